"""Telling the person at the desktop: a share arrived, access was refused, changes are stuck.

Notifications go over org.freedesktop.Notifications on the session's bus, if there is one. They show on locked
screens and stay in histories, so they name nobody and nothing unless that was chosen
(``notifications.details``). Nothing here delays an operation: what is to be told waits in a short queue, and
is thrown away when nobody takes it. Each notification has a connection of its own, so that none is left
open beside the keyring's.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from errno import EACCES
from typing import Any, Final

import trio

from meshkitfs.daemon import describe
from meshkitfs.daemon.config import NotificationsConfig
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import QUARANTINED
from meshkitfs.metadata import HttpMetadata
from meshkitfs.shares import AccessChanged, Event, Invitation

__all__ = ["DesktopNotifier", "Note", "send"]

_log = logging.getLogger(__name__)

WAITING: Final = 16
DEADLINE_S: Final = 5.0
# The same is told again after an hour at the earliest.
AGAIN_S: Final = 3600.0
_REMEMBERED: Final = 1000
# How often to look whether the mailbox may have changed, how soon to ask again, and by when in any case.
LOOK_S: Final = 2.0
ASK_LEAST_S: Final = 10.0
ASK_MOST_S: Final = 600.0
STUCK_LOOK_S: Final = 20.0
# What comes from others is shown no longer than this (characters).
_NAME_MAX: Final = 60
_BUS: Final = "DBUS_SESSION_BUS_ADDRESS"


@dataclass(frozen=True, slots=True)
class Note:
    """One notification. ``body`` is markup, in which names are escaped."""

    summary: str
    body: str


class DesktopNotifier:
    """Notifications of one open home."""

    def __init__(
        self, settings: NotificationsConfig, service: Service, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._settings = settings
        self._service = service
        self._address = environ.get(_BUS, "")
        self._send, self._receive = trio.open_memory_channel[Note](WAITING)
        self._told: dict[tuple[str, ...], float] = {}
        self._counts = {"sent": 0, "failed": 0, "dropped": 0}
        self._problem = ""
        # Of the mailbox: the letters seen, when it was asked for, and what the feed said of it then.
        self._seen: set[bytes] = set()
        self._asked, self._mark = float("-inf"), -1

    @property
    def active(self) -> bool:
        """Whether anything is told at all: it is wanted, and there is a session's bus."""
        return self._settings.enabled and bool(self._address)

    def status(self) -> dict[str, Any]:
        """Describe it for ``status``; ``problem`` says why the last one was not taken."""
        told = {"active": self.active, "details": self._settings.details, "problem": self._problem}
        return told | self._counts

    async def run(self) -> None:
        """Notify until cancelled."""
        if not self.active:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver)
            nursery.start_soon(self._repeat, self._look_for_letters, LOOK_S)
            nursery.start_soon(self._repeat, self._look_for_stuck, STUCK_LOOK_S)

    # -- what there is to tell -------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Take in what a share tells."""
        if isinstance(event, AccessChanged) and event.code:
            self.refused(event.share, MeshkitError(event.code))

    def refused(self, path: str, error: MeshkitError) -> None:
        """A program was refused ``path``, "SHARE/path/in/share". Locking is the person's own doing."""
        if error.errno != EACCES and error.code not in QUARANTINED:
            return
        if error.code != "identity_locked":
            share = path.partition("/")[0]
            where = f"{_shown(share)}: " if self._settings.details else ""
            body = f"{where}{html.escape(TABLE[error.code].sentence)} Run 'meshkitfs status' for more."
            self._tell(("refused", share, error.code), Note("Access to a share was refused", body))

    def _arrived(self, invitation: Invitation) -> None:
        summary, body = "A share was received", "Run 'meshkitfs inbox' to look at it."
        sender = invitation.letter.sender
        if self._settings.details and sender is not None:
            name = _shown(os.fsdecode(invitation.letter.name))
            body = f"{_shown(sender.handle)} shares '{name}' with you. {body}"
        self._tell(("arrived", invitation.letter_id.hex()), Note(summary, body))

    def _tell(self, key: tuple[str, ...], note: Note) -> None:
        """Queue a notification, unless the same was told within the last hour. Never waits."""
        if not self.active:
            return
        now = trio.current_time()
        if now - self._told.get(key, float("-inf")) < AGAIN_S:
            return
        if len(self._told) >= _REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told.pop(key, None)
        self._told[key] = now
        try:
            self._send.send_nowait(note)
        except trio.WouldBlock:
            self._counts["dropped"] += 1

    # -- looking ---------------------------------------------------------------------------------------

    async def _repeat(self, look: Callable[[], Awaitable[None]], pause: float) -> None:
        while True:
            try:
                if self._service.session.locked is None:
                    await look()
            except MeshkitError as error:
                _log.info("looking for what to tell must wait: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("looking for what to tell failed in a way nobody foresaw")
            await trio.sleep(pause)

    async def _look_for_letters(self) -> None:
        """Ask for the mailbox when it may have changed: seldom, and now and then whatever is said of it."""
        session, now = self._service.session, trio.current_time()
        metadata = session.metadata
        fed = isinstance(metadata, HttpMetadata) and metadata.feed.live
        mark = metadata.feed.mail if isinstance(metadata, HttpMetadata) and fed else metadata.tick()
        least = ASK_MOST_S if mark == self._mark else ASK_LEAST_S
        if now - self._asked < least:
            return
        self._asked, self._mark = now, mark
        invitations, _ = await session.book.inbox.waiting()
        for invitation in invitations:
            if not invitation.accepted and invitation.letter_id not in self._seen:
                self._arrived(invitation)
        # Only what is there now: a mailbox can be filled by strangers, and this must not grow with it.
        self._seen = {invitation.letter_id for invitation in invitations}

    async def _look_for_stuck(self) -> None:
        minutes = self._settings.stuck_minutes
        for item in describe.left(self._service.session):
            if (item["age_seconds"] or 0) >= 60 * minutes:
                which = f" of {_shown(item['share'])}" if self._settings.details else ""
                body = f"Something{which} has waited for {minutes} minutes. Run 'meshkitfs status' for more."
                self._tell(("stuck", item["share"]), Note("Changes are not stored yet", body))

    # -- telling it ------------------------------------------------------------------------------------

    async def _deliver(self) -> None:
        async for note in self._receive:
            try:
                with trio.fail_after(DEADLINE_S):
                    await send(self._address, note)
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            else:
                self._counts["sent"] += 1
                self._problem = ""

    def _failed(self, problem: str) -> None:
        self._counts["failed"] += 1
        if problem != self._problem:
            _log.info("no notification could be shown: %s", problem)
        self._problem = problem


async def send(address: str, note: Note) -> None:
    """Show ``note`` through the bus at ``address``. Raises whatever keeps it from being taken."""
    # Loaded here: most processes of this program never notify anybody.
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.trio import open_dbus_connection
    from jeepney.wrappers import unwrap_msg

    place = DBusAddress(
        "/org/freedesktop/Notifications",
        bus_name="org.freedesktop.Notifications",
        interface="org.freedesktop.Notifications",
    )
    hints = {"urgency": ("y", 1), "category": ("s", "transfer")}
    body: tuple[Any, ...] = ("meshkitfs", 0, "folder-remote", note.summary, note.body, [], hints, -1)
    async with await open_dbus_connection(address) as bus, bus.router() as router:
        answer = await router.send_and_get_reply(new_method_call(place, "Notify", "susssasa{sv}i", body))
    unwrap_msg(answer)


def _shown(name: str) -> str:
    """Return a name as it can be put into markup: short, on one line, and nothing but text."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return html.escape(plain if len(plain) <= _NAME_MAX else plain[:_NAME_MAX] + "…")
