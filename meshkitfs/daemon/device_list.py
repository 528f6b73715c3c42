"""The list of devices as this home keeps it: the newest, and the one that goes with a record still to come.

A list and the identity record that it belongs to are kept in two files, one after the other. What is to be
the list is noted down before the record is, so that after a failure or a death between them nobody takes the
list of before for the list of that record, and gives a device that was taken off it keys again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from meshkitfs.core import cbor
from meshkitfs.core.cose import record_hash
from meshkitfs.core.device import DeviceEntry, DeviceList
from meshkitfs.state import State

__all__ = ["Entries", "KeptList"]

_LIST: Final = "device_list"
_NEXT: Final = "device_next"

Entries = tuple[DeviceEntry, ...]


class KeptList:
    """The device list of one open home."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._list: DeviceList | None = None
        self._read = False

    def get(self) -> DeviceList | None:
        """Return the newest list; None while there is none."""
        if not self._read:
            blob = self._state.setting(_LIST)
            # Its signature was verified before it was kept, and the state is sealed.
            self._list = DeviceList.peek(blob) if blob is not None else None
            self._read = True
        return self._list

    def signed(self) -> bytes:
        """Return the newest list as it was signed; only where there is one."""
        blob: bytes = self._state.setting(_LIST)
        return blob

    def keep(self, blob: bytes, parsed: DeviceList) -> None:
        """Make ``blob`` the newest list, durably; nothing is expected any more. Blocks."""
        self._state.set_setting(_LIST, blob)
        self._state.drop_setting(_NEXT)
        self._list, self._read = parsed, True

    def expect(self, at: bytes, entries: Entries) -> None:
        """Note down, durably, that the record whose hash is ``at`` brings the list ``entries``. Blocks."""
        value = {"at": at, "devices": [dataclasses.asdict(entry) for entry in entries]}
        self._state.set_setting(_NEXT, cbor.encode(value))

    def due(self, chain: Sequence[bytes]) -> Entries:
        """Return who is on the list of the last record of ``chain``, as far as this home knows; () if not.

        That is what was expected with that record, or with one before it that is younger than the newest
        list; else the newest list goes on.
        """
        known = self.get()
        blob = self._state.setting(_NEXT)
        wanted = cbor.decode(blob) if isinstance(blob, bytes) else {}
        younger = chain[known.seq + 1 :] if known is not None else chain
        if any(record_hash(record) == wanted.get("at") for record in younger):
            return tuple(DeviceEntry(**item) for item in wanted["devices"])
        return known.entries if known is not None else ()
