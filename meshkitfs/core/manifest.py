"""Manifests: what an object consists of, and the references (digest || key) to its pieces.

A file manifest holds its content inline, or packed 64-byte references, or references to index blocks. A
directory manifest holds its entries, or references to pages of them. Names, types, times and sizes exist
only in here, sealed. Parsing accepts one byte form for each value and checks every rule of the format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import cbor2

from meshkitfs.core import cbor
from meshkitfs.core.blocks import (
    BLOCK_SIZES,
    HOLE,
    INLINE_MAX,
    OID_SIZE,
    REF_SIZE,
    REFS_PER_INDEX,
    SealedBlock,
    Where,
    seal_structured,
    unframe,
)
from meshkitfs.core.cobblestone import Bytes
from meshkitfs.core.entries import (
    DIR,
    FILE,
    HARDLINK,
    SYMLINK,
    Entry,
    decode_entries,
    encode_entries,
    invalid,
    valid_extra,
    valid_name,
)
from meshkitfs.core.pages import (
    PageRef,
    encode_page,
    load_sealed,
    parse_index,
    parse_page,
    seal_index,
    seal_page,
)

__all__ = [
    "DIR",
    "DIR_INLINE_BYTES",
    "DIR_INLINE_ENTRIES",
    "FILE",
    "HARDLINK",
    "INDEX_MAX",
    "SYMLINK",
    "DirManifest",
    "Entry",
    "FileManifest",
    "Manifest",
    "PageRef",
    "RootAttrs",
    "block_count",
    "encode_manifest",
    "encode_page",
    "parse_index",
    "parse_manifest",
    "parse_page",
    "seal_index",
    "seal_manifest",
    "seal_page",
]

_TYPE: Final = "mk/man@1"
INDEX_MAX: Final = 4096  # index blocks per file
DIR_INLINE_ENTRIES: Final = 64
DIR_INLINE_BYTES: Final = 16384
_U53: Final = cbor.MAX_INT
_NS: Final = 1_000_000_000


class RootAttrs(NamedTuple):
    """The attributes of a share's root directory itself, which has no entry anywhere (times in ns)."""

    mode: int
    mtime_ns: int
    ctime_ns: int
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class FileManifest:
    """A file: ``size`` bytes in blocks of ``block_size``; one of inline, refs, index holds the content.

    ``inline`` is the content itself (None otherwise), ``refs`` packed references of the blocks (at most
    4096 of them), ``index`` packed references of index blocks (above that). A `HOLE` reads as zeros.

    ``lineage`` is the oid that the blocks are bound to where that is not ``oid``: the file was made as a copy
    of another one and shares its blocks (b"" otherwise).
    """

    oid: bytes
    epoch: int
    ver: int
    size: int
    block_size: int
    inline: bytes | None = field(repr=False)
    refs: bytes = field(default=b"", repr=False)
    index: bytes = field(default=b"", repr=False)
    lineage: bytes = b""


@dataclass(frozen=True, slots=True)
class DirManifest:
    """A directory of ``count`` entries: ``entries`` (sorted by name), or None and ``pages``.

    ``links`` is the reference of the manifest of the share's hard-link table, a directory object named by
    the three fields after it (root manifest only). ``root`` are the root's own attributes (root only).
    """

    oid: bytes
    epoch: int
    ver: int
    count: int
    entries: tuple[Entry, ...] | None
    pages: tuple[PageRef, ...] = ()
    links: bytes | None = field(default=None, repr=False)
    links_oid: bytes = b""
    links_ver: int = 0
    links_epoch: int = 0
    root: RootAttrs | None = None


Manifest = FileManifest | DirManifest


def block_count(size: int, block_size: int) -> int:
    """Return how many blocks ``size`` bytes have in blocks of ``block_size``."""
    return -(-size // block_size)


def _uint(value: object, at_least: int = 0) -> bool:
    return type(value) is int and at_least <= value <= _U53


def _ref(value: object) -> bool:
    return type(value) is bytes and len(value) == REF_SIZE and value != HOLE


def _encode_file(manifest: FileManifest) -> dict[str, Any]:
    value: dict[str, Any] = {"size": manifest.size, "bs": manifest.block_size}
    if manifest.inline is not None:
        value["inline"] = manifest.inline
    elif manifest.index:
        value["index"] = manifest.index
    else:
        value["refs"] = manifest.refs
    if manifest.lineage:
        value["lineage"] = manifest.lineage
    return value


def _encode_times(nanoseconds: int) -> list[int]:
    return list(divmod(nanoseconds, _NS))


def _encode_dir(manifest: DirManifest) -> dict[str, Any]:
    value: dict[str, Any] = {"count": manifest.count}
    if manifest.entries is not None:
        value["entries"] = encode_entries(manifest.entries)
    else:
        value["pages"] = [[page.page_id, page.first, page.count, page.ref] for page in manifest.pages]
    if manifest.links is not None:
        value["links"] = [manifest.links_oid, manifest.links_epoch, manifest.links_ver, manifest.links]
    if manifest.root is not None:
        mode, mtime_ns, ctime_ns, extra = manifest.root
        value["root"] = [mode, *_encode_times(mtime_ns), *_encode_times(ctime_ns), extra or {}]
    return value


def _canonical_order(key: str) -> tuple[int, str]:
    return len(key), key


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical CBOR of a manifest (unsealed)."""
    if isinstance(manifest, FileManifest):
        value, kind = _encode_file(manifest), FILE
    else:
        value, kind = _encode_dir(manifest), DIR
    value |= {"t": _TYPE, "kind": kind, "oid": manifest.oid, "epoch": manifest.epoch, "ver": manifest.ver}
    # Sorting the one map here lets the encoder run without its canonical mode, which is three times slower.
    return cbor2.dumps({key: value[key] for key in sorted(value, key=_canonical_order)})


def seal_manifest(manifest: Manifest, key: bytes | None = None) -> tuple[bytes, SealedBlock]:
    """Seal a manifest; returns its 64-byte reference and the block for the store.

    ``key`` None draws a fresh one; the root manifest of a share is sealed under `ver_key`. Raises
    MeshkitError ``invalid_envelope`` if it is too large for one sealed object. The manifest is not checked
    here; `parse_manifest` refuses what breaks a rule.
    """
    where = Where.manifest(manifest.oid, manifest.epoch, manifest.ver)
    return seal_structured(where, encode_manifest(manifest), key)


def _parse_file(value: dict[str, Any], oid: bytes, epoch: int, ver: int) -> FileManifest:
    size, block_size = value.pop("size", None), value.pop("bs", None)
    if not _uint(size) or type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise invalid("file size or block size")
    lineage = value.pop("lineage", b"")
    if type(lineage) is not bytes or len(lineage) not in (0, OID_SIZE) or lineage == oid:
        raise invalid("lineage")
    if len(value) != 1:
        raise invalid("a file has exactly one of inline, refs, index")
    form, content = value.popitem()
    if type(content) is not bytes:
        raise invalid("content that is not bytes")
    blocks = block_count(size, block_size)
    if form == "inline":
        if len(content) != size or size > INLINE_MAX:
            raise invalid("inline content of another size")
        return FileManifest(oid, epoch, ver, size, block_size, content)
    if form == "refs":
        if not 0 < blocks <= REFS_PER_INDEX or len(content) != REF_SIZE * blocks:
            raise invalid("number of block references")
        return FileManifest(oid, epoch, ver, size, block_size, None, refs=content, lineage=lineage)
    if form == "index":
        count = -(-blocks // REFS_PER_INDEX)
        if blocks <= REFS_PER_INDEX or count > INDEX_MAX or len(content) != REF_SIZE * count:
            raise invalid("number of index references")
        return FileManifest(oid, epoch, ver, size, block_size, None, index=content, lineage=lineage)
    raise invalid("unknown field")


def _parse_pages(raw: object, count: int) -> tuple[PageRef, ...]:
    if type(raw) is not list or not raw:
        raise invalid("pages")
    pages = []
    last = b""
    for item in raw:
        if type(item) is not list or len(item) != 4:
            raise invalid("page reference")
        page = PageRef(*item)
        if not (_uint(page.page_id) and valid_name(page.first) and _uint(page.count, 1) and _ref(page.ref)):
            raise invalid("page reference")
        if page.first <= last:
            raise invalid("pages out of order")
        last = page.first
        pages.append(page)
    if sum(page.count for page in pages) != count or len({page.page_id for page in pages}) != len(pages):
        raise invalid("number of entries, or a page named twice")
    return tuple(pages)


def _parse_root(raw: object) -> RootAttrs:
    if type(raw) is not list or len(raw) != 6:
        raise invalid("root attributes")
    mode, mtime_s, mtime_ns, ctime_s, ctime_ns, extra = raw
    for seconds, nanoseconds in ((mtime_s, mtime_ns), (ctime_s, ctime_ns)):
        if type(seconds) is not int or abs(seconds) > _U53:
            raise invalid("time")
        if type(nanoseconds) is not int or not 0 <= nanoseconds < _NS:
            raise invalid("time")
    if type(mode) is not int or not 0 <= mode <= 0o7777 or not valid_extra(extra) or set(extra) - {"x"}:
        raise invalid("root attributes")
    return RootAttrs(mode, mtime_s * _NS + mtime_ns, ctime_s * _NS + ctime_ns, extra or None)


def _parse_dir(value: dict[str, Any], oid: bytes, epoch: int, ver: int) -> DirManifest:
    count = value.pop("count", None)
    if not _uint(count):
        raise invalid("number of entries")
    links: bytes | None = None
    links_oid, links_epoch, links_ver = b"", 0, 0
    if "links" in value:
        raw = value.pop("links")
        if type(raw) is not list or len(raw) != 4:
            raise invalid("link table")
        links_oid, links_epoch, links_ver, links = raw
        if type(links_oid) is not bytes or len(links_oid) != OID_SIZE:
            raise invalid("link table")
        if not (_uint(links_epoch) and _uint(links_ver) and _ref(links)):
            raise invalid("link table")
    root = _parse_root(value.pop("root")) if "root" in value else None
    if len(value) != 1:
        raise invalid("a directory has exactly one of entries, pages")
    form, content = value.popitem()
    entries: tuple[Entry, ...] | None = None
    pages: tuple[PageRef, ...] = ()
    if form == "entries":
        entries = decode_entries(content)
        if len(entries) != count or count > DIR_INLINE_ENTRIES:
            raise invalid("number of entries")
    elif form == "pages":
        pages = _parse_pages(content, count)
    else:
        raise invalid("unknown field")
    return DirManifest(oid, epoch, ver, count, entries, pages, links, links_oid, links_ver, links_epoch, root)


def _parse(raw: bytes, oid: bytes, epoch: int, ver: int) -> Manifest:
    value = load_sealed(raw)
    if type(value) is not dict or value.pop("t", None) != _TYPE:
        raise invalid("not a manifest of this version")
    if (value.pop("oid", None), value.pop("epoch", None), value.pop("ver", None)) != (oid, epoch, ver):
        raise invalid("manifest of another object or version")
    kind = value.pop("kind", None)
    if kind == FILE:
        return _parse_file(value, oid, epoch, ver)
    if kind == DIR:
        return _parse_dir(value, oid, epoch, ver)
    raise invalid("kind")


def parse_manifest(plaintext: Bytes, oid: bytes, epoch: int, ver: int) -> Manifest:
    """Return the manifest in ``plaintext`` (from `open_block`): that of this oid, epoch and ver.

    Raises MeshkitError ``invalid_envelope`` if it names another object or version or breaks any rule.
    """
    raw = unframe(plaintext)
    manifest = _parse(raw, oid, epoch, ver)
    # One byte form for each manifest: whatever was lenient above (1.0 == 1 == True) ends here.
    if encode_manifest(manifest) != raw:
        raise invalid("not in canonical form")
    return manifest
