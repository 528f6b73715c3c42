"""Which key vault a home uses: the one named, the one it already has, or the best there is."""

from __future__ import annotations

import os
from pathlib import Path

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import (
    KINDS,
    PASSPHRASE_FILE,
    PLAIN_FILE,
    SECRET_SERVICE,
    SYSTEMD_CREDENTIAL,
    TPM2,
    KeyVault,
    KeyVaultReport,
    Passphrase,
)
from meshkitfs.keyvault._files import vault_file
from meshkitfs.keyvault._move import under_way
from meshkitfs.keyvault._passphrase_file import PassphraseFileVault
from meshkitfs.keyvault._plain_file import PlainFileVault
from meshkitfs.keyvault._secret_service import SecretServiceVault, unusable_because
from meshkitfs.keyvault._session_cache import SessionCache
from meshkitfs.keyvault._systemd_credential import SystemdCredentialVault
from meshkitfs.keyvault._tpm2 import Seal, Tpm2Vault


def detect() -> str:
    """Return the kind of key vault that should keep a new key here. Asks nobody.

    ``secret-service`` if the session has a usable one, else ``passphrase-file``. The others are only used
    when a person names them: ``plain-file`` protects nothing, and a TPM or a credential has to be set up.
    """
    return SECRET_SERVICE if unusable_because() is None else PASSPHRASE_FILE


def existing(directory: Path) -> str | None:
    """Return the kind of key vault that ``directory`` holds a key for, or None.

    While a move of the key is unfinished there are two, with the same key; this is the one that counts.
    """
    move = under_way(directory)
    if move is not None:
        return move.now
    return next((kind for kind in KINDS if os.path.lexists(vault_file(directory, kind))), None)


def open_vault(
    kind: str, directory: Path, passphrase: Passphrase | None = None, seal: Seal | None = None
) -> KeyVault:
    """Return the key vault of that ``kind`` for the home ``directory``, and no other, ever.

    Opening reads nothing and asks nobody; a missing back end shows in `KeyVault.report` and makes
    `KeyVault.load` and `KeyVault.create` fail. Raises MeshkitError ``invalid_argument`` for an unknown
    kind, ``already_initialized`` if the home's key is in a vault of another kind. ``seal`` is how a TPM
    seals a new key.
    """
    return _open(kind, directory, passphrase, None, seal)


def open_home(
    directory: Path,
    kind: str | None,
    passphrase: Passphrase | None = None,
    cache_seconds: int | None = None,
) -> KeyVault:
    """Return the key vault that the home ``directory`` has a key in.

    ``kind`` is the one its configuration names, if it names one: it is used or refused, and never replaced by
    another, except while a move of the key is unfinished. With ``cache_seconds`` the kernel keeps the key
    in this session for so long. Raises as `open_vault`, and ``identity_not_found``.
    """
    move = under_way(directory)
    if move is not None and kind in (move.old, move.new):
        kind = move.now
    kind = kind or existing(directory)
    if kind is None:
        raise MeshkitError("identity_not_found", f"there is no key vault in {directory}")
    vault = open_vault(kind, directory, passphrase)
    return vault if cache_seconds is None else SessionCache(vault, directory, cache_seconds)


def choose(
    kind: str | None, directory: Path, passphrase: Passphrase | None = None, seal: Seal | None = None
) -> KeyVault:
    """Return the key vault named by ``kind``; without a name, the one the home has, else the best there is.

    Where the best there is stands in for a stronger kind that cannot be used, its report says so
    (``fallback``). Raises as `open_vault`.
    """
    if kind is not None:
        return open_vault(kind, directory, passphrase, seal)
    held = existing(directory)
    if held is not None:
        return open_vault(held, directory, passphrase)
    best = detect()
    return _open(best, directory, passphrase, None if best == SECRET_SERVICE else SECRET_SERVICE, None)


def report_all(directory: Path) -> tuple[KeyVaultReport, ...]:
    """The report of each kind, strongest first, as `doctor` shows them."""
    return tuple(make(kind, directory).report() for kind in KINDS)


def make(
    kind: str,
    directory: Path,
    passphrase: Passphrase | None = None,
    fallback: str | None = None,
    seal: Seal | None = None,
) -> KeyVault:
    """Return a key vault of that kind, whatever the home has; ``invalid_argument`` for an unknown kind."""
    if kind == TPM2:
        return Tpm2Vault(directory, passphrase, fallback, seal)
    if seal is not None:
        raise MeshkitError("invalid_argument", f"a PIN or registers are for a TPM, not for {kind}")
    if kind == SECRET_SERVICE:
        return SecretServiceVault(directory, fallback)
    if kind == PASSPHRASE_FILE:
        return PassphraseFileVault(directory, passphrase, fallback)
    if kind == SYSTEMD_CREDENTIAL:
        return SystemdCredentialVault(directory, fallback)
    if kind == PLAIN_FILE:
        return PlainFileVault(directory, fallback)
    raise MeshkitError("invalid_argument", f"no key vault {kind!r}; there are {', '.join(KINDS)}")


def _open(
    kind: str, directory: Path, passphrase: Passphrase | None, fallback: str | None, seal: Seal | None
) -> KeyVault:
    vault = make(kind, directory, passphrase, fallback, seal)
    held = existing(directory)
    if held is not None and held != kind:
        # One home, one key: a second vault beside it would be a second, different key.
        raise MeshkitError("already_initialized", f"the key of {directory} is in its {held} key vault")
    return vault
