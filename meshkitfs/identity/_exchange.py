"""What two people exchange outside the directory: a record as text, and the code they compare."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.errors import MeshkitError

PREFIX: Final = "meshkit-identity1:"
_MAX_TEXT: Final = 16384
_DIGITS: Final = 30  # decimal digits for each person, about 100 bits


def to_text(record: bytes) -> str:
    """Return a signed identity record as one line of text (prefix, then unpadded base64url)."""
    return PREFIX + base64.urlsafe_b64encode(record).decode().rstrip("=")


def from_text(text: str) -> bytes:
    """Return the signed record in a text form; white space in it (a wrapped mail) is ignored.

    Raises MeshkitError ``invalid_argument`` if it is no such text, ``invalid_record`` if the record in it
    is not valid.
    """
    if len(text) > _MAX_TEXT:
        raise MeshkitError("invalid_argument", "too long for an identity record")
    squeezed = "".join(text.split())
    encoded = squeezed.removeprefix(PREFIX)
    try:
        record = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        record = b""
    if not record or to_text(record) != squeezed:
        raise MeshkitError("invalid_argument", f"not an identity record in text form ({PREFIX}...)")
    IdentityRecord.parse_self_signed(record)
    return record


def verification_code(one: bytes, other: bytes) -> str:
    """Return the 60 digits that two people with these root keys (32 bytes each) both see: 12 groups of 5.

    Each half depends on one key only, so whoever stands in between would need a key with a given half:
    about 2**100 tries.
    """
    digits = "".join(sorted(_half(root) for root in (one, other)))
    return " ".join(digits[i : i + 5] for i in range(0, len(digits), 5))


def code_digits(code: str) -> str | None:
    """Return the digits of a code as a person types it (spaces and dashes between them), or None."""
    digits = code.translate(str.maketrans("", "", " \t\r\n-"))
    return digits if len(digits) == 2 * _DIGITS and digits.isascii() and digits.isdigit() else None


def _half(root: bytes) -> str:
    number = int.from_bytes(hashlib.sha256(b"mk/fp@1" + root).digest(), "big")
    return f"{number % 10**_DIGITS:0{_DIGITS}d}"
