"""The filesystem as the kernel sees it: the mount's root, the shares in it, their files and handles.

Metadata is answered from memory; only opening something that is not loaded, and reading its blocks, goes
to the byte store. Every operation on a share first gets a grant: `Share.live` where a lease may be relied
on, `Share.use(..., current=True)` where an open must see the newest state. Names and attributes that the
kernel was already told stay visible after a refusal, so that the reason can be asked for; nothing else is.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import queue
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from meshkitfs.core.entries import DIR, HARDLINK, TARGET_MAX, XATTR_NAME_MAX, XATTR_TOTAL_MAX, Entry
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares import (
    DirNode,
    Event,
    FileNode,
    NameChanged,
    Node,
    NodeChanged,
    Share,
    ShareBook,
    SymlinkNode,
    Tree,
    posix,
)
from meshkitfs.vfs._attributes import absence, attr_of, attr_of_share
from meshkitfs.vfs._control import CONTROL_INO, CONTROL_NAME, ControlFiles
from meshkitfs.vfs._faults import Faults, classified
from meshkitfs.vfs._handles import ControlHandle, DirHandle, FileHandle
from meshkitfs.vfs._xattrs import PREFIX, meshkit_names, meshkit_value
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
    ForgetEntry,
    ForgetInode,
    Invalidation,
    Opened,
    SetAttr,
    StatFs,
)

__all__ = ["MeshFilesystem"]

_log = logging.getLogger(__name__)

_READ_ONLY = os.O_RDONLY
_WRITES = os.O_WRONLY | os.O_RDWR
_STATFS_BLOCK = 4096
# Positions of a listing that "." and ".." take.
_DOTS = 2
# Blocks that one trip to a worker thread reads ahead.
PREFETCH_BLOCKS = 4

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _noted(
    method: Callable[Concatenate[MeshFilesystem, int, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[MeshFilesystem, int, _P], Coroutine[Any, Any, _T]]:
    """Have what ``method`` fails with remembered for the inode, or the inode of the open file, it was for."""

    @functools.wraps(method)
    async def noting(self: MeshFilesystem, number: int, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, number, *args, **kwargs)
        except (MeshkitError, BaseExceptionGroup) as error:
            self._note(number, error)
            raise

    return noting


class MeshFilesystem:
    """All shares of a book, one directory each."""

    def __init__(
        self,
        book: ShareBook,
        control: ControlFiles,
        runtime: Callable[[], dict[str, Any]],
        report: Callable[[str, MeshkitError], None] = lambda path, error: None,
    ) -> None:
        self.book = book
        self.faults = Faults(report)
        self.invalidations: queue.SimpleQueue[Invalidation] = queue.SimpleQueue()
        self._control = control
        self._runtime = runtime
        self._shares: dict[int, Share] = {}
        # Inodes the kernel has forgotten while they were still to be committed; see `forget`.
        self._lingering: set[int] = set()
        self._linger_until = 4096
        self._handles: dict[int, FileHandle | DirHandle | ControlHandle] = {}
        # Above the inode numbers of the root and the control files, below those of objects.
        self._next_handle = 1 << 16
        self._born = time.time_ns()

    # -- finding -----------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Turn what a share tells into what the kernel has to forget."""
        if isinstance(event, NodeChanged):
            self.invalidations.put(ForgetInode(event.ino, not event.content))
        elif isinstance(event, NameChanged):
            self.invalidations.put(ForgetEntry(event.parent, event.name, event.gone))

    def _note(self, number: int, error: BaseException) -> None:
        """Remember a failure of the file, directory or open handle of that number (they do not overlap)."""
        fault = classified(error)
        handle = self._handles.get(number)
        ino = handle.ino if isinstance(handle, FileHandle | DirHandle) else number
        share = self._shares.get(ino)
        if fault is not None and share is not None:
            self.faults.note(share, share.tree.nodes.get(ino) if share.tree is not None else None, fault)

    def _share(self, ino: int) -> Share:
        share = self._shares.get(ino)
        if share is None:
            raise posix(errno.ESTALE)
        return share

    def _known(self, ino: int) -> tuple[Share, Node | None]:
        """Return the share of an inode and its node, None for a share's root that is not loaded."""
        share = self._share(ino)
        node = share.tree.nodes.get(ino) if share.tree is not None else None
        if node is None and ino != share.root_ino:
            raise posix(errno.ESTALE)
        return share, node

    async def _granted(
        self, ino: int, right: str, *, current: bool = False
    ) -> tuple[Share, Grant, Tree, Node]:
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
    ) -> tuple[Share, Grant, Tree, DirNode]:
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
    def _still(share: Share, grant: Grant, tree: Tree, *nodes: Node) -> None:
        """Raise unless what was looked up is still so: `Share.changing` may have waited for a merge."""
        grant.check()
        for node in nodes:
            if share.tree is not tree or tree.nodes.get(node.ino) is not node:
                raise posix(errno.ESTALE)
            if isinstance(node, DirNode) and not tree.is_named(node):
                raise posix(errno.ENOENT)

    def _hand_out(self, share: Share, node: Node) -> Attr:
        self._shares[node.ino] = share
        return attr_of(share, node)

    def _root_attr(self) -> Attr:
        count = len(self.book.shares)
        return Attr(
            ROOT_INO, stat.S_IFDIR | 0o700, 2 + count, 4096, 8, self._born, self._born, self._born, 1.0, 1.0
        )

    async def _share_attr(self, share: Share) -> Attr:
        """Return the attributes of a share's root, opening it if that is allowed now."""
        self._shares[share.root_ino] = share
        if share.live("list") is None:
            try:
                await share.use("list")
            except MeshkitError:
                return attr_of_share(share)
        assert share.tree is not None
        return attr_of(share, share.tree.root)

    @_noted
    async def lookup(self, parent: int, name: bytes) -> Attr:
        if parent == ROOT_INO:
            if name == CONTROL_NAME:
                return self._control.attr(CONTROL_INO)
            share = self.book.shares.get(name)
            if share is None:
                return _absent(1.0)
            return await self._share_attr(share)
        if parent in self._control:
            ino = self._control.ino_of(name)
            return _absent(60.0) if ino is None else self._control.attr(ino)
        try:
            share, _, tree, node = await self._directory(parent, "list")
            if name not in (node.children or ()):
                # Whoever was told of a new file must find it, so "there is none" needs the newest state.
                share, _, tree, node = await self._directory(parent, "list", current=True)
        except MeshkitError as error:
            return self._remembered(parent, name, error)
        assert node.children is not None
        if name not in node.children:
            return _absent(absence(share))
        child = tree.node_of(node, name)
        child.lookups += 1
        return self._hand_out(share, child)

    def _remembered(self, parent: int, name: bytes, error: MeshkitError) -> Attr:
        """Answer for a name of a refused share the kernel was told before; raise ``error`` for others."""
        share, node = self._known(parent)
        child = (node.children or {}).get(name) if isinstance(node, DirNode) else None
        if isinstance(child, Node):
            child.lookups += 1
            return attr_of(share, child)
        raise error

    def looked_up(self, ino: int) -> None:
        share = self._shares.get(ino)
        if share is not None and share.tree is not None:
            node = share.tree.nodes.get(ino)
            if node is not None:
                node.lookups += 1

    def forget(self, ino: int, count: int) -> None:
        share = self._shares.get(ino)
        if share is None or share.tree is None:
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
        share, node = self._known(ino)
        if node is None:
            return await self._share_attr(share)
        return attr_of(share, node)

    @_noted
    async def readlink(self, ino: int) -> bytes:
        _, _, _, node = await self._granted(ino, "list")
        if not isinstance(node, SymlinkNode):
            raise posix(errno.EINVAL)
        return node.target

    # -- changing names ----------------------------------------------------------------------------

    @_noted
    async def mkdir(self, parent: int, name: bytes, mode: int) -> Attr:
        if parent == ROOT_INO:
            share = await self.book.create(name, mode & 0o777)
            return await self._share_attr(share)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.new_directory(mode & 0o7777)
            self._create(tree, directory, name, node)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @staticmethod
    def _create(tree: Tree, parent: DirNode, name: bytes, node: Node) -> None:
        try:
            tree.create(parent, name, node)
        except OSError:
            tree.nodes.pop(node.ino, None)
            raise

    @_noted
    async def symlink(self, parent: int, name: bytes, target: bytes) -> Attr:
        if not 0 < len(target) <= TARGET_MAX:
            raise posix(errno.ENAMETOOLONG)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.new_symlink(target)
            self._create(tree, directory, name, node)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @_noted
    async def link(self, ino: int, parent: int, name: bytes) -> Attr:
        if parent == ROOT_INO or self._shares.get(parent) is not self._shares.get(ino):
            raise posix(errno.EXDEV)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            if tree.links.children is None:
                await tree.load(grant, tree.links)
            _, node = self._known(ino)
            if node is None:
                raise posix(errno.EPERM)
            self._still(share, grant, tree, directory)
            tree.link(node, directory, name)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @_noted
    async def unlink(self, parent: int, name: bytes) -> None:
        if parent == ROOT_INO:
            await self._remove_share(name, DIR, errno.EISDIR, wanted=False)
            return
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            tree.remove(directory, name, directory=False)
        share.hurry()

    @_noted
    async def rmdir(self, parent: int, name: bytes) -> None:
        if parent == ROOT_INO:
            await self._remove_share(name, DIR, errno.ENOTDIR, wanted=True)
            return
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.node_of(directory, name)
            if isinstance(node, DirNode):
                await tree.load(grant, node)
            tree.remove(directory, name, directory=True)
        share.hurry()

    async def _remove_share(self, name: bytes, kind: int, mismatch: int, *, wanted: bool) -> None:
        """Removing an empty share of one's own, or a snapshot file, forgets it; anything else is refused."""
        share = self.book.shares.get(name)
        if share is None:
            raise posix(errno.ENOENT)
        if (share.row.kind == kind) is not wanted:
            raise posix(mismatch)
        if share.row.kind == DIR:
            await share.use("list", current=True)
            root = share.tree_root
            if isinstance(root, DirNode) and root.children:
                raise posix(errno.ENOTEMPTY)
            if not share.row.mine:
                raise posix(errno.EPERM)
        await self.book.remove(share)

    @_noted
    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        if old_parent == ROOT_INO and new_parent == ROOT_INO:
            await self._rename_share(old_name, new_name, flags)
            return
        if ROOT_INO in (old_parent, new_parent) or self._shares.get(old_parent) is not self._shares.get(
            new_parent
        ):
            raise posix(errno.EXDEV)
        share, grant, tree, source = await self._directory(old_parent, "write")
        _, _, _, target = await self._directory(new_parent, "write")
        async with share.changing():
            self._still(share, grant, tree, source, target)
            replaced = (target.children or {}).get(new_name)
            if replaced is not None and replaced.kind == DIR:
                directory = tree.node_of(target, new_name)
                if isinstance(directory, DirNode):
                    await tree.load(grant, directory)
            tree.rename(source, old_name, target, new_name, flags)
        share.hurry()

    async def _rename_share(self, old_name: bytes, new_name: bytes, flags: int) -> None:
        share = self.book.shares.get(old_name)
        if share is None:
            raise posix(errno.ENOENT)
        if flags & ~1:
            raise posix(errno.EINVAL)
        if old_name != new_name:
            await self.book.rename(share, new_name)

    # -- attributes --------------------------------------------------------------------------------

    @_noted
    async def setattr(self, ino: int, changes: SetAttr, fh: int | None) -> Attr:
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.EPERM)
        share, grant, tree, node = await self._granted(ino, "write")
        async with share.changing():
            self._still(share, grant, tree, node)
            now = time.time_ns()
            if changes.size is not None:
                if not isinstance(node, FileNode):
                    raise posix(errno.EISDIR)
                await self._truncate(tree, grant, node, changes.size)
            if changes.mode is not None:
                node.mode = changes.mode & 0o7777
            if changes.uid is not None or changes.gid is not None:
                # The owner shown is always the mounting user; only chown's side effect is kept.
                node.mode &= ~0o6000
            if changes.atime_ns is not None:
                node.atime_ns = changes.atime_ns
            if changes.mtime_ns is not None:
                node.mtime_ns = changes.mtime_ns
            tree.touch(node, now=now)
        share.hurry()
        return self._hand_out(share, node)

    async def _truncate(self, tree: Tree, grant: Grant, node: FileNode, size: int) -> None:
        # Nobody may have it open, and then a commit that ends now would let go of the content.
        node.pins += 1
        try:
            content = await tree.content(grant, node)
            async with content.lock:
                if size != content.size or size == 0:
                    await content.truncate(grant, size)
            node.mode &= ~0o6000
            tree.touch(node, content=True)
        finally:
            node.pins -= 1

    # -- files -------------------------------------------------------------------------------------

    def _handle(self, handle: FileHandle | DirHandle | ControlHandle) -> int:
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = handle
        return fh

    @_noted
    async def open(self, ino: int, flags: int) -> Opened:
        writes = bool(flags & _WRITES)
        if ino in self._control:
            if writes:
                raise posix(errno.EACCES)
            return Opened(self._handle(ControlHandle(self._control.content(ino))), False)
        share, named = self._known(ino)
        place = None if named is None else (named.parent, named.name)
        share, grant, tree, node = await self._granted(ino, "write" if writes else "read", current=True)
        if not isinstance(node, FileNode):
            raise posix(errno.EISDIR if isinstance(node, DirNode) else errno.ELOOP)
        gone = not tree.is_named(node) and not tree.removed_here(node)
        if gone or place not in (None, (node.parent, node.name)):
            # Replaced or moved elsewhere since the kernel looked: it looks the name up again on ESTALE.
            # (What was removed here can still be opened, through /proc/self/fd.)
            raise posix(errno.ESTALE)
        node.opens += 1
        try:
            await tree.content(grant, node)
            if flags & os.O_TRUNC and writes:
                async with share.changing():
                    self._still(share, grant, tree, node)
                    await self._truncate(tree, grant, node, 0)
        except BaseException:
            node.opens -= 1
            raise
        handle = FileHandle(share, node, append=bool(flags & os.O_APPEND))
        handle.wrote = bool(flags & os.O_TRUNC and writes)
        self.faults.clear(ino)
        kept, node.kernel_current = node.kernel_current, True
        return Opened(self._handle(handle), kept, refresh=not kept)

    @_noted
    async def create(self, parent: int, name: bytes, mode: int, flags: int) -> tuple[Opened, Attr]:
        share, grant, tree, directory = await self._directory(parent, "write")
        if name in (directory.children or ()) and not flags & os.O_EXCL:
            # Somebody else made it since the kernel looked, which is no reason to refuse it.
            return await self._open_existing(share, tree.node_of(directory, name), flags)
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.new_file(mode & 0o7777)
            self._create(tree, directory, name, node)
            node.lookups += 1
            node.opens += 1
        node.kernel_current = True
        handle = FileHandle(share, node, append=bool(flags & os.O_APPEND))
        handle.wrote = True
        return Opened(self._handle(handle), True), self._hand_out(share, node)

    async def _open_existing(self, share: Share, node: Node, flags: int) -> tuple[Opened, Attr]:
        self._hand_out(share, node)
        opened = await self.open(node.ino, flags)
        node.lookups += 1
        return opened, self._hand_out(share, node)

    @_noted
    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        handle = self._handles[fh]
        if isinstance(handle, ControlHandle):
            return handle.content[offset : offset + size]
        assert isinstance(handle, FileHandle)
        share, node = handle.share, handle.node
        grant = share.live("read")
        if grant is None:
            grant = await share.use("read")
        content = node.content
        if content is None:
            assert share.tree is not None
            content = await share.tree.content(grant, node)
        ahead = handle.ahead(offset, size, content.block_size, content.size)
        for at in range(ahead.start, ahead.stop, PREFETCH_BLOCKS):
            batch = range(at, min(at + PREFETCH_BLOCKS, ahead.stop))
            share.services.nursery.start_soon(content.prefetch, grant, batch)
        found = content.read_now(grant, offset, size)
        return found if found is not None else await content.read(grant, offset, size)

    @_noted
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        handle = self._handles[fh]
        assert isinstance(handle, FileHandle)  # the kernel writes only to what was opened for it
        share, node = handle.share, handle.node
        grant = share.live("write")
        if grant is None:
            grant = await share.use("write")
        if share.services.budget.full:
            await self._make_room(share)
        async with share.changing() as tree:
            self._still(share, grant, tree, node)
            if tree.sealer.error is not None:
                error, tree.sealer.error = tree.sealer.error, None
                share.hurry()
                raise error
            content = node.content
            if content is None:
                content = await tree.content(grant, node)
            async with content.lock:
                if handle.append and (offset > content.size or offset in node.past_sizes):
                    # The kernel's idea of the end is older than somebody else's change. Its other writes
                    # on this handle are not appends: they bring pages that were changed through a mapping.
                    offset = content.size
                    self.invalidations.put(ForgetInode(node.ino))
                await content.write(grant, offset, data)
            node.mode &= ~0o6000
            tree.touch(node, content=True)
        handle.wrote = True
        return len(data)

    async def _make_room(self, share: Share) -> None:
        """Wait until there is memory for more plaintext; end waiting if sealing fails (a full disk)."""
        budget = share.services.budget
        if budget.stuck:
            for other in self.book.shares.values():
                if other.tree is not None:
                    other.tree.spill()
        await budget.room(lambda: share.tree is None or share.tree.sealer.error is not None)

    async def flush(self, fh: int) -> None:
        handle = self._handles[fh]
        if isinstance(handle, FileHandle) and handle.wrote:
            handle.share.hurry()

    @_noted
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if isinstance(handle, FileHandle):
            if handle.node.content is not None:
                handle.node.content.random = handle.node.content.random or handle.wrote
            if handle.share.dirty:
                await handle.share.flush()

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        if not isinstance(handle, FileHandle):
            return
        share, node = handle.share, handle.node
        node.opens -= 1
        if handle.wrote:
            share.hurry()
        if share.tree is not None and not node.opens and share.tree.nodes.get(node.ino) is node:
            node.release_content()
            if node.parent is None:
                share.tree.evict(node)

    # -- directories -------------------------------------------------------------------------------

    @_noted
    async def opendir(self, ino: int) -> int:
        if ino == ROOT_INO or ino in self._control:
            return self._handle(DirHandle(ino, None))
        share, grant, tree, node = await self._granted(ino, "list", current=True)
        if not isinstance(node, DirNode):
            raise posix(errno.ENOTDIR)
        await tree.load(grant, node)
        self.faults.clear(ino)
        return self._handle(DirHandle(ino, share))

    def readdir(self, fh: int, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        handle = self._handles[fh]
        assert isinstance(handle, DirHandle)
        if handle.share is not None:
            yield from self._read_directory(handle, handle.share, start)
            return
        own = self._root_attr() if handle.ino == ROOT_INO else self._control.attr(handle.ino)
        yield from _dots(start, own, self._root_attr())
        start = max(start, _DOTS)
        if handle.ino == ROOT_INO:
            yield from self._read_root(handle, start)
        else:
            for i, (name, ino) in enumerate(self._control.names()[start - _DOTS :], start):
                yield name, self._control.attr(ino), i + 1

    def _read_root(self, handle: DirHandle, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        if start == _DOTS:
            handle.names = sorted(self.book.shares)
        for i in range(start, len(handle.names) + _DOTS):
            name = handle.names[i - _DOTS]
            share = self.book.shares.get(name)
            if share is not None:
                self._shares[share.root_ino] = share
                root = share.tree_root
                attr = attr_of_share(share) if root is None else attr_of(share, root)
                yield name, attr, i + 1

    def _read_directory(
        self, handle: DirHandle, share: Share, start: int
    ) -> Iterator[tuple[bytes, Attr, int]]:
        tree = share.tree
        if share.live("list") is None or tree is None:
            raise share.refusal or MeshkitError("freshness_unproven", share.name)
        node = tree.nodes.get(handle.ino)
        if not isinstance(node, DirNode) or node.children is None:
            raise posix(errno.ESTALE)
        above = self._root_attr() if node is tree.root else attr_of(share, node.parent or node)
        yield from _dots(start, attr_of(share, node), above)
        start = max(start, _DOTS)
        if start == _DOTS:
            handle.names = list(node.children)
        for i in range(start, len(handle.names) + _DOTS):
            name = handle.names[i - _DOTS]
            child = node.children.get(name)
            if child is None:
                continue
            if isinstance(child, Entry) and child.kind == HARDLINK and tree.links.children is None:
                continue
            yield name, self._hand_out(share, tree.node_of(node, name)), i + 1

    @_noted
    async def fsyncdir(self, fh: int) -> None:
        handle = self._handles[fh]
        if isinstance(handle, DirHandle) and handle.share is not None and handle.share.dirty:
            await handle.share.flush()

    async def releasedir(self, fh: int) -> None:
        self._handles.pop(fh, None)

    async def statfs(self) -> StatFs:
        usage = (
            next(iter(self.book.shares.values())).services.reader.store.usage() if self.book.shares else None
        )
        if usage is None:
            return StatFs(_STATFS_BLOCK, 0, 0, 0, 0)
        files = sum(len(share.tree.nodes) for share in self.book.shares.values() if share.tree is not None)
        return StatFs(
            _STATFS_BLOCK, usage.total_bytes, usage.free_bytes, files + usage.free_inodes, usage.free_inodes
        )

    # -- extended attributes -----------------------------------------------------------------------

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.ENODATA)
        share, node = self._known(ino)
        if name.startswith(PREFIX):
            if share.grant is None and share.refusal is None:
                await self._share_attr(share)
            value = meshkit_value(name, share, node, self._runtime, self.faults.of(ino))
        else:
            _, _, _, node = await self._granted(ino, "list")
            value = node.xattrs.get(name)
        if value is None:
            raise posix(errno.ENODATA)
        return value

    async def listxattr(self, ino: int) -> list[bytes]:
        if ino == ROOT_INO or ino in self._control:
            return []
        share, node = self._known(ino)
        names = meshkit_names(share, node, self._runtime)
        try:
            _, _, _, node = await self._granted(ino, "list")
        except MeshkitError:
            return names  # of a refused share only what says why
        return names + list(node.xattrs)

    @_noted
    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        if name.startswith(PREFIX):
            raise posix(errno.EACCES)
        if not name.startswith(b"user."):
            raise posix(errno.EOPNOTSUPP)
        if len(name) > XATTR_NAME_MAX:
            raise posix(errno.ERANGE)
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.EACCES)
        share, grant, tree, node = await self._granted(ino, "write")
        async with share.changing():
            self._still(share, grant, tree, node)
            total = sum(len(key) + len(held) for key, held in node.xattrs.items() if key != name)
            if total + len(name) + len(value) > XATTR_TOTAL_MAX:
                raise posix(errno.ENOSPC)
            node.xattrs[name] = value
            tree.touch(node)
        share.hurry()

    @_noted
    async def removexattr(self, ino: int, name: bytes) -> None:
        if name.startswith(PREFIX):
            raise posix(errno.EACCES)
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.ENODATA)
        share, grant, tree, node = await self._granted(ino, "write")
        async with share.changing():
            self._still(share, grant, tree, node)
            if node.xattrs.pop(name, None) is None:
                raise posix(errno.ENODATA)
            tree.touch(node)
        share.hurry()


def _dots(start: int, own: Attr, above: Attr) -> Iterator[tuple[bytes, Attr, int]]:
    """Yield "." and ".." of a listing, which stand before everything else in it."""
    for i, (name, attr) in enumerate(((b".", own), (b"..", above)), 1):
        if start < i:
            yield name, attr, i


def _absent(seconds: float) -> Attr:
    return Attr(0, 0, 0, 0, 0, 0, 0, 0, seconds, seconds)
