"""Somebody at a machine with a real systemd of their own: a user manager, run as an ordinary user.

    with seat("alice", 65011) as alice:         # a Machine: commands and calls are that user's, in there
        alice.init()
        alice.cli("autostart", "install")
        alice.systemctl("restart", "meshkitfs")

Its mounts, its /run, its /etc and its device are seen by nobody else. Its home is at /srv there, because a hardened
unit has a /tmp of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import user_manager
from homes import PATIENCE, Person, wait_until
from machines import Machine
from namespaces import LET_GO, TREE, VENV, copy_tree, python_there

NEEDED = ("setpriv", "fusermount3", "systemctl", "systemd-escape", "systemd-analyze")
_PREPARED = "namespaces are prepared"
_FSTAB = "import sys; from meshkitfs.cli import mount_fstab; sys.exit(mount_fstab())"
_SCRIPT = f"""\
echo $BASHPID > "$CGROUP/cgroup.procs"
exec unshare --mount --cgroup --propagation slave bash -ec '
{LET_GO}
mount --make-rshared /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
chown $U /sys/fs/cgroup /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/cgroup.subtree_control /sys/fs/cgroup/cgroup.threads
mount --bind "$BASE/fuse" /dev/fuse
mount --bind "$BASE/etc" /etc
if [ "$VENV" ]; then mount --bind "$VENV" "$BASE/srv/venv"; fi
mount --rbind "$BASE/srv" /srv
mount -t overlay overlay -o lowerdir="$BASE/sbin":/usr/sbin /usr/sbin 2>/dev/null || true
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/{{system,unit-root,mount-rootfs,propagate,incoming}} /run/credentials /run/lock /run/user/$U
mount -t tmpfs -o mode=700,uid=$U,gid=$U tmpfs /run/user/$U
echo {_PREPARED}
exec setpriv --reuid=$U --regid=$U --clear-groups --reset-env env XDG_RUNTIME_DIR=/run/user/$U HOME=/srv/$NAME \\
    USER=$NAME PATH=/usr/local/bin:/usr/bin:/bin /lib/systemd/systemd --user'
"""


class Seat(Machine):
    """The person, their machine and their systemd."""

    def __init__(self, base: Path, cgroup: Path, name: str, uid: int) -> None:
        Person.__init__(self, f"/srv/{name}/.local/share/meshkitfs", name, f"/srv/{name}/MeshKit")
        self.uid, self.base = uid, base
        self._log = base / "systemd.log"
        environ = {"CGROUP": str(cgroup), "BASE": str(base), "U": str(uid), "NAME": name}
        environ["VENV"] = sys.prefix if sys.prefix != VENV else ""
        with self._log.open("wb") as log:
            self._systemd = subprocess.Popen(
                ["bash", "-ec", _SCRIPT],
                env=os.environ | environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._user = None
        try:
            self._enter(name, uid)
        except BaseException:
            self.end()
            raise

    def _enter(self, name: str, uid: int) -> None:
        self._root = ["nsenter", "-t", str(self._systemd.pid), "-m", "-C"]
        user = [
            *self._root, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--reset-env",
            "env", f"XDG_RUNTIME_DIR=/run/user/{uid}", f"HOME=/srv/{name}", f"USER={name}", "LC_ALL=C.UTF-8",
            "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin", "PYTHONDONTWRITEBYTECODE=1",
        ]  # fmt: skip
        wait_until(lambda: self._answers(user), "systemd", PATIENCE)
        self.prefix, self.python = python_there(user)
        self._prefix = self.prefix
        # Else every one of the many processes would compile it again.
        self.sh(self.python, "-m", "compileall", "-q", f"{TREE}/meshkitfs", root=True)
        self.inside(f"{TREE}/environment").write_text(f"{self.prefix[-1]}\nPYTHON={self.python}\n")
        self.env = {"PATH": os.environ["PATH"]}
        self._user = subprocess.Popen(
            [*self.prefix, self.python, f"{TREE}/tests/machine_user.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip

    def _answers(self, user: list[str]) -> bool:
        if self._systemd.poll() is not None:
            log = self._log.read_text()
            if _PREPARED not in log:
                pytest.skip(f"NOT TESTED: a real systemd of a user; no namespaces for it: {log[-500:]}")
            raise AssertionError(f"systemd ended: {log}")
        if _PREPARED not in self._log.read_text():
            return False
        try:
            done = subprocess.run(
                [*user, "systemctl", "--user", "show-environment"], capture_output=True, cwd="/", timeout=10
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def sh(self, *command, check=True, root=False, timeout=PATIENCE):
        """Run a program in there, as the user or as root; returns what it printed."""
        done = subprocess.run(
            [*(self._root if root else self.prefix), *map(str, command)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd="/",
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def systemctl(self, *arguments, check=True):
        return self.sh("systemctl", "--user", *arguments, check=check, timeout=3 * PATIENCE)

    def shown(self, unit, name):
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def inside(self, path) -> Path:
        """A file of theirs, as root sees it from outside; not what is mounted there."""
        return self.base / "srv" / os.path.relpath(path, "/srv")

    def drop_in(self, unit, text):
        """Add to a unit, and have systemd know."""
        directory = self.inside(f"/srv/{self.name}/.config/systemd/user/{unit}.d")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "90-test.conf").write_text(text)
        self.systemctl("daemon-reload")

    def mounted(self, place=None) -> bool:
        table = Path(f"/proc/{self._systemd.pid}/mountinfo").read_text()
        return f" {place or self.mnt} " in table

    def kill(self, number=signal.SIGKILL):
        pid = int(self.shown("meshkitfs.service", "MainPID"))
        assert pid > 1, "it does not run"  # 0 would be this process and its own
        os.kill(pid, number)

    def end(self):
        if self._user is not None:
            self._user.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._user.wait(5)
            self._user.kill()
            self._user.wait()
            self._user.stdout.close()
        self._systemd.terminate()  # which stops every unit, and so unmounts
        try:
            self._systemd.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._systemd.kill()
            self._systemd.wait()


@contextlib.contextmanager
def seat(name: str, uid: int) -> Iterator[Seat]:
    """A seat, gone with all that it started when the block ends. Skips where it cannot be had."""
    why = user_manager.missing()
    absent = [program for program in NEEDED if not shutil.which(program)]
    if not why and absent:
        why = f"not installed: {', '.join(absent)}"
    if not why and not Path("/srv").is_dir():
        why = "there is no /srv to mount on"
    if why:
        pytest.skip(f"NOT TESTED: a real systemd of a user; {why}")
    tree = user_manager._cgroup2()
    assert tree is not None
    base, cgroup = Path(tempfile.mkdtemp(prefix="mkseat-")), tree / f"meshkitfs-seat-{os.getpid()}-{uid}"
    base.chmod(0o755)
    try:
        _prepare(base, cgroup, name, uid)
        person = Seat(base, cgroup, name, uid)
        try:
            yield person
        finally:
            person.end()
    finally:
        _sweep(cgroup)
        user_manager._remove(cgroup)
        shutil.rmtree(base, ignore_errors=True)


def _prepare(base: Path, cgroup: Path, name: str, uid: int) -> None:
    home = base / "srv" / name
    home.mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    os.chown(home, uid, uid)
    (base / "sbin").mkdir()
    with contextlib.suppress(shutil.Error):  # of files that went while they were copied
        shutil.copytree("/etc", base / "etc", symlinks=True, ignore=shutil.ignore_patterns("*shadow*"))
    copy_tree(base / "srv/tree")
    (base / "srv/venv").mkdir()
    program = base / "sbin/mount.fuse.meshkitfs"  # as pip would write it; which Python that is shows later
    program.write_text(
        f"#!/bin/sh\n. {TREE}/environment\nexport PYTHONPATH\nexec $PYTHON -P -c '{_FSTAB}' \"$@\"\n"
    )
    program.chmod(0o755)
    home = f"/srv/{name}"
    with (base / "etc/fstab").open("a") as fstab:
        fstab.write(f"{home}/.local/share/meshkitfs {home}/MeshKit fuse.meshkitfs noauto,user,nofail 0 0\n")
    with (base / "etc/passwd").open("a") as passwd:
        passwd.write(f"{name}:x:{uid}:{uid}::/srv/{name}:/bin/sh\n")
    with (base / "etc/group").open("a") as group:
        group.write(f"{name}:x:{uid}:\n")
    try:
        os.mknod(base / "fuse", 0o020666, os.stat("/dev/fuse").st_rdev)
        os.chmod(base / "fuse", 0o666)
        os.close(os.open(base / "fuse", os.O_RDWR))
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"NOT TESTED: a real systemd of a user; {error}")


def _sweep(cgroup: Path) -> None:
    """What systemd should have ended is ended by force: everything in there was started by it."""
    for _ in range(50):
        pids = [pid for file in cgroup.rglob("cgroup.procs") for pid in file.read_text().split()]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
