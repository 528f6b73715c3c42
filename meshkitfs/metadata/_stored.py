"""A metadata home over a database: the asynchronous face of `_queries`, the same for each database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.records import Timestamp
from meshkitfs.metadata import _lists, _queries
from meshkitfs.metadata._api import AccessList, Publication, ShareState
from meshkitfs.metadata._connection import Connection, Database

__all__ = ["TIMESTAMP_SECONDS", "StoredMetadata"]

TIMESTAMP_SECONDS: Final = 300
_EVERYTHING: Final = 2**62  # rows: no limit

T = TypeVar("T")


class StoredMetadata:
    """What `EmbeddedMetadata` and `PostgresMetadata` have in common: everything but the database.

    ``threads`` is how many transactions may be under way at once; ``clock`` gives the seconds since the epoch
    that go into timestamps.
    """

    def __init__(self, database: Database, threads: int, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._threads = threads
        # Told of each transaction: its kind ("read" or "write"), and its seconds with the wait for its turn.
        self.observe: Callable[[str, float], None] = lambda kind, seconds: None
        # One limiter for each run of trio, as trio's own: a thread abandoned by one run never gives back its
        # place.
        self._limiter = trio.lowlevel.RunVar[trio.CapacityLimiter](f"metadata_threads_{id(self)}")

    # -- shares ----------------------------------------------------------------------------------------

    async def service_key(self) -> bytes:
        """The public key of the timestamps this home signs."""
        return await self.read(lambda db: _queries.service_key(db).public)

    async def share_state(self, share: bytes, kid: bytes) -> ShareState:
        """Capsules, roster, timestamp and head of one moment, in one trip."""
        return await self.read(lambda db: self.state(db, share, kid))

    async def capsules(self, share: bytes, kid: bytes) -> list[bytes]:
        """All capsules of the share for this recipient, oldest first."""
        return await self.read(lambda db: _queries.capsules(db, share, kid))

    async def roster(self, share: bytes) -> bytes | None:
        """The newest roster."""
        return await self.read(lambda db: _queries.newest_roster(db, share))

    async def timestamp(self, share: bytes) -> bytes | None:
        """A timestamp over the newest roster, signed now and good for 300 s."""
        return await self.read(lambda db: self.vouch(db, share, _queries.newest_roster(db, share)))

    async def head(self, share: bytes) -> bytes | None:
        """The newest head."""
        return await self.read(lambda db: _queries.newest_head(db, share))

    async def heads(self, share: bytes, after_ver: int, upto_ver: int) -> list[bytes]:
        """The heads with ``after_ver < ver <= upto_ver``, oldest first."""
        return await self.read(lambda db: _queries.heads(db, share, after_ver, upto_ver, _EVERYTHING))

    async def retention(self, share: bytes) -> bytes | None:
        """The newest retention record."""
        return await self.read(lambda db: _queries.retention(db, share))

    async def retain(self, share: bytes, record: bytes) -> None:
        """Replace the retention record; see `Metadata.retain` for what is refused."""
        await self.write(lambda db: _queries.retain(db, share, record))

    async def publish(self, publication: Publication) -> None:
        """Apply a publication as one transaction; see `Metadata.publish` for what is refused."""
        await self.write(lambda db: _queries.publish(db, publication))

    # -- letters ---------------------------------------------------------------------------------------

    async def post_letter(self, to_kid: bytes, blob: bytes) -> bytes:
        """Put a letter into a mailbox. Raises invalid_argument (too large), no_space (mailbox full)."""
        _queries.check_letter(blob)
        letter_id = os.urandom(16)  # chosen out here: a transaction that is repeated posts the same letter
        await self.write(lambda db: _queries.post_letter(db, to_kid, letter_id, blob))
        return letter_id

    async def letters(self, kid: bytes) -> list[tuple[bytes, bytes]]:
        """The letters in a mailbox as (id, blob), oldest first."""
        return await self.read(lambda db: _queries.letters(db, kid))

    async def delete_letter(self, kid: bytes, letter_id: bytes) -> None:
        """Remove a letter from a mailbox."""
        await self.write(lambda db: _queries.delete_letter(db, kid, letter_id))

    # -- the identity directory ------------------------------------------------------------------------

    async def publish_identity(self, handle: str, record: bytes) -> None:
        """Publish an identity record. Raises identity_handle_taken, invalid_record."""
        await self.write(lambda db: _queries.publish_identity(db, handle, record))

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of records of a handle, oldest first."""
        return await self.read(lambda db: _queries.chain(db, handle))

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        """The chain in which a signing key of that kid occurs, oldest first."""

        def work(db: Connection) -> list[bytes]:
            handle = _queries.handle_of(db, kid)
            return [] if handle is None else _queries.chain(db, handle)

        return await self.read(work)

    # -- access lists ------------------------------------------------------------------------------------

    async def access_list(self, list_id: bytes) -> AccessList | None:
        """The newest record of a vault or revocation list; who has the file may read all of them."""

        def work(db: Connection) -> AccessList | None:
            record = _lists.newest_list(db, list_id)
            return None if record is None else AccessList(record, self.vouch_list(db, list_id, record))

        return await self.read(work)

    async def put_access_list(
        self, list_id: bytes, expect: int, record: bytes, readers: Sequence[bytes]
    ) -> None:
        """Replace the record of a list; see `Metadata.put_access_list` for what is refused."""
        await self.write(lambda db: _lists.put_list(db, list_id, expect, record))

    async def delete_access_list(self, list_id: bytes) -> None:
        """Remove a list."""
        await self.write(lambda db: _lists.delete_list(db, list_id))

    # -- the rest --------------------------------------------------------------------------------------

    def tick(self, share: bytes | None = None, also: Sequence[bytes] = ()) -> int:
        """A number that changes whenever the store may have changed; a few microseconds."""
        return self._database.tick()

    def close(self) -> None:
        """Let go of the database. Harmless when repeated."""
        self._database.close()

    # -- for what is built on a home: the service ------------------------------------------------------------

    @property
    def database(self) -> Database:
        """What is below."""
        return self._database

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a worker thread, in a transaction that sees one moment."""
        # An abandoned read changes nothing; its thread ends by itself.
        with self._observed("read"):
            return await trio.to_thread.run_sync(
                self._database.read, work, abandon_on_cancel=True, limiter=self._places()
            )

    async def write(self, work: Callable[[Connection], T], *, durable: bool = True) -> T:
        """Run ``work`` in a worker thread as one transaction; it may be run more than once."""
        # Never abandoned: the caller must learn whether the transaction took place.
        with self._observed("write"):
            return await trio.to_thread.run_sync(
                lambda: self._database.write(work, durable=durable), limiter=self._places()
            )

    @contextmanager
    def _observed(self, kind: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.observe(kind, time.monotonic() - begun)

    def state(self, db: Connection, share: bytes, kid: bytes) -> ShareState:
        """What `share_state` gives, inside a transaction."""
        roster = _queries.newest_roster(db, share)
        return ShareState(
            tuple(_queries.capsules(db, share, kid)),
            roster,
            self.vouch(db, share, roster),
            _queries.newest_head(db, share),
        )

    def vouch(self, db: Connection, share: bytes, roster: bytes | None) -> bytes | None:
        """A timestamp over this roster."""
        if roster is None:
            return None
        now = int(self._clock())
        record = Timestamp(share=share, roster=record_hash(roster), iat=now, exp=now + TIMESTAMP_SECONDS)
        return record.sign(_queries.service_key(db))

    def vouch_list(self, db: Connection, list_id: bytes, record: bytes) -> bytes | None:
        """A timestamp over this record, if it is a list of that id; for anything else nobody vouches."""
        if _lists.read_list(list_id, record) is None:
            return None
        return self.vouch(db, list_id, record)

    def _places(self) -> trio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = trio.CapacityLimiter(self._threads)
            self._limiter.set(limiter)
            return limiter
