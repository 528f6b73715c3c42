"""The last step of the walk: the newest head, held against what this device has seen of the share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from meshkitfs.core.cose import peek1, record_hash
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Capsule, Head, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._grant import HeadView
from meshkitfs.metadata import Metadata, ShareState
from meshkitfs.state import Clock, Mark, Quarantine, ShareRow, State

__all__ = ["METADATA_DEADLINE_S", "History"]

METADATA_DEADLINE_S: Final = 10


class History:
    """Checks heads; a share whose history does not fit is quarantined in ``state``."""

    def __init__(self, metadata: Callable[[], Metadata], state: State, clock: Clock) -> None:
        self._metadata = metadata
        self._state = state
        self._clock = clock

    def check_quarantine(self, share: bytes) -> None:
        """Raise why ``share`` is quarantined, if it is."""
        kept = self._state.quarantine(share)
        if kept is not None:
            raise MeshkitError(kept.code, kept.detail)

    async def head(
        self, found: ShareState, row: ShareRow, capsule: Capsule, roster: Roster, mark: Mark
    ) -> HeadView:
        """Return the verified newest head of the share, or what a snapshot's capsule names instead.

        Raises MeshkitError ``freshness_unproven``, ``invalid_record``, and ``head_rollback`` or
        ``head_fork``, which quarantine the share.
        """
        if capsule.grant == "snapshot":
            return HeadView(capsule.ver, capsule.epoch, capsule.root)
        if found.head is None:
            if mark.head_version:
                raise await self._quarantined(
                    row, "head_rollback", f"version {mark.head_version} was seen, none is offered"
                )
            # A share has had a head since it was created.
            raise MeshkitError("freshness_unproven", "the metadata store has no head for this share")
        writers = {kid_of(public): public for public in roster.writers}
        head = Head.parse(found.head, writers)
        if (head.share, head.oid) != (row.share, row.oid) or head.epoch != roster.epoch:
            raise MeshkitError("invalid_record", "the head offered belongs to another share, object or epoch")
        view = HeadView(head.ver, head.epoch, head.root, record_hash(found.head), head.writer, head.ts)
        if head.ver < max(mark.head_version, roster.minver, capsule.minver):
            raise await self._quarantined(
                row, "head_rollback", f"version {head.ver} offered, {mark.head_version} was seen"
            )
        if head.ver == mark.head_version and view.hash != mark.head_hash:
            raise await self._quarantined(row, "head_fork", f"two different versions {head.ver}")
        if mark.head_version and head.ver > mark.head_version:
            await self._chained(row, head, mark)
        return view

    async def _chained(self, row: ShareRow, head: Head, mark: Mark) -> None:
        """Check that ``head`` descends from the head this device has seen, record by record.

        Only the newest head needs a signature check: each record names the hash of the one before it, so
        a chain that arrives at the remembered hash is the writers' own.
        """
        between: list[bytes] = []
        if head.ver > mark.head_version + 1:
            try:
                with trio.fail_after(METADATA_DEADLINE_S):
                    between = await self._metadata().heads(row.share, mark.head_version, head.ver - 1)
            except trio.TooSlowError:
                raise MeshkitError(
                    "freshness_unproven", "no answer from the metadata store in time"
                ) from None
            except MeshkitError as error:
                raise MeshkitError("freshness_unproven", error.detail or error.code) from error
        expected: object = head.prev
        for blob in reversed(between):
            if record_hash(blob) != expected:
                break
            expected = peek1(blob, Head.TYPE).get("prev")
        if expected != mark.head_hash:
            raise await self._quarantined(
                row, "head_fork", f"version {head.ver} does not descend from version {mark.head_version}"
            )

    async def _quarantined(self, row: ShareRow, code: str, detail: str) -> MeshkitError:
        await trio.to_thread.run_sync(
            self._state.set_quarantine, Quarantine(row.share, code, detail, self._clock.now())
        )
        return MeshkitError(code, detail)
