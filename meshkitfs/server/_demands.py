"""What a capsule demands beside being in force, checked by the release service itself.

Vault records and revocation lists are the newest of its own database, by the rules that a device's gate
goes by. Tokens are shown by whoever asks. The signature of their request has proved that they hold their
newest key, and their chain that the keys of before were theirs; nobody asks with one of those. A policy is
decided by the rules in the capsule, which its owner signed, or by the one provider that the service was
told to ask. What nobody here can decide is refused.
"""

from __future__ import annotations

from typing import Final

from meshkitfs.core.capability import Token, usable_tokens
from meshkitfs.core.identity_record import verify_links
from meshkitfs.core.membership import ListMark, newest_revocations, newest_vault, revocations_id
from meshkitfs.core.pinned import Pinned
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import AccessList
from meshkitfs.metadata._stored import StoredMetadata
from meshkitfs.metadata.service import Asker, Member
from meshkitfs.policy import Deciders, Demand, ask, lasts

__all__ = ["Demands"]

_NOTHING: Final = AccessList(b"", None)


class Demands:
    """The conditions of a release; see `meshkitfs.metadata.service.Conditions`."""

    def __init__(self, home: StoredMetadata, deciders: Deciders) -> None:
        self._home = home
        self._deciders = deciders

    async def __call__(self, capsule: Capsule, roster: Roster, asker: Asker, now: int) -> int:
        """Return until when all that the capsule demands is proved (UNIX seconds). Raises the refusal."""
        until = capsule.exp
        if capsule.vault is not None:
            until = min(until, await self._vault(capsule, roster, now))
        if capsule.cap is not None:
            until = min(until, await self._capability(capsule, roster, asker, now))
        if capsule.pol is not None:
            until = min(until, await self._policy(capsule, now))
        return until

    async def _vault(self, capsule: Capsule, roster: Roster, now: int) -> int:
        pinned = Pinned.parse(capsule.vault or "")
        offered = await self._home.access_list(pinned.vault_id) or _NOTHING
        record, until = newest_vault(
            offered.record or None, offered.timestamp, vault=pinned.vault_id, owner=pinned.public,
            mark=ListMark(), timestamp_keys=roster.timestamp_keys, now=now,
        )  # fmt: skip
        if not record.lists(capsule.to):
            raise MeshkitError("vault_membership_required", f"vault record {record.seq} does not list it")
        return until

    async def _capability(self, capsule: Capsule, roster: Roster, asker: Asker, now: int) -> int:
        """Look for the right to read in what tokens give; the key gives no less."""
        asked = Pinned.parse(capsule.cap or "")
        if not asker.tokens:
            raise MeshkitError("capability_required", f"capability '{asked.label}'")
        offered = await self._home.access_list(revocations_id(asked.public)) or _NOTHING
        revoked, until = newest_revocations(
            offered.record or None, offered.timestamp, issuer=asked.public, mark=ListMark(),
            timestamp_keys=roster.timestamp_keys, now=now,
        )  # fmt: skip
        tokens: list[Token] = []
        unread: list[MeshkitError] = []
        for shown in asker.tokens:
            try:
                tokens.append(Token.from_bytes(shown))
            except MeshkitError as error:
                unread.append(error)
        good, refused = usable_tokens(
            tokens, asked=asked, holders=await self._holders(asker.member), share=capsule.share,
            revoked=revoked, now=now,
        )  # fmt: skip
        if not any(_reading(capsule) in token.rights for token in good):
            denied = MeshkitError("capability_denied", "no token gives the right to read")
            raise next(iter(unread + refused), denied)
        return min(until, *(token.last.exp for token in good))

    async def _holders(self, who: Member) -> tuple[bytes, ...]:
        """Return the signing keys that ``who`` has and had, the newest first, as their chain proves them.

        Raises ``capability_denied`` if the key that asks was replaced meanwhile, ``invalid_record`` if their
        records are no chain.
        """
        keys = [record.sig for record in verify_links(await self._home.identity(who.handle))]
        if keys[-1] != who.key:
            raise MeshkitError("capability_denied", "the key that asks has just been replaced")
        return tuple(reversed(keys))

    async def _policy(self, capsule: Capsule, now: int) -> int:
        """Ask about the strongest right to read that the capsule has: the key gives no less."""
        demand = Demand.of(capsule.pol or {})
        wanted = _reading(capsule)
        answer = (await ask(self._deciders, demand, capsule, [wanted], now))[wanted]
        if answer.allow is not True or lasts(answer) <= 0:
            why = f": {answer.reason}" if answer.reason else ""
            raise MeshkitError("policy_denied", f"policy '{demand.id}', {wanted}{why}")
        return now + lasts(answer)


def _reading(capsule: Capsule) -> str:
    """The strongest right to read in the capsule: with ``list`` alone, its owner gives the key for that."""
    return "read" if {"read", "write"} & set(capsule.rights) else "list"
