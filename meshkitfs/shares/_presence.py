"""Whether all of a file is at the store: asked before anything is built on what was stored long ago."""

from __future__ import annotations

from functools import partial
from typing import Final

from meshkitfs.core.blocks import HOLE, REF_SIZE, REFS_PER_INDEX, Where
from meshkitfs.core.cid import cid_text
from meshkitfs.core.manifest import FileManifest, block_count, parse_index
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._asking import in_time
from meshkitfs.shares._reader import BlockReader

__all__ = ["require_blocks"]

ASK_DEADLINE_S: Final = 60
# Blocks asked for at once.
_BATCH: Final = 1024


async def require_blocks(reader: BlockReader, grant: Grant, manifest: FileManifest) -> None:
    """Raise ``block_unavailable`` unless the store, or this device, has every block of a file.

    Only that they are there; what is in them is for `verify`. Raises also what an index block raises that
    cannot be opened.
    """
    if not manifest.index:
        await _require(reader, manifest.refs)
        return
    owner, blocks = manifest.lineage or manifest.oid, block_count(manifest.size, manifest.block_size)
    for i in range(len(manifest.index) // REF_SIZE):
        ref = manifest.index[i * REF_SIZE : (i + 1) * REF_SIZE]
        if ref != HOLE:
            plain = await reader.open(grant, ref, Where.index(owner, i))
            await _require(reader, parse_index(plain, min(REFS_PER_INDEX, blocks - i * REFS_PER_INDEX)))


async def _require(reader: BlockReader, refs: bytes) -> None:
    parts = (refs[at : at + REF_SIZE] for at in range(0, len(refs), REF_SIZE))
    wanted = [ref[:32] for ref in parts if ref != HOLE and ref[:32] not in reader.spooled]
    for at in range(0, len(wanted), _BATCH):
        batch = wanted[at : at + _BATCH]
        there = await in_time(ASK_DEADLINE_S, partial(reader.store.has_many, batch))
        for digest in batch:
            if digest not in there:
                raise MeshkitError("block_unavailable", cid_text(digest))
