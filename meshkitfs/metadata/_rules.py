"""What a metadata home accepts: who may sign which record, and what must follow on what.

Pure functions over one moment of the store, called inside the transaction that also writes, so that
nothing can come in between. They keep honest clients from damaging each other; readers verify again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshkitfs.core.cose import peek1
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Capsule, Head, IdentityRecord, Retention, Roster, verify_chain
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._api import Publication

__all__ = [
    "Standing",
    "check_capsules",
    "check_expectations",
    "check_head",
    "check_identity",
    "check_retention",
    "check_roster",
]

ROSTER_TYPE = "mk/roster@1"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a share stands: its owner's key, its newest roster, its newest head (0 and b"" before one).

    ``owner`` is the key that may sign now, which need not be the one that signed the newest roster;
    ``former`` are the ones that it has replaced.
    """

    owner: bytes = b""
    former: tuple[bytes, ...] = ()
    roster: Roster | None = None
    head_ver: int = 0
    head_hash: bytes = b""

    @property
    def roster_seq(self) -> int:
        return 0 if self.roster is None else self.roster.seq


def check_expectations(publication: Publication, standing: Standing) -> None:
    """Compare what the publisher has built on with where the share stands. Raises head_conflict."""
    if publication.head is not None and publication.expect_head is None:
        raise MeshkitError("invalid_record", "a new head without the head it replaces")
    if publication.roster is not None and publication.expect_roster is None:
        raise MeshkitError("invalid_record", "a new roster without the roster it replaces")
    if publication.expect_roster not in (None, standing.roster_seq):
        raise MeshkitError(
            "head_conflict", f"roster {standing.roster_seq} is in force, not {publication.expect_roster}"
        )
    if publication.expect_head not in (None, standing.head_hash):
        raise MeshkitError("head_conflict", f"the share is at version {standing.head_ver} by now")


def check_roster(publication: Publication, blob: bytes, standing: Standing) -> tuple[bytes, Roster]:
    """Return the owner's key and the roster, if it may follow. Raises invalid_record.

    The first roster of a share says who the owner is: the one of its writers who signed it. Every later
    one must be signed by the same key, or the newest one of its identity's chain.
    """
    owner = standing.owner or _first_owner(blob)
    roster = Roster.parse(blob, {kid_of(owner): owner})
    if roster.share != publication.share:
        raise MeshkitError("invalid_record", "the roster of another share")
    if (roster.seq, roster.epoch) != (publication.roster_seq, publication.roster_epoch):
        raise MeshkitError("invalid_record", "the numbers beside the roster are not those inside it")
    if roster.seq != standing.roster_seq + 1:
        raise MeshkitError("invalid_record", f"roster {roster.seq} cannot follow {standing.roster_seq}")
    previous = standing.roster
    if previous is not None and (roster.oid != previous.oid or roster.epoch < previous.epoch):
        raise MeshkitError("invalid_record", "the roster is for another object, or goes back to an old epoch")
    return owner, roster


def check_head(publication: Publication, blob: bytes, roster: Roster | None, standing: Standing) -> None:
    """Accept a head signed by a writer of the newest roster, in its epoch, chained to the newest head.

    Raises invalid_record; head_conflict when the epoch is not the roster's: the share was re-keyed.
    """
    if roster is None:
        raise MeshkitError("invalid_record", "a head for a share without a roster")
    head = Head.parse(blob, {kid_of(writer): writer for writer in roster.writers})
    if (head.share, head.oid) != (publication.share, roster.oid):
        raise MeshkitError("invalid_record", "the head of another share or object")
    if (head.ver, head.epoch) != (publication.head_ver, publication.head_epoch):
        raise MeshkitError("invalid_record", "the numbers beside the head are not those inside it")
    if head.epoch != roster.epoch:
        raise MeshkitError("head_conflict", f"epoch {roster.epoch} is in force, not {head.epoch}")
    # A device may have made several local versions before it could publish, so versions may skip.
    if head.ver <= standing.head_ver or head.prev != standing.head_hash:
        raise MeshkitError("invalid_record", "the head does not follow the one it replaces")


def check_capsules(
    publication: Publication, owner: bytes, former: Sequence[bytes] = (), epoch: int = 0
) -> None:
    """Accept capsules that the share's owner signed for this share. Raises invalid_record.

    What a key of before has signed is from an epoch before the newest, ``epoch``.
    """
    keys = {kid_of(owner): owner} if owner else {}  # without a roster nobody may grant anything
    all_keys = keys | {kid_of(key): key for key in former}
    for kid, capsule_id, blob in publication.capsules:
        capsule = Capsule.parse(blob, all_keys)
        if capsule.frm not in keys and capsule.epoch >= epoch:
            raise MeshkitError("invalid_record", "a capsule signed with a key that its owner has replaced")
        if (capsule.share, capsule.to, capsule.id) != (publication.share, kid, capsule_id):
            raise MeshkitError("invalid_record", "the capsule's share, recipient or id is another one")


def check_retention(share: bytes, blob: bytes, old: bytes | None, standing: Standing) -> Retention:
    """Return the retention record if it may follow ``old``. Raises invalid_record, head_conflict."""
    keys = {kid_of(standing.owner): standing.owner} if standing.owner else {}
    record = Retention.parse(blob, keys)
    all_keys = keys | {kid_of(key): key for key in standing.former}
    before = Retention.parse(old, all_keys) if old is not None else None
    if record.share != share:
        raise MeshkitError("invalid_record", "the retention record of another share")
    seq = before.seq if before is not None else 0
    if record.seq != seq + 1:
        raise MeshkitError("head_conflict", f"retention {seq} is in force; {record.seq} cannot follow it")
    if before is not None and not _covers(record, before):
        raise MeshkitError("invalid_record", "a version that was given up cannot be kept again")
    if any(last >= standing.head_ver for _, last, _ in record.ranges()):
        raise MeshkitError("invalid_record", "the newest version cannot be given up")
    return record


def _covers(new: Retention, old: Retention) -> bool:
    """Whether everything that ``old`` gave up is given up in ``new``."""
    # Both ascend, so one pass over both is enough: a record may have thousands of ranges.
    rest = iter(new.ranges())
    low, high = 0, -1
    for first, last, _ in old.ranges():
        at = first
        while at <= last:
            if at > high:
                following = next(rest, None)
                if following is None:
                    return False
                low, high, _ = following
            elif at < low:
                return False
            else:
                at = high + 1
    return True


def check_identity(handle: str, chain: Sequence[bytes], record: bytes) -> IdentityRecord:
    """Return the record if it may follow the chain of its handle (empty: be the first).

    Raises identity_handle_taken when it begins another chain, invalid_record when it is malformed.
    """
    try:
        parsed = verify_chain([*chain, record])
    except MeshkitError:
        if chain:
            if IdentityRecord.parse_self_signed(record).seq:
                raise MeshkitError("invalid_record", "the record does not follow the newest one") from None
            raise MeshkitError("identity_handle_taken", f"{handle!r} belongs to somebody else") from None
        raise
    if parsed.handle != handle:
        raise MeshkitError("invalid_record", "the record is for another handle")
    return parsed


def _first_owner(blob: bytes) -> bytes:
    writers = peek1(blob, ROSTER_TYPE).get("writers")
    if isinstance(writers, list):
        for writer in writers:
            if isinstance(writer, bytes) and _signed_by(blob, writer):
                return writer
    raise MeshkitError("invalid_record", "the first roster is not signed by one of its writers")


def _signed_by(blob: bytes, public: bytes) -> bool:
    try:
        Roster.parse(blob, {kid_of(public): public})
    except MeshkitError:
        return False
    return True
