"""Kill the daemon with SIGKILL under load: what an fsync promised is there after the next mount.

The writers (crash_writer.py) keep a manifest outside the mount; a name enters it only after its fsync
returned. A round proves nothing unless something was on its way when the daemon died, so that is counted.
"""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
from homes import HERE, Person, needs_fuse, wait_until

pytestmark = needs_fuse

WRITERS = 2


class Promises:
    """What one manifest demands of one directory."""

    def __init__(self, path):
        self.files = {}  # name -> sha, None while it was being changed
        self.allowed = {}  # name -> every sha that may be seen under it
        self.gone = set()
        self.directories = set()
        self.attributes = {}
        for line in path.read_text().splitlines():
            kind, name, *rest = json.loads(line)
            if kind == "intent":
                self.allowed.setdefault(name, set()).add(rest[0])
                self.gone.discard(name)
            elif kind == "file":
                self.files[name] = rest[0]
                self.allowed[name] = {rest[0]}
                self.gone.discard(name)
            elif kind == "maybe":
                self.files[name] = None
            elif kind == "maybe-gone":
                self.files.pop(name, None)
                self.attributes.pop(name, None)
            elif kind == "gone":
                self.gone.add(name)
            elif kind == "dir":
                self.directories.add(name)
            elif kind == "xattr-maybe":
                self.attributes.pop(name, None)
            elif kind == "xattr":
                self.attributes[name] = rest[0]
            # A file that is replaced starts without the attributes of the one before.
            if kind in ("intent", "gone"):
                self.attributes.pop(name, None)

    def check(self, base):
        for name, sha in self.files.items():
            data = (base / name).read_bytes()
            if sha is not None:
                allowed = self.allowed.get(name, set()) | {sha}
                assert hashlib.sha256(data).hexdigest() in allowed, f"{name} has lost what was fsynced"
        for name in self.gone:
            assert not os.path.lexists(base / name), f"{name} was removed and is back"
        for name in self.directories:
            assert (base / name).is_dir(), f"directory {name} is gone"
        for name, value in self.attributes.items():
            assert os.getxattr(base / name, "user.promise").decode() == value

    def __len__(self):
        return len(self.files) + len(self.gone) + len(self.directories) + len(self.attributes)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextlib.contextmanager
def writers(base, manifests, dice):
    """Run the writers until the block ends; they end by themselves when the mount does."""
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "crash_writer.py", base / f"w{i}", path, str(dice.randrange(1 << 30))],
            stderr=subprocess.PIPE,
            cwd="/",
        )
        for i, path in enumerate(manifests)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def rounds_of_killing(tmp_path, count, seed):
    print(f"seed {seed}")
    dice = random.Random(seed)
    manifests = [tmp_path / f"manifest{i}" for i in range(WRITERS)]
    on_the_way = 0
    with Person(tmp_path / "home", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        for number in range(count):
            base = alice.mount() / "first"
            for i, path in enumerate(manifests):
                if path.exists():
                    Promises(path).check(base / f"w{i}")
            wanted = lines(manifests[0]) + dice.randrange(5, 40)
            with writers(base, manifests, dice) as processes:
                wait_until(
                    lambda wanted=wanted: lines(manifests[0]) >= wanted or processes[0].poll() is not None,
                    f"the writers' progress in round {number}",
                )
                assert processes[0].poll() is None, processes[0].stderr.read().decode()
                status = alice.status()
                on_the_way += bool(status["left"] or status["pending"]["bytes"])
                alice.kill9()
        assert on_the_way, "nothing was on its way at any kill: this run proves nothing"
        base = alice.mount() / "first"
        assert alice.cli("sync", "--timeout", "60")["left"] == [], "an upload did not resume"
        for i, path in enumerate(manifests):
            promises = Promises(path)
            assert len(promises) > count
            promises.check(base / f"w{i}")
        alice.umount()
        # Everything is published, so nothing may depend on this device's spool any more.
        spooled = [path for path in (alice.root / "cache").rglob("*") if path.is_file()]
        for path in spooled:
            path.unlink()
        base = alice.mount() / "first"
        for i, path in enumerate(manifests):
            Promises(path).check(base / f"w{i}")
        alice.umount()


def test_kill_9_under_load(tmp_path):
    rounds_of_killing(tmp_path, 8, int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30))))


@pytest.mark.long
def test_kill_9_two_hundred_times(tmp_path):
    rounds_of_killing(tmp_path, 200, int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30))))
