"""A share's tree: loading directories on demand, and the namespace operations on it.

The operations (`create`, `remove`, `rename`, `link`) are synchronous and work on loaded directories, so
each of them is atomic; only `load` and what must load first awaits. Nothing here asks the gate: the caller
holds a grant and passes it where something has to be read.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import DIR, FILE, HARDLINK, NAME_MAX, SYMLINK, Entry
from meshkitfs.core.manifest import DirManifest, FileManifest, parse_manifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._content import FileContent
from meshkitfs.shares._directories import read_directory
from meshkitfs.shares._nodes import Child, DirNode, FileNode, Node, SymlinkNode, inode_number, new_oid
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._sealer import Sealer

__all__ = ["Tree", "check_name", "posix"]

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_NodeT = TypeVar("_NodeT", bound=Node)


def posix(number: int) -> OSError:
    """Return the plain POSIX outcome ``number``."""
    return OSError(number, os.strerror(number))


def check_name(name: bytes) -> None:
    """Raise unless ``name`` may be given to a file (the kernel already kept out '/' and NUL)."""
    if len(name) > NAME_MAX:
        raise posix(errno.ENAMETOOLONG)
    if name in (b"", b".", b".."):
        raise posix(errno.EINVAL)


class Tree:
    """The objects of one share that are in memory. ``ref`` is the share row the inode numbers belong to."""

    def __init__(self, ref: bytes, reader: BlockReader, sealer: Sealer, root: Node) -> None:
        self._ref = ref
        self.reader = reader
        self.sealer = sealer
        self.root = root
        self.nodes: dict[int, Node] = {root.ino: root}
        # The link table: a directory nobody sees, named by oid in hex. Empty in most shares.
        self.links = DirNode(new_oid(), 0)
        self.links.start_empty()
        self.dirty: set[Node] = set()
        # Files without a name that are still open: no commit ever takes their changes.
        self._nameless: set[FileNode] = set()
        self._loading: dict[DirNode, trio.Event] = {}
        # Called when something changed that a commit should pick up.
        self.on_change: Callable[[], None] = lambda: None
        # Called when a commit has written a node: with the generation it caught, the entry before and after.
        self.on_settled: Callable[[Node, int, Entry | None, Entry], None] | None = None

    # -- nodes -------------------------------------------------------------------------------------

    def touch(self, node: Node, *, content: bool = False, now: int | None = None) -> None:
        """Note a change of ``node``: of its content (mtime and ctime) or its attributes (ctime)."""
        now = time.time_ns() if now is None else now
        node.ctime_ns = now
        if content:
            node.mtime_ns = now
        self.mark(node)

    def mark(self, node: Node) -> None:
        """Note that ``node`` must be in the next commit, times untouched."""
        node.generation += 1
        if self.is_named(node):
            self.dirty.add(node)
            self.on_change()

    def is_named(self, node: Node) -> bool:
        """Whether ``node`` still has a place in the tree."""
        return node.parent is not None or node is self.root or node is self.links

    def spill(self) -> None:
        """Have the plaintext of changed files sealed and let go of: memory is short."""
        for node in (*self.dirty, *self._nameless):
            if isinstance(node, FileNode) and node.content is not None:
                node.content.spill()

    def spill_nameless(self) -> None:
        """The same for files without a name only: no commit takes what was changed in them."""
        for node in self._nameless:
            if node.content is not None:
                node.content.spill()

    def nameless_digests(self) -> set[bytes]:
        """Return the blocks of files that are open and have no name any more: no version will name them."""
        return {
            digest
            for node in self._nameless
            if node.content is not None
            for digest in node.content.table.digests()
        }

    def nameless_entries(self) -> list[Entry]:
        """Return the entries of such files: what the segments that are not loaded refer to stands there."""
        return [
            node.entry
            for node in self._nameless
            if node.entry is not None and node.content is not None and node.content.table.index
        ]

    def node_of(self, parent: DirNode, name: bytes) -> Node:
        """Return the node of a name in a loaded directory, making it if it is the first lookup."""
        assert parent.children is not None
        child = parent.children.get(name)
        if child is None:
            raise posix(errno.ENOENT)
        if isinstance(child, Node):
            return child
        if child.kind == HARDLINK:
            return self.node_of(self.links, child.oid.hex().encode())
        return self._instantiate(parent, name, child)

    def _instantiate(self, parent: DirNode, name: bytes, entry: Entry) -> Node:
        node = self.nodes.get(inode_number(self._ref, entry.oid))
        if node is not None and not self.is_named(node) and node.kind == entry.kind:
            # It is still in use, and somebody else has moved it to where it was found only now.
            self.bring(node, entry)
        else:
            node = self._new(entry.kind, entry.oid)
            node.adopt(entry)
        node.parent, node.name = parent, name
        node.linked = parent is self.links
        assert parent.children is not None
        parent.children[name] = node
        return node

    def bring(self, node: Node, entry: Entry) -> bool | None:
        """Bring a node to an ``entry`` that was committed elsewhere (its place is not touched).

        Returns None if nothing changed, else whether the content did.
        """
        old = node.entry
        if old is not None and not node.dirty and old._replace(name=entry.name) == entry:
            node.entry = entry
            node.nlink = (entry.extra or {}).get("nlink", 1)
            return None
        content = isinstance(node, FileNode) and (old is None or node.dirty or old.ref != entry.ref)
        if isinstance(node, FileNode) and content:
            if node.dirty and node.content is not None:
                node.content.discard()
            node.content = None
            node.kernel_current = False
            self._nameless.discard(node)
        version = max(node.version, entry.ver)
        node.adopt(entry)
        node.version = version
        return content

    def _new(self, kind: int, oid: bytes) -> Node:
        ino = inode_number(self._ref, oid)
        if ino in self.nodes:
            raise MeshkitError("invalid_envelope", f"object {oid.hex()[:16]} stands in two places")
        node: Node
        if kind == DIR:
            node = DirNode(oid, ino)
        elif kind == FILE:
            node = FileNode(oid, ino)
        else:
            node = SymlinkNode(oid, ino)
        self.nodes[ino] = node
        return node

    def evict(self, node: Node) -> None:
        """Let go of a node the kernel has forgotten, if nothing needs it; its entry takes its place."""
        if node.lookups or node.opens or node is self.root or node is self.links:
            return
        if node.parent is None:
            # The last name is gone and so is the last user: the object is gone.
            self.nodes.pop(node.ino, None)
            self.dirty.discard(node)
            if isinstance(node, FileNode):
                self._nameless.discard(node)
                if node.content is not None:
                    node.content.discard()
            return
        if node.dirty or node.entry is None:
            return
        if isinstance(node, FileNode):
            node.release_content()
            if node.content is not None or node.pins:
                return
        elif isinstance(node, DirNode) and (node in self._loading or any(True for _ in node.nodes())):
            return
        parent = node.parent
        if parent.children is not None and parent.children.get(node.name) is node:
            parent.children[node.name] = node.entry._replace(name=node.name)
            self.nodes.pop(node.ino, None)

    # -- loading -----------------------------------------------------------------------------------

    async def load(self, grant: Grant, node: DirNode) -> None:
        """Read a directory, unless it is in memory: its manifest and, all at once, its pages."""
        while node.children is None:
            other = self._loading.get(node)
            if other is not None:
                await other.wait()
                continue
            done = self._loading[node] = trio.Event()
            try:
                entry = node.entry
                assert entry is not None  # only committed directories are unloaded
                manifest, pages = await read_directory(self.reader, grant, entry)
                await self._load_links(grant, manifest, pages)
                # A merge may have given it a newer entry meanwhile: then this is not its content any more.
                if node.children is None and node.entry is entry:
                    node.fill(manifest, pages, {})
            finally:
                del self._loading[node]
                done.set()

    async def _load_links(self, grant: Grant, manifest: DirManifest, pages: list[tuple[Entry, ...]]) -> None:
        """Make the link table ready for a directory that has hard links in it."""
        if self.links.children is None:
            for entries in (manifest.entries or (), *pages):
                if any(entry.kind == HARDLINK for entry in entries):
                    await self.load(grant, self.links)
                    return

    async def content(self, grant: Grant, node: FileNode) -> FileContent:
        """Return the content of ``node``, reading its manifest if it is not in memory."""
        if node.content is not None:
            return node.content
        if node.entry is None:
            node.content = FileContent(node.oid, self.reader, self.sealer)
            return node.content
        entry = node.entry
        where = Where.manifest(entry.oid, entry.epoch, entry.ver)
        plain = await self.reader.open(grant, entry.ref, where)
        manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
        if not isinstance(manifest, FileManifest) or manifest.size != entry.size:
            raise MeshkitError("invalid_envelope", "a file's manifest does not fit its entry")
        if node.content is None and node.entry is entry:
            node.content = FileContent(node.oid, self.reader, self.sealer, manifest, node.used())
        return await self.content(grant, node)

    # -- namespace ---------------------------------------------------------------------------------

    def create(self, parent: DirNode, name: bytes, node: Node) -> None:
        """Bind a new ``node`` to a free name."""
        check_name(name)
        assert parent.children is not None
        if name in parent.children:
            raise posix(errno.EEXIST)
        now = time.time_ns()
        node.atime_ns = node.mtime_ns = node.ctime_ns = now
        self._bind(parent, name, node)
        self.mark(node)
        self.touch(parent, content=True, now=now)

    def new_file(self, mode: int) -> FileNode:
        node = self._made(FileNode, FILE)
        node.mode = mode
        node.content = FileContent(node.oid, self.reader, self.sealer)
        return node

    def new_directory(self, mode: int) -> DirNode:
        node = self._made(DirNode, DIR)
        node.mode = mode
        node.start_empty()
        return node

    def new_symlink(self, target: bytes) -> SymlinkNode:
        node = self._made(SymlinkNode, SYMLINK)
        node.mode = 0o777
        node.target = target
        return node

    def _made(self, of: type[_NodeT], kind: int) -> _NodeT:
        node = self._new(kind, new_oid())
        assert isinstance(node, of)
        return node

    def _bind(self, parent: DirNode, name: bytes, node: Node) -> None:
        if node.linked:
            parent.put(name, Entry(name, HARDLINK, node.oid, 0, 0, 0, 0, 0, 0, b""))
            return
        parent.put(name, node)
        node.parent, node.name = parent, name

    def _unbind(self, parent: DirNode, name: bytes, node: Node) -> None:
        """Take one name away from ``node``; its last one makes it nameless."""
        parent.drop(name)
        if node.linked:
            node.nlink -= 1
            if node.nlink > 0:
                self.touch(node)
                return
            self.links.drop(node.name)
            self.mark(self.links)
        node.nlink = 0
        node.parent = None
        # Removed by a request of this kernel, which so knows; see `removed_here`.
        node.name = b""
        node.ctime_ns = time.time_ns()
        self.dirty.discard(node)
        if isinstance(node, FileNode):
            self._nameless.add(node)
        self.evict(node)

    @staticmethod
    def removed_here(node: Node) -> bool:
        """Whether ``node`` lost its last name here, and not because somebody else removed or replaced it."""
        return node.parent is None and not node.name and not node.nlink

    def remove(self, parent: DirNode, name: bytes, *, directory: bool) -> Node:
        """Remove a name: of an empty, loaded directory, or of anything else. Returns the node it meant."""
        node = self.node_of(parent, name)
        if directory:
            if not isinstance(node, DirNode):
                raise posix(errno.ENOTDIR)
            if node.children:
                raise posix(errno.ENOTEMPTY)
        elif isinstance(node, DirNode):
            raise posix(errno.EISDIR)
        self._unbind(parent, name, node)
        self.touch(parent, content=True)
        return node

    def link(self, node: Node, parent: DirNode, name: bytes) -> None:
        """Give ``node`` one more name. The link table must be loaded."""
        check_name(name)
        assert parent.children is not None
        assert self.links.children is not None
        if isinstance(node, DirNode):
            raise posix(errno.EPERM)
        if name in parent.children:
            raise posix(errno.EEXIST)
        if node.parent is None:
            raise posix(errno.ENOENT)
        if not node.linked:
            old_parent, old_name = node.parent, node.name
            node.linked = True
            self._bind(old_parent, old_name, node)
            self.mark(old_parent)
            key = node.oid.hex().encode()
            self.links.put(key, node)
            node.parent, node.name = self.links, key
            self.mark(self.links)
        node.nlink += 1
        self._bind(parent, name, node)
        self.touch(node)
        self.touch(parent, content=True)

    def rename(
        self, old_parent: DirNode, old_name: bytes, new_parent: DirNode, new_name: bytes, flags: int
    ) -> Node | None:
        """Move a name; both directories, and a directory that is replaced, must be loaded.

        Returns the node that lost its name, if one did. ``flags`` as in renameat2(2): NOREPLACE, EXCHANGE.
        """
        check_name(new_name)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise posix(errno.EINVAL)
        assert new_parent.children is not None
        node = self.node_of(old_parent, old_name)
        target = self.node_of(new_parent, new_name) if new_name in new_parent.children else None
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise posix(errno.ENOENT)
            self._no_loop(node, new_parent)
            self._no_loop(target, old_parent)
            self._swap(old_parent, old_name, node, new_parent, new_name, target)
            return None
        if target is not None and flags & RENAME_NOREPLACE:
            raise posix(errno.EEXIST)
        if target is node:
            return None
        self._no_loop(node, new_parent)
        if target is not None:
            if isinstance(node, DirNode) and not isinstance(target, DirNode):
                raise posix(errno.ENOTDIR)
            if isinstance(target, DirNode):
                if not isinstance(node, DirNode):
                    raise posix(errno.EISDIR)
                if target.children:
                    raise posix(errno.ENOTEMPTY)
            self._unbind(new_parent, new_name, target)
        old_parent.drop(old_name)
        self._bind(new_parent, new_name, node)
        self._moved(node, old_parent, new_parent)
        return target

    def _swap(
        self, a_parent: DirNode, a_name: bytes, a: Node, b_parent: DirNode, b_name: bytes, b: Node
    ) -> None:
        if a is b:
            return
        a_parent.drop(a_name)
        b_parent.drop(b_name)
        self._bind(b_parent, b_name, a)
        self._bind(a_parent, a_name, b)
        self._moved(a, a_parent, b_parent)
        self._moved(b, b_parent, a_parent)

    def _moved(self, node: Node, old_parent: DirNode, new_parent: DirNode) -> None:
        now = time.time_ns()
        self.touch(node, now=now)
        self.touch(old_parent, content=True, now=now)
        if new_parent is not old_parent:
            self.touch(new_parent, content=True, now=now)

    def _no_loop(self, node: Node, into: DirNode) -> None:
        """Raise EINVAL if ``into`` lies below ``node``."""
        if not isinstance(node, DirNode):
            return
        at: DirNode | None = into
        while at is not None:
            if at is node:
                raise posix(errno.EINVAL)
            at = at.parent


def children_of(node: DirNode) -> dict[bytes, Child]:
    """Return the children of a loaded directory."""
    assert node.children is not None
    return node.children
