"""Cobblestone-256 (C2SP chunked-encryption@v1): the one way content is sealed.

A message is ``salt(24) || commitment(32) || chunks``; each chunk is up to 16 KiB of plaintext under
AES-256-GCM with a 16-byte tag, and the last chunk is always shorter than 16 KiB (possibly empty). Key,
nonces and commitment come from HKDF-Expand-SHA-512 over the salt and a context, so that a wrong key or
context fails before anything is decrypted.

``cryptography`` has this as a recipe since 50.0. The same format in 40 lines over its primitives stands
below: it takes over where the recipe is missing, and the tests run both against the same vectors.
"""

from __future__ import annotations

import hmac
import os
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.errors import MeshkitError

try:
    from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

    RECIPE = True
except ImportError:  # cryptography below 50
    RECIPE = False

__all__ = [
    "CHUNK",
    "HEADER",
    "KEY_SIZE",
    "RECIPE",
    "TAG",
    "Bytes",
    "open_",
    "plain_size",
    "seal",
    "sealed_size",
]

Bytes = bytes | bytearray | memoryview

KEY_SIZE: Final = 32
CHUNK: Final = 16384
TAG: Final = 16
HEADER: Final = 56  # salt 24, commitment 32
_SALT: Final = 24
_LABEL: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
_ZEROS: Final = memoryview(bytes(1 << 20))


class _Seal(Protocol):
    def __call__(
        self, key: Bytes, context: bytes, plaintext: Bytes, pad: int = 0, prefix: bytes = b""
    ) -> bytearray: ...


class _Open(Protocol):
    def __call__(self, key: Bytes, context: bytes, sealed: Bytes) -> memoryview: ...


def sealed_size(size: int) -> int:
    """Return how many bytes a message of ``size`` plaintext bytes has when sealed."""
    return HEADER + size + TAG * (size // CHUNK + 1)


def plain_size(size: int) -> int:
    """Return how many plaintext bytes a sealed message of ``size`` bytes holds.

    Raises MeshkitError ``invalid_envelope`` if no message has that size.
    """
    chunks, rest = divmod(size - HEADER, CHUNK + TAG)
    if chunks < 0 or rest < TAG:
        raise MeshkitError("invalid_envelope", "impossible length")
    return chunks * CHUNK + rest - TAG


def _derive(key: Bytes, salt: Bytes, context: bytes) -> tuple[AESGCM, int, bytes]:
    if len(key) != KEY_SIZE:
        raise ValueError("a key has 32 bytes")
    okm = HKDFExpand(SHA512(), 76, _LABEL + salt + context).derive(key)
    return AESGCM(okm[:32]), int.from_bytes(okm[32:44], "big"), okm[44:]


def seal_portable(
    key: Bytes,
    context: bytes,
    plaintext: Bytes,
    pad: int = 0,
    prefix: bytes = b"",
    *,
    salt: bytes | None = None,
) -> bytearray:
    """`seal` without the library's recipe. Only published test vectors ever fix ``salt``."""
    salt = os.urandom(_SALT) if salt is None else salt
    aead, nonce, commitment = _derive(key, salt, context)
    whole = bytes(plaintext) + bytes(pad)
    out = bytearray(prefix + salt + commitment)
    for i in range(len(whole) // CHUNK + 1):
        out += aead.encrypt((nonce ^ i).to_bytes(12, "big"), whole[i * CHUNK : (i + 1) * CHUNK], None)
    return out


def open_portable(key: Bytes, context: bytes, sealed: Bytes) -> memoryview:
    """`open_` without the library's recipe."""
    size = plain_size(len(sealed))
    view = memoryview(sealed)
    aead, nonce, commitment = _derive(key, bytes(view[:_SALT]), context)
    if not hmac.compare_digest(commitment, view[_SALT:HEADER]):
        raise MeshkitError("invalid_envelope", "wrong key or place")
    out = bytearray()
    try:
        for i in range(size // CHUNK + 1):
            at = HEADER + i * (CHUNK + TAG)
            out += aead.decrypt((nonce ^ i).to_bytes(12, "big"), view[at : at + CHUNK + TAG], None)
    except InvalidTag:
        raise MeshkitError("invalid_envelope", "wrong key, place or content") from None
    return memoryview(out).toreadonly()


def seal_recipe(key: Bytes, context: bytes, plaintext: Bytes, pad: int = 0, prefix: bytes = b"") -> bytearray:
    """Seal ``plaintext`` followed by ``pad`` zero bytes under a 32-byte key, bound to ``context``.

    ``prefix`` stands before the message in the result, in the clear; ``pad`` is at most 1 MiB.
    The plaintext is read in place and never copied.
    """
    start = len(prefix)
    size = len(plaintext) + pad
    encryptor = Cobblestone256Encryptor(key, context)
    out = bytearray(start + HEADER + size + TAG * (size // CHUNK + 1))
    view = memoryview(out)
    if start:
        out[:start] = prefix
    at = start + encryptor.update_into(plaintext, view[start:])
    if pad:
        at += encryptor.update_into(_ZEROS[:pad], view[at:])
    view[at:] = encryptor.finalize()
    return out


def open_recipe(key: Bytes, context: bytes, sealed: Bytes) -> memoryview:
    """Return the plaintext of a message sealed under ``key`` and ``context``, padding included.

    Raises MeshkitError ``invalid_envelope`` if key, context, length or any byte is not the original;
    nothing of the plaintext leaves this function before all of it is authenticated.
    """
    out = bytearray(plain_size(len(sealed)))
    try:
        decryptor = Cobblestone256Decryptor(key, context)
        at = decryptor.update_into(sealed, out)
        out[at:] = decryptor.finalize()
    except InvalidTag:
        raise MeshkitError("invalid_envelope", "wrong key, place or content") from None
    return memoryview(out).toreadonly()


# The names everyone uses: seal(key, context, plaintext, pad=0, prefix=b"") and open_(key, context, sealed).
seal: Final[_Seal] = seal_recipe if RECIPE else seal_portable
open_: Final[_Open] = open_recipe if RECIPE else open_portable
