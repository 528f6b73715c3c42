"""What the service does for a member: the operations of a metadata home, each with who may do it.

Every method is one transaction in which the permission is checked, the work done, the quota charged and the
audit log written. A share that a member may not see is to that member one that does not exist.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _desk, _queries, _rules
from meshkitfs.metadata._api import Publication, ShareState
from meshkitfs.metadata._connection import Connection, Database, value
from meshkitfs.metadata._desk import OPERATOR, Invitation, Member
from meshkitfs.metadata._ledger import Capability, Job, Ledger, LogEvent, Vault
from meshkitfs.metadata._lists import list_subject
from meshkitfs.metadata._queries import mailbox_subject, share_subject
from meshkitfs.metadata._releasing import RELEASE_S, Asker, Conditions, ReleaseKeys, Releasing, no_conditions
from meshkitfs.metadata._rules import Standing
from meshkitfs.metadata._stored import StoredMetadata

__all__ = [
    "RELEASE_S",
    "Asker",
    "Capability",
    "Changes",
    "Conditions",
    "Database",
    "Invitation",
    "Job",
    "LogEvent",
    "Member",
    "Quotas",
    "Refused",
    "ReleaseKeys",
    "Releasing",
    "Service",
    "Vault",
    "list_subject",
    "mailbox_subject",
    "share_subject",
]

PAGE_HEADS: Final = 500
PAGE_LETTERS: Final = 4 << 20  # bytes of letters in one answer; one letter always fits
INVITATION_SECONDS: Final = (60, 30 * 86400)  # the shortest and the longest life of one

T = TypeVar("T")
# Somebody was refused: who (a handle or ""), what kind of request, which share or mailbox, which code.
Refused = tuple[int, str, str, bytes | None, str]


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one identity may use: bytes of records kept, shares begun, letters a day."""

    record_bytes: int = 1 << 30
    shares: int = 10_000
    letters_a_day: int = 5_000


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed since a cursor, and the cursor of now."""

    cursor: int
    shares: tuple[bytes, ...]
    mailbox: bool


class Service:
    """A home that serves members. ``clock`` gives UNIX seconds.

    With ``release`` keys it is a release service too: a half is released for ``release_seconds``, after the
    ``conditions`` of its capsule were checked.
    """

    def __init__(
        self,
        home: StoredMetadata,
        quotas: Quotas,
        clock: Callable[[], float] = time.time,
        *,
        audit_days: int = 90,
        release: ReleaseKeys | None = None,
        release_seconds: int = RELEASE_S,
        conditions: Conditions = no_conditions,
    ) -> None:
        self.home = home
        self.quotas = quotas
        self.ledger = Ledger(home, quotas.record_bytes, clock)
        self._clock = clock
        self._audit_days = audit_days
        self.releasing: Releasing | None = None
        if release is not None:
            self.releasing = Releasing(
                home, release, clock, record_bytes=quotas.record_bytes, seconds=release_seconds,
                conditions=conditions,
            )  # fmt: skip

    # -- who asks ----------------------------------------------------------------------------------------

    async def member(self, kid: bytes) -> Member | None:
        """The member whose newest signing key has this kid."""
        return await self.home.read(lambda db: _desk.member(db, kid))

    async def recipient(self, kid: bytes) -> str | None:
        """Whose encryption key this is: the handle of the first who published it."""
        query = "SELECT handle FROM recipients WHERE kid = ?"
        found: str | None = await self.home.read(lambda db: value(db, query, kid))
        return found

    async def signing_key(self) -> SigningKey:
        """The key that signs this service's timestamps, and its policy decisions."""
        return await self.home.read(_queries.service_key)

    async def claim_nonce(self, keyid: bytes, nonce: bytes) -> bool:
        """Whether a request with this nonce is served for the first time."""
        token, now = os.urandom(16), self.now()
        return await self.home.write(
            lambda db: _desk.claim_nonce(db, keyid, nonce, token, now), durable=False
        )

    async def note_refusals(self, refusals: Sequence[Refused]) -> None:
        """Add what was refused, or only read, to the audit log."""

        def work(db: Connection) -> None:
            for line in refusals:
                _desk.note(db, *line)

        await self.home.write(work, durable=False)

    async def tidy(self, nonce_seconds: int) -> None:
        """Forget what is of no use any more: call it every now and then."""
        await self.home.write(
            lambda db: _desk.tidy(db, self.now(), nonce_seconds, self._audit_days), durable=False
        )

    # -- shares: reading ---------------------------------------------------------------------------------

    async def share_state(self, who: Member, share: bytes, kid: bytes) -> ShareState:
        """Raises metadata_forbidden for somebody else's kid, unless the share is one's own."""

        def work(db: Connection) -> ShareState:
            _check_kid(db, who, share, kid)
            if not _desk.sees(db, who, share):
                return ShareState((), None, None, None)
            return self.home.state(db, share, kid)

        return await self.home.read(work)

    async def capsules(self, who: Member, share: bytes, kid: bytes) -> list[bytes]:
        """Raises metadata_forbidden as `share_state`."""

        def work(db: Connection) -> list[bytes]:
            _check_kid(db, who, share, kid)
            return _queries.capsules(db, share, kid)

        return await self.home.read(work)

    async def roster(self, who: Member, share: bytes) -> bytes | None:
        """The newest roster."""
        return await self._look(who, share, lambda db: _queries.newest_roster(db, share), None)

    async def timestamp(self, who: Member, share: bytes) -> bytes | None:
        """A timestamp over the newest roster, signed now."""
        return await self._look(
            who, share, lambda db: self.home.vouch(db, share, _queries.newest_roster(db, share)), None
        )

    async def head(self, who: Member, share: bytes) -> bytes | None:
        """The newest head."""
        return await self._look(who, share, lambda db: _queries.newest_head(db, share), None)

    async def retention(self, who: Member, share: bytes) -> bytes | None:
        """The retention record."""
        return await self._look(who, share, lambda db: _queries.retention(db, share), None)

    async def heads(self, who: Member, share: bytes, after: int, upto: int) -> tuple[list[bytes], bool]:
        """The next page of heads, and whether there are more."""
        nothing: list[bytes] = []
        found = await self._look(
            who, share, lambda db: _queries.heads(db, share, after, upto, PAGE_HEADS + 1), nothing
        )
        return found[:PAGE_HEADS], len(found) > PAGE_HEADS

    # -- shares: writing ---------------------------------------------------------------------------------

    async def publish(self, who: Member, publication: Publication) -> None:
        """Raises what `Metadata.publish` does, metadata_forbidden, quota_exceeded."""
        share = publication.share

        def work(db: Connection) -> None:
            db.lock("share", share)
            if _desk.is_removed(db, "share", share):
                raise MeshkitError("metadata_forbidden", "that share was removed by who runs the service")
            owner = _desk.owner_of(db, share)
            if owner is not None and not _desk.sees(db, who, share):
                _refuse_as_unknown(publication)
            stored = _queries.publish(db, publication)
            if owner is None and _desk.owner_of(db, share) not in who.kids:
                raise MeshkitError("metadata_forbidden", "a new share is published by its owner")
            if stored:
                if publication.roster is not None:
                    _desk.drop_rosters(db, share, publication.roster_seq)
                self._charge_bytes(db, who, stored)
                if owner is None:
                    _desk.charge(db, who.handle, "shares", 0, 1, self.quotas.shares)
                self._note(db, who, "publish", share)

        await self.home.write(work)

    async def retain(self, who: Member, share: bytes, record: bytes) -> None:
        """Raises what `Metadata.retain` does, quota_exceeded."""

        def work(db: Connection) -> None:
            db.lock("share", share)
            if not _desk.sees(db, who, share):
                _rules.check_retention(share, record, None, Standing())
                raise MeshkitError("invalid_record", "a retention record for a share without a roster")
            if _queries.retain(db, share, record):
                self._note(db, who, "retain", share)

        await self.home.write(work)

    # -- letters -----------------------------------------------------------------------------------------

    async def post_letter(self, who: Member, to_kid: bytes, blob: bytes) -> bytes:
        """Raises what `Metadata.post_letter` does, quota_exceeded."""
        _queries.check_letter(blob)
        letter_id = os.urandom(16)

        def work(db: Connection) -> None:
            _queries.post_letter(db, to_kid, letter_id, blob)
            _desk.charge(db, who.handle, "letters", self.now() // _desk.DAY, 1, self.quotas.letters_a_day)
            self._note(db, who, "letter", to_kid)

        await self.home.write(work)
        return letter_id

    async def letters(
        self, who: Member, kid: bytes, after: bytes | None
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        """The next page of one's own mailbox, and whether there are more. Raises metadata_forbidden.

        ``after`` is the id of the letter to go on from; one that is gone begins again.
        """

        def work(db: Connection) -> tuple[list[tuple[bytes, bytes]], bool]:
            _check_mailbox(db, who, kid)
            return _queries.page_of_letters(db, kid, after, PAGE_LETTERS)

        return await self.home.read(work)

    async def delete_letter(self, who: Member, kid: bytes, letter_id: bytes) -> None:
        """Remove a letter from one's own mailbox. Raises metadata_forbidden."""

        def work(db: Connection) -> None:
            _check_mailbox(db, who, kid)
            _queries.delete_letter(db, kid, letter_id)

        await self.home.write(work)

    # -- people ------------------------------------------------------------------------------------------

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of a handle."""

        def work(db: Connection) -> list[bytes]:
            return [] if _desk.is_removed(db, "member", handle.encode()) else _queries.chain(db, handle)

        return await self.home.read(work)

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        """The chain of a signing key."""
        return await self.home.identity_by_kid(kid)

    async def publish_identity(
        self, handle: str, record: bytes, signer: bytes, *, welcome: bool, code: str | None
    ) -> bool:
        """Publish a record; returns whether somebody has joined with it.

        ``signer`` is the kid that signed the request: the newest key of the chain, or the key in the record.
        Who is not a member yet needs to be ``welcome``, or the ``code`` of an invitation, which is used up.
        Raises metadata_unauthorized, and what `Metadata.publish_identity` does.
        """

        def work(db: Connection) -> bool:
            db.lock("identity", handle.encode())
            chain = _queries.chain(db, handle)
            newest = IdentityRecord.parse_self_signed(chain[-1]).kid if chain else None
            if _desk.is_removed(db, "member", handle.encode()):
                raise MeshkitError("metadata_forbidden", "who runs the service has ended this membership")
            if signer not in {newest, signer_of(record)}:
                raise MeshkitError("metadata_unauthorized", "signed with a key that is not this identity's")
            known = bool(chain) and _follows(handle, chain, record)
            if not known and not welcome:
                if code is None:
                    raise MeshkitError(
                        "metadata_unauthorized", "an invitation or the service's token is needed"
                    )
                _desk.use_invitation(db, code, handle, self.now())
            if _queries.publish_identity(db, handle, record):
                _desk.note(db, self.now(), handle, "identity" if chain else "join", None, "ok")
            return not chain

        return await self.home.write(work)

    async def invite(self, inviter: Member | None, expires_in: int) -> tuple[str, int]:
        """Make an invitation (without a member: the operator's); its code and end. Raises quota_exceeded."""
        code, now = secrets.token_urlsafe(16), self.now()
        handle = OPERATOR if inviter is None else inviter.handle

        def work(db: Connection) -> None:
            _desk.invite(db, handle, code, now, now + expires_in)
            _desk.note(db, now, handle, "invite", None, "ok")

        await self.home.write(work)
        return code, now + expires_in

    @staticmethod
    def invitation_id(code: str) -> bytes:
        """By what its member takes an invitation back."""
        return _desk.invitation_id(code)

    async def invitations(self, who: Member) -> list[Invitation]:
        """One's own invitations."""
        return await self.home.read(lambda db: _desk.invitations(db, who.handle))

    async def uninvite(self, who: Member, invitation: bytes) -> bool:
        """Take one's own unused invitation back; False if there is none of that id."""
        return await self.home.write(lambda db: _desk.uninvite(db, who.handle, invitation))

    # -- changes -----------------------------------------------------------------------------------------

    async def changes(
        self, who: Member, shares: Sequence[bytes], mailbox: bytes | None, after: int | None
    ) -> Changes:
        """What of this has changed since a cursor; nothing without one. Raises metadata_forbidden.

        ``shares`` may hold the ids of vaults and revocation lists as well: everybody who knows such an id is
        told when it changes, since the first to be told has to be whoever was just removed. A share that the
        member may not see never changes. A cursor from the future, as after the database was
        restored from a backup, is one since which everything may have changed.
        """

        def work(db: Connection) -> Changes:
            if mailbox is not None:
                _check_mailbox(db, who, mailbox)
            newest = _queries.changed(db, _queries.EVERYTHING)
            since = newest if after is None else -1 if after > newest else after
            changed = [
                item
                for item in shares
                if (_queries.changed(db, share_subject(item)) > since and _desk.sees(db, who, item))
                or _queries.changed(db, list_subject(item)) > since
            ]
            letters = mailbox is not None and _queries.changed(db, mailbox_subject(mailbox)) > since
            return Changes(newest, tuple(changed), letters)

        return await self.home.read(work)

    # -- inside transactions -------------------------------------------------------------------------------

    async def _look(self, who: Member, share: bytes, work: Callable[[Connection], T], nothing: T) -> T:
        return await self.home.read(lambda db: work(db) if _desk.sees(db, who, share) else nothing)

    def _charge_bytes(self, db: Connection, who: Member, amount: int) -> None:
        _desk.charge(db, who.handle, "bytes", 0, amount, self.quotas.record_bytes)

    def _note(self, db: Connection, who: Member, kind: str, subject: bytes) -> None:
        _desk.note(db, self.now(), who.handle, kind, subject, "ok")

    def now(self) -> int:
        """UNIX seconds."""
        return int(self._clock())


def signer_of(record: bytes) -> bytes | None:
    """The kid of the signing key in an identity record; None if it is malformed."""
    try:
        return IdentityRecord.parse_self_signed(record).kid
    except MeshkitError:
        return None


def _check_mailbox(db: Connection, who: Member, kid: bytes) -> None:
    if not _desk.owns_mailbox(db, who, kid):
        raise MeshkitError("metadata_forbidden", "that mailbox is somebody else's")


def _check_kid(db: Connection, who: Member, share: bytes, kid: bytes) -> None:
    # The same answer whether or not the share exists.
    if not _desk.owns_mailbox(db, who, kid) and _desk.owner_of(db, share) not in who.kids:
        raise MeshkitError("metadata_forbidden", "what is addressed to somebody else's key is not shown")


def _refuse_as_unknown(publication: Publication) -> None:
    """Say what would be said of a share that does not exist. Raises always."""
    nothing = Standing()
    _rules.check_expectations(publication, nothing)
    owner, roster = b"", None
    if publication.roster is not None:
        owner, roster = _rules.check_roster(publication, publication.roster, nothing)
    if publication.head is not None:
        _rules.check_head(publication, publication.head, roster, nothing)
    _rules.check_capsules(publication, owner)
    raise MeshkitError("metadata_forbidden", "a new share is published by its owner")


def _follows(handle: str, chain: Sequence[bytes], record: bytes) -> bool:
    if record in chain:
        return True
    try:
        _rules.check_identity(handle, chain, record)
    except MeshkitError:
        return False
    return True
