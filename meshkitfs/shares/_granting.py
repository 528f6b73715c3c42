"""Capsules and rosters as an owner makes them: pure functions from terms and keys to signed records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshkitfs.core.capsule import capsule_header
from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Roster, make_capsule
from meshkitfs.core.release import EpochSecret, snapshot_mask, xor
from meshkitfs.core.secret_memory import wipe
from meshkitfs.gate import Grant
from meshkitfs.identity import Identity
from meshkitfs.state import Member

__all__ = ["ROSTER_LIFETIME_S", "Terms", "demands_of", "grace_of", "make_member", "make_roster", "own_grant"]

# How long a roster vouches without being renewed. This bounds how long a dishonest metadata service can hide
# a revocation from somebody who has seen nothing newer.
ROSTER_LIFETIME_S = 7 * 86400
# The owner's own capsule, and grants without --expires.
NO_EXPIRY_S = 20 * 365 * 86400
# Grants begin a little in the past, so that a recipient's slow clock does not find them not yet valid.
BACKDATE_S = 60


@dataclass(frozen=True, slots=True)
class Terms:
    """What a grant says beside whom it is for. ``expires`` is UNIX seconds, 0 for none.

    ``pol`` is the capsule's field of that name, without ``who``; where it is None, a ``policy`` is only
    named. ``offline_grace`` is how long (seconds) it is good for after the last proof that it still stands.
    ``keyvault`` is what the recipient's key vault has to give (`meshkitfs.keyvault.DEMANDS`).
    """

    rights: tuple[str, ...] = ("read",)
    expires: int = 0
    policy: str = ""
    vault: str = ""
    capability: str = ""
    pol: Mapping[str, Any] | None = None
    offline_grace: int = 0
    keyvault: tuple[str, ...] = ()

    def policy_for(self, handle: str) -> dict[str, Any] | None:
        """Return the capsule's ``pol`` for a recipient whom the owner knows as ``handle``."""
        if not self.policy:
            return None
        pol = dict(self.pol or {"id": self.policy})
        return pol | {"who": handle} if "rules" in pol else pol


def _held(secret: EpochSecret, grant: str, key: bytes, capsule_id: bytes, own: bool) -> tuple[str, bytes]:
    """Return which part of ``key`` a capsule holds where a release service has the other, and that part.

    The owner's own capsule of an epoch holds the seed, so that the owner needs nobody's release.
    """
    if grant == "snapshot":
        return "half", xor(key, snapshot_mask(secret.release_half, capsule_id))
    return ("whole", bytes(memoryview(secret.raw))) if own else ("half", secret.capsule_half)


def make_member(
    me: Identity, now: int, share_id: bytes, oid: bytes, kind: int, grant: str, terms: Terms, *,
    handle: str, to: bytes, signing: bytes, epoch: int, seq: int, ver: int = 0, root: bytes = b"",
    target: str = "", secret: EpochSecret, snapshot_key: bytes = b"",
) -> Member:  # fmt: skip
    """Make and sign one capsule at ``now`` (UNIX seconds); returns it as the row that remembers it.

    ``to`` and ``signing`` are the recipient's public keys. What the capsule grants is the key of the epoch
    that ``secret`` is of, or for a snapshot ``snapshot_key``; ``secret`` says whether a service has half.
    """
    capsule_id = os.urandom(16)
    expires = terms.expires or now + NO_EXPIRY_S
    header = {
        "id": capsule_id, "grant": grant, "kind": kind, "share": share_id, "oid": oid, "epoch": epoch,
        "ver": ver, "root": root, "nbf": now - BACKDATE_S, "exp": expires, "seq": seq,
        "rights": sorted(terms.rights), "pol": terms.policy_for(handle),
        "vault": terms.vault or None, "cap": terms.capability or None, "offline_grace": terms.offline_grace,
        "keyvault": sorted(terms.keyvault),
    }  # fmt: skip
    key, held = snapshot_key or secret.key, b""
    if secret.service is not None:
        own = to == me.encryption.public
        part, held = _held(secret, grant, key, capsule_id, own)
        header["rel"] = secret.service.header(part)
    try:
        blob = make_capsule(me.signing, header, key, to, held)
    finally:
        if not snapshot_key:
            wipe(key)
        wipe(held)
    return Member(
        share_id, handle, capsule_id, record_hash(blob), kid_of(to), to, signing,
        tuple(sorted(terms.rights)), now - BACKDATE_S, expires, grant, target, terms.policy, terms.vault,
        terms.capability, blob, 0,
    )  # fmt: skip


def grace_of(member: Member) -> int:
    """Return the offline grace (seconds) of a grant that this home has made."""
    if not member.blob:
        return 0
    return int(capsule_header(member.blob)["offline_grace"])


def demands_of(member: Member) -> tuple[str, ...]:
    """Return what a grant that this home has made demands of its recipient's key vault."""
    return tuple(capsule_header(member.blob).get("keyvault", ())) if member.blob else ()


def own_grant(grant: Grant, me: Identity) -> Member:
    """Return the owner's own grant of a share, as its capsule says."""
    capsule = grant.capsule
    return Member(
        capsule.share, me.handle, capsule.id, grant.capsule_hash, capsule.to, _public(me, capsule.to),
        me.signing.public, capsule.rights, capsule.nbf, capsule.exp, "live", "", "", "", "", b"", 0,
    )  # fmt: skip


def _public(me: Identity, kid: bytes) -> bytes:
    return next(key.public for key in me.encryption_keys if key.kid == kid)


def make_roster(
    share_id: bytes, oid: bytes, seq: int, epoch: int, members: list[Member], now: int,
    timestamp_keys: tuple[bytes, ...], minver: int = 0,
) -> Roster:  # fmt: skip
    """Return the roster that lists ``members``, valid from ``now``; whoever may write is a writer."""
    writers = dict.fromkeys(
        member.signing_public for member in members if member.grant == "live" and "write" in member.rights
    )
    return Roster(
        share_id, oid, seq, epoch, tuple(member.capsule_hash for member in members), tuple(writers), minver,
        now, now + ROSTER_LIFETIME_S, timestamp_keys,
    )  # fmt: skip
