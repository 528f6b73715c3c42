"""What the filesystem and its adapter say to each other: plain values, no FUSE and no network.

The adapter (``meshkitfs.fuse``) drives anything that has the shape of `Filesystem`; the tests do so too,
without a kernel. Inode numbers are 64-bit and stable for an object; the root of the mount is 1. Names are
bytes, as the kernel gives them. Times are integer nanoseconds since the epoch.

Every method may raise ``OSError`` (an ordinary POSIX outcome, such as ENOENT) or
`meshkitfs.errors.MeshkitError` (a refusal or a fault of ours, whose errno the error table names).
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "ROOT_INO",
    "Attr",
    "Filesystem",
    "ForgetEntry",
    "ForgetInode",
    "Invalidation",
    "Opened",
    "SetAttr",
    "StatFs",
]

ROOT_INO = 1


@dataclass(slots=True)
class Attr:
    """The attributes of one inode. ``ino == 0`` means "there is no such name", as a cacheable answer.

    ``mode`` is the whole st_mode (type and permission bits); ``blocks`` counts 512-byte units that are
    really stored; the timeouts say for how many seconds the kernel may believe the name and the
    attributes. The owner is always the mounting user, so it is not carried here.
    """

    ino: int
    mode: int
    nlink: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    entry_timeout: float
    attr_timeout: float
    generation: int = 0


@dataclass(slots=True)
class SetAttr:
    """The attributes a setattr call wants changed; None leaves one alone. ``mode`` is permission bits."""

    mode: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    uid: int | None = None
    gid: int | None = None


@dataclass(slots=True)
class Opened:
    """An open file: the handle for later calls, and whether the kernel may keep pages it already has.

    With ``refresh`` the adapter has the kernel drop its attributes of the inode before it answers the open:
    the file was changed elsewhere, and the reader must not be shown the old size.
    """

    fh: int
    keep_cache: bool
    refresh: bool = False


@dataclass(slots=True)
class StatFs:
    """Sizes in bytes and counts, as ``statvfs`` reports them after division by ``block_size``."""

    block_size: int
    total_bytes: int
    free_bytes: int
    files: int
    free_files: int


@dataclass(frozen=True, slots=True)
class ForgetInode:
    """Tell the kernel to drop what it cached of an inode; ``attr_only`` keeps its pages."""

    ino: int
    attr_only: bool = False


@dataclass(frozen=True, slots=True)
class ForgetEntry:
    """Tell the kernel that a name means something else now; ``deleted`` is the inode it meant, if gone."""

    parent: int
    name: bytes
    deleted: int = 0


Invalidation = ForgetInode | ForgetEntry


class Filesystem(Protocol):
    """A filesystem as the adapter sees it."""

    # Read by one dedicated thread of the adapter: kernel invalidation may block, so it never happens
    # on the event loop (docs/concepts.md, "kernel caches").
    invalidations: queue.SimpleQueue[Invalidation]

    async def lookup(self, parent: int, name: bytes) -> Attr: ...
    def looked_up(self, ino: int) -> None:
        """Count one more reference the kernel holds on ``ino`` (for names handed out by `readdir`)."""

    def forget(self, ino: int, count: int) -> None: ...
    async def getattr(self, ino: int) -> Attr: ...
    async def setattr(self, ino: int, changes: SetAttr, fh: int | None) -> Attr: ...
    async def readlink(self, ino: int) -> bytes: ...
    async def mkdir(self, parent: int, name: bytes, mode: int) -> Attr: ...
    async def symlink(self, parent: int, name: bytes, target: bytes) -> Attr: ...
    async def link(self, ino: int, parent: int, name: bytes) -> Attr: ...
    async def unlink(self, parent: int, name: bytes) -> None: ...
    async def rmdir(self, parent: int, name: bytes) -> None: ...
    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None: ...
    async def open(self, ino: int, flags: int) -> Opened: ...
    async def create(self, parent: int, name: bytes, mode: int, flags: int) -> tuple[Opened, Attr]: ...
    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview: ...
    async def write(self, fh: int, offset: int, data: bytes) -> int: ...
    async def flush(self, fh: int) -> None: ...
    async def fsync(self, fh: int, datasync: bool) -> None: ...
    async def release(self, fh: int) -> None: ...
    async def opendir(self, ino: int) -> int: ...
    def readdir(self, fh: int, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, id of the next entry) from position ``start`` (0 is the beginning)."""

    async def fsyncdir(self, fh: int) -> None: ...
    async def releasedir(self, fh: int) -> None: ...
    async def statfs(self) -> StatFs: ...
    async def getxattr(self, ino: int, name: bytes) -> bytes: ...
    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None: ...
    async def listxattr(self, ino: int) -> list[bytes]: ...
    async def removexattr(self, ino: int, name: bytes) -> None: ...
