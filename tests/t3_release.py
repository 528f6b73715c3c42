"""Shares whose key is in two halves, over a real release service: what that costs, and what lies against it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import evil
import pytest
import second_reader
from devices import Device, World, scratch
from evil_service import NO_ANSWERS, evil_service
from hacked_client import HackedClient, Refused
from homes import wait_until
from http_server import Answer

from meshkitfs.core.capability import Token, issuing
from meshkitfs.core.cose import record_hash
from meshkitfs.core.identity_record import first_record
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.records import Capsule
from meshkitfs.core.release import Release
from meshkitfs.daemon import config, describe
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata import _wire as wire
from meshkitfs.metadata.service import ReleaseKeys
from meshkitfs.policy import Deciders
from meshkitfs.server._demands import Demands
from meshkitfs.shares import Terms

DATA = b"what only two halves open " * 3000
KEYS = ReleaseKeys.derive(os.urandom(32).hex())


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def ground():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def behind(ground):
    home = EmbeddedMetadata.create(f"{ground}/service.db")
    yield home
    home.close()


@pytest.fixture(scope="module")
def server(behind):
    """A metadata service that releases keys, and the evil one before it."""
    with evil_service(behind, release=KEYS, conditions=Demands(behind, Deciders())) as serving:
        yield serving


@pytest.fixture(scope="module")
def people(ground, server):
    with World(rate=1.0) as world:
        alice = Device(world, f"{ground}/alice", "alice", metadata=server.url).start()
        bob = Device(world, f"{ground}/bob", "bob", beside=alice).start()
        yield alice, bob
        for device in (bob, alice):
            if device.session is not None:
                device.close()


@pytest.fixture
def served(server):
    yield server
    server.heal()
    server.inner.clock = time.time


@pytest.fixture
def two(people, served):
    """Alice with a share whose key is in halves, and bob, who may read and write it."""
    alice, bob = people
    create(alice, "first", "release")
    alice.view().write("file", DATA)
    alice.flush()
    alice.grant("first", bob)
    bob.session.services.releases.asked = alice.session.services.releases.asked = 0
    yield alice, bob
    served.heal()
    for device in people:
        for share in list(device.session.book.shares.values()):
            device.world.run(device.session.book.remove, share)
    me, metadata = bob.session.identity.encryption.kid, bob.session.metadata
    for letter, _ in bob.world.run(metadata.letters, me):
        bob.world.run(metadata.delete_letter, me, letter)


def create(device, name, enforcement, service=None):
    book = device.session.book
    return device.world.run(book.create, name.encode(), 0o700, enforcement, service)


def walk(device, action="read", trace=None, name="first"):
    return device.world.run(device.session.gate.open, device.share(name).row, action, trace)


def asked(device):
    """How often the service was asked for a half."""
    return device.session.services.releases.asked


def spent(device):
    session = device.session
    return session.store.counters.gets, session.services.reader.counters.opens


def refused(device, code, path="file"):
    """The share is closed with this code, for a program too, and nothing was fetched or decrypted for it."""
    before = spent(device)
    with pytest.raises(MeshkitError) as caught:
        walk(device)
    assert caught.value.code == code, caught.value.detail
    with pytest.raises(OSError) as seen:
        device.view().read(path)
    assert seen.value.errno == errno.EACCES
    assert spent(device) == before
    return caught.value


def capsules_of(behind, share, kid):
    return behind_run(behind.capsules, share, kid)


def behind_run(function, *args):
    import trio

    return trio.run(function, *args)


def kept(behind, device, owner, name="first"):
    """What somebody keeps who means to go on: capsule, owner's key, head."""
    row = device.share(name).row
    blob = capsules_of(behind, row.share, device.session.identity.encryption.kid)[-1]
    return blob, owner.session.identity.signing.public, behind_run(behind.head, row.share)


# == as it should be ===================================================================================


def test_both_read_and_write(two):
    alice, bob = two
    assert bob.view().read("file") == DATA
    bob.view().write("bob's", b"more")
    bob.flush()
    wait_until(lambda: alice.share().base.version == bob.share().base.version, "bob's change")
    assert alice.view().read("bob's") == b"more"


def test_the_owner_needs_nobody(two, served):
    alice, bob = two
    assert bob.view().read("file") == DATA
    assert asked(alice) == 0
    served.on("release", served.status(500))
    alice.close()
    alice.start()
    assert alice.view().read("file") == DATA
    alice.view().write("more", b"of it")
    alice.flush()
    assert asked(alice) == 0


def test_one_question_for_each_lease(two):
    alice, bob = two
    for _ in range(5):
        assert bob.view().read("file") == DATA
    assert asked(bob) == 1
    # What others publish is looked at, under the release that is there.
    walks = bob.session.gate.counters.walks
    for number in range(3):
        alice.view().write("file", b"%d" % number)
        alice.flush()
        wait_until(lambda: bob.share().base.version == alice.share().base.version, "the change")
    assert bob.session.gate.counters.walks > walks
    assert asked(bob) == 1
    unwraps = bob.session.gate.counters.unwraps
    grant = walk(bob)
    assert (asked(bob), bob.session.gate.counters.unwraps) == (1, unwraps)
    assert grant.deadline - time.clock_gettime(time.CLOCK_BOOTTIME) <= 300


def test_a_lease_ends_with_its_release_and_the_key_goes(place):
    """The service's releases are shorter than any other proof here; then it is gone."""
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with evil_service(behind, release=KEYS, release_seconds=4) as served, World(rate=1.0) as world:
        alice = Device(world, f"{place}/alice", "alice", metadata=served.url).start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
        create(alice, "first", "release")
        alice.view().write("file", DATA)
        alice.flush()
        alice.grant("first", bob)
        assert bob.view().read("file") == DATA
        grant = bob.share().grant
        assert grant.deadline - time.clock_gettime(time.CLOCK_BOOTTIME) <= 4
        held = bob.session.gate._released._held
        assert held
        fh = bob.view().open("file", os.O_RDONLY)
        before = asked(bob)
        wait_until(lambda: asked(bob) > before, "a renewal", 30)
        served.on("release", served.reset)
        wait_until(lambda: bob.share().refusal is not None, "the end", 30)
        assert bob.share().refusal.code == "key_release_unavailable"
        assert not held
        assert bob.share().grant is None
        with pytest.raises(OSError) as seen:
            bob.view().pread(fh, 0, 10)
        assert seen.value.errno == errno.EACCES
        served.heal()
        wait_until(lambda: bob.share().refusal is None, "the share", 60)
        assert bob.view().read("file") == DATA
        bob.close()
        alice.close()
    behind.close()


def test_what_nobody_renews_is_dropped_when_it_ends(two, monkeypatch):
    """Also a key that no lease is about, as after `explain`."""
    _, bob = two
    walk(bob)
    gate = bob.session.gate
    share = bob.share().row.share
    (digest,) = gate._released._held[share]
    held = gate._released._held[share][digest]
    assert repr(held.key) not in repr(held)
    gate.drop_ended()
    assert share in gate._released._held
    later = type("Later", (), {"exact": lambda _: held.exp + 0.5})()
    monkeypatch.setattr(gate._released, "_clock", later)
    gate.drop_ended()
    assert not gate._released._held


def test_a_revocation_begins_an_epoch_with_other_halves(two, behind):
    alice, bob = two
    carol = Device(alice.world, Path(alice.root).with_name("carol"), "carol", beside=alice).start()
    alice.grant("first", carol)
    assert bob.view().read("file") == carol.view().read("file") == DATA
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    wait_until(lambda: bob.share().refusal is not None, "the end")
    alice.view().write("file", b"without bob")
    alice.flush()
    wait_until(lambda: carol.view().read("file") == b"without bob", "the change")
    assert carol.share().grant.capsule.epoch == 2
    assert {carol.share().grant.enforcement, alice.share().grant.enforcement} == {"release"}
    # Versions of the old epoch: another question, once for the lease.
    carol.session.gate._released.forget(carol.share().row.share)
    before = asked(carol)
    share = carol.share()
    version = carol.world.run(share.history.refresh, share.grant) or share.history.kept[0]
    assert version.epoch == 1
    for _ in range(2):
        manifest = carol.world.run(
            carol.session.services.reader.open_root, share.grant, version.root, 1, version.number
        )
        assert manifest.ver == version.number
    assert asked(carol) == before + 1
    carol.close()


def test_a_snapshot(two, behind, served):
    """Granted as exactly one version; the release is a mask for it, and the half itself is not in it."""
    alice, bob = two
    share = alice.share()
    node = alice.world.run(_node, share, "file")
    alice.world.run(alice.session.book.add_snapshot, share, "file", node, "bob", Terms(("read",)))
    inbox, _ = bob.world.run(bob.session.book.inbox.waiting)
    letter = next(item for item in inbox if item.letter.offer.grant == "snapshot")
    bob.world.run(bob.session.book.inbox.accept, letter.id, b"copy")
    assert walk(bob, name="copy").enforcement == "release"
    alice.view().write("file", b"later")
    alice.flush()
    assert bob.view("copy").read("") == DATA
    alice.world.run(alice.session.book.revoke, share, "bob")
    wait_until(lambda: bob.share("copy").refusal is not None, "the end")
    with pytest.raises(MeshkitError) as caught:
        walk(bob, name="copy")
    assert caught.value.code == "share_revoked"


async def _node(share, name):
    await share.use("read")
    return share.tree.node_of(share.tree.root, name.encode())


def test_it_says_which_enforcement_a_share_has(two):
    alice, bob = two
    create(alice, "plain", "client")
    for device in (alice, bob):
        assert device.view().read("file") == DATA
        said = describe.share(device.share())
        assert (said["enforcement"], said["release_service"]) == (
            "release",
            alice.session.config.metadata.url,
        )
        ino = device.view().attr("file").ino
        value = json.loads(device.world.run(device.fs.getxattr, ino, b"user.meshkit.capabilities"))
        assert (value["enforcement"], value["release_service"]) == ("release", said["release_service"])
    assert alice.view("plain").attr("").ino
    alice.world.run(alice.share("plain").use, "list")
    assert describe.share(alice.share("plain"))["enforcement"] == "client"
    trace = Trace()
    walk(bob, trace=trace)
    step = next(step for step in trace.steps if step.name == "key")
    assert f"the half that {said['release_service']} released for" in step.evidence


def test_the_second_reader_reads_it_with_the_half(two, behind):
    """Somebody who follows docs/format.md, with what bob has: his seed, the stores, and the service's half."""
    alice, bob = two
    blob, owner, head = kept(behind, bob, alice)
    client = HackedClient(bob.root, time.time)
    capsule = Capsule.parse(blob, {kid_of(owner): owner})
    half = client.ask(capsule)
    header, _ = second_reader.open_capsule(bob.session.identity.encryption.seed, blob, owner, half)
    assert header["rel"]["part"] == "half"
    assert client.read(blob, owner, head, bob.blocks) == {"file": DATA}


# == what is refused when it is made =====================================================================


@pytest.mark.parametrize(
    ("enforcement", "service", "code"),
    [
        ("release", "http://127.0.0.1:9", "invalid_argument"),
        ("client", "http://127.0.0.1:9", "invalid_argument"),
        ("both", None, "invalid_argument"),
    ],
)
def test_a_share_that_cannot_be_made(two, enforcement, service, code):
    alice, _ = two
    with pytest.raises(MeshkitError) as caught:
        create(alice, "other", enforcement, service)
    assert caught.value.code == code
    assert b"other" not in alice.session.book.shares


def test_a_service_that_releases_nothing_and_one_that_is_away(place):
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with evil_service(behind) as plain, World(rate=1.0) as world:
        alice = Device(world, f"{place}/alice", "alice", metadata=plain.url).start()
        for fault, code in ((None, "not_supported"), (plain.reset, "metadata_unavailable")):
            if fault is not None:
                plain.on(None, fault)
            with pytest.raises(MeshkitError) as caught:
                create(alice, "first", "release")
            assert caught.value.code == code
            plain.heal()
        assert not alice.session.book.shares
        alice.close()
    behind.close()


def test_a_home_may_have_it_for_every_new_share(place, served):
    """`mkdir` at the top makes such a share then. A service elsewhere that has other rosters is refused."""
    with World(rate=1.0) as world:
        alice = Device(world, f"{place}/dora", "dora", metadata=served.url)
        text = json.loads(alice.home.config_path.read_text())
        alice.home.config_path.write_text(json.dumps(text | {"release": {"enforcement": "release"}}))
        alice.start()
        create(alice, "first", None)
        alice.world.run(alice.share().use, "list")
        assert alice.share().grant.enforcement == "release"
        create(alice, "plain", "client")
        alice.world.run(alice.share("plain").use, "list")
        assert alice.share("plain").grant.enforcement == "client"
        alice.close()
        elsewhere = EmbeddedMetadata.create(f"{place}/elsewhere.db")
        with evil_service(elsewhere, release=KEYS) as other:
            text["release"] = {"service": other.url, "enforcement": "release"}
            alice.home.config_path.write_text(json.dumps(text))
            alice.start()
            with pytest.raises(MeshkitError) as caught:
                create(alice, "third", None)
            assert caught.value.code == "metadata_unauthorized"  # nobody there knows her
            alice.close()
        elsewhere.close()


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"enforcement": "always"}, "release.enforcement"),
        ({"service": "ftp://keys.example"}, "release.service"),
        ({"service": "https://me:secret@keys.example"}, "release.service"),
        ({"caFile": "ca.pem"}, "release.service"),
        ({"enforcement": "release"}, "release.service"),
        ({"key": "00"}, "release.key"),
    ],
)
def test_the_configuration_is_checked(tmp_path, section, field):
    text = json.dumps({"version": 1, "release": section}).encode()
    with pytest.raises(MeshkitError) as caught:
        config.loads(text, tmp_path)
    assert caught.value.code == "invalid_config"
    assert f"'{field}'" in caught.value.detail


def test_the_configuration_is_written_as_it_is_read(tmp_path):
    section = {"service": "https://keys.example", "caFile": "ca.pem", "enforcement": "release"}
    found = config.loads(json.dumps({"version": 1, "release": section}).encode(), tmp_path)
    assert found.as_dict(tmp_path)["release"] == section


# == a hacked client ==================================================================================


def test_what_a_hacked_client_can_read_in_each_mode(two, behind, served):
    """Bob keeps everything he has and skips every check. Without the service he reads on; with it he cannot.

    In both modes he keeps what he has read; this is about the key, and all that it opens.
    """
    alice, bob = two
    create(alice, "plain", "client")
    alice.view("plain").write("file", DATA)
    alice.flush("plain")
    alice.grant("plain", bob)
    assert bob.view().read("file") == bob.view("plain").read("file") == DATA
    held = {name: kept(behind, bob, alice, name) for name in ("plain", "first")}
    client = HackedClient(bob.root, time.time)
    for name in held:
        assert client.read(*held[name], bob.blocks) == {"file": DATA}
    for name in held:
        alice.world.run(alice.session.book.revoke, alice.share(name), "bob")
    assert client.read(*held["plain"], bob.blocks) == {"file": DATA}
    with pytest.raises(Refused, match="share_revoked"):
        client.read(*held["first"], bob.blocks)
    # Nor does guessing help, nor the capsule alone.
    for half in (b"", bytes(32), os.urandom(32)):
        with pytest.raises(MeshkitError, match="key_unwrap_failed"):
            client.read(*held["first"], bob.blocks, half=half)
    # Given in again, he gets the half again, for the new capsule.
    alice.grant_again("first", bob, "read")
    held["first"] = kept(behind, bob, alice)
    assert client.read(*held["first"], bob.blocks) == {"file": DATA}


def test_a_hacked_client_after_its_grant_expired(two, behind, served):
    """The service's clock counts, whatever the client makes of the date."""
    alice, bob = two
    until = int(time.time()) + 600
    for name, mode in (("plain", "client"), ("timed", "release")):
        create(alice, name, mode)
        alice.view(name).write("file", DATA)
        alice.flush(name)
        alice.world.run(alice.session.book.add, alice.share(name), "bob", Terms(("read",), expires=until))
        bob.world.run(bob.session.book.inbox.accept, name, name.encode())
    held = {name: kept(behind, bob, alice, name) for name in ("plain", "timed")}
    client = HackedClient(bob.root, time.time)
    assert client.read(*held["timed"], bob.blocks) == {"file": DATA}
    served.inner.clock = lambda: until + 1.0
    assert client.read(*held["plain"], bob.blocks) == {"file": DATA}
    with pytest.raises(Refused, match="share_expired"):
        client.read(*held["timed"], bob.blocks)


def demanding(two, behind, **demands):
    """Alice's shares in both modes, granted to bob under these demands; returns what he keeps of them."""
    alice, bob = two
    for name, mode in (("plain", "client"), ("strict", "release")):
        create(alice, name, mode)
        alice.view(name).write("file", DATA)
        alice.flush(name)
        command(alice, "share.add", target=name, recipient="bob", rights=["read"], **demands)
        bob.world.run(bob.session.book.inbox.accept, name, name.encode())
    return {name: kept(behind, bob, alice, name) for name in ("plain", "strict")}


def command(device, method, **params):
    return device.world.run(Service(device.session).call, method, params)


def test_a_hacked_client_that_is_not_in_the_vault(two, behind):
    """In, out and in again: the service goes by the newest record of its own database."""
    alice, bob = two
    command(alice, "vault.create", name="crew")
    held, client = demanding(two, behind, vault="crew"), HackedClient(bob.root, time.time)
    assert client.read(*held["plain"], bob.blocks) == {"file": DATA}
    with pytest.raises(Refused, match="vault_membership_required"):
        client.read(*held["strict"], bob.blocks)
    command(alice, "vault.add", name="crew", member="bob")
    assert client.read(*held["strict"], bob.blocks) == {"file": DATA}
    wait_until(lambda: _opens(bob, "strict"), "the share")
    command(alice, "vault.remove", name="crew", member="bob")
    with pytest.raises(Refused, match="vault_membership_required"):
        client.read(*held["strict"], bob.blocks)
    assert client.read(*held["plain"], bob.blocks) == {"file": DATA}
    wait_until(lambda: not _opens(bob, "strict"), "the end")


def test_a_hacked_client_without_a_good_token(two, behind):
    alice, bob = two
    held = demanding(two, behind, capability="editors")
    blob, owner, head = held["strict"]
    client = HackedClient(bob.root, time.time)
    capsule = Capsule.parse(blob, {kid_of(owner): owner})
    assert client.read(*held["plain"], bob.blocks) == {"file": DATA}
    with pytest.raises(Refused, match="capability_required"):
        client.ask(capsule)

    def token(issuer, holder, biscuit=False, **changes):
        now = int(time.time())
        fields = {"token_id": os.urandom(16), "name": "editors", "holder": holder.public, "rights": ["read"]}
        fields |= {"share": None, "iat": now, "exp": now + 600}
        return issuing(biscuit).issue(issuer, **(fields | changes))

    mine, his = alice.session.identity.signing, bob.session.identity.signing
    # The issuer's revocation list is there since the first token was made by the command.
    command(alice, "capability.issue", name="editors", recipient="bob", rights=["list"])
    for bad in (
        token(SigningKey.generate(), his),
        token(mine, mine),
        token(mine, his, name="readers"),
        token(mine, his, share=bytes(16)),
        token(mine, his, exp=int(time.time()) - 1, iat=1),
        token(mine, his, rights=["list"]),
        token(mine, mine, biscuit=True),
        token(SigningKey.generate(), his, biscuit=True),
    ):
        with pytest.raises(Refused, match="capability_denied"):
            client.ask(capsule, [bad.to_bytes()])
    with pytest.raises(Refused, match="invalid_record"):
        client.ask(capsule, [token(mine, his).to_bytes()[:-1]])
    for good in (token(mine, his), token(mine, his, biscuit=True)):
        half = client.ask(capsule, [good.to_bytes()])
        assert client.read(blob, owner, head, bob.blocks, half) == {"file": DATA}


def test_the_tokens_that_are_held_are_shown_to_the_service(two, behind):
    """By a client as it is: the token comes by mail, and goes along with the question."""
    alice, bob = two
    held = demanding(two, behind, capability="editors")
    before = {row["token"] for row in command(alice, "capability.list")["issued"]}
    command(alice, "capability.issue", name="editors", recipient="bob", rights=["read"])
    (made,) = {row["token"] for row in command(alice, "capability.list")["issued"]} - before
    wait_until(lambda: _opens(bob, "strict"), "the share", 60)
    assert bob.share("strict").grant.enforcement == "release"
    command(alice, "capability.revoke", token=made)
    wait_until(lambda: not _opens(bob, "strict"), "the end", 60)
    tokens = [token.to_bytes() for token in bob.session.gate.lists.tokens()]
    blob, owner, _ = held["strict"]
    with pytest.raises(Refused, match="revoked"):
        HackedClient(bob.root, time.time).ask(Capsule.parse(blob, {kid_of(owner): owner}), tokens)


def test_a_token_for_a_key_that_its_holder_has_replaced(two, behind):
    """It is theirs still. Whoever stole the old key, or shows somebody else's token, gets nothing."""
    alice, bob = two
    held = demanding(two, behind, capability="editors")
    command(alice, "capability.issue", name="editors", recipient="bob", rights=["read"])
    wait_until(lambda: _opens(bob, "strict"), "the share", 60)
    token = max(bob.session.gate.lists.tokens(), key=lambda token: token.last.iat).to_bytes()
    thief = HackedClient(bob.root, time.time)
    old = bob.session.identity.signing
    bob.world.run(lambda: bob.session.life.rotate(signing=True, encryption=False))
    assert bob.session.identity.signing.public != old.public
    blob, owner, head = held["strict"]
    capsule = Capsule.parse(blob, {kid_of(owner): owner})
    with pytest.raises(Refused, match="metadata_unauthorized"):
        thief.ask(capsule, [token])
    client = HackedClient(bob.root, time.time)
    half = client.ask(capsule, [token])
    assert client.read(blob, owner, head, bob.blocks, half) == {"file": DATA}
    with pytest.raises(Refused, match="capability_denied: the token is another holder's"):
        client.ask(capsule, [foreign(alice, SigningKey.generate())])
    # The program as it is.
    bob.session.gate._released.forget(bob.share("strict").row.share)
    before = asked(bob)
    assert walk(bob, name="strict").enforcement == "release"
    assert asked(bob) == before + 1


def foreign(issuer, holder):
    """A token of the capability "editors" for somebody else."""
    token = Token.issue(
        issuer.session.identity.signing, token_id=os.urandom(16), name="editors", holder=holder.public,
        rights=["read"], share=None, iat=int(time.time()), exp=int(time.time()) + 600,
    )  # fmt: skip
    return token.to_bytes()


@pytest.mark.parametrize("broken", ["before", "after", "instead"])
def test_keys_that_no_chain_leads_to_hold_nothing_at_the_service(two, behind, broken, monkeypatch):
    """What the database says of keys is believed as far as the chain proves it."""
    alice, bob = two
    held = demanding(two, behind, capability="editors")
    command(alice, "capability.issue", name="editors", recipient="bob", rights=["read"])
    wait_until(lambda: _opens(bob, "strict"), "the share", 60)
    stranger = SigningKey.generate()
    blob, owner, _ = held["strict"]
    capsule, client = Capsule.parse(blob, {kid_of(owner): owner}), HackedClient(bob.root, time.time)
    chain = behind_run(behind.identity, "bob")
    his = first_record("bob", stranger, EncryptionKey.generate().public, 1, 1 << 32)
    mixed = {"before": [his, *chain], "after": [*chain, his], "instead": [his]}[broken]

    async def identity(_handle):
        return mixed

    monkeypatch.setattr(behind, "identity", identity)
    why = "has just been replaced" if broken == "instead" else "invalid_record"
    with pytest.raises(Refused, match=why):
        client.ask(capsule, [foreign(alice, stranger)])


def test_a_hacked_client_that_a_policy_denies(two, behind):
    """The owner's rules: a changed program need not evaluate them, the service does."""
    alice, bob = two
    rules = 'permit(principal == Identity::"carol", action, resource);'
    for name, mode in (("plain", "client"), ("strict", "release")):
        create(alice, name, mode)
        alice.view(name).write("file", DATA)
        alice.flush(name)
        terms = Terms(("read",), policy="hours", pol={"id": "hours", "rules": rules})
        alice.world.run(alice.session.book.add, alice.share(name), "bob", terms)
        bob.world.run(bob.session.book.inbox.accept, name, name.encode())
    client = HackedClient(bob.root, time.time)
    assert client.read(*kept(behind, bob, alice, "plain"), bob.blocks) == {"file": DATA}
    with pytest.raises(Refused, match="policy_denied"):
        client.read(*kept(behind, bob, alice, "strict"), bob.blocks)


def test_the_operator_has_half_and_all_the_bytes_and_reads_nothing(two, behind):
    """Who runs the service and has its secret, its database and every block, but no capsule."""
    alice, bob = two
    blob, owner, head = kept(behind, bob, alice)
    share = bob.share().row.share
    with evil.opened(behind.path) as database:
        (record,) = database.execute("SELECT blob FROM deposits WHERE share = ?", (share,)).fetchone()
    found_share, epoch, half = second_reader.open_deposit(KEYS.encryption.seed, record, owner)
    assert (found_share, epoch, len(half)) == (share, 1, 32)
    stored = {second_reader.sha256(p.read_bytes()): p.read_bytes() for p in bob.blocks.rglob("bafkrei*")}
    for key in (
        half,
        second_reader.joined(half, half, share, 1),
        second_reader.joined(bytes(32), half, share, 1),
    ):
        with pytest.raises(second_reader.FormatError):
            list(second_reader.read_share(owner, key, head, stored.__getitem__))
    # With the capsule, but without bob's key, it does not open.
    for seed in (KEYS.encryption.seed, EncryptionKey.generate().seed):
        with pytest.raises(second_reader.FormatError):
            second_reader.open_capsule(seed, blob, owner, half)


# == a service that lies ================================================================================


def lie(served, change):
    """Answers that are the service's own, changed by ``change(answer, to)`` and signed again with its key."""

    async def fault(request, honest, stream):
        record = wire.from_b64(json.loads(honest.body)["record"], "record")
        blob = change(Release.parse(record, {KEYS.signing.kid: KEYS.signing.public}))
        return Answer(200, json.dumps({"record": wire.b64(blob)}).encode(), honest.headers)

    served.on("release", fault)


def test_a_wrong_half_is_noticed_before_anything_is_decrypted(two, served):
    _alice, bob = two
    to = bob.session.identity.encryption.public
    lie(served, lambda answer: answer.sealing(os.urandom(32), to).sign(KEYS.signing))
    error = refused(bob, "key_unwrap_failed")
    assert "commits to" in error.detail
    assert bob.share().row.share not in bob.session.gate._released._held
    served.heal()
    assert bob.view().read("file") == DATA


def test_a_half_that_is_too_short(two, served):
    _, bob = two

    def change(answer):
        from meshkitfs.core import hpke

        sealed = hpke.wrap(bob.session.identity.encryption.public, answer.info, b"short")
        return Release(*(getattr(answer, name) for name in Release.FIELDS if name != "half"), sealed).sign(
            KEYS.signing
        )

    async def fault(request, honest, stream):
        return Answer(200, json.dumps({"record": wire.b64(b"\x00" * 50)}).encode(), honest.headers)

    served.on("release", fault)
    refused(bob, "key_release_unavailable")


def test_a_replayed_release(two, served, behind):
    """The answer to an earlier question, which was a good one, served again after the revocation."""
    _alice, bob = two
    answers = []

    async def remember(request, honest, stream):
        answers.append(honest)
        return honest

    served.on("release", remember)
    assert bob.view().read("file") == DATA
    assert len(answers) == 1

    async def replay(request, honest, stream):
        return answers[0]

    served.on("release", replay)
    bob.share().forget_tree()
    bob.session.gate.forget_keys()
    error = refused(bob, "key_release_unavailable")
    assert "another question" in error.detail


def test_a_release_for_another_capsule(two, served):
    """Of another share of the same two, as the service gave it."""
    alice, bob = two
    create(alice, "second", "release")
    alice.view("second").write("file", b"other")
    alice.flush("second")
    alice.grant("second", bob)
    there, nonces = bob.share("second").row.share.hex(), []

    async def elsewhere(request, honest, stream):
        body = json.loads(request.body)
        nonces.append(body["nonce"])
        share = bytes.fromhex(there)
        half = alice.share("second").grant.epoch_secret(1).release_half
        to = bob.session.identity.encryption
        capsule = wire_capsule(served, share, to.kid)
        now = int(time.time())
        record = Release(
            share, record_hash(capsule), 1, to.kid, wire.from_b64(body["nonce"], "n"), now, now + 60
        )
        blob = record.sealing(half, to.public).sign(KEYS.signing)
        return Answer(200, json.dumps({"record": wire.b64(blob)}).encode(), honest.headers)

    alice.world.run(alice.share("second").use, "reshare")
    served.on("release", elsewhere)
    error = refused(bob, "key_release_unavailable")
    assert "another question" in error.detail
    assert nonces


def wire_capsule(served, share, kid):
    return next(blob for found, to, blob in served.capsules if (found, to) == (share, kid))


@pytest.mark.parametrize("times", [(-400, -100), (100, 400)], ids=["over", "from the future"])
def test_a_release_that_is_not_of_now(two, served, times):
    _, bob = two
    to, now = bob.session.identity.encryption.public, int(time.time())

    def change(answer):
        from dataclasses import replace

        half = served_half(bob, answer)
        moved = replace(answer, iat=now + times[0], exp=now + times[1])
        return moved.sealing(half, to).sign(KEYS.signing)

    lie(served, change)
    refused(bob, "key_release_unavailable")


def served_half(bob, answer):
    from meshkitfs.core import hpke

    return hpke.unwrap(bob.session.identity.encryption, answer.info, answer.half)


def test_a_release_that_another_key_signed(two, served):
    _, bob = two
    other = ReleaseKeys.derive(os.urandom(32).hex())
    lie(served, lambda answer: answer.sign(other.signing))
    refused(bob, "key_release_unavailable")


QUICK = (
    "a page of HTML",
    "truncated",
    "reset",
    "redirect to itself",
    "200 with an error",
    "204",
    "500",
    "404",
)


@pytest.mark.parametrize("kind", QUICK)
def test_no_answer_opens_nothing(two, served, kind):
    _, bob = two
    served.on("release", NO_ANSWERS[kind](served))
    refused(bob, "key_release_unavailable")
    served.heal()
    wait_until(lambda: _opens(bob), "the share", 60)


def _opens(device, name="first"):
    try:
        return device.view(name).read("file") == DATA
    except OSError:
        return False


def test_a_refusal_counts_with_its_status_only(two, served):
    _, bob = two
    body = b'{"error": {"code": "key_release_refused", "message": "", "detail": "policy_denied: not today"}}'
    for status, code in ((200, "key_release_unavailable"), (403, "key_release_refused")):
        served.on("release", served.status(status, body))
        assert ("policy_denied" in refused(bob, code).detail) == (code == "key_release_refused")


# == places ===========================================================================================


def test_a_home_asks_nobody_that_it_does_not_know(two, served, monkeypatch):
    """The address in a capsule is its owner's word; the key in it tells who is meant."""
    _alice, bob = two
    releases = bob.session.services.releases
    monkeypatch.setattr(releases, "_known", {})
    error = refused(bob, "key_release_unavailable")
    assert "does not know" in error.detail
    monkeypatch.undo()
    # By another name, it is known by its key.
    (place,) = releases.places
    known = releases._known[place]
    monkeypatch.setattr(releases, "_known", {place.replace("127.0.0.1", "localhost"): known})
    assert bob.view().read("file") == DATA


def test_another_service_at_the_same_address_is_given_no_half(two, served):
    alice, bob = two

    async def other(request, honest, stream):
        keys, value = ReleaseKeys.derive(os.urandom(32).hex()), json.loads(honest.body)
        value |= {"key": wire.b64(keys.signing.public), "record": wire.b64(keys.record(int(time.time())))}
        return Answer(200, json.dumps(value).encode(), honest.headers)

    served.on("release-service", other)
    alice.session.services.releases._offers.clear()
    with pytest.raises(MeshkitError) as caught:
        alice.grant_again("first", bob, "read")
    assert caught.value.code == "service_key_changed"


# == what was lost ======================================================================================


def test_a_service_that_lost_its_halves_is_given_them_again(two, behind):
    """Restored from a backup: the next grant brings the half back; until then it releases nothing."""
    alice, bob = two
    assert bob.view().read("file") == DATA
    with evil.opened(behind.path) as database:
        database.execute("DELETE FROM deposits")
    bob.share().forget_tree()
    bob.session.gate.forget_keys()
    assert "left no half" in refused(bob, "key_release_refused").detail
    alice.grant_again("first", bob, "read")
    wait_until(lambda: _opens(bob), "the share")
