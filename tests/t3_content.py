"""The content of files: large ones with index blocks, holes, and what happens while something else waits.

Everything below FUSE is real and the clock stands still, so commits happen only where a test says. Where an
order of events matters, reads of sealed blocks are held up and let go by the test.
"""

from __future__ import annotations

import errno
import os
import random

import pytest
import trio
from devices import Device, View, World, pattern

from meshkitfs.core.blocks import HOLE
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import _refs
from meshkitfs.shares._refs import RefTable
from meshkitfs.vfs.types import SetAttr

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
SEGMENT = 4096 * BLOCK  # what one index block covers: 256 MiB


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def alice(world, tmp_path):
    device = Device(world, tmp_path / "alice", "alice")
    device.start()
    device.create_share("first")
    yield device
    if device.session is not None:
        device.close()


@pytest.fixture
def bob(world, alice, tmp_path):
    """Another home beside alice's; it has no share yet."""
    device = Device(world, tmp_path / "bob", "bob", beside=alice)
    device.start()
    yield device
    device.close()


def restart(device):
    device.close()
    device.start()
    return View(device, "first")


class Held:
    """Holds up reads of sealed blocks, all of them or those of one digest, after letting some through."""

    def __init__(self, device, digest=None, after=0):
        self._world = device.world
        self._reader = device.session.services.reader
        self._real = self._reader.verified
        self._let_through = after
        self._waiting = False

        async def verified(wanted):
            if (digest is None or wanted == digest) and not self._open.is_set():
                if self._let_through:
                    self._let_through -= 1
                else:
                    self._waiting = True
                    await self._open.wait()
            return await self._real(wanted)

        async def begin():
            self._open = trio.Event()
            self._reader.verified = verified

        self._world.run(begin)

    def wait(self):
        """Return when somebody waits for a block."""
        eventually(self._world, lambda: self._waiting)

    def let_go(self):
        async def end():
            self._reader.verified = self._real
            self._open.set()

        self._world.run(end)


def eventually(world, condition):
    async def poll():
        # Worker threads do not follow the loop's clock: give them the processor until they are done.
        while not condition():
            await trio.to_thread.run_sync(lambda: None)

    world.run(poll)


def node_of(device, path):
    ino = View(device, "first").attr(path).ino
    return device.share().tree.nodes[ino]


# -- large files -------------------------------------------------------------------------------------


def test_a_file_with_index_blocks(alice):
    view = View(alice, "first")
    fh = view.create("big")
    places = {
        0: b"start",
        100 * MIB + 7: pattern(1, 200_000),
        300 * MIB: b"beyond",
        301 * MIB + 5: pattern(2, 70_000),
    }
    view.truncate("big", 1)  # so that the size is known before the block size is chosen: small blocks
    view.truncate("big", 310 * MIB)
    size = 310 * MIB

    def check(view):
        fh = view.open("big", os.O_RDONLY)
        assert view.attr("big").size == size
        for at, data in places.items():
            assert view.pread(fh, at, len(data)) == data
            assert view.pread(fh, at + len(data), 10) == bytes(min(10, size - at - len(data)))
        for at in (50 * MIB, SEGMENT - 5, SEGMENT, 305 * MIB):
            assert view.pread(fh, at, 1000) == bytes(max(0, min(1000, size - at)))
        view.release(fh)
        stored = sum((at + len(data) - 1) // BLOCK - at // BLOCK + 1 for at, data in places.items())
        assert view.attr("big").blocks * 512 <= (stored + 1) * BLOCK

    for at, data in places.items():
        view.pwrite(fh, at, data)
    check(view)  # nothing is committed: no index block exists yet
    alice.flush()
    assert len(node_of(alice, "big").content.table.index) == 2 * 64
    check(view)
    view.release(fh)
    view = restart(alice)
    check(view)

    # Appending loads the last index block before it adds to it.
    view = restart(alice)
    places[size] = b"appended"
    size += 8
    view.append("big", b"appended")
    check(view)
    alice.flush()
    check(view)
    view = restart(alice)
    check(view)

    # One block in the middle: only its own segment is loaded and sealed anew.
    view = restart(alice)
    before = bytes(node_of(alice, "big").entry.ref)
    fh = view.open("big")
    view.pwrite(fh, 120 * MIB, b"middle")
    places[120 * MIB] = b"middle"
    alice.flush()
    assert set(node_of(alice, "big").content.table.segments) == {0}
    assert node_of(alice, "big").entry.ref != before
    check(view)
    view.release(fh)

    # Back below 4096 blocks: the references stand in the manifest again.
    view = restart(alice)
    size = 100 * MIB + 1000
    places = {0: b"start", 100 * MIB + 7: pattern(1, 200_000)[:993]}
    view.truncate("big", size)
    check(view)
    alice.flush()
    view = restart(alice)
    check(view)

    # And up again: nothing of what was cut off comes back.
    size = 600 * MIB
    view.truncate("big", size)
    check(view)
    fh = view.open("big", os.O_RDONLY)
    for at in (100 * MIB + 1000, 120 * MIB, 300 * MIB, 301 * MIB + 5, 310 * MIB):
        assert view.pread(fh, at, 8) == bytes(8)
    view.release(fh)
    alice.flush()
    check(restart(alice))


@pytest.mark.parametrize("cut", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 10 * MIB + 5, 10])
def test_cutting_at_the_edges_of_index_blocks(alice, cut):
    view = View(alice, "first")
    fh = view.create("big")
    view.truncate("big", 1)
    view.truncate("big", 3 * SEGMENT)
    marks = [0, SEGMENT - 8, SEGMENT, 2 * SEGMENT - 8, 2 * SEGMENT, 3 * SEGMENT - 8]
    for at in marks:
        view.pwrite(fh, at, b"%08d" % (at // KIB))
    alice.flush()
    view.release(fh)
    view = restart(alice)
    view.truncate("big", cut)
    view.truncate("big", 3 * SEGMENT)

    def check(view):
        fh = view.open("big", os.O_RDONLY)
        for at in marks:
            expected = (b"%08d" % (at // KIB))[: max(0, cut - at)].ljust(8, b"\0")
            assert view.pread(fh, at, 8) == expected, at
        view.release(fh)
        kept = {at // BLOCK for at in marks if at < cut}
        assert view.attr("big").blocks * 512 == len(kept) * BLOCK

    check(view)
    alice.flush()
    check(view)
    check(restart(alice))


def test_sizes_that_need_larger_blocks_and_sizes_that_cannot_be(alice):
    view = View(alice, "first")
    view.release(view.create("big"))
    with pytest.raises(OSError) as caught:
        view.truncate("big", (16 << 40) + 1)
    assert caught.value.errno == errno.EFBIG
    for size in (3 << 40, 16 << 40):
        view.truncate("big", 0)
        view.truncate("big", size)
        fh = view.open("big")
        view.pwrite(fh, size - 3, b"end")
        with pytest.raises(OSError) as caught:
            view.pwrite(fh, 16 << 40, b"x")
        assert caught.value.errno == errno.EFBIG
        view.release(fh)
        alice.flush()
        view = restart(alice)
        fh = view.open("big")
        assert view.pread(fh, size - 5, 100) == b"\0\0end"
        view.release(fh)


def test_a_table_of_references_against_a_plain_list(monkeypatch):
    """Random histories of writes, cuts, commits (also ones that are not taken over) and restarts."""
    monkeypatch.setattr(_refs, "REFS_PER_INDEX", 4)
    rng = random.Random(42)
    sealed = {}

    def seal(table, jobs):
        """What a commit does: returns what a reader of its manifest would start from."""
        copy = table.copy(jobs)
        for i, ref in jobs.items():
            copy.set(i, ref)
        if copy.count <= 4:
            return copy, (copy.count, copy.segment_bytes(0), b"", 0)
        for number in copy.changed_segments():
            copy.index.extend(bytes(max(0, 64 * (number + 1) - len(copy.index))))
            if number in copy.segments:
                packed = copy.segment_bytes(number)
                name = rng.randbytes(64) if any(packed) else HOLE
                # As an index block does: holes at the end are not kept.
                sealed[name] = packed[: -(-len(packed.rstrip(b"\0")) // 64) * 64]
                copy.index[64 * number : 64 * number + 64] = name
        copy.index.extend(bytes(max(0, 64 * -(-copy.count // 4) - len(copy.index))))
        return copy, (copy.count, b"", bytes(copy.index), copy.stored)

    def ready(table, i):
        number = table.segment_needed(i)
        if number is not None:
            table.load(number, sealed.get(table.index_ref(number), b""))

    for _ in range(300):
        table, model = RefTable(), []
        manifest, committed = seal(table, {})[1], []
        history = []
        for _ in range(40):
            action = rng.choice(["set", "set", "set", "grow", "cut", "commit", "lost", "restart", "look"])
            i = rng.randrange(30)
            history.append((action, i))
            if action == "set":
                ready(table, i)
                ref = rng.randbytes(64)
                table.set(i, ref)
                model += [HOLE] * (i + 1 - len(model))
                model[i] = ref
            elif action == "grow" and i > len(model):
                table.resize(i)
                model += [HOLE] * (i - len(model))
            elif action == "cut" and 0 < i < len(model):
                for at in range(i - 1, len(model)):
                    ready(table, at)
                cut = table.resize(i)
                assert sorted(cut) == sorted(ref for ref in model[i:] if ref != HOLE), history
                del model[i:]
            elif action in ("commit", "lost") and model:
                jobs = {}
                if rng.random() < 0.5:
                    ready(table, i % len(model))
                    jobs[i % len(model)] = model[i % len(model)] = rng.randbytes(64)
                copy, found = seal(table, jobs)
                for at, ref in jobs.items():
                    table.set(at, ref)
                if action == "commit":
                    manifest, committed = found, list(model)
                    # Taken over only if nothing changed since; a block that was just sealed is a change.
                    if copy.index and not jobs:
                        table.adopt_index(copy)
            elif action == "restart":
                table, model = RefTable(*manifest), list(committed)
            for at in range(len(model) + 2):
                if action == "look":
                    ready(table, at)
                peeked = table.peek(at)
                assert peeked in (None, model[at] if at < len(model) else HOLE), (history, at)
                assert peeked is not None or action != "look"
            assert table.count == len(model)
            assert table.stored == sum(ref != HOLE for ref in model), history


# -- while something waits -----------------------------------------------------------------------------


def test_a_commit_while_a_write_waits_for_its_block(alice):
    """What the commit has not seen must be in the next one."""
    view = View(alice, "first")
    view.write("file", pattern(1, 3 * 256 * KIB))
    view = restart(alice)
    fh = view.open("file")
    view.pwrite(fh, 0, pattern(2, 256 * KIB))  # replaces a whole block: nothing to read
    held = Held(alice)
    writing = alice.world.start(alice.fs.write, fh, 300_000, b"late")
    held.wait()
    flushing = alice.world.start(alice.share().flush)
    eventually(alice.world, lambda: alice.share().counters.commits == 1)
    held.let_go()
    writing.wait()
    flushing.wait()
    view.release(fh)
    alice.flush()
    expected = bytearray(pattern(2, 256 * KIB) + pattern(1, 3 * 256 * KIB)[256 * KIB :])
    expected[300_000:300_004] = b"late"
    assert view.read("file") == expected
    assert restart(alice).read("file") == expected


def test_cutting_a_closed_file_while_a_commit_ends(alice):
    view = View(alice, "first")
    view.write("file", pattern(1, 700_000))
    view = restart(alice)
    view.setattr("file", mode=0o600)  # something for the commit
    held = Held(alice, after=1)  # its manifest, not the block that is cut
    cutting = alice.world.start(alice.fs.setattr, view.attr("file").ino, SetAttr(size=300_000), None)
    held.wait()
    alice.flush()
    held.let_go()
    assert cutting.wait().size == 300_000
    assert view.read("file") == pattern(1, 700_000)[:300_000]
    alice.flush()
    assert restart(alice).read("file") == pattern(1, 700_000)[:300_000]


def test_old_references_do_not_come_back_into_a_file_that_was_emptied(alice):
    view = View(alice, "first")
    fh = view.create("file")
    view.truncate("file", 1)
    view.truncate("file", 400 * MIB)
    view.pwrite(fh, 300 * MIB, b"old content")
    alice.flush()
    view.release(fh)
    view = restart(alice)
    fh = view.open("file")
    held = Held(alice)
    reading = alice.world.start(alice.fs.read, fh, 300 * MIB, 11)
    held.wait()  # for the index block
    view.truncate("file", 0)
    view.truncate("file", 400 * MIB)
    held.let_go()
    assert bytes(reading.wait()) == bytes(11)
    assert view.pread(fh, 300 * MIB, 11) == bytes(11)
    view.release(fh)
    alice.flush()
    view = restart(alice)
    fh = view.open("file")
    assert view.pread(fh, 300 * MIB, 11) == bytes(11)
    view.release(fh)


def test_reading_a_block_that_is_rewritten_meanwhile(alice):
    """The old block is removed as soon as nothing names it; its reader gets the new one instead."""
    view = View(alice, "first")
    fh = view.create("file")
    view.pwrite(fh, 0, pattern(1, 256 * KIB))
    view.pwrite(fh, 256 * KIB, pattern(2, 256 * KIB))
    view.pwrite(fh, 0, pattern(1, 256 * KIB))  # whole, so that it is sealed at once
    content = node_of(alice, "file").content
    eventually(alice.world, lambda: not content.sealing)
    held = Held(alice)
    reading = alice.world.start(alice.fs.read, fh, 0, 100)
    held.wait()
    old = content.table.peek(0)
    view.pwrite(fh, 0, pattern(3, 256 * KIB))
    eventually(alice.world, lambda: content.table.peek(0) != old)
    spool = alice.session.services.spool
    eventually(alice.world, lambda: not os.path.exists(spool.path(old[:32])))
    held.let_go()
    assert bytes(reading.wait()) == pattern(3, 100)
    view.release(fh)


def test_a_block_that_is_really_missing_is_an_error(alice):
    view = View(alice, "first")
    view.write("file", pattern(1, 700_000))
    alice.flush()
    ref = None
    view = restart(alice)
    fh = view.open("file")
    ref = node_of(alice, "file").content.table.peek(0)
    store = alice.session.store
    alice.world.run(store.delete, ref[:32])
    with pytest.raises(OSError) as caught:
        view.pread(fh, 0, 100)
    assert caught.value.code == "block_unavailable"
    view.release(fh)


def test_reading_while_the_file_shrinks_gives_no_shifted_bytes(alice):
    view = View(alice, "first")
    view.write("file", pattern(1, 3 * 256 * KIB))
    view = restart(alice)
    fh = view.open("file")
    held = Held(alice, after=0)
    reading = alice.world.start(alice.fs.read, fh, 0, 3 * 256 * KIB)
    held.wait()
    cutting = alice.world.start(alice.fs.setattr, view.attr("file").ino, SetAttr(size=300_000), None)
    held.let_go()
    got = bytes(reading.wait())
    cutting.wait()
    assert got == pattern(1, 3 * 256 * KIB)[: len(got)]
    view.release(fh)


def test_a_directory_that_changes_elsewhere_while_it_is_read(world, alice, tmp_path):
    """The older listing must not stand in for the newer one, or the next commit undoes the other's change."""
    bob = Device(world, tmp_path / "bob", "bob", beside=alice)
    bob.start()
    View(alice, "first").mkdir("dir")
    View(alice, "first").write("dir/old", b"old")
    alice.flush()
    alice.grant("first", bob)
    theirs = View(bob, "first")
    theirs.attr("dir")  # known, and not read
    held = Held(bob, digest=node_of(bob, "dir").entry.ref[:32])
    reading = world.start(bob.fs.opendir, theirs.attr("dir").ino)
    held.wait()
    View(alice, "first").write("dir/new", b"new")
    alice.flush()
    refreshing = world.start(bob.share().refresh)
    eventually(world, lambda: bob.share().counters.merges == 1)
    held.let_go()
    reading.wait()
    refreshing.wait()
    assert theirs.listdir("dir") == ["new", "old"]
    theirs.write("dir/bobs", b"bob")
    bob.flush()
    alice.refresh()
    assert View(alice, "first").listdir("dir") == ["bobs", "new", "old"]


def test_appending_after_others_have_appended(alice, bob):
    """The kernel appends where it believes the end to be; what others added meanwhile must survive it."""
    View(alice, "first").write("log", b"start ")
    alice.flush()
    alice.grant("first", bob)
    theirs = View(bob, "first")
    fh = theirs.open("log", os.O_WRONLY | os.O_APPEND)
    View(alice, "first").append("log", b"alice ")
    alice.flush()
    bob.refresh()
    theirs.pwrite(fh, 6, b"bob")  # the end as bob's kernel knows it
    assert theirs.read("log") == b"start alice bob"
    # Not an append: a page that was changed through a mapping, written back on this descriptor.
    theirs.pwrite(fh, 0, b"START")
    assert theirs.read("log") == b"START alice bob"
    theirs.release(fh)
    bob.flush()
    alice.refresh()
    assert View(alice, "first").read("log") == b"START alice bob"


def test_a_rename_that_waited_looks_again_at_both_directories(world, alice, bob):
    """Others may have moved the file and removed its directory while the other directory was being read."""
    mine = View(alice, "first")
    for name in ("from", "to", "elsewhere"):
        mine.mkdir(name)
    mine.write("from/file", b"content")
    mine.write("to/other", b"")
    alice.flush()
    alice.grant("first", bob)
    theirs = View(bob, "first")
    assert theirs.listdir("from") == ["file"]
    places = [theirs.attr(name).ino for name in ("from", "to")]
    held = Held(bob, digest=node_of(bob, "to").entry.ref[:32])
    moving = world.start(bob.fs.rename, places[0], b"file", places[1], b"file", 0)
    held.wait()
    mine.rename("from/file", "elsewhere/file")
    mine.rmdir("from")
    alice.flush()
    bob.refresh()
    held.let_go()
    with pytest.raises(OSError) as caught:
        moving.wait()
    assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    bob.flush()
    expected = {"elsewhere": None, "elsewhere/file": b"content", "to": None, "to/other": b""}
    assert theirs.contents() == expected
    alice.refresh()
    assert mine.contents() == expected


def test_creating_what_others_have_created_opens_it(alice, bob):
    """The kernel asks for a new file when it knows of none; only with O_EXCL is an old one an error."""
    alice.grant("first", bob)
    theirs = View(bob, "first")
    parent = theirs.attr("").ino
    View(alice, "first").write("file", b"from alice")
    alice.flush()
    bob.refresh()
    flags = os.O_CREAT | os.O_RDWR
    opened, attr = bob.world.run(bob.fs.create, parent, b"file", 0o644, flags)
    assert attr.size == 10
    assert theirs.pread(opened.fh, 0, 100) == b"from alice"
    theirs.release(opened.fh)
    with pytest.raises(OSError) as caught:
        bob.world.run(bob.fs.create, parent, b"file", 0o644, flags | os.O_EXCL)
    assert caught.value.errno == errno.EEXIST
    opened, attr = bob.world.run(bob.fs.create, parent, b"file", 0o644, flags | os.O_TRUNC)
    assert attr.size == 0
    theirs.release(opened.fh)


# -- memory and a full disk ----------------------------------------------------------------------------


def test_writers_are_told_of_a_full_disk_instead_of_waiting(alice):
    services = alice.session.services
    services.budget._limit = 2 * MIB
    real = services.spool.write

    def full(block):
        raise MeshkitError("no_space", "the spool's filesystem is full")

    services.spool.write = full
    view = View(alice, "first")
    written = {}

    def write(name, at, size):
        view.pwrite(handles[name], at, pattern(at, size))
        written[name, at] = pattern(at, size)

    names = ["big", *(f"small{i}" for i in range(6))]
    handles = {name: view.create(name) for name in names}
    view.truncate("big", 1)
    view.truncate("big", 8 * MIB)
    # Parts of blocks, which wait in memory for more, up to just below the limit, ...
    for i in range(31):
        write("big", 2 * i * BLOCK, BLOCK - 10)
    # ... and several writes at once that each find room: well above it. One block less makes no room then.

    async def write_all():
        async with trio.open_nursery() as nursery:
            for name in names[1:]:
                nursery.start_soon(alice.fs.write, handles[name], 0, pattern(0, 60_000))

    alice.world.run(write_all)
    written |= {(name, 0): pattern(0, 60_000) for name in names[1:]}
    assert services.budget.held > services.budget._limit + BLOCK
    with pytest.raises(OSError) as caught:
        write("big", 7 * MIB, 10)
    assert caught.value.errno == errno.ENOSPC

    def check(view):
        for (name, at), data in written.items():
            fh = view.open(name, os.O_RDONLY)
            assert view.pread(fh, at, len(data)) == data
            view.release(fh)

    check(view)
    services.spool.write = real
    alice.flush()  # there is room again, and nothing of what was accepted is lost
    check(view)
    for fh in handles.values():
        view.release(fh)
    check(restart(alice))


def test_memory_is_given_back_where_no_commit_helps(alice):
    """Changed blocks of a file without a name, and of a share that cannot be published now."""
    services = alice.session.services
    services.budget._limit = 2 * MIB
    view = View(alice, "first")
    fh = view.create("file")
    view.unlink("file")
    for at in range(0, 16 * MIB, BLOCK):
        view.pwrite(fh, at, pattern(at, BLOCK - 10))
    alice.flush()
    view.pwrite(fh, 5, b"more")
    assert not alice.share().dirty  # there is nothing to commit
    for at in range(10 * BLOCK, 16 * MIB, 10 * BLOCK):
        assert view.pread(fh, at, BLOCK - 10) == pattern(at, BLOCK - 10)
    view.release(fh)
    view.forget_all()
    eventually(alice.world, lambda: services.budget.held == 0)
    assert services.budget.sealing == 0


def test_counted_memory_comes_back_to_nothing(alice):
    """After any history the budget is what is really held, or writers would one day wait for ever."""
    services = alice.session.services
    view = View(alice, "first")
    rng = random.Random(3)
    names = ["a", "b", "c"]
    for step in range(150):
        name = rng.choice(names)
        if name not in view.listdir():
            view.release(view.create(name))
        action = rng.randrange(7)
        if action < 3:
            fh = view.open(name)
            view.pwrite(
                fh, rng.choice([0, 5, 100_000, 300_000]), pattern(step, rng.choice([1, 20_000, 128 * KIB]))
            )
            view.release(fh)
        elif action == 3:
            view.truncate(name, rng.choice([0, 10, 65_536, 400_000]))
        elif action == 4:
            view.unlink(name)
        elif action == 5:
            alice.flush()
        else:
            view.rename(name, rng.choice(names))
    alice.flush()
    view.forget_all()
    eventually(alice.world, lambda: services.budget.held == 0)
    assert services.budget.sealing == 0
