"""Verifying a share block by block, and repairing what is broken from other copies of its byte store.

Verified is: fetched from the byte store, the bytes are what the name says, it opens under its key for its
place, and (all but data blocks) what is in it follows the format. What was verified is remembered, so that
a run that was cut off can be gone on with; what is broken is remembered for `repair`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from meshkitfs.core.blocks import ContentKey, SealedBlock, VerifiedBlock, open_block
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.providers import ByteStore
from meshkitfs.shares._history import Version
from meshkitfs.shares._share import Share
from meshkitfs.shares._walk import FAULTS, Names, Piece, Walk, root_piece

__all__ = ["Broken", "Repaired", "Verified", "repair", "verify"]

Progress = Callable[[dict[str, Any]], None]

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


@dataclass(slots=True)
class Repaired:
    """What `repair` did: blocks that are whole again, and what is still broken."""

    repaired: int
    left: list[Broken]


async def verify(share: Share, *, live: bool, resume: bool, progress: Progress) -> Verified:
    """Verify every block of every kept version of ``share``, or with ``live`` of the newest alone.

    With ``resume``, data blocks that the last run verified are not read again if it was cut off or found
    something broken. Raises the gate's refusals; ``provider_request_failed`` when the store cannot be asked,
    which ends the run: it can be resumed.
    """
    run = _Verification(share, progress)
    return await run.run(live=live, resume=resume)


async def repair(share: Share, sources: Sequence[ByteStore], progress: Progress) -> Repaired:
    """Store again what is broken, from this device's spool or one of ``sources``, and verify again.

    What is broken is what the last `verify` remembered, or else what a new one finds. A block that is
    repaired may name others that are broken too, so this goes on until nothing more can be had.
    """
    services = share.services
    job = _broken_job(share)
    wanted: Collection[bytes] = await trio.to_thread.run_sync(services.state.job_items, job)
    if not wanted:
        found = await verify(share, live=False, resume=False, progress=progress)
        wanted = {item.digest for item in found.broken}
        if not wanted:
            return Repaired(0, [])
    stored: set[bytes] = set()
    tried: set[bytes] = set()
    while fresh := set(wanted) - tried:
        tried |= fresh
        for count, digest in enumerate(sorted(fresh)):
            progress({"stage": "repairing", "done": count, "total": len(fresh), "unit": "blocks"})
            block = await _find(share, sources, digest)
            if block is not None:
                await _in_time(services.reader.store.put, SealedBlock(block.digest, block.data))
                stored.add(digest)
        await _in_time(services.reader.store.sync)
        found = await verify(share, live=False, resume=True, progress=progress)
        wanted = {item.digest for item in found.broken}
    return Repaired(len(stored - set(wanted)), found.broken)


async def _find(share: Share, sources: Sequence[ByteStore], digest: bytes) -> VerifiedBlock | None:
    """Return a whole copy of a block, from wherever there is one. Raises what is no answer."""

    async def spooled(digest: bytes) -> VerifiedBlock:
        return await trio.to_thread.run_sync(share.services.spool.read, digest)

    for get in (spooled, *(source.get for source in sources)):
        try:
            block: VerifiedBlock = await _in_time(get, digest)
        except MeshkitError as error:
            if error.code not in FAULTS:
                raise
        else:
            if block.digest == digest:
                return block
    return None


async def _in_time(call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    try:
        with trio.fail_after(FETCH_DEADLINE_S):
            return await call(*arguments)
    except trio.TooSlowError:
        raise MeshkitError("provider_request_failed", "no answer in time") from None


def _broken_job(share: Share) -> str:
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
        return await self._share.use("read")

    async def _fetch(self, digest: bytes) -> VerifiedBlock:
        # From the byte store, never from the spool: it is the store that is verified.
        block: VerifiedBlock = await _in_time(self._store.get, digest)
        return block

    async def run(self, *, live: bool, resume: bool) -> Verified:
        roots = await self._roots(live)
        state, result = self._state, self._result
        if resume:
            self._before = await trio.to_thread.run_sync(state.job_items, self._job)
        else:
            await trio.to_thread.run_sync(state.end_job, self._job)
        await trio.to_thread.run_sync(state.end_job, _broken_job(self._share))
        await self._count(roots)
        walk = Walk(self._lease, self._fetch, visit=self._visit, blocks=self._check, fault=self._fault)
        try:
            await walk.run(roots)
        finally:
            # Also when it is cut off: what was done is done.
            self._note()
        if self._broken:
            await self._locate(roots)
        else:
            await trio.to_thread.run_sync(state.end_job, self._job)
        result.blocks = len(walk.seen) - len(self._broken)
        result.broken = sorted(self._broken.values(), key=lambda item: (item.paths, item.digest))
        return result

    async def _roots(self, live: bool) -> list[Piece]:
        share = self._share
        grant = await share.use("read", current=True)
        if share.row.grant == "snapshot":
            head = grant.head
            versions = [Version(head.version, head.epoch, head.root, head.time, head.writer, head.hash)]
        else:
            await share.history.refresh(grant)
            versions = share.history.versions[-1:] if live else share.history.kept
        roots = []
        for version in versions:
            try:
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
            self._state.add_job_items(_broken_job(self._share), self._broken)

    # -- what a broken block means -------------------------------------------------------------------

    async def _locate(self, roots: list[Piece]) -> None:
        """Find all paths and versions that need what is broken, from the blocks up to the roots."""
        parents: dict[bytes, set[bytes]] = {}
        paths: dict[bytes, set[bytes]] = {root.digest: {b""} for root in roots}

        def refer(parent: Piece, piece: Piece) -> None:
            broken = piece.digest in self._broken
            if broken or piece.below is not None:
                parents.setdefault(piece.digest, set()).add(parent.digest)
            if broken:
                paths.setdefault(piece.digest, set()).add(piece.path)

        walk = Walk(self._lease, self._fetch, refer=refer, fault=lambda _piece, _error: None)
        await walk.run(roots)
        for digest, item in self._broken.items():
            above, waiting = {digest}, [digest]
            while waiting:
                fresh = parents.get(waiting.pop(), set()) - above
                above |= fresh
                waiting += fresh
            item.versions = sorted(root.version for root in roots if root.digest in above)
            item.paths = sorted(_label(path, walk.names) for path in paths.get(digest, ()))


def _opens(key: ContentKey, block: VerifiedBlock, piece: Piece) -> None:
    open_block(key, block, piece.where)


def _label(path: bytes, names: Names) -> bytes:
    """Return a path for people: the root is ``/``, a hard-linked object has one of its names."""
    return names.get(path, path) or b"/"
