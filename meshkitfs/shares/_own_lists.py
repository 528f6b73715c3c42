"""The lists that this home signs: its vaults, and the list of the capability tokens it has revoked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from meshkitfs.core.membership import (
    LIST_LIFETIME_S,
    LIST_RENEW_S,
    MEMBERS_MAX,
    ListMark,
    NumberedList,
    Revocations,
    VaultRecord,
    member_entry,
    revocations_id,
)
from meshkitfs.core.pinned import Pinned, valid_label
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.shares._services import Services
from meshkitfs.state import OwnList

__all__ = ["REVOKED", "OwnLists", "Vaults"]

_log = logging.getLogger(__name__)

# What the revocation list is kept under; no vault can be called this.
REVOKED: Final = ""
# How often the owner's daemon looks whether a list has to be renewed.
_LOOK_S: Final = 5
# Somebody else's change (another device of the same owner, or an answer that was lost) is taken in, and the
# own change made again on top of it, so many times.
_TRIES: Final = 3

L = TypeVar("L", bound=NumberedList)


class OwnLists:
    """Signs and publishes the next record of a list. ``identity`` returns the unlocked identity or raises."""

    def __init__(self, services: Services, identity: Callable[[], Identity]) -> None:
        self._services = services
        self._identity = identity
        # Each record is built on the one before.
        self._turn = trio.Lock()
        self._next_look = 0

    @property
    def now(self) -> int:
        """UNIX seconds."""
        return int(self._services.wall())

    async def change_vault(
        self,
        name: str,
        list_id: bytes,
        change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]],
        handles: dict[str, str],
    ) -> VaultRecord:
        """Publish what ``change`` makes of the vault's members; ``handles`` says who they are."""

        def make(before: VaultRecord | None, **common: int | bytes) -> VaultRecord:
            members = change(before.members if before is not None else ())
            return VaultRecord(**common, members=members)  # type: ignore[arg-type]

        return await self._next(VaultRecord, name, list_id, make, handles)

    async def change_revocations(
        self, change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
    ) -> Revocations:
        """Publish what ``change`` makes of the ids of revoked tokens."""

        def make(before: Revocations | None, **common: int | bytes) -> Revocations:
            tokens = change(before.tokens if before is not None else ())
            return Revocations(**common, tokens=tokens)  # type: ignore[arg-type]

        list_id = revocations_id(self._identity().signing.public)
        return await self._next(Revocations, REVOKED, list_id, make, {})

    async def renew(self) -> None:
        """Sign lists anew before they run out; cheap to call often. Raises if one could not be renewed."""
        if self.now < self._next_look:
            return
        self._next_look = self.now + _LOOK_S
        failure: MeshkitError | None = None
        for row in self._services.state.conditions.own_lists():
            kind: type[NumberedList] = Revocations if row.name == REVOKED else VaultRecord
            if kind.parse_owned(row.record).exp - self.now >= LIST_RENEW_S:
                continue
            try:
                if row.name == REVOKED:
                    await self.change_revocations(lambda tokens: tokens)
                else:
                    await self.change_vault(row.name, row.list_id, lambda members: members, row.handles)
            except MeshkitError as error:
                # One that cannot be renewed does not keep the others from it.
                failure = error
        if failure is not None:
            raise failure

    async def _next(
        self, kind: type[L], name: str, list_id: bytes, make: Callable[..., L], handles: dict[str, str]
    ) -> L:
        me, services = self._identity(), self._services
        rows = services.state.conditions
        async with self._turn:
            kept = rows.own_list(name)
            before = kind.parse_owned(kept.record) if kept is not None else None
            expect = before.seq if before is not None else 0
            for left in reversed(range(_TRIES)):
                now = self.now
                record = make(
                    before, id=list_id, seq=before.seq + 1 if before is not None else 1,
                    prev=before.digest if before is not None else b"", owner=me.signing.public,
                    iat=now, exp=now + LIST_LIFETIME_S,
                )  # fmt: skip
                signed = record.sign(me.signing)
                readers = record.signing_kids() if isinstance(record, VaultRecord) else ()
                try:
                    await services.metadata.put_access_list(list_id, expect, signed, readers)
                except MeshkitError as error:
                    if error.code != "head_conflict" or not left:
                        raise
                    offered = await services.metadata.access_list(list_id)
                    standing = kind.parse_owned(offered.record) if offered is not None else None
                    if standing is not None and standing.owner != me.signing.public:
                        raise
                    expect = standing.seq if standing is not None else 0
                    if standing is not None and (before is None or standing.seq >= before.seq):
                        before = standing
                    continue
                parsed = kind.parse_owned(signed)
                await trio.to_thread.run_sync(rows.set_own_list, OwnList(name, list_id, signed, handles))
                seen = ListMark(parsed.seq, parsed.digest)
                await trio.to_thread.run_sync(rows.raise_mark, list_id, me.signing.public, seen)
                return parsed
        raise AssertionError("the last try returns or raises")


class Vaults:
    """The vaults of a home's own: who is in them."""

    def __init__(
        self,
        services: Services,
        lists: OwnLists,
        identity: Callable[[], Identity],
        contacts: Callable[[], ContactBook],
    ) -> None:
        self._services = services
        self._lists = lists
        self._identity = identity
        self._contacts = contacts

    def list(self) -> list[OwnList]:
        """Return the vaults, by name."""
        return [row for row in self._services.state.conditions.own_lists() if row.name != REVOKED]

    def find(self, name: str) -> OwnList:
        """Return a vault. Raises ``vault_not_found``."""
        row = self._services.state.conditions.own_list(name) if name != REVOKED else None
        if row is None:
            raise MeshkitError("vault_not_found", name)
        return row

    def reference(self, text: str) -> str:
        """Return what a capsule says to demand a vault: a name of this home's own, or any as it is shown.

        Raises ``vault_not_found``.
        """
        if "@" in text:
            try:
                pinned = Pinned.parse(text)
                return pinned.text if pinned.vault_id else text
            except MeshkitError as error:
                raise MeshkitError("invalid_argument", f"'{text}': {error.detail}") from None
        return self.pinned(self.find(text)).text

    def pinned(self, row: OwnList) -> Pinned:
        """Return how a capsule names one of this home's own vaults."""
        return Pinned(row.list_id.hex(), self._identity().signing.public)

    async def create(self, name: str) -> OwnList:
        """Make a vault with nobody in it. Raises ``vault_exists``, ``invalid_argument``."""
        if not valid_label(name):
            raise MeshkitError("invalid_argument", f"'{name}' is no name for a vault: letters, digits, . _ -")
        if self._services.state.conditions.own_list(name) is not None:
            raise MeshkitError("vault_exists", name)
        await self._lists.change_vault(name, os.urandom(16), lambda members: members, {})
        return self.find(name)

    async def add(self, name: str, handle: str) -> OwnList:
        """Make a contact (or this identity) a member. Raises ``vault_not_found``, ``contact_unknown``."""
        row, me = self.find(name), self._identity()
        if handle == me.handle:
            entry = member_entry(me.signing.public, me.encryption.public)
        else:
            who = (await self._contacts().resolve(handle, self._lists.now)).public
            entry = member_entry(who.sig, who.enc)

        def change(members: tuple[bytes, ...]) -> tuple[bytes, ...]:
            if entry not in members and len(members) >= MEMBERS_MAX:
                raise MeshkitError("invalid_argument", f"a vault has {MEMBERS_MAX} members at most")
            return (*(member for member in members if member != entry), entry)

        await self._lists.change_vault(name, row.list_id, change, row.handles | {entry.hex(): handle})
        return self.find(name)

    async def remove(self, name: str, handle: str) -> OwnList:
        """Take a member out, under all keys that they were added with. Raises ``vault_not_found``."""
        row = self.find(name)
        gone = {bytes.fromhex(entry) for entry, who in row.handles.items() if who == handle}
        if gone.isdisjoint(VaultRecord.parse_owned(row.record).members):
            raise MeshkitError("vault_not_found", f"'{handle}' is not in '{name}'")
        kept = {entry: who for entry, who in row.handles.items() if who != handle}
        await self._lists.change_vault(
            name,
            row.list_id,
            lambda members: tuple(member for member in members if member not in gone),
            kept,
        )
        return self.find(name)

    async def delete(self, name: str) -> None:
        """Remove a vault: whoever a grant demands it of is not in it any more. Raises ``vault_not_found``."""
        row = self.find(name)
        # Emptied first: a reader who is shown the last record again finds nobody in it.
        await self._lists.change_vault(name, row.list_id, lambda _: (), {})
        await self._services.metadata.delete_access_list(row.list_id)
        await trio.to_thread.run_sync(self._services.state.conditions.drop_own_list, name)
