"""Repairing a share: what `verify` found broken, stored again from another copy of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ByteStore
from meshkitfs.shares._asking import in_time
from meshkitfs.shares._share import Share
from meshkitfs.shares._verify import FETCH_DEADLINE_S, Broken, broken_job, verify
from meshkitfs.shares._walk import FAULTS

__all__ = ["Repaired", "repair"]

Progress = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Repaired:
    """What `repair` did: blocks that are whole again, and what is still broken."""

    repaired: int
    left: list[Broken]


async def repair(share: Share, sources: Sequence[ByteStore], progress: Progress) -> Repaired:
    """Store again what is broken, from this device's spool or one of ``sources``, and verify again.

    What is broken is what the last `verify` remembered, or else what a new one finds. A block that is
    repaired may name others that are broken too, so this goes on until nothing more can be had.
    """
    services = share.services
    store = services.reader.store
    job = broken_job(share)
    wanted: Collection[bytes] = await trio.to_thread.run_sync(services.state.job_items, job)
    if not wanted:
        found = await verify(share, live=False, resume=False, progress=progress)
        wanted = {item.digest for item in found.broken}
        if not wanted:
            return Repaired(0, [])
    stored: set[bytes] = set()
    tried: set[bytes] = set()
    while fresh := set(wanted) - tried:
        tried |= fresh
        for count, digest in enumerate(sorted(fresh)):
            progress({"stage": "repairing", "done": count, "total": len(fresh), "unit": "blocks"})
            block = await _find(share, sources, digest)
            if block is not None:
                sealed = SealedBlock(block.digest, block.data)
                await in_time(FETCH_DEADLINE_S, partial(store.put, sealed))
                stored.add(digest)
        await in_time(FETCH_DEADLINE_S, store.sync)
        found = await verify(share, live=False, resume=True, progress=progress)
        wanted = {item.digest for item in found.broken}
    return Repaired(len(stored - set(wanted)), found.broken)


async def _find(share: Share, sources: Sequence[ByteStore], digest: bytes) -> VerifiedBlock | None:
    """Return a whole copy of a block, from wherever there is one. Raises what is no answer."""

    async def spooled(digest: bytes) -> VerifiedBlock:
        return await trio.to_thread.run_sync(share.services.spool.read, digest)

    for get in (spooled, *(source.get for source in sources)):
        try:
            block = await in_time(FETCH_DEADLINE_S, partial(get, digest))
        except MeshkitError as error:
            if error.code not in FAULTS:
                raise
        else:
            if block.digest == digest:
                return block
    return None
