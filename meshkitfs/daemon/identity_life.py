"""What becomes of an identity while its home is open: renewal, new keys, and what is left of a rotation."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from meshkitfs.daemon.rotation_schedule import Schedule
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Holder, Identity, prepared, publish, renewal_due, settle, standing
from meshkitfs.metadata import HttpMetadata, Metadata
from meshkitfs.shares import ShareBook

__all__ = ["IdentityLife", "Rotated"]

_log = logging.getLogger(__name__)

# How often it is looked whether there is something to do, and how soon again where a store was away (s).
LOOK_S: Final = 60.0
AGAIN_S: Final = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Rotated:
    """What a rotation came to: ``resumed`` says that it went on with an earlier one.

    ``signed`` are the own shares that were signed anew, ``left`` those that were not, with the reason.
    """

    resumed: bool
    signed: tuple[str, ...]
    left: tuple[tuple[str, MeshkitError], ...]


class IdentityLife:
    """The changes of one open home's identity. One at a time."""

    def __init__(
        self,
        holder: Holder,
        unlocked: Callable[[], Identity],
        metadata: Metadata,
        book: ShareBook,
        contacts: ContactBook,
        schedule: Schedule,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._holder = holder
        self._unlocked = unlocked
        self._metadata = metadata
        self._book = book
        self._contacts = contacts
        self.schedule = schedule
        self._wall = wall
        self._turn = trio.Lock()
        # Tells the other devices of this identity what its keys are now; made by whoever knows of devices.
        self.announce: Callable[[], Awaitable[None]] | None = None

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        pause = 0.0
        while True:
            await trio.sleep(pause)
            try:
                await self._look(first=not pause)
                pause = LOOK_S
            except MeshkitError as error:
                pause = AGAIN_S
                if error.code == "identity_locked":
                    continue
                _log.warning("the identity could not be looked after: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("looking after the identity failed in a way nobody foresaw")
                pause = LOOK_S

    async def _look(self, *, first: bool) -> None:
        async with self._turn:
            now = int(self._wall())
            async with self._holder.changing():
                me = self._unlocked()
                if me.pending is None and not me.unfinished and self.schedule.due(me, now):
                    _log.info("the identity gets new keys, as it was told to")
                    await self._holder.replace(prepared(me, now, signing=True, encryption=True))
                elif me.pending is None and renewal_due(me, now):
                    await self._holder.replace(prepared(me, now))
            await self._settle()
            if first and await standing(self._holder.identity, self._metadata) == "behind":
                await publish(self._holder.identity, self._metadata)
            if self._holder.identity.unfinished:
                await self._sign_shares()

    async def rotate(
        self,
        *,
        signing: bool,
        encryption: bool,
        again: bool = False,
        prepare: Callable[[bytes], None] | None = None,
    ) -> Rotated:
        """Give the identity new keys, or only a new record, and sign its shares with them.

        Goes on with a rotation that is not finished instead, unless ``again``: then a new one begins though
        shares were left. Raises ``identity_handle_taken`` if another device was faster, and what the metadata
        home raises; calling it again then goes on. A new one's record is given to ``prepare`` (which may
        block) before it is kept or shown to anybody.
        """
        async with self._turn:
            # Keys that another device has sent must not come between: they would be written over.
            async with self._holder.changing():
                me = self._unlocked()
                resumed = me.pending is not None or (me.unfinished and not again)
                if not resumed:
                    new = prepared(me, int(self._wall()), signing=signing, encryption=encryption)
                    if prepare is not None and new.pending is not None:
                        await trio.to_thread.run_sync(prepare, new.pending.record)
                    await self._holder.replace(new)
            await self._settle()
            if not self._holder.identity.unfinished:
                return Rotated(resumed, (), ())
            signed, left = await self._sign_shares()
            return Rotated(resumed, tuple(signed), tuple(left))

    async def _settle(self) -> None:
        """Bring a pending record out, and tell the rest of the home of its keys."""
        await settle(self._holder, self._metadata)
        me = self._holder.identity
        self._contacts.own(me.signing.public)
        if isinstance(self._metadata, HttpMetadata):
            self._metadata.feed.mailbox = me.encryption.kid
        if self.announce is not None:
            await self.announce()

    async def _sign_shares(self) -> tuple[list[str], list[tuple[str, MeshkitError]]]:
        signed: list[str] = []
        left: list[tuple[str, MeshkitError]] = []
        chain = self._holder.identity.chain
        for share in list(self._book.shares.values()):
            if not share.row.mine:
                continue
            try:
                if await self._book.resign(share):
                    signed.append(share.name)
            except MeshkitError as error:
                _log.warning("share %r is not signed with the new key yet: %s", share, error.code)
                left.append((share.name, error))
        if not left:
            async with self._holder.changing():
                # Unless there are newer keys meanwhile, with which nothing is signed yet.
                if (me := self._holder.identity).chain == chain:
                    await self._holder.replace(dataclasses.replace(me, unfinished=False))
        return signed, left
