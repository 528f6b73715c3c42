"""The encrypted state database of one home.

All calls are synchronous and short; a lock makes each of them atomic, so they may run on a worker thread
(those that must be durable do: a commit waits for the disk). The database is SQLite in WAL mode with
``synchronous=FULL`` under SQLite3 Multiple Ciphers' default cipher (ChaCha20-Poly1305 per page), keyed
with 32 bytes that the key vault's wrapping key yields.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from meshkitfs.core.secret_memory import wipe_text
from meshkitfs.errors import MeshkitError
from meshkitfs.state._carried import CarriedRows
from meshkitfs.state._conditions import SCHEMA as CONDITIONS_SCHEMA
from meshkitfs.state._conditions import ConditionRows
from meshkitfs.state._rows import LocalCommit, Mark, Member, Quarantine, ShareRow

__all__ = ["State"]

_SCHEMA_VERSION = 4

_SCHEMA = """
-- One row per thing the mount shows at its top level; columns as in ShareRow.
CREATE TABLE shares(
    ref BLOB PRIMARY KEY, share BLOB NOT NULL, oid BLOB NOT NULL, name BLOB NOT NULL UNIQUE,
    kind INTEGER NOT NULL, grant_kind TEXT NOT NULL, owner_public BLOB NOT NULL, owner_handle TEXT NOT NULL,
    mine INTEGER NOT NULL, mode INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, created INTEGER NOT NULL
) WITHOUT ROWID;
-- High-water marks by share id. Written, and on the disk, before plaintext that they cover is released.
CREATE TABLE marks(
    share BLOB PRIMARY KEY, roster_seq INTEGER NOT NULL, roster_hash BLOB NOT NULL,
    head_version INTEGER NOT NULL, head_hash BLOB NOT NULL
) WITHOUT ROWID;
-- Grants made by this home as owner; columns as in Member. revoked is a time, 0 while it stands.
CREATE TABLE members(
    capsule_id BLOB PRIMARY KEY, share BLOB NOT NULL, handle TEXT NOT NULL, capsule_hash BLOB NOT NULL,
    encryption_kid BLOB NOT NULL, encryption_public BLOB NOT NULL, signing_public BLOB NOT NULL,
    rights TEXT NOT NULL, not_before INTEGER NOT NULL, expires INTEGER NOT NULL, grant_kind TEXT NOT NULL,
    target TEXT NOT NULL, policy TEXT NOT NULL, vault TEXT NOT NULL, capability TEXT NOT NULL,
    blob BLOB NOT NULL, revoked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX members_by_share ON members(share);
-- At most one unpublished tree per share: a newer local commit contains the older one.
CREATE TABLE commits(
    share BLOB PRIMARY KEY, root BLOB NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL,
    base_hash BLOB NOT NULL, base_root BLOB NOT NULL, base_epoch INTEGER NOT NULL,
    base_version INTEGER NOT NULL
) WITHOUT ROWID;
-- Sealed blocks in the spool that a local commit names and the provider does not hold for certain yet.
CREATE TABLE staged(digest BLOB PRIMARY KEY, share BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX staged_by_share ON staged(share);
CREATE TABLE quarantine(
    share BLOB PRIMARY KEY, code TEXT NOT NULL, detail TEXT NOT NULL, since INTEGER NOT NULL
) WITHOUT ROWID;
-- Contacts: a JSON object per handle, in the form identity.contacts gives it.
CREATE TABLE contacts(handle TEXT PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
-- Single values: clock_floor (seconds); proof:REF, the records that proved a share last.
CREATE TABLE settings(name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
"""

# What a database of the version before lacks: _MIGRATIONS[1] makes one of version 1 one of version 2.
_MIGRATIONS = {
    1: """
-- Local commits that a newer one has replaced, but whose publication had begun: they may be public.
CREATE TABLE begun(
    share BLOB NOT NULL, root BLOB NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL,
    base_hash BLOB NOT NULL, base_root BLOB NOT NULL, base_epoch INTEGER NOT NULL,
    base_version INTEGER NOT NULL, PRIMARY KEY(share, version)
) WITHOUT ROWID;
-- What a long job (verify, reencrypt, ...) has done already, so that it can be resumed: items by job.
CREATE TABLE jobs(job TEXT NOT NULL, item BLOB NOT NULL, PRIMARY KEY(job, item)) WITHOUT ROWID;
""",
    2: CONDITIONS_SCHEMA,
    3: """
-- What was opened on this device, or refused; columns as in AuditLine.
CREATE TABLE audit(
    n INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL, share BLOB NOT NULL,
    path BLOB NOT NULL, action TEXT NOT NULL, code TEXT NOT NULL, program TEXT NOT NULL,
    times INTEGER NOT NULL
);
CREATE INDEX audit_by_time ON audit(last);
""",
}

_SHARE_COLUMNS = (
    "ref, share, oid, name, kind, grant_kind, owner_public, owner_handle, mine, mode, mtime_ns, created"
)
_COMMIT_COLUMNS = "share, root, epoch, version, base_hash, base_root, base_epoch, base_version"
_MEMBER_COLUMNS = (
    "share, handle, capsule_id, capsule_hash, encryption_kid, encryption_public, signing_public, rights, "
    "not_before, expires, grant_kind, target, policy, vault, capability, blob, revoked"
)


class State:
    """An open state database; use `State.open`."""

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self._open: apsw.Connection | None = connection
        self._path = path
        self._lock = threading.RLock()
        # What vaults and capabilities need to remember.
        self.conditions = ConditionRows(self._rows, self._transaction)
        # What goes along when the identity moves to another home.
        self.carried = CarriedRows(self._rows, self._transaction)

    def __repr__(self) -> str:
        return "<State>"

    @classmethod
    def open(cls, path: Path, key: bytes, *, create: bool = False) -> State:
        """Open the database at ``path`` with its 32-byte ``key``.

        Raises MeshkitError: ``not_initialized`` if it is not there (and ``create`` is false),
        ``state_corrupt`` if it is damaged or sealed with another key, ``no_space`` if it cannot be made,
        ``home_busy`` if another process holds it.
        """
        if not create and not path.exists():
            raise MeshkitError("not_initialized", f"{path} does not exist")
        flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
        if create:
            # SQLite would create it with the umask's mode; the ciphertext is nobody else's business either.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        db: apsw.Connection | None = None
        try:
            db = apsw.Connection(str(path), flags=flags)
            text = key.hex()
            db.pragma("hexkey", text)
            wipe_text(text)
            db.set_busy_timeout(5000)
            db.pragma("journal_mode", "wal")
            db.pragma("synchronous", "FULL")
            db.pragma("secure_delete", "ON")
            version = db.pragma("user_version")
            if version == 0 and create:
                with db:
                    db.execute(_SCHEMA + "".join(_MIGRATIONS.values()))
                    db.pragma("user_version", _SCHEMA_VERSION)
            elif version in _MIGRATIONS:
                with db:
                    for older in range(version, _SCHEMA_VERSION):
                        db.execute(_MIGRATIONS[older])
                    db.pragma("user_version", _SCHEMA_VERSION)
            elif version != _SCHEMA_VERSION:
                raise MeshkitError(
                    "state_corrupt", f"{path.name} has schema {version}, not {_SCHEMA_VERSION}"
                )
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, apsw.Error):
                raise _classified(error) from error
            raise
        return cls(db, path)

    def close(self) -> None:
        """Close the database, and with it forget its key and every page of it. May be called again.

        From then on everything raises ``identity_locked``, until `reopen`.
        """
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def reopen(self, key: bytes) -> None:
        """Open the database again after `close`. Raises as `open` does."""
        with self._lock:
            if self._open is None:
                self._open = State.open(self._path, key)._open

    @property
    def _db(self) -> apsw.Connection:
        if self._open is None:
            raise MeshkitError("identity_locked", "state.db is closed until the identity is unlocked")
        return self._open

    @contextmanager
    def _transaction(self) -> Iterator[apsw.Connection]:
        """One atomic, durable change. Errors of SQLite become ours here and nowhere else."""
        with self._lock:
            try:
                with self._db:
                    yield self._db
            except apsw.Error as error:
                raise _classified(error) from error

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except apsw.Error as error:
                raise _classified(error) from error

    # -- shares ------------------------------------------------------------------------------------

    def shares(self) -> list[ShareRow]:
        return [_share(row) for row in self._rows(f"SELECT {_SHARE_COLUMNS} FROM shares ORDER BY name")]  # noqa: S608

    def add_share(self, row: ShareRow) -> None:
        """Remember a share. Raises ``share_exists`` if the name or the grant is already here."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM shares WHERE name = ? OR ref = ?", (row.name, row.ref)).fetchall():
                raise MeshkitError("share_exists", row.name.decode(errors="replace"))
            db.execute(
                f"INSERT INTO shares({_SHARE_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",  # noqa: S608
                (
                    row.ref, row.share, row.oid, row.name, row.kind, row.grant, row.owner_public,
                    row.owner_handle, int(row.mine), row.mode, row.mtime_ns, row.created,
                ),
            )  # fmt: skip

    def rename_share(self, ref: bytes, name: bytes) -> None:
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM shares WHERE name = ?", (name,)).fetchall():
                raise MeshkitError("share_exists", name.decode(errors="replace"))
            db.execute("UPDATE shares SET name = ? WHERE ref = ?", (name, ref))

    def remove_share(self, ref: bytes) -> None:
        """Forget a share. Its marks stay, so that a later re-grant cannot be rolled back either."""
        with self._transaction() as db:
            db.execute("DELETE FROM shares WHERE ref = ?", (ref,))
            db.execute("DELETE FROM settings WHERE name = ?", (f"proof:{ref.hex()}",))

    # -- high-water marks ----------------------------------------------------------------------------

    def mark(self, share: bytes) -> Mark:
        rows = self._rows(
            "SELECT roster_seq, roster_hash, head_version, head_hash FROM marks WHERE share = ?", share
        )
        return Mark(*rows[0]) if rows else Mark()

    def raise_mark(self, share: bytes, mark: Mark) -> None:
        """Raise the marks of ``share``, never lower them; durable when it returns."""
        with self._transaction() as db:
            _raise_mark(db, share, mark)

    def forget_mark(self, share: bytes) -> None:
        """Lower the marks to nothing and lift the quarantine: what 'share accept-rollback' does."""
        with self._transaction() as db:
            db.execute("DELETE FROM marks WHERE share = ?", (share,))
            db.execute("DELETE FROM quarantine WHERE share = ?", (share,))

    def quarantine(self, share: bytes) -> Quarantine | None:
        rows = self._rows("SELECT share, code, detail, since FROM quarantine WHERE share = ?", share)
        return Quarantine(*rows[0]) if rows else None

    def set_quarantine(self, row: Quarantine) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO quarantine VALUES (?,?,?,?)",
                (row.share, row.code, row.detail, row.since),
            )

    # -- local commits ---------------------------------------------------------------------------------

    def local_commit(self, share: bytes) -> LocalCommit | None:
        rows = self._rows(f"SELECT {_COMMIT_COLUMNS} FROM commits WHERE share = ?", share)  # noqa: S608
        return LocalCommit(*rows[0]) if rows else None

    def begun_commits(self, share: bytes) -> list[LocalCommit]:
        """Return older local commits of ``share`` that may have been published, oldest first."""
        rows = self._rows(
            f"SELECT {_COMMIT_COLUMNS} FROM begun WHERE share = ? ORDER BY version",  # noqa: S608
            share,
        )
        return [LocalCommit(*row) for row in rows]

    def unpublished(self) -> set[bytes]:
        """Return the ids of the shares that have a local commit waiting."""
        return {row[0] for row in self._rows("SELECT share FROM commits")}

    def record_commit(
        self, commit: LocalCommit, staged: Iterable[tuple[bytes, int]], begun: Iterable[LocalCommit] = ()
    ) -> None:
        """Make ``commit`` the tree of its share on this device, naming its newly spooled (digest, size).

        ``begun`` are all older commits on the same base whose publication has begun.
        """
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO staged VALUES (?,?,?) ON CONFLICT(digest) DO NOTHING",
                [(digest, commit.share, size) for digest, size in staged],
            )
            db.execute("DELETE FROM begun WHERE share = ?", (commit.share,))
            db.executemany("INSERT INTO begun VALUES (?,?,?,?,?,?,?,?)", [_commit_row(old) for old in begun])
            db.execute("INSERT OR REPLACE INTO commits VALUES (?,?,?,?,?,?,?,?)", _commit_row(commit))

    def note_begun(self, commit: LocalCommit) -> None:
        """Note that an older local commit is about to be published."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO begun VALUES (?,?,?,?,?,?,?,?)", _commit_row(commit))

    def published(
        self, share: bytes, mark: Mark, stored: Iterable[bytes], rest: LocalCommit | None = None
    ) -> None:
        """A local commit of ``share`` is public: raise the mark and let its ``stored`` blocks go.

        ``rest`` is a newer one, which stands on it now.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM commits WHERE share = ?", (share,))
            db.execute("DELETE FROM begun WHERE share = ?", (share,))
            if rest is not None:
                db.execute("INSERT INTO commits VALUES (?,?,?,?,?,?,?,?)", _commit_row(rest))
            db.executemany("DELETE FROM staged WHERE digest = ?", [(digest,) for digest in stored])
            _raise_mark(db, share, mark)

    def unstage(self, digests: Iterable[bytes]) -> None:
        """Forget staged blocks that no commit needs any more."""
        with self._transaction() as db:
            db.executemany("DELETE FROM staged WHERE digest = ?", [(digest,) for digest in digests])

    def drop_commit(self, share: bytes) -> None:
        """Forget the local commit and its staged blocks (the share itself was removed)."""
        with self._transaction() as db:
            for table in ("commits", "begun", "staged"):
                db.execute(f"DELETE FROM {table} WHERE share = ?", (share,))  # noqa: S608

    def staged(self, share: bytes) -> list[tuple[bytes, int]]:
        """Return (digest, size in bytes) of the blocks of ``share`` that wait for the provider."""
        return [
            (digest, size)
            for digest, size in self._rows("SELECT digest, size FROM staged WHERE share = ?", share)
        ]

    def waiting(self, share: bytes) -> tuple[int, int]:
        """Return how many blocks of ``share`` wait for the provider, and their bytes."""
        ((blocks, size),) = self._rows("SELECT count(*), total(size) FROM staged WHERE share = ?", share)
        return blocks, int(size)

    def staged_digests(self) -> set[bytes]:
        return {row[0] for row in self._rows("SELECT digest FROM staged")}

    # -- long jobs -------------------------------------------------------------------------------------

    def job_items(self, job: str) -> set[bytes]:
        """Return what a job has done, by its own names for it (bytes)."""
        return {row[0] for row in self._rows("SELECT item FROM jobs WHERE job = ?", job)}

    def add_job_items(self, job: str, items: Iterable[bytes]) -> None:
        """Note that a job has done ``items``; durable when it returns."""
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO jobs VALUES (?,?)", [(job, item) for item in items])

    def end_job(self, job: str) -> None:
        """Forget everything about a job."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE job = ?", (job,))

    # -- members -----------------------------------------------------------------------------------------

    def members(self, share: bytes) -> list[Member]:
        """Return every grant made for ``share``, revoked ones included, oldest first."""
        return [
            _member(row)
            for row in self._rows(
                f"SELECT {_MEMBER_COLUMNS} FROM members WHERE share = ? ORDER BY not_before, capsule_id",  # noqa: S608
                share,
            )
        ]

    def set_members(self, rows: Iterable[Member]) -> None:
        """Insert or replace grants, all or none."""
        with self._transaction() as db:
            for row in rows:
                db.execute(
                    f"INSERT OR REPLACE INTO members({_MEMBER_COLUMNS}) "  # noqa: S608
                    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        row.share, row.handle, row.capsule_id, row.capsule_hash, row.encryption_kid,
                        row.encryption_public, row.signing_public, ",".join(row.rights), row.not_before,
                        row.expires, row.grant, row.target, row.policy, row.vault, row.capability, row.blob,
                        row.revoked,
                    ),
                )  # fmt: skip

    # -- contacts and settings -----------------------------------------------------------------------

    def contact_rows(self) -> list[tuple[str, str]]:
        return [
            (handle, row) for handle, row in self._rows("SELECT handle, row FROM contacts ORDER BY handle")
        ]

    def contact_row(self, handle: str) -> str | None:
        rows = self._rows("SELECT row FROM contacts WHERE handle = ?", handle)
        return str(rows[0][0]) if rows else None

    def set_contact_row(self, handle: str, row: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO contacts VALUES (?,?)", (handle, row))

    def setting(self, name: str) -> Any:
        rows = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return rows[0][0] if rows else None

    def set_setting(self, name: str, value: Any) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?,?)", (name, value))

    def drop_setting(self, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM settings WHERE name = ?", (name,))


def _classified(error: apsw.Error) -> MeshkitError:
    if isinstance(error, apsw.FullError):
        return MeshkitError("no_space", "state.db")
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return MeshkitError("home_busy", "state.db is locked by another program")
    return MeshkitError("state_corrupt", f"state.db: {type(error).__name__}")


def _share(row: tuple[Any, ...]) -> ShareRow:
    values = list(row)
    values[8] = bool(values[8])
    return ShareRow(*values)


def _member(row: tuple[Any, ...]) -> Member:
    values = list(row)
    values[7] = tuple(values[7].split(",")) if values[7] else ()
    return Member(*values)


def _commit_row(commit: LocalCommit) -> tuple[Any, ...]:
    return (
        commit.share, commit.root, commit.epoch, commit.version,
        commit.base_hash, commit.base_root, commit.base_epoch, commit.base_version,
    )  # fmt: skip


def _raise_mark(db: apsw.Connection, share: bytes, mark: Mark) -> None:
    db.execute("INSERT OR IGNORE INTO marks VALUES (?, 0, x'', 0, x'')", (share,))
    db.execute(
        "UPDATE marks SET roster_seq = ?, roster_hash = ? WHERE share = ? AND roster_seq < ?",
        (mark.roster_seq, mark.roster_hash, share, mark.roster_seq),
    )
    db.execute(
        "UPDATE marks SET head_version = ?, head_hash = ? WHERE share = ? AND head_version < ?",
        (mark.head_version, mark.head_hash, share, mark.head_version),
    )
