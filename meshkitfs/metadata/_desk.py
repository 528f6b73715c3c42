"""Rows that only a served home has: who is a member, what was asked, what is used up, who was invited.

Like `_queries`: functions inside a transaction, all of which may be repeated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _queries
from meshkitfs.metadata._connection import Connection, value

__all__ = ["OPERATOR", "Invitation", "Member"]

OPERATOR: Final = "-"  # no handle looks like this
DAY: Final = 86400
MAX_OPEN_INVITATIONS: Final = 100  # of one member
# So many rosters of a share stay: one is in force, and a publication that is repeated names a late one.
KEPT_ROSTERS: Final = 16


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody in the identity directory: the handle, the newest signing key, all signing keys' kids."""

    handle: str
    key: bytes
    kids: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Invitation:
    """One invitation; the code itself is known to nobody but who was given it."""

    id: bytes
    expires: int
    handle: str | None


def member(db: Connection, kid: bytes) -> Member | None:
    """The member whose *newest* signing key has this kid: a key that was replaced speaks for nobody."""
    handle = _queries.handle_of(db, kid)
    if handle is None or is_removed(db, "member", handle.encode()):
        return None
    query = "SELECT blob FROM identities WHERE handle = ? ORDER BY n DESC LIMIT 1"
    newest = IdentityRecord.parse_self_signed(value(db, query, handle))
    if newest.kid != kid:
        return None
    kids = db.rows("SELECT kid FROM identity_keys WHERE handle = ?", handle)
    return Member(handle, newest.sig, frozenset(found[0] for found in kids))


def owns_mailbox(db: Connection, who: Member, kid: bytes) -> bool:
    """Whether this is one of the member's encryption keys."""
    return bool(value(db, "SELECT handle FROM recipients WHERE kid = ?", kid) == who.handle)


def owner_of(db: Connection, share: bytes) -> bytes | None:
    """The kid of the key that owns the share; None if there is no such share."""
    owner = value(db, "SELECT owner FROM rosters WHERE share = ? ORDER BY seq LIMIT 1", share)
    return None if owner is None else kid_of(owner)


def sees(db: Connection, who: Member, share: bytes) -> bool:
    """Whether the member owns the share or has a capsule in it. To all others it does not exist."""
    if owner_of(db, share) in who.kids:
        return True
    query = (
        "SELECT 1 FROM capsules WHERE share = ? AND kid IN "
        "(SELECT kid FROM recipients WHERE handle = ?) LIMIT 1"
    )
    return value(db, query, share, who.handle) is not None


def is_removed(db: Connection, kind: str, subject: bytes) -> bool:
    """Whether the operator has removed this ``member`` (its handle, UTF-8) or ``share`` (its id)."""
    return value(db, "SELECT 1 FROM removed WHERE kind = ? AND id = ?", kind, subject) is not None


# -- requests ------------------------------------------------------------------------------------------------


def claim_nonce(db: Connection, keyid: bytes, nonce: bytes, token: bytes, now: int) -> bool:
    """Note that a request was served. False if it was before; ``token`` tells a repeated transaction."""
    query = "INSERT INTO nonces (keyid, nonce, token, created) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
    if db.run(query, keyid, nonce.hex(), token, now):
        return True
    known = value(db, "SELECT token FROM nonces WHERE keyid = ? AND nonce = ?", keyid, nonce.hex())
    return bool(known == token)


def note(db: Connection, at: int, who: str, kind: str, subject: bytes | None, outcome: str) -> None:
    """Write one line of the audit log."""
    query = "INSERT INTO audit (at, who, kind, share, outcome) VALUES (?, ?, ?, ?, ?)"
    db.run(query, at, who, kind, subject, outcome)


def charge(db: Connection, handle: str, kind: str, period: int, amount: int, limit: int) -> None:
    """Add to what somebody has used. Raises quota_exceeded, which undoes the transaction."""
    used = db.rows(
        "INSERT INTO counts (handle, kind, period, n) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (handle, kind, period) DO UPDATE SET n = counts.n + excluded.n RETURNING n",
        handle,
        kind,
        period,
        amount,
    )
    if used[0][0] > limit:
        raise MeshkitError("quota_exceeded", f"{kind}: {limit} is the limit")


def give_back(db: Connection, handle: str, kind: str, amount: int) -> None:
    """Take off what somebody has used of a quota that is for good: it is not kept any more."""
    query = (
        "UPDATE counts SET n = CASE WHEN n > ? THEN n - ? ELSE 0 END "
        "WHERE handle = ? AND kind = ? AND period = 0"
    )
    db.run(query, amount, amount, handle, kind)


def recharge(db: Connection, handle: str, before: int, after: int, limit: int) -> None:
    """Something of ``before`` bytes is replaced by ``after`` bytes. Raises quota_exceeded."""
    if after >= before:
        charge(db, handle, "bytes", 0, after - before, limit)
    else:
        give_back(db, handle, "bytes", before - after)


def drop_rosters(db: Connection, share: bytes, seq: int) -> None:
    """Delete the rosters that ``seq`` has superseded long ago; their bytes are their owner's again."""
    query = "DELETE FROM rosters WHERE share = ? AND seq <= ? RETURNING owner, length(blob)"
    gone = db.rows(query, share, seq - KEPT_ROSTERS)
    handle = _queries.handle_of(db, kid_of(gone[0][0])) if gone else None
    if handle is not None:
        give_back(db, handle, "bytes", sum(size for _, size in gone))


def tidy(db: Connection, now: int, nonce_seconds: int, audit_days: int) -> None:
    """Forget what is of no use any more."""
    db.run("DELETE FROM nonces WHERE created < ?", now - nonce_seconds)
    db.run("DELETE FROM counts WHERE period > 0 AND period < ?", now // DAY - 1)
    db.run("DELETE FROM audit WHERE at < ?", now - audit_days * DAY)
    db.run("DELETE FROM invitations WHERE expires < ?", now - 30 * DAY)


# -- invitations ---------------------------------------------------------------------------------------------


def code_hash(code: str) -> bytes:
    """What is kept of an invitation's code: it is random enough that this needs no salt."""
    return hashlib.sha256(b"mk/invitation@1\0" + code.encode()).digest()


def invitation_id(code: str) -> bytes:
    """By what an invitation is called where its code must not be."""
    return code_hash(code)[:16]


def invite(db: Connection, inviter: str, code: str, now: int, expires: int) -> bytes:
    """Make an invitation; returns its id. Raises quota_exceeded."""
    digest = code_hash(code)
    if inviter != OPERATOR:
        query = "SELECT count(*) FROM invitations WHERE inviter = ? AND handle IS NULL AND expires > ?"
        if value(db, query, inviter, now) >= MAX_OPEN_INVITATIONS:
            raise MeshkitError("quota_exceeded", f"{MAX_OPEN_INVITATIONS} invitations wait to be used")
    db.run(
        "INSERT INTO invitations (hash, id, inviter, created, expires) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        digest,
        invitation_id(code),
        inviter,
        now,
        expires,
    )
    return invitation_id(code)


def use_invitation(db: Connection, code: str, handle: str, now: int) -> None:
    """Use an invitation up. Raises metadata_unauthorized for one that is not good (any more)."""
    query = "UPDATE invitations SET handle = ? WHERE hash = ? AND handle IS NULL AND expires > ?"
    if not db.run(query, handle, code_hash(code), now):
        raise MeshkitError("metadata_unauthorized", "the invitation is unknown, used or too old")


def invitations(db: Connection, inviter: str) -> list[Invitation]:
    """Somebody's invitations, the newest first."""
    query = (
        "SELECT id, expires, handle FROM invitations WHERE inviter = ? ORDER BY created DESC, id LIMIT 1000"
    )
    return [Invitation(*found) for found in db.rows(query, inviter)]


def uninvite(db: Connection, inviter: str, invitation: bytes) -> bool:
    """Take an unused invitation back; False if there is none of that id."""
    query = "DELETE FROM invitations WHERE inviter = ? AND id = ? AND handle IS NULL"
    return db.run(query, inviter, invitation) > 0
