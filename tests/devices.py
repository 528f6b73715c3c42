"""Homes driven in the test's own process, step by step and without a kernel: sessions, crashes, power loss.

A `World` is one run of trio in a thread of its own whose clock stands still unless a test moves it, so no
timer ever commits anything behind a test's back. A `Device` is one home in it: it can be started, closed,
crashed (nothing is finished, as kill -9 does it) and lose its power (what no fsync covered is gone too).
`View` talks to its filesystem by path, as a small program would.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import stat
import tempfile
import threading
from pathlib import Path

import trio
from trio.testing import MockClock

from meshkitfs.daemon import opening
from meshkitfs.daemon.founding import initialize
from meshkitfs.daemon.home import Home
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ProviderSpec, _durable
from meshkitfs.shares import Terms
from meshkitfs.state import Spool
from meshkitfs.vfs import ControlFiles, MeshFilesystem
from meshkitfs.vfs.types import ROOT_INO, SetAttr

PATIENCE_S = 60.0
_MEMORY = "/dev/shm"


def scratch():
    """A new directory for many short lives of homes, in memory where possible. Remove it after use."""
    return tempfile.mkdtemp(prefix="meshkit-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)


class _Complaints(logging.Handler):
    """Collects what the product logs as a defect; a test that ends with one has failed."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        self.lines.append(self.format(record))


class World:
    """A trio loop in a thread, with a clock that only `pass_time` moves.

    With ``rate`` 1.0 it goes by itself too, for what talks to a server.
    """

    def __init__(self, rate=0.0):
        self.patience_s = PATIENCE_S  # for one piece of work in the loop
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="world", daemon=True)
        self._failure = None
        self._complaints = _Complaints()
        logging.getLogger("meshkitfs").addHandler(self._complaints)
        self.clock = MockClock(rate=rate)
        self._thread.start()
        assert self._started.wait(PATIENCE_S)

    def _run(self):
        async def main():
            # The product takes 0.0 for "never"; a real clock does not start there.
            self.clock.jump(1000.0)
            self._token = trio.lowlevel.current_trio_token()
            self._end = trio.Event()
            async with trio.open_nursery() as self.nursery:
                self._started.set()
                await self._end.wait()
                self.nursery.cancel_scope.cancel()

        try:
            trio.run(main, clock=self.clock)
        except BaseException as error:
            self._failure = error
            self._started.set()

    @property
    def well(self):
        """Whether the loop still runs and the product logged no defect."""
        return self._failure is None and not self._complaints.lines

    def run(self, work, *args):
        """Run an async function in the loop and return its result; one that never ends is a failure."""
        answer = queue.SimpleQueue()

        async def job():
            try:
                answer.put((await work(*args), None))
            except Exception as error:
                answer.put((None, error))

        self._token.run_sync_soon(self.nursery.start_soon, job)
        try:
            result, error = answer.get(timeout=self.patience_s)
        except queue.Empty:
            raise AssertionError(f"{work!r} did not end in {self.patience_s} s") from None
        if error is not None:
            raise error
        return result

    def start(self, work, *args):
        """Start an async function in the background; returns its `Task`."""
        task = Task(self)

        async def body():
            try:
                task.result = await work(*args)
            except Exception as error:
                task.error = error
            finally:
                task.done.set()

        async def spawn():
            task.done = trio.Event()
            self.nursery.start_soon(body)

        self.run(spawn)
        return task

    def pass_time(self, seconds):
        """Let the loop's clock jump, and whatever became due begin."""

        async def jump():
            self.clock.jump(seconds)
            for _ in range(5):
                await trio.lowlevel.checkpoint()

        self.run(jump)

    def close(self):
        """End the loop; raises if it had failed or the product logged a defect."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._end.set)
        self._thread.join(PATIENCE_S)
        logging.getLogger("meshkitfs").removeHandler(self._complaints)
        assert not self._thread.is_alive(), "the loop does not end"
        if self._failure is not None:
            raise self._failure
        assert not self._complaints.lines, "\n".join(self._complaints.lines)

    def expect_complaints(self):
        """The test provokes defects on purpose: return those logged so far, and forget them."""
        lines, self._complaints.lines = self._complaints.lines, []
        return lines

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Task:
    """Something started with `World.start`."""

    def __init__(self, world):
        self._world = world
        self.result = None
        self.error = None
        self.done = None

    def wait(self):
        """Return its result, or raise what it raised."""
        self._world.run(self.done.wait)
        if self.error is not None:
            raise self.error
        return self.result


# -- one home --------------------------------------------------------------------------------------

_crashed: set[int] = set()
_orderly_close = opening._close


async def _close_unless_crashed(session):
    if id(session) not in _crashed:
        await _orderly_close(session)


# Nothing but a crash skips the orderly end, and only of the session that crashed.
opening._close = _close_unless_crashed


class Device:
    """One home with its session and filesystem."""

    def __init__(self, world, root, name, beside=None, provider=None, metadata=None):
        self.world = world
        self.root = Path(root)
        self.name = name
        self.blocks = beside.blocks if beside else self.root / "blocks"
        self.metadata = metadata or (beside.metadata if beside else self.root / "metadata.db")
        self.home = Home(self.root)
        self.session = None
        self.fs = None
        self._scope = None
        with self.home.hold():
            world.run(
                initialize,
                self.home,
                name,
                provider or ProviderSpec.local(self.blocks),
                str(self.metadata),
                "plain-file",
                None,
                True,
            )

    def start(self, prepare=None):
        """Open the home; ``prepare(session)`` may put faults in before anything else happens."""
        assert self.session is None
        ended = []

        async def live(task_status):
            self._scope, self._end, self._ended = trio.CancelScope(), trio.Event(), trio.Event()
            ended.append(self._ended)
            try:
                with self._scope:
                    async with opening.open_session(self.home, None) as session:
                        self.session = session
                        if prepare is not None:
                            prepare(session)
                        task_status.started()
                        await self._end.wait()
            finally:
                ended[0].set()

        self.world.run(self.world.nursery.start, live)
        session = self.session
        self.fs = MeshFilesystem(session.book, ControlFiles({}), session.runtime)
        session.listeners.append(self.fs.on_event)
        return self

    def close(self):
        """End the session in order: what waits is published, as far as that is possible."""

        async def end():
            self._end.set()
            await self._ended.wait()

        self.world.run(end)
        self.session = self.fs = None

    def crash(self):
        """End the session like kill -9: nothing more is written, published or tidied up."""

        async def end():
            _crashed.add(id(self.session))
            try:
                self._scope.cancel()
                await self._ended.wait()
            finally:
                _crashed.discard(id(self.session))

        self.world.run(end)
        self.session = self.fs = None

    def share(self, name="first"):
        return self.session.book.find(name)

    def create_share(self, name="first"):
        return self.world.run(self.session.book.create, name.encode())

    def flush(self, name="first"):
        """What fsync does: returns when everything is published. Raises what keeps it from that."""
        self.world.run(self.share(name).flush)

    def refresh(self, name="first"):
        """Look for what others published, as the watcher of a running daemon does twice a second."""
        self.world.run(self.share(name).refresh)

    def grant(self, share, other):
        """Share with ``other`` (started too) to write, who accepts under the same name."""
        self.grant_again(share, other, "read", "write")
        self.world.run(other.session.book.inbox.accept, share, share.encode())

    def grant_again(self, share, other, *rights):
        """Replace what ``other`` was granted."""
        self.world.run(self.session.book.add, self.share(share), other.name, Terms(rights))

    def view(self, share="first"):
        return View(self, share)


# -- a small program ---------------------------------------------------------------------------------


class View:
    """Files by path in one share of a device; raises OSError as a program would see it.

    It keeps what it looked up, as the kernel does, until `forget_all`.
    """

    def __init__(self, device, share):
        self.device = device
        self.share = share
        self.refs: dict[int, int] = {}

    def _run(self, method, *args):
        try:
            return self.device.world.run(method, *args)
        except MeshkitError as error:
            raise Refused(error) from error

    @property
    def fs(self):
        return self.device.fs

    def attr(self, path):
        """lstat: walks from the root, one lookup for each name."""
        attr = self._run(self.fs.lookup, ROOT_INO, self.share.encode())
        for name in _parts(path):
            attr = self._run(self.fs.lookup, attr.ino, name)
            if not attr.ino:
                raise OSError(errno.ENOENT, path)
            self._count(attr)
        return attr

    def _count(self, attr):
        self.refs[attr.ino] = self.refs.get(attr.ino, 0) + 1

    def _place(self, path):
        """The inode of the directory that ``path`` is in, and its last name."""
        *above, name = _parts(path)
        return self.attr("/".join(os.fsdecode(part) for part in above)).ino, name

    def forget_all(self):
        """What memory pressure does: the kernel lets go of every inode."""

        async def forget():
            refs, self.refs = self.refs, {}
            for ino, count in refs.items():
                self.fs.forget(ino, count)

        self._run(forget)

    # -- files

    def create(self, path, mode=0o644, flags=os.O_RDWR):
        """Make a new file; one that is there already is an error."""
        parent, name = self._place(path)
        opened, attr = self._run(self.fs.create, parent, name, mode, flags | os.O_CREAT | os.O_EXCL)
        self._count(attr)
        return opened.fh

    def open(self, path, flags=os.O_RDWR):
        return self._run(self.fs.open, self.attr(path).ino, flags).fh

    def pwrite(self, fh, offset, data):
        assert self._run(self.fs.write, fh, offset, data) == len(data)

    def pread(self, fh, offset, size):
        async def read():
            return bytes(await self.fs.read(fh, offset, size))

        return self._run(read)

    def fsync(self, fh):
        self._run(self.fs.fsync, fh, False)

    def release(self, fh):
        async def close():
            await self.fs.flush(fh)
            await self.fs.release(fh)

        self._run(close)

    def write(self, path, data):
        """Like a shell's ``>``: truncate or create, write, close."""
        try:
            fh = self.open(path, os.O_WRONLY | os.O_TRUNC)
        except FileNotFoundError:
            fh = self.create(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            fh = self.create(path)
        try:
            for at in range(0, len(data), 1 << 17):
                self.pwrite(fh, at, data[at : at + (1 << 17)])
        finally:
            self.release(fh)

    def append(self, path, data):
        fh = self.open(path, os.O_WRONLY | os.O_APPEND)
        self.pwrite(fh, self.attr(path).size, data)
        self.release(fh)

    def read(self, path):
        fh = self.open(path, os.O_RDONLY)
        try:
            return self.pread(fh, 0, 1 << 24)
        finally:
            self.release(fh)

    def setattr(self, path, **changes):
        return self._run(self.fs.setattr, self.attr(path).ino, SetAttr(**changes), None)

    def truncate(self, path, size):
        return self.setattr(path, size=size)

    # -- names

    def mkdir(self, path, mode=0o755):
        self._count(self._run(self.fs.mkdir, *self._place(path), mode))

    def symlink(self, path, target):
        self._count(self._run(self.fs.symlink, *self._place(path), target))

    def link(self, old, new):
        self._count(self._run(self.fs.link, self.attr(old).ino, *self._place(new)))

    def unlink(self, path):
        self._run(self.fs.unlink, *self._place(path))

    def rmdir(self, path):
        self._run(self.fs.rmdir, *self._place(path))

    def rename(self, old, new, flags=0):
        self._run(self.fs.rename, *self._place(old), *self._place(new), flags)

    def listdir(self, path=""):
        return sorted(os.fsdecode(name) for name, _ in self.scan(path))

    def scan(self, path=""):
        """(name, attributes) of a directory, as one opendir and readdir give them."""
        return self._scan(self.attr(path).ino)

    def _scan(self, ino):
        async def scan():
            fh = await self.fs.opendir(ino)
            try:
                listed = [(name, attr) for name, attr, _ in self.fs.readdir(fh, 0)]
            finally:
                await self.fs.releasedir(fh)
            assert [name for name, _ in listed[:2]] == [b".", b".."]
            return listed[2:]

        return self._run(scan)

    # -- extended attributes

    def setxattr(self, path, name, value):
        self._run(self.fs.setxattr, self.attr(path).ino, name, value)

    def removexattr(self, path, name):
        self._run(self.fs.removexattr, self.attr(path).ino, name)

    def xattrs(self, path):
        return self._xattrs(self.attr(path).ino)

    def _xattrs(self, ino):
        async def collect():
            names = [n for n in await self.fs.listxattr(ino) if not n.startswith(b"user.meshkit.")]
            return {name: await self.fs.getxattr(ino, name) for name in names}

        return self._run(collect)

    def walk(self):
        """Every path with what a program can find out about it: path -> `Seen`. Looks at each twice."""
        found: dict[str, Seen] = {}

        def visit(path, ino):
            for raw, listed in self._scan(ino):
                name = os.fsdecode(raw)
                below = f"{path}/{name}" if path else name
                attr = self._run(self.fs.lookup, ino, raw)
                self._count(attr)
                # A listing and a direct look are different code; they must agree.
                assert (attr.ino, attr.mode, attr.size) == (listed.ino, listed.mode, listed.size), below
                data = None
                if stat.S_ISREG(attr.mode):
                    fh = self._run(self.fs.open, attr.ino, os.O_RDONLY).fh
                    data = self.pread(fh, 0, 1 << 24)
                    self.release(fh)
                    assert len(data) == attr.size, below
                elif stat.S_ISLNK(attr.mode):
                    data = self._run(self.fs.readlink, attr.ino)
                found[below] = Seen(
                    attr.ino,
                    attr.mode,
                    attr.nlink,
                    data,
                    attr.mtime_ns,
                    tuple(sorted(self._xattrs(attr.ino).items())),
                )
                if stat.S_ISDIR(attr.mode):
                    visit(below, attr.ino)

        visit("", self.attr("").ino)
        return found

    def contents(self):
        """path -> bytes of a file, target of a symlink, None for a directory."""
        return {path: seen.data for path, seen in self.walk().items()}

    def remove_tree(self, path):
        """rm -r"""
        for name in self.listdir(path):
            below = f"{path}/{name}"
            if stat.S_ISDIR(self.attr(below).mode):
                self.remove_tree(below)
            else:
                self.unlink(below)
        self.rmdir(path)


class Refused(OSError):
    """A refusal or fault of ours, as the adapter shows it: an errno, and the code behind it."""

    def __init__(self, error):
        super().__init__(error.errno, str(error))
        self.code = error.code


class Seen(tuple):
    """What one path is: inode, mode, link count, content, mtime, extended attributes."""

    __slots__ = ()
    ino = property(lambda self: self[0])
    mode = property(lambda self: self[1])
    nlink = property(lambda self: self[2])
    data = property(lambda self: self[3])
    mtime_ns = property(lambda self: self[4])
    xattrs = property(lambda self: self[5])

    def __new__(cls, *values):
        return tuple.__new__(cls, values)

    def __repr__(self):
        data = self.data
        shown = data if data is None or len(data) < 40 else f"{len(data)} bytes {data[:16]!r}…"
        return f"<{oct(self.mode)} nlink={self.nlink} {shown!r} mtime={self.mtime_ns} x={self.xattrs}>"


def _parts(path):
    return [os.fsencode(part) for part in path.split("/") if part]


def pattern(seed, size):
    """``size`` bytes that depend on ``seed`` and on their place, so that swapped blocks show."""
    unit = b"".join(b"%04x:%08x;" % (seed & 0xFFFF, at) for at in range(0, size, 14))
    return unit[:size]


# -- power loss ----------------------------------------------------------------------------------------


class Disk:
    """Knows what an fsync has covered below some directories, and takes the rest away.

    Files are covered by fsync of the file (its bytes) and of its directory (its name); syncfs covers all
    that was there when it began. SQLite does its own and is trusted.
    """

    def __init__(self, monkeypatch, *roots):
        self._roots = [Path(root) for root in roots]
        self._names: set[str] = set()
        self._bytes: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self.cover_everything()
        real_fsync, real_syncfs, real_all = os.fsync, Spool._syncfs, _durable.sync_filesystem

        def fsync(fd):
            target = os.readlink(f"/proc/self/fd/{fd}")
            status = os.fstat(fd)
            listed = (
                [f"{target}/{name}" for name in os.listdir(target)] if stat.S_ISDIR(status.st_mode) else []
            )
            real_fsync(fd)
            with self._lock:
                self._bytes.add((status.st_dev, status.st_ino))
                self._names.update(listed)

        def everything(call):
            def wrapped(*args):
                before = self._present()
                call(*args)
                self._cover(before)

            return wrapped

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Spool, "_syncfs", everything(real_syncfs))
        monkeypatch.setattr(_durable, "sync_filesystem", everything(real_all))

    def _present(self):
        found = []
        for root in self._roots:
            for directory, _, files in os.walk(root):
                for path in [directory, *(f"{directory}/{name}" for name in files)]:
                    with contextlib.suppress(FileNotFoundError):
                        status = os.lstat(path)
                        found.append((path, (status.st_dev, status.st_ino)))
        return found

    def _cover(self, present):
        with self._lock:
            for path, inode in present:
                self._names.add(path)
                self._bytes.add(inode)

    def cover_everything(self):
        """All that is there now counts as old."""
        self._cover(self._present())

    def lose_power(self):
        """Take away what nothing covered: names vanish, bytes turn to nothing. Returns how many files."""
        lost = 0
        for path, inode in self._present():
            if os.path.isdir(path):
                continue
            if path not in self._names:
                os.unlink(path)
                lost += 1
            elif inode not in self._bytes:
                os.truncate(path, 0)
                lost += 1
        self.cover_everything()
        return lost
