"""Inviting somebody who has no identity yet, and granting to whoever comes back with the secret.

An invitation is good for one identity, until its time is over or it is taken back. What is kept here of its
secret is the public half, so neither this device's memory nor a backup of it can be used to claim anything.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from typing import Any, Final, Literal

import trio

from meshkitfs.core.keys import SigningKey
from meshkitfs.core.ticket import MAGIC, Claim, Ticket, open_claim
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.shares._book import ShareBook
from meshkitfs.shares._granting import Terms
from meshkitfs.shares._services import Services

__all__ = ["Pending", "Welcome"]

_log = logging.getLogger(__name__)

_SETTING: Final = "invitations"
# Of invitations that are over, so many are remembered, to say what became of them.
_KEPT: Final = 100

# open: nobody came yet. claimed: somebody did, and the grant is under way. done, revoked: over.
Stage = Literal["open", "claimed", "done", "revoked"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """An invitation as its owner remembers it. ``id`` is 32 hex digits; times are UNIX seconds.

    ``public`` belongs to the secret. ``root`` and ``handle`` are of whoever claimed it, ``refused`` names who
    else tried: more than one means that somebody passed the file on.
    """

    id: str
    share: str
    name: str
    public: str
    rights: tuple[str, ...]
    expires: int
    until: int
    stage: Stage = "open"
    root: str = ""
    handle: str = ""
    refused: tuple[str, ...] = ()
    # What takes the code in it back at the metadata service; empty if there is none.
    joining: str = ""
    offline_grace: int = 0
    keyvault: tuple[str, ...] = ()

    def live(self, now: int) -> bool:
        """Whether a claim can still lead to a grant."""
        return self.stage == "claimed" or (self.stage == "open" and now < self.until)

    def as_dict(self, now: int) -> dict[str, Any]:
        """The form of ``share invitations --json``."""
        stage = "expired" if self.stage == "open" and now >= self.until else self.stage
        return {
            "id": self.id[:8], "share": self.name, "rights": list(self.rights), "expires": self.expires,
            "until": self.until, "stage": stage, "handle": self.handle, "refused": list(self.refused),
            "offline_grace": self.offline_grace, "key_vault_required": list(self.keyvault),
        }  # fmt: skip


class Welcome:
    """The invitations of a home. One change at a time."""

    def __init__(
        self,
        book: ShareBook,
        services: Services,
        identity: Callable[[], Identity],
        contacts: Callable[[], ContactBook],
    ) -> None:
        self._book = book
        self._services = services
        self._identity = identity
        self._contacts = contacts
        self._turn = trio.Lock()

    @property
    def _now(self) -> int:
        return int(self._services.wall())

    def items(self) -> list[Pending]:
        """Return the invitations, oldest first. Raises ``state_corrupt``."""
        text = self._services.state.setting(_SETTING)
        if text is None:
            return []
        try:
            return [_pending(row) for row in json.loads(text)]
        except (ValueError, TypeError, KeyError):
            raise MeshkitError("state_corrupt", "the list of invitations makes no sense") from None

    @property
    def awaited(self) -> bool:
        """Whether a claim may come."""
        return any(item.live(self._now) for item in self.items())

    async def invite(
        self, name: str, terms: Terms, until: int, url: str, join: str, *, joining: str = "", store: str = ""
    ) -> tuple[Pending, str]:
        """Make an invitation to the share ``name`` of this home's own; returns it with the ticket, a secret.

        ``url`` and ``join`` are where the newcomer finds the metadata service, and what it asks them for;
        ``joining`` is by what the service takes that back, ``store`` the byte store, as `Ticket` has it.
        Raises ``share_not_found``, ``not_owner``.
        """
        share, me = self._book.find(name), self._identity()
        if not share.row.mine:
            raise MeshkitError("not_owner", f"'{share.name}' belongs to {share.row.owner_handle}")
        # A grant of somebody else's name is written into the ticket as text.
        shown = share.row.name.decode(errors="replace")
        secret, ticket_id = SigningKey.generate(), os.urandom(16)
        ticket = Ticket(ticket_id, secret.seed, url, join, me.record, until, shown, store)
        made = Pending(
            ticket_id.hex(),
            share.row.ref.hex(),
            shown,
            secret.public.hex(),
            terms.rights,
            terms.expires,
            until,
            joining=joining,
            offline_grace=terms.offline_grace,
            keyvault=terms.keyvault,
        )
        text = ticket.to_text(me.signing)
        async with self._turn:
            await self._keep([*self.items(), made])
        return made, text

    async def revoke(self, wanted: str) -> Pending:
        """Take an invitation back; ``wanted`` is its id, or at least 4 characters of it.

        What was granted because of it already is not taken back by this. Raises ``letter_not_found``.
        """
        async with self._turn:
            found = [item for item in self.items() if len(wanted) >= 4 and item.id.startswith(wanted)]
            if len(found) != 1:
                raise MeshkitError("letter_not_found", f"'{wanted}' fits {len(found)} invitations")
            if found[0].stage in ("done", "revoked"):
                return found[0]
            return await self._change(found[0], stage="revoked")

    async def look(self) -> list[Pending]:
        """Read the claims in the mailbox and grant what they prove a right to; returns what was granted now.

        A claim that proves nothing, comes late or is the second one is thrown away. Raises what the metadata
        home raises; what was begun is gone on with the next time.
        """
        me, granted = self._identity(), []
        async with self._turn:
            letters = [
                (key, letter_id, blob)
                # What was invited to before a rotation comes to the key of then.
                for key in me.encryption_keys
                for letter_id, blob in await self._services.metadata.letters(key.kid)
            ]
            for key, letter_id, blob in letters:
                if not blob.startswith(MAGIC):
                    continue
                try:
                    claim = open_claim(key, blob)
                except MeshkitError as error:
                    _log.warning("a claim that cannot be read: %s", error.code)
                    continue
                done = await self._take(claim)
                if done is not None:
                    granted.append(done)
                await self._services.metadata.delete_letter(key.kid, letter_id)
        return granted

    async def _take(self, claim: Claim) -> Pending | None:
        """Grant what ``claim`` has a right to; None if it has none. Holds ``_turn``."""
        item = next((item for item in self.items() if item.id == claim.id.hex()), None)
        if item is None or not claim.proved_by(bytes.fromhex(item.public)):
            _log.warning("a claim without an invitation was thrown away")
            return None
        root = claim.sender.root.hex()
        if not item.live(self._now) or (item.stage == "claimed" and item.root != root):
            await self._refuse(item, claim.sender.handle)
            return None
        share = next((s for s in self._book.shares.values() if s.row.ref.hex() == item.share), None)
        try:
            if share is None:
                raise MeshkitError("share_not_found", item.name)
            contact = await self._contacts().meet(claim.record, self._now)
            # From here on it is this identity's, whatever happens in between.
            item = await self._change(item, stage="claimed", root=root, handle=contact.handle)
            terms = Terms(item.rights, item.expires, offline_grace=item.offline_grace, keyvault=item.keyvault)
            await self._book.add(share, contact.handle, terms)
        except MeshkitError as error:
            if error.code not in _FINAL:
                raise
            _log.warning("a claim leads to no grant: %s", error.code)
            await self._refuse(item, claim.sender.handle)
            return None
        return await self._change(item, stage="done")

    async def _refuse(self, item: Pending, handle: str) -> None:
        if handle != item.handle and handle not in item.refused:
            await self._change(item, refused=(*item.refused, handle)[-10:])

    async def _change(self, item: Pending, **changes: Any) -> Pending:
        new = dataclasses.replace(item, **changes)
        await self._keep([new if old.id == item.id else old for old in self.items()])
        return new

    async def _keep(self, items: list[Pending]) -> None:
        now = self._now
        over = [item for item in items if not item.live(now)][:-_KEPT]
        text = json.dumps([dataclasses.asdict(item) for item in items if item not in over])
        await trio.to_thread.run_sync(self._services.state.set_setting, _SETTING, text)


def _pending(row: dict[str, Any]) -> Pending:
    """Read an invitation back; of one that an earlier version kept, what is new has its default."""
    arrays = {"rights": row["rights"], "refused": row["refused"], "keyvault": row.get("keyvault", ())}
    return Pending(**row | {name: tuple(values) for name, values in arrays.items()})


# What will not become better by trying again.
_FINAL: Final = frozenset(
    {
        "contact_key_changed",
        "contact_unknown",
        "invalid_argument",
        "share_not_found",
        "share_revoked",
        "not_owner",
    }
)
