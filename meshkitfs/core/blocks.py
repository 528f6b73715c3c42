"""Blocks: what a byte store holds, and the only door from it to plaintext.

Three types make the unsafe program hard to write. `VerifiedBlock` exists only for bytes whose hash was
compared; `ContentKey` exists only where the gate minted it; `open_block` wants both. Everything sealed is
bound to its `Where`, so that a block moved to another place does not open there.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn, final

from meshkitfs.core import cobblestone
from meshkitfs.core.cbor import encode_uint
from meshkitfs.core.cid import cid_text
from meshkitfs.core.cobblestone import Bytes
from meshkitfs.errors import MeshkitError

__all__ = [
    "BLOCK_SIZES",
    "HOLE",
    "INLINE_MAX",
    "MAGIC",
    "MAX_SEALED",
    "OID_SIZE",
    "PAD_FLOOR",
    "REFS_PER_INDEX",
    "REF_SIZE",
    "ContentKey",
    "SealedBlock",
    "VerifiedBlock",
    "Where",
    "frame",
    "open_block",
    "padded_size",
    "ref_digest",
    "seal_block",
    "seal_structured",
    "unframe",
]

BLOCK_SIZES: Final = (65536, 262144, 1048576)
INLINE_MAX: Final = 16384
REFS_PER_INDEX: Final = 4096
MAX_SEALED: Final = 2 << 20
OID_SIZE: Final = 16
REF_SIZE: Final = 64
HOLE: Final = bytes(REF_SIZE)
MAGIC: Final = b"MKE1\x01"  # envelope version 1, suite 1: Cobblestone-256 under SHA-256 CIDs
PAD_FLOOR: Final = 512

_new = object.__new__
_set = object.__setattr__


@final
class VerifiedBlock:
    """Bytes that were hashed and found to be what their name says. `check` is the only constructor.

    ``digest`` is the 32-byte SHA-256, ``data`` the sealed bytes (read-only).
    """

    __slots__ = ("data", "digest")
    digest: bytes
    data: bytes | memoryview

    def __new__(cls) -> VerifiedBlock:
        raise TypeError("use VerifiedBlock.check")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("VerifiedBlock has no subclasses")

    @classmethod
    def check(cls, digest: bytes, data: Bytes) -> VerifiedBlock:
        """Hash ``data`` and return it as verified.

        The buffer is kept, not copied: whoever passes a mutable one gives it away. Raises MeshkitError
        ``cid_mismatch`` if it is larger than `MAX_SEALED` or its SHA-256 is not ``digest``.
        """
        if len(data) > MAX_SEALED:
            raise MeshkitError("cid_mismatch", f"{len(data)} bytes offered, the limit is {MAX_SEALED}")
        if not hmac.compare_digest(hashlib.sha256(data).digest(), digest):
            raise MeshkitError("cid_mismatch", cid_text(digest) if len(digest) == 32 else "malformed digest")
        block = _new(cls)
        _set(block, "digest", digest)
        _set(block, "data", data if type(data) is bytes else memoryview(data).toreadonly())
        return block

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a VerifiedBlock does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a VerifiedBlock does not change")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a VerifiedBlock cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"VerifiedBlock({cid_text(self.digest)}, {len(self.data)} bytes)"


@final
class ContentKey:
    """A 32-byte key that opens one sealed object. Minted by the gate (`core._mint`), never shown."""

    __slots__ = ("_raw",)
    _raw: bytes

    def __new__(cls) -> ContentKey:
        raise TypeError("only the gate mints content keys")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("ContentKey has no subclasses")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a ContentKey does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a ContentKey does not change")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a ContentKey cannot be copied or pickled")

    def __repr__(self) -> str:
        return "ContentKey(redacted)"


class SealedBlock(NamedTuple):
    """A sealed block on its way to a store: its 32-byte digest and its bytes."""

    digest: bytes
    data: Bytes

    def __repr__(self) -> str:
        return f"SealedBlock({self.digest.hex()}, {len(self.data)} bytes)"


@dataclass(frozen=True, slots=True)
class Where:
    """The place a sealed message belongs to: what it is, of which object, at which position.

    ``context`` is canonical CBOR and part of the key derivation. Built by the classmethods only.
    """

    context: bytes
    is_manifest: bool = False

    @classmethod
    def block(cls, oid: bytes, index: int) -> Where:
        """Data block ``index`` (from 0) of object ``oid`` (16 bytes)."""
        if len(oid) != OID_SIZE:
            raise ValueError("an oid has 16 bytes")
        return cls(b"\x83\x68mk/blk@1\x50" + oid + encode_uint(index))

    @classmethod
    def index(cls, oid: bytes, i: int) -> Where:
        """Index block ``i`` (from 0) of object ``oid``; the level is always 0 in this version."""
        if len(oid) != OID_SIZE:
            raise ValueError("an oid has 16 bytes")
        return cls(b"\x84\x68mk/idx@1\x50" + oid + b"\x00" + encode_uint(i))

    @classmethod
    def page(cls, oid: bytes, page_id: int) -> Where:
        """Page ``page_id`` of directory ``oid``."""
        if len(oid) != OID_SIZE:
            raise ValueError("an oid has 16 bytes")
        return cls(b"\x83\x69mk/page@1\x50" + oid + encode_uint(page_id))

    @classmethod
    def manifest(cls, oid: bytes, epoch: int, ver: int) -> Where:
        """The manifest of object ``oid`` as written in ``epoch`` at version ``ver``."""
        if len(oid) != OID_SIZE:
            raise ValueError("an oid has 16 bytes")
        return cls(b"\x84\x68mk/man@1\x50" + oid + encode_uint(epoch) + encode_uint(ver), True)


def ref_digest(ref: Bytes) -> bytes:
    """Return the 32-byte digest of a 64-byte block reference (digest || key)."""
    return bytes(ref[:32])


def padded_size(size: int, block_size: int) -> int:
    """Return the size ``size`` plaintext bytes are padded to: PADME, at least 512, at most ``block_size``.

    PADME rounds up so that a length leaks O(log log size) bits and costs at most 12 percent.
    """
    if size <= PAD_FLOOR:
        return PAD_FLOOR
    exponent = size.bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1
    return min((size + mask) & ~mask, block_size)


def seal_block(where: Where, plaintext: Bytes, block_size: int = 1048576) -> tuple[bytes, SealedBlock]:
    """Seal one data block under a fresh random key, padded with zeros to `padded_size`.

    Returns the 64-byte reference (digest || key) for the parent's manifest and the block for the store.
    ``plaintext`` is at most ``block_size`` bytes and is not copied. Safe in worker threads.
    """
    size = len(plaintext)
    if size > block_size or where.is_manifest:
        raise ValueError("more than one block of plaintext, or a manifest")
    key = os.urandom(32)
    data = cobblestone.seal(key, where.context, plaintext, padded_size(size, block_size) - size)
    digest = hashlib.sha256(data).digest()
    return digest + key, SealedBlock(digest, data)


def open_block(key: ContentKey, block: VerifiedBlock, where: Where) -> memoryview:
    """Return the plaintext of a verified block, with its padding. The only function that yields plaintext.

    Raises MeshkitError ``invalid_envelope`` if the block was not sealed under this key for this place, or
    (manifests) does not carry this version's magic.
    """
    if type(key) is not ContentKey or type(block) is not VerifiedBlock:
        raise TypeError("open_block takes a ContentKey and a VerifiedBlock")
    data = block.data
    if where.is_manifest:
        if data[:5] != MAGIC:
            raise MeshkitError("invalid_envelope", "not an envelope of a version and suite known here")
        data = memoryview(data)[5:]
    return cobblestone.open_(key._raw, where.context, data)


def frame(payload: bytes) -> bytes:
    """Return ``payload`` with its 4-byte length before and zero padding behind it (structured plaintext)."""
    size = 4 + len(payload)
    return len(payload).to_bytes(4, "big") + payload + bytes(padded_size(size, MAX_SEALED) - size)


def unframe(plaintext: Bytes) -> bytes:
    """Return what `frame` was given. Raises MeshkitError ``invalid_envelope`` for any other form."""
    size = int.from_bytes(plaintext[:4], "big") + 4
    if len(plaintext) < size or len(plaintext) != padded_size(size, MAX_SEALED):
        raise MeshkitError("invalid_envelope", "length field and length differ")
    if bytes(plaintext[size:]).strip(b"\0"):
        raise MeshkitError("invalid_envelope", "padding that is not zero")
    return bytes(plaintext[4:size])


def seal_structured(where: Where, payload: bytes, key: bytes | None = None) -> tuple[bytes, SealedBlock]:
    """Seal an encoded manifest or page under ``key`` (32 bytes; None draws a fresh one).

    Returns reference and block as `seal_block` does. Raises MeshkitError ``invalid_envelope`` if the
    result would be larger than any store has to accept (`MAX_SEALED`).
    """
    prefix = MAGIC if where.is_manifest else b""
    plaintext = frame(payload)
    if cobblestone.sealed_size(len(plaintext)) + len(prefix) > MAX_SEALED:
        raise MeshkitError("invalid_envelope", f"{len(payload)} bytes do not fit into one sealed object")
    key = os.urandom(32) if key is None else key
    data = cobblestone.seal(key, where.context, plaintext, 0, prefix)
    digest = hashlib.sha256(data).digest()
    return digest + key, SealedBlock(digest, data)
