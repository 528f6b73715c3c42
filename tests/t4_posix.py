"""What POSIX promises of files and directories, on a real mount of the real daemon.

One mount serves the whole module. What must survive a restart registers its check with ``survives``; the last
tests mount again and run all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import subprocess
import sys

import pytest
from homes import NOTHING, Person, fails, needs_fuse, sync_dir, wait_until

pytestmark = needs_fuse

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    with Person(tmp_path_factory.mktemp("posix") / "alice", "alice") as person:
        person.init()
        person.cli("share", "create", "first")
        person.cli("share", "create", "second")
        person.mount()
        person.checks = {}
        yield person


@pytest.fixture
def d(alice, request):
    """A directory of the test's own in the share ``first``."""
    path = alice.mnt / "first" / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def survives(alice, request):
    """Call it with a check: it is run now, and again after the module's remount."""

    def register(check):
        check()
        alice.checks[request.node.name] = check

    return register


def renameat2(old, new, flags):
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(new))


def put(path, data=b""):
    with open(path, "wb") as file:
        file.write(data)
    return path


def get(path):
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR, mode=0o644):
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def pattern(seed, size):
    return random.Random(seed).randbytes(size)


def program(body, *args):
    """Start a Python program of its own."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", body, *map(os.fsdecode, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- content ---------------------------------------------------------------------------------------


def test_a_file_behaves_as_on_a_local_disk(d, tmp_path, survives):
    """The same random calls on the mount and on a local file, around every edge of how content is kept."""
    seed = 20261123
    rng = random.Random(seed)
    edges = [0, 1, 100, 4096, 16 * KIB, 64 * KIB, 256 * KIB, 320 * KIB, MIB]
    files = {}
    for number in range(4):
        ours, theirs = d / f"file{number}", tmp_path / f"file{number}"
        files[ours] = theirs
        fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in (ours, theirs)]
        history = []
        for _ in range(90):
            at = max(0, rng.choice(edges) + rng.choice([-1, 0, 0, 1, 5]))
            length = rng.choice([1, 10, 4096, 64 * KIB, 256 * KIB + 3])
            action = rng.choice(
                ["write", "write", "write", "append", "cut", "read", "sync", "reopen", "replace"]
            )
            history.append((action, at, length))
            match action:
                case "write":
                    data = rng.randbytes(length)
                    assert [os.pwrite(fd, data, at) for fd in fds] == [length] * 2
                case "append":
                    data = rng.randbytes(length)
                    for fd in fds:
                        os.lseek(fd, 0, os.SEEK_END)
                        os.write(fd, data)
                case "cut":
                    for fd in fds:
                        os.ftruncate(fd, at)
                case "read":
                    got, wanted = (os.pread(fd, length, at) for fd in fds)
                    assert got == wanted, (seed, number, history)
                case "sync":
                    os.fdatasync(fds[0])
                case "reopen":
                    for fd in fds:
                        os.close(fd)
                    fds = [os.open(path, os.O_RDWR) for path in (ours, theirs)]
                case "replace":
                    for fd in fds:
                        os.close(fd)
                    fds = [os.open(path, os.O_RDWR | os.O_TRUNC) for path in (ours, theirs)]
            assert os.fstat(fds[0]).st_size == os.fstat(fds[1]).st_size, (seed, number, history)
        for fd in fds:
            os.close(fd)
        assert get(ours) == get(theirs), (seed, number, history)
    expected = {ours: get(theirs) for ours, theirs in files.items()}
    survives(lambda: [pytest.fail(str(path)) for path, data in expected.items() if get(path) != data])


@pytest.mark.parametrize("size", [10_000, 200_000, 700_000])
def test_shrinking_and_growing_again_reads_zeros(d, survives, size):
    data = pattern(size, size)
    path = put(d / "file", data)
    with opened(path) as fd:
        os.ftruncate(fd, size // 3)
        os.ftruncate(fd, size * 2)
    expected = data[: size // 3] + bytes(size * 2 - size // 3)
    survives(lambda: get(path) == expected or pytest.fail("what was cut off came back"))
    with opened(path) as fd:
        os.fsync(fd)
    # Again with everything stored, by path and with nobody having it open.
    os.truncate(path, 100)
    os.truncate(path, size)
    assert get(path) == data[:100] + bytes(size - 100)
    os.truncate(path, 0)
    assert get(path) == b""
    with opened(path) as fd:
        os.pwrite(fd, b"end", size)
    assert get(path) == bytes(size) + b"end"
    put(path, expected)


def test_appending_from_two_descriptors(d):
    path = put(d / "log", b"0")
    with opened(path, os.O_WRONLY | os.O_APPEND) as a, opened(path, os.O_WRONLY | os.O_APPEND) as b:
        for i in range(50):
            os.write(a, b"a%d" % i)
            os.write(b, b"b%d" % i)
        assert get(path)[:6] == b"0a0b0a"
        os.ftruncate(a, 3)
        os.write(b, b"!")
    assert get(path) == b"0a0!"


def test_o_trunc_empties_and_o_excl_refuses(d):
    path = put(d / "file", b"x" * 300_000)
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new")
    assert get(path) == b"new"
    with fails(errno.EEXIST):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with opened(path, os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"N")
    assert get(path) == b"New"


def test_a_shared_mapping_of_a_file_opened_for_appending(d):
    """Pages changed through a mapping come back on any writable descriptor, also one that appends."""
    path = put(d / "file", b"-" * 8192)
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        with mmap.mmap(fd, 8192) as view:
            view[0:5] = b"FIRST"
            view[5000:5006] = b"SECOND"
            view.flush()
        os.write(fd, b"tail")
    data = get(path)
    assert len(data) == 8196
    assert data[:5] == b"FIRST"
    assert data[5000:5006] == b"SECOND"
    assert data[8192:] == b"tail"


def test_large_holes(d, survives):
    """1 GiB of nothing costs nothing, and is zeros everywhere, with and without data in the middle."""
    path = d / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, GIB)
        assert os.fstat(fd).st_blocks * 512 < MIB
        # Not committed yet: no index block exists that could say what is where.
        for at in (0, 200 * MIB, 300 * MIB, 600 * MIB, GIB - 100):
            assert os.pread(fd, 100, at) == bytes(100)
        os.pwrite(fd, b"island", 600 * MIB + 7)
        os.pwrite(fd, b"shore", GIB - 5)
        assert os.fstat(fd).st_blocks * 512 < MIB
        os.fsync(fd)
        assert 0 < os.fstat(fd).st_blocks * 512 < MIB

    def check():
        with opened(path, os.O_RDONLY) as fd:
            status = os.fstat(fd)
            assert (status.st_size, status.st_blocks > 0, status.st_blocks * 512 < MIB) == (GIB, True, True)
            assert os.pread(fd, 20, 600 * MIB) == bytes(7) + b"island" + bytes(7)
            assert os.pread(fd, 10, GIB - 5) == b"shore"
            assert os.pread(fd, 64 * KIB, 300 * MIB) == bytes(64 * KIB)

    survives(check)


def test_a_sparse_file_can_be_cut_and_filled(d, survives):
    path = d / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 400 * MIB)
        os.fsync(fd)
        os.ftruncate(fd, 10 * MIB)
        os.ftruncate(fd, 500 * MIB)
        assert os.pread(fd, 3, 400 * MIB) == bytes(3)
        os.pwrite(fd, b"new", 450 * MIB)
        os.ftruncate(fd, 450 * MIB + 2)
        blocks = os.fstat(fd).st_blocks
        assert 0 < blocks * 512 <= 256 * KIB

    def check():
        assert os.stat(path).st_size == 450 * MIB + 2
        assert os.stat(path).st_blocks == blocks
        with opened(path, os.O_RDONLY) as fd:
            assert os.pread(fd, 10, 450 * MIB - 2) == b"\0\0ne"
            assert os.pread(fd, 3, 400 * MIB) == bytes(3)

    survives(check)


def test_the_largest_file(d, survives):
    path = put(d / "file", b"start")
    os.truncate(path, 9 << 40)
    assert os.stat(path).st_size == 9 << 40
    with fails(errno.EFBIG):
        os.truncate(path, 1 << 45)
    with opened(path) as fd, fails(errno.EFBIG):
        os.pwrite(fd, b"x", 1 << 45)
    survives(lambda: None)
    with opened(path) as fd:
        os.fsync(fd)
        assert os.pread(fd, 5, 0) == b"start"
        assert os.pread(fd, 5, 8 << 40) == bytes(5)


def test_seeking_data_and_holes(d):
    """pyfuse3 has no lseek handler: the kernel says that all is data and the only hole is at the end."""
    path = d / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 10 * MIB)
        assert os.lseek(fd, 4096, os.SEEK_DATA) == 4096
        assert os.lseek(fd, 4096, os.SEEK_HOLE) == 10 * MIB
        with fails(errno.ENXIO):
            os.lseek(fd, 10 * MIB, os.SEEK_DATA)


def test_preallocation_and_copies_in_the_kernel(d):
    source = put(d / "source", pattern(1, 300_000))
    with opened(d / "copy", os.O_RDWR | os.O_CREAT) as target, opened(source, os.O_RDONLY) as fd:
        done = 0
        while done < 300_000:
            done += os.copy_file_range(fd, target, 300_000 - done, done, done)
        assert os.pread(target, 400_000, 0) == get(source)
        os.posix_fallocate(target, 0, 400_000)
        assert os.fstat(target).st_size == 400_000
        with fails(errno.EOPNOTSUPP):
            if _libc.fallocate(target, 0, ctypes.c_long(0), ctypes.c_long(1 << 20)):
                raise OSError(ctypes.get_errno(), "fallocate")
    with fails(errno.EOPNOTSUPP):
        os.open(d, os.O_TMPFILE | os.O_RDWR)


# -- names -----------------------------------------------------------------------------------------


def test_rename_replaces(d, survives):
    put(d / "a", b"aaa")
    put(d / "b", b"bbb")
    ino = os.stat(d / "a").st_ino
    with opened(d / "b", os.O_RDWR) as fd:
        os.rename(d / "a", d / "b")
        # The file that lost its name is still there for those who have it open.
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"X", 0)
        assert os.pread(fd, 10, 0) == b"Xbb"
        assert get(d / "b") == b"aaa"
    assert os.stat(d / "b").st_ino == ino
    os.mkdir(d / "sub")
    os.rename(d / "b", d / "sub" / "c")
    os.rename(d / "sub" / "c", d / "sub" / "c")

    def check():
        assert sorted(os.listdir(d)) == ["sub"]
        assert get(d / "sub" / "c") == b"aaa"
        assert os.stat(d / "sub" / "c").st_ino == ino

    survives(check)


def test_rename_of_directories(d, survives):
    for name in ("full", "empty", "other"):
        os.mkdir(d / name)
    put(d / "full" / "x", b"x")
    put(d / "file")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(d / "other", d / "full")
    with fails(errno.ENOTDIR):
        os.rename(d / "other", d / "file")
    with fails(errno.EISDIR):
        os.rename(d / "file", d / "empty")
    with fails(errno.EINVAL):
        os.rename(d / "full", d / "full" / "below")
    os.mkdir(d / "full" / "deep")
    with fails(errno.EINVAL):
        os.rename(d / "full", d / "full" / "deep" / "below")
    with fails(errno.ENOENT):
        os.rename(d / "missing", d / "x")
    os.rename(d / "full", d / "empty")  # over an empty directory
    os.rename(d / "empty", d / "other" / "moved")
    assert (os.stat(d).st_nlink, os.stat(d / "other").st_nlink) == (3, 3)
    assert os.stat(d / "other" / "moved" / "..").st_ino == os.stat(d / "other").st_ino

    def check():
        assert sorted(os.listdir(d)) == ["file", "other"]
        assert get(d / "other" / "moved" / "x") == b"x"
        assert (os.stat(d).st_nlink, os.stat(d / "other").st_nlink) == (3, 3)

    survives(check)


def test_rename_with_flags(d, survives):
    put(d / "a", b"aaa")
    put(d / "b", b"bbb")
    os.mkdir(d / "dir")
    put(d / "dir" / "x", b"x")
    with fails(errno.EEXIST):
        renameat2(d / "a", d / "b", NOREPLACE)
    renameat2(d / "a", d / "c", NOREPLACE)
    renameat2(d / "b", d / "c", EXCHANGE)
    assert (get(d / "b"), get(d / "c")) == (b"aaa", b"bbb")
    renameat2(d / "b", d / "dir", EXCHANGE)
    assert (get(d / "dir"), get(d / "b" / "x")) == (b"aaa", b"x")
    os.mkdir(d / "other")
    renameat2(d / "b", d / "other", EXCHANGE)
    assert os.listdir(d / "b") == []
    with fails(errno.ENOENT):
        renameat2(d / "c", d / "missing", EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "other", d / "other" / "x", EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "c", d / "e", EXCHANGE | NOREPLACE)
    with fails(errno.EINVAL, errno.EPERM):
        renameat2(d / "c", d / "e", WHITEOUT)

    def check():
        assert sorted(os.listdir(d)) == ["b", "c", "dir", "other"]
        assert (get(d / "dir"), get(d / "c"), get(d / "other" / "x")) == (b"aaa", b"bbb", b"x")

    survives(check)


def test_between_shares_mv_copies(alice, d, survives):
    here, there = d, alice.mnt / "second"
    put(here / "file", pattern(7, 400_000))
    os.chmod(here / "file", 0o640)
    os.utime(here / "file", ns=(1_500_000_000_123_456_789,) * 2)
    os.setxattr(here / "file", "user.note", b"moved")
    for call in (os.rename, os.link):
        with fails(errno.EXDEV):
            call(here / "file", there / "file")
    with fails(errno.EXDEV):
        os.rename(here, alice.mnt / "elsewhere")
    os.mkdir(here / "tree")
    put(here / "tree" / "x", b"x")
    os.symlink("x", here / "tree" / "link")
    subprocess.run(["mv", here / "file", here / "tree", there], check=True)

    def check():
        assert os.listdir(here) == []
        assert get(there / "file") == pattern(7, 400_000)
        status = os.stat(there / "file")
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 1_500_000_000_123_456_789)
        assert os.getxattr(there / "file", "user.note") == b"moved"
        assert (get(there / "tree" / "x"), os.readlink(there / "tree" / "link")) == (b"x", "x")

    survives(check)


def test_unlink_while_open(d):
    path = put(d / "file", pattern(3, 500_000))
    with opened(path) as fd:
        os.unlink(path)
        assert os.listdir(d) == []
        with fails(errno.ENOENT):
            os.stat(path)
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 500_000, 0) == pattern(3, 500_000)
        os.pwrite(fd, b"still", 600_000)
        os.fsync(fd)
        os.ftruncate(fd, 300_000)
        os.fchmod(fd, 0o600)
        assert os.pread(fd, 400_000, 0) == pattern(3, 500_000)[:300_000]
        # Programs reopen what they hold this way.
        with opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
            os.pwrite(again, b"again", 0)
        assert os.pread(fd, 5, 0) == b"again"
        put(path, b"another file of that name")
        assert os.pread(fd, 5, 0) == b"again"
    assert get(path) == b"another file of that name"


def test_a_large_temporary_file_without_a_name(alice, d):
    """More than the write buffer holds, at random places, in a file that no commit will ever take."""
    path = d / "temporary"
    size, step = 160 * MIB, 64 * KIB
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.unlink(path)
        order = list(range(0, size, step))
        random.Random(5).shuffle(order)
        block = pattern(5, step - 8)
        for at in order:
            # Not to its end, so that the block stays open for more.
            os.pwrite(fd, at.to_bytes(8, "big") + block[:-100], at)
        for at in order[::50]:
            assert os.pread(fd, step - 100, at) == at.to_bytes(8, "big") + block[:-100]
    sync_dir(d)
    wait_until(lambda: alice.status()["pending"] == NOTHING, "the memory it took", 90)


def test_removing_directories(d):
    os.mkdir(d / "dir")
    put(d / "dir" / "x")
    put(d / "file")
    with fails(errno.ENOTEMPTY):
        os.rmdir(d / "dir")
    with fails(errno.ENOTDIR):
        os.rmdir(d / "file")
    with fails(errno.EISDIR):
        os.unlink(d / "dir")
    fd = os.open(d / "dir", os.O_RDONLY | os.O_DIRECTORY)
    os.unlink(d / "dir" / "x")
    os.rmdir(d / "dir")
    assert os.listdir(fd) == []
    assert os.fstat(fd).st_nlink == 0
    with fails(errno.ENOENT):
        os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(fd)
    assert os.listdir(d) == ["file"]


def test_symlinks(d, survives):
    targets = {
        "dangling": b"nowhere/at/all",
        "long": b"/" + b"x" * 4094,
        "strange": b"\xff\xfe \n-'\"",
        "file": b"real",
        "dir": b".",
    }
    put(d / "real", b"content")
    for name, target in targets.items():
        os.symlink(target, os.fsencode(d / name))
    with fails(errno.ENAMETOOLONG):
        os.symlink(b"x" * 4096, os.fsencode(d / "too long"))
    with fails(errno.EEXIST):
        os.symlink("real", d / "file")
    with fails(errno.ENOENT):
        os.stat(d / "dangling")
    with fails(errno.ELOOP):
        os.open(d / "file", os.O_RDONLY | os.O_NOFOLLOW)
    os.utime(d / "file", ns=(1, 1_000_000_000_000_000_001), follow_symlinks=False)

    def check():
        for name, target in targets.items():
            assert os.readlink(os.fsencode(d / name)) == target
            status = os.lstat(d / name)
            assert (stat.S_ISLNK(status.st_mode), status.st_size) == (True, len(target))
        assert get(d / "file") == get(d / "dir" / "real") == b"content"
        assert os.lstat(d / "file").st_mtime_ns == 1_000_000_000_000_000_001
        assert os.stat(d / "file").st_mtime_ns != 1_000_000_000_000_000_001

    survives(check)


def test_hard_links(d, survives):
    one = put(d / "one", pattern(1, 100_000))
    os.mkdir(d / "sub")
    two, three, four = d / "two", d / "sub" / "three", d / "sub" / "four"
    os.link(one, two)
    os.link(two, three)  # a link of a link, and in another directory
    inode = os.stat(one).st_ino
    assert [os.stat(path).st_nlink for path in (one, two, three)] == [3, 3, 3]
    assert {os.stat(path).st_ino for path in (one, two, three)} == {inode}
    with open(two, "r+b") as file:
        file.write(b"from two")
    with open(three, "ab") as file:
        file.write(b"from three")
    os.chmod(one, 0o600)
    os.setxattr(two, "user.x", b"both")
    expected = b"from two" + pattern(1, 100_000)[8:] + b"from three"
    assert get(one) == get(two) == get(three) == expected
    with fails(errno.EEXIST):
        os.link(one, two)
    with fails(errno.EPERM):
        os.link(d / "sub", d / "directory")
    os.rename(one, two)  # two names of one file: nothing happens
    assert os.stat(one).st_nlink == 3
    os.unlink(one)
    os.rename(three, four)
    os.symlink("nowhere", d / "symlink")
    os.link(d / "symlink", d / "symlink2", follow_symlinks=False)
    put(d / "victim")
    os.link(d / "victim", d / "victim2")
    os.rename(put(d / "new", b"new"), d / "victim")  # replaces one of two names

    def check():
        assert sorted(os.listdir(d)) == ["sub", "symlink", "symlink2", "two", "victim", "victim2"]
        assert os.listdir(d / "sub") == ["four"]
        for path in (two, four):
            status = os.stat(path)
            assert (status.st_nlink, status.st_ino, stat.S_IMODE(status.st_mode)) == (2, inode, 0o600)
            assert os.getxattr(path, "user.x") == b"both"
            assert get(path) == expected
        assert os.lstat(d / "symlink").st_nlink == 2
        assert os.readlink(d / "symlink2") == "nowhere"
        assert (get(d / "victim"), get(d / "victim2")) == (b"new", b"")
        assert (os.stat(d / "victim").st_nlink, os.stat(d / "victim2").st_nlink) == (1, 1)

    survives(check)


def test_editing_a_hard_link_after_a_restart_changes_all_names(alice, d):
    put(d / "one", b"before")
    os.link(d / "one", d / "two")
    alice.remount()
    with open(d / "two", "ab") as file:
        file.write(b" after")
    assert get(d / "one") == b"before after"
    os.unlink(d / "one")
    assert os.stat(d / "two").st_nlink == 1
    alice.remount()
    assert get(d / "two") == b"before after"
    assert os.stat(d / "two").st_nlink == 1


def test_a_directory_that_was_not_read_keeps_its_content(alice, d):
    """Its attributes, and its place, can change while nobody has looked into it since the mount."""
    for name in ("mode", "time", "attribute", "moved", "linked"):
        os.makedirs(d / name / "below")
        put(d / name / "x", name.encode())
        for i in range(100):
            put(d / name / "below" / f"{i:0100}")
    alice.remount()
    os.chmod(d / "mode", 0o711)
    os.utime(d / "time", ns=(1, 1))
    os.setxattr(d / "attribute", "user.a", b"b")
    os.rename(d / "moved", d / "linked" / "moved")
    alice.remount()
    assert stat.S_IMODE(os.stat(d / "mode").st_mode) == 0o711
    assert os.stat(d / "time").st_mtime_ns == 1
    assert os.getxattr(d / "attribute", "user.a") == b"b"
    for name in ("mode", "time", "attribute", "linked"):
        assert get(d / name / "x") == name.encode()
        assert len(os.listdir(d / name / "below")) == 100
    assert get(d / "linked" / "moved" / "x") == b"moved"
    assert len(os.listdir(d / "linked" / "moved" / "below")) == 100


def test_names_of_any_bytes(d, survives):
    names = {
        b"-rf", b" ", b"  two ", b"\n", b"a\nb", b"\\", b"*?[", b"\xff\xfe", "Ünï".encode(), b"...", b"~",
        "é".encode(), "e\u0301".encode(), b"A", b"a", b"con", b"\xed\xa0\x80", b"x" * 255, b"\xe2" * 255,
        b"\x01",
    }  # fmt: skip
    names |= {b"b%c" % byte for byte in range(1, 256) if byte != ord("/")}
    base = os.fsencode(d)
    for name in names:
        put(base + b"/" + name, name)

    def check():
        assert set(os.listdir(base)) == names
        assert all(get(base + b"/" + name) == name for name in names)

    survives(check)


def test_names_that_are_too_long(d):
    long = b"y" * 256
    base = os.fsencode(d) + b"/"
    put(base + b"file")
    calls = [
        lambda: os.open(base + long, os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(base + long),
        lambda: os.symlink(b"x", base + long),
        lambda: os.link(base + b"file", base + long),
        lambda: os.rename(base + b"file", base + long),
        lambda: os.stat(base + long),
        lambda: os.unlink(base + long),
        lambda: os.mkdir(os.fsencode(d.parent.parent) + b"/" + long),
    ]
    for call in calls:
        with fails(errno.ENAMETOOLONG):
            call()


def test_a_large_directory(d, survives):
    """Stored in pages: names come and go in the middle of it, while it is being committed."""
    rng = random.Random(11)
    names = [f"{rng.randbytes(4).hex()}-{i:05}-{'n' * rng.randrange(60)}" for i in range(5000)]
    for i, name in enumerate(names):
        put(d / name, b"%d" % i) if i % 10 else os.mkdir(d / name)
        if i == 2500:
            sync_dir(d)
    there = dict(enumerate(names))
    for i in range(0, 5000, 3):
        name = there.pop(i)
        os.unlink(d / name) if i % 10 else os.rmdir(d / name)
    for i in list(there)[::5]:
        new = f"renamed-{rng.randbytes(3).hex()}-{i}"
        os.rename(d / there[i], d / new)
        there[i] = new

    def check():
        assert sorted(os.listdir(d)) == sorted(there.values())
        with os.scandir(d) as entries:
            kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        for i, name in there.items():
            assert kinds[name] == (i % 10 == 0)
        for i in list(there)[::17]:
            assert i % 10 == 0 or get(d / there[i]) == b"%d" % i
        assert os.stat(d).st_nlink == 2 + sum(i % 10 == 0 for i in there)

    survives(check)


def test_reading_a_directory_while_it_changes(d):
    for i in range(3000):
        put(d / f"{i:04}")
    with os.scandir(d) as entries:
        first = next(entries).name
        for name in os.listdir(d):
            if name != first:
                os.unlink(d / name)
        put(d / "new")
        # What was there all the time is listed once; the rest may be listed or not, but without an error.
        seen = [first, *(entry.name for entry in entries)]
        assert seen.count(first) == 1
        assert len(seen) == len(set(seen))
    assert sorted(os.listdir(d)) == sorted([first, "new"])
    for i in range(1000):
        put(d / f"{i:04}")
    # What `rm -r` does.
    with os.scandir(d) as entries:
        for entry in entries:
            os.unlink(d / entry.name)
    assert os.listdir(d) == []


def test_dot_and_dot_dot_are_listed(alice, d):
    put(d / "file")
    for path, more in ((d, ["file"]), (alice.mnt, ["first", "second"]), (alice.mnt / ".meshkit", None)):
        listed = subprocess.run(
            ["ls", "-a1U", path], check=True, capture_output=True, text=True
        ).stdout.split()
        assert listed[:2] == [".", ".."]
        assert more is None or set(more) <= set(listed[2:])
        inodes = subprocess.run(
            ["ls", "-a1iU", path], check=True, capture_output=True, text=True
        ).stdout.split()
        assert int(inodes[0]) == os.stat(path).st_ino


def test_deep_paths(d, survives):
    depth = 150
    here = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    for level in range(depth):
        os.mkdir(f"level-{level:03}-" + "x" * 20, dir_fd=here)
        below = os.open(f"level-{level:03}-" + "x" * 20, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    fd = os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(fd, b"down here")
    os.fsync(fd)
    os.close(fd)
    os.close(here)

    def check():
        os.chdir(d)
        try:
            for level in range(depth):
                os.chdir(f"level-{level:03}-" + "x" * 20)
            assert get("bottom") == b"down here"
        finally:
            os.chdir("/")

    survives(check)


def test_wrong_kinds(d):
    put(d / "file", b"x")
    os.mkdir(d / "dir")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
        with fails(errno.EISDIR):
            os.open(d / "dir", flags)
    with fails(errno.ENOTDIR):
        os.open(d / "file", os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.ENOTDIR):
        os.stat(d / "file" / "below")
    with fails(errno.ENOTDIR):
        os.listdir(d / "file")
    with fails(errno.EEXIST):
        os.mkdir(d / "file")
    with fails(errno.EISDIR):
        os.truncate(d / "dir", 0)
    with fails(errno.EPERM):
        os.mkfifo(d / "fifo")
    os.mknod(d / "node", stat.S_IFREG | 0o600)
    assert os.stat(d / "node").st_size == 0


# -- attributes ------------------------------------------------------------------------------------


def test_modes_and_owner(d, survives):
    modes = [0o000, 0o400, 0o640, 0o755, 0o777, 0o4755, 0o2755, 0o1777]
    for mode in modes:
        put(d / f"file{mode:o}")
        os.mkdir(d / f"dir{mode:o}")
        for kind in ("file", "dir"):
            os.chmod(d / f"{kind}{mode:o}", mode)
    if os.getuid() == 0:
        # Accepted, as cp -a and tar need it, and not kept: everything belongs to the mounting user.
        os.chown(d / "file640", 12345, 12345)
    os.chmod(put(d / "written"), 0o4755)
    put(d / "written", b"x")

    def check():
        for mode in modes:
            for kind in ("file", "dir"):
                status = os.stat(d / f"{kind}{mode:o}")
                assert stat.S_IMODE(status.st_mode) == mode
                assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
        assert stat.S_IMODE(os.stat(d / "written").st_mode) == 0o755

    survives(check)


def test_the_umask_counts(d):
    before = os.umask(0o027)
    try:
        with opened(d / "file", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        os.mkdir(d / "dir", 0o777)
        assert stat.S_IMODE(os.stat(d / "dir").st_mode) == 0o750
    finally:
        os.umask(before)


def test_times_are_kept_to_the_nanosecond(d, survives):
    times = [0, 1, 1_700_000_000_123_456_789, -1, -86400_000_000_001, 5_000_000_000_999_999_999]
    for i, when in enumerate(times):
        for path in (put(d / f"file{i}"), d / f"dir{i}"):
            if path.name.startswith("dir"):
                os.mkdir(path)
            os.utime(path, ns=(when, when))

    def check():
        for i, when in enumerate(times):
            assert os.stat(d / f"file{i}").st_mtime_ns == when
            assert os.stat(d / f"dir{i}").st_mtime_ns == when

    survives(check)


def test_when_times_change(d):
    path = put(d / "file", b"x")
    old = 1_000_000_000_000_000_000

    def renewed(action):
        """Which of the file and its directory has a new mtime after ``action``."""
        for target in (path, d):
            os.utime(target, ns=(old, old))
        action()
        return {target.name for target in (path, d) if os.stat(target).st_mtime_ns != old}

    with opened(path) as fd:
        assert renewed(lambda: os.pwrite(fd, b"y", 0)) == {"file"}
        assert renewed(lambda: os.ftruncate(fd, 5)) == {"file"}
        assert renewed(lambda: os.fsync(fd)) == set()
    assert renewed(lambda: os.chmod(path, 0o600)) == set()
    assert renewed(lambda: put(d / "new")) == {d.name}
    assert renewed(lambda: os.unlink(d / "new")) == {d.name}
    assert renewed(lambda: os.link(path, d / "link")) == {d.name}
    assert renewed(lambda: os.rename(d / "link", d / "link2")) == {d.name}
    with opened(path) as fd:
        for action in (
            lambda: os.chmod(path, 0o644),
            lambda: os.utime(path, ns=(old, old)),
            lambda: os.setxattr(path, "user.x", b""),
            lambda: os.unlink(d / "link2"),
            lambda: os.rename(path, d / "moved"),
            lambda: os.unlink(d / "moved"),
        ):
            was = os.fstat(fd).st_ctime_ns
            action()
            assert os.fstat(fd).st_ctime_ns > was


def test_statvfs_is_plausible(alice, d):
    ours, theirs = os.statvfs(d), os.statvfs(alice.blocks)
    assert ours.f_namemax == 255
    total, free = ours.f_blocks * ours.f_frsize, ours.f_bavail * ours.f_frsize
    assert total == pytest.approx(theirs.f_blocks * theirs.f_frsize, rel=0.01)
    assert free == pytest.approx(theirs.f_bavail * theirs.f_frsize, rel=0.1)
    assert 0 < ours.f_ffree <= ours.f_files
    line = subprocess.run(["df", "--output=fstype,avail", d], check=True, capture_output=True, text=True)
    assert line.stdout.split()[-2] == "fuse.meshkitfs"


def test_user_attributes(alice, d, survives):
    path = put(d / "file")
    os.mkdir(d / "dir")
    root = alice.mnt / "first"
    values = {
        b"user.plain": b"value",
        b"user.empty": b"",
        b"user.binary": bytes(range(256)),
        b"user.\xff": b"name",
    }
    values[b"user." + b"n" * 250] = b"a name of 255 bytes"
    for place in (path, d / "dir", root):
        for name, value in values.items():
            os.setxattr(place, name, value)
    os.setxattr(path, "user.plain", b"created", os.XATTR_REPLACE)
    os.setxattr(path, "user.plain", b"value")
    with fails(errno.EEXIST):
        os.setxattr(path, "user.plain", b"again", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr(path, "user.missing", b"x", os.XATTR_REPLACE)
    os.setxattr(path, "user.fresh", b"x", os.XATTR_CREATE)
    os.removexattr(path, "user.fresh")
    for call in (lambda: os.getxattr(path, "user.fresh"), lambda: os.removexattr(path, "user.fresh")):
        with fails(errno.ENODATA):
            call()
    with fails(errno.EOPNOTSUPP, errno.EPERM):
        os.setxattr(path, "trusted.x", b"x")
    with fails(errno.ENODATA, errno.EOPNOTSUPP):
        os.getxattr(path, "security.capability")

    def check():
        for place in (path, d / "dir", root):
            names = {os.fsencode(name) for name in os.listxattr(place)}
            assert {name for name in names if not name.startswith(b"user.meshkit.")} == set(values)
            assert {name: os.getxattr(place, name) for name in values} == values

    survives(check)


def test_large_user_attributes(d, survives):
    path = put(d / "file", b"content")
    os.setxattr(path, "user.a", pattern(1, 65536))
    with fails(errno.E2BIG):
        os.setxattr(path, "user.b", bytes(65537))
    os.setxattr(path, "user.b", pattern(2, 65000))
    with fails(errno.ENOSPC):
        os.setxattr(path, "user.c", bytes(1000))
    for i in range(20):
        os.setxattr(put(d / f"more{i}"), "user.a", pattern(i, 60_000))

    def check():
        assert os.getxattr(path, "user.a") == pattern(1, 65536)
        assert os.getxattr(path, "user.b") == pattern(2, 65000)
        assert all(os.getxattr(d / f"more{i}", "user.a") == pattern(i, 60_000) for i in range(20))
        assert get(path) == b"content"

    survives(check)


def test_our_own_attributes_are_read_only(d):
    path = put(d / "file", b"x")
    names = [name for name in os.listxattr(path) if name.startswith("user.meshkit.")]
    assert {"user.meshkit.share", "user.meshkit.state", "user.meshkit.reason"} <= set(names)
    for name in [*names, "user.meshkit.invented"]:
        with fails(errno.EACCES):
            os.setxattr(path, name, b"forged")
        with fails(errno.EACCES):
            os.removexattr(path, name)
    with fails(errno.ENODATA):
        os.getxattr(path, "user.meshkit.invented")


# -- durability, locks, other processes ---------------------------------------------------------------


def test_fsync_publishes(alice, d):
    def heads():
        return alice.counters()["heads"]

    def stored():
        return alice.status()["pending"] == NOTHING and not alice.share("first")["reason"]

    for sync in (os.fsync, os.fdatasync):
        with opened(d / sync.__name__, os.O_RDWR | os.O_CREAT) as fd:
            for size in (100, 300_000, 3_000_000):
                os.pwrite(fd, pattern(size, size), 0)
                before = heads()
                sync(fd)
                assert heads() > before
                assert stored()
                assert alice.share("first")["state"] == "stored"
                before = heads()
                sync(fd)
                assert heads() == before  # nothing had changed
    for change in (
        lambda: put(d / "new"),
        lambda: os.rename(d / "new", d / "renamed"),
        lambda: os.unlink(d / "renamed"),
    ):
        sync_dir(d)
        before = heads()
        change()
        sync_dir(d)
        assert heads() > before
        assert stored()


def test_what_is_closed_is_published_without_asking(alice, d):
    put(d / "file", b"x" * 100_000)
    wait_until(lambda: alice.share("first")["state"] == "stored", "the commit after a close", 10)
    assert os.getxattr(d / "file", "user.meshkit.state") == b"stored"


LOCKER = """
import fcntl, os, sys
path, kind = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
take = fcntl.flock if kind == "flock" else fcntl.lockf
take(fd, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.readline()
take(fd, fcntl.LOCK_UN)
print("unlocked", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_locks_between_processes(d, kind):
    path = put(d / "file", b"x" * 100)
    take = fcntl.flock if kind == "flock" else fcntl.lockf
    other = program(LOCKER, path, kind)
    with other, opened(path) as fd:
        assert other.stdout.readline() == "locked\n"
        with fails(errno.EAGAIN, errno.EACCES):
            take(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind == "fcntl":
            fcntl.lockf(fd, fcntl.LOCK_UN)
        print(file=other.stdin, flush=True)
        assert other.stdout.readline() == "unlocked\n"
        take(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.stdin.close()
        assert other.wait(10) == 0


def test_inotify_tells_of_local_changes(d):
    fd = _libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0
    try:
        assert _libc.inotify_add_watch(fd, os.fsencode(d), 0x100 | 0x8 | 0x200) >= 0
        put(d / "file", b"x")
        os.unlink(d / "file")
        events = os.read(fd, 4096)
        assert events.count(b"file\0") == 3  # created, closed after writing, deleted
    finally:
        os.close(fd)


WORKLOAD = """
import os, random, sys
mount, mirror, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)

def both(call, *names):
    outcomes = []
    for base in (mount, mirror):
        try:
            call(*(os.path.join(base, name) for name in names))
            outcomes.append("ok")
        except OSError as error:
            outcomes.append(os.strerror(error.errno))
    assert outcomes[0] == outcomes[1], (seed, step, names, outcomes)

def write(data, at, flags):
    def call(path):
        fd = os.open(path, flags)
        os.pwrite(fd, data, at)
        os.close(fd)
    return call

def sync(path):
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    os.fsync(fd)
    os.close(fd)

names = [f"{a}{b}" for a in ("", "p/", "q/", "p/r/") for b in "abcdef"]
directories = ["p", "q", "p/r", "a"]
for step in range(steps):
    a, b = rng.choice(names), rng.choice(names)
    action = rng.randrange(12)
    if action < 4:
        data = rng.randbytes(rng.choice([0, 10, 5000, 70_000, 300_000]))
        flags = os.O_WRONLY | os.O_CREAT | rng.choice([0, os.O_TRUNC])
        both(write(data, rng.choice([0, 0, 100, 66_000]), flags), a)
    elif action == 4: both(os.unlink, a)
    elif action < 7: both(os.rename, a, b)
    elif action == 7:
        size = rng.choice([0, 7, 20_000, 400_000])
        both(lambda path: os.truncate(path, size), a)
    elif action == 8: both(os.link, a, b)
    elif action == 9: both(os.mkdir, rng.choice(directories))
    elif action == 10: both(os.rmdir, rng.choice(directories))
    else: sync(os.path.join(mount, a))
"""


def test_four_programs_at_once_behave_as_on_a_local_disk(d, tmp_path, survives):
    """Random work in four directories at the same time, mirrored on a local disk and compared with it."""
    programs = []
    for number in range(4):
        for base in (d, tmp_path):
            os.mkdir(base / str(number))
        seed = 1000 + number
        programs.append(program(WORKLOAD, d / str(number), tmp_path / str(number), str(seed), "600"))
    assert [each.wait(120) for each in programs] == [0] * 4

    def shape(base):
        found, inodes = {}, {}
        for directory, _, files in os.walk(base):
            for name in files:
                path = os.path.join(directory, name)
                status = os.stat(path)
                first = inodes.setdefault(status.st_ino, os.path.relpath(path, base))
                found[os.path.relpath(path, base)] = (status.st_size, status.st_nlink, first, get(path))
            found[os.path.relpath(directory, base)] = os.stat(directory).st_nlink
        return found

    # On this disk, too, names of one file come in any order: compare them as sets.
    def comparable(base):
        found = shape(base)
        groups = {}
        for path, value in found.items():
            if isinstance(value, tuple):
                groups.setdefault(value[2], set()).add(path)
        plain = {
            path: value if isinstance(value, int) else (value[0], value[1], value[3])
            for path, value in found.items()
        }
        return plain, sorted(sorted(group) for group in groups.values())

    expected = comparable(tmp_path)
    survives(lambda: comparable(d) == expected or pytest.fail("the tree differs from the local one"))


# -- the root of the mount ---------------------------------------------------------------------------


def test_the_control_directory_is_hidden_and_readable(alice):
    assert ".meshkit" not in os.listdir(alice.mnt)
    control = alice.mnt / ".meshkit"
    assert set(os.listdir(control)) == {"status.json", "errors.txt", "capabilities.json"}
    assert alice.status_file()["identity"] == "alice"
    assert get(control / "capabilities.json").startswith(b"{")
    assert get(control / "errors.txt")
    for call in (
        lambda: os.open(control / "status.json", os.O_WRONLY),
        lambda: os.open(control / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.unlink(control / "status.json"),
        lambda: os.mkdir(control / "dir"),
        lambda: os.rmdir(control),
    ):
        with fails(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTEMPTY):
            call()
    assert control.is_dir()


def test_directories_at_the_root_are_shares(alice):
    def shares():
        return {share["name"] for share in alice.status()["shares"]}

    root = alice.mnt
    os.mkdir(root / "notes")
    assert "notes" in shares()
    put(root / "notes" / "one", b"1")
    os.rename(root / "notes", root / "renamed")
    assert {"renamed"} <= shares()
    assert "notes" not in shares()
    assert not (root / "notes").exists()
    assert get(root / "renamed" / "one") == b"1"
    with fails(errno.ENOTEMPTY):
        os.rmdir(root / "renamed")
    with fails(errno.EEXIST, errno.ENOTEMPTY):
        os.rename(root / "renamed", root / "second")
    with fails(errno.EEXIST):
        os.mkdir(root / "second")
    with fails(errno.EINVAL):
        os.mkdir(root / ".hidden")
    with fails(errno.EISDIR):
        os.unlink(root / "renamed")
    with fails(errno.ENOENT):
        os.rmdir(root / "missing")
    for call in (
        lambda: os.open(root / "file", os.O_CREAT | os.O_WRONLY),
        lambda: os.symlink("x", root / "link"),
        lambda: os.mknod(root / "node"),
    ):
        with fails(errno.EACCES):
            call()
    os.unlink(root / "renamed" / "one")
    os.rmdir(root / "renamed")
    assert shares() == {"first", "second"}
    assert sorted(os.listdir(root)) == ["first", "second"]


# -- and all of it again ------------------------------------------------------------------------------


def test_everything_is_the_same_after_a_restart(alice):
    inodes = {path: os.lstat(path).st_ino for path in (alice.mnt / "first").iterdir()}
    alice.remount()
    for name, check in alice.checks.items():
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"after the restart, what {name} made is different") from error
    assert {path: os.lstat(path).st_ino for path in (alice.mnt / "first").iterdir()} == inodes


def test_everything_can_be_removed(alice):
    for name in ("first", "second"):
        for path in (alice.mnt / name).iterdir():
            subprocess.run(["rm", "-rf", "--", path], check=True)
        assert os.listdir(alice.mnt / name) == []
        assert os.stat(alice.mnt / name).st_nlink == 2


def test_the_daemon_noticed_no_defect(alice):
    assert alice.status()["errors"] == []
    bad = [line for line in alice.logs().splitlines() if "level=error" in line or "Traceback" in line]
    assert bad == []
