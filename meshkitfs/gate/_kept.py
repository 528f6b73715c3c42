"""What proved a share last, kept in the encrypted state database for when nobody answers.

Only for grants that may be used without a fresh proof: those with an offline grace, and one's own. Kept are
the signed records as they came; they are verified anew each time they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import trio

from meshkitfs.core import cbor
from meshkitfs.core.cose import record_hash
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import ShareState
from meshkitfs.state import Mark, State

__all__ = ["Kept", "is_newest_seen"]

_log = logging.getLogger(__name__)

# A timestamp alone is noted down this often (s): each time would wear the disk for a minute more of grace.
STEP_S: Final = 30
_FIELDS: Final = frozenset(("v", "capsules", "roster", "timestamp", "head"))
_VERSION: Final = 1
# An owner's home has a capsule of its own for each epoch.
_LIMIT: Final = 64 << 20


class Kept:
    """The last proof of each share, by the ``ref`` of its row."""

    def __init__(self, state: State) -> None:
        self._state = state
        # What is in the database, with the time of its timestamp (UNIX seconds); None: nothing is.
        self._known: dict[bytes, tuple[ShareState, int] | None] = {}

    async def get(self, ref: bytes) -> ShareState | None:
        """Return what was kept; None if nothing was, or if it makes no sense."""
        if ref not in self._known:
            value = await trio.to_thread.run_sync(self._state.setting, _name(ref))
            found = _read(value) if isinstance(value, bytes) else None
            self._known[ref] = None if found is None else (found, 0)
        known = self._known[ref]
        return None if known is None else known[0]

    async def keep(self, ref: bytes, found: ShareState, vouched: int) -> None:
        """Note down what a walk has just proved, vouched for at that time (UNIX seconds).

        Durable when it returns, if there is room."""
        known = self._known.get(ref)
        if known is not None:
            old, iat = known
            same = (old.capsules, old.roster, old.head) == (found.capsules, found.roster, found.head)
            if same and vouched < iat + STEP_S:
                return
        await self._put(ref, found, vouched)

    async def go_on(
        self, ref: bytes, head: bytes | None, roster: bytes | None, capsules: Sequence[bytes]
    ) -> None:
        """Let these records be the newest of what is kept, if anything is."""
        found = await self.get(ref)
        if found is not None:
            iat = (self._known[ref] or (found, 0))[1]
            found = ShareState(
                (*found.capsules, *capsules), roster or found.roster, found.timestamp, head or found.head
            )
            await self._put(ref, found, iat)

    async def forget(self, ref: bytes) -> None:
        """Keep nothing any more of what was granted; harmless if nothing is."""
        if await self.get(ref) is not None:
            await self._put(ref, None, 0)

    async def _put(self, ref: bytes, found: ShareState | None, iat: int) -> None:
        """Never a reason to fail: without it, a share only closes sooner when nobody answers."""
        try:
            if found is None:
                await trio.to_thread.run_sync(self._state.drop_setting, _name(ref))
            else:
                await trio.to_thread.run_sync(self._state.set_setting, _name(ref), _written(found))
        except MeshkitError as error:
            _log.warning("the proof of a share cannot be kept: %s (%s)", error.code, error.detail)
        else:
            self._known[ref] = None if found is None else (found, iat)


def is_newest_seen(found: ShareState, mark: Mark, *, live: bool) -> bool:
    """Return whether these are the very roster and head that ``mark`` remembers as the newest ones.

    Of older ones this device knows that they are over. Snapshots (not ``live``) have no head.
    """
    if found.roster is None or record_hash(found.roster) != mark.roster_hash:
        return False
    return not live or (found.head is not None and record_hash(found.head) == mark.head_hash)


def _name(ref: bytes) -> str:
    return f"proof:{ref.hex()}"


def _written(found: ShareState) -> bytes:
    return cbor.encode(
        {
            "v": _VERSION,
            "capsules": list(found.capsules),
            "roster": found.roster,
            "timestamp": found.timestamp,
            "head": found.head,
        }
    )


def _read(value: bytes) -> ShareState | None:
    try:
        fields: Any = cbor.decode(value, limit=_LIMIT)
    except MeshkitError:
        return None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS or fields["v"] != _VERSION:
        return None
    return ShareState(tuple(fields["capsules"]), fields["roster"], fields["timestamp"], fields["head"])
