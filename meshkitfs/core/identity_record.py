"""Identity records: a person's public keys, certified by those keys themselves, in a hash chain.

The first record has ``seq`` 0 and is signed by the root key in it. Each later one names the record hash of
the one before. A record with the same root renews or replaces the other keys; a record with a new root is
signed by the new root and carries the old root's endorsement of it, so that both have signed. A directory
that serves these can withhold them, never invent them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from meshkitfs.core import cose
from meshkitfs.core.fields import (
    Check,
    Record,
    blob,
    blob_up_to,
    check_fields,
    nullable,
    public_key,
    refuse,
    time,
    uint,
)
from meshkitfs.core.keys import SigningKey, check_encryption_public, kid_of

__all__ = [
    "Endorsement",
    "IdentityRecord",
    "first_record",
    "rotate",
    "valid_handle",
    "verify_chain",
    "verify_links",
]

HANDLE_MAX: Final = 64
_CHAIN_MAX: Final = 1000


def valid_handle(handle: object) -> bool:
    """Return whether ``handle`` can name a person: 1 to 64 lower-case letters, digits, '.', '_', '-', '@'.

    It begins with a letter or digit. The narrow alphabet keeps two handles from looking alike.
    """
    return (
        type(handle) is str
        and 0 < len(handle) <= HANDLE_MAX
        and handle[0] in _HANDLE_FIRST
        and _HANDLE_CHARS.issuperset(handle)
    )


_HANDLE_FIRST: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_HANDLE_CHARS: Final = _HANDLE_FIRST | frozenset("._-@")


def _encryption_key(value: Any) -> bool:
    check_encryption_public(value)
    return True


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Endorsement(Record):
    """The old root's word for a new one: signed by the old root, carried inside the new root's record."""

    TYPE: ClassVar[str] = "mk/rot@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "handle": valid_handle,
        "new": public_key,
        "seq": uint(1),
        "prev": blob(32),
    }

    handle: str
    new: bytes
    seq: int
    prev: bytes


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class IdentityRecord(Record):
    """A person's keys: ``root`` and ``sig`` (Ed25519, may be the same), ``enc`` (X-Wing, 1216 bytes).

    ``seq`` counts from 0, ``prev`` is the record hash of the record before (b"" for the first), ``nbf`` and
    ``exp`` bound its validity, ``created`` is when it was made (UNIX seconds). ``rot`` is None, or the old
    root's signed `Endorsement` where the root has changed.
    """

    TYPE: ClassVar[str] = "mk/id@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "handle": valid_handle,
        "root": public_key,
        "sig": public_key,
        "enc": _encryption_key,
        "seq": uint(),
        "prev": blob(0, 32),
        "nbf": time,
        "exp": time,
        "created": time,
        "rot": nullable(blob_up_to(1024)),
    }

    handle: str
    root: bytes
    sig: bytes
    enc: bytes
    seq: int
    prev: bytes
    nbf: int
    exp: int
    created: int
    rot: bytes | None = None

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if (value["seq"] == 0) != (value["prev"] == b""):
            raise refuse("only the first record has no predecessor")
        if value["seq"] == 0 and value["rot"] is not None:
            raise refuse("the first record has nothing to rotate from")
        if value["nbf"] >= value["exp"]:
            raise refuse("an identity record that ends before it begins")

    @classmethod
    def parse_self_signed(cls, blob: bytes) -> IdentityRecord:
        """Return the record in ``blob`` if the root key named in it signed it. Raises ``invalid_record``.

        This proves that it is consistent, not whose it is: that is what a chain, a pin or a comparison of
        fingerprints is for.
        """
        root = cose.peek1(blob, cls.TYPE).get("root", b"")
        public_key(root)
        return cls.parse(blob, {kid_of(root): root})

    @property
    def kid(self) -> bytes:
        """The kid of the signing key: what capsules and rosters know this person by."""
        return kid_of(self.sig)

    @property
    def enc_kid(self) -> bytes:
        """The kid of the encryption key: the address of capsules and letters to this person."""
        return kid_of(self.enc)


def first_record(handle: str, root: SigningKey, enc_public: bytes, now: int, lifetime: int) -> bytes:
    """Return the signed first record of a new identity whose root also signs, valid ``lifetime`` seconds."""
    record = IdentityRecord(handle, root.public, root.public, enc_public, 0, b"", now, now + lifetime, now)
    return record.sign(root)


def rotate(old_blob: bytes, old_root: SigningKey, new: IdentityRecord, new_root: SigningKey) -> bytes:
    """Return ``new``, signed by ``new_root``, as the successor of ``old_blob`` (fills seq, prev and rot).

    Raises MeshkitError ``invalid_record`` if ``old_root`` is not the old record's root or the handle differs.
    """
    old = IdentityRecord.parse(old_blob, {old_root.kid: old_root.public})
    if old.root != old_root.public or new.root != new_root.public or new.handle != old.handle:
        raise refuse("not a successor of that record")
    seq, prev = old.seq + 1, old.digest
    rot = None
    if new.root != old.root:
        rot = Endorsement(new.handle, new.root, seq, prev).sign(old_root)
    return dataclasses.replace(new, seq=seq, prev=prev, rot=rot).sign(new_root)


def _check_successor(old: IdentityRecord, new: IdentityRecord) -> None:
    if new.seq != old.seq + 1 or new.prev != old.digest or new.handle != old.handle:
        raise refuse("a record that does not follow the one before")
    if new.root == old.root:
        if new.rot is not None:
            raise refuse("a rotation to the same root")
        return
    if new.rot is None:
        raise refuse("a new root that the old one has not endorsed")
    word = Endorsement.parse(new.rot, {kid_of(old.root): old.root})
    if (word.handle, word.new, word.seq, word.prev) != (new.handle, new.root, new.seq, new.prev):
        raise refuse("an endorsement of something else")


def verify_chain(blobs: Sequence[bytes]) -> IdentityRecord:
    """Return the newest record of a whole chain, first record first.

    Raises MeshkitError ``invalid_record`` if it is empty, does not begin with the first record, or any link
    is not signed by the root it names, not chained, of another handle, or changes the root unendorsed.
    """
    records = verify_links(blobs)
    if records[0].seq != 0:
        raise refuse("an identity chain begins with its first record")
    return records[-1]


def verify_links(blobs: Sequence[bytes]) -> list[IdentityRecord]:
    """Return the records of a chain or of the end of one, each of which must follow the one before.

    The first of them is proved by nothing but itself: it is for the caller to know it. Raises MeshkitError
    ``invalid_record`` as `verify_chain`.
    """
    if not 0 < len(blobs) <= _CHAIN_MAX:
        raise refuse("an identity chain has 1 to 1000 records")
    records = [IdentityRecord.parse_self_signed(blobs[0])]
    for following in blobs[1:]:
        record = IdentityRecord.parse_self_signed(following)
        _check_successor(records[-1], record)
        records.append(record)
    return records
