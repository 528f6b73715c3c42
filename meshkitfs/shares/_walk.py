"""Walking everything that versions of a share consist of: manifests, pages, index blocks and data blocks.

Every block has a key of its own, so no digest is ever made twice, and a manifest is written anew whenever
something below it changes. A digest that was met before therefore stands for all that is below it, and is
not entered again: walking many versions costs what differs between them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from meshkitfs.core.blocks import HOLE, REF_SIZE, REFS_PER_INDEX, ContentKey, VerifiedBlock, Where, open_block
from meshkitfs.core.entries import DIR, FILE, HARDLINK, Entry
from meshkitfs.core.manifest import FileManifest, block_count, parse_index, parse_manifest, parse_page
from meshkitfs.core.pages import PageRef
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant

__all__ = [
    "DATA",
    "FAULTS",
    "INDEX",
    "MANIFEST",
    "PAGE",
    "Names",
    "Piece",
    "Walk",
    "file_piece",
    "root_piece",
]

MANIFEST: Final = "manifest"
PAGE: Final = "page"
INDEX: Final = "index"
DATA: Final = "block"

# What is known to be wrong with a block. Every other error means that nothing is known about it.
FAULTS: Final = frozenset({"block_unavailable", "cid_mismatch", "invalid_envelope"})

WORKERS: Final = 8
# Data blocks handed over at once.
_BATCH: Final = 16
# The path of the link table; no name can be empty, so no other path begins like those below it.
_LINKS: Final = b"/"

# The names of hard-linked objects that were met: the name in the link table to one path.
Names = dict[bytes, bytes]


@dataclass(frozen=True, slots=True, repr=False)
class Piece:
    """One sealed block of a version, with what is needed to open it.

    ``ref`` is its reference (digest || key); it is empty for a version's root manifest, whose key a grant
    derives from ``epoch`` and ``version``. ``path`` is one path of the object it belongs to, ``depth`` how
    many blocks had to be opened to find it.
    """

    digest: bytes
    kind: str
    where: Where
    path: bytes
    depth: int
    ref: bytes = b""
    epoch: int = 0
    version: int = 0
    below: Callable[[Piece, memoryview, Names], list[Piece]] | None = None

    def __repr__(self) -> str:
        # The reference contains a key, and names do not belong into logs either.
        return f"Piece({self.kind}, {self.digest.hex()})"

    async def reach(self, grant: Grant) -> None:
        """Make `key` work: the root of an older epoch may need a release."""
        if not self.ref:
            await grant.reach(self.epoch)

    def key(self, grant: Grant) -> ContentKey:
        """Return the key that opens it."""
        return grant.content_key(self.ref) if self.ref else grant.root_key(self.epoch, self.version)


def root_piece(oid: bytes, root: bytes, epoch: int, version: int) -> Piece:
    """Return the root manifest of a version, from which a walk begins; ``root`` is its digest."""
    return Piece(
        root, MANIFEST, Where.manifest(oid, epoch, version), b"", 0, epoch=epoch, version=version,
        below=partial(_object, oid, epoch, version, None, None),
    )  # fmt: skip


def file_piece(entry: Entry) -> Piece:
    """Return the manifest of a file by its ``entry``, wherever that stands."""
    return Piece(
        entry.ref[:32], MANIFEST, Where.manifest(entry.oid, entry.epoch, entry.ver), b"", 0, entry.ref,
        below=partial(_object, entry.oid, entry.epoch, entry.ver, FILE, entry.size),
    )  # fmt: skip


class Walk:
    """One walk, or several over the same ground: what was ``seen`` stays seen.

    - ``lease`` returns a live grant; it is asked for each block that is opened, so that a long walk outlives
      a lease. ``fetch`` returns a block by digest.
    - ``visit(piece)`` is called for each piece once, a parent before what is below it.
    - ``refer(parent, piece)`` is called for each reference, also to what was seen before.
    - ``blocks(pieces)`` is awaited for the data blocks, a few at a time, in several tasks at once.
    - ``skip`` holds digests not to visit; ``descend(digest)`` says whether to open what is visited.
    - ``fault(piece, error)`` makes the walk tolerant: it is told what is missing or damaged (`FAULTS`), and
      the walk goes on without what is below. Without it, and for every other error, the walk raises.
    """

    def __init__(
        self,
        lease: Callable[[], Awaitable[Grant]],
        fetch: Callable[[bytes], Awaitable[VerifiedBlock]],
        *,
        visit: Callable[[Piece], None] | None = None,
        refer: Callable[[Piece, Piece], None] | None = None,
        blocks: Callable[[Sequence[Piece]], Awaitable[None]] | None = None,
        skip: Container[bytes] = frozenset(),
        descend: Callable[[bytes], bool] | None = None,
        fault: Callable[[Piece, MeshkitError], None] | None = None,
    ) -> None:
        self._lease = lease
        self._fetch = fetch
        self._visit = visit
        self._refer = refer
        self._blocks = blocks
        self._skip = skip
        self._descend = descend
        self._fault = fault
        self.seen: set[bytes] = set()
        self.names: Names = {}
        # What is to be opened or handed over. Last in, first out: a tree is walked down before across, so
        # that little waits here.
        self._stack: list[Piece | list[Piece]] = []
        self._busy = 0
        self._idle = trio.lowlevel.ParkingLot()

    async def run(self, pieces: Iterable[Piece]) -> None:
        """Walk ``pieces`` and all that is below them. Raises the first error."""
        for piece in pieces:
            self._meet(piece)
        errors: list[MeshkitError] = []
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, errors, nursery.cancel_scope)
        if errors:
            self._stack.clear()
            raise errors[0]

    def _meet(self, piece: Piece) -> None:
        if piece.digest in self.seen or piece.digest in self._skip:
            return
        self.seen.add(piece.digest)
        if self._visit is not None:
            self._visit(piece)
        if piece.below is not None and (self._descend is None or self._descend(piece.digest)):
            self._stack.append(piece)

    async def _work(self, errors: list[MeshkitError], scope: trio.CancelScope) -> None:
        """Take from the stack until it is empty and nobody can put anything on it any more."""
        while True:
            while not self._stack:
                if not self._busy:
                    self._idle.unpark_all()
                    return
                await self._idle.park()
            item = self._stack.pop()
            self._busy += 1
            try:
                if isinstance(item, Piece):
                    await self._enter(item)
                elif self._blocks is not None:
                    await self._blocks(item)
            except MeshkitError as error:
                errors.append(error)
                scope.cancel()
            finally:
                self._busy -= 1
                self._idle.unpark_all()

    async def _enter(self, piece: Piece) -> None:
        try:
            found = await self._open(piece)
        except MeshkitError as error:
            if self._fault is None or error.code not in FAULTS:
                raise
            self._fault(piece, error)
            return
        batch: list[Piece] = []
        for child in found:
            if self._refer is not None:
                self._refer(piece, child)
            if child.kind == DATA and child.digest not in self.seen and child.digest not in self._skip:
                batch.append(child)
            self._meet(child)
        if self._blocks is not None:
            self._stack += [batch[at : at + _BATCH] for at in range(0, len(batch), _BATCH)]

    async def _open(self, piece: Piece) -> list[Piece]:
        grant = await self._lease()
        block = await self._fetch(piece.digest)
        if block.digest != piece.digest:
            raise MeshkitError("cid_mismatch", "the store gave another block than the one asked for")
        await piece.reach(grant)
        # In a thread: a large directory takes a while to parse, and a mount is to be served meanwhile.
        return await trio.to_thread.run_sync(_read, piece, piece.key(grant), block, self.names)


def _read(piece: Piece, key: ContentKey, block: VerifiedBlock, names: Names) -> list[Piece]:
    assert piece.below is not None
    return piece.below(piece, open_block(key, block, piece.where), names)


def _object(
    oid: bytes, epoch: int, version: int, kind: int | None, size: int | None,
    piece: Piece, plain: memoryview, names: Names,
) -> list[Piece]:  # fmt: skip
    """Return what a manifest names; ``kind`` and ``size`` are what its entry promises (None: anything)."""
    manifest = parse_manifest(plain, oid, epoch, version)
    if isinstance(manifest, FileManifest):
        if kind == DIR or size not in (None, manifest.size):
            raise MeshkitError("invalid_envelope", "a file's manifest does not fit its entry")
        return _content(manifest, piece)
    if kind == FILE:
        raise MeshkitError("invalid_envelope", "a file's entry names a directory")
    found = _entries(manifest.entries or (), piece, names)
    for i, page in enumerate(manifest.pages):
        upper = manifest.pages[i + 1].first if i + 1 < len(manifest.pages) else None
        place = Where.page(oid, page.page_id)
        found.append(_child(piece, page.ref, PAGE, place, piece.path, partial(_page, page, upper)))
    if manifest.links is not None:
        place = Where.manifest(manifest.links_oid, manifest.links_epoch, manifest.links_ver)
        read = partial(_object, manifest.links_oid, manifest.links_epoch, manifest.links_ver, DIR, None)
        found.append(_child(piece, manifest.links, MANIFEST, place, _LINKS, read))
    return found


def _page(page: PageRef, upper: bytes | None, piece: Piece, plain: memoryview, names: Names) -> list[Piece]:
    return _entries(parse_page(plain, page, upper), piece, names)


def _entries(entries: Iterable[Entry], piece: Piece, names: Names) -> list[Piece]:
    found = []
    for entry in entries:
        path = piece.path + b"/" + entry.name if piece.path else entry.name
        if entry.kind == HARDLINK:
            names.setdefault(_LINKS + b"/" + entry.oid.hex().encode(), path)
        elif entry.ref:
            read = partial(
                _object, entry.oid, entry.epoch, entry.ver, entry.kind,
                entry.size if entry.kind == FILE else None,
            )  # fmt: skip
            place = Where.manifest(entry.oid, entry.epoch, entry.ver)
            found.append(_child(piece, entry.ref, MANIFEST, place, path, read))
    return found


def _content(manifest: FileManifest, piece: Piece) -> list[Piece]:
    owner = manifest.lineage or manifest.oid
    if not manifest.index:
        return _data(owner, 0, manifest.refs, piece)
    blocks = block_count(manifest.size, manifest.block_size)
    found = []
    for i in range(len(manifest.index) // REF_SIZE):
        ref = manifest.index[i * REF_SIZE : (i + 1) * REF_SIZE]
        if ref != HOLE:
            first = i * REFS_PER_INDEX
            read = partial(_segment, owner, first, min(REFS_PER_INDEX, blocks - first))
            found.append(_child(piece, ref, INDEX, Where.index(owner, i), piece.path, read))
    return found


def _segment(
    owner: bytes, first: int, count: int, piece: Piece, plain: memoryview, _names: Names
) -> list[Piece]:
    return _data(owner, first, parse_index(plain, count), piece)


def _data(owner: bytes, first: int, refs: bytes, piece: Piece) -> list[Piece]:
    found = []
    for i in range(len(refs) // REF_SIZE):
        ref = refs[i * REF_SIZE : (i + 1) * REF_SIZE]
        if ref != HOLE:
            found.append(_child(piece, ref, DATA, Where.block(owner, first + i), piece.path, None))
    return found


def _child(
    parent: Piece, ref: bytes, kind: str, where: Where, path: bytes,
    below: Callable[[Piece, memoryview, Names], list[Piece]] | None,
) -> Piece:  # fmt: skip
    return Piece(ref[:32], kind, where, path, parent.depth + 1, ref, below=below)
