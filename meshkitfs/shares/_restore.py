"""Bringing back what a past version had: old content under live names, without copying a block.

First the past is compared with the present, and nothing is changed if the two cannot be brought together.
Then it is brought back in small batches, each of them one change of the tree; what a batch replaces was
published before, so that it stays in the history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import DIR, FILE, HARDLINK, SYMLINK, Entry
from meshkitfs.core.manifest import DirManifest, FileManifest, parse_manifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._content import FileContent
from meshkitfs.shares._events import NameChanged, NodeChanged
from meshkitfs.shares._history import Version
from meshkitfs.shares._lookback import Lookback, open_directory
from meshkitfs.shares._nodes import Child, DirNode, FileNode, Node, SymlinkNode
from meshkitfs.shares._past import SNAPSHOTS
from meshkitfs.shares._tree import Tree, check_name, in_parallel
from meshkitfs.shares._versions import Directory, Library

if TYPE_CHECKING:
    from meshkitfs.shares._share import Share

__all__ = ["Restored", "restore"]

# Objects that are brought back in one change of the tree; a merge waits for at most this.
BATCH: Final = 32
# How often a file that is written at this very moment is tried again.
_TRIES: Final = 20

Path = tuple[bytes, ...]


@dataclass(slots=True)
class Restored:
    """What was brought back: how many of each kind were made or changed; ``same`` were so already.

    ``replaced`` is the version that has what was there before.
    """

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    same: int = 0
    replaced: int = 0


@dataclass(slots=True)
class _Item:
    """One object to bring back to ``path``; ``linked`` if it had several names."""

    path: Path
    entry: Entry
    linked: bool
    manifest: FileManifest | None = field(default=None, repr=False)


async def restore(
    share: Share, version: Version, path: Path, to: Path | None, progress: Callable[[int, int], None]
) -> Restored:
    """Bring ``path`` of ``version`` back to its place, or to the free place ``to``; returns when published.

    ``progress`` is told how many of how many objects are done. Raises ``path_not_found``, ``path_exists``
    (something else is in the way), ``version_not_granted``, ``right_not_granted``, ``block_unavailable`` and
    what can keep a change from being published. If it fails on the way, what was done until then stays.
    """
    target = path if to is None else to
    for name in target:
        try:
            check_name(name)
        except OSError:
            raise MeshkitError("invalid_name", repr(name.decode(errors="replace"))) from None
    if target[:1] == (SNAPSHOTS,):
        raise MeshkitError("invalid_name", "'.snapshots' is where the versions are")
    await share.use("write", current=True)
    # What this replaces is to be found in the history.
    await share.flush()
    work = _Restore(share, version, target, fresh=to is not None)
    work.done.replaced = share.base.version
    try:
        await work.plan(path)
        await work.carry_out(progress)
    finally:
        work.let_go()
    await share.flush()
    return work.done


class _Restore:
    def __init__(self, share: Share, version: Version, target: Path, *, fresh: bool) -> None:
        self._share = share
        self._version = version
        self._target = target
        # The target must be free.
        self._fresh = fresh
        self._above: list[Entry] = []
        self._items: list[_Item] = []
        self._made: list[_Item] = []
        # Objects with several names that were brought back under one of them already.
        self._linked: dict[bytes, Node] = {}
        self.done = Restored()

    # -- reading -------------------------------------------------------------------------------------

    async def plan(self, path: Path) -> None:
        """Find out what has to be done. Raises if the past does not fit the present; changes nothing."""
        share = self._share
        grant = await share.use("write")
        tree = share.tree
        assert tree is not None  # `use` loads it
        root = await open_directory(share, grant, self._version)
        found = await Lookback(tree, grant).find(root, path)
        if found is None:
            raise MeshkitError("path_not_found", f"{_text(path)!r} in version {self._version.number}")
        self._above = [] if self._fresh else list(found.above)
        library = Library(tree, grant)
        linked = found.name.kind == HARDLINK
        waiting: list[tuple[_Item, Child | None, DirNode | None]] = [
            (_Item(self._target, found.entry, linked), await self._target_now(tree, grant), None)
        ]
        while waiting:
            item, there, parent = waiting.pop()
            if not self._wanted(tree, item, there):
                continue
            self._items.append(item)
            if item.entry.kind != DIR:
                continue
            old = await (library.directory(item.entry) if item.entry.name else library.root(root))
            if isinstance(there, Entry) and parent is not None:
                there = _child(tree, parent, item.path[-1])
            below = there if isinstance(there, DirNode) else None
            if below is not None:
                await tree.load(await share.use("write"), below)
            for entry in old.entries():
                linked = entry.kind == HARDLINK
                meant = await self._object(library, root, entry) if linked else entry
                place = (*item.path, entry.name)
                held = None if below is None else (below.children or {}).get(entry.name)
                if below is not None and held is not None and held.kind == HARDLINK:
                    held = _child(tree, below, entry.name)
                if place != (SNAPSHOTS,):
                    waiting.append((_Item(place, meant, linked), held, below))

    async def _target_now(self, tree: Tree, grant: Grant) -> Node | None:
        """Return what is at the target now, None if nothing is. Raises ``path_exists`` if it is no use."""
        for depth in range(len(self._target)):
            above = await _reach(tree, grant, self._target[:depth])
            if above is None:
                return None
            if not isinstance(above, DirNode):
                raise MeshkitError("path_exists", f"{_text(self._target[:depth])!r} is no directory now")
        node = await _reach(tree, grant, self._target)
        if self._fresh and node is not None:
            raise MeshkitError("path_exists", _text(self._target))
        return node

    async def _object(self, library: Library, root: DirManifest, name: Entry) -> Entry:
        table: Directory | None = await library.links(root)
        found = None if table is None else table.listing().get(name.oid.hex().encode())
        if found is None:
            raise MeshkitError("invalid_envelope", "a hard link names an object that is not there")
        return found

    def _wanted(self, tree: Tree, item: _Item, there: Child | None) -> bool:
        """Return whether ``item`` differs from what is ``there``. Raises ``path_exists`` for another kind."""
        if there is None:
            return True
        if there.kind != item.entry.kind:
            raise MeshkitError(
                "path_exists",
                f"{_text(item.path)!r} is a {_KINDS[there.kind]} now, and was a {_KINDS[item.entry.kind]}",
            )
        entry = there.entry if isinstance(there, Node) else there
        # Of a directory in memory, also what is in it may have changed.
        dirty = isinstance(there, Node) and (tree.dirty if there.kind == DIR else there.dirty)
        if entry is None or dirty or not _alike(entry, item.entry):
            return True
        if there.kind != DIR:
            self.done.same += 1
            if item.linked and isinstance(there, Node):
                self._hold(item, there)
        return False

    def _hold(self, item: _Item, node: Node) -> None:
        """Keep the node of an object with several names, for the other names that are brought back."""
        if item.linked and item.entry.oid not in self._linked:
            node.opens += 1
            self._linked[item.entry.oid] = node

    def let_go(self) -> None:
        """Let go of what was held until all was done."""
        tree = self._share.tree
        for node in self._linked.values():
            node.opens -= 1
            if tree is not None and tree.nodes.get(node.ino) is node:
                tree.evict(node)
        self._linked.clear()

    async def _read_contents(self, grant: Grant, items: Sequence[_Item]) -> None:
        tree = self._share.tree
        assert tree is not None
        files = [item for item in items if item.entry.kind == FILE and item.manifest is None]

        async def read(i: int) -> None:
            entry = files[i].entry
            where = Where.manifest(entry.oid, entry.epoch, entry.ver)
            plain = await tree.reader.open(grant, entry.ref, where)
            manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
            if not isinstance(manifest, FileManifest) or manifest.size != entry.size:
                raise MeshkitError("invalid_envelope", "a file's manifest does not fit its entry")
            files[i].manifest = manifest

        await in_parallel(read, len(files))

    # -- changing ------------------------------------------------------------------------------------

    async def carry_out(self, progress: Callable[[int, int], None]) -> None:
        """Bring everything back, a batch at a time, directories before what is in them."""
        share, total = self._share, len(self._items)
        for at in range(0, total, BATCH):
            batch = self._items[at : at + BATCH]
            progress(at, total)
            for _ in range(_TRIES):
                grant = await share.use("write")
                await self._read_contents(grant, batch)
                batch = await self._change(grant, batch)
                if not batch:
                    break
                # Somebody has written there meanwhile. That is published first, so that it is not lost.
                await share.flush()
                self.done.replaced = share.base.version
            else:
                raise MeshkitError("commit_pending", f"{_text(batch[0].path)!r} is written all the time")
            share.hurry()
        progress(total, total)
        await self._date_directories()

    async def _change(self, grant: Grant, batch: Sequence[_Item]) -> list[_Item]:
        """Bring a batch back in one change of the tree. Returns those that have to wait for a commit."""
        later = []
        async with self._share.changing() as tree:
            grant.check()
            if tree.links.children is None:
                await tree.load(grant, tree.links)
            for item in batch:
                if not await self._bring(tree, grant, item):
                    later.append(item)
                item.manifest = None
        return later

    async def _bring(self, tree: Tree, grant: Grant, item: _Item) -> bool:
        if not item.path:
            assert isinstance(tree.root, DirNode)
            self._attributes(tree, tree.root, item.entry)
            return True
        parent = await self._parent(tree, grant, item.path)
        name = item.path[-1]
        # From here on nothing waits until the name means what it is to mean (or its content is locked).
        if name not in (parent.children or ()):
            self._make(tree, parent, name, item)
            return True
        node = tree.node_of(parent, name)
        if node.kind != item.entry.kind or (self._fresh and item.path == self._target):
            raise MeshkitError("path_exists", f"{_text(item.path)!r} was made meanwhile")
        if isinstance(node, FileNode):
            return await self._replace(tree, node, item)
        if node.dirty and not isinstance(node, DirNode):
            return False
        if isinstance(node, SymlinkNode):
            node.target = (item.entry.extra or {})["target"]
            self.done.symlinks += 1
        self._attributes(tree, node, item.entry)
        return True

    async def _parent(self, tree: Tree, grant: Grant, path: Path) -> DirNode:
        """Return the directory that ``path`` is in, making those that are missing."""
        node: Node = tree.root
        for depth, name in enumerate(path[:-1]):
            assert isinstance(node, DirNode)  # checked below, and the root is one
            await tree.load(grant, node)
            if name in (node.children or ()):
                child = tree.node_of(node, name)
            else:
                old = self._above[depth] if depth < len(self._above) else None
                child = tree.new_directory(0o755 if old is None else old.mode)
                self._put(tree, node, name, child)
                if old is not None:
                    child.xattrs = dict((old.extra or {}).get("x", ()))
                self.done.directories += 1
            if not isinstance(child, DirNode):
                raise MeshkitError("path_exists", f"{_text(path[: depth + 1])!r} is no directory now")
            node = child
        assert isinstance(node, DirNode)
        await tree.load(grant, node)
        return node

    def _put(self, tree: Tree, parent: DirNode, name: bytes, node: Node) -> None:
        tree.create(parent, name, node)
        emit = self._share.services.emit
        emit(NameChanged(parent.ino, name, 0))
        emit(NodeChanged(parent.ino, False))

    def _make(self, tree: Tree, parent: DirNode, name: bytes, item: _Item) -> None:
        entry = item.entry
        twin = self._linked.get(entry.oid) if item.linked else None
        if twin is not None and tree.nodes.get(twin.ino) is twin and tree.is_named(twin):
            tree.link(twin, parent, name)
            self._share.services.emit(NameChanged(parent.ino, name, 0))
            self._share.services.emit(NodeChanged(twin.ino, False))
            self.done.files += 1
            return
        node: Node
        if entry.kind == DIR:
            node = tree.new_directory(entry.mode)
            self._made.append(item)
            self.done.directories += 1
        elif entry.kind == SYMLINK:
            node = tree.new_symlink((entry.extra or {})["target"])
            self.done.symlinks += 1
        else:
            assert item.manifest is not None  # read before
            file = tree.new_file(entry.mode)
            file.content = self._content(tree, file, item.manifest, entry)
            node = file
            self.done.files += 1
        self._put(tree, parent, name, node)
        self._attributes(tree, node, entry)
        self._hold(item, node)

    @staticmethod
    def _content(tree: Tree, node: FileNode, manifest: FileManifest, entry: Entry) -> FileContent:
        used = (entry.extra or {}).get("used", entry.size)
        content = FileContent(node.oid, tree.reader, tree.sealer, manifest, used)
        # Its blocks stay bound to the object they were written for.
        content.fork(manifest.lineage or entry.oid)
        return content

    async def _replace(self, tree: Tree, node: FileNode, item: _Item) -> bool:
        """Give a file its old content, under the same inode. False if it has changes of no version yet."""
        entry, manifest = item.entry, item.manifest
        assert manifest is not None  # read before
        if node.dirty:
            return False
        if node.entry is None or node.entry.ref != entry.ref:
            old_size = node.size
            if node.content is None:
                node.content = self._content(tree, node, manifest, entry)
            else:
                content = node.content
                # Whoever writes waits for this, and then writes into the old content that came back.
                async with content.lock:
                    if node.dirty or content.changed:
                        return False
                    used = (entry.extra or {}).get("used", entry.size)
                    content.become(manifest, used, manifest.lineage or entry.oid)
            node.past_sizes.add(old_size)
            node.kernel_current = False
        self._attributes(tree, node, entry, content=True)
        self.done.files += 1
        self._hold(item, node)
        return True

    def _attributes(self, tree: Tree, node: Node, entry: Entry, *, content: bool = False) -> None:
        xattrs = dict((entry.extra or {}).get("x", ()))
        if isinstance(node, DirNode) and (node.mode, node.xattrs) == (entry.mode, xattrs):
            return
        node.mode, node.xattrs = entry.mode, xattrs
        if not isinstance(node, DirNode):
            node.mtime_ns = node.atime_ns = entry.mtime_ns
        tree.touch(node)
        self._share.services.emit(NodeChanged(node.ino, content))

    async def _date_directories(self) -> None:
        """Give the directories that were made their old times, now that they are filled."""
        for at in range(0, len(self._made), BATCH):
            grant = await self._share.use("write")
            async with self._share.changing() as tree:
                grant.check()
                for item in self._made[at : at + BATCH]:
                    node = await _reach(tree, grant, item.path)
                    if isinstance(node, DirNode):
                        node.mtime_ns = node.atime_ns = item.entry.mtime_ns
                        tree.mark(node)


_KINDS: Final = {DIR: "directory", FILE: "file", SYMLINK: "symbolic link", HARDLINK: "file"}


def _alike(there: Entry, entry: Entry) -> bool:
    """Return whether two entries are of the same content and the same attributes."""
    extra, other = there.extra or {}, entry.extra or {}
    dated = there.mtime_ns == entry.mtime_ns or there.kind == DIR
    return dated and (there.ref, there.mode, extra.get("x"), extra.get("target")) == (
        entry.ref, entry.mode, other.get("x"), other.get("target"),
    )  # fmt: skip


def _child(tree: Tree, parent: DirNode, name: bytes) -> Node | None:
    """Return the node of a name in a loaded directory, None if there is none."""
    return tree.node_of(parent, name) if name in (parent.children or ()) else None


async def _reach(tree: Tree, grant: Grant, path: Path) -> Node | None:
    """Return the node at ``path``, None if there is none."""
    node: Node | None = tree.root
    for name in path:
        if not isinstance(node, DirNode):
            return None
        await tree.load(grant, node)
        node = _child(tree, node, name)
    return node


def _text(path: Path) -> str:
    return b"/".join(path).decode(errors="surrogateescape")
