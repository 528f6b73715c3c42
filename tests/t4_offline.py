"""Real mounts at a real service that is killed and comes back: who goes on, for how long, and who does not.

Bob's homes are configured with the shortest lease, so that its end can be waited for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os

import pytest
import t4_sharing as sharing
from homes import REASON, Person, errno_of, fails, needs_fuse, reason_code, wait_until
from homes import write_synced as put
from service import Service

pytestmark = needs_fuse

LEASE = 15  # s, the least that the configuration takes
PATIENT = 120.0


@pytest.fixture
def world(tmp_path):
    """A service; alice with two shares, of which bob has one with an offline grace and one without; all mounted."""
    with (
        Service(tmp_path / "service.db") as service,
        Person(tmp_path / "alice", "alice") as alice,
        Person(tmp_path / "bob", "bob") as bob,
    ):
        for person in (alice, bob):
            stores = ("--provider", f"local:{tmp_path}/blocks", "--metadata", service.url)
            person.cli("init", "--identity", person.name, "--key-vault", "plain-file", *stores)
            shorten(person)
            person.mount()
        places = {}
        for name, terms in (("graced", {"offline_grace": "2d"}), ("strict", {})):
            (alice.mnt / name).mkdir()
            put(alice.mnt / name / "file", name.encode())
            places[name] = sharing.add(alice, bob, name, rights=["read", "write"], **terms)
            assert (places[name] / "file").read_bytes() == name.encode()
        yield service, alice, bob, places
        if service.process.poll() is not None:
            service.start()


def shorten(person):
    """Configure the shortest lease."""
    path = person.root / "meshkit.config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"access": {"leaseSeconds": LEASE}}))


def closes(path, name="file"):
    """Wait until nothing there can be opened any more."""
    wait_until(
        lambda: errno_of(os.open, path / name, os.O_RDONLY) == errno.EACCES, "the end of a lease", PATIENT
    )


def opens(path, data, name="file"):
    def there():
        with contextlib.suppress(OSError):
            return (path / name).read_bytes() == data
        return False

    wait_until(there, f"{data!r}", PATIENT)


def test_a_service_that_is_killed_and_comes_back(world):
    service, alice, bob, places = world
    graced, strict = places["graced"], places["strict"]
    assert bob.status()["access"] == {
        "noticed_seconds": 11.0, "lease_seconds": 15.0, "unreachable_seconds": 16.0
    }  # fmt: skip
    with open(strict / "file", "rb", 0) as held, open(graced / "file", "rb", 0) as carried:
        assert (held.read(), carried.read()) == (b"strict", b"graced")
        service.kill()

        # The lease is over and nobody renews it: what is open ends, and the kernel's copies with it.
        wait_until(lambda: errno_of(os.pread, held.fileno(), 10, 0) == errno.EACCES, "the end", PATIENT)
        closes(strict)
        assert reason_code(strict) == "freshness_unproven"
        assert "freshness_unproven" in bob.errors_text()

        # With a grace it goes on, and says so.
        assert os.pread(carried.fileno(), 10, 0) == b"graced"
        assert (graced / "file").read_bytes() == b"graced"
    wait_until(lambda: bob.share(graced.name)["freshness"]["unconfirmed"], "the notice", PATIENT)
    shown = bob.share(graced.name)
    assert (shown["state"], shown["reason"]) == ("stored", "freshness_unproven")
    assert shown["freshness"]["offline_grace"] == 2 * 86400
    assert os.getxattr(graced, REASON).startswith(b"freshness_unproven: ")
    assert b"not confirmed since" in os.getxattr(graced, "user.meshkit.freshness")
    steps = {step["step"]: step for step in bob.explain(graced / "file")["steps"]}
    assert steps["freshness"]["result"] == "passed"
    assert "offline grace" in steps["freshness"]["evidence"]
    assert {step["step"]: step["result"] for step in bob.explain(strict / "file")["steps"]}[
        "capsule"
    ] == "refused"

    # Work goes on here, is not published, and is told so.
    with fails(errno.EIO):
        put(graced / "offline", b"made offline")
    assert (graced / "offline").read_bytes() == b"made offline"

    # And one's own shares are nobody's to close.
    for name in places:
        assert (alice.mnt / name / "file").read_bytes() == name.encode()
    (alice.mnt / "graced/hers").write_bytes(b"hers")

    # A mount that starts while the service is away knows the same.
    bob.remount()
    assert (graced / "file").read_bytes() == b"graced"
    assert (graced / "offline").read_bytes() == b"made offline"
    assert errno_of(os.open, strict / "file", os.O_RDONLY) == errno.EACCES
    alice.remount()
    for name in places:
        assert (alice.mnt / name / "file").read_bytes() == name.encode()
    assert (alice.mnt / "graced/hers").read_bytes() == b"hers"

    # It comes back: everything opens by itself, and what waited goes out.
    service.start()
    opens(strict, b"strict")
    opens(alice.mnt / "graced", b"made offline", "offline")
    opens(graced, b"hers", "hers")
    wait_until(lambda: bob.share(graced.name)["reason"] is None, "the confirmation", PATIENT)
    assert os.getxattr(graced, REASON) == b"ok"


def test_a_revocation_during_the_grace_bites_when_somebody_answers(world):
    service, alice, bob, places = world
    graced = places["graced"]
    told = alice.ask("share.revoke", share="graced", recipient="bob")
    assert (told["bound_seconds"], told["unreachable_bound_seconds"]) == (11.0, 2 * 86400 + 1.0)
    closes(graced)
    assert reason_code(graced) == "share_revoked"
    # What was seen is not forgotten when nobody answers any more, nor by a restart.
    service.kill()
    bob.remount()
    assert errno_of(os.open, graced / "file", os.O_RDONLY) == errno.EACCES


def test_the_shortest_lease_is_kept_up(world):
    """Renewals, all the while the share is open: none of them is noticed by a reader."""
    _, _, bob, places = world
    before = bob.counters()["gate_walks"]
    with open(places["strict"] / "file", "rb", 0) as file:

        def renewed():
            assert os.pread(file.fileno(), 10, 0) == b"strict"
            return bob.counters()["gate_walks"] >= before + 2

        wait_until(renewed, "renewals", PATIENT)
    assert bob.counters()["refusals"] == {}
