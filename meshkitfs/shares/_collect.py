"""Collecting garbage: deleting the blocks that only given-up versions of a share consist of.

A byte store may be used by several homes and people, so nothing is ever deleted for not being known. What is
deleted was named by a version of this very share that its owner gave up, and is needed by nothing that is
kept; both are found by walking. What is kept is walked first and strictly: if any of it cannot be read,
nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from meshkitfs.core.capsule import Capsule
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._asking import in_time
from meshkitfs.shares._history import Version
from meshkitfs.shares._prune import require_owner
from meshkitfs.shares._share import Share
from meshkitfs.shares._walk import Piece, Walk, root_piece

__all__ = ["Collected", "collect"]

Progress = Callable[[dict[str, Any]], None]

DELETE_DEADLINE_S: Final = 300
_BATCH: Final = 256


@dataclass(slots=True)
class Collected:
    """What was, or would be, deleted: ``versions`` given up and ``blocks`` of ``size`` bytes that they had.

    ``kept`` versions stay, and so do ``waiting`` ones that were given up less than the grace time ago.
    ``protected`` are granted snapshots that stand on given-up versions. ``damaged`` manifests of given-up
    versions could not be read: what only they name stays in the store.
    """

    versions: int = 0
    blocks: int = 0
    size: int = 0
    kept: int = 0
    waiting: int = 0
    protected: int = 0
    damaged: int = 0


async def collect(share: Share, grace: int, *, dry_run: bool, progress: Progress) -> Collected:
    """Delete what only versions need that were given up at least ``grace`` seconds ago.

    With ``dry_run`` only find out what that is. Raises ``not_owner``; ``gc_unsafe`` when it cannot be known
    what is needed; whatever keeps something that must be kept from being read. Nothing was deleted then.
    Errors while deleting leave the rest for the next time.
    """
    require_owner(share)
    return await _Collector(share, grace, progress).run(dry_run)


@dataclass(slots=True)
class _Garbage:
    """What given-up versions consist of, and how it was found."""

    depths: dict[bytes, int] = field(default_factory=dict)
    parents: dict[bytes, bytes] = field(default_factory=dict)
    snapshots: dict[bytes, Piece] = field(default_factory=dict)


class _Collector:
    def __init__(self, share: Share, grace: int, progress: Progress) -> None:
        self._share = share
        self._grace = grace
        self._progress = progress
        self._services = share.services
        self._store = share.services.reader.store
        self._done = Collected()
        self._keep = self._walk(visit=self._count)
        self._garbage = _Garbage()

    def _walk(self, **options: Any) -> Walk:
        return Walk(self._lease, self._services.reader.verified, **options)

    async def _lease(self) -> Grant:
        return await self._share.use("read")

    def _count(self, _: Piece) -> None:
        count = len(self._keep.seen)
        if count % 1000 == 0:
            self._progress({"stage": "looking at what is kept", "done": count, "unit": "blocks"})

    async def run(self, dry_run: bool) -> Collected:
        grant = await self._share.use("reshare", current=True)
        history = self._share.history
        await history.refresh(grant)
        versions = history.versions
        self._check_history(versions)
        snapshots = self._snapshots(grant)
        now = self._services.wall()
        due = [v for v in versions if (at := history.given_up(v)) is not None and at + self._grace <= now]
        due_numbers = {version.number for version in due}
        kept = [version for version in versions if version.number not in due_numbers]
        there = await self._there([version.root for version in versions])
        # Given up and collected before, with a shorter grace.
        kept = [v for v in kept if v.root in there or history.given_up(v) is None]
        due = [version for version in due if version.root in there]
        self._done.kept = len(history.kept)
        self._done.waiting = len(kept) - len(history.kept)
        await self._keep.run([*map(self._root, kept), *await self._local()])
        await self._find(due, snapshots)
        await self._protect(snapshots)
        await self._measure(due)
        if not dry_run and self._garbage.depths:
            await self._look_again(versions[-1])
            await self._measure(due)
            await self._delete()
        return self._done

    def _root(self, version: Version) -> Piece:
        return root_piece(self._share.row.oid, version.root, version.epoch, version.number)

    # -- what is needed ----------------------------------------------------------------------------

    def _check_history(self, versions: list[Version]) -> None:
        """Raise unless the metadata store shows the whole history, up to what the owner has seen of it.

        A kept version that is hidden would not be protected. The oldest and the newest are what a chain of
        hashes does not prove by itself.
        """
        if not versions or versions[0].number != 1:
            raise MeshkitError("gc_unsafe", "the metadata store does not show the first version")
        retention = self._share.history.retention
        if retention is not None and any(last >= versions[-1].number for _, last, _ in retention.ranges()):
            raise MeshkitError(
                "gc_unsafe",
                f"versions after {versions[-1].number} were given up, so there must be newer ones",
            )

    def _snapshots(self, grant: Grant) -> dict[bytes, str]:
        """Return the manifests of snapshots that are granted: digest to a name for messages."""
        services, row = self._services, self._share.row
        members = services.state.members(row.share)
        if set(grant.roster.caps) - {m.capsule_hash for m in members} - {grant.capsule_hash}:
            raise MeshkitError(
                "gc_unsafe", "there are grants of this share that this device does not remember"
            )
        return {
            Capsule.parse(m.blob, grant.owner).root: f"'{m.target}' granted to {m.handle}"
            for m in members
            if m.grant == "snapshot"
            and m.expires > services.wall()
            # The published roster counts, whatever this device remembers of having revoked.
            and (not m.revoked or m.capsule_hash in grant.roster.caps)
        }

    async def _local(self) -> list[Piece]:
        """Return the roots that this device's own work stands on."""
        # What is in memory alone may have been brought back from a version that is given up by now.
        await self._share.journal()
        oid, base = self._share.row.oid, self._share.base
        found = [root_piece(oid, base.root, base.epoch, base.version)] if base.version else []
        pending = self._services.state.local_commit(self._share.row.share)
        if pending is not None:
            found.append(root_piece(oid, pending.root, pending.epoch, pending.version))
            if pending.base_version:
                found.append(root_piece(oid, pending.base_root, pending.base_epoch, pending.base_version))
        return found

    async def _there(self, digests: list[bytes]) -> set[bytes]:
        return await in_time(DELETE_DEADLINE_S, lambda: self._store.has_many(digests))

    # -- what is not -------------------------------------------------------------------------------

    async def _find(self, due: list[Version], snapshots: dict[bytes, str]) -> None:
        """Walk the versions that may go, as far as they differ from what is kept."""
        garbage = self._garbage

        def visit(piece: Piece) -> None:
            garbage.depths[piece.digest] = piece.depth
            if piece.digest in snapshots:
                garbage.snapshots[piece.digest] = piece

        def refer(parent: Piece, piece: Piece) -> None:
            if piece.below is not None:
                garbage.parents.setdefault(piece.digest, parent.digest)

        def fault(piece: Piece, error: MeshkitError) -> None:
            # Missing: deleted by a collection that was cut off, or on purpose beside a snapshot.
            if error.code != "block_unavailable":
                self._done.damaged += 1

        self._progress({"stage": "looking at what was given up", "done": 0, "unit": "blocks"})
        walk = self._walk(visit=visit, refer=refer, fault=fault, skip=self._keep.seen)
        await walk.run(map(self._root, due))

    async def _protect(self, snapshots: dict[bytes, str]) -> None:
        """Keep what granted snapshots need, and the way to them, so that they are found again."""
        garbage = self._garbage
        unknown = [
            root for root in snapshots if root not in self._keep.seen and root not in garbage.snapshots
        ]
        for root in await self._there(unknown):
            raise MeshkitError("gc_unsafe", f"{snapshots[root]} ({cid_text(root)}) is in no version")
        found = {root: piece for root, piece in garbage.snapshots.items() if root not in self._keep.seen}
        self._done.protected = len(found)
        await self._keep.run(found.values())
        for root in found:
            above: bytes | None = root
            while above is not None:
                garbage.depths.pop(above, None)
                above = garbage.parents.get(above)
        self._spare()

    def _spare(self) -> None:
        """Take what is kept out of the garbage."""
        depths = self._garbage.depths
        for digest in [digest for digest in depths if digest in self._keep.seen]:
            del depths[digest]

    async def _measure(self, due: list[Version]) -> None:
        depths = self._garbage.depths
        self._done.versions = sum(version.root in depths for version in due)
        self._done.blocks = self._done.size = 0
        digests = list(depths)
        for at in range(0, len(digests), _BATCH):
            sizes = await in_time(DELETE_DEADLINE_S, partial(self._store.sizes, digests[at : at + _BATCH]))
            self._done.blocks += len(sizes)
            self._done.size += sum(sizes.values())

    # -- deleting ----------------------------------------------------------------------------------

    async def _look_again(self, newest: Version) -> None:
        """Keep what was published, or committed here, while this was looking."""
        services, history = self._services, self._share.history
        while True:
            # Through the gate, not by the change counter: this is the last moment to see it.
            await history.refresh(await services.gate.confirm(self._share.row, "reshare"))
            versions = history.versions
            new = [version for version in versions if version.number > newest.number]
            await self._keep.run([*map(self._root, new), *await self._local()])
            if versions[-1].hash == newest.hash:
                break
            newest = versions[-1]
        self._spare()

    async def _delete(self) -> None:
        """Delete the deepest first, durably before what is above it: what is left is always found again."""
        levels: dict[int, list[bytes]] = {}
        for digest, depth in self._garbage.depths.items():
            levels.setdefault(depth, []).append(digest)
        done, total = 0, len(self._garbage.depths)
        for depth in sorted(levels, reverse=True):
            digests = levels[depth]
            for at in range(0, len(digests), _BATCH):
                batch = digests[at : at + _BATCH]
                await in_time(DELETE_DEADLINE_S, partial(self._store.delete_many, batch))
                done += len(batch)
                self._progress({"stage": "deleting", "done": done, "total": total, "unit": "blocks"})
            await in_time(DELETE_DEADLINE_S, self._store.sync)
