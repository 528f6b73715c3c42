"""Bringing the tree in memory to another version of its share, with the nodes that are in use kept alive.

First everything that is needed is read, and that may fail; then the tree is changed in one go, without
waiting for anything. So the tree is always entirely at one version, whatever happens on the way.
"""

from __future__ import annotations

from collections.abc import Callable

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import DIR, FILE, HARDLINK, Entry
from meshkitfs.core.manifest import DirManifest, FileManifest, parse_manifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._content import FileContent
from meshkitfs.shares._directories import in_parallel
from meshkitfs.shares._events import Event, NameChanged, NodeChanged
from meshkitfs.shares._merge import Plan
from meshkitfs.shares._nodes import Child, DirNode, Node
from meshkitfs.shares._tree import Tree
from meshkitfs.shares._versions import LINKS, Directory, Library, Place, links_entry

__all__ = ["Graft"]


class Graft:
    """Brings ``tree`` to the version whose root is ``theirs``, with the edits of ``plan`` on top.

    ``alone`` says that nothing of ours is to stay, so that ``theirs`` may be older than the link table.
    """

    def __init__(
        self, tree: Tree, grant: Grant, library: Library, theirs: DirManifest, plan: Plan,
        emit: Callable[[Event], None], *, alone: bool = False,
    ) -> None:  # fmt: skip
        self._tree = tree
        self._without_links = alone and theirs.links is None
        self._grant = grant
        self._library = library
        self._theirs = theirs
        self._plan = plan
        self._emit = emit
        # What the directories that change are made from, by oid.
        self._sources: dict[bytes, Directory] = {}
        self._copied: dict[Place, FileManifest] = {}
        self._nodes = {node.oid: node for node in tree.nodes.values()}
        self._placed: set[Node] = set()
        self._replaced: list[tuple[DirNode, dict[bytes, Child]]] = []

    # -- reading -----------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Read every directory that is loaded and differs, or is to be edited. Changes nothing."""
        plan, links = self._plan, self._tree.links
        for place, entry in plan.copies.items():
            if entry.kind == FILE:
                self._copied[place] = await self._file(entry)
        root = await self._library.root(self._theirs)
        self._sources[self._theirs.oid] = root
        level = [(self._theirs.oid, root)]
        if self._theirs.links is not None and (
            LINKS in plan.edits or links.entry is None or links.entry.ref != self._theirs.links
        ):
            table = await self._library.directory(links_entry(self._theirs))
            self._sources[LINKS] = table
        elif self._theirs.links is None and LINKS in plan.edits and links.entry is not None:
            # Only ours has a table, so it stays; but what is in it may be theirs now.
            self._sources[LINKS] = await self._library.directory(links.entry)
        elif self._without_links and links.entry is not None:
            # Nothing has several names in it.
            self._sources[LINKS] = Directory(DirManifest(links.oid, 0, 0, 0, ()), [])
        while level:
            below = [entry for oid, source in level for entry in self._differing(oid, source)]
            level = await self._read(below)

    async def _read(self, entries: list[Entry]) -> list[tuple[bytes, Directory]]:
        found: list[tuple[bytes, Directory]] = []

        async def read(i: int) -> None:
            found.append((entries[i].oid, await self._library.directory(entries[i])))

        await in_parallel(read, len(entries))
        self._sources.update(found)
        return found

    async def _file(self, entry: Entry) -> FileManifest:
        where = Where.manifest(entry.oid, entry.epoch, entry.ver)
        plain = await self._tree.reader.open(self._grant, entry.ref, where)
        manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
        if not isinstance(manifest, FileManifest):
            raise MeshkitError("invalid_envelope", "a file's entry names a directory")
        return manifest

    def _differing(self, oid: bytes, source: Directory) -> list[Entry]:
        """Return the directories in a directory that have to be looked into."""
        edits = self._plan.edits.get(oid, {})
        entries = [entry for entry in source.entries() if entry.name not in edits]
        entries += [entry for entry in edits.values() if entry is not None]
        found = []
        for entry in entries:
            if entry.kind != DIR or entry.oid in self._sources:
                continue
            node = self._nodes.get(entry.oid)
            loaded = isinstance(node, DirNode) and node.children is not None
            stale = node is None or node.entry is None or node.entry.ref != entry.ref
            if entry.oid in self._plan.above or (loaded and stale):
                found.append(entry)
        return found

    # -- changing ----------------------------------------------------------------------------------

    def apply(self) -> None:
        """Change the tree. Synchronous: nobody sees it half changed."""
        tree = self._tree
        root = tree.root
        assert isinstance(root, DirNode)  # a single-file share has one version only
        self._placed.add(root)
        waiting = [(root, self._theirs.oid)]
        if self._theirs.links is not None:
            table = tree.links
            table.oid = self._theirs.links_oid
            table.entry = links_entry(self._theirs)
            table.version = max(table.version, table.entry.ver)
        elif self._without_links:
            tree.links.entry = None
        if LINKS in self._sources:
            waiting.append((tree.links, LINKS))
        while waiting:
            node, oid = waiting.pop()
            waiting += self._fill(node, oid)
        self._root_attributes(root)
        for _, before in self._replaced:
            for child in before.values():
                if isinstance(child, Node) and child not in self._placed:
                    self._lose(child)
        for node, before in self._replaced:
            self._tell(node, before)

    def _fill(self, node: DirNode, oid: bytes) -> list[tuple[DirNode, bytes]]:
        """Make one directory what it is now; returns those in it that are next."""
        tree, source, edits = self._tree, self._sources[oid], self._plan.edits.get(oid, {})
        self._replaced.append((node, dict(node.children or {})))
        meant = {entry.name: entry for entry in source.entries() if entry.name not in edits}
        keep: dict[bytes, Child] = {}
        for name, entry in (*meant.items(), *edits.items()):
            found = self._node(entry)
            if entry is not None and found is not None:
                self._placed.add(found)
                found.parent, found.name, found.linked = node, name, node is tree.links
                changed = tree.bring(found, entry)
                if changed is not None:
                    self._emit(NodeChanged(found.ino, changed))
                keep[name] = found
        node.fill(source.manifest, source.pages, keep)
        children = node.children
        assert children is not None  # it was just filled
        for name, entry in edits.items():
            if entry is not None:
                node.put(name, keep.get(name, entry))
            elif name in children:
                node.drop(name)
        copies = [place for place in self._plan.copies if place.directory == oid]
        for place in copies:
            self._copy(node, place)
        if edits or copies:
            tree.mark(node)
        below = []
        for name, child in list(children.items()):
            if child.kind == DIR and child.oid in self._sources:
                if isinstance(child, Entry) and child.oid in self._nodes:
                    continue  # a broken tree shows it twice
                directory = tree.node_of(node, name)
                assert isinstance(directory, DirNode)
                self._nodes[directory.oid] = directory
                self._placed.add(directory)
                below.append((directory, child.oid))
        return below

    def _node(self, entry: Entry | None) -> Node | None:
        """Return the node in memory that an entry means, unless it has found its place already."""
        if entry is None or entry.kind == HARDLINK:
            return None
        node = self._nodes.get(entry.oid)
        return None if node is None or node.kind != entry.kind or node in self._placed else node

    def _copy(self, node: DirNode, place: Place) -> None:
        """Make our content of an object that both sides wrote an object of its own."""
        tree, entry = self._tree, self._plan.copies[place]
        extra = entry.extra or {}
        copy: Node
        if entry.kind == FILE:
            manifest = self._copied[place]
            copy = file = tree.new_file(entry.mode)
            file.content = FileContent(
                copy.oid, tree.reader, tree.sealer, manifest, extra.get("used", entry.size)
            )
            # Its blocks stay bound to the object they were written for.
            file.content.fork(manifest.lineage or entry.oid)
        else:
            copy = tree.new_symlink(extra["target"])
        copy.mtime_ns = copy.atime_ns = entry.mtime_ns
        copy.ctime_ns = entry.ctime_ns
        copy.xattrs = dict(extra.get("x", ()))
        node.put(place.name, copy)
        copy.parent, copy.name = node, place.name
        tree.mark(copy)

    def _root_attributes(self, root: DirNode) -> None:
        attributes = self._plan.root or self._theirs.root
        if attributes is not None:
            root.mode, root.mtime_ns, root.ctime_ns, extra = attributes
            root.xattrs = dict((extra or {}).get("x", ()))
        root.version = max(root.version, self._theirs.ver)
        if self._plan.root is not None:
            self._tree.mark(root)

    def _lose(self, node: Node) -> None:
        """The object has no place any more, and neither has what is in it."""
        waiting = [node]
        lost = []
        while waiting:
            node = waiting.pop()
            lost.append(node)
            if isinstance(node, DirNode):
                waiting += [
                    child for _, child in node.nodes() if child.parent is node and child not in self._placed
                ]
        for node in reversed(lost):
            node.parent = None
            node.nlink = 0
            if isinstance(node, DirNode):
                # If it turns up elsewhere, it is read again, and what was in it is found again.
                node.children = None
            self._tree.dirty.discard(node)
            self._tree.evict(node)

    def _tell(self, node: DirNode, before: dict[bytes, Child]) -> None:
        """Have the kernel forget what it knows of the names that mean something else now."""
        if node is self._tree.links:
            return
        after = node.children or {}
        for name in before.keys() | after.keys():
            old, new = before.get(name), after.get(name)
            if old is None or new is None or old.oid != new.oid:
                gone = old.ino if isinstance(old, Node) and old.parent is None else 0
                self._emit(NameChanged(node.ino, name, gone))
        self._emit(NodeChanged(node.ino, False))
