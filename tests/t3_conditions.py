"""Vaults and capability tokens on real homes without a kernel: what opens, what does not, and what a store may try.

The rules of the records alone are in t0_capability.py; a removal against open descriptors and caches of a real
mount is in t4_conditions.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import evil
import pytest
import trio
from devices import Device, World, scratch
from evil import EvilMetadata
from evil_service import evil_service
from homes import wait_until

from meshkitfs.core.capability import LETTER_MAGIC, Token, seal_token
from meshkitfs.core.keys import kid_of
from meshkitfs.core.membership import (
    LIST_LIFETIME_S,
    LIST_RENEW_S,
    ListMark,
    Revocations,
    VaultRecord,
    revocations_id,
)
from meshkitfs.core.pinned import Pinned
from meshkitfs.core.records import Capsule
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.metadata import AccessList, EmbeddedMetadata
from meshkitfs.metadata import _feed as feed
from meshkitfs.vfs._xattrs import meshkit_value

DATA = b"what only members see " * 1000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


def interpose(session):
    """Put an `EvilMetadata` between the whole session and the real store."""
    session.gate._metadata = session.services.metadata = EvilMetadata(session.metadata)


@pytest.fixture
def people(place):
    """Alice with a share; bob and carol, each with a store of their own that can be evil."""
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start(interpose)
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start(interpose)
        carol = Device(world, f"{place}/carol", "carol", beside=alice).start(interpose)
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob, carol
        for device in (carol, bob, alice):
            device.close()


def ask(device, method, **params):
    return device.world.run(Service(device.session).call, method, params)


def refusal(device, method, **params):
    with pytest.raises(MeshkitError) as caught:
        ask(device, method, **params)
    return caught.value


def give(alice, other, rights=("read",), **terms):
    """Share with somebody, who takes it in; ``terms`` are those of ``share add``."""
    ask(alice, "share.add", target="first", recipient=other.name, rights=list(rights), **terms)
    if not any(share.name == "first" for share in other.session.book.shares.values()):
        other.world.run(other.session.book.inbox.accept, "first", b"first")


def liar(device):
    return device.session.gate._metadata


def signing(device):
    return device.session.identity.signing


def walk(device, action="read", trace=None):
    return device.world.run(device.session.gate.open, device.share().row, action, trace)


def opens(device):
    assert walk(device).rights
    device.share().reconsider()
    assert device.view().read("file") == DATA


def refused(device, code, step, says="", action="read"):
    """Refused at ``step``, and nothing was unwrapped, fetched or opened for it."""

    def spent():
        session = device.session
        return (
            session.gate.counters.unwraps,
            session.store.counters.gets,
            session.services.reader.counters.opens,
        )

    before, trace = spent(), Trace()
    with pytest.raises(MeshkitError) as caught:
        walk(device, action, trace)
    assert (caught.value.code, caught.value.errno) == (code, TABLE[code].errno)
    assert says in caught.value.detail
    results = {item.name: item.result for item in trace.steps}
    assert results[step] == "refused"
    assert (results["key"], results["head"]) == ("not reached", "not reached")
    assert spent() == before


def out(device, code):
    """A program gets the errno of the table."""
    device.share().reconsider()
    with pytest.raises(OSError) as caught:
        device.view().read("file")
    assert caught.value.errno == TABLE[code].errno
    assert device.share().refusal.code == code


# == vaults ==============================================================================================

MEMBER = "vault_membership_required"


def test_a_vault_opens_for_who_is_in_it_as_long_as_they_are(people):
    alice, bob, _ = people
    made = ask(alice, "vault.create", name="team")
    assert (made["members"], made["seq"]) == ([], 1)
    assert refusal(alice, "vault.create", name="team").code == "vault_exists"
    assert refusal(alice, "vault.create", name="no good").code == "invalid_argument"
    give(alice, bob, vault="team")
    refused(bob, MEMBER, "vault", "does not list this identity")
    out(bob, MEMBER)
    assert ask(alice, "vault.add", name="team", member="bob")["members"] == ["bob"]
    opens(bob)
    explained = ask(bob, "explain", path="first/file")
    (step,) = [step for step in explained["steps"] if step["step"] == "vault"]
    assert step["result"] == "passed"
    assert made["id"][:8] in step["evidence"]
    assert meshkit_value(b"user.meshkit.vault", bob.share(), None, dict, None).decode() == made["vault"]
    assert made["vault"] == Pinned(made["id"], signing(alice).public).text
    # Whoever has something open is out as soon as the next look.
    handle = bob.view().open("file", os.O_RDONLY)
    assert bob.view().pread(handle, 0, 10) == DATA[:10]
    gone = ask(alice, "vault.remove", name="team", member="bob")
    assert (gone["members"], gone["bound_seconds"]) == ([], 1.0)
    bob.refresh()
    with pytest.raises(OSError) as caught:
        bob.view().pread(handle, 0, 10)
    assert caught.value.errno == TABLE[MEMBER].errno
    refused(bob, MEMBER, "vault")
    assert refusal(alice, "vault.remove", name="team", member="bob").code == "vault_not_found"
    ask(alice, "vault.add", name="team", member="bob")
    opens(bob)
    ask(alice, "vault.delete", name="team")
    refused(bob, MEMBER, "vault", "shows no vault record")
    assert ask(alice, "vault.list") == {"vaults": []}
    for method in ("vault.show", "vault.delete"):
        assert refusal(alice, method, name="team").code == "vault_not_found"
    assert (
        refusal(alice, "share.add", target="first", recipient="bob", vault="team").code == "vault_not_found"
    )
    bob.view().release(handle)


def test_a_vault_of_the_same_name_is_another_vault(people):
    alice, bob, carol = people
    ask(alice, "vault.create", name="team")
    give(alice, bob, vault="team")
    for owner in (bob, carol):
        ask(owner, "vault.create", name="team")
        ask(owner, "vault.add", name="team", member="bob")
    ask(alice, "vault.create", name="other")
    ask(alice, "vault.add", name="other", member="bob")
    refused(bob, MEMBER, "vault")
    wanted = ask(alice, "vault.show", name="team")["id"]
    for owner, name in ((bob, "team"), (carol, "team"), (alice, "other")):
        # Shown in the place of the one that is wanted, each with a good timestamp of its own.
        found = bob.world.run(
            owner.session.metadata.access_list, bytes.fromhex(ask(owner, "vault.show", name=name)["id"])
        )
        liar(bob).on("access_list", evil.fixed(found), bytes.fromhex(wanted))
        refused(bob, MEMBER, "vault", "another's" if owner is alice else "not its owner's")
    liar(bob).heal()
    # And a record of bob's own making under alice's id is not alice's.
    mine = VaultRecord.parse_owned(bob.session.state.conditions.own_list("team").record)
    forged = replace(mine, id=bytes.fromhex(wanted), seq=9, prev=b"p" * 32).sign(signing(bob))
    liar(bob).on(
        "access_list",
        evil.fixed(AccessList(forged, liar(bob).sign_timestamp(bytes.fromhex(wanted), forged, mine.iat))),
    )
    refused(bob, MEMBER, "vault", "not its owner's")
    # Somebody else's vault can be demanded too, as it is named to others.
    liar(bob).heal()
    give(alice, bob, vault=ask(carol, "vault.show", name="team")["vault"])
    opens(bob)
    for wrong in ("team@bob", "team@" + ask(carol, "vault.show", name="team")["vault"].partition("@")[2]):
        error = refusal(alice, "share.add", target="first", recipient="bob", vault=wrong)
        assert error.code == "invalid_argument"


@pytest.fixture
def member(people):
    """Bob is in the vault and has opened the share; returns alice, bob and the vault's id."""
    alice, bob, _ = people
    vault = bytes.fromhex(ask(alice, "vault.create", name="team")["id"])
    give(alice, bob, vault="team")
    ask(alice, "vault.add", name="team", member="bob")
    opens(bob)
    return alice, bob, vault


def shown(device, list_id):
    """What the honest store shows."""
    return device.world.run(device.session.metadata.access_list, list_id)


def stamped(device, list_id, record, iat):
    """A record with a timestamp of the store's own key, which an evil service has."""
    return AccessList(record, liar(device).sign_timestamp(list_id, record, iat))


def test_a_store_that_replays_an_older_record(member):
    alice, bob, vault = member
    old = shown(bob, vault)
    ask(alice, "vault.remove", name="team", member="bob")
    refused(bob, MEMBER, "vault")
    liar(bob).on("access_list", evil.fixed(stamped(bob, vault, old.record, old_iat(old))), vault)
    refused(bob, MEMBER, "vault", "was seen")
    # Also after a restart: what was seen is remembered.
    bob.close()
    bob.start(interpose)
    liar(bob).on("access_list", evil.fixed(old), vault)
    refused(bob, MEMBER, "vault", "was seen")


def old_iat(offered):
    return VaultRecord.parse_owned(offered.record).iat


def test_a_store_that_shows_another_record_of_the_same_number(member):
    alice, bob, vault = member
    found = shown(bob, vault)
    record = VaultRecord.parse_owned(found.record)
    for forked, says in (
        (replace(record, exp=record.exp + 1), "two different records"),
        (replace(record, seq=record.seq + 1, prev=b"x" * 32), "does not follow"),
    ):
        signed = forked.sign(signing(alice))
        liar(bob).on("access_list", evil.fixed(stamped(bob, vault, signed, record.iat)), vault)
        refused(bob, MEMBER, "vault", says)
    # What was refused is seen all the same: the one before it is old now.
    liar(bob).heal()
    refused(bob, MEMBER, "vault", "was seen")


@pytest.mark.parametrize(
    "fault", ["withheld", "unavailable", "no timestamp", "old timestamp", "another's timestamp"]
)
def test_a_store_that_proves_nothing(member, fault):
    _, bob, vault = member
    found = shown(bob, vault)
    iat = old_iat(found)
    stranger = evil.SigningKey.generate()
    other = evil.Timestamp(share=vault, roster=evil.record_hash(found.record), iat=iat, exp=iat + 300)
    faults = {
        "withheld": (evil.fixed(None), "shows no vault record"),
        "unavailable": (evil.unavailable(), "evil"),
        "no timestamp": (evil.fixed(AccessList(found.record, None)), "nobody vouches"),
        "old timestamp": (evil.fixed(stamped(bob, vault, found.record, iat - 400)), "not of now"),
        "another's timestamp": (evil.fixed(AccessList(found.record, other.sign(stranger))), "not usable"),
    }
    answer, says = faults[fault]
    liar(bob).on("access_list", answer, vault)
    if fault == "unavailable":
        # No answer is not a no: nothing opens, and what is open may go on to the end of its lease.
        refused(bob, "freshness_unproven", "vault", says)
    else:
        refused(bob, MEMBER, "vault", says)
        out(bob, MEMBER)
    liar(bob).heal()
    opens(bob)


def test_a_store_that_gives_no_answer_in_time(member):
    _, bob, _ = member

    class Silence:
        def __getattr__(self, name):
            return getattr(inner, name)

        async def access_list(self, _):
            entered.append(True)
            await trio.sleep_forever()

    inner, entered = bob.session.gate._metadata, []
    bob.session.gate._metadata = Silence()
    task = bob.world.start(bob.session.gate.open, bob.share().row, "read")
    wait_until(lambda: entered, "the question")
    bob.world.pass_time(11)
    with pytest.raises(MeshkitError) as caught:
        task.wait()
    assert caught.value.code == "freshness_unproven"
    assert caught.value.detail == "no answer from the metadata store in time"


def test_an_offline_grace_does_not_stand_in_for_a_vault(people):
    """With the grace alone the share opens while nobody answers; a vault's list has to be shown."""
    alice, bob, _ = people

    def silent():
        for method in ("capsules", "roster", "timestamp", "head", "access_list"):
            liar(bob).on(method, evil.unavailable())

    ask(alice, "vault.create", name="team")
    ask(alice, "vault.add", name="team", member="bob")
    give(alice, bob, offline_grace="1d")
    opens(bob)
    silent()
    assert walk(bob).unproven is not None
    liar(bob).heal()
    give(alice, bob, offline_grace="1d", vault="team")
    opens(bob)
    silent()
    refused(bob, "freshness_unproven", "vault", "evil")


def test_a_service_that_withholds_a_removal_can_do_so_until_the_record_runs_out(member):
    """It has the key of the timestamps, and bob has not been shown the newer record."""
    alice, bob, vault = member
    old = shown(bob, vault).record
    iat = VaultRecord.parse_owned(old).iat
    later = [0]
    bob.session.clock._wall = lambda: iat + later[0]

    def withhold(_):
        return stamped(bob, vault, old, iat + later[0])

    liar(bob).on("access_list", withhold, vault)
    ask(alice, "vault.remove", name="team", member="bob")
    assert walk_vault(bob).until == iat + 300
    later[0] = LIST_LIFETIME_S - 100
    assert walk_vault(bob).until == iat + LIST_LIFETIME_S
    later[0] = LIST_LIFETIME_S
    with pytest.raises(MeshkitError) as caught:
        walk_vault(bob)
    assert caught.value.code == MEMBER
    assert "ran out 0 s ago" in caught.value.detail


def walk_vault(device):
    """The step of the vault alone: the proofs of the share itself would end at the same time."""
    gate = device.session.gate
    row = device.share().row
    found = device.world.run(
        device.session.metadata.share_state, row.share, device.session.identity.encryption.kid
    )
    owner = {kid_of(row.owner_public): row.owner_public}
    capsule = Capsule.parse(found.capsules[-1], owner)
    roster = evil.Roster.parse(found.roster, owner)
    return device.world.run(gate.lists.vault, capsule, roster, gate._clock.now(), Trace()._by_name["vault"])


def test_the_owners_home_renews_its_lists_by_itself(member, caplog):
    alice, bob, vault = member
    ask(alice, "capability.issue", name="editors", recipient="bob")
    lists, rows = alice.session.lists, alice.session.state.conditions
    before = {row.name: row.record for row in rows.own_lists()}
    assert set(before) == {"", "team"}
    alice.world.run(lists.renew)
    assert {row.name: row.record for row in rows.own_lists()} == before
    later = int(alice.session.services.wall()) + LIST_LIFETIME_S - LIST_RENEW_S + 10
    alice.session.services.wall = lambda: later
    lists._next_look = 0
    alice.world.run(lists.renew)
    for row in rows.own_lists():
        old = (VaultRecord if row.name else Revocations).parse_owned(before[row.name])
        new = (VaultRecord if row.name else Revocations).parse_owned(row.record)
        assert (new.seq, new.prev, new.exp) == (old.seq + 1, old.digest, later + LIST_LIFETIME_S)
    assert VaultRecord.parse_owned(shown(bob, vault).record).exp == later + LIST_LIFETIME_S
    # If it cannot, it says so; one that fails does not keep the other from it.
    later += LIST_LIFETIME_S
    lists._next_look = 0
    liar(alice).on("put_access_list", evil.unavailable(), vault)
    with caplog.at_level(logging.WARNING):
        alice.world.pass_time(1)
        wait_until(lambda: "could not be renewed" in caplog.text, "the warning")
    assert Revocations.parse_owned(rows.own_list("").record).iat == later
    liar(alice).heal()


def test_a_change_whose_answer_was_lost_is_not_lost(member):
    alice, bob, vault = member
    liar(alice).on("put_access_list", evil.unavailable(), times=1)
    assert refusal(alice, "vault.remove", name="team", member="bob").code == "metadata_unavailable"
    refused(bob, MEMBER, "vault")  # it has taken place
    ask(alice, "vault.add", name="team", member="carol")
    # The next change is made on top of it, and does not bring bob back.
    record = VaultRecord.parse_owned(shown(bob, vault).record)
    assert (record.seq, len(record.members)) == (4, 1)
    refused(bob, MEMBER, "vault")


def test_a_store_that_was_restored_gets_later_records_than_anybody_has_seen(member):
    alice, bob, vault = member
    old = shown(bob, vault)
    ask(alice, "vault.add", name="team", member="carol")
    opens(bob)
    with evil.opened(alice.metadata) as db:
        record = VaultRecord.parse_owned(old.record)
        db.execute("UPDATE vaults SET seq = ?, record = ? WHERE id = ?", (record.seq, old.record, vault))
    refused(bob, MEMBER, "vault", "was seen")
    ask(alice, "vault.add", name="team", member="alice")
    assert ask(alice, "vault.show", name="team")["members"] == ["alice", "bob", "carol"]
    assert VaultRecord.parse_owned(shown(bob, vault).record).seq == 4
    opens(bob)


# == capability tokens ===================================================================================

REQUIRED, DENIED = "capability_required", "capability_denied"


def issue(alice, to="bob", name="editors", rights=("read",), **more):
    return ask(alice, "capability.issue", name=name, recipient=to, rights=list(rights), **more)


def test_a_token_opens_for_its_holder_for_what_it_allows(people):
    alice, bob, _ = people
    give(alice, bob, ["write"], capability="editors")
    refused(bob, REQUIRED, "capability", "'editors'")
    out(bob, REQUIRED)
    made = issue(alice)
    assert "text" not in made
    listed = ask(bob, "capability.list")
    assert (listed["received"], [item["id"] for item in listed["held"]]) == (1, [made["id"]])
    assert ask(bob, "capability.list")["received"] == 0
    assert bob.world.run(bob.session.metadata.letters, bob.session.identity.encryption.kid) == []
    opens(bob)
    # The grant would let him write; what he holds does not.
    refused(bob, DENIED, "capability", "'write' is not among list, read", action="write")
    with pytest.raises(OSError) as caught:
        bob.view().write("file", b"x")
    assert caught.value.errno == TABLE[DENIED].errno
    assert walk(bob, "list").rights == {"list", "read"}
    report = json.loads(meshkit_value(b"user.meshkit.capabilities", bob.share(), None, dict, None))
    (caveat,) = report["caveats"]
    assert (report["rights"], caveat["capability"], caveat["rights"]) == (
        ["list", "read"],
        "editors",
        ["list", "read"],
    )
    assert caveat["expires"] == made["expires"]
    # A second token adds to the first.
    issue(alice, rights=["write"])
    ask(bob, "capability.list")
    bob.share().reconsider()
    bob.view().write("file", DATA)
    bob.flush()
    # Revoked, also for what is open.
    handle = bob.view().open("file", os.O_RDONLY)
    for row in ask(alice, "capability.list")["issued"]:
        assert ask(alice, "capability.revoke", token=row["token"])["bound_seconds"] == 1.0
    bob.refresh()
    with pytest.raises(OSError) as caught:
        bob.view().pread(handle, 0, 10)
    assert caught.value.errno == TABLE[DENIED].errno
    refused(bob, DENIED, "capability", "revoked by its issuer")
    assert all(row["revoked"] for row in ask(alice, "capability.list")["issued"])
    bob.view().release(handle)
    assert refusal(alice, "capability.revoke", token="ffffffff").code == "capability_not_found"


def test_a_token_is_narrowed_offline_and_passed_on(people):
    alice, bob, carol = people
    for other in (bob, carol):
        give(alice, other, ["write"], capability="editors")
    issue(alice, rights=["write"])
    (held,) = ask(bob, "capability.list")["held"]
    # Nobody is asked for anything while bob makes it.
    calls = len(liar(bob).log)
    given = ask(
        bob,
        "capability.narrow",
        capability=held["id"],
        recipient="carol",
        rights=["read"],
        expires="1d",
        send=False,
    )
    assert {name for name, _ in liar(bob).log[calls:]} <= {"identity", "identity_by_kid"}
    seen = ask(carol, "capability.inspect", text=given["text"])
    assert (seen["mine"], len(seen["chain"]), seen["rights"]) == (True, 2, ["list", "read"])
    assert refusal(bob, "capability.add", text=given["text"]).code == DENIED
    assert (
        refusal(alice, "capability.narrow", capability=held["id"], recipient="carol").code
        == "capability_not_found"
    )
    ask(carol, "capability.add", text=given["text"])
    opens(carol)
    refused(carol, DENIED, "capability", action="write")
    wider = refusal(carol, "capability.narrow", capability=given["id"], recipient="carol", rights=["write"])
    assert (wider.code, "widened" in wider.detail) == (DENIED, True)
    longer = refusal(carol, "capability.narrow", capability=given["id"], recipient="carol", expires="20d")
    assert longer.code == DENIED
    # Bob's own is as it was.
    bob.share().reconsider()
    bob.view().write("other", b"x")
    bob.flush()
    # What the issuer takes back from bob is taken back from carol.
    ask(alice, "capability.revoke", token=held["token"])
    for person in (bob, carol):
        refused(person, DENIED, "capability", "revoked")


def test_who_narrows_their_own_token_has_less(people):
    alice, bob, _ = people
    give(alice, bob, ["write"], capability="editors")
    issue(alice, rights=["write"])
    (wide,) = ask(bob, "capability.list")["held"]
    bob.share().reconsider()
    handle = bob.view().open("file", os.O_RDWR)
    bob.view().pwrite(handle, 0, b"before")
    bob.view().fsync(handle)
    ask(bob, "capability.narrow", capability=wide["id"], recipient="bob", rights=["read"])
    ask(bob, "capability.remove", capability=wide["id"])
    bob.refresh()
    with pytest.raises(OSError) as caught:
        bob.view().pwrite(handle, 0, b"after")
    assert caught.value.errno == TABLE[DENIED].errno
    assert bob.view().pread(handle, 0, 6) == b"before"
    bob.view().release(handle)
    (narrow,) = ask(bob, "capability.list")["held"]
    ask(bob, "capability.remove", capability=narrow["id"])
    refused(bob, REQUIRED, "capability")
    assert refusal(bob, "capability.remove", capability=narrow["id"]).code == "capability_not_found"


def keep(device, token):
    """Put a token into the home past every check, as somebody would who owns the device."""
    device.session.state.conditions.add_token(token.last.digest, token.to_bytes())


def token_of(issuer, holder, name="editors", **changes):
    now = int(issuer.session.services.wall())
    terms = {"rights": ("read",), "share": None, "iat": now, "exp": now + 1000} | changes
    return Token.issue(
        signing(issuer), token_id=os.urandom(16), name=name, holder=signing(holder).public, **terms
    )


def test_tokens_that_are_not_what_the_grant_asks_for(people):
    alice, bob, carol = people
    give(alice, bob, capability="editors")
    issue(alice, to="carol")  # so that there is a revocation list
    now = int(alice.session.services.wall())
    state = bob.session.state.conditions
    cases = [
        (token_of(carol, bob), REQUIRED, "'editors'"),  # another issuer's of the same name
        (token_of(bob, bob), REQUIRED, "'editors'"),  # bob's own
        (token_of(alice, bob, "viewers"), REQUIRED, "'editors'"),  # in the place of another capability
        (token_of(alice, carol), DENIED, "another holder's"),
        (token_of(alice, bob, share=b"x" * 16), DENIED, "another share"),
        (token_of(alice, bob, iat=now - 100, exp=now), DENIED, "ran out"),
        (token_of(alice, bob, iat=now + 600), DENIED, "from the future"),
    ]
    for token, code, says in cases:
        keep(bob, token)
        refused(bob, code, "capability", says)
        state.drop_token(token.last.digest)
    # Chains that do not hold are not tokens at all, whoever has put them there.
    good = token_of(alice, carol).narrow(signing(carol), holder=signing(bob).public, iat=now)
    data = good.to_bytes()
    for number, bad in enumerate((data[:-1] + bytes([data[-1] ^ 1]), data[:-9], b"", os.urandom(300))):
        state.add_token(bytes([number]) * 32, bad)
    refused(bob, REQUIRED, "capability")
    keep(bob, good)
    opens(bob)
    # A good one beside bad ones is enough, and they give nothing.
    keep(bob, token_of(alice, carol, rights=("write",)))
    assert walk(bob).rights == {"list", "read"}


def test_what_a_token_and_a_policy_both_leave_is_what_is_left(people):
    alice, bob, _ = people
    rules = 'permit(principal, action in [Action::"list", Action::"write"], resource);'
    ask(alice, "policy.create", name="no-reading", rules=rules)
    ask(
        alice,
        "policy.create",
        name="only-writing",
        rules='permit(principal, action == Action::"write", resource);',
    )
    issue(alice)
    ask(bob, "capability.list")
    give(alice, bob, ["write"], capability="editors", policy="no-reading")
    assert walk(bob, None).rights == {"list"}
    refused(bob, DENIED, "capability", action="write")
    refused(bob, "policy_denied", "policy", action="read")
    # Each leaves something, and together they leave nothing.
    give(alice, bob, ["write"], capability="editors", policy="only-writing")
    before = bob.session.gate.counters.unwraps
    with pytest.raises(MeshkitError) as caught:
        walk(bob, None)
    assert caught.value.code in (DENIED, "policy_denied")
    assert bob.session.gate.counters.unwraps == before


def test_a_store_that_hides_a_revocation(people):
    alice, bob, _ = people
    give(alice, bob, capability="editors")
    issue(alice)
    (held,) = ask(bob, "capability.list")["held"]
    list_id = revocations_id(signing(alice).public)
    opens(bob)
    old = shown(bob, list_id)
    ask(alice, "capability.revoke", token=held["token"])
    refused(bob, DENIED, "capability", "revoked by its issuer")
    for answer, says in (
        (old, "was seen"),
        (None, "shows no revocation list"),
        (AccessList(old.record[:-1] + b"x", old.timestamp), "not its owner's"),
    ):
        liar(bob).on("access_list", evil.fixed(answer), list_id)
        refused(bob, DENIED, "capability", says)
    liar(bob).on("access_list", evil.unavailable(), list_id)
    refused(bob, "freshness_unproven", "capability", "evil")


def test_what_comes_by_mail_and_is_no_token_of_ones_own_is_thrown_away(people):
    alice, bob, carol = people
    post = alice.session.metadata.post_letter
    kid = bob.session.identity.encryption.kid
    not_bobs = seal_token(token_of(alice, carol), bob.session.identity.encryption.public)
    for blob in (LETTER_MAGIC, LETTER_MAGIC + os.urandom(2000), not_bobs):
        alice.world.run(post, kid, blob)
    assert ask(bob, "inbox.list") == {"letters": [], "unreadable": 0}
    assert ask(bob, "capability.list") == {"held": [], "issued": [], "received": 0}
    assert alice.world.run(alice.session.metadata.letters, kid) == []


def test_a_token_is_taken_in_by_a_share_that_waits_for_it(people):
    alice, bob, _ = people
    give(alice, bob, capability="editors")
    out(bob, REQUIRED)
    issue(alice)
    bob.world.pass_time(5)
    wait_until(lambda: bob.world.pass_time(1) or bob.share().refusal is None, "the token")
    assert bob.view().read("file") == DATA


def test_texts_that_are_no_tokens(people):
    _, bob, _ = people
    for text in ("", "hello", "meshkit-capability1:", "meshkit-capability1:" + "A" * 400, "é"):
        assert refusal(bob, "capability.add", text=text).code in ("invalid_argument", "invalid_record")
    for more in ({}, {"capability": "a", "text": "b"}):
        assert refusal(bob, "capability.inspect", **more).code == "invalid_argument"
    for name in ("no good", "editors@alice", ""):
        error = refusal(bob, "capability.issue", name=name, recipient="bob")
        assert error.code == "invalid_argument"


# == at a service ========================================================================================


@pytest.fixture
def served(place):
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with evil_service(behind) as server:
        yield server
    behind.close()


@pytest.fixture
def apart(place, served):
    """Alice and bob, who meet at a service only."""
    with World(rate=1.0) as world:
        alice = Device(world, f"{place}/alice", "alice", metadata=served.url).start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        served.heal()
        for device in (bob, alice):
            device.close()


def test_a_removal_reaches_a_mount_over_the_feed(apart, served):
    alice, bob = apart
    ask(alice, "vault.create", name="team")
    ask(alice, "vault.add", name="team", member="bob")
    give(alice, bob, vault="team", capability="editors")
    issue(alice)
    ask(bob, "capability.list")
    opens(bob)
    handle = bob.view().open("file", os.O_RDONLY)
    wait_until(lambda: bob.session.metadata.feed.live, "the feed")
    bound = ask(alice, "vault.remove", name="team", member="bob")["bound_seconds"]
    assert bound == 1.0 + feed.RECHECK_S
    wait_until(lambda: bob.share().refusal is not None, "the removal", 20)
    assert bob.share().refusal.code == MEMBER
    with pytest.raises(OSError) as caught:
        bob.view().pread(handle, 0, 10)
    assert caught.value.errno == TABLE[MEMBER].errno
    bob.view().release(handle)
    ask(alice, "vault.add", name="team", member="bob")
    wait_until(lambda: bob.share().refusal is None or bob.share().reconsider(), "the way back", 20)
    assert bob.view().read("file") == DATA
    (row,) = ask(alice, "capability.list")["issued"]
    ask(alice, "capability.revoke", token=row["token"])
    wait_until(lambda: bob.share().refusal is not None, "the revocation", 20)
    assert bob.share().refusal.code == DENIED


def test_a_service_that_conceals_a_removal_does_so_for_the_published_time_only(apart, served):
    alice, bob = apart
    ask(alice, "vault.create", name="team")
    ask(alice, "vault.add", name="team", member="bob")
    give(alice, bob, vault="team")
    opens(bob)
    metadata = bob.session.metadata
    wait_until(lambda: metadata.feed.live, "the feed")
    wait_until(lambda: bob.share()._tick == bob.share()._store_tick(), "a look")
    served.on("changes", served.no_news)
    ask(alice, "vault.remove", name="team", member="bob")
    real = metadata.feed.clock
    metadata.feed.clock = lambda: real() + feed.RECHECK_S + 1
    wait_until(lambda: bob.share().refusal is not None, "the removal", 20)
    assert bob.share().refusal.code == MEMBER


def test_a_404_that_is_not_the_services_own_is_no_answer(apart, served):
    alice, bob = apart
    ask(alice, "vault.create", name="team")
    give(alice, bob, vault="team")
    refused(bob, MEMBER, "vault", "shows no vault record")
    served.on("vaults", served.status(404, b"<html>not here</html>"))
    refused(bob, "freshness_unproven", "vault", "HTTP 404")


def test_a_mark_is_never_lowered(people):
    _, bob, _ = people
    rows = bob.session.state.conditions
    rows.raise_mark(b"l" * 16, b"o" * 32, ListMark(5, b"h" * 32))
    rows.raise_mark(b"l" * 16, b"o" * 32, ListMark(4, b"x" * 32))
    rows.raise_mark(b"l" * 16, b"o" * 32, ListMark(5, b"y" * 32))
    assert rows.mark(b"l" * 16, b"o" * 32) == ListMark(5, b"h" * 32)
    assert rows.mark(b"l" * 16, b"p" * 32) == ListMark()
