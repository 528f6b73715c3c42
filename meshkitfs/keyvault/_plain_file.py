"""The wrapping key in an unprotected file: only ever chosen by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from meshkitfs.core.secret_memory import wipe, wipe_text
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import KEY_BYTES, PLAIN_FILE, KeyVaultReport, check_size
from meshkitfs.keyvault._files import check_private, create_private, read_private, remove, vault_file

_MAGIC: Final = b"meshkitfs plain key vault 1\n"


class PlainFileVault:
    """``keyvault.plain-file``: a magic line and the key in hexadecimal, mode 0600.

    Whoever can read the disk (root, a backup, a stolen laptop without disk encryption) has the key.
    """

    kind: Final = PLAIN_FILE

    def __init__(self, directory: Path, fallback: str | None = None) -> None:
        self._path = vault_file(directory, self.kind)
        self._fallback = fallback

    def report(self) -> KeyVaultReport:
        detail = f"{self._path} holds the key unprotected; only its file mode keeps other users out"
        available = True
        try:
            check_private(self._path)
        except MeshkitError as error:
            if error.code != "identity_not_found":
                available, detail = False, error.detail
        return KeyVaultReport(
            kind=self.kind,
            available=available,
            persistent=True,
            exportable=True,
            hardware_backed=False,
            user_presence=False,
            locked=False,
            fallback=self._fallback,
            detail=detail,
        )

    def create(self, secret: bytes) -> None:
        check_size(secret)
        create_private(self._path, _MAGIC + secret.hex().encode() + b"\n")

    def load(self) -> bytes:
        content = read_private(self._path)
        try:
            text = content.removeprefix(_MAGIC).decode("ascii")
            secret = bytes.fromhex(text)
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES or content != _MAGIC + secret.hex().encode() + b"\n":
            raise MeshkitError("identity_corrupt", f"{self._path} is not a key file")
        wipe(content)
        wipe_text(text)
        return secret

    def destroy(self) -> None:
        remove(self._path)

    def asks(self) -> None:
        return

    def forget(self) -> None:
        """There is nothing to lock."""

    def __repr__(self) -> str:
        return f"PlainFileVault({str(self._path)!r})"
