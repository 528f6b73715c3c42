"""Which key vault a home uses: the one named, the one it already has, or the best there is."""

from __future__ import annotations

import os
from pathlib import Path

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import (
    KINDS,
    PASSPHRASE_FILE,
    SECRET_SERVICE,
    KeyVault,
    KeyVaultReport,
    Passphrase,
)
from meshkitfs.keyvault._files import vault_file
from meshkitfs.keyvault._passphrase_file import PassphraseFileVault
from meshkitfs.keyvault._plain_file import PlainFileVault
from meshkitfs.keyvault._secret_service import SecretServiceVault, unusable_because


def detect() -> str:
    """Return the strongest kind of key vault that can keep a new key here. Asks nobody.

    ``secret-service`` if the session has a usable one, else ``passphrase-file``. Never ``plain-file``:
    that one is only used when a person names it.
    """
    return SECRET_SERVICE if unusable_because() is None else PASSPHRASE_FILE


def existing(directory: Path) -> str | None:
    """Return the kind of key vault that ``directory`` holds a key for, or None."""
    return next((kind for kind in KINDS if os.path.lexists(vault_file(directory, kind))), None)


def open_vault(kind: str, directory: Path, passphrase: Passphrase | None = None) -> KeyVault:
    """Return the key vault of that ``kind`` for the home ``directory``, and no other, ever.

    Opening reads nothing and asks nobody; a missing back end shows in `KeyVault.report` and makes
    `KeyVault.load` and `KeyVault.create` fail. Raises MeshkitError ``invalid_argument`` for an unknown
    kind, ``already_initialized`` if the home's key is in a vault of another kind.
    """
    return _open(kind, directory, passphrase, None)


def choose(kind: str | None, directory: Path, passphrase: Passphrase | None = None) -> KeyVault:
    """Return the key vault named by ``kind``; without a name, the one the home has, else the best there is.

    Where the best there is stands in for a stronger kind that cannot be used, its report says so
    (``fallback``). Raises as `open_vault`.
    """
    if kind is not None:
        return open_vault(kind, directory, passphrase)
    held = existing(directory)
    if held is not None:
        return open_vault(held, directory, passphrase)
    best = detect()
    return _open(best, directory, passphrase, None if best == SECRET_SERVICE else SECRET_SERVICE)


def report_all(directory: Path) -> tuple[KeyVaultReport, ...]:
    """The report of each kind, strongest first, as `doctor` shows them."""
    vaults: tuple[KeyVault, ...] = (
        SecretServiceVault(directory),
        PassphraseFileVault(directory),
        PlainFileVault(directory),
    )
    return tuple(vault.report() for vault in vaults)


def _open(kind: str, directory: Path, passphrase: Passphrase | None, fallback: str | None) -> KeyVault:
    if kind not in KINDS:
        raise MeshkitError("invalid_argument", f"no key vault {kind!r}; there are {', '.join(KINDS)}")
    held = existing(directory)
    if held is not None and held != kind:
        # One home, one key: a second vault beside it would be a second, different key.
        raise MeshkitError("already_initialized", f"the key of {directory} is in its {held} key vault")
    if kind == SECRET_SERVICE:
        return SecretServiceVault(directory, fallback)
    if kind == PASSPHRASE_FILE:
        return PassphraseFileVault(directory, passphrase, fallback)
    return PlainFileVault(directory, fallback)
