"""HPKE (RFC 9180) in base mode: KEM X-Wing (0x647A), HKDF-SHA256, AES-256-GCM; one seal per recipient."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from meshkitfs.core.keys import EncryptionKey, check_encryption_public
from meshkitfs.errors import MeshkitError

__all__ = ["OVERHEAD", "unwrap", "wrap"]

_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
OVERHEAD: Final = 1136  # encapsulated key 1120, tag 16


def wrap(public: bytes, info: bytes, plaintext: bytes) -> bytes:
    """Seal ``plaintext`` to a 1216-byte X-Wing public key, bound to ``info``; adds `OVERHEAD` bytes.

    Raises MeshkitError ``invalid_record`` if the public key is not usable.
    """
    return _SUITE.encrypt(plaintext, check_encryption_public(public), info=info)


def unwrap(key: EncryptionKey, info: bytes, sealed: bytes) -> bytes:
    """Return the plaintext sealed to ``key`` under ``info``. Raises MeshkitError ``key_unwrap_failed``."""
    try:
        return _SUITE.decrypt(sealed, key.hpke, info=info)
    except (InvalidTag, ValueError):
        raise MeshkitError("key_unwrap_failed", "") from None
