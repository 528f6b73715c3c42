"""identity.sealed: the sealed private keys in a home directory."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.errors import MeshkitError
from meshkitfs.identity._identity import (
    Identity,
    open_identity,
    seal_identity,
    seal_identity_with,
    sealing_key,
)

_MAX_BYTES: Final = 4 << 20


def save_identity(path: Path, identity: Identity, wrapping: bytes) -> None:
    """Seal ``identity`` into the file ``path`` (mode 0600): the old content or the new, never a part of it.

    Raises OSError if the directory does not take it; the old file then stands.
    """
    write_atomically(path, seal_identity(identity, wrapping))


class Sealer:
    """Saves an identity while its home is unlocked, with a key that opens nothing but that file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key: SecretBytes | None = None

    def unlock(self, wrapping: bytes) -> None:
        """Take the key from the key vault's secret."""
        self._key = SecretBytes(sealing_key(wrapping))

    def lock(self) -> None:
        """Forget the key; may be called again."""
        if self._key is not None:
            self._key.wipe()
            self._key = None

    def __call__(self, identity: Identity) -> None:
        """As `save_identity`. Raises ``identity_locked``."""
        if self._key is None:
            raise MeshkitError("identity_locked", "run 'meshkitfs unlock'")
        write_atomically(self._path, seal_identity_with(identity, self._key.view))


def load_identity(path: Path, wrapping: bytes) -> Identity:
    """Read what `save_identity` wrote.

    Raises MeshkitError ``identity_not_found`` (no such file), ``identity_locked`` (it cannot be read) or
    ``identity_corrupt`` (damaged, or of another key vault).
    """
    try:
        with path.open("rb") as file:
            blob = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise MeshkitError("identity_not_found", f"there is no {path}") from None
    except OSError as error:
        raise MeshkitError("identity_locked", f"cannot read {path}: {error.strerror}") from None
    if len(blob) > _MAX_BYTES:
        raise MeshkitError("identity_corrupt", f"{path} is too long")
    try:
        return open_identity(blob, wrapping)
    except MeshkitError as error:
        raise MeshkitError(error.code, f"{path}: {error.detail}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file of mode 0600 with ``content``, on disk when this returns. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
