"""Sealing and opening: Cobblestone, the three safety types, places, padding and frames."""

import copy
import os
import pickle

import pytest
import second_reader
from core_support import attempt, refuses, reopen
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs.core import blocks, cobblestone
from meshkitfs.core._mint import mint_key
from meshkitfs.core.blocks import MAGIC, MAX_SEALED, ContentKey, VerifiedBlock, Where, open_block, seal_block
from meshkitfs.core.cid import digest_of

OID, OTHER = bytes(range(16)), bytes(16)
KEY = bytes(range(32))
EDGES = [0, 1, 15, 16, 16383, 16384, 16385, 32767, 32768, 32769, 65536, 262144]

PAIRS = [(cobblestone.seal_portable, cobblestone.open_portable)]
if cobblestone.RECIPE:
    PAIRS.append((cobblestone.seal_recipe, cobblestone.open_recipe))


def test_the_recipe_is_used_where_it_exists():
    assert cobblestone.RECIPE
    assert cobblestone.seal is cobblestone.seal_recipe
    assert cobblestone.open_ is cobblestone.open_recipe


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("pad", [0, 1, 16384, 20000])
def test_both_implementations_read_each_other(size, pad):
    plaintext = os.urandom(size)
    for seal, _ in PAIRS:
        sealed = seal(KEY, b"context", plaintext, pad, b"prefix")
        assert sealed[:6] == b"prefix"
        body = bytes(sealed[6:])
        assert len(body) == cobblestone.sealed_size(size + pad)
        assert cobblestone.plain_size(len(body)) == size + pad
        for _, open_ in PAIRS:
            assert open_(KEY, b"context", body) == plaintext + bytes(pad)
        assert second_reader.cobblestone_open(KEY, b"context", body) == plaintext + bytes(pad)


@given(st.binary(max_size=200), st.integers(0, 40000), st.binary(max_size=30))
@settings(max_examples=50)
def test_any_plaintext_round_trips(head, size, context):
    plaintext = head + bytes(size)
    assert cobblestone.open_(KEY, context, cobblestone.seal(KEY, context, plaintext)) == plaintext
    view = memoryview(bytearray(plaintext))
    assert cobblestone.open_(KEY, context, memoryview(cobblestone.seal(KEY, context, view))) == plaintext


@pytest.mark.parametrize(("_", "open_"), PAIRS)
@pytest.mark.parametrize("size", [0, 5, 16384, 40000])
def test_every_part_of_a_message_is_authenticated(_, open_, size):
    sealed = bytes(cobblestone.seal(KEY, b"c", os.urandom(size)))
    assert len(open_(KEY, b"c", sealed)) == size
    for at in {0, 23, 24, 55, 56, len(sealed) // 2, len(sealed) - 17, len(sealed) - 16, len(sealed) - 1}:
        bad = bytearray(sealed)
        bad[at] ^= 1
        with refuses("invalid_envelope"):
            open_(KEY, b"c", bad)
    for bad in (sealed[:-1], sealed + b"\0", sealed[1:], sealed + bytes(16), sealed[:-16], sealed[:56], b""):
        with refuses("invalid_envelope"):
            open_(KEY, b"c", bad)
    with refuses("invalid_envelope"):
        open_(bytes(32), b"c", sealed)
    with refuses("invalid_envelope"):
        open_(KEY, b"d", sealed)


@pytest.mark.parametrize(("_", "open_"), PAIRS)
def test_chunks_do_not_swap_drop_or_repeat(_, open_):
    sealed = bytes(cobblestone.seal(KEY, b"c", os.urandom(3 * 16384 + 7)))
    header, step = sealed[:56], 16384 + 16
    chunks = [sealed[at : at + step] for at in range(56, len(sealed), step)]
    for order in ([1, 0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 0, 1, 2, 3], [3], [0, 1, 2, 3, 3]):
        with refuses("invalid_envelope"):
            open_(KEY, b"c", header + b"".join(chunks[i] for i in order))


@pytest.mark.parametrize(("seal", "open_"), PAIRS)
def test_a_key_has_32_bytes(seal, open_):
    sealed = bytes(cobblestone.seal(KEY, b"c", b"text"))
    for key in (KEY[:31], KEY + b"\0", b""):
        with pytest.raises(ValueError):
            seal(key, b"c", b"text")
        with pytest.raises(ValueError):
            open_(key, b"c", sealed)


def test_one_ciphertext_has_one_key():
    """The commitment refuses a message whose chunks a second key would open (invisible salamanders)."""
    # A message under key A whose commitment field was replaced by the one of key B for the same salt: with
    # GCM alone such a ciphertext can be made to open under both.
    salt = bytes(24)
    a = bytes(cobblestone.seal_portable(KEY, b"c", b"text", salt=salt))
    b = bytes(cobblestone.seal_portable(bytes(32), b"c", b"text", salt=salt))
    for _, open_ in PAIRS:
        for key, spliced in ((KEY, a[:24] + b[24:56] + a[56:]), (bytes(32), a[:24] + b[24:56] + a[56:])):
            with refuses("invalid_envelope"):
                open_(key, b"c", spliced)


def test_sealing_twice_gives_nothing_in_common():
    where = Where.block(OID, 0)
    (ref1, one), (ref2, two) = seal_block(where, b"same"), seal_block(where, b"same")
    assert ref1[:32] != ref2[:32]
    assert ref1[32:] != ref2[32:]
    assert one.data[:24] != two.data[:24]


# -- the three types --------------------------------------------------------------------------------


def test_a_verified_block_exists_only_for_verified_bytes():
    data = b"some bytes"
    block = VerifiedBlock.check(digest_of(data), data)
    assert (block.digest, block.data) == (digest_of(data), data)
    for bad in (data[:-1], data + b"\0", b"\0" + data[1:], b""):
        with refuses("cid_mismatch"):
            VerifiedBlock.check(digest_of(data), bad)
    for digest in (digest_of(data)[:31], b"", digest_of(data) + b"\0"):
        with refuses("cid_mismatch"):
            VerifiedBlock.check(digest, data)
    for make in (VerifiedBlock, lambda: VerifiedBlock(data), lambda: VerifiedBlock(digest_of(data), data)):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError):
        type("Sub", (VerifiedBlock,), {})
    for change in (lambda: setattr(block, "data", b"x"), lambda: delattr(block, "data")):
        with pytest.raises(AttributeError):
            change()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(block)


def test_a_verified_block_cannot_be_written_through():
    buffer = bytearray(b"some bytes")
    block = VerifiedBlock.check(digest_of(buffer), buffer)
    assert isinstance(block.data, memoryview)
    with pytest.raises(TypeError):
        block.data[0] = 0


def test_blocks_have_a_size_limit():
    data = bytes(MAX_SEALED)
    VerifiedBlock.check(digest_of(data), data)
    data += b"\0"
    with refuses("cid_mismatch", "limit"):
        VerifiedBlock.check(digest_of(data), data)


def test_a_content_key_is_minted_and_nothing_else():
    key = mint_key(KEY)
    for make in (ContentKey, lambda: ContentKey(KEY)):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError):
        type("Sub", (ContentKey,), {})
    for change in (lambda: setattr(key, "_raw", b"x"), lambda: delattr(key, "_raw")):
        with pytest.raises(AttributeError):
            change()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(key)
    for raw in (KEY[:31], KEY + b"\0", bytearray(KEY), None):
        with pytest.raises(ValueError):
            mint_key(raw)


def test_keys_do_not_show():
    ref, sealed = seal_block(Where.block(OID, 0), b"text")
    shown = repr(mint_key(ref[32:])) + repr(sealed) + repr(VerifiedBlock.check(ref[:32], sealed.data))
    assert ref[32:].hex() not in shown
    assert repr(ref[32:])[2:-1] not in shown


def test_open_block_takes_nothing_else():
    where = Where.block(OID, 0)
    ref, sealed = seal_block(where, b"text")
    block = VerifiedBlock.check(ref[:32], sealed.data)

    class Fake:
        digest, data, _raw = ref[:32], bytes(sealed.data), ref[32:]

    for key, what in (
        (Fake(), block),
        (ref[32:], block),
        (mint_key(ref[32:]), Fake()),
        (mint_key(ref[32:]), sealed),
    ):
        with pytest.raises(TypeError):
            open_block(key, what, where)


# -- places -----------------------------------------------------------------------------------------

PLACES = [
    Where.block(OID, 3), Where.block(OID, 4), Where.block(OTHER, 3), Where.index(OID, 3), Where.index(OID, 4),
    Where.index(OTHER, 3), Where.page(OID, 3), Where.page(OID, 4), Where.page(OTHER, 3),
    Where.manifest(OID, 1, 3), Where.manifest(OID, 1, 4), Where.manifest(OID, 2, 3),
    Where.manifest(OTHER, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(PLACES)))
def test_what_is_sealed_for_one_place_opens_nowhere_else(at):
    place = PLACES[at]
    if place.is_manifest:
        ref, sealed = blocks.seal_structured(place, b"payload")
        assert blocks.unframe(reopen(ref, sealed, place)) == b"payload"
    else:
        ref, sealed = seal_block(place, b"payload")
        assert bytes(reopen(ref, sealed, place)).rstrip(b"\0") == b"payload"
    for other in PLACES:
        if other is not place:
            with refuses("invalid_envelope"):
                reopen(ref, sealed, other)
    with refuses("invalid_envelope"):
        open_block(mint_key(bytes(32)), VerifiedBlock.check(ref[:32], sealed.data), place)


def test_a_block_moved_behind_the_magic_does_not_open_as_a_manifest():
    """Even the raw message, moved across the two kinds with its key, is bound to its context."""
    ref, sealed = seal_block(Where.block(OID, 3), b"payload")
    data = MAGIC + bytes(sealed.data)
    with refuses("invalid_envelope"):
        open_block(mint_key(ref[32:]), VerifiedBlock.check(digest_of(data), data), Where.manifest(OID, 1, 3))


@pytest.mark.parametrize("magic", [b"MKE1\x02", b"MKE1\x00", b"MKE2\x01", b"\0\0\0\0\0", b"mke1\x01", b""])
def test_other_versions_and_suites_are_refused(magic):
    where = Where.manifest(OID, 1, 3)
    ref, sealed = blocks.seal_structured(where, b"payload")
    data = magic + bytes(sealed.data)[5:]
    with refuses("invalid_envelope", "" if not magic else "suite"):
        open_block(mint_key(ref[32:]), VerifiedBlock.check(digest_of(data), data), where)


@given(st.integers(0, 700), st.data())
@settings(max_examples=150)
def test_a_mutated_block_never_opens(size, data):
    where = Where.block(OID, 1)
    ref, sealed = seal_block(where, bytes(size))
    bad = bytearray(sealed.data)
    how = data.draw(st.sampled_from(["flip", "cut", "extend", "splice"]))
    if how == "flip":
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    elif how == "extend":
        bad += data.draw(st.binary(min_size=1, max_size=40))
    else:
        at = data.draw(st.integers(0, len(bad) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=40))
        if bad[at : at + len(piece)] == piece:
            return
        bad[at : at + len(piece)] = piece
    with refuses("cid_mismatch"):
        VerifiedBlock.check(ref[:32], bad)
    # And where somebody makes a reference to the bad bytes, the seal itself refuses.
    with refuses("invalid_envelope"):
        open_block(mint_key(ref[32:]), VerifiedBlock.check(digest_of(bad), bad), where)


# -- padding and frames -----------------------------------------------------------------------------


@given(st.integers(0, 1 << 20))
def test_padding_is_padme(size):
    padded = blocks.padded_size(size, 1 << 20)
    assert padded == second_reader.padded(size, 1 << 20)
    assert size <= padded <= max(512, int(size * 1.12) + 1)
    assert blocks.padded_size(padded, 1 << 20) == padded
    for block_size in blocks.BLOCK_SIZES:
        if size <= block_size:
            assert blocks.padded_size(size, block_size) == padded <= block_size


def test_a_block_is_padded_with_zeros_and_never_above_its_size():
    for block_size in blocks.BLOCK_SIZES:
        for size in (0, 1, 600, block_size - 1, block_size):
            ref, sealed = seal_block(Where.block(OID, 0), b"\xff" * size, block_size)
            plain = reopen(ref, sealed, Where.block(OID, 0))
            assert len(plain) == blocks.padded_size(size, block_size) <= block_size
            assert bytes(plain) == b"\xff" * size + bytes(len(plain) - size)
            assert len(sealed.data) <= MAX_SEALED
        with pytest.raises(ValueError, match="one block"):
            seal_block(Where.block(OID, 0), bytes(block_size + 1), block_size)
    with pytest.raises(ValueError, match="one block"):
        seal_block(Where.manifest(OID, 1, 1), b"not a manifest")


@given(st.binary(max_size=1200))
def test_frames_round_trip(payload):
    framed = blocks.frame(payload)
    assert blocks.unframe(framed) == blocks.unframe(memoryview(framed)) == payload
    assert second_reader.unframe(framed) == payload


@given(st.binary(max_size=1200))
def test_whatever_unframes_frames_to_the_same_bytes(data):
    payload = attempt("invalid_envelope", blocks.unframe, data)
    if payload is not None:
        assert blocks.frame(payload) == data
        return
    with pytest.raises(second_reader.FormatError):
        second_reader.unframe(data)


def test_frames_that_are_refused():
    good = blocks.frame(b"payload")
    bad = {
        "padding not zero": good[:-1] + b"\1",
        "first padding byte not zero": good[:11] + b"\1" + good[12:],
        "one byte short": good[:-1],
        "one byte more": good + b"\0",
        "padded too far": good + bytes(512),
        "length field above the end": b"\xff" * 4 + good[4:],
        "length field above the end of the largest": b"\xff" * 4 + bytes(MAX_SEALED - 4),
        "no length field": b"\0\0\0",
        "nothing": b"",
    }
    for data in bad.values():
        with refuses("invalid_envelope"):
            blocks.unframe(data)


def test_a_manifest_has_a_size_limit():
    where = Where.manifest(OID, 1, 1)
    ref, sealed = blocks.seal_structured(where, bytes(1 << 20))
    assert blocks.unframe(reopen(ref, sealed, where)) == bytes(1 << 20)
    with refuses("invalid_envelope", "fit"):
        blocks.seal_structured(where, bytes((2 << 20) - 100))
