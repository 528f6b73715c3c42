"""The content of one file: clean blocks by reference, changed blocks in memory, blocks being sealed.

A block is in exactly one of three places, looked at in this order: ``dirty`` (plaintext that writes go
to), ``sealing`` (plaintext handed to a worker, never changed again) or the reference table. A write to a
block that is being sealed copies it back to ``dirty``; the worker's result then belongs only to the
commit that froze it.

Everything between two awaits is atomic (one event loop); `lock` orders operations that await in the
middle. Offsets and sizes are bytes of plaintext.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio

from meshkitfs.core.blocks import BLOCK_SIZES, HOLE, INLINE_MAX, REFS_PER_INDEX, Where
from meshkitfs.core.manifest import INDEX_MAX, FileManifest, parse_index
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._refs import RefTable, stored_refs

if TYPE_CHECKING:
    from meshkitfs.shares._reader import BlockReader
    from meshkitfs.shares._sealer import Sealer, SealJob

__all__ = ["FileContent", "RefTable"]

SMALL_BLOCK = BLOCK_SIZES[0]
LARGE_BLOCK = BLOCK_SIZES[1]
# Up to here a file's use is not known yet: it is one buffer, and its block size is chosen when it grows
# past this or is committed.
UNDECIDED_MAX = LARGE_BLOCK
# A manifest has room for so many blocks; what would need more is EFBIG.
MAX_BLOCKS: Final = REFS_PER_INDEX * INDEX_MAX
_ZEROS = bytes(LARGE_BLOCK)


class FileContent:
    """The bytes of one file, while it is open or changed. ``oid`` is the one its blocks are bound to."""

    __slots__ = (
        "block_size", "committed", "dirty", "holey", "inline", "lock", "oid", "random", "reader", "revision",
        "sealer", "sealing", "size", "table",
    )  # fmt: skip

    def __init__(
        self,
        oid: bytes,
        reader: BlockReader,
        sealer: Sealer,
        manifest: FileManifest | None = None,
        used: int | None = None,
    ) -> None:
        """Start empty, or as what ``manifest`` says; ``used`` is how many bytes of it are no holes."""
        self.oid = oid
        self.reader = reader
        self.sealer = sealer
        self.lock = trio.Lock()
        self.dirty: dict[int, bytearray] = {}
        self.sealing: dict[int, SealJob] = {}
        # Seen a write that was not at the end: a database rather than a film, so small blocks.
        self.random = False
        # May have holes, so that counting what is stored is worth the trouble.
        self.holey = False
        # Counts changes; ``committed`` is the revision that the node's entry describes.
        self.revision = 0
        self.committed = 0
        self.inline = b""
        self.table = RefTable()
        # 0 = undecided: all content is one buffer (``inline`` while unchanged, dirty[0] once written).
        self.block_size = 0
        self.size = 0
        if manifest is not None:
            self.oid = manifest.lineage or oid
            self._take(manifest, used)

    def _take(self, manifest: FileManifest, used: int | None) -> None:
        """Refer to what ``manifest`` names; nothing may be held."""
        self.size = manifest.size
        if manifest.inline is not None:
            self.inline = manifest.inline
            return
        self.block_size = manifest.block_size
        count = -(-manifest.size // manifest.block_size)
        self.holey = used is not None and used != manifest.size
        stored = -(-used // self.block_size) if self.holey and used is not None else count
        self.table = RefTable(count, manifest.refs, manifest.index, stored)

    # -- reading -----------------------------------------------------------------------------------

    def read_now(self, grant: Grant, offset: int, size: int) -> bytes | memoryview | None:
        """Return the bytes at ``offset`` if they lie in memory and in one block, else None."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        step = self.block_size
        if not step:
            grant.check()
            return _slice(self.dirty.get(0, self.inline), offset, end)
        i = offset // step
        if (end - 1) // step != i:
            return None
        buffer = self.dirty.get(i)
        if buffer is not None:
            grant.check()
            return _slice(buffer, offset - i * step, end - i * step)
        job = self.sealing.get(i)
        if job is not None:
            grant.check()
            return _slice(job.plain, offset - i * step, end - i * step)
        ref = self.table.peek(i)
        if ref is None:
            return None
        if ref == HOLE:
            grant.check()
            return _ZEROS[: end - offset] if end - offset <= len(_ZEROS) else bytes(end - offset)
        plain = self.reader.cached(grant, ref)
        return None if plain is None else _slice(plain, offset - i * step, end - i * step)

    async def read(self, grant: Grant, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Return up to ``size`` bytes at ``offset``; fewer only at the end of the file."""
        while True:
            end = min(offset + size, self.size)
            if offset >= end:
                return b""
            found = self.read_now(grant, offset, end - offset)
            if found is not None:
                return found
            step = self.block_size
            if (end - 1) // step != offset // step:
                break
            # Then look again: while this waits, a writer may have made the block something else.
            await self._bring(grant, offset // step)
        out = bytearray()
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            out += await self.read(grant, offset, stop - offset)
            offset = stop
        return out

    async def _bring(self, grant: Grant, i: int) -> memoryview | None:
        """Load block ``i`` into the plaintext cache; None if there is, or was, a hole."""
        table, step = self.table, self.block_size
        ref = await self.ref(grant, i)
        if ref == HOLE:
            return None
        try:
            plain = await self.reader.block(grant, ref, Where.block(self.oid, i))
        except MeshkitError:
            if self.table is table and table.peek(i) == ref and i not in self.dirty and i not in self.sealing:
                raise
            return None  # rewritten meanwhile, and the old block is gone for good reason
        if len(plain) > step:
            raise MeshkitError("invalid_envelope", "a block is larger than its file's block size")
        return plain

    async def prefetch(self, grant: Grant, blocks: range) -> None:
        """Load blocks ahead of a reader; trouble is left for the read that really needs them."""
        wanted = []
        for i in blocks:
            ref = self.table.peek(i)
            if ref is not None and ref != HOLE and i not in self.dirty and i not in self.sealing:
                wanted.append((ref, Where.block(self.oid, i)))
        await self.reader.ahead(grant, wanted)

    async def ref(self, grant: Grant, i: int) -> bytes:
        """Return reference ``i``, loading its index block if need be."""
        while (number := self.table.segment_needed(i)) is not None:
            await self._load_segment(grant, number)
        return self.table.peek(i) or HOLE

    async def _load_segment(self, grant: Grant, number: int) -> None:
        """Load one segment, unless the file was changed under it meanwhile (then look again)."""
        table, ref = self.table, self.table.index_ref(number)
        if ref == HOLE:
            table.load(number, b"")
            return
        plain = await self.reader.open(grant, ref, Where.index(self.oid, number))
        # A truncate may have taken it away, or a new table stand here: old references must not come back.
        if self.table is table and table.index_ref(number) == ref:
            count = min(REFS_PER_INDEX, table.count - number * REFS_PER_INDEX)
            table.load(number, parse_index(plain, count))

    # -- writing -----------------------------------------------------------------------------------

    async def write(self, grant: Grant, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``; a gap before it reads as zeros. Raises EFBIG."""
        end = offset + len(data)
        self._check_size(end)
        self.random = self.random or offset < self.size
        self.holey = self.holey or offset > self.size
        if not self.block_size:
            if end <= UNDECIDED_MAX:
                buffer = self._undecided()
                before = len(buffer)
                _splice(buffer, offset, data)
                self.sealer.hold(len(buffer) - before)
                self.size = max(self.size, end)
                self.revision += 1
                return
            self.decide(_fitting(end, SMALL_BLOCK if self.random else LARGE_BLOCK))
        step = self.block_size
        view = memoryview(data)
        at = offset
        while at < end:
            i, low = divmod(at, step)
            high = min(step, end - i * step)
            piece = view[at - offset : at - offset + high - low]
            buffer = self.dirty[i] if i in self.dirty else await self._writable(grant, i, low, high)
            before = len(buffer)
            if low == before:
                buffer += piece
            else:
                _splice(buffer, low, piece)
            self.sealer.hold(len(buffer) - before)
            at += high - low
            self.size = max(self.size, at)
            # Counted here and not before the waiting: a commit that froze the file while this waited has
            # not seen what was written just now.
            self.revision += 1
            if high == step:
                # The writer has left this block behind: seal it while it writes the next one.
                self.seal(i)

    def _undecided(self) -> bytearray:
        buffer = self.dirty.get(0)
        if buffer is None:
            buffer = self.dirty[0] = bytearray(self.inline)
            self.sealer.hold(len(buffer))
            self.inline = b""
        return buffer

    async def _writable(self, grant: Grant, i: int, low: int, high: int) -> bytearray:
        """Return the buffer of block ``i`` for a write to [low, high), with what it must keep."""
        job = self.sealing.pop(i, None)
        if job is not None:
            buffer = bytearray(job.plain)
        else:
            kept = max(0, min(self.block_size, self.size - i * self.block_size))
            # Also for a block that is overwritten whole: its new reference needs its segment.
            ref = await self.ref(grant, i)
            if ref == HOLE or kept == 0 or (low == 0 and high >= kept):
                buffer = bytearray()
            else:
                plain = await self._bring(grant, i)
                assert plain is not None  # `lock` keeps other writers out, so the reference stands
                buffer = bytearray(plain[:kept])
        self.sealer.hold(len(buffer))
        self.dirty[i] = buffer
        return buffer

    def decide(self, block_size: int) -> None:
        """Choose the block size of a file that was one buffer until now."""
        buffer = self._undecided()
        self.block_size = block_size
        self.table = RefTable(-(-self.size // block_size))
        self.table.segments[0] = bytearray()
        del self.dirty[0]
        for at in range(0, len(buffer), block_size):
            self.dirty[at // block_size] = buffer[at : at + block_size]

    def seal(self, i: int) -> SealJob:
        """Hand block ``i`` to the sealing workers."""
        buffer = self.dirty.pop(i)
        logical = min(self.block_size, self.size - i * self.block_size)
        if len(buffer) > logical:
            self.sealer.hold(logical - len(buffer))
            del buffer[logical:]
        job = self.sealer.submit(self, i, buffer)
        self.sealing[i] = job
        self.table.count = max(self.table.count, i + 1)
        return job

    def sealed(self, job: SealJob) -> bool:
        """Take over the reference of a finished job; False if the block was written or cut off meanwhile."""
        if self.sealing.get(job.index) is not job:
            return False
        del self.sealing[job.index]
        old = self.table.peek(job.index)
        self.table.set(job.index, job.ref)
        if old is not None and old != HOLE:
            self.sealer.replaced(old)
        return True

    def unsealed(self, job: SealJob) -> None:
        """A job failed (the disk is full): its plaintext waits in memory for the next try."""
        if self.sealing.get(job.index) is job:
            del self.sealing[job.index]
            self.dirty[job.index] = job.plain
            self.sealer.hold(len(job.plain))

    async def truncate(self, grant: Grant, size: int) -> None:
        """Set the size; bytes past the old end read as zeros. Raises EFBIG."""
        self._check_size(size)
        if size == 0:
            self._drop_all()
            self.revision += 1
            return
        self.holey = self.holey or size > self.size
        if not self.block_size:
            if size <= UNDECIDED_MAX:
                buffer = self._undecided()
                before = len(buffer)
                del buffer[size:]
                self.sealer.hold(len(buffer) - before)
                self.size = size
                self.revision += 1
                return
            self.decide(_fitting(size, SMALL_BLOCK))
        step = self.block_size
        count = -(-size // step)
        if size < self.size:
            await self._ready_to_cut(grant, count)
            last, cut = divmod(size, step)
            # What was cut off must not come back when the file grows again. A hole has nothing to cut.
            if cut and (last in self.dirty or last in self.sealing or await self.ref(grant, last) != HOLE):
                buffer = self.dirty[last] if last in self.dirty else await self._writable(grant, last, 0, 0)
                before = len(buffer)
                del buffer[cut:]
                self.sealer.hold(len(buffer) - before)
            for i in [i for i in self.dirty if i >= count]:
                self.sealer.hold(-len(self.dirty.pop(i)))
            for i in [i for i in self.sealing if i >= count]:
                del self.sealing[i]
        self.size = size
        for ref in self.table.resize(count):
            self.sealer.replaced(ref)
        self.revision += 1

    async def _ready_to_cut(self, grant: Grant, count: int) -> None:
        """Load what cutting to ``count`` blocks has to look at: the last segment, and all that has holes."""
        if self.holey:
            for i in range(count - 1, self.table.count, REFS_PER_INDEX):
                await self.ref(grant, i)
            await self.ref(grant, max(count, self.table.count) - 1)
        await self.ref(grant, count - 1)

    def _check_size(self, size: int) -> None:
        if size > MAX_BLOCKS * (self.block_size or BLOCK_SIZES[-1]):
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def _drop_all(self) -> None:
        self.sealer.hold(-sum(map(len, self.dirty.values())))
        self.dirty.clear()
        self.sealing.clear()
        for segment in self.table.segments.values():
            for ref in stored_refs(segment):
                self.sealer.replaced(ref)
        self.inline = b""
        self.table = RefTable()
        self.block_size = 0
        self.size = 0
        self.random = self.holey = False

    def fork(self, lineage: bytes) -> None:
        """Become the content of a new object whose blocks stay those of object ``lineage``."""
        self.oid = lineage
        self.revision += 1

    def become(self, manifest: FileManifest, used: int, lineage: bytes) -> None:
        """Have the content of ``manifest``, whose blocks are those of object ``lineage``, and no other.

        The caller holds ``lock``, and nothing that is to be kept may be waiting for a commit.
        """
        self._drop_all()
        self._take(manifest, used)
        self.fork(lineage)

    def discard(self) -> None:
        """Forget everything: the file is gone. Blocks that no commit has named yet are removed."""
        self._drop_all()

    def spill(self) -> None:
        """Hand every changed block to the sealing workers: memory is short and no commit may do it."""
        if not self.block_size:
            if not self.size:
                return
            self.decide(SMALL_BLOCK)
        for i in list(self.dirty):
            self.seal(i)

    @property
    def changed(self) -> bool:
        return self.revision != self.committed or bool(self.dirty or self.sealing)

    def stored_bytes(self) -> int:
        """Return about how many bytes are really kept, holes not counted (for st_blocks)."""
        if not self.holey or not self.block_size:
            return self.size
        fresh = sum(1 for blocks in (self.dirty, self.sealing) for i in blocks if self.table.peek(i) == HOLE)
        return min(self.size, (self.table.stored + fresh) * self.block_size)

    @property
    def inlinable(self) -> bool:
        return not self.block_size and self.size <= INLINE_MAX

    def inline_bytes(self) -> bytes:
        """Return the whole content of a small file, zero-filled to its size."""
        plain = bytes(self.dirty.get(0, self.inline))
        return plain + bytes(self.size - len(plain))


def _fitting(size: int, block_size: int) -> int:
    """Return the smallest block size from ``block_size`` up in which a file of ``size`` bytes is possible."""
    return next(step for step in BLOCK_SIZES if step >= block_size and size <= step * MAX_BLOCKS)


def _slice(plain: bytes | bytearray | memoryview, low: int, high: int) -> bytes | memoryview:
    """Return [low, high) of a block whose missing tail is zeros; a copy if the buffer can change."""
    piece = bytes(plain[low:high]) if isinstance(plain, bytearray) else plain[low:high]
    if len(piece) < high - low:
        return bytes(piece) + bytes(high - low - len(piece))
    return piece


def _splice(buffer: bytearray, low: int, piece: bytes | memoryview) -> None:
    if low > len(buffer):
        buffer.extend(bytes(low - len(buffer)))
    buffer[low : low + len(piece)] = piece
