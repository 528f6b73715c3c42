"""What a grant demands of its recipient's key vault: the format, and what meets a demand."""

import dataclasses

import pytest
import second_reader
from core_support import vectors

from meshkitfs import keyvault
from meshkitfs.core import _unwrap, cose
from meshkitfs.core.capsule import Capsule, make_capsule
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.release import EpochSecret, ReleaseService
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import DEMANDS, KeyVaultReport, unmet

ALICE, BOB, SERVICE = SigningKey.generate(), EncryptionKey.generate(), SigningKey.generate()
TRUST = {ALICE.kid: ALICE.public}
NOW = 1_800_000_000
KEY = bytes(range(32))
HEADER = {
    "id": bytes(16), "grant": "live", "share": bytes(16), "oid": bytes(16), "epoch": 3, "nbf": NOW,
    "exp": NOW + 1000, "seq": 1, "rights": ["read"],
}  # fmt: skip
WHERE = ReleaseService("https://keys.example", SERVICE.public)
CHIP = KeyVaultReport("tpm2", True, True, True, True, False, False, None, "a chip")


def parsed(blob):
    return Capsule.parse(blob, TRUST)


def refused(function, *args):
    with pytest.raises(MeshkitError) as caught:
        function(*args)
    assert caught.value.code == "invalid_record"


def demanding(*words, **more):
    return make_capsule(ALICE, HEADER | {"keyvault": list(words)} | more, KEY, BOB.public)


def test_the_frozen_capsules_open():
    """Made once by the first program that wrote them; they must open for ever, in both readers."""
    f = {name: bytes.fromhex(value) for name, value in vectors("frozen_strength.json").items()}
    owner, recipient = {kid_of(f["owner"]): f["owner"]}, EncryptionKey.from_seed(f["recipient_seed"])
    for name, half in (("capsule", b""), ("halved", f["half"])):
        capsule = Capsule.parse(f[name], owner)
        assert capsule.keyvault == ("hardware_backed", "persistent")
        assert (capsule.v, capsule.t, capsule.rel is None) == (3, "mk/cap@3", not half)
        assert _unwrap.open_capsule(capsule, recipient, half) == f["key"]
        header, key = second_reader.open_capsule(f["recipient_seed"], f[name], f["owner"], half or None)
        assert (key, header["keyvault"]) == (f["key"], list(capsule.keyvault))


def test_a_capsule_is_of_the_lowest_version_that_says_it():
    assert parsed(demanding("persistent", "hardware_backed")).keyvault == ("hardware_backed", "persistent")
    plain = parsed(demanding())
    assert (plain.t, plain.keyvault) == ("mk/cap@1", ())
    secret = EpochSecret(HEADER["share"], 3, KEY, WHERE)
    halved = HEADER | {"rel": WHERE.header("half"), "keyvault": ["persistent"]}
    both = parsed(make_capsule(ALICE, halved, secret.key, BOB.public, secret.capsule_half))
    assert (both.t, both.service) == ("mk/cap@3", WHERE)
    assert _unwrap.open_capsule(both, BOB, secret.release_half) == secret.key
    # A word of a later version is taken in, so that the gate can say what is wrong.
    assert parsed(demanding("quantum")).keyvault == ("quantum",)


def test_a_demand_cannot_be_stripped_or_left_out():
    """Also not by a signature of the owner's key: the key is wrapped to the header as it was."""
    blob = demanding("hardware_backed", "persistent")
    payload = cose.peek1(blob, "mk/cap@3")
    header = dict(payload["h"])

    def signed(typ, header):
        return cose.sign1(ALICE, typ, {"t": typ, "h": header, "w": payload["w"]})

    without = {name: value for name, value in header.items() if name not in ("keyvault", "rel")}
    for typ, bad in (
        ("mk/cap@3", header | {"keyvault": []}),
        ("mk/cap@3", header | {"keyvault": ["persistent", "hardware_backed"]}),
        ("mk/cap@3", header | {"keyvault": ["persistent", "persistent"]}),
        ("mk/cap@3", header | {"keyvault": ["x" * 65]}),
        ("mk/cap@3", header | {"keyvault": [""]}),
        ("mk/cap@3", header | {"keyvault": [1]}),
        ("mk/cap@3", header | {"keyvault": None}),
        ("mk/cap@3", header | {"keyvault": [f"word {n}" for n in range(9)]}),
        ("mk/cap@3", header | {"more": 1}),
        ("mk/cap@3", without | {"rel": None}),
        ("mk/cap@3", without | {"keyvault": ["persistent"]}),
        # What a program that knows versions 1 and 2 only is shown: it refuses, and does not ignore.
        ("mk/cap@1", header | {"v": 1, "t": "mk/cap@1"}),
        ("mk/cap@1", without | {"v": 1, "t": "mk/cap@1", "keyvault": ["persistent"]}),
        ("mk/cap@2", header | {"v": 2, "t": "mk/cap@2", "rel": WHERE.header("half")}),
    ):
        refused(parsed, signed(typ, bad))
        with pytest.raises(second_reader.FormatError):
            second_reader.open_capsule(BOB.seed, signed(typ, bad), ALICE.public)
    for typ, weaker in (
        ("mk/cap@1", without | {"v": 1, "t": "mk/cap@1"}),
        ("mk/cap@3", header | {"keyvault": ["persistent"]}),
    ):
        with pytest.raises(MeshkitError) as caught:
            _unwrap.open_capsule(parsed(signed(typ, weaker)), BOB)
        assert caught.value.code == "key_unwrap_failed"
    with pytest.raises(MeshkitError) as caught:
        demanding("a", "a")
    assert caught.value.code == "invalid_record"


def test_a_demand_is_met_by_what_is_known_and_by_nothing_else():
    assert unmet(CHIP, ["hardware_backed", "persistent"]) == ""
    assert unmet(CHIP, []) == ""
    for claims in (
        {"hardware_backed": False},
        {"hardware_backed": None},  # not known is not yes
        {"hardware_backed": 1},
        {"available": False},  # what it would give if it were there
        {"session_cache": "kernel"},  # a copy that no chip holds
    ):
        assert "hardware_backed" in unmet(dataclasses.replace(CHIP, **claims), ["hardware_backed"])
    for word in DEMANDS:
        assert unmet(KeyVaultReport.absent("tpm2", None, "gone"), [word])
    assert "not_exportable" in unmet(CHIP, ["persistent", "not_exportable"])
    assert "does not know" in unmet(CHIP, ["quantum"])
    # A session's copy is the vault's in this: it ends, and the vault stays.
    assert unmet(dataclasses.replace(CHIP, session_cache="kernel"), ["persistent"]) == ""
    # One that stands in for a stronger kind gives what it is.
    stand_in = KeyVaultReport("plain-file", True, True, True, False, False, False, "tpm2", "a file")
    assert "plain-file" in unmet(stand_in, ["hardware_backed"])
    with pytest.raises(MeshkitError) as caught:
        keyvault.require(stand_in, ["hardware_backed"])
    assert caught.value.code == "keyvault_too_weak"
