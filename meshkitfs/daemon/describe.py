"""Shares, grants and the state of a home as plain JSON values, for the CLI and the files in ``.meshkit``."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from meshkitfs.core.cid import cid_text
from meshkitfs.core.entries import FILE
from meshkitfs.core.keys import fingerprint, kid_of
from meshkitfs.daemon.metadata_home import lateness
from meshkitfs.daemon.session import Incident, Session
from meshkitfs.daemon.watching import WATCH_S
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.identity import Contact
from meshkitfs.metadata import HttpMetadata
from meshkitfs.shares import DirNode, Invitation, Share, demands_of, grace_of
from meshkitfs.state import Member

if TYPE_CHECKING:
    from meshkitfs.daemon.locking import Lock

__all__ = [
    "STEP_BOUND_S",
    "Incident",
    "amount",
    "bounds",
    "errors_text",
    "incident_text",
    "invitation",
    "left",
    "member",
    "pending",
    "share",
    "state",
    "status",
    "status_json",
]


# How long the end of a grant takes to reach open descriptors and the kernel's copies, in seconds: the
# watcher's step, and as much again for the walk and the kernel.
STEP_BOUND_S: Final = 2 * WATCH_S


def share(item: Share) -> dict[str, Any]:
    """Describe a share as it is known now, without asking anybody."""
    grant = item.grant
    refusal = item.refusal
    data: dict[str, Any] = {
        "name": item.name,
        "id": item.row.share.hex(),
        "kind": "file" if item.row.kind == FILE else "directory",
        "grant": item.row.grant,
        "mine": item.row.mine,
        "owner": item.row.owner_handle,
        "rights": sorted(grant.rights) if grant is not None else [],
        "enforcement": grant.enforcement if grant is not None else None,
        "release_service": grant.capsule.rel["url"] if grant is not None and grant.capsule.rel else None,
        "key_vault_required": list(grant.capsule.keyvault) if grant is not None else [],
        "expires": grant.capsule.exp if grant is not None else None,
        "version": item.base.version or None,
        "epoch": grant.roster.epoch if grant is not None else None,
        "head": cid_text(item.base.root) if item.base.root else None,
        "state": state(item),
        "reason": next((e.code for e in _reasons(item) if e is not None), None),
        "freshness": _freshness(item),
        "roster": _roster(item),
        "conflicts": [os.fsdecode(name) for name in item.conflicts],
    }
    root = item.tree_root
    if refusal is None and isinstance(root, DirNode) and root.children is not None:
        data["entries"] = len(root.children)
    return data


def _reasons(item: Share) -> tuple[MeshkitError | None, ...]:
    """What is wrong with a share, what matters most first."""
    return item.refusal, item.stuck, item.unread, item.unconfirmed, item.roster_problem


def _freshness(item: Share) -> dict[str, Any] | None:
    """Say when the metadata store last vouched for the grant, and how long it goes on without that."""
    grant = item.grant
    if grant is None:
        return None
    error = item.unconfirmed
    return {
        "proved": grant.proved or None,
        "age_seconds": max(0, int(time.time()) - grant.proved) if grant.proved else None,
        "ends_in_seconds": int(grant.seconds_left),
        "offline_grace": grant.capsule.offline_grace,
        "unconfirmed": "" if error is None else f"{error.code}: {error.detail}",
    }


def _roster(item: Share) -> dict[str, Any] | None:
    """Of a share of one's own: until when its roster vouches, and why it could not be renewed."""
    if not item.roster_until:
        return None
    problem = item.roster_problem
    return {"until": item.roster_until, "problem": "" if problem is None else problem.detail}


def state(item: Share) -> str:
    """Say where a share's changes are: nowhere to go, here, on their way, stuck here, or all stored.

    And of one without changes, if its newest version cannot be read.
    """
    if item.refusal is not None:
        return "refused"
    if not item.dirty:
        return "stored" if item.unread is None else "unreadable"
    if item.uploading is not None:
        return "uploading"
    return "dirty" if item.stuck is None else "stuck"


def _unopened(item: Share) -> str:
    """The same for a share with changes of an earlier run that was not opened since."""
    return "dirty" if item.stuck is None else "stuck"


def member(item: Member) -> dict[str, Any]:
    """Describe a grant its owner made."""
    return {
        "handle": item.handle,
        "grant": item.grant,
        "path": item.target,
        "rights": list(item.rights),
        "expires": item.expires,
        "policy": item.policy,
        "vault": item.vault,
        "capability": item.capability,
        "offline_grace": grace_of(item),
        "key_vault_required": list(demands_of(item)),
        "capsule": item.capsule_id.hex(),
        "revoked": item.revoked or None,
    }


def invitation(item: Invitation, contacts: dict[str, Contact]) -> dict[str, Any]:
    """Describe a letter in the inbox; ``trust`` says what is known of its sender."""
    letter = item.letter
    offer, sender = letter.offer, letter.sender
    assert offer is not None
    assert sender is not None
    contact = contacts.get(sender.handle)
    known = contact is not None and contact.public.root == sender.root
    return {
        "id": item.id,
        "from": sender.handle,
        "trust": str(contact.trust) if known and contact is not None else "unknown",
        "name": os.fsdecode(letter.name),
        "kind": "file" if letter.kind == FILE else "directory",
        "grant": offer.grant,
        "rights": list(offer.rights),
        "expires": offer.exp,
        "note": letter.note,
        "sent": letter.sent,
        "accepted": item.accepted,
    }


def pending(session: Session) -> dict[str, Any]:
    """Count what waits to be stored: blocks and bytes that are sealed, bytes that are in memory yet."""
    amounts = [item.waiting for item in session.book.shares.values() if item.row.grant == "live"]
    return {
        "blocks": sum(blocks for blocks, _ in amounts),
        "bytes": sum(size for _, size in amounts),
        "memory": session.services.budget.held,
    }


def amount(unsent: list[dict[str, Any]]) -> dict[str, int]:
    """Return of how many shares something is unsent, of what `left` lists, and how many bytes that is."""
    return {"shares": len(unsent), "bytes": sum(item["bytes"] for item in unsent)}


def left(session: Session) -> list[dict[str, Any]]:
    """List the shares with something unpublished, and why."""
    waiting = session.state.unpublished()
    found = []
    for item in session.book.shares.values():
        if item.dirty or (item.row.grant == "live" and item.row.share in waiting):
            blocks, size = item.waiting
            reason = item.stuck or item.refusal
            arrived, arrived_bytes = item.uploading or (0, 0)
            since = item.unsent_since
            found.append(
                {
                    "share": item.name,
                    "state": state(item) if item.dirty or item.refusal else _unopened(item),
                    "blocks": blocks,
                    "bytes": size,
                    # Some of it is not on this device's disk yet: it ends with the mount.
                    "unsaved": item.unsaved,
                    # Of them, what the provider has got in the upload under way.
                    "arrived": arrived,
                    "arrived_bytes": arrived_bytes,
                    "since": int(since) or None,
                    "age_seconds": max(0, int(time.time() - since)) if since else None,
                    "reason": reason.code if reason is not None else "",
                    "detail": reason.detail if reason is not None else "",
                }
            )
    return found


def status(session: Session, lock: Lock) -> dict[str, Any]:
    """Describe the whole home: identity, shares, what waits, what went wrong, and what it has cost."""
    reader = session.services.reader
    return {
        "access": bounds(session),
        "identity": session.identity.handle,
        "locked": lock.status(),
        "pid": os.getpid(),
        "key_vault": session.vault_report.as_dict() if session.vault_report is not None else None,
        "provider": session.store.name,
        "sources": [asdict(source) for source in session.store.sources()],
        "metadata": _metadata(session),
        "rotation": session.life.schedule.as_dict(session.identity) if session.locked is None else None,
        "shares": [share(item) | _members(session, item) for _, item in sorted(session.book.shares.items())],
        "pending": lock.pending(),
        "fsync": "published" if session.services.fsync_publishes else "journal",
        "spool": {
            "used": session.services.spool.used,
            "limit": session.services.budget.spool_limit,
        },
        "left": lock.left(),
        "errors": [
            {"time": item.time, "path": item.path, "code": item.code, "detail": item.detail}
            for item in session.incidents
        ],
        "counters": {
            "gate_walks": session.gate.counters.walks,
            "unwraps": session.gate.counters.unwraps,
            "releases": session.services.releases.asked if session.services.releases is not None else 0,
            "refusals": dict(session.gate.counters.refusals),
            "fetches": session.store.counters.gets,
            "puts": session.store.counters.puts,
            "decrypts": reader.counters.opens,
            "commits": sum(item.counters.commits for item in session.book.shares.values()),
            "heads": sum(item.counters.heads for item in session.book.shares.values()),
            "merges": sum(item.counters.merges for item in session.book.shares.values()),
        },
    }


def _members(session: Session, item: Share) -> dict[str, int | None]:
    """Say how many others have a share of one's own, as is known without asking; None if it is not.

    Somebody with several grants counts once.
    """
    if not item.row.mine or session.locked is not None:
        return {"members": None}
    # What this device did last counts: the grant that it holds itself may rest on the roster before.
    now = session.services.wall()
    members = session.state.members(item.row.share)
    handles = {member.handle for member in members if not member.revoked and member.expires > now}
    return {"members": len(handles - {session.identity.handle})}


def bounds(session: Session) -> dict[str, float]:
    """Say how soon an end of access bites in a mount of this home, in seconds.

    ``noticed_seconds``: as long as the metadata store answers. ``lease_seconds``: how long a grant goes on
    without an answer, and ``unreachable_seconds``: by when it has ended then, open files and the kernel's
    copies included. An offline grace takes the place of the lease for the grants that have one.
    """
    gate = session.gate
    return {
        "noticed_seconds": STEP_BOUND_S + lateness(session.metadata, gate.lease_s, gate.renew_ahead_s),
        "lease_seconds": gate.lease_s,
        "unreachable_seconds": STEP_BOUND_S + gate.lease_s,
    }


def _metadata(session: Session) -> dict[str, Any]:
    """Describe the metadata home; of a service also whether its change feed can be relied upon."""
    metadata = session.metadata
    data: dict[str, Any] = {"type": session.config.metadata.type, "place": session.config.metadata.place}
    if isinstance(metadata, HttpMetadata):
        data |= {"feed": "live" if metadata.feed.live else "down", "problem": metadata.feed.problem}
    return data


def steps(session: Session, trace: Trace) -> list[dict[str, str]]:
    """Describe a walk through the gate, with the fingerprint of who signed, and how sure one is of it."""
    known: dict[str, tuple[str, str, str]] = {}
    me = session.identity.public
    # While the home is locked nobody knows who its contacts are, and only the first step has been taken.
    for contact in session.contacts.list() if session.locked is None else ():
        kid = kid_of(contact.public.sig).hex()
        known[kid] = (contact.handle, contact.fingerprint, str(contact.trust))
    for own in (kid_of(me.sig), session.identity.encryption.kid):
        known[own.hex()] = (me.handle, fingerprint(me.root), "self")
    found = []
    for step in trace.as_list():
        by, mark, trust = known.get(step["signer"], (step["by"], "", ""))
        found.append(step | {"by": by, "fingerprint": mark, "trust": trust})
    return found


def status_json(session: Session, lock: Lock, mounted: dict[str, Any]) -> bytes:
    return json.dumps(status(session, lock) | mounted, indent=2, sort_keys=True).encode() + b"\n"


def errors_text(session: Session) -> bytes:
    """Return the incidents as text for people, newest last: what, why, and what to do."""
    if not session.incidents:
        return b"Nothing was refused and nothing went wrong since this mount began.\n"
    return "".join(map(incident_text, session.incidents)).encode(errors="surrogateescape")


def incident_text(item: Incident) -> str:
    """Return one incident as text for people."""
    when = datetime.fromtimestamp(item.time, UTC).isoformat().replace("+00:00", "Z")
    reason = TABLE[item.code]
    detail = f" ({item.detail})" if item.detail else ""
    return f"{when}  {item.path}\n    {item.code}: {reason.sentence}{detail}\n    {reason.remedy}\n"
