"""A PostgreSQL database of metadata: connections, transactions, deadlines, announcements.

Transactions that write lock what they are about (`Connection.lock`), so that comparing and setting holds
between processes and machines. Every statement, every wait for a connection and every wait for the server's
answer has a deadline, also when the server has stopped and says nothing. A transaction that lost its
connection is run again: all work is repeatable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _queries, _schema
from meshkitfs.metadata._connection import Connection, Heard, Row

__all__ = ["PostgresDatabase"]

_CHANNEL: Final = "meshkitfs"
_MIGRATION_LOCK: Final = 0x4D4B6D64
_PAUSE: Final = 0.02  # seconds before a transaction is run again, times the number of tries
_LISTEN_SECONDS: Final = 5.0  # of silence, after which the listener asks whether the server is there

T = TypeVar("T")
R = TypeVar("R")


class _Timeout(psycopg.OperationalError):
    """The server did not answer in time."""


class _Bounded(psycopg.Connection[Row]):
    """A connection that does not wait for the server longer than until ``deadline`` (monotonic)."""

    deadline: float = float("inf")

    def wait(self, gen: PQGen[R], interval: float = 0.1, timeout: float | None = None) -> R:
        left = self.deadline - time.monotonic()
        if (timeout is not None and timeout <= left) or left == float("inf"):
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, max(0.0, left))
        except psycopg.OperationalError:
            if time.monotonic() < self.deadline:
                raise
            self.pgconn.finish()  # whatever it was about to say belongs to nobody
            raise _Timeout("the database did not answer in time") from None


class PostgresDatabase:
    """The connections of one process to one database.

    ``conninfo`` is what libpq understands (a URL or ``key=value`` words); a password belongs into a file that
    ``passfile`` in it names, or into the environment. ``seconds`` is how long one transaction may take
    altogether. Raises metadata_unavailable when the database cannot be reached, is not durable, or was made
    by a newer version.
    """

    def __init__(self, conninfo: str, *, connections: int, seconds: float) -> None:
        self._seconds = seconds
        milliseconds = int(seconds * 1000)
        settings = (
            f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} "
            f"-c idle_in_transaction_session_timeout={milliseconds * 2}"
        )
        wait = {"connect_timeout": max(2, int(seconds)), "tcp_user_timeout": milliseconds}
        try:
            given = psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.Error:
            raise MeshkitError("invalid_config", "the address of the database is not understood") from None
        given["options"] = f"{given.get('options') or ''} {settings}".strip()
        self._given: dict[str, Any] = given | wait | {"application_name": "meshkitfs", "autocommit": True}
        try:
            with _classified():
                self._prepare()
        except _TryAgainError as error:
            raise _unavailable(error.detail) from None
        self._pool = ConnectionPool(
            kwargs=self._given,
            connection_class=_Bounded,
            min_size=1,
            max_size=connections,
            timeout=seconds,
            reconnect_timeout=1.0,  # then whoever needs a connection has it tried again
            open=True,
            name="metadata",
        )
        self._listener = _Listener(self._given, seconds)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run queries that see one moment of the store."""
        return self._run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", work)

    def write(self, work: Callable[[Connection], T], *, durable: bool = True) -> T:
        """Run reads and writes as one transaction, again if its connection was lost meanwhile."""
        begin = "BEGIN" if durable else "BEGIN; SET LOCAL synchronous_commit = off"
        return self._run(begin, work)

    def tick(self) -> int:
        """A number that differs from the last one whenever something was announced. Never waits."""
        return self._listener.tick()

    def listen(self, heard: Heard) -> Callable[[], None]:
        """Call ``heard`` with the subject of every announcement of any process."""
        return self._listener.add(heard)

    def close(self) -> None:
        """Close all connections. Harmless when repeated."""
        self._listener.stop()
        self._pool.close(timeout=1)

    def _run(self, begin: str, work: Callable[[Connection], T]) -> T:
        deadline = time.monotonic() + self._seconds
        tries = 0
        while True:
            tries += 1
            try:
                with _classified():
                    return self._once(begin, work, deadline)
            except _TryAgainError as again:
                if time.monotonic() + _PAUSE * tries >= deadline:
                    raise MeshkitError("metadata_unavailable", again.detail) from None
                time.sleep(_PAUSE * tries)

    def _once(self, begin: str, work: Callable[[Connection], T], deadline: float) -> T:
        connection = self._pool.getconn(timeout=max(0.001, deadline - time.monotonic()))
        try:
            connection.deadline = deadline
            transaction = _Transaction(connection)
            connection.execute(begin)
            try:
                result = work(transaction)
                if transaction.announced:
                    _queries.settle(transaction, transaction.announced)
                for subject in transaction.announced:
                    text = f"{self._listener.name}{subject.hex()}"
                    connection.execute("SELECT pg_notify(%s, %s)", (_CHANNEL, text))
                connection.execute("COMMIT")
            except BaseException:
                if not connection.closed:
                    with contextlib.suppress(psycopg.Error):
                        connection.execute("ROLLBACK")
                raise
        finally:
            connection.deadline = float("inf")
            self._pool.putconn(connection)
        self._listener.said(transaction.announced)
        return result

    def _prepare(self) -> None:
        """Make the tables or bring them up to date: whoever comes first does, the others wait for it."""
        with _Bounded.connect(**self._given) as connection:
            connection.deadline = time.monotonic() + max(30.0, self._seconds)
            for name in ("fsync", "synchronous_commit", "full_page_writes"):
                setting = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
                if setting == ("off",):
                    raise MeshkitError("metadata_unavailable", f"the database is not durable: {name} is off")
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
                _migrate(_Transaction(connection))


def _migrate(db: _Transaction) -> None:
    query = "SELECT 1 FROM pg_catalog.pg_tables WHERE tablename = ? AND schemaname = current_schema()"
    if not db.rows(query, "schema_version"):
        if db.rows(query, "rosters"):
            raise MeshkitError("metadata_unavailable", "the database holds tables of something else")
        db.script(_schema.for_postgresql(_schema.SCHEMA))
        db.run("INSERT INTO service (seed) VALUES (?)", os.urandom(32))
        db.run("CREATE TABLE schema_version (version BIGINT NOT NULL)")
        db.run("INSERT INTO schema_version (version) VALUES (?)", _schema.VERSION)
    ((version,),) = db.rows("SELECT version FROM schema_version FOR UPDATE")
    while version in _schema.MIGRATIONS:
        db.script(_schema.for_postgresql(_schema.MIGRATIONS[version]))
        if version in _queries.COMPLETE:
            _queries.COMPLETE[version](db)
        version += 1
        db.run("UPDATE schema_version SET version = ?", version)
    if version != _schema.VERSION:
        detail = f"the database has format {version}; this program knows {_schema.VERSION}"
        raise MeshkitError("metadata_unavailable", detail)


class _Transaction:
    """One transaction, as the queries want it."""

    def __init__(self, connection: _Bounded) -> None:
        self._connection = connection
        self.announced: list[bytes] = []

    def rows(self, query: str, *values: object) -> list[Row]:
        """Run a query and return all its rows."""
        cursor = self._connection.execute(_placeholders(query), values)
        return cursor.fetchall() if cursor.description else []

    def run(self, query: str, *values: object) -> int:
        """Run a statement and return how many rows it has changed."""
        return max(0, self._connection.execute(_placeholders(query), values).rowcount)

    def script(self, statements: str) -> None:
        """Run several statements that take no values."""
        self._connection.execute(cast(Any, statements))

    def lock(self, kind: str, key: bytes) -> None:
        """Wait until no other transaction holds this lock, and hold it to the end."""
        digest = hashlib.sha256(kind.encode() + b"\0" + key).digest()
        number = int.from_bytes(digest[:8], "big", signed=True)
        self._connection.execute("SELECT pg_advisory_xact_lock(%s)", (number,))

    def announce(self, subject: bytes) -> None:
        """Have it sent with the commit, once."""
        if subject not in self.announced:
            self.announced.append(subject)


class _Listener:
    """A thread that hears what other processes announce, over a connection of its own."""

    def __init__(self, given: dict[str, Any], seconds: float) -> None:
        self.name = os.urandom(8).hex()
        self._given = given
        self._seconds = seconds
        self._tick = 0
        self._lock = threading.Lock()
        self._hearers: list[Heard] = []
        self._stopping = threading.Event()
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="metadata-listen")
        self._thread.start()
        self._connected.wait(seconds)  # what is announced from now on is heard

    def tick(self) -> int:
        with self._lock:
            if not self._connected.is_set() or self._stopping.is_set():
                self._tick += 1
            return self._tick

    def add(self, heard: Heard) -> Callable[[], None]:
        with self._lock:
            self._hearers.append(heard)

        def remove() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._hearers.remove(heard)

        return remove

    def said(self, subjects: list[bytes]) -> None:
        """This process has announced something itself."""
        for subject in subjects:
            self._tell(subject)

    def stop(self) -> None:
        self._stopping.set()  # it ends within half a second; there is nothing to wait for

    def _tell(self, subject: bytes | None) -> None:
        with self._lock:
            self._tick += 1
            hearers = list(self._hearers)
        for heard in hearers:
            heard(subject)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with _Bounded.connect(**self._given) as connection:
                    connection.execute(f"LISTEN {_CHANNEL}")
                    self._connected.set()
                    self._tell(None)  # what was announced while nobody listened
                    self._hear(connection)
            except (psycopg.Error, OSError):
                self._connected.clear()
                self._tell(None)
                self._stopping.wait(0.5)

    def _hear(self, connection: _Bounded) -> None:
        asked = time.monotonic()
        while not self._stopping.is_set():
            for notice in connection.notifies(timeout=0.5):
                if not notice.payload.startswith(self.name):
                    self._tell(_subject(notice.payload[len(self.name) :]))
            if time.monotonic() > asked + _LISTEN_SECONDS:
                connection.deadline = time.monotonic() + self._seconds
                connection.execute("SELECT 1")
                connection.deadline = float("inf")
                asked = time.monotonic()


def _subject(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=512)
def _placeholders(query: str) -> Any:
    return query.replace("?", "%s")


class _TryAgainError(Exception):
    """The transaction may or may not have taken place, or met another one: run it again."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(detail)


@contextlib.contextmanager
def _classified() -> Iterator[None]:
    """Turn what PostgreSQL says into `MeshkitError`, or `_TryAgainError`. Its texts may hold values."""
    try:
        yield
    except (errors.DiskFull, errors.OutOfMemory):
        raise MeshkitError("no_space", "the database of the metadata store is full") from None
    except (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation) as error:
        raise _TryAgainError(f"others write at the same time ({type(error).__name__})") from None
    except (errors.QueryCanceled, errors.LockNotAvailable, errors.IdleInTransactionSessionTimeout):
        raise _unavailable("the database was busy with others for too long") from None
    except (PoolTimeout, PoolClosed):
        raise _unavailable("there is no connection to the database") from None
    except _Timeout as error:
        raise _unavailable(str(error)) from None
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise _TryAgainError(f"the connection to the database was lost ({_name(error)})") from None
    except psycopg.Error as error:
        raise _unavailable(f"the database refused ({_name(error)})") from None


def _name(error: psycopg.Error) -> str:
    return f"{type(error).__name__} {error.sqlstate or ''}".strip()


def _unavailable(detail: str) -> MeshkitError:
    return MeshkitError("metadata_unavailable", detail)
