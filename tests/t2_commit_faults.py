"""A commit that fails, or dies, at every single step: what is acknowledged is there, what is not is tried again.

The steps of a flush are found by watching one: every call of the spool, the state database, the byte store
and the metadata store that it makes. Then each of them fails in turn, before or after it did its work, by an
error or by the end of the process together with a power failure that takes everything no fsync has covered.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import threading

import pytest
import trio
from devices import Device, Disk, World, pattern, scratch

from meshkitfs.core.blocks import SealedBlock
from meshkitfs.core.cid import digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.shares._publishing import UPLOAD_TRIES
from meshkitfs.state import LocalCommit, Mark, Spool, State

KIB = 1024
# The calls that a commit and its publication consist of, by where they are, with the error each may end in.
STEPS = {
    "spool.write": "no_space",
    "spool.sync": "state_corrupt",
    "state.record_commit": "no_space",
    "state.staged": "state_corrupt",
    "store.put_files": "provider_request_failed",
    "store.sync": "no_space",
    "metadata.publish": "metadata_unavailable",
    "state.published": "no_space",
    # Never fails as a call: what cannot be removed stays until the next start.
    "spool.discard": None,
}


class Faults:
    """Wraps the steps of one session. ``calls`` lists them; ``arm`` makes one of them fail."""

    def __init__(self):
        self.calls = []
        self.dead = False
        self._armed = None
        self._lock = threading.Lock()

    def install(self, session):
        services = session.services
        places = {
            "spool": services.spool,
            "state": services.state,
            "store": services.reader.store,
            "metadata": services.metadata,
        }
        for step in STEPS:
            place, method = step.split(".")
            self._wrap(places[place], method, step)
        return self

    def _wrap(self, owner, method, step):
        real = getattr(owner, method)
        if method in ("put_files", "sync", "publish") and not isinstance(owner, Spool):

            @functools.wraps(real)
            async def wrapped(*args):
                fault = self._before(step)
                result = await real(*args)
                self._after(fault)
                return result
        else:

            @functools.wraps(real)
            def wrapped(*args):
                fault = self._before(step)
                result = None if fault == "skip" else real(*args)
                self._after(fault)
                return result

        setattr(owner, method, wrapped)

    def arm(self, step, number, code, *, late=False, death=False, times=1):
        """Let the ``number``-th call of ``step`` from now on fail; ``late``: after it did its work."""
        self._armed = {
            "step": step,
            "number": number,
            "code": code,
            "late": late,
            "death": death,
            "left": times,
        }

    def disarm(self):
        self._armed = None

    def _before(self, step):
        with self._lock:
            if self.dead and step == "spool.discard":
                return "skip"
            if self.dead:
                raise MeshkitError("state_corrupt", "this process is dead")
            self.calls.append(step)
            fault = self._armed
            if fault is None or fault["step"] != step:
                return None
            fault["number"] -= 1
            if fault["number"] >= 0 or not fault["left"]:
                return None
            fault["left"] -= 1
            if fault["late"]:
                return fault
        return self._strike(fault)

    def _after(self, fault):
        if fault not in (None, "skip"):
            self._strike(fault)

    def _strike(self, fault):
        self.dead = fault["death"]
        if fault["code"] is None:
            return "skip"
        raise MeshkitError(fault["code"], "injected")


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def device(world, place):
    device = Device(world, f"{place}/alice", "alice").start()
    device.create_share()
    yield device
    if device.session is not None:
        device.close()


def begin(device):
    """A published tree with something of every kind."""
    view = device.view()
    view.write("small", b"small")
    view.write("large", pattern(1, 300 * KIB))
    view.write("database", pattern(2, 200 * KIB))
    view.write("linked", b"two names")
    view.link("linked", "second")
    view.mkdir("many")
    for i in range(300):
        view.release(view.create(f"many/{i:03}"))
    device.flush()
    return view


def change(device):
    """Change it in every way, unpublished; returns an open, changed file (and what keeps it open)."""
    view = device.view()
    view.write("new", b"new")
    view.write("new large", pattern(3, 600 * KIB))
    view.write("small", b"small, and more")
    fh = view.open("database")
    view.pwrite(fh, 70 * KIB, b"in the middle")
    view.rename("large", "renamed")
    view.unlink("second")
    # In a page where nothing else changes, so that only the page itself says that it has to be written.
    view.unlink("many/007")
    view.write("many/250", b"two hundred and fifty")
    view.mkdir("directory")
    view.write("directory/inside", pattern(4, 20 * KIB))
    view.symlink("directory/link", b"../new")
    view.setxattr("new", b"user.tag", b"value")
    # Full blocks are sealed in threads: whether before or in the flush must not be left to chance.
    settle_threads(device)
    return view, fh


def settle_threads(device):
    """Let what is still under way in worker threads end."""

    async def idle():
        for share in device.session.book.shares.values():
            while share.tree is not None and share.tree.sealer._running:
                await trio.to_thread.run_sync(lambda: None)

    device.world.run(idle)


def tree(device):
    return device.view().walk()


def files_in(directory):
    return [os.path.join(at, name) for at, _, names in os.walk(directory) for name in names]


def nothing_left(device):
    """Everything is published: nothing is staged, and the spool has at most blocks of removed files in use."""
    assert not device.share().dirty
    assert device.session.state.unpublished() == set()
    assert device.session.state.staged(device.share().row.share) == []
    in_use = {digest.hex() for digest in device.share().tree.nameless_digests()}
    waiting = [path for path in files_in(device.home.cache_dir) if os.path.basename(path) not in in_use]
    assert waiting == [], f"{len(waiting)} blocks are left in the spool"


def only_from_the_provider(device, expected):
    """The same tree must come from the store alone."""
    device.close()
    for path in files_in(device.home.cache_dir):
        os.unlink(path)
    device.start()
    assert tree(device) == expected
    nothing_left(device)


def steps_of_a_flush(world, place):
    """(step, how many calls of it came before) for all that one flush does."""
    device = Device(world, f"{place}/watched", "watched")
    faults = Faults()
    device.start(faults.install)
    device.create_share()
    begin(device)
    view, fh = change(device)
    faults.calls.clear()
    device.flush()
    view.release(fh)
    calls = list(faults.calls)
    device.close()
    steps = [(step, calls[:i].count(step)) for i, step in enumerate(calls)]
    assert {step for step, _ in steps} == set(STEPS), "a step of the commit is not watched any more"
    # One of each in the middle of a row of writes says as much as all of them.
    rows = [index for index, (step, _) in enumerate(steps) if step == "spool.write"]
    boring = {
        index for i, index in enumerate(rows) if i not in (0, 1, len(rows) // 2, len(rows) - 2, len(rows) - 1)
    }
    return [step for index, step in enumerate(steps) if index not in boring]


def persistence(step):
    """How often a step has to fail for the flush to notice: a store may lose requests now and then."""
    return UPLOAD_TRIES + 1 if step == "store.put_files" else 1


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_an_error_at_any_step(world, place, late):
    """The tree stays as it is, the next flush publishes it, and nothing is forgotten or left behind."""
    for step, number in steps_of_a_flush(world, place):
        if late and step == "spool.write":
            continue  # a write that fails has left nothing; see the tests of the spool
        where = f"{step} {number} {'after' if late else 'before'}"
        device = Device(world, f"{place}/{step}{number}", "alice")
        faults = Faults()
        device.start(faults.install)
        device.create_share()
        begin(device)
        view, fh = change(device)
        expected = tree(device)
        # A full disk is a clean no, so it cannot come after the deed.
        code = "state_corrupt" if late and step == "state.record_commit" else STEPS[step]
        faults.arm(step, number, code, late=late, times=persistence(step))
        published = step in ("state.published", "spool.discard") or (step == "metadata.publish" and late)
        if STEPS[step] is None:
            device.flush()
        else:
            with pytest.raises(MeshkitError) as caught:
                device.flush()
            assert caught.value.code == device.share().stuck.code == code, where
        assert tree(device) == expected, where
        if not published:
            assert device.share().dirty, f"{where}: the changes count as published"
        # Work goes on after the failure, also on what was in the commit that failed.
        faults.disarm()
        try:
            view.pwrite(fh, 100 * KIB, b"after the failure")
        except OSError as error:
            assert error.errno == errno.ENOSPC, where  # a writer is told once that blocks could not be sealed
            view.pwrite(fh, 100 * KIB, b"after the failure")
        view.write("many/250", b"again")
        view.unlink("directory/inside")
        expected = tree(device)
        view.fsync(fh)
        view.release(fh)
        assert tree(device) == expected, where
        if step != "spool.discard" and not (late and step == "state.published"):
            nothing_left(device)  # in these two cases only the next start sweeps up
        only_from_the_provider(device, expected)
        device.close()
    assert world.well


def test_errors_without_end_leave_nothing_behind(world, place):
    """A disk that stays full for long: each try leaves as much room as it found."""
    device = Device(world, f"{place}/alice", "alice")
    faults = Faults()
    device.start(faults.install)
    device.create_share()
    begin(device)
    view, fh = change(device)
    expected = tree(device)
    view.release(fh)
    sizes = []
    for _ in range(6):
        writes = faults.calls.count("spool.write")
        faults.arm("spool.write", 7, "no_space", times=1000)
        with pytest.raises(MeshkitError):
            device.flush()
        assert faults.calls.count("spool.write") > writes
        settle_threads(device)
        sizes.append(len(files_in(device.home.cache_dir)))
    assert sizes[-1] <= sizes[1], f"failed commits pile up in the spool: {sizes}"
    faults.disarm()
    device.flush()
    assert tree(device) == expected
    nothing_left(device)
    blocks = len(files_in(device.blocks))
    only_from_the_provider(device, expected)
    device.close()
    clean = Device(world, f"{place}/clean", "clean").start()
    clean.create_share()
    begin(clean)
    view, fh = change(clean)
    clean.flush()
    view.release(fh)
    # What the failed tries sealed must not have gone to the provider either.
    assert blocks <= len(files_in(clean.blocks)) + 2
    clean.close()


@pytest.mark.parametrize("step", [step for step, code in STEPS.items() if code])
def test_fsync_says_so(world, place, step):
    """The program is told, by the errno of the error table; what it wrote is still there to read."""
    device = Device(world, f"{place}/alice", "alice")
    faults = Faults()
    device.start(faults.install)
    device.create_share()
    view = device.view()
    fh = view.create("file")
    view.pwrite(fh, 0, b"content")
    faults.arm(step, 0, STEPS[step], times=persistence(step))
    with pytest.raises(OSError) as caught:
        view.fsync(fh)
    assert caught.value.errno == MeshkitError(STEPS[step]).errno
    assert view.pread(fh, 0, 100) == b"content"
    view.fsync(fh)
    device.crash()
    device.start()
    assert device.view().contents() == {"file": b"content"}
    device.close()


@pytest.mark.parametrize("crash", [False, True], ids=["goes on", "dies"])
def test_what_a_commit_of_unknown_fate_names_is_kept(world, device, crash):
    """The database took it and said that it did not; then its blocks are overwritten before the next commit."""
    device.session.services.fsync_publishes = not crash
    view, state = device.view(), device.session.state
    fh = view.create("file")
    view.pwrite(fh, 0, pattern(1, 400 * KIB))
    view.fsync(fh)
    view.pwrite(fh, 0, pattern(2, 256 * KIB))
    record = state.record_commit

    def took_it(*args):
        record(*args)
        raise MeshkitError("state_corrupt", "injected")

    state.record_commit = took_it
    with pytest.raises(OSError):
        view.fsync(fh)
    state.record_commit = record
    view.pwrite(fh, 0, pattern(3, 256 * KIB))
    settle_threads(device)  # the block is sealed, and what it replaces is not needed by the tree any more
    if crash:
        device.crash()
        device.start()
        view = device.view()
    else:
        view.fsync(fh)
        view.release(fh)
    content = view.read("file")
    assert content[: 256 * KIB] == pattern(2 if crash else 3, 256 * KIB)
    assert content[256 * KIB :] == pattern(1, 400 * KIB)[256 * KIB :]
    device.flush()
    nothing_left(device)
    only_from_the_provider(device, tree(device))


def test_a_write_of_which_a_part_succeeded(world, device):
    """The store cannot give the block that the rest goes to: what is seen of the write is kept like any other."""
    view = device.view()
    view.write("file", pattern(1, 1024 * KIB))
    device.flush()
    store, get = device.session.store, device.session.store.get
    fh = view.open("file")

    async def away(digest):
        raise MeshkitError("provider_request_failed", "injected")

    store.get = away
    device.session.services.reader.forget()
    with pytest.raises(OSError):
        view.pwrite(fh, 0, pattern(2, 300 * KIB))  # one block entirely, and a part of the next
    store.get = get
    view.release(fh)
    seen = view.read("file")
    assert seen == pattern(2, 256 * KIB) + pattern(1, 1024 * KIB)[256 * KIB :]
    device.flush()
    assert device.session.services.budget.held == 0
    only_from_the_provider(device, tree(device))
    assert device.view().read("file") == seen


def test_a_full_disk_while_blocks_are_sealed(world, place):
    """Blocks fail in the background, others of the same commit succeed: none is lost or forgotten."""
    for failing in range(9):
        device = Device(world, f"{place}/alice{failing}", "alice")
        faults = Faults()
        device.start(faults.install)
        device.create_share()
        view = device.view()
        for i in range(3):
            view.write(f"file{i}", pattern(i, 520 * KIB))
        faults.arm("spool.write", failing, "no_space", times=3)
        with pytest.raises((MeshkitError, OSError)):
            # The first blocks were sealed while they were written; a write may be told instead.
            for i in range(3):
                view.append(f"file{i}", b"end")
            for _ in range(8):
                device.flush()
            raise MeshkitError("no_space", "the fault came and went unnoticed")
        faults.disarm()
        for name in ("file0", "file1", "file2"):
            data = view.read(name)
            assert data.removesuffix(b"end") == pattern(int(name[-1]), 520 * KIB)
        expected = tree(device)
        device.flush()
        assert tree(device) == expected
        nothing_left(device)
        only_from_the_provider(device, expected)
        device.close()


def test_fsync_waits_for_a_commit_that_has_begun(world, place):
    """While a commit is being written nothing is dirty any more, and nothing is safe yet."""
    device = Device(world, f"{place}/alice", "alice").start()
    device.create_share()
    view = device.view()
    fh = view.create("file")
    view.pwrite(fh, 0, b"content")
    spool = device.session.services.spool
    real, inside, go_on = spool.sync, threading.Event(), threading.Event()

    def sync():
        inside.set()
        assert go_on.wait(30)
        real()

    spool.sync = sync
    background = world.start(device.share().flush)
    assert inside.wait(30)
    fsync = world.start(device.fs.fsync, fh, False)
    world.pass_time(1)
    assert not fsync.done.is_set(), "fsync returned before anything was durable"
    go_on.set()
    spool.sync = real
    fsync.wait()
    background.wait()
    device.crash()
    device.start()
    assert device.view().contents() == {"file": b"content"}
    device.close()


def test_others_are_faster_again_and_again(world, place):
    """A storm of lost races: merged each time, published in the end, nothing lost on either side."""
    alice = Device(world, f"{place}/alice", "alice").start()
    alice.create_share()
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    mine, others = alice.view(), bob.view()
    mine.write("mine", b"mine")
    publish = alice.session.metadata.publish
    lost = []

    async def overtaken(publication):
        if len(lost) < 12:
            lost.append(len(lost))
            node = await bob_writes(bob, b"theirs %d" % len(lost))
            assert node
        await publish(publication)

    alice.session.metadata.publish = overtaken
    alice.flush()
    assert len(lost) == 12
    assert alice.share().counters.merges >= 12
    bob.refresh()
    wanted = {"mine": b"mine"} | {f"theirs {i}": b"theirs %d" % i for i in range(1, 13)}
    assert mine.contents() == others.contents() == wanted
    nothing_left(alice)
    alice.close()
    bob.close()


async def bob_writes(bob, data):
    share = bob.share()
    grant = await share.use("write", current=True)
    async with share.changing() as tree:
        node = tree.new_file(0o644)
        tree.create(tree.root, data, node)
        await (await tree.content(grant, node)).write(grant, 0, data)
        tree.touch(node, content=True)
    await share.flush()
    return node


# -- death and power failure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_death_and_power_failure_at_any_step(world, place, late, monkeypatch):
    """The next start has the tree of before or of after the commit, never another one, and goes on from it."""
    whole = 0
    for step, number in steps_of_a_flush(world, place):
        where = f"{step} {number} {'after' if late else 'before'}"
        device = Device(world, f"{place}/{step}{number}", "alice")
        disk = Disk(monkeypatch, device.home.cache_dir, device.blocks)
        faults = Faults()
        device.start(faults.install)
        device.create_share()
        begin(device)
        old = tree(device)
        view, _fh = change(device)
        new = tree(device)
        faults.arm(step, number, STEPS[step], late=late, death=True)
        with pytest.raises((MeshkitError, OSError)):
            device.flush()
            # The commit was through: only what comes after it died.
            raise MeshkitError("internal_error")
        device.crash()
        disk.lose_power()
        device.start()
        found = tree(device)
        recorded = step not in ("spool.write", "spool.sync") and not (
            step == "state.record_commit" and not late
        )
        assert found == (new if recorded else old), where
        whole += recorded
        device.flush()
        assert tree(device) == found, where
        nothing_left(device)
        only_from_the_provider(device, found)
        view = device.view()
        view.write("afterwards", b"works")
        device.flush()
        assert view.read("afterwards") == b"works"
        device.close()
        monkeypatch.undo()
    assert whole > 4


def test_power_failure_after_fsync(world, place, monkeypatch):
    """What fsync acknowledged is there although nothing else ever told the disk to hurry."""
    device = Device(world, f"{place}/alice", "alice")
    disk = Disk(monkeypatch, device.home.cache_dir, device.blocks)
    device.start()
    device.create_share()
    view = device.view()
    lost = 0
    for i in range(5):
        fh = view.create(f"file{i}")
        view.pwrite(fh, 0, pattern(i, (10, 20_000, 300_000, 70_000, 5)[i]))
        view.fsync(fh)
        expected = tree(device)
        view.pwrite(fh, 0, pattern(99, 600 * KIB))
        settle_threads(device)
        device.crash()
        lost += disk.lose_power()
        device.start()
        view = device.view()
        assert tree(device) == expected
    assert lost, "everything was covered by luck: this proves nothing"
    device.close()


def test_two_shares_do_not_take_each_others_blocks_along(world, place, monkeypatch):
    """One share's sync is under way with the other's blocks: the other must wait for it, not go on."""
    device = Device(world, f"{place}/alice", "alice")
    disk = Disk(monkeypatch, device.home.cache_dir, device.blocks)
    device.start()
    device.create_share("one")
    device.create_share("two")
    for name in ("one", "two"):
        device.view(name).write("file", pattern(7, 100 * KIB))
    inside, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(fd):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(30)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    first = world.start(device.share("one").flush)
    assert inside.wait(30)
    second = world.start(device.share("two").flush)
    settle_threads(device)
    assert not second.done.is_set(), "a share went on while its blocks were being synced"
    go_on.set()
    first.wait()
    second.wait()
    device.crash()
    disk.lose_power()
    device.start()
    for name in ("one", "two"):
        assert device.view(name).read("file") == pattern(7, 100 * KIB)
    device.close()


def test_a_state_that_is_older_than_what_was_published(world, place):
    """The commit was published, but the state database never learned of it: no conflict, nothing twice."""
    device = Device(world, f"{place}/alice", "alice")
    faults = Faults()
    device.start(faults.install)
    device.create_share()
    view = device.view()
    view.write("file", b"one")
    device.flush()
    view.write("file", b"two")
    faults.arm("state.published", 0, "no_space", death=True)
    with pytest.raises(MeshkitError):
        device.flush()
    device.crash()
    device.start()
    version = device.share().base.version
    view = device.view()
    view.write("file", b"three")
    device.flush()
    assert view.contents() == {"file": b"three"}
    assert device.share().counters.merges == 0
    assert device.share().base.version >= version
    nothing_left(device)
    device.close()


# -- the spool by itself ---------------------------------------------------------------------------------------


def block(data):
    return SealedBlock(digest_of(data), data)


def test_spool_keeps_nothing_of_a_write_that_failed(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "cache")
    written = []
    real = os.write

    def full(fd, data):
        if written:
            raise OSError(errno.ENOSPC, "full")
        written.append(real(fd, bytes(data[:100])))
        return written[0]

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MeshkitError) as caught:
        spool.write(block(b"x" * 1000))
    assert caught.value.code == "no_space"
    assert files_in(tmp_path) == []
    monkeypatch.undo()
    spool.sync()
    spool.write(block(b"x" * 1000))
    assert spool.read(digest_of(b"x" * 1000)).data == b"x" * 1000


def test_spool_writes_again_what_an_fsync_failed_for(tmp_path, monkeypatch):
    """After a failed write-back the kernel takes the pages for clean: another fsync alone would prove nothing."""
    spool = Spool(tmp_path / "cache")
    spool.write(block(b"one" * 100))
    spool.write(block(b"two" * 100))
    real, failing = os.fsync, [1]

    def fsync(fd):
        if failing:
            failing.pop()
            raise OSError(errno.EIO, "write-back failed")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    inode = os.stat(spool.path(digest_of(b"one" * 100))).st_ino
    with pytest.raises(MeshkitError):
        spool.sync()
    spool.sync()
    assert os.stat(spool.path(digest_of(b"one" * 100))).st_ino != inode, (
        "the same pages were synced once more"
    )
    for data in (b"one" * 100, b"two" * 100):
        assert spool.read(digest_of(data)).data == data
    assert len(files_in(tmp_path)) == 2


def test_spool_sync_of_many_fails_like_that_of_few(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "cache")
    for i in range(40):
        spool.write(block(b"%04d" % i * 10))
    monkeypatch.setattr(Spool, "_syncfs", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(MeshkitError):
        spool.sync()
    with pytest.raises(MeshkitError):
        spool.sync()
    monkeypatch.undo()
    spool.sync()
    assert len(files_in(tmp_path)) == 40


def test_spool_discard_while_syncing(tmp_path, monkeypatch):
    """A block that is replaced just now need not be durable, and its absence is no error."""
    spool = Spool(tmp_path / "cache")
    digests = [digest_of(b"%d" % i) for i in range(5)]
    for i in range(5):
        spool.write(block(b"%d" % i))
    real = os.fsync

    def fsync(fd):
        monkeypatch.setattr(os, "fsync", real)
        spool.discard(digests)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    spool.sync()
    assert files_in(tmp_path) == []


def test_spool_misses_a_block_that_nobody_discarded(tmp_path):
    spool = Spool(tmp_path / "cache")
    spool.write(block(b"needed"))
    os.unlink(spool.path(digest_of(b"needed")))
    with pytest.raises(MeshkitError):
        spool.sync()


def test_spool_sweep_meets_anything(tmp_path):
    spool = Spool(tmp_path / "cache")
    kept, gone = digest_of(b"kept"), digest_of(b"gone")
    spool.write(block(b"kept"))
    spool.write(block(b"gone"))
    (tmp_path / "cache" / "note.txt").write_text("not ours")
    (tmp_path / "cache" / "ab" / ("z" * 64)).write_text("no digest")
    (tmp_path / "cache" / "ab" / "directory").mkdir()
    assert spool.sweep({kept}) >= 2
    assert os.path.exists(spool.path(kept))
    assert not os.path.exists(spool.path(gone))


def test_spool_directories_survive_power_loss(tmp_path, monkeypatch):
    """The first commit of a new home: the names of the directories have to be durable too."""
    synced = []
    real = os.fsync

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    spool = Spool(tmp_path / "cache")
    spool.write(block(b"first"))
    spool.sync()
    name = spool.path(digest_of(b"first"))
    assert {name, os.path.dirname(name), str(tmp_path / "cache"), str(tmp_path)} <= set(synced)


# -- the state database by itself -----------------------------------------------------------------------------

KEY = bytes(range(32))


def commit(version, share=b"s" * 16):
    return LocalCommit(share, bytes([version]) * 32, 1, version, b"h" * 32, b"r" * 32, 1, version - 1)


def test_state_survives_its_process(tmp_path):
    """What a call has recorded is there when another process opens the file after a kill."""
    path = tmp_path / "state.db"
    State.open(path, KEY, create=True).close()
    pid = os.fork()
    if not pid:
        state = State.open(path, KEY)
        state.record_commit(commit(2), [(b"d" * 32, 100)])
        state.record_commit(commit(3), [(b"e" * 32, 200)])
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    state = State.open(path, KEY)
    assert state.local_commit(b"s" * 16) == commit(3)
    assert sorted(state.staged(b"s" * 16)) == [(b"d" * 32, 100), (b"e" * 32, 200)]
    state.published(b"s" * 16, Mark(0, b"", 3, b"n" * 32), [b"d" * 32])
    assert state.local_commit(b"s" * 16) is None
    assert state.staged(b"s" * 16) == [(b"e" * 32, 200)]
    state.close()


def test_state_transaction_is_all_or_nothing(tmp_path):
    state = State.open(tmp_path / "state.db", KEY, create=True)
    state.record_commit(commit(2), [(b"d" * 32, 100)])
    with pytest.raises(MeshkitError):
        state.record_commit(commit(3), [(b"e" * 32, 1), (b"f" * 32, None)])
    assert state.local_commit(b"s" * 16) == commit(2)
    assert state.staged(b"s" * 16) == [(b"d" * 32, 100)]
    state.close()


def test_state_marks_never_go_back(tmp_path):
    state = State.open(tmp_path / "state.db", KEY, create=True)
    share = b"s" * 16
    state.raise_mark(share, Mark(5, b"5" * 32, 9, b"9" * 32))
    state.raise_mark(share, Mark(6, b"6" * 32, 8, b"8" * 32))
    state.published(share, Mark(4, b"4" * 32, 7, b"7" * 32), [])
    assert state.mark(share) == Mark(6, b"6" * 32, 9, b"9" * 32)
    state.close()


@pytest.mark.parametrize("spoil", ["truncated", "flipped", "empty", "text", "other key", "no file"])
def test_state_that_cannot_be_used_says_so(tmp_path, spoil):
    path = tmp_path / "state.db"
    state = State.open(path, KEY, create=True)
    state.record_commit(commit(2), [(b"d" * 32, 100)])
    state.close()
    data = path.read_bytes()
    key = KEY
    if spoil == "truncated":
        path.write_bytes(data[: len(data) // 2 - 7])
    elif spoil == "flipped":
        path.write_bytes(bytes([data[0]]) + bytes([byte ^ 1 for byte in data[1:]]))
    elif spoil == "empty":
        path.write_bytes(b"")
    elif spoil == "text":
        path.write_bytes(b"this is no database\n" * 100)
    elif spoil == "other key":
        key = bytes(32)
    else:
        path.unlink()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MeshkitError) as caught:
        State.open(path, key)
    assert caught.value.code == ("not_initialized" if spoil == "no file" else "state_corrupt")
    assert key.hex() not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors, "a file of the database is still open"
    if spoil == "other key":
        assert path.read_bytes() == data
        state = State.open(path, KEY)
        assert state.local_commit(b"s" * 16) == commit(2)
        state.close()


def test_state_that_another_process_holds_is_busy_not_corrupt(tmp_path):
    """A backup program that copies the database holds a lock on it for a moment."""
    state = State.open(tmp_path / "state.db", KEY, create=True)
    other = State.open(tmp_path / "state.db", KEY)
    other._db.execute("BEGIN IMMEDIATE")
    state._db.set_busy_timeout(50)
    with pytest.raises(MeshkitError) as caught:
        state.record_commit(commit(2), [])
    assert caught.value.code == "home_busy"
    other._db.execute("ROLLBACK")
    state.record_commit(commit(2), [])
    assert state.local_commit(b"s" * 16) == commit(2)
    other.close()
    state.close()
