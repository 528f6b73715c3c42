"""The block references of a file: packed, 64 bytes each, in segments of an index block's size."""

from __future__ import annotations

from collections.abc import Iterable

from meshkitfs.core.blocks import HOLE, REF_SIZE, REFS_PER_INDEX

__all__ = ["RefTable", "stored_refs"]


class RefTable:
    """The block references of a file, in segments that are loaded when first needed.

    A file of up to `REFS_PER_INDEX` blocks has one segment, which stands in the manifest. Larger files
    have one index block per segment. ``stored`` is how many references are not holes; with an ``index``
    it has to be told, since the segments are not looked at.
    """

    __slots__ = ("_changed", "count", "index", "segments", "stored")

    def __init__(self, count: int = 0, refs: bytes = b"", index: bytes = b"", stored: int = 0) -> None:
        self.count = count
        self.stored = stored if index else _stored(refs)
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
            # A segment that neither memory nor the index knows has never held anything.
            return HOLE if self.segment_needed(i) is None else None
        at = (i % REFS_PER_INDEX) * REF_SIZE
        return bytes(segment[at : at + REF_SIZE]) or HOLE

    def set(self, i: int, ref: bytes) -> None:
        """Store reference ``i``; its segment must be loaded or new."""
        number, place = divmod(i, REFS_PER_INDEX)
        segment = self.segments.setdefault(number, bytearray())
        at = place * REF_SIZE
        if len(segment) < at:
            segment.extend(bytes(at - len(segment)))
        self.stored += (ref != HOLE) - any(segment[at : at + REF_SIZE])
        segment[at : at + REF_SIZE] = ref
        self.count = max(self.count, i + 1)
        self._changed.add(number)

    def resize(self, count: int) -> list[bytes]:
        """Cut or extend (with holes) to ``count`` references; the last segment must be loaded.

        Returns the references that were cut off, as far as their segments are loaded.
        """
        cut: list[bytes] = []
        if count < self.count:
            kept, place = -(-count // REFS_PER_INDEX), count % REFS_PER_INDEX
            for number in range(kept, -(-self.count // REFS_PER_INDEX)):
                segment = self.segments.pop(number, None)
                if segment is not None:
                    cut += stored_refs(segment)
                elif any(self.index_ref(number)):
                    self.stored -= min(REFS_PER_INDEX, self.count - number * REFS_PER_INDEX)
            self._changed = {n for n in self._changed if n < kept}
            last = self.segments.get(kept - 1)
            if place and last is not None and len(last) > place * REF_SIZE:
                cut += stored_refs(last[place * REF_SIZE :])
                del last[place * REF_SIZE :]
                self._changed.add(kept - 1)
            del self.index[kept * REF_SIZE if count > REFS_PER_INDEX else 0 :]
            self.stored = max(0, self.stored - len(cut))
        self.count = count
        return cut

    def digests(self) -> list[bytes]:
        """Return the digests of every block in the loaded segments, which is where changes are."""
        return [ref[:32] for segment in self.segments.values() for ref in stored_refs(segment)]

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
        other = RefTable(self.count, index=bytes(self.index) or HOLE, stored=self.stored)
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


def stored_refs(packed: bytes | bytearray) -> list[bytes]:
    """Return the references in ``packed`` that are not holes."""
    every = (bytes(packed[at : at + REF_SIZE]) for at in range(0, len(packed), REF_SIZE))
    return [ref for ref in every if ref != HOLE]


def _stored(packed: bytes | bytearray) -> int:
    """Return how many references in ``packed`` are not holes."""
    if HOLE not in packed:
        return len(packed) // REF_SIZE
    return len(stored_refs(packed))
