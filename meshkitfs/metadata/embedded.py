"""The embedded metadata home: one SQLite file that the homes of one machine share by path."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import apsw
import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.core.records import Roster, Timestamp
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _rules
from meshkitfs.metadata._api import Publication, ShareState
from meshkitfs.metadata._database import Database, create_file
from meshkitfs.metadata._rules import Standing

__all__ = ["EmbeddedMetadata"]

TIMESTAMP_SECONDS: Final = 300
MAX_LETTER: Final = 256 << 10  # bytes
MAX_LETTERS: Final = 1000  # waiting in one mailbox
_BUSY_SECONDS: Final = 5.0

# Short work that takes turns at a lock anyway. One for each run of trio, as trio's own: a thread abandoned
# by one run never gives back its place.
_THREADS: Final = 4
_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("embedded_metadata_threads")

T = TypeVar("T")


class EmbeddedMetadata:
    """Metadata in a SQLite file, for one or several homes (and UNIX users) of one machine.

    The key that signs timestamps is in the file. So everybody who may write the file can also vouch for
    the freshness of an old roster: a member who can stop the owner's revocation from being seen. That is
    the accepted risk of a home without a service; it lets nobody forge a roster, capsule or head.

    ``clock`` gives the seconds since the epoch that go into timestamps; ``busy_seconds`` is how long to
    wait for another process's write before answering metadata_unavailable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = _BUSY_SECONDS,
    ) -> None:
        """Open an existing file; raises metadata_unavailable when there is none, and never makes one."""
        self.path = Path(os.path.abspath(path))
        self._clock = clock
        self._database = Database(self.path, busy_seconds)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = _BUSY_SECONDS,
    ) -> EmbeddedMetadata:
        """Make the file unless it is there, then open it; its permissions follow the directory's."""
        create_file(Path(os.path.abspath(path)))
        return cls(path, clock=clock, busy_seconds=busy_seconds)

    # -- shares ----------------------------------------------------------------------------------------

    async def service_key(self) -> bytes:
        """The public key of the timestamps this file's users sign."""
        return await self._read(lambda db: _service(db).public)

    async def share_state(self, share: bytes, kid: bytes) -> ShareState:
        """Capsules, roster, timestamp and head of one moment, in one trip."""

        def work(db: apsw.Connection) -> ShareState:
            roster = _newest_roster(db, share)
            return ShareState(
                tuple(_capsules(db, share, kid)),
                roster,
                self._vouch(db, share, roster),
                _newest_head(db, share),
            )

        return await self._read(work)

    async def capsules(self, share: bytes, kid: bytes) -> list[bytes]:
        """All capsules of the share for this recipient, oldest first."""
        return await self._read(lambda db: _capsules(db, share, kid))

    async def roster(self, share: bytes) -> bytes | None:
        """The newest roster."""
        return await self._read(lambda db: _newest_roster(db, share))

    async def timestamp(self, share: bytes) -> bytes | None:
        """A timestamp over the newest roster, signed now and good for 300 s."""
        return await self._read(lambda db: self._vouch(db, share, _newest_roster(db, share)))

    async def head(self, share: bytes) -> bytes | None:
        """The newest head."""
        return await self._read(lambda db: _newest_head(db, share))

    async def heads(self, share: bytes, after_ver: int, upto_ver: int) -> list[bytes]:
        """The heads with ``after_ver < ver <= upto_ver``, oldest first."""
        query = "SELECT blob FROM heads WHERE share = ? AND ver > ? AND ver <= ? ORDER BY ver"
        return await self._read(
            lambda db: [row[0] for row in db.execute(query, (share, after_ver, upto_ver))]
        )

    async def retention(self, share: bytes) -> bytes | None:
        """The newest retention record."""
        return await self._read(lambda db: _retention(db, share))

    async def retain(self, share: bytes, record: bytes) -> None:
        """Replace the retention record; see `Metadata.retain` for what is refused."""
        await self._write(lambda db: _retain(db, share, record))

    async def publish(self, publication: Publication) -> None:
        """Apply a publication as one transaction; see `Metadata.publish` for what is refused."""
        await self._write(lambda db: _publish(db, publication))

    # -- letters ---------------------------------------------------------------------------------------

    async def post_letter(self, to_kid: bytes, blob: bytes) -> bytes:
        """Put a letter into a mailbox. Raises invalid_argument (too large), no_space (mailbox full)."""
        if not 0 < len(blob) <= MAX_LETTER:
            raise MeshkitError("invalid_argument", f"a letter has 1 to {MAX_LETTER} bytes, not {len(blob)}")

        def work(db: apsw.Connection) -> bytes:
            if db.execute("SELECT count(*) FROM letters WHERE kid = ?", (to_kid,)).get >= MAX_LETTERS:
                raise MeshkitError("no_space", f"{MAX_LETTERS} letters are waiting in that mailbox")
            letter_id = os.urandom(16)
            db.execute("INSERT INTO letters (kid, id, blob) VALUES (?, ?, ?)", (to_kid, letter_id, blob))
            return letter_id

        return await self._write(work)

    async def letters(self, kid: bytes) -> list[tuple[bytes, bytes]]:
        """The letters in a mailbox as (id, blob), oldest first."""
        query = "SELECT id, blob FROM letters WHERE kid = ? ORDER BY n"
        return await self._read(lambda db: [(row[0], row[1]) for row in db.execute(query, (kid,))])

    async def delete_letter(self, kid: bytes, letter_id: bytes) -> None:
        """Remove a letter from a mailbox."""
        query = "DELETE FROM letters WHERE kid = ? AND id = ?"
        await self._write(lambda db: _do(db, query, (kid, letter_id)))

    # -- the identity directory ------------------------------------------------------------------------

    async def publish_identity(self, handle: str, record: bytes) -> None:
        """Publish an identity record. Raises identity_handle_taken, invalid_record."""
        await self._write(lambda db: _publish_identity(db, handle, record))

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of records of a handle, oldest first."""
        return await self._read(lambda db: _chain(db, handle))

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        """The chain in which a signing key of that kid occurs, oldest first."""

        def work(db: apsw.Connection) -> list[bytes]:
            handle = db.execute("SELECT handle FROM identity_keys WHERE kid = ?", (kid,)).get
            return [] if handle is None else _chain(db, handle)

        return await self._read(work)

    # -- the rest --------------------------------------------------------------------------------------

    def tick(self) -> int:
        """A number that changes whenever the file may have changed; about 4 microseconds."""
        return self._database.tick()

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        self._database.close()

    async def _read(self, work: Callable[[apsw.Connection], T]) -> T:
        # An abandoned read changes nothing; its thread ends by itself.
        return await trio.to_thread.run_sync(
            self._database.read, work, abandon_on_cancel=True, limiter=_threads()
        )

    async def _write(self, work: Callable[[apsw.Connection], T]) -> T:
        # Never abandoned: the caller must learn whether the transaction took place.
        return await trio.to_thread.run_sync(self._database.write, work, limiter=_threads())

    def _vouch(self, db: apsw.Connection, share: bytes, roster: bytes | None) -> bytes | None:
        if roster is None:
            return None
        now = int(self._clock())
        record = Timestamp(share=share, roster=record_hash(roster), iat=now, exp=now + TIMESTAMP_SECONDS)
        return record.sign(_service(db))


def _threads() -> trio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
        return limiter


def _service(db: apsw.Connection) -> SigningKey:
    seed = db.execute("SELECT seed FROM service").get
    if not isinstance(seed, bytes) or len(seed) != 32:
        raise MeshkitError("metadata_unavailable", "the metadata store has lost the key of its timestamps")
    return SigningKey.from_seed(seed)


def _newest_roster(db: apsw.Connection, share: bytes) -> bytes | None:
    return _blob(db, "SELECT blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1", share)


def _newest_head(db: apsw.Connection, share: bytes) -> bytes | None:
    return _blob(db, "SELECT blob FROM heads WHERE share = ? ORDER BY ver DESC LIMIT 1", share)


def _retention(db: apsw.Connection, share: bytes) -> bytes | None:
    return _blob(db, "SELECT blob FROM retentions WHERE share = ?", share)


def _retain(db: apsw.Connection, share: bytes, blob: bytes) -> None:
    old = _retention(db, share)
    if old == blob:
        return
    record = _rules.check_retention(share, blob, old, _standing(db, share))
    db.execute(
        "INSERT OR REPLACE INTO retentions (share, seq, blob) VALUES (?, ?, ?)", (share, record.seq, blob)
    )


def _blob(db: apsw.Connection, query: str, share: bytes) -> bytes | None:
    value: bytes | None = db.execute(query, (share,)).get
    return value


def _capsules(db: apsw.Connection, share: bytes, kid: bytes) -> list[bytes]:
    query = "SELECT blob FROM capsules WHERE share = ? AND kid = ? ORDER BY n"
    return [row[0] for row in db.execute(query, (share, kid))]


def _chain(db: apsw.Connection, handle: str) -> list[bytes]:
    return [
        row[0] for row in db.execute("SELECT blob FROM identities WHERE handle = ? ORDER BY n", (handle,))
    ]


def _do(db: apsw.Connection, query: str, values: tuple[object, ...]) -> None:
    db.execute(query, values)


def _standing(db: apsw.Connection, share: bytes) -> Standing:
    query = "SELECT owner, blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1"
    row = db.execute(query, (share,)).fetchone()
    owner, roster = (b"", None) if row is None else (row[0], Roster.parse(row[1], {kid_of(row[0]): row[0]}))
    query = "SELECT ver, hash FROM heads WHERE share = ? ORDER BY ver DESC LIMIT 1"
    ver, head_hash = db.execute(query, (share,)).fetchone() or (0, b"")
    return Standing(owner, roster, ver, head_hash)


def _publish(db: apsw.Connection, publication: Publication) -> None:
    if _in_force(db, publication):
        return
    standing = _standing(db, publication.share)
    _rules.check_expectations(publication, standing)
    owner, roster = standing.owner, standing.roster
    if publication.roster is not None:
        owner, roster = _rules.check_roster(publication, publication.roster, standing)
        db.execute(
            "INSERT INTO rosters (share, seq, owner, hash, blob) VALUES (?, ?, ?, ?, ?)",
            (publication.share, roster.seq, owner, record_hash(publication.roster), publication.roster),
        )
    if publication.head is not None:
        _rules.check_head(publication, publication.head, roster, standing)
        db.execute(
            "INSERT INTO heads (share, ver, hash, blob) VALUES (?, ?, ?, ?)",
            (publication.share, publication.head_ver, record_hash(publication.head), publication.head),
        )
    _rules.check_capsules(publication, owner)
    for kid, capsule_id, blob in publication.capsules:
        query = "SELECT blob FROM capsules WHERE share = ? AND id = ?"
        known = db.execute(query, (publication.share, capsule_id)).get
        if known is None:
            query = "INSERT INTO capsules (share, kid, id, blob) VALUES (?, ?, ?, ?)"
            db.execute(query, (publication.share, kid, capsule_id, blob))
        elif known != blob:
            raise MeshkitError("invalid_record", "another capsule of this share has that id")


def _in_force(db: apsw.Connection, publication: Publication) -> bool:
    """Whether this very publication took place before: its answer was lost, and it is being repeated.

    Others may have followed it since; the publisher's next one will meet them.
    """
    known = 0
    for table, blob in (("heads", publication.head), ("rosters", publication.roster)):
        if blob is not None:
            query = f"SELECT 1 FROM {table} WHERE share = ? AND hash = ?"  # noqa: S608 - one of two literals
            if db.execute(query, (publication.share, record_hash(blob))).get is None:
                return False
            known += 1
    return known > 0


def _publish_identity(db: apsw.Connection, handle: str, record: bytes) -> None:
    chain = _chain(db, handle)
    if record in chain:
        return
    parsed = _rules.check_identity(handle, chain, record)
    for kid in {kid_of(parsed.root), kid_of(parsed.sig)}:
        holder = db.execute("SELECT handle FROM identity_keys WHERE kid = ?", (kid,)).get
        if holder not in (None, handle):
            raise MeshkitError("identity_handle_taken", f"this key is published as {holder!r} already")
        if holder is None:
            db.execute("INSERT INTO identity_keys (kid, handle) VALUES (?, ?)", (kid, handle))
    db.execute("INSERT INTO identities (handle, n, blob) VALUES (?, ?, ?)", (handle, len(chain), record))
