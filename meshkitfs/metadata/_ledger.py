"""MeshKit's other records: proofs, sync jobs with checkpoints, vaults, capabilities, provider logs.

What is in them is their owners' business: here they are kept, counted, and shown to whom they are for. Each
method is one transaction, and may be repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshkitfs.core.keys import kid_of
from meshkitfs.core.membership import Revocations
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _desk
from meshkitfs.metadata._connection import Connection, row, value
from meshkitfs.metadata._desk import Member
from meshkitfs.metadata._lists import list_subject, read_list
from meshkitfs.metadata._queries import touch
from meshkitfs.metadata._stored import StoredMetadata

__all__ = ["Capability", "Job", "Ledger", "LogEvent", "Vault"]

MAX_ACTIVE_JOBS: Final = 200
MAX_OLD_JOBS: Final = 1000
MAX_LOG_EVENTS: Final = 10_000  # kept of one identity
PAGE: Final = 500

_JOB: Final = "SELECT id, kind, payload, key, policy, status, checkpoint, created, updated FROM sync_jobs "
_CAPABILITY: Final = "SELECT id, owner, kid, record, created, revoked FROM capabilities "


@dataclass(frozen=True, slots=True)
class Job:
    """One sync job. ``payload`` and ``checkpoint`` are opaque; ``policy`` is dedupe, fail or replace."""

    id: bytes
    kind: str
    payload: bytes
    key: str
    policy: str
    status: str
    checkpoint: bytes | None
    created: int
    updated: int


@dataclass(frozen=True, slots=True)
class Vault:
    """A membership set: its record, and the signing kids of its members.

    ``timestamp`` vouches for the record; None if it is none of ours (docs/format.md), which is kept as it is.
    """

    id: bytes
    owner: str
    seq: int
    record: bytes
    timestamp: bytes | None
    members: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability record, without its secret: for the holder of one signing key."""

    id: bytes
    owner: str
    kid: bytes
    record: bytes
    created: int
    revoked: int | None


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One line of a provider log; ``n`` is its number here."""

    n: int
    at: int
    provider: str
    operation: str
    outcome: str
    bytes: int


class Ledger:
    """The records of members beside their shares. Raises quota_exceeded and metadata_forbidden throughout."""

    def __init__(self, home: StoredMetadata, record_bytes: int, clock: Callable[[], float]) -> None:
        self._home = home
        self._limit = record_bytes
        self._clock = clock

    # -- proofs ------------------------------------------------------------------------------------------

    async def put_proof(self, who: Member, cid: str, share: bytes | None, record: Mapping[str, Any]) -> None:
        """Keep what ``who`` says about the bytes of ``cid``; members of ``share`` may read it too."""
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))

        def work(db: Connection) -> None:
            db.lock("proof", f"{who.handle} {cid}".encode())
            if share is not None and not _desk.sees(db, who, share):
                raise MeshkitError("metadata_forbidden", "that is no share of yours")
            found = row(db, "SELECT share, record FROM proofs WHERE handle = ? AND cid = ?", who.handle, cid)
            if found == (share, text):
                return
            db.run(
                "INSERT INTO proofs (handle, cid, share, at, record) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (handle, cid) DO UPDATE "
                "SET share = excluded.share, at = excluded.at, record = excluded.record",
                who.handle,
                cid,
                share,
                self._now(),
                text,
            )
            old = 0 if found is None else len(found[1])
            _desk.recharge(db, who.handle, old, len(text), self._limit)

        await self._home.write(work)

    async def proofs(self, who: Member, cid: str) -> list[tuple[str, int, bytes | None, dict[str, Any]]]:
        """What is said about ``cid``, as (handle, when, share, record): one's own first."""

        def work(db: Connection) -> list[tuple[str, int, bytes | None, dict[str, Any]]]:
            query = (
                "SELECT handle, at, share, record FROM proofs "
                "WHERE cid = ? AND (handle = ? OR share IS NOT NULL) "
                "ORDER BY CASE WHEN handle = ? THEN 0 ELSE 1 END, at DESC LIMIT ?"
            )
            found = db.rows(query, cid, who.handle, who.handle, PAGE)
            seen: dict[bytes, bool] = {}
            shown = []
            for handle, at, share, record in found:
                if handle != who.handle and share not in seen:
                    seen[share] = _desk.sees(db, who, share)
                if handle == who.handle or seen[share]:
                    shown.append((handle, at, share, json.loads(record)))
            return shown

        return await self._home.read(work)

    # -- sync jobs ---------------------------------------------------------------------------------------

    async def enqueue(
        self, who: Member, kind: str, payload: bytes, key: str, policy: str
    ) -> tuple[Job, bool]:
        """Add a job; returns it and whether it is new.

        With an active job of the same ``key``: ``dedupe`` returns that one, ``fail`` raises sync_conflict,
        ``replace`` ends it.
        """
        job_id = os.urandom(16)

        def work(db: Connection) -> tuple[Job, bool]:
            db.lock("jobs", who.handle.encode())
            if (mine := _job(db, who, job_id)) is not None:
                return mine, True
            query = _JOB + "WHERE handle = ? AND key = ? AND active = 1"
            found = row(db, query, who.handle, key)
            if found is not None:
                if policy == "dedupe":
                    return Job(*found), False
                if policy == "fail":
                    raise MeshkitError("sync_conflict", "a job with that key is active")
                self._end(db, who, found[0], "replaced")
            query = "SELECT count(*) FROM sync_jobs WHERE handle = ? AND active = 1"
            if value(db, query, who.handle) >= MAX_ACTIVE_JOBS:
                raise MeshkitError("quota_exceeded", f"{MAX_ACTIVE_JOBS} jobs are active")
            now = self._now()
            db.run(
                "INSERT INTO sync_jobs "
                "(id, handle, kind, payload, key, policy, status, active, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?, 'queued', 1, ?, ?)",
                *(job_id, who.handle, kind, payload, key, policy, now, now),
            )
            made = _job(db, who, job_id)
            assert made is not None
            return made, True

        return await self._home.write(work)

    async def jobs(self, who: Member, *, active: bool) -> list[Job]:
        """One's own jobs: the active ones in the order they came, or the last that have ended."""
        order = "ORDER BY n LIMIT ?" if active else "ORDER BY n DESC LIMIT ?"
        query = _JOB + "WHERE handle = ? AND active = ? " + order
        return await self._home.read(
            lambda db: [Job(*found) for found in db.rows(query, who.handle, int(active), PAGE)]
        )

    async def job(self, who: Member, job_id: bytes) -> Job | None:
        """One's own job of that id."""
        return await self._home.read(lambda db: _job(db, who, job_id))

    async def advance(
        self, who: Member, job_id: bytes, status: str | None, checkpoint: bytes | None
    ) -> Job | None:
        """Set an active job's status (running, done, failed) or checkpoint. None if there is no such job.

        Raises sync_conflict for a job that has ended otherwise.
        """

        def work(db: Connection) -> Job | None:
            db.lock("jobs", who.handle.encode())
            job = _job(db, who, job_id)
            if job is None:
                return None
            if job.status not in ("queued", "running"):
                if job.status == status and checkpoint is None:
                    return job
                raise MeshkitError("sync_conflict", f"the job is {job.status} already")
            if checkpoint is not None:
                query = "UPDATE sync_jobs SET checkpoint = ?, updated = ? WHERE id = ?"
                db.run(query, checkpoint, self._now(), job_id)
            if status == "running":
                query = "UPDATE sync_jobs SET status = 'running', updated = ? WHERE id = ?"
                db.run(query, self._now(), job_id)
            elif status is not None:
                self._end(db, who, job_id, status)
            return _job(db, who, job_id)

        return await self._home.write(work)

    def _end(self, db: Connection, who: Member, job_id: bytes, status: str) -> None:
        # What was to be done is of no use any more; that it was is.
        query = "UPDATE sync_jobs SET status = ?, active = 0, payload = ?, updated = ? WHERE id = ?"
        db.run(query, status, b"", self._now(), job_id)
        query = (
            "DELETE FROM sync_jobs WHERE handle = ? AND active = 0 AND n <= (SELECT n FROM sync_jobs "
            "WHERE handle = ? AND active = 0 ORDER BY n DESC LIMIT 1 OFFSET ?)"
        )
        db.run(query, who.handle, who.handle, MAX_OLD_JOBS)

    # -- vaults ------------------------------------------------------------------------------------------

    async def put_vault(
        self, who: Member, vault: bytes, expect: int, record: bytes, members: Sequence[bytes]
    ) -> int:
        """Make or replace a vault, if ``expect`` is the seq in force (0: none); returns the new seq.

        A vault record or revocation list brings its own number, any other record gets the next one. Raises
        head_conflict otherwise, and metadata_forbidden when it is somebody else's.
        """

        def work(db: Connection) -> int:
            db.lock("vault", vault)
            found = row(db, "SELECT owner, seq, record FROM vaults WHERE id = ?", vault)
            owner, seq, old = found or (who.handle, 0, b"")
            if owner != who.handle:
                if not _takes_back(who, vault, old, record):
                    raise MeshkitError("metadata_forbidden", "that vault is somebody else's")
                db.run("DELETE FROM vaults WHERE id = ?", vault)
                seq, old = 0, b""
            listed = read_list(vault, record)
            following = expect + 1 if listed is None else listed.seq
            if seq == following and old == record and set(_members(db, vault)) == set(members):
                return int(seq)  # its answer was lost
            if seq != expect:
                raise MeshkitError("head_conflict", f"vault record {seq} is in force, not {expect}")
            if following <= seq:
                raise MeshkitError("invalid_record", f"vault record {following} after {seq}")
            before = _vault_size(db, vault, old)
            db.run(
                "INSERT INTO vaults (id, owner, seq, record) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, record = excluded.record",
                *(vault, who.handle, following, record),
            )
            db.run("DELETE FROM vault_members WHERE id = ?", vault)
            for kid in sorted(set(members)):
                db.run("INSERT INTO vault_members (id, kid) VALUES (?, ?)", vault, kid)
            touch(db, list_subject(vault))
            _desk.recharge(db, who.handle, before, _vault_size(db, vault, record), self._limit)
            return following

        return await self._home.write(work)

    async def vault(self, who: Member, vault: bytes) -> Vault | None:
        """The vault, for its owner and its members; None for all others.

        A revocation list is for everybody: whoever is shown a token may have to look whether it is revoked.
        """

        def work(db: Connection) -> Vault | None:
            found = row(db, "SELECT id, owner, seq, record FROM vaults WHERE id = ?", vault)
            if found is None:
                return None
            members = _members(db, vault)
            if not _readable(who, vault, found[1], found[3], members):
                return None
            stamp = self._home.vouch_list(db, vault, found[3])
            return Vault(found[0], found[1], found[2], found[3], stamp, members)

        return await self._home.read(work)

    async def delete_vault(self, who: Member, vault: bytes) -> bool:
        """Remove one's own vault; False if there is none."""

        def work(db: Connection) -> bool:
            db.lock("vault", vault)
            query = "SELECT record FROM vaults WHERE id = ? AND owner = ?"
            record = value(db, query, vault, who.handle)
            if record is None:
                return False
            _desk.give_back(db, who.handle, "bytes", _vault_size(db, vault, record))
            db.run("DELETE FROM vaults WHERE id = ?", vault)
            db.run("DELETE FROM vault_members WHERE id = ?", vault)
            touch(db, list_subject(vault))
            return True

        return await self._home.write(work)

    # -- capabilities ------------------------------------------------------------------------------------

    async def add_capability(self, who: Member, capability: bytes, kid: bytes, record: bytes) -> None:
        """Keep a capability for the holder of ``kid``. Raises sync_conflict when the id is another's."""

        def work(db: Connection) -> None:
            db.lock("capability", capability)
            found = row(db, "SELECT owner, kid, record FROM capabilities WHERE id = ?", capability)
            if found == (who.handle, kid, record):
                return
            if found is not None:
                raise MeshkitError("sync_conflict", "another capability has that id")
            db.run(
                "INSERT INTO capabilities (id, owner, kid, record, created) VALUES (?, ?, ?, ?, ?)",
                *(capability, who.handle, kid, record, self._now()),
            )
            self._charge(db, who, len(record))

        await self._home.write(work)

    async def capability(self, who: Member, capability: bytes) -> Capability | None:
        """The capability, for who made it and whom it is for; None for all others."""

        def work(db: Connection) -> Capability | None:
            found = row(db, _CAPABILITY + "WHERE id = ?", capability)
            if found is None or (found[1] != who.handle and found[2] not in who.kids):
                return None
            return Capability(*found)

        return await self._home.read(work)

    async def capabilities(self, who: Member) -> list[Capability]:
        """What one has made and what one was given, the newest first."""

        def work(db: Connection) -> list[Capability]:
            mine = "owner = ? OR kid IN (SELECT kid FROM identity_keys WHERE handle = ?)"
            query = _CAPABILITY + "WHERE " + mine + " ORDER BY created DESC, id LIMIT ?"
            return [Capability(*found) for found in db.rows(query, who.handle, who.handle, PAGE)]

        return await self._home.read(work)

    async def revoke_capability(self, who: Member, capability: bytes) -> bool:
        """Mark one's own capability as revoked, for good; False if there is none."""

        def work(db: Connection) -> bool:
            query = "UPDATE capabilities SET revoked = COALESCE(revoked, ?) WHERE id = ? AND owner = ?"
            return db.run(query, self._now(), capability, who.handle) > 0

        return await self._home.write(work)

    # -- provider logs -----------------------------------------------------------------------------------

    async def log(self, who: Member, events: Sequence[LogEvent]) -> None:
        """Add to one's own log; only the newest lines are kept. Repeated lines may come twice."""

        def work(db: Connection) -> None:
            db.lock("logs", who.handle.encode())
            query = (
                "INSERT INTO provider_logs (handle, at, provider, operation, outcome, bytes) "
                "VALUES (?, ?, ?, ?, ?, ?)"
            )
            for event in events:
                words = (event.provider, event.operation, event.outcome)
                db.run(query, who.handle, event.at, *words, event.bytes)
            query = (
                "DELETE FROM provider_logs WHERE handle = ? AND n <= (SELECT n FROM provider_logs "
                "WHERE handle = ? ORDER BY n DESC LIMIT 1 OFFSET ?)"
            )
            db.run(query, who.handle, who.handle, MAX_LOG_EVENTS)

        await self._home.write(work)

    async def logged(self, who: Member, after: int) -> tuple[list[LogEvent], bool]:
        """The next page of one's own log behind line ``after``, and whether there are more."""
        query = (
            "SELECT n, at, provider, operation, outcome, bytes FROM provider_logs "
            "WHERE handle = ? AND n > ? ORDER BY n LIMIT ?"
        )
        found = await self._home.read(lambda db: db.rows(query, who.handle, after, PAGE + 1))
        return [LogEvent(*line) for line in found[:PAGE]], len(found) > PAGE

    def _charge(self, db: Connection, who: Member, amount: int) -> None:
        _desk.charge(db, who.handle, "bytes", 0, amount, self._limit)

    def _now(self) -> int:
        return int(self._clock())


def _job(db: Connection, who: Member, job_id: bytes) -> Job | None:
    found = row(db, _JOB + "WHERE id = ? AND handle = ?", job_id, who.handle)
    return None if found is None else Job(*found)


def _readable(who: Member, vault: bytes, owner: str, record: bytes, members: Sequence[bytes]) -> bool:
    if owner == who.handle or not who.kids.isdisjoint(members):
        return True
    return isinstance(read_list(vault, record), Revocations)


def _takes_back(who: Member, vault: bytes, old: bytes, record: bytes) -> bool:
    """Whether ``record`` is the member's own revocation list, whose id somebody else has taken."""
    mine = read_list(vault, record)
    taken = not isinstance(read_list(vault, old), Revocations)
    return taken and isinstance(mine, Revocations) and kid_of(mine.owner) in who.kids


def _vault_size(db: Connection, vault: bytes, record: bytes) -> int:
    """What a vault as it is now takes of its owner's quota."""
    return len(record) + 16 * len(_members(db, vault))


def _members(db: Connection, vault: bytes) -> tuple[bytes, ...]:
    return tuple(
        found[0] for found in db.rows("SELECT kid FROM vault_members WHERE id = ? ORDER BY kid", vault)
    )
