"""Machines for tests: network namespaces on one bridge, and UNIX users with a mount namespace of their own.

    with Network() as net, net.machine("alice", 65001) as alice:   # a Person; commands and mount are in there
        alice.do("write", alice.mnt / "a/file", "text")     # as that user; fails with the user's OSError
        net.cut("alice")                                    # nothing passes any more, in either direction
        net.heal("alice")

The namespaces have no names in the system, unlike those of ``ip netns``: each lives as long as a process in it, and
links and mounts go with it, so nothing can be left behind in the system's own. No user is added either: each is
known on its own machine only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from homes import HERE, PATIENCE, Person, usable_python, wait_until
from namespaces import LET_GO

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "mount", "fusermount3")
NET = "10.87.0"
HUB = f"{NET}.1"
# A device that everybody may open, as on an ordinary machine, and a name for the user, without which fusermount3
# does nothing. Only here: the real ones are not touched. All of /etc is covered, not the one file in it: who adds a
# user to the system puts another file in its place, and what is mounted on a file that is replaced is gone everywhere.
PRIVATE = (
    *("unshare", "--net", "--mount", "sh", "-c"),
    f'{LET_GO}; mount --bind "$0" /dev/fuse && mount --bind "$1" /etc && shift && ip link set lo up && exec "$@"',
)


class Machine(Person):
    """A `Person` at a machine: commands run there as that user, and so does `do`."""

    def __init__(self, root, name, uid, device):
        super().__init__(root, name)
        self.uid = uid
        for place in (self.root, self.mnt):
            place.mkdir(mode=0o700)
            os.chown(place, uid, uid)
        user = [
            "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
            "env", f"HOME={self.root}", "PYTHONDONTWRITEBYTECODE=1",
        ]  # fmt: skip
        user, self.python = usable_python(user)
        etc = self.root.with_name(f"{name}.etc")
        with contextlib.suppress(shutil.Error):  # of files that went while they were copied
            shutil.copytree("/etc", etc, symlinks=True, ignore=shutil.ignore_patterns("*shadow*"))
        with (etc / "passwd").open("a") as passwd:
            passwd.write(f"{name}:x:{uid}:{uid}::{self.root}:/usr/sbin/nologin\n")
        self._user = subprocess.Popen(
            [*PRIVATE, device, etc, *user, self.python, HERE / "machine_user.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        self.net_pid = self._user.pid
        self._prefix = ["nsenter", "-t", str(self.net_pid), "--net", "--mount", *user]

    def run(self, *args, **options):
        return super().run(*args, prefix=self._prefix, **options)

    def do(self, call, *values):
        """Do something of `machine_user.CALLS` as the user. Raises OSError as it was raised there."""
        self._user.stdin.write(json.dumps([call, *values], default=os.fspath).encode() + b"\n")
        self._user.stdin.flush()
        ready, _, _ = select.select([self._user.stdout], [], [], 2 * PATIENCE)
        assert ready, f"{self.name} waits in vain: {call} {values}"
        line = self._user.stdout.readline()
        assert line, f"{self.name} has gone: {call} {values}"
        answer = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"])
        return answer["result"]

    def end(self):
        super().end()
        self._user.stdin.close()
        # A call that hangs in the kernel ends with its mount, which has ended with the daemon.
        try:
            self._user.wait(10)
        finally:
            self._user.kill()
            self._user.wait()
            self._user.stdout.close()


class Network:
    """The hub, with the bridge, and the machines on it. ``prefix`` runs a program at the hub, as root."""

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self._number = 1
        self._spaces = set()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def _open(self, stack):
        missing = [name for name in NEEDED if not shutil.which(name)]
        if os.geteuid() != 0 or missing:
            pytest.skip(f"NO MACHINES HERE: that needs root and {', '.join(missing or NEEDED)}")
        self.base = Path(tempfile.mkdtemp(prefix="meshkit-machines-"))
        stack.callback(shutil.rmtree, self.base)
        self.base.chmod(0o755)
        self._device = self.base / "fuse"
        try:
            os.mknod(self._device, 0o020666, os.stat("/dev/fuse").st_rdev)
            os.chmod(self._device, 0o666)
            os.close(os.open(self._device, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"NO MACHINES HERE: no FUSE device that users may open: {error}")
        probe = [*PRIVATE, self._device, "/etc", "true"]
        done = subprocess.run(probe, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NO MACHINES HERE: no namespaces can be made: {done.stderr.strip()}")
        holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, cwd="/")
        stack.callback(holder.wait, 10)
        stack.callback(holder.stdin.close)
        stack.callback(self._sweep)
        self._pid = holder.pid
        self._enter(holder.pid)
        self.prefix = ["nsenter", "-t", str(holder.pid), "--net"]
        self._ip("link set lo up")
        self._ip("link add hub type bridge")
        self._ip(f"addr add {HUB}/24 dev hub")
        self._ip("link set hub up")

    def machine(self, name, uid):
        """A machine on the bridge, and the person at it; it ends as a context manager does."""
        machine = Machine(self.base / name, name, uid, self._device)
        try:
            self._connect(machine)
        except BaseException:
            machine.end()
            raise
        return machine

    def _connect(self, machine):
        name, pid = machine.name, machine.net_pid
        self._enter(pid)
        at = ["nsenter", "-t", str(pid), "--net"]
        self._number += 1
        self._ip(f"link add {name} type veth peer name eth0 netns {pid}")
        self._ip(f"link set {name} master hub up")
        self._ip(f"addr add {NET}.{self._number}/24 dev eth0", at)
        self._ip("link set eth0 up", at)
        # Wait for the program too: when it answers, its namespaces are complete.
        assert machine.do("whoami") == [machine.uid, machine.uid, []]

    def cut(self, name):
        """Take the cable out at the hub. The machine's own addresses and routes stay as they are."""
        self._ip(f"link set {name} down")

    def heal(self, name):
        self._ip(f"link set {name} up")

    def _ip(self, arguments, at=None):
        command = [*(at or self.prefix), "ip", *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and arguments.startswith("link add"):
            pytest.skip(f"NO MACHINES HERE: ip {arguments}: {done.stderr.strip()}")
        assert not done.returncode, f"ip {arguments}: {done.stderr}"

    def _enter(self, pid):
        """Wait until ``pid`` is in a network namespace of its own, and remember that."""
        own = _space("self")
        wait_until(lambda: _space(pid) != own, "a namespace")
        self._spaces.add(_space(pid))

    def _inside(self):
        """The processes in these namespaces; all of them are ours."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self._pid:
                with contextlib.suppress(OSError):
                    if _space(entry.name) in self._spaces:
                        yield int(entry.name)

    def _sweep(self):
        """What should have ended by now is ended by force, and is a fault."""
        left = {pid: _command(pid) for pid in self._inside()}
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not list(self._inside()), "the end of what was left")
        assert not left, f"left behind on the machines: {left}"


def _space(pid):
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "?"
