"""The routes of people: mailboxes, the identity directory, invitations."""

from __future__ import annotations

import hmac
from typing import Annotated, Any

from fastapi import Header, Query, Request

from meshkitfs.server import _models as m
from meshkitfs.server._common import Handle, HexId, The, Who, b64, blob, gone, router

__all__ = ["routes"]

routes = router("people")
After = Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$", description="the letter to go on behind")]
Code = Annotated[str | None, Header(alias="Meshkit-Invitation", max_length=128)]


@routes.post("/mailboxes/{kid}", status_code=201, response_model=m.IdOut)
async def post_letter(who: Who, service: The, kid: HexId, body: m.LetterIn) -> dict[str, Any]:
    """Put a sealed letter into anybody's mailbox."""
    letter = await service.post_letter(who, bytes.fromhex(kid), blob(body.letter, "letter"))
    return {"id": b64(letter)}


@routes.get("/mailboxes/{kid}", response_model=m.LettersOut)
async def letters(who: Who, service: The, kid: HexId, after: After = None) -> dict[str, Any]:
    """The letters in one's own mailbox, oldest first: one page."""
    start = None if after is None else bytes.fromhex(after)
    found, more = await service.letters(who, bytes.fromhex(kid), start)
    return {"letters": [{"id": b64(i), "blob": b64(letter)} for i, letter in found], "more": more}


@routes.delete("/mailboxes/{kid}/{letter}", status_code=204)
async def delete_letter(who: Who, service: The, kid: HexId, letter: HexId) -> None:
    """Remove a letter from one's own mailbox; one that is not there is no error."""
    await service.delete_letter(who, bytes.fromhex(kid), bytes.fromhex(letter))


@routes.post("/identities/{handle}", status_code=204)
async def publish_identity(
    request: Request, service: The, handle: Handle, body: m.RecordIn, code: Code = None
) -> None:
    """Publish an identity record: the first one of a newcomer, or the next of a member's own chain.

    A newcomer's request is signed with the key in the record, and carries what the service asks for:
    ``Authorization: Bearer …`` (policy ``token``) or ``Meshkit-Invitation: CODE`` (``invite``).
    """
    welcome = request.app.state.join == "open" or _has_token(request)
    record = blob(body.record, "record")
    signer = request.state.requester.kid
    invitation = code if request.app.state.join == "invite" else None
    await service.publish_identity(handle, record, signer, welcome=welcome, code=invitation)


def _has_token(request: Request) -> bool:
    token: bytes | None = request.app.state.join_token
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if token is None or kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode("utf-8", "replace"), token)


@routes.get("/identities/{handle}", response_model=m.ChainOut)
async def identity(who: Who, service: The, handle: Handle) -> dict[str, Any]:
    """The chain of a handle; empty when nobody has that name."""
    return {"chain": [b64(record) for record in await service.identity(handle)]}


@routes.get("/identity-keys/{kid}", response_model=m.ChainOut)
async def identity_by_kid(who: Who, service: The, kid: HexId) -> dict[str, Any]:
    """The chain in which a signing key of that kid occurs; empty when there is none."""
    return {"chain": [b64(record) for record in await service.identity_by_kid(bytes.fromhex(kid))]}


@routes.post("/invitations", status_code=201, response_model=m.InvitationOut)
async def invite(who: Who, service: The, body: m.InvitationIn) -> dict[str, Any]:
    """Make an invitation for one newcomer. Its code is shown this once."""
    code, expires = await service.invite(who, body.expires_in)
    return {"id": service.invitation_id(code).hex(), "code": code, "expires": expires}


@routes.get("/invitations", response_model=m.InvitationsOut)
async def invitations(who: Who, service: The) -> dict[str, Any]:
    """One's own invitations, the newest first, without their codes."""
    found = await service.invitations(who)
    lines = [{"id": i.id.hex(), "expires": i.expires, "used_by": i.handle} for i in found]
    return {"invitations": lines}


@routes.delete("/invitations/{invitation}", status_code=204)
async def uninvite(who: Who, service: The, invitation: HexId) -> None:
    """Take back one's own invitation that nobody has used yet."""
    if not await service.uninvite(who, bytes.fromhex(invitation)):
        raise gone("invitation")
