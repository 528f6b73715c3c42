"""Identities and contacts: sealed on disk, pinned at first sight, and never replaced by a directory's word.

Directory and contact store are the real ones (embedded metadata, encrypted state.db); `Liar` wraps the
directory and answers as a hostile one would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs import identity as ids
from meshkitfs.core import cbor, cobblestone
from meshkitfs.core.keys import EncryptionKey, SigningKey, fingerprint
from meshkitfs.core.records import rotate
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.state import State

NOW = 1_800_000_000
DAY = 86400
WRAPPING = bytes(range(32))


def refused(code: str):
    @contextlib.contextmanager
    def check():
        with pytest.raises(MeshkitError) as caught:
            yield caught
        assert caught.value.code == code, caught.value

    return check()


def with_new_keys(old: Identity, now: int) -> Identity:
    """A proper rotation: new root, endorsed by the old one."""
    signing, encryption = SigningKey.generate(), EncryptionKey.generate()
    record = dataclasses.replace(
        old.public, root=signing.public, sig=signing.public, enc=encryption.public, created=now
    )
    blob = rotate(old.record, old.signing, record, signing)
    return Identity(old.handle, signing, encryption, (*old.chain, blob))


def renewed(old: Identity, now: int) -> Identity:
    """A further record of the same keys."""
    return ids.promoted(ids.prepared(old, now))


def later(old: Identity) -> Identity:
    """The same keys with one more record."""
    return renewed(old, old.public.exp - 1)


@pytest.fixture(scope="module")
def alice():
    return ids.create_identity("alice", NOW)


@pytest.fixture(scope="module")
def bob():
    return ids.create_identity("bob", NOW)


@pytest.fixture(scope="module")
def fake_bob():
    return ids.create_identity("bob", NOW)


@pytest.fixture(scope="module")
def eve():
    return ids.create_identity("eve", NOW)


# -- making and sealing ----------------------------------------------------------------------------


def test_a_new_identity_is_consistent(alice):
    record = alice.public
    assert record.handle == alice.handle == "alice"
    assert record.root == record.sig == alice.signing.public
    assert record.enc == alice.encryption.public
    assert record.seq == 0
    assert (record.nbf, record.exp) == (NOW, NOW + ids.LIFETIME)
    assert alice.record == alice.chain[-1]


def test_two_identities_share_nothing(bob, fake_bob):
    assert bob.signing.public != fake_bob.signing.public
    assert bob.encryption.public != fake_bob.encryption.public


@pytest.mark.parametrize("handle", ["", "Bob", "bo b", "bob/..", ".bob", "bo\0b", "b" * 65, "böb", "bob\n"])
def test_bad_names(handle):
    with refused("invalid_argument"):
        ids.create_identity(handle, NOW)


def test_sealed_and_opened(alice):
    blob = ids.seal_identity(alice, WRAPPING)
    opened = ids.open_identity(blob, WRAPPING)
    assert opened.chain == alice.chain
    assert opened.handle == "alice"
    assert opened.signing.seed == alice.signing.seed
    assert opened.encryption.seed == alice.encryption.seed
    for canary in (alice.signing.seed, alice.encryption.seed, b"alice", alice.record):
        assert canary not in blob
    assert ids.seal_identity(alice, WRAPPING) != blob


def test_another_key_does_not_open_it(alice):
    blob = ids.seal_identity(alice, WRAPPING)
    with refused("identity_corrupt"):
        ids.open_identity(blob, secrets.token_bytes(32))
    with pytest.raises(ValueError, match="32 bytes"):
        ids.open_identity(blob, WRAPPING[:31])


def test_the_vaults_secret_itself_is_not_the_key(alice):
    """The key in use is derived, so that no two uses of the vault's secret can meet."""
    blob = ids.seal_identity(alice, WRAPPING)
    with refused("invalid_envelope"):
        cobblestone.open_(WRAPPING, b"mk/identity@1", blob[5:])


def test_every_flipped_byte_is_noticed(alice):
    blob = ids.seal_identity(alice, WRAPPING)
    for position in [*range(70), *range(70, len(blob), 97), len(blob) - 1]:
        bad = bytearray(blob)
        bad[position] ^= 0x40
        with refused("identity_corrupt"):
            ids.open_identity(bytes(bad), WRAPPING)
    for cut in (b"", blob[:5], blob[:60], blob[:-1], blob + b"\0"):
        with refused("identity_corrupt"):
            ids.open_identity(cut, WRAPPING)


def resealed(identity: Identity, **changes: object) -> bytes:
    """An identity file with a right seal and other fields (a bug of ours, or another program's work)."""
    payload = {
        "t": "mk/identity-file@1",
        "handle": identity.handle,
        "sig": identity.signing.seed,
        "enc": identity.encryption.seed,
        "chain": list(identity.chain),
    } | changes
    payload = {name: value for name, value in payload.items() if value is not ...}
    key = ids._identity.sealing_key(WRAPPING)
    return bytes(cobblestone.seal(key, b"mk/identity@1", cbor.encode(payload), prefix=b"MKID\x01"))


def test_fields_that_do_not_belong_together_are_refused(alice, bob):
    assert ids.open_identity(resealed(alice), WRAPPING).chain == alice.chain
    wrong: list[dict[str, object]] = [
        {"t": "mk/identity-file@2"},
        {"handle": "bob"},
        {"sig": bob.signing.seed},
        {"enc": bob.encryption.seed},
        {"chain": list(bob.chain)},
        {"chain": []},
        {"chain": [*alice.chain, *alice.chain]},
        {"chain": ["text"]},
        {"sig": alice.signing.seed[:31]},
        {"enc": None},
        {"more": 1},
        {"handle": ...},
    ]
    for changes in wrong:
        with refused("identity_corrupt"):
            ids.open_identity(resealed(alice, **changes), WRAPPING)
    key = ids._identity.sealing_key(WRAPPING)
    with refused("identity_corrupt"):
        ids.open_identity(
            bytes(cobblestone.seal(key, b"mk/identity@1", b"\x01", prefix=b"MKID\x01")), WRAPPING
        )


def test_file_is_private_and_replaced_whole(alice, bob, tmp_path):
    path = tmp_path / "identity.sealed"
    before = os.umask(0)
    try:
        ids.save_identity(path, bob, WRAPPING)
        ids.save_identity(path, alice, WRAPPING)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["identity.sealed"]
    assert ids.load_identity(path, WRAPPING).handle == "alice"


def test_a_failed_save_leaves_the_old_file(alice, bob, tmp_path, monkeypatch):
    path = tmp_path / "identity.sealed"
    ids.save_identity(path, alice, WRAPPING)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ids.save_identity(path, bob, WRAPPING)
    assert [p.name for p in tmp_path.iterdir()] == ["identity.sealed"]
    assert ids.load_identity(path, WRAPPING).handle == "alice"


def test_loading_what_is_not_there(tmp_path):
    with refused("identity_not_found"):
        ids.load_identity(tmp_path / "identity.sealed", WRAPPING)
    with refused("identity_locked"):
        ids.load_identity(tmp_path, WRAPPING)
    (tmp_path / "big").touch()
    os.truncate(tmp_path / "big", 1 << 33)
    with refused("identity_corrupt") as caught:
        ids.load_identity(tmp_path / "big", WRAPPING)
    assert "big" in caught.value.detail


def test_nothing_secret_is_shown(alice):
    shown = repr(alice) + repr(ids.report(alice, NOW)) + json.dumps(ids.report(alice, NOW).as_dict())
    for seed in (alice.signing.seed, alice.encryption.seed):
        assert seed.hex() not in shown
        assert repr(seed)[2:-1] not in shown


def test_report(alice):
    report = ids.report(alice, NOW)
    assert report.handle == "alice"
    assert report.fingerprint == fingerprint(alice.signing.public)
    assert report.did.startswith("did:key:z6Mk")
    assert bytes.fromhex(report.kid) == alice.signing.kid
    assert bytes.fromhex(report.enc_kid) == alice.encryption.kid
    assert (report.records, report.created, report.valid_until) == (1, NOW, NOW + ids.LIFETIME)
    assert report.problems == ()
    for when, word in ((-1, "clock"), (ids.LIFETIME - 30 * DAY, "soon"), (ids.LIFETIME, "has expired")):
        (problem,) = ids.report(alice, NOW + when).problems
        assert word in problem


def test_renewal_keeps_the_keys_and_continues_the_chain(alice):
    assert not ids.renewal_due(alice, NOW + ids.LIFETIME // 2 - 1)
    assert ids.renewal_due(alice, NOW + ids.LIFETIME // 2)
    new = renewed(alice, NOW + ids.LIFETIME // 2)
    assert new.chain[:-1] == alice.chain
    assert (new.signing, new.encryption) == (alice.signing, alice.encryption)
    assert new.public.seq == 1
    assert new.public.exp == NOW + ids.LIFETIME // 2 + ids.LIFETIME
    assert ids.report(new, NOW + ids.LIFETIME).problems == ()
    assert ids.report(new, NOW + ids.LIFETIME).created == NOW
    assert ids.open_identity(ids.seal_identity(new, WRAPPING), WRAPPING).chain == new.chain


# -- text form and code ----------------------------------------------------------------------------


def test_text_form(alice):
    text = ids.to_text(alice.record)
    assert text.startswith("meshkit-identity1:")
    assert text.isascii()
    wrapped = "\n  ".join(text[i : i + 70] for i in range(0, len(text), 70)) + "\r\n"
    assert ids.from_text(text) == ids.from_text(wrapped) == alice.record


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: "",
        lambda t: "meshkit-identity1:",
        lambda t: t.replace("identity1", "identity2"),
        lambda t: t.removeprefix("meshkit-identity1:"),
        lambda t: t + "=",
        lambda t: t.replace("meshkit-identity1:", "meshkit-identity1:" * 2),
        lambda t: t[:-1] + "!",
        lambda t: t + "é",
        lambda t: t + "A" * 20000,
    ],
)
def test_text_that_is_no_record(alice, spoil):
    with refused("invalid_argument"):
        ids.from_text(spoil(ids.to_text(alice.record)))


def test_text_of_a_damaged_record(alice):
    bad = bytearray(alice.record)
    bad[-1] ^= 1
    with refused("invalid_record"):
        ids.from_text(ids.to_text(bytes(bad)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_text_form_is_the_only_one(data):
    text = ids.PREFIX + data.decode("latin-1")
    with pytest.raises(MeshkitError) as caught:
        ids.from_text(text)
    assert caught.value.code in ("invalid_argument", "invalid_record")


def test_code_is_the_same_for_both_and_covers_both_keys(alice, bob, eve):
    a, b, e = (identity.signing.public for identity in (alice, bob, eve))
    code = ids.verification_code(a, b)
    assert code == ids.verification_code(b, a)
    assert len({code, ids.verification_code(a, e), ids.verification_code(e, b)}) == 3
    assert [len(group) for group in code.split(" ")] == [5] * 12


def test_code_as_written_down():
    """Independent computation: two halves of 30 digits from SHA-256("mk/fp@1" || root), smaller one first."""
    one, other = bytes(32), b"\xff" * 32
    halves = sorted(
        str(int(hashlib.sha256(b"mk/fp@1" + root).hexdigest(), 16))[-30:] for root in (one, other)
    )
    assert ids.verification_code(one, other).replace(" ", "") == "".join(halves)


# -- the directory ---------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    home = EmbeddedMetadata.create(tmp_path / "metadata.db")
    yield home
    home.close()


class Liar:
    """A directory that answers some handles with what a hostile one chooses."""

    def __init__(self, inner: ids.Directory) -> None:
        self.inner = inner
        self.says: dict[str, list[bytes]] = {}
        self.asked = 0

    async def identity(self, handle: str) -> list[bytes]:
        self.asked += 1
        return self.says[handle] if handle in self.says else await self.inner.identity(handle)

    async def publish_identity(self, handle: str, record: bytes) -> None:
        await self.inner.publish_identity(handle, record)


def run(function, *args):
    return trio.run(function, *args)


def published(directory, *identities: Identity) -> None:
    for identity in identities:
        run(ids.publish, identity, directory)


def test_publishing_and_standing(directory, alice, fake_bob, bob):
    assert run(ids.standing, alice, directory) == "unpublished"
    published(directory, alice, alice)
    assert run(ids.standing, alice, directory) == "current"
    assert run(directory.identity, "alice") == [alice.record]
    twice = later(later(alice))
    assert run(ids.standing, twice, directory) == "behind"
    published(directory, twice)
    assert run(directory.identity, "alice") == list(twice.chain)
    assert run(ids.standing, alice, directory) == "ahead"
    with refused("identity_handle_taken"):
        run(ids.publish, alice, directory)
    published(directory, fake_bob)
    assert run(ids.standing, bob, directory) == "other"
    with refused("identity_handle_taken"):
        run(ids.publish, bob, directory)
    assert run(directory.identity, "bob") == [fake_bob.record]


def test_publishing_to_an_empty_directory_sends_the_whole_chain(directory, alice):
    rotated = later(with_new_keys(alice, NOW + DAY))
    published(directory, rotated)
    assert run(directory.identity, "alice") == list(rotated.chain)


# -- contacts --------------------------------------------------------------------------------------


@pytest.fixture
def liar(directory):
    return Liar(directory)


@pytest.fixture
def store(tmp_path):
    state = State.open(tmp_path / "state.db", WRAPPING, create=True)
    yield state
    state.close()


@pytest.fixture
def book(alice, store, liar):
    return ContactBook(alice.signing.public, store, liar)


def test_first_sight_pins(book, directory, bob):
    published(directory, bob)
    assert book.get("bob") is None
    contact = run(book.resolve, "bob", NOW)
    assert (contact.handle, contact.trust, contact.first_seen) == ("bob", "pinned", NOW)
    assert contact.record == bob.record
    assert contact.public.enc == bob.encryption.public
    assert book.get("bob") == contact == run(book.resolve, "bob", NOW + DAY)
    assert book.list() == [contact]


def test_never_seen(book):
    with refused("contact_unknown"):
        run(book.resolve, "nobody", NOW)
    with refused("contact_unknown"):
        book.verify("nobody", "0" * 60)
    with refused("contact_unknown"):
        book.verification_code("nobody")
    with refused("invalid_argument"):
        run(book.resolve, "No Body", NOW)
    assert book.list() == []


def test_oneself_is_no_contact(book, directory, alice):
    published(directory, alice)
    for attempt in (
        lambda: run(book.resolve, "alice", NOW),
        lambda: run(book.meet, alice.record, NOW),
        lambda: book.add(alice.record, NOW),
    ):
        with refused("invalid_argument"):
            attempt()
    assert book.list() == []


def test_an_unreachable_directory_is_not_an_answer(book, directory, store, alice, bob):
    class Down(Liar):
        async def identity(self, handle):
            raise MeshkitError("metadata_unavailable")

    published(directory, bob)
    run(book.resolve, "bob", NOW)
    down = ContactBook(alice.signing.public, store, Down(directory))
    for handle in ("bob", "nobody"):
        with refused("metadata_unavailable"):
            run(down.resolve, handle, NOW)
    assert down.get("bob").trust == "pinned"


def test_a_contact_the_directory_does_not_have_stays_usable(book, bob):
    book.add(bob.record, NOW)
    assert run(book.resolve, "bob", NOW).record == bob.record


@pytest.mark.parametrize(
    "change", [later, lambda i: with_new_keys(i, NOW), lambda i: later(with_new_keys(i, NOW))]
)
@pytest.mark.parametrize("trust", ["pinned", "verified"])
def test_a_chained_change_is_followed_and_keeps_its_trust(book, directory, bob, change, trust):
    published(directory, bob)
    run(book.resolve, "bob", NOW)
    if trust == "verified":
        book.verify("bob", book.verification_code("bob"))
    changed = change(bob)
    published(directory, changed)
    contact = run(book.resolve, "bob", NOW + ids.LIFETIME - 1)
    assert contact.record == changed.record
    assert contact.public.enc == changed.encryption.public
    assert (contact.trust, contact.first_seen) == (trust, NOW)
    assert book.get("bob") == contact


def forged_endorsement(victim: Identity, thief: Identity) -> list[bytes]:
    """A chain that continues the victim's with the thief's root, endorsed by the thief only."""
    from meshkitfs.core.identity_record import Endorsement

    old, prev = victim.public, victim.public.digest
    word = Endorsement("bob", thief.signing.public, 1, prev).sign(thief.signing)
    record = dataclasses.replace(thief.public, handle="bob", seq=1, prev=prev, rot=word)
    assert old.seq == 0
    return [*victim.chain, record.sign(thief.signing)]


def unendorsed(victim: Identity, thief: Identity) -> list[bytes]:
    record = dataclasses.replace(thief.public, handle="bob", seq=1, prev=victim.public.digest)
    return [*victim.chain, record.sign(thief.signing)]


OTHER_KEYS = {
    "another chain": lambda bob, fake: list(fake.chain),
    "another, longer chain": lambda bob, fake: list(later(fake).chain),
    "appended without endorsement": unendorsed,
    "appended with a forged endorsement": forged_endorsement,
    "rotated elsewhere": lambda bob, fake: list(with_new_keys(fake, NOW).chain),
    "somebody else's": lambda bob, fake: list(ids.create_identity("mallory", NOW).chain),
}


@pytest.mark.parametrize("lie", OTHER_KEYS.values(), ids=OTHER_KEYS.keys())
@pytest.mark.parametrize("trust", ["pinned", "verified"])
def test_another_key_blocks_for_good(book, liar, store, alice, bob, fake_bob, lie, trust):
    published(liar, bob)
    run(book.resolve, "bob", NOW)
    if trust == "verified":
        book.verify("bob", book.verification_code("bob"))
    liar.says["bob"] = lie(bob, fake_bob)
    with refused("contact_key_changed") as caught:
        run(book.resolve, "bob", NOW)
    assert fingerprint(bob.signing.public) in caught.value.detail
    blocked = book.get("bob")
    assert blocked.trust == "blocked"
    assert blocked.record == bob.record
    assert blocked.evidence == liar.says["bob"][-1]
    # The directory behaving again does not lift it, nor does a restart; nobody is even asked.
    del liar.says["bob"]
    asked = liar.asked
    again = ContactBook(alice.signing.public, store, liar)
    for attempt in (
        lambda: run(again.resolve, "bob", NOW),
        lambda: run(again.meet, bob.record, NOW),
        lambda: again.verification_code("bob"),
        lambda: again.verify("bob", ids.verification_code(alice.signing.public, bob.signing.public)),
    ):
        with refused("contact_key_changed"):
            attempt()
    assert liar.asked == asked


def test_a_second_history_of_the_same_key_blocks(book, liar, bob):
    """Two different second records, both properly signed: one of the two readers was shown a fork."""
    one = renewed(bob, NOW + ids.LIFETIME - 10)
    two = renewed(bob, NOW + ids.LIFETIME - 20)
    liar.says["bob"] = list(one.chain)
    run(book.resolve, "bob", NOW + ids.LIFETIME)
    for fork in (two, later(two)):
        liar.says["bob"] = list(fork.chain)
        with refused("contact_key_changed"):
            run(book.resolve, "bob", NOW + ids.LIFETIME)


def test_a_directory_that_lags_changes_nothing(book, liar, bob):
    chain = list(later(later(with_new_keys(bob, NOW))).chain)
    now = NOW + 2 * ids.LIFETIME
    liar.says["bob"] = chain
    pinned = run(book.resolve, "bob", now)
    for length in (2, 3, 4):
        liar.says["bob"] = chain[:length]
        assert run(book.resolve, "bob", now) == pinned


def test_rollback_to_before_a_rotation(book, liar, bob):
    """What is known stays, however much of it a directory hides or has lost."""
    rotated = with_new_keys(bob, NOW)
    liar.says["bob"] = list(rotated.chain)
    pinned = run(book.resolve, "bob", NOW)
    liar.says["bob"] = list(bob.chain)
    assert run(book.resolve, "bob", NOW) == pinned
    liar.says["bob"] = list(later(rotated).chain)
    newest = run(book.resolve, "bob", NOW + ids.LIFETIME)
    liar.says["bob"] = list(bob.chain)
    assert run(book.resolve, "bob", NOW + ids.LIFETIME) == newest
    assert newest.record == later(rotated).record


def garbage(bob: Identity) -> list[list[bytes]]:
    broken = bytearray(bob.record)
    broken[-1] ^= 1
    return [[b""], [b"x" * 100], [bytes(broken)], [bob.record, bob.record], [bob.record, bytes(broken)]]


def test_garbage_from_the_directory_is_an_error_and_no_block(book, liar, bob):
    """Otherwise a broken directory could block everybody; and it must not pin anything either."""
    for lie in garbage(bob):
        liar.says["bob"] = lie
        with refused("invalid_record"):
            run(book.resolve, "bob", NOW)
        assert book.get("bob") is None
    book.add(bob.record, NOW)
    for lie in garbage(bob):
        liar.says["bob"] = lie
        with refused("invalid_record"):
            run(book.resolve, "bob", NOW)
        assert book.get("bob").trust == "pinned"


def test_anothers_record_under_this_name_is_not_pinned(book, liar, eve):
    liar.says["bob"] = list(eve.chain)
    with refused("invalid_record"):
        run(book.resolve, "bob", NOW)
    assert book.list() == []


def test_expired_and_future_records(book, liar, bob):
    liar.says["bob"] = list(bob.chain)
    for when in (NOW + ids.LIFETIME, NOW - 2 * 3600):
        with refused("contact_unknown"):
            run(book.resolve, "bob", when)
        with refused("contact_unknown"):
            run(book.meet, bob.record, when)
        with refused("contact_unknown"):
            book.add(bob.record, when)
    assert book.list() == []
    run(book.resolve, "bob", NOW - 1800)
    with refused("contact_unknown") as caught:
        run(book.resolve, "bob", NOW + ids.LIFETIME)
    assert "2029-01" in caught.value.detail
    liar.says["bob"] = list(later(bob).chain)
    assert run(book.resolve, "bob", NOW + ids.LIFETIME).record == later(bob).record


def test_a_contact_pinned_while_the_directory_was_asked_wins(alice, store, directory, bob, fake_bob):
    class Slow(Liar):
        async def identity(self, handle):
            book.add(bob.record, NOW)
            return list(fake_bob.chain)

    book = ContactBook(alice.signing.public, store, Slow(directory))
    with refused("contact_key_changed"):
        run(book.resolve, "bob", NOW)
    assert book.get("bob").record == bob.record


# -- meeting the sender of a letter ------------------------------------------------------------------


def test_meeting_somebody_new(book, liar, bob, fake_bob):
    assert run(book.meet, bob.record, NOW).trust == "pinned"
    assert book.get("bob").record == bob.record
    with refused("contact_key_changed"):
        run(book.meet, fake_bob.record, NOW)
    assert book.get("bob").trust == "pinned"
    liar.says["bob"] = list(fake_bob.chain)
    with refused("contact_key_changed"):
        run(book.meet, bob.record, NOW)
    assert book.get("bob").trust == "blocked"


def test_a_letter_in_anothers_name(book, directory, bob, fake_bob):
    """Never seen here, but the directory knows another bob: the letter's word is not enough."""
    published(directory, bob)
    with refused("contact_key_changed"):
        run(book.meet, fake_bob.record, NOW)
    assert book.get("bob").record == bob.record
    assert run(book.meet, bob.record, NOW).record == bob.record


def test_a_letter_signed_with_a_key_that_was_rotated_away(book, directory, bob):
    """It may have waited since before that. What counts from here on is the newest key."""
    rotated = with_new_keys(bob, NOW)
    published(directory, rotated)
    assert run(book.meet, bob.record, NOW).record == rotated.record


def test_meeting_with_a_record_that_is_no_record(book, bob):
    for blob in (b"", b"x", bob.record[:-1] + bytes([bob.record[-1] ^ 1])):
        with refused("invalid_record"):
            run(book.meet, blob, NOW)


# -- adding by hand ----------------------------------------------------------------------------------


def test_adding_text_and_blob(book, bob, eve):
    assert book.add(ids.to_text(bob.record), NOW).trust == "pinned"
    assert book.add(eve.record, NOW).handle == "eve"
    assert [contact.handle for contact in book.list()] == ["bob", "eve"]
    with refused("invalid_argument"):
        book.add("hello", NOW)
    with refused("invalid_record"):
        book.add(ids.to_text(bob.record[:-4]), NOW)
    with refused("invalid_record"):
        book.add(b"hello", NOW)


def test_adding_again_keeps_trust_and_takes_newer_records(book, bob):
    book.add(bob.record, NOW)
    verified = book.verify("bob", book.verification_code("bob"))
    assert book.add(bob.record, NOW + 1) == verified
    newer = book.add(later(bob).record, NOW + ids.LIFETIME - 1)
    assert (newer.trust, newer.record) == ("verified", later(bob).record)
    assert book.add(bob.record, NOW + 2) == newer


def test_another_key_is_not_added_over_a_contact_unless_said(book, bob, fake_bob):
    before = book.add(bob.record, NOW)
    with refused("contact_key_changed"):
        book.add(fake_bob.record, NOW)
    assert book.get("bob") == before
    book.verify("bob", book.verification_code("bob"))
    replaced = book.add(fake_bob.record, NOW + 5, replace=True)
    assert (replaced.trust, replaced.record, replaced.first_seen) == ("pinned", fake_bob.record, NOW + 5)


@pytest.mark.parametrize("which", ["old", "new"])
def test_adding_by_hand_lifts_a_block_and_only_for_that_key(book, liar, bob, fake_bob, which):
    book.add(bob.record, NOW)
    book.verify("bob", book.verification_code("bob"))
    liar.says["bob"] = list(fake_bob.chain)
    with refused("contact_key_changed"):
        run(book.resolve, "bob", NOW)
    given = bob if which == "old" else fake_bob
    contact = book.add(given.record, NOW + 1)
    assert (contact.trust, contact.evidence) == ("pinned", None)
    if which == "new":
        assert run(book.resolve, "bob", NOW + 1) == contact
    else:
        with refused("contact_key_changed"):
            run(book.resolve, "bob", NOW + 1)


# -- comparing codes -----------------------------------------------------------------------------------


def test_both_sides_see_the_same_code(book, directory, tmp_path, alice, bob):
    published(directory, alice, bob)
    run(book.resolve, "bob", NOW)
    other = State.open(tmp_path / "other.db", WRAPPING, create=True)
    theirs = ContactBook(bob.signing.public, other, directory)
    run(theirs.resolve, "alice", NOW)
    assert book.verification_code("bob") == theirs.verification_code("alice")
    other.close()


@pytest.mark.parametrize(
    "typed",
    [lambda c: c, lambda c: c.replace(" ", ""), lambda c: c.replace(" ", "-"), lambda c: f" {c}\n"],
)
def test_the_right_code_verifies(book, bob, typed):
    book.add(bob.record, NOW)
    contact = book.verify("bob", typed(book.verification_code("bob")))
    assert contact.trust == "verified"
    assert book.get("bob") == contact


def test_a_wrong_code_does_not(book, alice, bob, fake_bob):
    book.add(bob.record, NOW)
    code = book.verification_code("bob")
    wrong = str((int(code[0]) + 1) % 10) + code[1:]
    arabic = code.replace(code[0], chr(0x660 + int(code[0])))
    with_fake = ids.verification_code(alice.signing.public, fake_bob.signing.public)
    for typed in (
        wrong,
        with_fake,
        code[:-1],
        code + "0",
        "",
        "-",
        code[6:] + " " + code[:5],
        arabic,
        code + "x",
    ):
        with refused("verification_failed") as caught:
            book.verify("bob", typed)
        assert code.replace(" ", "")[:10] not in str(caught.value)
    assert book.get("bob").trust == "pinned"


# -- what is stored ------------------------------------------------------------------------------------


def test_rows_that_make_no_sense_are_not_strangers(book, store, directory, bob, eve):
    """A row that cannot be read must not become first sight: that would pin what the directory offers."""
    published(directory, bob)
    run(book.resolve, "bob", NOW)
    good = json.loads(store.contact_row("bob"))
    bad: list[object] = [
        [],
        None,
        {},
        good | {"record": "x"},
        good | {"record": 7},
        good | {"record": ids.to_text(eve.record)},
        good | {"trust": "ultimate"},
        good | {"trust": ["pinned"]},
        good | {"first_seen": None},
        good | {"evidence": "x"},
    ]
    for row in ["", "{", *map(json.dumps, bad)]:
        store.set_contact_row("bob", row)
        for attempt in (lambda: book.get("bob"), lambda: run(book.resolve, "bob", NOW), book.list):
            with refused("state_corrupt"):
                attempt()
    store.set_contact_row("bob", json.dumps(good))
    assert book.get("bob").record == bob.record


def test_contact_as_shown(book, bob):
    shown = book.add(bob.record, NOW).as_dict()
    assert json.loads(json.dumps(shown)) == {
        "handle": "bob",
        "trust": "pinned",
        "fingerprint": fingerprint(bob.signing.public),
        "did": ids.report(bob, NOW).did,
        "first_seen": NOW,
        "valid_until": NOW + ids.LIFETIME,
        "key_changed": None,
    }


def test_the_book_takes_a_metadata_home_and_a_state():
    """The protocols' names are those of the real classes (mypy sees only what it is shown)."""
    for protocol, real in ((ids.Directory, EmbeddedMetadata), (ids.ContactStore, State)):
        wanted = {name for name in vars(protocol) if not name.startswith("_")}
        assert wanted
        assert wanted <= set(dir(real))
