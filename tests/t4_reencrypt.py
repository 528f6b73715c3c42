"""``share revoke --reencrypt`` and ``share reencrypt``, with real mounts, while files are open and in use."""

from __future__ import annotations

import errno
import mmap
import os
import threading

import pytest
from homes import Person, fails, invite, needs_fuse, reason_code
from homes import write_synced as put

pytestmark = needs_fuse


@pytest.fixture
def people(tmp_path):
    """Alice with the stores and a share, bob beside her with the right to write it, both mounted."""
    with Person(tmp_path / "alice", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.cli("share", "create", "first")
        mine = alice.mount() / "first"
        bob.mount()
        theirs = bob.mnt / invite(alice, "first", bob, "--rights", "write")["name"]
        yield alice, bob, mine, theirs


def fill(mine):
    (mine / "dir").mkdir()
    tree = {
        "big": os.urandom(5_000_000),
        "small": b"text",
        "dir/other": os.urandom(300_000),
        "dir/empty": b"",
    }
    for name, data in tree.items():
        put(mine / name, data)
    os.symlink("small", mine / "dir/link")
    os.link(mine / "small", mine / "dir/second name")
    return tree


def blocks(person):
    return {path.name for path in person.blocks.rglob("bafkrei*")}


def status_of(path):
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def test_revoking_with_reencrypt_while_files_are_open_and_read(people):
    alice, _, mine, theirs = people
    tree = fill(mine)
    assert (theirs / "dir/other").read_bytes() == tree["dir/other"]
    before = {path: status_of(path) for path in (mine, *mine.rglob("*"))}
    refs = {name: os.getxattr(mine / name, "user.meshkit.cid") for name in tree}
    old = blocks(alice)
    trouble, stop = [], threading.Event()

    def read_on():
        with open(mine / "big", "rb", 0) as file:
            while not stop.is_set():
                for at in range(0, len(tree["big"]), 65536):
                    if os.pread(file.fileno(), 65536, at) != tree["big"][at : at + 65536]:
                        trouble.append(at)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def write_on(file):
        count = 0
        while not stop.is_set():
            file.write(b"line\n")
            count += 1
        return count

    with open(mine / "big", "rb") as held, open(mine / "log", "ab", 0) as log:
        mapped = mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ)
        written = []
        reader = threading.Thread(target=read_on)
        writer = threading.Thread(target=lambda: written.append(write_on(log)))
        reader.start()
        writer.start()
        try:
            result = alice.run("--json", "share", "revoke", "first", "bob", "--reencrypt")
        finally:
            stop.set()
            reader.join()
            writer.join()
        assert not trouble
        assert mapped[:] == tree["big"]
        mapped.close()
    assert result.code == 0
    assert [grant["handle"] for grant in result.json["revoked"]] == ["bob"]
    done = result.json["reencrypted"]
    assert (done["complete"], done["unreadable"], done["epoch"]) == (True, [], 2)
    assert done["files"] >= len(tree)
    assert done["bytes"] >= sum(map(len, tree.values()))
    assert done["blocks"] >= 20 + 2
    for name, data in tree.items():
        assert (mine / name).read_bytes() == data
        assert os.getxattr(mine / name, "user.meshkit.cid") != refs[name]
    assert (mine / "log").read_bytes() == b"line\n" * written[0]
    del before[mine]  # the log was made in it
    assert {path: status_of(path) for path in before} == before
    assert old < blocks(alice)  # nothing was deleted
    with fails(errno.EACCES):
        (theirs / "small").read_bytes()
    assert reason_code(theirs) == "share_revoked"
    # It is what others get to see, and what is there after a restart.
    alice.remount()
    assert {name: (mine / name).read_bytes() for name in tree} == tree
    again = alice.cli("share", "reencrypt", str(mine))
    assert again["complete"]
    assert again["blocks"] < 20  # the log, at most


def test_who_may_and_what_is_said(people):
    alice, bob, mine, theirs = people
    tree = fill(mine)
    refused = bob.cli("share", "reencrypt", theirs.name, check=False)
    assert (refused.code, refused.error["code"]) == (5, "not_owner")
    missing = alice.cli("share", "reencrypt", "nosuch", check=False)
    assert (missing.code, missing.error["code"]) == (2, "share_not_found")
    nobody = alice.cli("share", "revoke", "first", "carol", "--reencrypt", check=False)
    assert (nobody.code, nobody.error["code"]) == (2, "not_shared")
    assert alice.share("first")["epoch"] == 1
    said = alice.run("share", "reencrypt", "first")
    assert "names no block that was there before" in said.out
    assert "meshkitfs gc" in said.out
    # Bob has access still: he gets the new blocks, and can go on changing them.
    assert (theirs / "big").read_bytes() == tree["big"]
    put(theirs / "small", b"by bob")
    assert (mine / "small").read_bytes() == b"by bob"


def test_without_a_mount_and_with_a_damaged_file(people):
    alice, bob, mine, _theirs = people
    tree = fill(mine)
    sound = blocks(alice)
    put(mine / "dir/bad", os.urandom(100_000))
    bob.umount()
    alice.umount()
    largest = max(
        (path for path in alice.blocks.rglob("bafkrei*") if path.name not in sound),
        key=lambda path: path.stat().st_size,
    )
    largest.unlink()
    result = alice.cli("share", "reencrypt", "first", check=False)
    assert result.code == 7
    assert (result.json["complete"], result.json["unreadable"]) == (False, ["dir/bad"])
    assert result.json["files"] == len(tree)
    alice.mount()
    assert {name: (mine / name).read_bytes() for name in tree} == tree
