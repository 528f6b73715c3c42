"""The whole story, on three machines: two people with a user and a network of their own, and what is between them.

At the hub are `meshkitfs serve` and an IPFS node, both behind TLS of an authority that only the homes know. What
alice and bob do goes through real mounts, as ordinary users; what they are cut off from is the network.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
import trustme
from homes import HERE, REASON, fails, wait_until
from machines import HUB, Network
from servers import nodejs
from servers.process import says, started
from service import Service

SOON = 60.0  # seconds in which a change arrives on a machine with much other work

# In contents, names and the share's name; whoever keeps things for them must not have seen it.
CANARY = "kanarienvogel"
SHARE = f"{CANARY}-plans"


class Hub:
    """The service and the node, each known to the people by an address with ``https``."""

    def __init__(self, network, stack):
        base = network.base
        authority = trustme.CA()
        self.ca, certificate, key = base / "ca.pem", base / "hub.pem", base / "hub.key"
        issued = authority.issue_cert(HUB)
        authority.cert_pem.write_to_path(self.ca)
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        self.repository = base / "ipfs"
        node = [*nodejs.script("ipfs_node", "node.mjs"), self.repository, "5001", "0"]
        stack.enter_context(started([*network.prefix, *node], ready=says(" end\n"), name="js-ipfs"))
        front = [sys.executable, HERE / "tls_front.py", certificate, key, HUB, "5443", "5001"]
        stack.enter_context(started([*network.prefix, *front], ready=says("ready\n"), name="TLS"))
        self.database = base / "service.db"
        self.service = stack.enter_context(
            Service(
                self.database, "--tls-cert-file", certificate, "--tls-key-file", key,
                join="invite", listen=f"{HUB}:8443", prefix=network.prefix,
            )
        )  # fmt: skip

    def invitation(self):
        """An invitation in the operator's name."""
        command = [sys.executable, "-m", "meshkitfs", "--json", "serve-invite", "--database", self.database]
        done = subprocess.run(command, capture_output=True, check=True, cwd="/", env=self.service.env)
        return json.loads(done.stdout)["code"].encode()

    def configure(self, person):
        """Write the person's configuration, which ``init`` follows."""
        provider = {
            "type": "ipfs-http", "ipfsApiUrl": f"https://{HUB}:5443", "caFile": str(self.ca),
            "timeoutMs": 3000, "retries": 1,
        }  # fmt: skip
        metadata = {"type": "http", "url": self.service.url, "caFile": str(self.ca)}
        config = {"version": 1, "identity": person.name, "provider": provider, "metadata": metadata}
        path = person.root / "meshkit.config.json"
        path.write_text(json.dumps(config | {"keyVault": {"type": "plain-file"}}))
        path.chmod(0o600)
        os.chown(path, person.uid, person.uid)

    def kept(self):
        """Everything that the node and the service have on their disks: names and contents of all files."""
        files = [path for path in self.repository.rglob("*") if path.is_file()]
        files += self.database.parent.glob("service.db*")
        return {str(path.relative_to(self.database.parent)): path.read_bytes() for path in files}


@pytest.fixture
def world():
    """The hub, alice and bob; neither of them has an identity."""
    with Network() as network, contextlib.ExitStack() as stack:
        hub = Hub(network, stack)
        alice = stack.enter_context(network.machine("alice", 65001))
        bob = stack.enter_context(network.machine("bob", 65002))
        for person in (alice, bob):
            hub.configure(person)
        yield network, hub, alice, bob


def errno_of(person, *call):
    """The errno that the call fails with for that person, 0 if it succeeds."""
    try:
        person.do(*call)
    except OSError as error:
        return error.errno
    return 0


def code(person, path):
    return person.do("getxattr", path, REASON).partition(":")[0]


def arrives(person, path, text):
    """Wait until the person reads this there."""
    wait_until(
        lambda: person.do("exists", path) and person.do("read", path) == text, f"{text!r} at {path}", SOON
    )


def version(person, path):
    return person.do("getxattr", path, "user.meshkit.version")


@pytest.mark.timeout(900)  # many commands, each of which takes long on a machine with much other work
def test_the_whole_story(world):
    network, hub, alice, bob = world

    # Alice comes with an invitation of the operator, bob with one of hers. Neither sees the other's home.
    alice.cli("init", "--identity", "alice", "--join-file", "-", stdin=hub.invitation())
    mine = alice.mount() / SHARE
    alice.do("mkdir", mine)
    alice.do("write", mine / f"{CANARY}.txt", f"{CANARY} of alice\n" * 5000)
    ticket = alice.root / "for-bob"
    alice.cli("share", "invite", SHARE, "--out", ticket, "--rights", "write", "--offline-grace", "1h")
    bob.cli("init", "--identity", "bob", "--invitation", "-", stdin=ticket.read_bytes())
    bob.mount()
    letter = wait_until(lambda: bob.cli("inbox")["letters"], "the invitation", SOON)[0]
    assert (letter["from"], letter["name"]) == ("alice", SHARE)
    theirs = bob.mnt / bob.cli("accept", letter["id"])["name"]
    for one, other in ((alice, bob), (bob, alice)):
        with fails(errno.EACCES):
            one.do("listdir", other.root)

    # Both edit, and the other one sees it.
    arrives(bob, theirs / f"{CANARY}.txt", f"{CANARY} of alice\n" * 5000)
    bob.do("write", theirs / f"{CANARY}.txt", f"{CANARY} of bob")
    arrives(alice, mine / f"{CANARY}.txt", f"{CANARY} of bob")
    alice.do("write", mine / "both.txt", "before")
    arrives(bob, theirs / "both.txt", "before")
    waiting = bob.do("open", theirs / "both.txt", os.O_RDONLY)
    # Bob has taken in all that there is: news on its way would have him ask, and be refused, at his next open.
    alice.cli("sync")
    wait_until(lambda: version(bob, theirs) == version(alice, mine), "the newest version", SOON)

    # Bob's cable is out. Alice goes on; he cannot store, is told so, and what he writes waits on his device.
    network.cut("bob")
    with fails(errno.EIO):
        bob.do("write", theirs / "both.txt", f"{CANARY}: bob's version")
    alice.do("write", mine / "both.txt", f"{CANARY}: alice's version")
    alice.do("write", mine / "of-alice.txt", f"{CANARY}: only alice's")
    with fails(errno.EIO):
        bob.do("write", theirs / "of-bob.txt", f"{CANARY}: only bob's")
    assert bob.do("read", theirs / "both.txt") == f"{CANARY}: bob's version"
    # It is open to him: the lease goes on, and after it the offline grace of his grant. t4_offline.py waits for both.
    assert bob.do("pread", waiting) == f"{CANARY}: bob's version"
    assert (errno_of(bob, "read", theirs / "both.txt"), code(bob, theirs)) == (0, "provider_request_failed")
    (share,) = bob.cli("status")["shares"]
    assert share["reason"] == "provider_request_failed"
    assert share["state"] in ("stuck", "uploading")  # it is tried again every few seconds
    assert share["freshness"]["offline_grace"] == 3600

    # The cable is in: they converge, with both versions of what both changed and everything else once.
    network.heal("bob")
    expected = {"both.txt", f"{CANARY}.txt", "of-alice.txt", "of-bob.txt"}

    def converged():
        with contextlib.suppress(OSError):  # it is refused until he is heard
            seen = [person.do("listdir", place) for person, place in ((alice, mine), (bob, theirs))]
            return seen[0] == seen[1] and set(seen[0]) > expected and seen[0]

    names = wait_until(converged, "the same names at both", 2 * SOON)
    (copy,) = set(names) - expected
    assert copy.startswith("both (conflict bob ")
    for person, place in ((alice, mine), (bob, theirs)):
        arrives(person, place / "both.txt", f"{CANARY}: alice's version")
        arrives(person, place / copy, f"{CANARY}: bob's version")
        arrives(person, place / "of-alice.txt", f"{CANARY}: only alice's")
        arrives(person, place / "of-bob.txt", f"{CANARY}: only bob's")
    bob.do("write", theirs / "of-bob.txt", "stored again")  # fsync works again
    arrives(alice, mine / "of-bob.txt", "stored again")

    # Alice takes his access away.
    held = bob.do("open", theirs / "both.txt", os.O_RDWR)
    assert bob.do("pread", held) == f"{CANARY}: alice's version"
    bound = alice.cli("share", "revoke", SHARE, "bob")["bound_seconds"]
    wait_until(lambda: errno_of(bob, "pread", held) == errno.EACCES, "the end of what is open", bound + SOON)
    for call in (("pwrite", held, "x"), ("open", theirs / "both.txt"), ("listdir", theirs)):
        with fails(errno.EACCES):
            bob.do(*call)
    assert code(bob, theirs / "both.txt") == "share_revoked"
    alice.do("write", mine / "both.txt", f"{CANARY}: after bob")
    assert alice.do("read", mine / "both.txt") == f"{CANARY}: after bob"
    with fails(errno.EACCES):
        bob.do("open", theirs / "both.txt")

    # Who kept all this for them can read none of it.
    kept = hub.kept()
    blocks = [data for name, data in kept.items() if name.endswith(".data") and "/blocks/" in name]
    assert len(blocks) > 10
    assert sum(map(len, blocks)) > len(f"{CANARY} of alice\n" * 5000)
    assert any(b"alice" in data for data in kept.values())  # a handle may be seen, and is found
    for secret in (CANARY, "both.txt", "of-alice", "of-bob", "conflict bob", "stored again"):
        assert not [name for name, data in kept.items() if secret.encode() in data or secret in name], secret
    for fd in (waiting, held):
        bob.do("close", fd)
    for person in (alice, bob):
        person.umount()
