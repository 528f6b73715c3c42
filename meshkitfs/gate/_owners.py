"""Whose signature counts for a share: its owner's keys, followed along the chain that both of them signed.

A share is pinned to the key that its owner had when it was accepted. What a later key signed counts if the
chain that leads to it is the contact's own. Of a key that was replaced nothing new is believed: at once where
this device has seen the owner's list under a later key, and everywhere when the overlap is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from meshkitfs.core.cose import signer_of
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Contact, ContactBook, Identity, Signer, Signers
from meshkitfs.metadata import ShareState
from meshkitfs.state import Mark, ShareRow, State

__all__ = ["Owners"]

DIRECTORY_DEADLINE_S = 10


class Owners:
    """Finds the keys of owners, and remembers under which of them each share's roster was seen last."""

    def __init__(
        self, identity: Callable[[], Identity], contacts: Callable[[], ContactBook], state: State
    ) -> None:
        self._identity = identity
        self._contacts = contacts
        self._state = state

    async def signers(self, row: ShareRow, found: ShareState, now: Callable[[], int]) -> Signers | None:
        """Return the keys of the owner of ``row``; None where nothing but the pinned key is known.

        The directory is asked only if what was ``found`` is signed with a key unknown here. Raises
        ``contact_key_changed`` if the contact is blocked, or the pinned key is not of their chain.
        """
        if row.mine:
            return _checked(row, Signers(self._identity().chain))
        contact = self._contact(row)
        if contact is None:
            return None
        signers = Signers(contact.chain)
        if _signer(found) in (*signers.keys, b"") and kid_of(row.owner_public) in signers.keys:
            return signers
        try:
            with trio.fail_after(DIRECTORY_DEADLINE_S):
                contact = await self._contacts().follow(row.owner_handle, now()) or contact
        except trio.TooSlowError:
            raise MeshkitError(
                "freshness_unproven", "no answer from the identity directory in time"
            ) from None
        except MeshkitError as error:
            if error.code in ("contact_key_changed", "clock_rollback"):
                raise
            raise MeshkitError(
                "freshness_unproven", f"the directory: {error.detail or error.code}"
            ) from error
        return _checked(row, Signers(contact.chain))

    def known(self, row: ShareRow) -> Mapping[bytes, bytes]:
        """Return the owner's keys, by kid, as far as they are known here. Raises as `signers`."""
        if row.mine:
            return _checked(row, Signers(self._identity().chain)).keys
        contact = self._contact(row)
        if contact is None:
            return {kid_of(row.owner_public): row.owner_public}
        return _checked(row, Signers(contact.chain)).keys

    def _contact(self, row: ShareRow) -> Contact | None:
        """Return what is remembered of somebody else's share's owner. Raises ``contact_key_changed``."""
        contact = self._contacts().remembered(row.owner_handle)
        if contact is not None and contact.trust == "blocked":
            raise MeshkitError("contact_key_changed", f"'{row.owner_handle}' is blocked")
        return contact

    def check_new(
        self, row: ShareRow, roster: Roster, seen: bytes, mark: Mark, signers: Signers, now: Callable[[], int]
    ) -> None:
        """Refuse a roster that this device has not seen and that is signed with a key of before.

        Raises ``key_replaced``. ``seen`` is the roster's record hash.
        """
        signer, pinned = signers.get(roster.signer), signers.get(kid_of(row.owner_public))
        assert signer is not None  # its signature was verified with a key from there
        assert pinned is not None  # `signers` has seen to it
        last = signers.get(self._state.setting(_seen(row)) or b"")
        if seen == mark.roster_hash:
            return
        for other in (pinned, last):
            if other is not None and signer.place < other.place:
                raise _replaced(row, signer, "and a later one was in use already")
        if signer.over(now()):
            raise _replaced(row, signer, "too long ago for something new")

    async def note(self, row: ShareRow, roster: Roster, signers: Signers) -> None:
        """Remember, durably, with which key the newest roster seen is signed."""
        if signers.several and self._state.setting(_seen(row)) != roster.signer:
            await trio.to_thread.run_sync(self._state.set_setting, _seen(row), roster.signer)


def _seen(row: ShareRow) -> str:
    return f"roster_signer:{row.share.hex()}"


def _signer(found: ShareState) -> bytes:
    """Return the kid that the roster says has signed it; b"" if it says nothing that could be looked up."""
    try:
        return signer_of(found.roster or b"", Roster.TYPE)
    except MeshkitError:
        return b""


def _checked(row: ShareRow, signers: Signers) -> Signers:
    if kid_of(row.owner_public) not in signers.keys:
        raise MeshkitError(
            "contact_key_changed",
            f"no chain leads from the key that '{row.owner_handle}' shared this with to the one trusted now",
        )
    return signers


def _replaced(row: ShareRow, signer: Signer, why: str) -> MeshkitError:
    kid = kid_of(signer.public).hex()[:16]
    return MeshkitError("key_replaced", f"'{row.owner_handle}' has replaced the key {kid}, {why}")
