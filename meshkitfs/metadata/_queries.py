"""The queries of a metadata home: each function runs inside one transaction of either database.

All of them may be repeated when it is not known whether they took place (see `_connection`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.core.records import IdentityRecord, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _rules
from meshkitfs.metadata._api import Publication
from meshkitfs.metadata._connection import Connection, row, value
from meshkitfs.metadata._rules import Standing

__all__ = ["COMPLETE", "MAX_LETTER", "MAX_LETTERS", "mailbox_subject", "share_subject"]

EVERYTHING: Final = b""  # the subject whose number is that of the newest change of all
MAX_LETTER: Final = 256 << 10  # bytes
MAX_LETTERS: Final = 1000  # waiting in one mailbox


def share_subject(share: bytes) -> bytes:
    """The subject of announcements about a share."""
    return b"s" + share


def mailbox_subject(kid: bytes) -> bytes:
    """The subject of announcements about a mailbox."""
    return b"m" + kid


def touch(db: Connection, subject: bytes) -> None:
    """Count a change of the subject and announce it, when the transaction is committed."""
    db.announce(subject)


def settle(db: Connection, subjects: Sequence[bytes]) -> None:
    """Number the changes of a transaction: the last thing before its commit.

    The numbers come from one row, which stays locked until the commit. So they are taken in the order of the
    commits, and whoever reads that row sees every change up to its number. They are about microseconds of the
    clock: after a restored backup they go on higher than they ever were.
    """
    query = (
        "INSERT INTO changes (subject, n) VALUES (?, ?) ON CONFLICT (subject) DO UPDATE "
        "SET n = CASE WHEN excluded.n > changes.n THEN excluded.n ELSE changes.n + 1 END RETURNING n"
    )
    number = value(db, query, EVERYTHING, time.time_ns() // 1000)
    for subject in subjects:
        db.run(
            "INSERT INTO changes (subject, n) VALUES (?, ?) "
            "ON CONFLICT (subject) DO UPDATE SET n = excluded.n",
            subject,
            number,
        )


def changed(db: Connection, subject: bytes) -> int:
    """The number of the subject's last change; 0 when it has never changed."""
    found: int | None = value(db, "SELECT n FROM changes WHERE subject = ?", subject)
    return found or 0


# -- shares ------------------------------------------------------------------------------------------------


def service_key(db: Connection) -> SigningKey:
    """The key that signs this home's timestamps. Raises metadata_unavailable when it is lost."""
    seed = value(db, "SELECT seed FROM service")
    if not isinstance(seed, bytes) or len(seed) != 32:
        raise MeshkitError("metadata_unavailable", "the metadata store has lost the key of its timestamps")
    return SigningKey.from_seed(seed)


def newest_roster(db: Connection, share: bytes) -> bytes | None:
    """The roster in force."""
    return _blob(db, "SELECT blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1", share)


def newest_head(db: Connection, share: bytes) -> bytes | None:
    """The newest head."""
    return _blob(db, "SELECT blob FROM heads WHERE share = ? ORDER BY ver DESC LIMIT 1", share)


def heads(db: Connection, share: bytes, after_ver: int, upto_ver: int, limit: int) -> list[bytes]:
    """At most ``limit`` heads with ``after_ver < ver <= upto_ver``, oldest first."""
    query = "SELECT blob FROM heads WHERE share = ? AND ver > ? AND ver <= ? ORDER BY ver LIMIT ?"
    return [found[0] for found in db.rows(query, share, after_ver, upto_ver, limit)]


def capsules(db: Connection, share: bytes, kid: bytes) -> list[bytes]:
    """All capsules of the share for this recipient, oldest first."""
    query = "SELECT blob FROM capsules WHERE share = ? AND kid = ? ORDER BY n"
    return [found[0] for found in db.rows(query, share, kid)]


def retention(db: Connection, share: bytes) -> bytes | None:
    """The retention record in force."""
    return _blob(db, "SELECT blob FROM retentions WHERE share = ?", share)


def retain(db: Connection, share: bytes, blob: bytes) -> bool:
    """Replace the retention record; see `Metadata.retain`. Returns whether anything was new."""
    db.lock("share", share)
    old = retention(db, share)
    if old == blob:
        return False
    record = _rules.check_retention(share, blob, old, standing(db, share))
    db.run(
        "INSERT INTO retentions (share, seq, blob) VALUES (?, ?, ?) "
        "ON CONFLICT (share) DO UPDATE SET seq = excluded.seq, blob = excluded.blob",
        share,
        record.seq,
        blob,
    )
    touch(db, share_subject(share))
    return True


def standing(db: Connection, share: bytes) -> Standing:
    """Where the share stands, as `_rules` wants to know it."""
    found = row(db, "SELECT owner, blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1", share)
    owner, roster = b"", None
    if found is not None:
        owner, roster = found[0], Roster.parse(found[1], {kid_of(found[0]): found[0]})
    owner, former = _owner_now(db, owner)
    query = "SELECT ver, hash FROM heads WHERE share = ? ORDER BY ver DESC LIMIT 1"
    ver, head_hash = row(db, query, share) or (0, b"")
    return Standing(owner, former, roster, ver, head_hash)


def _owner_now(db: Connection, owner: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """The key that signs for whom ``owner`` is a key of, and those it has replaced.

    Only root keys count, which have signed their record themselves: anybody can name another's key in one.
    """
    handle = handle_of(db, kid_of(owner)) if owner else None
    records = [IdentityRecord.parse_self_signed(blob) for blob in chain(db, handle)] if handle else []
    if not any(record.root == owner for record in records):
        return owner, ()
    newest = records[-1].sig
    return newest, tuple({record.root: None for record in records if record.root != newest})


def publish(db: Connection, publication: Publication) -> int:
    """Apply a publication; see `Metadata.publish`. Returns how many bytes of records were new."""
    db.lock("share", publication.share)
    if _in_force(db, publication):
        return 0
    before = standing(db, publication.share)
    _rules.check_expectations(publication, before)
    owner, roster = before.owner, before.roster
    stored = 0
    if publication.roster is not None:
        owner, roster = _rules.check_roster(publication, publication.roster, before)
        db.run(
            "INSERT INTO rosters (share, seq, owner, hash, blob) VALUES (?, ?, ?, ?, ?)",
            publication.share,
            roster.seq,
            owner,
            record_hash(publication.roster),
            publication.roster,
        )
        stored += len(publication.roster)
    if publication.head is not None:
        _rules.check_head(publication, publication.head, roster, before)
        db.run(
            "INSERT INTO heads (share, ver, hash, blob) VALUES (?, ?, ?, ?)",
            publication.share,
            publication.head_ver,
            record_hash(publication.head),
            publication.head,
        )
        stored += len(publication.head)
    _rules.check_capsules(publication, owner, before.former, roster.epoch if roster is not None else 0)
    for kid, capsule_id, blob in publication.capsules:
        query = "INSERT INTO capsules (share, kid, id, blob) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        if db.run(query, publication.share, kid, capsule_id, blob):
            stored += len(blob)
            continue
        query = "SELECT blob FROM capsules WHERE share = ? AND id = ?"
        if value(db, query, publication.share, capsule_id) != blob:
            raise MeshkitError("invalid_record", "another capsule of this share has that id")
    if stored:
        touch(db, share_subject(publication.share))
    return stored


def _in_force(db: Connection, publication: Publication) -> bool:
    """Whether this very publication took place before: its answer was lost, and it is being repeated.

    Others may have followed it since; the publisher's next one will meet them.
    """
    known = 0
    for query, number, blob in (
        ("SELECT hash FROM heads WHERE share = ? AND ver = ?", publication.head_ver, publication.head),
        ("SELECT hash FROM rosters WHERE share = ? AND seq = ?", publication.roster_seq, publication.roster),
    ):
        if blob is not None:
            if value(db, query, publication.share, number) != record_hash(blob):
                return False
            known += 1
    return known > 0


def _blob(db: Connection, query: str, share: bytes) -> bytes | None:
    found: bytes | None = value(db, query, share)
    return found


# -- letters -----------------------------------------------------------------------------------------------


def check_letter(blob: bytes) -> None:
    """Raise invalid_argument for a letter that no mailbox takes."""
    if not 0 < len(blob) <= MAX_LETTER:
        raise MeshkitError("invalid_argument", f"a letter has 1 to {MAX_LETTER} bytes, not {len(blob)}")


def post_letter(db: Connection, to_kid: bytes, letter_id: bytes, blob: bytes) -> None:
    """Put a letter into a mailbox, once for each id. Raises no_space (mailbox full)."""
    db.lock("mailbox", to_kid)
    if value(db, "SELECT 1 FROM letters WHERE id = ?", letter_id) is not None:
        return
    if value(db, "SELECT count(*) FROM letters WHERE kid = ?", to_kid) >= MAX_LETTERS:
        raise MeshkitError("no_space", f"{MAX_LETTERS} letters are waiting in that mailbox")
    db.run("INSERT INTO letters (kid, id, blob) VALUES (?, ?, ?)", to_kid, letter_id, blob)
    touch(db, mailbox_subject(to_kid))


def letters(db: Connection, kid: bytes) -> list[tuple[bytes, bytes]]:
    """The letters in a mailbox as (id, blob), oldest first."""
    return [(i, blob) for i, blob in db.rows("SELECT id, blob FROM letters WHERE kid = ? ORDER BY n", kid)]


def page_of_letters(
    db: Connection, kid: bytes, after: bytes | None, size: int
) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Letters of at most ``size`` bytes (or one) behind the one of id ``after``, and whether more wait."""
    start = value(db, "SELECT n FROM letters WHERE kid = ? AND id = ?", kid, after) if after else None
    query = "SELECT n, length(blob) FROM letters WHERE kid = ? AND n > ? ORDER BY n"
    waiting = db.rows(query, kid, start or 0)
    taken, total = 0, 0
    for _, length in waiting:
        if taken and total + length > size:
            break
        taken, total = taken + 1, total + length
    if not taken:
        return [], False
    query = "SELECT id, blob FROM letters WHERE kid = ? AND n > ? AND n <= ? ORDER BY n"
    page = db.rows(query, kid, start or 0, waiting[taken - 1][0])
    return [(letter, blob) for letter, blob in page], taken < len(waiting)


def delete_letter(db: Connection, kid: bytes, letter_id: bytes) -> None:
    """Remove a letter from a mailbox."""
    if db.run("DELETE FROM letters WHERE kid = ? AND id = ?", kid, letter_id):
        touch(db, mailbox_subject(kid))


# -- the identity directory ----------------------------------------------------------------------------------


def chain(db: Connection, handle: str) -> list[bytes]:
    """The chain of records of a handle, oldest first."""
    return [found[0] for found in db.rows("SELECT blob FROM identities WHERE handle = ? ORDER BY n", handle)]


def handle_of(db: Connection, kid: bytes) -> str | None:
    """The handle in whose chain a signing key of that kid occurs."""
    found: str | None = value(db, "SELECT handle FROM identity_keys WHERE kid = ?", kid)
    return found


def publish_identity(db: Connection, handle: str, record: bytes) -> bool:
    """Publish an identity record; see `Metadata.publish_identity`. Returns whether it was new.

    An encryption key belongs to the first who publishes it: nobody else is given what is addressed to it.
    """
    db.lock("identity", handle.encode())
    known = chain(db, handle)
    if record in known:
        return False
    parsed = _rules.check_identity(handle, known, record)
    for kid in sorted({kid_of(parsed.root), kid_of(parsed.sig)}):
        holder = handle_of(db, kid)
        if holder not in (None, handle):
            raise MeshkitError("identity_handle_taken", f"this key is published as {holder!r} already")
        if holder is None:
            db.run("INSERT INTO identity_keys (kid, handle) VALUES (?, ?)", kid, handle)
    holder = value(db, "SELECT handle FROM recipients WHERE kid = ?", parsed.enc_kid)
    if holder not in (None, handle):
        raise MeshkitError("identity_handle_taken", f"this key is published as {holder!r} already")
    if holder is None:
        db.run("INSERT INTO recipients (kid, handle) VALUES (?, ?)", parsed.enc_kid, handle)
    db.run("INSERT INTO identities (handle, n, blob) VALUES (?, ?, ?)", handle, len(known), record)
    return True


def _name_recipients(db: Connection) -> None:
    for handle, blob in db.rows("SELECT handle, blob FROM identities ORDER BY handle, n"):
        kid = IdentityRecord.parse_self_signed(blob).enc_kid
        db.run("INSERT INTO recipients (kid, handle) VALUES (?, ?) ON CONFLICT DO NOTHING", kid, handle)


# What follows the statements of `_schema.MIGRATIONS`, in the same transaction.
COMPLETE: Final[Mapping[int, Callable[[Connection], None]]] = {2: _name_recipients}
