"""What is told at the desktop, how often, and that nothing ever waits for a desktop. On a real bus."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from notified import Desktop
from secret_service import private_session

from meshkitfs.daemon import notifying
from meshkitfs.daemon.config import NotificationsConfig
from meshkitfs.daemon.notifying import DesktopNotifier, Note
from meshkitfs.errors import MeshkitError

REFUSED = MeshkitError("share_revoked", "canary-detail")


def notifier(address="unix:path=/nowhere", *, service=None, **settings):
    return DesktopNotifier(
        NotificationsConfig(**settings), service, {"DBUS_SESSION_BUS_ADDRESS": address} if address else {}
    )


def told(one):
    """Take everything out of its queue."""
    found = []
    while True:
        try:
            found.append(one._receive.receive_nowait())
        except trio.WouldBlock:
            return found


def run(work):
    async def main():
        with trio.fail_after(30):
            await work()

    trio.run(main)


def test_without_a_bus_or_a_wish_there_is_nothing():
    async def work():
        for quiet in (notifier(""), notifier(enabled=False)):
            quiet.refused("share/file", REFUSED)
            assert told(quiet) == []
            assert not quiet.status()["active"]
            await quiet.run()  # returns

    run(work)


def test_the_same_is_told_once_an_hour():
    async def work():
        one = notifier()
        for _ in range(3):
            one.refused("first/a", REFUSED)
            one.refused("first/b", REFUSED)
        one.refused("first/a", MeshkitError("share_expired"))
        one.refused("second", REFUSED)
        assert len(told(one)) == 3
        clock.jump(notifying.AGAIN_S - 1)
        one.refused("first/a", REFUSED)
        assert told(one) == []
        clock.jump(1)
        one.refused("first/a", REFUSED)
        assert len(told(one)) == 1

    clock = trio.testing.MockClock()
    trio.run(work, clock=clock)


def test_only_refusals_are_told():
    async def work():
        one = notifier()
        for code in ("identity_locked", "block_unavailable", "path_not_found", "no_space"):
            one.refused("first", MeshkitError(code))
        assert told(one) == []
        one.refused("first", MeshkitError("head_rollback"))  # no EACCES, and worth more than most
        assert len(told(one)) == 1

    run(work)


def letter(name, sender):
    return SimpleNamespace(
        letter_id=name,
        accepted=False,
        letter=SimpleNamespace(name=name, sender=SimpleNamespace(handle=sender)),
    )


def test_names_only_by_choice_and_never_as_markup():
    hostile = b'<a href="http://evil.example">x</a>\n&\xff' + b"z" * 200

    async def work():
        for details in (False, True):
            one = notifier(details=details)
            one.refused("canary-share/canary-file", REFUSED)
            one._arrived(letter(hostile, "mallory<b>"))
            refused, arrived = told(one)
            everything = refused.summary + refused.body + arrived.summary + arrived.body
            assert ("canary-share" in refused.body) is details
            assert "canary-file" not in everything
            assert "canary-detail" not in everything
            assert ("mallory&lt;b&gt;" in arrived.body) is details
            assert not set("<>\n\udcff") & set(everything)
            assert len(arrived.body) < 300

    run(work)


def test_the_queue_is_bounded_and_nobody_waits():
    async def work():
        one = notifier()
        for number in range(notifying._REMEMBERED + 50):
            one.refused(f"share-{number}", REFUSED)
        assert len(told(one)) == notifying.WAITING
        assert one.status()["dropped"] == notifying._REMEMBERED + 50 - notifying.WAITING
        assert len(one._told) == notifying._REMEMBERED

    run(work)


class Mailbox:
    """A home of which only the mailbox and the unsent changes are asked for."""

    def __init__(self):
        self.letters, self.asked, self.moved = [], 0, 0
        self.locked = None
        self.metadata = SimpleNamespace(tick=lambda: self.moved)
        self.session = self
        self.book = SimpleNamespace(inbox=SimpleNamespace(waiting=self.waiting))

    async def waiting(self):
        self.asked += 1
        return list(self.letters), 0


def test_letters_are_told_once_and_the_mailbox_is_asked_for_seldom():
    async def work():
        home = Mailbox()
        one = notifier(service=home)
        home.letters = [letter(b"waited since before", "bob")]
        await one._look_for_letters()
        assert len(told(one)) == 1
        for _ in range(50):
            clock.jump(notifying.LOOK_S)
            await one._look_for_letters()
        assert home.asked == 1
        home.moved += 1
        home.letters.append(letter(b"new", "bob"))
        await one._look_for_letters()
        assert (home.asked, len(told(one))) == (2, 1)
        clock.jump(notifying.ASK_MOST_S)
        await one._look_for_letters()
        assert (home.asked, told(one)) == (3, [])

    clock = trio.testing.MockClock()
    trio.run(work, clock=clock)


def test_what_is_stuck_is_told(monkeypatch):
    async def work():
        one = notifier(service=Mailbox(), stuck_minutes=2)
        for age, expected in ((None, 0), (119, 0), (120, 1), (5000, 0)):
            left = [{"share": "canary-share", "age_seconds": age}]
            monkeypatch.setattr(notifying.describe, "left", lambda session, left=left: left)
            await one._look_for_stuck()
            found = told(one)
            assert len(found) == expected
            assert all("canary-share" not in note.body for note in found)

    run(work)


def test_a_desktop_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(notifying, "DEADLINE_S", 0.2)

    async def work():
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "bus"))
            silent.listen()
            one = notifier(f"unix:path={tmp_path}/bus", service=Mailbox())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.run)
                one.refused("first", REFUSED)
                one.refused("second", REFUSED)
                while one.status()["failed"] < 2:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert one.status()["problem"].startswith("TooSlowError")

    run(work)


def test_a_bus_without_a_desktop_and_then_with_one():
    with private_session(keyring=False) as session:
        address = session.env["DBUS_SESSION_BUS_ADDRESS"]
        with pytest.raises(Exception, match="ServiceUnknown"):
            trio.run(notifying.send, address, Note("one", "body"))
        with Desktop(address) as desktop:
            trio.run(notifying.send, address, Note("two", "body"))
            assert desktop.next(20) == ("two", "body")
