"""Invitations to other people's shares: what waits in the mailbox, and taking or throwing it away."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import trio

from meshkitfs.core.capability import LETTER_MAGIC as TOKEN_MAGIC
from meshkitfs.core.entries import FILE
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.memory import MEMORY_MAGIC
from meshkitfs.core.records import Letter, open_letter
from meshkitfs.core.ticket import MAGIC as CLAIM_MAGIC
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.shares._services import Services
from meshkitfs.shares._share import Share
from meshkitfs.state import ShareRow

__all__ = ["Inbox", "Invitation", "check_share_name"]


@dataclass(frozen=True, slots=True)
class Invitation:
    """A letter in the inbox, opened: ``id`` is short and unique in the inbox."""

    id: str
    letter_id: bytes
    letter: Letter
    accepted: bool


def check_share_name(name: bytes) -> bytes:
    """Return ``name`` if a share may have it. Raises ``invalid_name``."""
    if not 0 < len(name) <= 255 or b"/" in name or b"\0" in name or name.startswith(b"."):
        raise MeshkitError("invalid_name", repr(name.decode(errors="replace")))
    return name


class Inbox:
    """The invitations to this identity. What is accepted is put into ``shares``, the book of the home."""

    def __init__(
        self,
        shares: dict[bytes, Share],
        services: Services,
        identity: Callable[[], Identity],
        contacts: Callable[[], ContactBook],
    ) -> None:
        self._shares = shares
        self._services = services
        self._identity = identity
        self._contacts = contacts

    @property
    def _now(self) -> int:
        return int(self._services.wall())

    async def waiting(self) -> tuple[list[Invitation], int]:
        """Return the invitations waiting here, and how many letters could not be opened."""
        me = self._identity()
        held = {share.row.ref for share in self._shares.values()}
        found, unreadable = [], 0
        for key, letter_id, blob in await self._letters(me):
            if blob.startswith((CLAIM_MAGIC, TOKEN_MAGIC, MEMORY_MAGIC)):
                # No letter: a claim (see `Welcome`), a capability token (see `Tokens`), or from this identity
                # itself, for whoever recovers it.
                continue
            try:
                letter = open_letter(key, blob)
            except MeshkitError:
                unreadable += 1
                continue
            offer = letter.offer
            assert offer is not None  # open_letter sets it
            ref = offer.id if offer.grant == "snapshot" else offer.share
            found.append(Invitation(letter_id.hex()[:8], letter_id, letter, ref in held))
        return found, unreadable

    async def _letters(self, me: Identity) -> list[tuple[EncryptionKey, bytes, bytes]]:
        """Return the letters to each key of this identity: not everybody has heard of the newest."""
        metadata = self._services.metadata
        return [
            (key, letter_id, blob)
            for key in reversed(me.encryption_keys)
            for letter_id, blob in await metadata.letters(key.kid)
        ]

    async def accept(self, wanted: str, name: bytes | None = None) -> Share:
        """Take an invitation: by its id (or at least 4 characters of it), or by an unmistakable name.

        The sender becomes a contact. Raises ``letter_not_found``, ``contact_key_changed``.
        """
        me = self._identity()
        found = await self._invitation(wanted)
        letter = found.letter
        offer, sender = letter.offer, letter.sender
        assert offer is not None  # open_letter sets both
        assert sender is not None
        contact = await self._contacts().meet(letter.owner_record, self._now)
        # Not the key in the letter, which may be an old one: whoever has that is the owner no more.
        owner = contact.public.sig
        ref = offer.id if offer.grant == "snapshot" else offer.share
        row = ShareRow(
            ref, offer.share, offer.oid, self._free_name(name, letter, sender.handle), offer.kind,
            offer.grant, owner, sender.handle, owner == me.signing.public, letter.mode,
            letter.mtime * 1_000_000_000, self._now,
        )  # fmt: skip
        held = next((share for share in self._shares.values() if share.row.ref == ref), None)
        if held is None:
            await trio.to_thread.run_sync(self._services.state.add_share, row)
            held = self._shares[row.name] = Share(row, self._services)
        await self._services.metadata.delete_letter(offer.to, found.letter_id)
        return held

    async def decline(self, wanted: str) -> Invitation:
        """Throw an invitation away, which is named as for `accept`; the sender is not told.

        What was accepted already stays. Raises ``letter_not_found``.
        """
        found = await self._invitation(wanted)
        offer = found.letter.offer
        assert offer is not None  # open_letter sets it
        await self._services.metadata.delete_letter(offer.to, found.letter_id)
        return found

    async def _invitation(self, wanted: str) -> Invitation:
        """Return the one invitation of that id (at least 4 characters of it) or name."""
        invitations, _ = await self.waiting()
        matches = [item for item in invitations if len(wanted) >= 4 and item.id.startswith(wanted)]
        matches = matches or [item for item in invitations if os.fsdecode(item.letter.name) == wanted]
        if len(matches) != 1:
            detail = f"'{wanted}' fits {len(matches)} invitations" if matches else wanted
            raise MeshkitError("letter_not_found", detail)
        return matches[0]

    def _free_name(self, name: bytes | None, letter: Letter, owner: str) -> bytes:
        """Return ``name``, or the sender's name for it with the sender's own behind ("photos (bob)")."""
        if name is not None:
            if check_share_name(name) in self._shares:
                raise MeshkitError("share_exists", name.decode(errors="replace"))
            return name
        stem, extension = os.path.splitext(letter.name) if letter.kind == FILE else (letter.name, b"")
        stem = stem.lstrip(b".") or b"share"
        for number in range(1, 1000):
            again = "" if number == 1 else f" {number}"
            mark = f" ({owner}{again})".encode()
            candidate = stem[: 255 - len(mark) - len(extension)] + mark + extension
            if candidate not in self._shares:
                return candidate
        raise MeshkitError("share_exists", os.fsdecode(letter.name))
