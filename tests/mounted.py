"""Mounts for tests: the daemon of memvfs.py and the programs that use its mount, each a process of its own.

A mount that hangs takes whoever touches it with it, so neither happens in the test's process, every wait
has an end, and `Daemon.end` leaves neither a process nor a mount behind, whatever happened before.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import preflight

HERE = Path(__file__).resolve().parent
PATIENCE = 20  # seconds a test waits for what takes milliseconds


def _why_no_mounts():
    try:
        preflight.check_system()
    except MeshkitError as error:
        return str(error)
    return None


needs_mount = pytest.mark.skipif(_why_no_mounts() is not None, reason=f"cannot mount: {_why_no_mounts()}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users")

PRELUDE = """
import ctypes, errno, json, mmap, os, stat, sys, time
root = sys.argv[1]
def at(name): return os.path.join(root, name)
def fails(call, *args, **more):
    try:
        call(*args, **more)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
def put(name, text=b""):
    with open(at(name), "wb", 0) as file: file.write(text)
    return at(name)
def get(name):
    with open(at(name), "rb", 0) as file: return file.read().decode("latin-1")
result = None
"""


def wait_until_in(process, kernel_function):
    """Return when a thread of ``process`` waits in that function of the kernel (only root can see it)."""
    until = time.monotonic() + PATIENCE
    where = ""
    while kernel_function not in where:
        assert time.monotonic() < until, where
        where = "".join(stack.read_text() for stack in Path(f"/proc/{process.pid}/task").glob("*/stack"))


class Client:
    """A program using the mount; its last act is to print the variable ``result``."""

    def __init__(self, daemon, body, user=None):
        self._daemon = daemon
        if user is not None:
            # Not as the process starts: this interpreter may be out of that user's reach.
            body = f"os.setgroups([]); os.setgid({user}); os.setuid({user})\n{body}"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PRELUDE + body + "\nprint(json.dumps(result))", daemon.place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def line(self):
        """Return what the program prints before its end (it must flush)."""
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, "a program using the mount says nothing"
        return json.loads(self.process.stdout.readline())

    def proceed(self):
        """Let a program go on that waits for a line."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def result(self):
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self.process.kill()
            raise AssertionError("a program using the mount hangs") from None
        assert self.process.returncode == 0, err.decode()
        return json.loads(out)


class Daemon:
    """memvfs.py in a process of its own, mounted at ``place``."""

    def __init__(self, place, log, timeout=300.0, **options):
        self.place = str(place)
        self.log = log
        self._clients = []
        os.makedirs(place, exist_ok=True)
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "memvfs.py"),
                    self.place,
                    "--timeout",
                    str(timeout),
                    "--options",
                    json.dumps(options),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(HERE.parent)},
                bufsize=0,
            )
        self._pending = b""
        try:
            assert self.line() == "ready"
        except BaseException:
            self.end()
            raise

    def line(self):
        """Return what the daemon says next; fails if it says nothing, which is how a hang shows."""
        until = time.monotonic() + PATIENCE
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                raise AssertionError(f"the daemon says nothing; its log: {self.log.read_text()}")
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def send(self, name, *values):
        self.process.stdin.write(json.dumps([name, *values]).encode() + b"\n")

    def __call__(self, name, *values):
        self.send(name, *values)
        return self.line()

    def start(self, body, user=None):
        client = Client(self, body, user)
        self._clients.append(client)
        return client

    def do(self, body, user=None):
        return self.start(body, user).result()

    def kill(self):
        """End everything by force, also a daemon that hangs in the kernel."""
        mount = preflight.find(self.place)
        self.process.kill()
        if mount is not None and mount.fstype == preflight.FSTYPE:
            preflight.sever(mount)
        self.process.wait(PATIENCE)

    def end(self):
        """Stop the daemon as it should be stopped, then make sure that nothing is left of it."""
        try:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
            left = preflight.find(self.place)
            in_time = self.process.poll() is not None
        finally:
            self.kill()
            self.process.stdout.close()
            for client in self._clients:
                client.process.kill()
                client.process.communicate()
            while preflight.is_ours(self.place):
                preflight.unmount(self.place, lazy=True)
        assert in_time, "the daemon did not end"
        assert left is None, "the daemon left its mount behind"


@contextlib.contextmanager
def mounts_in(directory):
    """Yield a function that mounts with the options given; every mount it made is ended afterwards."""
    daemons = []

    def make(**options):
        place = directory / f"mnt{len(daemons)}"
        daemons.append(Daemon(place, directory / f"log{len(daemons)}", **options))
        return daemons[-1]

    try:
        yield make
    finally:
        for daemon in daemons:
            daemon.end()
