"""The ordered checks. The first failure ends the walk; nothing is unwrapped, fetched or decrypted before.

The order is that of docs/concepts.md and MeshKit's public description: identity, capsule, roster,
freshness, validity, key vault, vault, capability, policy, then the unwrap, then the head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import trio

from meshkitfs.core._unwrap import open_capsule
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import _evidence as evidence
from meshkitfs.gate._conditions import Conditions, KeyVaultNow
from meshkitfs.gate._epochs import Epochs
from meshkitfs.gate._grant import Grant, HeadView, implied, lease_now, make_grant
from meshkitfs.gate._history import METADATA_DEADLINE_S, History
from meshkitfs.gate._kept import Kept, is_newest_seen
from meshkitfs.gate._lists import AccessLists
from meshkitfs.gate._owners import Owners
from meshkitfs.gate._released import Released
from meshkitfs.gate._trace import Step, Trace
from meshkitfs.metadata import Metadata, ReleaseSource, ShareState
from meshkitfs.policy import PolicyProvider
from meshkitfs.state import Clock, Mark, ShareRow, State

__all__ = ["QUARANTINED", "Counters", "Gate"]

_log = logging.getLogger(__name__)

# How long before its end a lease is renewed, at most: so that what cannot wait (a listing) does not meet it.
RENEW_AHEAD_S = 60.0
# What says that the metadata store goes back in time or shows another history: the share is quarantined.
# For a head that is until a person says what is true, for a roster until the one that was seen is back.
QUARANTINED = frozenset({"head_rollback", "head_fork", "roster_rollback", "roster_fork"})


@dataclass(slots=True)
class Counters:
    """What the gate has done since start; tests use it to prove what did not happen."""

    walks: int = 0
    unwraps: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    # Questions to policies, one for each right, by what came of them; see `Conditions`.
    questions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Proof:
    """What a walk has proved before it looks at the grant's own terms.

    ``vouched`` is when the metadata store last vouched for the roster, ``until`` when the proof of freshness
    ends (UNIX seconds). ``unproven`` is why there is no fresh one, if an older one is good enough.
    """

    found: ShareState
    capsules: dict[bytes, Capsule]
    capsule: Capsule
    capsule_hash: bytes
    roster: Roster
    vouched: int
    now: int
    until: int
    mark: Mark
    # The keys that the share's owner has or had: kid to public key.
    owner: Mapping[bytes, bytes]
    unproven: MeshkitError | None = None


class Gate:
    """Opens shares for one identity.

    ``encryption`` returns the identity's X-Wing keys, the newest first, or raises
    ``identity_locked``/``identity_not_found``; so does ``signing`` with its signing key, to which capability
    tokens are bound.
    ``lease_s`` is how long (seconds, 5 minutes at most) a grant is good for without being renewed;
    ``key_vault`` says what this home's key vault gives, without which no grant that demands any of it opens.
    """

    def __init__(
        self,
        encryption: Callable[[], Sequence[EncryptionKey]],
        signing: Callable[[], Sequence[SigningKey]],
        metadata: Metadata,
        state: State,
        clock: Clock,
        owners: Owners,
        policy: PolicyProvider | None = None,
        releases: ReleaseSource | None = None,
        *,
        lease_s: float = evidence.FRESH_S,
        key_vault: KeyVaultNow | None = None,
    ) -> None:
        self.lease_s = min(lease_s, float(evidence.FRESH_S))
        self._encryption = encryption
        self._metadata = metadata
        self._state = state
        self._clock = clock
        self._owners = owners
        self.lists = AccessLists(lambda: self._metadata, state, signing)
        self._conditions = Conditions(policy, self.lists, key_vault)
        self._history = History(lambda: self._metadata, state, clock)
        self._kept = Kept(state)
        self.counters = Counters(questions=self._conditions.questions)
        # Unwrapped keys by share and capsule hash: renewing a lease every few minutes needs no new unwrap.
        self._keys: dict[bytes, dict[bytes, SecretBytes]] = {}
        # Those that needed a release service, which end with the release.
        self._released = Released(releases, clock, self.lists.shown, self._count_unwrap)
        # The last refusal of each share, so that asking again twice a second is not logged twice a second.
        self._refused: dict[bytes, str] = {}

    @property
    def renew_ahead_s(self) -> float:
        """How long before its end a lease is to be renewed."""
        return min(RENEW_AHEAD_S, self.lease_s / 3)

    def forget_keys(self) -> None:
        """Wipe every unwrapped key (the identity was locked). Grants that hold one must have ended."""
        for held in self._keys.values():
            for key in held.values():
                key.wipe()
        self._keys.clear()
        self._released.forget_all()

    def drop_ended(self) -> None:
        """Drop the keys whose release is over; to be called every now and then."""
        self._released.drop_ended()

    def _count_unwrap(self) -> None:
        self.counters.unwraps += 1

    async def confirm(self, row: ShareRow, action: str | None) -> Grant:
        """As `open`, but only with a fresh proof: for what must not rest on what was true some time ago."""
        grant = await self.open(row, action)
        if grant.unproven is not None:
            raise grant.unproven
        return grant

    async def note_published(
        self, row: ShareRow, *, head: bytes | None = None, roster: bytes | None = None,
        capsules: Sequence[bytes] = (),
    ) -> None:  # fmt: skip
        """Note what this device has published of a share (records): what is kept goes on from there.

        ``capsules`` are those addressed to this identity.
        """
        await self._kept.go_on(row.ref, head, roster, capsules)

    async def remembered_roster(self, row: ShareRow) -> Roster | None:
        """Return the roster that last proved this share of one's own, as far as it is known here."""
        found = await self._kept.get(row.ref)
        if found is None:
            return None
        try:
            return evidence.roster(found, row, self._owners.known(row), Mark())[0]
        except MeshkitError:
            return None

    async def open(self, row: ShareRow, action: str | None, trace: Trace | None = None) -> Grant:
        """Walk the checks for ``row`` and return a grant that includes ``action``; None for any right at all.

        Raises MeshkitError with the code of the first check that failed. Every code that can come from here
        has errno EACCES, except those of a bad history: `QUARANTINED`, and ``invalid_record`` (a head that no
        listed writer signed).
        """
        trace = trace if trace is not None else Trace()
        self.counters.walks += 1
        try:
            grant = await self._walk(row, action, trace)
        except MeshkitError as error:
            self._refuse(row, action, error)
            raise
        self._refused.pop(row.ref, None)
        return grant

    def _refuse(self, row: ShareRow, action: str | None, error: MeshkitError) -> None:
        self.counters.refusals[error.code] = self.counters.refusals.get(error.code, 0) + 1
        if error.code == "right_not_granted":
            level = logging.INFO  # the grant itself is good
        else:
            # What may not be used is not kept either; a grant that comes back is unwrapped anew.
            self._keys.pop(row.share, None)
            self._released.forget(row.share)
            level = logging.DEBUG if self._refused.get(row.ref) == error.code else logging.WARNING
            self._refused[row.ref] = error.code
        fields = {
            "code": error.code,
            "share": row.share.hex()[:8],
            "action": action or "any",
            "detail": error.detail,
        }
        _log.log(level, "refused", extra={"fields": fields})

    async def _walk(self, row: ShareRow, action: str | None, trace: Trace) -> Grant:
        """Take every step in its order; each raises its refusal, which ends the walk."""
        asked = lease_now()
        mine = self._identity(trace)
        proof = await self._proved(row, mine, trace)
        capsule, roster, now = proof.capsule, proof.roster, proof.now
        _check_validity(proof, row, trace)
        granted = _check_rights(proof, row, action, trace)
        met = await self._conditions.check(capsule, roster, granted, action, now, trace)
        if row.grant == "live":
            self._check_quarantine(row, trace)
        with trace.step("key") as step:
            secret, released_until = await self._key(capsule, proof.capsule_hash, mine, now, step)
        with trace.step("head") as step:
            head = await self._history.head(proof.found, row, capsule, roster, proof.mark)
            step.note(f"version {head.version}", signer=head.writer, since=head.time)
        await self._note_head(row, proof, head)
        if secret.wiped:
            raise MeshkitError("identity_locked", "it was locked meanwhile")
        await self._note_proof(row, proof)
        proofs = {"share_expired": capsule.exp, "freshness_unproven": proof.until, **met.proofs}
        if released_until:
            proofs["key_release_unavailable"] = released_until
        epochs = Epochs(proof.capsules, capsule, mine, self._released, self._unwrap)
        grant = make_grant(
            secret,
            capsule,
            proof.capsule_hash,
            roster,
            head,
            now=self._clock.exact(),
            proofs=proofs,
            older=epochs.key,
            reach=epochs.reach,
            secret_of=epochs.secret,
            withheld=met.withheld,
            one_open=met.one_open,
            owner=proof.owner,
            lists=met.lists,
            caveats=met.caveats,
        )
        grant.limit(asked + self.lease_s)
        grant.proved, grant.unproven = proof.vouched, proof.unproven
        return grant

    def _identity(self, trace: Trace) -> dict[bytes, EncryptionKey]:
        """Return this identity's encryption keys by kid, the newest first."""
        with trace.step("identity") as step:
            newest, *former = self._encryption()
            step.note(f"encryption key {newest.kid.hex()[:16]}", signer=newest.kid)
            return {key.kid: key for key in (newest, *former)}

    async def _proved(self, row: ShareRow, mine: Mapping[bytes, EncryptionKey], trace: Trace) -> _Proof:
        """Prove capsule, roster and freshness, by what the store shows or, if it may be, what is kept."""
        try:
            return await self._prove(row, mine, trace)
        except MeshkitError as error:
            if error.code != "freshness_unproven":
                raise
            return await self._remember(row, mine, trace, error)

    def _check_quarantine(self, row: ShareRow, trace: Trace) -> None:
        """Refuse what is known already, so nothing needs to be unwrapped to find it out again."""
        try:
            self._history.check_quarantine(row.share)
        except MeshkitError:
            with trace.step("head"):
                raise

    async def _note_head(self, row: ShareRow, proof: _Proof, head: HeadView) -> None:
        """Have the mark on the disk before anything that it covers can be read (rollback memory)."""
        if proof.capsule.grant == "live" and head.version > proof.mark.head_version:
            mark = replace(proof.mark, head_version=head.version, head_hash=head.hash)
            await trio.to_thread.run_sync(self._state.raise_mark, row.share, mark)

    async def _note_proof(self, row: ShareRow, proof: _Proof) -> None:
        """Keep a fresh proof where it may be gone by later, and raise the clock floor to it.

        Only a walk that passed may do that: an attacker's record must not.
        """
        if proof.unproven is not None:
            return
        self._clock.raise_floor(proof.vouched)
        if row.mine or proof.capsule.offline_grace:
            await self._kept.keep(row.ref, proof.found, proof.vouched)
        else:
            await self._kept.forget(row.ref)

    async def _prove(self, row: ShareRow, mine: Mapping[bytes, EncryptionKey], trace: Trace) -> _Proof:
        """Ask the metadata store, and check what it shows: capsule, roster, freshness."""
        # Read before asking: what the store answers then can only be newer, unless it goes back.
        mark = self._state.mark(row.share)
        by = row.owner_handle
        with trace.step("capsule") as step:
            found = await self._ask(row, mine)
            signers = await self._owners.signers(row, found, self._clock.now)
            keys = signers.keys if signers else {kid_of(row.owner_public): row.owner_public}
            capsules = evidence.capsules(found.capsules, row, keys, mine)
            newest = max(capsules.values(), key=lambda capsule: (capsule.seq, capsule.exp))
            said = f"{len(capsules)} signed by {row.owner_handle}"
            step.note(said, until=newest.exp, by=by, signer=newest.frm)
        with trace.step("roster") as step:
            roster, roster_hash = evidence.roster(found, row, keys, mark)
            owner = roster.signer
            if signers is not None:
                self._owners.check_new(row, roster, roster_hash, mark, signers, self._clock.now)
                await self._owners.note(row, roster, signers)
            step.note(f"roster {roster.seq}", since=roster.iat, until=roster.exp, by=by, signer=owner)
            if roster.seq > mark.roster_seq:
                # Signed by the owner, so it has been seen, also if it says that this grant was revoked:
                # an older one that still lists it must not be believed later.
                mark = replace(mark, roster_seq=roster.seq, roster_hash=roster_hash)
                await trio.to_thread.run_sync(self._state.raise_mark, row.share, mark)
            capsule, capsule_hash = evidence.listed(capsules, roster, row)
            step.evidence = f"roster {roster.seq} lists capsule {capsule.id.hex()[:16]}"
        with trace.step("freshness") as step:
            now = self._clock.now()
            # Whose roster it is can renew it, also when it has run out.
            stamp = evidence.timestamp(found, roster, roster_hash, now, renewable=row.mine)
            until = evidence.fresh_until(stamp)
            if not row.mine:
                until = min(until, roster.exp)
            step.note(
                f"timestamp of {now - stamp.iat} s ago, good for {until - now} s more",
                by="the metadata store",
                signer=stamp.signer,
                since=stamp.iat,
                until=until,
            )
        return _Proof(found, capsules, capsule, capsule_hash, roster, stamp.iat, now, until, mark, keys)

    async def _remember(
        self, row: ShareRow, mine: Mapping[bytes, EncryptionKey], trace: Trace, error: MeshkitError
    ) -> _Proof:
        """Go by the last proof of this share, where that may be: within an offline grace, or if it is ours.

        Nobody but this identity can take its own share from it, so what it knows of its own roster needs no
        witness. Others need the newest records this device has seen, and a time since the last timestamp that
        their grant allows; the clock floor sees to it that the time passes. Raises ``error``, which is why
        there is no fresh proof, with more detail; and ``clock_rollback``.
        """
        mark = self._state.mark(row.share)
        found = await self._kept.get(row.ref)
        if found is None or not is_newest_seen(found, mark, live=row.grant == "live"):
            raise error
        now = self._clock.now()
        try:
            keys = self._owners.known(row)
            capsules = evidence.capsules(found.capsules, row, keys, mine)
            roster, roster_hash = evidence.roster(found, row, keys, mark)
            capsule, capsule_hash = evidence.listed(capsules, roster, row)
            vouched = 0
            if not row.mine:
                vouched = evidence.vouched(found, roster, roster_hash, now).iat
        except MeshkitError:
            raise error from None
        until = now + evidence.FRESH_S
        if row.mine:
            last_word = "this identity is the owner, and has published no other roster"
        else:
            last = min(vouched + capsule.offline_grace, roster.exp)
            if now >= last:
                if capsule.offline_grace:
                    error = MeshkitError(
                        error.code, f"{error.detail}; the offline grace ended {now - last} s ago"
                    )
                raise error
            until = min(until, last)
            last_word = f"last {now - vouched} s ago; offline grace, for {last - now} s more"
            self._clock.raise_floor(now)
        trace.again("capsule", "roster", "freshness")
        for name, note in (
            ("capsule", "remembered"),
            (
                "roster",
                f"roster {roster.seq}, the newest that was seen, lists capsule {capsule.id.hex()[:16]}",
            ),
            ("freshness", f"not now ({error.detail}); {last_word}"),
        ):
            with trace.step(name) as step:
                step.note(note, by=row.owner_handle, signer=roster.signer, until=until)
        return _Proof(found, capsules, capsule, capsule_hash, roster, vouched, now, until, mark, keys, error)

    async def _ask(self, row: ShareRow, kids: Iterable[bytes]) -> ShareState:
        """Return where the share stands, with the capsules for any of the keys, the newest first.

        Those for former keys are asked for afterwards: what the roster lists is there by then.
        """
        newest, *former = kids
        try:
            with trio.fail_after(METADATA_DEADLINE_S):
                found = await self._metadata.share_state(row.share, newest)
                for kid in former:
                    more = await self._metadata.capsules(row.share, kid)
                    found = replace(found, capsules=(*found.capsules, *more))
                return found
        except trio.TooSlowError:
            raise MeshkitError("freshness_unproven", "no answer from the metadata store in time") from None
        except MeshkitError as error:
            # Unknown is not yes: without the store nothing can be proved, whatever its trouble is.
            raise MeshkitError("freshness_unproven", error.detail or error.code) from error

    async def _key(
        self, capsule: Capsule, capsule_hash: bytes, keys: Mapping[bytes, EncryptionKey], now: int, step: Step
    ) -> tuple[SecretBytes, int]:
        """Return the key of ``capsule``, and the end of its release (UNIX seconds; 0 if it needs none)."""
        if not Released.needed(capsule):
            secret = self._unwrap(capsule, capsule_hash, keys)
            step.note("unwrapped; matches the commitment in the signed capsule")
            return secret, 0
        held = await self._released.obtain(capsule, capsule_hash, capsule, keys[capsule.to])
        assert capsule.rel is not None  # a release was needed
        step.note(
            f"unwrapped with the half that {capsule.rel['url']} released for {held.exp - now} s more; "
            "matches the commitment in the signed capsule"
        )
        return held.key, held.exp

    def _unwrap(
        self, capsule: Capsule, capsule_hash: bytes, keys: Mapping[bytes, EncryptionKey]
    ) -> SecretBytes:
        held = self._keys.setdefault(capsule.share, {})
        secret = held.get(capsule_hash)
        if secret is None:
            self.counters.unwraps += 1
            secret = held[capsule_hash] = SecretBytes(open_capsule(capsule, keys[capsule.to]))
        return secret


def _check_validity(proof: _Proof, row: ShareRow, trace: Trace) -> None:
    capsule, now = proof.capsule, proof.now
    with trace.step("validity") as step:
        step.note("", since=capsule.nbf, until=capsule.exp, by=row.owner_handle, signer=proof.roster.signer)
        if now + evidence.SKEW_S < capsule.nbf:
            raise MeshkitError("share_expired", f"valid in {capsule.nbf - now} s")
        if now >= capsule.exp:
            raise MeshkitError("share_expired", f"expired {now - capsule.exp} s ago")
        step.evidence = f"for {capsule.exp - now} s more"


def _check_rights(proof: _Proof, row: ShareRow, action: str | None, trace: Trace) -> frozenset[str]:
    """Return everything that the capsule grants."""
    with trace.step("rights") as step:
        granted = implied(proof.capsule.rights)
        rule = action or "any"
        step.note(", ".join(sorted(granted)), rule=rule, by=row.owner_handle, signer=proof.roster.signer)
        if action is not None and action not in granted:
            raise MeshkitError("right_not_granted", f"'{action}' is not among {step.evidence}")
        return granted
