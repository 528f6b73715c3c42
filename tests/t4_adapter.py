"""The FUSE adapter on real mounts, with a filesystem in memory behind it: what each system call means."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing
from memvfs import MemVfs
from mounted import mounts_in, needs_mount, needs_root
from namespaces import LET_GO

from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.fuse import spin
from meshkitfs.fuse.operations import Operations
from meshkitfs.fuse.refusal import errno_for
from meshkitfs.fuse.spin import Readiness
from meshkitfs.fuse.workers import Workers
from meshkitfs.vfs.types import Attr, Opened


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One mount for all tests that leave it as they found it."""
    with mounts_in(tmp_path_factory.mktemp("shared")) as make:
        yield make()


@pytest.fixture
def mount(tmp_path):
    """Makes mounts with options of the test's choice."""
    with mounts_in(tmp_path) as make:
        yield make


def adapter(fs):
    """The handlers alone, without a mount."""
    return Operations(fs, Workers(60, Readiness()), 60, lambda error: None)


# -- what the system calls mean ----------------------------------------------------------------------------


@needs_mount
class TestSemantics:
    def test_files_keep_what_is_written(self, shared):
        assert shared.do(
            """
put("f", b"hello")
fd = os.open(at("f"), os.O_RDWR)
os.pwrite(fd, b"J", 0)
os.pwrite(fd, b"end", 8)
os.ftruncate(fd, 10)
os.close(fd)
with open(at("f"), "ab", 0) as file: file.write(b"!")
info = os.stat(at("f"))
result = [get("f"), info.st_size, info.st_nlink, stat.filemode(info.st_mode), info.st_uid == os.getuid()]
os.unlink(at("f"))
"""
        ) == ["Jello\0\0\0en!", 11, 1, "-rw-r--r--", True]

    def test_links_and_renames(self, shared):
        assert shared.do(
            """
put("a", b"text")
os.link(at("a"), at("b"))
os.symlink("a", at("s"))
links = [os.stat(at("b")).st_nlink, os.readlink(at("s")), get("s")]
os.rename(at("b"), at("c"))
put("victim", b"old")
os.rename(at("c"), at("victim"))
result = links + [get("victim"), sorted(os.listdir(root))]
for name in os.listdir(root): os.unlink(at(name))
"""
        ) == [2, "a", "text", "text", ["a", "s", "victim"]]

    def test_a_file_unlinked_or_replaced_while_open_stays_readable(self, shared):
        assert shared.do(
            """
fd = os.open(put("open", b"first"), os.O_RDONLY)
put("new", b"second")
os.rename(at("new"), at("open"))
other = os.open(at("open"), os.O_RDONLY)
os.unlink(at("open"))
result = [os.pread(fd, 9, 0).decode(), os.pread(other, 9, 0).decode(), os.fstat(fd).st_nlink]
"""
        ) == ["first", "second", 0]

    def test_names_longer_than_255_bytes_are_refused_by_every_operation(self, shared):
        refused = shared.do(
            """
long, file = at("n" * 256), put("short")
result = [
    fails(os.stat, long), fails(os.open, long, os.O_CREAT | os.O_WRONLY), fails(os.mkdir, long),
    fails(os.symlink, "x", long), fails(os.link, file, long), fails(os.rename, file, long),
    fails(os.rename, long, file), fails(os.unlink, long), fails(os.rmdir, long), fails(os.mknod, long),
]
os.unlink(file)
os.mkdir(at("n" * 255)); os.rmdir(at("n" * 255))
"""
        )
        assert set(refused) == {"ENAMETOOLONG"}

    def test_the_adapter_itself_refuses_long_names(self):
        # The kernel looks a name up first, so that most handlers never see it; but it need not.
        operations = adapter(MemVfs())
        long = b"n" * 256

        async def refusals():
            return [
                await _code(operations.lookup(1, long, None)),
                await _code(operations.mknod(1, long, 0o644, 0, None)),
                await _code(operations.mkdir(1, long, 0o755, None)),
                await _code(operations.symlink(1, long, b"x", None)),
                await _code(operations.link(1, 1, long, None)),
                await _code(operations.unlink(1, long, None)),
                await _code(operations.rmdir(1, long, None)),
                await _code(operations.rename(1, long, 1, b"x", 0, None)),
                await _code(operations.rename(1, b"x", 1, long, 0, None)),
                await _code(operations.create(1, long, 0o644, os.O_WRONLY, None)),
            ]

        assert set(trio.run(refusals)) == {errno.ENAMETOOLONG}

    def test_rename_flags_reach_the_filesystem(self, shared):
        assert shared.do(
            """
put("a", b"A"); put("b", b"B")
libc = ctypes.CDLL(None, use_errno=True)
def rename(flags):
    if libc.renameat2(-100, at("a").encode(), -100, at("b").encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")
result = [fails(rename, 1), fails(rename, 2), get("a"), get("b")]
for name in "ab": os.unlink(at(name))
"""
        ) == ["EEXIST", "EINVAL", "A", "B"]
        assert ["rename", 2] in shared("history")

    def test_mknod_makes_regular_files_and_nothing_else(self, shared):
        handles = shared("state")["handles"]
        assert shared.do(
            """
import socket
os.mknod(at("plain"), 0o640 | stat.S_IFREG)
sock = socket.socket(socket.AF_UNIX)
result = [stat.filemode(os.stat(at("plain")).st_mode), fails(os.mkfifo, at("fifo")),
          fails(os.mknod, at("dev"), 0o600 | stat.S_IFCHR, 0), fails(sock.bind, os.path.relpath(at("sock")))]
os.unlink(at("plain"))
"""
        ) == ["-rw-r-----", "EPERM", "EPERM", "EPERM"]
        assert shared("state")["handles"] == handles

    def test_extended_attributes_of_the_user_and_no_others(self, shared):
        before = shared("calls").get("getxattr", 0)
        assert shared.do(
            """
file = put("x", b"a write asks for security.capability")
result = [fails(os.getxattr, file, "security.capability"), fails(os.setxattr, file, "security.mine", b"1"),
          fails(os.removexattr, file, "security.mine"), fails(os.getxattr, file, "trusted.mine")]
"""
        ) == ["ENODATA", "ENOTSUP", "ENODATA", "ENODATA"]
        assert shared("calls").get("getxattr", 0) == before
        assert shared.do(
            """
file = at("x")
os.setxattr(file, "user.k", b"v\\0w")
result = [os.getxattr(file, "user.k") == b"v\\0w", os.listxattr(file),
          fails(os.setxattr, file, "user.k", b"", os.XATTR_CREATE),
          fails(os.setxattr, file, "user.l", b"", os.XATTR_REPLACE), fails(os.getxattr, file, "user.l")]
os.removexattr(file, "user.k")
result += [os.listxattr(file), fails(os.removexattr, file, "user.k")]
os.unlink(file)
"""
        ) == [True, ["user.k"], "EEXIST", "ENODATA", "ENODATA", [], "ENODATA"]

    def test_statfs(self, shared):
        assert shared.do(
            """
s = os.statvfs(root)
result = [s.f_bsize, s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_namemax]
"""
        ) == [4096, 4096, 1 << 18, 1 << 17, 1 << 17, 1000, 500, 255]

    def test_open_flags_and_modes_reach_the_filesystem(self, shared):
        shared.do(
            """
os.umask(0o027)
os.close(os.open(at("log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666))
os.close(os.open(at("log"), os.O_WRONLY | os.O_APPEND))
os.close(os.open(at("log"), os.O_WRONLY | os.O_TRUNC))
os.unlink(at("log"))
"""
        )
        assert shared("history")[-3:] == [
            ["create", 0o640, os.O_APPEND],
            ["open", os.O_APPEND],
            ["open", os.O_TRUNC],
        ]

    def test_setattr_carries_the_handle_and_only_what_changes(self, shared):
        shared.do(
            """
put("s")
os.chmod(at("s"), 0o4711)
fd = os.open(at("s"), os.O_RDWR)
os.ftruncate(fd, 5)
os.utime(at("s"), ns=(1, -2_000_000_001))
result = os.stat(at("s")).st_mtime_ns
os.unlink(at("s"))
"""
        )
        chmod, truncate, utime = [entry[1:] for entry in shared("history") if entry[0] == "setattr"][-3:]
        assert chmod == [None, 0o4711, None, None]
        assert truncate[0] is not None
        assert truncate[1:3] == [None, 5]
        assert utime == [None, None, None, -2_000_000_001]

    def test_fsync_says_which_kind(self, shared):
        shared.do(
            "fd = os.open(put('y', b'1'), os.O_RDWR); os.fsync(fd); os.fdatasync(fd); os.unlink(at('y'))"
        )
        assert shared("history")[-2:] == [["fsync", False], ["fsync", True]]

    def test_shared_memory_maps(self, shared):
        assert (
            shared.do(
                """
fd = os.open(put("map", bytes(8192)), os.O_RDWR)
with mmap.mmap(fd, 8192) as memory:
    memory[4096:4100] = b"mmap"
    memory.flush()
result = os.pread(fd, 4, 4096).decode()
os.unlink(at("map"))
"""
            )
            == "mmap"
        )

    def test_the_kernel_keeps_pages_across_opens(self, shared):
        shared.do("put('cached', bytes(10000)); result = get('cached') and None")
        before = shared("calls")["read"]
        shared.do("get('cached'); get('cached'); os.unlink(at('cached'))")
        assert shared("calls")["read"] == before

    def test_large_reads_and_writes_are_exact(self, shared):
        assert shared.do(
            """
data = os.urandom(3_000_001)
put("large", data)
fd = os.open(at("large"), os.O_RDONLY | os.O_DIRECT)
page = mmap.mmap(-1, 1 << 20)
got = os.preadv(fd, [page], 1 << 20)
with open(at("large"), "rb") as file: whole = file.read()
result = [got, page[:] == data[1 << 20 : 2 << 20], whole == data]
os.unlink(at("large"))
"""
        ) == [1 << 20, True, True]


@needs_mount
class TestDirectories:
    def test_every_name_is_listed_once_while_the_directory_changes(self, shared):
        listed = shared.do(
            """
os.mkdir(at("big"))
for i in range(3000): os.close(os.open(at(f"big/keep-{i:04}"), os.O_CREAT | os.O_WRONLY))
for i in range(1000): os.close(os.open(at(f"big/go-{i:04}"), os.O_CREAT | os.O_WRONLY))
with os.scandir(at("big")) as entries:
    seen = [next(entries).name for _ in range(10)]
    for i in range(1000): os.unlink(at(f"big/go-{i:04}"))
    for i in range(200): os.close(os.open(at(f"big/new-{i:04}"), os.O_CREAT | os.O_WRONLY))
    for i in range(0, 3000, 2): os.rename(at(f"big/keep-{i:04}"), at(f"big/keep-{i:04}x"))
    seen += [entry.name for entry in entries]
result = seen
"""
        )
        keep = [name[:9] for name in listed if name.startswith("keep") and int(name[5:9]) % 2]
        assert sorted(keep) == [f"keep-{i:04}" for i in range(1, 3000, 2)]
        assert len(set(listed)) == len(listed)
        shared.do("import shutil; shutil.rmtree(at('big'))")

    def test_the_kernel_lets_go_of_every_reference(self, mount):
        """Names handed out by listing count exactly as often as the kernel believes."""
        daemon = mount()
        daemon.do(
            """
os.mkdir(at("d"))
for i in range(500): os.close(os.open(at(f"d/{i}"), os.O_CREAT | os.O_WRONLY))
for _ in range(3):
    for entry in os.scandir(at("d")): entry.stat()
"""
        )
        references = daemon("state")["references"].values()
        assert max(references) >= 4
        assert min(references) >= 0
        daemon.do("import shutil; shutil.rmtree(at('d'))")
        assert daemon("wait_nodes", 1) is None
        assert daemon("state")["handles"] == 0

    def test_an_error_in_the_middle_of_a_listing_shows_and_leaks_nothing(self, mount):
        daemon = mount()
        daemon.do("for name in ('a', 'b', 'c!', 'd'): put(name)")
        daemon("fail", "readdir", "cid_mismatch")
        assert daemon.do(
            """
seen = []
def listing():
    for entry in os.scandir(root): seen.append(entry.name)
result = [fails(listing), seen]
"""
        ) == ["EIO", ["a", "b"]]
        daemon("fail", "readdir")
        daemon.do("for name in os.listdir(root): os.unlink(at(name))")
        assert daemon("wait_nodes", 1) is None

    def test_one_failing_forget_does_not_hold_up_the_others(self):
        class Failing(MemVfs):
            def forget(self, ino, count):
                if ino == 5:
                    raise RuntimeError("a defect")
                self.history.append((ino, count))

        fs = Failing()
        operations = adapter(fs)
        trio.run(operations.forget, [(4, 1), (5, 1), (6, 2)])
        assert fs.history == [(4, 1), (6, 2)]


@needs_mount
class TestTheMount:
    def test_how_it_shows_in_the_mount_table(self, shared):
        line = next(
            line for line in Path("/proc/self/mounts").read_text().splitlines() if shared.place in line
        )
        source, place, fstype, options, *_ = line.split()
        assert (source, place, fstype) == ("meshkitfs", shared.place, "fuse.meshkitfs")
        assert {"rw", "nosuid", "nodev", "default_permissions"} <= set(options.split(","))
        assert "allow_other" not in options

    def test_read_only_and_noexec(self, mount):
        daemon = mount(read_only=True, noexec=True)
        assert daemon.do("result = fails(os.mkdir, at('d'))") == "EROFS"
        line = next(
            line for line in Path("/proc/self/mounts").read_text().splitlines() if daemon.place in line
        )
        assert {"ro", "noexec"} <= set(line.split()[3].split(","))

    @needs_root
    def test_other_users_stay_out(self, shared, tmp_path_factory):
        _open_the_way_to(shared.place)
        assert shared.do("result = fails(os.listdir, root)", user=65534) == "EACCES"

    @needs_root
    def test_where_others_are_let_in_the_mode_bits_hold(self, mount):
        daemon = mount(allow_other=True)
        _open_the_way_to(daemon.place)
        daemon.do("os.chmod(put('mine', b'x'), 0o600); os.chmod(put('ours', b'x'), 0o644)")
        assert daemon.do(
            "result = [fails(get, 'mine'), fails(get, 'ours'), fails(put, 'new')]", user=65534
        ) == [
            "EACCES",
            "ok",
            "EACCES",
        ]

    @needs_root
    def test_an_ordinary_user_mounts_through_fusermount3(self, tmp_path):
        # In a mount namespace of its own, with a device anybody may open, as on an ordinary machine.
        (tmp_path / "mnt").mkdir()
        os.chown(tmp_path / "mnt", 65534, 65534)
        _open_the_way_to(tmp_path / "mnt")
        os.mknod(tmp_path / "fuse", 0o020666, os.makedev(10, 229))
        os.chmod(tmp_path / "fuse", 0o666)
        script = ORDINARY_USER.format(place=str(tmp_path / "mnt"), tests=str(Path(__file__).parent))
        in_private = ["unshare", "--mount", "sh", "-c", f'{LET_GO}; mount --bind "$0" /dev/fuse && exec "$@"']
        ended = subprocess.run(
            [*in_private, tmp_path / "fuse", sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (ended.stdout, ended.stderr) == ("hello 65534 nosuid,nodev\nunmounted\n", "")

    def test_a_mount_that_the_kernel_refuses_says_why(self, tmp_path):
        from meshkitfs.fuse.mount import run

        async def attempt():
            await run(MemVfs(), tmp_path / "missing", stop=trio.Event())

        with pytest.raises(MeshkitError) as caught:
            trio.run(attempt)
        assert caught.value.code == "mount_failed"
        assert "No such file" in caught.value.detail


ORDINARY_USER = """
import encodings.ascii, os, subprocess, sys
sys.path.append({tests!r})
import memvfs, trio
from meshkitfs.fuse import preflight
from meshkitfs.fuse.mount import run
# After the imports: this interpreter may be out of that user's reach.
os.setgroups([]); os.setgid(65534); os.setuid(65534); os.chdir("/")
preflight.check_system()
place = preflight.check_mountpoint({place!r}, [])

async def main():
    fs, stop = memvfs.MemVfs(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: run(fs, place, stop=stop, task_status=task_status))
        script = 'cd "$0"; printf hello > f; cat f; stat -c " %u" f; grep " $0 " /proc/mounts | cut -d, -f2,3'
        said = await trio.run_process(["sh", "-c", script, place], capture_stdout=True)
        print(said.stdout.decode().replace("\\n", " ", 1).strip())
        stop.set()

trio.run(main)
print("mounted" if preflight.mounts() and preflight.is_ours(place) else "unmounted")
"""


def _open_the_way_to(place):
    # pytest makes its directories for their owner alone.
    for directory in Path(place).parents:
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)


# -- waiting for requests ----------------------------------------------------------------------------------


class Requests:
    """A pipe as the device: worker tasks that read one byte at a time and may be held up by it."""

    def __init__(self, readiness):
        self.readiness = readiness
        self.end, self.start = os.pipe()
        self.served = []
        self.hold = trio.Event()
        self.done = trio.Event()

    async def work(self):
        while True:
            try:
                await self.readiness.wait_readable(self.end)
            except trio.ClosedResourceError:
                return
            request = os.read(self.end, 1)
            if not request:
                return
            self.served.append(request)
            if request == b"s":
                await self.hold.wait()
            else:
                self.done.set()

    async def run(self, scenario, workers=3):
        try:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for _ in range(workers):
                        nursery.start_soon(self.work)
                    await trio.testing.wait_all_tasks_blocked()
                    await scenario()
        finally:
            os.close(self.end)
            if self.start is not None:
                os.close(self.start)


class TestReadiness:
    def test_a_parked_worker_takes_over_when_two_others_are_held_up(self):
        """One worker finds a slow request in epoll, the one it wakes finds another by polling."""

        async def main():
            requests = Requests(Readiness())

            async def scenario():
                os.write(requests.start, b"ssf")
                await requests.done.wait()
                requests.hold.set()
                requests.readiness.notify_closing(requests.end)

            await requests.run(scenario)
            assert requests.served == [b"s", b"s", b"f"]

        trio.run(main)

    @pytest.mark.parametrize("gone", [True, False])
    def test_everybody_leaves_when_the_device_is_gone_or_closed(self, gone):
        async def main():
            requests = Requests(Readiness())

            async def scenario():
                if gone:
                    os.close(requests.start)
                    requests.start = None
                else:
                    requests.readiness.notify_closing(requests.end)

            await requests.run(scenario, workers=5)

        trio.run(main)

    def test_patience_ends_where_polling_finds_nothing_and_comes_back_where_it_would(self, monkeypatch):
        now = 0.0

        def clock():
            nonlocal now
            now += 1e-6
            return now

        monkeypatch.setattr(spin, "perf_counter", clock)

        async def main():
            nonlocal now
            readiness = Readiness()
            end, start = os.pipe()
            seen = []

            async def request(pause):
                nonlocal now
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(readiness.wait_readable, end)
                    await trio.testing.wait_all_tasks_blocked()
                    now += pause
                    os.write(start, b"x")
                os.read(end, 1)
                seen.append(readiness.patience)

            for pause in (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 20e-6):
                await request(pause)
            os.close(end)
            os.close(start)
            assert seen == [*sorted(seen[:-1], reverse=True), spin.PATIENCE]
            assert seen[-2] < spin.PATIENCE / 10

        trio.run(main)

    def test_other_tasks_get_their_turn_under_a_stream_of_requests(self):
        async def main():
            readiness = Readiness()
            end, start = os.pipe()
            os.write(start, b"x")  # never read: there is always a request
            passed = 0
            async with trio.open_nursery() as nursery:

                async def other():
                    await trio.sleep(0)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(other)
                while True:
                    await readiness.wait_readable(end)
                    passed += 1
            os.close(end)
            os.close(start)
            assert passed < 1_000_000

        trio.run(main)


class TestWorkers:
    def test_a_worker_whose_scope_is_spent_starts_over_in_a_new_one(self):
        """In the old scope, every further request that waits for anything would end at once."""
        happened = []

        async def main():
            workers = Workers(0.01, Readiness())

            async def loop():
                """As pyfuse3's: the first request hangs, the second waits a moment and is the last."""
                while True:
                    try:
                        async with workers.Lock():
                            pass
                    except trio.ClosedResourceError:
                        happened.append("left")
                        return
                    try:
                        await (trio.lowlevel.checkpoint if happened else trio.sleep_forever)()
                        happened.append("answered")
                        return
                    except trio.Cancelled:
                        happened.append("overdue" if workers.overdue() else "cancelled")

            async with trio.open_nursery() as outer:
                outer.start_soon(workers.watch)
                async with workers.open_nursery() as nursery:
                    nursery.start_soon(loop, name="worker")
                outer.cancel_scope.cancel()

        trio.run(main)
        assert happened == ["overdue", "left", "answered"]


# -- failures ----------------------------------------------------------------------------------------------


async def _code(awaitable):
    """Return the errno a handler refuses with, 0 if it does not; anything but FUSEError is a failure."""
    try:
        await awaitable
    except pyfuse3.FUSEError as refusal:
        return refusal.errno
    return 0


class TestRefusals:
    @pytest.mark.parametrize("code", sorted(TABLE))
    def test_every_refusal_of_ours_answers_its_errno(self, code):
        assert errno_for(MeshkitError(code)) == TABLE[code].errno

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (OSError(errno.ENOTEMPTY, "x"), errno.ENOTEMPTY),
            (FileNotFoundError(errno.ENOENT, "x"), errno.ENOENT),
            (OSError(errno.ENOSYS, "x"), errno.EOPNOTSUPP),
            (OSError("no number"), None),
            (OSError(0, "success?"), None),
            (OSError(-5, "negative"), None),
            (OSError(512, "ERESTARTSYS"), None),
            (trio.TooSlowError(), errno.ETIMEDOUT),
            (TimeoutError(), errno.ETIMEDOUT),
            (MemoryError(), errno.ENOMEM),
            (ValueError(), None),
            (RecursionError(), None),
            (ExceptionGroup("g", [ValueError(), OSError(errno.ENOSPC, "x")]), errno.ENOSPC),
            (ExceptionGroup("g", [OSError(errno.EIO, "x"), MeshkitError("share_expired")]), errno.EACCES),
            (ExceptionGroup("g", [ExceptionGroup("h", [MeshkitError("no_space")])]), errno.ENOSPC),
            (ExceptionGroup("g", [trio.TooSlowError()]), errno.ETIMEDOUT),
            (ExceptionGroup("g", [ValueError()]), None),
        ],
    )
    def test_errno_of(self, error, expected):
        assert errno_for(error) == expected

    def test_every_handler_is_guarded(self):
        handlers = {
            name
            for name, member in vars(pyfuse3.Operations).items()
            if not name.startswith("_") and callable(member) and name not in ("init", "stacktrace")
        }
        ours = {name for name in handlers if hasattr(getattr(Operations, name), "__wrapped__")}
        # Not asked for with default_permissions; the kernel's own poll is right; forget has no answer.
        assert handlers - ours == {"access", "poll", "forget"}

    def test_values_pyfuse3_cannot_use_never_reach_it(self):
        class Wrong(MemVfs):
            wrong: object = None

            async def getattr(self, ino):
                return self.wrong

            read = write = opendir = open = getxattr = listxattr = readlink = statfs = create = lookup = (
                lambda self, *args: self.getattr(0)
            )

        fs = Wrong()
        operations = adapter(fs)

        async def answers(wrong, *calls):
            fs.wrong = wrong
            return {await _code(call()) for call in calls}

        async def everything():
            return set().union(
                await answers(
                    None,
                    *(lambda: operations.getattr(1, None), lambda: operations.lookup(1, b"x", None)),
                    *(lambda: operations.read(1, 0, 10), lambda: operations.write(1, 0, b"x")),
                    *(lambda: operations.opendir(1, None), lambda: operations.open(1, 0, None)),
                    *(lambda: operations.getxattr(1, b"user.x", None), lambda: operations.listxattr(1, None)),
                    *(lambda: operations.readlink(1, None), lambda: operations.statfs(None)),
                    lambda: operations.create(1, b"x", 0, 0, None),
                ),
                await answers(bytes(11), lambda: operations.read(1, 0, 10)),
                await answers("text", lambda: operations.read(1, 0, 10)),
                await answers("text", lambda: operations.getxattr(1, b"user.x", None)),
                await answers(-1, lambda: operations.write(1, 0, b"x"), lambda: operations.opendir(1, None)),
                await answers(2, lambda: operations.write(1, 0, b"x")),
                await answers(1 << 64, lambda: operations.opendir(1, None)),
                await answers(Opened(-1, True), lambda: operations.open(1, 0, None)),
                await answers(Attr(-1, 0, 0, 0, 0, 0, 0, 0, 0, 0), lambda: operations.getattr(1, None)),
                await answers(Attr(1, 0, 0, 1 << 70, 0, 0, 0, 0, 0, 0), lambda: operations.getattr(1, None)),
            )

        assert trio.run(everything) == {errno.EIO}

    def test_reads_are_handed_on_without_a_copy(self):
        class Fixed(MemVfs):
            async def read(self, fh, offset, size):
                return self.view

        fs = Fixed()
        fs.view = memoryview(bytearray(100))[10:20]
        operations = adapter(fs)
        assert trio.run(operations.read, 1, 0, 10) is fs.view


EVERY_OPERATION = """
def file(flags=os.O_RDWR): return os.open(at("f"), flags)
operations = {
    "lookup": lambda: os.stat(at("new")),
    "getattr": lambda: os.fstat(file()),
    "setattr": lambda: os.chmod(at("f"), 0o600),
    "readlink": lambda: os.readlink(at("s")),
    "mkdir": lambda: os.mkdir(at("new")),
    "symlink": lambda: os.symlink("x", at("new")),
    "link": lambda: os.link(at("f"), at("new")),
    "unlink": lambda: os.unlink(at("f")),
    "rmdir": lambda: os.rmdir(at("d")),
    "rename": lambda: os.rename(at("f"), at("g")),
    "open": file,
    "create": lambda: os.open(at("new"), os.O_CREAT | os.O_WRONLY),
    "read": lambda: os.preadv(file(os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 0),
    "write": lambda: os.pwrite(file(), b"x", 0),
    "flush": lambda: os.close(file()),
    "fsync": lambda: os.fsync(file()),
    "release": lambda: os.close(file()),
    "opendir": lambda: os.listdir(root),
    "fsyncdir": lambda: os.fsync(os.open(root, os.O_RDONLY)),
    "releasedir": lambda: os.listdir(root),
    "statfs": lambda: os.statvfs(root),
    "getxattr": lambda: os.getxattr(at("f"), "user.x"),
    "setxattr": lambda: os.setxattr(at("f"), "user.x", b"x"),
    "listxattr": lambda: os.listxattr(at("f")),
    "removexattr": lambda: os.removexattr(at("f"), "user.x"),
}
"""


@needs_mount
class TestFailures:
    def test_no_failing_handler_takes_the_mount_down(self, mount):
        daemon = mount(timeout=0)
        daemon.do("put('f', b'x'); os.mkdir(at('d')); os.symlink('x', at('s'))")
        answers = {}
        for name in daemon.do(EVERY_OPERATION + "result = list(operations)"):
            daemon("fail", name, "value")
            answers[name] = daemon.do(EVERY_OPERATION + f"result = fails(operations[{name!r}])")
            daemon("fail", name)
        # The kernel does not wait for an answer to these two.
        assert (answers.pop("release"), answers.pop("releasedir")) == ("ok", "ok")
        assert set(answers.values()) == {"EIO"}
        assert daemon.do("result = get('f')") == "x"
        log = daemon.log.read_text()
        assert all(f"{name} failed in a way nobody foresaw" in log for name in answers)

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ("value", "EIO"),
            ("badnumber", "EIO"),
            ("group", "EACCES"),
            ("share_revoked", "EACCES"),
            ("cid_mismatch", "EIO"),
            ("enospc", "ENOSPC"),
            ("slow", "ETIMEDOUT"),
        ],
    )
    def test_what_a_program_sees(self, shared, how, expected):
        shared.do("put('seen')")
        shared("fail", "write", how)
        try:
            assert shared.do("result = fails(os.pwrite, os.open(at('seen'), os.O_RDWR), b'x', 0)") == expected
        finally:
            shared("fail", "write")
            shared.do("os.unlink(at('seen'))")

    def test_not_implemented_is_never_said_to_the_kernel(self, mount):
        """It would not ask again, and fsync would succeed without us for ever after."""
        daemon = mount()
        fsync = "result = fails(os.fsync, os.open(put('f'), os.O_RDWR))"
        daemon("fail", "fsync", "enosys")
        assert daemon.do(fsync) == "ENOTSUP"
        daemon("fail", "fsync", "enospc")
        assert daemon.do(fsync) == "ENOSPC"

    def test_a_keyboard_interrupt_in_a_handler_ends_the_mount_in_order(self, tmp_path):
        with mounts_in(tmp_path) as make:
            daemon = make(timeout=0)
            daemon("fail", "statfs", "interrupt")
            assert daemon.do("result = fails(os.statvfs, root)") == "ENOTCONN"
        assert "KeyboardInterrupt" in daemon.log.read_text()
