"""What the queries of a metadata home need of a database: the same few calls over SQLite and PostgreSQL.

Queries are written once, in the SQL that both understand, with ``?`` for each value. A `Connection` is good
for one transaction. Work that is given to `Database.write` may be run again when the outcome of its commit is
not known or another transaction came in between, so repeating it must do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

__all__ = ["Connection", "Database", "Heard", "Row", "row", "value"]

Row = tuple[Any, ...]
T = TypeVar("T")
# Called from any thread with the subject that has changed, or None: it may have been any.
Heard = Callable[[bytes | None], None]


class Connection(Protocol):
    """One transaction of a database."""

    def rows(self, query: str, *values: object) -> list[Row]:
        """Run a query and return all its rows (none for a statement without RETURNING)."""

    def run(self, query: str, *values: object) -> int:
        """Run a statement and return how many rows it has changed."""

    def lock(self, kind: str, key: bytes) -> None:
        """Keep every other transaction that wants this lock waiting until this one has ended."""

    def announce(self, subject: bytes) -> None:
        """Tell all who listen, once the transaction is committed, that this subject has changed."""


class Database(Protocol):
    """A database of metadata. `read` and `write` are for worker threads; both have a deadline.

    Failures are `MeshkitError`: metadata_unavailable, no_space; what the work raises passes through, and
    undoes the transaction.
    """

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run queries that see one moment of the store."""

    def write(self, work: Callable[[Connection], T], *, durable: bool = True) -> T:
        """Run reads and writes as one transaction. Not ``durable``: a power cut may undo it afterwards."""

    def tick(self) -> int:
        """See `Metadata.tick`."""

    def listen(self, heard: Heard) -> Callable[[], None]:
        """Call ``heard`` on every announcement, of other processes too, until the result is called."""

    def close(self) -> None:
        """Let go of everything. Harmless when repeated."""


def row(db: Connection, query: str, *values: object) -> Row | None:
    """The first row of a query, None when there is none."""
    found = db.rows(query, *values)
    return found[0] if found else None


def value(db: Connection, query: str, *values: object) -> Any:
    """The first value of the first row, None when there is none."""
    found = db.rows(query, *values)
    return found[0][0] if found else None
