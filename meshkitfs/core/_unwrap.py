"""Taking the key out of a capsule. The import contract lets only ``meshkitfs.gate`` import this module."""

from __future__ import annotations

import hmac

from meshkitfs.core import hpke
from meshkitfs.core.capsule import WRAP_SIZE, Capsule
from meshkitfs.core.keys import EncryptionKey, key_commit
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

__all__ = ["hpke_open", "open_capsule"]


def hpke_open(wrap: bytes, key: EncryptionKey, info: bytes) -> bytes:
    """Return the 32-byte key in ``wrap``. Raises MeshkitError ``key_unwrap_failed``."""
    if len(wrap) != WRAP_SIZE:
        raise MeshkitError("key_unwrap_failed", "wrapped key of another length")
    return hpke.unwrap(key, info, wrap)


def open_capsule(capsule: Capsule, key: EncryptionKey) -> bytes:
    """Return the 32-byte key that ``capsule`` grants to the holder of ``key``; the caller wipes it.

    To be called only after every other check has passed. Raises MeshkitError ``recipient_not_authorized``
    if it is addressed to somebody else, ``key_unwrap_failed`` if it does not open or its key is not the one
    the owner committed to.
    """
    if capsule.to != key.kid:
        raise MeshkitError("recipient_not_authorized", "the capsule is addressed to another key")
    raw = hpke_open(capsule.wrap, key, capsule.info)
    if not hmac.compare_digest(key_commit(raw, capsule.oid, capsule.epoch, capsule.ver), capsule.kc):
        wipe(raw)
        raise MeshkitError("key_unwrap_failed", "the key is not the one the capsule commits to")
    return raw
