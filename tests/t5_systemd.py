"""The daemon as a systemd service: what it tells systemd, and how it lives and dies under a real one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import secret_service
import trio
from homes import HERE, PATIENCE, Person, fails, is_daemon, needs_fuse, usable_python, wait_until
from namespaces import TREE
from seat import seat
from whole_machine import booted, plant

from meshkitfs.daemon import notify, watchdog
from meshkitfs.fuse import helper, preflight

ROOT = HERE.parent
UNIT = "meshkitfs.service"


# == what is told ========================================================================================


class Manager:
    """The other end of sd_notify."""

    def __init__(self, path):
        self.path = str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self._sock.settimeout(PATIENCE)

    def next(self):
        return self._sock.recv(8192).decode().splitlines()

    def until(self, line):
        """The message that has this line; those before it are passed over."""
        while line not in (message := self.next()):
            pass
        return message

    def pending(self):
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return self.next()
        self._sock.settimeout(PATIENCE)
        return None


@pytest.fixture
def manager(tmp_path):
    return Manager(tmp_path / "notify")


def taken(**environ):
    return notify.Notifier.take(environ), environ


def test_only_who_is_asked_tells_and_children_are_not():
    assert taken() == (None, {})
    assert taken(NOTIFY_SOCKET="relative", WATCHDOG_USEC="1") == (None, {})
    notifier, environ = taken(
        NOTIFY_SOCKET="/x", WATCHDOG_USEC="2500000", WATCHDOG_PID=str(os.getpid()), A="b"
    )
    assert notifier.watchdog_s == 2.5
    assert environ == {"A": "b"}
    for values in (
        {"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_USEC": "x"},
    ):
        assert taken(NOTIFY_SOCKET="/x", **values)[0].watchdog_s is None


def test_an_abstract_address(manager):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"meshkitfs-test-{os.getpid()}"
        sock.bind("\0" + name)
        sock.settimeout(PATIENCE)
        notify.Notifier(f"@{name}").ready("fine")
        assert sock.recv(100) == b"READY=1\nSTATUS=fine"


def test_a_status_is_one_line_and_is_said_once(manager):
    notifier = notify.Notifier(manager.path)
    notifier.ready("a")
    notifier.status("a")
    notifier.status("b\nWATCHDOG=1\nMAINPID=1")
    assert manager.next() == ["READY=1", "STATUS=a"]
    assert manager.next() == ["STATUS=b WATCHDOG=1 MAINPID=1"]
    assert manager.pending() is None


def test_a_manager_that_has_gone_harms_nothing(tmp_path, caplog):
    notify.Notifier(str(tmp_path / "nothing")).ready("x")
    assert "could not be told" in caplog.text


def test_what_does_not_answer_is_not_said_to_live(manager, autojump_clock):
    """The loop runs on, and still nothing is said: that is what the watchdog is for."""

    async def main():
        hangs = trio.Event()
        asked = 0

        async def alive():
            nonlocal asked
            asked += 1
            if asked > 2:
                await hangs.wait()
            return asked == 1

        with trio.move_on_after(60):
            await watchdog.keep(notify.Notifier(manager.path, 3.0), lambda: "", alive)
        return asked

    assert trio.run(main, clock=autojump_clock) > 10
    assert manager.next() == ["WATCHDOG=1"]
    assert manager.pending() is None


@pytest.fixture
def autojump_clock():
    return trio.testing.MockClock(autojump_threshold=0)


@needs_fuse
def test_a_mount_tells_what_it_is(tmp_path, manager):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        with foreground(alice, manager, WATCHDOG_USEC="3000000") as process:
            ready = manager.next()
            assert ready == ["READY=1", f"STATUS=Mounted at {alice.mnt}; shares: 0; all published"]
            assert preflight.is_ours(alice.mnt)
            (alice.mnt / "first").mkdir()
            manager.until(f"STATUS=Mounted at {alice.mnt}; shares: 1; all published")
            manager.until("WATCHDOG=1")
            alice.cli("lock")
            manager.until(f"STATUS=Mounted at {alice.mnt}; locked: run 'meshkitfs unlock'")
            alice.cli("unlock")
            manager.until(f"STATUS=Mounted at {alice.mnt}; shares: 1; all published")
            process.terminate()
            assert manager.until("STOPPING=1")[1].startswith("STATUS=Unmounted")
            assert process.wait(PATIENCE) == 0


@needs_fuse
def test_a_home_that_is_mounted_already_is_not_passed_off_as_the_units(tmp_path, manager):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.mount()
        with foreground(alice, manager) as process:
            assert process.wait(PATIENCE) != 0
            assert b"home_busy" in process.stderr.read()
        assert manager.pending() is None


@needs_fuse
def test_there_may_be_no_keyring_yet(tmp_path, manager):
    """As at boot: it comes up locked, and opens when there is one."""
    with secret_service.private_session() as session, Person(tmp_path / "dave", "dave") as dave:
        dave.env |= {
            name: session.env[name] for name in ("DBUS_SESSION_BUS_ADDRESS", "HOME", "XDG_RUNTIME_DIR")
        }
        dave.init(key_vault="secret-service")
        session.stop_keyring()
        with foreground(dave, manager):
            locked = f"STATUS=Mounted at {dave.mnt}; locked: run 'meshkitfs unlock'"
            assert manager.next() == ["READY=1", locked]
            session.start_keyring()
            manager.until(f"STATUS=Mounted at {dave.mnt}; shares: 0; all published")
            (dave.mnt / "first").mkdir()


@contextlib.contextmanager
def foreground(person, manager, **environ):
    person.mnt.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "meshkitfs", "mount", "--foreground", person.mnt],
        env=person.env | {"NOTIFY_SOCKET": manager.path} | environ,
        cwd="/",
        stderr=subprocess.PIPE,
    )
    person.daemons.append(process.pid)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


LOGS = """
import logging, os, pathlib, sys
from meshkitfs.daemon import logs
info = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{info.st_dev}:{info.st_ino + int(sys.argv[1])}"
logs.setup(pathlib.Path(sys.argv[2]), stderr=True)
log = logging.getLogger("x")
log.info("mounted")
log.warning("odd")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("password=hunter2")
"""


def logged(tmp_path, off):
    file = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", LOGS, str(off), str(file)], capture_output=True, cwd=ROOT, check=True
    )
    return done.stderr.decode().splitlines(), file.read_text().splitlines()


def test_lines_for_the_journal_have_priorities_and_those_of_the_file_have_times(tmp_path):
    journal, file = logged(tmp_path, 0)
    assert journal[:2] == ["<6>level=info logger=x msg=mounted", "<4>level=warning logger=x msg=odd"]
    assert len(journal) > 4
    assert all(line.startswith("<3>") for line in journal[2:])
    assert "hunter2" not in "".join(journal)
    assert all(line.startswith(("time=", "    ")) for line in file)


def test_a_stderr_that_was_redirected_is_not_the_journal(tmp_path):
    text, file = logged(tmp_path, 1)
    assert text == file


# == the mount helper ====================================================================================


@pytest.fixture
def ask():
    """Ask a mount helper; returns its answer and what it handed over."""

    def send(request):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(PATIENCE)
            ours.send(request if isinstance(request, bytes) else json.dumps(request).encode())
            with its:
                helper._answer(its)
            data, descriptors, _, _ = socket.recv_fds(ours, 10000, 4)
        return json.loads(data), descriptors

    return send


def refusal(answer):
    assert answer[1] == []
    return answer[0]["error"]["code"]


@needs_fuse
def test_the_helper_mounts_an_empty_directory_and_nothing_else(tmp_path, ask):
    point = tmp_path / "mnt"
    point.mkdir()
    mount = {"do": "mount", "point": str(point), "read_only": False}
    (point / "file").touch()
    assert refusal(ask(mount)) == "mountpoint_not_empty"
    (point / "file").unlink()
    (tmp_path / "link").symlink_to(point)
    assert refusal(ask(mount | {"point": str(tmp_path / "link")})) == "mount_failed"
    assert refusal(ask(mount | {"point": f"{point}/../mnt"})) == "mount_failed"
    assert refusal(ask(mount | {"point": "mnt"})) == "mount_failed"
    assert refusal(ask(mount | {"point": str(tmp_path / "none")})) == "mountpoint_missing"
    point.chmod(0o777)
    assert refusal(ask(mount)) == "mount_failed"
    point.chmod(0o700)
    for wrong in (b"", b"[]", b"{}", b"\xff", {"do": "mount", "point": str(point)}, mount | {"options": "allow_other"},
                  mount | {"read_only": 1}, {"do": "exec", "point": str(point)}):  # fmt: skip
        assert refusal(ask(wrong)) == "invalid_argument"
    assert refusal(ask({"do": "umount", "point": str(point)})) == "not_mounted"
    assert not preflight.is_ours(point)
    answer, descriptors = ask(mount)
    try:
        assert answer == {"ok": True}
        assert os.readlink(f"/proc/self/fd/{descriptors[0]}") == "/dev/fuse"
        table = Path("/proc/self/mountinfo").read_text().splitlines()
        line = next(line for line in table if f" {point} " in line)
        for option in ("nosuid", "nodev", "default_permissions", "fuse.meshkitfs"):
            assert option in line
        assert "allow_other" not in line
        # A living mount is not cleared; a dead one is.
        assert refusal(ask(mount)) == "mountpoint_busy"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        assert ask({"do": "clear", "point": str(point)}) == ({"ok": True}, [])
    assert not preflight.is_ours(point)
    assert ask({"do": "clear", "point": str(point)}) == ({"ok": False}, [])


@needs_fuse
@pytest.mark.parametrize("when", ["before it resolves the path", "after", "and removed"])
def test_a_directory_that_is_exchanged_meanwhile_hides_nothing(tmp_path, ask, monkeypatch, when):
    """A daemon that was taken over may write to where it mounts, and has the helper mount over another place."""
    victim, point = tmp_path / "victim" / ".ssh", tmp_path / "own" / ".ssh"
    for directory in (victim, point):
        directory.mkdir(parents=True, mode=0o700)
    (victim / "id").write_text("private")
    swap = f"mv '{tmp_path}/own' '{tmp_path}/gone' && ln -s '{tmp_path}/victim' '{tmp_path}/own'"
    if when == "and removed":
        swap = f"rmdir '{point}' && {swap}"
    real = shutil.which("fusermount3")
    # The second is the worst that can be: the program itself is given the other place.
    place = '"$@"' if when != "after" else f"-o rw,fsname=meshkitfs,subtype=meshkitfs -- '{victim}'"
    program = tmp_path / "bin" / "fusermount3"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -u ] && exec {real} "$@"\n[ -e \'{tmp_path}/gone\' ] || {{ {swap}; }}\n'
        f"exec {real} {place}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    answer = ask({"do": "mount", "point": str(point), "read_only": False})
    for descriptor in answer[1]:
        os.close(descriptor)
    left = [mount.path for mount in preflight.mounts() if mount.path.startswith(str(tmp_path))]
    for path in left:
        preflight.clear_stale(path)
    assert left == []
    assert refusal(answer) == "mount_failed"
    assert (victim / "id").read_text() == "private"


@pytest.mark.skipif(os.geteuid() != 0, reason="ONLY ROOT CAN BE TWO USERS")
def test_the_helper_works_for_its_own_user_only(tmp_path):
    """The program itself, started as systemd does, but by another user than the one that has connected."""
    point = tmp_path / "mnt"
    point.mkdir()
    command, python = usable_python(["setpriv", "--reuid=65012", "--regid=65012", "--clear-groups", "env"])
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its:
            script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{its.fileno()}'
            process = subprocess.Popen(
                [*command, "bash", "-c", script, "bash", python, "-m", "meshkitfs", "mount-helper"],
                pass_fds=[its.fileno()],
                cwd="/",
            )
        ours.settimeout(PATIENCE)
        ours.send(json.dumps({"do": "mount", "point": str(point), "read_only": False}).encode())
        data, descriptors, _, _ = socket.recv_fds(ours, 10000, 4)
        assert process.wait(PATIENCE) == 1
    answer = json.loads(data)
    assert refusal((answer, descriptors)) == "mount_failed"
    assert "own user" in answer["error"]["detail"]


def test_a_helper_that_does_not_answer_is_no_reason_to_mount_otherwise(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.mnt.mkdir()
        done = alice.cli(
            "mount", str(alice.mnt), check=False, env={"MESHKITFS_MOUNT_HELPER": str(tmp_path / "none")}
        )
        assert done.error["code"] == "mount_failed"
        assert not preflight.is_ours(alice.mnt)


# == under a real systemd ================================================================================


@pytest.fixture(scope="module")
def witness(tmp_path_factory):
    """Somebody outside whose mount was there before."""
    with Person(tmp_path_factory.mktemp("witness") / "wilma", "wilma") as person:
        person.init()
        person.mount()
        yield person


@pytest.fixture(scope="module")
def alice(witness):
    with seat("alice", 65011) as person:
        person.init()
        yield person


def test_the_mounts_of_others_are_not_held(alice, witness):
    """Else their daemons would live as long as these namespaces, though they have been unmounted."""
    subprocess.run(["fusermount3", "-u", witness.mnt], check=True)
    wait_until(lambda: not is_daemon(witness.pid), "the end of a daemon that was unmounted")


@pytest.fixture
def installed(alice):
    """The unit, running; with limits that are shorter than the shipped ones."""
    data = alice.cli("autostart", "install", "--no-start")
    assert (data["enabled"], data["active"]) == (True, "inactive")
    alice.drop_in(UNIT, "[Unit]\nStartLimitBurst=100\n[Service]\nRestartSec=100ms\n")
    alice.systemctl("start", UNIT)
    yield alice
    alice.cli("autostart", "uninstall")
    shutil.rmtree(alice.inside(f"/srv/alice/.config/systemd/user/{UNIT}.d"), ignore_errors=True)
    alice.systemctl("daemon-reload")
    alice.systemctl("reset-failed", check=False)
    assert not alice.mounted()


def share(alice):
    with contextlib.suppress(FileExistsError):
        if not alice.do("exists", alice.mnt / "first"):
            alice.do("mkdir", alice.mnt / "first")
    return alice.mnt / "first"


def running(alice, restarts):
    wait_until(lambda: int(alice.shown(UNIT, "NRestarts")) >= restarts, "a restart", PATIENCE)
    wait_until(lambda: alice.shown(UNIT, "ActiveState") == "active", "the unit", PATIENCE)


def test_the_units_are_clean(alice):
    """As shipped, but for a program that is there to be found."""
    place = alice.inside("/srv/alice/verify")
    (place / f"{UNIT}.d").mkdir(parents=True)
    units = []
    for path in sorted((ROOT / "systemd").iterdir()):
        file = place / (path.name if path.suffix != ".conf" else f"{UNIT}.d/{path.name}")
        file.write_text(path.read_text().replace("/usr/bin/meshkitfs", "/bin/true"))
        if path.suffix != ".conf":
            units.append("/srv/alice/verify/" + path.name.replace("@.", "@x."))
    for template in place.glob("*@.service"):
        shutil.copy(template, str(template).replace("@.", "@x."))
    assert len(units) == 6
    assert alice.sh("systemd-analyze", "--user", "--man=no", "verify", *units) == ""


def test_start_write_stop_and_start(installed):
    alice = installed
    assert alice.shown(UNIT, "StatusText").startswith("Mounted at /srv/alice/MeshKit; shares: ")
    assert alice.shown(UNIT, "WatchdogUSec") == "2min"
    first = share(alice)
    # Not synced: what is written when the unit is stopped goes out then.
    fd = alice.do("open", first / "kept", os.O_CREAT | os.O_WRONLY)
    alice.do("pwrite", fd, "before the stop")
    alice.do("close", fd)
    alice.systemctl("stop", UNIT)
    assert (alice.shown(UNIT, "ActiveState"), alice.shown(UNIT, "Result")) == ("inactive", "success")
    assert not alice.mounted()
    assert alice.cli("status")["left"] == []
    alice.systemctl("start", UNIT)
    assert alice.do("read", first / "kept") == "before the stop"
    alice.systemctl("restart", UNIT)
    assert alice.do("read", first / "kept") == "before the stop"
    data = alice.cli("autostart", "status")
    assert (data["unit"], data["installed"], data["active"], data["state"]) == (
        UNIT,
        True,
        "active",
        "running",
    )
    assert data["pid"] == int(alice.shown(UNIT, "MainPID"))
    # Ended by a command: that is no failure, and it stays ended.
    alice.cli("umount")
    wait_until(lambda: alice.shown(UNIT, "ActiveState") == "inactive", "the unit's end")
    assert alice.shown(UNIT, "NRestarts") == "0"


def test_a_crash(installed):
    alice = installed
    first = share(alice)
    alice.do("write", first / "crash", "synced")
    alice.kill()
    running(alice, 1)
    assert alice.do("read", first / "crash") == "synced"
    assert Path(f"/proc/{alice._systemd.pid}/mountinfo").read_text().count(f" {alice.mnt} ") == 1


@pytest.mark.long
def test_a_daemon_that_hangs(installed):
    """Nothing is said within the time of the watchdog, so it is ended and started anew."""
    alice = installed
    first = share(alice)
    alice.do("write", first / "hang", "synced")
    limits = "[Service]\nRestartSec=1h\nWatchdogSec=6s\nTimeoutAbortSec=5s\n"
    alice.drop_in(UNIT, f"[Unit]\nStartLimitBurst=100\n{limits}")
    alice.systemctl("restart", UNIT)
    before = alice.shown(UNIT, "MainPID")
    alice.kill(signal.SIGSTOP)
    wait_until(lambda: alice.shown(UNIT, "SubState") == "auto-restart", "the watchdog", PATIENCE)
    assert alice.shown(UNIT, "Result") == "watchdog"
    with fails(errno.ENOTCONN, errno.ECONNABORTED):  # nothing takes plain text meanwhile
        alice.do("listdir", alice.mnt)
    alice.drop_in(UNIT, "[Unit]\nStartLimitBurst=100\n")
    alice.systemctl("restart", UNIT)
    assert alice.shown(UNIT, "MainPID") != before
    assert alice.do("read", first / "hang") == "synced"


@pytest.mark.long
def test_an_upgrade_while_it_is_mounted(alice, tmp_path):
    """The files of the program are replaced below a running daemon, which goes on; the next start is the new one."""
    place = alice.inside("/srv/alice/program")
    old = place / "meshkitfs"
    shutil.copytree(ROOT / "meshkitfs", old, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "systemd", place / "systemd")
    search = next(item for item in alice.prefix if item.startswith("PYTHONPATH=")).partition("=")[2]
    search = search.replace(TREE, "/srv/alice/program", 1)
    alice.sh("env", f"PYTHONPATH={search}", alice.python, "-m", "meshkitfs", "autostart", "install")
    try:
        first = share(alice)
        alice.do("write", first / "old", "by the old one")
        fd = alice.do("open", first / "old")
        old.rename(place / "gone")
        shutil.rmtree(place / "gone")
        shutil.copytree(ROOT / "meshkitfs", old, ignore=shutil.ignore_patterns("__pycache__"))
        new = (old / "__init__.py").read_text().replace('__version__ = "', '__version__ = "9.')
        (old / "__init__.py").write_text(new)
        assert alice.do("pread", fd) == "by the old one"
        alice.do("close", fd)
        alice.do("write", first / "meanwhile", "still the old one")
        assert alice.do("read", first / "meanwhile") == "still the old one"
        alice.systemctl("restart", UNIT)
        assert json.loads(alice.do("read", alice.mnt / ".meshkit/status.json"))
        assert alice.do("read", first / "meanwhile") == "still the old one"
    finally:
        alice.sh("env", f"PYTHONPATH={search}", alice.python, "-m", "meshkitfs", "autostart", "uninstall")


def test_hardened(alice):
    data = alice.cli("autostart", "install", "--hardened")
    assert (data["hardened"], data["active"]) == (True, "active")
    try:
        pid = alice.shown(UNIT, "MainPID")
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert (status["NoNewPrivs"], status["Seccomp"], status["CapBnd"]) == ("1", "2", "0" * 16)
        first = share(alice)
        alice.do("write", first / "hard", "synced")
        assert alice.do("read", first / "hard") == "synced"
        # What it does not need it cannot write.
        table = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        access = {line[4]: line[5].split(",")[0] for line in table}
        assert (access["/"], access["/srv"], access[str(alice.root)]) == ("ro", "ro", "rw")
        alice.drop_in(UNIT, "[Service]\nRestartSec=100ms\n")
        alice.kill()
        running(alice, 1)
        assert alice.do("read", first / "hard") == "synced"
        report = alice.sh("systemd-analyze", "--user", "security", "--no-pager", UNIT)
        score = float(report.rpartition(f"for {UNIT}: ")[2].split()[0])
        assert score <= 2.5, report
        alice.systemctl("stop", UNIT)
        assert not alice.mounted()
        assert alice.shown(UNIT, "Result") == "success"
        # Back to the plain one: nothing of the other is left.
        alice.systemctl("start", UNIT)
        assert alice.cli("autostart", "install")["hardened"] is False
        assert not alice.inside(f"/srv/alice/.config/systemd/user/{UNIT}.d/50-hardened.conf").exists()
    finally:
        alice.cli("autostart", "uninstall")
        shutil.rmtree(alice.inside(f"/srv/alice/.config/systemd/user/{UNIT}.d"), ignore_errors=True)
        alice.systemctl("daemon-reload")
    left = [path.name for path in alice.inside("/srv/alice/.config/systemd/user").rglob("meshkitfs*")]
    assert left == []


def test_another_home_waits_for_its_passphrase(alice):
    """An instance of the template; there is nobody to ask at the start, so it comes up locked."""
    root, point = "/srv/alice/work", "/srv/alice/Work"
    at = ["--home", root, "--json"]
    alice.run(
        *at, "init", "--identity", "work", "--key-vault", "passphrase-file", "--passphrase-fd", "0",
        stdin=b"correct horse battery staple",
    )  # fmt: skip
    path = alice.inside(f"{root}/meshkit.config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mount": {"point": point}}))
    try:
        data = alice.run(*at, "autostart", "install").json
        assert data["unit"] == "meshkitfs@srv-alice-work.service"
        assert (data["active"], data["status"]) == (
            "active",
            f"Mounted at {point}; locked: run 'meshkitfs unlock'",
        )
        with fails(errno.EACCES):
            alice.do("mkdir", f"{point}/first")
        alice.run(*at, "unlock", "--passphrase-fd", "0", stdin=b"correct horse battery staple")
        alice.do("mkdir", f"{point}/first")
        alice.do("write", f"{point}/first/x", "open")
        wait_until(lambda: "locked" not in alice.shown(data["unit"], "StatusText"), "the status")
        alice.systemctl("restart", data["unit"])
        assert "locked" in alice.shown(data["unit"], "StatusText")
    finally:
        data = alice.run(*at, "autostart", "uninstall").json
        assert (data["installed"], data["enabled"], data["active"]) == (False, False, "inactive")
    assert not alice.mounted(point)


HEALTH = """
import http.client, socket, sys
connection = http.client.HTTPConnection("localhost", timeout=60)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.settimeout(60)
connection.sock.connect(sys.argv[1])
connection.request("GET", "/v1/health")
print(connection.getresponse().status)
"""


def test_a_metadata_service_starts_when_it_is_asked(alice):
    where = "/run/user/65011/metadata.sock"
    # Not at a port of this machine, which may be somebody's.
    alice.drop_in("meshkitfs-serve.socket", f"[Socket]\nListenStream=\nListenStream={where}\nNoDelay=no\n")
    service = "meshkitfs-serve.service"
    try:
        data = alice.cli("autostart", "install", "serve")
        assert (data["installed"], data["enabled"], data["active"]) == (True, True, "inactive")
        assert alice.sh(alice.python, "-c", HEALTH, where) == "200\n"
        assert alice.shown(service, "ActiveState") == "active"
        assert alice.shown(service, "StatusText") == f"Listening on unix:{where}"
        pid = int(alice.shown(service, "MainPID"))
        assert pid > 1
        os.kill(pid, signal.SIGKILL)
        # Nobody is refused meanwhile: the socket is systemd's.
        assert alice.sh(alice.python, "-c", HEALTH, where) == "200\n"
        assert alice.run("--json", "autostart", "install", "serve", "--hardened", check=False).code == 2
    finally:
        alice.cli("autostart", "uninstall", "serve")
    assert alice.shown("meshkitfs-serve.socket", "ActiveState") == "inactive"


def test_the_table_of_filesystems(alice):
    """By root, as at boot: it becomes the owner's mount. By its owner, for whom the table allows it."""
    for root in (True, False):
        alice.sh("mount", alice.mnt, root=root)
        first = share(alice)
        alice.do("write", first / "fstab", "text")
        assert alice.do("read", first / "fstab") == "text"
        pid = alice.cli("status")["pid"]
        assert f"Uid:\t{alice.uid}\t" in Path(f"/proc/{pid}/status").read_text()
        (line,) = [line for line in Path(f"/proc/{alice._systemd.pid}/mountinfo").read_text().splitlines()
                   if f" {alice.mnt} " in line]  # fmt: skip
        assert "noexec" in line.split()[5]
        if root:
            alice.sh("umount", alice.mnt, root=True)
        else:
            alice.cli("umount")
        assert not alice.mounted()
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the daemon's end", PATIENCE)
    said = alice.sh(
        "mount", "-t", "fuse.meshkitfs", "-o", "acl", alice.root, alice.mnt, root=True, check=False
    )
    assert "mount option 'acl'" in said
    assert not alice.mounted()


@pytest.mark.long
def test_a_machine_that_boots(tmp_path):
    """A whole systemd, with logind and the journal: installed in one life of it, mounted by the next one's boot."""
    with plant("carol", 65021) as planted:
        with booted(planted) as machine:
            machine.sh("loginctl", "enable-linger", "carol")
            wait_until(lambda: "active" in machine.sh("systemctl", "is-active", "user@65021", check=False).split(),
                       "the user's systemd", PATIENCE)  # fmt: skip
            prefix, python = machine.user("carol", 65021)

            def carol(*command):
                done = subprocess.run(
                    [*prefix, *command], capture_output=True, text=True, cwd="/", timeout=2 * PATIENCE
                )
                assert done.returncode == 0, f"{done.stderr}\n{journal()}"
                return done.stdout

            mesh = (python, "-m", "meshkitfs", "--json")
            carol(*mesh, "init", "--identity", "carol", "--key-vault", "plain-file")
            data = json.loads(carol(*mesh, "autostart", "install", "--hardened"))
            assert (data["active"], data["linger"]) == ("active", True)
            carol(
                "sh",
                "-ec",
                "mkdir ~/MeshKit/first; echo before > ~/MeshKit/first/file; sync ~/MeshKit/first/file",
            )

            def journal(*options):
                command = ("journalctl", "--no-pager", "--output=cat", "_SYSTEMD_USER_UNIT=meshkitfs.service")
                return machine.sh(*command, *options)

            # Information is not among the warnings: the priorities are the journal's own.
            wait_until(lambda: "msg=mounted" in journal(), "the journal", PATIENCE)
            assert "level=info logger=meshkitfs.daemon.run msg=mounted" in journal()
            assert "msg=mounted" in journal("--priority=info")
            assert "msg=mounted" not in journal("--priority=warning")
            assert "<6>" not in journal()
        # Nobody logs in.
        with booted(planted) as machine:
            prefix, python = machine.user("carol", 65021)

            def content():
                done = subprocess.run(
                    [*prefix, "sh", "-c", "cat ~/MeshKit/first/file"],
                    capture_output=True,
                    cwd="/",
                    timeout=PATIENCE,
                )
                return done.stdout

            wait_until(lambda: content() == b"before\n", "the mount after the boot", PATIENCE)
            assert "carol" not in machine.sh("loginctl", "list-sessions")
