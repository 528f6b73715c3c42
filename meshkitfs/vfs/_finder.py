"""From inode numbers to shares, nodes and grants: what every operation of the filesystem starts with."""

from __future__ import annotations

import errno
import functools
import queue
import stat
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares import (
    SNAPSHOTS,
    AnyShare,
    DirNode,
    Event,
    FileNode,
    NameChanged,
    Node,
    NodeChanged,
    PastShare,
    Share,
    ShareBook,
    SymlinkNode,
    Tree,
    posix,
)
from meshkitfs.state import AuditLine
from meshkitfs.vfs._attributes import absence, attr_of, attr_of_past, attr_of_share, timeout
from meshkitfs.vfs._control import CONTROL_INO, CONTROL_NAME, ControlFiles
from meshkitfs.vfs._faults import Faults, classified
from meshkitfs.vfs._handles import ControlHandle, DirHandle, FileHandle
from meshkitfs.vfs._opens import Opens
from meshkitfs.vfs._snapshots import Snapshots, has_snapshots
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
    ForgetEntry,
    ForgetInode,
    Invalidation,
)

__all__ = ["Finder", "absent", "noted"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_F = TypeVar("_F", bound="Finder")


def noted(
    method: Callable[Concatenate[_F, int, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_F, int, _P], Coroutine[Any, Any, _T]]:
    """Have what ``method`` fails with remembered for the inode, or the inode of the open file, it was for."""

    @functools.wraps(method)
    async def noting(self: _F, number: int, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, number, *args, **kwargs)
        except (MeshkitError, BaseExceptionGroup) as error:
            self._note(number, error, method.__name__, args[0] if args else None)
            raise

    return noting


class Finder:
    """Knows what each inode number means, and gets the grant that an operation on it needs."""

    def __init__(
        self,
        book: ShareBook,
        control: ControlFiles,
        runtime: Callable[[], dict[str, Any]],
        report: Callable[[str, MeshkitError], None] = lambda path, error: None,
        record: Callable[[AuditLine], None] | None = None,
    ) -> None:
        self.book = book
        self.faults = Faults(report)
        self.opens = Opens(record)
        self.invalidations: queue.SimpleQueue[Invalidation] = queue.SimpleQueue()
        self._control = control
        self._runtime = runtime
        self._snapshots = Snapshots()
        self._shares: dict[int, AnyShare] = {}
        # Inodes the kernel has forgotten while they were still to be committed; see `forget`.
        self._lingering: set[int] = set()
        self._linger_until = 4096
        self._handles: dict[int, FileHandle | DirHandle | ControlHandle] = {}
        # Above the inode numbers of the root and the control files, below those of objects.
        self._next_handle = 1 << 16
        self._born = time.time_ns()
        # Why there is nothing to see here: the identity is locked. None while it is not.
        self.closed: Callable[[], MeshkitError | None] = lambda: None

    def on_event(self, event: Event) -> None:
        """Turn what a share tells into what the kernel has to forget."""
        if isinstance(event, NodeChanged):
            self.invalidations.put(ForgetInode(event.ino, not event.content))
        elif isinstance(event, NameChanged):
            self.invalidations.put(ForgetEntry(event.parent, event.name, event.gone))

    def _note(self, number: int, error: BaseException, operation: str, argument: object) -> None:
        """Remember a failure of the file, directory or open handle of that number (they do not overlap)."""
        fault = classified(error)
        handle = self._handles.get(number)
        ino = handle.ino if isinstance(handle, FileHandle | DirHandle) else number
        share = self._shares.get(ino)
        if fault is not None and share is not None:
            node = share.tree.nodes.get(ino) if share.tree is not None else None
            self.faults.note(share, node, fault)
            self.opens.refused(share, node, operation, argument, fault)

    def _share(self, ino: int) -> AnyShare:
        share = self._shares.get(ino)
        if share is None:
            # What reads `.snapshots` itself does not come here.
            raise posix(errno.EROFS if ino in self._snapshots else errno.ESTALE)
        return share

    def _not_past(self, *directories: int) -> None:
        """Raise EROFS if one of these is a directory of a past version: no name in it changes."""
        for ino in directories:
            if ino in self._snapshots or isinstance(self._shares.get(ino), PastShare):
                raise posix(errno.EROFS)

    def _not_reserved(self, parent: int, name: bytes, number: int = errno.EEXIST) -> None:
        """Raise ``number`` if ``name`` is that of the directory that every share's root has by itself."""
        if name == SNAPSHOTS and has_snapshots(self._shares.get(parent), parent):
            raise posix(number)

    def _known(self, ino: int) -> tuple[AnyShare, Node | None]:
        """Return the share of an inode and its node, None for a share's root that is not loaded."""
        share = self._share(ino)
        node = share.tree.nodes.get(ino) if share.tree is not None else None
        if node is None and ino != share.root_ino:
            raise posix(errno.ESTALE)
        return share, node

    async def _granted(
        self, ino: int, right: str, *, current: bool = False
    ) -> tuple[AnyShare, Grant, Tree, Node]:
        """Return what an operation needs: a grant that includes ``right``, and the node."""
        share = self._share(ino)
        grant = None if current else share.live(right)
        if grant is None:
            grant = await share.use(right, current=current)
        tree = share.tree
        assert tree is not None  # `use` loads it
        node = tree.nodes.get(ino)
        if node is None:
            raise posix(errno.ESTALE)
        return share, grant, tree, node

    async def _directory(
        self, ino: int, right: str, *, current: bool = False
    ) -> tuple[AnyShare, Grant, Tree, DirNode]:
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.EACCES)
        # A change of names is an open: it must see a right that was just given, or taken.
        share, grant, tree, node = await self._granted(ino, right, current=current or right == "write")
        if not isinstance(node, DirNode):
            raise posix(errno.ENOTDIR)
        if node.children is None:
            await tree.load(grant, node)
        if not tree.is_named(node):
            raise posix(errno.ENOENT)
        return share, grant, tree, node

    @staticmethod
    def _still(share: AnyShare, grant: Grant, tree: Tree, *nodes: Node) -> None:
        """Raise unless what was looked up is still so: `Share.changing` may have waited for a merge."""
        grant.check()
        for node in nodes:
            if share.tree is not tree or tree.nodes.get(node.ino) is not node:
                raise posix(errno.ESTALE)
            if isinstance(node, DirNode) and not tree.is_named(node):
                raise posix(errno.ENOENT)
            if not tree.is_named(node) and not tree.removed_here(node):
                # Removed or replaced by somebody else: what is written to it now nobody would ever find.
                raise posix(errno.ESTALE)

    def _hand_out(self, share: AnyShare, node: Node) -> Attr:
        self._shares[node.ino] = share
        return attr_of(share, node)

    def _hidden(self, share: AnyShare, ino: int) -> MeshkitError | None:
        """Return why even what the kernel was told before is not told now; None if it is.

        While the identity is locked. The root of a share still shows why.
        """
        closed = self.closed()
        return closed if closed is not None and ino != getattr(share, "share", share).root_ino else None

    def _root_attr(self) -> Attr:
        count = len(self.book.shares)
        return Attr(
            ROOT_INO, stat.S_IFDIR | 0o700, 2 + count, 4096, 8, self._born, self._born, self._born, 1.0, 1.0
        )

    async def _share_attr(self, share: AnyShare) -> Attr:
        """Return the attributes of a share's root, opening it if that is allowed now."""
        self._shares[share.root_ino] = share
        if isinstance(share, PastShare):
            return attr_of_past(share, timeout(share))
        if share.live("list") is None:
            try:
                await share.use("list")
            except MeshkitError:
                return attr_of_share(share)
        assert share.tree is not None
        return attr_of(share, share.tree.root)

    @noted
    async def lookup(self, parent: int, name: bytes) -> Attr:
        if parent == ROOT_INO:
            if name == CONTROL_NAME:
                return self._control.attr(CONTROL_INO)
            top = self.book.shares.get(name)
            closed = self.closed()
            if top is None and closed is not None:
                raise closed
            if top is None:
                return absent(1.0)
            return await self._share_attr(top)
        if parent in self._control:
            ino = self._control.ino_of(name)
            return absent(60.0) if ino is None else self._control.attr(ino)
        if parent in self._snapshots:
            return await self._lookup_version(parent, name)
        if name == SNAPSHOTS:
            root = self._shares.get(parent)
            if isinstance(root, Share) and has_snapshots(root, parent):
                return self._snapshots.enter(root)
        try:
            share, _, tree, node = await self._directory(parent, "list")
            if name not in (node.children or ()):
                # Whoever was told of a new file must find it, so "there is none" needs the newest state.
                share, _, tree, node = await self._directory(parent, "list", current=True)
        except MeshkitError as error:
            return self._remembered(parent, name, error)
        assert node.children is not None
        if name not in node.children:
            return absent(absence(share))
        child = tree.node_of(node, name)
        child.lookups += 1
        return self._hand_out(share, child)

    async def _lookup_version(self, parent: int, name: bytes) -> Attr:
        """Answer for a name in a ``.snapshots``."""
        found = await self._snapshots.lookup(parent, name)
        if not isinstance(found, PastShare):
            return absent(0.0) if found is None else found
        found.lookups += 1
        found.share.past.used(found)
        return await self._share_attr(found)

    def _remembered(self, parent: int, name: bytes, error: MeshkitError) -> Attr:
        """Answer for a name of a refused share the kernel was told before; raise ``error`` for others."""
        share, node = self._known(parent)
        if error.code == "identity_locked":
            raise error
        child = (node.children or {}).get(name) if isinstance(node, DirNode) else None
        if isinstance(child, Node):
            child.lookups += 1
            return attr_of(share, child)
        raise error

    def looked_up(self, ino: int) -> None:
        share = self._shares.get(ino)
        if isinstance(share, PastShare) and ino == share.root_ino:
            share.lookups += 1
            return
        if share is not None and share.tree is not None:
            node = share.tree.nodes.get(ino)
            if node is not None:
                node.lookups += 1

    def forget(self, ino: int, count: int) -> None:
        share = self._shares.get(ino)
        if isinstance(share, PastShare) and ino == share.root_ino:
            share.lookups -= count
            self._let_go(share)
            return
        if share is None or share.tree is None:
            if share is None:
                self._snapshots.forget(ino, count)
            return
        node = share.tree.nodes.get(ino)
        if node is None:
            return
        node.lookups = max(0, node.lookups - count)
        if not node.lookups and ino != share.root_ino:
            share.tree.evict(node)
            if ino not in share.tree.nodes:
                del self._shares[ino]
            else:
                self._linger(ino)
        if isinstance(share, PastShare) and share.lookups <= 0:
            self._let_go(share)

    def _let_go(self, past: PastShare) -> None:
        """Drop the tree of a version if the kernel has forgotten all of it."""
        if past.unused:
            past.share.past.drop(past)
            for ino in (past.root_ino, *(past.tree.nodes if past.tree is not None else ())):
                if self._shares.get(ino) is past:
                    del self._shares[ino]

    def _linger(self, ino: int) -> None:
        """Note an inode that goes away after the next commit, of which nobody tells us: look now and then."""
        self._lingering.add(ino)
        if len(self._lingering) >= self._linger_until:
            for old in self._lingering:
                share = self._shares.get(old)
                if share is not None and (share.tree is None or old not in share.tree.nodes):
                    del self._shares[old]
            self._lingering &= self._shares.keys()
            self._linger_until = 2 * len(self._lingering) + 4096

    async def getattr(self, ino: int) -> Attr:
        if ino == ROOT_INO:
            return self._root_attr()
        if ino in self._control:
            return self._control.attr(ino)
        if ino in self._snapshots:
            return self._snapshots.attr(ino)
        share, node = self._known(ino)
        hidden = self._hidden(share, ino)
        if hidden is not None:
            raise hidden
        if node is None:
            return await self._share_attr(share)
        if isinstance(node, FileNode) and node.opens and share.live("list") is None:
            # Most likely it is about to be read, and that will have to wait for the grant, with which a new
            # version can come. The kernel has to know the size of that one first: it fills what a read of a
            # shorter file leaves with zeros, up to the size that it believes in.
            with suppress(MeshkitError):  # attributes are shown all the same
                await share.use("list")
            share, node = self._known(ino)
            assert node is not None  # only the root of a share is no node
        return attr_of(share, node)

    @noted
    async def readlink(self, ino: int) -> bytes:
        if ino in self._snapshots:
            target = await self._snapshots.target(ino)
            if target is None:
                raise posix(errno.ENOENT)
            return target
        _, _, _, node = await self._granted(ino, "list")
        if not isinstance(node, SymlinkNode):
            raise posix(errno.EINVAL)
        return node.target

    @staticmethod
    def _create(tree: Tree, parent: DirNode, name: bytes, node: Node) -> None:
        try:
            tree.create(parent, name, node)
        except OSError:
            tree.nodes.pop(node.ino, None)
            raise

    def _handle(self, handle: FileHandle | DirHandle | ControlHandle) -> int:
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = handle
        return fh


def absent(seconds: float) -> Attr:
    return Attr(0, 0, 0, 0, 0, 0, 0, 0, seconds, seconds)
