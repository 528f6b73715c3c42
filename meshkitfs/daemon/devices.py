"""This home as one of several devices of its identity: the list of them, and the letters between them.

Whatever changes the list makes a new identity record, which the directory takes from one device only. Then
the device that made it tells the others: each gets the new list and the identity's keys in a letter to its
own mailbox, sealed to its own key; one that was taken off the list gets the list alone, and shuts itself. A
device believes such a letter if a device that it knows has signed it, if its records go on from those that it
has, and if the directory has the same ones.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core import cbor
from meshkitfs.core.cose import record_hash
from meshkitfs.core.device import (
    DEVICES_MOST,
    DeviceCode,
    DeviceEntry,
    DeviceLetter,
    DeviceList,
    valid_device_name,
)
from meshkitfs.core.identity_record import IdentityRecord, verify_chain
from meshkitfs.core.keys import SigningKey, fingerprint, kid_of
from meshkitfs.core.memory import MEMORY_MAGIC, Whole, open_memories, seal_memory
from meshkitfs.core.secret_memory import wipe
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon.device_list import Entries, KeptList
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import (
    ContactBook,
    DeviceKeys,
    Holder,
    Identity,
    acting_as,
    followed,
    publish,
    seal_identity,
)
from meshkitfs.metadata import HttpMetadata, Metadata
from meshkitfs.state import State

__all__ = ["REVOKED", "Devices"]

_log = logging.getLogger(__name__)

# Settings: whom of the old list to tell that it is off it, the record whose list everybody was told of, and
# the list that this device is not on.
_GONE: Final = "device_gone"
_TOLD: Final = "device_told"
REVOKED: Final = "device_revoked"
_TRIES: Final = 4
# What a change of the list meets if another device was faster.
_LATE: Final = frozenset({"identity_handle_taken", "metadata_unauthorized", "device_behind"})


@dataclass(frozen=True, slots=True)
class _News:
    """A letter that may be about what comes next."""

    whole: Whole
    letter: DeviceLetter
    list: DeviceList


class Devices:
    """The devices of one open home's identity, this one among them."""

    def __init__(
        self,
        state: State,
        metadata: Metadata,
        holder: Holder,
        unlocked: Callable[[], Identity],
        keys: DeviceKeys,
        contacts: ContactBook,
        config: configuration.Config,
        root: Path,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._metadata = metadata
        self._holder = holder
        self._unlocked = unlocked
        self._keys = keys
        self._contacts = contacts
        self._config = config
        self._root = root
        self._wall = wall
        self._turn = trio.Lock()
        self._kept = KeptList(state)
        # `IdentityLife.rotate`, and what shuts the home when it is no device any more.
        self.rotate: Callable[..., Awaitable[Any]] | None = None
        self.shut: Callable[[MeshkitError], Awaitable[None]] | None = None
        self._revoked = False

    # -- what is known ---------------------------------------------------------------------------

    @property
    def kid(self) -> bytes | None:
        """The kid of this device; None while its identity has no other home."""
        device = self._keys.identity
        return None if device is None or self.list() is None else device.signing.kid

    def list(self) -> DeviceList | None:
        """Return the newest device list; None while there is none."""
        return self._kept.get()

    def shut_out(self) -> bool:
        """Whether this device was taken off the list."""
        return self._revoked

    def others(self) -> set[bytes]:
        """Return the kids of the other devices."""
        known, device = self.list(), self._keys.identity
        if known is None or device is None:
            return set()
        return {entry.kid for entry in known.entries} - {device.signing.kid}

    @property
    def place(self) -> int:
        """The place of this device on the list, from 0; 0 without a list."""
        known, mine = self.list(), self.kid
        kids = [entry.kid for entry in known.entries] if known is not None else []
        return kids.index(mine) if mine in kids else 0

    def described(self) -> dict[str, Any]:
        """Return the devices, for `device list`."""
        known, mine = self.list(), self.kid
        entries = known.entries if known is not None else ()
        names = {entry.kid: entry.name for entry in entries}
        return {
            "devices": [
                {
                    "name": entry.name,
                    "fingerprint": fingerprint(entry.public.root),
                    "added": entry.added,
                    "added_by": names.get(entry.by, ""),
                    "this": entry.kid == mine,
                }
                for entry in entries
            ],
            "handle": self._holder.identity.handle,
            "list": known.seq if known is not None else 0,
        }

    # -- hearing ---------------------------------------------------------------------------------

    async def catch_up(self) -> None:
        """As `look`, for a request that was refused: what cannot be found out is left to others to say."""
        try:
            await self.look()
        except MeshkitError as error:
            _log.info("whether other devices have newer keys is not known: %s", error.code)

    async def look(self) -> bool:
        """Take what the other devices say of new keys; say whether there was something.

        Raises what the metadata home raises, and ``device_revoked`` when this is no device any more.
        """
        device = self._keys.identity
        if device is None or self.list() is None or self.shut_out():
            return False
        self._unlocked()
        async with self._turn:
            with acting_as(device.signing):
                news = await self._look(device)
        if self.shut_out():
            await self._end()
            raise MeshkitError("device_revoked")
        return news

    async def _look(self, device: Identity) -> bool:
        found = await self._metadata.letters(device.encryption.kid)
        letters = [(at, blob) for at, blob in found if blob.startswith(MEMORY_MAGIC)]
        news = False
        while letters and not self.shut_out():
            done, following = await trio.to_thread.run_sync(self._read_letters, device, letters)
            if following is not None:
                took = await self._adopt(device, following)
                if took is None:
                    break  # the directory does not know it yet
                news |= took
                done |= {letters[place][0] for place in following.whole.places}
            for letter_id in done:
                await self._metadata.delete_letter(device.encryption.kid, letter_id)
            letters = [(at, blob) for at, blob in letters if at not in done]
            if following is None:
                break
        return news

    def _read_letters(
        self, device: Identity, letters: Sequence[tuple[bytes, bytes]]
    ) -> tuple[set[bytes], _News | None]:
        """Return which letters are of no use any more, and the one that says what came next."""
        known, me = self.list(), self._holder.identity
        assert known is not None  # `look` has seen it
        signers = {entry.kid: entry.public.sig for entry in known.entries if entry.kid != device.signing.kid}
        done: set[bytes] = set()
        news: list[_News] = []
        for whole in open_memories([(device.encryption, blob) for _, blob in letters], signers):
            try:
                letter = DeviceLetter.from_bytes(whole.text)
                listed = letter.proved()
                if listed.seq <= me.public.seq or letter.chain[: len(me.chain)] != me.chain:
                    raise MeshkitError("invalid_record", "of before, or of another chain")
                left_out = {entry.kid for entry in known.entries} - {entry.kid for entry in listed.entries}
                if left_out and listed.signer == me.signing.kid:
                    # Whoever is taken off has these keys, and could say it of others: so it takes new ones.
                    raise MeshkitError("invalid_record", "of fewer devices, with the keys of before")
                verify_chain(letter.chain)
            except MeshkitError as error:
                _log.info("a letter of another device is not for now: %s", error.detail)
                done |= {letters[place][0] for place in whole.places}
                continue
            news.append(_News(whole, letter, listed))
        return done, min(news, key=lambda item: item.list.seq, default=None)

    async def _adopt(self, device: Identity, news: _News) -> bool | None:
        """Do what a letter says; None if the directory does not know its records yet."""
        letter = news.letter
        there = tuple(await self._metadata.identity(self._holder.identity.handle))
        if len(there) < len(letter.chain) and there == letter.chain[: len(there)]:
            return None
        if there[: len(letter.chain)] != letter.chain:
            _log.error("another device follows a chain of keys that the directory does not have")
            return False
        try:
            if news.list.find(device.signing.kid) is None:
                await trio.to_thread.run_sync(self._state.set_setting, REVOKED, letter.list)
                self._revoked = True
                return True
            async with self._holder.changing():
                new = await trio.to_thread.run_sync(followed, self._holder.identity, letter)
                await trio.to_thread.run_sync(self._kept.expect, news.list.at, news.list.entries)
                await self._holder.replace(new)
        except MeshkitError as error:
            if error.code not in ("invalid_record", "identity_corrupt"):
                raise
            _log.error("the keys that another device has sent cannot be used: %s", error.detail)
            return False
        finally:
            wipe(letter.key)
        await self._keep(letter.list, news.list)
        await trio.to_thread.run_sync(self._state.set_setting, _TOLD, news.list.at)
        self._contacts.own(new.signing.public)
        if isinstance(self._metadata, HttpMetadata):
            self._metadata.feed.mailbox = new.encryption.kid
        _log.info("another device has changed the identity's keys or devices")
        return True

    async def _keep(self, blob: bytes, parsed: DeviceList) -> None:
        await trio.to_thread.run_sync(self._kept.keep, blob, parsed)

    async def _end(self) -> None:
        if self.shut is not None:
            await self.shut(MeshkitError("device_revoked"))

    # -- telling ---------------------------------------------------------------------------------

    async def announce(self) -> None:
        """Tell each device of the newest record's list, unless that was done. Raises what the home raises."""
        device = self._keys.identity
        if device is None:
            return
        async with self._turn:
            me, at = self._unlocked(), self._holder.identity.public.digest
            if self._state.setting(_TOLD) == at:
                return
            known = self.list()
            if known is None or known.at != at:
                entries = self._kept.due(me.chain)
                if not entries:
                    return
                listed = DeviceList.of(me.record, entries, int(self._wall()))
                blob = listed.sign(me.signing)
                left = {entry.kid for entry in entries}
                gone = [entry.record for entry in (known.entries if known else ()) if entry.kid not in left]
                await trio.to_thread.run_sync(self._state.set_setting, _GONE, cbor.encode(gone))
                await self._keep(blob, DeviceList.parse_for(blob, me.record))
            with acting_as(device.signing):
                await self._tell_all(device, me)
            await trio.to_thread.run_sync(self._state.set_setting, _TOLD, at)

    async def _tell_all(self, device: Identity, me: Identity) -> None:
        known = self.list()
        assert known is not None  # `announce` has made it
        letter = DeviceLetter(self._kept.signed(), me.chain)
        for record in cbor.decode(self._state.setting(_GONE) or cbor.encode([])):
            await self._post(device.signing, letter, verify_chain([record]).enc)
        full = await trio.to_thread.run_sync(_with_keys, letter, me)
        try:
            for entry in known.entries:
                if entry.kid != device.signing.kid:
                    await self._post(device.signing, full, entry.public.enc)
        finally:
            wipe(full.key)

    async def _post(self, signer: SigningKey, letter: DeviceLetter, to: bytes) -> None:
        text = letter.to_bytes()
        parts = await trio.to_thread.run_sync(seal_memory, signer, text, int(self._wall()), to)
        wipe(text)
        for part in parts:
            await self._metadata.post_letter(kid_of(to), part)

    # -- changing --------------------------------------------------------------------------------

    async def approve(self, text: str, name: str | None = None, own_name: str | None = None) -> DeviceEntry:
        """Make the device that shows the code ``text`` one of this identity; doing it again is harmless.

        ``name`` is what it is to be called, ``own_name`` this home, if it is the first of several. Raises
        ``device_not_found``, ``device_exists``, ``invalid_argument``, and what the metadata home raises.
        """
        code = DeviceCode.from_text(text)
        chain = await self._metadata.identity_by_kid(code.kid)
        record = verify_chain(chain) if chain else None
        if record is None or record.kid != code.kid or len(chain) != 1:
            raise MeshkitError("device_not_found", "nobody waits with this code")
        device = await self._own_device()
        mine = DeviceEntry(
            _name(own_name or _hostname()), device.record, int(self._wall()), device.signing.kid
        )
        called = _name(name or f"device-{code.kid.hex()[:6]}")

        def with_it(known: Entries) -> Entries | None:
            entries = known or (mine,)
            if any(entry.kid == code.kid for entry in entries):
                return None
            if len(entries) >= DEVICES_MOST or any(entry.name == called for entry in entries):
                raise MeshkitError("device_exists", f"'{called}'")
            added = DeviceEntry(called, chain[0], int(self._wall()), device.signing.kid)
            return (*entries, added)

        await self._change(with_it, new_keys=False)
        me, known = self._unlocked(), self.list()
        found = known.find(code.kid) if known is not None else None
        if found is None:
            raise MeshkitError("device_behind", "another device has taken it off the list meanwhile")
        state = await trio.to_thread.run_sync(self._state.carried.give)
        stores = replace(self._config, key_vault=None, mount=configuration.MountConfig())
        letter = replace(
            await trio.to_thread.run_sync(_with_keys, DeviceLetter(self._kept.signed(), me.chain), me),
            stores=json.dumps(stores.as_dict(self._root)),
            state=state,
        )
        try:
            await self._post(code.signer(), letter, record.enc)
        finally:
            wipe(letter.key)
        return found

    async def revoke(self, name: str) -> DeviceEntry:
        """Take a device off the list and give the identity new keys that it does not get.

        Raises ``device_not_found``, ``invalid_argument`` for this very device, and as `IdentityLife.rotate`.
        """
        gone: list[DeviceEntry] = []

        def without_it(known: Entries) -> Entries | None:
            found = [entry for entry in known if entry.name == name]
            if gone and not found:
                return None  # another device has done the same
            if not found:
                raise MeshkitError("device_not_found", name)
            if found[0].kid == self.kid:
                raise MeshkitError("invalid_argument", f"'{name}' is this device: do it on another one")
            gone[:] = found
            return tuple(entry for entry in known if entry.name != name)

        await self._change(without_it, new_keys=True)
        return gone[0]

    async def _change(self, edit: Callable[[Entries], Entries | None], *, new_keys: bool) -> None:
        """Publish what ``edit`` makes of the list, on top of whatever other devices did meanwhile."""
        assert self.rotate is not None  # set where this is assembled
        for left in reversed(range(_TRIES)):
            # What an earlier change did not come to: `edit` must not begin with the list of before it.
            await self.announce()
            known, base = self.list(), self._holder.identity.public.digest
            entries = edit(known.entries if known is not None else ())
            if entries is None:
                return

            def prepare(record: bytes, entries: Entries = entries, base: bytes = base) -> None:
                if IdentityRecord.parse_self_signed(record).prev != base:
                    # Another change came in between, and its list is not what `edit` has seen.
                    raise MeshkitError("device_behind", "the list has just been changed")
                self._kept.expect(record_hash(record), entries)

            try:
                await self.rotate(signing=new_keys, encryption=new_keys, again=True, prepare=prepare)
            except MeshkitError as error:
                if error.code not in _LATE or not left:
                    raise
            known = self.list()
            if known is not None and known.entries == entries:
                return
            await self.look()
        raise MeshkitError("device_behind", "other devices were faster each time")

    async def _own_device(self) -> Identity:
        """Return this home's own keys as a device, which are made and made known when there are none."""
        self._unlocked()
        device = self._keys.identity
        if device is None:
            device = self._keys.new(int(self._wall()))
            with acting_as(device.signing):
                await publish(device, self._metadata)
            await trio.to_thread.run_sync(self._keys.keep, device)
        return device


def _with_keys(letter: DeviceLetter, me: Identity) -> DeviceLetter:
    key = os.urandom(keyvault.KEY_BYTES)
    return replace(letter, key=key, identity=seal_identity(replace(me, pending=None), key))


def _name(name: str) -> str:
    if not valid_device_name(name):
        raise MeshkitError(
            "invalid_argument", f"'{name}' is no name for a device: 1 to 32 of a-z 0-9 . _ - @"
        )
    return name


def _hostname() -> str:
    """Return what this machine is called, as a name for a device."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in platform.node().lower()).strip("-")
    return name[:32].strip("-") or "first"
