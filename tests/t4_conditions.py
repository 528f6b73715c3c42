"""Vaults and capability tokens against two real mounts: open descriptors, memory maps, cached pages, the command line."""

from __future__ import annotations

import errno
import json
import mmap
import os

import pytest
from homes import Person, errno_of, needs_fuse, reason_code, wait_until, write_synced

pytestmark = needs_fuse

DATA = b"what only members see " * 5000


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("conditions")
    with Person(base / "alice", "alice") as alice, Person(base / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        yield alice, bob


def shared(alice, bob, name, *options):
    """A share of alice's with a file, given to bob on terms; returns her path and his."""
    mine = alice.mnt / name
    mine.mkdir()
    write_synced(mine / "file", DATA)
    alice.cli("share", "add", name, "bob", *options)
    (letter,) = [item for item in bob.ask("inbox.list")["letters"] if item["name"] == name]
    return mine, bob.mnt / bob.ask("inbox.accept", letter=letter["id"])["name"]


def test_a_member_is_taken_out_while_a_file_is_open(pair):
    alice, bob = pair
    alice.cli("vault", "create", "team")
    _, theirs = shared(alice, bob, "papers", "--vault", "team")
    assert errno_of(os.listdir, theirs) == errno.EACCES
    assert reason_code(theirs) == "vault_membership_required"
    alice.ask("vault.add", name="team", member="bob")
    wait_until(lambda: errno_of(os.listdir, theirs) == 0, "the way in")
    assert (theirs / "file").read_bytes() == DATA
    vault = alice.ask("vault.show", name="team")
    assert os.getxattr(theirs, "user.meshkit.vault").decode() == vault["vault"]
    with open(theirs / "file", "rb", buffering=0) as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        assert mapped[:10] == DATA[:10]
        done = alice.cli("vault", "remove", "team", "bob")
        assert done["members"] == []
        wait_until(
            lambda: errno_of(os.pread, file.fileno(), 4096, 0) == errno.EACCES,
            "the descriptor's end", done["bound_seconds"] + 5,
        )  # fmt: skip
        mapped.close()
    assert errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EACCES
    assert reason_code(theirs) == "vault_membership_required"
    explained = bob.ask("explain", path=str(theirs / "file"))
    assert explained["code"] == "vault_membership_required"
    assert "vault_membership_required" in bob.errors_text()
    # Somebody else's removal from somebody else's vault is nothing to alice.
    assert (alice.mnt / "papers" / "file").read_bytes() == DATA
    alice.ask("vault.add", name="team", member="bob")
    wait_until(
        lambda: (bob.mnt / theirs.name / "file").exists() and reason_code(theirs) == "ok", "the way back"
    )
    assert (theirs / "file").read_bytes() == DATA
    assert [item["name"] for item in alice.ask("vault.list")["vaults"]] == ["team"]
    alice.ask("vault.delete", name="team")
    wait_until(lambda: errno_of(os.listdir, theirs) == errno.EACCES, "the end of the vault")
    failed = alice.cli("vault", "show", "team", check=False)
    assert (failed.error["code"], failed.code) == ("vault_not_found", 2)


def test_a_token_is_narrowed_to_reading_while_somebody_writes(pair):
    alice, bob = pair
    mine, theirs = shared(alice, bob, "drafts", "--rights", "write", "--capability", "editors")
    assert errno_of(os.listdir, theirs) == errno.EACCES
    assert reason_code(theirs) == "capability_required"
    # On paper, so to say: through a file, which bob's home takes from standard input.
    text = alice.run("capability", "issue", "editors", "bob", "--rights", "write", "--out", "-").out
    assert text.startswith("meshkit-capability1:")
    added = bob.cli("capability", "add", "-", stdin=text.encode())
    wait_until(lambda: errno_of(os.listdir, theirs) == 0, "the way in")
    with open(theirs / "file", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"before", 0)
        os.fsync(file.fileno())
        bob.cli("capability", "narrow", added["id"], "bob", "--rights", "read")
        bob.ask("capability.remove", capability=added["id"])
        wait_until(
            lambda: errno_of(os.pwrite, file.fileno(), b"before", 0) == errno.EACCES, "the end of writing", 10
        )
        assert os.pread(file.fileno(), 6, 0) == b"before"
    assert errno_of(os.open, theirs / "new", os.O_CREAT | os.O_WRONLY) == errno.EACCES
    assert (theirs / "file").read_bytes()[:6] == b"before"
    report = json.loads(os.getxattr(theirs, "user.meshkit.capabilities"))
    (caveat,) = report["caveats"]
    assert (report["rights"], caveat["rights"], caveat["blocks"]) == (["list", "read"], ["list", "read"], 2)
    (held,) = bob.ask("capability.list")["held"]
    seen = bob.cli("capability", "inspect", held["id"])
    assert (seen["mine"], [block["rights"] for block in seen["chain"]]) == (
        True,
        [["read", "write"], ["read"]],
    )
    (issued,) = alice.ask("capability.list")["issued"]
    done = alice.cli("capability", "revoke", issued["token"])
    wait_until(
        lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EACCES,
        "the revocation",
        done["bound_seconds"] + 5,
    )
    assert reason_code(theirs) == "capability_denied"
    assert mine.is_dir()
    # The token itself stands in no log and no listing of either.
    secret = text.split(":")[1][:60]
    for person in (alice, bob):
        assert secret not in person.logs() + person.errors_text() + json.dumps(person.status())


def test_what_was_typed_wrong_is_said(pair, tmp_path):
    alice, _ = pair
    text = "meshkit-capability1:AAAA"
    for args, stdin, says in (
        (("inspect", "-"), b"hello\n", "that is not the text of a capability token"),
        (("inspect", "ab"), None, "say 4 digits of its id, or more"),
        (("inspect", "abcd"), None, "no id begins with 'abcd'"),
        (("inspect", tmp_path / "none"), None, "No such file or directory"),
        (("inspect", text), None, "a token comes in a file, or with '-' on standard input"),
        (("add", text), None, "a token comes in a file, or with '-' on standard input"),
        (("revoke", "abcd"), None, "no id begins with 'abcd'"),
    ):
        failed = alice.run("capability", *args, stdin=stdin, check=False)
        assert failed.code == 2
        assert says in failed.err
        assert text not in failed.err
    outside = alice.run("explain", "/etc/passwd", check=False)
    assert outside.code == 2
    assert "/etc/passwd is not in a share of this home's mount" in outside.err
