"""Canonical CBOR, CIDs and durations."""

import base64
import math
from datetime import UTC, datetime

import dag_cbor
import pytest
from core_support import attempt, refuses
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID

from meshkitfs.core import cbor, cid, durations
from meshkitfs.core.blocks import Where

INTS = st.integers(-(2**53) + 1, 2**53 - 1)
SCALARS = st.none() | st.booleans() | INTS | st.binary(max_size=40) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=5),
    max_leaves=20,
)


@given(VALUES)
def test_round_trip_and_agreement_with_dag_cbor(value):
    data = cbor.encode(value)
    assert data == dag_cbor.encode(value)
    assert cbor.decode(data) == value


@given(st.binary(max_size=60))
def test_whatever_decodes_encodes_to_the_same_bytes(data):
    values = attempt("invalid_record", lambda: [cbor.decode(data)])
    assert values is None or cbor.encode(values[0]) == data


@given(VALUES, st.data())
def test_mutated_encodings_are_refused_or_mean_themselves(value, data):
    raw = bytearray(cbor.encode(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    test_whatever_decodes_encodes_to_the_same_bytes.hypothesis.inner_test(bytes(raw))


BOMBS = {
    "duplicate key": "a2616101616102",
    "unsorted keys": "a2616201616101",
    "longer key before shorter": "a262616101616201",
    "non-minimal integer": "1801",
    "non-minimal length": "590001ff",
    "indefinite bytes": "5f4101ff",
    "indefinite array": "9f01ff",
    "indefinite map": "bf616101ff",
    "trailing byte": "0100",
    "empty": "",
    "truncated": "6261",
    "float": "fb3ff8000000000000",
    "float that is an integer": "f93c00",
    "NaN": "f97e00",
    "undefined": "f7",
    "simple value": "e0",
    "integer key": "a10101",
    "bytes key": "a1410101",
    "tag 42 (a CID link)": "d82a4101",
    "tag 2 (bignum)": "c24101",
    "tag 35 (regular expression)": "d8236161",
    "tag 0 (date)": "c074323031332d30332d32315432303a30343a30305a",
    "tag 28 (shared value)": "d81c80",
    "self-describe tag": "d9d9f701",
    "2**53": "1b0020000000000000",
    "-(2**53)": "3b001fffffffffffff",
    "2**64-1": "1bffffffffffffffff",
    "huge array": "9bffffffffffffffff",
    "huge bytes": "5bffffffffffffffff00",
    "huge map": "bb00000000ffffffff",
    "invalid UTF-8": "62c328",
    "5000 deep": "81" * 5000 + "01",
    "17 deep": "81" * 17 + "01",
}


@pytest.mark.parametrize("name", BOMBS)
def test_cbor_that_is_refused(name):
    with refuses("invalid_record"):
        cbor.decode(bytes.fromhex(BOMBS[name]))


def test_sixteen_deep_is_the_limit():
    data = bytes.fromhex("81" * 16 + "01")
    assert cbor.encode(cbor.decode(data)) == data
    value = 1
    for _ in range(16):
        value = [value]
    cbor.encode(value)
    with refuses("invalid_record", "deeply"):
        cbor.encode([value])


def test_size_limit():
    data = cbor.encode(bytes(100))
    assert cbor.decode(data, limit=len(data)) == bytes(100)
    with refuses("invalid_record", "limit"):
        cbor.decode(data, limit=len(data) - 1)
    with refuses("invalid_record", "limit"):
        cbor.decode(cbor.encode(bytes(1 << 20)))


@pytest.mark.parametrize(
    "value", [1.0, math.nan, 2**53, -(2**53), (1,), {1: 2}, {b"a": 1}, {1, 2}, bytearray(1)]
)
def test_values_outside_the_subset_are_not_encoded(value):
    with refuses("invalid_record"):
        cbor.encode(value)
    with refuses("invalid_record"):
        cbor.encode({"a": [value]})


def test_text_without_utf8_form_is_not_encoded():
    for value in ("\ud800", ["\udfff"], {"\udc80": 1}):
        with refuses("invalid_record"):
            cbor.encode(value)


@given(st.integers(0, 2**53 - 1))
def test_hand_rolled_integers(value):
    assert cbor.encode_uint(value) == dag_cbor.encode(value)


def test_hand_rolled_integers_have_the_same_range():
    for value in (-1, 2**53):
        with pytest.raises(ValueError):
            cbor.encode_uint(value)


OIDS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, 2**53 - 1) | st.sampled_from([0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32])


@given(OIDS, NUMBERS, NUMBERS)
def test_contexts_are_the_cbor_they_stand_for(oid, a, b):
    assert Where.block(oid, a).context == dag_cbor.encode(["mk/blk@1", oid, a])
    assert Where.index(oid, a).context == dag_cbor.encode(["mk/idx@1", oid, 0, a])
    assert Where.page(oid, a).context == dag_cbor.encode(["mk/page@1", oid, a])
    assert Where.manifest(oid, a, b).context == dag_cbor.encode(["mk/man@1", oid, a, b])


def test_a_context_needs_a_whole_oid():
    for make in (Where.block, Where.index, Where.page, lambda oid, n: Where.manifest(oid, n, n)):
        for size in (0, 15, 17):
            with pytest.raises(ValueError):
                make(bytes(size), 1)


@given(st.binary(min_size=32, max_size=32))
def test_cid_round_trip_and_agreement_with_multiformats(digest):
    text = cid.cid_text(digest)
    assert cid.parse_cid(text) == digest
    other = CID.decode(text)
    assert bytes(other) == cid.cid_bytes(digest)
    assert (other.version, other.codec.name, other.hashfun.name) == (1, "raw", "sha2-256")


def test_a_digest_has_32_bytes():
    for size in (0, 31, 33):
        with pytest.raises(ValueError):
            cid.cid_bytes(bytes(size))


GOOD = cid.cid_text(cid.digest_of(b""))


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (GOOD.upper(), "upper case"),
        ("bafkrei" + GOOD[7:].upper(), "canonical"),
        (GOOD[:-1], "characters"),
        (GOOD + "a", "characters"),
        (GOOD[:-1] + chr(ord(GOOD[-1]) + 1), "canonical"),
        (GOOD[:-1] + "1", "base32"),
        (GOOD[:-1] + "\u0430", "base32"),
        (GOOD[:-1] + "=", "base32"),
        (" " + GOOD, "bafkrei"),
        ("", "bafkrei"),
        ("QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n", "CIDv0"),
        ("bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi", "dag-pb"),
        ("bafyreigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi", "dag-cbor"),
        ("bafkqabtimvwgy3yk", "identity"),
        ("bafkriegdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi", "hash function"),
        ("zb2rhe5P4gXftAwvA4eXQ5HJwsER2owDyS9sKaQRRVQPn93bA", "base58"),
        (None, "text"),
        (b"bafkrei", "text"),
    ],
)
def test_cids_that_are_refused(text, about):
    with refuses("invalid_cid", about):
        cid.parse_cid(text)


def test_cid_of_another_hash_in_the_right_clothes_is_refused():
    # Starts with "bafkrei" and has 59 characters, but the multihash length byte says 0x21.
    raw = bytes.fromhex("01551221") + bytes(32)
    text = "b" + base64.b32encode(raw).decode().lower().rstrip("=")
    with refuses("invalid_cid"):
        cid.parse_cid(text)


NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600), ("999999s", 999999)],
)
def test_durations(text, seconds):
    assert durations.parse_expiry(text, NOW) == NOW + seconds


def test_dates():
    midnight = int(datetime(2027, 1, 31, tzinfo=UTC).timestamp())
    assert durations.parse_expiry("2027-01-31", NOW) == midnight
    assert durations.parse_expiry("2027-01-31T00:00:00", NOW) == midnight
    assert durations.parse_expiry("2027-01-31T02:00:00+02:00", NOW) == midnight


@pytest.mark.parametrize(
    "text",
    ["", "7", "d", "-7d", "7 d", "7D", "1.5h", "7d\n", "0d", "never", "1999-01-01", "9999-01-01", "9999999s",
     "999999w", "2027-13-01", "\u0667d"],
)  # fmt: skip
def test_expiries_that_are_refused(text):
    with refuses("invalid_argument"):
        durations.parse_expiry(text, NOW)
