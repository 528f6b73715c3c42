"""Lifting the quarantine of a share whose metadata store was restored from a backup, on its owner's word."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import QUARANTINED, Grant
from meshkitfs.identity import Identity, Signers
from meshkitfs.metadata import Publication
from meshkitfs.shares._publishing import publish
from meshkitfs.shares._releasing import deposit
from meshkitfs.shares._services import Services
from meshkitfs.shares._share import Share
from meshkitfs.state import Mark, Member

__all__ = ["accept_rollback", "remembered"]

_log = logging.getLogger(__name__)


async def accept_rollback(services: Services, identity: Callable[[], Identity], share: Share) -> Mark:
    """Take what the metadata store shows now as the truth and lift the quarantine; return the old marks.

    What was changed here and is not published yet is merged into it. Raises ``invalid_argument`` if the
    store shows nothing older or different: there is nothing to accept then, and forgetting what was seen
    would only weaken the next check. Raises what else keeps the share closed.
    """
    row = share.row
    try:
        await services.gate.confirm(row, "list")
    except MeshkitError as error:
        if error.code not in QUARANTINED:
            raise
    else:
        raise MeshkitError("invalid_argument", f"'{share.name}' shows nothing older than was seen here")
    old = services.state.mark(row.share)
    await trio.to_thread.run_sync(services.state.forget_mark, row.share)
    epoch = await _take_as_seen(services, identity(), share) if row.mine else 0
    # What was given up since is not in the restored store, and its next record is numbered after that.
    share.history.retention = None
    if row.mine:
        await _give_back_keys(services, identity(), share, epoch)
    _log.warning("a rollback was accepted", extra={"fields": {"share": row.share.hex()[:8]}})
    if not share.dirty:
        share.forget_tree()
    grant = await share.use("list", current=True)
    if row.mine:
        await _leave_halves_again(services, identity(), share, grant)
    return old


async def _take_as_seen(services: Services, me: Identity, share: Share) -> int:
    """Note the roster of a share of one's own as seen, whichever of one's keys has signed it; its epoch.

    A store that was restored may have nothing newer than what a key of before has signed: for the owner
    alone that is good enough to sign it anew.
    """
    row = share.row
    blob = await services.metadata.roster(row.share)
    if blob is None:
        return 0
    roster = Roster.parse(blob, Signers(me.chain).keys)
    seen = Mark(roster_seq=roster.seq, roster_hash=record_hash(blob))
    await trio.to_thread.run_sync(services.state.raise_mark, row.share, seen)
    return roster.epoch


async def _give_back_keys(services: Services, me: Identity, share: Share, epoch: int) -> None:
    """Publish again the capsules that the store has forgotten, for those who have access.

    No roster lists them, so they open nothing new. But what is not published yet, here and in the homes
    of others, may have been made in an epoch that the store knows nothing of, and cannot be read without.
    """
    grants = remembered(services, me, share)
    standing = {member.encryption_kid for member, _ in grants if not member.revoked}
    # Of a key of before, the store takes only what is from before the epoch it shows.
    now = me.signing.kid
    capsules = [
        (m.encryption_kid, m.capsule_id, m.blob)
        for m, capsule in grants
        if m.encryption_kid in standing and (capsule.frm == now or capsule.epoch < epoch)
    ]
    await publish(services, Publication(share.row.share, capsules=tuple(capsules)))


async def _leave_halves_again(services: Services, me: Identity, share: Share, grant: Grant) -> None:
    """Leave at the release service again what a restored one may have forgotten."""
    epochs = {c.epoch for _, c in remembered(services, me, share) if c.service is not None}
    try:
        for epoch in sorted(epochs):
            with grant.epoch_secret(epoch) as secret:
                await deposit(services, secret)
    except MeshkitError as error:
        _log.warning("halves of keys could not be left again: %s (%s)", error.code, error.detail)


def remembered(services: Services, me: Identity, share: Share) -> list[tuple[Member, Capsule]]:
    """Return the live grants of ``share`` that this device has made, also those that ended."""
    owner = Signers(me.chain).keys
    return [
        (member, Capsule.parse(member.blob, owner))
        for member in services.state.members(share.row.share)
        if member.grant == "live" and member.blob
    ]
