"""The shape of a store directory: its marker file, its directories, its place for half-written files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from meshkitfs.providers import _durable

__all__ = [
    "MARKER",
    "TEMPORARY",
    "create",
    "directories",
    "files",
    "has_marker",
    "make_directory",
    "names",
    "strangers",
    "sweep",
]

MARKER: Final = "meshkitfs-store"
TEMPORARY: Final = "tmp"
_MARKER_TEXT: Final = b"meshkitfs block store 1\n"
_STALE_SECONDS: Final = 86_400  # a temporary file this old belongs to a process that was killed


def has_marker(directory: str) -> bool:
    """Whether the directory is a store of this version. Raises OSError when that cannot be read."""
    try:
        return Path(directory, MARKER).read_bytes() == _MARKER_TEXT
    except FileNotFoundError:
        return False


def create(path: Path) -> None:
    """Make a store directory, private unless its parent is a setgid directory meant for a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        parent = stat.S_IMODE(path.parent.stat().st_mode)
        make_directory(str(path), 0o700 | (parent & 0o2077 if parent & stat.S_ISGID else 0))
    marker = path / MARKER
    if marker.exists():
        return
    others = strangers(str(path))
    if others:
        raise OSError(errno.ENOTEMPTY, f"the directory already holds other things ({others[0]!r})")
    mode = stat.S_IMODE(path.stat().st_mode)
    # Written under another name first: whoever sees the marker sees all of it.
    draft = path / TEMPORARY / secrets.token_hex(12)
    make_directory(str(draft.parent), mode)
    draft.write_bytes(_MARKER_TEXT)
    draft.chmod(mode & 0o666)
    _durable.fsync_path(str(draft))
    draft.replace(marker)
    _durable.fsync_path(str(path))


def make_directory(path: str, mode: int) -> None:
    """Make a directory with exactly this mode, whatever the umask; another process may have been first.

    It gets its name last: another user must never meet it while it is still closed to the group.
    """
    draft = f"{path}.{secrets.token_hex(6)}"
    os.mkdir(draft, 0o700)
    try:
        os.chmod(draft, mode)
        os.rename(draft, path)
    except OSError as error:
        os.rmdir(draft)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def strangers(directory: str) -> list[str]:
    """What is in a store directory and does not belong there, as far as its name says so. Raises OSError."""
    ours = (TEMPORARY, MARKER, "lost+found")
    return sorted(name for name in os.listdir(directory) if len(name) != 2 and name not in ours)


def directories(directory: str) -> list[str]:
    """The names of the directories that blocks are in, in order. Raises OSError."""
    with os.scandir(directory) as entries:
        return sorted(
            entry.name for entry in entries if len(entry.name) == 2 and entry.is_dir(follow_symlinks=False)
        )


def names(directory: str, inner: str) -> list[str]:
    """What is in one of those directories, in order. Raises OSError."""
    return sorted(os.listdir(f"{directory}/{inner}"))


def files(directory: str) -> Iterator[str]:
    """All that is in those directories, in no order that counts. Raises OSError."""
    for inner in directories(directory):
        yield from names(directory, inner)


def sweep(directory: str) -> None:
    """Remove what killed processes left half written. Not being able to is no reason to fail."""
    limit = time.time() - _STALE_SECONDS
    with contextlib.suppress(OSError), os.scandir(f"{directory}/{TEMPORARY}") as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_mtime < limit:
                os.unlink(entry.path)
