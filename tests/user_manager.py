"""A real systemd that runs units for a test: a user manager in mount and cgroup namespaces of its own.

Needs root and a cgroup2 tree. What it mounts is seen by nobody else, and everything it started ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import LET_GO

_DEADLINE = 30.0
_SYSTEMD = "/lib/systemd/systemd"
# /run is new: it is what PID 1 would have prepared. Shared, because credentials are mounted from a namespace
# further down.
_SCRIPT = f"""\
echo $BASHPID > "$1/cgroup.procs"
exec unshare --mount --cgroup --propagation slave bash -ec '
{LET_GO}
mount --make-rshared /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/{{system,unit-root,mount-rootfs,propagate,incoming}} /run/credentials /run/lock /run/user/0
chmod 700 /run/user/0
exec env -i XDG_RUNTIME_DIR=/run/user/0 HOME="$0" USER=root PATH=/usr/local/bin:/usr/bin:/bin {_SYSTEMD} --user
' "$2"
"""


def _cgroup2() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    return None


def missing() -> str:
    """Why this cannot be had here; empty if it can."""
    programs = [name for name in ("unshare", "nsenter", "systemd-run") if shutil.which(name) is None]
    if programs or not os.path.exists(_SYSTEMD):
        return f"not installed: {', '.join(programs) or 'systemd'}"
    if os.geteuid() != 0:
        return "only root may make its namespaces"
    return "" if _cgroup2() is not None else "no cgroup2 tree is mounted"


class Manager:
    """One running systemd; `run` runs a command as a transient service of it."""

    def __init__(self, root: Path, cgroup: Path) -> None:
        self._log = root / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-ec", _SCRIPT, "bash", str(cgroup), str(root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _DEADLINE
        while self._inside("systemctl", "--user", "show-environment").returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"systemd did not start: {self._log.read_text()}")
            time.sleep(0.05)

    def run(self, *command: str, properties: tuple[str, ...] = (), env: dict[str, str] | None = None):
        """Run ``command`` as a service with these properties of a unit; returns the completed process."""
        options = [f"--property={item}" for item in properties]
        options += [f"--setenv={name}={value}" for name, value in (env or {}).items()]
        return self._inside("systemd-run", "--user", "--wait", "--pipe", "--quiet", *options, *command)

    def _inside(self, *command: str):
        return subprocess.run(
            [
                *("nsenter", "-t", str(self._process.pid), "-m", "-C"),
                *("env", "XDG_RUNTIME_DIR=/run/user/0", *command),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def user_manager() -> Iterator[Manager]:
    """A systemd, gone when the block ends. Skips where it cannot be had."""
    if missing():
        pytest.skip(f"NOT TESTED: a real systemd; {missing()}")
    tree = _cgroup2()
    assert tree is not None
    root = Path(tempfile.mkdtemp(prefix="mksd-"))
    cgroup = tree / f"meshkitfs-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        shutil.rmtree(root)
        pytest.skip(f"NOT TESTED: a real systemd; {cgroup}: {error.strerror}")
    try:
        manager = Manager(root, cgroup)
        try:
            yield manager
        finally:
            manager.close()
    finally:
        _remove(cgroup)
        shutil.rmtree(root, ignore_errors=True)


def _remove(cgroup: Path) -> None:
    """Remove a tree of control groups, which is possible once the last process in it has gone."""
    deadline = time.monotonic() + _DEADLINE
    while cgroup.exists():
        for path in sorted(cgroup.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        if time.monotonic() > deadline:
            print(f"left behind: {cgroup}", file=sys.stderr)
            return
        time.sleep(0.02)
