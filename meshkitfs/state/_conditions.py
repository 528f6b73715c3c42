"""What a device remembers for vaults and capabilities: marks of lists, own lists, tokens held and issued."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import apsw

from meshkitfs.core.membership import ListMark

__all__ = ["SCHEMA", "ConditionRows", "IssuedRow", "OwnList"]

SCHEMA: Final = """
-- The newest record of a vault or revocation list that was seen: by id and owner's key.
CREATE TABLE list_marks(
    list BLOB NOT NULL, owner BLOB NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY(list, owner)
) WITHOUT ROWID;
-- Lists that this home signs: vaults by the name they have here, and one revocation list, named ''.
-- handles: whom a vault's members were added as, a JSON object by the hex of their entries.
CREATE TABLE own_lists(
    name TEXT PRIMARY KEY, list BLOB NOT NULL, record BLOB NOT NULL, handles TEXT NOT NULL
) WITHOUT ROWID;
-- Capability tokens that this identity holds or held: by the hash of their last block.
CREATE TABLE tokens(hash BLOB PRIMARY KEY, token BLOB NOT NULL) WITHOUT ROWID;
-- Tokens that this identity issued, so that they can be revoked. revoked is a time, 0 while it stands.
CREATE TABLE issued(
    id BLOB PRIMARY KEY, name TEXT NOT NULL, handle TEXT NOT NULL, rights TEXT NOT NULL, share BLOB NOT NULL,
    expires INTEGER NOT NULL, revoked INTEGER NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class OwnList:
    """A list of this home's own: its name here (empty: the revocation list), id and newest signed record.

    ``handles`` says whom the members of a vault were added as, by the hex of their entries.
    """

    name: str
    list_id: bytes
    record: bytes
    handles: dict[str, str]


@dataclass(frozen=True, slots=True)
class IssuedRow:
    """A token that was issued here. ``share`` is empty for one that is for any share; times: UNIX seconds."""

    id: bytes
    name: str
    handle: str
    rights: tuple[str, ...]
    share: bytes
    expires: int
    revoked: int


class ConditionRows:
    """A part of `State`, whose reading and transactions it uses. All calls are synchronous and short."""

    def __init__(
        self,
        rows: Callable[..., list[tuple[Any, ...]]],
        transaction: Callable[[], AbstractContextManager[apsw.Connection]],
    ) -> None:
        self._rows = rows
        self._transaction = transaction

    def mark(self, list_id: bytes, owner: bytes) -> ListMark:
        rows = self._rows("SELECT seq, hash FROM list_marks WHERE list = ? AND owner = ?", list_id, owner)
        return ListMark(*rows[0]) if rows else ListMark()

    def raise_mark(self, list_id: bytes, owner: bytes, mark: ListMark) -> None:
        """Raise the mark of a list, never lower it; durable when it returns."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO list_marks VALUES (?,?,?,?) ON CONFLICT(list, owner) DO UPDATE "
                "SET seq = excluded.seq, hash = excluded.hash WHERE excluded.seq > seq",
                (list_id, owner, mark.seq, mark.hash),
            )

    def own_lists(self) -> list[OwnList]:
        rows = self._rows("SELECT name, list, record, handles FROM own_lists ORDER BY name")
        return [OwnList(name, list_id, record, json.loads(text)) for name, list_id, record, text in rows]

    def own_list(self, name: str) -> OwnList | None:
        return next((row for row in self.own_lists() if row.name == name), None)

    def set_own_list(self, row: OwnList) -> None:
        with self._transaction() as db:
            values = (row.name, row.list_id, row.record, json.dumps(row.handles))
            db.execute("INSERT OR REPLACE INTO own_lists VALUES (?,?,?,?)", values)

    def drop_own_list(self, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM own_lists WHERE name = ?", (name,))

    def tokens(self) -> list[bytes]:
        """Return the tokens that are held, as bytes."""
        return [row[0] for row in self._rows("SELECT token FROM tokens ORDER BY hash")]

    def add_token(self, digest: bytes, token: bytes) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO tokens VALUES (?,?)", (digest, token))

    def drop_token(self, digest: bytes) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM tokens WHERE hash = ?", (digest,))

    def issued(self) -> list[IssuedRow]:
        rows = self._rows("SELECT id, name, handle, rights, share, expires, revoked FROM issued ORDER BY id")
        return [
            IssuedRow(token_id, name, handle, tuple(rights.split(",")), share, expires, revoked)
            for token_id, name, handle, rights, share, expires, revoked in rows
        ]

    def set_issued(self, row: IssuedRow) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO issued VALUES (?,?,?,?,?,?,?)",
                (row.id, row.name, row.handle, ",".join(row.rights), row.share, row.expires, row.revoked),
            )
