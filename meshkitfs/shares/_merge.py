"""Bringing the tree in memory to a head that somebody else published, without losing what was done here.

Three versions of each directory are compared entry by entry: the base both sides started from, theirs, and
ours (what the last local commit recorded). A side that did not change a name takes the other's; a name that
both changed keeps theirs, and ours stays beside it under a conflict name. Subtrees whose references are
equal are not looked into. The caller has made sure that nothing changes here meanwhile.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

from meshkitfs.core.entries import DIR, FILE, Entry
from meshkitfs.core.manifest import DirManifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._events import Event, NameChanged, NodeChanged
from meshkitfs.shares._nodes import Child, DirNode, FileNode, Node, inode_number
from meshkitfs.shares._tree import Tree, children_of

__all__ = ["Merge", "conflict_name", "links_entry"]

Listing = dict[bytes, Entry]
Loaded = tuple[DirManifest, list[tuple[Entry, ...]]]


def conflict_name(name: bytes, who: str, when: datetime.date, taken: Callable[[bytes], bool]) -> bytes:
    """Return ``name`` with "(conflict WHO DATE)" before its extension, unlike any name that is ``taken``."""
    stem, extension = os.path.splitext(name)
    for number in range(1, 10_000):
        again = "" if number == 1 else f" {number}"
        mark = f" (conflict {who} {when.isoformat()}{again})".encode()
        candidate = stem[: 255 - len(mark) - len(extension)] + mark + extension
        if not taken(candidate):
            return candidate
    raise MeshkitError("head_conflict", "no free name for a conflict copy")


class Merge:
    """One run of bringing ``tree`` from its base to ``theirs``."""

    def __init__(
        self, tree: Tree, grant: Grant, ref: bytes, who: str, now: float, emit: Callable[[Event], None]
    ) -> None:
        self._tree = tree
        self._grant = grant
        self._ref = ref
        self._who = who
        self._day = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
        self._emit = emit
        # Nodes that lost their name on the way; those that found no new one are gone at the end.
        self._homeless: dict[Node, None] = {}
        self.conflicts: list[bytes] = []

    async def run(self, base: DirManifest, theirs: DirManifest) -> None:
        """Merge the roots and all below them, and the link table."""
        tree = self._tree
        root = tree.root
        assert isinstance(root, DirNode)  # a single-file share has one version only
        await self._links(base, theirs)
        if root.children is not None:
            await self._directory(root, await self._whole(base), await self._whole(theirs))
        if theirs.root is not None and (base.root == self._root_attrs(root) or base.root != theirs.root):
            root.mode, root.mtime_ns, root.ctime_ns, extra = theirs.root
            root.xattrs = dict((extra or {}).get("x", ()))
            self._emit(NodeChanged(root.ino, False))
        for node in self._homeless:
            if node.parent is None:
                node.nlink = 0
                tree.dirty.discard(node)
                tree.evict(node)

    @staticmethod
    def _root_attrs(root: DirNode) -> tuple[object, ...]:
        extra = {"x": root.extra()["x"]} if root.xattrs else None
        return (root.mode, root.mtime_ns, root.ctime_ns, extra)

    async def _whole(self, manifest: DirManifest) -> Loaded:
        return manifest, await self._tree.read_pages(self._grant, manifest)

    async def _links(self, base: DirManifest, theirs: DirManifest) -> None:
        tree, links = self._tree, self._tree.links
        if theirs.links is None or theirs.links == base.links:
            return
        their_entry = links_entry(theirs)
        if base.links is None or base.links_oid != theirs.links_oid:
            # Both sides may have begun a table of their own: theirs is kept, our objects move into it.
            ours = dict(children_of(links)) if links.children else {}
            links.oid = theirs.links_oid
            links.entry = their_entry
            links.version = their_entry.ver
            links.children = None
            await tree.load(self._grant, links)
            for name, child in ours.items():
                links.put(name, child)
                tree.mark(links)
            return
        if links.children is not None:
            base_loaded = await tree.read_directory(self._grant, links_entry(base))
            await self._directory(links, base_loaded, await tree.read_directory(self._grant, their_entry))
        links.entry = their_entry
        links.version = max(links.version, their_entry.ver)

    # -- one directory -----------------------------------------------------------------------------

    async def _directory(self, node: DirNode, base: Loaded | None, theirs: Loaded) -> None:
        before = dict(children_of(node))
        base_list = _listing(base) if base is not None else {}
        their_list = _listing(theirs)
        ours: Listing = {}
        for name, child in before.items():
            entry = child if isinstance(child, Entry) else child.entry
            if entry is not None:
                ours[name] = entry if entry.name == name else entry._replace(name=name)
        ours_changed = {
            name for name in ours.keys() | base_list.keys() if ours.get(name) != base_list.get(name)
        }
        keep: dict[bytes, Child] = {}
        for name, entry in their_list.items():
            known = self._known(node, name, entry, before, ours_changed)
            if known is not None:
                keep[name] = known
        node.fill(theirs[0], theirs[1], keep)
        for name, child in before.items():
            if (
                isinstance(child, Node)
                and child.parent is node
                and child.name == name
                and keep.get(name) is not child
            ):
                child.parent = None
                self._homeless[child] = None
        for name, child in keep.items():
            assert isinstance(child, Node)
            child.parent, child.name = node, name
            if name not in ours_changed:
                await self._update(child, base_list.get(name), their_list[name])
        for name in sorted(ours_changed):
            await self._reapply(
                node, name, before.get(name), ours.get(name), base_list.get(name), their_list.get(name)
            )
        for name in before.keys() | children_of(node).keys():
            if before.get(name) != children_of(node).get(name):
                old = before.get(name)
                gone = old.ino if isinstance(old, Node) and old.parent is None else 0
                self._emit(NameChanged(node.ino, name, gone))
        self._emit(NodeChanged(node.ino, False))

    def _known(
        self, node: DirNode, name: bytes, entry: Entry, before: dict[bytes, Child], ours_changed: set[bytes]
    ) -> Node | None:
        """Return the node in memory that their ``entry`` means, so that open files and inodes live on."""
        here = before.get(name)
        if isinstance(here, Node) and here.oid == entry.oid and here.kind == entry.kind:
            return here
        if name in ours_changed:
            return None
        elsewhere = self._tree.nodes.get(inode_number(self._ref, entry.oid))
        if (
            elsewhere is None
            or elsewhere.kind != entry.kind
            or elsewhere.linked != (node is self._tree.links)
        ):
            return None
        # They moved it: the place it had here is overwritten when that directory is merged.
        return elsewhere

    async def _update(self, node: Node, base: Entry | None, theirs: Entry) -> None:
        """Bring a node that only they changed to their entry."""
        old = node.entry
        if old == theirs:
            return
        if isinstance(node, DirNode) and node.children is not None and (old is None or old.ref != theirs.ref):
            base_loaded = None
            if base is not None and base.kind == DIR and base.oid == theirs.oid:
                base_loaded = await self._tree.read_directory(self._grant, base)
            await self._directory(node, base_loaded, await self._tree.read_directory(self._grant, theirs))
        content = isinstance(node, FileNode) and (old is None or old.ref != theirs.ref)
        if isinstance(node, FileNode) and content:
            node.content = None
            node.kernel_current = False
        dirty = node.dirty
        node.adopt(theirs)
        if dirty:
            self._tree.mark(node)
        self._emit(NodeChanged(node.ino, content))

    async def _reapply(
        self,
        node: DirNode,
        name: bytes,
        child: Child | None,
        ours: Entry | None,
        base: Entry | None,
        theirs: Entry | None,
    ) -> None:
        """Put what we did to ``name`` on top of their directory."""
        tree = self._tree
        if ours == theirs:
            return
        if theirs == base:
            if ours is None or child is None:
                node.drop(name)
            else:
                self._place(node, name, child)
            tree.mark(node)
            return
        if ours is None or child is None:
            return  # we removed what they changed: their change lives
        if theirs is None:
            self._place(node, name, child)  # they removed what we changed: our change lives
            tree.mark(node)
            return
        if ours.kind == theirs.kind == DIR and ours.oid == theirs.oid:
            await self._both_changed_directory(node, name, child, base, theirs)
        elif node is tree.links:
            self._place(node, name, child)
            tree.mark(node)
        elif ours.oid == theirs.oid and ours.ref == theirs.ref:
            if isinstance(child, Node):  # attributes only: theirs
                await self._update(child, base, theirs)
        elif ours.oid == theirs.oid and base is not None and ours.ref == base.ref:
            if isinstance(child, Node):  # their content, our attributes: the content counts
                await self._update(child, base, theirs)
        else:
            await self._keep_both(node, name, child, ours, theirs)

    def _place(self, node: DirNode, name: bytes, child: Child) -> None:
        node.put(name, child)
        if isinstance(child, Node):
            child.parent, child.name = node, name
            self._homeless.pop(child, None)

    async def _both_changed_directory(
        self, node: DirNode, name: bytes, child: Child, base: Entry | None, theirs: Entry
    ) -> None:
        tree = self._tree
        if isinstance(child, Entry):
            # Ours is known only by its entry: bring it into memory to merge into it.
            node.put(name, child)
            child = tree.node_of(node, name)
        assert isinstance(child, DirNode)
        self._place(node, name, child)
        await tree.load(self._grant, child)
        base_loaded = None
        if base is not None and base.kind == DIR and base.oid == theirs.oid:
            base_loaded = await tree.read_directory(self._grant, base)
        await self._directory(child, base_loaded, await tree.read_directory(self._grant, theirs))
        child.mtime_ns = max(child.mtime_ns, theirs.mtime_ns)
        child.version = max(child.version, theirs.ver)
        tree.mark(child)
        self._emit(NodeChanged(child.ino, False))

    async def _keep_both(self, node: DirNode, name: bytes, child: Child, ours: Entry, theirs: Entry) -> None:
        """Keep theirs under the name and ours beside it."""
        tree = self._tree
        spare = conflict_name(name, self._who, self._day, children_of(node).__contains__)
        self.conflicts.append(spare)
        if ours.oid != theirs.oid or ours.kind != FILE:
            self._place(node, spare, child)
            if isinstance(child, Node):
                tree.mark(child)
        else:
            # The same file: it goes on as theirs, and our bytes become a new file beside it.
            copy = tree.new_file(ours.mode)
            copy.content = None
            copy.entry = ours
            (await tree.content(self._grant, copy)).fork(ours.oid)
            copy.entry = None
            copy.mtime_ns, copy.ctime_ns = ours.mtime_ns, ours.ctime_ns
            copy.xattrs = dict((ours.extra or {}).get("x", ()))
            self._place(node, spare, copy)
            tree.mark(copy)
            if isinstance(child, Node):
                await self._update(child, ours, theirs)
        tree.mark(node)


def _listing(loaded: Loaded) -> Listing:
    manifest, pages = loaded
    entries = manifest.entries if manifest.entries is not None else (e for page in pages for e in page)
    return {entry.name: entry for entry in entries}


def links_entry(manifest: DirManifest) -> Entry:
    """Return the entry that a root manifest's link table would have, had it a name."""
    assert manifest.links is not None
    return Entry(
        b"links",
        DIR,
        manifest.links_oid,
        0o700,
        0,
        0,
        0,
        manifest.links_epoch,
        manifest.links_ver,
        manifest.links,
    )
