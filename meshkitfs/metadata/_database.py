"""The SQLite file of a metadata home: how it is made, opened, shared and given up.

Several processes of several UNIX users use one file at the same time. It is in WAL mode with
synchronous=FULL, so what was committed survives kill -9 and power loss; waiting for another writer has a
deadline. All SQLite errors leave here as ``metadata_unavailable`` (or ``no_space``).
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import apsw

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _queries, _schema
from meshkitfs.metadata._connection import Connection, Heard, Row

__all__ = ["Database", "SqliteConnection", "create_file"]

_CREATE_WAIT_SECONDS: Final = 10.0
_WATCH_SECONDS: Final = 0.2  # between two looks for changes that other processes have made

T = TypeVar("T")


class Database:
    """The connections of one process to the file: one reads, one writes, one only looks for changes.

    `read` and `write` are for worker threads; `tick` is for the event loop. Raises metadata_unavailable
    when the file is missing, is not a metadata store, or was written by a newer version.
    """

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self.path = path
        self._busy_seconds = busy_seconds
        self._epoch = 0
        self._hasty: _Link | None = None
        self._opening = threading.Lock()
        self._closed = threading.Event()
        with _classified():
            self._writer = _Link(path, busy_seconds)
            try:
                self._reader = _Link(path, busy_seconds)
                self._ticker = _Link(path, 0)
            except BaseException:
                self.close()
                raise

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run queries that see one moment of the store."""
        return self._run(self._reader, "BEGIN", work)

    def write(self, work: Callable[[Connection], T], *, durable: bool = True) -> T:
        """Run reads and writes as one transaction, alone; an exception undoes it.

        What is not ``durable`` survives kill -9, but is not waited for until it is on the disk.
        """
        return self._run(self._writer if durable else self._hurried(), "BEGIN IMMEDIATE", work)

    def tick(self) -> int:
        """A number that differs from the last one whenever the file may have changed. Never waits."""
        if self._ticker.lock.acquire(blocking=False):
            try:
                if not self._ticker.is_stale():
                    version: int = self._ticker.connection.execute("PRAGMA data_version").get
                    return (self._epoch << 32) + version
            except (OSError, apsw.Error, MeshkitError):
                pass  # gone, locked or damaged: the caller asks properly and is told which
            finally:
                self._ticker.lock.release()
        self._epoch += 1
        return self._epoch << 32

    def listen(self, heard: Heard) -> Callable[[], None]:
        """Call ``heard(None)`` soon (a quarter of a second) after every announcement, until told to stop.

        The thread that looks ends with it, and with `close`.
        """
        stop = threading.Event()
        threading.Thread(target=self._watch, args=(heard, stop), daemon=True, name="metadata-watch").start()
        return stop.set

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        self._closed.set()
        for name in ("_ticker", "_reader", "_writer", "_hasty"):
            link: _Link | None = getattr(self, name, None)
            if link is not None:
                with link.lock:
                    link.close()

    def _hurried(self) -> _Link:
        with self._opening, _classified():
            if self._hasty is None:
                self._hasty = _Link(self.path, self._busy_seconds, synchronous="NORMAL")
                # Writers of one process take turns here: SQLite would have them sleep and try again.
                self._hasty.lock = self._writer.lock
            return self._hasty

    def _watch(self, heard: Heard, stop: threading.Event) -> None:
        tick, announced = -1, -1
        while not stop.is_set() and not self._closed.is_set():
            now = self.tick()
            if now != tick:
                tick = now
                try:
                    newest = self.read(lambda db: _queries.changed(db, _queries.EVERYTHING))
                except MeshkitError:
                    newest = -2  # not known: they look for themselves, and meet the error
                if newest != announced:
                    announced = newest
                    heard(None)
            stop.wait(_WATCH_SECONDS)

    def _run(self, link: _Link, begin: str, work: Callable[[Connection], T]) -> T:
        with _acquired(link.lock, self._busy_seconds), _classified():
            if link.is_stale():
                link.reopen()
            with self._ticker.lock:
                if self._ticker.is_stale():
                    self._ticker.reopen()
                    self._epoch += 1
            return in_transaction(link.connection, begin, lambda db: _settled(SqliteConnection(db), work))


def _settled(db: SqliteConnection, work: Callable[[Connection], T]) -> T:
    result = work(db)
    if db.announced:
        _queries.settle(db, db.announced)
    return result


class SqliteConnection:
    """One transaction of the file, as the queries want it. Writers are alone, so there is nothing to lock."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.announced: list[bytes] = []

    def rows(self, query: str, *values: object) -> list[Row]:
        """Run a query and return all its rows."""
        return list(self._connection.execute(query, values))

    def run(self, query: str, *values: object) -> int:
        """Run a statement and return how many rows it has changed."""
        self._connection.execute(query, values).fetchall()
        return self._connection.changes()

    def lock(self, kind: str, key: bytes) -> None:
        """Nothing to do."""

    def announce(self, subject: bytes) -> None:
        """Have it numbered with the commit: whoever looks at the file sees it."""
        if subject not in self.announced:
            self.announced.append(subject)


class _Link:
    """One connection. It notices that the file was removed or replaced; SQLite goes on with the old one."""

    def __init__(self, path: Path, busy_seconds: float, *, synchronous: str = "FULL") -> None:
        self.lock = threading.Lock()
        self._path = path
        self._busy_seconds = busy_seconds
        self._synchronous = synchronous
        self._closed = False
        self._open()

    def is_stale(self) -> bool:
        """Whether another file stands at the path now. Raises OSError when none does."""
        if self._closed:
            raise _unavailable("the metadata store is closed")
        return _file_id(self._path) != self._file_id

    def reopen(self) -> None:
        """Go over to the file that stands at the path now. Raises OSError, apsw.Error."""
        self._file_id = (0, 0)  # stays stale until a file was really opened
        self.connection.close()
        self._open()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(apsw.Error):
            self.connection.close()

    def _open(self) -> None:
        # Taken before opening: a file exchanged in between is noticed at the next use.
        file_id = _file_id(self._path)
        self.connection = connect(self._path, self._busy_seconds)
        try:
            migrate(self.connection)
            check_format(self.connection, self._path)
            self.connection.execute("PRAGMA journal_mode = WAL").fetchall()
            self.connection.execute(f"PRAGMA synchronous = {self._synchronous}").fetchall()
        except BaseException:
            self.connection.close()
            raise
        self._file_id = file_id


def create_file(path: Path) -> None:
    """Make the file with its schema unless it is there; the permissions follow the directory's.

    Two processes may do this at once: the schema is made in one transaction by whoever comes first.
    Raises metadata_unavailable, also when the file is something else.
    """
    with _classified():
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.parent.stat().st_mode) & 0o666
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                os.fchmod(fd, mode)  # SQLite gives the files beside it the same mode and group
            finally:
                os.close(fd)
        connection = connect(path, _CREATE_WAIT_SECONDS)
        try:
            if not _is_empty(connection):
                migrate(connection)
                check_format(connection, path)  # before anything of a stranger's database is changed
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            in_transaction(connection, "BEGIN IMMEDIATE", _make_schema)
            check_format(connection, path)
        finally:
            connection.close()
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def connect(path: Path, busy_seconds: float) -> apsw.Connection:
    """Open an existing file, never making one. Raises apsw.Error."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.set_busy_timeout(int(busy_seconds * 1000))
    # The file is shared: what others put into its schema must not run in this process.
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0)
    connection.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
    connection.execute("PRAGMA synchronous = FULL").fetchall()
    return connection


def migrate(connection: apsw.Connection) -> None:
    """Bring a metadata store of an older version to the one known here; leave everything else alone."""
    if connection.execute("PRAGMA application_id").get != _schema.APPLICATION_ID:
        return
    if connection.execute("PRAGMA user_version").get in _schema.MIGRATIONS:
        in_transaction(connection, "BEGIN IMMEDIATE", _migrate)


def check_format(connection: apsw.Connection, path: Path) -> None:
    """Refuse a file that is not a metadata store of a version known here. Raises metadata_unavailable."""
    if connection.execute("PRAGMA application_id").get != _schema.APPLICATION_ID:
        raise _unavailable(f"{path} is not a meshkitfs metadata store")
    version = connection.execute("PRAGMA user_version").get
    if version != _schema.VERSION:
        raise _unavailable(f"{path} has format {version}; this program knows {_schema.VERSION}")


def in_transaction(connection: apsw.Connection, begin: str, work: Callable[[apsw.Connection], T]) -> T:
    """Run ``work`` between BEGIN and COMMIT; any exception rolls back. Raises apsw.Error."""
    connection.execute(begin)
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _make_schema(connection: apsw.Connection) -> None:
    if _is_empty(connection):
        connection.execute(_schema.SCHEMA).fetchall()
        connection.execute("INSERT INTO service (seed) VALUES (?)", (os.urandom(32),))
        connection.execute(f"PRAGMA application_id = {_schema.APPLICATION_ID}").fetchall()
        connection.execute(f"PRAGMA user_version = {_schema.VERSION}").fetchall()


def _migrate(connection: apsw.Connection) -> None:
    # Looked at again inside the transaction: another process may have done it meanwhile.
    while (version := connection.execute("PRAGMA user_version").get) in _schema.MIGRATIONS:
        connection.execute(_schema.MIGRATIONS[version]).fetchall()
        if version in _queries.COMPLETE:
            _queries.COMPLETE[version](SqliteConnection(connection))
        connection.execute(f"PRAGMA user_version = {version + 1}").fetchall()


def _is_empty(connection: apsw.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_schema").get == 0)


def _file_id(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _acquired(lock: threading.Lock, seconds: float) -> Iterator[None]:
    if not lock.acquire(timeout=seconds):
        raise _unavailable("the metadata store is busy")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _classified() -> Iterator[None]:
    """Turn what SQLite and the filesystem say into `MeshkitError`."""
    try:
        yield
    except apsw.FullError as error:
        raise MeshkitError("no_space", f"metadata store: {error}") from None
    except apsw.BusyError:
        raise _unavailable("another process kept the metadata store locked for too long") from None
    except apsw.Error as error:
        raise _unavailable(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        raise _unavailable(f"{error.filename or 'metadata store'}: {error.strerror}") from None


def _unavailable(detail: str) -> MeshkitError:
    return MeshkitError("metadata_unavailable", detail)
