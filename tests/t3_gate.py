"""The gate's checks that nothing on a disk can provoke: late and wrong answers, policy providers, leases.

A real session without a kernel. The metadata store's answers are spoiled on their way to the gate, and the
policy provider is the test's own.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import time
import traceback
from pathlib import Path

import evil
import pytest
import t4_gate
import trio
from devices import Device, World, scratch
from evil import EvilMetadata
from homes import wait_until

from meshkitfs.core import _mint
from meshkitfs.core.blocks import ContentKey, VerifiedBlock
from meshkitfs.core.capsule import make_capsule
from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Roster, Timestamp, record_hash
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import Grant, Trace, _grant
from meshkitfs.gate import _gate as gate_module
from meshkitfs.policy import POLICY_DEADLINE_S, Decision
from meshkitfs.shares import Terms

DATA = b"the content that must not come out " * 1000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def two(place):
    """Alice with a share, and bob with an evil store between him and the metadata."""
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start(interpose)
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        if bob.session is not None:
            bob.close()
        alice.close()


def interpose(session):
    """Put an `EvilMetadata` between the session's gate and shares and the real store."""
    evil_metadata = EvilMetadata(session.metadata)
    session.gate._metadata = session.services.metadata = evil_metadata


def metadata_of(device):
    return device.session.services.metadata


def give(alice, bob, terms=None):
    """Alice shares with bob, who takes it in without opening it; returns his row of it."""
    alice.world.run(alice.session.book.add, alice.share(), "bob", terms or Terms(("read", "write")))
    bob.world.run(bob.session.book.inbox.accept, "first", b"first")
    return bob.share().row


def walk(device, action="read", trace=None):
    """One walk through the gate."""
    return device.world.run(device.session.gate.open, device.share().row, action, trace)


def counters(device):
    session = device.session
    return session.gate.counters.unwraps, session.store.counters.gets, session.services.reader.counters.opens


def refused(device, code, step, *, unwraps=0):
    """Assert that the gate refuses at ``step`` with ``code``, having spent nothing."""
    before, trace = counters(device), Trace()
    with pytest.raises(MeshkitError) as caught:
        walk(device, trace=trace)
    assert caught.value.code == code
    results = {item.name: item.result for item in trace.steps}
    assert results[step] == "refused"
    order = list(results)
    assert {results[name] for name in order[order.index(step) + 1 :]} <= {"not reached"}
    after = counters(device)
    assert (after[0] - before[0], *after[1:]) == (unwraps, *before[1:])
    # A program gets the errno of the table and nothing else.
    with pytest.raises(OSError) as seen:
        device.view().read("file")
    assert seen.value.errno == TABLE[code].errno
    return caught.value


# == freshness =======================================================================================


def roster_hash_of(bob):
    return record_hash(evil.newest_roster(bob.metadata, bob.share().row.share))


def stamped(bob, iat, exp, *, roster=None, share=None, signer=None):
    """A fault that serves a timestamp of these times, by default signed by the right service."""

    def fault(_):
        record = Timestamp(
            share=share or bob.share().row.share, roster=roster or roster_hash_of(bob), iat=iat, exp=exp
        )
        return record.sign(signer or evil.service_key(bob.metadata))

    return fault


def now():
    """Of the test, not of its module: a timestamp that has run out meanwhile is refused for another reason."""
    return int(time.time())


TIMESTAMPS = {
    "none": lambda bob: evil.withheld,
    "damaged": lambda bob: evil.damaged,
    "run out": lambda bob: stamped(bob, now() - 310, now() - 10),
    "from the future": lambda bob: stamped(bob, now() + 600, now() + 900),
    "good for a year, and old": lambda bob: stamped(bob, now() - 310, now() + 31_536_000),
    "over another roster": lambda bob: stamped(bob, now(), now() + 300, roster=bytes(32)),
    "of another share": lambda bob: stamped(bob, now(), now() + 300, share=bytes(16)),
    "of another service": lambda bob: stamped(bob, now(), now() + 300, signer=SigningKey.generate()),
    "not bytes": lambda bob: evil.fixed(b"\xa0"),
    "a roster": lambda bob: evil.fixed(evil.newest_roster(bob.metadata, bob.share().row.share)),
}


@pytest.mark.parametrize("kind", TIMESTAMPS)
def test_timestamps(two, kind):
    alice, bob = two
    row = give(alice, bob)
    metadata_of(bob).on("timestamp", TIMESTAMPS[kind](bob), row.share)
    error = refused(bob, "freshness_unproven", "freshness")
    assert ("no timestamp" in error.detail) is (kind == "none")
    metadata_of(bob).heal()
    assert bob.view().read("file") == DATA


def test_a_lease_is_never_longer_than_its_shortest_proof(two):
    alice, bob = two
    row = give(alice, bob)
    now = int(time.time())
    metadata_of(bob).on("timestamp", stamped(bob, now, now + 31_536_000), row.share)
    grant = walk(bob)
    assert grant.fresh_until == now + 300
    assert 0 < grant.deadline - time.clock_gettime(_grant._LEASE_CLOCK) <= 301
    metadata_of(bob).on("timestamp", stamped(bob, now, now + 20), row.share)
    assert walk(bob).deadline - time.clock_gettime(_grant._LEASE_CLOCK) <= 21
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",), int(time.time()) + 9))
    assert walk(bob).deadline - time.clock_gettime(_grant._LEASE_CLOCK) <= 10


def test_a_lease_ends_with_the_roster_too(two):
    alice, bob = two
    row = give(alice, bob)
    now = int(time.time())
    signing = alice.session.identity.signing
    short = evil.forged_roster(evil.newest_roster(bob.metadata, row.share), signing, exp=now + 15)
    metadata_of(bob).on("roster", evil.fixed(short), row.share)
    metadata_of(bob).on("timestamp", stamped(bob, now, now + 300, roster=record_hash(short)), row.share)
    assert walk(bob).deadline - time.clock_gettime(_grant._LEASE_CLOCK) <= 16


def test_a_lease_that_ran_out_gives_nothing_more(two):
    alice, bob = two
    give(alice, bob)
    grant = walk(bob)
    grant.deadline = time.clock_gettime(_grant._LEASE_CLOCK)
    assert not grant.alive
    uses = (lambda: grant.content_key(bytes(64)), lambda: grant.root_key(1, 1), lambda: grant.require("list"))
    for use in (*uses, lambda: grant.sealing_key(1), grant.check):
        with pytest.raises(MeshkitError) as caught:
            use()
        assert caught.value.code == "freshness_unproven"


def test_a_lease_counts_while_the_machine_sleeps():
    """CLOCK_MONOTONIC stands still in suspend: a laptop opened after a night would go on with its grants."""
    assert time.CLOCK_BOOTTIME == _grant._LEASE_CLOCK


@pytest.mark.parametrize("code", ["metadata_unavailable", "invalid_record", "no_space", "internal_error"])
@pytest.mark.parametrize("method", ["capsules", "roster", "timestamp", "head"])
def test_whatever_the_store_says_unknown_is_no(two, method, code):
    alice, bob = two
    give(alice, bob)
    metadata_of(bob).on(method, evil.unavailable(code))
    refused(bob, "freshness_unproven", "capsule")


def test_a_store_that_never_answers(two):
    alice, bob = two
    give(alice, bob)

    silence = metadata_of(bob).share_state = Silence()
    assert late(bob, silence, gate_module.METADATA_DEADLINE_S) == "freshness_unproven"
    assert counters(bob) == (0, 0, 0)


class Silence:
    """A call that never answers."""

    def __init__(self):
        self.asked = False

    async def __call__(self, *args):
        self.asked = True
        await trio.sleep_forever()


def late(device, silence, deadline):
    """Walk until ``silence`` is asked and its deadline is over; returns the code of the refusal."""
    task = device.world.start(device.session.gate.open, device.share().row, "read", None)
    wait_until(lambda: silence.asked, "the question")
    device.world.pass_time(deadline + 1)
    with pytest.raises(MeshkitError) as caught:
        task.wait()
    return caught.value.code


@pytest.mark.parametrize("how", ["error", "silence"])
def test_a_chain_of_heads_that_cannot_be_had(two, how):
    """Between the version seen and the newest there are others, and nobody shows them."""
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    for text in (b"1", b"2", b"3"):
        alice.view().write("file", text)
        alice.flush()
    if how == "error":
        metadata_of(bob).on("heads", evil.unavailable())
        with pytest.raises(MeshkitError) as caught:
            walk(bob)
        code = caught.value.code
    else:
        silence = metadata_of(bob).heads = Silence()
        code = late(bob, silence, gate_module.METADATA_DEADLINE_S)
    assert code == "freshness_unproven"
    assert bob.session.state.quarantine(bob.share().row.share) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blobs: [],
        lambda blobs: blobs[1:],
        lambda blobs: blobs[:-1],
        lambda blobs: blobs[::-1],
        evil.damaged,
        lambda blobs: [b"\xa0" for _ in blobs],
    ],
)
def test_a_chain_of_heads_with_a_gap(two, spoil):
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    for text in (b"1", b"2", b"3"):
        alice.view().write("file", text)
        alice.flush()
    metadata_of(bob).on("heads", spoil)
    with pytest.raises(MeshkitError) as caught:
        walk(bob)
    assert caught.value.code == "head_fork"


# == policy ==========================================================================================


class Provider:
    """A policy provider that gives one answer, however wrong, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def decide(self, demand, requests, now):
        self.asked.append(requests)
        if isinstance(self.answer, BaseException):
            raise self.answer
        answer = await self.answer() if callable(self.answer) else self.answer
        return [answer(request) if callable(answer) else answer for request in requests]

    async def aclose(self):
        pass


class Odd:
    """An answer of another shape."""

    allow = True


NOS = {
    "no": (Decision(False, 60), "policy_denied"),
    "None": (Decision(None, 60), "policy_denied"),
    "the string true": (Decision("true", 60), "policy_denied"),
    "the number 1": (Decision(1, 60), "policy_denied"),
    "an object": (Decision({"decision": True}, 60), "policy_denied"),
    "yes, until just now": (Decision(True, 0), "policy_denied"),
    "yes, until long ago": (Decision(True, -3600), "policy_denied"),
    "yes, for how long?": (Decision(True, "long"), "policy_provider_error"),
    "nothing": (None, "policy_provider_error"),
    "another shape": (Odd(), "policy_provider_error"),
    "a coded failure": (MeshkitError("policy_provider_error", "500"), "policy_provider_error"),
    "another coded failure": (MeshkitError("provider_http_error", "500"), "policy_provider_error"),
    "a crash": (RuntimeError("boom"), "policy_provider_error"),
    "a network failure": (OSError(111, "refused"), "policy_provider_error"),
}


@pytest.mark.parametrize("kind", NOS)
def test_everything_but_yes_is_no(two, kind):
    alice, bob = two
    give(alice, bob, Terms(("read",), policy="p1"))
    answer, code = NOS[kind]
    bob.session.gate._conditions._policy = Provider(answer)
    refused(bob, code, "policy")


def test_a_late_yes_is_no(two):
    alice, bob = two
    give(alice, bob, Terms(("read",), policy="p1"))
    silence = Silence()
    bob.session.gate._conditions._policy = Provider(silence)
    assert late(bob, silence, POLICY_DEADLINE_S) == "policy_provider_error"
    assert counters(bob) == (0, 0, 0)


def test_yes_is_yes_for_as_long_as_it_says(two):
    alice, bob = two
    row = give(alice, bob, Terms(("read",), policy="p1"))
    provider = bob.session.gate._conditions._policy = Provider(Decision(True, 30))
    grant = walk(bob)
    assert 0 < grant.deadline - time.clock_gettime(_grant._LEASE_CLOCK) <= 31
    (requests,) = provider.asked
    assert [asked.action for asked in requests] == ["list", "read"]
    asked = requests[1]
    assert (asked.policy_id, asked.capsule_id) == ("p1", grant.capsule.id)
    assert asked.identity == bob.session.identity.encryption.kid.hex()
    assert bob.view().read("file") == DATA
    assert row.grant == "live"


def test_the_decision_is_about_the_capsule_that_is_opened(two):
    """The store puts another capsule in its place while the policy provider thinks: it is not used."""
    alice, bob = two
    row = give(alice, bob, Terms(("read",), policy="p1"))
    decided = bob_capsule(bob)

    async def swap():
        evil.replace_capsule(bob.metadata, decided, b"something else entirely")
        return Decision(True, 30)

    bob.session.gate._conditions._policy = Provider(swap)
    assert walk(bob).capsule_hash == record_hash(decided)
    assert row.share == bob.share().row.share


def bob_capsule(bob):
    kid = bob.session.identity.encryption.kid
    found = evil.capsules(bob.metadata, bob.share().row.share)
    return [blob for blob in found if evil.peek1(blob, "mk/cap@1")["h"]["to"] == kid][-1]


# == identity ========================================================================================


@pytest.mark.parametrize("code", ["identity_locked", "identity_not_found"])
def test_no_identity_no_question(two, code):
    """A locked key vault ends the walk before the store learns that somebody wanted to look."""
    alice, bob = two
    give(alice, bob)

    def locked():
        raise MeshkitError(code)

    bob.session.gate._encryption = locked
    bob.session.gate.forget_keys()
    asked = len(metadata_of(bob).log)
    refused(bob, code, "identity")
    assert len(metadata_of(bob).log) == asked


# == what a refusal leaves behind ====================================================================


def test_keys_are_forgotten_with_the_refusal(two):
    alice, bob = two
    give(alice, bob)
    assert bob.view().read("file") == DATA
    gate, share = bob.session.gate, bob.share()
    assert gate._keys[share.row.share]
    grant = share.grant
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    bob.refresh()
    assert share.refusal.code == "share_revoked"
    assert share.row.share not in gate._keys
    assert grant._key is None
    for use in (
        lambda: grant.content_key(bytes(64)),
        lambda: grant.root_key(1, 1),
        lambda: grant.sealing_key(1),
        lambda: grant.require("list"),
        grant.check,
    ):
        with pytest.raises(MeshkitError) as caught:
            use()
        assert caught.value.code == "share_revoked"
    assert bob.session.services.reader._held == 0


def test_a_refusal_is_logged_once_and_not_twice_a_second(two, caplog):
    alice, bob = two
    give(alice, bob)
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    with caplog.at_level(logging.INFO, "meshkitfs.gate"):
        for _ in range(5):
            with pytest.raises(MeshkitError):
                walk(bob)
    assert len([record for record in caplog.records if record.msg == "refused"]) == 1


def test_a_revocation_that_was_seen_stays_seen(two):
    """The roster without him raises the mark even though its walk fails; the older one is then refused."""
    alice, bob = two
    row = give(alice, bob)
    walk(bob)
    seq = evil.peek(Roster, evil.newest_roster(bob.metadata, row.share)).seq
    with evil.opened(bob.metadata) as db:
        heads = db.execute("SELECT max(ver) FROM heads WHERE share = ?", (row.share,)).get
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    refused(bob, "share_revoked", "roster")
    evil.roll_back_roster(bob.metadata, row.share, seq)
    evil.roll_back_head(bob.metadata, row.share, heads)
    refused(bob, "roster_rollback", "roster")


def test_a_clock_cannot_be_pushed_forward_by_a_record_that_fails(two):
    alice, bob = two
    row = give(alice, bob)
    floor = bob.session.clock._floor
    later = int(time.time()) + 50  # within the skew that is allowed
    metadata_of(bob).on("timestamp", stamped(bob, later, later + 300), row.share)
    metadata_of(bob).on("head", evil.withheld, row.share)
    refused(bob, "freshness_unproven", "head", unwraps=1)
    assert bob.session.clock._floor == floor
    metadata_of(bob).heal()
    walk(bob)
    assert bob.session.clock._floor > floor


def test_marks_are_durable_before_anything_is_read(two):
    """What was seen is on the disk when the grant is handed out: a crash right then forgets nothing."""
    alice, bob = two
    row = give(alice, bob)
    walk(bob)
    version = evil.peek(evil.Head, evil.newest_head(bob.metadata, row.share)).ver
    bob.crash()
    alice.view().write("more", b"m")
    alice.flush()
    evil.roll_back_head(bob.metadata, row.share, version - 1)
    bob.start(interpose)
    error = refused(bob, "head_rollback", "head", unwraps=1)
    assert str(version) in error.detail


# == the three types =================================================================================


def test_nobody_else_makes_grants_keys_or_verified_blocks():
    with pytest.raises(TypeError):
        Grant(object(), b"k" * 32, None, None, None)
    with pytest.raises(TypeError):
        ContentKey(object(), b"k" * 32)
    with pytest.raises(TypeError):
        VerifiedBlock(b"d" * 32, b"data")
    with pytest.raises(MeshkitError) as caught:
        VerifiedBlock.check(b"d" * 32, b"data")
    assert caught.value.code == "cid_mismatch"
    secret = os.urandom(32)
    shown = repr(_mint.mint_key(secret))
    assert not t4_gate.found_in(shown.encode(), {"key": secret})


# == secrets =========================================================================================


def test_no_secret_in_logs_at_debug_level_nor_in_exceptions(place):
    """Everything is logged, unredacted, with tracebacks; every refusal and fault above happens once."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(fields)s", defaults={"fields": ""}))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    said = []
    try:
        with World() as world:
            alice = Device(world, f"{place}/alice", "alice").start()
            bob = Device(world, f"{place}/bob", "bob", beside=alice).start(interpose)
            alice.create_share()
            alice.view().write("file", DATA)
            alice.flush()
            row = give(alice, bob)
            assert bob.view().read("file") == DATA
            secrets = {
                f"{device.name}'s {name}": secret
                for device in (alice, bob)
                for name, secret in t4_gate.secrets_of(device, alice.metadata).items()
            }
            # Keys of single blocks, from the references in the tree.
            for device in (alice, bob):
                for node in device.share().tree.nodes.values():
                    if node.entry is not None and node.entry.ref:
                        secrets[f"{device.name}'s {node.name}"] = node.entry.ref[32:]
            secrets["content"] = DATA[:32]
            assert len(secrets) >= 12

            def attempt(work, *args):
                try:
                    said.append(repr(work(*args)))
                except Exception as error:
                    said.append("".join(traceback.format_exception(error)) + repr(error) + str(vars(error)))

            for method in ("capsules", "roster", "timestamp", "head"):
                for fault in (evil.withheld, evil.damaged, evil.unavailable()):
                    metadata_of(bob).on(method, fault)
                    attempt(walk, bob)
                    metadata_of(bob).heal()
            for block in evil.all_blocks(alice.blocks):
                evil.flip_file(alice.blocks, block)
            bob.close()
            bob.start(interpose)
            attempt(bob.view().read, "file")
            for block in evil.all_blocks(alice.blocks):
                evil.flip_file(alice.blocks, block)
            metadata_of(bob).on("capsules", lambda found: [_other_wrap(alice, found[-1])])
            attempt(walk, bob)
            metadata_of(bob).heal()
            alice.world.run(alice.session.book.revoke, alice.share(), "bob")
            attempt(walk, bob)
            attempt(bob.view().read, "file")
            for device in (alice, bob):
                session = device.session
                me, share = session.identity, device.share()
                things = [session, me, me.signing, me.encryption, session.vault, session.gate, session.book]
                things += [session.services, share, share.grant, row]
                said += map(repr, things)
            bob.close()
            alice.close()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    log = stream.getvalue()
    assert "share_revoked" in log
    assert not t4_gate.found_in(log.encode(errors="replace"), secrets)
    assert not t4_gate.found_in("".join(said).encode(errors="replace"), secrets)
    assert b"the content that" not in log.encode()


def _other_wrap(alice, blob):
    header = evil.peek1(blob, "mk/cap@1")["h"]
    terms = {name: value for name, value in header.items() if name not in ("v", "t", "kc", "frm", "to")}
    me = alice.session.identity
    return make_capsule(me.signing, terms, os.urandom(32), me.encryption.public)


def test_this_file_belongs_to_the_table():
    """The codes that t4_gate.py says are proved here are."""
    here = Path(__file__).read_text()
    for code, where in t4_gate.ELSEWHERE.items():
        if "t3_gate.py" in where:
            assert f'"{code}"' in here
