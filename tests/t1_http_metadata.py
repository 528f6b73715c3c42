"""The HTTP metadata client alone: what it believes, what it repeats, and when its number moves."""

from __future__ import annotations

import json
import os
import time

import pytest
import trio
from devices import World
from evil_service import evil_service
from homes import wait_until
from http_server import Answer, HttpServer, reset, unused_port
from service_home import MemoryPin, believe_silence
from t1_metadata_contract import Share

from meshkitfs.core.identity_record import first_record
from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.metadata import EmbeddedMetadata, HttpMetadata, Publication, look
from meshkitfs.metadata import _feed as feed
from meshkitfs.metadata import _wire as wire
from meshkitfs.metadata import http as client_module
from meshkitfs.net import Limits, Secret

ID, KID = bytes(range(16)), bytes(range(16, 32))
RECORD = b"a record"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A try may take a second, nothing is tried more than twice, and never waited for."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("meshkitfs.net._endpoint.backoff", lambda failures: 0.0)
    monkeypatch.setattr(client_module, "_LIMITS", Limits(deadline_s=1.0, overall_s=9.0, tries=2, cap=1 << 20))
    yield
    monkeypatch.undo()


class Script:
    """A server that gives one answer to everything (or what a function of the request gives)."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []

    async def __call__(self, request, stream):
        self.requests.append(request)
        return self.answer(request) if callable(self.answer) else self.answer


def told(code, status, **more):
    body = {"error": {"code": code, "message": "words", "detail": "why", **more}}
    return Answer(status, json.dumps(body).encode(), [("Content-Type", "application/json")])


def said(value, status=200):
    return Answer(status, json.dumps(value).encode(), [("Content-Type", "application/json")])


SCRIPT = Script(None)


@pytest.fixture(scope="module", autouse=True)
def place(quick):
    """One server and one loop for everything that only differs in what is answered."""
    with World(rate=1.0) as world, HttpServer(SCRIPT) as server:
        PLACE.update(world=world, url=server.url, home=client(server.url))
        yield
        world.run(PLACE["home"].aclose)


PLACE = {}


def client(url, **options):
    return HttpMetadata(url, lambda: SIGNING, MemoryPin(), **options)


def asking(answer, work, **options):
    """Run ``work(client)`` against a server that answers so; returns (result or error, requests)."""
    SCRIPT.answer, SCRIPT.requests = answer, []

    async def main():
        home = client(PLACE["url"], **options) if options else PLACE["home"]
        try:
            return await work(home)
        except MeshkitError as error:
            return error
        finally:
            if options:
                await home.aclose()

    return PLACE["world"].run(main), SCRIPT.requests


SIGNING = SigningKey.generate()
PUBLICATION = Publication(ID, expect_head=b"", head=b"h", head_ver=1, head_epoch=1)
CALLS = {
    "share_state": lambda home: home.share_state(ID, KID),
    "capsules": lambda home: home.capsules(ID, KID),
    "roster": lambda home: home.roster(ID),
    "timestamp": lambda home: home.timestamp(ID),
    "head": lambda home: home.head(ID),
    "heads": lambda home: home.heads(ID, 0, 9),
    "retention": lambda home: home.retention(ID),
    "retain": lambda home: home.retain(ID, RECORD),
    "publish": lambda home: home.publish(PUBLICATION),
    "post_letter": lambda home: home.post_letter(KID, b"x"),
    "letters": lambda home: home.letters(KID),
    "delete_letter": lambda home: home.delete_letter(KID, ID),
    "publish_identity": lambda home: home.publish_identity("bob", RECORD),
    "identity": lambda home: home.identity("bob"),
    "identity_by_kid": lambda home: home.identity_by_kid(KID),
    "info": lambda home: home.info(),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS)
STATUSES = {
    "invalid_argument": 400,
    "metadata_unauthorized": 401,
    "metadata_forbidden": 403,
    "quota_exceeded": 403,
    "head_conflict": 409,
    "identity_handle_taken": 409,
    "invalid_record": 422,
    "rate_limited": 429,
    "no_space": 507,
}
ANYWHERE = {"metadata_unauthorized", "metadata_forbidden", "rate_limited"}
STORING = {"invalid_argument", "no_space", "quota_exceeded"}
SENSIBLE = {
    "publish": STORING | {"head_conflict", "invalid_record"},
    "retain": STORING | {"head_conflict", "invalid_record"},
    "publish_identity": STORING | {"identity_handle_taken", "invalid_record"},
    "post_letter": STORING,
}


# == refusals ============================================================================================


@pytest.mark.parametrize("code", STATUSES)
@EVERY_CALL
def test_a_refusal_counts_where_it_makes_sense(call, code):
    error, _ = asking(told(code, STATUSES[code]), CALLS[call])
    sensible = code in ANYWHERE | SENSIBLE.get(call, set())
    assert error.code == (code if sensible else "metadata_unavailable")
    assert "why" in error.detail


@pytest.mark.parametrize("code", sorted(TABLE.keys() - STATUSES.keys()))
def test_no_other_code_is_taken_over(code):
    for status in (400, 403, 404, 409):
        error, _ = asking(told(code, status), CALLS["publish"])
        assert error.code == "metadata_unavailable"


def test_a_refusal_with_another_status_is_none():
    for code in STATUSES:
        for status in {200, 204, *STATUSES.values()} - {STATUSES[code], 413, 429}:
            error, _ = asking(told(code, status), CALLS["publish"])
            if status != 204:  # which has no body, and means that it took place
                assert error.code == "metadata_unavailable", (code, status)


ODD_REFUSALS = [
    b"",
    b"<html>conflict</html>",
    b"null",
    b"[]",
    b'{"error": null}',
    b'{"error": "head_conflict"}',
    b'{"error": ["head_conflict"]}',
    b'{"error": {"code": "head_conflict"}}',
    b'{"error": {"code": ["head_conflict"], "message": "m", "detail": ""}}',
    b'{"error": {"code": "head_conflict", "message": 1, "detail": ""}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", ODD_REFUSALS, ids=range(len(ODD_REFUSALS)))
def test_a_refusal_of_another_shape_is_unavailable(body):
    error, _ = asking(Answer(409, body), CALLS["publish"])
    assert error.code == "metadata_unavailable"


def test_what_a_service_says_is_shown_short_and_printable():
    nasty = "\x1b[2J\x00" + "x" * 10_000 + "\u202e"
    error, _ = asking(told("head_conflict", 409, detail=nasty), CALLS["publish"])
    assert error.code == "head_conflict"
    assert error.detail.isprintable()
    assert len(error.detail) <= 200


# == answers =============================================================================================

RIGHT = {
    "share_state": {"capsules": ["YQ"], "roster": None, "timestamp": None, "head": "YQ"},
    "capsules": {"capsules": ["YQ"]},
    "roster": {"record": None},
    "timestamp": {"record": "YQ"},
    "head": {"record": "YQ"},
    "heads": {"heads": ["YQ"], "more": False},
    "retention": {"record": None},
    "letters": {"letters": [{"id": wire.b64(ID), "blob": "YQ"}], "more": False},
    "identity": {"chain": ["YQ"]},
    "identity_by_kid": {"chain": []},
    "post_letter": {"id": wire.b64(ID)},
    "info": {"service": "meshkitfs", "version": 1, "key": wire.b64(bytes(32)), "time": 1, "join": "open"},
}
READING = pytest.mark.parametrize("call", RIGHT)


@READING
def test_the_right_answers_are_read(call):
    result, requests = asking(said(RIGHT[call], 201 if call == "post_letter" else 200), CALLS[call])
    assert not isinstance(result, MeshkitError), result
    assert len(requests) == 1
    assert b"keyid" in dict(requests[0].headers)[b"signature-input"]


def spoiled(value):
    """Answers that are almost right."""
    yield [value]
    yield {}
    yield None
    if "service" not in value:  # which may say more of itself
        yield value | {"more than that": 1}
    for name in value:
        yield {key: item for key, item in value.items() if key != name}
        for wrong in (5, "Y", "YR", "YQ==", "ü", [5], {"a": 1}, ["Y"], True, 1e999):
            if type(wrong) is not type(value[name]) or name not in ("more", "time", "version"):
                yield value | {name: wrong}


@READING
def test_answers_of_another_shape_are_unavailable(call):
    status = 201 if call == "post_letter" else 200
    tried = 0
    for value in spoiled(RIGHT[call]):
        result, _ = asking(said(value, status), CALLS[call])
        assert getattr(result, "code", result) == "metadata_unavailable", value
        tried += 1
    assert tried > 10


PAGES = {
    "html": b"<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>",
    "nothing": b"",
    "text": b"OK",
    "half": b'{"record": "YQ',
    "nested": b'{"record": ' + b"[" * 50_000,
    "not utf-8": b'{"record": "\xff"}',
}


@pytest.mark.parametrize("page", PAGES)
@EVERY_CALL
def test_a_page_is_no_answer(call, page):
    result, _ = asking(Answer(200, PAGES[page], [("Content-Type", "text/html")]), CALLS[call])
    assert result.code == "metadata_unavailable"


@EVERY_CALL
@pytest.mark.parametrize("status", [202, 206, 301, 302, 307, 308, 404, 418, 500, 502, 503])
def test_a_status_that_means_nothing_here_is_unavailable(call, status):
    answer = Answer(status, b"{}", [("Location", "file:///etc/passwd")])
    result, _ = asking(answer, CALLS[call])
    assert result.code == "metadata_unavailable"


# == pages of answers ====================================================================================


def test_pages_of_heads_that_lead_nowhere_end():
    share = Share.new()
    first = share.head()
    for heads in ([], [first], [b"no head"]):
        endless = said({"heads": [wire.b64(blob) for blob in heads], "more": True})
        result, requests = asking(endless, CALLS["heads"])
        assert result.code == "metadata_unavailable"
        assert len(requests) <= 2


def test_pages_of_letters_that_lead_nowhere_end():
    for letters in ([], [{"id": wire.b64(ID), "blob": "YQ"}]):
        result, requests = asking(said({"letters": letters, "more": True}), CALLS["letters"])
        assert result.code == "metadata_unavailable"
        assert len(requests) <= 2


# == what is repeated ====================================================================================


def losing(times):
    """A server that answers the first ``times`` requests with a broken connection."""

    class Losing(Script):
        async def __call__(self, request, stream):
            self.requests.append(request)
            if len(self.requests) <= times:
                reset(stream)
                return None
            return Answer(204)

    return Losing(None)


@pytest.mark.parametrize("call", ["publish", "retain", "publish_identity", "delete_letter"])
def test_a_lost_answer_is_asked_for_again(call):
    script = losing(1)
    with HttpServer(script) as server:
        trio.run(_call, server.url, CALLS[call])
    first, second = script.requests
    assert first.body == second.body
    # Each try is signed anew: a nonce counts once.
    assert dict(first.headers)[b"signature-input"] != dict(second.headers)[b"signature-input"]


def test_a_letter_is_never_sent_twice():
    script = losing(1)
    with HttpServer(script) as server, pytest.raises(MeshkitError) as caught:
        trio.run(_call, server.url, CALLS["post_letter"])
    assert caught.value.code == "metadata_unavailable"
    assert len(script.requests) == 1


async def _call(url, work):
    home = HttpMetadata(url, lambda: SIGNING, MemoryPin())
    try:
        return await work(home)
    finally:
        await home.aclose()


def test_nobody_there():
    with pytest.raises(MeshkitError) as caught:
        trio.run(_call, f"http://127.0.0.1:{unused_port()}", CALLS["head"])
    assert caught.value.code == "metadata_unavailable"


def test_a_closed_client_asks_nobody():
    script = Script(said({"record": None}))

    async def main(url):
        home = HttpMetadata(url, lambda: SIGNING, MemoryPin())
        await home.head(ID)
        home.close()
        with pytest.raises(MeshkitError) as caught:
            await home.head(ID)
        assert caught.value.code == "metadata_unavailable"
        await home.aclose()
        await home.aclose()

    with HttpServer(script) as server:
        trio.run(main, server.url)
    assert len(script.requests) == 1


@pytest.mark.parametrize("handle", ["..", "a/b", "", "A", "bob?x=1", "é", "a" * 65])
def test_what_cannot_be_a_handle_is_not_asked_about(handle):
    script = Script(said({"chain": []}))
    with HttpServer(script) as server, pytest.raises(MeshkitError) as caught:
        trio.run(_call, server.url, lambda home: home.identity(handle))
    assert caught.value.code == "invalid_argument"
    assert script.requests == []


# == the service's key, and joining ======================================================================


def info_of(key, join="open"):
    return said(
        {"service": "meshkitfs", "version": 1, "key": wire.b64(key), "time": time.time(), "join": join}
    )


def test_the_key_of_the_service_is_taken_once():
    script, pin = Script(info_of(b"1" * 32)), MemoryPin()

    async def main(url):
        home = HttpMetadata(url, lambda: SIGNING, pin)
        assert await home.service_key() == await home.service_key() == b"1" * 32
        script.answer = info_of(b"2" * 32)
        for _ in range(2):
            with pytest.raises(MeshkitError) as caught:
                await home.service_key()
            assert caught.value.code == "service_key_changed"
        assert pin.key == b"1" * 32
        assert await home.trust_key() == b"2" * 32
        assert await home.service_key() == b"2" * 32
        await home.aclose()

    with HttpServer(script) as server:
        trio.run(main, server.url)


@pytest.mark.parametrize("join", ["open", "token", "invite"])
def test_the_secret_goes_where_the_service_wants_it_and_nowhere_else(join):
    def answer(request):
        if request.path == "/v1/service":
            return info_of(bytes(32), join)
        if request.method == "GET":
            return said({"chain": []})
        shown = [name for name in (b"authorization", b"meshkit-invitation") if name in dict(request.headers)]
        return Answer(204) if shown or join == "open" else told("metadata_unauthorized", 401)

    async def work(home):
        await home.publish_identity("bob", RECORD)
        await home.identity("bob")

    result, requests = asking(answer, work, join=lambda: Secret("geheim"))
    assert result is None
    seen = [
        (request.method, request.path, [name for name, value in request.headers if b"geheim" in value])
        for request in requests
    ]
    wanted = {"open": [], "token": [b"authorization"], "invite": [b"meshkit-invitation"]}[join]
    assert [what for method, _, what in seen if method == "POST"] == (
        [[]] if join == "open" else [[], wanted]
    )
    assert not any(what for method, _, what in seen if method != "POST")
    assert not any(b"geheim" in request.body or "geheim" in request.target for request in requests)


def test_looking_at_a_service_needs_no_key():
    script = Script(info_of(b"1" * 32, "invite"))
    with HttpServer(script) as server:
        info = trio.run(look, server.url)
    assert (info.key, info.join) == (b"1" * 32, "invite")
    assert b"signature" not in dict(script.requests[0].headers)


# == the number that moves ===============================================================================


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Line:
    """The other end of the feed: what it is asked, and what it will say next."""

    def __init__(self):
        self.asked = []
        self.answers, self._next = trio.open_memory_channel(100)[::-1]

    async def __call__(self, body):
        self.asked.append(body)
        answer = await self.answers.receive()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def say(self, shares=(), mailbox=False, cursor="c"):
        self._next.send_nowait(feed.News(cursor, tuple(shares), mailbox))

    def fail(self, code="metadata_unavailable"):
        self._next.send_nowait(MeshkitError(code, "away"))


@pytest.fixture
def followed():
    """A feed that runs, with the line it listens to and the clock it trusts by; time passes by hand."""
    with World() as world:

        async def begin():
            line, clock = Line(), Clock()
            made = feed.Feed(line, KID, clock)
            world.nursery.start_soon(made.run)
            return made, line, clock

        made, line, clock = world.run(begin)

        def settle(seconds=0.0):
            """Let the feed do what it does next; ``seconds`` pass for it and for its trust."""
            clock.now += seconds
            world.pass_time(max(seconds, 20.0))

        yield made, line, clock, settle, world


def test_silence_is_believed_for_a_while_only(followed):
    made, line, clock, settle, world = followed
    other = bytes(16)
    made.asked(ID)
    assert not made.live
    line_say(world, line)
    settle()
    assert made.live
    assert line.asked[0] == {"shares": [wire.b64(ID)], "mailbox": wire.b64(KID), "after": None, "wait": 0}
    settle()
    assert line.asked[1]["after"] == "c"
    assert line.asked[1]["wait"] == feed.WAIT_S
    before = made.tick(ID), made.tick(other), made.tick()
    assert before == (made.tick(ID), made.tick(other), made.tick())
    line_say(world, line, [ID], cursor=7)
    settle()
    assert made.tick(ID) != before[0]
    assert made.tick() != before[2]
    assert made.tick(other) == before[1]
    # Nothing is heard any more.
    still = made.tick(ID)
    clock.now += feed.TRUST_S - 1
    assert made.tick(ID) == still
    clock.now += 2
    assert not made.live
    ticks = []
    for _ in range(int(10 * feed.STEP_S)):
        clock.now += 1
        ticks.append(made.tick(ID))
    assert len(set(ticks)) == 11  # one of them because the share was not asked about for a minute
    # And heard again, from where it stopped.
    line_say(world, line, cursor=8)
    settle()
    assert line.asked[2]["after"] == 7
    assert not made.live  # that was asked for long ago
    line_say(world, line, cursor=9)
    settle()
    assert made.live
    assert made.tick(ID) == made.tick(ID)


def line_say(world, line, *args, **options):
    async def say():
        line.say(*args, **options)

    world.run(say)


def test_trust_counts_from_the_question_not_from_the_answer(followed):
    """An answer that was held back for long says nothing about the time since it was asked for."""
    made, line, clock, settle, world = followed
    line_say(world, line)
    settle()
    settle()
    assert made.live
    clock.now += feed.TRUST_S + 1
    assert not made.live
    line_say(world, line)
    settle()
    assert not made.live


def test_what_the_feed_conceals_is_asked_about_all_the_same(followed):
    made, line, clock, settle, world = followed
    made.asked(ID)
    line_say(world, line)
    settle()
    moves = 0
    last = made.tick(ID)
    for _ in range(int(3 * feed.RECHECK_S) + 2):
        clock.now += 1
        line_say(world, line)
        settle()
        if made.tick(ID) != last:
            moves, last = moves + 1, made.tick(ID)
    assert made.live
    assert moves in (2, 3)
    made.asked(ID)
    for _ in range(int(feed.RECHECK_S) - 1):
        clock.now += 1
        line_say(world, line)
        settle()
        assert made.tick(ID) == last


def test_a_share_that_is_asked_about_goes_along_at_once(followed):
    made, line, _, settle, world = followed
    line_say(world, line)
    settle()
    settle()
    assert line.asked[-1]["shares"] == []

    async def ask():
        made.asked(ID)

    world.run(ask)
    settle()
    assert line.asked[-1]["shares"] == [wire.b64(ID)]
    assert line.asked[-1]["after"] == "c"


def test_more_shares_than_a_poll_holds(followed, monkeypatch):
    """Those that do not go along are asked about as often as without a feed."""
    made, line, clock, settle, world = followed
    monkeypatch.setattr(feed, "SHARES_MAX", 2)
    for number in range(4):
        clock.now += 0.1
        made.asked(bytes([number]) * 16)
    line_say(world, line)
    settle()
    settle()
    assert line.asked[-1]["shares"] == [wire.b64(bytes([number]) * 16) for number in (2, 3)]
    before = [made.tick(bytes([number]) * 16) for number in range(4)]
    clock.now += feed.STEP_S + 1
    after = [made.tick(bytes([number]) * 16) for number in range(4)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True, True]


def test_nobody_elses_shares_move_anything(followed):
    made, line, _, settle, world = followed
    line_say(world, line)
    settle()
    before = made.tick()
    line_say(world, line, [os.urandom(16)])
    settle()
    assert made.tick() == before


def test_mail(followed):
    made, line, _, settle, world = followed
    line_say(world, line)
    settle()
    before = made.mail
    line_say(world, line, mailbox=True)
    settle()
    assert made.mail == before + 1


def test_a_feed_that_fails_is_asked_again_later_and_later(followed, monkeypatch):
    made, line, _, settle, world = followed
    pauses = []
    monkeypatch.setattr(feed, "backoff", lambda failures: pauses.append(failures) or 1.0)
    for code in ("metadata_unavailable", "metadata_unauthorized", "metadata_unavailable"):

        async def fail(code=code):
            line.fail(code)

        world.run(fail)
        settle()
        assert made.problem == code
    assert pauses == [1, 2, 3]
    line_say(world, line)
    settle()
    assert made.problem == ""
    assert len(line.asked) >= 4


def test_a_service_that_answers_at_once_with_nothing_is_not_flooded(followed, monkeypatch):
    _, line, _, settle, world = followed
    pauses = []
    monkeypatch.setattr(feed, "backoff", lambda failures: pauses.append(failures) or 1.0)
    for _ in range(5):
        line_say(world, line)
        settle()
    assert pauses == [1, 2, 3, 4]


def test_a_defect_in_the_feed_takes_nothing_down(followed):
    made, line, _, settle, world = followed

    async def fail():
        line._next.send_nowait(RuntimeError("a defect"))

    world.run(fail)
    settle()
    assert made.problem == "internal_error"
    line_say(world, line)
    settle()
    assert made.live
    assert "a defect" in world.expect_complaints()[0]
    PLACE["world"].expect_complaints()  # which listens to the same log


# == the number, at a real server ========================================================================


@pytest.fixture
def served(tmp_path):
    """A client that follows a server, a share of its own there, and somebody else at the same store."""
    with World(rate=1.0) as world:
        behind = EmbeddedMetadata.create(tmp_path / "metadata.db")
        with evil_service(behind) as server:
            share = Share.new()
            home = HttpMetadata(server.url, lambda: share.owner, MemoryPin())

            async def begin():
                record = first_record(
                    "bob", share.owner, EncryptionKey.generate().public, int(time.time()), 1000
                )
                await home.publish_identity("bob", record)
                await behind.publish(share.publication(roster=share.roster(), head=share.head()))
                world.nursery.start_soon(follow)
                await home.feed.heard.wait()

            scope = trio.CancelScope()

            async def follow():
                with scope:
                    await home.run()

            world.run(begin)

            async def end():
                scope.cancel()
                await trio.lowlevel.checkpoint()
                await home.aclose()

            yield world, server, home, behind, share
            world.run(end)
        behind.close()


def test_looking_at_the_number_asks_nobody(served):
    world, server, home, _, share = served
    world.run(home.share_state, share.share, KID)
    before = len(server.log)

    async def look_often():
        return {home.tick(share.share) for _ in range(10_000)}

    assert len(world.run(look_often)) == 1
    assert len(server.log) <= before + 1  # a poll of the feed at most


def test_a_change_is_told_by_the_feed(served, monkeypatch):
    """That no pause on its way is long is in t3_http_home."""
    believe_silence(monkeypatch)
    world, _, home, behind, share = served
    world.run(home.share_state, share.share, KID)
    for _ in range(3):
        before = home.tick(share.share)
        share.seq, share.ver = share.seq or 1, share.ver or 1
        share.prev = share.prev or wire_hash(world, behind, share)
        started = time.monotonic()
        world.run(behind.publish, share.publication(head=share.head()))
        share.ver += 1
        share.prev = wire_hash(world, behind, share)
        wait_until(lambda before=before: home.tick(share.share) != before, "the change")
        print(f"told {time.monotonic() - started:.3f} s after the publication began")


def wire_hash(world, behind, share):
    from meshkitfs.core.cose import record_hash

    return record_hash(world.run(behind.head, share.share))
