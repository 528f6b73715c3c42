"""What waits to be published: slow, failing and absent stores, answers that are lost, queues that are full.

The store and the metadata home are the real ones; a `Gate` in front of a method holds its calls up, fails
them, or lets them happen and loses the answer.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import stat

import pytest
import trio
from devices import Device, Refused, World, pattern, scratch

from meshkitfs.core.blocks import REFS_PER_INDEX
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import _outbox
from meshkitfs.shares._pace import IDLE_DELAY_S
from meshkitfs.state import _spool

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def alice(world, place):
    device = Device(world, f"{place}/alice", "alice").start()
    device.create_share()
    yield device
    if device.session is not None:
        device.close()


def content(size, mark=b"0"):
    return pattern(int(mark), size)


class Gate:
    """In front of one async method of one object: open at first."""

    def __init__(self, device, owner, method):
        self.device = device
        self.calls = 0
        self._real = real = getattr(owner, method)
        self._wait = None
        self.fail = lambda *args: None  # returns the code a call fails with, or None
        self.lose = False  # the deed is done and the answer lost

        @functools.wraps(real)
        async def through(*args):
            self.calls += 1
            if self._wait is not None:
                await self._wait.wait()
            code = self.fail(*args)
            if code is not None:
                raise MeshkitError(code, "on purpose")
            result = await real(*args)
            if self.lose:
                self.lose = False
                raise MeshkitError("metadata_unavailable", "the answer is lost")
            return result

        setattr(owner, method, through)

    def shut(self):
        async def make():
            self._wait = trio.Event()

        self.device.world.run(make)

    def open(self):
        async def let():
            self._wait.set()
            self._wait = None

        self.device.world.run(let)


def puts(device):
    return Gate(device, device.session.store, "put_files")


def publications(device):
    return Gate(device, device.session.metadata, "publish")


def until(device, condition):
    """Let the loop run until something is so; threads do their part in real time."""

    async def wait():
        with trio.fail_after(60):
            while not condition():
                await trio.to_thread.run_sync(lambda: None)

    device.world.run(wait)


def spooled(device):
    return [path for path in device.home.cache_dir.rglob("*") if path.is_file()]


def journal(device):
    device.world.run(device.share().journal)


# -- while an upload takes its time --------------------------------------------------------------------------


def test_local_commits_go_on_during_an_upload(alice):
    """What is journaled meanwhile survives a crash, and is published after what was on its way."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    gate.shut()
    view.write("first", content(100 * KIB, b"1"))
    alice.world.start(share.flush)
    until(alice, lambda: gate.calls)
    view.write("second", b"second")
    commits = share.counters.commits
    journal(alice)
    assert share.counters.commits == commits + 1
    assert share.counters.heads == 0
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"first": content(100 * KIB, b"1"), "second": b"second"}
    assert alice.share().dirty
    alice.flush()
    assert not alice.share().dirty
    assert not alice.share().conflicts
    assert spooled(alice) == []


def test_a_change_is_durable_soon_although_the_upload_is_slow(alice):
    """Nobody calls fsync, and the store does not answer: at the latest after `IDLE_DELAY_S` it is journaled."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    gate.shut()
    view.write("first", b"first")
    alice.world.start(share.flush)
    until(alice, lambda: gate.calls)
    view.write("second", b"second")
    commits = share.counters.commits
    alice.world.pass_time(IDLE_DELAY_S + 1)
    until(alice, lambda: share.counters.commits > commits)
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"first": b"first", "second": b"second"}


def test_what_is_written_and_not_closed_is_durable_soon_although_the_upload_is_slow(alice):
    """A log that nobody closes: nothing but the write itself says that there is something to journal."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    log = view.create("log")
    alice.flush()
    calls = gate.calls
    gate.shut()
    view.write("first", b"first")
    alice.world.start(share.flush)
    until(alice, lambda: gate.calls > calls)
    alice.world.pass_time(IDLE_DELAY_S + 1)  # what watches over the upload has seen that there is nothing
    commits = share.counters.commits
    view.pwrite(log, 0, b"line")
    alice.world.pass_time(IDLE_DELAY_S + 1)
    until(alice, lambda: share.counters.commits > commits)
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"first": b"first", "log": b"line"}


def test_a_disk_that_was_full_during_an_upload_ends_nothing(alice):
    """Journaling fails once while a slow upload goes on; nothing more is written, and it is tried again."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    gate.shut()
    view.write("first", b"first")
    alice.world.start(share.flush)
    until(alice, lambda: gate.calls)
    spool, failed = alice.session.services.spool, []
    sync = spool.sync

    def full():
        failed.append(1)
        raise MeshkitError("no_space", "on purpose")

    spool.sync = full
    view.write("second", b"second")
    alice.world.pass_time(IDLE_DELAY_S + 1)
    until(alice, lambda: failed)
    spool.sync = sync
    commits = share.counters.commits
    for _ in range(3):
        alice.world.pass_time(IDLE_DELAY_S + 1)
    until(alice, lambda: share.counters.commits > commits)
    assert share.counters.heads == 0
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"first": b"first", "second": b"second"}


def test_an_upload_ends_with_what_it_began_and_the_rest_follows(alice):
    """Two heads, in order; nothing is merged with itself."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    gate.shut()
    view.write("file", content(300 * KIB, b"1"))
    flush = alice.world.start(share.flush)
    until(alice, lambda: gate.calls)
    view.write("file", content(300 * KIB, b"2"))
    journal(alice)
    gate.open()
    flush.wait()
    assert share.counters.heads == 1
    assert share.dirty
    assert view.read("file") == content(300 * KIB, b"2")
    alice.flush()
    assert share.counters.heads == 2
    assert share.counters.merges == 0
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"file": content(300 * KIB, b"2")}
    assert spooled(alice) == []


@pytest.mark.parametrize("crash", [False, True], ids=["goes on", "dies"])
@pytest.mark.parametrize("newer", [False, True], ids=["alone", "with a newer commit"])
def test_an_answer_that_was_lost(alice, crash, newer):
    """The head is public, and this device does not know: it must find out before it merges or publishes."""
    gate, view, share = publications(alice), alice.view(), alice.share()
    view.write("file", b"one")
    gate.lose = True
    gate.shut()
    flush = alice.world.start(share.flush)
    until(alice, lambda: gate.calls)
    if newer:
        view.write("file", b"two")
        journal(alice)
    gate.open()
    with pytest.raises(MeshkitError) as caught:
        flush.wait()
    assert caught.value.code == "metadata_unavailable"
    if crash:
        alice.crash()
        alice.start()
    view = alice.view()
    assert view.contents() == {"file": b"two" if newer else b"one"}
    alice.flush()
    view.write("after", b"after")
    alice.flush()
    assert view.contents() == {"file": b"two" if newer else b"one", "after": b"after"}
    assert alice.share().conflicts == []
    assert alice.share().counters.merges == 0


def test_a_publication_that_arrives_late(alice):
    """A request is given up, the next commit is tried, and then the first one takes effect after all."""
    metadata, view = alice.session.metadata, alice.view()
    real, kept = metadata.publish, []

    async def slow(publication):
        kept.append(publication)
        raise MeshkitError("metadata_unavailable", "no answer in time")

    metadata.publish = slow
    for text in (b"one", b"two"):
        view.write("file", text)
        with pytest.raises(MeshkitError):
            alice.flush()

    async def late(publication):
        metadata.publish = real
        await real(kept[0])
        await real(publication)

    metadata.publish = late
    view.write("file", b"three")
    alice.flush()
    assert view.contents() == {"file": b"three"}
    assert alice.share().conflicts == []


def test_the_share_moves_on_while_an_upload_is_under_way(world, place, alice):
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    gate = puts(alice)
    gate.shut()
    alice.view().write("from alice", b"a")
    flush = world.start(alice.share().flush)
    until(alice, lambda: gate.calls)
    bob.view().write("from bob", b"b")
    bob.flush()
    alice.refresh()  # merges: what is on its way can not be published any more
    assert alice.view().read("from bob") == b"b"
    gate.open()
    flush.wait()
    bob.refresh()
    for device in (alice, bob):
        assert device.view().contents() == {"from alice": b"a", "from bob": b"b"}
    bob.close()


def test_a_revocation_ends_beside_a_writer_that_never_rests(world, place, alice):
    """Each upload takes so long that something is journaled meanwhile: the revocation does not wait for quiet."""
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    share, store = alice.share(), alice.session.store
    put_files, wrote = store.put_files, []

    async def slow(files):
        # With the cycle taken, the writer's journaling has to wait.
        if not share._cycle.locked() and len(wrote) < 30:
            name = b"file%d" % len(wrote)
            wrote.append(name)
            await share.use("write")
            async with share.changing() as tree:
                node = tree.new_file(0o644)
                tree.create(tree.root, name, node)
            await share.journal()
        await put_files(files)

    store.put_files = slow
    alice.view().write("file", b"content")
    world.run(alice.session.book.revoke, share, "bob")
    assert 1 <= len(wrote) < 5
    store.put_files = put_files
    alice.flush()
    assert set(alice.view().contents()) == {"file", *map(bytes.decode, wrote)}
    with pytest.raises(Refused):
        bob.view().listdir()
    bob.close()


@pytest.mark.parametrize("newer", [False, True], ids=["alone", "with a newer commit"])
def test_the_answer_to_a_revocation_that_was_lost(world, place, alice, newer):
    """It took a change along. That is no change of somebody else's, to be merged with what is here."""
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    view, share, metadata = alice.view(), alice.share(), alice.session.metadata
    view.write("file", b"one")
    alice.flush()
    publish, reseal = metadata.publish, share._reseal

    async def takes_a_change_along(*args):
        grant = share.grant
        async with share.changing() as tree:
            node = tree.node_of(tree.root, b"file")
            await (await tree.content(grant, node)).write(grant, 0, b"two")
            tree.touch(node, content=True)
        await reseal(*args)

    async def lost(publication):
        await publish(publication)
        if publication.roster and publication.head:
            metadata.publish = publish
            raise MeshkitError("metadata_unavailable", "the answer is lost")

    share._reseal, metadata.publish = takes_a_change_along, lost
    with pytest.raises(MeshkitError):
        world.run(alice.session.book.revoke, share, "bob")
    assert metadata.publish == publish, "nothing was lost: this proves nothing"
    if newer:
        view.write("newer", b"newer")
        journal(alice)
    alice.flush()
    wanted = {"file": b"two"} | ({"newer": b"newer"} if newer else {})
    assert view.contents() == wanted
    assert share.conflicts == []
    assert share.counters.merges == 0
    alice.crash()
    alice.start()
    assert alice.view().contents() == wanted
    bob.close()


# -- what need not be uploaded -------------------------------------------------------------------------------


def test_what_newer_commits_replaced_is_not_uploaded(alice):
    """Twenty versions of a file are journaled while the provider is away: one of them goes out."""
    gate, view, share = puts(alice), alice.view(), alice.share()
    gate.fail = lambda *args: "provider_request_failed"
    view.mkdir("directory")
    view.write("directory/large", content(600 * KIB))
    for i in range(20):
        view.write("file", content(100 * KIB, b"%d" % i))
        view.write("directory/small", b"%d" % i)
        journal(alice)
    assert len(spooled(alice)) > 60
    gate.fail = lambda *args: None
    before = alice.session.store.counters.puts
    alice.flush()
    # The root, the directory, a file of three blocks, one of one, and a small one.
    assert alice.session.store.counters.puts - before == 2 + (1 + 3) + (1 + 1) + 1
    assert spooled(alice) == []
    alice.crash()
    alice.start()
    contents = alice.view().contents()
    assert contents["file"] == content(100 * KIB, b"19")
    assert contents["directory/small"] == b"19"
    assert contents["directory/large"] == content(600 * KIB)
    assert share.counters.merges == 0


def test_a_provider_that_is_away_for_long_does_not_fill_the_spool(alice, monkeypatch):
    monkeypatch.setattr(_outbox, "DROP_STEP", MIB)
    gate, view = puts(alice), alice.view()
    gate.fail = lambda *args: "provider_request_failed"
    sizes = []
    for i in range(30):
        view.write("file", content(700 * KIB, b"%d" % i))
        with pytest.raises(MeshkitError):
            alice.flush()
        sizes.append(alice.session.services.spool.used)
    assert max(sizes) < 6 * MIB
    assert sum(path.stat().st_size for path in spooled(alice)) == sizes[-1]
    alice.crash()
    alice.start()
    alice.flush()
    assert alice.view().contents() == {"file": content(700 * KIB, b"29")}


def test_a_block_that_cannot_be_read_back_keeps_nothing_from_being_published(alice, monkeypatch):
    """Looking for what is superseded only spares the provider something."""
    gate, view = puts(alice), alice.view()
    for i in range(3):
        view.write("file", content(100 * KIB, b"%d" % i))
        journal(alice)
    tried = []

    def bad_sector(path, *args, **named):
        tried.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(_spool, "open", bad_sector, raising=False)
        alice.flush()
    assert tried
    assert gate.calls
    assert not alice.share().dirty


def test_an_open_file_without_a_name_keeps_its_blocks(alice):
    """It was committed, then removed: no version needs its blocks, and still they can be read."""
    gate, view = puts(alice), alice.view()
    gate.fail = lambda *args: "provider_request_failed"
    view.write("file", content(500 * KIB))
    fh = view.open("file")
    journal(alice)
    view.unlink("file")
    for i in range(3):
        view.write("other", b"%d" % i)
        with pytest.raises(MeshkitError):
            alice.flush()
    alice.session.services.reader.forget()
    assert view.pread(fh, 0, MIB) == content(500 * KIB)
    gate.fail = lambda *args: None
    view.release(fh)
    alice.flush()
    assert alice.view().contents() == {"other": b"2"}


def test_a_large_open_file_without_a_name_keeps_the_blocks_that_were_not_looked_at(alice):
    """Its references are read in segments of 4096, when they are needed; until then only its manifest names them."""
    gate, view = puts(alice), alice.view()
    gate.fail = lambda *args: "provider_request_failed"
    far = (REFS_PER_INDEX + 1) * 256 * KIB
    fh = view.create("large")
    view.pwrite(fh, 0, b"near")
    view.pwrite(fh, far, content(64 * KIB))
    view.release(fh)
    journal(alice)
    view.forget_all()
    fh = view.open("large")
    table = alice.fs._handles[fh].node.content.table
    assert table.index
    assert not table.segments, "the references are in memory: this proves nothing"
    view.unlink("large")
    for i in range(3):
        view.write("other", b"%d" % i)
        with pytest.raises(MeshkitError):
            alice.flush()
    alice.session.services.reader.forget()
    assert view.pread(fh, far, 64 * KIB) == content(64 * KIB)
    gate.fail = lambda *args: None
    view.release(fh)
    alice.flush()
    assert alice.view().contents() == {"other": b"2"}


def test_temporary_files_without_a_name_are_not_uploaded(alice):
    view, store = alice.view(), alice.session.store
    fh = view.create("temporary")
    view.unlink("temporary")
    view.pwrite(fh, 0, content(2 * MIB))
    view.write("file", b"small")
    before = store.counters.puts
    alice.flush()
    assert store.counters.puts - before == 2  # the file and the root
    assert view.pread(fh, 0, 4 * MIB) == content(2 * MIB)
    view.release(fh)
    view.forget_all()
    until(alice, lambda: not spooled(alice))


def test_blocks_of_a_lost_race_are_taken_back_from_the_store(world, place, alice):
    """They were uploaded, and nothing that is public names them."""
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    gate = publications(alice)
    gate.shut()
    alice.view().write("from alice", b"a")
    flush = world.start(alice.share().flush)
    until(alice, lambda: gate.calls)
    bob.view().write("from bob", b"b")
    bob.flush()
    before = {path.name for path in alice.blocks.rglob("*") if path.is_file()}
    gate.open()
    flush.wait()
    after = {path.name for path in alice.blocks.rglob("*") if path.is_file()}
    assert len(before - after) == 1  # the root that lost
    bob.refresh()
    for device in (alice, bob):
        device.session.services.reader.forget()
        assert device.view().contents() == {"from alice": b"a", "from bob": b"b"}
    bob.close()


# -- queues that are full ------------------------------------------------------------------------------------


def test_a_copy_that_is_larger_than_the_spool(alice):
    """Back-pressure instead of growth: the spool stays near its limit and everything arrives."""
    services = alice.session.services
    services.budget.spool_limit = 4 * MIB
    view, share, most = alice.view(), alice.share(), 0
    data = content(256 * KIB)
    fh = view.create("large")
    for i in range(256):
        view.pwrite(fh, i * len(data), data)
        most = max(most, services.spool.used)
    view.release(fh)
    alice.flush()
    assert 3 * MIB < most <= 5 * MIB, f"the spool was never full, or grew: {most}"
    assert share.counters.heads < 64
    alice.crash()
    alice.start()
    fh = alice.view().open("large", os.O_RDONLY)
    for i in range(256):
        assert alice.view().pread(fh, i * len(data), len(data)) == data


def test_a_share_that_cannot_be_sent_is_no_full_disk_for_the_others(alice):
    """What waits there takes room, but a spool that empties all the time is no reason to refuse a write."""
    alice.create_share("other")
    other, gate = alice.share("other"), publications(alice)
    gate.fail = lambda publication: "metadata_unavailable" if publication.share == other.row.share else None
    alice.view("other").write("file", b"stays here")
    with pytest.raises(MeshkitError):
        alice.flush("other")
    assert other.stuck is not None
    alice.session.services.budget.spool_limit = 4 * MIB
    view, data = alice.view(), content(256 * KIB)
    fh = view.create("large")
    for i in range(128):
        view.pwrite(fh, i * len(data), data)
    view.release(fh)
    alice.flush()
    assert other.dirty
    fh = view.open("large", os.O_RDONLY)
    for i in range(128):
        assert view.pread(fh, i * len(data), len(data)) == data
    gate.fail = lambda publication: None
    alice.flush("other")


def test_a_full_spool_and_no_provider_is_a_full_disk(alice):
    """The writer is told; what was acknowledged stays; when the provider is back, writing goes on."""
    services, gate, view = alice.session.services, puts(alice), alice.view()
    services.budget.spool_limit = 2 * MIB
    gate.fail = lambda *args: "provider_request_failed"
    fh = view.create("large")
    written, data = 0, content(256 * KIB)
    with pytest.raises(OSError) as caught:
        for _ in range(100):
            view.pwrite(fh, written, data)
            written += len(data)
            journal(alice)
            if services.budget.spool_full:
                with pytest.raises(MeshkitError):
                    alice.flush()
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, Refused)
    assert 2 * MIB <= written < 4 * MIB
    assert view.pread(fh, 0, written) == data * (written // len(data))
    gate.fail = lambda *args: None
    alice.flush()
    view.pwrite(fh, written, data)
    view.release(fh)
    alice.flush()
    assert alice.view().read("large") == data * (written // len(data) + 1)


def test_a_writer_waits_for_room_and_is_let_go_when_there_is_some(alice):
    services, gate, view = alice.session.services, puts(alice), alice.view()
    services.budget.spool_limit = MIB
    gate.shut()
    fh = view.create("large")
    data = content(256 * KIB)
    for i in range(8):
        view.pwrite(fh, i * len(data), data)
        journal(alice)
        if services.budget.spool_full:
            break
    flush = alice.world.start(alice.share().flush)
    until(alice, lambda: gate.calls)
    write = alice.world.start(alice.fs.write, fh, (i + 1) * len(data), data)
    alice.world.pass_time(1)
    assert not write.done.is_set()
    gate.open()
    assert write.wait() == len(data)
    flush.wait()
    view.release(fh)


def test_a_file_without_a_name_that_is_larger_than_the_spool_is_a_full_disk(alice):
    """Nothing will ever publish it, so nobody waits for that; and closing it makes room again."""
    services, view = alice.session.services, alice.view()
    services.budget.spool_limit = 2 * MIB
    fh = view.create("temporary")
    view.unlink("temporary")
    written, data = 0, content(128 * KIB)
    with pytest.raises(Refused) as caught:
        for i in range(100):
            view.pwrite(fh, i * len(data), data)
            written += len(data)
    assert caught.value.errno == errno.ENOSPC
    assert 2 * MIB <= written < 4 * MIB
    assert view.pread(fh, 0, written) == data * (written // len(data))
    alice.flush()
    other = view.create("other")
    with pytest.raises(Refused):
        view.pwrite(other, 0, b"x")
    view.release(fh)
    view.forget_all()
    until(alice, lambda: not services.budget.spool_full)
    view.pwrite(other, 0, b"there is room")
    view.release(other)
    alice.flush()
    assert alice.view().contents() == {"other": b"there is room"}


def test_a_writer_is_let_go_when_a_file_without_a_name_is_closed(alice):
    services, gate, view = alice.session.services, puts(alice), alice.view()
    temporary = view.create("temporary")
    view.unlink("temporary")
    view.pwrite(temporary, 0, content(MIB))
    view.pwrite(temporary, MIB, content(MIB))
    until(alice, lambda: services.spool.used > MIB)
    fh = view.create("file")
    gate.shut()
    flush = alice.world.start(alice.share().flush)
    until(alice, lambda: gate.calls)
    services.budget.spool_limit = MIB
    write = alice.world.start(alice.fs.write, fh, 0, b"waits")
    alice.world.pass_time(1)
    assert not write.done.is_set()
    view.release(temporary)
    view.forget_all()
    assert write.wait() == len(b"waits")
    assert not flush.done.is_set()
    gate.open()
    flush.wait()


def test_a_share_that_is_stuck_does_not_make_a_disk_full_for_others(alice):
    """A large copy waits for room, as long as its own share goes on being published."""
    services, metadata = alice.session.services, alice.session.metadata
    second = alice.create_share("second").row.share
    publish = metadata.publish

    async def refuses_one(publication):
        if publication.share == second:
            raise MeshkitError("metadata_unavailable", "on purpose")
        await publish(publication)

    metadata.publish = refuses_one
    alice.view("second").write("file", b"stuck")
    with pytest.raises(MeshkitError):
        alice.flush("second")
    services.budget.spool_limit = 2 * MIB
    view, data, full = alice.view(), content(128 * KIB), 0
    fh = view.create("large")
    for i in range(100):
        full += services.budget.spool_full
        view.pwrite(fh, i * len(data), data)
    assert full, "the spool was never full: this proves nothing"
    assert alice.share("second").stuck is not None
    view.release(fh)
    metadata.publish = publish


# -- a provider that fails now and then ------------------------------------------------------------------------


def test_a_provider_that_loses_three_requests_of_ten(alice):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    dice, failed = random.Random(seed), [0]

    def fail(blocks):
        if any(dice.random() < 0.3 for _ in blocks if isinstance(blocks, list)) or dice.random() < 0.3:
            failed[0] += 1
            return "provider_request_failed"
        return None

    gates = [puts(alice), Gate(alice, alice.session.store, "get")]
    for gate in gates:
        gate.fail = fail
    view = alice.view()
    for i in range(40):
        view.write(f"file{i}", content(100 * KIB, b"%d" % i))
    for _ in range(20):
        try:
            alice.flush()
            break
        except MeshkitError as error:
            assert error.code == "provider_request_failed"
    else:
        raise AssertionError("nothing gets through")
    assert failed[0] > 10
    alice.session.services.reader.forget()
    view.forget_all()
    wrong = 0
    for i in range(40):
        try:
            assert view.read(f"file{i}") == content(100 * KIB, b"%d" % i)
        except OSError:
            wrong += 1  # six lost requests in a row
    assert wrong <= 2
    assert gates[1].calls > 40


def test_a_retry_does_not_offer_again_what_has_arrived(alice):
    view, gate = alice.view(), puts(alice)
    publish = publications(alice)
    publish.fail = lambda *args: "metadata_unavailable"
    view.write("file", content(3 * MIB))
    for _ in range(3):
        with pytest.raises(MeshkitError):
            alice.flush()
    first = gate.calls
    assert first == 1
    publish.fail = lambda *args: None
    alice.flush()
    assert gate.calls == first
    alice.session.services.reader.forget()
    assert view.read("file") == content(3 * MIB)


def test_a_store_that_lost_what_it_had_taken_is_given_it_again(alice):
    view, publish = alice.view(), publications(alice)
    publish.fail = lambda *args: "metadata_unavailable"
    view.write("file", content(3 * MIB))
    with pytest.raises(MeshkitError):
        alice.flush()
    victim = max((path for path in alice.blocks.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    os.unlink(victim)
    publish.fail = lambda *args: None
    alice.flush()
    assert stat.S_ISREG(os.stat(victim).st_mode)


# -- fsync = journal -----------------------------------------------------------------------------------------


def test_fsync_of_a_journal_needs_no_provider(alice):
    alice.session.services.fsync_publishes = False
    gate, view = puts(alice), alice.view()
    gate.fail = lambda *args: "provider_request_failed"
    fh = view.create("file")
    view.pwrite(fh, 0, content(300 * KIB))
    view.fsync(fh)
    assert not gate.calls
    assert alice.share().counters.heads == 0
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"file": content(300 * KIB)}
    alice.flush()
    assert alice.share().counters.heads == 1


def test_fsync_of_a_journal_fails_when_this_device_does(alice):
    alice.session.services.fsync_publishes = False
    view, spool = alice.view(), alice.session.services.spool

    def full():
        raise MeshkitError("no_space", "on purpose")

    fh = view.create("file")
    view.pwrite(fh, 0, b"content")
    real, spool.sync = spool.sync, full
    with pytest.raises(OSError) as caught:
        view.fsync(fh)
    assert caught.value.errno == errno.ENOSPC
    spool.sync = real
    view.fsync(fh)
    alice.crash()
    alice.start()
    assert alice.view().contents() == {"file": b"content"}
