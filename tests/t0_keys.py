"""Keys, HPKE and the signed container."""

import copy
import hashlib
import os
import pickle

import cbor2
import pytest
import second_reader
from core_support import attempt, refuses
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs.core import cbor, cose, hpke, keys
from meshkitfs.core.keys import EncryptionKey, SigningKey

ALICE, EVE = SigningKey.from_seed(bytes(32)), SigningKey.from_seed(b"\1" * 32)
BOB = EncryptionKey.from_seed(b"\2" * 32)
TRUST = {ALICE.kid: ALICE.public}
P = 2**255 - 19


def test_keys_come_from_their_seeds():
    assert SigningKey.from_seed(ALICE.seed).public == ALICE.public
    assert SigningKey.generate().public != SigningKey.generate().public
    assert EncryptionKey.from_seed(BOB.seed).public == BOB.public
    assert EncryptionKey.generate().public != EncryptionKey.generate().public
    assert (len(ALICE.public), len(ALICE.kid), len(BOB.public), len(BOB.kid)) == (32, 16, 1216, 16)
    for size in (0, 31, 33):
        with pytest.raises(ValueError):
            EncryptionKey.from_seed(bytes(size))
        with pytest.raises(ValueError):
            SigningKey.from_seed(bytes(size))


def test_key_objects_keep_their_secrets():
    for key in (SigningKey.generate(), EncryptionKey.generate()):
        assert key.seed.hex() not in repr(key)
        assert repr(key.seed)[2:-1] not in repr(key)
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                duplicate(key)


SMALL_ORDER = [0, 1, P - 1]
SMALL_ORDER += [0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826]
SMALL_ORDER += [0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7]


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", SMALL_ORDER)
def test_small_order_keys_are_refused(y, sign):
    raw = (y | sign << 255).to_bytes(32, "little")
    with refuses("invalid_record", "small order"):
        keys.check_ed25519_public(raw)


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", [P, P + 1, 2**255 - 1])
def test_non_canonical_keys_are_refused(y, sign):
    with refuses("invalid_record", "canonical"):
        keys.check_ed25519_public((y | sign << 255).to_bytes(32, "little"))


def test_the_library_alone_would_accept_a_forgery():
    """Why the two tests above are there: a signature that nobody made verifies under the identity point."""
    raw, forged = b"\1" + bytes(31), b"\1" + bytes(31) + bytes(32)
    Ed25519PublicKey.from_public_bytes(raw).verify(forged, b"anything at all")
    payload = cbor.encode({"t": "mk/head@1"})
    protected = cbor2.dumps({1: -19, 4: keys.kid_of(raw), 16: "mk/head@1"}, canonical=True)
    blob = cbor2.dumps([protected, {}, payload, forged])
    with refuses("invalid_record", "small order"):
        cose.verify1(blob, {keys.kid_of(raw): raw}, "mk/head@1")


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33), bytes(1215), "0" * 32, None, [1], bytearray(32)])
def test_keys_of_another_shape_are_refused(raw):
    with refuses("invalid_record", "32 bytes"):
        keys.check_ed25519_public(raw)
    with refuses("invalid_record", "1216 bytes"):
        keys.check_encryption_public(raw)


def test_points_off_the_curve_never_verify():
    # About half of all y have no point. The library finds out when the key is used.
    for y in range(2, 60):
        key = attempt("invalid_record", keys.check_ed25519_public, y.to_bytes(32, "little"))
        if key is not None:
            with pytest.raises(InvalidSignature):
                key.verify(bytes(64), b"x")


def test_encryption_keys_that_are_no_keys_are_refused():
    for bad in (
        BOB.public[:-1],
        BOB.public + b"\0",
        b"\xff" * 1184 + BOB.public[1184:],  # ML-KEM coefficients above q
        BOB.public[:1184] + bytes(32),  # X25519 point of order 1: every shared secret is zero
        BOB.public[:1184] + b"\1" + bytes(31),
    ):
        with refuses("invalid_record"):
            keys.check_encryption_public(bad)
        with refuses("invalid_record"):
            hpke.wrap(bad, b"info", b"text")


def test_did_and_fingerprint():
    did = keys.did_key(ALICE.public)
    assert did.startswith("did:key:z6Mk")
    groups = keys.fingerprint(ALICE.public).split("-")
    assert [len(group) for group in groups] == [4] * 6  # 120 bits
    assert keys.fingerprint(EVE.public) != keys.fingerprint(ALICE.public)
    with refuses("invalid_record"):
        keys.did_key(bytes(32))


def test_derived_keys_depend_on_everything():
    for derive in (keys.ver_key, keys.key_commit):
        values = [
            derive(bytes(32), bytes(16), 1, 2),
            derive(b"\1" * 32, bytes(16), 1, 2),
            derive(bytes(32), b"\1" * 16, 1, 2),
            derive(bytes(32), bytes(16), 2, 2),
            derive(bytes(32), bytes(16), 1, 1),
            derive(bytes(32), bytes(16), 2, 1),
        ]
        assert len({*values}) == len(values)
    assert keys.ver_key(bytes(32), bytes(16), 1, 2) != keys.key_commit(bytes(32), bytes(16), 1, 2)


# -- HPKE ------------------------------------------------------------------------------------------


def test_hpke_round_trip_and_refusals():
    sealed = hpke.wrap(BOB.public, b"info", b"text")
    assert len(sealed) == len(b"text") + hpke.OVERHEAD
    assert hpke.unwrap(BOB, b"info", sealed) == b"text"
    assert hpke.wrap(BOB.public, b"info", b"text") != sealed
    flipped = [
        sealed[:at] + bytes((sealed[at] ^ 1,)) + sealed[at + 1 :]
        for at in (0, 1087, 1088, 1119, 1120, -1 % len(sealed))
    ]
    cut = [b"", sealed[:100], sealed[:1120], sealed[:-1], sealed + b"\0"]
    zero_point = sealed[:1088] + bytes(32) + sealed[1120:]
    for bad in (*flipped, *cut, zero_point):
        with refuses("key_unwrap_failed"):
            hpke.unwrap(BOB, b"info", bad)
    with refuses("key_unwrap_failed"):
        hpke.unwrap(BOB, b"other", sealed)
    with refuses("key_unwrap_failed"):
        hpke.unwrap(EncryptionKey.generate(), b"info", sealed)


# -- the signed container --------------------------------------------------------------------------

payloads = st.dictionaries(st.text(max_size=5), st.binary(max_size=300) | st.integers(0, 9), max_size=4)


@given(payloads, st.sampled_from(["mk/head@1", "mk/ts@1", "t" * 24]))
@settings(max_examples=60)
def test_records_round_trip_and_are_standard_cose(payload, typ):
    payload = payload | {"t": typ}
    blob = cose.sign1(ALICE, typ, payload)
    assert cose.verify1(blob, TRUST, typ) == (payload, ALICE.kid)
    assert cose.peek1(blob, typ) == payload
    assert second_reader.verify(blob, typ, [ALICE.public]) == payload
    # The bytes are what a general COSE encoder makes (RFC 9052), section 4.4's structure is what is signed.
    protected = cbor2.dumps({1: -19, 4: ALICE.kid, 16: typ}, canonical=True)
    body = cbor.encode(payload)
    signature = ALICE.sign(cbor2.dumps(["Signature1", protected, b"", body], canonical=True))
    assert blob == cbor2.dumps([protected, {}, body, signature], canonical=True)


@pytest.mark.parametrize("size", [0, 1, 10, 11, 12, 230, 245, 246, 247, 65520, 65525, 65526, 65527, 70000])
def test_payload_lengths_at_the_edges_of_the_encoding(size):
    payload = {"t": "mk/x@1", "d": bytes(size)}
    blob = cose.sign1(ALICE, "mk/x@1", payload)
    assert cose.verify1(blob, TRUST, "mk/x@1")[0] == payload
    assert second_reader.verify(blob, "mk/x@1", [ALICE.public]) == payload


def resigned(protected=None, unprotected=None, payload=b"", signer=ALICE, typ="mk/head@1"):
    """A record whose parts are wrong on purpose but whose signature is right."""
    if protected is None:
        protected = cbor2.dumps({1: -19, 4: signer.kid, 16: typ}, canonical=True)
    signature = signer.sign(cbor2.dumps(["Signature1", protected, b"", payload], canonical=True))
    return cbor2.dumps([protected, unprotected or {}, payload, signature])


HEAD = cbor.encode({"t": "mk/head@1", "ver": 1})
GOOD = resigned(payload=HEAD)
PROTECTED = cbor2.dumps({1: -19, 4: ALICE.kid, 16: "mk/head@1"}, canonical=True)
CONTAINERS = {
    "other type": resigned(payload=cbor.encode({"t": "mk/stat@1"}), typ="mk/stat@1"),
    "other type of the same length": resigned(payload=HEAD, typ="mk/heaD@1"),
    "payload of another type": resigned(payload=cbor.encode({"t": "mk/roster@1"})),
    "payload without a type": resigned(payload=cbor.encode({"ver": 1})),
    "payload not a map": resigned(payload=cbor.encode(["mk/head@1"])),
    "payload not CBOR": resigned(payload=b"\xff"),
    "payload not canonical": resigned(payload=b"\xa2\x63ver\x01\x61t\x69mk/head@1"),
    "payload empty": resigned(payload=b""),
    "payload with a float": resigned(payload=cbor2.dumps({"t": "mk/head@1", "ver": 1.0})),
    "payload with a tag": resigned(payload=cbor2.dumps({"t": "mk/head@1", "c": cbor2.CBORTag(42, b"\0")})),
    "signed by a stranger": resigned(payload=HEAD, signer=EVE),
    "a stranger under the signer's kid": resigned(PROTECTED, payload=HEAD, signer=EVE),
    "unprotected header": resigned(unprotected={4: b"x"}, payload=HEAD),
    "unprotected kid": resigned(unprotected={4: ALICE.kid}, payload=HEAD),
    "EdDSA (-8) instead of -19": resigned(cbor2.dumps({1: -8, 4: ALICE.kid, 16: "mk/head@1"}), payload=HEAD),
    "no algorithm": resigned(cbor2.dumps({4: ALICE.kid, 16: "mk/head@1"}), payload=HEAD),
    "more protected": resigned(cbor2.dumps({1: -19, 4: ALICE.kid, 16: "mk/head@1", 99: 0}), payload=HEAD),
    "protected out of order": resigned(cbor2.dumps({4: ALICE.kid, 1: -19, 16: "mk/head@1"}), payload=HEAD),
    "protected not minimal": resigned(b"\xb8\x03" + PROTECTED[1:], payload=HEAD),
    "protected empty": resigned(b"", payload=HEAD),
    "type as bytes": resigned(cbor2.dumps({1: -19, 4: ALICE.kid, 16: b"mk/head@1"}), payload=HEAD),
    "kid too short": resigned(cbor2.dumps({1: -19, 4: ALICE.kid[:15], 16: "mk/head@1"}), payload=HEAD),
    "trailing byte": GOOD + b"\0",
    "leading byte": b"\0" + GOOD,
    "truncated": GOOD[:-1],
    "tagged (COSE_Sign1 is tag 18)": b"\xd2" + GOOD,
    "five parts": b"\x85" + GOOD[1:] + b"\xf6",
    "indefinite array": b"\x9f" + GOOD[1:] + b"\xff",
    "signature with a long head": GOOD[:-66] + b"\x59\x00\x40" + GOOD[-64:],
    "signature of another record": GOOD[:-64] + resigned(payload=cbor.encode({"t": "mk/head@1"}))[-64:],
    "signature zero": GOOD[:-64] + bytes(64),
    "empty": b"",
    "only the head": GOOD[:45],
    "payload with a long head": GOOD.replace(b"\x52" + HEAD, b"\x58\x12" + HEAD),
    "detached payload": cbor2.dumps([PROTECTED, {}, None, GOOD[-64:]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_that_are_refused(name):
    assert cose.verify1(GOOD, TRUST, "mk/head@1")[0] == {"t": "mk/head@1", "ver": 1}
    assert second_reader.verify(GOOD, "mk/head@1", [ALICE.public])
    with refuses("invalid_record"):
        cose.verify1(CONTAINERS[name], TRUST, "mk/head@1")
    with pytest.raises(second_reader.FormatError):
        second_reader.verify(CONTAINERS[name], "mk/head@1", [ALICE.public])


def test_signature_plus_group_order_is_refused():
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(GOOD[-32:], "little") + order
    with refuses("invalid_record", "signature"):
        cose.verify1(GOOD[:-32] + s.to_bytes(32, "little"), TRUST, "mk/head@1")


def test_only_bytes_of_bounded_size_are_looked_at():
    for bad in (bytearray(GOOD), None, "x", bytes((1 << 20) + 1)):
        with refuses("invalid_record", "bytes"):
            cose.verify1(bad, TRUST, "mk/head@1")
    with refuses("invalid_record", "large"):
        cose.sign1(ALICE, "mk/x@1", {"t": "mk/x@1", "d": bytes(1 << 20)})
    largest = cose.sign1(ALICE, "mk/x@1", {"t": "mk/x@1", "d": bytes((1 << 20) - 300)})
    assert cose.verify1(largest, TRUST, "mk/x@1")


def test_the_payload_names_its_type():
    with pytest.raises(ValueError):
        cose.sign1(ALICE, "mk/head@1", {"t": "mk/ts@1"})
    with pytest.raises(ValueError):
        cose.sign1(ALICE, "mk/head@1", {})


def test_every_bit_of_a_record_counts():
    for at in range(len(GOOD)):
        for bit in range(8):
            bad = bytearray(GOOD)
            bad[at] ^= 1 << bit
            assert attempt("invalid_record", cose.verify1, bytes(bad), TRUST, "mk/head@1") is None, (at, bit)


def test_a_stranger_is_named_as_the_reason():
    with refuses("invalid_record", "may not sign"):
        cose.verify1(GOOD, {}, "mk/head@1")


@given(st.data())
@settings(max_examples=300)
def test_no_mutation_of_a_record_verifies(data):
    bad = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        at = data.draw(st.integers(0, len(bad) - 1)) if bad else 0
        if how == "flip" and bad:
            bad[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del bad[at : at + data.draw(st.integers(1, 5))]
        elif how == "insert":
            bad[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        else:
            bad[at:at] = bad[at : at + 9]
    bad = bytes(bad)
    found = attempt("invalid_record", cose.verify1, bad, TRUST, "mk/head@1")
    assert found is None or bad == GOOD


@given(st.binary(max_size=120))
def test_random_bytes_are_no_record(data):
    for call in (cose.peek1, lambda blob, typ: cose.verify1(blob, TRUST, typ)):
        assert attempt("invalid_record", call, data, "mk/head@1") is None


def test_record_hash():
    blob = os.urandom(99)
    assert cose.record_hash(blob) == hashlib.sha256(blob).digest()
