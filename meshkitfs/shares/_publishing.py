"""Talking to the byte store and the metadata home when a version goes out, each call with its deadline."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from meshkitfs.core.records import Head
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import Publication
from meshkitfs.shares._services import Services
from meshkitfs.state import ShareRow

__all__ = ["PUBLISH_DEADLINE_S", "UPLOAD_DEADLINE_S", "publish", "signed_head", "upload"]

# One batch of blocks, and the sync after all of them.
UPLOAD_DEADLINE_S = 300
PUBLISH_DEADLINE_S = 30
_UPLOAD_BATCH = 256


def signed_head(
    services: Services, row: ShareRow, epoch: int, version: int, previous: bytes, root: bytes
) -> bytes:
    """Return a head of ``row``'s share, signed by this identity; ``previous`` is the head's record hash."""
    moment = int(services.wall())
    head = Head(row.share, row.oid, epoch, version, previous, root, moment)
    return head.sign(services.signing())


async def upload(services: Services, digests: Sequence[bytes]) -> None:
    """Bring spooled blocks to the byte store, durably. Raises what the store raises."""
    store = services.reader.store
    try:
        for at in range(0, len(digests), _UPLOAD_BATCH):
            batch = digests[at : at + _UPLOAD_BATCH]
            with trio.fail_after(UPLOAD_DEADLINE_S):
                await store.put_files([(digest, services.spool.path(digest)) for digest in batch])
        with trio.fail_after(UPLOAD_DEADLINE_S):
            await store.sync()
    except trio.TooSlowError:
        raise MeshkitError("provider_request_failed", "no answer in time") from None


async def publish(services: Services, publication: Publication) -> None:
    """Publish, atomically. Raises ``head_conflict``, ``metadata_unavailable`` and the home's own."""
    try:
        with trio.fail_after(PUBLISH_DEADLINE_S):
            await services.metadata.publish(publication)
    except trio.TooSlowError:
        raise MeshkitError("metadata_unavailable", "no answer in time") from None
