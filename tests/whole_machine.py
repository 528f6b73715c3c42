"""A whole systemd as process 1 of namespaces of its own, over this machine's files, none of which are changed.

    with plant("alice", 65021) as planted, booted(planted) as machine:
        machine.sh("loginctl", "enable-linger", "alice")

Its root is an overlay in memory over ours; process, network and mount namespaces are its own, and the kernel's settings
can only be read. Needs root, overlayfs, a cgroup2 tree and a systemd with logind and journald.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import user_manager
from homes import PATIENCE, wait_until
from namespaces import LET_GO, VENV, copy_tree, python_there

# Of the services of the machine below, only what a login needs is to run.
_MASKED = (
    "systemd-sysctl systemd-modules-load systemd-timesyncd systemd-remount-fs systemd-udevd systemd-udev-trigger "
    "systemd-networkd systemd-resolved networking postgresql sysstat console-getty getty@tty1 ssh cron rsyslog "
    "apt-daily apt-daily-upgrade e2scrub_reap systemd-tmpfiles-setup-dev kmod-static-nodes"
)
_SCRIPT = """\
echo $BASHPID > "$CGROUP/cgroup.procs"
exec unshare --mount --pid --fork --kill-child=SIGKILL --cgroup --uts --ipc --net --propagation private bash -ec '
@LET_GO@
mount -t tmpfs tmpfs "$BASE/w"; mkdir "$BASE"/w/{up,wk,root}
R="$BASE/w/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$BASE/w/up",workdir="$BASE/w/wk" "$R"
mount -t proc proc "$R/proc"; mount --bind "$R/proc/sys" "$R/proc/sys"; mount -o remount,bind,ro "$R/proc/sys"
mount -t sysfs -o ro sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup" 2>/dev/null || {
    mount -t tmpfs tmpfs "$R/sys/fs"; mkdir "$R/sys/fs/cgroup"; mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"; }
mount -t tmpfs -o mode=755 tmpfs "$R/dev"
for n in null zero full random urandom tty; do touch "$R/dev/$n"; mount --bind "/dev/$n" "$R/dev/$n"; done
touch "$R/dev/fuse" "$R/dev/console"
mount --bind "$BASE/fuse" "$R/dev/fuse"; mount --bind "$BASE/console" "$R/dev/console"
mkdir "$R"/dev/{pts,shm}; mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"; ln -s /proc/self/fd "$R/dev/fd"; mount -t tmpfs tmpfs "$R/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$R/run"; mount -t tmpfs -o mode=1777 tmpfs "$R/tmp"
for file in passwd group shadow; do cat "$BASE/$file" >> "$R/etc/$file"; done
rm -rf "$R/var/log/journal"; mkdir -p "$R/var/log/journal" "$R/var/lib/systemd/linger"
mount --bind "$BASE/linger" "$R/var/lib/systemd/linger"
mkdir -p "$R"/srv/{tree,venv}; mount --bind "$BASE/tree" "$R/srv/tree"
if [ "$VENV" ]; then mount --bind "$VENV" "$R/srv/venv"; fi
while IFS=: read -r name _ uid _ _ home _; do
    mkdir -p "$R$home"; mount --bind "$BASE/homes/$name" "$R$home"
done < "$BASE/passwd"
mkdir -p "$R/run/systemd/system"; for u in $MASKED; do ln -sf /dev/null "$R/run/systemd/system/$u.service"; done
ip link set lo up; hostname meshkitfs-test; cd "$R"; mkdir -p mnt/old; pivot_root . mnt/old; umount -l /mnt/old
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb /lib/systemd/systemd --system \\
    --unit=multi-user.target --log-target=console --show-status=no'
""".replace("@LET_GO@", LET_GO)


class Machine:
    """A machine that has booted. ``root``: the command that runs something there as root."""

    def __init__(self, base: Path, cgroup: Path) -> None:
        self._console = base / "console"
        environ = {"CGROUP": str(cgroup), "BASE": str(base), "MASKED": _MASKED}
        environ["VENV"] = sys.prefix if sys.prefix != VENV else ""
        with (base / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-ec", _SCRIPT],
                env=os.environ | environ,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        self._log = base / "log"
        self.root: list[str] = []
        try:
            wait_until(self._up, "the boot of the machine", PATIENCE)
        except BaseException:
            self.off()
            raise

    def _up(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(
                self._log.read_text()[-2000:] + self._console.read_text(errors="replace")[-2000:]
            )
        if not self.root:
            children = (
                Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            )
            if not children or Path(f"/proc/{children[0]}/comm").read_text() != "systemd\n":
                return False
            self.root = ["nsenter", "-t", children[0], *["-m", "-p", "-C", "-u", "-i", "-n", "--wd=/"]]
        return self.sh("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def sh(self, *command, check=True, timeout=PATIENCE):
        done = subprocess.run(
            [*self.root, *map(str, command)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd="/",
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def user(self, name: str, uid: int) -> tuple[list[str], str]:
        """How to run something there as a user whose systemd runs: the beginning of a command, and a Python."""
        return python_there(
            [
                *self.root, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--reset-env",
                "env", f"XDG_RUNTIME_DIR=/run/user/{uid}", f"HOME=/srv/{name}", f"USER={name}",
                "PATH=/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1",
            ]
        )  # fmt: skip

    def off(self) -> None:
        """Turn it off in order; by force if it does not."""
        if self.root:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.sh("systemctl", "poweroff", check=False)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def missing() -> str:
    why = user_manager.missing()
    needed = ("loginctl", "journalctl", "setpriv", "ip", "fusermount3", "dbus-daemon")
    absent = [name for name in needed if not shutil.which(name)]
    absent += [name for name in ("logind", "journald") if not Path(f"/lib/systemd/systemd-{name}").exists()]
    absent += [] if list(Path("/lib").glob("*/security/pam_systemd.so")) else ["libpam-systemd"]
    return why or (f"not installed: {', '.join(absent)}" if absent else "")


@contextlib.contextmanager
def plant(name: str, uid: int) -> Iterator[Path]:
    """What a machine is made of: a user, and what of the user outlives a boot. Skips where it cannot be had."""
    if why := missing():
        pytest.skip(f"NOT TESTED: a whole systemd; {why}")
    base = Path(tempfile.mkdtemp(prefix="mkboot-"))
    base.chmod(0o755)
    try:
        (base / "linger").mkdir()
        copy_tree(base / "tree")
        home = base / "homes" / name
        home.mkdir(parents=True)
        home.chmod(0o700)
        os.chown(home, uid, uid)
        (base / "passwd").write_text(f"{name}:x:{uid}:{uid}::/srv/{name}:/bin/sh\n")
        (base / "shadow").write_text(f"{name}:!:20000:0:99999:7:::\n")
        (base / "group").write_text(f"{name}:x:{uid}:\n")
        try:
            os.mknod(base / "fuse", 0o020666, os.stat("/dev/fuse").st_rdev)
            os.chmod(base / "fuse", 0o666)
            os.close(os.open(base / "fuse", os.O_RDWR))
        except OSError as error:
            pytest.skip(f"NOT TESTED: a whole systemd; {error}")
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def booted(base: Path) -> Iterator[Machine]:
    """The machine, turned off when the block ends."""
    tree = user_manager._cgroup2()
    assert tree is not None
    cgroup = tree / f"meshkitfs-boot-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"NOT TESTED: a whole systemd; {cgroup}: {error.strerror}")
    (base / "w").mkdir(exist_ok=True)
    (base / "console").write_text("")
    try:
        try:
            machine = Machine(base, cgroup)
        except RuntimeError as error:
            pytest.skip(f"NOT TESTED: a whole systemd; it does not start here: {error}")
        try:
            yield machine
        finally:
            machine.off()
    finally:
        user_manager._remove(cgroup)
