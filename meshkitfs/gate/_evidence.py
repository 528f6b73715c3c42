"""Reading what the metadata store offers: which record is the owner's, the newest, this recipient's, fresh.

Pure functions over one answer of the store. Each returns what it proved or raises the refusal.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Final

from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Capsule, Roster, Timestamp
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import ShareState
from meshkitfs.state import Mark, ShareRow

__all__ = ["FRESH_S", "SKEW_S", "capsules", "fresh_until", "listed", "roster", "timestamp", "vouched"]

# Records signed by another machine's clock may be this far ahead of ours.
SKEW_S: Final = 60
# No timestamp is believed for longer than this after it was signed, whatever it says of itself.
FRESH_S: Final = 300


def capsules(
    blobs: Iterable[bytes], row: ShareRow, owner: Mapping[bytes, bytes], mine: Container[bytes]
) -> dict[bytes, Capsule]:
    """The capsules for this row that the share's owner signed, by record hash.

    ``owner`` are the keys that the owner has or had (kid to public), ``mine`` the kids of the recipient's
    encryption keys. Which of them counts, the roster says.
    """
    usable: dict[bytes, Capsule] = {}
    others = 0
    for blob in blobs:
        try:
            capsule = Capsule.parse(blob, owner)
        except MeshkitError:
            continue
        if capsule.share != row.share or capsule.grant != row.grant:
            continue
        if capsule.oid != row.oid or (row.grant == "snapshot" and capsule.id != row.ref):
            continue
        if capsule.to not in mine:
            others += 1
            continue
        usable[record_hash(blob)] = capsule
    if not usable:
        if others:
            raise MeshkitError("recipient_not_authorized", "the capsules here are for other keys")
        raise MeshkitError("capsule_not_found", f"share {row.share.hex()[:8]} of {row.owner_handle}")
    return usable


def roster(
    found: ShareState, row: ShareRow, owner: Mapping[bytes, bytes], mark: Mark
) -> tuple[Roster, bytes]:
    """The newest roster, signed by the owner and not older than one already seen."""
    if found.roster is None:
        raise MeshkitError("freshness_unproven", "the metadata store has no roster for this share")
    try:
        roster = Roster.parse(found.roster, owner)
    except MeshkitError as error:
        raise MeshkitError("freshness_unproven", f"the roster is not the owner's: {error.detail}") from error
    if roster.share != row.share:
        raise MeshkitError("freshness_unproven", "the roster offered belongs to another share")
    seen = record_hash(found.roster)
    if roster.seq < mark.roster_seq:
        raise MeshkitError("roster_rollback", f"roster {roster.seq} offered, {mark.roster_seq} was seen")
    if roster.seq == mark.roster_seq and seen != mark.roster_hash:
        raise MeshkitError("roster_fork", f"two different rosters {roster.seq}")
    return roster, seen


def listed(capsules: dict[bytes, Capsule], roster: Roster, row: ShareRow) -> tuple[Capsule, bytes]:
    """The newest of ``capsules`` that the roster lists."""
    listed = [(capsule, digest) for digest, capsule in capsules.items() if digest in roster.caps]
    if row.grant == "live":
        listed = [(capsule, digest) for capsule, digest in listed if capsule.epoch == roster.epoch]
    if not listed:
        # The newest of them counts: an earlier one that was to last longer was replaced by it.
        latest = max(capsules.values(), key=lambda capsule: (capsule.seq, capsule.exp)).exp
        if latest <= roster.iat:
            # By the owner's own clock it had run out: that is why the owner no longer lists it.
            raise MeshkitError("share_expired", f"expired {roster.iat - latest} s before roster {roster.seq}")
        raise MeshkitError("share_revoked", f"roster {roster.seq} of {row.owner_handle} no longer lists it")
    return max(listed, key=lambda pair: (pair[0].seq, pair[0].exp))


def vouched(found: ShareState, roster: Roster, roster_hash: bytes, now: int) -> Timestamp:
    """The service's word that the roster is the newest one, however long ago it gave it."""
    if found.timestamp is None:
        raise MeshkitError("freshness_unproven", "the metadata store gives no timestamp")
    keys = {kid_of(public): public for public in roster.timestamp_keys}
    try:
        stamp = Timestamp.parse(found.timestamp, keys)
    except MeshkitError as error:
        raise MeshkitError("freshness_unproven", f"the timestamp is not usable: {error.detail}") from error
    if stamp.share != roster.share or stamp.roster != roster_hash:
        raise MeshkitError("freshness_unproven", "the timestamp is for another roster")
    if stamp.iat > now + SKEW_S:
        raise MeshkitError("freshness_unproven", f"the timestamp is from {stamp.iat - now} s in the future")
    return stamp


def timestamp(
    found: ShareState, roster: Roster, roster_hash: bytes, now: int, *, renewable: bool = False
) -> Timestamp:
    """The service's proof that the roster is the newest one, fresh at ``now``.

    A roster that is ``renewable`` here may have run out.
    """
    stamp = vouched(found, roster, roster_hash, now)
    if now >= fresh_until(stamp):
        raise MeshkitError("freshness_unproven", f"the timestamp ran out {now - fresh_until(stamp)} s ago")
    if now >= roster.exp and not renewable:
        raise MeshkitError("freshness_unproven", f"the roster ran out {now - roster.exp} s ago")
    return stamp


def fresh_until(stamp: Timestamp) -> int:
    """Return until when a timestamp may be believed."""
    return min(stamp.exp, stamp.iat + FRESH_S)
