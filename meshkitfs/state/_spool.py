"""Sealed blocks of this device that wait for the byte store: one file each, named by digest.

A file appears under its final name at once. That is safe without a rename: a block counts only once a
local commit names it, a commit names it only after `sync`, and every read verifies the digest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.errors import MeshkitError

__all__ = ["Spool"]

# Above this many files one syncfs(2) is cheaper than an fsync each, even with strangers' dirty pages in it.
_SYNCFS_ABOVE = 16

_libc = ctypes.CDLL(None, use_errno=True)


class Spool:
    """A directory of sealed blocks. All methods do blocking I/O and belong on a worker thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._base = str(directory)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for shard in range(256):
            (directory / f"{shard:02x}").mkdir(parents=True, exist_ok=True, mode=0o700)
        # Written since the last sync: what fsync has to cover.
        self._unsynced: set[bytes] = set()
        # Discarded while a sync runs, which may be about to look at them.
        self._gone: set[bytes] = set()
        self._lock = threading.Lock()
        self._syncing = threading.Lock()

    def path(self, digest: bytes) -> str:
        name = digest.hex()
        return f"{self._base}/{name[:2]}/{name}"

    def write(self, block: SealedBlock) -> int:
        """Store a block; not durable before `sync`. Returns its size. Raises ``no_space`` (ENOSPC)."""
        path = self.path(block.digest)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(block.data)
                size = written = len(view)
                written = os.write(fd, view)
                while written < size:
                    written += os.write(fd, view[written:])
            finally:
                os.close(fd)
        except OSError as error:
            raise _classified(error) from error
        with self._lock:
            self._unsynced.add(block.digest)
        return size

    def read(self, digest: bytes) -> VerifiedBlock:
        """Return a spooled block. Raises ``cid_mismatch``; ``block_unavailable`` if it is not here."""
        try:
            with open(self.path(digest), "rb", buffering=0) as file:
                return VerifiedBlock.check(digest, file.readall())
        except FileNotFoundError as error:
            raise MeshkitError("block_unavailable", f"{digest.hex()[:16]}… is not in the spool") from error

    def sync(self) -> None:
        """Make every block written so far durable."""
        # One at a time: a second share's commit must not go on because the first has taken its blocks along.
        with self._syncing:
            with self._lock:
                waiting, self._unsynced = self._unsynced, set()
                self._gone.clear()
            if not waiting:
                return
            try:
                if len(waiting) > _SYNCFS_ABOVE:
                    self._syncfs()
                else:
                    self._sync_each(waiting)
            except OSError as error:
                with self._lock:
                    self._unsynced |= waiting - self._gone
                raise _classified(error) from error

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
        """Remove blocks that the byte store holds, or that nothing names any more."""
        for digest in digests:
            with self._lock:
                self._unsynced.discard(digest)
                if self._syncing.locked():
                    self._gone.add(digest)
            try:
                os.unlink(self.path(digest))
            except FileNotFoundError:
                continue

    def sweep(self, keep: set[bytes]) -> int:
        """Remove every block not in ``keep`` (left by a crash before its commit); return how many."""
        removed = 0
        for shard in os.scandir(self._base):
            for entry in os.scandir(shard.path):
                if len(entry.name) != 64 or bytes.fromhex(entry.name) not in keep:
                    os.unlink(entry.path)
                    removed += 1
        return removed


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
