"""Small private files: created once, whole, durable, and read back only if nobody else could touch them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

_MAX_BYTES: Final = 4096
_TEMPORARY: Final = re.compile(r"\.key(?:vault\.[a-z0-9-]+|-move)\.[0-9a-f]{16}")


def vault_file(directory: Path, kind: str) -> Path:
    """The file that a key vault of ``kind`` keeps in a home directory (for the Secret Service: a pointer)."""
    return directory / f"keyvault.{kind}"


def create_private(path: Path, content: bytes) -> None:
    """Write ``content`` to the new file ``path`` with mode 0600, complete and on disk or not at all.

    Raises MeshkitError: ``already_initialized`` if anything has that name, ``keyvault_unavailable`` if the
    directory does not take it.
    """
    try:
        with _temporary(path, content) as temporary:
            # link() and not rename(): it fails if the name exists, so two creators cannot both win.
            os.link(temporary, path)
        _sync_directory(path.parent)
    except FileExistsError:
        raise MeshkitError("already_initialized", f"{path} exists") from None
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot write {path}: {error.strerror}") from None


def replace_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` (mode 0600) in place of what may be there; never half of it.

    Raises MeshkitError ``keyvault_unavailable``.
    """
    try:
        with _temporary(path, content) as temporary:
            temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A private file beside ``path`` with this content, on disk; gone afterwards if it is there still."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        # The umask can only have taken bits away; the owner must be able to read it back.
        os.fchmod(fd, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def read_private(path: Path) -> bytes:
    """Return the content of ``path`` if it is a regular file of ours that nobody else may read or write.

    Of a file longer than any key vault writes, only the beginning is read: its reader then refuses it.

    Raises MeshkitError: ``identity_not_found`` if it does not exist, ``keyvault_refused`` if it is a link,
    no regular file, another user's, or open to group or others; ``keyvault_unavailable`` if it cannot be
    read.
    """
    with _opened(path) as fd:
        buffer = bytearray(_MAX_BYTES)
        with memoryview(buffer) as view:
            # Not os.read: it makes a buffer that it then shortens, and leaves behind what it held.
            content = bytes(view[: os.readv(fd, [view])])
        wipe(buffer)
        return content


def check_private(path: Path) -> None:
    """Raise what `read_private` would, without looking at the content."""
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        # NOFOLLOW: a link could name a file of another place, with other protection. NONBLOCK: a FIFO
        # put there must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MeshkitError("identity_not_found", f"there is no {path}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise MeshkitError("keyvault_refused", f"{path} is a symbolic link") from None
        raise MeshkitError("keyvault_unavailable", f"cannot open {path}: {error.strerror}") from None
    try:
        # Judged on the open descriptor: what was checked is what is read.
        _require_private(path, os.fstat(fd))
        yield fd
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot read {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove ``path`` durably; no error if it is not there."""
    try:
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot remove {path}: {error.strerror}") from None


def remove_leftovers(directory: Path) -> None:
    """Remove what a kill left of files that were being written in ``directory``, which nobody else writes to.

    Of a key vault such a file can hold the key.
    """
    for path in directory.glob(".key*"):
        if _TEMPORARY.fullmatch(path.name):
            remove(path)


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MeshkitError("keyvault_refused", f"{path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise MeshkitError("keyvault_refused", f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise MeshkitError(
            "keyvault_refused",
            f"{path} is open to others (mode {mode:04o}); if nobody has used that, 'chmod 600' it",
        )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
