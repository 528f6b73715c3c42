"""Ordinary programs at work inside a real mount of the real daemon, and nothing readable left on the disk."""

from __future__ import annotations

import base64
import hashlib
import mmap
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from homes import NOTHING, Person, needs_fuse, wait_until

pytestmark = needs_fuse

MIB = 1 << 20
BIG = 300 * MIB
EDITOR = next((name for name in ("vim", "vim.tiny", "vi", "ex") if shutil.which(name)), None)


def tool(name):
    return pytest.mark.skipif(
        name is None or shutil.which(name) is None, reason=f"{name} IS NOT INSTALLED HERE"
    )


def run(*command, cwd=None, timeout=120, check=True, **more):
    """Run a program and return what it printed; its complaints are a failure."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GIT_"))}
    env |= {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        [*map(os.fspath, command)], cwd=cwd, timeout=timeout, capture_output=True, env=env, **more
    )
    if check:
        assert done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
        return done.stdout.decode(errors="surrogateescape")
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A real tree: this interpreter's standard library, some odd things, and one file of 300 MB."""
    place = tmp_path_factory.mktemp("source") / "tree"
    place.mkdir()
    ignore = shutil.ignore_patterns("site-packages", "__pycache__", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), place / "lib", symlinks=True, ignore=ignore)
    os.symlink("lib/json/__init__.py", place / "symlink")
    os.symlink("nowhere", place / "dangling")
    os.link(place / "lib" / "os.py", place / "hardlink")
    (place / "empty").mkdir(mode=0o711)
    (place / "Ünï \n name").write_bytes(b"odd")
    os.truncate(os.open(place / "sparse", os.O_CREAT | os.O_WRONLY), 5 * MIB)
    rng = random.Random(300)
    with open(place / "big", "wb") as file:
        for _ in range(BIG // (10 * MIB)):
            file.write(rng.randbytes(10 * MIB))
    assert sum(len(files) for _, _, files in os.walk(place)) > 1500
    return place


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    with Person(tmp_path_factory.mktemp("tools") / "alice", "alice") as person:
        person.init()
        person.cli("share", "create", "first")
        person.mount()
        yield person


@pytest.fixture
def d(alice, request):
    """A directory of the test's own in the share."""
    path = alice.mnt / "first" / request.node.name
    path.mkdir()
    return path


def listing(place, fields="%P\\0%y\\0%m\\0%n\\0%l\\0%T@"):
    """Everything below ``place`` with its type, mode, links, target and time; sizes of files."""
    everything = run("find", place, "-mindepth", "1", "-printf", fields + "\\0\\0")
    sizes = run("find", place, "-type", "f", "-printf", "%P\\0%s\\0\\0")
    return sorted(everything.split("\0\0")), sorted(sizes.split("\0\0"))


def same(one, other):
    run("diff", "-r", "--no-dereference", one, other, timeout=300)


# -- a real tree -------------------------------------------------------------------------------------


def test_cp_a_of_a_real_tree(alice, source, d):
    run("cp", "-a", source, d / "tree", timeout=300)
    same(source, d / "tree")
    assert listing(source) == listing(d / "tree")
    # Nothing of it in any cache: the daemon and the kernel's mount are new.
    alice.remount()
    same(source, d / "tree")
    assert listing(source) == listing(d / "tree")
    same(source, d / "tree")  # and now from the kernel's cache, as far as it keeps it
    run("sync", "-f", d)


def test_du_and_df_are_sane(alice, source, d):
    def du(place, *options):
        return int(run("du", "-s", "--block-size=1", *options, place).split()[0])

    tree = d.parent / "test_cp_a_of_a_real_tree" / "tree"
    if not tree.exists():
        pytest.skip("runs after the copy of the tree")
    # Directories have sizes of their own on every filesystem.
    directories = sum(4096 + os.stat(path).st_size for path, _, _ in os.walk(source))
    assert du(tree, "--apparent-size") == pytest.approx(du(source, "--apparent-size"), abs=2 * directories)
    assert du(tree) == pytest.approx(du(source), rel=0.1)
    before = os.statvfs(alice.mnt)
    (d / "more").write_bytes(random.Random(1).randbytes(50 * MIB))
    run("sync", d / "more")
    after = os.statvfs(alice.mnt)
    taken = (before.f_bavail - after.f_bavail) * after.f_frsize
    assert taken > 20 * MIB  # others use the same disk, so no exact number
    assert run("df", "--output=target", d).split()[-1] == str(alice.mnt)


@tool("tar")
def test_tar(source, d, tmp_path):
    archive = tmp_path / "tree.tar"
    run("tar", "-C", source, "--exclude=./big", "-cf", archive, ".")
    run("tar", "-C", d, "-xpf", archive)
    run("tar", "-C", d, "--compare", "-f", archive)
    run("tar", "-C", d, "--sort=name", "-cf", tmp_path / "ours.tar", ".")
    run("tar", "-C", source, "--compare", "-f", tmp_path / "ours.tar")
    run("tar", "-C", d, "-czf", d / "inside.tgz", "lib/json")
    run("tar", "-tzf", d / "inside.tgz")


@tool("rsync")
def test_rsync_twice(source, d):
    def sync(place):
        report = run("rsync", "-aHi", "--delete", "--stats", "--exclude=/big", f"{place}/", f"{d}/")
        # Lines of -i: what kind of change, then the name.
        changes = [
            line
            for line in report.splitlines()
            if line[:2] in ("<f", ">f", "cd", "cL", ".f", ".d", "hf", "*d")
        ]
        number = next(
            line for line in report.splitlines() if line.startswith("Number of regular files transferred")
        )
        return int(number.split(":")[1].replace(",", "")), changes

    first, _ = sync(source)
    assert first > 1500
    assert sync(source) == (0, [])
    (d / "stray").write_bytes(b"to be deleted")
    (d / "lib" / "os.py").write_bytes(b"changed")
    os.utime(d / "lib" / "ast.py", ns=(1, 1))
    shutil.rmtree(d / "lib" / "json")
    again, _ = sync(source)
    assert again >= 3
    assert sync(source) == (0, [])
    same(source / "lib", d / "lib")
    assert not (d / "stray").exists()


# -- git ---------------------------------------------------------------------------------------------


@tool("git")
def test_git(alice, source, d):
    repository, clone = d / "repository", d / "clone"
    shutil.copytree(source / "lib" / "asyncio", repository)
    shutil.copytree(source / "lib" / "idlelib", repository / "idlelib")

    def git(*arguments, where=repository):
        who = ["-c", "user.name=Alice", "-c", "user.email=alice@example.org"]
        return run("git", *who, *arguments, cwd=where)

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    assert git("status", "--porcelain") == ""
    for i in range(5):
        (repository / "tasks.py").write_text(f"# version {i}\n")
        git("commit", "-q", "-a", "-m", f"change {i}")
    git("checkout", "-q", "-b", "side", "HEAD~3")
    git("mv", "idlelib", "idle")
    git("commit", "-q", "-m", "moved")
    git("checkout", "-q", "main")
    git("merge", "-q", "side", "-m", "merged")
    git("gc", "-q", "--aggressive", "--prune=now")
    git("fsck", "--full", "--strict")
    assert git("status", "--porcelain") == ""
    run("git", "clone", "-q", repository, clone)
    run("git", "clone", "-q", "--no-local", repository, d / "clone2")
    same(repository / "idle", clone / "idle")
    git("fsck", "--full", where=clone)
    alice.remount()
    git("fsck", "--full", "--strict")
    # The index knows inode numbers, sizes and times of everything: they have not changed.
    assert git("status", "--porcelain") == ""
    assert git("diff-files", "--name-only") == ""
    assert git("rev-list", "--count", "HEAD").strip() == "8"


# -- sqlite ------------------------------------------------------------------------------------------

READER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], timeout=30)
looked = last = 0
while True:
    # Each transaction of the writer adds two rows that cancel each other out.
    count, total = db.execute("SELECT count(*), coalesce(sum(amount), 0) FROM moves").fetchone()
    assert total == 0 and count % 2 == 0 and count >= last, (count, total, last)
    looked, last = looked + 1, count
    if count >= int(sys.argv[2]):
        break
print(looked)
"""


@pytest.mark.parametrize("mode", ["delete", "wal", "truncate", "persist"])
def test_sqlite_with_a_concurrent_reader(alice, d, mode):
    path = d / "data.db"
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("CREATE TABLE moves(id INTEGER PRIMARY KEY, amount INTEGER, note BLOB)")
    rounds = 60
    reader = subprocess.Popen(
        [sys.executable, "-I", "-c", READER, path, str(rounds * 2)], stdout=subprocess.PIPE, text=True
    )
    rng = random.Random(8)
    for i in range(rounds):
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO moves(amount, note) VALUES (?, ?)", (i, rng.randbytes(5000)))
        db.execute("INSERT INTO moves(amount, note) VALUES (?, ?)", (-i, rng.randbytes(5000)))
        if i % 10 == 9:
            db.execute("UPDATE moves SET note = ? WHERE id % 7 = 0", (rng.randbytes(2000),))
        db.execute("COMMIT")
    db.execute("BEGIN")
    db.execute("DELETE FROM moves")
    db.execute("ROLLBACK")
    assert int(reader.communicate(timeout=60)[0]) > 0
    assert reader.returncode == 0
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    if mode == "wal":
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    db.execute("VACUUM")
    digest = db.execute("SELECT count(*), sum(length(note)), max(id) FROM moves").fetchone()
    db.close()
    run("cp", path, d / "copy.db")
    if mode in ("delete", "wal"):
        alice.remount()
    for name in ("data.db", "copy.db"):
        db = sqlite3.connect(d / name)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*), sum(length(note)), max(id) FROM moves").fetchone() == digest
        db.close()


@tool("sqlite3")
def test_the_sqlite_shell(d):
    script = "CREATE TABLE t(x); INSERT INTO t SELECT value FROM generate_series(1, 10000);"
    done = run("sqlite3", d / "shell.db", script, check=False)
    if done.returncode:
        run("sqlite3", d / "shell.db", "CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES (1), (2);")
    assert run("sqlite3", d / "shell.db", "PRAGMA integrity_check;").strip() == "ok"


# -- editors -----------------------------------------------------------------------------------------


@tool(EDITOR)
@pytest.mark.parametrize("copy", ["yes", "no", "auto"])
def test_vim(d, copy):
    path = d / "text"
    path.write_text("one\ntwo\nthree\n" * 1000)
    os.chmod(path, 0o640)
    options = ["-c", f"set backup writebackup backupskip= backupcopy={copy}"]
    for old, new in (("two", "TWO"), ("one", "a longer first word")):
        run(
            EDITOR,
            "-Nu",
            "NONE",
            "-es",
            *options,
            "-c",
            f"%s/{old}/{new}/g",
            "-c",
            "wq",
            path,
            stdin=subprocess.DEVNULL,
        )
    assert path.read_text() == "a longer first word\nTWO\nthree\n" * 1000
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(d)) == ["text", "text~"]
    assert (d / "text~").read_text() == "one\nTWO\nthree\n" * 1000


def test_sed_in_place(d):
    for i in range(20):
        (d / f"file{i}").write_text("alpha\n" * (i * 100 + 1))
    run("sed", "-i", "s/alpha/beta/", *sorted(d.iterdir()))
    run("sed", "-i.bak", "s/beta/gamma/", d / "file3")
    assert all((d / f"file{i}").read_text() == "beta\n" * (i * 100 + 1) for i in range(20) if i != 3)
    assert (d / "file3").read_text() == "gamma\n" * 301
    assert (d / "file3.bak").read_text() == "beta\n" * 301


def test_saving_as_editors_do(alice, d):
    """Write beside it, fsync, take over mode and attributes, rename over; with the old one kept as a link."""
    path = d / "document"
    path.write_bytes(b"version 0")
    os.chmod(path, 0o604)
    for i in range(1, 30):
        with open(d / ".document.tmp", "xb") as file:
            file.write(b"version %d" % i * i * 100)
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
        backup = d / "document~"
        backup.unlink(missing_ok=True)
        os.link(path, backup)
        os.replace(d / ".document.tmp", path)
        assert path.read_bytes() == b"version %d" % i * i * 100
        assert path.stat().st_nlink == backup.stat().st_nlink == 1
    fd = os.open(d, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert sorted(os.listdir(d)) == ["document", "document~"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert backup.read_bytes() == b"version 28" * 2800


# -- memory maps -------------------------------------------------------------------------------------

MAPPER = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
    print(hashlib.sha256(view).hexdigest(), flush=True)
    sys.stdin.readline()
    print(hashlib.sha256(view).hexdigest(), flush=True)
"""


def test_mapped_readers_and_writers(alice, d):
    size = 20 * MIB + 123
    data = bytearray(random.Random(9).randbytes(size))
    path = d / "mapped"
    path.write_bytes(data)
    readers = [
        subprocess.Popen(
            [sys.executable, "-I", "-c", MAPPER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    before = hashlib.sha256(data).hexdigest()
    assert [reader.stdout.readline().strip() for reader in readers] == [before] * 2
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as one, mmap.mmap(file.fileno(), 0) as two:
        for at in (0, 4095, 64 * 1024 - 3, 5 * MIB, 7 * MIB + 1, size - 10):
            one[at : at + 9] = data[at : at + 9] = b"%09d" % at
            assert two[at : at + 9] == data[at : at + 9]
        one.flush()
        # write(2) and mappings show each other's changes.
        os.pwrite(file.fileno(), b"by write", 11 * MIB)
        data[11 * MIB : 11 * MIB + 8] = b"by write"
        assert one[11 * MIB : 11 * MIB + 8] == b"by write"
        two[12 * MIB] = data[12 * MIB] = 7
    after = hashlib.sha256(data).hexdigest()
    for reader in readers:
        assert reader.communicate("\n", timeout=30)[0].strip() == after
    assert path.read_bytes() == data
    alice.remount()
    assert path.read_bytes() == data


# -- other tools -------------------------------------------------------------------------------------


def test_install_and_coreutils(source, d, tmp_path):
    run("install", "-D", "-m", "750", source / "lib" / "os.py", d / "bin" / "os.py")
    assert stat.S_IMODE((d / "bin" / "os.py").stat().st_mode) == 0o750
    run("install", "-d", "-m", "711", d / "made" / "by" / "install")
    run("install", "-p", "-b", source / "lib" / "os.py", d / "bin" / "os.py")
    assert (d / "bin" / "os.py~").exists()
    assert int((d / "bin" / "os.py").stat().st_mtime) == int((source / "lib" / "os.py").stat().st_mtime)
    run("cp", "-a", source / "lib" / "json", d / "json")
    run("cp", "-al", d / "json", d / "linked")
    assert (d / "linked" / "decoder.py").stat().st_nlink == 2
    run("chmod", "-R", "u=rwX,go=", d / "json")
    run("mv", d / "json", d / "moved")
    run("dd", "if=/dev/zero", f"of={d}/dd", "bs=64k", "count=33", "conv=fsync", "status=none")
    run("dd", f"if={source}/big", f"of={d}/dd", "bs=1000", "count=5", "seek=7", "conv=notrunc", "status=none")
    assert (d / "dd").stat().st_size == 33 * 65536
    with open(source / "big", "rb") as big, open(d / "dd", "rb") as made:
        made.seek(7000)
        assert made.read(6000) == big.read(5000) + bytes(1000)
    run("truncate", "-s", "1M", d / "dd")
    run("split", "-b", "100K", d / "dd", d / "part-")
    assert run("sh", "-c", f"cat '{d}'/part-* | cmp - '{d}/dd' && echo same").strip() == "same"
    run("sort", "-R", "-T", d, "-o", d / "sorted", source / "lib" / "os.py")
    run("touch", "-d", "2001-02-03 04:05:06.789", d / "sorted")
    assert run("stat", "-c", "%.9Y", d / "sorted").strip().endswith(".789000000")
    run("cp", "-a", d / "moved", tmp_path / "back")
    same(d / "moved", tmp_path / "back")
    run(sys.executable, "-m", "compileall", "-q", d / "moved")
    run("rm", "-rf", d)
    assert not d.exists()


def test_sparse_copies(d, tmp_path):
    original = tmp_path / "original"
    with open(original, "wb") as file:
        file.truncate(200 * MIB)
        for at in (0, 30 * MIB, 150 * MIB + 5):
            file.seek(at)
            file.write(b"data" * 5000)
    for option in ("always", "auto"):
        run("cp", f"--sparse={option}", original, d / option)
        run("cmp", original, d / option)
        assert (d / option).stat().st_blocks * 512 < 10 * MIB
    run("cp", "--sparse=always", d / "always", tmp_path / "back")
    run("cmp", original, tmp_path / "back")


def test_python_runs_from_the_mount(source, d):
    shutil.copytree(source / "lib" / "json", d / "ourjson")
    code = "import ourjson, sys; assert ourjson.__file__.startswith(sys.path[0]); print(ourjson.dumps([1]))"
    assert run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(d)!r}); {code}").strip() == "[1]"
    assert (d / "ourjson" / "__pycache__").is_dir()
    (d / "script").write_text("#!/bin/sh\necho ran\n")
    os.chmod(d / "script", 0o755)
    assert run(d / "script").strip() == "ran"


# -- nothing to read on the disk ---------------------------------------------------------------------

MARK = "xq7MARKxq7"


def forms(marker):
    raw = marker.encode()
    yield raw
    yield raw.hex().encode()
    yield marker.encode("utf-16-le")
    # Base64 at any of the three alignments; what depends on neighbours is cut off.
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + raw).rstrip(b"=")
        yield text[(0, 2, 3)[shift] : len(text) - 2]


def traces(*places):
    """Every file below ``places`` whose bytes or name show the marker in some form."""
    wanted = list(forms(MARK))
    found = []
    looked = 0
    for place in places:
        for directory, _, files in os.walk(place):
            for name in files:
                path = Path(directory, name)
                if not path.is_file() or path.is_symlink():
                    continue
                try:
                    data = path.read_bytes()
                except FileNotFoundError:
                    continue  # sent and gone
                looked += 1
                if any(form in data or form in os.fsencode(path) for form in wanted):
                    found.append(path)
    return found, looked


def test_nothing_readable_reaches_the_disk(tmp_path):
    """Content, names, targets, attributes: in no file of the home, whatever state it is in."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    home, mnt = tmp_path / "home", tmp_path / "mnt"
    with Person(home, "carol", mnt) as carol:
        carol.env |= {"TMPDIR": str(scratch), "SQLITE_TMPDIR": str(scratch)}
        carol.init()
        carol.cli("share", "create", f"share {MARK}")
        carol.mount()
        share = mnt / f"share {MARK}"

        def write(tag):
            top = share / f"dir {MARK} {tag}"
            top.mkdir()
            (top / f"small {MARK}").write_bytes(MARK.encode() * 10)
            (top / "medium").write_bytes(MARK.encode() * 10_000)
            (top / "large").write_bytes(MARK.encode() * 300_000)
            with open(top / "updated", "wb") as file:
                file.truncate(2 * MIB)
                for at in range(0, 2 * MIB, 100_000):
                    file.seek(at)
                    file.write(MARK.encode())
            os.symlink(f"/somewhere/{MARK}", top / "symlink")
            os.link(top / "medium", top / f"link {MARK}")
            os.setxattr(top / "medium", f"user.{MARK}", MARK.encode())
            for i in range(200):
                (top / f"{MARK} {i}").touch()
            (top / "gone").write_bytes(MARK.encode() * 100_000)
            (top / "gone").unlink()
            return top

        def clean():
            found, looked = traces(home, scratch)
            assert found == []
            assert looked > 5

        # The search finds what is there to be found, in each form.
        (home / "control").write_bytes(b"x" + base64.b64encode(b"yy" + MARK.encode()) + b"z")
        assert traces(home)[0] == [home / "control"]
        (home / "control").unlink()
        write("one")
        clean()
        assert len(traces(share)[0]) > 200
        top = write("two")
        clean()  # some of it is on its way
        with open(top / "medium", "ab") as file:
            file.write(MARK.encode())
            os.fsync(file.fileno())
        clean()
        with pytest.raises(OSError):
            os.rmdir(top)
        carol.cli("share", "show", f"share {MARK}")
        write("three")
        carol.kill9()
        clean()
        carol.mount()
        assert (top / "medium").read_bytes().endswith(MARK.encode())
        (share / "errors").write_bytes(MARK.encode())
        carol.umount()
        clean()
        assert os.listdir(scratch) == []


def test_the_daemon_noticed_no_defect(alice):
    wait_until(lambda: alice.status()["pending"] == NOTHING, "everything to be stored")
    assert alice.status()["errors"] == []
    bad = [line for line in alice.logs().splitlines() if "level=error" in line or "Traceback" in line]
    assert bad == []
