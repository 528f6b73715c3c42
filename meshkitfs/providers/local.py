"""Blocks as files of one directory on this machine: ``DIR/xx/<CID>``, xx being the CID's last two letters.

Several homes, also of several UNIX users, may use one directory at the same time: a block never changes,
gets its name only when it is complete, and takes over the group and the permissions of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import trio

from meshkitfs.core.blocks import MAX_SEALED, SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_text, parse_cid
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import _durable, _layout
from meshkitfs.providers._api import Capabilities, Counters, Source, Usage
from meshkitfs.providers._options import PATH, Options, option

__all__ = ["LocalOptions", "LocalStore"]

DIRECTORY: Final = "blocks"  # below the home, when no other is named
_THREADS: Final = 8  # reads overlap; hashing keeps every core busy long before this many
_SINGLE_FSYNCS: Final = 8  # above this many new paths, one sync of the filesystem is cheaper
# O_NONBLOCK and the regular-file check: a FIFO planted in the store must not hang the reader.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# link(2) answers these where the two places cannot share a file; a copy still works.
_COPY_INSTEAD: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})

# One for each run of trio, as trio's own: a thread abandoned by one run never gives back its place.
_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("local_store_threads")

T = TypeVar("T")


class LocalStore:
    """The byte store of a directory. Made by `open`; every async method is one trip to a worker thread."""

    local = True

    def __init__(self, directory: Path) -> None:
        """Name a store directory; it is looked at with `attach`, at the latest by the first request."""
        self.directory = directory
        self.name = f"local-dev:{directory}"
        self.counters = Counters()
        self._source = Source(self.name)
        self._dir = str(directory)
        self._temporary = f"{self._dir}/{_layout.TEMPORARY}"
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._new_files: set[str] = set()
        self._new_names: set[str] = set()
        # New files that a sync was to cover which failed: nobody knows whether they are on the disk.
        self._doubtful: set[str] = set()
        # A process before us may have stored blocks and died before its sync; ours must cover them too.
        self._sync_all = True
        self._attached = False

    def attach(self) -> None:
        """Look whether the directory is a store, once. Raises provider_request_failed when it is none."""
        if self._attached:
            return
        self._check_marker()
        try:
            status = os.stat(self._dir)
        except OSError as error:
            raise _failed("the store cannot be used", error) from None
        self._dir_mode = stat.S_IMODE(status.st_mode)
        self._file_mode = status.st_mode & 0o666
        self._gid = status.st_gid
        _layout.sweep(self._dir)
        self._attached = True

    @classmethod
    def open(cls, directory: str | Path, *, create: bool = False, absent: bool = False) -> LocalStore:
        """Open the store in ``directory``; with ``create``, make it when there is none.

        A marker file tells a store from an empty directory, such as the mount point of a disk that is not
        there. Raises provider_request_failed; with ``absent`` only requests do, until it is there.
        """
        path = Path(os.path.abspath(directory))
        if create:
            try:
                _layout.create(path)
            except OSError as error:
                raise _failed(f"cannot make a store at {path}", error) from None
        store = cls(path)
        try:
            store.attach()
        except MeshkitError:
            if not absent:
                raise
        return store

    # -- the ByteStore methods -------------------------------------------------------------------------

    async def get(self, digest: bytes) -> VerifiedBlock:
        """The block of that digest. Raises block_unavailable, cid_mismatch, provider_request_failed."""
        # Nobody waits for an abandoned read, and it changes nothing, so an interrupted reader stops at once.
        with self.counters.trip("get"):
            return await trio.to_thread.run_sync(
                self.get_now, digest, abandon_on_cancel=True, limiter=_threads()
            )

    def get_now(self, digest: bytes) -> VerifiedBlock:
        """`get` without the trip, for callers that are in a worker thread already."""
        self.attach()
        with self._lock:
            self.counters.gets += 1
        try:
            block = VerifiedBlock.check(digest, self._read(digest))
        except MeshkitError as error:
            with self._lock:
                self._source.note(error)
            raise
        with self._lock:
            self._source.served += 1
            self.counters.bytes_in += len(block.data)
        return block

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        """`get` for many in one trip; what cannot be had is left out."""

        def work() -> dict[bytes, VerifiedBlock]:
            found = {}
            for digest in digests:
                with contextlib.suppress(MeshkitError):
                    found[digest] = self.get_now(digest)
            return found

        with self.counters.trip("get"):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=_threads())

    async def put(self, block: SealedBlock) -> None:
        """Store a block under its digest; raises no_space, provider_request_failed."""
        with self.counters.trip("put"):
            await self._in_thread(lambda: self._put(block))

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        """Store a spooled file by a hard link, or by a copy when it is on another filesystem.

        The link shares the file with the spool, so the file takes over the store's group and permissions.
        """
        with self.counters.trip("put"):
            await self._in_thread(lambda: self._put_file(digest, os.fspath(path)))

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        """`put_file` for many in one trip. On an error those before the failing one are stored."""

        def work() -> None:
            for digest, path in files:
                self._put_file(digest, os.fspath(path))

        with self.counters.trip("put"):
            await self._in_thread(work)

    async def has(self, digest: bytes) -> bool:
        """Whether there is a file of that name with something in it."""
        return bool(await self.has_many((digest,)))

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests the store has a file for."""
        return set(await self.sizes(digests))

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Those of the digests the store has a file for, with its size."""
        wanted = list(digests)
        return await self._in_thread(
            lambda: {digest: size for digest in wanted if (size := self._size(digest)) > 0}
        )

    async def delete(self, digest: bytes) -> None:
        """Remove the block's file; it is no error when there is none."""
        await self.delete_many((digest,))

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """`delete` for many in one trip, in the order given."""

        def work() -> None:
            for digest in digests:
                self._delete(digest)

        await self._in_thread(work)

    async def sync(self) -> None:
        """Return when what was stored and deleted before this call stays so after a power failure."""
        await self._in_thread(self._sync)

    # -- what only a store that can be listed has ------------------------------------------------------

    async def count(self) -> int:
        """How many files the store holds below its directories, foreign ones included."""
        return await self._in_thread(lambda: sum(1 for _ in _layout.files(self._dir)))

    async def digests(
        self, after: bytes = b"", foreign: Callable[[str], None] = lambda _: None
    ) -> AsyncIterator[bytes]:
        """Every block the store has a file for, in the order of `place`, beginning behind ``after``.

        ``foreign`` is told the path (below the store) of whatever is no block; it is left alone. Raises
        provider_request_failed.
        """
        start = self.place(after) if after else ""
        try:
            if not after:
                for name in await self._in_thread(lambda: _layout.strangers(self._dir)):
                    foreign(name)
            for directory in await self._in_thread(lambda: _layout.directories(self._dir)):
                if directory < start[:2]:
                    continue
                for name in await self._in_thread(lambda d=directory: _layout.names(self._dir, d)):  # type: ignore[misc]
                    path = f"{directory}/{name}"
                    if path <= start:
                        continue
                    try:
                        digest = parse_cid(name)
                    except MeshkitError:
                        digest = b""
                    if digest and self.place(digest) == path:
                        yield digest
                    else:
                        foreign(path)
        except OSError as error:
            raise _failed("the store cannot be listed", error) from None
        self._check_marker()

    @staticmethod
    def place(digest: bytes) -> str:
        """The path of a block below the store's directory."""
        text = cid_text(digest)
        return f"{text[-2:]}/{text}"

    def usage(self) -> Usage:
        """Room on the filesystem that holds the store."""
        try:
            room = os.statvfs(self._dir)
        except OSError as error:
            raise _failed("the store cannot be used", error) from None
        return Usage(room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize, room.f_favail)

    async def probe(self) -> Capabilities:
        """What a directory can do is known."""
        return Capabilities(conditional_put=True, multi_delete=True, listing=True)

    def sources(self) -> list[Source]:
        """The directory."""
        return [self._source]

    def close(self) -> None:
        """Nothing is held open."""

    async def aclose(self) -> None:
        """Nothing is held open."""

    # -- in worker threads -----------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def attached() -> T:
            self.attach()
            return work()

        return await trio.to_thread.run_sync(attached, limiter=_threads())

    def _path(self, digest: bytes) -> str:
        return f"{self._dir}/{self.place(digest)}"

    def _read(self, digest: bytes) -> bytes:
        path = self._path(digest)
        try:
            fd = os.open(path, _READ)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise MeshkitError("cid_mismatch", f"{cid_text(digest)} is not a regular file")
                # One byte more than there should be: a file that grows meanwhile must not match by luck.
                return _read_all(fd, min(status.st_size, MAX_SEALED) + 1)
            finally:
                os.close(fd)
        except FileNotFoundError:
            self._check_marker()
            raise MeshkitError("block_unavailable", cid_text(digest)) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise MeshkitError("cid_mismatch", f"{cid_text(digest)} is a symbolic link") from None
            raise _failed(f"cannot read {cid_text(digest)}", error) from None

    def _put(self, block: SealedBlock) -> None:
        with self._lock:
            self.counters.puts += 1
        _check_size(len(block.data))
        target = self._path(block.digest)
        try:
            if not self._settled(block.digest, target):
                self._write(target, block.data)
        except OSError as error:
            raise _failed(f"cannot store {cid_text(block.digest)}", error) from None

    def _put_file(self, digest: bytes, path: str) -> None:
        with self._lock:
            self.counters.puts += 1
        try:
            source = os.stat(path)
        except OSError as error:
            detail = f"the file of block {cid_text(digest)} cannot be read: {error.strerror}"
            raise MeshkitError("block_unavailable", detail) from None
        _check_size(source.st_size)
        target = self._path(digest)
        try:
            try:
                self._share(path, source)
                self._name(lambda: os.link(path, target), target)
                with self._lock:
                    # It stands in for one that was lost.
                    self._new_files.discard(target)
                    self._doubtful.discard(target)
            except FileExistsError:
                same = os.path.samestat(os.lstat(target), source)
                if not same and not self._settled(digest, target):
                    self._write(target, Path(path).read_bytes())
                return
            except OSError as error:
                if error.errno not in _COPY_INSTEAD:
                    raise
                self._write(target, Path(path).read_bytes())
                return
        except OSError as error:
            raise _failed(f"cannot store {cid_text(digest)}", error) from None
        self._count_stored(source.st_size)

    def _settled(self, digest: bytes, target: str) -> bool:
        """Whether the store has the block already, from an upload that was cut off or from another home.

        Then it is made durable here, since nobody can tell whether the other one came to its sync. A
        damaged copy does not count, so storing the block again repairs it.
        """
        if target in self._doubtful or not os.path.lexists(target):
            return False
        try:
            VerifiedBlock.check(digest, self._read(digest))
        except MeshkitError:
            return False
        _durable.fsync_path(target)
        with self._lock:
            self._new_names.add(os.path.dirname(target))
        return True

    def _write(self, target: str, data: bytes | bytearray | memoryview) -> None:
        """Put bytes under a name, replacing what is there. Raises OSError."""
        temporary = f"{self._temporary}/{secrets.token_hex(12)}"
        fd = self._name(lambda: os.open(temporary, _CREATE, 0o600), temporary)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                self._share(fd, os.fstat(fd))
            finally:
                os.close(fd)
            self._name(lambda: os.replace(temporary, target), target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        with self._lock:
            self._new_files.add(target)
            self._doubtful.discard(target)
        self._count_stored(len(data))

    def _share(self, file: int | str, status: os.stat_result) -> None:
        """Give a file the permissions and, where others may use the store, the group of the directory."""
        if self._file_mode & 0o060 and status.st_gid != self._gid:
            with contextlib.suppress(PermissionError):  # not a member: the permissions for others must do
                os.chown(file, -1, self._gid)
        if stat.S_IMODE(status.st_mode) != self._file_mode:
            os.chmod(file, self._file_mode)

    def _name(self, action: Callable[[], T], path: str) -> T:
        """Run what makes ``path`` appear, making its directory first if it has to be."""
        parent = os.path.dirname(path)
        try:
            result = action()
        except FileNotFoundError:
            self._check_marker()
            _layout.make_directory(parent, self._dir_mode)
            with self._lock:
                self._new_names.add(self._dir)
            result = action()
        if parent != self._temporary:
            with self._lock:
                self._new_names.add(parent)
        return result

    def _size(self, digest: bytes) -> int:
        """The size of the block's file, 0 when there is none. An empty file is no block."""
        try:
            return os.stat(self._path(digest)).st_size
        except FileNotFoundError:
            self._check_marker()
            return 0
        except OSError as error:
            raise _failed("the store cannot be used", error) from None

    def _delete(self, digest: bytes) -> None:
        path = self._path(digest)
        try:
            os.unlink(path)
        except FileNotFoundError:
            self._check_marker()
            return
        except OSError as error:
            raise _failed(f"cannot delete {cid_text(digest)}", error) from None
        with self._lock:
            self._new_names.add(os.path.dirname(path))
            # Its bytes need no sync any more.
            self._new_files.discard(path)
            self._doubtful.discard(path)

    def _sync(self) -> None:
        # One at a time: a second caller must not return early because the first has taken its paths along.
        with self._syncing:
            with self._lock:
                files, self._new_files = self._new_files, set()
                names, self._new_names = self._new_names, set()
                doubtful = files & self._doubtful
            try:
                for path in doubtful:
                    self._write_again(path)
                with self._lock:
                    self._new_files -= doubtful
                if self._sync_all or len(files) + len(names) > _SINGLE_FSYNCS:
                    _durable.sync_filesystem(self._dir)
                else:
                    _durable.sync_paths([*files, *names])
            except OSError as error:
                # Somebody else may be about to rely on some of them, who will only see a later sync.
                with self._lock:
                    files = {path for path in files if path in self._doubtful or os.path.lexists(path)}
                    self._new_files |= files
                    self._doubtful |= files
                    self._new_names |= names
                raise _failed("blocks could not be made durable", error) from None
            self._sync_all = False

    def _write_again(self, path: str) -> None:
        """Write a block anew after its write-back failed. Raises OSError if it is lost.

        The kernel forgets that its pages were never written, so fsync would report a success that is none;
        but they still hold the block, or the digest tells that they do not. One that is lost fails every
        sync until it is stored again, or deleted.
        """
        digest = parse_cid(os.path.basename(path))
        try:
            block = VerifiedBlock.check(digest, self._read(digest))
        except MeshkitError as error:
            if path not in self._doubtful:
                return  # deleted meanwhile
            raise OSError(errno.EIO, f"a block was lost ({error.code})") from None
        self._write(path, block.data)

    def _count_stored(self, size: int) -> None:
        with self._lock:
            self.counters.bytes_out += size

    def _check_marker(self) -> None:
        """Tell "the block is not there" from "the store is not there". Raises provider_request_failed."""
        try:
            if _layout.has_marker(self._dir):
                return
        except OSError as error:
            raise _failed("the store cannot be used", error) from None
        raise MeshkitError("provider_request_failed", f"there is no block store at {self._dir}")


@dataclass(frozen=True, slots=True)
class LocalOptions(Options):
    """``{"type": "local-dev", "store": DIR}``: a directory of this machine."""

    local: ClassVar[bool] = True
    store: Path = option(PATH)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {"store": DIRECTORY}

    @classmethod
    def parse(cls, text: str, base: Path) -> LocalOptions:
        """``local:DIR``"""
        return cls.read({"store": text}, "provider", base)

    def directories(self) -> list[Path]:
        return [self.store]

    async def open(self, *, create: bool) -> LocalStore:
        """Open the directory. Raises provider_request_failed when it is no store."""
        return await trio.to_thread.run_sync(lambda: LocalStore.open(self.store, create=create))

    async def open_absent(self) -> LocalStore:
        """Open the directory, which need not be there."""
        return await trio.to_thread.run_sync(lambda: LocalStore.open(self.store, absent=True))


def _threads() -> trio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
        return limiter


def _read_all(fd: int, size: int) -> bytes:
    data = os.read(fd, size)
    if len(data) < size - 1:  # a signal cut it short, or the file shrank
        while more := os.read(fd, size - len(data)):
            data += more
    return data


def _check_size(size: int) -> None:
    if not 0 < size <= MAX_SEALED:
        raise MeshkitError("invalid_envelope", f"a sealed block of {size} bytes cannot be stored")


def _failed(what: str, error: OSError) -> MeshkitError:
    code = "no_space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "provider_request_failed"
    return MeshkitError(code, f"{what}: {error.strerror}")
