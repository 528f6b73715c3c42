"""Reading directories: from an entry to the manifest and pages it names, whatever version they are of."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import Entry
from meshkitfs.core.manifest import DirManifest, parse_manifest, parse_page
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._reader import BlockReader

__all__ = ["in_parallel", "read_directory", "read_pages"]


async def read_directory(
    reader: BlockReader, grant: Grant, entry: Entry
) -> tuple[DirManifest, list[tuple[Entry, ...]]]:
    """Return the manifest and pages that a directory's ``entry`` names."""
    plain = await reader.open(grant, entry.ref, Where.manifest(entry.oid, entry.epoch, entry.ver))
    manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
    if not isinstance(manifest, DirManifest):
        raise MeshkitError("invalid_envelope", "a directory's entry names a file")
    return manifest, await read_pages(reader, grant, manifest)


async def read_pages(reader: BlockReader, grant: Grant, manifest: DirManifest) -> list[tuple[Entry, ...]]:
    """Return the entries of a directory's pages, in order."""
    pages: list[tuple[Entry, ...]] = [()] * len(manifest.pages)

    async def read(i: int) -> None:
        page = manifest.pages[i]
        upper = manifest.pages[i + 1].first if i + 1 < len(manifest.pages) else None
        plain = await reader.open(grant, page.ref, Where.page(manifest.oid, page.page_id))
        pages[i] = parse_page(plain, page, upper)

    await in_parallel(read, len(pages))
    return pages


async def in_parallel(work: Callable[[int], object], count: int) -> None:
    """Run ``await work(i)`` for each i, a few at a time; the first error ends the others."""
    if not count:
        return
    errors: list[MeshkitError] = []
    limiter = trio.CapacityLimiter(8)

    async def one(i: int, cancel: trio.CancelScope) -> None:
        async with limiter:
            try:
                await work(i)  # type: ignore[misc]
            except MeshkitError as error:
                errors.append(error)
                cancel.cancel()

    async with trio.open_nursery() as nursery:
        for i in range(count):
            nursery.start_soon(one, i, nursery.cancel_scope)
    if errors:
        raise errors[0]
