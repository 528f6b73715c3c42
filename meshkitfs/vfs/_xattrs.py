"""The ``user.meshkit.*`` attributes: the state of a share and a file, for people, scripts and file managers.

All are answered from memory, since file managers ask for each entry of a listing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import QUARANTINED
from meshkitfs.shares import AnyShare, Node, PastShare

__all__ = ["PREFIX", "meshkit_names", "meshkit_value", "reason_text", "share_state"]

PREFIX = b"user.meshkit."

# Gives what this runtime really offers: key vault, memory protection, enforcement (from the daemon).
Runtime = Callable[[], dict[str, Any]]


def reason_text(share: AnyShare, fault: MeshkitError | None) -> str:
    """Return why the share is refused, or what went wrong with this file (``fault``) or with publishing.

    In the words of the error table; "ok" if nothing did.
    """
    error = share.denial or fault or share.stuck or share.unconfirmed
    if error is None:
        return "ok"
    detail = f" ({error.detail})" if error.detail else ""
    if error is share.unconfirmed and share.grant is not None:
        detail = f" ({error.detail}; it may be used for {share.grant.seconds_left:.0f} s more all the same)"
    return f"{error.code}: {error.reason.sentence}{detail} {error.remedy}"


def share_state(share: AnyShare, node: Node | None) -> str:
    """Return clean, dirty, uploading, stored or quarantined."""
    if share.refusal is not None and share.refusal.code in QUARANTINED:
        return "quarantined"
    if node is not None and node.dirty:
        return "dirty"
    if share.dirty:
        return "uploading"
    grant = share.grant
    return "stored" if grant is not None and "write" in grant.rights else "clean"


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _recipients(share: AnyShare) -> str:
    if not share.row.mine:
        return share.services.who
    if share.refusal is not None and share.refusal.code == "identity_locked":
        return ""  # this device's memory is closed
    members = share.services.state.members(share.row.share)
    return ",".join(sorted({member.handle for member in members if not member.revoked}))


def _capabilities(share: AnyShare, runtime: Runtime) -> str:
    grant = share.grant
    value = runtime() | {
        "rights": sorted(grant.rights) if grant is not None else [],
        "caveats": list(grant.caveats) if grant is not None else [],
        "key_vault_required": list(grant.capsule.keyvault) if grant is not None else [],
        "enforcement": grant.enforcement if grant is not None else None,
        "release_service": grant.capsule.rel["url"] if grant is not None and grant.capsule.rel else None,
    }
    return json.dumps(value, sort_keys=True)


def meshkit_value(
    name: bytes, share: AnyShare, node: Node | None, runtime: Runtime, fault: MeshkitError | None
) -> bytes | None:
    """Return one attribute, or None if it does not apply here."""
    if name == PREFIX + b"reason":
        return reason_text(share, fault).encode(errors="surrogateescape")
    value = _value(name[len(PREFIX) :].decode(errors="replace"), share, node, runtime)
    return None if value is None else value.encode(errors="surrogateescape")


def _value(name: str, share: AnyShare, node: Node | None, runtime: Runtime) -> str | None:
    grant = share.grant
    match name:
        case "reason":
            return "ok"  # its text is made by `meshkit_value`; here only that there is one
        case "state":
            return share_state(share, node)
        case "share":
            return share.row.share.hex()
        case "owner":
            return share.row.owner_handle
        case "recipients":
            return _recipients(share)
        case "capabilities":
            return _capabilities(share, runtime)
        case "cid":
            if share.row.grant == "live" and share.tree is not None and node is share.tree.root:
                return cid_text(share.base.root) if share.base.root else None
            if node is not None and node.entry is not None and node.entry.ref:
                return cid_text(node.entry.ref[:32])
            return cid_text(share.base.root) if share.row.grant == "snapshot" and share.base.root else None
        case "version":
            return str(share.base.version) if share.base.version else None
    if grant is None:
        return None
    match name:
        case "rights":
            lost = {"write", "reshare"} if isinstance(share, PastShare) else set()
            return ",".join(sorted(grant.rights - lost))
        case "expires":
            return _time(grant.capsule.exp)
        case "policy":
            return str(grant.capsule.pol["id"]) if grant.capsule.pol else None
        case "vault":
            return grant.capsule.vault
        case "keyvault":
            return ",".join(grant.capsule.keyvault) or None
        case "capsule":
            return grant.capsule.id.hex()
        case "freshness":
            if share.unconfirmed is None:
                return _time(grant.fresh_until)
            since = f" since {_time(grant.proved)}" if grant.proved else ""
            return f"{_time(grant.fresh_until)}, not confirmed{since}"
        case "verified":
            return "cid,seal,signature" if grant.alive else None
    return None


_NAMES = (
    "capabilities", "capsule", "cid", "expires", "freshness", "keyvault", "owner", "policy", "reason",
    "recipients", "rights", "share", "state", "vault", "verified", "version",
)  # fmt: skip


def meshkit_names(share: AnyShare, node: Node | None, runtime: Runtime) -> list[bytes]:
    """Return the names of the attributes that have a value here."""
    return [PREFIX + name.encode() for name in _NAMES if _value(name, share, node, runtime) is not None]
