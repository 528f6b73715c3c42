"""What a key vault is, and the truthful account it gives of itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.errors import MeshkitError

KEY_BYTES: Final = 32
"""Size of the one secret a key vault holds: the wrapping key of a home."""

SECRET_SERVICE: Final = "secret-service"  # noqa: S105 (the names of kinds, and prompts: no passwords)
PASSPHRASE_FILE: Final = "passphrase-file"  # noqa: S105
PLAIN_FILE: Final = "plain-file"
TPM2: Final = "tpm2"
SYSTEMD_CREDENTIAL: Final = "systemd-credential"
KINDS: Final = (TPM2, SECRET_SERVICE, PASSPHRASE_FILE, SYSTEMD_CREDENTIAL, PLAIN_FILE)
"""Every kind of key vault, strongest first."""

PASSPHRASE_PROMPT: Final = "Passphrase of the meshkitfs key vault: "  # noqa: S105
NEW_PASSPHRASE_PROMPT: Final = "New passphrase for the meshkitfs key vault: "  # noqa: S105
PIN_PROMPT: Final = "PIN of the meshkitfs key in the TPM: "
NEW_PIN_PROMPT: Final = "New PIN for the meshkitfs key in the TPM: "
EXPORT_PROMPT: Final = "Passphrase of the exported identity: "
NEW_EXPORT_PROMPT: Final = "New passphrase for the exported identity: "
NEW_PROMPTS: Final = (NEW_PASSPHRASE_PROMPT, NEW_PIN_PROMPT, NEW_EXPORT_PROMPT)

Passphrase = Callable[[str], str]
"""Where a passphrase or PIN comes from: called with one of the prompts above (so that a source which talks
to a person can ask twice for a new one), answers it."""


@dataclass(frozen=True, slots=True)
class KeyVaultReport:
    """What a key vault really gives, here and now. ``None`` means: not known, so do not count on it.

    ``available``        the back end can be used on this machine, in this session
    ``persistent``       the key is still there after a restart
    ``exportable``       some program other than this one can get the key out as bytes
    ``hardware_backed``  a chip holds the key
    ``user_presence``    a person has to act each time the key is used
    ``locked``           using the key first needs something this process does not have yet
    ``fallback``         the stronger kind this one stands in for because that was not usable when it was
                         chosen; None if it was chosen by name
    ``detail``           one sentence for a person: what protects the key, or what is missing
    ``session_cache``    where the key is kept between two uses of the vault (``kernel``); None: nowhere
    """

    kind: str
    available: bool
    persistent: bool | None
    exportable: bool | None
    hardware_backed: bool | None
    user_presence: bool | None
    locked: bool | None
    fallback: str | None
    detail: str
    session_cache: str | None = None

    @classmethod
    def absent(cls, kind: str, fallback: str | None, detail: str) -> KeyVaultReport:
        """Report a back end that is not there: what it would give is unknown, not promised."""
        return cls(
            kind=kind,
            available=False,
            persistent=None,
            exportable=None,
            hardware_backed=None,
            user_presence=None,
            locked=True,
            fallback=fallback,
            detail=detail,
        )

    def as_dict(self) -> dict[str, str | bool | None]:
        """The form in ``.meshkit/capabilities.json``, ``doctor --json`` and ``user.meshkit.capabilities``."""
        return asdict(self)


class KeyVault(Protocol):
    """Keeps one 32-byte wrapping key for one home directory. Calls block: from trio, use a worker thread.

    `create` and `load` raise `MeshkitError` with ``keyvault_unavailable`` (the back end is not there),
    ``keyvault_refused`` (it is there, but weaker than its name promises), ``identity_locked`` (it could
    not be unlocked), ``wrong_passphrase``; `load` also with ``identity_not_found`` (nothing was ever
    stored), ``identity_corrupt``, and of a TPM or credential ``keyvault_locked_out``,
    ``keyvault_pcr_changed``, ``keyvault_replaced``; `create` with ``already_initialized``.
    """

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ...

    def report(self) -> KeyVaultReport:
        """Say what this vault gives now. Never prompts, never raises for a missing back end."""
        ...

    def create(self, secret: bytes) -> None:
        """Store ``secret`` (32 bytes) durably. Never replaces a key that is already there."""
        ...

    def load(self) -> bytes:
        """Return the 32 bytes, for the caller to wipe; may ask the person (passphrase, keyring's prompt)."""
        ...

    def destroy(self) -> None:
        """Forget the key. Not a secure erasure: copies on the disk or in backups are out of reach."""
        ...

    def asks(self) -> str | None:
        """The prompt with which `load` would ask its `Passphrase` now; None if it asks for none."""
        ...

    def forget(self) -> None:
        """Lock: after this, `load` needs again what it needed at first. Never raises, never asks."""
        ...


def ask(passphrase: Passphrase | None, prompt: str) -> str:
    """Return the answer to ``prompt``; ``identity_locked`` if there is nobody to ask."""
    if passphrase is None:
        raise MeshkitError("identity_locked", "a passphrase is needed and there is nobody to ask")
    # One passphrase, however the keyboard composes its accents (RFC 8265, OpaqueString).
    phrase = unicodedata.normalize("NFC", passphrase(prompt))
    if any(0xD800 <= ord(character) < 0xE000 for character in phrase):
        raise MeshkitError("invalid_argument", "the passphrase is not valid text")
    return phrase


def derive_key(secret: bytes, label: str) -> bytes:
    """Derive the 32-byte key for one use from the vault's secret.

    Labels in use: ``mk/identity@1`` (identity.sealed, derived there), ``mk/state-db@1`` (state.db).
    Raises ValueError for a secret of another size: a programming error.
    """
    check_size(secret)
    return HKDFExpand(hashes.SHA256(), KEY_BYTES, label.encode()).derive(secret)


def check_size(secret: bytes) -> None:
    if len(secret) != KEY_BYTES:
        raise ValueError(f"a key vault holds exactly {KEY_BYTES} bytes, not {len(secret)}")
