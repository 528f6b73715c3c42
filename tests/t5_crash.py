"""Kill the daemon with SIGKILL under load: what an fsync promised is there after the next mount.

The writers (crash_writer.py) keep a manifest outside the mount; a name enters it only after its fsync
returned. A third program (crash_granter.py) grants the share and revokes it meanwhile: whom it was told to be
revoked is refused after the next mount. A round proves nothing unless something was on its way when the daemon
died, so that is counted.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
from homes import HERE, Person, errno_of, invite, needs_fuse, wait_until

pytestmark = needs_fuse

WRITERS = 2


class Promises:
    """What one manifest demands of one directory."""

    def __init__(self, path):
        self.files = {}  # name -> sha, None while it was being changed in place
        self.allowed = {}  # name -> every sha that may be seen under it, if it is there at all
        self.moves = {}  # old name -> (new name, sha), while nobody knows which of the two it has
        self.gone = set()
        self.directories = set()
        self.attributes = {}
        for line in path.read_text().splitlines():
            kind, name, *rest = json.loads(line)
            getattr(self, "_" + kind.replace("-", "_"))(name, *rest)

    def _touched(self, name):
        """Something is about to happen to ``name``: a move whose end nobody saw says nothing of it any more."""
        self.gone.discard(name)
        self.moves = {old: move for old, move in self.moves.items() if name not in (old, move[0])}

    def _intent(self, name, sha):
        self._touched(name)
        if name not in self.allowed or self.allowed[name] is not None:
            self.allowed.setdefault(name, set()).add(sha)
        # A file that is replaced starts without the attributes of the one before.
        self.attributes.pop(name, None)

    def _file(self, name, sha):
        self.files[name] = sha
        self.allowed[name] = {sha}

    def _maybe(self, name):
        self._touched(name)
        self.files[name] = self.allowed[name] = None

    def _moving(self, old, new, sha):
        self._touched(old)
        self._touched(new)
        self.files.pop(old, None)
        self.attributes.pop(old, None)
        self.allowed[old] = self.allowed[new] = {sha}
        self.moves[old] = (new, sha)

    def _moved(self, old, new, sha):
        del self.moves[old]
        self._gone(old)
        self._file(new, sha)

    def _maybe_gone(self, name):
        self._touched(name)
        self.files.pop(name, None)
        self.attributes.pop(name, None)

    def _gone(self, name):
        self.gone.add(name)
        self.allowed[name] = set()

    def _dir(self, name):
        self.directories.add(name)

    def _xattr_maybe(self, name):
        self._touched(name)
        self.attributes.pop(name, None)

    def _xattr(self, name, value):
        self.attributes[name] = value

    def check(self, base):
        found = {name: sha_of(base / name) for name in os.listdir(base) if name.startswith("file")}
        found |= {name: sha_of(base / name) for name in self.files if "/" in name}
        for name in self.files:
            assert name in found, f"{name} is lost"
        for name, sha in found.items():
            assert name in self.allowed, f"{name} was never made"
            allowed = self.allowed[name]
            # Whole old content or whole new content; only what was changed in place may be in between.
            assert allowed is None or sha in allowed, f"{name} has lost what was fsynced, or is half of it"
        for old, (new, _) in self.moves.items():
            assert (old in found) != (new in found), f"{old} was renamed to {new}, and it is not one of them"
        for name in self.gone:
            assert not os.path.lexists(base / name), f"{name} was removed and is back"
        for name in self.directories:
            assert (base / name).is_dir(), f"directory {name} is gone"
        for name, value in self.attributes.items():
            assert os.getxattr(base / name, "user.promise").decode() == value

    def __len__(self):
        return len(self.files) + len(self.gone) + len(self.directories) + len(self.attributes)


def sha_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextlib.contextmanager
def programs(*commands):
    """Run programs of this directory until the block ends; they end by themselves when the mount does."""
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / name, *map(str, args)],
            stderr=subprocess.PIPE,
            cwd="/",
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        )
        for name, *args in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def check_access(bob, share, manifest):
    """What the owner was told last, about Bob's access, is so for Bob; returns that line."""
    last = manifest.read_text().splitlines()[-1]
    code = bob.ask("explain", path=share)["code"]
    if last == "revoked":
        assert code == "share_revoked", f"the revocation was acknowledged, and Bob is told {code or 'yes'}"
    elif last == "granted":
        assert code == "", f"the grant was acknowledged, and Bob is told {code}"
    assert code in ("", "share_revoked")
    assert errno_of(os.listdir, bob.mnt / share) == (errno.EACCES if code else 0)
    # Each grant is also a letter, and a mailbox has room for a thousand.
    for letter in bob.ask("inbox.list")["letters"]:
        bob.ask("inbox.accept", letter=letter["id"])
    return last


def rounds_of_killing(tmp_path, count, seed):
    print(f"seed {seed}")
    dice = random.Random(seed)
    manifests = [tmp_path / f"manifest{i}" for i in range(WRITERS)]
    grants = tmp_path / "grants"
    on_the_way, revoked, between = 0, 0, 0
    with Person(tmp_path / "home", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.cli("share", "create", "first")
        bob.mount()
        name = invite(alice, "first", bob)["name"]
        alice.cli("share", "revoke", "first", "bob")
        grants.write_text("revoked\n")

        def check():
            base = alice.mnt / "first"
            for i, path in enumerate(manifests):
                if path.exists():
                    Promises(path).check(base / f"w{i}")
            return check_access(bob, name, grants)

        for number in range(count):
            base = alice.mount() / "first"
            last = check()
            revoked += last == "revoked"
            between += last in ("granting", "revoking")
            wanted = lines(manifests[0]) + dice.randrange(5, 40)
            # Every other time the last that is acknowledged is a revocation, while the writers go on.
            limit = number % 2
            commands = [
                ("crash_writer.py", base / f"w{i}", path, dice.randrange(1 << 30))
                for i, path in enumerate(manifests)
            ]
            commands.append(("crash_granter.py", alice.root, "first", "bob", grants, limit))
            with programs(*commands) as processes:

                def far_enough(wanted=wanted, limit=limit, processes=processes):
                    if processes[0].poll() is not None or processes[-1].poll():
                        return True
                    return lines(manifests[0]) >= wanted and (not limit or processes[-1].poll() == 0)

                wait_until(far_enough, f"the writers' progress in round {number}", 300)
                for process in processes[:-1]:
                    assert process.poll() is None, process.stderr.read().decode()
                assert not processes[-1].poll(), processes[-1].stderr.read().decode()
                status = alice.status()
                on_the_way += bool(status["left"] or status["pending"]["bytes"])
                alice.kill9()
        assert on_the_way, "nothing was on its way at any kill: this run proves nothing"
        base = alice.mount() / "first"
        last = check()
        revoked += last == "revoked"
        between += last in ("granting", "revoking")
        print(
            f"{count} kills: on the way at {on_the_way}, after a revocation {revoked}, within one {between}"
        )
        assert revoked > count // 2
        assert between, "nobody was just being granted or revoked at any kill"
        assert alice.cli("sync", "--timeout", "60")["left"] == [], "an upload did not resume"
        check()
        for path in manifests:
            assert len(Promises(path)) > count
        alice.umount()
        # Everything is published, so nothing may depend on this device's spool any more.
        spooled = [path for path in (alice.root / "cache").rglob("*") if path.is_file()]
        for path in spooled:
            path.unlink()
        alice.mount()
        check()
        alice.umount()


def test_kill_9_under_load(tmp_path):
    rounds_of_killing(tmp_path, 5, int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30))))


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_kill_9_two_hundred_times(tmp_path):
    rounds_of_killing(tmp_path, 200, int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30))))
