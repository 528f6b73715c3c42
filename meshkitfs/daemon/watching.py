"""What an open home does by itself: notice what others did, renew what runs out, take up what waits.

Each task here survives what goes wrong in it: a watcher that has died would leave open what should close.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import Share

__all__ = ["WATCH_S", "resume", "watch"]

_log = logging.getLogger(__name__)

# How often the metadata store is asked whether something changed. This bounds how long a revocation, an
# expiry or a remote change can go unnoticed on a mount that nobody opens anything in.
WATCH_S: Final = 0.5
# How often it is asked whether the mailbox may have changed while an invitation is out, and how often it is
# looked into whatever the answer is.
CLAIMS_S: Final = 1.0
CLAIMS_LEAST_S: Final = 60.0
# How often a share with unsent changes of an earlier run is tried to be opened, while a store is away.
TAKE_UP_AGAIN_S: Final = 5.0


def watch(session: Session, nursery: trio.Nursery) -> None:
    """Start everything that goes on while ``session`` is open."""
    for task in (_shares, _leases, _rosters, _claims, resume, _tokens):
        nursery.start_soon(task, session)
    for part in (session.watched, session.life, session.auditing, session.remembering, session.peers):
        nursery.start_soon(part.run)


async def _shares(session: Session) -> None:
    """Notice what others did, and renew leases."""
    busy: set[Share] = set()

    async def look(share: Share) -> None:
        try:
            await share.refresh()
        except Exception:
            _log.exception("the watcher failed in a way nobody foresaw")
        finally:
            busy.discard(share)

    async with trio.open_nursery() as nursery:
        while True:
            await trio.sleep(WATCH_S)
            for share in list(session.book.shares.values()):
                # One that must wait for an answer keeps none of the others waiting.
                if share not in busy:
                    busy.add(share)
                    nursery.start_soon(look, share)


async def _leases(session: Session) -> None:
    """Let what is over end, whoever is being waited for elsewhere."""
    while True:
        await trio.sleep(WATCH_S)
        for share in list(session.book.shares.values()):
            share.lapse()
        session.gate.drop_ended()


async def _rosters(session: Session) -> None:
    """Keep this home's own rosters valid, and those whose time is over out."""
    while True:
        await trio.sleep(WATCH_S)
        if session.locked is not None:
            continue
        try:
            await session.book.renew_rosters()
        except Exception:
            _log.exception("renewing rosters failed in a way nobody foresaw")
        try:
            await session.lists.renew()
            await session.vaults.follow()
        except MeshkitError as error:
            _log.warning("a vault or revocation list could not be renewed: %s (%s)", error.code, error.detail)
        except Exception:
            _log.exception("the watcher failed in a way nobody foresaw")


async def _claims(session: Session) -> None:
    """Let in who comes back with an invitation; nobody is asked while none is out."""
    seen, looked = -1, 0.0
    while True:
        await trio.sleep(CLAIMS_S)
        try:
            if session.locked is not None or not session.welcome.awaited:
                continue
            tick = session.metadata.tick()
            if tick == seen and trio.current_time() < looked + CLAIMS_LEAST_S:
                continue
            looked = trio.current_time()
            for item in await session.welcome.look():
                _log.info("an invitation was claimed", extra={"fields": {"invitation": item.id[:8]}})
            seen = tick
        except MeshkitError as error:
            _log.info("the claims must wait: %s (%s)", error.code, error.detail)
        except Exception:
            _log.exception("looking for claims failed in a way nobody foresaw")


async def _tokens(session: Session) -> None:
    """Take in tokens that come by mail while a share waits for one; nobody is asked otherwise."""
    seen = -1
    while True:
        await trio.sleep(CLAIMS_S)
        waiting = [
            share
            for share in session.book.shares.values()
            if share.refusal is not None and share.refusal.code.startswith("capability_")
        ]
        tick = session.metadata.tick()
        if not waiting or tick == seen:
            continue
        try:
            if await session.tokens.collect():
                for share in waiting:
                    share.reconsider()
            seen = tick
        except MeshkitError as error:
            _log.info("tokens in the mailbox must wait: %s (%s)", error.code, error.detail)
        except Exception:
            _log.exception("looking for tokens failed in a way nobody foresaw")


async def resume(session: Session) -> None:
    """Go on with the changes that an earlier run could not publish."""
    waiting = session.state.unpublished()
    for share in list(session.book.shares.values()):
        if share.row.share in waiting and share.row.grant == "live":
            session.services.nursery.start_soon(_take_up, session, share)


async def _take_up(session: Session, share: Share) -> None:
    """Open a share with unsent changes, which then go out by themselves."""
    while True:
        try:
            await share.use("list")
            return
        except MeshkitError as error:
            _log.warning("unsent changes of share %r must wait: %s", share, error.code)
            if share.refusal is not None:
                return  # the watcher looks at it again
            share.stuck = error
        await trio.sleep(TAKE_UP_AGAIN_S)
