"""New keys for an identity in use: what goes on working, what a thief of the old key can do, what a crash leaves.

Real sessions without a kernel, over the embedded metadata home and over the real service.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from types import SimpleNamespace

import apsw
import evil
import pytest
from devices import Device, World, scratch
from evil import EvilMetadata
from homes import wait_until
from inner_service import InnerService

from meshkitfs import identity as ids
from meshkitfs.core.capsule import make_capsule
from meshkitfs.core.identity_record import rotate as successor
from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Head, Retention, Roster, Timestamp, record_hash
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.locking import Lock
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.identity import _signers
from meshkitfs.metadata import EmbeddedMetadata, Publication
from meshkitfs.shares import Rules, Terms, _hearing, prune

DATA = b"what was written before " * 3000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def asks_when_told(monkeypatch):
    """An owner asks about members when a test looks, and not because a minute is over."""
    monkeypatch.setattr(_hearing, "HEAR_S", 1 << 40)


@pytest.fixture(params=["embedded", "service"])
def anywhere(request, place):
    """Makes devices whose metadata is in a file, or at a service."""
    if request.param == "embedded":
        with World() as world:
            yield maker(world, place, f"{place}/metadata.db")
        return
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with InnerService(behind) as server, World(rate=1.0) as world:
        yield maker(world, place, server.url)
    behind.close()


@pytest.fixture
def here(place):
    """Makes devices whose metadata is in a file."""
    with World() as world:
        yield maker(world, place, f"{place}/metadata.db")


def maker(world, place, metadata):
    made = []

    def device(name, beside=None):
        made.append(Device(world, f"{place}/{name}", name, beside=beside, metadata=metadata))
        return made[-1].start()

    return device


@pytest.fixture
def pair(here):
    """Alice with a share, and bob, who may write in it, with an evil directory and store before him."""
    alice, bob = people(here)
    interpose(bob.session)
    yield alice, bob
    for device in (bob, alice):
        if device.session is not None:
            device.close()


def people(make):
    alice = make("alice")
    bob = make("bob", alice)
    alice.create_share()
    alice.view().write("file", DATA)
    alice.flush()
    alice.grant("first", bob)
    assert bob.view().read("file") == DATA
    return alice, bob


def interpose(session):
    between = EvilMetadata(session.metadata)
    session.gate._metadata = session.services.metadata = session.contacts._directory = between
    return between


def between(device):
    return device.session.services.metadata


def rotate(device, signing=True, encryption=True, again=False):
    life = device.session.life
    return device.world.run(lambda: life.rotate(signing=signing, encryption=encryption, again=again))


def me(device):
    return device.session.identity


def roster_of(device, alice):
    blob = device.world.run(device.session.metadata.roster, device.share().row.share)
    return Roster.parse(blob, {key.kid: key.public for key in me(alice).signing_keys})


def look(device):
    """What the watcher of a running daemon does once a minute."""
    device.session.book._hearing._asked.clear()
    device.session.book._next_look = 0
    device.world.run(device.session.book.renew_rosters)


def fails(code, work, *args):
    with pytest.raises(MeshkitError) as caught:
        work(*args)
    assert caught.value.code == code, caught.value
    return caught.value


def refused(device, code, *, quarantined=False):
    """The share is closed with this code and the errno of the table; whether for good, is told apart."""

    def failure():
        device.refresh()
        try:
            device.view().read("file")
        except OSError as error:
            return error
        return None

    seen = wait_until(failure, "the refusal", 10)
    assert (seen.code, seen.errno) == (code, TABLE[code].errno), seen
    kept = device.session.state.quarantine(device.share().row.share)
    assert (kept is not None) is quarantined


def opened(device, data=DATA):
    """The share opens, and shows this; a service's word of a change takes a moment."""

    def shows():
        device.refresh()
        return device.view().read("file") == data

    wait_until(shows, "the content", 10)


# == the story =======================================================================================


def test_owner_and_member_rotate_and_go_on(anywhere):
    alice, bob = people(anywhere)
    old = me(alice)
    done = rotate(alice)
    assert (done.resumed, done.signed, done.left) == (False, ("first",), ())
    assert me(alice).signing.kid != old.signing.kid
    assert me(alice).encryption.kid != old.encryption.kid
    assert not me(alice).unfinished
    roster = roster_of(alice, alice)
    assert roster.signer == me(alice).signing.kid
    assert old.signing.public not in roster.writers
    assert roster.epoch == 2  # who has the old encryption key has the keys of the first
    opened(bob)
    opened(alice)
    wait_until(lambda: bob.session.contacts.get("alice").record == me(alice).record, "bob's look")
    assert bob.session.contacts.get("alice").key_changed
    # Bob's turn. Until his owner has heard, he opens with the old key, and signs with it.
    before = me(bob)
    rotate(bob)
    opened(bob)
    bob.view().write("file", b"by bob, not heard of yet")
    bob.flush()
    opened(alice, b"by bob, not heard of yet")
    assert before.signing.public in roster_of(alice, alice).writers
    look(alice)
    roster = roster_of(alice, alice)
    assert me(bob).signing.public in roster.writers
    assert before.signing.public not in roster.writers

    def wrapped_for_the_new_key():
        opened(bob, b"by bob, not heard of yet")
        return bob.share().grant.capsule.to == me(bob).encryption.kid

    wait_until(wrapped_for_the_new_key, "the new capsule")
    bob.view().write("file", b"by bob's new key")
    bob.flush()
    opened(alice, b"by bob's new key")
    assert alice.share().grant.head.writer == me(bob).signing.kid
    alice.view().write("file", b"and back")
    alice.flush()
    opened(bob, b"and back")
    # What was sealed to keys of before is readable: the past, and after a restart.
    for device in (bob, alice):
        device.close()
        device.start()
        opened(device, b"and back")
        past = device.world.run(device.share().past.use, "list")
        device.world.run(device.share().history.refresh, past)
        assert device.share().history.versions[0].epoch == 1
        older = past._older(1)
        assert len(older.view) == 32
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    refused(bob, "share_revoked")


def test_what_lies_in_the_mailbox_of_an_old_key_is_found(anywhere):
    alice = anywhere("alice")
    bob = anywhere("bob", alice)
    alice.create_share()
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms())
    rotate(bob)
    rotate(alice)
    invitations, unreadable = bob.world.run(bob.session.book.inbox.waiting)
    assert (len(invitations), unreadable) == (1, 0)
    bob.world.run(bob.session.book.inbox.accept, "first", b"first")
    assert bob.world.run(bob.session.book.inbox.waiting)[0] == []
    look(alice)
    bob.refresh()
    assert bob.world.run(bob.share().use, "read").capsule.to == me(bob).encryption.kid


def test_each_key_by_itself(pair):
    alice, bob = pair
    one = me(alice)
    rotate(alice, encryption=False)
    two = me(alice)
    assert (two.encryption.kid, two.signing.kid == one.signing.kid) == (one.encryption.kid, False)
    opened(bob)
    rotate(alice, signing=False)
    three = me(alice)
    assert (three.signing.kid, three.encryption.kid == two.encryption.kid) == (two.signing.kid, False)
    opened(bob)
    rotate(alice, signing=False, encryption=False)
    assert (me(alice).signing.kid, me(alice).encryption.kid) == (three.signing.kid, three.encryption.kid)
    assert len(me(alice).chain) == 4
    opened(bob)
    assert [key.kid for key in me(alice).signing_keys] == [two.signing.kid, one.signing.kid]


def test_the_file_of_an_identity_with_a_past(pair):
    alice, _ = pair
    rotate(alice)
    now = ids.prepared(me(alice), int(time.time()), signing=True)
    wrapping = os.urandom(32)
    again = ids.open_identity(ids.seal_identity(now, wrapping), wrapping)
    for name in ("signing_keys", "encryption_keys"):
        assert [key.kid for key in getattr(again, name)] == [key.kid for key in getattr(now, name)]
    assert again.pending.record == now.pending.record
    assert (again.chain, again.unfinished) == (now.chain, now.unfinished)
    shown = repr(again) + repr(again.pending) + str(ids.report(again, 0))
    for key in (*again.signing_keys, again.pending.signing, *again.encryption_keys):
        assert key.seed.hex() not in shown
        assert repr(key.seed)[2:-1] not in shown
    stranger = dataclasses.replace(now, pending=now.pending._replace(signing=SigningKey.generate()))
    fails("identity_corrupt", ids.open_identity, ids.seal_identity(stranger, wrapping), wrapping)


def test_locking_takes_the_old_keys_too_and_unlocking_brings_them_back(pair):
    alice, bob = pair
    rotate(alice)
    lock = Lock(bob.session)
    rotate(bob)
    keys = (*me(bob).signing_keys, *me(bob).encryption_keys)
    bob.world.run(lock.lock)
    for key in keys:
        fails("identity_locked", lambda key=key: key.seed)
    fails("identity_locked", rotate, bob)
    bob.world.run(lock.unlock)
    assert [key.seed for key in keys]
    opened(bob)
    rotate(bob)
    opened(bob)


def test_a_verified_contact_stays_verified(pair):
    alice, bob = pair
    book = bob.session.contacts
    book.verify("alice", book.verification_code("alice"))
    rotate(alice)
    opened(bob)
    (shown,) = bob.world.run(Service(bob.session).call, "contacts.list", {})["contacts"]
    assert (shown["trust"], shown["key_changed"] is not None) == ("verified", True)
    assert shown["fingerprint"] == ids.report(me(alice), 0).fingerprint
    # The code is of the keys of now: both still see the same.
    rotate(bob)
    alice.world.run(alice.session.contacts.resolve, "bob", int(time.time()))
    assert book.verification_code("alice") == alice.session.contacts.verification_code("bob")


def test_a_record_is_renewed_before_it_runs_out(pair):
    """By the home itself, while it is open; nobody's key has changed by that."""
    alice, bob = pair
    was = me(alice)
    life = alice.session.life
    life._wall = lambda: was.public.exp - ids.LIFETIME // 4
    alice.world.run(lambda: life._look(first=False))
    assert me(alice).public.exp == was.public.exp - ids.LIFETIME // 4 + ids.LIFETIME
    assert me(alice).chain[:-1] == was.chain
    assert alice.world.run(alice.session.metadata.identity, "alice") == list(me(alice).chain)
    contact = bob.world.run(bob.session.contacts.follow, "alice", int(time.time()))
    assert (contact.record, contact.key_changed) == (me(alice).record, 0)
    opened(bob)
    alice.close()
    alice.start()
    assert me(alice).chain[:-1] == was.chain


# == a kill between any two steps ====================================================================


class Killed(Exception):
    """The process ends here."""


def die(*_):
    raise Killed


def before_the_keys_are_stored(alice, monkeypatch):
    monkeypatch.setattr(alice.session.holder, "_save", die)


def before_the_record_is_published(alice, monkeypatch):
    monkeypatch.setattr(alice.session.metadata, "publish_identity", die)


def before_the_answer_has_come(alice, monkeypatch):
    real = alice.session.metadata.publish_identity

    async def lost(*args):
        await real(*args)
        die()

    monkeypatch.setattr(alice.session.metadata, "publish_identity", lost)


def before_the_keys_are_taken_into_use(alice, monkeypatch):
    holder = alice.session.holder
    real = holder._save
    monkeypatch.setattr(holder, "_save", lambda new: real(new) if new.pending is not None else die())


def before_a_share_is_signed(alice, monkeypatch):
    monkeypatch.setattr(alice.session.metadata, "publish", die)


def before_that_is_known(alice, monkeypatch):
    real = alice.session.metadata.publish

    async def lost(publication):
        await real(publication)
        die()

    monkeypatch.setattr(alice.session.metadata, "publish", lost)


STEPS = [
    before_the_keys_are_stored, before_the_record_is_published, before_the_answer_has_come,
    before_the_keys_are_taken_into_use, before_a_share_is_signed, before_that_is_known,
]  # fmt: skip


AGAIN, DAEMON = "the command again", "the daemon"
CASES = [
    *(("embedded", then, step) for step in STEPS for then in (AGAIN, DAEMON)),
    # Where it matters that a service answers the newest key only.
    *(("service", AGAIN, step) for step in STEPS[1:5]),
    ("service", DAEMON, before_the_keys_are_taken_into_use),
]


@pytest.mark.parametrize(
    ("anywhere", "then", "step"),
    CASES,
    ids=[f"{step.__name__}-{then}-{where}".replace(" ", "_") for where, then, step in CASES],
    indirect=["anywhere"],
)
def test_a_kill_leaves_an_identity_that_works_and_a_rotation_that_can_be_finished(
    anywhere, monkeypatch, step, then
):
    alice, bob = people(anywhere)
    with monkeypatch.context() as patched:
        step(alice, patched)
        with pytest.raises(Killed):
            rotate(alice)
        alice.crash()
    # Between the two lives, bob goes on.
    opened(bob)
    alone = then == AGAIN
    alice.start((lambda session: setattr(session.life, "_look", nothing)) if alone else None)
    stored = step is not before_the_keys_are_stored
    if alone:
        assert rotate(alice).resumed is stored
    elif stored:
        wait_until(lambda: len(me(alice).chain) == 2 and not me(alice).unfinished, "the rotation's end")
    else:
        assert len(me(alice).chain) == 1
        rotate(alice)
    assert len(me(alice).chain) == 2  # one rotation, whatever happened
    assert not me(alice).unfinished
    assert alice.world.run(alice.session.metadata.identity, "alice") == list(me(alice).chain)
    opened(alice)
    alice.view().write("file", b"after")
    alice.flush()
    assert roster_of(alice, alice).signer == me(alice).signing.kid
    opened(bob, b"after")
    for device in (bob, alice):
        device.close()


async def nothing(*, first):
    pass


def test_a_share_that_cannot_be_signed_is_named_and_done_later(pair):
    alice, bob = pair
    alice.create_share("second")
    real = alice.session.metadata.publish
    first = alice.share().row.share

    async def away(publication):
        if publication.share == first:
            raise MeshkitError("metadata_unavailable", "away")
        await real(publication)

    alice.session.metadata.publish = away
    done = rotate(alice)
    assert done.signed == ("second",)
    assert [(name, error.code) for name, error in done.left] == [("first", "metadata_unavailable")]
    assert me(alice).unfinished
    assert "not finished" in " ".join(ids.report(me(alice), int(time.time())).problems)
    opened(bob)  # the list under the old key was seen before, and counts until it runs out
    keys = me(alice).signing.kid
    assert rotate(alice).left
    assert me(alice).signing.kid == keys
    alice.session.metadata.publish = real
    done = rotate(alice)
    assert (done.resumed, done.signed, done.left, me(alice).unfinished) == (True, ("first",), (), False)
    opened(bob)
    assert bob.share().grant.roster.signer == me(alice).signing.kid == keys


def test_another_rotation_can_be_begun_though_shares_were_left(pair):
    alice, bob = pair

    async def away(_):
        raise MeshkitError("metadata_unavailable", "away")

    real, alice.session.metadata.publish = alice.session.metadata.publish, away
    rotate(alice)
    rotate(alice, again=True)
    assert len(me(alice).chain) == 3
    alice.session.metadata.publish = real
    assert rotate(alice).signed == ("first",)
    opened(bob)


# == two devices at once =============================================================================


@pytest.mark.parametrize("late", ["before it looks", "after it has looked"])
def test_of_two_devices_one_is_told_that_it_came_too_late(pair, place, late):
    alice, bob = pair
    alice.close()
    shutil.copytree(alice.root, f"{place}/copy")
    alice.start()
    copy = SimpleNamespace(world=alice.world, root=f"{place}/copy", home=Home(f"{place}/copy"), session=None)
    Device.start(copy)
    was = me(copy)
    chain = alice.world.run(copy.session.metadata.identity, "alice")
    rotate(alice)
    if late == "after it has looked":
        store = EvilMetadata(copy.session.metadata)
        store.on("identity", evil.fixed(chain), "alice", times=1)
        copy.session.life._metadata = store
    error = fails("identity_handle_taken", rotate, copy)
    assert "another device" in error.detail
    # Nothing of its keys is left, and what it had before is what it has.
    assert (me(copy).pending, me(copy).chain, me(copy).signing.kid) == (None, was.chain, was.signing.kid)
    assert alice.world.run(alice.session.metadata.identity, "alice") == list(me(alice).chain)
    shown = alice.world.run(Service(copy.session).call, "identity.show", {})
    assert any("old copy" in problem for problem in shown["problems"])
    Device.close(copy)
    opened(bob)
    opened(alice)


# == a stolen key ====================================================================================


@pytest.fixture
def stolen(pair):
    """Alice has rotated; mallory has her old signing key. Bob has seen the new list."""
    alice, bob = pair
    thief = me(alice).signing
    rotate(alice)
    opened(bob)
    return alice, bob, thief


def serve(bob, roster, head=None):
    """Put a roster before bob, vouched for by the real service, and a head."""
    share, now = bob.share().row.share, int(time.time())
    store = between(bob)
    stamp = Timestamp(share, record_hash(roster), now, now + 300).sign(evil.service_key(bob.metadata))
    store.on("roster", evil.fixed(roster), share)
    store.on("timestamp", evil.fixed(stamp), share)
    if head is not None:
        store.on("head", evil.fixed(head), share)


def forged(bob, thief, **changes):
    genuine = evil.newest_roster(bob.metadata, bob.share().row.share)
    seq = evil.peek(Roster, genuine).seq + 1
    return evil.forged_roster(genuine, thief, **{"seq": seq, "writers": (thief.public,)} | changes)


def test_the_old_key_signs_a_roster(stolen):
    _, bob, thief = stolen
    seen = bob.session.state.mark(bob.share().row.share)
    serve(bob, forged(bob, thief))
    refused(bob, "key_replaced")
    assert bob.session.state.mark(bob.share().row.share) == seen
    between(bob).heal()
    opened(bob)


def test_the_old_key_signs_a_roster_after_a_restart(stolen):
    """What was seen is remembered by the device, not by the process."""
    _, bob, thief = stolen
    bob.close()
    bob.start(interpose)
    serve(bob, forged(bob, thief))
    refused(bob, "key_replaced")


def test_the_old_key_signs_a_roster_for_who_has_not_seen_the_new_list(pair, monkeypatch):
    """For the overlap, what its owner may have signed before is believed; after that, nothing new is."""
    alice, bob = pair
    thief = me(alice).signing
    old = evil.newest_roster(bob.metadata, bob.share().row.share)
    rotate(alice)
    bob.world.run(bob.session.contacts.follow, "alice", int(time.time()))
    serve(bob, evil.forged_roster(old, thief, seq=evil.peek(Roster, old).seq + 1))
    between(bob).on("head", evil.withheld, bob.share().row.share)
    error = fails("head_rollback", bob.world.run, bob.session.gate.open, bob.share().row, "read")
    assert "none is offered" in error.detail  # past the roster, for the head is missing
    bob.session.state.forget_mark(bob.share().row.share)
    monkeypatch.setattr(_signers, "OVERLAP_S", -1)
    fails("key_replaced", bob.world.run, bob.session.gate.open, bob.share().row, "read")
    # The very list that was seen is nothing new: it counts until it runs out.
    between(bob).heal()
    bob.session.state.forget_mark(bob.share().row.share)
    opened(bob)


def test_the_old_key_signs_a_head(stolen):
    _, bob, thief = stolen
    share = bob.share().row.share
    genuine = evil.newest_head(bob.metadata, share)
    head = evil.peek(Head, genuine)
    forgery = evil.forged_head(genuine, thief, ver=head.ver + 1, prev=record_hash(genuine))
    between(bob).on("head", evil.fixed(forgery), share)
    refused(bob, "invalid_record")
    between(bob).heal()
    opened(bob)


def grant_by(thief, bob, key, epoch, rights=("read", "write")):
    row, now = bob.share().row, int(time.time())
    header = {
        "id": os.urandom(16), "grant": "live", "kind": 0, "share": row.share, "oid": row.oid, "epoch": epoch,
        "nbf": now - 60, "exp": now + 86400, "seq": 99, "rights": sorted(rights),
    }  # fmt: skip
    return header["id"], make_capsule(thief, header, key, me(bob).encryption.public)


def test_the_old_key_signs_a_capsule(stolen):
    alice, bob, thief = stolen
    row = bob.share().row
    epoch = bob.share().grant.roster.epoch
    capsule_id, blob = grant_by(thief, bob, os.urandom(32), epoch)
    # No store takes it, and a store that shows it changes nothing: the list does not name it.
    publication = Publication(row.share, capsules=((me(bob).encryption.kid, capsule_id, blob),))
    fails("invalid_record", alice.world.run, alice.session.metadata.publish, publication)
    between(bob).on("capsules", lambda honest: [*honest, blob], row.share)
    opened(bob)
    assert bob.share().grant.capsule.id != capsule_id
    between(bob).on("capsules", evil.fixed([blob]), row.share)
    refused(bob, "share_revoked")
    between(bob).heal()
    opened(bob)


def test_no_store_takes_a_roster_or_a_head_of_the_old_key(stolen):
    alice, bob, thief = stolen
    share = bob.share().row.share
    roster = forged(bob, thief)
    parsed = evil.peek(Roster, roster)
    publication = Publication(
        share, expect_roster=parsed.seq - 1, roster=roster, roster_seq=parsed.seq, roster_epoch=parsed.epoch
    )
    fails("invalid_record", alice.world.run, alice.session.metadata.publish, publication)
    genuine = evil.newest_head(bob.metadata, share)
    head = evil.peek(Head, genuine)
    forgery = evil.forged_head(genuine, thief, ver=head.ver + 1, prev=record_hash(genuine))
    publication = Publication(
        share, expect_head=record_hash(genuine), head=forgery, head_ver=head.ver + 1, head_epoch=head.epoch
    )
    fails("invalid_record", alice.world.run, alice.session.metadata.publish, publication)


def test_what_an_owner_gave_up_is_signed_anew_and_the_old_key_gives_up_nothing(pair):
    alice, bob = pair
    share = alice.share()
    for text in (b"2", b"3", b"4"):
        alice.view().write("file", text)
        alice.flush()
    alice.world.run(lambda: prune(share, Rules(last=1), dry_run=False))
    thief = me(alice).signing
    rotate(alice)
    opened(bob, b"4")
    record = alice.world.run(alice.session.metadata.retention, share.row.share)
    kept = Retention.parse(record, {me(alice).signing.kid: me(alice).signing.public})
    grant = bob.world.run(bob.share().use, "read")
    bob.world.run(bob.share().history.refresh, grant)
    assert bob.share().history.retention.seq == kept.seq == 2
    more = dataclasses.replace(kept, seq=3).sign(thief)
    fails("invalid_record", alice.world.run, alice.session.metadata.retain, share.row.share, more)
    between(bob).on("retention", evil.fixed(more), share.row.share)
    fails("invalid_record", bob.world.run, bob.share().history.refresh, grant)


# == a directory that lies ===========================================================================


def forked(alice, old):
    """The chain that mallory makes of the stolen key: signed by old and new, beside the true one."""
    new = SigningKey.generate()
    record = dataclasses.replace(old.public, root=new.public, sig=new.public)
    return [*old.chain, successor(old.record, old.signing, record, new)]


def without_a_chain(alice, old):
    return list(ids.create_identity("alice", int(time.time())).chain)


def somebody_elses(alice, old):
    return list(ids.create_identity("mallory", int(time.time())).chain)


@pytest.mark.parametrize("lie", [forked, without_a_chain, somebody_elses])
def test_a_key_without_a_valid_chain_closes_everything(pair, lie):
    """The contact is blocked: nothing is shared with it, and what it shared stays shut."""
    alice, bob = pair
    old = me(alice)
    rotate(alice)
    opened(bob)
    bob.create_share("bobs")
    between(bob).on("identity", evil.fixed(lie(alice, old)), "alice")
    add = bob.session.book.add
    fails("contact_key_changed", bob.world.run, add, bob.share("bobs"), "alice", Terms())
    refused(bob, "contact_key_changed")
    assert bob.session.contacts.get("alice").trust == "blocked"
    # The directory behaving again does not lift it, nor does a restart.
    between(bob).heal()
    refused(bob, "contact_key_changed")
    bob.close()
    bob.start()
    refused(bob, "contact_key_changed")
    fails("contact_key_changed", bob.world.run, bob.session.book.add, bob.share("bobs"), "alice", Terms())
    # The person's own act does.
    bob.session.contacts.add(me(alice).record, int(time.time()))
    opened(bob)


def test_the_gate_finds_out_that_a_key_changed_without_a_chain(pair):
    """Nobody shares anything: the list of who has access is simply signed by a stranger."""
    _, bob = pair
    stranger = ids.create_identity("alice", int(time.time()))
    between(bob).on("identity", evil.fixed(list(stranger.chain)), "alice")
    serve(bob, forged(bob, stranger.signing))
    refused(bob, "contact_key_changed")
    assert bob.session.contacts.get("alice").trust == "blocked"


def test_a_contact_replaced_by_hand_does_not_inherit_the_shares(pair):
    _, bob = pair
    other = ids.create_identity("alice", int(time.time()))
    bob.session.contacts.add(other.record, int(time.time()), replace=True)
    between(bob).on("identity", evil.fixed(list(other.chain)), "alice")
    refused(bob, "contact_key_changed")
    assert bob.session.contacts.get("alice").trust == "pinned"
    between(bob).heal()


def test_a_directory_that_hides_the_newest_record(pair):
    alice, bob = pair
    old = list(me(alice).chain)
    between(bob).on("identity", evil.fixed(old), "alice")
    rotate(alice)
    # Bob cannot know that the new key is alice's: he does not open, and blocks nobody.
    # (A lease that lives goes on until its end: unknown is not no.)
    fails("freshness_unproven", bob.world.run, bob.session.gate.open, bob.share().row, "read")
    assert bob.session.contacts.get("alice").trust == "pinned"
    between(bob).heal()
    opened(bob)
    # From here on he knows, whatever it hides.
    between(bob).on("identity", evil.fixed(old), "alice")
    contact = bob.world.run(bob.session.contacts.resolve, "alice", int(time.time()))
    assert contact.record == me(alice).record
    serve(bob, forged(bob, me(alice).old_signing[-1]))
    refused(bob, "key_replaced")


@pytest.mark.parametrize("left", [1, 2])
def test_a_truncated_chain_and_an_old_record_change_nothing(pair, left):
    alice, bob = pair
    first = me(alice).record
    rotate(alice)
    rotate(alice)
    opened(bob)
    known = bob.session.contacts.get("alice")
    assert known.record == me(alice).record
    between(bob).on("identity", evil.fixed(list(me(alice).chain[:left])), "alice")
    now = int(time.time())
    assert bob.world.run(bob.session.contacts.resolve, "alice", now) == known
    assert bob.session.contacts.add(first, now) == known
    assert bob.world.run(bob.session.contacts.meet, first, now) == known
    opened(bob)


def test_a_directory_that_cannot_be_asked_is_a_no_for_now(pair):
    alice, bob = pair
    between(bob).on("identity", evil.unavailable(), "alice")
    rotate(alice)
    # (A lease that lives goes on until its end: unknown is not no.)
    fails("freshness_unproven", bob.world.run, bob.session.gate.open, bob.share().row, "read")
    between(bob).heal()
    opened(bob)


# == others ==========================================================================================


def test_a_member_with_another_key_without_a_chain_keeps_the_old_grant_only(pair):
    """The owner does not re-wrap for a key that no chain leads to."""
    alice, bob = pair
    stranger = ids.create_identity("bob", int(time.time()))
    store = interpose(alice.session)
    store.on("identity", evil.fixed(list(stranger.chain)), "bob")
    opened(alice)
    look(alice)
    assert alice.session.contacts.get("bob").trust == "blocked"
    assert me(bob).signing.public in roster_of(alice, alice).writers
    alice.create_share("other")
    rotate(alice)
    roster = roster_of(alice, alice)
    assert stranger.signing.public not in roster.writers
    assert me(bob).signing.public in roster.writers
    opened(bob)


def test_a_store_restored_to_before_a_rotation(pair, place):
    """The owner says what is true, and signs it anew; the member follows."""
    alice, bob = pair
    backup = f"{place}/backup.db"
    apsw.Connection(str(alice.metadata)).execute("VACUUM INTO ?", (backup,))
    rotate(alice)
    opened(bob)
    with evil.opened(alice.metadata) as db, evil.opened(backup) as old:
        for table in ("rosters", "heads", "capsules", "identities", "identity_keys", "recipients"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608
            rows = old.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
            if rows:
                marks = ",".join("?" * len(rows[0]))
                db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608
    between(bob).heal()
    refused(bob, "roster_rollback")
    alice.close()
    alice.start()
    wait_until(lambda: len(directory(alice)) == 2, "the record's return")
    alice.world.run(alice.session.book.accept_rollback, alice.share())
    look(alice)
    assert roster_of(alice, alice).signer == me(alice).signing.kid
    bob.world.run(bob.session.book.accept_rollback, bob.share())
    opened(bob)


def directory(device):
    return device.world.run(device.session.metadata.identity, device.name)


def test_a_service_asks_for_the_newest_key_and_requests_under_way_find_it(anywhere):
    """Requests go on all the time while the key changes: none of them is refused for that."""
    alice, bob = people(anywhere)
    alice.view().write("busy", b"0")
    stop, failures = [], []

    async def busy():
        while not stop:
            try:
                await alice.session.metadata.share_state(
                    alice.share().row.share, me(alice).encryption_keys[-1].kid
                )
            except MeshkitError as error:
                failures.append(error)

    tasks = [alice.world.start(busy) for _ in range(4)]
    for _ in range(3):
        rotate(alice)
    stop.append(True)
    for task in tasks:
        task.wait()
    assert not failures
    opened(bob)
    for device in (bob, alice):
        device.close()
