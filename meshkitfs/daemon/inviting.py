"""The commands around people who have no identity yet: inviting, taking invitations back, claiming."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from meshkitfs.core.durations import parse_expiry, parse_span
from meshkitfs.core.ticket import Ticket, seal_claim
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import publish
from meshkitfs.metadata import HttpMetadata
from meshkitfs.shares import ROSTER_LIFETIME_S, Terms

__all__ = ["Inviting", "checked_grace", "checked_rights"]

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
        self, share: str, rights: list[str] | None = None, expires: str | None = None, within: str = "7d",
        offline_grace: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        session, now = self._session, int(time.time())
        span = parse_span(within)
        if not _LEAST_S <= span <= _MOST_S:
            raise MeshkitError("invalid_argument", f"'{within}': an invitation is good for 60s to 30d")
        terms = Terms(
            checked_rights(rights or ["read"]),
            parse_expiry(expires, now) if expires else 0,
            offline_grace=checked_grace(offline_grace),
        )
        session.book.find(share)  # before the service makes an invitation that nobody will use
        url = join = ""
        if isinstance(session.metadata, HttpMetadata):
            url = session.config.metadata.url
            secret = await session.metadata.invitation(span)
            join = secret.reveal() if secret is not None else ""
        made, ticket = await session.welcome.invite(share, terms, now + span, url, join)
        return made.as_dict(now) | {"ticket": ticket}

    async def _invitations(self) -> dict[str, Any]:
        granted = await self._session.welcome.look()
        now = int(time.time())
        items = [item.as_dict(now) for item in self._session.welcome.items()]
        return {"invitations": items, "granted": [item.id[:8] for item in granted]}

    async def _uninvite(self, invitation: str) -> dict[str, Any]:
        return (await self._session.welcome.revoke(invitation)).as_dict(int(time.time()))

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


def checked_rights(names: list[str]) -> tuple[str, ...]:
    """Return the rights a capsule names for what was asked; writing includes reading."""
    unknown = set(names) - {"list", "read", "write", "reshare"}
    if unknown or not names:
        raise MeshkitError("invalid_argument", f"rights {', '.join(sorted(unknown)) or '(none)'}")
    if "reshare" in names:
        # Rosters have one signer; a right that cannot be used must not be promised.
        raise MeshkitError("not_supported", "'reshare': only the owner of a share can grant it to others")
    return tuple(sorted({*names, "read"} if "write" in names else set(names)))
