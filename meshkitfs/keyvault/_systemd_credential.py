"""The wrapping key sealed under a credential that systemd hands to the unit (``LoadCredential=`` and others).

The credential is read, never written: whoever sets up the unit makes it. The home keeps
``keyvault.systemd-credential``, four lines of ASCII:

    meshkitfs systemd-credential key vault 1
    <name of the credential>$<salt>
    <nonce>$<sealed key>
    <SHA-256 of the lines above, in hexadecimal>

Salt (32 bytes), nonce (12) and sealed key (48) are unpadded base64. The AES-256-GCM key is HKDF-SHA256 of the
credential with that salt and the label ``mk/systemd-credential@1``; the associated data are the first two
lines, with their newlines. So one credential can serve several homes, and a key that exists can be moved.

How the credential is stored cannot be seen from inside a unit: systemd shows a plain file, one encrypted with
the host's key, and one sealed with the TPM in the same way. What cannot be seen is reported as not known.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import KEY_BYTES, SYSTEMD_CREDENTIAL, KeyVaultReport, check_size
from meshkitfs.keyvault._files import create_private, read_private, remove, vault_file
from meshkitfs.keyvault._text import b64, checked, damaged, lines_of, unb64

CREDENTIAL: Final = "meshkitfs-key"
"""Name of the credential."""
DIRECTORY_VARIABLE: Final = "CREDENTIALS_DIRECTORY"
"""The environment variable in which systemd says where a unit's credentials are."""
MIN_CREDENTIAL: Final = 32
"""Fewest bytes of the credential. They are taken for random ones: nothing slows a guess down."""
MAX_CREDENTIAL: Final = 4096

_MAGIC: Final = "meshkitfs systemd-credential key vault 1"
_LABEL: Final = b"mk/systemd-credential@1"
_SALT, _NONCE, _SEALED = 32, 12, KEY_BYTES + 16
# linux/magic.h: file systems that are in memory only, and the one of those that is never swapped out.
_RAMFS, _TMPFS = 0x858458F6, 0x01021994

HOW_TO: Final = (
    f"as root: head -c {MIN_CREDENTIAL} /dev/urandom | systemd-creds encrypt --name={CREDENTIAL} - "
    f"/etc/credstore.encrypted/{CREDENTIAL}; then in the [Service] section of the unit: "
    f"LoadCredentialEncrypted={CREDENTIAL}:/etc/credstore.encrypted/{CREDENTIAL}. "
    f"For a user unit before systemd 256, a private file with {MIN_CREDENTIAL} random bytes and "
    f"LoadCredential={CREDENTIAL}:FILE"
)
"""How to make the credential, for a person."""


class SystemdCredentialVault:
    """``keyvault.systemd-credential``, and the credential of the unit that this process is in."""

    kind: Final = SYSTEMD_CREDENTIAL

    def __init__(self, directory: Path, fallback: str | None = None) -> None:
        self._path = vault_file(directory, self.kind)
        self._fallback = fallback

    def report(self) -> KeyVaultReport:
        try:
            name = CREDENTIAL
            try:
                name = _parse(read_private(self._path), self._path)[0]
            except MeshkitError as error:
                if error.code != "identity_not_found":
                    raise
            _, where = _credential(name)
        except MeshkitError as error:
            return self._report(available=False, exportable=None, detail=error.detail)
        return self._report(
            available=True,
            exportable=True,
            detail=f"sealed under the credential {name} of this unit, {where}; how that is kept while the "
            "unit does not run cannot be seen from here. Root, and every program that may read the "
            "credential, can open the key",
        )

    def _report(self, *, available: bool, exportable: bool | None, detail: str) -> KeyVaultReport:
        return KeyVaultReport(
            kind=self.kind,
            available=available,
            # The credential may be a file, or gone with a transient unit; the TPM may have sealed it, or not.
            persistent=None,
            exportable=exportable,
            hardware_backed=None,
            user_presence=False if available else None,
            locked=not available,
            fallback=self._fallback,
            detail=detail,
        )

    def create(self, secret: bytes) -> None:
        check_size(secret)
        credential, _ = _credential(CREDENTIAL)
        salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
        head = f"{CREDENTIAL}${b64(salt)}"
        sealed = AESGCM(_stretch(credential, salt)).encrypt(nonce, secret, _aad(head))
        create_private(self._path, checked(_MAGIC, head, f"{b64(nonce)}${b64(sealed)}"))

    def load(self) -> bytes:
        name, salt, nonce, sealed, aad = _parse(read_private(self._path), self._path)
        credential, _ = _credential(name)
        try:
            return AESGCM(_stretch(credential, salt)).decrypt(nonce, sealed, aad)
        except InvalidTag:
            raise MeshkitError(
                "keyvault_replaced",
                f"{self._path} was sealed under another credential {name} than this unit's",
            ) from None

    def destroy(self) -> None:
        """Remove the home's file. The credential is its maker's, and may serve others."""
        remove(self._path)

    def asks(self) -> None:
        return

    def forget(self) -> None:
        """There is nothing to lock: the unit has its credential for as long as it runs."""

    def __repr__(self) -> str:
        return f"SystemdCredentialVault({str(self._path)!r})"


def _parse(content: bytes, path: Path) -> tuple[str, bytes, bytes, bytes, bytes]:
    """Return the credential's name, salt, nonce, sealed key and associated data."""
    try:
        head, body = lines_of(content, _MAGIC, path)
        name, salt = head.split("$")
        nonce, sealed = body.split("$")
        # The name becomes part of a path.
        if name != CREDENTIAL:
            raise ValueError
        return name, unb64(salt, _SALT), unb64(nonce, _NONCE), unb64(sealed, _SEALED), _aad(head)
    except ValueError:
        raise damaged(path) from None


def _aad(head: str) -> bytes:
    return f"{_MAGIC}\n{head}\n".encode()


def _stretch(credential: bytes, salt: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, _LABEL).derive(credential)


def _credential(name: str) -> tuple[bytes, str]:
    """Return the credential and, for a person, where it is.

    Raises MeshkitError ``keyvault_unavailable`` (not in a unit, or one without it; the detail says how it is
    made), ``keyvault_refused`` (others may read it, or it is too short to be random bytes).
    """
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if not os.path.isabs(directory):
        raise MeshkitError(
            "keyvault_unavailable", f"this is not in a unit with credentials. To make one, {HOW_TO}"
        )
    path = Path(directory, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MeshkitError(
            "keyvault_unavailable", f"this unit has no credential {name}. To make one, {HOW_TO}"
        ) from None
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot open {path}: {error.strerror}") from None
    try:
        _require_private(path, os.fstat(fd))
        credential = os.read(fd, MAX_CREDENTIAL + 1)
        where = _where(fd)
    except OSError as error:
        raise MeshkitError("keyvault_unavailable", f"cannot read {path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if not MIN_CREDENTIAL <= len(credential) <= MAX_CREDENTIAL:
        raise MeshkitError(
            "keyvault_refused",
            f"the credential {name} must be random bytes, {MIN_CREDENTIAL} to {MAX_CREDENTIAL} of them",
        )
    return credential, where


def _require_private(path: Path, status: os.stat_result) -> None:
    # systemd leaves the file root's and lets the unit's user in by an access list, whose mask stands where
    # the group's bits are; or it gives the file to that user.
    mine = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    systemds = status.st_uid == 0 and not status.st_mode & 0o027
    if not stat.S_ISREG(status.st_mode) or not (mine or systemds):
        mode = stat.S_IMODE(status.st_mode)
        raise MeshkitError(
            "keyvault_refused", f"{path} is open to others (owner uid {status.st_uid}, mode {mode:04o})"
        )


def _where(fd: int) -> str:
    kind = _file_system(fd)
    if kind == _RAMFS:
        return "in memory that is never swapped out"
    if kind == _TMPFS:
        return "in memory that may be swapped out"
    return "in a plain file on a disk"


def _file_system(fd: int) -> int:
    """Return the magic number of the file system that ``fd`` is on. Raises OSError."""
    # struct statfs begins with it on every Linux (a machine word); the rest is only room.
    buffer = (ctypes.c_ulong * 64)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(buffer[0]) & 0xFFFFFFFF
