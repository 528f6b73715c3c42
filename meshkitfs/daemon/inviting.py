"""The commands around people who have no identity yet: inviting, taking invitations back, claiming."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from meshkitfs.core.durations import parse_expiry, parse_span
from meshkitfs.core.ticket import Ticket, link_of, seal_claim
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import publish
from meshkitfs.keyvault import DEMANDS
from meshkitfs.metadata import HttpMetadata
from meshkitfs.providers import shareable
from meshkitfs.shares import ROSTER_LIFETIME_S, Terms

__all__ = ["Inviting", "checked_demands", "checked_grace", "checked_rights"]

_LEAST_S: Final = 60
_MOST_S: Final = 30 * 86400


class Inviting:
    """These commands of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "share.invite": self._invite,
            "share.invitations": self._invitations,
            "share.uninvite": self._uninvite,
            "invitation.claim": self._claim,
        }

    async def _invite(
        self,
        share: str,
        rights: list[str] | None = None,
        expires: str | None = None,
        within: str = "7d",
        link: bool = False,
        offline_grace: str | None = None,
        require_key_vault: list[str] | None = None,
    ) -> dict[str, Any]:
        session, now = self._session, int(time.time())
        span = parse_span(within)
        if not _LEAST_S <= span <= _MOST_S:
            raise MeshkitError("invalid_argument", f"'{within}': an invitation is good for 60s to 30d")
        terms = Terms(
            checked_rights(rights or ["read"]),
            parse_expiry(expires, now) if expires else 0,
            offline_grace=checked_grace(offline_grace),
            keyvault=checked_demands(require_key_vault),
        )
        if link and not isinstance(session.metadata, HttpMetadata):
            raise MeshkitError(
                "invalid_argument", "a link leads to a metadata service, and this home has none"
            )
        session.book.find(share)  # before the service makes an invitation that nobody will use
        url = join = joining = store = ""
        if isinstance(session.metadata, HttpMetadata):
            url = session.config.metadata.url
            known = shareable(session.config.provider)
            store = json.dumps(known, separators=(",", ":")) if known is not None else ""
            invitation = await session.metadata.invitation(span)
            if invitation is not None:
                joining, join = invitation[0], invitation[1].reveal()
        made, ticket = await session.welcome.invite(
            share, terms, now + span, url, join, joining=joining, store=store
        )
        place = link_of(ticket, url) if url else ""
        return made.as_dict(now) | {"ticket": ticket, "link": place, "store": store}

    async def _invitations(self) -> dict[str, Any]:
        granted = await self._session.welcome.look()
        now = int(time.time())
        items = [item.as_dict(now) for item in self._session.welcome.items()]
        return {"invitations": items, "granted": [item.id[:8] for item in granted]}

    async def _uninvite(self, invitation: str) -> dict[str, Any]:
        """Take an invitation back here, and then its code at the service, as far as that answers."""
        item = await self._session.welcome.revoke(invitation)
        data = item.as_dict(int(time.time())) | {"joining": "none", "reason": ""}
        metadata = self._session.metadata
        if item.joining and item.stage == "revoked" and isinstance(metadata, HttpMetadata):
            try:
                data["joining"] = "taken_back" if await metadata.uninvite(item.joining) else "used"
            except MeshkitError as error:
                data |= {"joining": "unknown", "reason": error.code}
        return data

    async def _claim(self, ticket: str) -> dict[str, Any]:
        """Tell the owner of an invitation which identity it is for: this one."""
        session, now = self._session, int(time.time())
        parsed = Ticket.from_text(ticket)
        mine = session.config.metadata.url
        if parsed.url != mine:
            raise MeshkitError(
                "invalid_argument",
                f"the invitation is for {parsed.url or 'a metadata store on its own machine'}, and this home "
                f"uses {session.config.metadata.place}",
            )
        if now >= parsed.until:
            raise MeshkitError("share_expired", f"the invitation ended {now - parsed.until} s ago")
        owner = parsed.owner
        session.contacts.add(parsed.owner_record, now)
        await publish(session.identity, session.metadata)
        blob = seal_claim(session.identity.signing, session.identity.record, parsed, now)
        await session.metadata.post_letter(owner.enc_kid, blob)
        return {"owner": owner.handle, "share": parsed.name, "until": parsed.until}


def checked_grace(text: str | None) -> int:
    """Return the seconds of an offline grace; none if nothing was asked for. Raises ``invalid_argument``."""
    span = parse_span(text) if text else 0
    if span > ROSTER_LIFETIME_S:
        raise MeshkitError(
            "invalid_argument",
            f"'{text}': what is not proved anew ends after 7d at the latest, whatever is granted",
        )
    return span


def checked_demands(names: list[str] | None) -> tuple[str, ...]:
    """Return what a grant demands of the recipient's key vault. Raises ``invalid_argument``."""
    unknown = set(names or ()) - set(DEMANDS)
    if unknown:
        raise MeshkitError(
            "invalid_argument",
            f"'{min(unknown)}' cannot be demanded of a key vault; these can: {', '.join(DEMANDS)}",
        )
    return tuple(sorted(set(names or ())))


def checked_rights(names: list[str]) -> tuple[str, ...]:
    """Return the rights a capsule names for what was asked; writing includes reading."""
    unknown = set(names) - {"list", "read", "write", "reshare"}
    if unknown or not names:
        raise MeshkitError("invalid_argument", f"rights {', '.join(sorted(unknown)) or '(none)'}")
    if "reshare" in names:
        # Rosters have one signer; a right that cannot be used must not be promised.
        raise MeshkitError("not_supported", "'reshare': only the owner of a share can grant it to others")
    return tuple(sorted({*names, "read"} if "write" in names else set(names)))
