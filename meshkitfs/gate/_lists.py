"""Proving membership of a vault, and that a capability token gives what a grant asks for.

The rules are in `meshkitfs.core.membership` and `meshkitfs.core.capability`; here are the questions to the
metadata store, and the memory of what was seen, which no store can take back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from meshkitfs.core.capability import Token, usable_tokens
from meshkitfs.core.keys import SigningKey
from meshkitfs.core.membership import (
    ListMark,
    NumberedList,
    Revocations,
    VaultRecord,
    authentic_list,
    newest_revocations,
    newest_vault,
    revocations_id,
)
from meshkitfs.core.pinned import Pinned
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._trace import Step
from meshkitfs.metadata import AccessList, Metadata
from meshkitfs.state import State

__all__ = ["AccessLists", "Proved"]

LIST_DEADLINE_S = 10
# How many tokens a release service looks at.
SHOWN = 16


@dataclass(frozen=True, slots=True)
class Proved:
    """What was proved: until when it may be believed (UNIX seconds), which rights it leaves, by which list.

    ``rights`` is None where it takes none away. ``caveats`` are for people.
    """

    until: int
    list_id: bytes
    rights: frozenset[str] | None = None
    caveats: tuple[dict[str, Any], ...] = ()


class AccessLists:
    """``signing`` returns the identity's signing keys, of now and before, or raises ``identity_locked`` or
    ``identity_not_found``: a token that was made for a key that its holder has replaced is theirs still."""

    def __init__(
        self, metadata: Callable[[], Metadata], state: State, signing: Callable[[], Sequence[SigningKey]]
    ) -> None:
        self._metadata = metadata
        self._state = state
        self._signing = signing

    async def vault(self, capsule: Capsule, roster: Roster, now: int, step: Step) -> Proved:
        """Prove that this identity is a member of the vault that ``capsule`` names.

        Raises ``vault_membership_required``.
        """
        code = "vault_membership_required"
        pinned = _pinned(capsule.vault, code, "vault")
        try:
            vault = pinned.vault_id
        except MeshkitError as error:
            raise MeshkitError(code, f"the grant names its vault in no known form: {error.detail}") from error
        offered, mark = await self._offered(VaultRecord, vault, pinned.public, code)
        record, until = newest_vault(
            offered.record if offered is not None else None,
            offered.timestamp if offered is not None else None,
            vault=vault, owner=pinned.public, mark=mark, timestamp_keys=roster.timestamp_keys, now=now,
        )  # fmt: skip
        # The encryption key is the one that a capsule is made for, and that only its holder can use.
        if not record.lists(capsule.to):
            raise MeshkitError(
                code, f"record {record.seq} of vault {vault.hex()[:8]} does not list this identity"
            )
        step.note(
            f"record {record.seq} of vault {vault.hex()[:8]} lists this identity, for {until - now} s more"
        )
        return Proved(until, vault)

    async def capability(self, capsule: Capsule, roster: Roster, now: int, step: Step) -> Proved:
        """Prove that this identity holds a token of the capability that ``capsule`` asks for.

        Several tokens count together: each is proof of its own rights. Raises ``capability_required`` if none
        is held here, ``capability_denied`` if none is good,
        ``biscuit_not_installed`` if none is held but what nothing here can read.
        """
        code = "capability_denied"
        asked = _pinned(capsule.cap, code, "capability")
        mine = [key.public for key in self._signing()]
        kept, unread = self._kept()
        held = [token for token in kept if token.pinned == asked]
        if not held:
            if unread:
                raise unread[0]  # it may be the one that is asked for
            detail = f"capability '{asked.label}'"
            if any(token.name == asked.label for token in kept):
                detail += (
                    "; the one held here was issued under another key than the grant names: "
                    "whoever issued it has to grant the share again with '--capability'"
                )
            raise MeshkitError("capability_required", detail)
        list_id = revocations_id(asked.public)
        offered, mark = await self._offered(Revocations, list_id, asked.public, code)
        revoked, until = newest_revocations(
            offered.record if offered is not None else None,
            offered.timestamp if offered is not None else None,
            issuer=asked.public, mark=mark, timestamp_keys=roster.timestamp_keys, now=now,
        )  # fmt: skip
        good, refused = usable_tokens(
            held, asked=asked, holders=mine, share=capsule.share, revoked=revoked, now=now
        )
        if not good:
            raise (unread + refused)[-1]  # each that is held is good or was refused
        until = min(until, *(token.last.exp for token in good))
        rights = frozenset[str]().union(*(token.rights for token in good))
        named = ", ".join(f"{token.id.hex()[:8]} ({len(token.blocks)} blocks)" for token in good)
        step.note(
            f"'{asked.label}': {', '.join(sorted(rights))} by token {named}; not in revocation list "
            f"{revoked.seq}; for {until - now} s more"
        )
        return Proved(until, list_id, rights, tuple(_caveats(token) for token in good))

    def shown(self, capsule: Capsule) -> list[bytes]:
        """Return at most `SHOWN` tokens that ``capsule`` asks for, for a service that checks them itself."""
        if capsule.cap is None:
            return []
        asked = _pinned(capsule.cap, "capability_denied", "capability")
        held = [token for token in self.tokens() if token.pinned == asked]
        # The ones that last longest first: what ran out is of no use there.
        return [token.to_bytes() for token in sorted(held, key=lambda token: -token.last.exp)[:SHOWN]]

    def tokens(self) -> list[Token]:
        """Return the tokens that are kept here and whose chains hold, whoever issued them."""
        return self._kept()[0]

    def _kept(self) -> tuple[list[Token], list[MeshkitError]]:
        """Return `tokens`, and ``biscuit_not_installed`` for each that nothing here can read."""
        found: list[Token] = []
        unread: list[MeshkitError] = []
        for data in self._state.conditions.tokens():
            try:
                found.append(Token.from_bytes(data))
            except MeshkitError as error:
                if error.code == "biscuit_not_installed":
                    unread.append(error)
        return found, unread

    async def _offered(
        self, kind: type[NumberedList], list_id: bytes, owner: bytes, code: str
    ) -> tuple[AccessList | None, ListMark]:
        """Return what the store shows of a list, and what was seen of it before; it counts as seen now."""
        # Read before asking: what the store answers then can only be newer, unless it goes back.
        mark = self._state.conditions.mark(list_id, owner)
        try:
            with trio.fail_after(LIST_DEADLINE_S):
                offered = await self._metadata().access_list(list_id)
        except trio.TooSlowError:
            raise MeshkitError("freshness_unproven", "no answer from the metadata store in time") from None
        except MeshkitError as error:
            # Unknown is not yes, and not no either.
            raise MeshkitError("freshness_unproven", error.detail or error.code) from error
        if offered is not None:
            record = authentic_list(kind, offered.record, list_id, owner, code)
            if record.seq > mark.seq:
                # Signed by its owner, so it has been seen, also if this walk ends here.
                seen = ListMark(record.seq, record.digest)
                await trio.to_thread.run_sync(self._state.conditions.raise_mark, list_id, owner, seen)
        return offered, mark


def _pinned(text: str | None, code: str, what: str) -> Pinned:
    try:
        return Pinned.parse(text or "")
    except MeshkitError as error:
        raise MeshkitError(code, f"the grant names its {what} in no known form: {error.detail}") from error


def _caveats(token: Token) -> dict[str, Any]:
    """Describe what limits a token, for ``user.meshkit.capabilities``: nothing that would help to use it."""
    last = token.last
    return {
        "capability": token.name,
        "token": token.id.hex()[:8],
        "rights": sorted(token.rights),
        "share": last.share.hex() if last.share is not None else None,
        "expires": last.exp,
        "blocks": len(token.blocks),
    }
