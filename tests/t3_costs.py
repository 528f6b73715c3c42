"""What things cost, in counts: heads, commits, blocks stored, signatures, walks through the gate, requests.

The world's clock stands still, so nothing here depends on how fast the machine is.
"""

import math
import os
import shutil
import time

import pytest
import trio
from devices import Device, World, pattern, scratch

from meshkitfs.core.blocks import REFS_PER_INDEX, SealedBlock
from meshkitfs.core.keys import SigningKey
from meshkitfs.shares import _pace
from meshkitfs.state import Spool

KIB = 1024
MIB = 1024 * KIB


class Meter:
    """Counts what a device does from `reset` on."""

    def __init__(self, device, monkeypatch):
        self.device = device
        self.publishes = self.signatures = 0
        self.spooled = []  # sizes of sealed blocks
        metadata = device.session.metadata
        publish, sign, write = metadata.publish, SigningKey.sign, Spool.write

        async def counted_publish(publication):
            self.publishes += 1
            await publish(publication)

        def counted_sign(key, *args):
            # The metadata store signs its timestamps with a key of its own.
            self.signatures += key.public == device.session.identity.signing.public
            return sign(key, *args)

        def counted_write(spool, block: SealedBlock):
            self.spooled.append(len(block.data))
            return write(spool, block)

        metadata.publish = counted_publish
        monkeypatch.setattr(SigningKey, "sign", counted_sign)
        monkeypatch.setattr(Spool, "write", counted_write)
        self.reset()

    def _now(self):
        session, share = self.device.session, self.device.share()
        return {
            "puts": session.store.counters.puts,
            "gets": session.store.counters.gets,
            "bytes out": session.store.counters.bytes_out,
            "walks": session.gate.counters.walks,
            "unwraps": session.gate.counters.unwraps,
            "decrypts": session.services.reader.counters.opens,
            "commits": share.counters.commits,
            "heads": share.counters.heads,
            "publishes": self.publishes,
            "signatures": self.signatures,
            "sealed": len(self.spooled),
        }

    def reset(self):
        self._start = self._now()

    def __getitem__(self, name):
        return self._now()[name] - self._start[name]

    def __str__(self):
        return ", ".join(f"{name} {self[name]}" for name in self._start)


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
    device.view().listdir()
    yield device
    if device.session is not None:
        device.close()


@pytest.fixture
def meter(device, monkeypatch):
    return Meter(device, monkeypatch)


def quiet(device):
    """Time passes until everything is published; returns how many seconds of the world's clock that took."""
    passed, until = 0.0, time.monotonic() + 120
    while device.share().dirty:
        device.world.pass_time(0.1)
        passed += 0.1
        time.sleep(0.001)
        assert time.monotonic() < until
    device.flush()  # waits until the cycle has noted down what it did
    return passed


def pause(meter):
    """Let what has begun get done before the clock goes on; to pause too short hides costs, and never adds any."""
    before = ""
    while before != str(meter):
        before = str(meter)
        time.sleep(0.02)


def make_files(device, directory, names, data=b""):
    """Create, write and close many files, in one trip to the loop; what `View.write` does for each."""
    parent = device.view().attr(directory).ino
    fs = device.fs

    async def make():
        for number, name in enumerate(names):
            opened, attr = await fs.create(parent, name, 0o644, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            if data:
                await fs.write(opened.fh, 0, data + b"%d" % number)
            await fs.flush(opened.fh)
            await fs.release(opened.fh)
            fs.forget(attr.ino, 1)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()

    device.world.run(make)


def untar(device, meter, count):
    """``count`` small files in ten directories, at 100 files a second of the world's clock; checks what it cost."""
    view = device.view()
    for i in range(10):
        view.mkdir(f"dir{i}")
    device.flush()
    device.refresh()
    meter.reset()
    chunk, seconds = 100, 0.0
    for at in range(0, count, chunk):
        directory = at * 10 // count
        make_files(device, f"dir{directory}", [b"file%06d" % i for i in range(at, at + chunk)], b"content ")
        device.world.pass_time(0.1)
        seconds += 0.1
        pause(meter)
    seconds += quiet(device)
    print(f"{count} files in {seconds:.1f} s of the world's clock: {meter}")
    heads = meter["heads"]
    # While changes go on a cycle begins once in BUSY_DELAY_S, plus the quick one at the beginning and the last one.
    most = math.ceil(seconds / _pace.BUSY_DELAY_S) + 2
    assert 0 < heads <= most
    assert meter["commits"] == heads
    assert meter["publishes"] == heads
    assert meter["signatures"] == heads
    # Each file is one manifest, once. Each head has the root, the directories, and of those the pages that changed.
    pages = math.ceil(count / 10 / 128) + 1  # a page that is split is half full: at least 128 of 256 entries
    assert count <= meter["puts"] <= count + heads * (1 + 10 * (1 + pages))
    # Where a head touches only the directory of the moment it is far less; two may be under way at a boundary.
    assert meter["puts"] <= count + heads * (1 + 3 * (1 + pages))
    assert meter["walks"] <= 2 * heads + 2
    assert meter["unwraps"] == 0, "the key was known"
    assert meter["gets"] == 0
    device.close()
    device.start()
    for i in range(10):
        assert len(device.view().listdir(f"dir{i}")) == count // 10


def test_many_small_files_are_a_few_heads(device, meter):
    untar(device, meter, 2_000)


@pytest.mark.long
def test_ten_thousand_small_files_are_a_few_heads(device, meter):
    untar(device, meter, 10_000)


def test_a_flood_between_two_moments_is_one_head(device, meter):
    device.view().mkdir("dir")
    device.flush()
    meter.reset()
    make_files(device, "dir", [b"%04d" % i for i in range(1000)], b"content ")
    quiet(device)
    assert (meter["heads"], meter["commits"], meter["publishes"], meter["signatures"]) == (1, 1, 1, 1)


def test_one_page_of_a_ten_gigabyte_database(device, meter):
    """One block, its index block, the manifest, the directories up to the root, and nothing else."""
    view = device.view()
    size = 10 << 30
    view.mkdir("a")
    view.mkdir("a/b")
    fh = view.create("a/b/database")
    # A database writes here and there, and syncs: 64 KiB blocks.
    view.pwrite(fh, 0, pattern(1, 100 * KIB))
    view.pwrite(fh, 4 * KIB, b"a page")
    view.fsync(fh)
    ino = view.attr("a/b/database").ino
    assert device.share().tree.nodes[ino].content.block_size == 64 * KIB
    view.truncate("a/b/database", size)
    segment = REFS_PER_INDEX * 64 * KIB
    # Real blocks in several segments of the index.
    for number in range(size // segment + 1):
        if number * segment + 128 * KIB < size:
            view.pwrite(fh, number * segment + 64 * KIB, pattern(number, 64 * KIB))
    view.fsync(fh)
    device.refresh()
    assert view.attr("a/b/database").size == size
    assert size // segment >= 2, "it has only one index block: this proves nothing"
    at = (size // segment - 1) * segment + 64 * KIB
    for again in range(2):
        meter.reset()
        view.pwrite(fh, at + 8 * KIB, b"%d" % again + b"p" * (4 * KIB - 1))
        view.fsync(fh)
        print(f"one page of {size >> 30} GiB: {meter}, sizes {meter.spooled[-meter['sealed'] :]}")
        # The block, its index block, the file's manifest, a/b, a, the root.
        assert meter["puts"] == meter["sealed"] == 6
        assert (meter["heads"], meter["commits"], meter["signatures"]) == (1, 1, 1)
        # A block of 64 KiB, an index block of as many references, and small things.
        index = REFS_PER_INDEX * 64
        assert sum(meter.spooled[-6:]) <= (64 * KIB + index) * 1.13 + 4 * 4 * KIB + (size // segment + 1) * 64
        # The block that is changed in place is read, and its index block.
        assert meter["gets"] <= 2
        device.refresh()
    view.release(fh)
    assert view.attr("a/b/database").size == size
    fh = view.open("a/b/database", os.O_RDONLY)
    assert view.pread(fh, at + 8 * KIB, 4 * KIB) == b"1" + b"p" * (4 * KIB - 1)
    assert (
        view.pread(fh, at + 12 * KIB, 10) == pattern(size // segment - 1, 64 * KIB)[12 * KIB : 12 * KIB + 10]
    )
    view.release(fh)


def one_entry(device, meter, count):
    view = device.view()
    view.mkdir("many")
    names = [b"%08d" % (i * 7919 % 100_000_000) for i in range(count)]
    make_files(device, "many", names)
    device.flush()
    device.refresh()
    middle = names[count // 2].decode()
    for change in (
        lambda: view.setattr(f"many/{middle}", mode=0o600),
        lambda: view.unlink(f"many/{middle}"),
        lambda: view.symlink(f"many/{middle}", b"target"),
    ):
        meter.reset()
        change()
        device.flush()
        print(f"one entry of {count}: {meter}, sizes {meter.spooled[-meter['sealed'] :]}")
        # The page, the directory's manifest (which lists the pages), the root.
        assert meter["puts"] == meter["sealed"] == 3
        assert meter["heads"] == meter["signatures"] == 1
        # A page has at most 256 entries of these short names; the manifest about 100 bytes for each page.
        assert sum(meter.spooled[-3:]) <= 64 * KIB + count // 128 * 128 + 8 * KIB
        device.refresh()
    # A file's own content is one manifest more.
    meter.reset()
    view.write(f"many/{names[1].decode()}", b"content")
    device.flush()
    assert meter["puts"] == 4


def test_one_entry_of_a_large_directory(device, meter):
    one_entry(device, meter, 10_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_one_entry_of_a_hundred_thousand(device, meter):
    device.world.patience_s = 900.0
    one_entry(device, meter, 100_000)


def test_listing_again_asks_nobody(device, meter):
    view = device.view()
    view.mkdir("dir")
    make_files(device, "dir", [b"%04d" % i for i in range(1000)], b"content ")
    device.close()
    device.start()
    meter.__init__(device, pytest.MonkeyPatch())
    view = device.view()
    assert len(view.listdir("dir")) == 1000
    assert meter["gets"] > 0, "a first listing comes from the provider, so this proves nothing"
    meter.reset()
    for _ in range(3):
        assert len(view.scan("dir")) == 1000
        assert view.attr("dir/0500").size == len(b"content 500")
    assert (meter["gets"], meter["decrypts"], meter["walks"], meter["puts"]) == (0, 0, 0, 0)
