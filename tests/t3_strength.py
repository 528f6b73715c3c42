"""A grant that demands a minimum strength of the recipient's key vault, on homes without a kernel."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import trio
from devices import Device, World, scratch
from evil import EvilMetadata, fixed
from swtpm import own_tpm_fixture  # noqa: F401 (fixture)

from meshkitfs import keyvault
from meshkitfs.core.records import Capsule
from meshkitfs.daemon import config, vault_watch
from meshkitfs.daemon.locking import Lock
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.keyvault import _tpm_device
from meshkitfs.shares import Terms, demands_of
from meshkitfs.vfs._xattrs import meshkit_names, meshkit_value

CODE = "keyvault_strength_required"
DATA = b"only for keys in a chip " * 1000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def people(place):
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start(interpose)
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        for device in (bob, alice):
            device.close()


def interpose(session):
    session.gate._metadata = session.services.metadata = EvilMetadata(session.metadata)


def ask(device, method, **params):
    return device.world.run(Service(device.session).call, method, params)


def give(alice, bob, *demands, **terms):
    data = ask(alice, "share.add", target="first", recipient="bob", require_key_vault=list(demands), **terms)
    if not bob.session.book.shares:
        bob.world.run(bob.session.book.inbox.accept, "first", b"first")
    return data


def gives(device, **claims):
    """Have the home's key vault report these claims, and the watcher see it."""
    vault = device.session.watched.vault
    honest = getattr(vault, "honest", vault)
    device.session.watched.vault = Claiming(honest, replace(honest.report(), **claims))
    device.world.run(device.session.watched.look)


class Claiming:
    """A key vault that says this of itself."""

    def __init__(self, honest, report):
        self.honest, self.kind = honest, honest.kind
        self._report = report

    def report(self):
        return self._report

    def __getattr__(self, name):
        return getattr(self.honest, name)


def walk(device, trace=None):
    return device.world.run(device.session.gate.open, device.share().row, "read", trace)


def opens(device):
    assert walk(device).capsule.keyvault
    device.refresh()
    assert device.view().read("file") == DATA


def refused(device, says=""):
    """Refused at its own step; nothing was unwrapped and nothing fetched for it."""
    before, trace = device.session.gate.counters.unwraps, Trace()
    gets = device.session.store.counters.gets
    with pytest.raises(MeshkitError) as caught:
        walk(device, trace)
    assert (caught.value.code, caught.value.errno) == (CODE, TABLE[CODE].errno)
    assert says in caught.value.detail
    results = {step.name: step.result for step in trace.steps}
    assert (results["rights"], results["keyvault"], results["vault"]) == ("passed", "refused", "not reached")
    assert (results["key"], device.session.gate.counters.unwraps) == ("not reached", before)
    assert device.session.store.counters.gets == gets


def test_a_weak_key_vault_opens_nothing_and_a_strong_one_does(people):
    alice, bob = people
    made = give(alice, bob, "hardware_backed", "persistent")
    assert made["key_vault_required"] == ["hardware_backed", "persistent"]
    refused(bob, "hardware_backed; this is a plain-file key vault")
    gives(bob, hardware_backed=True)
    opens(bob)
    share = bob.share()
    assert meshkit_value(b"user.meshkit.keyvault", share, None, dict, None) == b"hardware_backed,persistent"
    assert b"user.meshkit.keyvault" in meshkit_names(share, None, dict)
    shown = json.loads(meshkit_value(b"user.meshkit.capabilities", share, None, dict, None))
    assert shown["key_vault_required"] == ["hardware_backed", "persistent"]
    (step,) = [s for s in ask(bob, "explain", path="first/file")["steps"] if s["step"] == "keyvault"]
    assert (step["result"], step["rule"]) == ("passed", "hardware_backed, persistent")
    assert "by its own report" in step["evidence"]
    (status,) = ask(bob, "status")["shares"]
    assert status["key_vault_required"] == ["hardware_backed", "persistent"]
    (bobs,) = ask(alice, "share.show", share="first")["recipients"]
    assert bobs["key_vault_required"] == ["hardware_backed", "persistent"]
    # The owner's own grant demands nothing, and one made anew without it neither.
    assert not alice.world.run(alice.session.gate.open, alice.share().row, "read").capsule.keyvault
    gives(bob, hardware_backed=False)
    give(alice, bob)
    assert not walk(bob).capsule.keyvault


def test_a_key_vault_that_gets_weaker_ends_what_is_open_and_comes_back(people):
    alice, bob = people
    give(alice, bob, "hardware_backed")
    gives(bob, hardware_backed=True)
    opens(bob)
    handle = bob.view().open("file", os.O_RDONLY)
    assert bob.view().pread(handle, 0, 10) == DATA[:10]
    for claims in ({"hardware_backed": None, "available": False}, {"session_cache": "kernel"}):
        gives(bob, hardware_backed=True)
        bob.refresh()
        assert bob.share().refusal is None
        gives(bob, **{"hardware_backed": True} | claims)
        bob.refresh()  # the watcher's next look
        assert bob.share().refusal.code == CODE
        with pytest.raises(OSError) as caught:
            bob.view().pread(handle, 0, 10)
        assert caught.value.errno == TABLE[CODE].errno
        assert meshkit_value(b"user.meshkit.reason", bob.share(), None, dict, None).startswith(CODE.encode())
    gives(bob, hardware_backed=True)  # and without a restart
    bob.refresh()
    assert bob.view().read("file") == DATA
    assert bob.view().pread(handle, 0, 10) == DATA[:10]
    bob.view().release(handle)


def test_a_key_vault_that_says_nothing_meets_nothing(people, monkeypatch):
    alice, bob = people
    give(alice, bob, "persistent")
    opens(bob)
    bob.session.gate._conditions._key_vault = None
    refused(bob, "does not say")
    watched = vault_watch.VaultWatch(bob.session.vault, lambda: None)
    bob.session.gate._conditions._key_vault = watched.now
    monkeypatch.setattr(vault_watch, "DEADLINE_S", 0)
    monkeypatch.setattr(watched, "look", trio.sleep_forever)
    refused(bob, "does not say")
    # A report is believed for a while only, also when the next never comes.
    watched.report, watched._looked_at = bob.session.vault.report(), bob.world.run(_now)
    assert walk(bob)
    bob.world.pass_time(vault_watch.STALE_S)
    refused(bob, "does not say")


async def _now():
    return trio.current_time()


def test_a_store_that_shows_the_grant_of_before_opens_nothing(people):
    """The demand was added later: the old capsule is the owner's too, and the roster does not list it."""
    alice, bob = people
    give(alice, bob)
    assert walk(bob)
    kid, share = bob.session.identity.encryption.kid, bob.share().row.share
    old = bob.world.run(alice.session.metadata.capsules, share, kid)
    give(alice, bob, "hardware_backed")
    refused(bob)
    bob.session.gate._metadata.on("capsules", fixed(old))
    with pytest.raises(MeshkitError) as caught:
        walk(bob)
    assert caught.value.code == "share_revoked"


def test_a_demand_of_a_later_version_is_refused_and_not_ignored(people):
    alice, bob = people
    share = alice.share()
    alice.world.run(alice.session.book.add, share, "bob", Terms(("read",), keyvault=("quantum",)))
    bob.world.run(bob.session.book.inbox.accept, "first", b"first")
    gives(bob, hardware_backed=True, exportable=False, user_presence=True)
    refused(bob, "quantum, which this version does not know")
    with pytest.raises(MeshkitError) as caught:
        give(alice, bob, "quantum")
    assert caught.value.code == "invalid_argument"
    assert "hardware_backed" in caught.value.detail


def test_a_demand_stays_through_a_new_epoch_and_a_changed_policy(people):
    """What is granted anew by itself says what it said: nothing weaker is chosen silently."""
    alice, bob = people
    ask(alice, "policy.create", name="p", members=["bob"])
    give(alice, bob, "hardware_backed", policy="p")
    carol = Device(alice.world, f"{alice.root}.carol", "carol", beside=alice).start()
    try:
        ask(alice, "share.add", target="first", recipient="carol")
        before = walk_capsule(alice, "bob")
        ask(alice, "share.revoke", share="first", recipient="carol")
        after = walk_capsule(alice, "bob")
        assert (after.epoch, after.keyvault) == (before.epoch + 1, ("hardware_backed",))
    finally:
        carol.close()
        shutil.rmtree(carol.root, ignore_errors=True)
    refused(bob)


def walk_capsule(alice, handle):
    held = alice.session.state.members(alice.share().row.share)
    (row,) = [m for m in held if m.handle == handle and not m.revoked]
    assert demands_of(row) == ("hardware_backed",)
    return Capsule.parse(
        row.blob, {alice.session.identity.signing.kid: alice.session.identity.signing.public}
    )


def test_a_locked_home_is_refused_as_locked(people):
    alice, bob = people
    give(alice, bob, "persistent")
    opens(bob)
    lock = Lock(bob.session)
    bob.world.run(lock.lock)
    trace = Trace()
    with pytest.raises(MeshkitError) as caught:
        walk(bob, trace)
    assert caught.value.code == "identity_locked"
    assert [s.result for s in trace.steps if s.name == "keyvault"] == ["not reached"]
    bob.world.run(lock.unlock)
    opens(bob)


def test_an_invitation_passes_the_demand_on(people):
    alice, _ = people
    made = ask(alice, "share.invite", share="first", require_key_vault=["persistent"])
    assert made["key_vault_required"] == ["persistent"]
    (kept,) = alice.session.welcome.items()
    assert kept.keyvault == ("persistent",)


def test_software_that_answers_as_a_tpm_is_no_hardware_and_a_chip_is(people, own_tpm, monkeypatch):
    """A real TPM made of software; what a chip would say of itself is the one thing that is made up."""
    alice, bob = people
    give(alice, bob, "hardware_backed", "persistent")
    refused(bob, "this is a plain-file key vault")
    moved(bob, keyvault.TPM2)
    refused(bob, "this is a tpm2 key vault")
    honest = _tpm_device.Tpm.nature
    monkeypatch.setattr(_tpm_device.Tpm, "nature", lambda self: replace(honest(self), chip=True))
    bob.world.run(bob.session.watched.look)
    opens(bob)
    own_tpm.stop()
    bob.world.run(bob.session.watched.look)
    bob.refresh()
    assert bob.share().refusal.code == CODE
    own_tpm.start()
    bob.world.run(bob.session.watched.look)
    opens(bob)
    moved(bob, keyvault.PLAIN_FILE)
    refused(bob, "this is a plain-file key vault")
    moved(bob, keyvault.TPM2)
    opens(bob)


def moved(device, kind):
    """What `meshkitfs keyvault migrate` does, between two mounts."""
    device.close()
    path = device.home.config_path
    with device.home.hold():
        keyvault.migrate(device.home.root, kind, lambda new: config.set_key_vault(path, new), weaker=True)
    device.start()
