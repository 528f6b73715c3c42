"""A grant: a lease on a share's keys, made by the gate and by nobody else."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from meshkitfs.core._mint import mint_key
from meshkitfs.core.blocks import ContentKey
from meshkitfs.core.keys import ver_key
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.core.release import EpochSecret
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.errors import MeshkitError

__all__ = ["Grant", "HeadView", "lease_now", "make_grant"]

_GATE_ONLY = object()

# What each right of a capsule lets an identity do. Reading implies listing; writing implies both.
_IMPLIED = {
    "list": {"list"},
    "read": {"read", "list"},
    "write": {"read", "list", "write"},
    "reshare": {"reshare"},
}


# Leases count on a clock that nobody can set, and that goes on while the machine sleeps.
_LEASE_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_now() -> float:
    """Return the time on the clock that leases count on (seconds)."""
    return time.clock_gettime(_LEASE_CLOCK)


def implied(rights: Iterable[str]) -> frozenset[str]:
    """Return everything that ``rights`` (of a capsule) let an identity do."""
    return frozenset().union(*(_IMPLIED.get(right, set()) for right in rights))


def _no_older(epoch: int) -> SecretBytes:
    raise MeshkitError("right_not_granted", f"this grant holds no key of epoch {epoch}")


async def _reach_no_older(epoch: int) -> None:
    pass  # `_no_older` says so when the key is wanted


def _no_secret(epoch: int) -> EpochSecret:
    raise MeshkitError("right_not_granted", f"this grant holds no key of epoch {epoch} to give away")


@dataclass(frozen=True, slots=True)
class HeadView:
    """The verified newest head of a share: where its tree starts. All zero for a share without one yet."""

    version: int = 0
    epoch: int = 0
    root: bytes = b""
    hash: bytes = b""
    writer: bytes = b""
    time: int = 0


@final
class Grant:
    """The proof that a share may be used now, and the only source of its content keys.

    A grant ends at the earliest of its proofs (``deadline``, in seconds of the lease clock) or when `end` is
    called. From then on `content_key` raises, so an open handle cannot read another block.
    """

    __slots__ = (
        "_error", "_key", "_lapse", "_older", "_reach", "_secret_of", "_withheld", "capsule", "capsule_hash",
        "caveats", "deadline", "expires", "fresh_until", "head", "lifetime", "lists", "one_open", "owner",
        "proved", "rights", "roster", "unproven",
    )  # fmt: skip

    def __init__(
        self, token: object, key: SecretBytes, capsule: Capsule, roster: Roster, head: HeadView
    ) -> None:
        if token is not _GATE_ONLY:
            raise TypeError("a Grant is made by meshkitfs.gate only")
        self._key: SecretBytes | None = key
        self._error: MeshkitError | None = None
        self._lapse = "freshness_unproven"
        self._older: Callable[[int], SecretBytes] = _no_older
        self._reach: Callable[[int], Awaitable[None]] = _reach_no_older
        self._secret_of: Callable[[int], EpochSecret] = _no_secret
        self._withheld: Mapping[str, MeshkitError] = {}
        # The ids of the access lists that it relies on, and what limits the tokens behind it (for people).
        self.lists: tuple[bytes, ...] = ()
        self.caveats: tuple[dict[str, Any], ...] = ()
        self.capsule = capsule
        self.capsule_hash = b""
        self.roster = roster
        self.head = head
        self.rights = implied(capsule.rights)
        self.deadline = 0.0
        self.lifetime = 0.0
        # Whether the next open has to ask again although the lease lives: nobody said how long it may be
        # used.
        self.one_open = False
        self.expires = capsule.exp
        # The keys that the owner of the share has or had: kid to public key.
        self.owner: Mapping[bytes, bytes] = {}
        self.fresh_until = 0
        # When the metadata store last vouched for it (UNIX seconds), and why it does not now; None: it does.
        self.proved = 0
        self.unproven: MeshkitError | None = None

    def __repr__(self) -> str:
        return f"<Grant {'+'.join(sorted(self.rights))} {'alive' if self.alive else 'ended'}>"

    @property
    def enforcement(self) -> str:
        """Who sees to it that the grant ends: "client", this program alone; "release", a service too."""
        return "client" if self.capsule.rel is None else "release"

    @property
    def alive(self) -> bool:
        return self._error is None and lease_now() < self.deadline

    @property
    def seconds_left(self) -> float:
        """How long the lease goes on if nothing renews or ends it."""
        return 0.0 if self._error is not None else max(0.0, self.deadline - lease_now())

    @property
    def expired(self) -> MeshkitError | None:
        """Why it is over for good, if its own end has come; a lease that can be renewed is not."""
        if self._lapse != "share_expired" or lease_now() < self.deadline:
            return None
        return MeshkitError("share_expired", "its time ran out while it was in use")

    def ends_within(self, seconds: float) -> bool:
        """Return whether the lease is over in so many seconds, or already."""
        return self._error is not None or lease_now() + seconds >= self.deadline

    def limit(self, deadline: float) -> None:
        """Let the lease end at ``deadline`` (seconds of the lease clock) if it does not before."""
        if deadline < self.deadline:
            self.deadline, self._lapse = deadline, "freshness_unproven"

    def due(self, seconds: float) -> bool:
        """Return whether to renew it: it is over in so many seconds, or lives in its last quarter."""
        return self.ends_within(min(seconds, self.lifetime / 4))

    def withholds(self, right: str) -> bool:
        """Return whether the capsule has ``right``, and what it demands beside that was answered with no."""
        return right in self._withheld

    def end(self, error: MeshkitError) -> None:
        """End the lease now and forget the key; later uses raise ``error``."""
        self._error = error
        self._key = None
        self._older, self._reach, self._secret_of = _no_older, _reach_no_older, _no_secret

    def check(self) -> None:
        """Raise the reason why this grant is over, if it is."""
        if self._error is not None:
            raise self._error
        if lease_now() >= self.deadline:
            raise self.expired or MeshkitError(self._lapse, "the lease has run out and was not renewed")

    def require(self, right: str) -> None:
        """Raise unless the grant is alive and includes ``right`` (``right_not_granted``)."""
        self.check()
        if right in self._withheld:
            raise self._withheld[right]
        if right not in self.rights:
            raise MeshkitError(
                "right_not_granted", f"'{right}' is not among {', '.join(sorted(self.rights))}"
            )

    def _secret(self) -> SecretBytes:
        self.check()
        assert self._key is not None  # end() sets the error that check() raises
        if self._key.wiped:
            raise MeshkitError("identity_locked")
        return self._key

    def content_key(self, ref: bytes) -> ContentKey:
        """Return the key that ``ref`` (a 64-byte block reference from an opened manifest) carries."""
        self.check()
        return mint_key(ref[32:])

    async def reach(self, epoch: int) -> None:
        """Make `root_key` work for ``epoch``: a release service may have to be asked for an older one.

        Raises ``right_not_granted``, ``key_release_refused``, ``key_release_unavailable``.
        """
        self.check()
        if self.capsule.grant == "live" and epoch != self.capsule.epoch:
            await self._reach(epoch)

    def root_key(self, epoch: int, version: int) -> ContentKey:
        """Return the key of the tree's own root manifest.

        A live grant derives it from the share's epoch key; a snapshot grant holds it as it is, and any
        other version than the one it was made for is refused with ``right_not_granted``.
        """
        key = self._secret()
        if self.capsule.grant == "snapshot":
            if (epoch, version) != (self.capsule.epoch, self.capsule.ver):
                raise MeshkitError("right_not_granted", "a snapshot grant opens exactly one version")
            return mint_key(bytes(key.view))
        if epoch != self.capsule.epoch:
            # A member in good standing may still open what was sealed before the last rotation.
            key = self._older(epoch)
        return mint_key(ver_key(key.view, self.capsule.oid, epoch, version))

    def sealing_key(self, version: int) -> bytes:
        """Return the raw key under which the root manifest of ``version`` is sealed. Needs ``write``."""
        self.require("write")
        if self.capsule.grant != "live":
            raise MeshkitError("right_not_granted", "a snapshot cannot be written")
        return ver_key(self._secret().view, self.capsule.oid, self.capsule.epoch, version)

    @property
    def owner_now(self) -> Mapping[bytes, bytes]:
        """The keys of the owner, by kid, that speak for the share now: the roster's, and what came later."""
        kids = list(self.owner)
        at = kids.index(self.roster.signer)
        return {kid: self.owner[kid] for kid in kids[at:]}

    def epoch_key(self) -> bytes:
        """Return a copy of the share's epoch key, to wrap it for somebody else; the caller wipes it.

        Needs ``reshare``.
        """
        self.require("reshare")
        return bytes(self._secret().view)

    def epoch_secret(self, epoch: int) -> EpochSecret:
        """Return all that the owner has of an epoch, to make capsules of it, and wipe. Needs ``reshare``."""
        self.require("reshare")
        return self._secret_of(epoch)


def make_grant(
    key: SecretBytes,
    capsule: Capsule,
    capsule_hash: bytes,
    roster: Roster,
    head: HeadView,
    *,
    now: float,
    proofs: Mapping[str, int],
    older: Callable[[int], SecretBytes],
    reach: Callable[[int], Awaitable[None]],
    secret_of: Callable[[int], EpochSecret],
    withheld: Mapping[str, MeshkitError],
    one_open: bool,
    owner: Mapping[bytes, bytes],
    lists: tuple[bytes, ...],
    caveats: tuple[dict[str, Any], ...],
) -> Grant:
    """Make a grant that lives from ``now`` (wall-clock seconds) until the earliest of its proofs ends.

    ``proofs`` says until when each of them may be believed, by the code of what follows. ``older`` yields the
    epoch key of an earlier epoch from an older capsule of the same recipient, ``reach`` makes sure that it
    can, ``secret_of`` yields what an owner has of an epoch. ``withheld`` are rights of the capsule that it
    does not get, with the refusals; ``one_open`` says that the next open asks again; ``owner`` are the
    owner's keys, ``lists`` and ``caveats`` say what it rests on. For the gate.
    """
    grant = Grant(_GATE_ONLY, key, capsule, roster, head)
    grant.capsule_hash = capsule_hash
    # What cannot be renewed comes first if two end together.
    grant._lapse = min(proofs, key=lambda code: (proofs[code], code != "share_expired"))
    grant.lifetime = max(0.0, proofs[grant._lapse] - now)
    grant.deadline = lease_now() + grant.lifetime
    grant.rights -= withheld.keys()
    grant._withheld = withheld
    grant.one_open = one_open
    grant.fresh_until = proofs["freshness_unproven"]
    grant._older, grant._reach, grant._secret_of = older, reach, secret_of
    grant.owner = owner
    grant.lists = lists
    grant.caveats = caveats
    return grant
