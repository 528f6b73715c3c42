"""Signed records: heads, rosters and timestamps here; capsules, identities and letters from their modules.

All are COSE_Sign1 (`meshkitfs.core.cose`) over one canonical map. Times are UNIX seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from meshkitfs.core.capsule import RIGHTS, Capsule, make_capsule
from meshkitfs.core.cose import record_hash
from meshkitfs.core.fields import (
    Check,
    Record,
    array,
    blob,
    check_fields,
    public_key,
    ranges,
    refuse,
    time,
    uint,
)
from meshkitfs.core.identity_record import IdentityRecord, rotate, verify_chain
from meshkitfs.core.letter import Letter, open_letter, seal_letter

__all__ = [
    "RIGHTS",
    "Capsule",
    "Head",
    "IdentityRecord",
    "Letter",
    "Retention",
    "Roster",
    "Timestamp",
    "make_capsule",
    "open_letter",
    "record_hash",
    "rotate",
    "seal_letter",
    "verify_chain",
]

_CAPSULES_MAX: Final = 10_000
_WRITERS_MAX: Final = 1_000
_PRUNED_MAX: Final = 10_000


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Head(Record):
    """The newest version of a share, signed by a writer and chained to the one before.

    ``share`` and ``oid`` (the root directory or file) are 16 bytes, ``prev`` is the record hash of the head
    before (b"" only for version 1), ``root`` the digest of the root manifest's block.
    """

    TYPE: ClassVar[str] = "mk/head@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "oid": blob(16),
        "epoch": uint(1),
        "ver": uint(1),
        "prev": blob(0, 32),
        "root": blob(32),
        "ts": time,
    }

    share: bytes
    oid: bytes
    epoch: int
    ver: int
    prev: bytes
    root: bytes
    ts: int

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if (value["ver"] == 1) != (value["prev"] == b""):
            raise refuse("only the first head has no predecessor")

    @property
    def writer(self) -> bytes:
        """The kid of the writer who signed this head (once parsed)."""
        return self.signer


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Roster(Record):
    """What is valid now in a share, signed by its owner; ``seq`` only grows.

    ``caps`` are the record hashes of the valid capsules, ``writers`` the Ed25519 public keys that may sign
    heads, ``minver`` the lowest head version to accept, ``timestamp_keys`` the public keys whose timestamps
    count. Order in the tuples is free, repetition is not.
    """

    TYPE: ClassVar[str] = "mk/roster@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "oid": blob(16),
        "seq": uint(1),
        "epoch": uint(1),
        "caps": array(blob(32), _CAPSULES_MAX),
        "writers": array(public_key, _WRITERS_MAX),
        "minver": uint(),
        "iat": time,
        "exp": time,
        "timestamp_keys": array(public_key, 16),
    }

    share: bytes
    oid: bytes
    seq: int
    epoch: int
    caps: tuple[bytes, ...]
    writers: tuple[bytes, ...]
    minver: int
    iat: int
    exp: int
    timestamp_keys: tuple[bytes, ...]

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if value["iat"] >= value["exp"]:
            raise refuse("a roster that ends before it begins")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Timestamp(Record):
    """The metadata service's word that ``roster`` (a record hash) is the newest one, from iat until exp."""

    TYPE: ClassVar[str] = "mk/ts@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "roster": blob(32),
        "iat": time,
        "exp": time,
    }

    share: bytes
    roster: bytes
    iat: int
    exp: int

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if value["iat"] >= value["exp"]:
            raise refuse("a timestamp that ends before it begins")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Retention(Record):
    """Which past versions of a share its owner has given up; ``seq`` only grows, and so does what is listed.

    ``pruned`` is flat: first and last version (inclusive) and the time it was given up, again and again, in
    ascending order. Versions that no range holds are kept. The newest version can never be given up: readers
    take no notice of a range that holds it.
    """

    TYPE: ClassVar[str] = "mk/retention@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "seq": uint(1),
        "pruned": ranges(_PRUNED_MAX),
        "iat": time,
    }

    share: bytes
    seq: int
    pruned: tuple[int, ...]
    iat: int

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return ``pruned`` as (first version, last version, time given up)."""
        flat = self.pruned
        return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
