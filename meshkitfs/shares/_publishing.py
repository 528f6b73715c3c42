"""Talking to the byte store and the metadata home when a version goes out, each call with its deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
# Batches on their way at the same time, and how often one block is offered before the cycle gives up.
UPLOADS = 4
UPLOAD_TRIES = 6
_BATCH = 64


def signed_head(
    services: Services, row: ShareRow, epoch: int, version: int, previous: bytes, root: bytes,
    writers: Sequence[bytes],
) -> bytes:  # fmt: skip
    """Return a head of ``row``'s share, signed by this identity with the key of it that is among ``writers``.

    ``previous`` is the head's record hash.
    """
    moment = int(services.wall())
    head = Head(row.share, row.oid, epoch, version, previous, root, moment)
    return head.sign(services.writing_key(writers))


async def upload(
    services: Services,
    digests: Sequence[bytes],
    stored: Callable[[Sequence[bytes]], None] = lambda _: None,
    got: Callable[[Sequence[bytes]], None] = lambda _: None,
) -> None:
    """Bring spooled blocks to the byte store, durably, several batches at a time.

    ``got`` is told of what the store has taken as it goes, ``stored`` of what is durable there, also when
    others could not be stored. Raises what the store raises, after every block had its tries.
    """
    arrived: list[bytes] = []

    def taken(batch: Sequence[bytes]) -> None:
        arrived.extend(batch)
        got(batch)

    failures: list[MeshkitError] = []
    batches = iter([digests[at : at + _BATCH] for at in range(0, len(digests), _BATCH)])
    async with trio.open_nursery() as nursery:
        for _ in range(min(UPLOADS, -(-len(digests) // _BATCH))):
            nursery.start_soon(_carry, services, batches, taken, failures)
    try:
        with trio.fail_after(UPLOAD_DEADLINE_S):
            await services.reader.store.sync()
    except trio.TooSlowError:
        failures.insert(0, _too_slow())
    except MeshkitError as error:
        failures.insert(0, error)
    else:
        stored(arrived)
    if failures:
        raise failures[0]


async def _carry(
    services: Services,
    batches: Iterator[Sequence[bytes]],
    taken: Callable[[Sequence[bytes]], None],
    failures: list[MeshkitError],
) -> None:
    """Store batch after batch until there are none left, or the store is found to be of no use now."""
    for batch in batches:
        try:
            await _put(services, batch)
            taken(batch)
        except MeshkitError as error:
            if error.code != "provider_request_failed" or failures:
                failures.append(error)
                return
            await _one_by_one(services, batch, taken, failures)
            if failures:
                return


async def _one_by_one(
    services: Services,
    batch: Sequence[bytes],
    taken: Callable[[Sequence[bytes]], None],
    failures: list[MeshkitError],
) -> None:
    """Offer each block of a failed batch by itself: a store that loses some requests takes the others."""
    for digest in batch:
        for attempt in range(1, UPLOAD_TRIES + 1):
            try:
                await _put(services, [digest])
                taken([digest])
                break
            except MeshkitError as error:
                if attempt == UPLOAD_TRIES or error.code != "provider_request_failed":
                    failures.append(error)
                    return


async def _put(services: Services, batch: Sequence[bytes]) -> None:
    try:
        with trio.fail_after(UPLOAD_DEADLINE_S):
            await services.reader.store.put_files([(digest, services.spool.path(digest)) for digest in batch])
    except trio.TooSlowError:
        raise _too_slow() from None


def _too_slow() -> MeshkitError:
    return MeshkitError("provider_request_failed", "no answer in time")


async def publish(services: Services, publication: Publication) -> None:
    """Publish, atomically. Raises ``head_conflict``, ``metadata_unavailable`` and the home's own."""
    try:
        with trio.fail_after(PUBLISH_DEADLINE_S):
            await services.metadata.publish(publication)
    except trio.TooSlowError:
        raise MeshkitError("metadata_unavailable", "no answer in time") from None
