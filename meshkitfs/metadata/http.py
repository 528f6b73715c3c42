"""The metadata home of another machine: a metadata service, spoken to over HTTP (docs/service.md).

Every request is signed with the identity's key. Answers are untrusted: see `meshkitfs.metadata._answers` for
what counts as one. The service's key of timestamps is remembered when it is first seen; another one later is
reported, and never taken instead.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from meshkitfs.core.cose import peek1
from meshkitfs.core.identity_record import valid_handle
from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Head
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _answers as answers
from meshkitfs.metadata._answers import ServiceInfo
from meshkitfs.metadata._api import AccessList, Publication, ShareState
from meshkitfs.metadata._feed import POLL_DEADLINE_S, Feed, News, read_news
from meshkitfs.metadata._wire import (
    b64,
    from_b64,
    read_blob,
    read_blobs,
    read_fields,
    read_share_state,
    write_publication,
)
from meshkitfs.net import Codes, Endpoint, Limits, Reply, Secret, SignatureAuth, Tls

__all__ = ["HttpMetadata", "KeyPin", "ServiceInfo", "look"]

T = TypeVar("T")

_CODES: Final = Codes("metadata_unavailable", "metadata_unavailable")
# The gate waits 10 s and a publication 30 s: within that, a lost answer is asked for again.
_LIMITS: Final = Limits(deadline_s=5.0, overall_s=9.0, tries=3, concurrency=8, cap=16 << 20)
_FEED_LIMITS: Final = Limits(deadline_s=POLL_DEADLINE_S, tries=1, concurrency=1, cap=1 << 20)
# What a newcomer shows, by what the service asks for.
_JOIN_HEADERS: Final = {"token": ("Authorization", "Bearer {}"), "invite": ("Meshkit-Invitation", "{}")}
_PUBLISH_DEADLINE_S: Final = 12.0
# More would not fit the deadline of anybody who asks, and a service must not fill the memory with them.
_HEADS_MAX: Final = 100_000
_PAGES_MAX: Final = 1000
_NOT_A_MEMBER: Final = 401


class KeyPin(Protocol):
    """Where this home remembers the key of a service's timestamps."""

    def get(self) -> bytes | None: ...

    def set(self, key: bytes) -> None:
        """Remember ``key``, durably."""


class HttpMetadata:
    """A `Metadata` at a URL. Belongs to one run of trio; `run` and `aclose` are called in it.

    ``signing`` gives the identity's signing key, or raises why it cannot be had. ``mailbox`` is the kid whose
    letters are watched for. ``join`` gives what a newcomer shows to be taken in. ``steady`` returns when no
    change of the identity's keys is under way. ``clock`` is UNIX seconds.
    Raises invalid_config for an unusable address or TLS file.
    """

    def __init__(
        self,
        url: str,
        signing: Callable[[], SigningKey],
        pin: KeyPin,
        *,
        mailbox: bytes | None = None,
        tls: Tls | None = None,
        uds: Path | None = None,
        join: Callable[[], Secret | None] | None = None,
        steady: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        auth = SignatureAuth(signing, clock)
        self._signing = signing
        self._steady = steady
        self._endpoint = Endpoint(url, _CODES, auth=auth, limits=_LIMITS, tls=tls, uds=uds)
        # A poll that hangs must neither be in the way of other requests nor make the service look dead.
        self._polling = Endpoint(url, _CODES, auth=auth, limits=_FEED_LIMITS, tls=tls, uds=uds)
        self._pin = pin
        self.join = join
        self._clock = clock
        self._closed = False
        self.feed = Feed(self._poll, mailbox)

    def __repr__(self) -> str:
        return f"<HttpMetadata {self.name}>"

    @property
    def name(self) -> str:
        """The service's address for people."""
        return self._endpoint.name

    # -- the service itself ------------------------------------------------------------------------------

    async def info(self) -> ServiceInfo:
        """What the service says of itself. Raises metadata_unavailable if it is no such service."""
        reply = await self._send("GET", "/v1/service")
        return answers.read(reply, answers.read_service, self.name)

    async def service_key(self) -> bytes:
        """The key of the service's timestamps: the one it had when this home first met it.

        Raises service_key_changed if it shows another one now.
        """
        info = await self.info()
        known = self._pin.get()
        if known is None:
            self._pin.set(info.key)
        elif known != info.key:
            raise MeshkitError(
                "service_key_changed", f"{self.name} shows {info.key.hex()[:16]}, known is {known.hex()[:16]}"
            )
        return info.key

    async def trust_key(self) -> bytes:
        """Take the key that the service shows now, because the person says so; returns it."""
        key = (await self.info()).key
        self._pin.set(key)
        return key

    async def run(self) -> None:
        """Follow the change feed until cancelled."""
        await self.feed.run()

    # -- shares ------------------------------------------------------------------------------------------

    async def share_state(self, share: bytes, kid: bytes) -> ShareState:
        """Capsules, roster, timestamp and head of one moment, in one request."""
        self.feed.asked(share)
        reply = await self._send("GET", f"/v1/shares/{share.hex()}/state", params={"kid": kid.hex()})
        return answers.read(reply, read_share_state, self.name)

    async def capsules(self, share: bytes, kid: bytes) -> list[bytes]:
        """All capsules of the share for this recipient, oldest first."""
        reply = await self._send("GET", f"/v1/shares/{share.hex()}/capsules", params={"kid": kid.hex()})
        return answers.read(reply, _one_of("capsules", read_blobs), self.name)

    async def roster(self, share: bytes) -> bytes | None:
        """The newest roster."""
        return await self._record(share, "roster")

    async def timestamp(self, share: bytes) -> bytes | None:
        """A timestamp over the newest roster, signed now and good for 300 s."""
        return await self._record(share, "timestamp")

    async def head(self, share: bytes) -> bytes | None:
        """The newest head."""
        return await self._record(share, "head")

    async def heads(self, share: bytes, after_ver: int, upto_ver: int) -> list[bytes]:
        """The heads with ``after_ver < ver <= upto_ver``, oldest first."""
        found: list[bytes] = []
        while True:
            reply = await self._send(
                "GET", f"/v1/shares/{share.hex()}/heads", params={"after": after_ver, "upto": upto_ver}
            )
            page, more = answers.read(reply, _read_heads, self.name)
            found += page
            if not more:
                return found
            last = _version(page[-1]) if page else after_ver
            # A page that does not lead on would be asked for again without end.
            if not after_ver < last <= upto_ver or len(found) > _HEADS_MAX:
                raise MeshkitError("metadata_unavailable", f"{self.name}: pages of heads that lead nowhere")
            after_ver = last

    async def retention(self, share: bytes) -> bytes | None:
        """The newest retention record."""
        return await self._record(share, "retention")

    async def retain(self, share: bytes, record: bytes) -> None:
        """Replace the retention record; see `Metadata.retain` for what is refused."""
        codes = {"head_conflict", "invalid_record", *answers.PUBLISHING}
        _not_empty(record)
        try:
            await self._send(
                "PUT", f"/v1/shares/{share.hex()}/retention", 204, codes, json={"record": b64(record)}
            )
        finally:
            self.feed.changed(share)

    async def publish(self, publication: Publication) -> None:
        """Apply a publication as one transaction; see `Metadata.publish` for what is refused.

        Repeated when its answer is lost: the service knows it again.
        """
        codes = {"head_conflict", "invalid_record", *answers.PUBLISHING}
        path = f"/v1/shares/{publication.share.hex()}/publications"
        _not_empty(publication.roster, publication.head, *(blob for _, _, blob in publication.capsules))
        try:
            await self._send(
                "POST", path, 204, codes, json=write_publication(publication),
                deadline_s=_PUBLISH_DEADLINE_S, idempotent=True,
            )  # fmt: skip
        finally:
            # Also when it failed: a lost answer does not tell whether it took place.
            self.feed.changed(publication.share)

    # -- letters -----------------------------------------------------------------------------------------

    async def post_letter(self, to_kid: bytes, blob: bytes) -> bytes:
        """Put a letter into a mailbox, at most once. Raises invalid_argument, no_space, quota_exceeded."""
        path = f"/v1/mailboxes/{to_kid.hex()}"
        reply = await self._send(
            "POST", path, 201, answers.PUBLISHING, json={"letter": b64(blob)}, idempotent=False
        )
        return answers.read(reply, _read_letter_id, self.name)

    async def letters(self, kid: bytes) -> list[tuple[bytes, bytes]]:
        """The letters in a mailbox of one's own as (id, blob), oldest first."""
        found: dict[bytes, bytes] = {}
        params: dict[str, str] = {}
        for _ in range(_PAGES_MAX):
            reply = await self._send("GET", f"/v1/mailboxes/{kid.hex()}", params=params)
            page, more = answers.read(reply, answers.read_letters, self.name)
            before = len(found)
            found.update(page)
            if not more:
                return list(found.items())
            if len(found) == before:
                break
            params = {"after": page[-1][0].hex()}
        raise MeshkitError("metadata_unavailable", f"{self.name}: pages of letters that lead nowhere")

    async def delete_letter(self, kid: bytes, letter_id: bytes) -> None:
        """Remove a letter from a mailbox."""
        await self._send("DELETE", f"/v1/mailboxes/{kid.hex()}/{letter_id.hex()}", 204)

    # -- access lists ------------------------------------------------------------------------------------

    async def access_list(self, list_id: bytes) -> AccessList | None:
        """The newest record of a vault or revocation list that this identity may read; None if there is none.

        None is an answer of the service itself; any other 404 is metadata_unavailable.
        """
        self.feed.asked(list_id)
        try:
            reply = await self._send("GET", f"/v1/vaults/{list_id.hex()}", codes={"path_not_found"})
        except MeshkitError as error:
            if error.code == "path_not_found":
                return None
            raise
        return answers.read(reply, lambda value: answers.read_access_list(value, list_id), self.name)

    async def put_access_list(
        self, list_id: bytes, expect: int, record: bytes, readers: Sequence[bytes]
    ) -> None:
        """Replace the record of a list; see `Metadata.put_access_list` for what is refused."""
        codes = {"head_conflict", "invalid_record", *answers.PUBLISHING}
        _not_empty(record)
        body = {"expect": expect, "record": b64(record), "members": [b64(kid) for kid in readers]}
        try:
            await self._send("PUT", f"/v1/vaults/{list_id.hex()}", 200, codes, json=body)
        finally:
            self.feed.changed(list_id)

    async def delete_access_list(self, list_id: bytes) -> None:
        """Remove one's own list."""
        try:
            await self._send("DELETE", f"/v1/vaults/{list_id.hex()}", 204, {"path_not_found"})
        except MeshkitError as error:
            if error.code != "path_not_found":
                raise
        finally:
            self.feed.changed(list_id)

    # -- the identity directory --------------------------------------------------------------------------

    async def publish_identity(self, handle: str, record: bytes) -> None:
        """Publish an identity record. Raises identity_handle_taken, invalid_record.

        The first one of a newcomer goes with what the service asks for; without it, metadata_unauthorized.
        """
        try:
            await self._publish_identity(handle, record, {})
        except MeshkitError as error:
            if error.code != "metadata_unauthorized" or self.join is None:
                raise
            # A member needs no introduction, and shows the secret to nobody.
            await self._publish_identity(handle, record, await self._introduction(self.join))

    async def _publish_identity(self, handle: str, record: bytes, headers: Mapping[str, str]) -> None:
        codes = {"identity_handle_taken", "invalid_record", *answers.PUBLISHING}
        _not_empty(record)
        await self._send(
            "POST", f"/v1/identities/{_handle(handle)}", 204, codes, json={"record": b64(record)},
            headers=headers, idempotent=True,
        )  # fmt: skip

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of records of a handle, oldest first."""
        reply = await self._send("GET", f"/v1/identities/{_handle(handle)}")
        return answers.read(reply, answers.read_chain, self.name)

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        """The chain in which a signing key of that kid occurs, oldest first."""
        reply = await self._send("GET", f"/v1/identity-keys/{kid.hex()}")
        return answers.read(reply, answers.read_chain, self.name)

    async def _introduction(self, join: Callable[[], Secret | None]) -> Mapping[str, str]:
        """The headers that let a newcomer in: the secret, where the service says that it wants one."""
        asked = (await self.info()).join
        secret = join() if asked in _JOIN_HEADERS else None
        if secret is None:
            return {}
        name, form = _JOIN_HEADERS[asked]
        return {name: form.format(secret.reveal())}

    async def invitation(self, lifetime_s: int) -> tuple[str, Secret] | None:
        """Have the service make an invitation for one newcomer: its id and code; None if it asks for none.

        Raises ``metadata_forbidden`` if this identity may not invite.
        """
        if (await self.info()).join != "invite":
            return None
        reply = await self._send(
            "POST", "/v1/invitations", 201, answers.PUBLISHING, json={"expires_in": lifetime_s},
            idempotent=False,
        )  # fmt: skip
        return answers.read(reply, answers.read_invitation, self.name)

    async def uninvite(self, invitation: str) -> bool:
        """Take an invitation of one's own back, by its id; False if somebody has used it."""
        try:
            await self._send("DELETE", f"/v1/invitations/{invitation}", 204, {"path_not_found"})
        except MeshkitError as error:
            if error.code != "path_not_found":
                raise
            return False
        return True

    # -- the rest ----------------------------------------------------------------------------------------

    def tick(self, share: bytes | None = None, also: Sequence[bytes] = ()) -> int:
        """A number that changes whenever something may have changed at the service; no request is made.

        While the feed is down it changes by itself (see `meshkitfs.metadata._feed`).
        """
        return self.feed.tick(share, also)

    def close(self) -> None:
        """Answer no more calls. The connections are closed by `aclose`."""
        self._closed = True

    async def aclose(self) -> None:
        """Close the connections. Harmless when repeated."""
        self.close()
        await self._endpoint.aclose()
        await self._polling.aclose()

    async def _record(self, share: bytes, which: str) -> bytes | None:
        reply = await self._send("GET", f"/v1/shares/{share.hex()}/{which}")
        return answers.read(reply, _one_of("record", read_blob), self.name)

    async def _poll(self, body: dict[str, Any]) -> News:
        reply = await self._send("POST", "/v1/changes", json=body, over=self._polling)
        return answers.read(reply, read_news, self.name)

    async def _send(
        self,
        method: str,
        path: str,
        wanted: int = 200,
        codes: set[str] | frozenset[str] = frozenset(),
        *,
        over: Endpoint | None = None,
        **options: Any,
    ) -> Reply:
        """Return the reply if it has the status that was ``wanted``; else raise what it means."""
        if self._closed:
            raise MeshkitError("metadata_unavailable", f"{self.name}: closed")
        endpoint, signer = over or self._endpoint, self._signing().kid
        accept = {wanted, *answers.ANSWERED}
        reply = await endpoint.request(method, path, accept=accept, last=answers.LAST, **options)
        if reply.status == _NOT_A_MEMBER and self._steady is not None:
            # The service knows the newest key only: a request may have met it just as that changed.
            await self._steady()
            if self._signing().kid != signer:
                reply = await endpoint.request(method, path, accept=accept, last=answers.LAST, **options)
        if reply.status != wanted:
            raise answers.refusal(reply, codes, self.name)
        return reply


async def look(url: str, tls: Tls | None = None, uds: Path | None = None) -> ServiceInfo:
    """Ask a service who it is, unsigned and once. Raises invalid_config, metadata_unavailable."""
    endpoint = Endpoint(url, _CODES, limits=Limits(deadline_s=5.0, tries=1), tls=tls, uds=uds)
    try:
        reply = await endpoint.request("GET", "/v1/service", accept={200})
        return answers.read(reply, answers.read_service, endpoint.name)
    finally:
        await endpoint.aclose()


def _not_empty(*records: bytes | None) -> None:
    # The one malformed record that the wire has no form for.
    if b"" in records:
        raise MeshkitError("invalid_record", "an empty record")


def _handle(handle: str) -> str:
    # Its alphabet needs no escaping in a path; anything else would be another path.
    if not valid_handle(handle):
        raise MeshkitError("invalid_argument", "that cannot be anybody's handle")
    return handle


def _one_of(field: str, reader: Callable[[Any, str], T]) -> Callable[[Any], T]:
    return lambda value: reader(read_fields(value, (field,), field)[field], field)


def _read_heads(value: Any) -> tuple[list[bytes], bool]:
    fields = read_fields(value, ("heads", "more"), "heads")
    if type(fields["more"]) is not bool:
        raise MeshkitError("invalid_argument", "heads that do not say whether there are more")
    return read_blobs(fields["heads"], "heads"), fields["more"]


def _version(head: bytes) -> int:
    """Return the version a head claims: to ask for the next page. Its readers verify it."""
    try:
        ver = peek1(head, Head.TYPE).get("ver")
    except MeshkitError:
        ver = None
    return ver if type(ver) is int else 0


def _read_letter_id(value: Any) -> bytes:
    letter_id = from_b64(read_fields(value, ("id",), "a letter's id")["id"], "id")
    if len(letter_id) != 16:
        raise MeshkitError("invalid_argument", "a letter's id is not 16 bytes")
    return letter_id
