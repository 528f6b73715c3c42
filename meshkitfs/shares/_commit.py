"""A local commit: freeze what changed, seal it bottom-up, and leave a complete new tree on this device.

Freezing is synchronous, so a commit shows the share as it was at one moment: a rename can never be caught
half done. Everything after that works on the frozen values while the live tree goes on changing. Nothing
is published here; see `_share`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import trio

from meshkitfs.core.blocks import BLOCK_SIZES, INLINE_MAX, REFS_PER_INDEX, SealedBlock
from meshkitfs.core.entries import Entry
from meshkitfs.core.manifest import (
    DirManifest,
    FileManifest,
    PageRef,
    RootAttrs,
    seal_index,
    seal_manifest,
    seal_page,
)
from meshkitfs.errors import MeshkitError
from meshkitfs.shares._content import LARGE_BLOCK, SMALL_BLOCK, RefTable
from meshkitfs.shares._nodes import Child, DirNode, FileNode, Node, Part
from meshkitfs.shares._sealer import SealJob
from meshkitfs.shares._tree import Tree
from meshkitfs.state import Spool

__all__ = ["Frozen", "freeze", "settle", "thaw", "write_out"]

# How long the sealing of small things may hold the event loop at a time.
_SLICE_S = 0.0005
_WRITE_BATCH = 128


@dataclass(slots=True)
class _File:
    node: FileNode
    generation: int
    revision: int
    skeleton: Entry
    # Nothing but attributes changed: the manifest that exists goes on being used.
    keep: Entry | None = None
    size: int = 0
    block_size: int = 0
    lineage: bytes = b""
    inline: bytes | None = None
    table: RefTable | None = None
    jobs: list[SealJob] = field(default_factory=list)


@dataclass(slots=True)
class _Part:
    part: Part
    page_id: int
    first: bytes
    count: int
    ref: bytes
    # Sorted children of a part that has to be written; None for one that stays as it is.
    items: list[tuple[bytes, Child]] | None


@dataclass(slots=True)
class _Dir:
    node: DirNode
    generation: int
    depth: int
    skeleton: Entry
    inline: bool
    count: int
    parts: list[_Part]
    # It is not loaded, so only its attributes can have changed: the manifest that exists goes on being used.
    keep: Entry | None = None


@dataclass(slots=True)
class _Plain:
    """A symlink: it has no manifest, its entry is all there is."""

    node: Node
    generation: int
    skeleton: Entry


@dataclass(slots=True)
class Frozen:
    """What one commit will write. ``staged`` collects its blocks: digest -> size."""

    files: list[_File]
    directories: list[_Dir]
    others: list[_Plain]
    links: tuple[Entry | None, bytes]
    staged: dict[bytes, int]
    entries: dict[Node, Entry] = field(default_factory=dict)
    written: list[tuple[Part, bytes]] = field(default_factory=list)
    root: bytes = b""
    # Digests of the manifests, pages and index blocks that were spooled for this commit and nothing else.
    sealed: list[bytes] = field(default_factory=list)

    def owners(self) -> list[_File | _Plain | _Dir]:
        return [*self.files, *self.others, *self.directories]


def _skeleton(node: Node, size: int) -> Entry:
    return Entry(
        node.name, node.kind, node.oid, node.mode, node.mtime_ns, node.ctime_ns, size, 0, 0, b"",
        node.extra() or None,
    )  # fmt: skip


def freeze(tree: Tree) -> Frozen | None:
    """Take everything that changed since the last commit; None if nothing did.

    Synchronous. The parts of directories count as written from here on; `thaw` takes that back.
    """
    climbed: set[DirNode] = set()
    leaves: list[Node] = []
    for node in tree.dirty:
        if node.parent is None and node is not tree.root and node is not tree.links:
            continue
        if isinstance(node, DirNode):
            climbed.add(node)
        else:
            leaves.append(node)
        _climb(tree, node, climbed)
    tree.dirty.clear()
    if not climbed and not leaves:
        return None
    assert isinstance(tree.root, DirNode)  # only directory shares are written
    climbed.add(tree.root)
    frozen = Frozen(
        [], [], [], (tree.links.entry, tree.links.oid), tree.sealer.take_fresh(tree.nameless_digests())
    )
    for node in leaves:
        if isinstance(node, FileNode):
            frozen.files.append(_freeze_file(node, frozen.staged))
        else:
            frozen.others.append(_Plain(node, node.generation, _skeleton(node, node_size(node))))
    for node in climbed:
        frozen.directories.append(_freeze_directory(tree, node))
    # Children before parents, the root last; the link table just before the root that refers to it.
    frozen.directories.sort(key=lambda item: item.depth, reverse=True)
    for owner in frozen.owners():
        # Held until the commit has settled: a directory on the way to a change may itself be clean, and
        # if the kernel forgot it meanwhile, its old entry would take its place.
        owner.node.opens += 1
    return frozen


def node_size(node: Node) -> int:
    """Return st_size of a node, as its entry records it."""
    if isinstance(node, FileNode):
        return node.size
    return len(getattr(node, "target", b""))


def _climb(tree: Tree, node: Node, climbed: set[DirNode]) -> None:
    """Note in every directory above ``node`` that the entry on the way down is out of date."""
    at = node
    while at.parent is not None:
        parent = at.parent
        parent.soil(at.name)
        if parent in climbed:
            return
        climbed.add(parent)
        at = parent


def _freeze_file(node: FileNode, staged: dict[bytes, int]) -> _File:
    content = node.content
    size = node.size
    if content is None or (node.entry is not None and content.revision == content.committed):
        return _File(node, node.generation, 0, _skeleton(node, size), keep=node.entry)
    if content.inlinable:
        return _File(
            node, node.generation, content.revision, _skeleton(node, size), size=size, block_size=SMALL_BLOCK,
            inline=content.inline_bytes(),
        )  # fmt: skip
    if not content.block_size:
        # A file that is synced while it grows, or written here and there, is a database: small blocks.
        content.decide(SMALL_BLOCK if content.random else LARGE_BLOCK)
    for i in list(content.dirty):
        content.seal(i)
    jobs = list(content.sealing.values())
    for job in jobs:
        job.commit = staged
    table = content.table.copy(job.index for job in jobs)
    table.resize(-(-size // content.block_size))
    return _File(
        node, node.generation, content.revision, _skeleton(node, size), size=size,
        block_size=content.block_size, table=table, jobs=jobs,
        lineage=b"" if content.oid == node.oid else content.oid,
    )  # fmt: skip


def _freeze_directory(tree: Tree, node: DirNode) -> _Dir:
    depth = 0
    at: DirNode | None = node.parent
    while at is not None:
        depth += 2
        at = at.parent
    if node is tree.links:
        depth = 1
    if node.children is None:
        return _Dir(node, node.generation, depth, _skeleton(node, 0), False, 0, [], node.entry)
    inline = node.arrange()
    parts = []
    for part in node.parts:
        items: list[tuple[bytes, Child]] | None = None
        if part.dirty:
            children = node.children
            items = [(name, children[name]) for name in sorted(part.names)]
            part.dirty = False
        parts.append(_Part(part, part.page_id, part.first, len(part.names), part.ref, items))
    count = len(node.children or ())
    return _Dir(node, node.generation, depth, _skeleton(node, 0), inline, count, parts)


def thaw(tree: Tree, frozen: Frozen, *, named: bool = False) -> None:
    """The commit did not happen: everything it took is changed again.

    ``named`` says that the state database may name it all the same, so that nothing of it may go.
    """
    for directory in frozen.directories:
        for item in directory.parts:
            if item.items is not None:
                item.part.dirty = True
    for file in frozen.files:
        for job in file.jobs:
            # What is still being sealed must be staged by the next commit, not by this one.
            job.commit = None
    if not named:
        # The next try seals its own. On a disk that is full for long, these would leave it no room.
        for digest in frozen.sealed:
            frozen.staged.pop(digest, None)
        tree.sealer.dispose(frozen.sealed)
    tree.sealer.give_back(frozen.staged, named=named)
    for owner in frozen.owners():
        node = owner.node
        node.opens -= 1
        if node.parent is not None or node is tree.root or node is tree.links:
            tree.dirty.add(node)
        else:
            tree.evict(node)


async def write_out(
    tree: Tree, frozen: Frozen, spool: Spool, epoch: int, version: int, root_key: bytes
) -> None:
    """Seal and spool all of ``frozen``; afterwards ``frozen.root`` is the digest of the new root manifest.

    Not durable before `Spool.sync`. Raises MeshkitError ``no_space`` when the disk is full.
    """
    sink = _Sink(spool, tree.sealer.spooled, frozen)
    slices = _Slices()
    for item in frozen.files:
        for job in item.jobs:
            await job.done.wait()
            if job.error is not None:
                raise job.error
        frozen.entries[item.node] = await _write_file(item, sink, epoch)
        await sink.flush(_WRITE_BATCH)
        await slices.breathe()
    for plain in frozen.others:
        frozen.entries[plain.node] = plain.skeleton._replace(epoch=epoch, ver=plain.node.version + 1)
    for directory in frozen.directories:
        async for _ in _write_directory(tree, directory, frozen, sink, epoch, version, root_key):
            await sink.flush(_WRITE_BATCH)
            await slices.breathe()
    await sink.flush(0)


class _Slices:
    """Lets other tasks run whenever a slice of the loop's time is used up."""

    def __init__(self) -> None:
        self._end = time.perf_counter() + _SLICE_S

    async def breathe(self) -> None:
        if time.perf_counter() > self._end:
            await trio.lowlevel.checkpoint()
            self._end = time.perf_counter() + _SLICE_S


class _Sink:
    """Collects sealed manifests and pages and writes them to the spool, many per thread hop."""

    def __init__(self, spool: Spool, spooled: set[bytes], frozen: Frozen) -> None:
        self._spool = spool
        self._spooled = spooled
        self._frozen = frozen
        self._waiting: list[SealedBlock] = []

    def add(self, block: SealedBlock) -> None:
        self._waiting.append(block)

    async def flush(self, above: int) -> None:
        """Write what waits, if it is more than ``above`` blocks."""
        if len(self._waiting) > above:
            blocks, self._waiting = self._waiting, []
            await trio.to_thread.run_sync(self._write, blocks)
            for block in blocks:
                self._spooled.add(block.digest)
                self._frozen.staged[block.digest] = len(block.data)

    def _write(self, blocks: list[SealedBlock]) -> None:
        for block in blocks:
            self._spool.write(block)
            self._frozen.sealed.append(block.digest)


async def _write_file(item: _File, sink: _Sink, epoch: int) -> Entry:
    if item.keep is not None:
        keep = item.keep
        return item.skeleton._replace(epoch=keep.epoch, ver=keep.ver, ref=keep.ref)
    node = item.node
    ver = node.version + 1
    if item.inline is not None:
        manifest = FileManifest(node.oid, epoch, ver, item.size, item.block_size, item.inline)
    else:
        table = item.table
        assert table is not None  # a file is frozen either inline or with its table
        for job in item.jobs:
            if job.index < table.count:
                table.set(job.index, job.ref)
        if table.count <= REFS_PER_INDEX:
            manifest = FileManifest(
                node.oid,
                epoch,
                ver,
                item.size,
                item.block_size,
                None,
                table.segment_bytes(0),
                lineage=item.lineage,
            )
        else:
            await _write_index(table, item.lineage or node.oid, sink)
            manifest = FileManifest(
                node.oid, epoch, ver, item.size, item.block_size, None,
                index=bytes(table.index), lineage=item.lineage,
            )  # fmt: skip
    ref, block = seal_manifest(manifest)
    sink.add(block)
    return item.skeleton._replace(epoch=epoch, ver=ver, ref=ref)


async def _write_index(table: RefTable, oid: bytes, sink: _Sink) -> None:
    """Seal the index blocks of a large file's changed segments."""
    changed = table.changed_segments()
    segments = -(-table.count // REFS_PER_INDEX)
    table.index.extend(bytes(max(0, segments * 64 - len(table.index))))
    for number in changed:
        if number in table.segments:
            ref, block = seal_index(oid, number, table.segment_bytes(number))
            table.index[number * 64 : (number + 1) * 64] = ref
            if block.digest:
                sink.add(block)
        await trio.lowlevel.checkpoint()


async def _write_directory(
    tree: Tree, item: _Dir, frozen: Frozen, sink: _Sink, epoch: int, version: int, root_key: bytes
) -> AsyncIterator[None]:
    """Seal a directory's changed pages and its manifest, pausing between them for the caller."""
    node, keep = item.node, item.keep
    if keep is not None:
        frozen.entries[node] = item.skeleton._replace(epoch=keep.epoch, ver=keep.ver, ref=keep.ref)
        return
    is_root = node is tree.root
    entries: tuple[Entry, ...] | None = None
    pages: list[PageRef] = []
    if item.inline:
        assert len(item.parts) == 1
        assert item.parts[0].items is not None
        entries = tuple(_entry_of(name, child, frozen) for name, child in item.parts[0].items)
        frozen.written.append((item.parts[0].part, b"inline"))
    else:
        for part in item.parts:
            ref = part.ref
            if part.items is not None:
                listed = [_entry_of(name, child, frozen) for name, child in part.items]
                ref, block = seal_page(node.oid, part.page_id, listed)
                sink.add(block)
                frozen.written.append((part.part, ref))
                yield
            pages.append(PageRef(part.page_id, part.first, part.count, ref))
    ver = version if is_root else node.version + 1
    manifest = DirManifest(node.oid, epoch, ver, item.count, entries, tuple(pages))
    if is_root:
        manifest = _root_manifest(manifest, item, frozen, tree)
    ref, block = seal_manifest(manifest, root_key if is_root else None)
    sink.add(block)
    if is_root:
        frozen.root = block.digest
    frozen.entries[node] = item.skeleton._replace(epoch=epoch, ver=ver, ref=ref)
    yield


def _root_manifest(manifest: DirManifest, item: _Dir, frozen: Frozen, tree: Tree) -> DirManifest:
    skeleton = item.skeleton
    links = frozen.entries.get(tree.links, frozen.links[0])
    extra = {key: value for key, value in (skeleton.extra or {}).items() if key == "x"}
    return DirManifest(
        manifest.oid, manifest.epoch, manifest.ver, manifest.count, manifest.entries, manifest.pages,
        links=links.ref if links is not None else None,
        links_oid=frozen.links[1] if links is not None else b"",
        links_ver=links.ver if links is not None else 0,
        links_epoch=links.epoch if links is not None else 0,
        root=RootAttrs(skeleton.mode, skeleton.mtime_ns, skeleton.ctime_ns, extra or None),
    )  # fmt: skip


def _entry_of(name: bytes, child: Child, frozen: Frozen) -> Entry:
    if isinstance(child, Entry):
        return child if child.name == name else child._replace(name=name)
    entry = frozen.entries.get(child) or child.entry
    if entry is None:
        raise MeshkitError("internal_error", f"object {child.oid.hex()[:8]} was not written")
    return entry if entry.name == name else entry._replace(name=name)


def settle(tree: Tree, frozen: Frozen, on_clean: Callable[[Node], None]) -> None:
    """The commit is durable: nodes take their new entries, and are clean if they have not changed again."""
    tree.sealer.settled()
    for part, ref in frozen.written:
        # A part that changed again keeps its new reference too: it is what the last commit says of it.
        part.ref = ref
    for item in frozen.files:
        _settle_file(item, frozen.entries[item.node])
    for owner in frozen.owners():
        node = owner.node
        node.opens -= 1
        old, node.entry = node.entry, frozen.entries[node]
        node.version = node.entry.ver
        if tree.on_settled is not None:
            tree.on_settled(node, owner.generation, old, node.entry)
        if node.generation == owner.generation:
            node.clean_generation = node.generation
            on_clean(node)
        elif node.parent is None:
            tree.evict(node)


def _settle_file(item: _File, entry: Entry) -> None:
    content = item.node.content
    if content is None or item.keep is not None:
        return
    unchanged = content.revision == item.revision
    if unchanged:
        content.committed = item.revision
        if item.inline is not None:
            content.inline = item.inline
            for buffer in content.dirty.values():
                content.sealer.hold(-len(buffer))
            content.dirty.clear()
        elif item.table is not None and item.table.index:
            content.table.adopt_index(item.table)


assert max(BLOCK_SIZES) >= LARGE_BLOCK > INLINE_MAX  # the sizes this module relies on
