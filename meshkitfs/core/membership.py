"""Vault records and revocation lists: numbered sets that one key signs, each naming the one before it.

The rules by which a reader believes one are in `newest_vault` and `newest_revocations`. They are pure, so
that a device's gate and a service that releases keys decide alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, TypeVar

from meshkitfs.core.cose import peek1
from meshkitfs.core.fields import Check, Record, array, blob, check_fields, public_key, refuse, time, uint
from meshkitfs.core.keys import KID_SIZE, kid_of
from meshkitfs.core.records import Timestamp
from meshkitfs.errors import MeshkitError

__all__ = [
    "LIST_LIFETIME_S",
    "LIST_RENEW_S",
    "MEMBERS_MAX",
    "ListMark",
    "NumberedList",
    "Revocations",
    "VaultRecord",
    "authentic_list",
    "member_entry",
    "newest_revocations",
    "newest_vault",
    "revocations_id",
]

MEMBERS_MAX: Final = 1000
_REVOKED_MAX: Final = 3000
# How long a record vouches without being renewed, as a roster: it bounds how long a dishonest service can
# hide a removal. The owner's daemon renews it while this much is left.
LIST_LIFETIME_S: Final = 7 * 86400
LIST_RENEW_S: Final = 4 * 86400
# As the gate reads the timestamp of a roster: believed for no longer, and not from further in the future.
_FRESH_S: Final = 300
_SKEW_S: Final = 60


@dataclasses.dataclass(frozen=True, slots=True)
class ListMark:
    """The newest record of a list that a device has seen; seq 0 and no hash if it has seen none."""

    seq: int = 0
    hash: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class NumberedList(Record):
    """What both lists have in common.

    ``id`` is 16 bytes, ``seq`` counts from 1, ``prev`` is the record hash of the one before (b"" for the
    first), ``owner`` the Ed25519 public key that signs all of them, ``iat`` and ``exp`` UNIX seconds.
    """

    id: bytes
    seq: int
    prev: bytes
    owner: bytes
    iat: int
    exp: int

    @classmethod
    def parse_owned(cls: type[L], blob: bytes) -> L:
        """Return the record if the key that it names itself signed it. Raises ``invalid_record``."""
        owner = peek1(blob, cls.TYPE).get("owner")
        if type(owner) is not bytes:
            raise refuse(f"a {cls.TYPE} without its owner's key")
        record = cls.parse(blob, {kid_of(owner): owner})
        if record.owner != owner:
            raise refuse(f"a {cls.TYPE} that names two owners")
        return record

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if value["iat"] >= value["exp"]:
            raise refuse(f"a {cls.TYPE} that ends before it begins")
        if (value["seq"] == 1) != (value["prev"] == b""):
            raise refuse("only the first record has no predecessor")


L = TypeVar("L", bound=NumberedList)
_COMMON: Final[Mapping[str, Check]] = {
    "id": blob(16),
    "seq": uint(1),
    "prev": blob(0, 32),
    "owner": public_key,
    "iat": time,
    "exp": time,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class VaultRecord(NumberedList):
    """Who is in a vault. A member is 32 bytes: the kid of their signing key, then of their encryption key."""

    TYPE: ClassVar[str] = "mk/vault@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {**_COMMON, "members": array(blob(2 * KID_SIZE), MEMBERS_MAX)}

    members: tuple[bytes, ...]

    def lists(self, encryption_kid: bytes) -> bool:
        """Whether the holder of this encryption key, for whom a capsule is made, is a member."""
        return any(member[KID_SIZE:] == encryption_kid for member in self.members)

    def signing_kids(self) -> tuple[bytes, ...]:
        """The kids of the members' signing keys: by these a service knows who may read the record."""
        return tuple(member[:KID_SIZE] for member in self.members)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Revocations(NumberedList):
    """The ids of the capability tokens that their issuer has taken back, each with all made from it."""

    TYPE: ClassVar[str] = "mk/revocations@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {**_COMMON, "tokens": array(blob(16), _REVOKED_MAX)}

    tokens: tuple[bytes, ...]

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        # Not by zero-argument super(): a dataclass with slots is another class than the one written here.
        NumberedList._check.__func__(cls, value)  # type: ignore[attr-defined]
        if value["id"] != revocations_id(value["owner"]):
            raise refuse("a revocation list under the id of another issuer")


def member_entry(signing_public: bytes, encryption_public: bytes) -> bytes:
    """Return how a vault record lists the holder of these two keys."""
    return kid_of(signing_public) + kid_of(encryption_public)


def revocations_id(issuer: bytes) -> bytes:
    """Return the 16-byte id of an issuer's revocation list; there is one for each issuing key."""
    return hashlib.sha256(b"mk/revocations@1\0" + issuer).digest()[:16]


def newest_vault(
    record: bytes | None, stamp: bytes | None, *, vault: bytes, owner: bytes, mark: ListMark,
    timestamp_keys: Iterable[bytes], now: int,
) -> tuple[VaultRecord, int]:  # fmt: skip
    """Return the record of ``vault`` that a store offers, and until when it may be believed (UNIX seconds).

    ``owner`` is the pinned key, ``mark`` what was seen of it before, ``timestamp_keys`` are those of the
    share's roster. Raises MeshkitError ``vault_membership_required`` unless it is proved to be that vault's,
    not older than or different from what was seen, and fresh.
    """
    return _newest(
        VaultRecord, "vault_membership_required", record, stamp, vault, owner, mark, timestamp_keys, now
    )


def newest_revocations(
    record: bytes | None, stamp: bytes | None, *, issuer: bytes, mark: ListMark,
    timestamp_keys: Iterable[bytes], now: int,
) -> tuple[Revocations, int]:  # fmt: skip
    """Return the revocation list of ``issuer``, as `newest_vault` does. Raises ``capability_denied``."""
    return _newest(
        Revocations, "capability_denied", record, stamp, revocations_id(issuer), issuer, mark, timestamp_keys,
        now,
    )  # fmt: skip


def authentic_list(kind: type[L], blob: bytes, list_id: bytes, owner: bytes, code: str) -> L:
    """Return the record in ``blob`` if ``owner`` signed it for this list. Raises MeshkitError ``code``.

    It need not be the newest, nor fresh; but whoever has been shown it has seen it (`ListMark`).
    """
    try:
        record = kind.parse(blob, {kid_of(owner): owner})
    except MeshkitError as error:
        raise MeshkitError(code, f"the {_name(kind)} is not its owner's: {error.detail}") from error
    if record.id != list_id or record.owner != owner:
        raise MeshkitError(code, f"the {_name(kind)} offered is another's")
    return record


def _name(kind: type[NumberedList]) -> str:
    return "vault record" if kind is VaultRecord else "revocation list"


def _newest(
    kind: type[L], code: str, blob: bytes | None, stamp: bytes | None, list_id: bytes, owner: bytes,
    mark: ListMark, timestamp_keys: Iterable[bytes], now: int,
) -> tuple[L, int]:  # fmt: skip
    what = _name(kind)
    if blob is None:
        raise MeshkitError(code, f"the metadata store shows no {what} to this identity")
    record = authentic_list(kind, blob, list_id, owner, code)
    if record.seq < mark.seq:
        raise MeshkitError(code, f"{what} {record.seq} offered, {mark.seq} was seen")
    if record.seq == mark.seq and record.digest != mark.hash:
        raise MeshkitError(code, f"two different records {record.seq} of one {what}")
    if record.seq == mark.seq + 1 and record.prev != mark.hash:
        raise MeshkitError(code, f"{what} {record.seq} does not follow the one that was seen")
    if now >= record.exp:
        raise MeshkitError(code, f"the {what} ran out {now - record.exp} s ago")
    if record.iat > now + _SKEW_S:
        raise MeshkitError(code, f"the {what} is from {record.iat - now} s in the future")
    if stamp is None:
        raise MeshkitError(code, f"nobody vouches that the {what} is the newest")
    try:
        word = Timestamp.parse(stamp, {kid_of(public): public for public in timestamp_keys})
    except MeshkitError as error:
        raise MeshkitError(code, f"the timestamp of the {what} is not usable: {error.detail}") from error
    if word.share != list_id or word.roster != record.digest:
        raise MeshkitError(code, f"the timestamp is not for this {what}")
    until = min(word.exp, word.iat + _FRESH_S, record.exp)
    if word.iat > now + _SKEW_S or now >= until:
        raise MeshkitError(code, f"the timestamp of the {what} is not of now")
    return record, until
