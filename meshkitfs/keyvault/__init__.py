"""Where a home's private keys live, and how strong that truthfully is.

A key vault ("key vault", two words: MeshKit's "vault" is a membership set) holds ONE random 32-byte wrapping
key. Everything else this device keeps secret is sealed with keys derived from it (`derive_key`).

    vault = choose(None, home)           # or open_vault("passphrase-file", home, ask)
    vault.create(secrets.token_bytes(32))
    wrapping = vault.load()

Nothing here falls back silently: a kind that was named is used or fails, and `KeyVault.report` says what it
gives now. `migrate` moves the key to another kind, `require` checks what is demanded of one. All calls block.
"""

from meshkitfs.keyvault._api import (
    EXPORT_PROMPT,
    KEY_BYTES,
    KINDS,
    NEW_EXPORT_PROMPT,
    NEW_PASSPHRASE_PROMPT,
    NEW_PIN_PROMPT,
    NEW_PROMPTS,
    PASSPHRASE_FILE,
    PASSPHRASE_PROMPT,
    PIN_PROMPT,
    PLAIN_FILE,
    SECRET_SERVICE,
    SYSTEMD_CREDENTIAL,
    TPM2,
    KeyVault,
    KeyVaultReport,
    Passphrase,
    derive_key,
)
from meshkitfs.keyvault._choose import choose, detect, existing, open_home, open_vault, report_all
from meshkitfs.keyvault._migrate import migrate
from meshkitfs.keyvault._passphrase_file import open_with_passphrase, seal_with_passphrase
from meshkitfs.keyvault._session_cache import CACHE_SECONDS
from meshkitfs.keyvault._strength import DEMANDS, rank, require, unmet
from meshkitfs.keyvault._tpm2 import Seal

__all__ = [
    "CACHE_SECONDS",
    "DEMANDS",
    "EXPORT_PROMPT",
    "KEY_BYTES",
    "KINDS",
    "NEW_EXPORT_PROMPT",
    "NEW_PASSPHRASE_PROMPT",
    "NEW_PIN_PROMPT",
    "NEW_PROMPTS",
    "PASSPHRASE_FILE",
    "PASSPHRASE_PROMPT",
    "PIN_PROMPT",
    "PLAIN_FILE",
    "SECRET_SERVICE",
    "SYSTEMD_CREDENTIAL",
    "TPM2",
    "KeyVault",
    "KeyVaultReport",
    "Passphrase",
    "Seal",
    "choose",
    "derive_key",
    "detect",
    "existing",
    "migrate",
    "open_home",
    "open_vault",
    "open_with_passphrase",
    "rank",
    "report_all",
    "require",
    "seal_with_passphrase",
    "unmet",
]
