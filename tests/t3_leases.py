"""Leases and freshness: what an answer that does not come means, offline grace, one's own shares, rosters.

Real sessions without a kernel. The metadata store is spoiled on its way to the gate; where time matters, the
clocks of a home (and of the store) are moved together.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import evil
import pytest
from devices import Device, Task, World, scratch
from evil import EvilMetadata
from homes import wait_until
from t3_gate import Provider, Silence, give

import meshkitfs.gate
from meshkitfs.core.records import Roster, record_hash
from meshkitfs.daemon import describe
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import ENDS, FRESH_S
from meshkitfs.gate._grant import lease_now
from meshkitfs.policy import Decision
from meshkitfs.shares import Terms
from meshkitfs.shares._book import ROSTER_AGAIN_S, ROSTER_RENEW_S
from meshkitfs.vfs._xattrs import reason_text

DATA = b"what is read under a lease " * 1000
DAY = 86400


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def two(place):
    """Alice with a share, and bob; each has an evil store between the metadata and what asks for it."""
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start(interpose)
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start(interpose)
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        for device in (bob, alice):
            if device.session is not None:
                device.session.services.metadata.heal()
                device.close()


def interpose(session):
    evil_metadata = EvilMetadata(session.metadata)
    session.gate._metadata = session.services.metadata = evil_metadata


def metadata_of(device):
    return device.session.services.metadata


def withhold(device):
    """From now on nobody answers what a share is."""
    for method in ("capsules", "roster", "timestamp", "head"):
        metadata_of(device).on(method, evil.unavailable())


def at(device, later):
    """Let it be ``later`` seconds from now on all clocks of a home, except those that nobody can set."""
    session = device.session
    session.clock._wall = session.services.wall = lambda: time.time() + later
    session.metadata._clock = session.clock._wall


def lapse(device):
    """Let the lease be over now."""
    device.share().grant.deadline = lease_now()


def look(device):
    """What the watchers of a daemon do."""
    let_lapse(device)
    device.refresh()


def let_lapse(device):
    async def work():
        device.share().lapse()

    device.world.run(work)


def xattr(view, path, name):
    ino = view.attr(path).ino
    return view.device.world.run(view.fs.getxattr, ino, name)


def errno_of(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno
    return 0


# == the table =======================================================================================


def test_the_table_is_complete():
    """Every code that the gate's modules name has its row."""
    gate = Path(meshkitfs.gate.__file__).parent
    named = set()
    for module in gate.glob("*.py"):
        if module.name != "_verdicts.py":
            named |= set(re.findall(r'"([a-z]+(?:_[a-z]+)+)"', module.read_text())) & TABLE.keys()
    # From below: what the identity, the unwrap, the clock and the state database raise.
    below = {
        "identity_not_found", "identity_locked", "key_unwrap_failed", "clock_rollback", "state_corrupt",
        "no_space", "home_busy",
    }  # fmt: skip
    assert named | below <= ENDS.keys() <= TABLE.keys()


UNKNOWN = {
    "no answer": ("freshness_unproven", lambda m, alice, bob: m.on("roster", evil.unavailable())),
    "no roster": ("freshness_unproven", lambda m, alice, bob: m.on("roster", evil.withheld)),
    "a damaged roster": ("freshness_unproven", lambda m, alice, bob: m.on("roster", evil.damaged)),
    "no timestamp": ("freshness_unproven", lambda m, alice, bob: m.on("timestamp", evil.withheld)),
    "no capsule": ("capsule_not_found", lambda m, alice, bob: m.on("capsules", lambda found: [])),
    "a capsule for another key": (
        "recipient_not_authorized",
        lambda m, alice, bob: m.on("capsules", lambda found: evil.capsules(alice.metadata, row_of(bob).share)[:1]),
    ),
    "a policy provider that fails": (
        "policy_provider_error",
        lambda m, alice, bob: setattr(bob.session.gate._conditions, "_policy", Provider(None)) or m.heal(),
    ),
}  # fmt: skip


def row_of(device):
    return device.share().row


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_is_not_no(two, kind):
    """What was proved goes on, and ends with its lease: not before, and not after."""
    alice, bob = two
    code, fault = UNKNOWN[kind]
    assert ENDS[code] is False
    give(alice, bob, Terms(("read", "write"), policy="p" if "policy" in kind else ""))
    bob.session.gate._conditions._policy = Provider(Decision(True, 600))
    view = bob.view()
    fd = view.open("file")
    assert view.read("file") == DATA
    grant = bob.share().grant
    fault(metadata_of(bob), alice, bob)
    look(bob)
    assert view.read("file") == DATA  # an open that wants the newest state
    assert bob.share().grant is grant
    assert grant.alive
    assert bob.share().refusal is None
    assert bob.share().unconfirmed.code == code
    said = reason_text(bob.share(), None)
    assert said.startswith(f"{code}: ")
    assert "all the same" in said
    assert b"not confirmed since" in xattr(view, "file", b"user.meshkit.freshness")
    shown = describe.share(bob.share())
    assert (shown["state"], shown["reason"]) == ("stored", code)
    assert shown["freshness"]["unconfirmed"].startswith(code)
    assert 0 < shown["freshness"]["ends_in_seconds"] <= FRESH_S
    lapse(bob)
    let_lapse(bob)
    assert bob.share().refusal.code in ("freshness_unproven", code)
    assert errno_of(view.pread, fd, 0, 10) == errno.EACCES
    assert errno_of(view.read, "file") == errno.EACCES
    assert bob.share().refusal.code == code


def test_a_lease_that_ends_is_renewed_when_somebody_answers(two):
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    withhold(bob)
    look(bob)
    first = bob.share().grant
    alice.view().write("file", b"meanwhile")
    alice.flush()
    assert bob.view().read("file") == DATA
    metadata_of(bob).heal()
    look(bob)
    assert bob.view().read("file") == b"meanwhile"
    assert bob.share().grant is not first
    assert bob.share().unconfirmed is None
    assert reason_text(bob.share(), None) == "ok"


def test_a_newer_roster_that_nobody_vouches_for_ends_a_lease(two):
    """The owner has said something new; what rests on the roster before is not gone on with."""
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    metadata_of(bob).on("timestamp", evil.withheld)
    assert errno_of(bob.view().read, "file") == errno.EACCES
    assert bob.share().refusal.code == "freshness_unproven"


def test_changes_go_on_under_a_lease_and_go_out_later(two):
    alice, bob = two
    give(alice, bob)
    bob.view().write("file", b"one")
    bob.flush()
    withhold(bob)
    metadata_of(bob).inner, kept = Unreachable(metadata_of(bob).inner), metadata_of(bob).inner
    look(bob)
    bob.view().write("file", b"two")
    with pytest.raises(MeshkitError) as caught:
        bob.flush()
    assert caught.value.code == "metadata_unavailable"
    assert bob.view().read("file") == b"two"
    metadata_of(bob).inner = kept
    metadata_of(bob).heal()
    bob.flush()
    alice.refresh()
    assert alice.view().read("file") == b"two"


class Unreachable:
    """A metadata home at which nothing can be published."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def publish(self, publication):
        raise MeshkitError("metadata_unavailable", "away")


def test_an_open_waits_for_silence_once(two):
    """Who opens a file while nobody answers waits a deadline at first, and then hardly at all."""
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    silence, real = Silence(), metadata_of(bob).share_state
    metadata_of(bob).share_state = silence
    alice.view().write("file", b"meanwhile")
    alice.flush()
    for seconds in (10.5, 1.5):
        silence.asked = False
        metadata_of(bob)._turn += 1 << 50
        task = bob.world.start(bob.share().use, "read")
        assert task.wait() is bob.share().grant  # what is open asks nobody
        task = start_open(bob)
        wait_for(lambda: silence.asked)
        bob.world.pass_time(seconds)
        assert task.wait() is bob.share().grant
    assert bob.share().unconfirmed.code == "freshness_unproven"
    metadata_of(bob).share_state = real
    metadata_of(bob).heal()
    assert bob.view().read("file") == b"meanwhile"


def start_open(device) -> Task:
    async def current():
        return await device.share().use("read", current=True)

    return device.world.start(current)


def wait_for(condition):

    wait_until(condition, "it")


PROVED = {
    "revoked": ("share_revoked", lambda alice, bob: alice.world.run(alice.session.book.revoke, alice.share(), "bob")),
    "an old roster": ("roster_rollback", lambda alice, bob: old_roster(alice, bob)),
    "an old head": ("head_rollback", lambda alice, bob: metadata_of(bob).on("head", evil.withheld)),
    "a head that nobody signed": ("invalid_record", lambda alice, bob: metadata_of(bob).on("head", evil.damaged)),
    "the clock was set back": ("clock_rollback", lambda alice, bob: at(bob, -3600)),
    "locked": ("identity_locked", lambda alice, bob: lock(bob)),
    "a policy that says no": ("policy_denied", lambda alice, bob: deny(bob)),
}  # fmt: skip


def old_roster(alice, bob):
    """Bob has seen a newer roster than the one that he is shown now."""
    old = evil.newest_roster(bob.metadata, row_of(bob).share)
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    assert bob.view().read("file") == DATA
    metadata_of(bob).on("roster", evil.fixed(old))


def lock(device):
    def locked():
        raise MeshkitError("identity_locked")

    device.session.gate._encryption = locked


def deny(device):
    device.session.gate._conditions._policy = Provider(Decision(False, 60))


@pytest.mark.parametrize("kind", PROVED)
def test_a_proved_no_ends_a_lease_at_once(two, kind):
    alice, bob = two
    code, happens = PROVED[kind]
    assert ENDS[code] is True
    give(alice, bob, Terms(("read", "write"), policy="p" if "policy" in kind else ""))
    bob.session.gate._conditions._policy = Provider(Decision(True, 600))
    view = bob.view()
    fd = view.open("file")
    assert view.read("file") == DATA
    happens(alice, bob)
    metadata_of(bob)._turn += 1 << 50
    bob.refresh()
    assert bob.share().refusal.code == code
    assert errno_of(view.pread, fd, 0, 10) == TABLE[code].errno


# == offline grace ===================================================================================


def graced(two, seconds=3 * DAY):
    """Bob with an offline grace, who has read the file; from now on nobody answers him."""
    alice, bob = two
    give(alice, bob, Terms(("read", "write"), offline_grace=seconds))
    assert bob.view().read("file") == DATA
    withhold(bob)
    return alice, bob


def over(device):
    """The lease ends; whether the share opens again is for the gate to say."""
    if device.share().grant is not None:
        lapse(device)
    let_lapse(device)
    return errno_of(device.view().read, "file")


def test_a_grace_carries_on_and_ends(two):
    _, bob = graced(two, DAY)
    assert over(bob) == 0
    assert bob.share().unconfirmed.code == "freshness_unproven"
    assert bob.share().grant.seconds_left <= FRESH_S
    at(bob, DAY - 200)
    assert over(bob) == 0
    assert 0 < bob.share().grant.seconds_left <= 200  # never beyond the grace
    at(bob, DAY + 5)
    assert over(bob) == errno.EACCES
    assert bob.share().refusal.code == "freshness_unproven"
    assert "the offline grace ended" in bob.share().refusal.detail
    at(bob, 0)
    assert over(bob) == errno.EACCES  # the clock is set back
    assert bob.share().refusal.code == "clock_rollback"


def test_without_a_grace_a_share_closes(two):
    _, bob = graced(two, 0)
    assert errno_of(bob.view().read, "file") == 0
    assert over(bob) == errno.EACCES
    bob.close()
    bob.start(interpose)
    withhold(bob)
    assert errno_of(bob.view().read, "file") == errno.EACCES


def test_a_grace_outlives_a_restart(two):
    _, bob = graced(two)
    bob.close()
    bob.start(interpose)
    withhold(bob)
    assert bob.view().read("file") == DATA
    bob.view().write("new", b"offline")
    assert bob.view().read("new") == b"offline"
    bob.close()
    bob.start(interpose)
    withhold(bob)
    at(bob, 3 * DAY + 10)
    assert errno_of(bob.view().read, "file") == errno.EACCES
    metadata_of(bob).heal()
    assert bob.view().read("file") == DATA
    assert bob.view().read("new") == b"offline"


def test_a_grace_that_ends_with_the_roster(two):
    """A roster vouches for 7 days, and no grace is good for longer."""
    alice, bob = two
    signing = alice.session.identity.signing
    give(alice, bob, Terms(("read",), offline_grace=7 * DAY))
    now = int(time.time())
    short = evil.forged_roster(
        evil.newest_roster(bob.metadata, row_of(bob).share), signing, exp=now + 1000, seq=50
    )
    metadata_of(bob).on("roster", evil.fixed(short))
    metadata_of(bob).on(
        "timestamp", lambda stamp: metadata_of(bob).sign_timestamp(row_of(bob).share, short, now)
    )
    assert bob.view().read("file") == DATA
    withhold(bob)
    at(bob, 900)
    assert over(bob) == 0
    at(bob, 1010)
    assert over(bob) == errno.EACCES


def test_a_grace_that_ends_with_the_grant(two):
    alice, bob = two
    give(alice, bob, Terms(("read",), int(time.time()) + 2000, offline_grace=7 * DAY))
    assert bob.view().read("file") == DATA
    withhold(bob)
    at(bob, 1900)
    assert over(bob) == 0
    at(bob, 2010)
    assert over(bob) == errno.EACCES
    assert bob.share().refusal.code == "share_expired"


def test_a_grant_that_was_shortened_has_expired(two):
    """Its owner lists it no longer, and that is not called a revocation because of the longer grant before it."""
    alice, bob = two
    give(alice, bob, Terms(("read",)))
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",), int(time.time()) + 2))
    alice.refresh()
    epoch = alice.share().grant.roster.epoch

    def shut_out():
        alice.session.book._next_look = 0
        alice.world.run(alice.session.book.renew_rosters)
        alice.refresh()
        return alice.share().grant.roster.epoch > epoch

    wait_until(shut_out, "the end of the grant")
    assert errno_of(bob.view().read, "file") == errno.EACCES
    assert bob.share().refusal.code == "share_expired"
    with pytest.raises(MeshkitError, match="before roster"):
        bob.world.run(bob.session.gate.open, row_of(bob), "read")


def test_a_revocation_that_was_seen_ends_a_grace(two):
    alice, bob = two
    give(alice, bob, Terms(("read",), offline_grace=3 * DAY))
    assert bob.view().read("file") == DATA
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    bob.refresh()
    assert bob.share().refusal.code == "share_revoked"
    withhold(bob)
    assert errno_of(bob.view().read, "file") == errno.EACCES
    assert bob.share().refusal.code == "freshness_unproven"
    bob.close()
    bob.start(interpose)
    withhold(bob)
    assert errno_of(bob.view().read, "file") == errno.EACCES


def test_what_is_kept_is_the_newest_that_was_seen(two):
    """A newer version was seen, and its records are not there: older ones are not shown in its place."""
    _, bob = graced(two)
    state, share = bob.session.state, row_of(bob).share
    mark = state.mark(share)
    state.raise_mark(share, replace(mark, head_version=mark.head_version + 1, head_hash=bytes(32)))
    assert over(bob) == errno.EACCES
    assert bob.share().refusal.code == "freshness_unproven"
    assert state.quarantine(share) is None  # nobody has shown anything wrong


def test_a_grace_that_was_taken_back(two):
    alice, bob = two
    give(alice, bob, Terms(("read",), offline_grace=3 * DAY))
    assert bob.view().read("file") == DATA
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    bob.refresh()
    withhold(bob)
    assert over(bob) == errno.EACCES


def test_a_grace_is_kept_over_a_new_epoch(two):
    """Revoking somebody else wraps every other grant anew, with all its terms."""
    alice, bob = two
    give(alice, bob, Terms(("read",), offline_grace=3 * DAY))
    alice.refresh()
    (bobs,) = [m for m in alice.session.book.standing(alice.share()) if m.handle == "bob"]
    assert describe.member(bobs)["offline_grace"] == 3 * DAY
    carol = Device(alice.world, alice.root.with_name("carol"), "carol", beside=alice).start()
    alice.world.run(alice.session.book.add, alice.share(), "carol", Terms(("read",)))
    alice.world.run(alice.session.book.revoke, alice.share(), "carol")
    carol.close()
    assert bob.view().read("file") == DATA
    assert bob.share().grant.capsule.epoch == 2
    assert bob.share().grant.capsule.offline_grace == 3 * DAY


def test_what_is_kept_is_verified_again(two):
    """Somebody who could write the state database still could not sign."""
    _, bob = graced(two)
    state, name = bob.session.state, f"proof:{row_of(bob).ref.hex()}"
    good = state.setting(name)
    at_roster = good.index(evil.newest_roster(bob.metadata, row_of(bob).share))
    bad = good[: at_roster + 100] + bytes([good[at_roster + 100] ^ 1]) + good[at_roster + 101 :]
    for spoiled in (bad, b"\xa0", b"nothing", 7):
        bob.close()
        bob.start(interpose)
        withhold(bob)
        bob.session.state.set_setting(name, spoiled)
        assert errno_of(bob.view().read, "file") == errno.EACCES
        assert bob.share().refusal.code == "freshness_unproven"


# == clocks ==========================================================================================


def test_a_clock_that_is_set_back_between_two_runs_does_not_lengthen_a_grace(two):
    _, bob = graced(two, DAY)
    at(bob, DAY - 3600)
    assert over(bob) == 0  # and that it is so late by now is remembered
    bob.close()
    bob.start(interpose)
    withhold(bob)
    at(bob, 10)
    assert errno_of(bob.view().read, "file") == errno.EACCES
    assert bob.share().refusal.code == "clock_rollback"


def test_a_clock_that_stands_still_does_not_lengthen_a_grace(two):
    """Time that passed in this run, suspended or not, has passed, whatever the wall clock says."""
    _, bob = graced(two, DAY)
    at(bob, 100)
    assert over(bob) == 0
    clock = bob.session.clock
    running = clock._running
    stopped = time.time() + 100
    clock._wall = lambda: stopped
    clock._running = lambda: running() + DAY
    assert over(bob) == errno.EACCES
    assert bob.share().refusal.code == "clock_rollback"
    clock._wall = lambda: stopped + DAY - 60  # within what is put up with
    assert errno_of(bob.view().read, "file") == errno.EACCES
    assert "the offline grace ended" in bob.share().refusal.detail


def test_a_lease_ends_in_suspend(two):
    """The machine sleeps: the lease counts on, and nothing is read before somebody was asked."""
    alice, bob = two
    give(alice, bob)
    view = bob.view()
    fd = view.open("file")
    assert view.read("file") == DATA
    withhold(bob)
    bob.share().grant.deadline -= FRESH_S  # as after five minutes of sleep
    assert errno_of(view.pread, fd, 0, 10) == errno.EACCES
    metadata_of(bob).heal()
    assert view.pread(fd, 0, 10) == DATA[:10]


def test_a_shorter_lease_is_the_homes_choice(two):
    alice, bob = two
    bob.session.gate.lease_s = 20.0
    give(alice, bob)
    assert bob.view().read("file") == DATA
    assert bob.share().grant.seconds_left <= 20
    bounds = describe.bounds(bob.session)
    assert bounds == {"noticed_seconds": 1.0, "lease_seconds": 20.0, "unreachable_seconds": 21.0}


# == one's own =======================================================================================


def test_ones_own_share_is_not_closed_by_silence(two):
    alice, _ = two
    withhold(alice)
    assert over(alice) == 0
    assert alice.share().unconfirmed.code == "freshness_unproven"
    at(alice, 30 * DAY)  # longer than any roster
    assert over(alice) == 0
    alice.close()
    alice.start(interpose)
    withhold(alice)
    at(alice, 30 * DAY)
    assert alice.view().read("file") == DATA
    alice.view().write("file", b"offline")
    metadata_of(alice).heal()
    alice.flush()
    assert alice.view().read("file") == b"offline"


def test_a_roster_that_ran_out_does_not_keep_its_owner_out(two):
    """Renewing it is what they come for."""
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    alice.close()
    alice.start(interpose)
    for device in (alice, bob):
        at(device, 8 * DAY)
    assert over(bob) == errno.EACCES
    assert "the roster ran out" in bob.share().refusal.detail
    assert alice.view().read("file") == DATA
    alice.world.run(alice.session.book.renew_rosters)
    assert errno_of(bob.view().read, "file") == 0


def test_nothing_is_deleted_on_remembered_proof(two):
    alice, _ = two
    withhold(alice)
    assert over(alice) == 0
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(alice.session.gate.confirm, row_of(alice), "reshare")
    assert caught.value.code == "freshness_unproven"
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(alice.session.book.accept_rollback, alice.share())
    assert caught.value.code == "freshness_unproven"


# == rosters =========================================================================================


def roster_of(device, share=None):
    blob = evil.newest_roster(device.metadata, share or row_of(device).share)
    return evil.peek(Roster, blob), record_hash(blob)


def test_an_owner_renews_rosters_also_of_what_nobody_opens(two):
    alice, bob = two
    give(alice, bob, Terms(("read",), offline_grace=DAY))
    first, _ = roster_of(alice)
    alice.close()
    alice.start(interpose)
    renew = alice.session.book.renew_rosters
    alice.world.run(renew)
    assert roster_of(alice)[0] == first
    assert alice.share().tree is None  # it is not opened to find that out
    at(alice, 7 * DAY - ROSTER_RENEW_S + 60)
    alice.world.run(renew)
    second, _ = roster_of(alice)
    assert (second.seq, second.exp > first.exp) == (first.seq + 1, True)
    assert set(second.caps) == set(first.caps)
    assert alice.share().roster_until == second.exp
    assert bob.view().read("file") == DATA


def test_an_owner_who_cannot_renew_says_so(two):
    alice, _ = two
    session, share = alice.session, alice.share()
    first, _ = roster_of(alice)
    withhold(alice)
    metadata_of(alice).inner, kept = Unreachable(metadata_of(alice).inner), metadata_of(alice).inner
    at(alice, 5 * DAY)
    alice.world.run(session.book.renew_rosters)
    assert share.roster_problem.code == "roster_not_renewed"
    assert "metadata_unavailable" in share.roster_problem.detail
    assert [item.code for item in session.incidents if item.code == "roster_not_renewed"] != []
    shown = describe.share(share)
    assert shown["roster"]["until"] == first.exp
    assert "runs out in" in shown["roster"]["problem"]
    assert b"roster_not_renewed" in describe.errors_text(session)
    metadata_of(alice).inner = kept
    metadata_of(alice).heal()
    at(alice, 5 * DAY + ROSTER_AGAIN_S + 10)
    alice.world.run(session.book.renew_rosters)
    assert share.roster_problem is None
    assert describe.share(share)["roster"]["problem"] == ""
    assert roster_of(alice)[0].seq == first.seq + 1


def test_one_roster_that_cannot_be_renewed_keeps_no_other_from_it(two):
    alice, _ = two
    alice.create_share("second")
    first = row_of(alice).share
    metadata_of(alice).on("roster", evil.unavailable(), first)
    at(alice, 5 * DAY)
    let_lapse(alice)
    metadata_of(alice).inner = Stubborn(metadata_of(alice).inner, first)
    before = roster_of(alice, alice.share("second").row.share)[0].seq
    alice.world.run(alice.session.book.renew_rosters)
    assert alice.share().roster_problem is not None
    assert alice.share("second").roster_problem is None
    assert roster_of(alice, alice.share("second").row.share)[0].seq == before + 1
    metadata_of(alice).inner = metadata_of(alice).inner._inner


class Stubborn(Unreachable):
    """A metadata home that publishes nothing of one share."""

    def __init__(self, inner, share):
        super().__init__(inner)
        self._share = share

    async def publish(self, publication):
        if publication.share == self._share:
            raise MeshkitError("metadata_unavailable", "away")
        await self._inner.publish(publication)


def test_an_owner_who_has_just_revoked_goes_on(two):
    """Nobody answers any more before what was published was looked at again."""
    alice, bob = two
    give(alice, bob)
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    withhold(alice)
    assert errno_of(alice.view().read, "file") == 0
    alice.close()
    alice.start(interpose)
    withhold(alice)
    assert alice.view().read("file") == DATA
    assert alice.share().grant.roster.epoch == 2


def test_how_a_grace_is_said(two):
    alice, bob = two
    service = Service(alice.session)
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(
            service.call, "share.add", {"target": "first", "recipient": "bob", "offline_grace": "8d"}
        )
    assert caught.value.code == "invalid_argument"
    wanted = {"target": "first", "recipient": "bob", "offline_grace": "36h"}
    assert alice.world.run(service.call, "share.add", wanted)["offline_grace"] == 36 * 3600
    bob.world.run(bob.session.book.inbox.accept, "first", b"first")
    assert bob.view().read("file") == DATA
    assert describe.share(bob.share())["freshness"]["offline_grace"] == 36 * 3600
    told = alice.world.run(service.call, "share.revoke", {"share": "first", "recipient": "bob"})
    assert (told["bound_seconds"], told["unreachable_bound_seconds"]) == (1.0, 36 * 3600 + 1.0)
    invited = alice.world.run(service.call, "share.invite", {"share": "first", "offline_grace": "3d"})
    assert invited["offline_grace"] == 3 * DAY
    (item,) = alice.session.welcome.items()
    assert item.offline_grace == 3 * DAY
