"""The contract of every byte store, and what is particular to the local one.

A new provider joins the first half by an entry in `stores.STORES`.
"""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import stores
import trio
import trio.testing
from servers.helia import helia_fixture  # noqa: F401
from servers.moto import moto_s3_fixture  # noqa: F401
from servers.rclone import rclone_s3_fixture  # noqa: F401

from meshkitfs.core.blocks import MAX_SEALED, SealedBlock, VerifiedBlock, Where, seal_block
from meshkitfs.core.cid import cid_text, digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import (
    ByteStore,
    Capabilities,
    Listable,
    LocalStore,
    ProviderSpec,
    _durable,
    _layout,
    open_provider,
    parse_provider,
)

OID = bytes(range(16))


def sealed(size: int = 1000, index: int = 0) -> SealedBlock:
    return seal_block(Where.block(OID, index), os.urandom(size))[1]


@pytest.fixture(scope="module", autouse=True)
def portal():
    """The run of trio that every call of these tests is made in."""
    global _portal
    _portal = stores.Portal()
    yield _portal
    _portal.close()


def run(function, *args):
    return _portal.run(function, *args)


def code_of(excinfo: pytest.ExceptionInfo[MeshkitError]) -> str:
    return excinfo.value.reason.code


def fails(code: str, function, *args) -> MeshkitError:
    with pytest.raises(MeshkitError) as excinfo:
        run(function, *args)
    assert code_of(excinfo) == code
    return excinfo.value


@pytest.fixture(params=stores.STORES)
def opened(request, tmp_path, portal):
    with stores.STORES[request.param](portal, request, tmp_path) as found:
        yield found


@pytest.fixture
def store(opened):
    return opened.store


def offer(store, digest: bytes, data: bytes) -> None:
    """Put bytes under a name that is not theirs. A store may refuse them, or find out when they are read."""
    with contextlib.suppress(MeshkitError):
        run(store.put, SealedBlock(digest, data))


def path_of(store: LocalStore, digest: bytes) -> str:
    text = cid_text(digest)
    return f"{store.directory}/{text[-2:]}/{text}"


# -- every store ------------------------------------------------------------------------------------


def test_is_a_byte_store(store):
    assert isinstance(store, ByteStore)
    assert isinstance(store.name, str)
    assert isinstance(store.local, bool)


def test_put_get_round_trip(store):
    for size in (1, 70_000, 262_144, 1_048_576):
        block = sealed(size)
        run(store.put, block)
        got = run(store.get, block.digest)
        assert type(got) is VerifiedBlock
        assert got.digest == block.digest
        assert bytes(got.data) == bytes(block.data)
    run(store.sync)


def test_put_takes_every_kind_of_buffer(store):
    for kind in (bytes, bytearray, memoryview):
        block = sealed()
        run(store.put, SealedBlock(block.digest, kind(bytes(block.data))))
        assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def test_put_is_idempotent(store):
    block = sealed()
    run(store.put, block)
    run(store.put, block)
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def test_missing_block(store):
    fails("block_unavailable", store.get, digest_of(b"never stored"))


def test_wrong_bytes_are_never_returned(store):
    offer(store, digest_of(b"other"), sealed().data)
    with pytest.raises(MeshkitError) as excinfo:
        run(store.get, digest_of(b"other"))
    assert code_of(excinfo) in ("cid_mismatch", "block_unavailable")


@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "empty", "huge", "page"])
def test_what_was_damaged_at_the_store_is_refused_and_repaired_by_storing_again(opened, how):
    if opened.plant is None:
        pytest.skip("this store's own names are the hashes of what it holds")
    block = sealed(100_000)
    run(opened.store.put, block)
    good = bytes(block.data)
    damaged = {
        "flip": good[:500] + bytes([good[500] ^ 1]) + good[501:],
        "truncate": good[:-1],
        "extend": good + b"\0",
        "empty": b"",
        "huge": good + bytes(3 * MAX_SEALED),
        "page": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    }
    opened.plant(block.digest, damaged[how])
    with pytest.raises(MeshkitError) as excinfo:
        run(opened.store.get, block.digest)
    # Too large an answer is thrown away before anybody can say what it was.
    allowed = ("cid_mismatch", "provider_request_failed") if how == "huge" else ("cid_mismatch",)
    assert code_of(excinfo) in allowed
    run(opened.store.put, block)
    assert bytes(run(opened.store.get, block.digest).data) == good


def test_has_and_has_many(store):
    blocks = [sealed(index=i) for i in range(3)]
    run(store.put, blocks[0])
    run(store.put, blocks[2])
    assert run(store.has, blocks[0].digest)
    assert not run(store.has, blocks[1].digest)
    wanted = (b.digest for b in blocks)
    assert run(store.has_many, wanted) == {blocks[0].digest, blocks[2].digest}
    assert run(store.has_many, []) == set()


def test_get_many_leaves_out_what_cannot_be_had(store):
    good, wrong = sealed(), sealed(index=1)
    run(store.put, good)
    offer(store, digest_of(b"other"), wrong.data)
    found = run(store.get_many, [good.digest, digest_of(b"other"), digest_of(b"never stored")])
    assert found.keys() == {good.digest}
    assert type(found[good.digest]) is VerifiedBlock
    assert bytes(found[good.digest].data) == bytes(good.data)
    assert store.counters.gets == 3
    assert run(store.get_many, []) == {}


def test_delete_and_delete_again(opened):
    store, block = opened.store, sealed()
    run(store.put, block)
    run(store.delete, block.digest)
    run(store.delete, block.digest)
    assert not run(store.has, block.digest)
    assert run(store.sizes, [block.digest]) == {}
    if not opened.lingers:
        fails("block_unavailable", store.get, block.digest)


def test_delete_many_and_sizes(store):
    blocks = [sealed(size, i) for i, size in enumerate((1, 5000, 70_000, 5000))]
    for block in blocks[:3]:
        run(store.put, block)
    digests = [block.digest for block in blocks]
    assert run(store.sizes, iter(digests)) == {block.digest: len(block.data) for block in blocks[:3]}
    run(store.delete_many, digests[1:])  # one of them was never there
    run(store.sync)
    assert run(store.sizes, digests) == {digests[0]: len(blocks[0].data)}
    assert bytes(run(store.get, digests[0]).data) == bytes(blocks[0].data)
    run(store.delete_many, [])
    assert run(store.sizes, []) == {}


@pytest.mark.parametrize("size", [0, MAX_SEALED + 1])
def test_impossible_sizes_are_refused(store, size, tmp_path):
    data = bytes(size)
    fails("invalid_envelope", store.put, SealedBlock(digest_of(data), data))
    spool = tmp_path / "spool"
    spool.write_bytes(data)
    fails("invalid_envelope", store.put_file, digest_of(data), spool)
    assert not run(store.has, digest_of(data))


def test_put_file_and_put_files(store, tmp_path):
    blocks = [sealed(index=i) for i in range(5)]
    files = []
    for i, block in enumerate(blocks):
        path = tmp_path / f"spool{i}"
        path.write_bytes(block.data)
        files.append((block.digest, path))
    run(store.put_file, *files[0])
    run(store.put_files, files)  # the first is there already
    run(store.sync)
    for block, (_, path) in zip(blocks, files, strict=True):
        assert bytes(run(store.get, block.digest).data) == bytes(block.data)
        path.unlink()  # the store's copy is its own
        assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def test_put_file_of_a_missing_file(store, tmp_path):
    fails("block_unavailable", store.put_file, digest_of(b"x"), tmp_path / "nothing")
    assert not run(store.has, digest_of(b"x"))


def test_put_files_stops_at_the_first_failure_and_keeps_the_rest(store, tmp_path):
    first, second = sealed(), sealed(index=1)
    path = tmp_path / "spool"
    path.write_bytes(first.data)
    fails("block_unavailable", store.put_files, [(first.digest, path), (second.digest, tmp_path / "gone")])
    assert run(store.has_many, [first.digest, second.digest]) == {first.digest}


def test_counters(store, tmp_path):
    block, other = sealed(5000), sealed(70_000)
    path = tmp_path / "spool"
    path.write_bytes(other.data)
    run(store.put, block)
    run(store.put_file, other.digest, path)
    run(store.get, block.digest)
    fails("block_unavailable", store.get, digest_of(b"nothing"))
    counters = store.counters
    assert (counters.puts, counters.bytes_out) == (2, len(block.data) + len(other.data))
    assert (counters.gets, counters.bytes_in) == (2, len(block.data))


def test_many_readers_and_writers_at_once(store):
    blocks = [sealed(20_000, i) for i in range(40)]

    async def both(block):
        await store.put(block)
        got = await store.get(block.digest)
        assert bytes(got.data) == bytes(block.data)

    async def main():
        async with trio.open_nursery() as nursery:
            for block in blocks:
                nursery.start_soon(both, block)
        await store.sync()

    run(main)
    assert store.counters.gets == store.counters.puts == 40


def test_reading_many_and_storing_many_at_once(store, tmp_path):
    blocks = [sealed(3000, i) for i in range(70)]
    files = []
    for i, block in enumerate(blocks):
        (tmp_path / f"spool{i}").write_bytes(block.data)
        files.append((block.digest, tmp_path / f"spool{i}"))
    run(store.put_files, files)
    run(store.sync)
    found = run(store.get_many, [block.digest for block in blocks])
    assert {digest: bytes(block.data) for digest, block in found.items()} == {
        block.digest: bytes(block.data) for block in blocks
    }


def test_trying_it_out_leaves_nothing_behind(store):
    block = sealed()
    run(store.put, block)
    capabilities = run(store.probe)
    assert isinstance(capabilities, Capabilities)
    if capabilities.listing:
        assert run(listed, store) == [block.digest]
    assert run(store.has, block.digest)


def test_it_says_where_blocks_come_from(store):
    block = sealed()
    run(store.put, block)
    run(store.get, block.digest)
    sources = store.sources()
    assert sum(source.served for source in sources) == 1
    assert all(source.name and not source.barred for source in sources)


def test_closing_twice_is_harmless(store):
    run(store.aclose)
    run(store.aclose)


def test_a_listing_of_any_store_goes_on_from_anywhere(store):
    if not isinstance(store, Listable):
        pytest.skip("this store cannot be listed")
    blocks = [sealed(10, i) for i in range(20)]
    for block in blocks:
        run(store.put, block)
    every = run(listed, store)
    assert set(every) == {block.digest for block in blocks}
    assert run(store.count) == 20
    assert run(listed, store, every[7]) == every[8:]


def test_usage(store):
    usage = store.usage()
    assert usage.total_bytes >= usage.free_bytes >= 0
    assert usage.free_inodes >= 0


# -- the local store: a listing ----------------------------------------------------------------------


async def listed(store, after=b"", foreign=lambda _: None):
    return [digest async for digest in store.digests(after, foreign)]


def test_a_listing_is_complete_in_order_and_goes_on_from_anywhere(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    assert run(listed, store) == []
    blocks = [sealed(index=i) for i in range(50)]
    for block in blocks:
        run(store.put, block)
    every = run(listed, store)
    assert set(every) == {block.digest for block in blocks}
    assert every == sorted(every, key=store.place)
    assert run(store.count) == 50
    for i, digest in enumerate(every):
        assert run(listed, store, digest) == every[i + 1 :]
    run(store.delete, every[10])
    assert run(listed, store, every[10]) == every[11:]  # from where something was


def test_a_listing_names_what_is_no_block_and_leaves_it(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    run(store.put, block)
    place = store.place(block.digest)
    wrong = "aa" if place[:2] != "aa" else "bb"
    strangers = [f"{place[:2]}/notes.txt", f"{wrong}/{place[3:]}", "README"]
    for path in strangers:
        (store.directory / path).parent.mkdir(exist_ok=True)
        (store.directory / path).write_bytes(b"x")
    found = []
    assert run(listed, store, b"", found.append) == [block.digest]
    assert sorted(found) == sorted(strangers)
    assert all((store.directory / path).read_bytes() == b"x" for path in strangers)


def test_a_store_that_is_away_has_no_listing(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    (store.directory / "meshkitfs-store").unlink()
    fails("provider_request_failed", listed, store)
    (tmp_path / "blocks").rename(tmp_path / "elsewhere")
    fails("provider_request_failed", listed, store)


# -- the local store: damage ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["flip", "truncate", "extend", "empty", "huge", "symlink", "fifo", "directory"]
)
def test_damaged_files_are_refused_and_repaired_by_storing_again(tmp_path, how):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed(100_000)
    run(store.put, block)
    path = path_of(store, block.digest)
    data = bytearray(block.data)
    if how == "flip":
        data[500] ^= 1
    elif how == "truncate":
        data = data[:-1]
    elif how == "extend":
        data += b"\0"
    elif how == "empty":
        data = b""
    elif how == "huge":
        data += bytes(3 * MAX_SEALED)
    if how in ("symlink", "fifo", "directory"):
        os.unlink(path)
    if how == "symlink":
        (tmp_path / "elsewhere").write_bytes(block.data)
        os.symlink(tmp_path / "elsewhere", path)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "directory":
        os.mkdir(path)
    else:
        with open(path, "wb") as f:
            f.write(data)
    error = fails("cid_mismatch", store.get, block.digest)
    assert error.reason.errno == errno.EIO
    if how != "directory":
        run(store.put, block)
        assert bytes(run(store.get, block.digest).data) == bytes(block.data)
        assert not os.path.islink(path)


def test_put_file_repairs_a_damaged_copy(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)
    run(store.put, block)
    with open(path_of(store, block.digest), "r+b") as f:
        f.write(b"\xff\xff\xff")
    run(store.put_file, block.digest, spool)
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def test_an_empty_file_is_not_had(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    run(store.put, block)
    os.truncate(path_of(store, block.digest), 0)
    assert not run(store.has, block.digest)


# -- the local store: the store itself is away ------------------------------------------------------


def test_a_store_that_is_away_is_unknown_not_missing(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    run(store.put, block)
    os.rename(tmp_path / "blocks", tmp_path / "moved")
    os.mkdir(tmp_path / "blocks")  # as the mount point of an unmounted disk would look
    fails("provider_request_failed", store.get, block.digest)
    fails("provider_request_failed", store.has, block.digest)
    fails("provider_request_failed", store.delete, block.digest)
    fails("provider_request_failed", store.put, sealed())
    assert os.listdir(tmp_path / "blocks") == []


def test_open_needs_a_store(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MeshkitError) as excinfo:
            LocalStore.open(place)
        assert code_of(excinfo) == "provider_request_failed"
    assert not (tmp_path / "nothing").exists()


def test_create_is_repeatable_and_leaves_strangers_alone(tmp_path):
    LocalStore.open(tmp_path / "a", create=True)
    LocalStore.open(tmp_path / "a", create=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "diary.txt").write_text("mine")
    with pytest.raises(MeshkitError) as excinfo:
        LocalStore.open(tmp_path / "b", create=True)
    assert code_of(excinfo) == "provider_request_failed"
    assert os.listdir(tmp_path / "b") == ["diary.txt"]


def test_a_store_of_another_version_is_refused(tmp_path):
    LocalStore.open(tmp_path / "a", create=True)
    (tmp_path / "a" / _layout.MARKER).write_text("meshkitfs block store 2\n")
    with pytest.raises(MeshkitError) as excinfo:
        LocalStore.open(tmp_path / "a")
    assert code_of(excinfo) == "provider_request_failed"


# -- the local store: files -------------------------------------------------------------------------


def test_put_file_is_a_hard_link(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)
    run(store.put_file, block.digest, spool)
    assert os.path.samefile(spool, path_of(store, block.digest))


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_put_file_copies_where_a_link_is_impossible(tmp_path, monkeypatch, code):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    run(store.put_file, block.digest, spool)
    assert not os.path.samefile(spool, path_of(store, block.digest))
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def test_put_file_across_real_filesystems(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second filesystem at /dev/shm")
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    spool = f"/dev/shm/meshkitfs-test-{os.getpid()}"
    try:
        with open(spool, "wb") as f:
            f.write(block.data)
        run(store.put_file, block.digest, spool)
    finally:
        os.unlink(spool)
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)


def modes(directory) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {"files": set(), "directories": set(), "groups": set()}
    for place, directories, files in os.walk(directory):
        for name in files:
            status = os.lstat(os.path.join(place, name))
            found["files"].add(stat.S_IMODE(status.st_mode))
            found["groups"].add(status.st_gid)
        for name in directories:
            status = os.lstat(os.path.join(place, name))
            found["directories"].add(stat.S_IMODE(status.st_mode))
            found["groups"].add(status.st_gid)
    return found


def fill(store: LocalStore, tmp_path) -> None:
    run(store.put, sealed())
    block = sealed(index=1)
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)
    spool.chmod(0o600)
    run(store.put_file, block.digest, spool)


def test_a_store_is_private_by_default(tmp_path):
    os.chmod(tmp_path, 0o755)
    store = LocalStore.open(tmp_path / "blocks", create=True)
    fill(store, tmp_path)
    assert stat.S_IMODE(os.stat(store.directory).st_mode) == 0o700
    assert modes(store.directory)["files"] == {0o600}
    assert modes(store.directory)["directories"] == {0o700}


def test_a_store_in_a_group_directory_is_the_groups(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    if os.geteuid() == 0:
        os.chown(shared, -1, 12345)
    os.chmod(shared, 0o2770)
    old = os.umask(0o077)
    try:
        store = LocalStore.open(shared / "blocks", create=True)
        fill(store, tmp_path)
    finally:
        os.umask(old)
    found = modes(store.directory)
    assert found["files"] == {0o660}
    assert found["directories"] == {0o2770}
    assert found["groups"] == {os.stat(shared).st_gid}
    assert stat.S_IMODE(os.stat(store.directory).st_mode) == 0o2770


AS_USER = """
import os, sys, trio
from meshkitfs.core.blocks import SealedBlock
from meshkitfs.core.cid import digest_of
from meshkitfs.providers import LocalStore
uid, gid, place, digest = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], bytes.fromhex(sys.argv[4])
os.setgroups([]); os.setgid(gid); os.setuid(uid); os.umask(0o077)
store = LocalStore.open(place)
print(trio.run(store.get, digest).digest.hex())
data = os.urandom(900)
trio.run(store.put, SealedBlock(digest_of(data), data))
print(digest_of(data).hex())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become two other users")
def test_two_users_of_one_group_read_each_others_blocks():
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are closed to other users
        os.chown(place, -1, 12345)
        os.chmod(place, 0o2770)
        store = LocalStore.open(f"{place}/blocks", create=True)
        block = sealed()
        run(store.put, block)
        digest = block.digest.hex()
        for uid in ("12346", "12347"):  # the second one reads what the first one wrote
            arguments = [sys.executable, "-c", AS_USER, uid, "12345", f"{place}/blocks", digest]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            read, digest_written = done.stdout.split()
            assert read == digest
            digest = digest_written
        assert run(store.has, bytes.fromhex(digest))


def test_left_over_temporary_files_are_swept_when_old(tmp_path):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    old, young = (store.directory / _layout.TEMPORARY / name for name in ("old", "young"))
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    LocalStore.open(store.directory)
    assert not old.exists()
    assert young.exists()


def test_failed_put_leaves_nothing(tmp_path, monkeypatch):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    error = fails("no_space", store.put, block)
    assert error.reason.errno == errno.ENOSPC
    assert os.listdir(store.directory / _layout.TEMPORARY) == []
    assert not run(store.has, block.digest)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small filesystem")
def test_a_really_full_filesystem(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        store = LocalStore.open(small / "blocks", create=True)
        blocks = [sealed(100_000, i) for i in range(20)]
        stored = []

        async def fill_up():
            for block in blocks:
                await store.put(block)
                stored.append(block)

        fails("no_space", fill_up)
        assert stored
        assert os.listdir(store.directory / _layout.TEMPORARY) == []
        for block in stored:
            assert bytes(run(store.get, block.digest).data) == bytes(block.data)
        assert store.usage().total_bytes == 1 << 20
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


# -- the local store: durability --------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """Records what is made durable; the real calls run too."""
    calls: list[str] = []
    real_path, real_all = _durable.fsync_path, _durable.sync_filesystem

    def one(path):
        calls.append(path)
        real_path(path)

    def everything(directory):
        calls.append("*")
        real_all(directory)

    monkeypatch.setattr(_durable, "fsync_path", one)
    monkeypatch.setattr(_durable, "sync_filesystem", everything)
    return calls


def test_the_first_sync_covers_what_a_killed_process_left(tmp_path, synced):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    synced.clear()
    run(store.sync)
    assert synced == ["*"]
    synced.clear()
    run(store.sync)
    assert synced == []


def test_sync_covers_files_names_and_new_directories(tmp_path, synced):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    run(store.sync)
    synced.clear()
    block, linked = sealed(), sealed(index=1)
    spool = tmp_path / "spool"
    spool.write_bytes(linked.data)
    run(store.put, block)
    run(store.put_file, linked.digest, spool)
    run(store.sync)
    place, other = path_of(store, block.digest), path_of(store, linked.digest)
    # a linked file was made durable by whoever spooled it; its name was not
    assert set(synced) == {place, os.path.dirname(place), os.path.dirname(other), str(store.directory)}


def test_many_new_blocks_are_synced_at_once(tmp_path, synced):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    run(store.sync)
    for i in range(10):
        run(store.put, sealed(index=i))
    synced.clear()
    run(store.sync)
    assert synced == ["*"]


def test_a_block_found_in_place_is_made_durable_too(tmp_path, synced):
    first = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    run(first.put, block)
    second = LocalStore.open(tmp_path / "blocks")
    run(second.sync)
    synced.clear()
    run(second.put, block)
    run(second.sync)
    assert path_of(second, block.digest) in synced
    assert os.path.dirname(path_of(second, block.digest)) in synced


@contextlib.contextmanager
def failing_disk(monkeypatch):
    """Every write-back fails, and the kernel says so once."""

    def broken(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        yield


def test_a_failed_sync_is_reported_and_the_next_one_writes_anew(tmp_path, monkeypatch, synced):
    """Also for somebody else, who stored a block before that and only sees the next sync."""
    store = LocalStore.open(tmp_path / "blocks", create=True)
    run(store.sync)
    block, linked = sealed(), sealed(index=1)
    spool = tmp_path / "spool"
    spool.write_bytes(linked.data)
    run(store.put, block)
    run(store.put_file, linked.digest, spool)
    with failing_disk(monkeypatch):
        fails("provider_request_failed", store.sync)
        fails("provider_request_failed", store.sync)
    path = path_of(store, block.digest)
    before = os.stat(path).st_ino
    synced.clear()
    run(store.sync)
    # To the kernel its pages are clean, so the same file would not be written any more.
    assert os.stat(path).st_ino != before
    assert path in synced
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)
    synced.clear()
    run(store.sync)
    assert path not in synced, "it is written again and again"


def test_a_block_that_a_failed_sync_has_lost_is_not_durable_before_it_is_stored_again(tmp_path, monkeypatch):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    run(store.sync)
    lost, deleted = sealed(), sealed(index=1)
    run(store.put, lost)
    run(store.put, deleted)
    with failing_disk(monkeypatch):
        fails("provider_request_failed", store.sync)
    for block in (lost, deleted):
        with open(path_of(store, block.digest), "r+b") as file:
            file.write(bytes(10))  # what the kernel dropped is read back from a disk that never got it
    run(store.delete, deleted.digest)
    fails("provider_request_failed", store.sync)
    fails("provider_request_failed", store.sync)
    run(store.put, lost)
    run(store.sync)
    assert bytes(run(store.get, lost.digest).data) == bytes(lost.data)
    assert not run(store.has, deleted.digest)


def test_a_second_sync_waits_for_the_first(tmp_path, monkeypatch):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    run(store.sync)
    run(store.put, sealed())
    entered, go_on, order = threading.Event(), threading.Event(), []
    real = _durable.sync_paths

    def slow(paths):
        if paths:
            entered.set()
            assert go_on.wait(30)
            real(paths)
            order.append("durable")

    monkeypatch.setattr(_durable, "sync_paths", slow)

    async def second():
        await trio.to_thread.run_sync(entered.wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            await trio.testing.wait_all_tasks_blocked(0.05)
            go_on.set()

    async def late():
        await store.sync()
        order.append("returned")

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.sync)
            nursery.start_soon(second)

    run(main)
    assert order[0] == "durable"


def test_syncfs_is_really_called():
    # the errno of a directory that is not there proves that the call reaches the kernel interface
    with pytest.raises(FileNotFoundError):
        _durable.sync_filesystem("/nonexistent/place")
    _durable.sync_filesystem("/")


def test_a_failing_syncfs_is_an_error(tmp_path, monkeypatch):
    real = os.open
    # syncfs(2) refuses a descriptor that was opened for its path only
    monkeypatch.setattr(os, "open", lambda path, flags: real(path, flags | os.O_PATH))
    with pytest.raises(OSError) as excinfo:
        _durable.sync_filesystem(str(tmp_path))
    assert excinfo.value.errno == errno.EBADF


# -- the local store: speed, as counts --------------------------------------------------------------


def test_each_call_is_one_trip_to_a_thread(tmp_path, monkeypatch):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    trips = 0
    real = trio.to_thread.run_sync

    async def counted(*args, **kwargs):
        nonlocal trips
        trips += 1
        return await real(*args, **kwargs)

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    blocks = [sealed(index=i) for i in range(6)]
    files = []
    for i, block in enumerate(blocks):
        (tmp_path / f"s{i}").write_bytes(block.data)
        files.append((block.digest, tmp_path / f"s{i}"))
    for function, args in (
        (store.put_files, (files,)),
        (store.get, (blocks[0].digest,)),
        (store.get_many, ([b.digest for b in blocks],)),
        (store.has_many, ([b.digest for b in blocks],)),
        (store.put, (blocks[0],)),
        (store.sync, ()),
        (store.delete, (blocks[0].digest,)),
    ):
        trips = 0
        run(function, *args)
        assert trips == 1, function.__name__


def test_an_interrupted_reader_stops_at_once(tmp_path, monkeypatch):
    store = LocalStore.open(tmp_path / "blocks", create=True)
    block = sealed()
    run(store.put, block)
    stuck, release = threading.Event(), threading.Event()
    real = LocalStore._read

    def hanging(self, digest):
        stuck.set()
        release.wait(30)
        return real(self, digest)

    monkeypatch.setattr(LocalStore, "_read", hanging)

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.get, block.digest)
            await trio.to_thread.run_sync(stuck.wait)
            nursery.cancel_scope.cancel()

    run(main)  # would not come back before the read does
    assert not release.is_set()
    release.set()


# -- naming a store ---------------------------------------------------------------------------------


def test_parse_provider(tmp_path):
    spec = parse_provider(f"local:{tmp_path}/blocks")
    assert spec == ProviderSpec.local(tmp_path / "blocks")
    assert parse_provider(f"local-dev:{tmp_path}/blocks") == spec
    assert parse_provider("local:blocks", tmp_path) == spec
    assert parse_provider("local:a:b", tmp_path).directories() == [tmp_path / "a:b"]
    assert ProviderSpec.from_config(spec.to_config(), Path("/")) == spec
    assert ProviderSpec.from_config({"type": "local-dev", "store": "blocks"}, tmp_path) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blocks",
        "local:",
        "s3:bucket",
        "s3:https://host",
        "s3:ftp://host/bucket",
        "locl:x",
        ":x",
        "local:a\0b",
    ],
)
def test_parse_provider_refuses(text):
    with pytest.raises(MeshkitError) as excinfo:
        parse_provider(text)
    assert code_of(excinfo) == "invalid_argument"


def test_config_hints():
    with pytest.raises(MeshkitError, match="did you mean 'local'"):
        parse_provider("locl:x")
    with pytest.raises(MeshkitError, match=r"'provider\.stor' is not a known field.*'store'"):
        ProviderSpec.from_config({"type": "local-dev", "stor": "x"}, Path("/"))
    for fields in ([], {}, {"type": 3}, {"type": "local"}, {"type": "local-dev", "store": ""}):
        with pytest.raises(MeshkitError) as excinfo:
            ProviderSpec.from_config(fields, Path("/"))
        assert code_of(excinfo) == "invalid_config"


def test_open_provider(tmp_path):
    spec = parse_provider(f"local:{tmp_path}/blocks")
    fails("provider_request_failed", open_provider, spec)
    store = run(partial(open_provider, spec, create=True))
    block = sealed()
    run(store.put, block)
    assert run(run(open_provider, spec).has, block.digest)
