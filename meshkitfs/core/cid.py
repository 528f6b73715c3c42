"""Content identifiers: CIDv1, codec raw, sha2-256, and nothing else.

Inside the program a block is named by its 32-byte digest; the 36-byte and the text form exist for
stores, people and exports.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from meshkitfs.errors import MeshkitError

__all__ = ["CID_PREFIX", "TEXT_LENGTH", "cid_bytes", "cid_text", "digest_of", "parse_cid"]

# version 1, codec raw (0x55), multihash sha2-256 (0x12) of 32 bytes (0x20)
CID_PREFIX: Final = b"\x01\x55\x12\x20"
TEXT_LENGTH: Final = 59

# What people paste by mistake, and what it is.
_KNOWN_OTHERS: Final = (
    ("Qm", "that is a CIDv0 (dag-pb)"),
    ("bafybei", "that CID has codec dag-pb"),
    ("bafyrei", "that CID has codec dag-cbor"),
    ("bafkqa", "that CID has an identity hash"),
    ("bafk", "that CID has another hash function"),
    ("z", "that is base58; base32 is used here"),
    ("B", "upper case is not accepted"),
)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32-byte SHA-256 of ``data``: the name of a block."""
    return hashlib.sha256(data).digest()


def cid_bytes(digest: bytes) -> bytes:
    """Return the 36-byte binary CID of a 32-byte digest."""
    if len(digest) != 32:
        raise ValueError("a digest has 32 bytes")
    return CID_PREFIX + digest


def cid_text(digest: bytes) -> str:
    """Return the text CID (``bafkrei...``, 59 characters) of a 32-byte digest."""
    return "b" + base64.b32encode(cid_bytes(digest)).decode("ascii").lower().rstrip("=")


def parse_cid(text: str) -> bytes:
    """Return the digest that a text CID names.

    Raises MeshkitError ``invalid_cid`` unless it is the one text form of CIDv1, raw, sha2-256, base32
    lower case; the detail says what it looks like instead.
    """
    if not isinstance(text, str):
        raise MeshkitError("invalid_cid", "not text")
    if not text.startswith("bafkrei"):
        for prefix, what in _KNOWN_OTHERS:
            if text.startswith(prefix):
                raise MeshkitError("invalid_cid", what)
        raise MeshkitError("invalid_cid", "it does not start with 'bafkrei'")
    if len(text) != TEXT_LENGTH:
        raise MeshkitError("invalid_cid", f"{len(text)} characters instead of {TEXT_LENGTH}")
    try:
        # The check against the re-encoded text refuses upper case and stray padding bits.
        raw = base64.b32decode(text[1:].upper().encode("ascii") + b"======")
    except ValueError:
        raise MeshkitError("invalid_cid", "a character that base32 does not have") from None
    if cid_text(raw[4:]) != text:
        raise MeshkitError("invalid_cid", "not in canonical form")
    return raw[4:]
