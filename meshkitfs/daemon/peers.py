"""What the other devices of this identity remember: shares, grants, contacts, vaults and tokens appear here.

Each device posts what it remembers to the identity's mailbox (`remembering`). This one compares what a device
posted with what it had posted before, and does here what was changed there. What a device has *seen* (marks
of rosters and heads, quarantines) is its own, and is not taken from anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import trio

from meshkitfs.core import cbor
from meshkitfs.core.membership import Revocations, VaultRecord
from meshkitfs.daemon.devices import Devices
from meshkitfs.daemon.remembering import MEMORY_MOST, Remembering, memories
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.metadata import Metadata
from meshkitfs.shares import ShareBook
from meshkitfs.state import State, check_carried

__all__ = ["Peers"]

_log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
# How often the mailboxes are looked into whatever the change feed says.
LEAST_S: Final = 60.0
_BASE: Final = "peer:"
# The tables that are taken in, and the place of what says that a row is revoked, which it is for good.
_TAKEN: Final[dict[str, int | None]] = {
    "members": 16, "contacts": None, "own_lists": None, "tokens": None, "issued": 6,
}  # fmt: skip

_Row = list[Any]


class Peers:
    """Hears the other devices of one open home, and tells them."""

    def __init__(
        self,
        state: State,
        metadata: Metadata,
        unlocked: Callable[[], Identity],
        book: ShareBook,
        contacts: ContactBook,
        devices: Devices,
        remembering: Remembering,
    ) -> None:
        self._state = state
        self._metadata = metadata
        self._unlocked = unlocked
        self._book = book
        self._contacts = contacts
        self._devices = devices
        self._remembering = remembering
        self._turn = trio.Lock()

    @property
    def any(self) -> bool:
        """Whether this identity has other devices."""
        return bool(self._devices.others())

    async def tell(self) -> None:
        """Post what this device remembers, if there are others. Raises what the metadata home raises."""
        if self.any:
            await self._remembering.post()

    async def run(self) -> None:
        """Hear of new keys, and of what the others did, until cancelled."""
        seen, looked = -1, -LEAST_S
        while True:
            await trio.sleep(LOOK_S)
            if self._devices.kid is None:
                continue
            try:
                tick = self._metadata.tick()
                if tick == seen and trio.current_time() < looked + LEAST_S:
                    continue
                looked = trio.current_time()
                await self._devices.look()
                await self.hear()
                seen = tick
            except MeshkitError as error:
                if error.code not in ("identity_locked", "device_revoked"):
                    _log.info("the other devices are not heard now: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("hearing the other devices failed in a way nobody foresaw")

    async def hear(self) -> bool:
        """Take in what the others have posted; say whether there was something new."""
        others = self._devices.others()
        if not others:
            return False
        async with self._turn:
            news = False
            for kid, (_, after) in (await memories(self._unlocked(), self._metadata)).items():
                if kid not in others:
                    continue
                try:
                    news |= await self._take(kid, after)
                except MeshkitError as error:
                    if error.code != "invalid_record":
                        raise
                    _log.warning("what another device remembers cannot be taken: %s", error.detail)
            return news

    async def _take(self, kid: bytes, after: dict[str, Any]) -> bool:
        check_carried(after)
        name = _BASE + kid.hex()
        kept = self._state.setting(name)
        before = cbor.decode(kept, limit=MEMORY_MOST) if isinstance(kept, bytes) else {}
        if before == after:
            return False
        mine = await trio.to_thread.run_sync(self._state.carried.give)
        rows, gone = _changes(before, after, mine)
        await trio.to_thread.run_sync(self._state.carried.merge, rows, gone)
        for row in rows["contacts"]:
            self._contacts.reread(row[0])
        await self._take_shares(_by_key(before.get("shares", [])), _by_key(after["shares"]))
        # Last: a death before that does the same again.
        await trio.to_thread.run_sync(self._state.set_setting, name, cbor.encode(after))
        return True

    async def _take_shares(self, before: dict[Any, _Row], after: dict[Any, _Row]) -> None:
        """Add shares that were made or accepted there, name and remove them as it was done there."""
        here = {share.row.ref: share for share in self._book.shares.values()}
        for ref, row in after.items():
            share, old = here.get(ref), before.get(ref)
            if share is None and old is None:
                await self._add(row)
            elif share is not None and old is not None and old[3] != row[3] == self._free(row[3]):
                await self._book.rename(share, row[3])
        for ref in before.keys() - after.keys():
            share = here.get(ref)
            # Of one that has unsent changes nothing is thrown away because of what another device did.
            if share is not None and not share.dirty:
                await self._book.remove(share)

    async def _add(self, row: _Row) -> None:
        name = self._free(row[3])
        named = {"shares": [[*row[:3], name, *row[4:]]]}
        await trio.to_thread.run_sync(self._state.carried.merge, named, {})
        added = next(found for found in self._state.shares() if found.ref == row[0])
        self._book.add_known(added)

    def _free(self, name: bytes) -> bytes:
        """Return ``name``, or with a number behind it if a share here has that name."""
        candidate, number = name, 1
        while candidate in self._book.shares:
            number += 1
            mark = f" {number}".encode()
            candidate = name[: 255 - len(mark)] + mark
        return candidate


def _by_key(rows: list[_Row]) -> dict[Any, _Row]:
    return {row[0]: row for row in rows}


def _changes(
    before: dict[str, Any], after: dict[str, Any], mine: dict[str, list[_Row]]
) -> tuple[dict[str, list[_Row]], dict[str, list[Any]]]:
    """Return which rows are to be put in here, and the keys of those to be taken out, by table."""
    rows: dict[str, list[_Row]] = {}
    gone: dict[str, list[Any]] = {}
    for table, revoked in _TAKEN.items():
        old, new, here = (_by_key(rows_of.get(table, [])) for rows_of in (before, after, mine))
        rows[table] = [
            _sticky(row, here.get(key), revoked)
            for key, row in new.items()
            if old.get(key) != row and here.get(key) != row and _newer(table, row, here.get(key))
        ]
        gone[table] = [key for key, row in old.items() if key not in new and here.get(key) == row]
    return rows, gone


def _sticky(row: _Row, here: _Row | None, revoked: int | None) -> _Row:
    if revoked is None or here is None or row[revoked]:
        return row
    return [*row[:revoked], here[revoked], *row[revoked + 1 :]]


def _newer(table: str, row: _Row, here: _Row | None) -> bool:
    """Whether ``row`` may take the place of ``here``: no older list, and nobody who is blocked is let in."""
    if here is None:
        return True
    if table == "own_lists":
        return _seq(row[2]) > _seq(here[2])
    return table != "contacts" or '"blocked"' not in here[1]


def _seq(record: bytes) -> int:
    for kind in (VaultRecord, Revocations):
        try:
            return kind.parse_owned(record).seq
        except MeshkitError:
            continue
    raise MeshkitError("invalid_record", "a list of no known kind")
