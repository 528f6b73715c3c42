"""A recovery file stays good while shares come and go: what it lacks is left at the metadata home, sealed.

As long as there is a recovery file, the home posts what it remembers (shares by their names, members,
contacts, marks) to its own mailbox whenever that has changed, and removes what it posted before. Whoever
restores the file takes the newest. Of keys only the file knows: it is out of date when they are replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import trio

from meshkitfs.core import cbor
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.memory import MEMORY_MAGIC, open_memories, open_memory, seal_memory
from meshkitfs.daemon import config as configuration
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Identity
from meshkitfs.metadata import Metadata
from meshkitfs.state import State

__all__ = ["Remembering", "latest", "memories"]

_log = logging.getLogger(__name__)

_SETTING: Final = "recovery"
# The digest of what was posted last, by this very home.
_POSTED: Final = "posted"
# How often it is looked whether something has changed, and how soon something is posted again (s).
LOOK_S: Final = 5.0
LEAST_S: Final = 60.0
# How long the end of a session waits for it (s).
CLOSE_S: Final = 5.0
MEMORY_MOST: Final = 32 << 20
# What changes with every opening; it goes along, and is no reason to post.
_RESTLESS: Final = ("marks", "list_marks")
_RESTLESS_SETTING: Final = "clock_floor"


class Remembering:
    """What one open home does about its recovery file."""

    def __init__(
        self,
        state: State,
        metadata: Metadata,
        identity: Callable[[], Identity],
        unlocked: Callable[[], Identity],
        config: configuration.Config,
        device: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self._state = state
        self._metadata = metadata
        self._identity = identity
        self._unlocked = unlocked
        self._config = config
        # The kid of this home, if it is one of several devices: the others learn from the letters, too.
        self._device = device
        # The state's count of changes when it was looked at last.
        self._looked = -1
        # Why what is remembered is not posted; "" if it is, as far as was looked, or there is no file.
        self.unposted = ""
        self._turn = trio.Lock()

    # -- the file --------------------------------------------------------------------------------

    async def made(self, made: int) -> dict[str, Any]:
        """Note that a recovery file was written at ``made``, and post what is remembered."""
        note = {"made": made, **self._facts()}
        await trio.to_thread.run_sync(self._state.set_setting, _SETTING, json.dumps(note))
        await trio.to_thread.run_sync(self._state.drop_setting, _POSTED)
        with suppress(MeshkitError):  # the report says so
            await self.post()
        return self.report() or {}

    def report(self) -> dict[str, Any] | None:
        """Say when the newest recovery file was written, and what makes it useless now; None without one."""
        note = self._note()
        if note is None:
            return None
        now = self._facts()
        stale = [word for name, word in _WORDS.items() if note.get(name) != now[name]]
        return {
            "made": note["made"], "current": not stale, "changed": stale, "unposted": self.unposted,
        }  # fmt: skip

    def _facts(self) -> dict[str, str]:
        """What has to be now as it was when the file was written, for the file to be good."""
        me = self._identity()
        stores = f"{self._config.provider.to_config()} {self._config.metadata.place}"
        return {
            "signing": me.signing.kid.hex(),
            "encryption": me.encryption.kid.hex(),
            "stores": hashlib.sha256(stores.encode()).hexdigest(),
        }

    def _note(self) -> dict[str, Any] | None:
        text = self._state.setting(_SETTING)
        if text is None:
            return None
        try:
            note = json.loads(text)
            if isinstance(note, dict) and type(note.get("made")) is int:
                return note
        except ValueError:
            pass
        raise MeshkitError("state_corrupt", "the note about the recovery file makes no sense")

    # -- the letters -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Post what has changed, until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            try:
                # Other devices wait for it; a recovery file does not.
                if await self.post() and self._device() is None:
                    await trio.sleep(LEAST_S)
            except MeshkitError as error:
                if error.code != "identity_locked":
                    _log.info("what is remembered is not posted yet: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("posting what is remembered failed in a way nobody foresaw")

    async def close(self) -> None:
        """Post it a last time; what fails is left to the next session."""
        with trio.move_on_after(CLOSE_S, shield=True):
            try:
                await self.post()
            except MeshkitError as error:
                _log.info("what is remembered is not posted: %s (%s)", error.code, error.detail)

    async def post(self) -> bool:
        """Post what is remembered, if there is a recovery file and it has changed; say whether it did."""
        async with self._turn:
            if self._note() is None and self._device() is None:
                return False
            me, changes = self._unlocked(), self._state.carried.changes()
            if changes == self._looked:
                return False
            carried = await trio.to_thread.run_sync(self._state.carried.give)
            digest = _digest(carried, me)
            fresh = bool(digest != self._state.setting(_POSTED))
            if fresh:
                self.unposted = "commit_pending"
                try:
                    await self._replace(me, carried)
                except MeshkitError as error:
                    self.unposted = error.code
                    raise
                await trio.to_thread.run_sync(self._state.set_setting, _POSTED, digest)
            self._looked, self.unposted = changes, ""
            return fresh

    async def _replace(self, me: Identity, carried: dict[str, Any]) -> None:
        """Post ``carried``, and then take away what was posted before."""
        device = self._device()
        said = {"state": carried} | ({} if device is None else {"device": device})
        text = cbor.encode(said)
        letters = await trio.to_thread.run_sync(
            seal_memory, me.signing, text, int(time.time()), me.encryption.public
        )
        before = await _letters(self._metadata, me.encryption_keys)
        if device is not None:
            before = await trio.to_thread.run_sync(_by, device, before, me)
        for letter in letters:
            await self._metadata.post_letter(me.encryption.kid, letter)
        # Only now: a kill in between leaves both, and the newer one counts.
        for key, letter_id, _ in before:
            await self._metadata.delete_letter(key.kid, letter_id)


_WORDS: Final = {
    "signing": "the signing key",
    "encryption": "the encryption key",
    "stores": "the byte store or metadata store",
}


def _digest(carried: dict[str, Any], me: Identity) -> bytes:
    """Return what is the same as long as there is nothing to post."""
    steady = {table: rows for table, rows in carried.items() if table not in _RESTLESS}
    steady["settings"] = [row for row in steady["settings"] if row[0] != _RESTLESS_SETTING]
    return hashlib.sha256(me.signing.kid + me.encryption.kid + cbor.encode(steady)).digest()


async def _letters(
    metadata: Metadata, keys: tuple[EncryptionKey, ...]
) -> list[tuple[EncryptionKey, bytes, bytes]]:
    return [
        (key, letter_id, letter)
        for key in keys
        for letter_id, letter in await metadata.letters(key.kid)
        if letter.startswith(MEMORY_MAGIC)
    ]


def _by(
    device: bytes, letters: list[tuple[EncryptionKey, bytes, bytes]], me: Identity
) -> list[tuple[EncryptionKey, bytes, bytes]]:
    """Return those of ``letters`` that this device has posted, or a home that was the only one."""
    signers = {key.kid: key.public for key in me.signing_keys}
    found: list[tuple[EncryptionKey, bytes, bytes]] = []
    for whole in open_memories([(key, letter) for key, _, letter in letters], signers):
        said = cbor.decode(whole.text, limit=MEMORY_MOST)
        if isinstance(said, dict) and said.get("device", device) == device:
            found += [letters[place] for place in whole.places]
    return found


async def memories(me: Identity, metadata: Metadata) -> dict[bytes, tuple[int, dict[str, Any]]]:
    """Return what each device of ``me`` posted last: when (UNIX seconds), and its state; by the device's kid.

    What is not signed with the newest key, or cannot be read, counts as not there.
    """
    letters = await _letters(metadata, (me.encryption,))
    signers = {me.signing.kid: me.signing.public}
    opened = await trio.to_thread.run_sync(
        open_memories, [(key, letter) for key, _, letter in letters], signers
    )
    found: dict[bytes, tuple[int, dict[str, Any]]] = {}
    for whole in opened:
        try:
            said = cbor.decode(whole.text, limit=MEMORY_MOST)
        except MeshkitError:
            continue
        match said:
            case {"device": bytes() as device, "state": dict() as state}:
                found.setdefault(device, (whole.made, state))
    return found


async def _newest(me: Identity, metadata: Metadata) -> tuple[int, dict[str, Any]] | None:
    letters = await _letters(metadata, me.encryption_keys)
    # Of the newest key only: with one of before, a thief could put contacts of theirs into a recovered home.
    signers = {me.signing.kid: me.signing.public}
    found = await trio.to_thread.run_sync(open_memory, [(key, letter) for key, _, letter in letters], signers)
    if found is None:
        return None
    content = cbor.decode(found[1], limit=MEMORY_MOST)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise MeshkitError("invalid_record", "a letter to oneself that says something else")
    return found[0], content["state"]


async def latest(me: Identity, metadata: Metadata, since: int) -> dict[str, Any] | None:
    """Return what was remembered last by the home of ``me``, if that is not older than ``since``.

    Letters that cannot be read count as not there. Raises what the metadata home raises.
    """
    try:
        newest = await _newest(me, metadata)
    except MeshkitError as error:
        if error.code != "invalid_record":
            raise
        _log.warning("what was remembered last cannot be read: %s", error.detail)
        return None
    return None if newest is None or newest[0] < since else newest[1]
