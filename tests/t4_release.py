"""Two real mounts over a real service that holds half of a share's key; and a client that skips its checks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time

import evil
import pytest
from hacked_client import HackedClient, Refused
from homes import Person, errno_of, fails, invite, needs_fuse, reason_code, wait_until
from homes import write_synced as put
from service import Service
from t1_release import key_file

from meshkitfs.errors import MeshkitError

pytestmark = needs_fuse

DATA = b"read only with both halves " * 1000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def service(place):
    config = place / "service.json"
    config.write_text(json.dumps({"release": {"keyFile": str(key_file(place)), "seconds": 60}}))
    with Service(place / "service.db", config=config) as running:
        yield running
        assert running.stop() == 0
        assert running.said == ""


@pytest.fixture(scope="module")
def pair(place, service):
    with Person(place / "alice", "alice") as alice, Person(place / "bob", "bob") as bob:
        for person in (alice, bob):
            stores = ("--provider", f"local:{place}/blocks", "--metadata", service.url)
            person.cli("init", "--identity", person.name, "--key-vault", "plain-file", *stores)
            person.mount()
        yield alice, bob


@pytest.fixture
def alice(pair):
    return pair[0]


@pytest.fixture
def bob(pair):
    return pair[1]


def shared(alice, bob, name, *options):
    """A share of alice's with a file, given to bob; returns both directories."""
    made = alice.cli("share", "create", name, *options)
    put(alice.mnt / name / "file", DATA)
    return made, alice.mnt / name, bob.mnt / invite(alice, name, bob, "--rights", "write")["name"]


def kept(service, alice, bob, name):
    """What bob has seen and kept: his newest capsule, the owner's key, the head."""
    share = bytes.fromhex(alice.share(name)["id"])
    kid = bytes.fromhex(bob.ask("identity.show")["enc_kid"])
    with evil.opened(service.database) as database:
        query = "SELECT blob FROM capsules WHERE share = ? AND kid = ? ORDER BY n DESC"
        (capsule,) = database.execute(query, (share, kid)).fetchone()
        (owner,) = database.execute("SELECT owner FROM rosters WHERE share = ?", (share,)).fetchone()
        (head,) = database.execute(
            "SELECT blob FROM heads WHERE share = ? ORDER BY ver DESC", (share,)
        ).fetchone()
    return capsule, owner, head


def test_what_each_mode_enforces_when_somebody_skips_every_check(place, service, alice, bob):
    held, directories = {}, {}
    for name, options in (("plain", ()), ("halves", ("--enforcement", "release"))):
        made, mine, theirs = shared(alice, bob, name, *options)
        assert made["enforcement"] == ("release" if options else "client")
        assert made["release_service"] == (service.url if options else None)
        assert (theirs / "file").read_bytes() == DATA
        put(theirs / "bob's", b"written")
        wait_until(lambda mine=mine: errno_of(os.stat, mine / "bob's") == 0, "bob's file")
        held[name], directories[name] = kept(service, alice, bob, name), (mine, theirs)
    assert alice.counters()["releases"] == 0
    assert bob.counters()["releases"] == 1
    hacked, want = HackedClient(bob.root, time.time), {"file": DATA, "bob's": b"written"}
    for name in held:
        assert hacked.read(*held[name], place / "blocks") == want
    with contextlib.ExitStack() as stack:
        open_files = {
            name: stack.enter_context(open(directories[name][1] / "file", "rb", 0)) for name in held
        }
        for name in held:
            alice.cli("share", "revoke", name, "bob")
        for name, file in open_files.items():
            wait_until(
                lambda file=file: errno_of(os.pread, file.fileno(), 10, 0) == errno.EACCES,
                f"the end of {name}",
            )
            assert reason_code(directories[name][1]) == "share_revoked"
    # The mount refuses both. Somebody who skips its checks goes on with one of them.
    assert hacked.read(*held["plain"], place / "blocks") == want
    with pytest.raises(Refused, match="share_revoked"):
        hacked.read(*held["halves"], place / "blocks")


def test_who_enforces_is_shown_everywhere(service, alice, bob):
    _, mine, theirs = shared(
        alice, bob, "shown", "--enforcement", "release", "--release-service", service.url
    )
    for path in (mine, theirs, theirs / "file"):
        value = json.loads(os.getxattr(path, "user.meshkit.capabilities"))
        assert (value["enforcement"], value["release_service"]) == ("release", service.url)
    for person, name in ((alice, mine.name), (bob, theirs.name)):
        assert f"release, by {service.url}" in person.run("share", "show", name).out
    steps = {step["step"]: step["evidence"] for step in bob.explain(theirs)["steps"]}
    assert f"the half that {service.url} released" in steps["key"]
    assert "released" not in {s["step"]: s["evidence"] for s in alice.explain(mine)["steps"]}["key"]


def test_without_the_service_nothing_opens_and_the_owner_goes_on(place, service, alice, bob):
    """An instance without the secret has taken its place: the metadata are there, the halves are not."""
    alice.cli("share", "create", "away", "--enforcement", "release")
    mine = alice.mnt / "away"
    put(mine / "file", DATA)
    alice.cli("share", "add", "away", "bob")
    assert service.stop() == 0
    plain = Service(service.database, listen=service.listen)
    try:
        reached(alice, bob)
        wait_until(lambda: errno_of(os.open, mine / "file", os.O_RDONLY) == 0, "alice's share", 60)
        put(mine / "file", b"the owner needs nobody")
        theirs = bob.mnt / accepted(bob)
        with fails(errno.EACCES):
            (theirs / "file").read_bytes()
        assert reason_code(theirs) == "key_release_unavailable"
        assert bob.explain(theirs)["code"] == "key_release_unavailable"
        assert "key_release_unavailable" in bob.errors_text()
        assert alice.cli("share", "create", "more", "--enforcement", "release", check=False).error[
            "code"
        ] == ("not_supported")
    finally:
        plain.stop()
        service.start()
    reached(alice, bob)
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == 0, "the share", 60)
    assert (theirs / "file").read_bytes() == b"the owner needs nobody"


def reached(*people):
    """The service is there again, and their homes have noticed."""
    for person in people:

        def answered(person=person):
            try:
                return person.ask("inbox.list")
            except MeshkitError:
                return None

        wait_until(answered, "the service", 60)


def accepted(person):
    """Take the one invitation that waits; returns the share's name."""
    (letter,) = (item for item in person.cli("inbox")["letters"] if not item["accepted"])
    return person.cli("accept", letter["id"])["name"]


def test_a_vault_is_looked_at_by_the_service_too(service, alice, bob):
    """The mount refuses before it asks; the service says no to whoever asks anyway."""
    alice.cli("vault", "create", "crew")
    alice.cli("share", "create", "strict", "--enforcement", "release")
    put(alice.mnt / "strict" / "file", DATA)
    name = invite(alice, "strict", bob, "--vault", "crew")["name"]
    with fails(errno.EACCES):
        (bob.mnt / name / "file").read_bytes()
    assert bob.counters()["refusals"]["vault_membership_required"]
    with pytest.raises(Refused, match=r"key_release_refused.*vault_membership_required"):
        HackedClient(bob.root, time.time).key(*kept(service, alice, bob, "strict")[:2])
    alice.cli("vault", "add", "crew", "bob")
    wait_until(lambda: errno_of(os.open, bob.mnt / name / "file", os.O_RDONLY) == 0, "the share", 60)
    assert HackedClient(bob.root, time.time).key(*kept(service, alice, bob, "strict")[:2])


def test_a_refusal_of_the_service_reaches_the_program(service, alice, bob):
    """Its clock is its own; here the half is gone from its database, which a client cannot know."""
    alice.cli("share", "create", "lost", "--enforcement", "release")
    put(alice.mnt / "lost" / "file", DATA)
    share = bytes.fromhex(alice.share("lost")["id"])
    with evil.opened(service.database) as database:
        database.execute("DELETE FROM deposits WHERE share = ?", (share,))
    capsule = alice.cli("share", "add", "lost", "bob")  # which leaves it there again
    with evil.opened(service.database) as database:
        assert database.execute("SELECT count(*) FROM deposits WHERE share = ?", (share,)).fetchone() == (1,)
        database.execute("DELETE FROM deposits WHERE share = ?", (share,))
    assert capsule["rights"] == ["read"]
    theirs = bob.mnt / accepted(bob)
    with fails(errno.EACCES):
        (theirs / "file").read_bytes()
    assert reason_code(theirs) == "key_release_refused"
    assert bob.run("explain", str(theirs)).out.count("key_release_refused") >= 1
    alice.cli("share", "add", "lost", "bob")
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == 0, "the share", 60)
