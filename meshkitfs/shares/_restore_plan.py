"""What has to be brought back: a past version compared with the share of now. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from meshkitfs.core.entries import DIR, FILE, HARDLINK, SYMLINK, Entry
from meshkitfs.core.manifest import DirManifest, FileManifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._history import Version
from meshkitfs.shares._lookback import Lookback, open_directory
from meshkitfs.shares._nodes import Child, DirNode, Node
from meshkitfs.shares._past import SNAPSHOTS
from meshkitfs.shares._tree import Tree
from meshkitfs.shares._versions import Directory, Library
from meshkitfs.shares._walk import FAULTS

if TYPE_CHECKING:
    from meshkitfs.shares._share import Share

__all__ = ["Item", "Path", "Plan", "Twins", "reach", "text_of"]

Path = tuple[bytes, ...]


@dataclass(slots=True)
class Item:
    """One object to bring back to ``path``; ``linked`` if it had several names.

    ``now`` is what is there, if only its content can be another (brought back before, it has a manifest of
    its own); ``same`` says that it is not. ``lost`` says that some of it cannot be had any more.
    """

    path: Path
    entry: Entry
    linked: bool
    manifest: FileManifest | None = field(default=None, repr=False)
    now: Entry | None = None
    same: bool = False
    lost: bool = False


class Twins:
    """The nodes of objects that had several names, kept for the names that are brought back later."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, Node] = {}

    def hold(self, item: Item, node: Node) -> None:
        """Note that ``node`` is what the object of ``item`` has become, if it had several names."""
        if item.linked and item.entry.oid not in self._nodes:
            node.opens += 1
            self._nodes[item.entry.oid] = node

    def of(self, tree: Tree, item: Item) -> Node | None:
        """Return the node that ``item`` shall be another name of, None if there is none."""
        node = self._nodes.get(item.entry.oid) if item.linked else None
        return node if node is not None and tree.nodes.get(node.ino) is node and tree.is_named(node) else None

    def let_go(self, tree: Tree | None) -> None:
        """All is done: the nodes may leave memory."""
        for node in self._nodes.values():
            node.opens -= 1
            if tree is not None and tree.nodes.get(node.ino) is node:
                tree.evict(node)
        self._nodes.clear()


class Plan:
    """The objects of ``version`` to bring back to ``target``, which with ``fresh`` must be a free place.

    After `make`: ``items`` has directories before what is in them, ``above`` the old directories that the
    target was in, ``same`` counts what need not be brought back, and ``unreadable`` are directories in the
    target that cannot be, because they are missing or damaged in the old version.
    """

    def __init__(self, share: Share, version: Version, target: Path, *, fresh: bool, twins: Twins) -> None:
        self._share = share
        self._version = version
        self._target = target
        self._fresh = fresh
        self._twins = twins
        self.above: list[Entry] = []
        self.items: list[Item] = []
        self.same = 0
        self.unreadable: list[Path] = []

    async def make(self, path: Path) -> None:
        """Compare what ``path`` was with what is there. Raises ``path_not_found``, ``path_exists``."""
        share = self._share
        grant = await share.use("write")
        tree = share.tree
        assert tree is not None  # `use` loads it
        root = await open_directory(share, grant, self._version)
        found = await Lookback(tree.reader, grant).find(root, path)
        if found is None:
            raise MeshkitError("path_not_found", f"{text_of(path)!r} in version {self._version.number}")
        self.above = [] if self._fresh else list(found.above)
        library = Library(tree.reader, grant)
        linked = found.name.kind == HARDLINK
        waiting: list[tuple[Item, Child | None, DirNode | None]] = [
            (Item(self._target, found.entry, linked), await self._target_now(tree, grant), None)
        ]
        while waiting:
            item, there, parent = waiting.pop()
            if not self._wanted(tree, item, there):
                continue
            if item.entry.kind != DIR:
                self.items.append(item)
                continue
            try:
                old = await (library.directory(item.entry) if item.entry.name else library.root(root))
            except MeshkitError as error:
                if error.code not in FAULTS or not self.items:
                    raise
                self.unreadable.append(item.path)
                continue
            self.items.append(item)
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
                    waiting.append((Item(place, meant, linked), held, below))

    async def _target_now(self, tree: Tree, grant: Grant) -> Node | None:
        """Return what is at the target now, None if nothing is. Raises ``path_exists`` if it is no use."""
        for depth in range(len(self._target)):
            above = await reach(tree, grant, self._target[:depth])
            if above is None:
                return None
            if not isinstance(above, DirNode):
                raise MeshkitError("path_exists", f"{text_of(self._target[:depth])!r} is no directory now")
        node = await reach(tree, grant, self._target)
        if self._fresh and node is not None:
            raise MeshkitError("path_exists", text_of(self._target))
        return node

    async def _object(self, library: Library, root: DirManifest, name: Entry) -> Entry:
        table: Directory | None = await library.links(root)
        found = None if table is None else table.listing().get(name.oid.hex().encode())
        if found is None:
            raise MeshkitError("invalid_envelope", "a hard link names an object that is not there")
        return found

    def _wanted(self, tree: Tree, item: Item, there: Child | None) -> bool:
        """Return whether ``item`` differs from what is ``there``. Raises ``path_exists`` for another kind."""
        if there is None:
            return True
        if there.kind != item.entry.kind:
            raise MeshkitError(
                "path_exists",
                f"{text_of(item.path)!r} is a {_KINDS[there.kind]} now, and was a {_KINDS[item.entry.kind]}",
            )
        entry = there.entry if isinstance(there, Node) else there
        # Of a directory in memory, also what is in it may have changed.
        dirty = isinstance(there, Node) and (tree.dirty if there.kind == DIR else there.dirty)
        if entry is None or dirty:
            return True
        if not _alike(entry, item.entry):
            if entry.size == item.entry.size and _alike(entry._replace(ref=item.entry.ref), item.entry):
                item.now = entry
            return True
        if there.kind != DIR:
            self.same += 1
            if isinstance(there, Node):
                self._twins.hold(item, there)
        return False


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


async def reach(tree: Tree, grant: Grant, path: Path) -> Node | None:
    """Return the node at ``path``, None if there is none."""
    node: Node | None = tree.root
    for name in path:
        if not isinstance(node, DirNode):
            return None
        await tree.load(grant, node)
        node = _child(tree, node, name)
    return node


def text_of(path: Path) -> str:
    return b"/".join(path).decode(errors="surrogateescape")
