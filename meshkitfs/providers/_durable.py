"""Making files durable: by a sync of the whole filesystem where that pays, one by one where not."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable

__all__ = ["fsync_path", "sync_filesystem", "sync_paths"]


def fsync_path(path: str) -> None:
    """fsync one file or directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(directory: str) -> None:
    """Make everything on the filesystem that holds ``directory`` durable. Raises OSError.

    Uses syncfs(2), which reports write errors; where there is none, sync(2), which cannot.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:
        os.sync()
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The foreign call lets go of the interpreter lock, so other threads run on meanwhile.
        if call(fd) != 0:
            code = ctypes.get_errno()
            if code != errno.ENOSYS:
                raise OSError(code, os.strerror(code), directory)
            os.sync()
    finally:
        os.close(fd)


def sync_paths(paths: Iterable[str]) -> None:
    """fsync each file or directory; one that was deleted meanwhile needs none. Raises OSError."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fsync_path(path)
