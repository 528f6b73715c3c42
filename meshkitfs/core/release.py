"""Key release: a share's key in two halves, one in each capsule, the other at a service that hands it out.

The owner draws a seed for each epoch. Both halves follow from it, and the epoch key from both halves; neither
half says anything of the key, or of the other half. The capsule of a recipient holds the capsule half, the
owner's own capsule the seed. A granted snapshot needs another key than the epoch's: there the service gives
a mask that is made from its half for that one capsule.

What the service keeps and answers is sealed to one key each time (`seal_half`). Opening an answer is in
`meshkitfs.core._unwrap`, which only the gate may import.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from meshkitfs.core import cbor, hpke
from meshkitfs.core.fields import Check, Record, blob, check_fields, refuse, time, uint
from meshkitfs.core.keys import EncryptionKey, check_encryption_public, kid_of
from meshkitfs.core.secret_memory import wipe

__all__ = [
    "HALF_SIZE",
    "RELEASE_MAX_S",
    "Deposit",
    "EpochSecret",
    "Release",
    "ReleaseKey",
    "ReleaseService",
    "capsule_half",
    "epoch_key",
    "release_half",
    "released",
    "snapshot_mask",
    "xor",
]

HALF_SIZE: Final = 32 + hpke.OVERHEAD  # as it is sealed
# For no longer than this after it was signed a release is believed, whatever it says of itself (seconds).
RELEASE_MAX_S: Final = 3600


def capsule_half(seed: bytes, share: bytes, epoch: int) -> bytes:
    """Return the half that capsules hold, from the epoch's seed (32 bytes)."""
    return HKDFExpand(SHA256(), 32, b"mk/ch@1\0" + share + struct.pack(">Q", epoch)).derive(seed)


def release_half(seed: bytes, share: bytes, epoch: int) -> bytes:
    """Return the half that the release service holds, from the epoch's seed (32 bytes)."""
    return HKDFExpand(SHA256(), 32, b"mk/rh@1\0" + share + struct.pack(">Q", epoch)).derive(seed)


def epoch_key(capsule: bytes, release: bytes, share: bytes, epoch: int) -> bytes:
    """Return the epoch key that the two halves make."""
    info = b"mk/ek@1\0" + share + struct.pack(">Q", epoch)
    return HKDF(SHA256(), 32, salt=b"mk/ek@1", info=info).derive(capsule + release)


def snapshot_mask(release: bytes, capsule_id: bytes) -> bytes:
    """Return what the key of a granted snapshot is masked with, for one capsule."""
    return HKDFExpand(SHA256(), 32, b"mk/rs@1\0" + capsule_id).derive(release)


def xor(one: bytes, other: bytes) -> bytes:
    """Return the 32 bytes that differ between two keys of 32 bytes."""
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def released(release: bytes, grant: str, capsule_id: bytes) -> bytes:
    """Return what the service gives to the holder of a capsule of this kind: its half, or the mask."""
    return snapshot_mask(release, capsule_id) if grant == "snapshot" else release


@dataclasses.dataclass(frozen=True, slots=True)
class ReleaseService:
    """Which service holds the other half: its address, and the Ed25519 key that signs what it says."""

    url: str
    key: bytes

    def header(self, part: str) -> dict[str, Any]:
        """Return the field ``rel`` of a capsule that holds this ``part``: "half" or "whole" (the seed)."""
        return {"key": self.key, "part": part, "url": self.url}


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class EpochSecret:
    """What an owner has of one epoch: the epoch key itself or, with a release ``service``, the seed.

    Around its use (``with``): ``raw`` is wiped at the end.
    """

    share: bytes
    epoch: int
    raw: bytes
    service: ReleaseService | None = None

    def __repr__(self) -> str:
        return f"EpochSecret(epoch={self.epoch}, release={self.service is not None})"

    def __enter__(self) -> EpochSecret:
        return self

    def __exit__(self, *_: object) -> None:
        wipe(self.raw)

    @property
    def key(self) -> bytes:
        """A copy of the epoch key; whoever takes it wipes it."""
        if self.service is None:
            return bytes(memoryview(self.raw))
        halves = self.capsule_half, self.release_half
        try:
            return epoch_key(*halves, self.share, self.epoch)
        finally:
            for half in halves:
                wipe(half)

    @property
    def capsule_half(self) -> bytes:
        """The half that capsules hold; whoever takes it wipes it."""
        return capsule_half(self.raw, self.share, self.epoch)

    @property
    def release_half(self) -> bytes:
        """The half that the service holds; whoever takes it wipes it."""
        return release_half(self.raw, self.share, self.epoch)

    def deposit(self, to: bytes) -> Deposit:
        """Return the service's half, sealed to the service's X-Wing public key ``to``; to be signed."""
        kid = kid_of(to)
        half = self.release_half
        sealed = hpke.wrap(to, deposit_info(self.share, self.epoch, kid), half)
        wipe(half)
        return Deposit(self.share, self.epoch, kid, sealed)


def deposit_info(share: bytes, epoch: int, to: bytes) -> bytes:
    """Return the HPKE info of a deposited half."""
    return b"mk/half@1\0" + share + struct.pack(">Q", epoch) + to


def _encryption_key(value: Any) -> bool:
    check_encryption_public(value)
    return True


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ReleaseKey(Record):
    """A release service's X-Wing public key ``enc``, to which halves are sealed; its Ed25519 key signs."""

    TYPE: ClassVar[str] = "mk/rkey@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {"enc": _encryption_key, "iat": time}

    enc: bytes
    iat: int


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Deposit(Record):
    """The release service's half of one epoch, sealed to its X-Wing key of kid ``to``; the owner signs."""

    TYPE: ClassVar[str] = "mk/half@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "epoch": uint(1),
        "to": blob(16),
        "half": blob(HALF_SIZE),
    }

    share: bytes
    epoch: int
    to: bytes
    half: bytes

    def open(self, key: EncryptionKey) -> bytes:
        """Return the half. Raises ``key_unwrap_failed`` if it is not sealed to ``key``."""
        return hpke.unwrap(key, deposit_info(self.share, self.epoch, self.to), self.half)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Release(Record):
    """One answer of the release service, signed by it: a half, for one request and one recipient, for a time.

    ``capsule`` is the record hash of the capsule that was checked, ``epoch`` that of the half, ``nonce`` the
    request's, ``to`` the kid of the recipient's X-Wing key that ``half`` is sealed to.
    """

    TYPE: ClassVar[str] = "mk/release@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "share": blob(16),
        "capsule": blob(32),
        "epoch": uint(1),
        "to": blob(16),
        "nonce": blob(16),
        "iat": time,
        "exp": time,
        "half": blob(HALF_SIZE),
    }

    share: bytes
    capsule: bytes
    epoch: int
    to: bytes
    nonce: bytes
    iat: int
    exp: int
    half: bytes = b""

    @property
    def info(self) -> bytes:
        """The HPKE info of the half: everything else that is said."""
        said = {name: getattr(self, name) for name in self.FIELDS if name != "half"}
        return b"mk/release@1\0" + hashlib.sha256(cbor.encode(said)).digest()

    def sealing(self, half: bytes, to: bytes) -> Release:
        """Return the same with ``half`` sealed to the X-Wing public key ``to``."""
        return dataclasses.replace(self, half=hpke.wrap(to, self.info, half))

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if not value["iat"] < value["exp"] <= value["iat"] + RELEASE_MAX_S:
            raise refuse("a release that ends before it begins, or too late")
