"""The routes of MeshKit's other records: proofs, sync jobs, vaults, capabilities, provider logs."""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import Path, Query, Response

from meshkitfs.core.cid import parse_cid
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata.service import Capability, Job, LogEvent
from meshkitfs.server import _models as m
from meshkitfs.server._common import HexId, The, Who, b64, blob, gone, key, router

__all__ = ["routes"]

routes = router("records")
Cid = Annotated[str, Path(pattern=r"^bafkrei[a-z2-7]{52}$", description="CIDv1, raw, sha2-256, base32")]
After = Annotated[int, Query(ge=0, le=m.MAX_NUMBER)]


# -- proofs --------------------------------------------------------------------------------------------------


@routes.put("/proofs/{cid}", status_code=204)
async def put_proof(who: Who, service: The, cid: Cid, body: m.ProofIn) -> None:
    """Keep what one says about the bytes of a CID, in place of what one said before."""
    _check_cid(cid)
    share = None if body.share is None else key(body.share, "share")
    await service.ledger.put_proof(who, cid, share, body.model_dump(exclude={"share"}))


@routes.get("/proofs/{cid}", response_model=m.ProofsOut)
async def proofs(who: Who, service: The, cid: Cid) -> dict[str, Any]:
    """What oneself and the members of one's shares say about a CID."""
    _check_cid(cid)
    found = await service.ledger.proofs(who, cid)
    return {"proofs": [record | {"share": b64(share), "by": by, "at": at} for by, at, share, record in found]}


def _check_cid(cid: str) -> None:
    try:
        parse_cid(cid)
    except MeshkitError as error:
        raise MeshkitError("invalid_argument", error.detail or "that is no CID") from None


# -- sync jobs -----------------------------------------------------------------------------------------------


@routes.post(
    "/sync/jobs",
    status_code=201,
    response_model=m.JobOut,
    responses={200: {"model": m.JobOut, "description": "one was active already"}},
)
async def enqueue(who: Who, service: The, body: m.JobIn, response: Response) -> dict[str, Any]:
    """Add a job: 201; with the policy ``dedupe`` and an active job of that key, that one: 200."""
    payload = blob(body.payload, "payload")
    job, new = await service.ledger.enqueue(who, body.kind, payload, body.key, body.policy)
    if not new:
        response.status_code = 200
    return _job(job)


@routes.get("/sync/jobs", response_model=m.JobsOut)
async def jobs(
    who: Who, service: The, active: Annotated[bool, Query(description="false: those that have ended")] = True
) -> dict[str, Any]:
    """One's own jobs."""
    return {"jobs": [_job(job) for job in await service.ledger.jobs(who, active=active)]}


@routes.get("/sync/jobs/{job}", response_model=m.JobOut)
async def one_job(who: Who, service: The, job: HexId) -> dict[str, Any]:
    """One of one's own jobs."""
    found = await service.ledger.job(who, bytes.fromhex(job))
    if found is None:
        raise gone("job")
    return _job(found)


@routes.patch("/sync/jobs/{job}", response_model=m.JobOut)
async def advance(who: Who, service: The, job: HexId, body: m.JobPatch) -> dict[str, Any]:
    """Set the status or the checkpoint of an active job."""
    checkpoint = None if body.checkpoint is None else blob(body.checkpoint, "checkpoint")
    found = await service.ledger.advance(who, bytes.fromhex(job), body.status, checkpoint)
    if found is None:
        raise gone("job")
    return _job(found)


def _job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id.hex(),
        "kind": job.kind,
        "payload": b64(job.payload),
        "key": job.key,
        "policy": job.policy,
        "status": job.status,
        "checkpoint": b64(job.checkpoint),
        "created": job.created,
        "updated": job.updated,
    }


# -- vaults --------------------------------------------------------------------------------------------------


@routes.put("/vaults/{vault}", response_model=m.SeqOut)
async def put_vault(who: Who, service: The, vault: HexId, body: m.VaultIn) -> dict[str, Any]:
    """Make or replace one's own vault, if nobody has replaced it since."""
    members = [key(kid, "members") for kid in body.members]
    record = blob(body.record, "record")
    seq = await service.ledger.put_vault(who, bytes.fromhex(vault), body.expect, record, members)
    return {"seq": seq}


@routes.get("/vaults/{vault}", response_model=m.VaultOut)
async def vault_record(who: Who, service: The, vault: HexId) -> dict[str, Any]:
    """A vault that one owns or is a member of, or a revocation list."""
    found = await service.ledger.vault(who, bytes.fromhex(vault))
    if found is None:
        raise gone("vault")
    members = [b64(kid) for kid in found.members]
    return {
        "id": found.id.hex(),
        "owner": found.owner,
        "seq": found.seq,
        "record": b64(found.record),
        "timestamp": b64(found.timestamp),
        "members": members,
    }


@routes.delete("/vaults/{vault}", status_code=204)
async def delete_vault(who: Who, service: The, vault: HexId) -> None:
    """Remove one's own vault."""
    if not await service.ledger.delete_vault(who, bytes.fromhex(vault)):
        raise gone("vault")


# -- capabilities --------------------------------------------------------------------------------------------


@routes.post("/capabilities", status_code=201, response_model=m.IdOut)
async def add_capability(who: Who, service: The, body: m.CapabilityIn) -> dict[str, Any]:
    """Keep a capability for the holder of a signing key."""
    made = os.urandom(16)
    await service.ledger.add_capability(who, made, key(body.kid, "kid"), blob(body.record, "record"))
    return {"id": made.hex()}


@routes.get("/capabilities", response_model=m.CapabilitiesOut)
async def capabilities(who: Who, service: The) -> dict[str, Any]:
    """What one has made and what one was given."""
    return {"capabilities": [_capability(found) for found in await service.ledger.capabilities(who)]}


@routes.get("/capabilities/{capability}", response_model=m.CapabilityOut)
async def capability_record(who: Who, service: The, capability: HexId) -> dict[str, Any]:
    """One of them."""
    found = await service.ledger.capability(who, bytes.fromhex(capability))
    if found is None:
        raise gone("capability")
    return _capability(found)


@routes.delete("/capabilities/{capability}", status_code=204)
async def revoke_capability(who: Who, service: The, capability: HexId) -> None:
    """Revoke what one has made, for good; it stays visible as revoked."""
    if not await service.ledger.revoke_capability(who, bytes.fromhex(capability)):
        raise gone("capability")


def _capability(found: Capability) -> dict[str, Any]:
    return {
        "id": found.id.hex(),
        "owner": found.owner,
        "kid": b64(found.kid),
        "record": b64(found.record),
        "created": found.created,
        "revoked": found.revoked,
    }


# -- provider logs -------------------------------------------------------------------------------------------


@routes.post("/logs", status_code=204)
async def log(who: Who, service: The, body: m.LogIn) -> None:
    """Add lines to one's own log; the newest are kept."""
    await service.ledger.log(who, [LogEvent(n=0, **event.model_dump()) for event in body.events])


@routes.get("/logs", response_model=m.LogOut)
async def logged(who: Who, service: The, after: After = 0) -> dict[str, Any]:
    """One's own log behind a line, oldest first: one page."""
    found, more = await service.ledger.logged(who, after)
    events = [
        {
            "n": event.n,
            "at": event.at,
            "provider": event.provider,
            "operation": event.operation,
            "outcome": event.outcome,
            "bytes": event.bytes,
        }
        for event in found
    ]
    return {"events": events, "more": more}
