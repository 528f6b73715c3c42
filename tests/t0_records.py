"""Heads, rosters, timestamps, retention records, capsules, identity records and letters."""

import dataclasses

import pytest
import second_reader
from core_support import attempt, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs.core import _unwrap, cbor, cose, hpke, letter, records
from meshkitfs.core.blocks import frame
from meshkitfs.core.capsule import WRAP_SIZE, capsule_info
from meshkitfs.core.identity_record import Endorsement, IdentityRecord, first_record, rotate, valid_handle
from meshkitfs.core.keys import EncryptionKey, SigningKey, key_commit, kid_of
from meshkitfs.core.records import (
    Capsule,
    Head,
    Letter,
    Retention,
    Roster,
    Timestamp,
    make_capsule,
    verify_chain,
)

ALICE, BOB, EVE = (SigningKey.from_seed(bytes((n,)) * 32) for n in (1, 2, 3))
BOB_ENC, EVE_ENC, ALICE_ENC = (EncryptionKey.from_seed(bytes((n,)) * 32) for n in (4, 5, 6))
TRUST = {ALICE.kid: ALICE.public}
SHARE, OID, NOW, KEY = b"s" * 16, b"o" * 16, 1_800_000_000, b"k" * 32
POINT = ALICE.public

HEAD = Head(SHARE, OID, 1, 2, b"p" * 32, b"r" * 32, NOW)
ROSTER = Roster(SHARE, OID, 3, 1, (b"c" * 32,), (ALICE.public, BOB.public), 1, NOW, NOW + 9, (EVE.public,))
STAMP = Timestamp(SHARE, b"h" * 32, NOW, NOW + 300)
RETENTION = Retention(SHARE, 2, (1, 3, NOW, 4, 4, NOW + 5, 9, 20, NOW), NOW + 5)
RECORDS = {"head": HEAD, "roster": ROSTER, "timestamp": STAMP, "retention": RETENTION}


@pytest.mark.parametrize("name", RECORDS)
def test_records_round_trip(name):
    record = RECORDS[name]
    blob = record.sign(ALICE)
    parsed = type(record).parse(blob, TRUST)
    assert parsed == record
    assert (parsed.signer, parsed.digest) == (ALICE.kid, cose.record_hash(blob))
    assert parsed.sign(ALICE) == blob
    assert second_reader.verify(blob, record.TYPE, [ALICE.public])
    assert (record.signer, record.digest) == (b"", b"")


def test_a_head_names_its_writer():
    assert Head.parse(HEAD.sign(BOB), {BOB.kid: BOB.public}).writer == BOB.kid


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_a_stranger_or_of_another_type_are_refused(name):
    record = RECORDS[name]
    with refuses("invalid_record"):
        type(record).parse(record.sign(EVE), TRUST)
    with refuses("invalid_record"):
        type(record).parse(record.sign(ALICE), {ALICE.kid: EVE.public})
    for other in RECORDS.values():
        if other is not record:
            with refuses("invalid_record"):
                type(other).parse(record.sign(ALICE), TRUST)


BAD_FIELDS = [
    ("head", {"share": SHARE[:15]}), ("head", {"share": "s" * 16}), ("head", {"oid": b""}),
    ("head", {"epoch": 0}), ("head", {"epoch": True}), ("head", {"ver": 0}), ("head", {"ver": -1}),
    ("head", {"ver": 2**53}), ("head", {"prev": b""}), ("head", {"prev": b"p" * 31}), ("head", {"ver": 1}),
    ("head", {"root": b""}), ("head", {"root": b"r" * 33}), ("head", {"ts": -1}), ("head", {"ts": 2**41}),
    ("head", {"ts": None}),
    ("roster", {"seq": 0}), ("roster", {"epoch": 0}), ("roster", {"caps": [b"c" * 31]}),
    ("roster", {"caps": None}),
    ("roster", {"caps": [b"c" * 32] * 2}), ("roster", {"caps": ["c" * 32]}), ("roster", {"share": b"x"}),
    ("roster", {"oid": b"x"}), ("roster", {"caps": [n.to_bytes(32, "big") for n in range(10_001)]}),
    ("roster", {"writers": [bytes(32)]}), ("roster", {"writers": [b"\1" + bytes(31)]}),
    ("roster", {"writers": [None]}),
    ("roster", {"writers": [[POINT]]}), ("roster", {"writers": [POINT] * 2}), ("roster", {"minver": -1}),
    ("roster", {"iat": NOW + 9}), ("roster", {"exp": NOW - 1}), ("roster", {"timestamp_keys": [bytes(32)]}),
    ("roster", {"timestamp_keys": POINT}), ("roster", {"iat": "0"}), ("roster", {"exp": 1.5}),
    ("timestamp", {"share": b""}), ("timestamp", {"roster": b""}), ("timestamp", {"roster": b"h" * 16}),
    ("timestamp", {"exp": NOW}), ("timestamp", {"iat": -5}), ("timestamp", {"exp": None}),
    ("retention", {"share": b""}), ("retention", {"seq": 0}), ("retention", {"iat": -1}),
    ("retention", {"pruned": None}), ("retention", {"pruned": [1, 2]}), ("retention", {"pruned": [[1, 2, NOW]]}),
    ("retention", {"pruned": [0, 2, NOW]}), ("retention", {"pruned": [3, 2, NOW]}),  # empty
    ("retention", {"pruned": [-1, 2, NOW]}), ("retention", {"pruned": [1, 2, -1]}),
    ("retention", {"pruned": [1, 2, 2**41]}), ("retention", {"pruned": [1, 2**53, NOW]}),
    ("retention", {"pruned": [1, 3, NOW, 3, 5, NOW]}),  # overlap
    ("retention", {"pruned": [4, 5, NOW, 1, 2, NOW]}),  # order
    ("retention", {"pruned": [1, 1, NOW, 1, 1, NOW]}), ("retention", {"pruned": [True, 2, NOW]}),
    ("retention", {"pruned": [1.0, 2, NOW]}), ("retention", {"pruned": ["1", 2, NOW]}),
    ("retention", {"pruned": [n for i in range(1, 10_002) for n in (i, i, NOW)]}),
]  # fmt: skip


def signed_payload(record, **changes):
    """The record as somebody with the right key and the wrong program would sign it."""
    payload = {key: item for key, item in (record.payload() | changes).items() if item is not ...}
    # What the encoder itself refuses (None) cannot be signed by any program of ours.
    return attempt("invalid_record", cose.sign1, ALICE, record.TYPE, payload)


@pytest.mark.parametrize(("name", "changes"), BAD_FIELDS)
def test_fields_that_are_refused(name, changes):
    record = RECORDS[name]
    blob = signed_payload(record, **changes)
    if blob is not None:
        with refuses("invalid_record"):
            type(record).parse(blob, TRUST)
    with refuses("invalid_record"):
        dataclasses.replace(record, **changes).sign(ALICE)


@pytest.mark.parametrize("name", RECORDS)
def test_missing_and_unknown_fields_are_refused(name):
    record = RECORDS[name]
    for field in record.FIELDS:
        with refuses("invalid_record", "fields"):
            type(record).parse(signed_payload(record, **{field: ...}), TRUST)
    with refuses("invalid_record", "fields"):
        type(record).parse(signed_payload(record, more=1), TRUST)


def test_both_readers_agree_on_what_was_given_up():
    full = [n for i in range(1, 10_001) for n in (2 * i, 2 * i, NOW)]
    for flat in ([], [1, 1, 0], [1, 3, NOW, 4, 4, NOW + 5], full):
        record = dataclasses.replace(RETENTION, pruned=tuple(flat))
        blob = record.sign(ALICE)
        ranges = Retention.parse(blob, TRUST).ranges()
        assert ranges == second_reader.given_up(blob, ALICE.public)
        assert [n for part in ranges for n in part] == flat
    for name, changes in BAD_FIELDS:
        blob = signed_payload(RETENTION, **changes) if name == "retention" else None
        if blob is not None:
            with pytest.raises(second_reader.FormatError):
                second_reader.given_up(blob, ALICE.public)


def test_the_first_head_has_no_predecessor():
    first = dataclasses.replace(HEAD, ver=1, prev=b"")
    assert Head.parse(first.sign(ALICE), TRUST) == first


@given(st.sampled_from(sorted(RECORDS)), st.data())
@settings(max_examples=150)
def test_a_mutated_record_is_refused(name, data):
    record = RECORDS[name]
    blob = bytearray(record.sign(ALICE))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert attempt("invalid_record", type(record).parse, bytes(blob), TRUST) is None


# -- capsules --------------------------------------------------------------------------------------

LIVE = {
    "id": b"i" * 16, "grant": "live", "share": SHARE, "oid": OID, "epoch": 1, "nbf": NOW, "exp": NOW + 3600,
    "seq": 3, "rights": ["read", "list"],
}  # fmt: skip
RULED = LIVE | {"pol": {"id": "office", "rules": "permit(principal, action, resource);", "who": "bob"}}
SNAPSHOT = LIVE | {"grant": "snapshot", "ver": 5, "root": b"r" * 32, "kind": 1}
FULL = LIVE | {
    "pol": {"id": "policy-9", "key": b"\7" * 32, "url": "https://pdp.example/"}, "vault": "crew",
    "cap": "biscuit", "offline_grace": 60, "minver": 4,
}  # fmt: skip


@pytest.mark.parametrize("header", [LIVE, SNAPSHOT, FULL, RULED])
def test_a_capsule_gives_its_key_to_its_recipient(header):
    blob = make_capsule(ALICE, header, KEY, BOB_ENC.public)
    capsule = Capsule.parse(blob, TRUST)
    for name, value in header.items():
        assert getattr(capsule, name) == (tuple(sorted(value)) if name == "rights" else value)
    assert (capsule.frm, capsule.to, capsule.digest) == (ALICE.kid, BOB_ENC.kid, cose.record_hash(blob))
    assert capsule.kc == key_commit(KEY, OID, 1, header.get("ver", 0))
    assert len(capsule.wrap) == WRAP_SIZE == 1168
    assert _unwrap.open_capsule(capsule, BOB_ENC) == KEY
    assert second_reader.open_capsule(BOB_ENC.seed, blob, ALICE.public)[1] == KEY
    with refuses("recipient_not_authorized"):
        _unwrap.open_capsule(capsule, EVE_ENC)
    assert KEY.hex() not in repr(capsule)


def test_a_policy_needs_only_its_id():
    capsule = Capsule.parse(make_capsule(ALICE, LIVE | {"pol": {"id": "p"}}, KEY, BOB_ENC.public), TRUST)
    assert capsule.pol == {"id": "p", "key": None, "url": None}


def parts(blob):
    payload, _ = cose.verify1(blob, TRUST, "mk/cap@1")
    return payload["h"], payload["w"]


def rebuilt(header, wrap, signer=ALICE, **more):
    return cose.sign1(signer, "mk/cap@1", {"t": "mk/cap@1", "h": header, "w": wrap, **more})


EDITS = [
    {"exp": NOW + 10**6}, {"nbf": 0}, {"oid": b"x" * 16}, {"share": b"x" * 16}, {"epoch": 2}, {"seq": 9},
    {"rights": ["list", "read", "write"]}, {"id": b"x" * 16}, {"minver": 1}, {"vault": "other"}, {"cap": "x"},
    {"offline_grace": 10**6}, {"pol": {"id": "p", "key": None, "url": None}}, {"kind": 1},
    {"grant": "snapshot", "ver": 1, "root": b"r" * 32}, {"kc": b"x" * 32},
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_header_does_not_open_even_signed_again(edit):
    header, wrap = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    blob = rebuilt(header | edit, wrap)
    capsule = Capsule.parse(blob, TRUST)
    with refuses("key_unwrap_failed"):
        _unwrap.open_capsule(capsule, BOB_ENC)
    with pytest.raises(second_reader.FormatError):
        second_reader.open_capsule(BOB_ENC.seed, blob, ALICE.public)


def test_a_capsule_readdressed_to_another_key_does_not_open():
    header, wrap = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    capsule = Capsule.parse(rebuilt(header | {"to": EVE_ENC.kid}, wrap), TRUST)
    with refuses("key_unwrap_failed"):
        _unwrap.open_capsule(capsule, EVE_ENC)
    with refuses("recipient_not_authorized"):
        _unwrap.open_capsule(capsule, BOB_ENC)


def test_a_wrap_of_another_capsule_does_not_open():
    header, _ = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    _, wrap = parts(make_capsule(ALICE, LIVE | {"seq": 4}, KEY, BOB_ENC.public))
    with refuses("key_unwrap_failed"):
        _unwrap.open_capsule(Capsule.parse(rebuilt(header, wrap), TRUST), BOB_ENC)


def test_a_key_that_the_header_does_not_commit_to_is_refused():
    """A malicious owner who gives each recipient another key under one header (salamander)."""
    header, _ = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    wrap = hpke.wrap(BOB_ENC.public, capsule_info(header), b"x" * 32)
    blob = rebuilt(header, wrap)
    with refuses("key_unwrap_failed", "commit"):
        _unwrap.open_capsule(Capsule.parse(blob, TRUST), BOB_ENC)
    with pytest.raises(second_reader.FormatError):
        second_reader.open_capsule(BOB_ENC.seed, blob, ALICE.public)


@pytest.mark.parametrize("size", [0, 40, 1136, 1167, 1169])
def test_a_wrap_of_another_length_is_refused_before_any_key_touches_it(size):
    header, wrap = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    with refuses("invalid_record", "length"):
        Capsule.parse(rebuilt(header, (wrap + b"\0")[:size]), TRUST)
    with refuses("key_unwrap_failed", "length"):
        _unwrap.hpke_open((wrap + b"\0")[:size], BOB_ENC, capsule_info(header))
    with refuses("invalid_record"):
        Capsule.parse(rebuilt(header, "w" * 1168), TRUST)


BAD_HEADERS = [
    {"v": 2}, {"v": True}, {"t": "mk/cap@2"}, {"id": b"i"}, {"grant": "forever"}, {"kind": 2}, {"kind": True},
    {"share": b""}, {"oid": OID + b"o"}, {"epoch": 0}, {"ver": 1}, {"ver": -1}, {"root": b"r" * 32},
    {"root": b"r"}, {"nbf": -1}, {"exp": NOW}, {"exp": NOW - 1}, {"minver": -1}, {"seq": -1}, {"rights": []},
    {"rights": ["read", "list"]}, {"rights": ["list", "list"]}, {"rights": ["admin"]}, {"rights": "read"},
    {"rights": [["read"]]}, {"kc": b""},
    {"frm": EVE.kid}, {"frm": b""}, {"to": b""}, {"pol": {}}, {"pol": {"id": "p"}}, {"pol": "p"},
    {"pol": {"id": "", "key": None, "url": None}}, {"pol": {"id": "p", "key": b"k", "url": None}},
    {"pol": {"id": "p", "key": None, "url": 1}}, {"pol": {"id": "p", "key": None, "url": None, "x": 1}},
    {"pol": {"id": "p", "rules": "x"}}, {"pol": {"id": "p", "rules": "", "who": "b"}},
    {"pol": {"id": "p", "rules": "x" * 8193, "who": "b"}}, {"pol": {"id": "p", "rules": b"x", "who": "b"}},
    {"pol": {"id": "p", "rules": "x", "who": ""}}, {"pol": {"id": "p", "rules": None, "who": "b"}},
    {"pol": {"id": "p", "rules": "x", "who": "b", "key": None, "url": None}},
    {"vault": ""}, {"vault": "v" * 257}, {"vault": 1}, {"cap": ""}, {"cap": b"x"}, {"offline_grace": -1},
    {"offline_grace": 10**9}, {"more": 1}, {"exp": ...}, {"pol": ...}, {"grant": "snapshot"},
    {"grant": "snapshot", "ver": 1}, {"grant": "snapshot", "root": b"r" * 32},
]  # fmt: skip


@pytest.mark.parametrize("edit", BAD_HEADERS)
def test_headers_that_are_refused(edit):
    header, wrap = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    edited = {key: item for key, item in (header | edit).items() if item is not ...}
    with refuses("invalid_record"):
        Capsule.parse(rebuilt(edited, wrap), TRUST)


def test_capsules_of_another_shape_are_refused():
    header, wrap = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))
    assert Capsule.parse(rebuilt(header, wrap), TRUST)
    with refuses("invalid_record"):
        Capsule.parse(rebuilt(header, wrap, more=1), TRUST)
    for bad in (None, [], b"", "h"):
        with refuses("invalid_record"):
            Capsule.parse(rebuilt(bad, wrap), TRUST)
    with refuses("invalid_record"):
        Capsule.parse(make_capsule(EVE, LIVE, KEY, BOB_ENC.public), TRUST)
    # Eve signs what names Alice as its sender.
    with refuses("invalid_record", "sender"):
        Capsule.parse(rebuilt(header, wrap, EVE), {EVE.kid: EVE.public})


def test_what_a_caller_must_not_ask_for():
    for bad in ({"kc": b"k" * 32}, {"frm": EVE.kid}, {"to": EVE_ENC.kid}, {"v": 1}, {"t": "x"}):
        with pytest.raises(ValueError):
            make_capsule(ALICE, LIVE | bad, KEY, BOB_ENC.public)
    for key in (b"", KEY[:31], KEY + b"k"):
        with pytest.raises(ValueError):
            make_capsule(ALICE, LIVE, key, BOB_ENC.public)
    for bad in ({"rights": []}, {"exp": NOW}, {"ver": 1}, {"more": 1}, {"grant": "snapshot"}):
        with refuses("invalid_record"):
            make_capsule(ALICE, LIVE | bad, KEY, BOB_ENC.public)
    with refuses("invalid_record"):
        make_capsule(ALICE, LIVE, KEY, bytes(1216))


@given(st.data())
@settings(max_examples=60)
def test_a_mutated_wrap_never_opens(data):
    header, wrap = CAPSULE_PARTS
    bad = bytearray(wrap)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    capsule = Capsule.parse(rebuilt(header, bytes(bad)), TRUST)
    assert attempt("key_unwrap_failed", _unwrap.open_capsule, capsule, BOB_ENC) is None


CAPSULE_PARTS = parts(make_capsule(ALICE, LIVE, KEY, BOB_ENC.public))


# -- identities ------------------------------------------------------------------------------------


def identity(root, enc=ALICE_ENC, **changes):
    values = {
        "handle": "alice", "root": root.public, "sig": root.public, "enc": enc.public, "seq": 0, "prev": b"",
        "nbf": NOW, "exp": NOW + 9, "created": NOW,
    }  # fmt: skip
    return IdentityRecord(**(values | changes))


FIRST = first_record("alice", ALICE, ALICE_ENC.public, NOW, 9)


def test_a_first_record():
    record = IdentityRecord.parse_self_signed(FIRST)
    assert record == identity(ALICE)
    assert (record.kid, record.enc_kid) == (ALICE.kid, ALICE_ENC.kid)
    assert verify_chain([FIRST]) == record
    assert identity(ALICE).sign(ALICE) == FIRST


def test_a_chain_of_renewal_and_rotation():
    second = rotate(FIRST, ALICE, identity(ALICE, BOB_ENC), ALICE)
    third = rotate(second, ALICE, identity(BOB, BOB_ENC), BOB)
    fourth = rotate(third, BOB, identity(BOB, EVE_ENC), BOB)
    newest = verify_chain([FIRST, second, third, fourth])
    assert (newest.seq, newest.root, newest.enc, newest.rot) == (3, BOB.public, EVE_ENC.public, None)
    assert newest.prev == cose.record_hash(third)
    for broken in ([second], [FIRST, third], [FIRST, second, fourth], [FIRST, FIRST], [second, FIRST], []):
        with refuses("invalid_record"):
            verify_chain(broken)


def test_a_root_changes_only_with_the_old_roots_word():
    prev = cose.record_hash(FIRST)
    new = identity(EVE, seq=1, prev=prev)
    word = {"handle": "alice", "new": EVE.public, "seq": 1, "prev": prev}
    good = Endorsement(**word).sign(ALICE)
    assert verify_chain([FIRST, dataclasses.replace(new, rot=good).sign(EVE)]).root == EVE.public
    bad = {
        "none": None,
        "signed by the new root": Endorsement(**word).sign(EVE),
        "for another root": Endorsement(**(word | {"new": BOB.public})).sign(ALICE),
        "for another handle": Endorsement(**(word | {"handle": "eve"})).sign(ALICE),
        "for another seq": Endorsement(**(word | {"seq": 2})).sign(ALICE),
        "after another record": Endorsement(**(word | {"prev": b"x" * 32})).sign(ALICE),
        "a record of another type": FIRST[:1024],
    }
    for rot in bad.values():
        with refuses("invalid_record", "endorsed" if rot is None else ""):
            verify_chain([FIRST, dataclasses.replace(new, rot=rot).sign(EVE)])
    for rot in ("text", b"", [good]):
        blob = cose.sign1(EVE, "mk/id@1", new.payload() | {"rot": rot})
        with refuses("invalid_record", "rot"):
            IdentityRecord.parse_self_signed(blob)


@pytest.mark.parametrize(
    "changes",
    [{"seq": 2}, {"prev": b"x" * 32}, {"handle": "alicia"}, {"rot": b"x"}],
)
def test_successors_that_are_refused(changes):
    good = identity(ALICE, seq=1, prev=cose.record_hash(FIRST))
    assert verify_chain([FIRST, good.sign(ALICE)]) == good
    with refuses("invalid_record"):
        verify_chain([FIRST, dataclasses.replace(good, **changes).sign(ALICE)])


@pytest.mark.parametrize(
    "changes",
    [
        {"handle": "Alice"}, {"handle": ""}, {"handle": "a" * 65}, {"handle": "-a"}, {"handle": "a b"},
        {"handle": "\u0430lice"}, {"handle": b"alice"}, {"root": bytes(32)}, {"sig": b"\1" + bytes(31)},
        {"sig": b""}, {"enc": bytes(1216)}, {"enc": ALICE_ENC.public[:-1]}, {"seq": 1}, {"seq": -1},
        {"prev": b"x" * 32}, {"prev": b"x"}, {"nbf": NOW + 9}, {"exp": 0}, {"created": -1}, {"rot": b"x"},
        {"rot": b""}, {"rot": bytes(2000)},
    ],
)  # fmt: skip
def test_first_records_that_are_refused(changes):
    payload = identity(ALICE).payload() | changes
    blob = cose.sign1(ALICE, "mk/id@1", payload)
    with refuses("invalid_record"):
        IdentityRecord.parse_self_signed(blob)
    with refuses("invalid_record"):
        dataclasses.replace(identity(ALICE), **changes).sign(ALICE)


def test_a_record_is_signed_by_the_root_it_names():
    with refuses("invalid_record"):
        IdentityRecord.parse_self_signed(identity(ALICE).sign(EVE))
    # Signed by the signing key is not enough: that key is what the root certifies.
    with refuses("invalid_record"):
        IdentityRecord.parse_self_signed(identity(ALICE, sig=EVE.public).sign(EVE))
    assert IdentityRecord.parse_self_signed(identity(ALICE, sig=EVE.public).sign(ALICE)).kid == EVE.kid
    for bad in (b"", b"x", HEAD.sign(ALICE), cose.sign1(ALICE, "mk/id@1", {"t": "mk/id@1"})):
        with refuses("invalid_record"):
            IdentityRecord.parse_self_signed(bad)


def test_rotate_wants_the_right_keys():
    for old, new, new_root in (
        (EVE, identity(BOB), BOB),
        (ALICE, identity(BOB), EVE),
        (ALICE, identity(BOB, handle="bob"), BOB),
    ):
        with refuses("invalid_record"):
            rotate(FIRST, old, new, new_root)
    # A record that names another root than its signer has no successor either.
    with refuses("invalid_record"):
        rotate(identity(ALICE).sign(EVE), EVE, identity(BOB), BOB)


def test_a_chain_has_a_length_limit():
    with refuses("invalid_record", "1000"):
        verify_chain([FIRST] * 1001)


def test_handles():
    for good in ("a", "alice", "alice@example.org", "0", "a.b_c-d", "a" * 64):
        assert valid_handle(good)
    for bad in ("", ".a", "@a", "A", "a/b", "a\0", "a\n", "\u00e9", "a" * 65, None, b"a", 1):
        assert not valid_handle(bad)


# -- letters ---------------------------------------------------------------------------------------

CAPSULE = make_capsule(ALICE, LIVE, KEY, BOB_ENC.public)
LETTER = Letter(CAPSULE, FIRST, b"dr\xffafts", 0, 0o755, NOW, 0, "for you", NOW)


def test_a_letter_reaches_its_recipient():
    blob = records.seal_letter(ALICE, LETTER, BOB_ENC.public)
    opened = records.open_letter(BOB_ENC, blob)
    assert opened == LETTER
    assert (opened.sender.handle, opened.sender.kid, opened.offer.id) == ("alice", ALICE.kid, LIVE["id"])
    with refuses("key_unwrap_failed"):
        records.open_letter(EVE_ENC, blob)


def test_a_letter_shows_nothing_outside():
    blob = records.seal_letter(ALICE, LETTER, BOB_ENC.public)
    for secret in (b"dr\xffafts", b"alice", b"for you", ALICE.kid, ALICE.public, SHARE, LIVE["id"]):
        assert secret not in blob
    other = records.seal_letter(ALICE, dataclasses.replace(LETTER, note="f"), BOB_ENC.public)
    assert len(other) == len(blob)
    assert "drafts" not in repr(LETTER)
    assert "for you" not in repr(LETTER)


def sealed_by_hand(payload, signer=ALICE, to=BOB_ENC, info=None, framed=None):
    signed = cose.sign1(signer, letter.TYPE, payload)
    info = b"mk/letter@1\0" + to.kid if info is None else info
    return b"MKL1\x01" + hpke.wrap(to.public, info, frame(signed) if framed is None else framed)


def letter_payload(**changes):
    fields = ("capsule", "owner_record", "name", "kind", "mode", "mtime", "size", "note", "sent")
    payload = {"t": letter.TYPE, "to": BOB_ENC.kid} | {name: getattr(LETTER, name) for name in fields}
    return {key: item for key, item in (payload | changes).items() if item is not ...}


EVE_RECORD = first_record("eve", EVE, EVE_ENC.public, NOW, 9)
BAD_LETTERS = {
    "signed by somebody else than the record says": sealed_by_hand(letter_payload(), EVE),
    "somebody else's record": sealed_by_hand(letter_payload(owner_record=EVE_RECORD)),
    "somebody else's capsule, own record": sealed_by_hand(letter_payload(owner_record=EVE_RECORD), EVE),
    "capsule for somebody else": sealed_by_hand(
        letter_payload(capsule=make_capsule(ALICE, LIVE, KEY, EVE_ENC.public))
    ),
    "capsule of another kind": sealed_by_hand(letter_payload(kind=1)),
    "capsule that is none": sealed_by_hand(letter_payload(capsule=b"x")),
    "record that is none": sealed_by_hand(letter_payload(owner_record=b"x")),
    "record missing": sealed_by_hand(letter_payload(owner_record=...)),
    "record text": sealed_by_hand(letter_payload(owner_record="x")),
    "passed on from another recipient": sealed_by_hand(letter_payload(to=EVE_ENC.kid)),
    "unknown field": sealed_by_hand(letter_payload(more=1)),
    "missing field": sealed_by_hand(letter_payload(note=...)),
    "name with a slash": sealed_by_hand(letter_payload(name=b"../x")),
    "name dot dot": sealed_by_hand(letter_payload(name=b"..")),
    "name text": sealed_by_hand(letter_payload(name="x")),
    "mode with type": sealed_by_hand(letter_payload(mode=0o100644)),
    "mtime text": sealed_by_hand(letter_payload(mtime="0")),
    "mtime far away": sealed_by_hand(letter_payload(mtime=2**50)),
    "size negative": sealed_by_hand(letter_payload(size=-1)),
    "note too long": sealed_by_hand(letter_payload(note="n" * 4097)),
    "note bytes": sealed_by_hand(letter_payload(note=b"n")),
    "sent negative": sealed_by_hand(letter_payload(sent=-1)),
    "not framed": sealed_by_hand(letter_payload(), framed=cose.sign1(ALICE, letter.TYPE, letter_payload())),
    "other version": b"MKL1\x02" + sealed_by_hand(letter_payload())[5:],
    "only the magic": b"MKL1\x01",
    "empty": b"",
    "too long": b"MKL1\x01" + bytes(65536),
}


@pytest.mark.parametrize("name", BAD_LETTERS)
def test_letters_that_are_refused(name):
    assert records.open_letter(BOB_ENC, sealed_by_hand(letter_payload())) == LETTER
    with refuses("invalid_record"):
        records.open_letter(BOB_ENC, BAD_LETTERS[name])


def test_a_letter_sealed_for_another_purpose_does_not_open():
    for info in (b"", b"mk/letter@1\0", b"mk/cap@1\0" + BOB_ENC.kid):
        with refuses("key_unwrap_failed"):
            records.open_letter(BOB_ENC, sealed_by_hand(letter_payload(), info=info))


def test_letters_that_are_not_written():
    for changes in (
        {"name": b"a/b"},
        {"note": "n" * 5000},
        {"kind": 2},
        {"capsule": b""},
        {"note": "\ud800"},
    ):
        with refuses("invalid_record"):
            records.seal_letter(ALICE, dataclasses.replace(LETTER, **changes), BOB_ENC.public)
    with refuses("invalid_record"):
        records.seal_letter(ALICE, LETTER, bytes(1216))


def test_what_is_signed_is_canonical():
    for blob, typ in ((CAPSULE, "mk/cap@1"), (FIRST, "mk/id@1")):
        payload = cose.peek1(blob, typ)
        assert cbor.encode(payload) in blob
    assert kid_of(ALICE.public) == ALICE.kid
