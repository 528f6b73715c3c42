"""The commands that begin and end a mount, on real mounts with real daemons."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import secrets
import signal
import subprocess
import sys

import pytest
from homes import Person, errno_of, is_daemon, kill, needs_fuse, wait_until

from meshkitfs.cli import _asking, main
from meshkitfs.fuse import preflight

pytestmark = needs_fuse

PHRASE = f"correct horse {secrets.token_hex(8)}"


@pytest.fixture
def alice(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        # The default mount point is below HOME; no test may use the real one.
        alice.env["HOME"] = str(tmp_path)
        yield alice


@pytest.fixture
def ready(alice):
    alice.init()
    alice.cli("share", "create", "first")
    return alice


def start(person, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "meshkitfs", "--json", *arguments],
        env=person.env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end_all(processes):
    """Return (exit code, stdout, stderr) of each, after all of them ran at the same time."""
    outputs = [process.communicate(timeout=90) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_a_first_walk_as_a_person_sees_it(alice, tmp_path):
    point = tmp_path / "MeshKit"
    done = alice.run("mount", check=False)
    assert (done.code, done.out) == (3, "")
    assert "meshkitfs init" in done.err
    done = alice.run("init", "--identity", "alice", "--key-vault", "plain-file")
    assert done.out.startswith("Created the identity alice.\nfingerprint  ")
    assert "Warning: the private keys are in a file without a passphrase" in done.err
    assert alice.run("init", check=False).code == 3
    assert "is set up already" in alice.run("init", "--if-needed").out
    done = alice.run("mount")
    alice.daemons.append(alice.home.holder())
    assert done.out == f"Mounted at {point}. Unmount with 'meshkitfs umount'.\n"
    assert preflight.is_ours(point)
    assert point.stat().st_mode & 0o777 == 0o700
    done = alice.run("mount")
    assert done.out == f"It is mounted at {point} already.\n"
    assert alice.run("mount", "--foreground").out == done.out
    assert alice.run("mount", str(tmp_path), check=False).code == 9
    assert alice.run("share", "create", "first").out == "Created the share first.\n"
    assert "is there already" in alice.run("share", "create", "first", "--if-needed").out
    (point / "first" / "a").write_text("x")
    assert alice.run("share", "list").out.splitlines()[1].startswith("first  you ")
    assert "It may be opened." in alice.run("explain", str(point / "first/a")).out
    assert f"mounted at  {point}" in alice.run("status").out
    checks = {check["name"]: check["status"] for check in alice.cli("doctor")["checks"]}
    assert checks["daemon"] == checks["mount point"] == checks["unsent"] == "ok"
    assert "fail" not in checks.values()
    done = alice.run("umount")
    assert done.out == f"Unmounted {point}. Everything is published.\n"
    assert not preflight.is_ours(point)
    assert alice.home.holder() is None
    assert not alice.home.socket_path.exists()
    assert alice.run("umount", check=False).code == 10
    assert alice.run("umount", "--if-needed").out == ""


def test_a_configuration_written_first_is_followed(alice, tmp_path):
    alice.home.ensure()
    text = json.dumps(
        {
            "version": 1,
            "identity": "alice",
            "provider": {"type": "local-dev", "store": str(tmp_path / "blocks")},
            "keyVault": {"type": "plain-file"},
            "mount": {"point": str(tmp_path / "here")},
        }
    )
    alice.home.config_path.write_text(text)
    alice.run("init")
    assert alice.home.config_path.read_text() == text
    assert alice.cli("identity", "show")["handle"] == "alice"
    data = alice.cli("mount")
    alice.daemons.append(data["pid"])
    assert data["mountpoint"] == str(tmp_path / "here")
    assert (tmp_path / "blocks").is_dir()
    assert not alice.blocks.exists()


def test_a_mount_in_use_stays_and_force_cuts_it_off(ready):
    ready.mount()
    path = ready.mnt / "first" / "open"
    with path.open("w") as file:
        refused = ready.cli("umount", check=False)
        assert (refused.code, refused.out) == (10, "")
        assert refused.error["code"] == "mount_in_use"
        file.write("written after that")
    assert path.read_text() == "written after that"
    ready.remount()
    assert path.read_text() == "written after that"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert ready.cli("umount", "--force")["unmounted"] is True
        assert not preflight.is_ours(ready.mnt)
        assert errno_of(os.fstatvfs, descriptor) in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_a_dead_daemons_mount_is_found_and_cleared(ready):
    ready.mount()
    kill(ready.pid)
    assert errno_of(os.listdir, ready.mnt) in (errno.ENOTCONN, errno.ECONNABORTED)
    findings = {check["detail"] for check in ready.cli("doctor")["checks"]}
    assert {"not running", f"{ready.mnt} is the mount of a dead daemon"} <= findings
    ready.daemons.append(ready.cli("mount", str(ready.mnt))["pid"])  # clears it by itself
    assert os.listdir(ready.mnt) == ["first"]
    kill(ready.pid)
    assert ready.cli("umount", str(ready.mnt))["unmounted"] is True
    assert not preflight.is_ours(ready.mnt)


def test_a_daemon_that_hangs_does_not_keep_its_mount(ready, monkeypatch, capsys):
    ready.mount()
    for name, value in ready.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_asking, "_INFO_SECONDS", 0.2)
    os.kill(ready.pid, signal.SIGSTOP)
    try:
        assert main(["umount", "--force", str(ready.mnt)]) == 0
        assert "does not answer" in capsys.readouterr().err
        assert not preflight.is_ours(ready.mnt)
    finally:
        os.kill(ready.pid, signal.SIGCONT)
    wait_until(lambda: not is_daemon(ready.pid), "the daemon's end after its mount was taken away")


def test_in_the_foreground_ctrl_c_unmounts(ready):
    ready.mnt.mkdir()
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "meshkitfs", "mount", "--foreground", str(ready.mnt)],
        env=ready.env,
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        start_new_session=True,
    )
    ready.daemons.append(process.pid)
    try:
        assert process.stderr is not None
        first = next(line for line in process.stderr if b"Mounted at" in line)
        assert first == f"Mounted at {ready.mnt}. Ctrl-C unmounts it.\n".encode()
        (ready.mnt / "first" / "a").write_text("x")
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert b"Traceback" not in err
        assert not preflight.is_ours(ready.mnt)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def test_a_passphrase_reaches_the_daemon_and_nothing_else(alice, tmp_path):
    file = tmp_path / "phrase"
    file.touch(0o600)
    file.write_text(PHRASE)
    with_file = {"MESHKITFS_PASSPHRASE_FILE": str(file)}
    done = alice.cli("init", "--identity", "alice", "--key-vault", "passphrase-file", env=with_file)
    assert done["key_vault"]["kind"] == "passphrase-file"
    done = alice.cli("share", "list", check=False)
    assert done.error["code"] == "identity_locked"
    done = alice.cli("mount", check=False)
    assert (done.code, done.error["code"]) == (4, "identity_locked")
    read_end, write_end = os.pipe()
    os.write(write_end, b"wrong\n")
    os.close(write_end)
    done = subprocess.run(
        [sys.executable, "-m", "meshkitfs", "--json", "mount", "--passphrase-fd", str(read_end)],
        env=alice.env,
        pass_fds=[read_end],
        capture_output=True,
        cwd="/",
        check=False,
    )
    os.close(read_end)
    assert json.loads(done.stderr)["error"]["code"] == "wrong_passphrase"
    assert done.returncode == 4
    assert alice.home.holder() is None
    data = alice.cli("mount", env=with_file)
    alice.daemons.append(data["pid"])
    for name in ("cmdline", "environ"):
        with open(f"/proc/{data['pid']}/{name}", "rb") as shown:
            assert PHRASE.encode() not in shown.read()
    assert PHRASE not in alice.logs()
    assert PHRASE not in "".join(alice.outputs)
    # With the daemon there, no command needs it any more.
    assert alice.cli("share", "list") == {"shares": []}


def test_what_keeps_a_mount_from_starting_is_told_by_the_command(ready):
    place = ready.metadata
    place.rename(place.with_name("away"))
    done = ready.mount(check=False)
    assert (done.code, done.error["code"]) == (7, "metadata_unavailable")
    assert str(place) in done.error["detail"]
    assert not preflight.is_ours(ready.mnt)
    assert ready.home.holder() is None
    place.with_name("away").rename(place)
    ready.mount()


def test_a_directory_with_a_trap_in_it_is_not_searched_for_modules(ready, tmp_path):
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("trio", "json", "pyfuse3", "cryptography", "apsw"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nraise SystemExit(5)\n")
    ready.mnt.mkdir()
    command = [sys.executable, "-P", "-m", "meshkitfs", "--json", "mount", str(ready.mnt)]
    done = subprocess.run(command, env=ready.env, cwd=trap, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    ready.daemons.append(json.loads(done.stdout)["pid"])
    assert not (tmp_path / "sprung").exists()


def test_commands_without_a_daemon_take_turns(ready):
    ended = end_all([start(ready, "share", "create", f"s{number}") for number in range(4)])
    assert [code for code, _, _ in ended] == [0, 0, 0, 0], ended
    names = {share["name"] for share in ready.cli("share", "list")["shares"]}
    assert names == {"first", "s0", "s1", "s2", "s3"}


def test_two_mounts_at_once_are_one_mount(ready):
    ready.mnt.mkdir()
    ended = end_all([start(ready, "mount", str(ready.mnt)) for _ in range(3)])
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert {json.loads(out)["pid"] for _, out, _ in ended} == {ready.home.holder()}
    assert len([mount for mount in preflight.mounts() if mount.path == str(ready.mnt)]) == 1


def test_a_read_only_mount_refuses_writes_with_erofs(ready):
    ready.mount("--read-only")
    assert errno_of(os.mkdir, ready.mnt / "second") == errno.EROFS
    assert errno_of(os.open, ready.mnt / "first" / "a", os.O_CREAT | os.O_WRONLY) == errno.EROFS
