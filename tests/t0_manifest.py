"""Manifests, directory entries, pages and index blocks, each judged by both readers."""

import os

import cbor2
import dag_cbor
import pytest
import second_reader
from core_support import attempt, refuses, reopen
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs.core import blocks, entries, manifest
from meshkitfs.core.blocks import BLOCK_SIZES, HOLE, INLINE_MAX, REFS_PER_INDEX, Where
from meshkitfs.core.entries import DIR, FILE, HARDLINK, SYMLINK, Entry
from meshkitfs.core.manifest import DirManifest, FileManifest, PageRef, RootAttrs

OID = bytes(range(16))
REF = bytes(range(64))
LIMIT = 2**53 - 1
SECOND = 10**9

# -- strategies -------------------------------------------------------------------------------------

oids = st.binary(min_size=16, max_size=16)
refs = st.binary(min_size=64, max_size=64).filter(lambda ref: ref != HOLE)
numbers = st.integers(0, LIMIT) | st.sampled_from([0, 23, 24, 255, 256, 65535, 65536, 2**32, LIMIT])
times = st.integers(-LIMIT * SECOND, LIMIT * SECOND) | st.sampled_from(
    [0, -1, SECOND - 1, 1_800_000_000 * SECOND + 1]
)
names = st.binary(min_size=1, max_size=40).filter(entries.valid_name) | st.sampled_from(
    [b"a", b"..a", b"...", b" ", b"\xff\xfe", b"\xf0\x9f\x94\x92", b"x" * 255]
)
modes = st.integers(0, 0o7777)
xattr_names = st.binary(min_size=1, max_size=10).filter(lambda name: b"\0" not in name)
xattrs = st.dictionaries(xattr_names, st.binary(max_size=10), min_size=1, max_size=3).map(
    lambda pairs: [[name, pairs[name]] for name in sorted(pairs)]
)


@st.composite
def extras(draw, kind):
    extra = {}
    if draw(st.booleans()):
        extra["x"] = draw(xattrs)
    if draw(st.booleans()):
        extra["used"] = draw(numbers)
    if draw(st.booleans()):
        extra["nlink"] = draw(st.integers(1, LIMIT))
    if kind == SYMLINK:
        extra["target"] = draw(st.binary(min_size=1, max_size=30).filter(lambda target: b"\0" not in target))
    return extra or None


@st.composite
def some_entry(draw):
    kind = draw(st.sampled_from([DIR, FILE, SYMLINK, HARDLINK]))
    return Entry(
        draw(names), kind, draw(oids), draw(modes), draw(times), draw(times), draw(numbers), draw(numbers),
        draw(numbers), draw(refs) if kind in (DIR, FILE) else b"", draw(extras(kind)),
    )  # fmt: skip


entry_lists = st.lists(some_entry(), max_size=6, unique_by=lambda entry: entry.name).map(
    lambda items: tuple(sorted(items, key=lambda entry: entry.name))
)


@st.composite
def file_manifests(draw):
    oid, epoch, ver, block_size = draw(oids), draw(numbers), draw(numbers), draw(st.sampled_from(BLOCK_SIZES))
    form = draw(st.sampled_from(["inline", "refs", "index"]))
    lineage = draw(st.just(b"") | oids.filter(lambda other: other != oid))
    if form == "inline":
        content = draw(st.binary(max_size=100))
        return FileManifest(oid, epoch, ver, len(content), block_size, content)
    if form == "refs":
        count = draw(st.integers(1, 5))
        packed = b"".join(draw(st.lists(refs | st.just(HOLE), min_size=count, max_size=count)))
        size = draw(st.integers((count - 1) * block_size + 1, count * block_size))
        return FileManifest(oid, epoch, ver, size, block_size, None, refs=packed, lineage=lineage)
    count = draw(st.integers(2, 4))
    packed = b"".join(draw(st.lists(refs | st.just(HOLE), min_size=count, max_size=count)))
    span = block_size * REFS_PER_INDEX
    size = draw(st.integers((count - 1) * span + 1, count * span))
    return FileManifest(oid, epoch, ver, size, block_size, None, index=packed, lineage=lineage)


@st.composite
def dir_manifests(draw):
    oid, epoch, ver = draw(oids), draw(numbers), draw(numbers)
    more = {}
    if draw(st.booleans()):
        more |= {
            "links": draw(refs),
            "links_oid": draw(oids),
            "links_ver": draw(numbers),
            "links_epoch": draw(numbers),
        }
    if draw(st.booleans()):
        root_extra = {"x": draw(xattrs)} if draw(st.booleans()) else None
        more["root"] = RootAttrs(draw(modes), draw(times), draw(times), root_extra)
    if draw(st.booleans()):
        items = draw(entry_lists)
        return DirManifest(oid, epoch, ver, len(items), items, **more)
    firsts = sorted(draw(st.sets(names, min_size=1, max_size=4)))
    pages = tuple(
        PageRef(i * 7, first, draw(st.integers(1, 300)), draw(refs)) for i, first in enumerate(firsts)
    )
    return DirManifest(oid, epoch, ver, sum(page.count for page in pages), None, pages, **more)


manifests = file_manifests() | dir_manifests()


def plain(value):
    return blocks.frame(manifest.encode_manifest(value))


# -- round trips ------------------------------------------------------------------------------------


@given(manifests)
@settings(max_examples=150)
def test_manifests_round_trip(value):
    ref, sealed = manifest.seal_manifest(value)
    where = Where.manifest(value.oid, value.epoch, value.ver)
    plaintext = reopen(ref, sealed, where)
    assert manifest.parse_manifest(plaintext, value.oid, value.epoch, value.ver) == value
    assert bytes(plaintext) == plain(value)
    raw = manifest.encode_manifest(value)
    assert dag_cbor.encode(dag_cbor.decode(raw)) == raw
    second_reader.parse_manifest(bytes(plaintext), value.oid, value.epoch, value.ver)


@given(entry_lists.filter(bool), numbers)
@settings(max_examples=150)
def test_pages_round_trip(items, page_id):
    ref, sealed = manifest.seal_page(OID, page_id, items)
    plaintext = reopen(ref, sealed, Where.page(OID, page_id))
    assert manifest.parse_page(plaintext) == items
    assert (
        manifest.parse_page(plaintext, PageRef(page_id, items[0].name, len(items), ref), b"\xff" * 256)
        == items
    )
    raw = manifest.encode_page(items)
    assert dag_cbor.encode(dag_cbor.decode(raw)) == raw
    assert [entry["name"] for entry in second_reader.parse_page(bytes(plaintext))] == [
        entry.name for entry in items
    ]


@given(st.lists(refs | st.just(HOLE), min_size=1, max_size=20), st.integers(0, 4095))
def test_index_blocks_round_trip(listed, i):
    packed = b"".join(listed)
    ref, sealed = manifest.seal_index(OID, i, packed)
    if not packed.strip(b"\0"):
        assert (ref, sealed.digest, sealed.data) == (HOLE, b"", b"")
        return
    plaintext = reopen(ref, sealed, Where.index(OID, i))
    # A file that has grown since reads the same index block, and what it does not name is a hole.
    for n in (len(listed), len(listed) + 3):
        assert manifest.parse_index(plaintext, n) == packed + HOLE * (n - len(listed))
        assert second_reader.parse_index(bytes(plaintext), n) == packed + HOLE * (n - len(listed))
    assert manifest.seal_index(OID, i, packed + HOLE)[1].digest
    assert len(manifest.seal_index(OID, i, packed + HOLE * 9)[1].data) == len(sealed.data)


def test_a_full_index_block():
    packed = os.urandom(64 * REFS_PER_INDEX)
    ref, sealed = manifest.seal_index(OID, 0, packed)
    assert manifest.parse_index(reopen(ref, sealed, Where.index(OID, 0)), REFS_PER_INDEX) == packed
    for bad in (packed + REF, packed[:-1]):
        with pytest.raises(ValueError):
            manifest.seal_index(OID, 0, bad)


def test_index_blocks_that_are_refused():
    good = (REF * 2).ljust(512, b"\0")
    bad = {
        "more than the file has": (good, 1),
        "no reference": (bytes(512), 8),
        "too short": (good[:448], 2),
        "too long": (good + bytes(64), 2),
        "a whole reference of padding too far": (good + bytes(512), 2),
        "above the limit": (REF * 4097, 4097),
        "no block at all": (b"", 1),
    }
    for plaintext, n in bad.values():
        with refuses("invalid_envelope"):
            manifest.parse_index(plaintext, n)
        with pytest.raises(second_reader.FormatError):
            second_reader.parse_index(plaintext, n)


def test_a_given_key_is_used_and_a_fresh_one_drawn():
    value = FileManifest(OID, 1, 1, 0, 65536, b"")
    key = bytes(range(32))
    assert manifest.seal_manifest(value, key)[0][32:] == key
    first, second = manifest.seal_manifest(value)[0], manifest.seal_manifest(value)[0]
    assert len({key, first[32:], second[32:]}) == 3


# -- what both readers must refuse ------------------------------------------------------------------


def entry(**changes):
    values = {
        "name": b"n", "kind": FILE, "oid": OID, "mode": 0o644, "mtime_s": 5, "mtime_ns": 6, "ctime_s": 7,
        "ctime_ns": 8, "size": 9, "epoch": 1, "ver": 2, "ref": REF, "extra": {},
    }  # fmt: skip
    return list((values | changes).values())


def symlink(**changes):
    return entry(**({"kind": SYMLINK, "ref": b"", "extra": {"target": b"t"}} | changes))


def file_value(**changes):
    value = {
        "t": "mk/man@1",
        "kind": 1,
        "oid": OID,
        "epoch": 1,
        "ver": 2,
        "size": 3,
        "bs": 65536,
        "inline": b"abc",
    }
    return {key: item for key, item in (value | changes).items() if item is not ...}


def refs_value(count, size, **changes):
    return file_value(inline=..., size=size, refs=REF * count, **changes)


def dir_value(**changes):
    value = {"t": "mk/man@1", "kind": 0, "oid": OID, "epoch": 1, "ver": 2, "count": 1, "entries": [entry()]}
    return {key: item for key, item in (value | changes).items() if item is not ...}


def pages_value(*pages, count=None, **changes):
    total = sum(page[2] for page in pages) if count is None else count
    return dir_value(entries=..., pages=[list(page) for page in pages], count=total, **changes)


def verdicts(value):
    """Return what the two readers say of a manifest: whether each accepts it."""
    plaintext = blocks.frame(value if isinstance(value, bytes) else dag_cbor.encode(value))
    ours = attempt("invalid_envelope", manifest.parse_manifest, plaintext, OID, 1, 2)
    try:
        theirs = second_reader.parse_manifest(plaintext, OID, 1, 2)
    except second_reader.FormatError:
        theirs = None
    return ours is not None, theirs is not None


GOOD = {
    "file": file_value(),
    "empty file": file_value(size=0, inline=b""),
    "largest inline": file_value(size=INLINE_MAX, inline=bytes(INLINE_MAX)),
    "one block": refs_value(1, 1),
    "two blocks": refs_value(2, 65537),
    "block of 1 MiB": refs_value(1, 65537, bs=1048576),
    "most references": refs_value(4096, 4096 * 65536),
    "index": file_value(inline=..., size=4096 * 65536 + 1, index=REF * 2),
    "lineage": refs_value(1, 1, lineage=bytes(16)),
    "lineage of an index": file_value(inline=..., size=4096 * 65536 + 1, index=REF * 2, lineage=bytes(16)),
    "hole": file_value(inline=..., size=1, refs=HOLE),
    "directory": dir_value(),
    "empty directory": dir_value(entries=[], count=0),
    "64 entries": dir_value(count=64, entries=[entry(name=b"%02d" % i) for i in range(64)]),
    "pages": pages_value((0, b"a", 100, REF), (1, b"b", 1, REF)),
    "links": dir_value(links=[OID, 1, 2, REF]),
    "root": dir_value(root=[0o755, -5, 0, 5, 999_999_999, {"x": [[b"user.a", b""]]}]),
    "symlink": dir_value(entries=[symlink()]),
    "longest target": dir_value(entries=[symlink(extra={"target": b"t" * 4095})]),
    "hard link": dir_value(entries=[entry(kind=HARDLINK, ref=b"")]),
    "all extras": dir_value(entries=[entry(extra={"x": [[b"a", b""], [b"b", b""]], "used": 0, "nlink": 1})]),
    "largest xattrs": dir_value(entries=[entry(extra={"x": [[b"a", bytes(131071)]]})]),
    "name of 255 bytes": dir_value(entries=[entry(name=b"n" * 255)]),
    "name that is not UTF-8": dir_value(entries=[entry(name=b"\xff\n")]),
    "old time": dir_value(entries=[entry(mtime_s=-(2**53) + 1, mtime_ns=0)]),
}

BAD = {
    # binding
    "other type": file_value(t="mk/man@2"),
    "no type": file_value(t=...),
    "other oid": file_value(oid=bytes(16)),
    "other epoch": file_value(epoch=2),
    "other ver": file_value(ver=1),
    "no ver": file_value(ver=...),
    "epoch true": file_value(epoch=True),
    "epoch 1.0": file_value(epoch=1.0),
    "ver 2.0": file_value(ver=2.0),
    "other kind": file_value(kind=2),
    "no kind": file_value(kind=...),
    "kind true": file_value(kind=True),
    "kind false": dir_value(kind=False),
    "unknown field": file_value(more=1),
    "unknown field in a directory": dir_value(more=1),
    "an array": [1],
    "text": "manifest",
    "null": None,
    # files
    "no size": file_value(size=...),
    "negative size": refs_value(1, -1),
    "size true": file_value(size=True, inline=b"a"),
    "no block size": file_value(bs=...),
    "block size 4096": refs_value(1, 1, bs=4096),
    "block size 0": refs_value(1, 1, bs=0),
    "block size 65536.0": refs_value(1, 1, bs=65536.0),
    "lineage that is the oid": refs_value(1, 1, lineage=OID),
    "lineage empty": refs_value(1, 1, lineage=b""),
    "lineage short": refs_value(1, 1, lineage=bytes(15)),
    "lineage long": refs_value(1, 1, lineage=bytes(17)),
    "lineage text": refs_value(1, 1, lineage="o" * 16),
    "lineage null": refs_value(1, 1, lineage=None),
    "lineage of inline content": file_value(lineage=bytes(16)),
    "lineage of a directory": dir_value(lineage=bytes(16)),
    "block size text": file_value(bs="65536"),
    "inline longer than size": file_value(inline=b"abcd"),
    "inline shorter than size": file_value(inline=b"ab"),
    "inline too large": file_value(size=INLINE_MAX + 1, inline=bytes(INLINE_MAX + 1)),
    "inline text": file_value(inline="abc"),
    "inline null": file_value(inline=None),
    "inline and refs": file_value(refs=REF),
    "no content": file_value(inline=...),
    "no refs": refs_value(0, 0),
    "fewer refs than blocks": refs_value(1, 65537),
    "more refs than blocks": refs_value(2, 65536),
    "half a ref": file_value(inline=..., size=1, refs=REF[:63]),
    "4097 refs": refs_value(4097, 4096 * 65536 + 1),
    "index for few blocks": file_value(inline=..., size=4096 * 65536, index=REF),
    "fewer index refs": file_value(inline=..., size=4096 * 65536 + 1, index=REF),
    "more index refs": file_value(inline=..., size=4096 * 65536 + 1, index=REF * 3),
    "4097 index blocks": file_value(inline=..., size=4096 * 4096 * 65536 + 1, index=REF * 4097),
    "entries in a file": file_value(inline=..., entries=[]),
    # directories
    "no count": dir_value(count=...),
    "other count": dir_value(count=2),
    "count true": dir_value(count=True),
    "negative count": dir_value(count=-1, entries=[]),
    "no entries": dir_value(entries=...),
    "entries null": dir_value(entries=None),
    "entries a map": dir_value(entries={}),
    "65 entries": dir_value(count=65, entries=[entry(name=b"%02d" % i) for i in range(65)]),
    "entries and pages": dir_value(pages=[[0, b"a", 1, REF]]),
    "entries out of order": dir_value(count=2, entries=[entry(name=b"b"), entry(name=b"a")]),
    "name twice": dir_value(count=2, entries=[entry(), entry()]),
    "content of a file": dir_value(entries=..., inline=b""),
    "no pages": pages_value(),
    "pages out of order": pages_value((0, b"b", 1, REF), (1, b"a", 1, REF)),
    "page with a first name twice": pages_value((0, b"a", 1, REF), (1, b"a", 1, REF)),
    "page id twice": pages_value((0, b"a", 1, REF), (0, b"b", 1, REF)),
    "empty page": pages_value((0, b"a", 0, REF)),
    "pages of another count": pages_value((0, b"a", 2, REF), count=3),
    "page that is a hole": pages_value((0, b"a", 1, HOLE)),
    "page with a short ref": pages_value((0, b"a", 1, REF[:32])),
    "page with a bad name": pages_value((0, b"..", 1, REF)),
    "page id negative": pages_value((-1, b"a", 1, REF)),
    "page with a field more": dir_value(entries=..., pages=[[0, b"a", 1, REF, 0]]),
    "page not an array": dir_value(entries=..., pages=[REF]),
    "page a number": dir_value(entries=..., pages=[1]),
    "page null": dir_value(entries=..., pages=[None]),
    "page a map": dir_value(entries=..., pages=[{"a": 1, "b": 2, "c": 3, "d": 4}]),
    "entry a number": dir_value(entries=[1]),
    "entry null": dir_value(entries=[None]),
    "entries a number": dir_value(entries=1),
    "links a number": dir_value(links=1),
    "root a number": dir_value(root=1),
    "pages null": dir_value(entries=..., pages=None),
    "pages a number": dir_value(entries=..., pages=1),
    "pages not an array": dir_value(entries=..., pages=REF),
    "links too short": dir_value(links=[OID, 1, 2]),
    "links with a short oid": dir_value(links=[OID[:15], 1, 2, REF]),
    "links that are a hole": dir_value(links=[OID, 1, 2, HOLE]),
    "links null": dir_value(links=None),
    "links with a negative version": dir_value(links=[OID, 1, -2, REF]),
    "links with a negative epoch": dir_value(links=[OID, -1, 2, REF]),
    "root too short": dir_value(root=[0o755, 0, 0, 0, 0]),
    "root with a file type": dir_value(root=[0o40755, 0, 0, 0, 0, {}]),
    "root mode true": dir_value(root=[True, 0, 0, 0, 0, {}]),
    "root with nanoseconds of a second": dir_value(root=[0o755, 0, 10**9, 0, 0, {}]),
    "root with negative nanoseconds": dir_value(root=[0o755, 0, 0, 0, -1, {}]),
    "root with a text time": dir_value(root=[0o755, "0", 0, 0, 0, {}]),
    "root with a target": dir_value(root=[0o755, 0, 0, 0, 0, {"target": b"t"}]),
    "root null": dir_value(root=None),
    "root with text nanoseconds": dir_value(root=[0o755, 0, "0", 0, 0, {}]),
    "root with null nanoseconds": dir_value(root=[0o755, 0, 0, 0, None, {}]),
    "page with a text ref": pages_value((0, b"a", 1, "r" * 64)),
    "links with a text ref": dir_value(links=[OID, 1, 2, "r" * 64]),
    "links with a text oid": dir_value(links=["o" * 16, 1, 2, REF]),
    "root with an extra array": dir_value(root=[0o755, 0, 0, 0, 0, []]),
    "root with an extra null": dir_value(root=[0o755, 0, 0, 0, 0, None]),
    "root with a huge time": dir_value(root=[0o755, 2**53, 0, 0, 0, {}]),
    "root with a huge old time": dir_value(root=[0o755, 0, 0, -(2**53), 0, {}]),
    "huge size": file_value(size=2**53),
    "huge count": dir_value(count=2**53),
    "huge page id": pages_value((2**53, b"a", 1, REF)),
    "huge page count": pages_value((0, b"a", 2**53, REF)),
    "huge links version": dir_value(links=[OID, 1, 2**53, REF]),
}  # fmt: skip

BAD_ENTRIES = {
    "kind 4": entry(kind=4),
    "kind negative": entry(kind=-1),
    "kind 4 without ref": entry(kind=4, ref=b""),
    "kind negative without ref": entry(kind=-1, ref=b""),
    "kind true": entry(kind=True),
    "kind text": entry(kind="1"),
    "field missing": entry()[:-1],
    "field more": [*entry(), 0],
    "not an array": {"name": b"n"},
    "name text": entry(name="n"),
    "name empty": entry(name=b""),
    "name too long": entry(name=b"n" * 256),
    "name with a slash": entry(name=b"a/b"),
    "name with NUL": entry(name=b"a\0"),
    "name dot": entry(name=b"."),
    "name dot dot": entry(name=b".."),
    "oid short": entry(oid=OID[:15]),
    "oid text": entry(oid="0" * 16),
    "mode with type": entry(mode=0o100644),
    "mode negative": entry(mode=-1),
    "mode true": entry(mode=True),
    "mtime nanoseconds": entry(mtime_ns=10**9),
    "mtime nanoseconds negative": entry(mtime_ns=-1),
    "ctime nanoseconds": entry(ctime_ns=10**9),
    "ctime nanoseconds negative": entry(ctime_ns=-1),
    "mtime text": entry(mtime_s="5"),
    "ctime null": entry(ctime_s=None),
    "size negative": entry(size=-1),
    "size true": entry(size=True),
    "epoch negative": entry(epoch=-1),
    "ver negative": entry(ver=-1),
    "ver text": entry(ver=""),
    "file without ref": entry(ref=b""),
    "file with a short ref": entry(ref=REF[:63]),
    "file that is a hole": entry(ref=HOLE),
    "directory without ref": entry(kind=DIR, ref=b""),
    "directory that is a hole": entry(kind=DIR, ref=HOLE),
    "ref text": entry(ref="r" * 64),
    "symlink with ref": symlink(ref=REF),
    "symlink without target": symlink(extra={}),
    "symlink with an empty target": symlink(extra={"target": b""}),
    "symlink with NUL": symlink(extra={"target": b"a\0b"}),
    "symlink with a long target": symlink(extra={"target": b"t" * 4096}),
    "symlink with a text target": symlink(extra={"target": "t"}),
    "hard link with ref": entry(kind=HARDLINK),
    "hard link with a target": entry(kind=HARDLINK, ref=b"", extra={"target": b"t"}),
    "file with a target": entry(extra={"target": b"t"}),
    "extra null": entry(extra=None),
    "extra array": entry(extra=[]),
    "extra unknown": entry(extra={"y": 1}),
    "used negative": entry(extra={"used": -1}),
    "used true": entry(extra={"used": True}),
    "nlink zero": entry(extra={"nlink": 0}),
    "nlink text": entry(extra={"nlink": "2"}),
    "huge mtime": entry(mtime_s=2**53),
    "huge old mtime": entry(mtime_s=-(2**53)),
    "huge ctime": entry(ctime_s=2**53),
    "huge old ctime": entry(ctime_s=-(2**53)),
    "huge size": entry(size=2**53),
    "huge epoch": entry(epoch=2**53),
    "huge ver": entry(ver=2**53),
    "huge used": entry(extra={"used": 2**53}),
    "huge nlink": entry(extra={"nlink": 2**53}),
    "xattrs a number": entry(extra={"x": 5}),
    "xattrs bytes": entry(extra={"x": b"ab"}),
    "xattrs a map of pairs": entry(extra={"x": {"a": b""}}),
    "xattrs empty": entry(extra={"x": []}),
    "xattrs a map": entry(extra={"x": {}}),
    "xattr not a pair": entry(extra={"x": [[b"a"]]}),
    "xattr a number": entry(extra={"x": [1]}),
    "xattr not an array": entry(extra={"x": [b"ab"]}),
    "xattr name text": entry(extra={"x": [["a", b""]]}),
    "xattr value text": entry(extra={"x": [[b"a", ""]]}),
    "xattr name empty": entry(extra={"x": [[b"", b""]]}),
    "xattr name long": entry(extra={"x": [[b"a" * 256, b""]]}),
    "xattr name with NUL": entry(extra={"x": [[b"a\0", b""]]}),
    "xattr twice": entry(extra={"x": [[b"a", b""], [b"a", b""]]}),
    "xattrs out of order": entry(extra={"x": [[b"b", b""], [b"a", b""]]}),
    "xattrs too large": entry(extra={"x": [[b"a", bytes(131072)]]}),
}


@pytest.mark.parametrize("name", GOOD)
def test_both_readers_accept(name):
    assert verdicts(GOOD[name]) == (True, True)


@pytest.mark.parametrize("name", BAD)
def test_both_readers_refuse(name):
    assert verdicts(BAD[name]) == (False, False)


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_both_readers_refuse_the_entry(name):
    bad = BAD_ENTRIES[name]
    assert verdicts(dir_value(entries=[bad])) == (False, False)
    plaintext = blocks.frame(dag_cbor.encode([bad]))
    with refuses("invalid_envelope"):
        manifest.parse_page(plaintext)
    with pytest.raises(second_reader.FormatError):
        second_reader.parse_page(plaintext)


def non_canonical():
    """Every canonical manifest in another dress: same value, other bytes."""
    good = dag_cbor.encode(dir_value())
    assert good[0] == 0xA7
    yield "indefinite map", b"\xbf" + good[1:] + b"\xff"
    yield "map with a long head", b"\xb8\x07" + good[1:]
    yield "trailing byte", good + b"\0"
    yield "truncated", good[:-1]
    first = dag_cbor.encode("t") + dag_cbor.encode("mk/man@1")
    assert good[1:].startswith(first)
    yield "keys out of order", good[:1] + good[1 + len(first) :] + first
    yield "key twice", b"\xa8" + first + good[1:]
    yield "long integer", good.replace(b"\x63ver\x02", b"\x63ver\x18\x02")
    yield "float", good.replace(b"\x63ver\x02", b"\x63ver\xf9\x40\x00")
    yield "tagged", good.replace(b"\x63ver\x02", b"\x63ver\xc2\x41\x02")
    yield "17 deep", dag_cbor.encode({"t": "mk/man@1"})[:-1] + b"\x81" * 17 + b"\1"


@pytest.mark.parametrize(("name", "raw"), list(non_canonical()))
def test_both_readers_refuse_other_forms(name, raw):
    assert verdicts(raw) == (False, False)
    assert verdicts(dag_cbor.encode(dir_value())) == (True, True)


def test_extra_fields_out_of_canonical_order_are_refused():
    item = dag_cbor.encode([entry(extra={"x": [[b"a", b""]], "used": 1, "nlink": 1})])
    x, used = dag_cbor.encode("x") + dag_cbor.encode([[b"a", b""]]), dag_cbor.encode("used") + b"\x01"
    assert x + used in item
    for bad in (item.replace(x + used, used + x), item.replace(used, b"\x64used\x18\x01")):
        with refuses("invalid_envelope"):
            manifest.parse_page(blocks.frame(bad))
        with pytest.raises(second_reader.FormatError):
            second_reader.parse_page(blocks.frame(bad))


def test_keys_of_extra_fields_that_are_not_text_are_refused():
    for key in (b"used", 1, None, True):
        bad = blocks.frame(cbor2.dumps([entry(extra={key: 1})], canonical=True))
        with refuses("invalid_envelope"):
            manifest.parse_page(bad)
        with pytest.raises(second_reader.FormatError):
            second_reader.parse_page(bad)


def test_pages_must_be_what_their_directory_says():
    items = [Entry(name, FILE, OID, 0, 0, 0, 0, 0, 0, REF) for name in (b"b", b"c")]
    plaintext = blocks.frame(manifest.encode_page(items))
    good = PageRef(1, b"b", 2, REF)
    assert len(manifest.parse_page(plaintext, good, b"d")) == 2
    for page, upper in (
        (PageRef(1, b"a", 2, REF), None),
        (PageRef(1, b"b", 1, REF), None),
        (good, b"c"),
        (good, b"b"),
    ):
        with refuses("invalid_envelope"):
            manifest.parse_page(plaintext, page, upper)
    with refuses("invalid_envelope", "empty"):
        manifest.parse_page(blocks.frame(manifest.encode_page([])))


# -- differential: random edits of valid values -----------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers(-2, 70000) | st.binary(max_size=70) | st.text(max_size=3)
LEAVES |= st.just(1.0) | st.just([]) | st.just({}) | st.just(HOLE)


def spots(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from spots(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from spots(value[i], (*path, i))


def edited(value, path, leaf, how):
    if not path:
        return leaf
    copy = dict(value) if isinstance(value, dict) else list(value)
    key, rest = path[0], path[1:]
    if rest or how == "replace":
        copy[key] = edited(copy[key], rest, leaf, how)
    elif how == "delete":
        del copy[key]
    elif isinstance(copy, dict):
        copy[leaf if isinstance(leaf, str) else "size"] = copy[key]
    else:
        copy.insert(key, leaf if how == "insert" else copy[key])
    return copy


@given(st.sampled_from(sorted(set(GOOD) - {"most references"})), st.data())
@settings(max_examples=400)
def test_the_readers_agree_on_edited_manifests(name, data):
    value = GOOD[name]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(spots(value))))
        how = data.draw(st.sampled_from(["replace", "delete", "insert", "repeat"]))
        value = edited(value, path, data.draw(LEAVES), how)
    ours, theirs = verdicts(value)
    assert ours == theirs


@given(manifests, st.data())
@settings(max_examples=200)
def test_the_readers_agree_on_flipped_bytes(value, data):
    raw = bytearray(manifest.encode_manifest(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    plaintext = blocks.frame(bytes(raw))
    place = (value.oid, value.epoch, value.ver)
    parsed = attempt("invalid_envelope", manifest.parse_manifest, plaintext, *place)
    assert parsed is None or manifest.encode_manifest(parsed) == raw
    try:
        other = second_reader.parse_manifest(plaintext, *place)
    except second_reader.FormatError:
        other = None
    assert (parsed is None) == (other is None)


def test_nothing_printed_shows_keys_names_or_content():
    item = Entry(b"secret-name", FILE, OID, 0, 0, 0, 0, 0, 0, REF)
    shown = repr(
        (
            item,
            PageRef(1, b"secret-name", 1, REF),
            FileManifest(OID, 1, 1, 6, 65536, b"secret", REF, REF),
            DirManifest(OID, 1, 1, 1, (item,), (PageRef(1, b"secret-name", 1, REF),), REF),
        )
    )
    assert "secret" not in shown
    assert repr(REF[32:])[2:-1] not in shown
    assert REF[32:].hex() not in shown
