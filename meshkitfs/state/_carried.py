"""What goes along when an identity moves to another home: what its state remembers and is not of the device.

Unsent changes, the journal of long jobs and the audit stay: the first are in the spool, the others are about
this device. Marks are never lowered by what comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import apsw

from meshkitfs.errors import MeshkitError

__all__ = ["CarriedRows", "check_carried"]

_TABLES: Final[dict[str, tuple[str, ...]]] = {
    "shares": (
        "ref", "share", "oid", "name", "kind", "grant_kind", "owner_public", "owner_handle", "mine", "mode",
        "mtime_ns", "created",
    ),
    "members": (
        "capsule_id", "share", "handle", "capsule_hash", "encryption_kid", "encryption_public",
        "signing_public", "rights", "not_before", "expires", "grant_kind", "target", "policy", "vault",
        "capability", "blob", "revoked",
    ),
    "quarantine": ("share", "code", "detail", "since"),
    "contacts": ("handle", "row"),
    "own_lists": ("name", "list", "record", "handles"),
    "tokens": ("hash", "token"),
    "issued": ("id", "name", "handle", "rights", "share", "expires", "revoked"),
    "settings": ("name", "value"),
    "marks": ("share", "roster_seq", "roster_hash", "head_version", "head_hash"),
    "list_marks": ("list", "owner", "seq", "hash"),
}  # fmt: skip
# Of the device, and not carried.
STAYS: Final = ("commits", "begun", "staged", "jobs", "audit")
# Numbers that the encoding has no room for are carried as text; the column makes numbers of them again.
_LONG: Final = ("mtime_ns",)
# Settings that stay: what proved a share last, which is fetched again, what this home has posted, and what it
# is as one of several devices.
_STAY: Final = ("proof:", "posted", "device_", "peer:")


class CarriedRows:
    """Reads and takes them: ``{table: [row, ...]}``, each row its columns in the order above."""

    def __init__(
        self,
        rows: Callable[..., list[tuple[Any, ...]]],
        transaction: Callable[[], AbstractContextManager[apsw.Connection]],
    ) -> None:
        self._rows = rows
        self._transaction = transaction

    def give(self) -> dict[str, list[list[Any]]]:
        """Return everything that goes along."""
        found: dict[str, list[list[Any]]] = {}
        for table, columns in _TABLES.items():
            rows = self._rows(f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1, 2")  # noqa: S608
            found[table] = [
                [str(value) if name in _LONG else value for name, value in zip(columns, row, strict=True)]
                for row in rows
                if table != "settings" or not row[0].startswith(_STAY)
            ]
        return found

    def changes(self) -> int:
        """Return a number that is another one after every change of this state, as long as it is open."""
        ((count,),) = self._rows("SELECT total_changes()")
        return int(count)

    def merge(self, rows: Mapping[str, Sequence[Sequence[Any]]], gone: Mapping[str, Sequence[Any]]) -> None:
        """Put ``rows`` in, and take those whose first column is in ``gone`` out, by table; all or none.

        For what another device of the same identity has changed. Raises ``invalid_record`` as `take`.
        """
        try:
            with self._transaction() as db:
                for table, found in rows.items():
                    columns = _TABLES[table]
                    places = ",".join("?" * len(columns))
                    put = f"REPLACE INTO {table}({', '.join(columns)}) VALUES ({places})"  # noqa: S608
                    db.executemany(put, found)
                for table, keys in gone.items():
                    key = _TABLES[table][0]
                    db.executemany(f"DELETE FROM {table} WHERE {key} = ?", [(item,) for item in keys])  # noqa: S608
        except MeshkitError as error:
            if error.code != "state_corrupt":
                raise
            raise MeshkitError("invalid_record", "rows that this version cannot take") from None

    def take(self, carried: Any, *, keep: tuple[str, ...] = ()) -> None:
        """Make ``carried`` what is remembered here, all of it or nothing; marks only go up.

        Settings named in ``keep`` stay as they are. Raises ``invalid_record`` if it is not what `give` gave.
        """
        check_carried(carried)
        try:
            with self._transaction() as db:
                for table, columns in _TABLES.items():
                    if table not in ("marks", "list_marks", "settings"):
                        db.execute(f"DELETE FROM {table}")  # noqa: S608
                    rows = [row for row in carried[table] if table != "settings" or row[0] not in keep]
                    places = ",".join("?" * len(columns))
                    insert = f"INSERT INTO {table}({', '.join(columns)}) VALUES ({places})"  # noqa: S608
                    db.executemany(f"{insert} {_RAISE.get(table, '')}", rows)
        except MeshkitError as error:
            if error.code != "state_corrupt":
                raise
            raise MeshkitError("invalid_record", "rows that this version cannot take") from None


# What to do with a row that is there.
_RAISE: Final = {
    "settings": "ON CONFLICT(name) DO UPDATE SET value = excluded.value",
    "list_marks": "ON CONFLICT(list, owner) DO UPDATE SET seq = excluded.seq, hash = excluded.hash "
    "WHERE excluded.seq > seq",
    "marks": "ON CONFLICT(share) DO UPDATE SET "
    "roster_hash = iif(excluded.roster_seq > roster_seq, excluded.roster_hash, roster_hash), "
    "roster_seq = max(excluded.roster_seq, roster_seq), "
    "head_hash = iif(excluded.head_version > head_version, excluded.head_hash, head_hash), "
    "head_version = max(excluded.head_version, head_version)",
}


def check_carried(carried: Any) -> None:
    """Raise ``invalid_record`` if ``carried`` does not have the form of what `CarriedRows.give` gives."""
    if type(carried) is not dict or carried.keys() != _TABLES.keys():
        raise MeshkitError("invalid_record", "not what a state has")
    for table, columns in _TABLES.items():
        rows = carried[table]
        if type(rows) is not list or not all(type(row) is list and len(row) == len(columns) for row in rows):
            raise MeshkitError("invalid_record", f"not rows of {table}")
        for row in rows:
            if not all(type(value) in (bytes, str, int) for value in row):
                raise MeshkitError("invalid_record", f"not values of {table}")
