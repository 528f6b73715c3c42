"""The release service: it keeps one half of each epoch's key, and hands it out after checks of its own.

It believes nothing that a request says but who signed it. The newest roster, the capsules and the deposited
halves are those in its database, the time is its own clock's. What it keeps is sealed to a key that is not in
the database, so that whoever has only that has nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.records import Capsule, IdentityRecord, Roster
from meshkitfs.core.release import Deposit, Release, ReleaseKey, released
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _desk, _queries
from meshkitfs.metadata._connection import Connection, row, value
from meshkitfs.metadata._desk import Member
from meshkitfs.metadata._stored import StoredMetadata

__all__ = ["RELEASE_S", "Asker", "Conditions", "ReleaseKeys", "Releasing", "no_conditions"]

# For how long a half is released, unless its settings say less (seconds).
RELEASE_S: Final = 300
# A capsule of another machine's clock may begin so much later.
SKEW_S: Final = 60


@dataclass(frozen=True, slots=True, repr=False)
class ReleaseKeys:
    """The service's keys: ``signing`` signs what it says, to ``encryption`` halves are sealed."""

    signing: SigningKey
    encryption: EncryptionKey

    @classmethod
    def derive(cls, secret: str) -> ReleaseKeys:
        """Return the keys of the secret in the service's settings: 64 hex digits, 32 random bytes.

        Raises invalid_config for anything else.
        """
        try:
            seed = bytes.fromhex(secret)
        except ValueError:
            seed = b""
        if len(seed) != 32 or len(secret) != 64:
            raise MeshkitError("invalid_config", "the key of the release service is not 64 hex digits")

        def derived(label: bytes) -> bytes:
            return HKDFExpand(SHA256(), 32, label).derive(seed)

        return cls(
            SigningKey.from_seed(derived(b"mk/release-sign@1")),
            EncryptionKey.from_seed(derived(b"mk/release-seal@1")),
        )

    def record(self, now: int) -> bytes:
        """Return the signed statement of the key that halves are sealed to."""
        return ReleaseKey(self.encryption.public, now).sign(self.signing)


@dataclass(frozen=True, slots=True)
class Case:
    """What the database says of one request: the capsule and its owner's newest roster have been checked."""

    capsule: Capsule
    roster: Roster
    half: Capsule  # the capsule whose other half is wanted: the same, unless it is of an older epoch
    deposit: Deposit
    to: bytes


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for a half, and what they show for it: capability tokens, as they came."""

    member: Member
    tokens: tuple[bytes, ...] = ()


# Checks what else a capsule in this roster demands (policy, vault, capability), for whoever asks,
# at a time; returns until when that may be believed. Raises the refusal.
Conditions = Callable[[Capsule, Roster, Asker, int], Awaitable[int]]


async def no_conditions(capsule: Capsule, roster: Roster, asker: Asker, now: int) -> int:
    """Refuse what this service has nobody to ask about."""
    if capsule.pol is not None:
        raise MeshkitError("policy_provider_required", "this service decides no policies")
    if capsule.vault is not None:
        raise MeshkitError("vault_membership_required", "this service knows no vaults")
    if capsule.cap is not None:
        raise MeshkitError("capability_required", "this service checks no capabilities")
    return capsule.exp


class Releasing:
    """Keeps halves and hands them out, for ``seconds`` each time. ``clock`` gives UNIX seconds."""

    def __init__(
        self,
        home: StoredMetadata,
        keys: ReleaseKeys,
        clock: Callable[[], float],
        *,
        record_bytes: int,
        seconds: int = RELEASE_S,
        conditions: Conditions = no_conditions,
    ) -> None:
        self.keys = keys
        self.seconds = seconds
        self._home = home
        self._clock = clock
        self._record_bytes = record_bytes
        self.conditions = conditions

    def _now(self) -> int:
        return int(self._clock())

    async def deposit(self, who: Member, share: bytes, record: bytes) -> None:
        """Keep a half of somebody's share. Repeating the same half is harmless.

        It is released for a share only if it is its owner who left it. Raises ``invalid_record``,
        ``head_conflict`` (another half is kept for that epoch), ``quota_exceeded``, ``metadata_forbidden``.
        """
        deposit = Deposit.parse(record, {kid_of(who.key): who.key})
        if deposit.share != share or deposit.to != self.keys.encryption.kid:
            raise MeshkitError("invalid_record", "the half is of another share, or for another service")
        half = self._opened(deposit)
        owner = kid_of(who.key)

        def work(db: Connection) -> None:
            db.lock("share", share)
            if _desk.is_removed(db, "share", share):
                raise MeshkitError("metadata_forbidden", "that share was removed by who runs the service")
            keys = _owner_keys(db, who.key)
            known = _kept(db, share, keys, deposit.epoch)
            if known is not None:
                if self._opened(Deposit.parse(known, keys)) != half:
                    raise MeshkitError("head_conflict", f"another half is kept for epoch {deposit.epoch}")
                return
            db.run(
                "INSERT INTO deposits (share, owner, epoch, blob) VALUES (?, ?, ?, ?)",
                share,
                owner,
                deposit.epoch,
                record,
            )
            _desk.charge(db, who.handle, "bytes", 0, len(record), self._record_bytes)
            _desk.note(db, self._now(), who.handle, "deposit", share, "ok")

        await self._home.write(work)

    async def release(self, asker: Asker, share: bytes, capsule_id: bytes, epoch: int, nonce: bytes) -> bytes:
        """Return the signed answer for the holder of a capsule, with the half of ``epoch`` sealed to them.

        Raises ``key_release_refused``, whose detail begins with the code of what was not as it must be.
        """
        try:
            return await self._release(asker, share, capsule_id, epoch, nonce)
        except MeshkitError as error:
            if error.code in ("metadata_unavailable", "no_space"):
                raise  # that says nothing of who asks
            detail = f"{error.code}: {error.detail}" if error.detail else error.code
            raise MeshkitError("key_release_refused", detail) from None

    async def _release(
        self, asker: Asker, share: bytes, capsule_id: bytes, epoch: int, nonce: bytes
    ) -> bytes:
        who, now = asker.member, self._now()
        case = await self._home.read(lambda db: self._look(db, who, share, capsule_id, epoch, now))
        until = await self.conditions(case.capsule, case.roster, asker, now)

        def work(db: Connection) -> None:
            # Whoever was asked took their time: what was true before must be true still.
            again = self._look(db, who, share, capsule_id, epoch, self._now())
            if again.roster.digest != case.roster.digest:
                raise MeshkitError("freshness_unproven", "the roster was replaced meanwhile; ask again")
            _desk.note(db, self._now(), who.handle, "release", share, "ok")

        await self._home.write(work, durable=False)
        now = self._now()
        exp = min(now + self.seconds, until, case.capsule.exp, case.roster.exp)
        if exp <= now:
            raise MeshkitError("share_expired", "its time is over")
        half = released(self._opened(case.deposit), case.half.grant, case.half.id)
        answer = Release(share, case.capsule.digest, epoch, case.half.to, nonce, now, exp)
        return answer.sealing(half, case.to).sign(self.keys.signing)

    def _opened(self, deposit: Deposit) -> bytes:
        """The half in a deposit. Raises invalid_record: what cannot be opened cannot be released."""
        try:
            half = deposit.open(self.keys.encryption)
        except MeshkitError:
            raise MeshkitError("invalid_record", "a half that this service cannot open") from None
        if len(half) != 32:
            raise MeshkitError("invalid_record", "a half of another size")
        return half

    def _look(
        self, db: Connection, who: Member, share: bytes, capsule_id: bytes, epoch: int, now: int
    ) -> Case:
        """Check a request against what the database has; raises why nothing is to be released."""
        found = row(db, "SELECT owner, blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1", share)
        blob = value(db, "SELECT blob FROM capsules WHERE share = ? AND id = ?", share, capsule_id)
        if found is None or blob is None:
            raise MeshkitError("capsule_not_found")
        owner, newest = found
        keys = _owner_keys(db, owner)
        roster, capsule = Roster.parse(newest, keys), Capsule.parse(blob, keys)
        if (capsule.share, roster.share) != (share, share) or not _desk.owns_mailbox(db, who, capsule.to):
            raise MeshkitError("capsule_not_found")  # to all others it does not exist
        if capsule.digest not in roster.caps:
            raise MeshkitError("share_revoked", f"roster {roster.seq} does not list the capsule")
        if now >= roster.exp:
            raise MeshkitError("freshness_unproven", f"roster {roster.seq} ran out {now - roster.exp} s ago")
        if now + SKEW_S < capsule.nbf or now >= capsule.exp:
            raise MeshkitError("share_expired", "outside the capsule's time")
        if capsule.grant == "live" and capsule.epoch != roster.epoch:
            raise MeshkitError("share_revoked", f"epoch {capsule.epoch} is over")
        half = capsule if epoch == capsule.epoch else _older(db, who, capsule, epoch, keys)
        self._check_named(half)
        kept = _kept(db, share, keys, epoch)
        if kept is None:
            raise MeshkitError("key_release_unavailable", f"the owner has left no half of epoch {epoch} here")
        return Case(capsule, roster, half, Deposit.parse(kept, keys), _encryption_key(db, who, half.to))

    def _check_named(self, capsule: Capsule) -> None:
        service = capsule.service
        if service is None or capsule.rel is None or capsule.rel["part"] != "half":
            raise MeshkitError("right_not_granted", "the capsule needs no release")
        if service.key != self.keys.signing.public:
            raise MeshkitError("right_not_granted", "the capsule names another release service")


def _owner_keys(db: Connection, owner: bytes) -> dict[bytes, bytes]:
    """All signing keys of the identity that has this one, by kid: they may have been replaced since."""
    keys = {kid_of(owner): owner}
    handle = _queries.handle_of(db, kid_of(owner))
    for blob in _queries.chain(db, handle) if handle is not None else ():
        public = IdentityRecord.parse_self_signed(blob).sig
        keys[kid_of(public)] = public
    return keys


def _kept(db: Connection, share: bytes, keys: Iterable[bytes], epoch: int) -> bytes | None:
    """The half of an epoch that was left under one of these kids."""
    query = "SELECT blob FROM deposits WHERE share = ? AND owner = ? AND epoch = ?"
    found = (value(db, query, share, kid, epoch) for kid in keys)
    return next((bytes(blob) for blob in found if blob is not None), None)


def _older(db: Connection, who: Member, capsule: Capsule, epoch: int, keys: dict[bytes, bytes]) -> Capsule:
    """The live capsule of an older epoch that the recipient of ``capsule`` was granted in its time."""
    if capsule.grant == "live" and epoch < capsule.epoch:
        query = (
            "SELECT blob FROM capsules WHERE share = ? AND kid IN "
            "(SELECT kid FROM recipients WHERE handle = ?) ORDER BY n"
        )
        for (blob,) in db.rows(query, capsule.share, who.handle):
            past = Capsule.parse(blob, keys)
            if past.grant == "live" and past.epoch == epoch and past.rel is not None:
                return past
    raise MeshkitError("right_not_granted", f"no capsule of epoch {epoch} was granted to this identity")


def _encryption_key(db: Connection, who: Member, kid: bytes) -> bytes:
    """The X-Wing public key of that kid, from the chain of whoever asks."""
    for blob in reversed(_queries.chain(db, who.handle)):
        record = IdentityRecord.parse_self_signed(blob)
        if record.enc_kid == kid:
            return record.enc
    raise MeshkitError("recipient_not_authorized", "the key is in no record of this identity")
