"""Hearing that a member of a share has other keys than it was granted to, and which they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

import trio

from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.core.keys import kid_of
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Contact, ContactBook, Identity, Signers
from meshkitfs.state import Member

__all__ = ["HEAR_S", "Hearing", "keys_in"]

_log = logging.getLogger(__name__)

# How often the directory is asked about each member of a share that is in use, and how long one look at all
# of them may take: who was not reached is asked the next time.
HEAR_S: Final = 60
HEAR_DEADLINE_S: Final = 5


class Hearing:
    """What an owner knows of the keys of members, from the contacts."""

    def __init__(self, identity: Callable[[], Identity], contacts: Callable[[], ContactBook]) -> None:
        self._identity = identity
        self._contacts = contacts
        self._asked: dict[str, int] = {}

    async def hear(self, members: Iterable[Member], now: int) -> None:
        """Ask the directory about the members who were not asked for `HEAR_S`; never a reason to fail.

        One whose key changed without a chain is blocked by this, and keeps what was granted to the old key.
        """
        me = self._identity().handle
        due = {m.handle for m in members if m.grant == "live" and m.handle != me}
        with trio.move_on_after(HEAR_DEADLINE_S):
            for handle in sorted(due):
                if now < self._asked.get(handle, -HEAR_S) + HEAR_S:
                    continue
                self._asked[handle] = now
                try:
                    await self._contacts().follow(handle, now)
                except MeshkitError as error:
                    _log.info("a member's keys were not looked up: %s", error.code)

    def changed(self, member: Member) -> bool:
        """Whether a live grant was made for other keys than its member has now."""
        return member.grant == "live" and self.keys_of(member) != (
            member.encryption_public,
            member.signing_public,
        )

    def keys_of(self, member: Member) -> tuple[bytes, bytes]:
        """Return the encryption and signing key that ``member`` is granted to now.

        Those of their newest record, if a chain leads to it from the key that they were granted with.
        """
        me = self._identity()
        if member.handle == me.handle:
            return me.encryption.public, me.signing.public
        contact = self._contacts().remembered(member.handle)
        if contact is None or not _theirs(contact, member):
            return member.encryption_public, member.signing_public
        return keys_in(contact.record)


@lru_cache(maxsize=1024)
def keys_in(record: bytes) -> tuple[bytes, bytes]:
    """Return the encryption and signing key in an identity record that was verified before."""
    public = IdentityRecord.parse_self_signed(record)
    return public.enc, public.sig


def _theirs(contact: Contact, member: Member) -> bool:
    return contact.trust != "blocked" and kid_of(member.signing_public) in Signers(contact.chain).keys
