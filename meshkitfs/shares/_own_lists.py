"""The lists that this home signs: its vaults, and the lists of the capability tokens it has revoked.

Grants and tokens name the key that a list is signed with. So a list keeps its key for good, also when its
owner has replaced that key: only then can somebody be taken out of it afterwards.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from meshkitfs.core.keys import KID_SIZE, SigningKey
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
from meshkitfs.identity import ContactBook, Identity, Signers
from meshkitfs.shares._hearing import keys_in
from meshkitfs.shares._services import Services
from meshkitfs.state import OwnList

__all__ = ["REVOKED", "OwnLists", "Vaults"]

_log = logging.getLogger(__name__)

# What the first revocation list is kept under, and how the names of those of later keys begin; no vault can
# be called so.
REVOKED: Final = ""
_LATER: Final = "@"
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
        """Publish what ``change`` makes of the ids of revoked tokens, in the list of each key that has one.

        Returns the newest key's list, which there is afterwards. Which key issued a token need not be known.
        """
        newest, *former = self._identity().signing_keys
        for key in former:
            if (name := self._list_of(key)) is not None:
                await self._change_revocations(name, key, change)
        return await self._change_revocations(
            self._list_of(newest) or self._free_name(newest), newest, change
        )

    async def begin_revocations(self) -> None:
        """Publish a revocation list of the newest key, if there is none yet."""
        key = self._identity().signing
        if self._list_of(key) is None:
            await self._change_revocations(self._free_name(key), key, lambda tokens: tokens)

    async def _change_revocations(
        self, name: str, key: SigningKey, change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
    ) -> Revocations:
        def make(before: Revocations | None, **common: int | bytes) -> Revocations:
            tokens = change(before.tokens if before is not None else ())
            return Revocations(**common, tokens=tokens)  # type: ignore[arg-type]

        return await self._next(Revocations, name, revocations_id(key.public), make, {})

    def _list_of(self, key: SigningKey) -> str | None:
        """Return the name that the revocation list of ``key`` is kept under."""
        wanted = revocations_id(key.public)
        rows = self._services.state.conditions.own_lists()
        return next((row.name for row in rows if _is_revocations(row) and row.list_id == wanted), None)

    def _free_name(self, key: SigningKey) -> str:
        first = self._services.state.conditions.own_list(REVOKED) is None
        return REVOKED if first else _LATER + key.kid.hex()

    async def renew(self) -> None:
        """Sign lists anew before they run out; cheap to call often. Raises if one could not be renewed."""
        if self.now < self._next_look:
            return
        self._next_look = self.now + _LOOK_S
        failure: MeshkitError | None = None
        for row in self._services.state.conditions.own_lists():
            kind: type[NumberedList] = Revocations if _is_revocations(row) else VaultRecord
            record = kind.parse_owned(row.record)
            if record.exp - self.now >= LIST_RENEW_S:
                continue
            try:
                if _is_revocations(row):
                    key = self._key(record.owner)
                    await self._change_revocations(row.name, key, lambda tokens: tokens)
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
            key = self._key(before.owner) if before is not None else me.signing
            expect = before.seq if before is not None else 0
            for left in reversed(range(_TRIES)):
                now = self.now
                record = make(
                    before, id=list_id, seq=before.seq + 1 if before is not None else 1,
                    prev=before.digest if before is not None else b"", owner=key.public,
                    iat=now, exp=now + LIST_LIFETIME_S,
                )  # fmt: skip
                signed = record.sign(key)
                readers = record.signing_kids() if isinstance(record, VaultRecord) else ()
                try:
                    await services.metadata.put_access_list(list_id, expect, signed, readers)
                except MeshkitError as error:
                    if error.code != "head_conflict" or not left:
                        raise
                    offered = await services.metadata.access_list(list_id)
                    standing = kind.parse_owned(offered.record) if offered is not None else None
                    if standing is not None and standing.owner != key.public:
                        raise
                    expect = standing.seq if standing is not None else 0
                    if standing is not None and (before is None or standing.seq >= before.seq):
                        before = standing
                    continue
                parsed = kind.parse_owned(signed)
                await trio.to_thread.run_sync(rows.set_own_list, OwnList(name, list_id, signed, handles))
                seen = ListMark(parsed.seq, parsed.digest)
                await trio.to_thread.run_sync(rows.raise_mark, list_id, key.public, seen)
                return parsed
        raise AssertionError("the last try returns or raises")

    def _key(self, public: bytes) -> SigningKey:
        """Return the key, of now or of before, that a list is signed with. Raises ``invalid_record``."""
        for key in self._identity().signing_keys:
            if key.public == public:
                return key
        raise MeshkitError("invalid_record", "a list that is signed with a key that this home does not have")


def _is_revocations(row: OwnList) -> bool:
    return row.name == REVOKED or row.name.startswith(_LATER)


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
        self._next_look = 0

    def list(self) -> list[OwnList]:
        """Return the vaults, by name."""
        return [row for row in self._services.state.conditions.own_lists() if not _is_revocations(row)]

    def find(self, name: str) -> OwnList:
        """Return a vault. Raises ``vault_not_found``."""
        row = self._services.state.conditions.own_list(name)
        if row is None or _is_revocations(row):
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
        return Pinned(row.list_id.hex(), VaultRecord.parse_owned(row.record).owner)

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

    async def follow(self) -> None:
        """List members who have got new keys under those, as far as is known here; cheap to call often.

        Only where a chain leads from the keys they were added with: others stay as they are, and have to be
        added again.
        """
        if self._lists.now < self._next_look:
            return
        self._next_look = self._lists.now + _LOOK_S
        for row in self.list():
            listed = VaultRecord.parse_owned(row.record).members
            fresh = {entry: self._entry_now(entry, row.handles.get(entry.hex(), "")) for entry in listed}
            if all(entry == now for entry, now in fresh.items()):
                continue
            renamed = {entry.hex(): now.hex() for entry, now in fresh.items()}
            handles = {renamed.get(entry, entry): who for entry, who in row.handles.items()}

            def change(members: tuple[bytes, ...], fresh: dict[bytes, bytes] = fresh) -> tuple[bytes, ...]:
                return tuple(dict.fromkeys(fresh.get(entry, entry) for entry in members))

            await self._lists.change_vault(row.name, row.list_id, change, handles)

    def _entry_now(self, entry: bytes, handle: str) -> bytes:
        me = self._identity()
        if handle == me.handle:
            mine = entry[:KID_SIZE] in {key.kid for key in me.signing_keys}
            return member_entry(me.signing.public, me.encryption.public) if mine else entry
        contact = self._contacts().remembered(handle)
        if contact is None or contact.trust == "blocked":
            return entry
        if entry[:KID_SIZE] not in Signers(contact.chain).keys:
            return entry
        encryption, signing = keys_in(contact.record)
        return member_entry(signing, encryption)

    async def delete(self, name: str) -> None:
        """Remove a vault: whoever a grant demands it of is not in it any more. Raises ``vault_not_found``."""
        row = self.find(name)
        # Emptied first: a reader who is shown the last record again finds nobody in it.
        await self._lists.change_vault(name, row.list_id, lambda _: (), {})
        await self._services.metadata.delete_access_list(row.list_id)
        await trio.to_thread.run_sync(self._services.state.conditions.drop_own_list, name)
