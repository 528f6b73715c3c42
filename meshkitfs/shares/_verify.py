"""Verifying a share block by block.

Verified is: fetched from the byte store, the bytes are what the name says, it opens under its key for its
place, and (all but data blocks) what is in it follows the format. What was verified is remembered, so that
a run that was cut off can be gone on with; what is broken is remembered for `_repair`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from meshkitfs.core.blocks import ContentKey, VerifiedBlock, open_block
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._asking import in_time
from meshkitfs.shares._history import Version
from meshkitfs.shares._share import Share
from meshkitfs.shares._walk import FAULTS, MANIFEST, Names, Piece, Walk, root_piece

__all__ = ["FETCH_DEADLINE_S", "Broken", "Verified", "broken_job", "verify"]

Progress = Callable[[dict[str, Any]], None]

_Parents = dict[bytes, dict[bytes, bool]]

FETCH_DEADLINE_S: Final = 60
# Verified blocks are remembered this many at a time: one write to the disk for each batch.
_NOTE: Final = 512


@dataclass(slots=True)
class Broken:
    """A block that is missing or damaged, what of (``kind``), and the paths and versions that need it."""

    digest: bytes
    kind: str
    code: str
    paths: list[bytes] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Verified:
    """What `verify` found: ``blocks`` of ``versions`` were verified, ``before`` of them in a run before.

    ``closed`` versions are older than what this identity was granted.
    """

    versions: int = 0
    blocks: int = 0
    before: int = 0
    closed: int = 0
    broken: list[Broken] = field(default_factory=list)


async def verify(share: Share, *, live: bool, resume: bool, progress: Progress) -> Verified:
    """Verify every block of every kept version of ``share``, or with ``live`` of the newest alone.

    With ``resume``, data blocks that the last run verified are not read again if it was cut off or found
    something broken. Raises the gate's refusals; ``provider_request_failed`` when the store cannot be asked,
    which ends the run: it can be resumed.
    """
    run = _Verification(share, progress)
    return await run.run(live=live, resume=resume)


def broken_job(share: Share) -> str:
    """Return the name of the job that remembers which blocks of ``share`` are broken."""
    return f"broken:{share.row.ref.hex()}"


class _Verification:
    def __init__(self, share: Share, progress: Progress) -> None:
        self._share = share
        self._progress = progress
        self._state = share.services.state
        self._store = share.services.reader.store
        self._job = f"verify:{share.row.ref.hex()}"
        self._result = Verified()
        self._before: set[bytes] = set()
        self._verified: list[bytes] = []
        self._broken: dict[bytes, Broken] = {}
        self._done = self._total = 0

    async def _lease(self) -> Grant:
        return await self._share.past.use("read")

    async def _fetch(self, digest: bytes) -> VerifiedBlock:
        # From the byte store, never from the spool: it is the store that is verified.
        return await in_time(FETCH_DEADLINE_S, lambda: self._store.get(digest))

    async def run(self, *, live: bool, resume: bool) -> Verified:
        roots = await self._roots(live)
        state, result = self._state, self._result
        if resume:
            self._before = await trio.to_thread.run_sync(state.job_items, self._job)
        else:
            await trio.to_thread.run_sync(state.end_job, self._job)
        await trio.to_thread.run_sync(state.end_job, broken_job(self._share))
        await self._count(roots)
        walk = Walk(self._lease, self._fetch, visit=self._visit, blocks=self._check, fault=self._fault)
        try:
            await walk.run(roots)
        finally:
            # Also when it is cut off: what was done is done.
            self._note()
        if self._broken:
            await self._locate(await self._still_kept(roots))
        if not self._broken:
            await trio.to_thread.run_sync(state.end_job, self._job)
        result.blocks = len(walk.seen) - len(self._broken)
        result.broken = sorted(self._broken.values(), key=lambda item: (item.paths, item.digest))
        return result

    async def _roots(self, live: bool) -> list[Piece]:
        share = self._share
        grant = await share.past.use("read", current=True)
        if share.row.grant == "snapshot":
            head = grant.head
            versions = [Version(head.version, head.epoch, head.root, head.time, head.writer, head.hash)]
        else:
            await share.history.refresh(grant)
            versions = share.history.versions[-1:] if live else share.history.kept
        roots = []
        for version in versions:
            try:
                await grant.reach(version.epoch)
                grant.root_key(version.epoch, version.number)
            except MeshkitError as error:
                if error.code != "right_not_granted":
                    raise
                self._result.closed += 1
                continue
            roots.append(root_piece(grant.capsule.oid, version.root, version.epoch, version.number))
        self._result.versions = len(roots)
        return roots

    async def _count(self, roots: list[Piece]) -> None:
        """Find out how many blocks there are, for the progress bar."""

        def visit(_: Piece) -> None:
            self._total += 1
            if self._total % 1000 == 0:
                self._progress({"stage": "counting", "done": self._total, "unit": "blocks"})

        walk = Walk(self._lease, self._fetch, visit=visit, fault=lambda _piece, _error: None)
        await walk.run(roots)

    # -- one block -----------------------------------------------------------------------------------

    def _visit(self, piece: Piece) -> None:
        if piece.below is not None:
            self._advance()

    def _advance(self) -> None:
        self._done += 1
        if self._done % 16 == 0 or self._done == self._total:
            self._progress({"stage": "verifying", "done": self._done, "total": self._total, "unit": "blocks"})

    async def _check(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.digest in self._before:
                self._result.before += 1
            else:
                await self._verify(piece)
            self._advance()
        if len(self._verified) >= _NOTE:
            batch, self._verified = self._verified, []
            await trio.to_thread.run_sync(self._state.add_job_items, self._job, batch)

    async def _verify(self, piece: Piece) -> None:
        grant = await self._lease()
        try:
            block = await self._fetch(piece.digest)
            if block.digest != piece.digest:
                raise MeshkitError("cid_mismatch", "the store gave another block than the one asked for")
            await piece.reach(grant)
            await trio.to_thread.run_sync(_opens, piece.key(grant), block, piece)
        except MeshkitError as error:
            if error.code not in FAULTS:
                raise
            self._fault(piece, error)
        else:
            self._verified.append(piece.digest)

    def _fault(self, piece: Piece, error: MeshkitError) -> None:
        self._broken[piece.digest] = Broken(piece.digest, piece.kind, error.code)

    def _note(self) -> None:
        if self._verified:
            self._state.add_job_items(self._job, self._verified)
            self._verified = []
        if self._broken:
            self._state.add_job_items(broken_job(self._share), self._broken)

    # -- what a broken block means -------------------------------------------------------------------

    async def _locate(self, roots: list[Piece]) -> None:
        """Find all paths and versions that need what is broken, from the blocks up to the roots."""
        # By digest: what names it, and whether that is a manifest. It is large; a whole share needs none.
        parents: _Parents = {}

        def note_parent(parent: Piece, piece: Piece) -> None:
            if piece.below is not None or piece.digest in self._broken:
                parents.setdefault(piece.digest, {})[parent.digest] = parent.kind == MANIFEST

        await self._again(roots, note_parent)
        objects = {digest: _objects(item, parents) for digest, item in self._broken.items()}
        wanted = set().union(*objects.values())
        paths: dict[bytes, set[bytes]] = {root.digest: {b""} for root in roots}

        def note_path(_: Piece, piece: Piece) -> None:
            if piece.digest in wanted:
                paths.setdefault(piece.digest, set()).add(piece.path)

        names = await self._again(roots, note_path)
        for digest, item in self._broken.items():
            above = _above(digest, parents)
            item.versions = sorted(root.version for root in roots if root.digest in above)
            found = (path for manifest in objects[digest] for path in paths.get(manifest, ()))
            item.paths = sorted({_label(path, names) for path in found})
        self._broken = {digest: item for digest, item in self._broken.items() if item.versions}
        job = broken_job(self._share)
        await trio.to_thread.run_sync(self._state.end_job, job)
        await trio.to_thread.run_sync(self._state.add_job_items, job, list(self._broken))

    async def _still_kept(self, roots: list[Piece]) -> list[Piece]:
        """Leave out the versions that were given up meanwhile: that they are being deleted is no damage."""
        share = self._share
        if share.row.grant == "snapshot":
            return roots
        await share.history.refresh(await share.past.use("read", current=True))
        kept = {version.number for version in share.history.kept}
        return [root for root in roots if root.version in kept]

    async def _again(self, roots: list[Piece], refer: Callable[[Piece, Piece], None]) -> Names:
        walk = Walk(self._lease, self._fetch, refer=refer, fault=lambda _piece, _error: None)
        await walk.run(roots)
        return walk.names


def _above(digest: bytes, parents: _Parents) -> set[bytes]:
    """Return a block and everything that leads to it."""
    found, waiting = {digest}, [digest]
    while waiting:
        fresh = parents.get(waiting.pop(), {}).keys() - found
        found |= fresh
        waiting += fresh
    return found


def _objects(item: Broken, parents: _Parents) -> set[bytes]:
    """Return the manifests of the objects that a block is a piece of."""
    if item.kind == MANIFEST:
        return {item.digest}
    found, waiting = set(), [item.digest]
    while waiting:
        for parent, is_manifest in parents.get(waiting.pop(), {}).items():
            if is_manifest:
                found.add(parent)
            else:
                waiting.append(parent)
    return found


def _opens(key: ContentKey, block: VerifiedBlock, piece: Piece) -> None:
    open_block(key, block, piece.where)


def _label(path: bytes, names: Names) -> bytes:
    """Return a path for people: the root is ``/``, a hard-linked object has one of its names."""
    return names.get(path, path) or b"/"
