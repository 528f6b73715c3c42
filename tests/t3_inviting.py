"""Inviting somebody who has no identity yet: one identity, once, in time, and only with the secret."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import evil
import pytest
import trio
import trustme
from devices import Device, World, scratch
from homes import Person, wait_until
from inner_service import InnerService

from meshkitfs.core import cbor, hpke
from meshkitfs.core.blocks import frame
from meshkitfs.core.identity_record import first_record
from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.core.ticket import MAGIC, Ticket, open_claim, seal_claim
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata

DATA = b"what the newcomer may read"


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


def now():
    return int(time.time())


# == tickets and claims ==================================================================================


class Somebody:
    def __init__(self, handle):
        self.signing, self.encryption = SigningKey.generate(), EncryptionKey.generate()
        self.record = first_record(handle, self.signing, self.encryption.public, now(), 10**7)


def ticket_of(owner, **changes):
    made = Ticket(
        os.urandom(16), os.urandom(32), "https://mesh.example", "code", owner.record, now() + 60, "first"
    )
    return replace(made, **changes)


def test_a_ticket_is_read_as_it_was_written():
    owner = Somebody("alice")
    made = ticket_of(owner)
    text = made.to_text(owner.signing)
    assert text.isascii()
    assert Ticket.from_text(text) == made
    wrapped = "\n".join(text[i : i + 60] for i in range(0, len(text), 60))
    assert Ticket.from_text(f"  {wrapped}\r\n") == made
    assert made.owner.handle == "alice"
    assert "code" not in repr(made)
    assert made.seed.hex() not in repr(made)


def test_a_ticket_that_was_changed_is_refused_and_not_repeated():
    owner, eve = Somebody("alice"), Somebody("eve")
    text = ticket_of(owner).to_text(owner.signing)
    wrong = [
        "", "meshkit-invitation1:", text[1:], text[:-1], text + "A", text + "=", text.replace("1:", "2:"),
        text[:200] + ("A" if text[200] != "A" else "B") + text[201:], "x" * 100_000, text * 20,
        ticket_of(owner).to_text(eve.signing), "meshkit-invitation1:" + "é" * 20,
    ]  # fmt: skip
    for value in wrong:
        with pytest.raises(MeshkitError) as caught:
            Ticket.from_text(value)
        assert caught.value.code in ("invalid_argument", "invalid_record")
        assert text[40:60] not in str(caught.value)


def test_a_claim_is_proved_by_its_secret_for_its_identity_and_its_owner():
    owner, carol, eve = Somebody("alice"), Somebody("carol"), Somebody("eve")
    made = ticket_of(owner)
    public = SigningKey.from_seed(made.seed).public
    sealed = seal_claim(carol.signing, carol.record, made, now())
    assert sealed.startswith(MAGIC)
    claim = open_claim(owner.encryption, sealed)
    assert (claim.id, claim.record, claim.sender.handle) == (made.id, carol.record, "carol")
    assert claim.proved_by(public)
    assert not claim.proved_by(SigningKey.generate().public)
    assert not replace(claim, record=eve.record).proved_by(public)
    assert not replace(claim, id=bytes(16)).proved_by(public)
    assert not replace(claim, to=bytes(16)).proved_by(public)
    assert not replace(claim, proof=evil.flipped(claim.proof, 200)).proved_by(public)
    with pytest.raises(MeshkitError) as caught:
        open_claim(carol.encryption, sealed)
    assert caught.value.code == "key_unwrap_failed"
    # Without the secret, no other record can be put under the proof.
    with pytest.raises(MeshkitError):
        open_claim(owner.encryption, seal_claim(eve.signing, carol.record, made, now()))
    for bad in (b"", MAGIC, sealed[:-1], b"MKL1\x01" + sealed[5:], sealed + b"x"):
        with pytest.raises(MeshkitError):
            open_claim(owner.encryption, bad)
    unframed = MAGIC + hpke.wrap(owner.encryption.public, b"mk/claim@1\0" + owner.encryption.kid, b"x" * 300)
    framed = MAGIC + hpke.wrap(
        owner.encryption.public,
        b"mk/claim@1\0" + owner.encryption.kid,
        frame(cbor.encode({"t": "mk/claim@1"})),
    )
    for bad in (unframed, framed):
        with pytest.raises(MeshkitError) as caught:
            open_claim(owner.encryption, bad)
        assert caught.value.code == "invalid_record"


# == the owner ===========================================================================================


@pytest.fixture
def three(place):
    """Alice with a share; bob and carol beside her, who have nothing of it. Time stands still."""
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
        carol = Device(world, f"{place}/carol", "carol", beside=alice).start()
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob, carol
        for device in (carol, bob, alice):
            if device.session is not None:
                device.close()


def call(device, method, **params):
    return device.world.run(Service(device.session).call, method, params)


def invite(device, **params):
    return call(device, "share.invite", share="first", **params)


def stage(device):
    (item,) = call(device, "share.invitations")["invitations"]
    return item["stage"], item["handle"], item["refused"]


def letters_of(device):
    return device.world.run(device.session.metadata.letters, device.session.identity.encryption.kid)


def test_whoever_comes_with_the_secret_is_let_in_once(three):
    alice, bob, carol = three
    made = invite(alice, rights=["read"])
    assert stage(alice) == ("open", "", [])
    told = call(bob, "invitation.claim", ticket=made["ticket"])
    assert (told["owner"], told["share"]) == ("alice", "first")
    # The owner, as the file names them, is a contact from here on.
    assert bob.session.contacts.get("alice").public.root == alice.session.identity.public.root
    # To the owner it is no letter, and to nobody anything yet.
    assert call(alice, "inbox.list") == {"letters": [], "unreadable": 0}
    assert call(bob, "inbox.list")["letters"] == []
    assert call(alice, "share.invitations")["granted"] == [made["id"]]
    assert stage(alice) == ("done", "bob", [])
    (letter,) = call(bob, "inbox.list")["letters"]
    assert letter["from"] == "alice"
    call(bob, "inbox.accept", letter=letter["id"], name="first")
    assert bob.view().read("file") == DATA
    # The same file, in somebody else's hands.
    call(carol, "invitation.claim", ticket=made["ticket"])
    assert call(alice, "share.invitations")["granted"] == []
    assert stage(alice) == ("done", "bob", ["carol"])
    assert call(carol, "inbox.list")["letters"] == []
    assert letters_of(alice) == []
    alice.refresh()
    assert {member.handle for member in alice.session.book.standing(alice.share())} == {"alice", "bob"}


def test_the_owners_mount_lets_in_by_itself(three):
    alice, bob, _ = three
    made = invite(alice)
    call(bob, "invitation.claim", ticket=made["ticket"])

    def granted():
        alice.world.pass_time(2)
        return bool(letters_of(bob))

    wait_until(granted, "the grant")
    assert stage(alice)[0] == "done"


def test_nobody_looks_for_claims_while_no_invitation_is_out(three, monkeypatch):
    alice, bob, _ = three
    looks = []
    real = alice.session.welcome.look

    async def counted():
        looks.append(1)
        return await real()

    monkeypatch.setattr(alice.session.welcome, "look", counted)
    for _ in range(5):
        alice.world.pass_time(100)
    assert looks == []
    made = invite(alice)
    alice.world.pass_time(2)
    before = len(looks)
    for _ in range(20):
        alice.world.pass_time(2)  # and nothing changes in the store
    assert len(looks) <= before + 1
    call(bob, "invitation.claim", ticket=made["ticket"])
    wait_until(lambda: alice.world.pass_time(2) or letters_of(bob), "the grant")


def test_rights_and_end_are_those_of_the_invitation(three):
    alice, bob, _ = three
    made = invite(alice, rights=["write"], expires="2h")
    call(bob, "invitation.claim", ticket=made["ticket"])
    call(alice, "share.invitations")
    alice.refresh()
    member = next(m for m in alice.session.book.standing(alice.share()) if m.handle == "bob")
    assert member.rights == ("read", "write")
    assert abs(member.expires - time.time() - 7200) < 60


def test_an_invitation_that_was_taken_back(three):
    alice, bob, _ = three
    made = invite(alice)
    assert call(alice, "share.uninvite", invitation=made["id"])["stage"] == "revoked"
    call(bob, "invitation.claim", ticket=made["ticket"])  # bob cannot know
    assert call(alice, "share.invitations")["granted"] == []
    assert stage(alice) == ("revoked", "", ["bob"])
    assert letters_of(bob) == []
    with pytest.raises(MeshkitError) as caught:
        call(alice, "share.uninvite", invitation="zzzz")
    assert caught.value.code == "letter_not_found"


def test_an_invitation_whose_time_is_over(three, monkeypatch):
    alice, bob, _ = three
    made = invite(alice, within="60s")
    call(bob, "invitation.claim", ticket=made["ticket"])
    real = alice.session.services.wall
    alice.session.services.wall = lambda: real() + 61
    assert call(alice, "share.invitations")["granted"] == []
    (item,) = alice.session.welcome.items()
    assert item.as_dict(int(real()) + 61)["stage"] == "expired"
    assert item.refused == ("bob",)
    assert letters_of(bob) == []
    # And whoever comes later hears it from their own home.
    old = Ticket.from_text(made["ticket"])
    late = replace(old, until=int(time.time()) - 5).to_text(alice.session.identity.signing)
    with pytest.raises(MeshkitError) as caught:
        call(bob, "invitation.claim", ticket=late)
    assert caught.value.code == "share_expired"


@pytest.mark.parametrize("within", ["59s", "0d", "31d", "soon"])
def test_how_long_an_invitation_may_last(three, within):
    alice, _, _ = three
    with pytest.raises(MeshkitError) as caught:
        invite(alice, within=within)
    assert caught.value.code == "invalid_argument"
    assert call(alice, "share.invitations")["invitations"] == []


def test_only_an_owner_invites(three):
    alice, bob, _ = three
    alice.grant("first", bob)
    for device, share, code in ((bob, "first", "not_owner"), (alice, "nosuch", "share_not_found")):
        with pytest.raises(MeshkitError) as caught:
            call(device, "share.invite", share=share)
        assert caught.value.code == code
    with pytest.raises(MeshkitError) as caught:
        invite(alice, rights=["reshare"])
    assert caught.value.code == "not_supported"


def test_a_claim_without_the_secret_is_thrown_away(three):
    """Eve knows everything but the secret: the id, the owner, and how a claim looks."""
    alice, bob, _ = three
    made = Ticket.from_text(invite(alice)["ticket"])
    forged = replace(made, seed=os.urandom(32))
    blob = seal_claim(bob.session.identity.signing, bob.session.identity.record, forged, now())
    alice.world.run(bob.session.metadata.post_letter, alice.session.identity.encryption.kid, blob)
    unknown = replace(made, id=os.urandom(16))
    blob = seal_claim(bob.session.identity.signing, bob.session.identity.record, unknown, now())
    alice.world.run(bob.session.metadata.post_letter, alice.session.identity.encryption.kid, blob)
    alice.world.run(
        bob.session.metadata.post_letter, alice.session.identity.encryption.kid, MAGIC + b"junk" * 99
    )
    assert call(alice, "share.invitations")["granted"] == []
    assert stage(alice) == ("open", "", [])
    assert letters_of(bob) == []
    assert [blob for _, blob in letters_of(alice)] == [MAGIC + b"junk" * 99]


def test_a_claim_under_the_name_of_somebody_who_is_known(three):
    """The directory's bob is the one alice knows; a claim of another key under his name grants nothing."""
    alice, bob, carol = three
    alice.grant("first", bob)
    made = Ticket.from_text(invite(alice)["ticket"])
    other = Somebody("bob")
    blob = seal_claim(other.signing, other.record, made, now())
    alice.world.run(carol.session.metadata.post_letter, alice.session.identity.encryption.kid, blob)
    assert call(alice, "share.invitations")["granted"] == []
    assert stage(alice) == ("open", "", ["bob"])
    # The invitation is still good for whoever it was meant for.
    call(carol, "invitation.claim", ticket=made.to_text(alice.session.identity.signing))
    assert call(alice, "share.invitations")["granted"]
    assert stage(alice) == ("done", "carol", ["bob"])


def test_a_grant_that_was_interrupted_is_gone_on_with(three, monkeypatch):
    """The store goes away between the claim and the grant: the same person gets in later, and nobody else."""
    alice, bob, carol = three
    made = invite(alice)
    call(bob, "invitation.claim", ticket=made["ticket"])
    real = alice.session.book.add

    async def away(*args):
        raise MeshkitError("metadata_unavailable", "away")

    monkeypatch.setattr(alice.session.book, "add", away)
    with pytest.raises(MeshkitError):
        call(alice, "share.invitations")
    (item,) = alice.session.welcome.items()
    assert (item.stage, item.handle) == ("claimed", "bob")
    monkeypatch.setattr(alice.session.book, "add", real)
    alice.crash()
    alice.start()
    call(carol, "invitation.claim", ticket=made["ticket"])
    assert call(alice, "share.invitations")["granted"] == [made["id"]]
    assert stage(alice) == ("done", "bob", ["carol"])
    alice.refresh()
    assert {member.handle for member in alice.session.book.standing(alice.share())} == {"alice", "bob"}


def test_an_invitation_that_is_being_granted_is_nobody_elses(three, monkeypatch):
    """Bob's claim is lost at the store in the middle of his grant; carol has the file too."""
    alice, bob, carol = three
    made = invite(alice)
    call(bob, "invitation.claim", ticket=made["ticket"])
    real = alice.session.book.add

    async def away(*args):
        raise MeshkitError("metadata_unavailable", "away")

    monkeypatch.setattr(alice.session.book, "add", away)
    with pytest.raises(MeshkitError):
        call(alice, "share.invitations")
    monkeypatch.setattr(alice.session.book, "add", real)
    ((lost, _),) = letters_of(alice)
    alice.world.run(alice.session.metadata.delete_letter, alice.session.identity.encryption.kid, lost)
    call(carol, "invitation.claim", ticket=made["ticket"])
    assert call(alice, "share.invitations")["granted"] == []
    assert stage(alice) == ("claimed", "bob", ["carol"])
    call(bob, "invitation.claim", ticket=made["ticket"])
    assert call(alice, "share.invitations")["granted"] == [made["id"]]


def test_what_is_kept_of_an_invitation_claims_nothing(three, place):
    alice, _, _ = three
    made = Ticket.from_text(invite(alice)["ticket"])
    kept = alice.session.state.setting("invitations")
    assert made.id.hex() in kept
    assert made.seed.hex() not in kept
    # And the file opens nothing: no capsule, and no key of the share, is in it.
    assert alice.world.run(alice.session.metadata.capsules, alice.share().row.share, bytes(16)) == []
    grant = alice.world.run(alice.share().use, "reshare")
    assert grant.epoch_key() not in cbor.encode(made.payload())


def test_a_list_that_makes_no_sense_is_said_to_be_one(three):
    alice, _, _ = three
    for text in ("{", "[1]", '[{"id": 1}]', "null"):
        alice.session.state.set_setting("invitations", text)
        with pytest.raises(MeshkitError) as caught:
            alice.session.welcome.items()
        assert caught.value.code == "state_corrupt"
    alice.session.state.set_setting("invitations", "[]")


def test_an_invitation_to_another_service_is_refused(three):
    alice, bob, _ = three
    made = replace(Ticket.from_text(invite(alice)["ticket"]), url="https://elsewhere.example")
    with pytest.raises(MeshkitError) as caught:
        call(bob, "invitation.claim", ticket=made.to_text(alice.session.identity.signing))
    assert caught.value.code == "invalid_argument"
    assert "elsewhere.example" in caught.value.detail
    assert letters_of(alice) == []


# == the program, over a service that asks for invitations ===============================================


def test_somebody_who_has_nothing_comes_in_with_a_file(place):
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with (
        InnerService(behind, "invite") as server,
        Person(f"{place}/alice", "alice") as alice,
        Person(f"{place}/carol", "carol") as carol,
    ):
        blocks = f"local:{place}/blocks"
        code = server.invite()
        join = {"env": {"MESHKITFS_JOIN_TOKEN": code}}
        vault = ("--key-vault", "plain-file", "--provider", blocks)
        alice.cli("init", "--identity", "alice", "--metadata", server.url, *vault, **join)
        alice.cli("share", "create", "photos")
        file = f"{place}/for-carol"
        made = alice.cli("share", "invite", "photos", "--out", file, "--rights", "read", "--within", "3d")
        assert made["file"] == file
        assert "ticket" not in made
        assert Path(file).stat().st_mode & 0o777 == 0o600
        again = alice.cli("share", "invite", "photos", "--out", file, check=False)
        assert again.error["code"] == "invalid_argument"  # nothing is overwritten
        secret = Path(file).read_text().strip()
        Path(file).chmod(0o644)
        refused = carol.cli("init", "--identity", "carol", "--invitation", file, *vault, check=False)
        assert refused.error["code"] == "invalid_config"
        Path(file).chmod(0o600)
        joined = carol.cli("init", "--identity", "carol", "--invitation", file, *vault)
        assert joined["published"] is True
        assert joined["invitation"]["owner"] == "alice"
        assert carol.cli("contacts", "list")["contacts"][0]["handle"] == "alice"
        assert carol.cli("inbox")["letters"] == []
        listed = alice.cli("share", "invitations")
        assert listed["granted"] == [made["id"]]
        letter = carol.cli("inbox")["letters"][0]
        assert (letter["from"], letter["name"]) == ("alice", "photos")
        carol.cli("accept", letter["id"])
        assert carol.cli("share", "list")["shares"][0]["rights"] == ["list", "read"]
        # Used: it lets nobody else in, at the service or at alice's.
        with Person(f"{place}/dave", "dave") as dave:
            late = dave.cli(
                "init", "--identity", "dave", "--invitation", "-", *vault, stdin=secret.encode(), check=False
            )
            assert late.error["code"] == "metadata_unauthorized"
        seed = Ticket.from_text(secret).seed
        everything = "".join(alice.outputs + carol.outputs) + alice.logs() + carol.logs()
        assert secret not in everything
        assert seed.hex() not in everything
        assert secret[100:140] not in everything
        assert code not in everything
    behind.close()


def test_an_invitation_and_a_configuration_that_is_there_before(place):
    """It is followed, with its certificate authority, and never changed; what contradicts it is refused."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(f"{place}/ca.pem")
    certificate.cert_chain_pems[0].write_to_path(f"{place}/cert.pem")
    certificate.private_key_pem.write_to_path(f"{place}/key.pem")
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with InnerService(behind, tls=(f"{place}/cert.pem", f"{place}/key.pem")) as server:
        reached = {"type": "http", "url": server.url, "caFile": f"{place}/ca.pem"}
        store = {"provider": {"type": "local-dev", "store": f"{place}/blocks"}}

        def configured(name, **more):
            person = Person(f"{place}/{name}", name)
            person.root.mkdir(mode=0o700)
            vault = {"type": "plain-file"}
            person.home.config_path.write_text(json.dumps({"version": 1, "keyVault": vault, **store, **more}))
            return person

        alice = configured("alice", metadata=reached)
        alice.cli("init", "--identity", "alice")
        alice.cli("share", "create", "photos")

        def come(person, *options, check=True):
            file = f"{place}/for-{person.name}"
            alice.cli("share", "invite", "photos", "--out", file)
            command = ("init", "--identity", person.name, "--invitation", file, *options)
            return person.cli(*command, check=check)

        bob = configured("bob", metadata=reached)
        before = bob.home.config_path.read_text()
        come(bob)
        assert bob.home.config_path.read_text() == before
        alice.cli("share", "invitations")
        (letter,) = bob.cli("inbox")["letters"]
        assert bob.cli("accept", letter["id"])["owner"] == "alice"

        elsewhere = {"type": "http", "url": "https://elsewhere.example"}
        for person, options, about in (
            (configured("carol"), ("--metadata-ca", f"{place}/ca.pem"), server.url),  # it says: a file
            (configured("dave", metadata=elsewhere), (), server.url),
            (configured("erin", metadata=reached), ("--provider", f"local:{place}/others"), "byte store"),
        ):
            before = person.home.config_path.read_text()
            refused = come(person, *options, check=False)
            assert refused.error["code"] == "invalid_argument"
            assert about in refused.error["detail"]
            assert not person.home.initialized
            assert person.home.config_path.read_text() == before
            assert trio.run(behind.identity, person.name) == []
        assert not os.path.exists(f"{place}/others")
    behind.close()


def test_no_file_is_left_when_no_invitation_was_made(place):
    with Person(f"{place}/alice", "alice") as alice:
        alice.init()
        file = Path(f"{place}/file")
        assert (
            alice.cli("share", "invite", "nosuch", "--out", file, check=False).error["code"]
            == "share_not_found"
        )
        assert not file.exists()
        alice.cli("share", "create", "first")
        alice.cli("share", "invite", "first", "--out", file)
        listed = alice.run("share", "invitations")
        assert "first" in listed.out
        item = json.loads(alice.run("--json", "share", "invitations").out)["invitations"][0]
        assert alice.cli("share", "uninvite", item["id"])["stage"] == "revoked"
