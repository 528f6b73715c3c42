"""Access lists in a metadata home: vault records and revocation lists, each replaced by its owner's next one.

Functions inside one transaction, as in `_queries`; all may be repeated. What a home may say of a list is
bound to what the record itself is: a timestamp vouches for nothing that is not a list of that very id, or it
could be made to vouch for an old roster.
"""

from __future__ import annotations

from typing import Final

from meshkitfs.core.cose import record_hash
from meshkitfs.core.membership import NumberedList, Revocations, VaultRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._connection import Connection, row
from meshkitfs.metadata._queries import touch

__all__ = ["LIST_MAX", "delete_list", "list_subject", "newest_list", "put_list", "read_list"]

LIST_MAX: Final = 64 << 10  # bytes


def list_subject(list_id: bytes) -> bytes:
    """The subject of announcements about an access list."""
    return b"v" + list_id


def read_list(list_id: bytes, record: bytes) -> NumberedList | None:
    """Return what the record is, if it is a list of that id, signed by the key it names; None otherwise."""
    for kind in (VaultRecord, Revocations):
        try:
            found: NumberedList = kind.parse_owned(record)
        except MeshkitError:
            continue
        return found if found.id == list_id else None
    return None


def newest_list(db: Connection, list_id: bytes) -> bytes | None:
    """The record in force."""
    found = row(db, "SELECT record FROM vaults WHERE id = ?", list_id)
    return None if found is None else bytes(found[0])


def put_list(db: Connection, list_id: bytes, expect: int, record: bytes) -> None:
    """Replace the record numbered ``expect`` (0: none) by a later one; see `Metadata.put_access_list`."""
    db.lock("vault", list_id)
    parsed = read_list(list_id, record)
    if parsed is None or len(record) > LIST_MAX:
        raise MeshkitError("invalid_record", "not a record of this list")
    found = row(db, "SELECT owner, seq, record FROM vaults WHERE id = ?", list_id)
    owner = parsed.owner.hex()
    if found is not None:
        if found[2] == record:
            return  # its answer was lost
        if found[0] != owner:
            raise MeshkitError("invalid_record", "not signed by who signed the record before it")
    seq = 0 if found is None else found[1]
    if seq != expect:
        raise MeshkitError("head_conflict", f"record {seq} is in force, not {expect}")
    if parsed.seq <= seq:
        raise MeshkitError("invalid_record", f"record {parsed.seq} after {seq}")
    # Numbers are left out when a restored store has forgotten some; otherwise each names the one before it.
    if found is not None and parsed.seq == seq + 1 and parsed.prev != record_hash(found[2]):
        raise MeshkitError("head_conflict", f"another record {seq} is in force")
    db.run(
        "INSERT INTO vaults (id, owner, seq, record) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, record = excluded.record",
        *(list_id, owner, parsed.seq, record),
    )
    touch(db, list_subject(list_id))


def delete_list(db: Connection, list_id: bytes) -> None:
    """Remove a list; one that is not there is no error."""
    if db.run("DELETE FROM vaults WHERE id = ?", list_id):
        touch(db, list_subject(list_id))
