"""Sealing changed blocks in worker threads, and bounding how much plaintext waits for it.

Each share has a `Sealer`; all of a home share one `Budget`. Jobs go to threads in small batches, because
a thread hop costs about as much as sealing 64 KiB. The event loop only moves references about.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from meshkitfs.core.blocks import Where, seal_block
from meshkitfs.errors import MeshkitError
from meshkitfs.state import Spool

if TYPE_CHECKING:
    from meshkitfs.shares._content import FileContent

__all__ = ["Budget", "SealJob", "Sealer"]

_log = logging.getLogger(__name__)

WORKERS = 2
BATCH = 4
# Plaintext that may wait in memory, all shares together. Past it, writers wait (back-pressure).
MEMORY_LIMIT = 96 << 20
# Sealed blocks that may wait for the provider on this device, unless the configuration says otherwise and as
# long as the disk is not the tighter bound.
SPOOL_LIMIT = 4 << 30


class Budget:
    """Makes writers wait while too much waits: changed plaintext in memory, unsent blocks in the spool.

    ``limit`` bounds the first and ``spool_limit`` the second, in bytes; ``spooled`` tells how much is there.
    """

    def __init__(
        self,
        limit: int = MEMORY_LIMIT,
        spool_limit: int = SPOOL_LIMIT,
        spooled: Callable[[], int] = lambda: 0,
    ) -> None:
        self._limit = limit
        self.spool_limit = spool_limit
        self._spooled = spooled
        self._held = 0
        # How much of it is with the sealing workers, and so will be let go of without a commit.
        self.sealing = 0
        # How many sealing workers are at it, which makes room in memory and in the spool.
        self.working = 0
        self._relief = trio.Event()
        # Set by the owner: asks for commits when memory is full of blocks that nobody seals otherwise.
        self.on_pressure: Callable[[], None] = lambda: None

    def hold(self, delta: int) -> None:
        """Count ``delta`` more bytes (fewer, if negative)."""
        self._held += delta
        if delta < 0 and not self.full:
            self.look_again()

    @property
    def held(self) -> int:
        return self._held

    @property
    def full(self) -> bool:
        return self._held > self._limit or self.spool_full

    @property
    def spool_full(self) -> bool:
        """Whether as much waits for the provider as may, with what is just being sealed."""
        return self._spooled() + self.sealing > self.spool_limit

    @property
    def stuck(self) -> bool:
        """Whether waiting for the sealing workers alone would not make much room."""
        return self._held - self.sealing > self._limit // 2

    def look_again(self) -> None:
        """Have those who wait in `room` look again: there is some, or sealing has failed."""
        self._relief.set()
        self._relief = trio.Event()

    async def room(self, failed: Callable[[], bool] = lambda: False) -> None:
        """Wait until there is room for more, or ``failed()`` says that there will be none."""
        while self.full and not failed():
            self.on_pressure()
            await self._relief.wait()


class SealJob:
    """One block on its way: ``plain`` never changes again; ``ref`` is set when ``done``.

    ``commit`` is the dictionary (digest -> size) of the local commit that counts on this block, if one does.
    """

    __slots__ = ("block_size", "commit", "content", "done", "error", "index", "plain", "ref", "size")

    def __init__(self, content: FileContent, index: int, plain: bytearray) -> None:
        self.content = content
        self.index = index
        self.plain = plain
        self.block_size = content.block_size
        self.ref = b""
        self.size = 0
        self.commit: dict[bytes, int] | None = None
        self.done = trio.Event()
        self.error: MeshkitError | None = None

    def __repr__(self) -> str:
        return f"<SealJob block {self.index}, {len(self.plain)} bytes>"


class Sealer:
    """Turns plaintext blocks of one share into spooled, sealed ones."""

    def __init__(self, nursery: trio.Nursery, spool: Spool, spooled: set[bytes], budget: Budget) -> None:
        self._nursery = nursery
        self._spool = spool
        self.spooled = spooled
        self.budget = budget
        self.hold = budget.hold
        # Spooled since the last local commit: digest -> size. A commit stages them; a block that is
        # replaced before that is simply removed again.
        self._fresh: dict[bytes, int] = {}
        # Of these, what the state database may name all the same: a commit failed, and its fate is unknown.
        self._named: set[bytes] = set()
        self._garbage: list[bytes] = []
        self._queue: deque[SealJob] = deque()
        self._running = 0
        # Why the last job failed; writers are told until a commit succeeds.
        self.error: MeshkitError | None = None

    def submit(self, content: FileContent, index: int, plain: bytearray) -> SealJob:
        """Queue a block; its reference arrives through ``content.sealed``."""
        job = SealJob(content, index, plain)
        self._queue.append(job)
        self.budget.sealing += len(plain)
        self._wake()
        return job

    def _wake(self) -> None:
        if self._running < WORKERS:
            self._running += 1
            self.budget.working += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        try:
            while (batch := self._next_batch()) or self._garbage:
                if batch:
                    await trio.to_thread.run_sync(self._seal, batch)
                for job in batch:
                    self._finish(job)
                if self._garbage:
                    garbage, self._garbage = self._garbage, []
                    await trio.to_thread.run_sync(self._spool.discard, garbage)
        finally:
            self._running -= 1
            self.budget.working -= 1
            # What was disposed of has made room; or it was the last that could.
            self.budget.look_again()

    def _next_batch(self) -> list[SealJob]:
        """Return the next jobs; those whose block was written again or cut off meanwhile are dropped."""
        batch: list[SealJob] = []
        while self._queue and len(batch) < BATCH:
            job = self._queue.popleft()
            if job.commit is None and job.content.sealing.get(job.index) is not job:
                self._let_go(job)
                job.done.set()
            else:
                batch.append(job)
        return batch

    def _let_go(self, job: SealJob) -> None:
        self.budget.sealing -= len(job.plain)
        self.hold(-len(job.plain))

    def _seal(self, batch: list[SealJob]) -> None:
        for job in batch:
            try:
                job.ref, block = seal_block(
                    Where.block(job.content.oid, job.index), job.plain, job.block_size
                )
                job.size = self._spool.write(block)
            except MeshkitError as error:
                job.error = error
            except Exception:
                # A defect here must not take the mount down; the block's plaintext stays in memory.
                _log.exception("a block could not be sealed")
                job.error = MeshkitError("internal_error", "a block could not be sealed; see the log")

    def _finish(self, job: SealJob) -> None:
        self._let_go(job)
        if job.error is not None:
            self.error = job.error
            job.content.unsealed(job)
            self.budget.look_again()
        else:
            digest = job.ref[:32]
            self.spooled.add(digest)
            if job.commit is not None:
                job.commit[digest] = job.size
            else:
                self._fresh[digest] = job.size
            if not job.content.sealed(job):
                self.replaced(job.ref)
        job.done.set()

    def replaced(self, ref: bytes) -> None:
        """The block of ``ref`` is no longer named; remove it if no commit names it either."""
        digest = ref[:32]
        if digest not in self._named and self._fresh.pop(digest, None) is not None:
            self.dispose([digest])

    def dispose(self, digests: list[bytes]) -> None:
        """Have spooled blocks removed that nothing names, and nothing will."""
        if digests:
            self.spooled.difference_update(digests)
            self._garbage += digests
            self._wake()

    @property
    def fresh(self) -> tuple[int, int]:
        """How many blocks were spooled since the last local commit, and their bytes."""
        return len(self._fresh), sum(self._fresh.values())

    def take_fresh(self, keep: set[bytes]) -> dict[bytes, int]:
        """Return and forget the blocks spooled since the last call: a commit that starts now stages them.

        Those of ``keep`` stay: no commit will name them.
        """
        fresh, self._fresh = self._fresh, {}
        for digest in keep & fresh.keys():
            self._fresh[digest] = fresh.pop(digest)
        return fresh

    def give_back(self, staged: dict[bytes, int], *, named: bool) -> None:
        """A commit failed: its blocks are again just blocks that nothing durable names.

        Unless it is ``named`` all the same: then they stay until a commit has succeeded, which stages them.
        """
        self._fresh.update(staged)
        if named:
            self._named.update(staged)

    def settled(self) -> None:
        """A commit has succeeded: the state database names it and no other."""
        self._named.clear()
