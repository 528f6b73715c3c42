"""Past versions in a real mount: ordinary programs read them, and nothing else stumbles over them."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess

import pytest
from homes import Person, errno_of, fails, invite, needs_fuse, reason_code, sync_dir, wait_until

pytestmark = needs_fuse


def run(*command, cwd=None, check=True):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GIT_"))}
    env |= {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run([*map(os.fspath, command)], cwd=cwd, timeout=120, capture_output=True, env=env)
    if check:
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout.decode(errors="surrogateescape")


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    with Person(tmp_path_factory.mktemp("history") / "alice", "alice") as person:
        person.init()
        person.mount()
        yield person


@pytest.fixture
def first(alice, request):
    """A share of the test's own."""
    path = alice.mnt / request.node.name.removeprefix("test_")[:40]
    path.mkdir()
    return path


def published(alice, share):
    """Publish what was changed, and return the version that has it."""
    sync_dir(share)
    return alice.share(share.name)["version"]


def snapshot(share, number):
    """The directory of one version."""
    label = os.readlink(share / ".snapshots" / f"v{number}")
    return share / ".snapshots" / label


def fill(place):
    (place / "sub").mkdir(parents=True)
    (place / "sub/file").write_bytes(b"content\n" * 50_000)
    (place / "other").write_bytes(b"old\n")
    os.symlink("sub/file", place / "link")
    os.link(place / "other", place / "twin")
    os.chmod(place / "other", 0o640)
    os.setxattr(place / "other", "user.colour", b"blue")
    os.utime(place / "other", ns=(10**18, 10**18))


def test_programs_copy_a_version_out(alice, first, tmp_path):
    fill(tmp_path / "expected")
    fill(first / "tree")
    number = published(alice, first)
    shutil.rmtree(first / "tree")
    (first / "new").write_bytes(b"new")
    last = published(alice, first)
    assert sorted(os.listdir(first)) == ["new"]
    listed = sorted(os.listdir(first / ".snapshots"), key=lambda name: int(name.rpartition("-v")[2]))
    assert [int(name.rpartition("-v")[2]) for name in listed] == list(range(1, last + 1))
    run("ls", "-l", first / ".snapshots")
    old = snapshot(first, number)
    assert sorted(os.listdir(old)) == ["tree"]
    run("diff", "-r", "--no-dereference", tmp_path / "expected", old / "tree")
    run("diff", "-r", tmp_path / "expected", first / ".snapshots" / f"v{number}" / "tree")
    run("cp", "-a", old / "tree", tmp_path / "out")
    run("diff", "-r", "--no-dereference", tmp_path / "expected", tmp_path / "out")
    there = os.stat(tmp_path / "out/other")
    assert (there.st_mode & 0o777, there.st_mtime_ns, there.st_nlink) == (0o640, 10**18, 2)
    assert os.getxattr(tmp_path / "out/other", "user.colour") == b"blue"
    assert run("find", old / "tree", "-type", "f", "-links", "2").count("\n") == 2
    # Within a session of the kernel and after it, by the same number.
    ino = os.stat(old / "tree/sub/file").st_ino
    alice.remount()
    assert os.stat(snapshot(first, number) / "tree/sub/file").st_ino == ino


def test_programs_that_walk_do_not_meet_it(first, alice, tmp_path):
    (first / "a").write_bytes(b"1")
    published(alice, first)
    (first / "a").write_bytes(b"2")
    published(alice, first)
    assert os.path.isdir(first / ".snapshots")
    assert run("find", first, "-mindepth", "1").split() == [str(first / "a")]
    assert run("ls", "-A", first).split() == ["a"]
    run("cp", "-r", first, tmp_path / "copy")
    assert os.listdir(tmp_path / "copy") == ["a"]
    if shutil.which("git"):
        run("git", "init", "-q", first)
        assert run("git", "status", "--porcelain", cwd=first) == "?? a\n"
        run("git", "add", "-A", cwd=first)
        assert run("git", "status", "--porcelain", cwd=first) == "A  a\n"
    if shutil.which("rsync"):
        run("rsync", "-a", f"{first}/", tmp_path / "synced")
        assert ".snapshots" not in os.listdir(tmp_path / "synced")
    run("rm", "-rf", first)
    assert not first.exists()


def test_nothing_can_be_changed(first, alice):
    (first / "a").write_bytes(b"1")
    (first / "d").mkdir()
    old = snapshot(first, published(alice, first))
    for call, *args in (
        (os.open, old / "a", os.O_WRONLY),
        (os.open, old / "a", os.O_RDWR | os.O_TRUNC),
        (os.open, old / "new", os.O_WRONLY | os.O_CREAT),
        (os.mkdir, old / "new"),
        (os.unlink, old / "a"),
        (os.rmdir, old / "d"),
        (os.rename, old / "a", old / "b"),
        (os.rename, old / "a", first / "b"),
        (os.rename, first / "a", old / "b"),
        (os.symlink, "x", old / "b"),
        (os.link, first / "a", old / "b"),
        (os.truncate, old / "a", 0),
        (os.chmod, old / "a", 0o777),
        (os.utime, old / "a"),
        (os.setxattr, old / "a", "user.x", b"1"),
        (os.mkdir, first / ".snapshots" / "mine"),
        (os.chmod, first / ".snapshots", 0o777),
        (os.rmdir, old),
    ):
        assert errno_of(call, *args) == errno.EROFS, (call, args)
    assert errno_of(os.mkdir, first / ".snapshots") == errno.EEXIST
    assert errno_of(os.rmdir, first / ".snapshots") == errno.EACCES
    assert (old / "a").read_bytes() == b"1"
    for name in ("v99", "yesterday", "1999-01-01"):
        assert errno_of(os.stat, first / ".snapshots" / name) == errno.ENOENT


def test_a_file_comes_back_while_an_editor_has_it_open(first, alice):
    path = first / "text"
    path.write_bytes(b"the first draft\n" * 30_000)
    number = published(alice, first)
    path.write_bytes(b"oh no")
    sync_dir(first)
    editor = os.open(path, os.O_RDWR)
    try:
        assert os.pread(editor, 100, 0) == b"oh no"
        ino = os.fstat(editor).st_ino
        answer = alice.cli("restore", str(path), "--at", f"v{number}")
        assert (answer["files"], answer["replaced"]) == (1, number + 1)
        assert os.pread(editor, 16, 0) == b"the first draft\n"
        assert os.fstat(editor).st_size == 480_000
        assert path.stat().st_ino == ino
        assert path.read_bytes() == b"the first draft\n" * 30_000
        os.pwrite(editor, b"THE", 0)
        os.fsync(editor)
    finally:
        os.close(editor)
    alice.remount()
    assert path.read_bytes().startswith(b"THE first draft\nthe first")
    told = alice.cli("history", str(path))["versions"]
    assert [row["what"] for row in told[:3]] == ["changed"] * 3
    assert {row["writer"] for row in told} == {"alice"}


def test_what_was_deleted_comes_back_by_command(first, alice):
    fill(first / "tree")
    number = published(alice, first)
    shutil.rmtree(first / "tree")
    sync_dir(first)
    assert errno_of(os.stat, first / "tree") == errno.ENOENT  # the kernel may remember that
    shown = alice.run("history", f"{first}/tree/other").out
    assert "removed" in shown
    assert f"v{number}" in shown
    said = alice.run("restore", f"{first}/tree", "--at", f"v{number}").out
    assert "3 files, 2 directories, 1 symbolic link" in said
    assert "stays in the history" in said
    assert (first / "tree/sub/file").read_bytes() == b"content\n" * 50_000
    assert (first / "tree/other").stat().st_ino == (first / "tree/twin").stat().st_ino
    assert (first / "tree/other").stat().st_mtime_ns == 10**18
    again = alice.run("restore", f"{first.name}/tree", "--at", "0s", "--to", f"{first.name}/second/tree").out
    assert "second/tree" in again
    run("diff", "-r", "--no-dereference", first / "tree", first / "second/tree")
    for words, code in (
        (("--at", "v999"), "version_not_found"),
        (("--at", "someday"), "invalid_argument"),
        (("--at", f"v{number}", "--to", str(first / "tree")), "path_exists"),
    ):
        failed = alice.cli("restore", str(first / "tree"), *words, check=False)
        assert failed.error["code"] == code
    assert alice.cli("history", str(first / "never"), check=False).error["code"] == "path_not_found"
    # Without a daemon it is the same.
    alice.umount()
    assert alice.cli("restore", f"{first.name}/tree", "--at", f"v{number}", "--to", f"{first.name}/third")[
        "files"
    ]
    alice.mount()
    run("diff", "-r", "--no-dereference", first / "tree", first / "third")


def test_a_revocation_reaches_open_files_of_the_past(tmp_path, first, alice):
    (first / "secret").write_bytes(b"past secret\n" * 40_000)
    number = published(alice, first)
    (first / "secret").write_bytes(b"now")
    sync_dir(first)
    with Person(tmp_path / "bob", "bob") as bob:
        bob.init(beside=alice)
        bob.mount()
        theirs = bob.mnt / invite(alice, first.name, bob)["name"]
        old = snapshot(theirs, number)
        with open(old / "secret", "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert pages[:4] == b"past"
            assert os.pread(file.fileno(), 4, 0) == b"past"
            alice.cli("share", "revoke", first.name, "bob")
            wait_until(
                lambda: errno_of(os.pread, file.fileno(), 4, 0) == errno.EACCES, "the end of the grant"
            )
            with fails(errno.EACCES):
                os.pread(file.fileno(), 4, 200_000)
            assert reason_code(old / "secret") == "share_revoked"
            with fails(errno.EACCES):
                os.listdir(theirs / ".snapshots")
            pages.close()


def test_a_byte_store_restored_from_a_backup(tmp_path):
    """The metadata store knows versions that the byte store does not have any more: every command, under a mount."""
    with Person(tmp_path / "carol", "carol") as carol:
        carol.init()
        carol.mount()
        share = carol.mnt / "first"
        share.mkdir()
        fill(share / "tree")
        whole = published(carol, share)
        carol.umount()
        shutil.copytree(carol.blocks, tmp_path / "backup")
        carol.mount()
        (share / "tree/other").write_bytes(b"since then\n")
        (share / "new").mkdir()
        (share / "new/file").write_bytes(os.urandom(300_000))
        lost = published(carol, share)
        carol.umount()
        shutil.rmtree(carol.blocks)
        shutil.copytree(tmp_path / "backup", carol.blocks)
        carol.mount()
        assert errno_of(os.listdir, share) == errno.EIO
        assert reason_code(share) == "block_unavailable"
        told = carol.run("verify", "first", check=False)
        assert told.code == 6
        assert "block_unavailable" in told.out
        assert f"versions {lost}" in told.out
        told = carol.run("repair", "first", "--from", f"local:{tmp_path / 'backup'}", check=False)
        assert (told.code, "0 blocks repaired" in told.out) == (6, True)
        assert (snapshot(share, whole) / "tree/other").read_bytes() == b"old\n"
        told = carol.run("history", "first").out
        assert "cannot be read: block_unavailable" in told
        failed = carol.run("restore", "first", "--at", f"v{whole}", check=False)
        assert (failed.code, "--exact" in failed.err) == (7, True)
        done = carol.run("restore", "first", "--at", f"v{whole}", "--exact").out
        assert f"exactly what it was in version {whole}" in done
        run("diff", "-r", "--no-dereference", share, snapshot(share, whole))
        (share / "tree/other").write_bytes(b"and on it goes\n")
        newest = published(carol, share)
        assert carol.cli("verify", "first", "--versions", "live")["shares"][0]["broken"] == []
        carol.remount()
        assert (share / "tree/other").read_bytes() == b"and on it goes\n"
        assert carol.share("first")["version"] == newest
