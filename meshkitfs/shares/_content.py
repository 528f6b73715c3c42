"""The content of one file: clean blocks by reference, changed blocks in memory, blocks being sealed.

A block is in exactly one of three places, looked at in this order: ``dirty`` (plaintext that writes go
to), ``sealing`` (plaintext handed to a worker, never changed again) or the reference table. A write to a
block that is being sealed copies it back to ``dirty``; the worker's result then belongs only to the
commit that froze it.

Everything between two awaits is atomic (one event loop); `lock` orders operations that await in the
middle. Offsets and sizes are bytes of plaintext.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from meshkitfs.core.blocks import BLOCK_SIZES, HOLE, INLINE_MAX, REF_SIZE, REFS_PER_INDEX, Where
from meshkitfs.core.manifest import FileManifest, parse_index
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant

if TYPE_CHECKING:
    from meshkitfs.shares._reader import BlockReader
    from meshkitfs.shares._sealer import Sealer, SealJob

__all__ = ["FileContent", "RefTable"]

SMALL_BLOCK = BLOCK_SIZES[0]
LARGE_BLOCK = BLOCK_SIZES[1]
# Up to here a file's use is not known yet: it is one buffer, and its block size is chosen when it grows
# past this or is committed.
UNDECIDED_MAX = LARGE_BLOCK
_ZEROS = bytes(LARGE_BLOCK)


class RefTable:
    """The block references of a file, in segments that are loaded when first needed.

    A file of up to `REFS_PER_INDEX` blocks has one segment, which stands in the manifest. Larger files
    have one index block per segment.
    """

    __slots__ = ("_changed", "count", "index", "segments")

    def __init__(self, count: int = 0, refs: bytes = b"", index: bytes = b"") -> None:
        self.count = count
        self.segments: dict[int, bytearray] = {}
        # References of the index blocks, one per segment; HOLE where the segment was never sealed.
        self.index = bytearray(index)
        self._changed: set[int] = set()
        if not index:
            self.segments[0] = bytearray(refs)

    def peek(self, i: int) -> bytes | None:
        """Return reference ``i`` (`HOLE` past the end), or None if its segment is not loaded."""
        if i >= self.count:
            return HOLE
        segment = self.segments.get(i // REFS_PER_INDEX)
        if segment is None:
            return None
        at = (i % REFS_PER_INDEX) * REF_SIZE
        return bytes(segment[at : at + REF_SIZE]) or HOLE

    def set(self, i: int, ref: bytes) -> None:
        """Store reference ``i``; its segment must be loaded or new."""
        number, place = divmod(i, REFS_PER_INDEX)
        segment = self.segments.setdefault(number, bytearray())
        at = place * REF_SIZE
        if len(segment) < at:
            segment.extend(bytes(at - len(segment)))
        segment[at : at + REF_SIZE] = ref
        self.count = max(self.count, i + 1)
        self._changed.add(number)

    def resize(self, count: int) -> None:
        """Cut or extend (with holes) to ``count`` references; the last segment must be loaded."""
        if count < self.count:
            last, place = divmod(count, REFS_PER_INDEX)
            for number in [n for n in self.segments if n > last]:
                del self.segments[number]
            self._changed = {n for n in self._changed if n <= last}
            segment = self.segments.get(last)
            if segment is not None and len(segment) > place * REF_SIZE:
                del segment[place * REF_SIZE :]
                self._changed.add(last)
            keep = -(-count // REFS_PER_INDEX) if count > REFS_PER_INDEX else 0
            del self.index[keep * REF_SIZE :]
        self.count = count

    def segment_needed(self, i: int) -> int | None:
        """Return the segment to load before reference ``i`` can be used, or None."""
        number = i // REFS_PER_INDEX
        # Also for a place past the end: appending to an unloaded segment must not start it afresh.
        return number if number not in self.segments and number * REF_SIZE < len(self.index) else None

    def index_ref(self, number: int) -> bytes:
        return bytes(self.index[number * REF_SIZE : (number + 1) * REF_SIZE])

    def load(self, number: int, refs: bytes) -> None:
        self.segments.setdefault(number, bytearray(refs))

    def copy(self, blocks: Iterable[int] = ()) -> RefTable:
        """Return a table that later changes of this one do not touch.

        Unchanged segments stay unloaded in it, except those of ``blocks``, which are about to be set.
        """
        wanted = self._changed | {i // REFS_PER_INDEX for i in blocks}
        other = RefTable(self.count, index=bytes(self.index) or HOLE)
        other.index = bytearray(self.index)
        other.segments = {n: bytearray(s) for n, s in self.segments.items() if n in wanted or not self.index}
        other._changed = set(self._changed)
        return other

    def changed_segments(self) -> list[int]:
        """Return the segments whose index block has to be sealed anew."""
        segments = range(-(-self.count // REFS_PER_INDEX))
        return [
            n
            for n in segments
            if n in self._changed or not any(self.index[n * REF_SIZE : (n + 1) * REF_SIZE])
        ]

    def segment_bytes(self, number: int) -> bytes:
        """Return the packed references of a loaded segment, filled up with holes to its full count."""
        size = min(REFS_PER_INDEX, self.count - number * REFS_PER_INDEX) * REF_SIZE
        segment = bytes(self.segments.get(number, b""))
        return segment + bytes(size - len(segment))

    def adopt_index(self, sealed: RefTable) -> None:
        """Take over the index references a commit has sealed, where nothing changed meanwhile."""
        if len(self.index) < len(sealed.index):
            self.index.extend(bytes(len(sealed.index) - len(self.index)))
        self.index[: len(sealed.index)] = sealed.index
        self._changed.clear()


class FileContent:
    """The bytes of one file, while it is open or changed. ``oid`` is the one its blocks are bound to."""

    __slots__ = (
        "block_size", "committed", "dirty", "holey", "inline", "lock", "oid", "random", "reader", "revision",
        "sealer", "sealing", "size", "table",
    )  # fmt: skip

    def __init__(
        self, oid: bytes, reader: BlockReader, sealer: Sealer, manifest: FileManifest | None = None
    ) -> None:
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
            self.size = manifest.size
            self.oid = manifest.lineage or oid
            if manifest.inline is not None:
                self.inline = manifest.inline
            else:
                self.block_size = manifest.block_size
                count = -(-manifest.size // manifest.block_size)
                self.table = RefTable(count, manifest.refs, manifest.index)

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
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        found = self.read_now(grant, offset, end - offset)
        if found is not None:
            return found
        step = self.block_size
        if (end - 1) // step == offset // step:
            await self._bring(grant, offset // step)
            again = self.read_now(grant, offset, end - offset)
            return again if again is not None else await self.read(grant, offset, size)
        out = bytearray()
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            out += await self.read(grant, offset, stop - offset)
            offset = stop
        return out

    async def _bring(self, grant: Grant, i: int) -> memoryview | None:
        """Load block ``i`` into the plaintext cache; None where there is a hole."""
        ref = await self.ref(grant, i)
        if ref == HOLE:
            return None
        plain = await self.reader.block(grant, ref, Where.block(self.oid, i))
        if len(plain) > self.block_size:
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
        number = self.table.segment_needed(i)
        if number is not None:
            await self._load_segment(grant, number)
        return self.table.peek(i) or HOLE

    async def _load_segment(self, grant: Grant, number: int) -> None:
        ref = self.table.index_ref(number)
        if ref == HOLE:
            self.table.load(number, b"")
            return
        plain = await self.reader.open(grant, ref, Where.index(self.oid, number))
        count = min(REFS_PER_INDEX, self.table.count - number * REFS_PER_INDEX)
        self.table.load(number, parse_index(plain, count))

    # -- writing -----------------------------------------------------------------------------------

    async def write(self, grant: Grant, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``; a gap before it reads as zeros."""
        end = offset + len(data)
        self.revision += 1
        self.random = self.random or offset < self.size
        self.holey = self.holey or offset > self.size
        if not self.block_size:
            if end <= UNDECIDED_MAX:
                buffer = self._undecided()
                before = len(buffer)
                _splice(buffer, offset, data)
                self.sealer.hold(len(buffer) - before)
                self.size = max(self.size, end)
                return
            self.decide(SMALL_BLOCK if self.random else LARGE_BLOCK)
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
            number = self.table.segment_needed(i)
            if number is not None:
                await self._load_segment(grant, number)
            if kept == 0 or (low == 0 and high >= kept):
                buffer = bytearray()
            else:
                plain = await self._bring(grant, i)
                buffer = bytearray() if plain is None else bytearray(plain[:kept])
        # While this waited, a truncate or another writer may have made the block's buffer.
        if i in self.dirty:
            return self.dirty[i]
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
        """Set the size; bytes past the old end read as zeros."""
        self.revision += 1
        if size == 0:
            self._drop_all()
            return
        self.holey = self.holey or size > self.size
        if not self.block_size:
            if size <= UNDECIDED_MAX:
                buffer = self._undecided()
                before = len(buffer)
                del buffer[size:]
                self.sealer.hold(len(buffer) - before)
                self.size = size
                return
            self.decide(SMALL_BLOCK)
        step = self.block_size
        count = -(-size // step)
        if size < self.size:
            last, cut = divmod(size, step)
            if cut:
                # What was cut off must not come back when the file grows again.
                buffer = self.dirty[last] if last in self.dirty else await self._writable(grant, last, 0, 0)
                before = len(buffer)
                del buffer[cut:]
                self.sealer.hold(len(buffer) - before)
            elif count:
                number = self.table.segment_needed(count - 1)
                if number is not None:
                    await self._load_segment(grant, number)
            for i in [i for i in self.dirty if i >= count]:
                self.sealer.hold(-len(self.dirty.pop(i)))
            for i in [i for i in self.sealing if i >= count]:
                del self.sealing[i]
        elif self.table.count and self.table.segment_needed(self.table.count - 1) is not None:
            await self._load_segment(grant, (self.table.count - 1) // REFS_PER_INDEX)
        self.size = size
        self.table.resize(count)

    def _drop_all(self) -> None:
        self.sealer.hold(-sum(map(len, self.dirty.values())))
        self.dirty.clear()
        self.sealing.clear()
        self.inline = b""
        self.table = RefTable()
        self.block_size = 0
        self.size = 0
        self.random = self.holey = False

    def fork(self, lineage: bytes) -> None:
        """Become the content of a new object whose blocks stay those of object ``lineage``."""
        self.oid = lineage
        self.revision += 1

    def discard(self) -> None:
        """Forget everything: the file is gone. Blocks that no commit has named yet are removed."""
        if not self.table.index:
            refs = self.table.segments.get(0, b"")
            for at in range(0, len(refs), REF_SIZE):
                self.sealer.replaced(bytes(refs[at : at + REF_SIZE]))
        self._drop_all()

    @property
    def changed(self) -> bool:
        return self.revision != self.committed or bool(self.dirty or self.sealing)

    def stored_bytes(self) -> int:
        """Return about how many bytes are really kept, holes not counted (for st_blocks)."""
        if not self.holey or not self.block_size or self.table.index:
            return self.size
        refs = self.table.segments.get(0, b"")
        stored = {at // REF_SIZE for at in range(0, len(refs), REF_SIZE) if refs[at : at + REF_SIZE] != HOLE}
        stored.update(self.dirty, self.sealing)
        return min(self.size, len(stored) * self.block_size)

    @property
    def inlinable(self) -> bool:
        return not self.block_size and self.size <= INLINE_MAX

    def inline_bytes(self) -> bytes:
        """Return the whole content of a small file, zero-filled to its size."""
        plain = bytes(self.dirty.get(0, self.inline))
        return plain + bytes(self.size - len(plain))


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
