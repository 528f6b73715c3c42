"""Signed records: COSE_Sign1 (RFC 9052) with one fixed shape, read and written byte by byte.

``[protected, {}, payload, signature]`` where protected is ``{1: -19, 4: kid, 16: type}`` (Ed25519, key id,
record type) and the payload is one canonical CBOR map whose ``"t"`` repeats the type. There is no other
form, so no general CBOR decoder ever sees bytes that nobody has signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidSignature

from meshkitfs.core import cbor
from meshkitfs.core.keys import KID_SIZE, SigningKey, check_ed25519_public
from meshkitfs.errors import MeshkitError

__all__ = ["peek1", "read1", "record_hash", "sign1", "signer_of", "verify1"]

# {1: -19, 4: h'kid', 16: "type"}: map(3), 1 -> -19, 4 -> bytes(16)
_PROTECTED: Final = b"\xa3\x01\x32\x04\x50"
_SIGNATURE: Final = b"\x58\x40"


def _head(major: int, size: int) -> bytes:
    first = cbor.encode_uint(size)
    return bytes((first[0] | major << 5,)) + first[1:]


def _bstr(data: bytes) -> bytes:
    return _head(2, len(data)) + data


def _protected(kid: bytes, typ: str) -> bytes:
    text = typ.encode()
    return _PROTECTED + kid + b"\x10" + _head(3, len(text)) + text


def _to_sign(protected: bytes, payload: bytes) -> bytes:
    return b"\x84\x6aSignature1" + _bstr(protected) + b"\x40" + _bstr(payload)


def record_hash(blob: bytes) -> bytes:
    """Return the SHA-256 of a whole signed record: what rosters, timestamps and next heads point at."""
    return hashlib.sha256(blob).digest()


def sign1(signer: SigningKey, typ: str, payload: Mapping[str, Any]) -> bytes:
    """Return ``payload`` signed as a record of type ``typ``; ``payload["t"]`` must be that type."""
    if payload.get("t") != typ:
        raise ValueError("the payload's type differs from the record's")
    protected = _protected(signer.kid, typ)
    body = cbor.encode(dict(payload))
    if len(body) > cbor.MAX_RECORD - 256:
        raise MeshkitError("invalid_record", "too large for one record")
    signature = signer.sign(_to_sign(protected, body))
    return b"\x84" + _bstr(protected) + b"\xa0" + _bstr(body) + _SIGNATURE + signature


def claims(blob: bytes, typ: str) -> bool:
    """Return whether a record says of itself that it is of type ``typ``. Nothing is verified."""
    size = len(_protected(bytes(KID_SIZE), typ))
    at = 1 + len(_head(2, size))
    return type(blob) is bytes and blob[at + size - len(typ) : at + size] == typ.encode()


def _split(blob: bytes, typ: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Return (kid, protected, payload, signature) of a record of exactly this type and form."""
    if type(blob) is not bytes or len(blob) > cbor.MAX_RECORD:
        raise MeshkitError("invalid_record", "not bytes, or larger than a record may be")
    size = len(_protected(bytes(KID_SIZE), typ))
    at = 1 + len(_head(2, size))
    protected = blob[at : at + size]
    kid = protected[len(_PROTECTED) : len(_PROTECTED) + KID_SIZE]
    if blob[: at + size] != b"\x84" + _bstr(_protected(kid, typ)):
        raise MeshkitError("invalid_record", f"not a record of type {typ}")
    at += size
    # The rest is fixed by its length: empty unprotected header, payload, 64-byte signature.
    tail = len(blob) - at - 1 - 2 - 64
    for width in (1, 2, 3, 5):
        payload_size = tail - width
        if payload_size >= 0 and len(_head(2, payload_size)) == width:
            break
    else:
        raise MeshkitError("invalid_record", "truncated")
    start = at + 1 + width
    payload = blob[start : start + payload_size]
    if blob[at:start] != b"\xa0" + _head(2, payload_size) or blob[-66:-64] != _SIGNATURE:
        raise MeshkitError("invalid_record", "malformed record")
    return kid, protected, payload, blob[-64:]


def _payload(raw: bytes, typ: str) -> dict[str, Any]:
    value = cbor.decode(raw)
    if type(value) is not dict or value.get("t") != typ:
        raise MeshkitError("invalid_record", f"payload is not of type {typ}")
    return value


def verify1(blob: bytes, keys: Mapping[bytes, bytes], typ: str) -> tuple[dict[str, Any], bytes]:
    """Return payload and signer's kid of a record of type ``typ`` signed by one of ``keys`` (kid -> public).

    Raises MeshkitError ``invalid_record`` for another type or form, an unknown signer, a bad signature or
    a payload that is not canonical. The payload is parsed only after its signature was verified.
    """
    kid, protected, payload, signature = _split(blob, typ)
    public = keys.get(kid)
    if public is None:
        raise MeshkitError("invalid_record", "signed by somebody who may not sign this")
    try:
        check_ed25519_public(public).verify(signature, _to_sign(protected, payload))
    except InvalidSignature:
        raise MeshkitError("invalid_record", "the signature is not valid") from None
    return _payload(payload, typ), kid


def read1(blob: bytes, typ: str) -> tuple[dict[str, Any], bytes]:
    """Return payload and signer's kid WITHOUT verifying the signature: for a record known by its hash.

    A hash that a verified record names vouches for every byte, the signature included. Raises MeshkitError
    ``invalid_record`` for another type or form.
    """
    kid, _, payload, _ = _split(blob, typ)
    return _payload(payload, typ), kid


def signer_of(blob: bytes, typ: str) -> bytes:
    """Return the kid that a record of type ``typ`` says has signed it; nothing is verified.

    Raises MeshkitError ``invalid_record`` for another type or form.
    """
    return _split(blob, typ)[0]


def peek1(blob: bytes, typ: str) -> dict[str, Any]:
    """Return the payload WITHOUT verifying it: only to learn which key a self-signed record names."""
    return _payload(_split(blob, typ)[2], typ)
