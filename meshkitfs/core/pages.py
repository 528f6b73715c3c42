"""The pieces of large objects: pages of a directory, and index blocks of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cbor2

from meshkitfs.core import cbor
from meshkitfs.core.blocks import (
    BLOCK_SIZES,
    HOLE,
    REF_SIZE,
    REFS_PER_INDEX,
    SealedBlock,
    Where,
    padded_size,
    seal_block,
    seal_structured,
    unframe,
)
from meshkitfs.core.cobblestone import Bytes
from meshkitfs.core.entries import Entry, decode_entries, encode_entries, invalid
from meshkitfs.errors import MeshkitError

__all__ = ["PageRef", "encode_page", "load_sealed", "parse_index", "parse_page", "seal_index", "seal_page"]


@dataclass(frozen=True, slots=True)
class PageRef:
    """One page of a directory: its id (unique in the directory), first name, number of entries, reference."""

    page_id: int
    first: bytes = field(repr=False)
    count: int
    ref: bytes = field(repr=False)


def load_sealed(raw: bytes) -> Any:
    """Decode sealed CBOR; the caller proves its form by re-encoding. Raises ``invalid_envelope``."""
    try:
        return cbor.load_plain(raw)
    except MeshkitError as error:
        raise invalid(error.detail) from None


def encode_page(entries: Sequence[Entry]) -> bytes:
    """Return the canonical CBOR of a page (unsealed); its length is what counts against a page's size."""
    return cbor2.dumps(encode_entries(entries))


def seal_page(oid: bytes, page_id: int, entries: Sequence[Entry]) -> tuple[bytes, SealedBlock]:
    """Seal one page of directory ``oid``: ``entries`` sorted by name, at least one."""
    return seal_structured(Where.page(oid, page_id), encode_page(entries))


def parse_page(
    plaintext: Bytes, page: PageRef | None = None, upper: bytes | None = None
) -> tuple[Entry, ...]:
    """Return the entries of a page.

    With ``page``, count and first name must be what the manifest says; with ``upper`` (the next page's first
    name) all names must be below it. Raises MeshkitError ``invalid_envelope``.
    """
    raw = unframe(plaintext)
    items = load_sealed(raw)
    entries = decode_entries(items)
    if not entries:
        raise invalid("an empty page")
    # The entries were built from these very lists, type by type, so encoding the lists again is proof enough.
    if cbor2.dumps(items) != raw:
        raise invalid("not in canonical form")
    if page is not None and (len(entries) != page.count or entries[0].name != page.first):
        raise invalid("page that is not what the manifest says")
    if upper is not None and entries[-1].name >= upper:
        raise invalid("pages overlap")
    return entries


def seal_index(oid: bytes, i: int, refs: Bytes) -> tuple[bytes, SealedBlock]:
    """Seal index block ``i`` of file ``oid``: at most 4096 packed references.

    Holes at the end are dropped. If nothing but holes is left the answer's reference is `HOLE` and its
    block is empty: there is nothing to store.
    """
    raw = bytes(refs)
    if len(raw) % REF_SIZE or len(raw) > REF_SIZE * REFS_PER_INDEX:
        raise ValueError("an index block holds 1 to 4096 references")
    used = -(-len(raw.rstrip(b"\0")) // REF_SIZE) * REF_SIZE
    if not used:
        return HOLE, SealedBlock(b"", b"")
    return seal_block(Where.index(oid, i), memoryview(raw)[:used])


def parse_index(plaintext: Bytes, n: int) -> bytes:
    """Return the ``n`` packed references of an index block; what was dropped at the end comes back as holes.

    Raises MeshkitError ``invalid_envelope`` if it holds more than ``n`` or is not padded as it must be.
    """
    raw = bytes(plaintext)
    used = -(-len(raw.rstrip(b"\0")) // REF_SIZE)
    if not 0 < used <= n <= REFS_PER_INDEX or len(raw) != padded_size(used * REF_SIZE, BLOCK_SIZES[-1]):
        raise invalid("number of references in an index block")
    return raw[: n * REF_SIZE].ljust(n * REF_SIZE, b"\0")
