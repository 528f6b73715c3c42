"""Locking a mounted home: what stops, what stays, what is left in memory; and mounts that come up locked."""

import contextlib
import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import homes
import pytest
import secret_service
import t4_gate
from homes import Person, errno_of, fails, needs_fuse, reason_code, usable_python, wait_until
from t4_sharing import MAPPED

from meshkitfs.errors import MeshkitError

pytestmark = needs_fuse
PHRASE = "correct horse battery staple"
REFUSED = (
    lambda place: os.open(place / "file", os.O_RDONLY),
    lambda place: os.listdir(place),
    lambda place: os.listdir(place.parent),
    lambda place: os.stat(place / "file"),
    lambda place: os.stat(place / "never seen"),
    lambda place: os.stat(place.parent / "never seen"),
    lambda place: os.stat(place / "directory/inner"),
    lambda place: os.listdir(place / "directory"),
    lambda place: (place / "new").mkdir(),
    lambda place: (place.parent / "new share").mkdir(),
    lambda place: os.rename(place / "file", place / "renamed"),
    lambda place: os.unlink(place / "file"),
    lambda place: os.truncate(place / "file", 0),
)


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    with Person(tmp_path_factory.mktemp("lock") / "alice", "alice") as alice:
        alice.init()
        alice.mount()
        yield alice


@pytest.fixture
def place(alice, request):
    """A share with a file and a directory, unlocked before and after."""
    name = request.node.name.partition("[")[0][5:40]
    alice.ask("share.create", name=name)
    place = alice.mnt / name
    (place / "directory").mkdir()
    homes.write_synced(place / "directory/inner", b"inner")
    homes.write_synced(place / "file", b"content " * 100_000)
    yield place
    alice.ask("unlock")


def test_everything_is_refused_and_goes_on_after(alice, place):
    assert (place / "directory/inner").read_bytes() == b"inner"
    assert alice.cli("lock")["left"] == []
    for refused in REFUSED:
        with fails(errno.EACCES):
            refused(place)
    assert reason_code(place) == "identity_locked"
    assert alice.share(place.name)["reason"] == "identity_locked"
    assert f"{place.name}\n    identity_locked" in alice.errors_text()
    assert alice.status_file()["locked"]["by"] == "lock"
    explained = alice.explain(place / "file")
    assert explained["code"] == "identity_locked"
    assert [step["result"] for step in explained["steps"][:2]] == ["refused", "not reached"]
    before = alice.counters()
    # Nothing is asked, unwrapped, fetched or opened meanwhile.
    with fails(errno.EACCES):
        (place / "file").read_bytes()
    after = alice.counters()
    assert [after[key] - before[key] for key in ("unwraps", "fetches", "decrypts")] == [0, 0, 0]
    for command in (["share", "list"], ["share", "create", "more"], ["inbox"], ["history", place.name]):
        result = alice.cli(*command, check=False)
        assert result.code in (0, 4), result
        if result.code:
            assert result.error["code"] == "identity_locked"
    assert alice.cli("lock")["locked"]
    assert alice.cli("unlock") == {"locked": None}
    assert (place / "directory/inner").read_bytes() == b"inner"
    assert os.stat(place / "file").st_size == 800_000
    assert reason_code(place) == "ok"
    assert alice.cli("unlock") == {"locked": None}


# == what was in use =================================================================================


def test_an_open_descriptor_and_cached_pages(alice, place):
    data = (place / "file").read_bytes()
    with open(place / "file", "rb", 0) as file, open(place / "file", "r+b", 0) as writer:
        assert file.read() == data  # all of it is in the page cache now
        alice.ask("lock")
        for offset in (0, 4096, 700_000):
            assert errno_of(os.pread, file.fileno(), 4096, offset) == errno.EACCES
        assert errno_of(os.pwrite, writer.fileno(), b"x", 0) == errno.EACCES
        assert errno_of(os.fstat, file.fileno()) == errno.EACCES
        alice.ask("unlock")
        assert os.pread(file.fileno(), 4096, 4096) == data[4096:8192]
        assert os.pwrite(writer.fileno(), b"changed", 0) == 7
        os.fsync(writer.fileno())
    assert (place / "file").read_bytes() == b"changed" + data[7:]


def test_a_memory_map(alice, place):
    """The kernel ends a process that touches a page it cannot get: SIGBUS."""
    reader = subprocess.Popen(
        [sys.executable, "-c", MAPPED, place / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    data = (place / "file").read_bytes()
    assert int(reader.stdout.readline()) == sum(data[i] for i in range(0, len(data), mmap.PAGESIZE))
    alice.ask("lock")
    out, _ = reader.communicate(f"{homes.PATIENCE}\n", timeout=homes.PATIENCE)
    assert out == ""
    assert reader.returncode == -signal.SIGBUS


def test_a_running_cat(alice, place):
    """It stops with EACCES in the middle, and what it had got by then is right."""
    data = os.urandom(48 << 20)
    homes.write_synced(place / "large", data)
    alice.remount()
    cat = subprocess.Popen(["cat", place / "large"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    got = cat.stdout.read(1 << 20)  # the pipe is full now, and the cat waits for us
    alice.ask("lock")
    rest, said = cat.communicate(timeout=homes.PATIENCE)
    assert cat.returncode == 1
    assert b"Permission denied" in said
    assert len(got + rest) < len(data)
    assert data.startswith(got + rest)
    alice.ask("unlock")
    assert (place / "large").read_bytes() == data


def test_a_working_directory_inside(alice, place):
    shell = subprocess.Popen(
        ["sh", "-c", "read _; cat inner 2>&1; read _; cat inner; pwd"],
        cwd=place / "directory",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    alice.ask("lock")
    shell.stdin.write(b"\n")
    shell.stdin.flush()
    assert b"Permission denied" in shell.stdout.readline()
    alice.ask("unlock")
    out, _ = shell.communicate(b"\n", timeout=homes.PATIENCE)
    assert out == b"inner" + os.fsencode(place / "directory") + b"\n"


def test_a_member_is_locked_out_by_itself_only(alice, place, tmp_path):
    with Person(tmp_path / "bob", "bob") as bob:
        bob.init(alice)
        homes.invite(alice, place.name, bob, "--rights", "read,write")
        bob.mount()
        theirs = bob.mnt / f"{place.name} (alice)"
        with open(theirs / "file", "rb", 0) as file:
            assert file.read(7) == b"content"
            bob.ask("lock")
            with fails(errno.EACCES):
                os.stat(theirs / "directory/inner")
            homes.write_synced(place / "file", b"written by alice meanwhile")
            bob.ask("unlock")
            assert os.pread(file.fileno(), 100, 0) == b"written by alice meanwhile"
        # A revocation that came meanwhile stays one.
        bob.ask("lock")
        alice.ask("share.revoke", share=place.name, recipient="bob")
        bob.ask("unlock")
        with fails(errno.EACCES):
            (theirs / "file").read_bytes()
        assert reason_code(theirs) == "share_revoked"


# == nothing is lost ===================================================================================


def test_what_was_written_is_saved_first_and_sent_after(alice, place):
    """Also what is in the kernel only, through a map, and what no store takes at the moment."""
    with open(place / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        assert view[:7] == b"content"
        blocks = alice.blocks.rename(alice.blocks.with_name("away"))
        try:
            (place / "new").write_bytes(b"n" * 300_000)
            view[:6] = b"mapped"
            left = alice.cli("lock")["left"]
            assert [(item["share"], item["unsaved"]) for item in left] == [(place.name, False)]
            assert alice.status()["left"] == left
            assert alice.status()["pending"]["blocks"] > 0
            assert alice.cli("sync", check=False).code == 7
        finally:
            blocks.rename(alice.blocks)
    alice.kill9()
    alice.mount()
    assert (place / "new").read_bytes() == b"n" * 300_000
    assert (place / "file").read_bytes() == b"mapped" + (b"content " * 100_000)[6:]
    assert alice.cli("sync")["left"] == []


def test_writers_at_full_speed_lose_nothing_they_were_told_is_written(alice, place):
    """Locked and unlocked under writers, again and again: no hang, no lost byte, EACCES and nothing else."""
    ends = threading.Event()
    said = []

    def write(number, file):
        done, refused, other = 0, 0, []
        with file:
            while not ends.is_set():
                try:
                    file.write(b"%08d" % done)
                    done += 1
                except OSError as error:
                    refused += 1
                    if error.errno != errno.EACCES:
                        other.append(error)
        said.append((number, done, refused, other))

    files = [open(place / f"log {number}", "wb", 0) for number in range(3)]  # noqa: SIM115 (a thread closes it)
    writers = [threading.Thread(target=write, args=pair) for pair in enumerate(files)]
    for writer in writers:
        writer.start()
    for _ in range(4):
        alice.ask("lock")
        alice.ask("unlock")
    ends.set()
    for writer in writers:
        writer.join(homes.PATIENCE)
    assert len(said) == 3
    assert not any(other for *_, other in said)
    for number, done, _, _ in said:
        written = (place / f"log {number}").read_bytes()
        assert written == b"".join(b"%08d" % i for i in range(done))
    alice.remount()
    for number, done, _, _ in said:
        assert (place / f"log {number}").stat().st_size == 8 * done


# == memory ============================================================================================


def found_in_memory(pid, secrets):
    """The names of ``secrets`` (bytes by name) that are in writable memory of ``pid``, raw or in hex."""
    wanted = secrets | {f"{name} in hex": secret.hex().encode() for name, secret in secrets.items()}
    found = set()
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, mode = line.split()[:2]
            if not mode.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            with contextlib.suppress(OSError, ValueError):  # [vvar] and its like
                data = os.pread(memory.fileno(), end - start, start)
                found |= {name for name, secret in wanted.items() if secret in data}
    return found


def test_keys_are_gone_from_memory(alice, place):
    """Read by root, which nothing keeps out: while it is open they are there, so this can find them.

    Content that was read is gone as well. What programs wrote last stays in the buffers in which libfuse takes
    their requests (docs/security.md), so this daemon has only read.
    """
    share = os.getxattr(place, "user.meshkit.share").decode()
    everything = t4_gate.secrets_of(alice, alice.metadata)
    secrets = {name: key for name, key in everything.items() if " of " not in name or share in name}
    assert len(secrets) == 7
    content = b"content " * 3000
    alice.remount()
    with open(place / "file", "rb") as file:
        assert file.read(len(content)) == content
        # A key of a single file, as it stands in the tree of a directory that is open.
        held = found_in_memory(alice.pid, secrets | {"content": content})
        assert held >= {"content", "signing seed", "encryption seed"}
        assert any(name.startswith("epoch key") for name in held)
        alice.ask("lock")
        assert found_in_memory(alice.pid, secrets | {"content": content}) == set()
        alice.ask("unlock")
        file.seek(0)
        assert file.read() == b"content " * 100_000
        alice.ask("lock")
        assert found_in_memory(alice.pid, secrets | {"content": content}) == set()


ATTACK = """
import ctypes, errno, os, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def tried(pid):
    said = []
    for name in ("environ", "mem", "maps"):
        try:
            with open(f"/proc/{pid}/{name}", "rb", 0) as file:
                if name == "mem":
                    start = int(open(f"/proc/{pid}/maps").read().split("-")[0], 16)
                    os.pread(file.fileno(), 16, start)
                else:
                    file.read(16)
            said.append(f"{name} read")
        except OSError as error:
            said.append(f"{name} {errno.errorcode[error.errno]}")
    traced = libc.ptrace(16, pid, 0, 0)  # PTRACE_ATTACH
    said.append("ptrace " + ("attached" if traced == 0 else errno.errorcode[ctypes.get_errno()]))
    if traced == 0:
        os.waitpid(pid, 0x40000000)
        libc.ptrace(17, pid, 0, 0)
    return said

child = subprocess.Popen(["sleep", "60"])
while b"sleep" not in open(f"/proc/{child.pid}/cmdline", "rb").read():
    time.sleep(0.01)
print(*tried(child.pid))
child.kill()
print(*tried(int(sys.argv[1])))
"""


@contextlib.contextmanager
def nobodys(name):
    """A `Person` with the rights of an ordinary user, and the prefix with which commands become that user."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("NOT TESTED: AN ORDINARY USER'S MEMORY: that needs root and setpriv")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("NOT TESTED: AN ORDINARY USER'S MEMORY: /dev/fuse is closed for ordinary users here")
    base = Path(tempfile.mkdtemp(prefix="meshkit-nobody-", dir="/tmp"))
    try:
        base.chmod(0o755)
        for directory in ("home", "mnt"):
            (base / directory).mkdir(mode=0o700)
            os.chown(base / directory, 65534, 65534)
        ordinary = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        prefix, python = usable_python([*ordinary, "env", f"HOME={base}", "PYTHONDONTWRITEBYTECODE=1"])
        with Person(base / "home", name, mnt=base / "mnt", python=python) as person:
            yield person, prefix
    finally:
        shutil.rmtree(base)


def test_a_process_of_the_same_user_cannot_read_the_memory():
    """Neither memory nor environment, nor by tracing; and what the daemon itself needs of /proc still works."""
    with nobodys("nobody") as (person, prefix):

        def run(*args):
            return person.cli(*args, prefix=prefix)

        run("init", "--identity", "nobody", "--key-vault", "plain-file")
        pid = run("mount", str(person.mnt))["pid"]
        person.daemons.append(pid)
        assert Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0] == "65534"
        run("share", "create", "first")
        assert run("status")["mountpoint"] == str(person.mnt)
        attack = [*prefix, person.python, "-c", ATTACK, str(pid)]
        done = subprocess.run(attack, capture_output=True, text=True, timeout=homes.PATIENCE, cwd="/")
        assert done.returncode == 0, done.stderr
        other, daemon = done.stdout.splitlines()
        # Of a process that does nothing about it, all this can be had.
        assert other == "environ read mem read maps read ptrace attached"
        assert daemon == "environ EACCES mem EACCES maps EACCES ptrace EPERM"
        (shown,) = {Path(f"/proc/{pid}/limits").read_text().split("Max core file size")[1].split()[0]}
        assert shown == "0"
        given = json.loads(_as(prefix, person.mnt / ".meshkit/capabilities.json"))
        assert (given["traceable"], given["core_dumps"]) == (False, False)
        run("lock")
        assert run("status")["locked"]
        run("unlock")
        run("umount")


def _as(prefix, path):
    return subprocess.run([*prefix, "cat", path], capture_output=True, check=True).stdout


def test_key_memory_is_locked(alice):
    given = json.loads((alice.mnt / ".meshkit/capabilities.json").read_bytes())
    assert given["locked_memory"] is True
    assert int(Path(f"/proc/{alice.pid}/status").read_text().split("VmLck:")[1].split()[0]) >= 16


# == key vaults ========================================================================================


def with_phrase(person, *args, phrase=PHRASE, check=True):
    """Run a command with the passphrase in a descriptor."""
    return person.cli(*args, "--passphrase-fd", "0", stdin=phrase.encode() + b"\n", check=check)


def test_a_passphrase(tmp_path):
    with Person(tmp_path / "carol", "carol") as carol:
        with_phrase(carol, "init", "--identity", "carol", "--key-vault", "passphrase-file")
        carol.mnt.mkdir()
        carol.daemons.append(with_phrase(carol, "mount", str(carol.mnt))["pid"])
        carol.ask("share.create", name="first")
        homes.write_synced(carol.mnt / "first/file", b"carol's")
        carol.cli("lock")
        secrets = {"passphrase": PHRASE.encode()}
        assert found_in_memory(carol.pid, secrets) == set()
        # Without the passphrase, or with another one, it stays shut; the daemon has not kept the first.
        for command, code in (
            (lambda: carol.cli("unlock", check=False), "identity_locked"),
            (lambda: with_phrase(carol, "unlock", phrase="something else", check=False), "wrong_passphrase"),
        ):
            assert command().error["code"] == code
            assert errno_of(os.open, carol.mnt / "first/file", os.O_RDONLY) == errno.EACCES
        for params, code in (
            ({}, "identity_locked"),
            ({"key": "00" * 32}, "identity_corrupt"),
            ({"key": "x"}, "invalid_argument"),
        ):
            with pytest.raises(MeshkitError) as caught:
                carol.ask("unlock", **params)
            assert caught.value.code == code
            assert carol.status()["locked"]
        assert with_phrase(carol, "unlock") == {"locked": None}
        assert (carol.mnt / "first/file").read_bytes() == b"carol's"
        carol.umount()
        # It can also come up locked, asking nobody.
        carol.mount("--locked")
        assert carol.status()["locked"]["by"] == "start"
        for refused in (carol.mnt / "first", carol.mnt / "anything"):
            with fails(errno.EACCES):
                os.stat(refused)
        with fails(errno.EACCES):
            os.listdir(carol.mnt)
        with fails(errno.EACCES):
            (carol.mnt / "new").mkdir()
        assert "identity_locked" in carol.errors_text()
        assert carol.status_file()["shares"] == []
        assert carol.cli("share", "list", check=False).error["code"] == "identity_locked"
        walk = carol.cli("explain", str(carol.mnt / "first/file"))
        assert (walk["code"], walk["path"], walk["locked"]["by"]) == (
            "identity_locked",
            "first/file",
            "start",
        )
        assert [step["result"] for step in walk["steps"]] == ["refused"] + ["not reached"] * 10
        assert carol.cli("unlock", check=False).error["code"] == "identity_locked"
        with pytest.raises(MeshkitError) as caught:
            carol.ask("unlock", key="00" * 32)
        assert caught.value.code == "identity_corrupt"
        with_phrase(carol, "unlock")
        assert os.listdir(carol.mnt) == ["first"]
        homes.write_synced(carol.mnt / "first/file", b"written after")
        # Locked and unlocked again like any other, and unmounted while it is locked.
        carol.cli("lock")
        with fails(errno.EACCES):
            (carol.mnt / "first/file").read_bytes()
        assert carol.umount()["left"] == []
        carol.mount("--locked")
        assert carol.umount()["left"] == []
        wait_until(lambda: not homes.is_daemon(carol.pid), "the daemon's end")


def test_a_keyring(tmp_path):
    """A real gnome-keyring: locked at the start, unlocked by another program, and asked again by unlock."""
    with secret_service.private_session() as session, Person(tmp_path / "dave", "dave") as dave:
        dave.env |= session.env | {
            name: dave.env[name] for name in ("MESHKITFS_HOME", "PYTHONPATH", "LC_ALL")
        }
        dave.init(key_vault="secret-service")
        dave.mount()
        dave.ask("share.create", name="first")
        homes.write_synced(dave.mnt / "first/file", b"dave's")
        dave.cli("lock")
        with fails(errno.EACCES):
            (dave.mnt / "first/file").read_bytes()
        session.lock()
        # There is nobody who could answer the keyring's prompt.
        assert dave.cli("unlock", check=False).error["code"] == "identity_locked"
        session.stop_keyring()
        session.start_keyring()
        # The keyring is open, and yet a home that a person has locked stays so until somebody says otherwise.
        wait_until(lambda: dave.status()["key_vault"]["locked"] is False, "the report of the open keyring")
        assert dave.status()["locked"]
        dave.cli("unlock")
        assert (dave.mnt / "first/file").read_bytes() == b"dave's"
        dave.umount()
        session.lock()
        dave.mount()
        assert dave.status()["locked"]["by"] == "keyring"
        with fails(errno.EACCES):
            os.listdir(dave.mnt)
        session.stop_keyring()
        session.start_keyring()  # unlocked, as another program or a login would
        wait_until(lambda: errno_of(os.listdir, dave.mnt) == 0, "the home to open by itself")
        assert (dave.mnt / "first/file").read_bytes() == b"dave's"
        assert dave.status()["locked"] is None
