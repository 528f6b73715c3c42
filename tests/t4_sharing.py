"""Two people, two homes, two real mounts: giving, using, changing and taking back access."""

from __future__ import annotations

import errno
import mmap
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evil
import homes
import pytest
from homes import (
    CliFailure,
    Person,
    errno_of,
    fails,
    needs_fuse,
    reason,
    reason_code,
    sync_dir,
    usable_python,
    wait_until,
)
from homes import write_synced as put

pytestmark = needs_fuse


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Alice with the stores, bob beside her, both mounted."""
    base = tmp_path_factory.mktemp("sharing")
    with Person(base / "alice", "alice") as alice, Person(base / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        yield alice, bob


@pytest.fixture
def alice(pair):
    return pair[0]


@pytest.fixture
def bob(pair):
    return pair[1]


@pytest.fixture
def give(alice, bob, request):
    """A function that makes a share of alice's with a file and gives it to bob; returns both directories."""

    def give(rights="read", expires=None, name=None):
        name = name or request.node.name.removeprefix("test_")[:40]
        os.mkdir(alice.mnt / name)
        put(alice.mnt / name / "file", b"first")
        return alice.mnt / name, add(alice, bob, name, rights=rights.split(","), expires=expires)

    return give


def add(alice, bob, target, **terms):
    """`share add` and `accept` over the control sockets; returns bob's path of it."""
    alice.ask("share.add", target=target, recipient=bob.name, **terms)
    waiting = [letter for letter in bob.ask("inbox.list")["letters"] if not letter["accepted"]]
    return bob.mnt / bob.ask("inbox.accept", letter=waiting[-1]["id"])["name"]


# == the story, word for word ================================================================


def test_the_story(tmp_path):
    """Points 3 to 5 of the issue through the commands alone."""
    with Person(tmp_path / "alice", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
        alice.init()
        alice.cli("share", "create", "first")
        mine = alice.mount() / "first"
        tree = {"a.txt": b"text", "deep/er/b.bin": os.urandom(300_000), "deep/empty": b""}
        for name, data in tree.items():
            (mine / name).parent.mkdir(parents=True, exist_ok=True)
            put(mine / name, data)

        bob.init(beside=alice)
        added = alice.cli("share", "add", "first", "bob", "--rights", "read", "--expires", "7d")
        assert added["rights"] == ["read"]
        assert abs(added["expires"] - time.time() - 7 * 86400) < 60
        (letter,) = bob.cli("inbox")["letters"]
        assert (letter["from"], letter["name"], letter["rights"]) == ("alice", "first", ["read"])
        accepted = bob.cli("accept", letter["id"])
        theirs = bob.mount() / accepted["name"]
        assert os.listdir(bob.mnt) == [accepted["name"]]
        assert bob.cli("inbox")["letters"] == []
        subprocess.run(["diff", "-r", mine, theirs], check=True)

        for refused in (
            lambda: (theirs / "a.txt").write_bytes(b"no"),
            lambda: (theirs / "new").write_bytes(b"no"),
            lambda: (theirs / "a.txt").unlink(),
            lambda: (theirs / "dir").mkdir(),
            lambda: (theirs / "a.txt").rename(theirs / "c"),
            lambda: os.truncate(theirs / "a.txt", 0),
        ):
            with fails(errno.EACCES):
                refused()
        assert reason_code(theirs / "a.txt") == "right_not_granted"
        subprocess.run(["diff", "-r", mine, theirs], check=True)

        put(mine / "a.txt", b"changed")
        assert (theirs / "a.txt").read_bytes() == b"changed"

        alice.cli("share", "add", "first", "bob", "--rights", "write")
        put(theirs / "from-bob", b"written by bob")
        put(mine / "from-alice", b"written by alice")
        assert (mine / "from-bob").read_bytes() == b"written by bob"
        assert (theirs / "from-alice").read_bytes() == b"written by alice"

        alice.cli("share", "revoke", "first", "bob")
        with fails(errno.EACCES):
            (theirs / "a.txt").read_bytes()
        shown = subprocess.run(
            ["getfattr", "--only-values", "-n", "user.meshkit.reason", theirs / "a.txt"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        explained = bob.explain(theirs / "a.txt")
        assert explained["code"] == "share_revoked"
        assert shown.startswith("share_revoked: ")
        for words in (explained["message"], explained["suggestion"]):
            assert len(words) > 20
            assert words in shown
        spoken = bob.run("explain", theirs / "a.txt").out
        assert explained["message"] in spoken
        assert explained["suggestion"] in spoken
        shown_to_alice = alice.cli("share", "show", "first")
        assert (shown_to_alice["epoch"], shown_to_alice["recipients"]) == (2, [])

        (alice.mnt / "notes").mkdir()
        assert {"first", "notes"} == {share["name"] for share in alice.cli("share", "list")["shares"]}
        put(alice.mnt / "notes/one.pdf", b"version one")
        put(alice.mnt / "notes/two.pdf", b"not for bob")
        granted = alice.cli("share", "add", "notes/one.pdf", "bob", "--snapshot")
        (letter,) = [item for item in bob.cli("inbox")["letters"] if not item["accepted"]]
        assert (letter["kind"], letter["grant"]) == ("file", "snapshot")
        name = bob.cli("accept", letter["id"])["name"]
        seen = bob.mnt / name
        assert seen.is_file()
        assert seen.read_bytes() == b"version one"
        assert os.getxattr(seen, "user.meshkit.cid").decode() == granted["cid"]
        put(alice.mnt / "notes/one.pdf", b"version two")
        assert seen.read_bytes() == b"version one"


# == changes are seen at the next open ===============================================================


def in_place(path, data):
    put(path, data, "r+b")
    os.truncate(path, len(data))
    sync_dir(path.parent)


def rename_over(path, data):
    draft = path.with_name(".draft")
    put(draft, data)
    draft.rename(path)
    sync_dir(path.parent)


@pytest.mark.parametrize("size", [5, 20_000, 200_000, 1_500_000])
@pytest.mark.parametrize("change", [put, in_place, rename_over])
def test_new_content_at_the_next_open(give, change, size):
    mine, theirs = give(name=f"{change.__name__}-{size}")
    for generation in range(3):
        data = os.urandom(size - generation)
        change(mine / "file", data)
        assert (theirs / "file").read_bytes() == data
        assert (theirs / "file").stat().st_size == len(data)


def test_appends_and_truncations_are_seen(give):
    mine, theirs = give()
    expected = b"first"
    for piece in (b"x" * 10, b"y" * 70_000, b"z" * 300_000):
        put(mine / "file", piece, "ab")
        expected += piece
        assert (theirs / "file").read_bytes() == expected
    for size in (100_000, 65_536, 3, 0):
        fd = os.open(mine / "file", os.O_RDWR)
        os.ftruncate(fd, size)
        os.fsync(fd)
        os.close(fd)
        assert (theirs / "file").read_bytes() == expected[:size]


def test_an_open_file_that_changes_shows_the_change_too(give):
    """Not promised by close-to-open; but what is read must be one of the two versions, never a mixture."""
    mine, theirs = give()
    old, new = b"o" * 400_000, b"n" * 400_000
    put(mine / "file", old)
    with open(theirs / "file", "rb") as file:
        assert file.read(10) == b"o" * 10
        put(mine / "file", new)
        wait_until(lambda: os.pread(file.fileno(), 10, 0) == b"n" * 10, "the pushed change")
        assert os.pread(file.fileno(), 400_000, 0) == new


def test_names_come_go_and_move(give):
    mine, theirs = give()
    put(mine / "new", b"n")
    (mine / "directory").mkdir()
    put(mine / "directory/inner", b"i")
    os.symlink("file", mine / "link")
    sync_dir(mine)
    assert sorted(os.listdir(theirs)) == ["directory", "file", "link", "new"]
    assert (theirs / "directory/inner").read_bytes() == b"i"
    assert os.readlink(theirs / "link") == "file"
    assert (theirs / "new").read_bytes() == b"n"

    (mine / "new").rename(mine / "renamed")
    (mine / "directory").rename(mine / "moved")
    (mine / "link").unlink()
    sync_dir(mine)
    assert sorted(os.listdir(theirs)) == ["file", "moved", "renamed"]
    assert (theirs / "renamed").read_bytes() == b"n"
    assert (theirs / "moved/inner").read_bytes() == b"i"
    assert errno_of(os.open, theirs / "new", os.O_RDONLY) == errno.ENOENT
    # A stat of a name the kernel remembers may be old for as long as the notice takes, no longer.
    for gone in ("new", "directory", "link"):
        wait_until(
            lambda gone=gone: errno_of(os.lstat, theirs / gone) == errno.ENOENT, f"{gone} to be gone", 5
        )

    (mine / "moved/inner").unlink()
    (mine / "moved").rmdir()
    sync_dir(mine)
    assert sorted(os.listdir(theirs)) == ["file", "renamed"]


def test_a_name_that_becomes_another_kind(give):
    mine, theirs = give()
    assert (theirs / "file").read_bytes() == b"first"
    (mine / "file").unlink()
    (mine / "file").mkdir()
    put(mine / "file/in", b"now a directory")
    sync_dir(mine)
    assert os.listdir(theirs) == ["file"]
    assert wait_until(lambda: errno_of(os.listdir, theirs / "file") == 0, "the directory", 5)
    assert (theirs / "file/in").read_bytes() == b"now a directory"


def test_attributes_come_across(give):
    mine, theirs = give()
    os.chmod(mine / "file", 0o640)
    os.utime(mine / "file", ns=(0, 1_234_567_890_123_456_789))
    os.setxattr(mine / "file", "user.colour", b"green")
    sync_dir(mine)
    os.close(os.open(theirs / "file", os.O_RDONLY))
    status = wait_until(
        lambda: (found := os.stat(theirs / "file")).st_mode & 0o777 == 0o640 and found, "the mode", 5
    )
    assert status.st_mtime_ns == 1_234_567_890_123_456_789
    assert os.getxattr(theirs / "file", "user.colour") == b"green"


# == two writers =====================================================================================


def test_both_write_different_files_at_the_same_time(give):
    mine, theirs = give("write")
    writers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import os, sys\n"
                "for i in range(10):\n"
                "    with open(f'{sys.argv[1]}/{sys.argv[2]}-{i}', 'wb') as f:\n"
                "        f.write(sys.argv[2].encode() * 1000); f.flush(); os.fsync(f.fileno())\n",
                directory,
                who,
            ]
        )
        for directory, who in ((mine, "alice"), (theirs, "bob"))
    ]
    assert [writer.wait(homes.PATIENCE) for writer in writers] == [0, 0]
    expected = {"file": b"first"} | {
        f"{who}-{i}": who.encode() * 1000 for who in ("alice", "bob") for i in range(10)
    }
    for directory in (mine, theirs):
        assert {name: (directory / name).read_bytes() for name in os.listdir(directory)} == expected


def test_the_same_file_changed_by_both_keeps_both(give):
    mine, theirs = give("write")
    with open(mine / "file", "r+b", 0) as hers, open(theirs / "file", "r+b", 0) as his:
        hers.write(b"alice's words")
        his.write(b"bob's words")
        os.fsync(hers.fileno())
        os.fsync(his.fileno())
    sync_dir(mine)
    for directory in (mine, theirs):
        names = sorted(os.listdir(directory))
        assert len(names) == 2, names
        assert "file" in names
        assert any("conflict" in name and ("bob" in name or "alice" in name) for name in names)
        found = {(directory / name).read_bytes() for name in names}
        assert found == {b"alice's words", b"bob's words"}


def test_one_changes_what_the_other_removes(give):
    """The change wins: nothing that somebody wrote disappears silently."""
    mine, theirs = give("write")
    with open(theirs / "file", "r+b", 0) as his:
        his.write(b"still needed")
        (mine / "file").unlink()
        sync_dir(mine)
        os.fsync(his.fileno())
    for directory in (mine, theirs):
        assert b"still needed" in {(directory / name).read_bytes() for name in os.listdir(directory)}


def test_both_append_to_one_file_and_no_line_is_lost(give):
    mine, theirs = give("write")
    for i in range(5):
        put(mine / "file", f"alice {i}\n".encode(), "ab")
        put(theirs / "file", f"bob {i}\n".encode(), "ab")
    text = (mine / "file").read_bytes()
    assert text == b"first" + b"".join(f"alice {i}\nbob {i}\n".encode() for i in range(5))
    assert (theirs / "file").read_bytes() == text


# == taking back =====================================================================================


def test_revocation_reaches_opens_lists_and_stats(alice, bob, give):
    mine, theirs = give()
    (mine / "directory").mkdir()
    put(mine / "directory/inner", b"i")
    assert (theirs / "directory/inner").read_bytes() == b"i"
    before = bob.counters()
    ended = alice.ask("share.revoke", share=mine.name, recipient="bob")
    assert [item["handle"] for item in ended["revoked"]] == ["bob"]
    for refused in (
        lambda: os.open(theirs / "file", os.O_RDONLY),
        lambda: os.listdir(theirs),
        lambda: os.listdir(theirs / "directory"),
        lambda: os.open(theirs / "directory/inner", os.O_RDONLY),
        lambda: os.open(theirs / "never seen", os.O_RDONLY),
        lambda: (theirs / "new").mkdir(),
    ):
        with fails(errno.EACCES):
            refused()
    for path in (theirs, theirs / "file", theirs / "directory"):
        assert reason_code(path) == "share_revoked"
    after = bob.counters()
    assert [after[key] - before[key] for key in ("unwraps", "fetches", "decrypts")] == [0, 0, 0]
    assert bob.share(theirs.name)["reason"] == "share_revoked"
    assert "share_revoked" in bob.errors_text()
    assert (mine / "file").read_bytes() == b"first"  # alice goes on
    # A second time there is nothing to take.
    with pytest.raises(CliFailure) as caught:
        alice.cli("share", "revoke", mine.name, "bob")
    assert "not_shared" in str(caught.value)


def test_an_open_descriptor_dies_within_the_published_bound(alice, give):
    mine, theirs = give()
    data = os.urandom(600_000)
    put(mine / "file", data)
    with open(theirs / "file", "rb", 0) as file:
        assert file.read() == data  # all of it is in the page cache now
        bound = alice.ask("share.revoke", share=mine.name, recipient="bob")["bound_seconds"]
        wait_until(
            lambda: errno_of(os.pread, file.fileno(), 4096, 0) == errno.EACCES, "the descriptor's end", bound
        )
        assert errno_of(os.pread, file.fileno(), 4096, 500_000) == errno.EACCES
    # Without an open or another call by bob in between: the watcher noticed.
    assert reason_code(theirs / "file") == "share_revoked"


MAPPED = """
import mmap, os, signal, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print(sum(view[i] for i in range(0, len(view), 4096)), flush=True)
end = time.monotonic() + float(sys.stdin.readline())
while time.monotonic() < end:
    view[0]
print("still readable", flush=True)
"""


def test_a_memory_map_dies_too(alice, give):
    mine, theirs = give()
    data = os.urandom(300_000)
    put(mine / "file", data)
    reader = subprocess.Popen(
        [sys.executable, "-c", MAPPED, theirs / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(reader.stdout.readline()) == sum(data[i] for i in range(0, len(data), mmap.PAGESIZE))
    bound = alice.ask("share.revoke", share=mine.name, recipient="bob")["bound_seconds"]
    out, _ = reader.communicate(f"{bound}\n", timeout=homes.PATIENCE)
    assert out == ""
    assert reader.returncode == -signal.SIGBUS


def test_granting_again_opens_it_again(alice, bob, give):
    mine, theirs = give()
    alice.ask("share.revoke", share=mine.name, recipient="bob")
    with fails(errno.EACCES):
        (theirs / "file").read_bytes()
    put(mine / "file", b"written meanwhile")
    alice.ask("share.add", target=mine.name, recipient="bob", rights=["read"])
    assert (theirs / "file").read_bytes() == b"written meanwhile"
    assert reason(theirs / "file") == "ok"
    assert bob.explain(theirs / "file")["code"] == ""


def test_what_is_written_after_a_revocation_has_keys_the_revoked_never_had(alice, give):
    """The epoch changes, and no capsule of the new epoch is addressed to bob."""
    mine, _ = give()
    share = bytes.fromhex(os.getxattr(mine, "user.meshkit.share").decode())
    before = evil.capsules(alice.metadata, share)
    alice.ask("share.revoke", share=mine.name, recipient="bob")
    new = [blob for blob in evil.capsules(alice.metadata, share) if blob not in before]
    peeked = [evil.peek1(blob, "mk/cap@1")["h"] for blob in new]
    me = alice.ask("identity.show")["enc_kid"]
    assert [(header["epoch"], header["to"].hex()) for header in peeked] == [(2, me)]
    assert evil.peek(evil.Head, evil.newest_head(alice.metadata, share)).epoch == 2


def test_rights_can_be_changed_while_it_is_mounted(alice, give):
    mine, theirs = give("read")
    with fails(errno.EACCES):
        put(theirs / "file", b"no")
    alice.ask("share.add", target=mine.name, recipient="bob", rights=["write"])
    put(theirs / "file", b"yes")
    assert (mine / "file").read_bytes() == b"yes"
    alice.ask("share.add", target=mine.name, recipient="bob", rights=["read"])
    with fails(errno.EACCES):
        put(theirs / "file", b"no more")
    assert (theirs / "file").read_bytes() == b"yes"
    assert (mine / "file").read_bytes() == b"yes"


def test_a_grant_ends_by_itself(alice, bob, give):
    mine, theirs = give(expires="5s")
    with open(theirs / "file", "rb", 0) as file:
        assert file.read() == b"first"
        wait_until(
            lambda: errno_of(os.open, theirs / "file", os.O_RDONLY) == errno.EACCES,
            "the end of the grant",
            20,
        )
        wait_until(lambda: errno_of(os.pread, file.fileno(), 5, 0) == errno.EACCES, "the descriptor's end", 1)
    assert reason_code(theirs / "file") == "share_expired"
    explained = bob.explain(theirs / "file")
    assert explained["code"] == "share_expired"
    # The roster, if alice's daemon has noticed already and shut him out; else his own device's clock.
    assert [item["step"] for item in explained["steps"] if item["result"] == "refused"] in (
        ["validity"],
        ["roster"],
    )
    alice.ask("share.revoke", share=add_third(alice, mine), recipient="carol")
    with fails(errno.EACCES):
        (theirs / "file").read_bytes()
    assert reason_code(theirs / "file") == "share_expired"


def add_third(alice, mine):
    """Give carol access, so that the roster changes; returns the share's name."""
    root = alice.root.with_name("carol")
    with Person(root, "carol") as carol:
        if not root.exists():
            carol.init(beside=alice)
    alice.ask("share.add", target=mine.name, recipient="carol", rights=["read"])
    return mine.name


def test_a_writer_whose_time_is_over_leaves_the_share_in_order(alice, bob, give):
    """The newest version is his, and he is no writer any more: alice's daemon signs another one on top."""
    # Long enough for him to write on a busy machine, short enough to wait for.
    mine, theirs = give("write", expires="8s")
    put(theirs / "file", b"bob's last words")
    wait_until(lambda: reason_code(theirs) == "share_expired", "the end of bob's grant", 40)
    wait_until(lambda: alice.share(mine.name)["epoch"] == 2, "bob to be shut out", 40)
    assert (mine / "file").read_bytes() == b"bob's last words"
    assert reason(mine / "file") == "ok"
    put(mine / "file", b"alice goes on")
    alice.ask("share.add", target=mine.name, recipient="bob", rights=["read"])
    assert (theirs / "file").read_bytes() == b"alice goes on"
    assert [item["handle"] for item in alice.ask("share.show", share=mine.name)["recipients"]] == ["bob"]


def test_a_writer_cannot_keep_a_revocation_from_happening(alice, give):
    """Every version bob publishes in between makes alice begin again; she gets through all the same."""
    mine, theirs = give("write")
    busy = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys\n"
            "for i in range(1000000):\n"
            "    with open(f'{sys.argv[1]}/busy', 'wb') as f:\n"
            "        f.write(b'%d' % i); f.flush(); os.fsync(f.fileno())\n"
            "    if i == 3: print(flush=True)\n",
            theirs,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert busy.stdout.readline() == b"\n"
    alice.ask("share.revoke", share=mine.name, recipient="bob")
    _, said = busy.communicate(timeout=homes.PATIENCE)
    assert b"PermissionError" in said
    assert (mine / "file").read_bytes() == b"first"
    assert (mine / "busy").read_bytes().isdigit()


# == snapshots =======================================================================================


def test_a_snapshot_of_a_file_is_exactly_one_version_of_one_file(alice, bob, give):
    mine, _ = give(name="papers")
    alice.ask("share.revoke", share="papers", recipient="bob")
    data = os.urandom(150_000)
    (mine / "deep").mkdir()
    put(mine / "deep/report.pdf", data)
    put(mine / "deep/private", b"private")
    seen = add(alice, bob, "papers/deep/report.pdf", snapshot=True)
    assert seen.name == "report (alice).pdf"
    assert seen.read_bytes() == data
    put(mine / "deep/report.pdf", b"edited")
    assert seen.read_bytes() == data
    with fails(errno.EACCES):
        seen.write_bytes(b"no")
    with fails(errno.EACCES):
        os.truncate(seen, 0)
    for near in ("private", "../deep", ".."):
        assert not (seen.parent / near / "private").exists()
    assert bob.share(seen.name)["kind"] == "file"
    assert bob.share(seen.name)["rights"] == ["list", "read"]
    # A remount must not show another version either, and the whole share stays closed.
    bob.remount()
    assert seen.read_bytes() == data
    with fails(errno.EACCES):
        os.listdir(bob.mnt / "papers (alice)")


def test_a_snapshot_of_a_directory_with_all_that_is_in_it(alice, bob, give):
    mine, _ = give(name="album")
    (mine / "trip/day one").mkdir(parents=True)
    photos = {f"day one/{i:03}.jpg": os.urandom(2000 + i) for i in range(100)}
    photos["cover.jpg"] = os.urandom(90_000)
    for name, data in photos.items():
        (mine / "trip" / name).write_bytes(data)
    put(mine / "outside", b"not part of it")
    sync_dir(mine)
    seen = add(alice, bob, "album/trip", snapshot=True)
    assert seen.is_dir()

    def content():
        return {str(path.relative_to(seen)): path.read_bytes() for path in seen.rglob("*") if path.is_file()}

    assert content() == photos
    (mine / "trip/cover.jpg").write_bytes(b"another")
    put(mine / "trip/day one/new.jpg", b"new")
    (mine / "trip/day one/001.jpg").unlink()
    sync_dir(mine / "trip")
    assert content() == photos
    with fails(errno.EACCES):
        (seen / "mine").write_bytes(b"no")


def test_a_snapshot_can_be_revoked(alice, bob, give):
    give(name="once")
    alice.ask("share.revoke", share="once", recipient="bob")
    seen = add(alice, bob, "once/file", snapshot=True)
    assert seen.read_bytes() == b"first"
    alice.ask("share.revoke", share="once", recipient="bob")
    with fails(errno.EACCES):
        seen.read_bytes()
    assert reason_code(seen) == "share_revoked"


@pytest.mark.parametrize(
    ("target", "options", "code"),
    [
        ("nothing", [], "share_not_found"),
        ("plain", ["--snapshot"], "invalid_argument"),
        ("plain/missing", ["--snapshot"], "path_not_found"),
        ("plain/file", [], "not_supported"),
        ("plain/file", ["--snapshot", "--rights", "write"], "invalid_argument"),
        ("plain", ["--expires", "yesterday"], "invalid_argument"),
        ("plain", ["--expires", "2020-01-01"], "invalid_argument"),
    ],
)
def test_bad_grants_are_refused(alice, target, options, code):
    if not (alice.mnt / "plain").exists():
        (alice.mnt / "plain").mkdir()
        put(alice.mnt / "plain/file", b"x")
    before = alice.cli("share", "show", "plain")["recipients"]
    result = alice.cli("share", "add", target, "bob", *options, check=False)
    assert result.error["code"] == code
    assert alice.cli("share", "show", "plain")["recipients"] == before


def test_a_recipient_never_seen(alice, give):
    give()
    result = alice.cli("share", "add", "plain", "nobody", check=False)
    assert result.error["code"] == "contact_unknown"


def test_only_the_owner_grants_and_revokes(bob, give):
    _, theirs = give("write")
    for command in (["share", "add", theirs.name, "alice"], ["share", "revoke", theirs.name, "alice"]):
        assert bob.cli(*command, check=False).error["code"] == "not_owner"


# == people ==========================================================================================


def test_verifying_a_contact(alice, bob, give):
    give()
    code = alice.cli("contacts", "verify", "bob")["code"]
    assert bob.cli("contacts", "verify", "alice")["code"] == code
    digits = "".join(c for c in code if c.isdigit())
    assert len(digits) == 60
    wrong = digits[:-1] + str((int(digits[-1]) + 1) % 10)
    assert alice.cli("contacts", "verify", "bob", wrong, check=False).error["code"] == "verification_failed"
    (listed,) = [item for item in alice.cli("contacts", "list")["contacts"] if item["handle"] == "bob"]
    assert listed["trust"] == "pinned"
    assert alice.cli("contacts", "verify", "bob", *code.split())["trust"] == "verified"
    assert alice.cli("share", "add", "plain", "bob")["trust"] == "verified"


def test_an_accepted_invitation_has_a_name_of_ones_own(alice, bob):
    (alice.mnt / "named").mkdir()
    alice.cli("share", "add", "named", "bob")
    waiting = [item for item in bob.cli("inbox")["letters"] if item["name"] == "named"]
    for name, code in ((".hidden", "invalid_name"), ("a/b", "invalid_name")):
        assert bob.cli("accept", waiting[0]["id"], "--name", name, check=False).error["code"] == code
    assert bob.cli("accept", "zzzz", check=False).error["code"] == "letter_not_found"
    assert bob.cli("accept", waiting[0]["id"], "--name", "from alice")["name"] == "from alice"
    assert (bob.mnt / "from alice").is_dir()


# == another UNIX user ===============================================================================


@pytest.fixture
def stranger():
    """A UNIX user made for the test (root only), and a directory that both of us may use."""
    if os.geteuid() != 0 or not shutil.which("useradd") or not shutil.which("setpriv"):
        pytest.skip("NO SECOND UNIX USER HERE: that needs root, useradd and setpriv")
    name = "meshkittest"
    subprocess.run(["useradd", "--create-home", "--user-group", name], check=True, capture_output=True)
    base = Path(tempfile.mkdtemp(prefix="meshkit-two-users-", dir="/tmp"))
    try:
        user = pwd.getpwnam(name)
        base.chmod(0o755)
        shared = base / "shared"
        shared.mkdir()
        os.chown(shared, 0, user.pw_gid)
        shared.chmod(0o2770)
        prefix = [
            "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--no-new-privs",
            "env", f"HOME={user.pw_dir}", f"USER={name}", "PYTHONDONTWRITEBYTECODE=1",
        ]  # fmt: skip
        yield *usable_python(prefix), Path(user.pw_dir), shared
    finally:
        # Forced, or a process of his that has not quite ended keeps him, and the next run finds him there.
        subprocess.run(["userdel", "--force", "--remove", name], check=True, capture_output=True)
        shutil.rmtree(base)


def test_two_unix_users(stranger, tmp_path):
    prefix, python, his_home, shared = stranger
    with Person(tmp_path / "alice", "alice") as alice:
        stores = ["--provider", f"local:{shared}/blocks", "--metadata", f"{shared}/metadata.db"]
        old = os.umask(0o007)
        try:
            alice.init(None, *stores)
            alice.cli("share", "create", "first")
            alice.mount()
        finally:
            os.umask(old)
        put(alice.mnt / "first/file", b"across users")
        bob = Person(his_home / "meshkitfs", "bob", mnt=his_home / "MeshKit", python=python)

        def as_bob(*args, check=True):
            return bob.cli(*args, prefix=prefix, check=check)

        as_bob("init", "--identity", "bob", "--key-vault", "plain-file", *stores)
        assert (his_home / "meshkitfs").stat().st_uid != 0
        alice.cli("share", "add", "first", "bob", "--rights", "write")
        (letter,) = as_bob("inbox")["letters"]
        name = as_bob("accept", letter["id"])["name"]
        shown = as_bob("share", "show", name)
        assert (shown["reason"], shown["entries"], shown["rights"]) == (None, 1, ["list", "read", "write"])
        assert as_bob("explain", f"{name}/file")["code"] == ""
        alice.cli("share", "revoke", "first", "bob")
        assert as_bob("explain", f"{name}/file")["code"] == "share_revoked"
        # Alice's own files are out of his reach: only the two stores are common.
        for private in ("identity.sealed", "keyvault.plain-file", "state.db"):
            path = alice.root / private
            assert subprocess.run([*prefix, "cat", path], capture_output=True).returncode != 0
        # What bob's processes made in the common directory, alice's can still use.
        put(alice.mnt / "first/file", b"still works")
        assert (alice.mnt / "first/file").read_bytes() == b"still works"
        if not os.access("/dev/fuse", os.R_OK) or os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
            pytest.skip("BOB'S OWN MOUNT NOT TESTED: /dev/fuse is closed for ordinary users here")
        his_home.joinpath("MeshKit").mkdir()
        os.chown(bob.mnt, his_home.stat().st_uid, his_home.stat().st_gid)
        # fusermount3 has to get root's rights for a moment.
        with_helper = [item for item in prefix if item != "--no-new-privs"]
        bob.cli("mount", str(bob.mnt), prefix=with_helper)
        try:
            alice.cli("share", "add", "first", "bob", "--rights", "read")
            read = subprocess.run([*prefix, "cat", bob.mnt / name / "file"], capture_output=True, check=True)
            assert read.stdout == b"still works"
        finally:
            bob.cli("umount", prefix=with_helper)


def test_a_share_that_others_have_cannot_be_forgotten(alice, bob, give):
    mine, _ = give()
    (mine / "file").unlink()
    with fails(errno.EBUSY):
        mine.rmdir()
    alice.cli("share", "revoke", mine.name, "bob")
    mine.rmdir()
    assert not mine.exists()
