"""Open files: reading, writing, and the attributes a file is changed in."""

from __future__ import annotations

import errno
import os
import time

from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares import (
    AnyShare,
    DirNode,
    FileNode,
    Node,
    Tree,
    posix,
)
from meshkitfs.vfs._finder import Finder, noted
from meshkitfs.vfs._handles import ControlHandle, FileHandle
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
    ForgetInode,
    Opened,
    SetAttr,
)

__all__ = ["Files"]


_WRITES = os.O_WRONLY | os.O_RDWR
# Blocks that one trip to a worker thread reads ahead.
PREFETCH_BLOCKS = 4


class Files(Finder):
    """Open files, and changes of what is in them or known of them."""

    @noted
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

    @noted
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
        self.opens.allowed(share, node, "write" if writes else "read")
        kept, node.kernel_current = node.kernel_current, True
        return Opened(self._handle(handle), kept, refresh=not kept)

    @noted
    async def create(self, parent: int, name: bytes, mode: int, flags: int) -> tuple[Opened, Attr]:
        self._not_reserved(parent, name)
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
        self.opens.allowed(share, node, "create")
        handle = FileHandle(share, node, append=bool(flags & os.O_APPEND))
        handle.wrote = True
        return Opened(self._handle(handle), True), self._hand_out(share, node)

    async def _open_existing(self, share: AnyShare, node: Node, flags: int) -> tuple[Opened, Attr]:
        self._hand_out(share, node)
        opened = await self.open(node.ino, flags)
        node.lookups += 1
        return opened, self._hand_out(share, node)

    @noted
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

    @noted
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
                revision = content.revision
                try:
                    await content.write(grant, offset, data)
                finally:
                    # Also what was written before a block could not be read: it is seen, so it is kept.
                    if content.revision != revision:
                        node.mode &= ~0o6000
                        tree.touch(node, content=True)
                        handle.wrote = True
        return len(data)

    async def _make_room(self, share: AnyShare) -> None:
        """Wait until more may be written; end waiting if sealing fails (a full disk).

        Raises ``no_space`` if as much as may be waits here, and nothing that is under way will make room.
        """
        budget = share.services.budget
        if budget.stuck:
            for other in self.book.shares.values():
                if other.tree is not None:
                    other.tree.spill()

        def waiting() -> list[MeshkitError | None]:
            return [other.stuck for other in self.book.shares.values() if other.dirty]

        def hopeless() -> bool:
            # A share that can be published makes room, whatever keeps others from it.
            return budget.spool_full and not budget.working and None not in waiting()

        await budget.room(lambda: share.tree is None or share.tree.sealer.error is not None or hopeless())
        if hopeless():
            codes = sorted({reason.code for reason in waiting() if reason is not None})
            # Nothing to publish: they are those of files that were removed and are still open.
            why = ", ".join(codes) or "files without a name hold them"
            raise MeshkitError(
                "no_space", f"{budget.spool_limit} bytes are spooled, and may be no more: {why}"
            )

    async def flush(self, fh: int) -> None:
        handle = self._handles[fh]
        if isinstance(handle, FileHandle) and handle.wrote:
            handle.share.hurry()

    @noted
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if isinstance(handle, FileHandle):
            if handle.node.content is not None:
                handle.node.content.random = handle.node.content.random or handle.wrote
            if handle.share.dirty:
                await handle.share.fsync()

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
