"""What whoever runs a service does with its database: look at members, shares and audit log, and remove.

An operator has no key of any member and needs none: what is removed are records that nobody here can read.
Every removal is one transaction; with ``apply`` false it takes place and is undone again, so that what is
said to happen is what happens. The service may be running: its instances see it with the next request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

from meshkitfs.core.cose import read1
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Head
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _desk, _queries
from meshkitfs.metadata._connection import Connection, row, value
from meshkitfs.metadata._desk import OPERATOR
from meshkitfs.metadata._queries import mailbox_subject, share_subject
from meshkitfs.metadata._stored import StoredMetadata

__all__ = ["AuditLine", "MemberLine", "Operator", "Removal", "ShareLine"]

_PAGE: Final = 500  # heads in memory at once
_EVERYTHING: Final = 2**62  # rows, or versions: no limit
_GONE_BEFORE: Final = "-"  # begins the names of released identities; no handle looks like this

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MemberLine:
    """A member: bytes and shares count against their quotas; ``removed`` is a time (UNIX seconds) or None."""

    handle: str
    kid: bytes
    bytes: int
    shares: int
    letters: int
    removed: int | None


@dataclass(frozen=True, slots=True)
class ShareLine:
    """A share: owner ('' if no member), newest version, heads and bytes kept, identities with a capsule."""

    share: bytes
    owner: str
    version: int
    heads: int
    bytes: int
    recipients: int


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line of the audit log; ``who`` is a handle, '' for somebody unknown, '-' for the operator."""

    n: int
    at: int
    who: str
    kind: str
    subject: bytes | None
    outcome: str


@dataclass(slots=True)
class Removal:
    """What a removal takes away (numbers of records), gives back (bytes by handle), and means for others."""

    what: str
    applied: bool = False
    shares: list[str] = field(default_factory=list)
    heads: int = 0
    rosters: int = 0
    capsules: int = 0
    letters: int = 0
    invitations: int = 0
    records: int = 0
    # Members other than the one who is removed that lose something by it.
    affected: list[str] = field(default_factory=list)
    # Shares that stay: those of the removed member, and those that others have granted to them.
    left: list[str] = field(default_factory=list)
    granted: list[str] = field(default_factory=list)
    given_back: dict[str, int] = field(default_factory=dict)

    def give(self, db: Connection, handle: str | None, amount: int) -> None:
        """Give bytes of the quota back to who had paid for them."""
        if handle is not None and amount:
            _desk.give_back(db, handle, "bytes", amount)
            self.given_back[handle] = self.given_back.get(handle, 0) + amount


class _Undo(Exception):  # noqa: N818 - nothing is wrong: it ends a transaction that was only tried
    pass


class Operator:
    """The operator's commands over an open home. ``clock`` gives UNIX seconds."""

    def __init__(self, home: StoredMetadata, clock: Callable[[], float] = time.time) -> None:
        self._home = home
        self._clock = clock

    # -- looking -----------------------------------------------------------------------------------------

    async def members(self) -> list[MemberLine]:
        """All members by handle, those who were removed too."""
        return await self._home.read(_members)

    async def shares(self, owner: str | None = None) -> list[ShareLine]:
        """All shares, or those of one owner; the largest first."""

        def work(db: Connection) -> list[ShareLine]:
            found = [_share_line(db, share) for (share,) in db.rows("SELECT DISTINCT share FROM rosters")]
            chosen = [line for line in found if owner is None or line.owner == owner]
            return sorted(chosen, key=lambda line: (-line.bytes, line.share))

        return await self._home.read(work)

    async def audit(
        self, *, since: int = 0, who: str | None = None, refused: bool = False, limit: int = 0
    ) -> list[AuditLine]:
        """The newest ``limit`` lines (0: all) from ``since`` on, oldest first. ``refused``: only refusals."""
        wanted = ["at >= ?"]
        values: list[object] = [since, limit or _EVERYTHING]
        if who is not None:
            wanted.append("who = ?")
            values.insert(1, who)
        if refused:
            wanted.append("outcome NOT IN ('ok', 'read')")
        query = (
            f"SELECT n, at, who, kind, share, outcome FROM audit WHERE {' AND '.join(wanted)} "  # noqa: S608
            "ORDER BY n DESC LIMIT ?"
        )
        found = await self._home.read(lambda db: db.rows(query, *values))
        return [AuditLine(*line) for line in reversed(found)]

    async def stats(self) -> dict[str, int]:
        """How much there is of everything."""

        def work(db: Connection) -> dict[str, int]:
            queries = {
                "members": "SELECT count(DISTINCT handle) FROM identities",
                "removed_members": "SELECT count(*) FROM removed WHERE kind = 'member'",
                "shares": "SELECT count(DISTINCT share) FROM rosters",
                "heads": "SELECT count(*) FROM heads",
                "rosters": "SELECT count(*) FROM rosters",
                "capsules": "SELECT count(*) FROM capsules",
                "letters": "SELECT count(*) FROM letters",
                "open_invitations": "SELECT count(*) FROM invitations WHERE handle IS NULL AND expires > ?",
                "active_jobs": "SELECT count(*) FROM sync_jobs WHERE active = 1",
                "audit_lines": "SELECT count(*) FROM audit",
            }
            counted = {
                name: int(value(db, query, *([int(self._clock())] if "?" in query else [])))
                for name, query in queries.items()
            }
            counted["members"] -= counted["removed_members"]
            sizes = (f"SELECT sum(length(blob)) FROM {table}" for table in _RECORDS)  # noqa: S608
            counted["record_bytes"] = sum(int(value(db, query) or 0) for query in sizes)
            return counted

        return await self._home.read(work)

    # -- removing ----------------------------------------------------------------------------------------

    async def remove_share(self, share: bytes, *, apply: bool) -> Removal:
        """Delete every record of a share; it cannot be published again. Raises share_not_found."""

        def work(db: Connection) -> Removal:
            removal = Removal(f"share {share.hex()}", apply)
            self._share(db, share, removal)
            self._note(db, "remove-share", share)
            return removal

        return await self._change(work, apply)

    async def remove_member(self, handle: str, *, shares: bool, apply: bool) -> Removal:
        """End a membership: nothing signed by that identity is accepted any more, its handle stays taken.

        Letters, open invitations and other records of theirs are deleted; with ``shares`` also the shares
        that they own. What they have granted stays else, and ends when their rosters run out. Raises
        contact_unknown.
        """

        def work(db: Connection) -> Removal:
            removal = Removal(f"member {handle}", apply)
            kids = _signing_kids(db, handle)
            owned = [share for share in _all_shares(db) if _desk.owner_of(db, share) in kids]
            removal.granted = sorted(share.hex() for share in _granted_to(db, handle) - set(owned))
            _delete_own(db, handle, removal)
            for share in owned if shares else ():
                self._share(db, share, removal)
                self._note(db, "remove-share", share)
            if not shares:
                removal.left = [share.hex() for share in owned]
                removal.affected = sorted({who for share in owned for who in _recipients(db, share)})
            removal.affected = [who for who in removal.affected if who != handle]
            self._mark(db, "member", handle.encode())
            self._note(db, f"remove-member {handle}", None)
            return removal

        return await self._change(work, apply)

    async def readmit(self, handle: str) -> None:
        """Let somebody who was removed be a member again, with the same keys. Raises contact_unknown."""

        def work(db: Connection) -> None:
            if not db.run("DELETE FROM removed WHERE kind = 'member' AND id = ?", handle.encode()):
                raise MeshkitError("contact_unknown", f"no member {handle!r} was removed")
            self._note(db, f"readmit {handle}", None)

        await self._home.write(work)

    async def release_handle(self, handle: str, *, apply: bool) -> Removal:
        """Let somebody else take the handle of a removed member, who stays the owner of what is left.

        Raises contact_unknown, and invalid_argument while it is a member's.
        """
        suffix = os.urandom(4).hex()  # chosen out here: the transaction may be repeated

        def work(db: Connection) -> Removal:
            _signing_kids(db, handle)
            if not _desk.is_removed(db, "member", handle.encode()):
                raise MeshkitError("invalid_argument", f"{handle!r} is a member's: remove the member first")
            db.lock("identity", handle.encode())
            # The keys keep an owner that nobody can be: who takes the handle gets neither the mailbox, nor
            # the shares, nor anything addressed to the one before.
            name = f"{_GONE_BEFORE}{suffix}-{handle}"
            for query in (
                "UPDATE identities SET handle = ? WHERE handle = ?",
                "UPDATE identity_keys SET handle = ? WHERE handle = ?",
                "UPDATE recipients SET handle = ? WHERE handle = ?",
                "UPDATE invitations SET inviter = ? WHERE inviter = ?",
                "UPDATE counts SET handle = ? WHERE handle = ?",
            ):
                db.run(query, name, handle)
            query = "UPDATE removed SET id = ? WHERE kind = 'member' AND id = ?"
            db.run(query, name.encode(), handle.encode())
            self._note(db, f"release-handle {handle}", None)
            return Removal(f"handle {handle}", apply)

        return await self._change(work, apply)

    async def _change(self, work: Callable[[Connection], Removal], apply: bool) -> Removal:
        if apply:
            return await self._home.write(work)
        tried: list[Removal] = []

        def attempt(db: Connection) -> None:
            tried.append(work(db))
            raise _Undo

        try:
            await self._home.write(attempt)
        except _Undo:
            return tried[-1]
        raise AssertionError("unreachable")

    def _share(self, db: Connection, share: bytes, removal: Removal) -> None:
        """Delete one share inside a transaction, and add what went to ``removal``."""
        db.lock("share", share)
        owner_public = value(db, "SELECT owner FROM rosters WHERE share = ? ORDER BY seq LIMIT 1", share)
        if owner_public is None:
            raise MeshkitError("share_not_found", share.hex())
        owner = _queries.handle_of(db, kid_of(owner_public))
        removal.affected = sorted({*removal.affected, *_recipients(db, share)} - {owner or ""})
        for size, signer in _head_sizes(db, share):
            removal.give(db, _queries.handle_of(db, signer), size)
        for table in ("rosters", "capsules"):
            total = value(db, f"SELECT sum(length(blob)) FROM {table} WHERE share = ?", share)  # noqa: S608
            removal.give(db, owner, int(total or 0))
        proofs = db.rows("DELETE FROM proofs WHERE share = ? RETURNING handle, length(record)", share)
        for who, size in proofs:
            removal.give(db, who, size)
        removal.records += len(proofs)
        removal.heads += db.run("DELETE FROM heads WHERE share = ?", share)
        removal.rosters += db.run("DELETE FROM rosters WHERE share = ?", share)
        removal.capsules += db.run("DELETE FROM capsules WHERE share = ?", share)
        halves = db.rows("DELETE FROM deposits WHERE share = ? RETURNING owner, length(blob)", share)
        for signer, size in halves:
            removal.give(db, _queries.handle_of(db, signer), size)
        removal.records += len(halves)
        db.run("DELETE FROM retentions WHERE share = ?", share)
        if owner is not None:
            _desk.give_back(db, owner, "shares", 1)
        removal.shares.append(share.hex())
        self._mark(db, "share", share)
        _queries.touch(db, share_subject(share))

    def _mark(self, db: Connection, kind: str, subject: bytes) -> None:
        query = "INSERT INTO removed (kind, id, at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        db.run(query, kind, subject, int(self._clock()))

    def _note(self, db: Connection, kind: str, share: bytes | None) -> None:
        _desk.note(db, int(self._clock()), OPERATOR, kind, share, "ok")


_RECORDS: Final = ("heads", "rosters", "capsules", "letters", "identities", "retentions")


def _members(db: Connection) -> list[MemberLine]:
    used: dict[tuple[str, str], int] = {
        (handle, kind): n
        for handle, kind, n in db.rows("SELECT handle, kind, n FROM counts WHERE period = 0")
    }
    query = "SELECT r.handle, count(*) FROM letters l JOIN recipients r ON r.kid = l.kid GROUP BY r.handle"
    letters: dict[str, int] = dict(db.rows(query))
    removed: dict[bytes, int] = dict(db.rows("SELECT id, at FROM removed WHERE kind = 'member'"))
    query = (
        "SELECT i.handle, k.kid FROM identities i JOIN identity_keys k ON k.handle = i.handle "
        "WHERE i.n = 0 ORDER BY i.handle, k.kid"
    )
    first: dict[str, bytes] = {}
    for handle, kid in db.rows(query):
        first.setdefault(handle, kid)
    return [
        MemberLine(
            handle,
            kid,
            used.get((handle, "bytes"), 0),
            used.get((handle, "shares"), 0),
            letters.get(handle, 0),
            removed.get(handle.encode()),
        )
        for handle, kid in first.items()
    ]


def _share_line(db: Connection, share: bytes) -> ShareLine:
    owner = _queries.handle_of(db, _desk.owner_of(db, share) or b"") or ""
    query = "SELECT max(ver), count(*), sum(length(blob)) FROM heads WHERE share = ?"
    version, heads, size = row(db, query, share) or (0, 0, 0)
    total = int(size or 0)
    for table in ("rosters", "capsules"):
        total += int(value(db, f"SELECT sum(length(blob)) FROM {table} WHERE share = ?", share) or 0)  # noqa: S608
    recipients = value(db, "SELECT count(DISTINCT kid) FROM capsules WHERE share = ?", share)
    return ShareLine(share, owner, version or 0, heads, total, recipients)


def _all_shares(db: Connection) -> list[bytes]:
    return [found[0] for found in db.rows("SELECT DISTINCT share FROM rosters ORDER BY share")]


def _granted_to(db: Connection, handle: str) -> set[bytes]:
    query = "SELECT DISTINCT share FROM capsules WHERE kid IN (SELECT kid FROM recipients WHERE handle = ?)"
    return {found[0] for found in db.rows(query, handle)}


def _recipients(db: Connection, share: bytes) -> set[str]:
    """The handles of who has a capsule in the share, revoked ones too."""
    query = "SELECT DISTINCT r.handle FROM capsules c JOIN recipients r ON r.kid = c.kid WHERE c.share = ?"
    return {found[0] for found in db.rows(query, share)}


def _signing_kids(db: Connection, handle: str) -> frozenset[bytes]:
    """Raises contact_unknown for a handle that no member has or had."""
    kids = db.rows("SELECT kid FROM identity_keys WHERE handle = ?", handle)
    if not kids:
        raise MeshkitError("contact_unknown", f"there is no member {handle!r}")
    return frozenset(found[0] for found in kids)


def _head_sizes(db: Connection, share: bytes) -> Iterator[tuple[int, bytes]]:
    """Size and signer of each head: whoever has signed it has published it, and paid for it."""
    after = -1
    while page := _queries.heads(db, share, after, _EVERYTHING, _PAGE):
        for blob in page:
            payload, signer = read1(blob, Head.TYPE)
            after = payload["ver"]
            yield len(blob), signer


def _delete_own(db: Connection, handle: str, removal: Removal) -> None:
    """Delete what is a member's alone."""
    for (kid,) in db.rows("SELECT kid FROM recipients WHERE handle = ?", handle):
        removal.letters += db.run("DELETE FROM letters WHERE kid = ?", kid)
        _queries.touch(db, mailbox_subject(kid))
    removal.invitations = db.run("DELETE FROM invitations WHERE inviter = ? AND handle IS NULL", handle)
    size = 0
    for table, column in (("proofs", "handle"), ("vaults", "owner"), ("capabilities", "owner")):
        query = f"SELECT count(*), sum(length(record)) FROM {table} WHERE {column} = ?"  # noqa: S608
        count, total = row(db, query, handle) or (0, 0)
        removal.records += count
        size += int(total or 0)
    members = "DELETE FROM vault_members WHERE id IN (SELECT id FROM vaults WHERE owner = ?)"
    size += 16 * db.run(members, handle)
    for table, column in (("proofs", "handle"), ("vaults", "owner"), ("capabilities", "owner")):
        db.run(f"DELETE FROM {table} WHERE {column} = ?", handle)  # noqa: S608
    for table in ("sync_jobs", "provider_logs"):
        removal.records += db.run(f"DELETE FROM {table} WHERE handle = ?", handle)  # noqa: S608
    removal.give(db, handle, size)
