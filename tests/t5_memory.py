"""How much memory and room a real daemon takes: bounded by what is written down, not by what is copied."""

import json
import os
import random
import threading

import pytest
from homes import Person, in_the_foreground, needs_fuse, wait_until

from meshkitfs.daemon.opening import READ_CACHE
from meshkitfs.shares._sealer import MEMORY_LIMIT

MIB = 1 << 20
# What a daemon may need beside its buffers and its cache: requests of the kernel, batches of blocks on their way
# through sealing and upload, thread stacks, what the allocator keeps.
SLACK = 96 * MIB
# Beyond its limit the spool holds what was being sealed when it was reached.
SPOOL_SLACK = 2 * MIB


def pages(seed, size):
    """``size`` bytes that do not compress and never repeat, in pieces of one MiB; the same for a seed."""
    dice = random.Random(seed)
    for at in range(0, size, MIB):
        yield dice.randbytes(min(MIB, size - at))


def peak(pid):
    """The most memory that the process ever had, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def spool_limit(person, limit):
    path = person.root / "meshkit.config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"writing": {"spoolLimit": limit}}))


class Copy(threading.Thread):
    """A program that writes a large file; ``written`` is how far it came."""

    def __init__(self, path, seed, size):
        super().__init__(daemon=True)
        self.path, self.seed, self.size = path, seed, size
        self.written, self.error = 0, None
        self.start()

    def run(self):
        try:
            with open(self.path, "wb", buffering=0) as file:
                for page in pages(self.seed, self.size):
                    for at in range(0, len(page), 128 << 10):
                        self.written += file.write(page[at : at + (128 << 10)])
                os.fsync(file.fileno())
        except OSError as error:
            self.error = error


def same(path, seed, size):
    with open(path, "rb", buffering=0) as file:
        return all(file.read(len(page)) == page for page in pages(seed, size)) and not file.read(1)


@needs_fuse
def test_a_writer_that_is_faster_than_the_provider_waits(tmp_path):
    """Back-pressure instead of growth: it gets as far as memory and spool reach, and goes on when there is room."""
    limit, size = 64 * MIB, 512 * MIB
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        spool_limit(alice, limit)
        answers = tmp_path / "answers"
        alice.env["STORE_ANSWERS"] = str(answers)
        with in_the_foreground(alice, "silent_store.py") as process:
            before = peak(process.pid)
            copy = Copy(alice.mnt / "first/large", 1, size)
            wait_until(lambda: alice.status()["spool"]["used"] > limit, "the full spool")
            # Nobody waits for it to begin to wait: as long as it has not, what is accepted goes on growing.
            seen = [-1] * 10
            while len(set(seen)) > 1 or copy.written != seen[-1]:
                seen = [*seen[1:], copy.written]
                status = alice.status()
            assert copy.is_alive()
            assert copy.written < limit + MEMORY_LIMIT + SPOOL_SLACK + 16 * MIB
            assert limit < status["spool"]["used"] < limit + SPOOL_SLACK
            assert status["pending"]["memory"] <= MEMORY_LIMIT + 2 * MIB
            assert (alice.mnt / "first").stat().st_size >= 0, "others wait with it"
            answers.touch()
            most = 0
            while copy.is_alive():
                most = max(most, alice.status()["spool"]["used"])
            assert copy.error is None
            assert most < limit + SPOOL_SLACK
            assert peak(process.pid) - before < MEMORY_LIMIT + SLACK
            assert same(alice.mnt / "first/large", 1, size)
            assert peak(process.pid) - before < MEMORY_LIMIT + READ_CACHE + SLACK
            assert alice.cli("umount")["left"] == []


@needs_fuse
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_gigabytes_take_no_more_memory_than_the_first(tmp_path):
    """A copy of any size (COPY_MIB): what it takes is reached early, and the rest adds next to nothing."""
    first, size = 512 * MIB, int(os.environ.get("COPY_MIB", "3072")) * MIB
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        spool_limit(alice, 256 * MIB)
        base = alice.mount() / "first"
        before = peak(alice.pid)
        copy = Copy(base / "large", 2, size)
        wait_until(lambda: copy.written > first or not copy.is_alive(), "the first part", 600)
        early, spool = peak(alice.pid), 0
        while copy.is_alive():
            spool = max(spool, alice.status()["spool"]["used"])
        late = peak(alice.pid)
        alice.umount()
        base = alice.mount() / "first"
        assert same(base / "large", 2, size)
        read = peak(alice.pid)
        print(
            f"peak of the daemon in MiB: {before >> 20} at rest, {early >> 20} after {first >> 20} MiB, "
            f"{late >> 20} after {size >> 20} MiB, {read >> 20} reading; spool {spool >> 20}"
        )
        assert copy.error is None
        assert early - before < MEMORY_LIMIT + SLACK
        assert late - early < 32 * MIB
        assert read - before < READ_CACHE + SLACK
        assert spool < 256 * MIB + SPOOL_SLACK


@needs_fuse
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_small_files_take_a_little_each(tmp_path):
    """A tree has its names and attributes in memory, and no contents."""
    count, half = 20_000, 10_000
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mount() / "first"
        before = peak(alice.pid)
        dice = random.Random(3)
        peaks = []
        for number in range(count):
            if number % 1000 == 0:
                (base / f"d{number:05}").mkdir()
            (base / f"d{number // 1000 * 1000:05}/{number:05}").write_bytes(dice.randbytes(4096))
            if number + 1 in (half, count):
                peaks.append(peak(alice.pid))
        each = (peaks[1] - peaks[0]) / (count - half)
        print(f"peak of the daemon in MiB: {before >> 20} at rest, {peaks[0] >> 20} after {half} files, "
              f"{peaks[1] >> 20} after {count}: {each:.0f} bytes each")  # fmt: skip
        assert each < 2048, "contents stay in memory"
        alice.umount()
