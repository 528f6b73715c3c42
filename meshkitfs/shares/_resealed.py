"""What `_reencrypt` has done, remembered by this device so that it can be interrupted."""

from __future__ import annotations

import trio

from meshkitfs.state import State

__all__ = ["Done"]

# Enough of a digest to know it by: a chance hit among a million objects has odds of one in 10**13.
_SHORT = 8


class Done:
    """The manifests of one share known to have no older key below them, for one epoch."""

    def __init__(self, state: State, share: bytes, epoch: int) -> None:
        self._state = state
        self._job = f"reencrypt:{share.hex()}"
        # Longer than the items that stand for manifests, so that it is none of them.
        mark = b"epoch" + epoch.to_bytes(8, "big")
        self._known = state.job_items(self._job)
        if mark not in self._known:
            # What an earlier epoch protected may be known to whoever was shut out since.
            state.end_job(self._job)
            state.add_job_items(self._job, [mark])
            self._known = {mark}
        self._unsaved: list[bytes] = []

    def __contains__(self, ref: bytes) -> bool:
        return ref[:_SHORT] in self._known

    def add(self, ref: bytes) -> None:
        """Note the manifest that ``ref`` names."""
        if ref not in self:
            self._known.add(ref[:_SHORT])
            self._unsaved.append(ref[:_SHORT])

    async def save(self) -> None:
        """Make what was noted durable."""
        if self._unsaved:
            items, self._unsaved = self._unsaved, []
            await trio.to_thread.run_sync(self._state.add_job_items, self._job, items)
