"""The versions a share has had: the chain of its heads, and which of them its owner has given up.

Only the newest head carries a signature that counts now. Each record names the hash of the one before it, so
a chain that arrives at the newest is the writers' own, whoever may write today.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from meshkitfs.core.moments import parse_moment, version_label
from meshkitfs.core.records import Head, Retention
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant, HeadView
from meshkitfs.shares._services import Services
from meshkitfs.state import ShareRow

__all__ = ["History", "Version"]

ASK_DEADLINE_S = 30
# Heads asked for at once.
_STEP = 1000


@dataclass(frozen=True, slots=True)
class Version:
    """One published version: its root manifest's digest and ``epoch``, when (UNIX seconds), by whom (kid)."""

    number: int
    epoch: int
    root: bytes
    time: int
    writer: bytes
    hash: bytes

    @property
    def label(self) -> str:
        """How it is called in ``.snapshots``: ``2026-11-25T035310Z-v12``."""
        return version_label(self.number, self.time)

    @property
    def head(self) -> HeadView:
        """The head that published it, as the gate shows the newest one."""
        return HeadView(self.number, self.epoch, self.root, self.hash, self.writer, self.time)


class History:
    """What is known of a share's versions. `refresh` brings it up to the grant's head."""

    def __init__(self, services: Services, row: ShareRow) -> None:
        self._services = services
        self._row = row
        # Oldest first, without gaps in the chain; the newest is the head of the last refresh.
        self._versions: list[Version] = []
        self.retention: Retention | None = None
        self._refreshing = trio.Lock()

    async def refresh(self, grant: Grant) -> None:
        """Learn what was published, and given up, up to ``grant``'s head.

        Raises ``metadata_unavailable``, ``head_fork`` (the chain does not lead to that head),
        ``invalid_record``.
        """
        async with self._refreshing:
            await self._read_chain(grant)
            await self._read_retention(grant)

    async def _read_chain(self, grant: Grant) -> None:
        head = grant.head
        known = self._versions
        if known and known[-1].hash == head.hash:
            return
        if self._row.grant != "live" or not head.version:
            self._versions = []
            return
        found: list[Version] = []
        expected, upto = head.hash, head.version
        while expected:
            blobs = await self._heads(max(0, upto - _STEP), upto)
            for blob in reversed(blobs):
                if known and known[-1].hash == expected:
                    break
                record = Head.parse_known(blob, expected)
                found.append(
                    Version(record.ver, record.epoch, record.root, record.ts, record.writer, expected)
                )
                expected = record.prev
            if known and known[-1].hash == expected:
                self._versions = known + found[::-1]
                return
            upto = max(0, upto - _STEP)
            if not upto:
                break
        if not found:
            raise MeshkitError("head_fork", "the versions kept do not lead to the newest one")
        self._versions = found[::-1]

    async def _heads(self, after: int, upto: int) -> list[bytes]:
        try:
            with trio.fail_after(ASK_DEADLINE_S):
                return await self._services.metadata.heads(self._row.share, after, upto)
        except trio.TooSlowError:
            raise MeshkitError("metadata_unavailable", "no answer in time") from None

    async def _read_retention(self, grant: Grant) -> None:
        try:
            with trio.fail_after(ASK_DEADLINE_S):
                blob = await self._services.metadata.retention(self._row.share)
        except trio.TooSlowError:
            raise MeshkitError("metadata_unavailable", "no answer in time") from None
        if blob is None:
            return
        # Of a key that was replaced this is not taken: what it gives up may be deleted for good.
        record = Retention.parse(blob, grant.owner_now)
        if record.share != self._row.share:
            raise MeshkitError("invalid_record", "the retention record of another share")
        # An older one only shows versions whose blocks may be gone; but what was seen stays seen.
        if self.retention is None or record.seq > self.retention.seq:
            self.retention = record

    @property
    def versions(self) -> list[Version]:
        """Every version that was ever published, oldest first."""
        return list(self._versions)

    @property
    def kept(self) -> list[Version]:
        """The versions that have not been given up, oldest first; the newest is always one of them."""
        return [version for version in self._versions if self.given_up(version) is None]

    def at(self, when: str, now: int) -> Version:
        """Return the kept version that ``when`` means at ``now`` (UNIX seconds); see `parse_moment`.

        Of a time, that is the one with the highest number of those published not after it. Raises
        ``version_not_found``, ``invalid_argument``.
        """
        moment = parse_moment(when, now)
        for version in reversed(self.kept):
            if moment.number is None:
                meant = version.time <= moment.until
            else:
                meant = version.number == moment.number and moment.label in ("", version.label)
            if meant:
                return version
        raise MeshkitError("version_not_found", when)

    def given_up(self, version: Version) -> int | None:
        """Return when a version was given up (UNIX seconds), None if it is kept."""
        if self.retention is None or version.number == self._versions[-1].number:
            return None
        for first, last, when in self.retention.ranges():
            if first <= version.number <= last:
                return when
        return None
