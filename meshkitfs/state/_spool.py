"""Sealed blocks of this device that wait for the byte store: one file each, named by digest.

A file appears under its final name at once. That is safe without a rename: a block counts only once a
local commit names it, a commit names it only after `sync`, and every read verifies the digest.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.errors import MeshkitError

__all__ = ["Spool"]

_log = logging.getLogger(__name__)

# Above this many files one syncfs(2) is cheaper than an fsync each, even with strangers' dirty pages in it.
_SYNCFS_ABOVE = 16

_libc = ctypes.CDLL(None, use_errno=True)


class Spool:
    """A directory of sealed blocks. All methods do blocking I/O and belong on a worker thread."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``, making what is missing. Raises ``no_space``, ``state_corrupt``."""
        self.directory = directory
        self._base = str(directory)
        try:
            _make_directories(directory)
        except OSError as error:
            raise _classified(error) from error
        # Written since the last sync: what fsync has to cover.
        self._unsynced: set[bytes] = set()
        # An fsync that was to cover them failed: nobody knows whether they are on the disk.
        self._doubtful: set[bytes] = set()
        # Discarded while a sync runs, which may be about to look at them.
        self._gone: set[bytes] = set()
        # What is in it, by size; ``used`` is their sum in bytes.
        self._sizes: dict[bytes, int] = {}
        self.used = 0
        self._lock = threading.Lock()
        self._syncing = threading.Lock()

    def path(self, digest: bytes) -> str:
        name = digest.hex()
        return f"{self._base}/{name[:2]}/{name}"

    def write(self, block: SealedBlock) -> int:
        """Store a block; not durable before `sync`. Returns its size. Raises ``no_space`` (ENOSPC)."""
        try:
            _write(self.path(block.digest), block.data)
        except OSError as error:
            raise _classified(error) from error
        with self._lock:
            self._unsynced.add(block.digest)
            self._count(block.digest, len(block.data))
        return len(block.data)

    def read(self, digest: bytes) -> VerifiedBlock:
        """Return a spooled block.

        Raises ``cid_mismatch``; ``block_unavailable`` if it is not here; ``state_corrupt`` if its disk fails.
        """
        try:
            with open(self.path(digest), "rb", buffering=0) as file:
                return VerifiedBlock.check(digest, file.readall())
        except FileNotFoundError as error:
            raise MeshkitError("block_unavailable", f"{digest.hex()[:16]}… is not in the spool") from error
        except OSError as error:
            raise _classified(error) from error

    def written(self, digest: bytes) -> float:
        """Return when a block was written (UNIX seconds), 0 if it is not here."""
        try:
            return os.stat(self.path(digest)).st_mtime
        except OSError:
            return 0.0

    def sync(self) -> None:
        """Make every block written so far durable."""
        # One at a time: a second share's commit must not go on because the first has taken its blocks along.
        with self._syncing:
            with self._lock:
                waiting, self._unsynced = self._unsynced, set()
                doubtful = self._doubtful & waiting
                self._gone.clear()
            if not waiting:
                return
            try:
                for digest in doubtful:
                    self._write_again(digest)
                if len(waiting) > _SYNCFS_ABOVE:
                    self._syncfs()
                else:
                    self._sync_each(waiting)
            except OSError as error:
                with self._lock:
                    self._unsynced |= waiting - self._gone
                    self._doubtful |= waiting - self._gone
                raise _classified(error) from error
            with self._lock:
                self._doubtful -= waiting

    def _write_again(self, digest: bytes) -> None:
        """Write a block anew after its write-back failed.

        The kernel then takes its pages for clean, so fsync would succeed with nothing on the disk; but the
        pages still hold the data, or the digest tells that they do not.
        """
        path = self.path(digest)
        try:
            data = self.read(digest).data
        except MeshkitError as error:
            with self._lock:
                if digest in self._gone:
                    return
            raise OSError(errno.EIO, f"a block was lost: {error.code}") from error
        _write(f"{path}.new", data)
        os.replace(f"{path}.new", path)

    def _sync_each(self, waiting: set[bytes]) -> None:
        for digest in waiting:
            try:
                _fsync(self.path(digest))
            except FileNotFoundError:
                with self._lock:
                    if digest not in self._gone:
                        raise
        for shard in {digest[0] for digest in waiting}:
            _fsync(f"{self._base}/{shard:02x}")

    def _syncfs(self) -> None:
        fd = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)

    def discard(self, digests: Iterable[bytes]) -> None:
        """Remove blocks that the byte store holds, or that nothing names any more. Never fails.

        What cannot be removed only takes room, and the next start sweeps it up.
        """
        for digest in digests:
            with self._lock:
                self._unsynced.discard(digest)
                self._doubtful.discard(digest)
                self._count(digest, 0)
                if self._syncing.locked():
                    self._gone.add(digest)
            try:
                os.unlink(self.path(digest))
            except FileNotFoundError:
                continue
            except OSError as error:
                _log.warning("a block that is not needed could not be removed: %s", error.strerror)

    def _count(self, digest: bytes, size: int) -> None:
        """Note what a block takes, 0 if it goes. Holds the lock."""
        self.used += size - self._sizes.pop(digest, 0)
        if size:
            self._sizes[digest] = size

    def sweep(self, keep: set[bytes]) -> int:
        """Remove every file that is no block of ``keep`` (left by a crash before its commit).

        Returns how many. What cannot be removed only takes room.
        """
        names = {digest.hex(): digest for digest in keep}
        removed = 0
        for shard in range(256):
            for entry in os.scandir(f"{self._base}/{shard:02x}"):
                if entry.name in names:
                    with self._lock:
                        self._count(names[entry.name], entry.stat(follow_symlinks=False).st_size)
                elif not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
                        removed += 1
        return removed


def _make_directories(base: Path) -> None:
    """Make the spool's directories, so that they survive a power failure as what is in them does."""
    known = base.is_dir()
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = False
    for shard in range(256):
        try:
            (base / f"{shard:02x}").mkdir(mode=0o700)
            made = True
        except FileExistsError:
            continue
    if made:
        _fsync(str(base))
    if not known:
        _fsync(str(base.parent))


def _write(path: str, data: bytes | bytearray | memoryview) -> None:
    """Write a file; nothing of it stays if that fails. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _fsync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _classified(error: OSError) -> MeshkitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MeshkitError("no_space", "the spool's filesystem is full")
    return MeshkitError("state_corrupt", f"the spool cannot be used: {error.strerror}")
