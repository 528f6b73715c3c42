"""The end of access against the kernel's caches: two real mounts, and everything that can outlive an open.

A new way in which access ends is one more row of `ENDINGS`; every holder is then tried with it.

How long the end takes is a promise of a machine that is not overloaded, so the tests wait for it longer than it is
published: what they prove is that it comes, to each of these, as EACCES (a memory map: SIGBUS), and that nothing
hangs and nothing false is read. With ``-s`` they print how long it took.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import t4_sharing as sharing
from homes import PATIENCE, Person, errno_of, fails, needs_fuse, reason_code, wait_until
from homes import write_synced as put

pytestmark = needs_fuse

MIB = 1 << 20
BUSY = 30.0  # what a machine with other work may need beside the published bound (s)
SMALL = os.urandom(600_000)
PIECE = os.urandom(MIB)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("leases")
    with Person(base / "alice", "alice") as alice, Person(base / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        yield alice, bob


@dataclass
class Scene:
    """A share of alice's, seen by both. ``size`` is that of the big file in it."""

    alice: Person
    bob: Person
    name: str
    mine: Path
    theirs: Path
    size: int


@dataclass(frozen=True)
class Ending:
    """A way in which access ends: what bob is refused with, and what makes it so.

    ``begins`` is called before alice grants, to make what the ending needs, and ``terms`` go to ``share.add``;
    ``happens`` returns the published bound in seconds; ``after`` sets right what the next scene needs.
    """

    code: str
    happens: Callable[[Scene], float]
    begins: Callable[[Person], None] = lambda alice: None
    terms: tuple[tuple[str, str], ...] = ()
    after: Callable[[Scene], None] = lambda scene: None


def revoke(scene):
    return scene.alice.ask("share.revoke", share=scene.name, recipient="bob")["bound_seconds"]


def expire(scene):
    """Alice replaces the grant by one that ends soon: whatever holds the share is there already."""
    scene.alice.ask("share.add", target=scene.name, recipient="bob", rights=["read", "write"], expires="4s")
    return 4 + scene.bob.status()["access"]["noticed_seconds"]


def change_policy(scene):
    """The rules are replaced by ones that permit everything but what bob asks for."""
    rules = 'permit(principal == Identity::"carol", action, resource);'
    changed = scene.alice.ask("policy.edit", name="leases", rules=rules)
    assert changed["renewed"] == 1
    return changed["bound_seconds"]


def leave_vault(scene):
    return scene.alice.ask("vault.remove", name="leases", member="bob")["bound_seconds"]


def revoke_token(scene):
    live = [row["token"] for row in scene.alice.ask("capability.list")["issued"] if not row["revoked"]]
    (token,) = live
    return scene.alice.ask("capability.revoke", token=token)["bound_seconds"]


def lock(scene):
    """It is done when the command returns; what the kernel has not dropped after `KERNEL_S` is not waited for."""
    assert scene.bob.ask("lock")["locked"]
    return 0.0


def with_policy(alice):
    alice.ask("policy.create", name="leases", rules='permit(principal == Identity::"bob", action, resource);')


def with_vault(alice):
    alice.ask("vault.create", name="leases")
    alice.ask("vault.add", name="leases", member="bob")


def with_token(alice):
    alice.ask("capability.issue", name="leases", recipient="bob", rights=["write"])


def without(kind):
    """Take away what `begins` made, so that a second scene can make it again."""

    def after(scene):
        scene.alice.ask("share.revoke", share=scene.name, recipient="bob")
        scene.alice.ask(f"{kind}.delete", name="leases")

    return after


ENDINGS = {
    "revoke": Ending("share_revoked", revoke),
    "expiry": Ending("share_expired", expire),
    "policy": Ending(
        "policy_denied", change_policy, with_policy, (("policy", "leases"),), after=without("policy")
    ),
    "vault": Ending(
        "vault_membership_required", leave_vault, with_vault, (("vault", "leases"),), after=without("vault")
    ),
    "capability": Ending("capability_denied", revoke_token, with_token, (("capability", "leases"),)),
    "lock": Ending("identity_locked", lock, after=lambda scene: scene.bob.ask("unlock")),
}


def big_pieces(size):
    """Where the big file has bytes; everywhere else it is sparse."""
    return (0, size // 2, size - MIB)


@pytest.fixture(params=ENDINGS)
def ending(request):
    return ENDINGS[request.param]


@pytest.fixture(params=[256 * MIB, pytest.param(1024 * MIB, marks=pytest.mark.long)], ids=["256M", "1G"])
def scene(pair, ending, request):
    alice, bob = pair
    name = request.node.name.removeprefix("test_")[:60].replace("[", "-").replace("]", "")
    mine, size = alice.mnt / name, request.param
    mine.mkdir()
    (mine / "directory").mkdir()
    put(mine / "directory/inner", b"inside")
    put(mine / "file", SMALL)
    with open(mine / "big", "wb") as file:
        for at in big_pieces(size):
            file.seek(at)
            file.write(PIECE)
        file.flush()
        os.fsync(file.fileno())
    ending.begins(alice)
    theirs = sharing.add(alice, bob, name, rights=["read", "write"], **dict(ending.terms))
    # What bob needs beside the grant may come a moment later, as a token by mail does.
    wait_until(lambda: errno_of(os.listdir, theirs) == 0, "the way in", BUSY)
    scene = Scene(alice, bob, name, mine, theirs, size)
    yield scene
    ending.after(scene)


# == what holds on to a share ========================================================================


class Descriptor:
    """An open descriptor, all of whose bytes are in the page cache."""

    def __init__(self, scene, stack):
        self._fd = os.open(scene.theirs / "file", os.O_RDONLY)
        stack.callback(os.close, self._fd)
        assert os.pread(self._fd, 2 * len(SMALL), 0) == SMALL

    def ended(self):
        return errno_of(os.pread, self._fd, 4096, 0) == errno.EACCES

    def afterwards(self, scene):
        for at in (0, 300_000, len(SMALL) - 10):
            assert errno_of(os.pread, self._fd, 10, at) == errno.EACCES


class Writer:
    """A descriptor open for writing, with bytes that were not stored yet."""

    def __init__(self, scene, stack):
        self._fd = os.open(scene.theirs / "directory/written", os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, self._fd)
        os.write(self._fd, b"before")
        os.fsync(self._fd)

    def ended(self):
        return errno_of(os.pwrite, self._fd, b"after", 0) == errno.EACCES

    def afterwards(self, scene):
        assert errno_of(os.fsync, self._fd) in (0, errno.EACCES)  # what was taken before may go, or not
        assert errno_of(os.pread, self._fd, 5, 0) == errno.EACCES
        assert not (scene.mine / "directory/written").read_bytes().startswith(b"after")


class Resident:
    """Pages in the kernel's page cache, counted with mincore, without touching them."""

    def __init__(self, scene, stack):
        with open(scene.theirs / "file", "rb", 0) as file:
            self._view = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
            assert file.read() == SMALL
        self._held = (ctypes.c_char * len(self._view)).from_buffer(self._view)
        stack.callback(self._close)
        assert self.pages() == -(-len(SMALL) // mmap.PAGESIZE)

    def _close(self):
        del self._held
        self._view.close()

    def pages(self):
        count = -(-len(self._view) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(self._held))
        assert libc.mincore(address, ctypes.c_size_t(len(self._view)), found) == 0, os.strerror(
            ctypes.get_errno()
        )
        return sum(page & 1 for page in found)

    def ended(self):
        return self.pages() == 0

    def afterwards(self, scene):
        assert errno_of(os.open, scene.theirs / "file", os.O_RDONLY) == errno.EACCES
        assert self.pages() == 0


class Process:
    """A program of its own, which is killed if it hangs."""

    def __init__(self, stack, *command, **options):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        stack.callback(self._end)

    def _end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


MAPPED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print(sum(view[i] for i in range(0, len(view), 4096)), flush=True)
while True:
    view[0]
"""


class Mapped(Process):
    """A memory map that is read all the time."""

    def __init__(self, scene, stack):
        super().__init__(stack, sys.executable, "-c", MAPPED, scene.theirs / "file", text=True)
        expected = sum(SMALL[i] for i in range(0, len(SMALL), mmap.PAGESIZE))
        assert int(self.process.stdout.readline()) == expected

    def ended(self):
        return self.process.poll() is not None

    def afterwards(self, scene):
        assert self.process.returncode == -signal.SIGBUS


class Cat(Process):
    """A ``cat`` of the big file, stopped in the middle because nobody takes what it has read."""

    def __init__(self, scene, stack):
        super().__init__(stack, "cat", scene.theirs / "big", stderr=subprocess.PIPE)
        self._size = scene.size
        self._read = self.process.stdout.read(MIB + 4096)

    def ended(self):
        return True  # it is seen when somebody takes the rest

    def afterwards(self, scene):
        rest, said = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 1
        assert b"Permission denied" in said
        read = self._read + rest
        # What the pipe and cat itself held is all that still came, and it is what is in the file.
        assert len(rest) < MIB
        assert read == PIECE + bytes(len(read) - MIB)


class Reading(Process):
    """A program that reads the big file from beginning to end, again and again."""

    def __init__(self, scene, stack):
        loop = 'while cat "$0" >/dev/null; do echo again; done'
        super().__init__(stack, "sh", "-c", loop, scene.theirs / "big", stderr=subprocess.PIPE)

    def ended(self):
        return self.process.poll() is not None

    def afterwards(self, scene):
        _, said = self.process.communicate(timeout=PATIENCE)
        assert b"Permission denied" in said


INSIDE = """
import json, os, sys
os.chdir(sys.argv[1])
assert "inner" in os.listdir(".")
print(flush=True)
for line in sys.stdin:
    found = []
    for call in (lambda: os.listdir("."), lambda: os.open("inner", os.O_RDONLY), lambda: os.mkdir("new"),
                 lambda: os.open("never seen", os.O_RDONLY), lambda: os.listdir("..")):
        try:
            call()
            found.append(0)
        except OSError as error:
            found.append(error.errno)
    print(json.dumps(found), flush=True)
"""


class Inside(Process):
    """A program whose current directory is in the share."""

    def __init__(self, scene, stack):
        super().__init__(stack, sys.executable, "-c", INSIDE, scene.theirs / "directory", text=True)
        self.process.stdout.readline()

    def ended(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._found = json.loads(self.process.stdout.readline())
        return self._found[0] == errno.EACCES

    def afterwards(self, scene):
        assert self.ended()
        assert self._found == [errno.EACCES] * 5


class Attributes:
    """Names and attributes that the kernel was told. They go on being shown as they were: that is how a person can
    ask for the reason. What is new is not."""

    def __init__(self, scene, stack):
        self._path = scene.theirs / "directory/inner"
        self._seen = os.stat(self._path)

    def ended(self):
        return errno_of(os.chmod, self._path, self._seen.st_mode & 0o777) == errno.EACCES

    def afterwards(self, scene):
        put(scene.mine / "directory/inner", b"much longer than before")
        put(scene.mine / "directory/another", b"")
        for _ in range(3):
            with contextlib.suppress(PermissionError):
                now = os.stat(self._path)
                assert (now.st_size, now.st_mtime_ns) == (self._seen.st_size, self._seen.st_mtime_ns)
            with fails(errno.EACCES):
                os.stat(scene.theirs / "directory/another")


HOLDERS = {
    "descriptor": Descriptor,
    "writer": Writer,
    "pages": Resident,
    "mmap": Mapped,
    "cat": Cat,
    "reading": Reading,
    "inside": Inside,
    "attributes": Attributes,
}


def test_whatever_is_open_ends(scene, ending):
    """All of them at once, as on a real machine: none keeps another from its end."""
    with contextlib.ExitStack() as stack:
        holders = {name: kind(scene, stack) for name, kind in HOLDERS.items()}
        begun = time.monotonic()
        bound = ending.happens(scene)
        took = {}
        for name, holder in holders.items():
            wait_until(holder.ended, f"the end of {name}", bound + BUSY)
            took[name] = round(time.monotonic() - begun, 2)
        print(f"{ending.code}: published {bound} s; seen after (s) {took}")
        for name, holder in holders.items():
            holder.afterwards(scene)
            print(f"{name} has ended")
        # While a home is locked only the shares themselves say why, by their names.
        assert reason_code(scene.theirs) == ending.code
        if ending.code != "identity_locked":
            assert reason_code(scene.theirs / "file") == ending.code
        assert errno_of(os.listdir, scene.theirs) == errno.EACCES
    # The mount is well, and so is alice's.
    assert scene.bob.status()["pid"] == scene.bob.pid
    assert (scene.mine / "file").read_bytes() == SMALL


BUSY_WRITER = """
import errno, os, select, sys, time
place, number = sys.argv[1:]
allowed = {errno.EACCES, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EEXIST}
counts = {"ok": 0, "refused": 0}
path = os.path.join(place, f"w{number}")
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(fd, os.urandom(100_000))
            os.pread(fd, 4096, 0)
            if number == "0":
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path, path + ".moved")
        os.listdir(place)
        with open(os.path.join(place, "file"), "rb") as file:
            file.read()
        counts["ok"] += 1
    except OSError as error:
        if error.errno not in allowed:
            print("unexpected", errno.errorcode.get(error.errno, error.errno), flush=True)
            sys.exit(3)
        counts["refused"] += 1
        time.sleep(0.01)
print(counts["ok"], counts["refused"], flush=True)
"""


def test_ending_and_giving_access_again_never_deadlocks_with_writers(pair):
    """Eight times, with programs that write, read, rename and list all the time in the share it is about."""
    alice, bob = pair
    mine = alice.mnt / "stress"
    mine.mkdir()
    put(mine / "file", SMALL)
    theirs = sharing.add(alice, bob, "stress", rights=["read", "write"])
    with contextlib.ExitStack() as stack:
        writers = [
            Process(stack, sys.executable, "-c", BUSY_WRITER, theirs, str(number), text=True)
            for number in range(3)
        ]
        for writer in writers:
            assert writer.process.stdout.readline() == "ready\n"
        for _ in range(8):
            alice.ask("share.revoke", share="stress", recipient="bob")
            wait_until(lambda: errno_of(os.listdir, theirs) == errno.EACCES, "the end", BUSY)
            alice.ask("share.add", target="stress", recipient="bob", rights=["read", "write"])
            wait_until(lambda: errno_of(os.listdir, theirs) == 0, "the new grant", BUSY)
            with (
                open(theirs / "file", "rb") as file,
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
            ):
                assert view[:10] == SMALL[:10]
        for writer in writers:
            out, _ = writer.process.communicate("end\n", timeout=PATIENCE)
            assert writer.process.returncode == 0, out
            done, refused = map(int, out.split())
            print(f"{done} rounds, {refused} refused")
            assert done > 0
    assert (theirs / "file").read_bytes() == SMALL
    bob.cli("sync", "--timeout", "60")
    assert bob.status()["pid"] == bob.pid
