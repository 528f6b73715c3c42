"""Where a home's private keys live, and how strong that truthfully is.

A key vault ("key vault", two words: MeshKit's "vault" is a membership set) holds ONE random 32-byte wrapping
key. Everything else this device keeps secret is sealed with keys derived from it (`derive_key`).

    vault = choose(None, home)           # or open_vault("passphrase-file", home, ask)
    vault.create(secrets.token_bytes(32))
    wrapping = vault.load()

Nothing here falls back silently: a kind that was named is used or fails, and `KeyVault.report` says what it
gives now. All calls block.
"""

from meshkitfs.keyvault._api import (
    KEY_BYTES,
    KINDS,
    NEW_PASSPHRASE_PROMPT,
    PASSPHRASE_FILE,
    PASSPHRASE_PROMPT,
    PLAIN_FILE,
    SECRET_SERVICE,
    KeyVault,
    KeyVaultReport,
    Passphrase,
    derive_key,
)
from meshkitfs.keyvault._choose import choose, detect, existing, open_vault, report_all

__all__ = [
    "KEY_BYTES",
    "KINDS",
    "NEW_PASSPHRASE_PROMPT",
    "PASSPHRASE_FILE",
    "PASSPHRASE_PROMPT",
    "PLAIN_FILE",
    "SECRET_SERVICE",
    "KeyVault",
    "KeyVaultReport",
    "Passphrase",
    "choose",
    "derive_key",
    "detect",
    "existing",
    "open_vault",
    "report_all",
]
