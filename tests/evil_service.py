"""A metadata service that does, on command, everything a service should not: a real server on a real socket.

    with evil_service(home) as evil:                # clients use evil.url; home is the metadata behind it
        evil.on("state", evil.html)                 # answers about shares' states are a page of HTML
        evil.on("changes", evil.silence)
        evil.on("state", evil.stale_roster)
        evil.heal()

It passes every request on to an honest service in front of which it stands, byte for byte and with the
authority that the client named, so signatures stay good. What was published through it is remembered, so that it
can be served again later. A fault is ``async (request, honest answer, stream) -> Answer``, or None if it has said
everything itself.

Words for ``on``: ``state``, ``heads``, ``publications``, ``retention``, ``mailboxes``, ``identities``,
``identity-keys``, ``changes``, ``service``; None for everything.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from urllib.parse import urlsplit

import evil
import h11
import trio
from evil import peek
from http_server import Answer, HttpServer, reset
from inner_service import InnerService

from meshkitfs.core.cose import record_hash
from meshkitfs.core.records import Head, Timestamp
from meshkitfs.metadata._wire import b64, from_b64, read_publication

HTML = b"<!DOCTYPE html><html><body>Welcome to the hotel. Please log in.</body></html>"


class EvilService(HttpServer):
    """``timestamp_key`` gives the service's signing key, for faults that vouch for something old.

    The honest service must answer to this one's authority: it is told `stand_before` it once both are there.
    """

    def __init__(self, timestamp_key=None, tls=None):
        self._upstream = ("", 0)
        self.timestamp_key = timestamp_key
        self.inner = None
        self.faults = {}
        self.rosters: dict[bytes, list[bytes]] = {}
        self.published_heads: dict[bytes, list[bytes]] = {}
        self.capsules: list[tuple[bytes, bytes, bytes]] = []  # share, kid, blob
        self.log: list[tuple[str, str]] = []
        self.told: list[bytes] = []  # shares that the honest service named in answers of the change feed
        super().__init__(self._answer, tls)

    def stand_before(self, honest_url):
        parts = urlsplit(honest_url)
        self._upstream = (parts.hostname, parts.port)

    @property
    def authority(self):
        return f"127.0.0.1:{self.port}"

    def on(self, what, fault, times=None, who=""):
        """Spoil answers of that kind from now on, for good or a number of times.

        ``who`` limits it to requests about one kid (in hex): the service is evil to one client only.
        """
        self.faults[what] = [fault, times, who]

    def heal(self):
        """Be honest from now on."""
        self.faults.clear()

    async def _answer(self, request, stream):
        self.log.append((request.method, request.path))
        honest = await self._forward(request)
        self._remember(request, honest)
        for what in (_word(request.path), None):
            if what in self.faults:
                fault, times, who = self.faults[what]
                if who not in request.target:
                    continue
                if times == 1:
                    del self.faults[what]
                elif times is not None:
                    self.faults[what][1] = times - 1
                return await fault(request, honest, stream)
        return honest

    async def _forward(self, request):
        async with await trio.open_tcp_stream(*self._upstream) as upstream:
            talk = h11.Connection(h11.CLIENT)
            kept = [(name, value) for name, value in request.headers if name != b"connection"]
            head = h11.Request(method=request.method, target=request.target, headers=kept)
            await upstream.send_all(talk.send(head))
            if request.body:
                await upstream.send_all(talk.send(h11.Data(data=request.body)))
            await upstream.send_all(talk.send(h11.EndOfMessage()) or b"")
            status, headers, body = 0, [], b""
            while True:
                event = talk.next_event()
                if event is h11.NEED_DATA:
                    talk.receive_data(await upstream.receive_some(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    headers = [(name.decode(), value.decode()) for name, value in event.headers]
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return Answer(502, b"the honest service broke off")
        kept = [(n, v) for n, v in headers if n.lower() in ("content-type", "retry-after")]
        return Answer(status, body, kept)

    def _remember(self, request, answer):
        if _word(request.path) == "publications" and answer.status == 204:
            share = bytes.fromhex(request.path.split("/")[3])
            published = read_publication(share, json.loads(request.body))
            for kept, blob in ((self.rosters, published.roster), (self.published_heads, published.head)):
                if blob is not None and blob not in kept.setdefault(share, []):
                    kept[share].append(blob)
            self.capsules += [(share, kid, blob) for kid, _, blob in published.capsules]
        if _word(request.path) == "changes" and answer.status == 200:
            self.told += [from_b64(share, "share") for share in json.loads(answer.body)["shares"]]

    # -- lies: answers in the right form ---------------------------------------------------------------

    def _stamp(self, share, roster):
        """A timestamp of now over whatever roster is wanted: the evil service has the service's key."""
        now = int(time.time())
        record = Timestamp(share=share, roster=record_hash(roster), iat=now, exp=now + 300)
        return record.sign(self.timestamp_key())

    def changed(self, **fields):
        """Answers with these fields replaced (each a function of the share's id, or a value)."""

        async def fault(request, honest, stream):
            value = json.loads(honest.body)
            share = bytes.fromhex(request.path.split("/")[3])
            value |= {name: item(share) if callable(item) else item for name, item in fields.items()}
            return Answer(honest.status, json.dumps(value).encode(), honest.headers)

        return fault

    def saying(self, **fields):
        """Answers with these fields replaced, of routes that are about no share."""

        async def fault(request, honest, stream):
            value = json.loads(honest.body) | fields
            return Answer(honest.status, json.dumps(value).encode(), honest.headers)

        return fault

    async def mute(self, request, honest, stream):
        """Does what it is asked to do, and breaks off without saying so; reading goes on."""
        if request.method == "GET":
            return honest
        reset(stream)
        return None

    def roster_of(self, back):
        """The roster that many publications before the newest, vouched for as if it were in force."""

        def old(share):
            return self.rosters[share][-1 - back]

        return self.changed(
            roster=lambda share: b64(old(share)), timestamp=lambda share: b64(self._stamp(share, old(share)))
        )

    def head_of(self, back):
        """The head that many publications before the newest, as the newest."""
        return self.changed(head=lambda share: b64(self.published_heads[share][-1 - back]))

    def heads_for(self, by_kid):
        """Another newest head for each reader: ``by_kid`` maps the kid that asks to the head it is shown."""

        async def fault(request, honest, stream):
            shown = next((head for kid, head in by_kid.items() if kid.hex() in request.target), None)
            return await self.changed(**({} if shown is None else {"head": b64(shown)}))(
                request, honest, stream
            )

        return fault

    def capsules_of(self, want):
        """The capsules for which ``want(share, kid)`` holds, in place of the reader's own."""
        return self.changed(capsules=[b64(blob) for share, kid, blob in self.capsules if want(share, kid)])

    def chain_of(self, record):
        """A directory that answers with this record, whoever is asked for."""

        async def fault(request, honest, stream):
            if request.method != "GET":
                return honest
            return Answer(200, json.dumps({"chain": [b64(record)]}).encode(), honest.headers)

        return fault

    async def no_news(self, request, honest, stream):
        """A feed that answers, late as it should, that nothing has changed."""
        value = json.loads(honest.body) | {"shares": [], "mailbox": False}
        if json.loads(request.body)["wait"]:
            await trio.sleep(1)
        return Answer(200, json.dumps(value).encode(), honest.headers)

    # -- no answers at all ------------------------------------------------------------------------------

    async def html(self, request, honest, stream):
        """200, and a page."""
        return Answer(200, HTML, [("Content-Type", "text/html")])

    async def silence(self, request, honest, stream):
        """Takes the request and never says anything."""
        await trio.sleep_forever()

    async def slow_loris(self, request, honest, stream):
        """A right answer, one byte now and then: each in time, the whole never."""
        for byte in honest.to_bytes():
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.05)

    async def endless_head(self, request, honest, stream):
        """Headers without end."""
        await stream.send_all(b"HTTP/1.1 200 OK\r\n")
        while True:
            await stream.send_all(b"X-More: and more\r\n" * 100)

    async def endless_body(self, request, honest, stream):
        """A body without end, in chunks."""
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await stream.send_all(b"1000\r\n" + b" " * 4096 + b"\r\n")

    async def promised_body(self, request, honest, stream):
        """A Content-Length that no memory holds."""
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n{")
        await trio.sleep_forever()

    async def truncated(self, request, honest, stream):
        """Ends in the middle of the body, in an orderly way."""
        data = honest.to_bytes()
        await stream.send_all(data[: len(data) - max(1, len(honest.body) // 2)])

    async def too_short(self, request, honest, stream):
        """A Content-Length that leaves off the end of the body."""
        return Answer(
            honest.status,
            honest.body,
            [*honest.headers, ("Content-Length", str(max(0, len(honest.body) - 3)))],
        )

    async def too_long(self, request, honest, stream):
        """A Content-Length larger than the body that comes."""
        longer = Answer(
            honest.status, honest.body, [*honest.headers, ("Content-Length", str(len(honest.body) + 9))]
        )
        await stream.send_all(longer.to_bytes())

    async def reset(self, request, honest, stream):
        """Breaks the connection after the request was done."""
        reset(stream)

    async def reset_in_body(self, request, honest, stream):
        """Breaks the connection in the middle of the answer."""
        data = honest.to_bytes()
        await stream.send_all(data[: len(data) - max(1, len(honest.body) // 2)])
        reset(stream)

    async def garbage(self, request, honest, stream):
        """No HTTP at all."""
        await stream.send_all(bytes(range(256)) * 16)

    async def compressed(self, request, honest, stream):
        """Says that the body is compressed, which nobody asked for: it could unpack to anything."""
        return Answer(honest.status, honest.body, [*honest.headers, ("Content-Encoding", "gzip")])

    def redirect(self, location, status=302):
        """Sends elsewhere."""

        async def fault(request, honest, stream):
            return Answer(status, b"", [("Location", location)])

        return fault

    def status(self, number, body=b"{}"):
        """Answers with that status, whatever happened."""

        async def fault(request, honest, stream):
            return Answer(number, body)

        return fault


@contextlib.contextmanager
def evil_service(home, **options):
    """The real service over ``home`` (an EmbeddedMetadata) as ``inner``, with an `EvilService` before it."""
    with (
        EvilService(lambda: evil.service_key(home.path)) as between,
        InnerService(home, names={between.authority}, **options) as honest,
    ):
        between.stand_before(honest.url)
        between.inner = honest
        yield between


NO_ANSWERS = {
    "a page of HTML": lambda evil: evil.html,
    "silence": lambda evil: evil.silence,
    "slow loris": lambda evil: evil.slow_loris,
    "endless head": lambda evil: evil.endless_head,
    "endless body": lambda evil: evil.endless_body,
    "a promised terabyte": lambda evil: evil.promised_body,
    "truncated": lambda evil: evil.truncated,
    "content-length too short": lambda evil: evil.too_short,
    "content-length too long": lambda evil: evil.too_long,
    "reset": lambda evil: evil.reset,
    "reset in the body": lambda evil: evil.reset_in_body,
    "garbage": lambda evil: evil.garbage,
    "compressed": lambda evil: evil.compressed,
    "redirect to file:": lambda evil: evil.redirect("file:///etc/passwd"),
    "redirect to itself": lambda evil: evil.redirect(evil.url, 307),
    "redirect to https": lambda evil: evil.redirect("https://example.invalid/", 308),
    "200 with an error": lambda evil: evil.status(
        200, b'{"error": {"code": "head_conflict", "message": "", "detail": ""}}'
    ),
    "204": lambda evil: evil.status(204, b""),
    "500": lambda evil: evil.status(500),
    "404": lambda evil: evil.status(404),
    "401": lambda evil: evil.status(
        401, b'{"error": {"code": "metadata_unauthorized", "message": "", "detail": ""}}'
    ),
}
"""Everything that is no answer, by what it does; each makes a fault from the service."""


def forked(genuine, signer, **changes):
    """A head that follows the one ``genuine`` follows, and is another: what a writer who cheats signs."""
    return replace(peek(Head, genuine), **changes).sign(signer)


def _word(path):
    parts = path.strip("/").split("/")
    if len(parts) > 3 and parts[1] == "shares":
        return parts[3]
    return parts[1] if len(parts) > 1 else ""
