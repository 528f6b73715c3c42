"""prune, gc and verify beside a real mount that is in use, with real files."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading

import evil
import pytest
from homes import Person, errno_of, needs_fuse, write_synced

pytestmark = needs_fuse

BIG = os.urandom(700_000)


@pytest.fixture
def alice(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.mount()
        yield alice


def test_a_weekly_routine_beside_work(alice, tmp_path):
    share = alice.mnt / "first"
    share.mkdir()
    for i in range(5):
        write_synced(share / "large", BIG[i * 1000 :])
        write_synced(share / f"file {i}", b"%d" % i)
    write_synced(share / "held", BIG)
    held = os.open(share / "large", os.O_RDONLY)
    stop, failures, written = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                name = f"new {len(written)}"
                write_synced(share / name, b"written beside it " + name.encode())
                written.append(name)
        except OSError as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        before = len(evil.all_blocks(alice.blocks))
        assert alice.cli("prune", "first", "--keep-last", "1")["given_up"] >= 11
        assert alice.cli("gc", "first")["blocks"] == 0  # the grace
        done = alice.cli("gc", str(share), "--grace", "0d", "--yes")
        assert (done["deleted"], done["versions"] >= 11) == (True, True)
        (found,) = alice.cli("verify", "first")["shares"]
        assert (found["failure"], found["broken"]) == (None, [])
        assert os.pread(held, 1 << 20, 0) == BIG[4000:]
    finally:
        stop.set()
        worker.join(60)
        os.close(held)
    assert failures == []
    assert len(written) > 0
    assert before > 0
    alice.remount()
    assert (share / "held").read_bytes() == BIG
    assert (share / "large").read_bytes() == BIG[4000:]
    assert [(share / name).read_bytes() for name in written] == [
        b"written beside it " + name.encode() for name in written
    ]
    assert sorted(os.listdir(share)) == sorted(["large", "held", *(f"file {i}" for i in range(5)), *written])


def test_damage_is_named_and_mended_under_a_mount(alice, tmp_path):
    share = alice.mnt / "first"
    share.mkdir()
    write_synced(share / "large", BIG)
    shutil.copytree(alice.blocks, tmp_path / "copy")
    victim = max(evil.all_blocks(alice.blocks).items(), key=lambda item: item[1].stat().st_size)[0]
    evil.flip_file(alice.blocks, victim)
    alice.remount()
    assert errno_of((share / "large").read_bytes)
    found = alice.run("verify", "first", "--json", check=False)
    assert found.code == 6
    (broken,) = found.json["shares"][0]["broken"]
    assert broken["paths"] == ["large"]
    # Also said from inside the mount, where there may be a directory of the share's name, or of a place in it.
    (share / "first").mkdir()
    for place in ("first", ".", "../first", f"{share}"):
        done = subprocess.run(
            [alice.python, "-m", "meshkitfs", "verify", place], cwd=share, env=alice.env, capture_output=True
        )
        assert done.returncode == 6, done.stderr
    done = alice.cli("repair", "first", "--from", f"local:{tmp_path / 'copy'}")
    assert (done["repaired"], done["broken"]) == (1, [])
    assert (share / "large").read_bytes() == BIG
