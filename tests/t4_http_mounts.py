"""Real mounts of homes whose metadata is at a service: sharing as always, and a service that turns evil."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import evil
import pytest
import t4_sharing as sharing
from evil_service import NO_ANSWERS, EvilService
from homes import Person, errno_of, fails, invite, needs_fuse, reason_code, wait_until
from homes import write_synced as put
from service import Service
from t4_offline import shorten

pytestmark = needs_fuse


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """`meshkitfs serve` as a process of its own, and the evil one before it."""
    database = tmp_path_factory.mktemp("service") / "service.db"
    with (
        EvilService(lambda: evil.service_key(database)) as between,
        Service(database, "--name", between.authority) as honest,
    ):
        between.stand_before(honest.url)
        yield between


@pytest.fixture(scope="module")
def pair(tmp_path_factory, service):
    """Alice and bob with one byte store and one service, both mounted."""
    base = tmp_path_factory.mktemp("people")
    with Person(base / "alice", "alice") as alice, Person(base / "bob", "bob") as bob:
        for person in (alice, bob):
            stores = ("--provider", f"local:{base}/blocks", "--metadata", service.url)
            person.cli("init", "--identity", person.name, "--key-vault", "plain-file", *stores)
            if person is bob:
                shorten(bob)
            person.mount()
        yield alice, bob
        service.heal()


alice, bob = sharing.alice, sharing.bob


@pytest.fixture(autouse=True)
def honest_again(service):
    yield
    service.heal()


@pytest.fixture
def shared(alice, bob, request):
    """A share of alice's with a file, which bob may write; returns both directories."""
    name = request.node.name.removeprefix("test_")[:30].replace("[", "-").replace("]", "")
    os.mkdir(alice.mnt / name)
    put(alice.mnt / name / "file", b"first")
    theirs = bob.mnt / invite(alice, name, bob, "--rights", "write")["name"]
    return alice.mnt / name, theirs


def live(*people):
    for person in people:
        wait_until(lambda person=person: person.status()["metadata"]["feed"] == "live", "the feed")


def share_of(path):
    """The id of the share at a path of a mount."""
    return bytes.fromhex(os.getxattr(path, "user.meshkit.share").decode())


def test_a_change_reaches_the_other_mount_because_the_feed_tells(alice, bob, shared, service):
    """That no pause on its way is long is in t3_http_home."""
    mine, theirs = shared
    share = share_of(mine)
    assert (theirs / "file").read_bytes() == b"first"
    live(alice, bob)
    for number in range(3):
        text = b"change %d" % number
        for here, there, what in ((mine, theirs, text), (theirs, mine, b"back " + text)):
            told = service.told.count(share)
            put(here / "file", what)
            done = time.monotonic()
            wait_until(lambda there=there, what=what: (there / "file").read_bytes() == what, "the change")
            print(f"there {time.monotonic() - done:.3f} s after the publication")
            wait_until(lambda told=told: service.told.count(share) > told, "the feed")


def test_a_revocation_reaches_an_open_descriptor_because_the_feed_tells(alice, bob, shared, service):
    mine, theirs = shared
    share = share_of(mine)
    live(alice, bob)
    with open(theirs / "file", "rb", 0) as file:
        assert file.read() == b"first"
        told = service.told.count(share)
        bound = alice.ask("share.revoke", share=mine.name, recipient="bob")["bound_seconds"]
        assert bound == 61.0  # what holds even if the service conceals it
        done = time.monotonic()
        wait_until(lambda: errno_of(os.pread, file.fileno(), 10, 0) == errno.EACCES, "the end", bound)
        print(f"ended {time.monotonic() - done:.3f} s after the revocation")
        assert service.told.count(share) > told
    assert reason_code(theirs / "file") == "share_revoked"


def test_a_memory_map_dies_too(alice, bob, shared):
    mine, theirs = shared
    live(alice, bob)
    reader = subprocess.Popen(
        [sys.executable, "-c", sharing.MAPPED, theirs / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(reader.stdout.readline()) == b"first"[0]
    bound = alice.ask("share.revoke", share=mine.name, recipient="bob")["bound_seconds"]
    out, _ = reader.communicate(f"{bound}\n", timeout=bound + 10)
    assert out == ""
    assert reader.returncode == -signal.SIGBUS


@pytest.mark.parametrize("kind", ["a page of HTML", "reset"])
def test_no_answer_is_eacces(alice, bob, shared, service, kind):
    """Alice changes something, so bob's mount has to ask, and gets no answer until its lease is over."""
    mine, theirs = shared
    assert (theirs / "file").read_bytes() == b"first"
    live(alice, bob)
    service.on("state", NO_ANSWERS[kind](service), who=_kid(bob))
    put(mine / "file", b"second")
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EACCES, "the refusal", 120)
    before = _spent(bob)
    with fails(errno.EACCES):
        os.listdir(theirs)
    with fails(errno.EACCES):
        (theirs / "file").read_bytes()
    assert reason_code(theirs) == "freshness_unproven"
    assert _spent(bob) == before
    assert "freshness_unproven" in bob.errors_text()
    assert (mine / "file").read_bytes() == b"second"  # alice goes on
    service.heal()
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == 0, "the share", 60)
    assert (theirs / "file").read_bytes() == b"second"


def test_an_old_head_is_eio_and_stays_shut(alice, bob, shared, service):
    mine, theirs = shared
    put(mine / "file", b"second")
    wait_until(lambda: (theirs / "file").read_bytes() == b"second", "the change")
    live(alice, bob)
    service.on("state", service.head_of(back=2), who=_kid(bob))
    put(mine / "file", b"third")
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EIO, "the refusal", 30)
    before = _spent(bob)
    with fails(errno.EIO):
        (theirs / "file").read_bytes()
    assert reason_code(theirs) == "head_rollback"
    assert _spent(bob) == before
    service.heal()
    put(mine / "file", b"fourth")
    walks = bob.counters()["gate_walks"]
    wait_until(lambda: bob.explain(theirs / "file")["code"] == "head_rollback", "an answer")
    wait_until(lambda: bob.counters()["gate_walks"] > walks, "another look")
    assert errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EIO
    assert _spent(bob) == before


def test_a_revocation_and_a_new_grant(alice, bob, shared):
    mine, theirs = shared
    alice.ask("share.revoke", share=mine.name, recipient="bob")
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EACCES, "the end", 10)
    put(mine / "file", b"written meanwhile")
    alice.ask("share.add", target=mine.name, recipient="bob", rights=["read"])
    wait_until(lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == 0, "the new grant", 10)
    assert (theirs / "file").read_bytes() == b"written meanwhile"


def _kid(person):
    return person.ask("identity.show")["enc_kid"]


def _spent(person):
    counters = person.counters()
    return [counters[name] for name in ("unwraps", "fetches", "decrypts")]
