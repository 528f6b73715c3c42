"""Policies and real mounts: Cerbos decides, or the owner's rules; what was allowed ends when they say so.

What Cerbos permits stands in a file that it watches. It says nothing of how long an answer holds, so every open
asks it, and what is open is asked about again within `UNSAID_S` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import subprocess
import sys

import pytest
from homes import Person, errno_of, fails, needs_fuse, reason_code, wait_until, write_synced
from servers.cerbos import cerbos

from meshkitfs.daemon.watching import WATCH_S
from meshkitfs.policy import POLICY_DEADLINE_S, UNSAID_S

pytestmark = needs_fuse

DATA = os.urandom(300_000)
# The published bound for what is open, and the time that Cerbos may take to read a file.
BOUND_S = UNSAID_S + POLICY_DEADLINE_S + 2 * WATCH_S
PATIENCE_S = 60


@pytest.fixture(scope="module")
def pdp(tmp_path_factory):
    with cerbos(tmp_path_factory.mktemp("cerbos"), "list", "read", "write") as server:
        yield server


def configure(person, **policy):
    """Put a policy provider into a home's configuration."""
    path = person.root / "meshkit.config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policy": {"type": "authzen", **policy}}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, pdp):
    place = tmp_path_factory.mktemp("policies")
    with Person(place / "alice", "alice") as alice, Person(place / "bob", "bob") as bob:
        alice.init()
        configure(alice, endpoint=pdp.url)
        alice.mount()
        bob.init(beside=alice)
        configure(bob, endpoint=pdp.url)
        bob.mount()
        yield alice, bob


@pytest.fixture
def given(pair, pdp, request):
    """A share of alice's with a file, given to bob under a policy; everything is permitted at first."""
    alice, bob = pair
    permit(pdp, "list", "read", "write")
    name = request.node.name.removeprefix("test_")[:40]
    os.mkdir(alice.mnt / name)
    write_synced(alice.mnt / name / "file", DATA)

    def give(policy="p1", rights=("read", "write")):
        alice.ask("share.add", target=name, recipient="bob", rights=list(rights), policy=policy)
        (letter,) = [item for item in bob.ask("inbox.list")["letters"] if item["name"] == name]
        return bob.mnt / bob.ask("inbox.accept", letter=letter["id"])["name"]

    return give


def permit(pdp, *actions):
    """Change the policy file, and wait until Cerbos has taken note of it."""
    pdp.allow(*actions)
    for action in ("list", "read", "write"):
        wait_until(lambda a=action: pdp.decides(a) is (a in actions), "Cerbos' new policy", PATIENCE_S)


def content(path):
    """What can be read; None if it is refused."""
    with contextlib.suppress(PermissionError):
        return path.read_bytes()
    return None


def opens(path, data=DATA):
    """Wait until it can be read: on a busy machine an answer may be late, and late is a no."""
    wait_until(lambda: content(path) == data, f"{path.name} to be readable", PATIENCE_S)


def refused(path, code):
    """Assert that the very next open is refused, and that it comes to be for this reason."""
    with fails(errno.EACCES):
        (path / "file").read_bytes()
    wait_until(
        lambda: content(path / "file") is None and reason_code(path) == code, f"{code} of {path}", PATIENCE_S
    )


def policy_step(person, path):
    (step,) = [step for step in person.ask("explain", path=str(path))["steps"] if step["step"] == "policy"]
    return step


def test_the_next_open_asks_the_policy_file(pair, pdp, given):
    _, bob = pair
    path = given()
    opens(path / "file")
    assert os.getxattr(path, "user.meshkit.policy") == b"p1"
    step = policy_step(bob, path)
    assert step["result"] == "passed"
    assert f"{pdp.url}, not signed" in step["evidence"]

    permit(pdp)
    refused(path, "policy_denied")
    assert policy_step(bob, path)["code"] == "policy_denied"
    wait_until(lambda: "policy_denied: " in bob.errors_text(), "the refusal in errors.txt")

    permit(pdp, "list", "read", "write")
    opens(path / "file")
    assert reason_code(path) == "ok"


def test_each_right_needs_its_own_yes(pair, pdp, given):
    path = given()
    opens(path / "file")
    with open(path / "file", "r+b", 0) as file:
        file.write(b"bob")
        os.fsync(file.fileno())
        permit(pdp, "list", "read")
        with fails(errno.EACCES):
            os.open(path / "file", os.O_WRONLY)
        for call in (
            lambda: os.open(path / "new", os.O_CREAT | os.O_WRONLY),
            lambda: os.unlink(path / "file"),
            lambda: os.mkdir(path / "dir"),
            lambda: os.rename(path / "file", path / "other"),
        ):
            with fails(errno.EACCES):
                call()
        # The writer has been shut out with that; whoever reads has not.
        with fails(errno.EACCES):
            os.pwrite(file.fileno(), b"more", 0)
    opens(path / "file", b"bob" + DATA[3:])
    permit(pdp, "list", "read", "write")
    wait_until(lambda: errno_of(write_synced, path / "file", b"again") == 0, "the right to write", PATIENCE_S)

    permit(pdp, "list")
    with fails(errno.EACCES):
        os.open(path / "file", os.O_RDONLY)
    wait_until(lambda: errno_of(os.listdir, path) == 0, "the listing")


MAPPED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print(sum(view[i] for i in range(0, len(view), 4096)), flush=True)
sys.stdin.readline()
while True:
    view[0]
"""


def test_what_is_open_ends_within_the_bound(pair, pdp, given):
    """Nobody opens anything: a descriptor and a memory map whose pages are in the kernel's cache."""
    path = given()
    opens(path / "file")
    mapped = subprocess.Popen(
        [sys.executable, "-c", MAPPED, path / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert int(mapped.stdout.readline()) == sum(DATA[i] for i in range(0, len(DATA), mmap.PAGESIZE))
        with open(path / "file", "rb", 0) as file:
            assert file.read() == DATA
            permit(pdp)
            wait_until(
                lambda: errno_of(os.pread, file.fileno(), 4096, 0) == errno.EACCES,
                "the descriptor's end",
                BOUND_S + PATIENCE_S,
            )
            mapped.communicate("\n", timeout=PATIENCE_S)
            assert mapped.returncode == -signal.SIGBUS
            assert reason_code(path) == "policy_denied"
            permit(pdp, "list", "read", "write")
            wait_until(lambda: errno_of(os.pread, file.fileno(), 4096, 0) == 0, "the descriptor's life")
            assert os.pread(file.fileno(), 100, 0) == DATA[:100]
    finally:
        with contextlib.suppress(ProcessLookupError):
            mapped.kill()
        mapped.communicate()


def test_a_decision_point_that_hangs_opens_nothing(pair, pdp, given):
    path = given()
    opens(path / "file")
    pdp.process.pause()
    try:
        refused(path, "policy_provider_error")
    finally:
        pdp.process.resume()
    opens(path / "file")


def test_the_owners_rules_by_the_commands(pair, pdp, given, tmp_path):
    """Made, tried out, demanded, changed while a file is open, and deleted, as a person does it."""
    alice, bob = pair
    rules = tmp_path / "rules.cedar"
    rules.write_text('permit(principal == Identity::"bob", action == Action::"raed", resource);')
    failed = alice.run("policy", "create", "office", rules, check=False)
    assert failed.code == 2
    assert "line 1, column 48" in failed.err
    rules.write_text('@id("readers")\npermit(principal == Identity::"bob", action, resource);')
    assert "1 rule" in alice.run("policy", "create", "office", rules).out
    assert "allow" in alice.run("policy", "test", "office", "bob", "--action", "read").out
    denied = alice.run("policy", "test", "office", "carol").out
    assert "no rule permits it" in denied
    assert "allow" not in denied

    permit(pdp)  # it is not asked
    path = given("office", ("read",))
    with open(path / "file", "rb", 0) as file:
        assert file.read() == DATA
        assert "rule readers (line 1)" in policy_step(bob, path)["evidence"]
        assert "office" in alice.run("policy", "list").out
        shown = alice.run("policy", "show", "office").out
        assert "readers" in shown
        assert path.name.partition(" ")[0] in shown
        changed = alice.cli("policy", "edit", "office", "-", stdin=b"forbid(principal, action, resource);")
        assert changed["renewed"] == 1
        wait_until(
            lambda: errno_of(os.pread, file.fileno(), 4096, 0) == errno.EACCES,
            "the descriptor's end",
            changed["bound_seconds"] + PATIENCE_S,
        )
    assert reason_code(path) == "policy_denied"
    assert "forbidden by rule 1" in policy_step(bob, path)["evidence"]
    assert alice.run("policy", "delete", "office", check=False).code == 9
    alice.run("policy", "edit", "office", "--member", "bob")
    assert (path / "file").read_bytes() == DATA
    alice.cli("share", "revoke", path.name.partition(" ")[0], "bob")
    alice.run("policy", "delete", "office")


def test_trying_out_a_provider(pair, pdp):
    alice, _ = pair
    permit(pdp, "read")
    decided = alice.cli("policy", "test", "p1", "bob")["decisions"]
    assert [(item["action"], item["allow"]) for item in decided] == [
        ("list", False), ("read", True), ("write", False),
    ]  # fmt: skip
    assert pdp.url in decided[1]["reason"]
    checks = {check["name"]: check for check in alice.cli("doctor", check=False).json["checks"]}
    assert checks["policy provider"]["status"] == "ok"
