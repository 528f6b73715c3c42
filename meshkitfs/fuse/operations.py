"""Each request of the kernel as one call of the filesystem, and each failure as an errno.

No exception other than pyfuse3's FUSEError may leave a handler: pyfuse3 would take the whole mount down
with it. So every handler is wrapped in `_handler`, values are made fit for pyfuse3 inside of it, and what
comes back from the filesystem is checked where pyfuse3 would choke on it outside.

The handlers hold no state and await nothing but the filesystem. They are the innermost loop of the whole
program: some ten microseconds are all a request may cost, so nothing here is done twice or for looks.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from meshkitfs.fuse.refusal import errno_for
from meshkitfs.fuse.workers import Workers
from meshkitfs.vfs import CALLER
from meshkitfs.vfs.types import Attr, Filesystem, ForgetInode, SetAttr

__all__ = ["Counters", "Operations"]

_log = logging.getLogger(__name__)

_NAME_MAX = 255  # FUSE itself lets longer names through
# What programs take as a good size for one read or write; the smallest block of a file.
_PREFERRED_IO = 65536
_PERMISSIONS = 0o7777
# How long an open waits for the kernel to take note that the file was changed elsewhere.
_SETTLE_SECONDS = 2.0
_BUFFERS = (bytes, bytearray, memoryview)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _handler(
    method: Callable[Concatenate[Operations, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Operations, _P], Coroutine[Any, Any, _T]]:
    """Turn whatever leaves ``method`` into a FUSEError. Cancellation too: a request is always answered."""
    name = method.__name__

    @functools.wraps(method)
    async def answered(self: Operations, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        self.counters.done[name] += 1
        try:
            return await method(self, *args, **kwargs)
        except GeneratorExit:
            raise
        except BaseException as error:
            code = self._errno(name, error)
            self.counters.failed[code] += 1
            raise FUSEError(code) from None

    return answered


class Counters:
    """What the kernel has asked for: requests by handler, failures by errno, bytes read and written."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.failed: Counter[int] = Counter()
        self.bytes_read = 0
        self.bytes_written = 0


def _refusal(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _check(name: bytes) -> None:
    if len(name) > _NAME_MAX:
        raise _refusal(errno.ENAMETOOLONG)


def _is_user_xattr(name: bytes) -> bool:
    # Everything else is a namespace of the kernel (ACLs, capabilities, labels) that we do not keep:
    # claiming to would make cp, tar and rsync believe that they had preserved something.
    return name.startswith(b"user.")


class Operations(pyfuse3.Operations):
    """pyfuse3's view of one `Filesystem`.

    ``fs`` is driven from the event loop only. ``workers`` holds the deadlines; ``sync_deadline`` (seconds)
    is the one for fsync, which may have to move gigabytes, and for a write that waits until there is room.
    ``interrupt`` is told of a KeyboardInterrupt or
    SystemExit that struck inside a handler. ``serving`` is set when the kernel has greeted us.
    """

    # Where others write too, the writeback cache overwrites what they wrote: the kernel then owns the
    # size of a file, and appends at the size it believes in (tests/t4_adapter.py has the proof).
    enable_writeback_cache = False
    # Would promise lookups by inode number across restarts (NFS export).
    supports_dot_lookup = False
    enable_acl = False

    def __init__(
        self,
        fs: Filesystem,
        workers: Workers,
        sync_deadline: float,
        interrupt: Callable[[BaseException], None],
    ) -> None:
        self._fs = fs
        self._workers = workers
        self._sync_deadline = sync_deadline
        self._interrupt = interrupt
        self._uid = os.getuid()
        self._gid = os.getgid()
        self.serving = trio.Event()
        self.counters = Counters()
        # Returns when the kernel has taken note of every invalidation queued so far; set by the mount.
        self.settled: Callable[[], Awaitable[None]] | None = None

    def init(self) -> None:
        self.serving.set()

    def _errno(self, handler: str, error: BaseException) -> int:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._interrupt(error)
            return errno.ENOTCONN
        code = errno_for(error)
        if code is None:
            _log.error("%s failed in a way nobody foresaw", handler, exc_info=error)
            return errno.EIO
        if code == errno.ENOTCONN and self._workers.overdue():
            _log.warning("%s took too long and was ended", handler)
            return errno.ETIMEDOUT
        return code

    def _entry(self, attr: Attr) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = attr.ino
        entry.generation = attr.generation
        entry.entry_timeout = attr.entry_timeout
        entry.attr_timeout = attr.attr_timeout
        entry.st_mode = attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_size = attr.size
        entry.st_blocks = attr.blocks
        entry.st_blksize = _PREFERRED_IO
        entry.st_atime_ns = attr.atime_ns
        entry.st_mtime_ns = attr.mtime_ns
        entry.st_ctime_ns = attr.ctime_ns
        return entry

    # -- names and attributes --------------------------------------------------------------------------

    @_handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        _check(name)
        return self._entry(await self._fs.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        # Nobody waits for an answer, and one inode's trouble must not keep the others referenced.
        for inode, count in inode_list:
            try:
                self._fs.forget(inode, count)
            except Exception:
                _log.exception("forget failed in a way nobody foresaw")

    @_handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._entry(await self._fs.getattr(inode))

    @_handler
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        changes = SetAttr(
            mode=attr.st_mode & _PERMISSIONS if fields.update_mode else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
        )
        return self._entry(await self._fs.setattr(inode, changes, fh))

    @_handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return bytes(await self._fs.readlink(inode))

    # -- the tree --------------------------------------------------------------------------------------

    @_handler
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        _check(name)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            # The errno mknod(2) names for a filesystem without devices, pipes and sockets.
            raise _refusal(errno.EPERM)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        opened, attr = await self._fs.create(parent_inode, name, mode & _PERMISSIONS, flags)
        try:
            await self._fs.flush(opened.fh)
        finally:
            await self._fs.release(opened.fh)
        return self._entry(attr)

    @_handler
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        _check(name)
        return self._entry(await self._fs.mkdir(parent_inode, name, mode & _PERMISSIONS))

    @_handler
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        _check(name)
        return self._entry(await self._fs.symlink(parent_inode, name, target))

    @_handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        _check(new_name)
        return self._entry(await self._fs.link(inode, new_parent_inode, new_name))

    @_handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        _check(name)
        await self._fs.unlink(parent_inode, name)

    @_handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        _check(name)
        await self._fs.rmdir(parent_inode, name)

    @_handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        _check(name_old)
        _check(name_new)
        await self._fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    # -- files -----------------------------------------------------------------------------------------

    @_handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        CALLER.set(ctx.pid)
        opened = await self._fs.open(inode, flags)
        if opened.refresh and self.settled is not None:
            # The reader must not see the old size: the kernel forgets it before the open is answered.
            self._fs.invalidations.put(ForgetInode(inode, attr_only=True))
            with trio.move_on_after(_SETTLE_SECONDS):
                await self.settled()
        return FileInfo(opened.fh, keep_cache=opened.keep_cache)

    @_handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        _check(name)
        CALLER.set(ctx.pid)
        opened, attr = await self._fs.create(parent_inode, name, mode & _PERMISSIONS, flags)
        return FileInfo(opened.fh, keep_cache=opened.keep_cache), self._entry(attr)

    @_handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await self._fs.read(fh, off, size)
        if not isinstance(data, _BUFFERS) or len(data) > size:
            raise TypeError("the filesystem's read returned no buffer, or more than was asked for")
        self.counters.bytes_read += len(data)
        # pyfuse3's stub says bytes, but it takes any contiguous buffer, and takes it without a copy.
        return data  # type: ignore[return-value]

    @_handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._workers.allow(self._sync_deadline)
        written = await self._fs.write(fh, off, buf)
        if not 0 <= written <= len(buf):
            raise ValueError("the filesystem's write returned an impossible count")
        self.counters.bytes_written += written
        return written

    @_handler
    async def flush(self, fh: int) -> None:
        await self._fs.flush(fh)

    @_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        self._workers.allow(self._sync_deadline)
        await self._fs.fsync(fh, datasync)

    @_handler
    async def release(self, fh: int) -> None:
        await self._fs.release(fh)

    # -- directories -----------------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        CALLER.set(ctx.pid)
        # Through FileInfo, so that a handle which is no 64-bit number fails here and not in pyfuse3.
        return FileInfo(await self._fs.opendir(inode)).fh

    @_handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        given = 0
        try:
            for name, attr, next_id in self._fs.readdir(fh, start_id):
                if not pyfuse3.readdir_reply(token, name, self._entry(attr), next_id):
                    return
                given += 1
                if name not in (b".", b".."):
                    self._fs.looked_up(attr.ino)
        except Exception:
            # Entries already counted as known to the kernel must reach it. The kernel asks again from
            # where they end, and that request fails cleanly.
            if not given:
                raise

    @_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._workers.allow(self._sync_deadline)
        await self._fs.fsyncdir(fh)

    @_handler
    async def releasedir(self, fh: int) -> None:
        await self._fs.releasedir(fh)

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        facts = await self._fs.statfs()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = facts.block_size
        answer.f_blocks = facts.total_bytes // facts.block_size
        answer.f_bfree = answer.f_bavail = facts.free_bytes // facts.block_size
        answer.f_files = facts.files
        answer.f_ffree = answer.f_favail = facts.free_files
        answer.f_namemax = _NAME_MAX
        return answer

    # -- extended attributes ---------------------------------------------------------------------------

    @_handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if not _is_user_xattr(name):
            # Not ENOSYS: the kernel would then never ask for any attribute again. The first write to
            # each file asks for security.capability, so this is answered without the filesystem.
            raise _refusal(errno.ENODATA)
        return bytes(await self._fs.getxattr(inode, name))

    @_handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if not _is_user_xattr(name):
            raise _refusal(errno.EOPNOTSUPP)
        await self._fs.setxattr(inode, name, value)

    @_handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [bytes(name) for name in await self._fs.listxattr(inode)]

    @_handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if not _is_user_xattr(name):
            raise _refusal(errno.ENODATA)
        await self._fs.removexattr(inode, name)
