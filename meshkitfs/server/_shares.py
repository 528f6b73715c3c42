"""The routes of shares: state, capsules, roster, timestamp, heads, retention, publications, changes."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import trio
from fastapi import Query, Request

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _wire
from meshkitfs.metadata.service import list_subject, mailbox_subject, share_subject
from meshkitfs.server import _models as m
from meshkitfs.server._common import HexId, The, Who, b64, blob, key, router
from meshkitfs.server._hub import Hub
from meshkitfs.server._limits import TooManyError

__all__ = ["routes"]

MAX_POLLS = 32  # of one member at a time
routes = router("shares")
Kid = Annotated[str, Query(pattern=r"^[0-9a-f]{32}$", description="kid of an encryption key of one's own")]
Version = Annotated[int, Query(ge=0, le=m.MAX_NUMBER)]


@routes.get("/shares/{share}/state", response_model=m.ShareStateOut)
async def state(who: Who, service: The, share: HexId, kid: Kid) -> dict[str, Any]:
    """All that the gate needs of a share, of one moment."""
    found = await service.share_state(who, bytes.fromhex(share), bytes.fromhex(kid))
    return _wire.write_share_state(found)


@routes.get("/shares/{share}/capsules", response_model=m.CapsulesOut)
async def capsules(who: Who, service: The, share: HexId, kid: Kid) -> dict[str, Any]:
    """The capsules for one kid, oldest first, revoked ones included."""
    found = await service.capsules(who, bytes.fromhex(share), bytes.fromhex(kid))
    return {"capsules": [b64(capsule) for capsule in found]}


@routes.get("/shares/{share}/roster", response_model=m.RecordOut)
async def roster(who: Who, service: The, share: HexId) -> dict[str, Any]:
    """The roster in force."""
    return {"record": b64(await service.roster(who, bytes.fromhex(share)))}


@routes.get("/shares/{share}/timestamp", response_model=m.RecordOut)
async def timestamp(who: Who, service: The, share: HexId) -> dict[str, Any]:
    """A timestamp over the roster in force, signed now."""
    return {"record": b64(await service.timestamp(who, bytes.fromhex(share)))}


@routes.get("/shares/{share}/head", response_model=m.RecordOut)
async def head(who: Who, service: The, share: HexId) -> dict[str, Any]:
    """The newest head."""
    return {"record": b64(await service.head(who, bytes.fromhex(share)))}


@routes.get("/shares/{share}/retention", response_model=m.RecordOut)
async def retention(who: Who, service: The, share: HexId) -> dict[str, Any]:
    """The retention record in force."""
    return {"record": b64(await service.retention(who, bytes.fromhex(share)))}


@routes.put("/shares/{share}/retention", status_code=204)
async def retain(who: Who, service: The, share: HexId, body: m.RecordIn) -> None:
    """Replace the retention record by the next one."""
    await service.retain(who, bytes.fromhex(share), blob(body.record, "record"))


@routes.get("/shares/{share}/heads", response_model=m.HeadsOut)
async def heads(
    who: Who, service: The, share: HexId, after: Version = 0, upto: Version = m.MAX_NUMBER
) -> dict[str, Any]:
    """The heads with ``after < version <= upto``: one page; go on from the last one's version."""
    found, more = await service.heads(who, bytes.fromhex(share), after, upto)
    return {"heads": [b64(record) for record in found], "more": more}


@routes.post("/shares/{share}/publications", status_code=204)
async def publish(who: Who, service: The, share: HexId, body: m.PublicationIn) -> None:
    """Apply a publication, entirely or not at all. Repeating one is harmless."""
    publication = _wire.read_publication(bytes.fromhex(share), body.model_dump())
    if publication.head is None and publication.roster is None and not publication.capsules:
        raise MeshkitError("invalid_argument", "a publication of nothing")
    await service.publish(who, publication)


@routes.post("/changes", response_model=m.ChangesOut)
async def changes(request: Request, who: Who, service: The, body: m.ChangesIn) -> dict[str, Any]:
    """Wait until something of this changes after the cursor, or the time is over.

    Without a cursor the answer comes at once, with the cursor of now and no changes.
    """
    shares = list(dict.fromkeys(key(share, "share") for share in body.shares))
    mailbox = None if body.mailbox is None else key(body.mailbox, "mailbox")
    after = None if body.after is None else int(body.after)
    subjects = [subject(share) for share in shares for subject in (share_subject, list_subject)]
    subjects += [] if mailbox is None else [mailbox_subject(mailbox)]
    hub: Hub = request.app.state.hub
    polls: Counter[str] = request.app.state.polls
    if polls[who.handle] >= MAX_POLLS:
        raise TooManyError(f"{MAX_POLLS} polls of this identity are waiting", 5)
    polls[who.handle] += 1
    try:
        deadline = trio.current_time() + (body.wait if after is not None else 0)
        while True:
            # Who waits is noted before looking, so that nothing comes in between.
            with hub.waiting(subjects) as event:
                found = await service.changes(who, shares, mailbox, after)
                over = hub.stopping or trio.current_time() >= deadline
                if found.shares or found.mailbox or over or not await _woken(request, event, deadline):
                    return _told(found)
    finally:
        polls[who.handle] -= 1
        if not polls[who.handle]:
            del polls[who.handle]


def _told(found: Any) -> dict[str, Any]:
    return {
        "cursor": str(found.cursor),
        "shares": [b64(share) for share in found.shares],
        "mailbox": found.mailbox,
    }


async def _woken(request: Request, event: trio.Event, deadline: float) -> bool:
    """Wait for the event; False when the time is over, or the client has gone and reads no answer."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, request, nursery.cancel_scope)
        nursery.cancel_scope.deadline = deadline
        await event.wait()
        nursery.cancel_scope.cancel()
    return event.is_set()


async def _watch(request: Request, scope: trio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
