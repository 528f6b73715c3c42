"""Key release, the format: two halves of a key, capsules of version 2, deposits and releases."""

import dataclasses
import os

import pytest
import second_reader
from core_support import vectors

from meshkitfs.core import _unwrap, cose, hpke, release
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.records import Capsule, make_capsule
from meshkitfs.core.release import Deposit, EpochSecret, Release, ReleaseKey, ReleaseService
from meshkitfs.errors import MeshkitError

ALICE, EVE = SigningKey.generate(), SigningKey.generate()
SERVICE = SigningKey.generate()
BOB, SEAL = EncryptionKey.generate(), EncryptionKey.generate()
TRUST = {ALICE.kid: ALICE.public}
WHERE = ReleaseService("https://keys.example", SERVICE.public)
SHARE, OID = os.urandom(16), os.urandom(16)
SECRET = EpochSecret(SHARE, 3, os.urandom(32), WHERE)
NOW = 1_800_000_000
LIVE = {
    "id": os.urandom(16), "grant": "live", "share": SHARE, "oid": OID, "epoch": 3, "nbf": NOW,
    "exp": NOW + 1000, "seq": 1, "rights": ["read"], "rel": WHERE.header("half"),
}  # fmt: skip
MANIFEST_KEY = os.urandom(32)
SNAPSHOT = LIVE | {"grant": "snapshot", "ver": 5, "root": os.urandom(32)}


def half_capsule(header=LIVE, to=BOB):
    return make_capsule(ALICE, header, SECRET.key, to.public, SECRET.capsule_half)


def parsed(blob):
    return Capsule.parse(blob, TRUST)


def code_of(function, *args):
    with pytest.raises(MeshkitError) as caught:
        function(*args)
    return caught.value.code


def answer(capsule, half, nonce, **changes):
    record = Release(capsule.share, capsule.digest, capsule.epoch, capsule.to, nonce, NOW, NOW + 300)
    return dataclasses.replace(record, **changes).sealing(half, BOB.public).sign(SERVICE)


# == the vectors =====================================================================================


def test_published_halves():
    v = vectors("release.json")
    seed, share, epoch = bytes.fromhex(v["seed"]), bytes.fromhex(v["share"]), v["epoch"]
    capsule_half, release_half = second_reader.halves(seed, share, epoch)
    assert (capsule_half.hex(), release_half.hex()) == (v["capsule_half"], v["release_half"])
    assert second_reader.joined(capsule_half, release_half, share, epoch).hex() == v["epoch_key"]
    mask = second_reader.expand(release_half, b"mk/rs@1\0" + bytes.fromhex(v["snapshot"]["capsule"]))
    assert mask.hex() == v["snapshot"]["mask"]
    service, record = bytes.fromhex(v["service"]), bytes.fromhex(v["record"])
    assert second_reader.verify(record, "mk/rkey@1", [service])["enc"] == (
        ReleaseKey.parse(record, {kid_of(service): service}).enc
    )


def test_the_frozen_capsules_deposit_and_release_open():
    """Made once by the first program that wrote them; they must open for ever, in both readers."""
    f = {name: bytes.fromhex(value) for name, value in vectors("frozen_release.json").items()}
    owner = {kid_of(f["owner"]): f["owner"]}
    recipient, service = (
        EncryptionKey.from_seed(f["recipient_seed"]),
        EncryptionKey.from_seed(f["service_seed"]),
    )
    capsule = Capsule.parse(f["capsule"], owner)
    nonce = Release.parse(f["release"], {kid_of(f["service"]): f["service"]}).nonce
    half, _ = _unwrap.open_release(f["release"], capsule, capsule.digest, nonce, recipient)
    assert half == Deposit.parse(f["deposit"], owner).open(service)
    assert _unwrap.open_capsule(capsule, recipient, half) == f["key"]
    assert _unwrap.open_secret(Capsule.parse(f["whole"], owner), recipient).key == f["key"]
    expected = {"share": capsule.share, "capsule": capsule.digest, "epoch": 7, "nonce": nonce}
    theirs = second_reader.open_release(f["recipient_seed"], f["release"], f["service"], expected)
    assert theirs == half == second_reader.open_deposit(f["service_seed"], f["deposit"], f["owner"])[2]
    for name, given in (("capsule", half), ("whole", None)):
        assert second_reader.open_capsule(f["recipient_seed"], f[name], f["owner"], given)[1] == f["key"]


# == halves ==========================================================================================


def test_both_halves_make_the_key_and_neither_is_it():
    """Of one half, changed in any bit, another key comes; so each of them counts."""
    whole = {SECRET.key, SECRET.raw, SECRET.capsule_half, SECRET.release_half}
    assert len(whole) == 4
    other = bytes([SECRET.release_half[0] ^ 1]) + SECRET.release_half[1:]
    assert release.epoch_key(SECRET.capsule_half, other, SHARE, 3) != SECRET.key
    other = bytes([SECRET.capsule_half[0] ^ 1]) + SECRET.capsule_half[1:]
    assert release.epoch_key(other, SECRET.release_half, SHARE, 3) != SECRET.key
    # Bound to the share and the epoch: halves of the same seed elsewhere are other halves.
    for share, epoch in ((os.urandom(16), 3), (SHARE, 4)):
        there = EpochSecret(share, epoch, SECRET.raw, WHERE)
        assert len(whole | {there.key, there.capsule_half, there.release_half}) == 7
    assert SECRET.raw.hex() not in repr(SECRET)


def test_a_capsule_with_half_of_the_key():
    blob = half_capsule()
    capsule = parsed(blob)
    assert (capsule.v, capsule.t, capsule.rel["url"]) == (2, "mk/cap@2", "https://keys.example")
    assert capsule.service == WHERE
    assert _unwrap.open_capsule(capsule, BOB, SECRET.release_half) == SECRET.key
    assert second_reader.open_capsule(BOB.seed, blob, ALICE.public, SECRET.release_half)[1] == SECRET.key
    # What is in it is not the key, and no more than the half.
    assert hpke.unwrap(BOB, capsule.info, capsule.wrap) == SECRET.capsule_half
    for wrong in (b"", bytes(32), SECRET.capsule_half, SECRET.key, SECRET.release_half[:31]):
        assert code_of(_unwrap.open_capsule, capsule, BOB, wrong) == "key_unwrap_failed"
        with pytest.raises(second_reader.FormatError):
            second_reader.open_capsule(BOB.seed, blob, ALICE.public, wrong or None)
    assert code_of(_unwrap.open_secret, capsule, BOB) == "right_not_granted"
    assert code_of(_unwrap.open_capsule, capsule, SEAL, SECRET.release_half) == "recipient_not_authorized"


def test_the_owners_own_capsule_needs_nobody():
    blob = make_capsule(ALICE, LIVE | {"rel": WHERE.header("whole")}, SECRET.key, BOB.public, SECRET.raw)
    capsule = parsed(blob)
    assert _unwrap.open_capsule(capsule, BOB) == SECRET.key
    assert _unwrap.open_secret(capsule, BOB) == SECRET
    assert second_reader.open_capsule(BOB.seed, blob, ALICE.public)[1] == SECRET.key


def test_a_snapshot_is_masked_for_its_capsule_alone():
    mask = release.released(SECRET.release_half, "snapshot", SNAPSHOT["id"])
    blob = make_capsule(ALICE, SNAPSHOT, MANIFEST_KEY, BOB.public, release.xor(MANIFEST_KEY, mask))
    capsule = parsed(blob)
    assert _unwrap.open_capsule(capsule, BOB, mask) == MANIFEST_KEY
    assert second_reader.open_capsule(BOB.seed, blob, ALICE.public, mask)[1] == MANIFEST_KEY
    elsewhere = release.released(SECRET.release_half, "snapshot", os.urandom(16))
    for wrong in (elsewhere, SECRET.release_half):
        assert code_of(_unwrap.open_capsule, capsule, BOB, wrong) == "key_unwrap_failed"
    seeded = SNAPSHOT | {"rel": WHERE.header("whole")}
    assert code_of(make_capsule, ALICE, seeded, MANIFEST_KEY, BOB.public, bytes(32)) == "invalid_record"


def test_each_version_has_exactly_its_fields():
    blob = half_capsule()
    header = dict(cose.peek1(blob, "mk/cap@2")["h"])
    wrap = cose.peek1(blob, "mk/cap@2")["w"]

    def signed(typ, header):
        return cose.sign1(ALICE, typ, {"t": typ, "h": header, "w": wrap})

    assert parsed(signed("mk/cap@2", header)).rel
    without = {name: value for name, value in header.items() if name != "rel"}
    for typ, bad in (
        ("mk/cap@2", without),
        ("mk/cap@2", header | {"rel": None}),
        ("mk/cap@2", header | {"v": 1}),
        ("mk/cap@2", header | {"t": "mk/cap@1"}),
        ("mk/cap@2", header | {"more": 1}),
        ("mk/cap@2", header | {"rel": {"key": bytes(32), "part": "none", "url": "u"}}),
        ("mk/cap@2", header | {"rel": {"key": bytes(31), "part": "half", "url": "u"}}),
        ("mk/cap@2", header | {"rel": {"key": bytes(32), "part": "half", "url": ""}}),
        ("mk/cap@2", header | {"rel": {"key": bytes(32), "part": "half"}}),
        ("mk/cap@1", header),
        ("mk/cap@1", header | {"v": 1, "t": "mk/cap@1"}),
        ("mk/cap@1", without | {"v": 2}),
    ):
        assert code_of(parsed, signed(typ, bad)) == "invalid_record", bad
    assert code_of(parsed, cose.sign1(EVE, "mk/cap@2", {"t": "mk/cap@2", "h": header, "w": wrap})) == (
        "invalid_record"
    )
    # What needs no release is written as before.
    plain = {name: value for name, value in LIVE.items() if name != "rel"}
    assert parsed(make_capsule(ALICE, plain, SECRET.key, BOB.public)).t == "mk/cap@1"


def test_an_edited_header_does_not_open_even_signed_again():
    """The owner of another service cannot be put into a capsule, not even by who could sign it."""
    blob = half_capsule()
    payload = cose.peek1(blob, "mk/cap@2")
    for changed in ({"key": EVE.public, "part": "half", "url": "u"}, WHERE.header("whole")):
        header = payload["h"] | {"rel": changed}
        again = cose.sign1(ALICE, "mk/cap@2", {"t": "mk/cap@2", "h": header, "w": payload["w"]})
        assert code_of(_unwrap.open_capsule, parsed(again), BOB, SECRET.release_half) == "key_unwrap_failed"


# == deposits ========================================================================================


def test_a_deposit_opens_for_the_service_only():
    blob = SECRET.deposit(SEAL.public).sign(ALICE)
    deposit = Deposit.parse(blob, TRUST)
    assert deposit.open(SEAL) == SECRET.release_half
    assert second_reader.open_deposit(SEAL.seed, blob, ALICE.public) == (SHARE, 3, SECRET.release_half)
    assert code_of(deposit.open, BOB) == "key_unwrap_failed"
    for changes in ({"epoch": 4}, {"share": bytes(16)}, {"to": bytes(16)}):
        assert code_of(dataclasses.replace(deposit, **changes).open, SEAL) == "key_unwrap_failed"
    assert code_of(Deposit.parse, blob, {EVE.kid: EVE.public}) == "invalid_record"
    assert SECRET.release_half not in blob


# == releases ========================================================================================


def test_a_release_is_an_answer_to_one_question():
    capsule, nonce = parsed(half_capsule()), os.urandom(16)
    good = answer(capsule, SECRET.release_half, nonce)
    half, said = _unwrap.open_release(good, capsule, capsule.digest, nonce, BOB)
    assert half == SECRET.release_half
    assert (said.iat, said.exp) == (NOW, NOW + 300)
    other = parsed(half_capsule(LIVE | {"id": os.urandom(16)}))
    for args in (
        (good, capsule, capsule.digest, os.urandom(16), BOB),  # replayed
        (good, other, other.digest, nonce, BOB),  # for another capsule
        (good, capsule, capsule.digest, nonce, SEAL),  # for somebody else
        (answer(capsule, SECRET.release_half, nonce, epoch=2), capsule, capsule.digest, nonce, BOB),
        (answer(capsule, SECRET.release_half, nonce, share=bytes(16)), capsule, capsule.digest, nonce, BOB),
        (good[:-1] + bytes([good[-1] ^ 1]), capsule, capsule.digest, nonce, BOB),
    ):
        assert code_of(_unwrap.open_release, *args) == "invalid_record"
    record = Release(SHARE, capsule.digest, 3, BOB.kid, nonce, NOW, NOW + 300)
    by_eve = record.sealing(SECRET.release_half, BOB.public).sign(EVE)
    assert code_of(_unwrap.open_release, by_eve, capsule, capsule.digest, nonce, BOB) == "invalid_record"
    # Its end cannot be moved: the half is sealed to all that is said.
    parts = Release.parse(good, {SERVICE.kid: SERVICE.public})
    longer = dataclasses.replace(parts, exp=NOW + 900).sign(SERVICE)
    assert code_of(_unwrap.open_release, longer, capsule, capsule.digest, nonce, BOB) == "key_unwrap_failed"


@pytest.mark.parametrize(
    "times", [(NOW, NOW), (NOW + 1, NOW), (NOW, NOW + 3601)], ids=["no time", "back", "for too long"]
)
def test_a_release_is_for_a_while(times):
    record = Release(SHARE, bytes(32), 3, BOB.kid, bytes(16), *times)
    assert code_of(record.sealing(bytes(32), BOB.public).sign, SERVICE) == "invalid_record"
