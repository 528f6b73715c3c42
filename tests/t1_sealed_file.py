"""Files with an identity in them: what is not whole, not of this kind or not for this key opens nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pytest
import trio

from meshkitfs import keyvault
from meshkitfs.cli._words import ask_words, words_of
from meshkitfs.core import cbor
from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.core.memory import PART, open_memory, seal_memory
from meshkitfs.daemon import carrying, remembering, sealed_file
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import create_identity, prepared, promoted, seal_identity
from meshkitfs.keyvault._passphrase_file import FLOOR, Cost
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.state import Mark, ShareRow, State
from meshkitfs.state._carried import _TABLES, STAYS

PHRASE = "a phrase for the tests"


@contextlib.contextmanager
def refused(code):
    with pytest.raises(MeshkitError) as caught:
        yield caught
    assert caught.value.code == code, caught.value


def content():
    key = os.urandom(32)
    return {
        "t": "mk/identity-export@1",
        "made": 1_800_000_000,
        "key": key,
        "identity": seal_identity(create_identity("alice", int(time.time())), key),
        "stores": '{"version": 1, "identity": "alice"}',
        "state": {},
    }


def export(place, phrase=PHRASE, cost=FLOOR):
    key = os.urandom(32)
    header = keyvault.seal_with_passphrase(phrase, key, cost)
    sealed = sealed_file.seal(sealed_file.EXPORT, header, key, content())
    place.write_bytes(sealed_file.finish(sealed_file.EXPORT, header, sealed))
    return header, sealed


def recovery(place):
    words, salt = os.urandom(32), os.urandom(32)
    sealed = sealed_file.seal(sealed_file.RECOVERY, salt, sealed_file.recovery_key(words, salt), content())
    place.write_bytes(sealed_file.finish(sealed_file.RECOVERY, salt, sealed))
    return words


def opened(place, phrase=PHRASE):
    return sealed_file.open_export(place, lambda: phrase)


def never():
    raise AssertionError("it was asked for a secret")


# -- files ------------------------------------------------------------------------------------------------


def test_an_export_opens_with_its_passphrase_only(tmp_path):
    place = tmp_path / "file"
    export(place)
    assert carrying.opened(opened(place)).identity.handle == "alice"
    assert b"alice" not in place.read_bytes()
    with refused("wrong_passphrase") as caught:
        opened(place, "another phrase for it")
    assert "another" not in str(caught.value)


def test_a_recovery_file_opens_with_its_words_only(tmp_path):
    place = tmp_path / "file"
    words = recovery(place)
    assert carrying.opened(sealed_file.open_recovery(place, lambda: bytes(bytearray(words)))).made
    with refused("wrong_words"):
        sealed_file.open_recovery(place, lambda: os.urandom(32))


def test_what_is_cut_short_or_changed_is_said_before_anybody_is_asked(tmp_path):
    place = tmp_path / "file"
    export(place)
    whole = place.read_bytes()
    sizes = [0, 1, 4, 5, 6, 8, 40, len(whole) // 2, len(whole) - 33, len(whole) - 1]
    spoiled = [whole[:size] for size in sizes] + [whole + b"x"]
    for position in {*range(12), *range(12, len(whole), 97), len(whole) - 1}:
        # The first byte of the version is a matter of its own.
        if position != 4:
            spoiled.append(whole[:position] + bytes((whole[position] ^ 1,)) + whole[position + 1 :])
    for damaged in spoiled:
        place.write_bytes(damaged)
        with refused("sealed_file_invalid"):
            sealed_file.open_export(place, never)


def test_parts_of_two_files_open_nothing(tmp_path):
    place, other = tmp_path / "file", tmp_path / "other"
    header, sealed = export(place)
    another_header, another_sealed = export(other)
    for mixed in (header, another_sealed), (another_header, sealed):
        place.write_bytes(sealed_file.finish(sealed_file.EXPORT, *mixed))
        with refused("sealed_file_invalid"):
            opened(place)


def test_the_two_kinds_are_not_taken_for_each_other(tmp_path):
    place = tmp_path / "file"
    export(place)
    with refused("sealed_file_invalid") as caught:
        sealed_file.open_recovery(place, never)
    assert "an export" in caught.value.detail
    recovery(place)
    with refused("sealed_file_invalid"):
        sealed_file.open_export(place, never)
    # Also where somebody has written the other kind into it.
    whole = place.read_bytes()[:-32].replace(b"MKIX\x01R", b"MKIX\x01X", 1)
    place.write_bytes(whole + hashlib.sha256(whole).digest())
    with refused("sealed_file_invalid"):
        sealed_file.open_export(place, never)


def test_a_newer_version_is_said(tmp_path):
    place = tmp_path / "file"
    export(place)
    place.write_bytes(place.read_bytes().replace(b"MKIX\x01", b"MKIX\x02", 1))
    with refused("sealed_file_version"):
        sealed_file.open_export(place, never)
    with refused("sealed_file_version"):
        carrying.opened(content() | {"t": "mk/identity-export@2"})
    for wrong in ({}, {"t": "mk/other@1"}, content() | {"identity": b"x"}, content() | {"stores": "{"}):
        with refused("sealed_file_invalid"):
            carrying.opened(wrong)


def test_a_header_cannot_make_guessing_cheap(tmp_path, monkeypatch):
    place = tmp_path / "file"
    with monkeypatch.context() as patched:
        patched.setattr("meshkitfs.keyvault._passphrase_file.FLOOR", Cost(1024, 1, 1))
        export(place, cost=Cost(1024, 1, 1))
    with refused("keyvault_refused"):
        sealed_file.open_export(place, never)
    with refused("invalid_argument"):
        keyvault.seal_with_passphrase("short", os.urandom(32), FLOOR)


def test_places_that_are_no_files(tmp_path):
    for place in (tmp_path, tmp_path / "nothing", Path("/dev/zero")):
        with refused("invalid_argument"):
            sealed_file.open_export(place, never)


# -- words ------------------------------------------------------------------------------------------------


def given(text):
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    return ask_words(read)


def test_words_spell_what_they_were_made_from():
    secret = os.urandom(32)
    words = words_of(secret)
    assert len(words.split()) == 24
    assert given(words + "\n") == secret
    assert given(words) == secret  # whoever writes need not end the line
    assert given("  ".join(word[:4].upper() for word in words.split())) == secret


def test_words_that_cannot_be_right_are_told_and_not_repeated():
    words = words_of(bytes(range(32))).split()
    swapped = [words[1], words[0], *words[2:]]
    for wrong, says in (
        (words[:-1], "23 words"),
        ([*words[:6], "meshkitfs", *words[7:]], "word 7"),
        (swapped, "checksum"),
        ([], "0 words"),
    ):
        with refused("wrong_words") as caught:
            given(" ".join(wrong) + "\n")
        assert says in caught.value.detail
        assert not set(wrong) & set(caught.value.detail.replace(":", " ").split()) - {"a", "not", "word"}


# -- letters to oneself -----------------------------------------------------------------------------------


def test_the_newest_whole_memory_counts():
    signer, box = SigningKey.generate(), EncryptionKey.generate()
    keys = {signer.kid: signer.public}
    long = os.urandom(2 * PART + 100)
    old = [(box, letter) for letter in seal_memory(signer, b"the old one", 100, box.public)]
    new = [(box, letter) for letter in seal_memory(signer, long, 200, box.public)]
    assert len(new) == 3
    assert open_memory([*new[::-1], *old], keys) == (200, long)
    assert open_memory([*old, *new[1:]], keys) == (100, b"the old one")  # a part is missing
    assert open_memory([], keys) is None


def test_only_oneself_is_believed():
    signer, box, thief = SigningKey.generate(), EncryptionKey.generate(), SigningKey.generate()
    keys = {signer.kid: signer.public}
    forged = seal_memory(thief, b"a lie", 300, box.public)
    elsewhere = seal_memory(signer, b"for another", 300, EncryptionKey.generate().public)
    assert open_memory([(box, letter) for letter in (*forged, *elsewhere, b"noise")], keys) is None


def test_a_key_of_before_is_not_believed(tmp_path):
    """Whoever stole it could put contacts of their own into a recovered home."""
    now = int(time.time())
    me = promoted(prepared(create_identity("alice", now), now, signing=True))
    text = cbor.encode({"state": {"contacts": [["bob", "{}"]]}})
    metadata = EmbeddedMetadata.create(tmp_path / "metadata.db")
    found = []
    for signer in (me.old_signing[0], me.signing):
        (letter,) = seal_memory(signer, text, now, me.encryption.public)
        trio.run(metadata.post_letter, me.encryption.kid, letter)
        found.append(trio.run(remembering.latest, me, metadata, now))
    assert found == [None, {"contacts": [["bob", "{}"]]}]
    assert trio.run(remembering.latest, me, metadata, now + 1) is None  # older than the file itself
    metadata.close()


# -- the state --------------------------------------------------------------------------------------------


@pytest.fixture
def states(tmp_path):
    with contextlib.ExitStack() as stack:
        made = [State.open(tmp_path / name, os.urandom(32), create=True) for name in ("one", "two")]
        for state in made:
            stack.callback(state.close)
        yield made


def test_every_table_goes_along_or_is_of_the_device(states):
    tables = {name for (name,) in states[0]._rows("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert tables == _TABLES.keys() | set(STAYS)
    for table, columns in _TABLES.items():
        assert {row[1] for row in states[0]._rows(f"PRAGMA table_info({table})")} == set(columns)


def filled(state):
    share = b"s" * 16
    row = ShareRow(
        share, share, b"o" * 16, b"mine", 1, "live", b"k" * 32, "alice", True, 0o700, 1_790_000_000_123_456_789, 7
    )  # fmt: skip
    state.add_share(row)
    state.raise_mark(share, Mark(5, b"r" * 32, 9, b"h" * 32))
    state.set_contact_row("bob", "{}")
    state.set_setting("clock_floor", 1_790_000_000)
    state.set_setting("proof:x", b"what stays")
    return row


def test_what_goes_along_arrives_as_it_was(states):
    one, two = states
    row = filled(one)
    two.carried.take(one.carried.give())
    assert two.shares() == [row]
    assert two.mark(row.share) == one.mark(row.share)
    assert two.contact_rows() == [("bob", "{}")]
    assert two.setting("clock_floor") == 1_790_000_000
    assert two.setting("proof:x") is None


def test_marks_only_go_up(states):
    one, two = states
    row = filled(one)
    two.raise_mark(row.share, Mark(8, b"R" * 32, 3, b"H" * 32))
    two.carried.take(one.carried.give())
    assert two.mark(row.share) == Mark(8, b"R" * 32, 9, b"h" * 32)


def test_rows_that_make_no_sense_change_nothing(states):
    one, two = states
    row = filled(one)
    good = one.carried.give()
    filled(two)
    for wrong in (
        None,
        {},
        good | {"more": []},
        good | {"shares": [good["shares"][0][:-1]]},
        good | {"contacts": [["carol", None]]},
        good | {"contacts": [["carol", "{}"], ["carol", "{}"]]},
    ):
        with refused("invalid_record"):
            two.carried.take(wrong)
    assert two.shares() == [row]
    assert two.contact_rows() == [("bob", "{}")]


def test_every_change_is_noticed(states):
    one, _ = states
    before = one.carried.changes()
    assert one.carried.changes() == before
    one.set_contact_row("bob", "{}")
    assert one.carried.changes() != before
