"""People with homes of their own, real daemons and real mounts; everything is ended by process id.

    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        mnt = alice.mount()                     # waits until it answers; alice.mnt is the same path
        with Person(tmp_path / "bob", "bob") as bob:
            bob.init(beside=alice)              # same byte store and metadata store
            ...

`cli` runs the real program in a process of its own. `status` and `counters` ask the daemon over its control
socket, which is exact; `status_file` reads ``.meshkit/status.json``, which may be half a second old.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshkitfs.daemon import client
from meshkitfs.daemon.home import Home
from meshkitfs.fuse import preflight

HERE = Path(__file__).resolve().parent
PATIENCE = 60
# What `status` says of a home in which nothing waits.
NOTHING = {"blocks": 0, "bytes": 0, "memory": 0}
REASON = "user.meshkit.reason"

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="NO REAL MOUNT HERE: /dev/fuse cannot be opened"
)


class CliFailure(AssertionError):
    """A command that should have succeeded did not."""


class Result:
    """What a command printed and returned. ``json`` is its result, ``error`` its failure (with --json)."""

    def __init__(self, args, code, out, err):
        self.args, self.code, self.out, self.err = args, code, out, err

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def error(self):
        return json.loads(self.err.strip().splitlines()[-1])["error"]

    def __repr__(self):
        return f"{' '.join(self.args)} -> {self.code}\n{self.out}\n{self.err}"


class Person:
    """One home directory, its commands and its mount."""

    def __init__(self, root, name, mnt=None, python=sys.executable):
        self.root = Path(root)
        self.python = python
        self.name = name
        self.mnt = Path(mnt) if mnt else self.root.with_name(self.root.name + ".mnt")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MESHKIT")}
        self.env |= {"MESHKITFS_HOME": str(self.root), "PYTHONPATH": str(HERE.parent), "LC_ALL": "C.UTF-8"}
        self.home = Home(self.root)
        self.daemons = []  # process ids of every daemon this object started
        self.outputs = []  # everything commands printed, for the tests that look for secrets in it

    @property
    def blocks(self):
        return self.root / "blocks"

    @property
    def metadata(self):
        return self.root / "metadata.db"

    # -- commands --------------------------------------------------------------------------------

    def run(self, *args, check=True, stdin=None, timeout=PATIENCE, env=None, prefix=()):
        """Run ``meshkitfs ARGS`` as this person and return its `Result`."""
        done = subprocess.run(
            [*prefix, self.python, "-m", "meshkitfs", *map(str, args)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            env=self.env | (env or {}),
            cwd="/",
        )
        result = Result(
            [self.name, *map(str, args)],
            done.returncode,
            done.stdout.decode(errors="surrogateescape"),
            done.stderr.decode(errors="surrogateescape"),
        )
        self.outputs += [result.out, result.err]
        if check and result.code != 0:
            raise CliFailure(repr(result))
        return result

    def cli(self, *args, check=True, **options):
        """Run a command with ``--json``; returns its parsed result, or with ``check=False`` the `Result`."""
        result = self.run("--json", *args, check=check, **options)
        return result.json if check else result

    def init(self, beside=None, *options, key_vault="plain-file"):
        """Set this home up; ``beside`` is the person whose byte store and metadata store are used too."""
        stores = []
        if beside is not None:
            stores = ["--provider", f"local:{beside.blocks}", "--metadata", str(beside.metadata)]
        return self.cli("init", "--identity", self.name, "--key-vault", key_vault, *stores, *options)

    def configure(self, **sections):
        """Put ``sections`` into the configuration file; the next daemon reads them."""
        path = self.root / "meshkit.config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | sections))

    # -- the mount -------------------------------------------------------------------------------

    def mount(self, *options, check=True):
        """Mount in the background and return the mount point; with ``check=False`` the command's `Result`."""
        self.mnt.mkdir(parents=True, exist_ok=True)
        result = self.run("--json", "mount", *options, str(self.mnt), check=check)
        if result.code == 0:
            self.daemons.append(result.json["pid"])
        return self.mnt if check else result

    def umount(self, *options):
        """Unmount through the command, which publishes what waits; returns what it says."""
        return self.cli("umount", *options)

    def remount(self):
        """Unmount and mount again; what cannot be published may be left (exit code 7), nothing else."""
        result = self.run("--json", "umount", check=False)
        if result.code not in (0, 7):
            raise CliFailure(repr(result))
        return self.mount()

    @property
    def pid(self):
        """The daemon's process id."""
        return self.daemons[-1]

    def kill9(self):
        """Kill the daemon without a chance to finish anything, and take the dead mount away."""
        kill(self.pid)
        # The kernel notices a moment after the process has gone, when its last thread has let go of /dev/fuse.
        wait_until(
            lambda: preflight.clear_stale(self.mnt) or not preflight.is_ours(self.mnt), "the dead mount's end"
        )

    def end(self):
        """Leave nothing behind: end the daemons of this home by process id and unmount what is mounted."""
        holder = self.home.holder()
        if holder and holder not in self.daemons and holder != os.getpid():
            self.daemons.append(holder)
        for pid in self.daemons:
            if is_daemon(pid):
                os.kill(pid, signal.SIGTERM)
        for pid in self.daemons:
            with contextlib.suppress(TimeoutError):
                wait_until(lambda pid=pid: not is_daemon(pid), "the daemon's end", 15)
            kill(pid)
        for _ in range(5):
            if not preflight.is_ours(self.mnt):
                break
            with contextlib.suppress(Exception):
                if not preflight.clear_stale(self.mnt):
                    preflight.unmount(self.mnt, lazy=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.end()

    # -- looking ---------------------------------------------------------------------------------

    def ask(self, method, **params):
        """Call a method of the running daemon over its control socket (cheaper than a command)."""
        answer = client.ask_daemon(self.home, method, params)
        assert answer is not None, f"{self.name}'s daemon does not run"
        return answer

    def status(self):
        return self.ask("status")

    def counters(self):
        """What the daemon has done so far: gate_walks, unwraps, fetches, decrypts, ..."""
        return self.status()["counters"]

    def share(self, name):
        """The status of one share."""
        return next(share for share in self.status()["shares"] if share["name"] == name)

    def status_file(self):
        return json.loads((self.mnt / ".meshkit/status.json").read_bytes())

    def errors_text(self):
        return (self.mnt / ".meshkit/errors.txt").read_text(errors="surrogateescape")

    def explain(self, path):
        return self.cli("explain", str(path))

    def logs(self):
        """Everything this home's daemons logged."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.root.glob("log/*")) if p.is_file())


def invite(owner, target, recipient, *options):
    """Share ``target`` with ``recipient`` and have the newest invitation accepted; returns its result."""
    owner.cli("share", "add", target, recipient.name, *options)
    letters = recipient.cli("inbox")["letters"]
    waiting = [letter for letter in letters if not letter["accepted"]]
    return recipient.cli("accept", waiting[-1]["id"])


@contextlib.contextmanager
def in_the_foreground(person, program=""):
    """A daemon that is a child of this process, so that its exit code can be seen; ``program``: a file here."""
    person.mnt.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [
            sys.executable,
            *([HERE / program] if program else ["-m", "meshkitfs"]),
            "mount",
            "--foreground",
            person.mnt,
        ],
        env=person.env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    person.daemons.append(process.pid)
    try:
        wait_until(lambda: preflight.is_ours(person.mnt) or process.poll() is not None, "the mount")
        assert process.poll() is None, process.stdout.read().decode()
        wait_until(lambda: errno_of(os.stat, person.mnt / ".meshkit/status.json") == 0, "the mount")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def usable_python(prefix, tree=HERE.parent, venv=sys.prefix):
    """``prefix`` with what else another user needs to run our code, and the interpreter to run it with.

    The interpreter of these tests may be in a directory that is closed to others; then the system's own is
    tried, with our packages. ``tree`` and ``venv``: where our code and its environment are there.
    """
    ours = [path.replace(sys.prefix, venv, 1) for path in sys.path if "site-packages" in path]
    packages = os.pathsep.join([str(tree), *ours])
    own = sys.executable.replace(sys.prefix, venv, 1)
    for python, search in ((own, str(tree)), ("/usr/bin/python3", packages)):
        command = [*prefix, f"PYTHONPATH={search}"]
        tried = subprocess.run(
            [*command, python, "-c", "import meshkitfs.daemon.service"], capture_output=True, cwd="/"
        )
        if not tried.returncode:
            return command, python
    pytest.skip("A SECOND UNIX USER CANNOT RUN ANY PYTHON HERE: " + tried.stderr.decode()[-200:])


# -- waiting and failing -------------------------------------------------------------------------


def wait_until(condition, what="it", timeout=30.0):
    """Poll until ``condition()`` is true and return its value; TimeoutError says what was waited for."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.02)


@contextlib.contextmanager
def fails(*numbers):
    """The block must raise OSError with one of these errnos."""
    with pytest.raises(OSError) as caught:
        yield caught
    got = errno.errorcode.get(caught.value.errno, caught.value.errno)
    assert caught.value.errno in numbers, f"{got} instead of {[errno.errorcode[n] for n in numbers]}"


def errno_of(call, *args):
    """The errno that ``call(*args)`` fails with, 0 if it succeeds."""
    try:
        result = call(*args)
    except OSError as error:
        return error.errno
    if isinstance(result, int) and call is os.open:
        os.close(result)
    return 0


def reason(path):
    """The text of ``user.meshkit.reason`` (its code is what stands before the colon)."""
    return os.getxattr(path, REASON).decode()


def reason_code(path):
    return reason(path).partition(":")[0]


def write_synced(path, data, mode="wb"):
    """Write and fsync: when this returns, others see it at their next open."""
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_dir(path):
    """Fsync a directory: names changed in it are published when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- processes -----------------------------------------------------------------------------------


def is_daemon(pid):
    """Whether ``pid`` runs and is one of our daemons (process ids are used again)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"meshkitfs" in command and state != "Z"


def kill(pid):
    """Kill -9 and wait until it is gone."""
    if is_daemon(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_daemon(pid), "a killed daemon's end")


# -- mounts of other kinds -----------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def tmpfs(directory, size):
    """A tmpfs of ``size`` bytes at ``directory`` (root only: skips loudly otherwise)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    options = f"size={size},mode=0700".encode()
    if _libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, options):
        pytest.skip(f"A SMALL DISK CANNOT BE MADE HERE: mount: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        if _libc.umount2(os.fsencode(directory), 2):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
