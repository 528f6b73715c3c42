"""The JSON of the metadata service: what client and server both read and write (docs/service.md).

Bytes are base64url without padding, ids in paths 32 hex digits. Reading is strict: exactly the fields of a
form, each of its type, base64url in its one canonical spelling. What one side guessed, the other would guess
differently.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._api import Publication, ShareState

__all__ = [
    "b64",
    "from_b64",
    "from_hex",
    "read_blob",
    "read_blobs",
    "read_fields",
    "read_publication",
    "read_share_state",
    "write_publication",
    "write_share_state",
]

ID_BYTES: Final = 16
_MAX_NUMBER: Final = 2**63 - 1


def b64(data: bytes | None) -> str | None:
    """Return bytes as they stand in JSON; None stays null."""
    return None if data is None else base64.urlsafe_b64encode(data).decode().rstrip("=")


def from_b64(value: Any, what: str) -> bytes:
    """Return the bytes of a JSON string. Raises invalid_argument, naming ``what``."""
    if isinstance(value, str) and value.isascii() and len(value) % 4 != 1:
        try:
            data = base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if b64(data) == value:
            return data
    raise MeshkitError("invalid_argument", f"{what} is not base64url without padding")


def from_hex(value: str, what: str) -> bytes:
    """Return the 16 bytes of an id in a path. Raises invalid_argument."""
    if len(value) == 2 * ID_BYTES and all(c in "0123456789abcdef" for c in value):
        return bytes.fromhex(value)
    raise MeshkitError("invalid_argument", f"{what} is not {2 * ID_BYTES} small hex digits")


def read_fields(value: Any, names: Sequence[str], what: str) -> Mapping[str, Any]:
    """Return a JSON object that has exactly these fields. Raises invalid_argument."""
    if not isinstance(value, dict) or set(value) != set(names):
        raise MeshkitError("invalid_argument", f"{what} is not an object of {', '.join(names)}")
    return value


def read_blob(value: Any, what: str) -> bytes | None:
    """Return an optional blob: bytes, or None for null. Raises invalid_argument."""
    return None if value is None else from_b64(value, what)


def read_blobs(value: Any, what: str) -> list[bytes]:
    """Return a list of blobs. Raises invalid_argument."""
    if not isinstance(value, list):
        raise MeshkitError("invalid_argument", f"{what} is not a list")
    return [from_b64(item, what) for item in value]


def read_number(value: Any, what: str) -> int:
    """Return a number that fits 63 bits and is not negative. Raises invalid_argument."""
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise MeshkitError("invalid_argument", f"{what} is not a number from 0")
    return value


_PUBLICATION: Final = (
    "expect_head", "head", "head_ver", "head_epoch", "expect_roster", "roster", "roster_seq", "roster_epoch",
    "capsules",
)  # fmt: skip


def write_publication(publication: Publication) -> dict[str, Any]:
    """Return the body of ``POST …/publications``; the share stands in the path."""
    return {
        "expect_head": b64(publication.expect_head),
        "head": b64(publication.head),
        "head_ver": publication.head_ver,
        "head_epoch": publication.head_epoch,
        "expect_roster": publication.expect_roster,
        "roster": b64(publication.roster),
        "roster_seq": publication.roster_seq,
        "roster_epoch": publication.roster_epoch,
        "capsules": [
            {"kid": b64(kid), "id": b64(capsule), "blob": b64(blob)}
            for kid, capsule, blob in publication.capsules
        ],
    }


def read_publication(share: bytes, value: Any) -> Publication:
    """Return the publication of a request's body. Raises invalid_argument."""
    fields = read_fields(value, _PUBLICATION, "a publication")
    if not isinstance(fields["capsules"], list):
        raise MeshkitError("invalid_argument", "capsules is not a list")
    expected = fields["expect_roster"]
    return Publication(
        share,
        expect_head=read_blob(fields["expect_head"], "expect_head"),
        head=read_blob(fields["head"], "head"),
        head_ver=read_number(fields["head_ver"], "head_ver"),
        head_epoch=read_number(fields["head_epoch"], "head_epoch"),
        expect_roster=None if expected is None else read_number(expected, "expect_roster"),
        roster=read_blob(fields["roster"], "roster"),
        roster_seq=read_number(fields["roster_seq"], "roster_seq"),
        roster_epoch=read_number(fields["roster_epoch"], "roster_epoch"),
        capsules=tuple(_read_capsule(item) for item in fields["capsules"]),
    )


def _read_capsule(value: Any) -> tuple[bytes, bytes, bytes]:
    fields = read_fields(value, ("kid", "id", "blob"), "a capsule")
    kid, capsule = from_b64(fields["kid"], "kid"), from_b64(fields["id"], "id")
    if (len(kid), len(capsule)) != (ID_BYTES, ID_BYTES):
        raise MeshkitError("invalid_argument", "a capsule's kid or id is not 16 bytes")
    return kid, capsule, from_b64(fields["blob"], "blob")


def write_share_state(state: ShareState) -> dict[str, Any]:
    """Return the answer of ``GET …/state``."""
    return {
        "capsules": [b64(blob) for blob in state.capsules],
        "roster": b64(state.roster),
        "timestamp": b64(state.timestamp),
        "head": b64(state.head),
    }


def read_share_state(value: Any) -> ShareState:
    """Return the share state in an answer. Raises invalid_argument."""
    fields = read_fields(value, ("capsules", "roster", "timestamp", "head"), "a share's state")
    return ShareState(
        tuple(read_blobs(fields["capsules"], "capsules")),
        read_blob(fields["roster"], "roster"),
        read_blob(fields["timestamp"], "timestamp"),
        read_blob(fields["head"], "head"),
    )
