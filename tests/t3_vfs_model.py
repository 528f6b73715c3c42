"""The filesystem against a plain model: random operations, and then restarts, crashes and evictions.

Everything below FUSE is real: session, gate, sealing, spool, state database, byte store. The model is a few
dictionaries. The loop's clock stands still, so commits happen only where the test says: after a crash the
tree must be exactly one that the model went through, and not older than the last fsync.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import stat
import time

import pytest
from devices import Device, View, World, pattern, scratch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

DIR, FILE, LINK = "dir", "file", "symlink"
KIB = 1024
# Around everything that changes how a file is kept: inline up to 16 KiB, one buffer up to 256 KiB, blocks
# of 64 or of 256 KiB.
EDGES = (0, 1, 2, 100, 4096, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 320 * KIB, 512 * KIB, 600 * KIB)
sizes = st.one_of(
    st.sampled_from(EDGES),
    st.tuples(st.sampled_from(EDGES[5:]), st.sampled_from((-1, 1))).map(sum),
    st.integers(0, 600 * KIB),
)
lengths = st.one_of(
    st.sampled_from((1, 10, 4096, 16 * KIB, 16 * KIB + 1, 64 * KIB, 128 * KIB, 256 * KIB + 7)),
    st.integers(1, 300 * KIB),
)
seeds = st.integers(0, 0xFFFF)
names = st.sampled_from(("a", "b", "c", "d", "Ünï", "x" * 255))
picks = st.integers(0, 1 << 16)


class Inode:
    """A file, directory or symlink of the model. ``data`` is bytes, the target, or a dict of names."""

    def __init__(self, kind, mode, data):
        self.kind = kind
        self.mode = mode
        self.data = data
        self.xattrs = {}
        self.nlink = 1
        self.mtime_ns = None

    def seen(self):
        kind = {DIR: stat.S_IFDIR, FILE: stat.S_IFREG, LINK: stat.S_IFLNK}[self.kind]
        nlink, data = self.nlink, self.data
        if self.kind == DIR:
            nlink = 2 + sum(child.kind == DIR for child in self.data.values())
            data = None
        return (kind | self.mode, nlink, data, self.mtime_ns, tuple(sorted(self.xattrs.items())))


class Handle:
    def __init__(self, fh, inode, append):
        self.fh, self.inode, self.append = fh, inode, append


def tree_of(root):
    """path -> what `View.walk` should see there, and which paths are the same object."""
    found, same = {}, {}

    def visit(path, inode):
        for name, child in inode.data.items():
            below = f"{path}/{name}" if path else name
            found[below] = child.seen()
            same.setdefault(id(child), set()).add(below)
            if child.kind == DIR:
                visit(below, child)

    visit("", root)
    return found, sorted(map(sorted, same.values()))


def shortened(value):
    """``value`` with long contents cut, for a message."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(shortened, value))
    return f"{len(value)} bytes {value[:20]}…" if isinstance(value, bytes) and len(value) > 40 else value


class Model(RuleBasedStateMachine):
    """Which rules may run next must not depend on what a crash left: that differs from run to run."""

    def __init__(self):
        super().__init__()
        self.place = scratch()
        self.world = World()
        self.device = Device(self.world, f"{self.place}/alice", "alice")
        self.device.start()
        self.device.create_share("first")
        self.view = View(self.device, "first")
        self.root = Inode(DIR, 0o700, {})
        self.handles = []
        self.background = None
        # Since the last start: ending a session that did nothing tests nothing.
        self.steps = 0
        # What a crash may leave: the tree of the last completed flush, and any since a flush began.
        self.possible = [tree_of(self.root)]

    def teardown(self):
        try:
            if self.device.session is not None:
                try:
                    self.finish_background()
                    self.same_tree()
                except BaseException:
                    self.device.crash()
                    raise
                self.device.close()
        finally:
            try:
                self.world.close()
            finally:
                shutil.rmtree(self.place, ignore_errors=True)

    # -- choosing ------------------------------------------------------------------------------------

    def paths(self, *kinds):
        found = []

        def visit(path, inode):
            for name, child in sorted(inode.data.items()):
                below = f"{path}/{name}" if path else name
                if child.kind in kinds:
                    found.append((below, inode, name, child))
                if child.kind == DIR:
                    visit(below, child)

        visit("", self.root)
        return found

    def pick(self, number, *kinds):
        """(path, directory, name, inode) of one existing object, or None."""
        found = self.paths(*kinds)
        return found[number % len(found)] if found else None

    def pick_directory(self, number):
        found = [("", self.root), *((path, inode) for path, _, _, inode in self.paths(DIR))]
        return found[number % len(found)]

    def pick_handle(self, number):
        return self.handles[number % len(self.handles)] if self.handles else None

    @staticmethod
    def join(path, name):
        return f"{path}/{name}" if path else name

    def fails(self, number, call, *args):
        with pytest.raises(OSError) as caught:
            call(*args)
        assert caught.value.errno == number, f"{errno.errorcode.get(caught.value.errno)}: {caught.value}"

    def stamp(self, path, inode):
        """Learn the mtime that an operation gave; from now on it must stay."""
        inode.mtime_ns = self.view.attr(path).mtime_ns
        assert 0 <= time.time_ns() - inode.mtime_ns < 60 * 10**9, "it was changed just now"

    def stamp_above(self, *paths):
        for path in paths:
            if path:
                inode = self.root
                for part in path.split("/"):
                    inode = inode.data[part]
                inode.mtime_ns = self.view.attr(path).mtime_ns

    def changed(self):
        if self.background is not None:
            # Its freeze may not have happened yet.
            self.possible.append(tree_of(self.root))

    # -- files ---------------------------------------------------------------------------------------

    @rule(where=picks, name=names, mode=st.sampled_from((0o600, 0o644, 0o755)), append=st.booleans())
    def create(self, where, name, mode, append):
        path, directory = self.pick_directory(where)
        full = self.join(path, name)
        if name in directory.data:
            self.fails(errno.EEXIST, self.view.create, full)
            return
        fh = self.view.create(full, mode, os.O_RDWR | (os.O_APPEND if append else 0))
        inode = directory.data[name] = Inode(FILE, mode, b"")
        self.handles.append(Handle(fh, inode, append))
        self.stamp(full, inode)
        self.stamp_above(path)
        self.changed()

    @rule(which=picks, append=st.booleans(), truncate=st.booleans())
    def open(self, which, append, truncate):
        found = self.pick(which, FILE)
        if found is None or len(self.handles) > 8:
            return
        path, _, _, inode = found
        flags = os.O_RDWR | (os.O_APPEND if append else 0) | (os.O_TRUNC if truncate else 0)
        self.handles.append(Handle(self.view.open(path, flags), inode, append))
        if truncate:
            inode.data = b""
            inode.mode &= ~0o6000
            self.stamp(path, inode)
            self.changed()

    @rule(which=picks, offset=sizes, length=lengths, seed=seeds)
    def write(self, which, offset, length, seed):
        handle = self.pick_handle(which)
        if handle is None:
            return
        data = pattern(seed, length)
        inode = handle.inode
        if handle.append:
            offset = len(inode.data)
        if offset + length > 1 << 20:
            return
        for at in range(0, length, 1 << 17):  # the kernel's largest request
            piece = data[at : at + (1 << 17)]
            self.view.pwrite(handle.fh, offset + at, piece)
        inode.data = inode.data[:offset].ljust(offset, b"\0") + data + inode.data[offset + length :]
        inode.mode &= ~0o6000
        self.learn(inode)
        self.changed()

    def learn(self, inode):
        """Take over the mtime of a file that was changed through a handle, if it still has a name."""
        for path, _, _, found in self.paths(FILE):
            if found is inode:
                self.stamp(path, inode)
                return

    @rule(which=picks, name=names, length=lengths, seed=seeds)
    def save(self, which, name, length, seed):
        """A file with content, in one step, so that histories get somewhere."""
        self.finish_background()  # it could see the file half written
        path, directory = self.pick_directory(which)
        full = self.join(path, name)
        inode = directory.data.get(name)
        if inode is not None and inode.kind != FILE:
            return
        data = pattern(seed, length)
        self.view.write(full, data)
        if inode is None:
            inode = directory.data[name] = Inode(FILE, 0o644, b"")
            self.stamp_above(path)
        inode.data = data
        inode.mode &= ~0o6000
        self.stamp(full, inode)

    @rule(which=picks, offset=sizes, length=lengths)
    def read(self, which, offset, length):
        handle = self.pick_handle(which)
        if handle is not None:
            got = self.view.pread(handle.fh, offset, length)
            assert got == handle.inode.data[offset : offset + length]

    @rule(which=picks, size=sizes)
    def truncate(self, which, size):
        found = self.pick(which, FILE)
        if found is None:
            return
        path, _, _, inode = found
        attr = self.view.truncate(path, size)
        assert attr.size == size
        inode.data = inode.data[:size].ljust(size, b"\0")
        inode.mode &= ~0o6000
        self.stamp(path, inode)
        self.changed()

    @rule(which=picks, seed=seeds, length=lengths)
    def append(self, which, seed, length):
        found = self.pick(which, FILE)
        if found is None or len(found[3].data) + length > 1 << 20:
            return
        path, _, _, inode = found
        data = pattern(seed, min(length, 1 << 17))
        self.view.append(path, data)
        inode.data += data
        inode.mode &= ~0o6000
        self.stamp(path, inode)
        self.changed()

    @rule(which=picks)
    def release(self, which):
        handle = self.pick_handle(which)
        if handle is not None:
            self.handles.remove(handle)
            self.view.release(handle.fh)

    # -- names ---------------------------------------------------------------------------------------

    @rule(where=picks, name=names)
    def mkdir(self, where, name):
        path, directory = self.pick_directory(where)
        if path.count("/") > 3:
            return
        full = self.join(path, name)
        if name in directory.data:
            self.fails(errno.EEXIST, self.view.mkdir, full)
            return
        self.view.mkdir(full)
        inode = directory.data[name] = Inode(DIR, 0o755, {})
        self.stamp(full, inode)
        self.stamp_above(path)
        self.changed()

    @rule(where=picks, count=st.sampled_from((3, 70, 300)), seed=seeds)
    def fill(self, where, count, seed):
        """Many small files at once, so that a directory needs pages."""
        self.finish_background()  # in between there are many trees
        path, directory = self.pick_directory(where)
        if len(self.paths(FILE)) > 1000:
            return
        made = []
        for i in range(count):
            name = f"n{seed:04x}-{i:03}"
            if name in directory.data:
                continue
            self.view.release(self.view.create(self.join(path, name)))
            made.append((name, Inode(FILE, 0o644, b"")))
        for name, attr in self.view.scan(path):
            for mine, inode in made:
                if mine == os.fsdecode(name):
                    inode.mtime_ns = attr.mtime_ns
        for name, inode in made:
            directory.data[name] = inode
        self.stamp_above(path)

    @rule(where=picks, name=names, points_to=st.text("abc/.", min_size=1, max_size=300).map(str.encode))
    def symlink(self, where, name, points_to):
        path, directory = self.pick_directory(where)
        full = self.join(path, name)
        if name in directory.data:
            self.fails(errno.EEXIST, self.view.symlink, full, points_to)
            return
        self.view.symlink(full, points_to)
        inode = directory.data[name] = Inode(LINK, 0o777, points_to)
        self.stamp(full, inode)
        self.stamp_above(path)
        self.changed()

    @rule(which=picks, where=picks, name=names)
    def link(self, which, where, name):
        found = self.pick(which, FILE, LINK, DIR)
        if found is None:
            return
        old, _, _, inode = found
        path, directory = self.pick_directory(where)
        full = self.join(path, name)
        if inode.kind == DIR:
            self.fails(errno.EPERM, self.view.link, old, full)
            return
        if name in directory.data:
            self.fails(errno.EEXIST, self.view.link, old, full)
            return
        self.view.link(old, full)
        directory.data[name] = inode
        inode.nlink += 1
        self.stamp_above(path)
        self.changed()

    @rule(which=picks)
    def unlink(self, which):
        found = self.pick(which, FILE, LINK, DIR)
        if found is None:
            return
        path, directory, name, inode = found
        if inode.kind == DIR:
            self.fails(errno.EISDIR, self.view.unlink, path)
            return
        self.view.unlink(path)
        del directory.data[name]
        inode.nlink -= 1
        self.stamp_above(path.rpartition("/")[0])
        self.changed()

    @rule(which=picks)
    def rmdir(self, which):
        found = self.pick(which, DIR, DIR, FILE)
        if found is None:
            return
        path, directory, name, inode = found
        if inode.kind != DIR:
            self.fails(errno.ENOTDIR, self.view.rmdir, path)
        elif inode.data:
            self.fails(errno.ENOTEMPTY, self.view.rmdir, path)
        else:
            self.view.rmdir(path)
            del directory.data[name]
            self.stamp_above(path.rpartition("/")[0])
            self.changed()

    @rule(which=picks, where=picks, name=names, flags=st.sampled_from((0, 0, 0, 1, 2)))
    def rename(self, which, where, name, flags):
        found = self.pick(which, FILE, DIR, LINK)
        if found is None:
            return
        old, source, old_name, inode = found
        path, directory = self.pick_directory(where)
        full = self.join(path, name)
        target = directory.data.get(name)
        number = self.rename_error(old, full, inode, target, flags)
        if number:
            self.fails(number, self.view.rename, old, full, flags)
            return
        self.view.rename(old, full, flags)
        if target is inode:
            return
        if flags == 2:
            source.data[old_name], directory.data[name] = target, inode
        else:
            del source.data[old_name]
            if target is not None:
                target.nlink -= 1
            directory.data[name] = inode
        self.stamp_above(*self.still_there(source, directory))
        self.changed()

    def still_there(self, *inodes):
        return [path for path, _, _, inode in self.paths(DIR) if any(inode is one for one in inodes)]

    @staticmethod
    def rename_error(old, full, inode, target, flags):
        """The errno that Linux gives, or 0."""
        below = full == old or full.startswith(old + "/")
        if flags == 2:
            if target is None:
                return errno.ENOENT
            if inode is target:
                return 0
            if (inode.kind == DIR and below) or (target.kind == DIR and old.startswith(full + "/")):
                return errno.EINVAL
            return 0
        if flags == 1 and target is not None:
            return errno.EEXIST
        if inode is target:
            return 0
        if inode.kind == DIR and below:
            return errno.EINVAL
        if target is None:
            return 0
        if inode.kind == DIR:
            if target.kind != DIR:
                return errno.ENOTDIR
            return errno.ENOTEMPTY if target.data else 0
        return errno.EISDIR if target.kind == DIR else 0

    # -- attributes ----------------------------------------------------------------------------------

    @rule(which=picks, mode=st.sampled_from((0o400, 0o640, 0o777, 0o4755)))
    def chmod(self, which, mode):
        found = self.pick(which, FILE, DIR)
        if found is not None:
            self.view.setattr(found[0], mode=mode)
            found[3].mode = mode
            self.changed()

    @rule(which=picks, when=st.integers(-(10**18), 4 * 10**18))
    def utimens(self, which, when):
        found = self.pick(which, FILE, DIR, LINK)
        if found is not None:
            self.view.setattr(found[0], mtime_ns=when, atime_ns=when)
            found[3].mtime_ns = when
            self.changed()

    @rule(
        which=picks,
        name=st.sampled_from((b"user.a", b"user.b")),
        size=st.sampled_from((0, 1, 100, 4000)),
        seed=seeds,
    )
    def setxattr(self, which, name, size, seed):
        found = self.pick(which, FILE, DIR)
        if found is not None:
            self.view.setxattr(found[0], name, pattern(seed, size))
            found[3].xattrs[name] = pattern(seed, size)
            self.changed()

    @rule(which=picks, name=st.sampled_from((b"user.a", b"user.b")))
    def removexattr(self, which, name):
        found = self.pick(which, FILE, DIR)
        if found is None:
            return
        if name not in found[3].xattrs:
            self.fails(errno.ENODATA, self.view.removexattr, found[0], name)
            return
        self.view.removexattr(found[0], name)
        del found[3].xattrs[name]
        self.changed()

    # -- commits, and the end of everything ------------------------------------------------------------

    @rule(which=picks)
    def fsync(self, which):
        handle = self.pick_handle(which)
        if handle is not None:
            self.view.fsync(handle.fh)
            self.settled()

    @rule()
    def flush(self):
        self.device.flush()
        self.settled()

    def settled(self):
        """What is acknowledged now must survive everything."""
        self.possible = [tree_of(self.root)]

    @precondition(lambda self: self.background is None)
    @rule()
    def start_flush(self):
        """A commit that runs while the following operations change things."""
        self.possible.append(tree_of(self.root))
        self.background = self.world.start(self.device.share().flush)

    @precondition(lambda self: self.background is not None)
    @rule()
    def finish_background(self):
        if self.background is not None:
            task, self.background = self.background, None
            task.wait()
            # It shows some moment since it began, and at least the first one.
            self.possible = [*self.possible[1:], tree_of(self.root)]

    @rule(seconds=st.sampled_from((0.06, 1.0, 6.0)))
    def time_passes(self, seconds):
        """The committer in the background does its work."""
        self.finish_background()
        self.world.pass_time(seconds)
        self.device.flush()
        self.settled()

    @rule()
    def forget(self):
        self.view.forget_all()

    @rule()
    def same_tree(self):
        found = self.view.walk()
        self.compare(found, [tree_of(self.root)])

    @staticmethod
    def compare(found, possible):
        got = {path: seen[1:] for path, seen in found.items()}
        inodes = {}
        for path, seen in found.items():
            inodes.setdefault(seen.ino, []).append(path)
        same = sorted(map(sorted, inodes.values()))
        if any(got == expected and same == links for expected, links in possible):
            return
        expected, links = possible[-1]
        different = {
            path: (got.get(path), expected.get(path))
            for path in sorted({*got, *expected})
            if got.get(path) != expected.get(path)
        }
        assert not different, (
            f"{len(possible)} trees were possible; (found, expected): {shortened(different)}"
        )
        assert same == links

    @precondition(lambda self: self.steps > 7)
    @rule()
    def restart(self):
        """An orderly end publishes everything; what was open is simply gone."""
        self.finish_background()
        self.device.close()
        self.reopen()
        self.compare(self.view.walk(), [tree_of(self.root)])
        self.settled()

    @precondition(lambda self: self.steps > 7)
    @rule()
    def crash(self):
        self.device.crash()
        self.background = None
        self.reopen()
        found = self.view.walk()
        self.compare(found, self.possible)
        self.root = self.root_of(found)
        self.possible = [tree_of(self.root)]

    def reopen(self):
        # The model holds objects by their names only, so what had none is gone with its last handle.
        self.handles.clear()
        self.steps = 0
        self.device.start()
        self.view = View(self.device, "first")

    @staticmethod
    def root_of(found):
        """The model of a tree that was found."""
        root = Inode(DIR, 0o700, {})
        objects = {}
        for path, seen in sorted(found.items()):
            kind = {stat.S_IFDIR: DIR, stat.S_IFREG: FILE, stat.S_IFLNK: LINK}[stat.S_IFMT(seen.mode)]
            inode = objects.get(seen.ino)
            if inode is None:
                inode = Inode(kind, stat.S_IMODE(seen.mode), {} if kind == DIR else copy.copy(seen.data))
                inode.nlink, inode.mtime_ns, inode.xattrs = seen.nlink, seen.mtime_ns, dict(seen.xattrs)
                objects[seen.ino] = inode
            at = root
            *above, name = path.split("/")
            for part in above:
                at = at.data[part]
            at.data[name] = inode
        return root

    @invariant()
    def world_is_well(self):
        assert self.world.well
        self.steps += 1


BASE = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def test_short_histories():
    run_state_machine_as_test(Model, settings=settings(BASE, max_examples=25, stateful_step_count=40))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_long_histories():
    run_state_machine_as_test(Model, settings=settings(BASE, max_examples=400, stateful_step_count=120))
