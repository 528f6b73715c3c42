"""Revoking, rewriting under new keys, and what somebody who was shut out can still open.

What a version names is found out by the second reader, from the store's files: it does not go through the
gate, and knows nothing of how the product walks a tree.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import threading
from typing import Any, NamedTuple

import pytest
import second_reader
import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from devices import Device, World

from meshkitfs.core.blocks import HOLE
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import _reencrypt, _sealer
from meshkitfs.shares._reader import BlockReader

KIB = 1024


def noise(seed, size):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def world():
    with World() as running:
        yield running


@pytest.fixture
def alice(world, tmp_path):
    device = Device(world, tmp_path / "alice", "alice").start()
    device.create_share()
    yield device
    if device.session is not None:
        device.close()


@pytest.fixture
def bob(world, tmp_path, alice):
    device = Device(world, tmp_path / "bob", "bob", beside=alice).start()
    yield device
    if device.session is not None:
        device.close()


# -- the second reader's view --------------------------------------------------------------------------------


def stored(device):
    """Everything the byte store holds: digest -> bytes."""
    found = {}
    for path in device.blocks.rglob("bafkrei*"):
        data = path.read_bytes()
        found[hashlib.sha256(data).digest()] = data
    return found


def delete(device, digests):
    """What a collector does, or a provider: these blocks are not in the store any more."""
    for path in device.blocks.rglob("bafkrei*"):
        if hashlib.sha256(path.read_bytes()).digest() in digests:
            path.unlink()


class Named(NamedTuple):
    """A reference, and where it stands: what has to be known to try a key on its block."""

    ref: bytes
    kind: str
    context: Any
    magic: bytes = b""


class Evidence:
    """What somebody with the seed of ``reader`` and both stores holds at this moment."""

    def __init__(self, owner, reader, writers=()):
        row, metadata = owner.share().row, owner.session.metadata
        identity = reader.session.identity
        self.owner = owner.session.identity.signing.public
        self.writers = [writer.session.identity.signing.public for writer in writers]
        blobs = owner.world.run(metadata.capsules, row.share, identity.encryption.kid)
        opened = [second_reader.open_capsule(identity.encryption.seed, blob, self.owner) for blob in blobs]
        self.keys = {header["epoch"]: key for header, key in opened if header["share"] == row.share}
        self.head = owner.world.run(metadata.head, row.share)
        self.blocks = stored(owner)

    @property
    def key(self):
        return self.keys[max(self.keys)]

    def read(self, *, head=None, key=None, blocks=None):
        """(path -> content, references) of a version; raises FormatError or KeyError where it ends."""
        refs, real = [], second_reader.fetch

        def fetch(get, ref, context, magic=b""):
            refs.append(Named(bytes(ref), context[0], context, magic))
            return real(get, ref, context, magic)

        second_reader.fetch = fetch
        try:
            blocks = self.blocks if blocks is None else blocks
            found = {
                os.fsdecode(path): None if content is None else bytes(content)
                for path, _, content in second_reader.read_share(
                    self.owner, key or self.key, head or self.head, blocks.__getitem__, self.writers
                )
            }
        finally:
            second_reader.fetch = real
        return found, refs


def assert_apart(old, new):
    """No digest and no key of one version is in the other."""
    old_refs, new_refs = {named.ref for named in old}, {named.ref for named in new}
    assert old_refs
    assert new_refs
    assert not {ref[:32] for ref in old_refs} & {ref[:32] for ref in new_refs}
    assert not {ref[32:] for ref in old_refs} & {ref[32:] for ref in new_refs}


def blocks_of(refs):
    return {named.ref for named in refs if named.kind == "mk/blk@1"}


# -- a share and its rewriting -----------------------------------------------------------------------------


def fill(view):
    view.write("empty", b"")
    view.write("small", b"some text\n")
    view.write("blocks", noise(1, 700 * KIB + 3))
    view.mkdir("dir")
    view.mkdir("dir/inner")
    view.write("dir/inner/deep", noise(2, 90 * KIB))
    view.mkdir("dir/only links")
    view.symlink("dir/only links/link", b"../\xff")
    for i in range(80):
        view.symlink(f"dir/only links/{i}", b"nowhere")  # pages with nothing in them that has a key
    view.mkdir("dir/nothing")
    view.write("first name", b"linked")
    view.link("first name", "dir/second name")
    view.write("large linked", noise(3, 70 * KIB))
    view.link("large linked", "dir/inner/its other name")
    view.setxattr("small", b"user.note", b"\0\xff")
    fh = view.create("sparse")
    view.pwrite(fh, 600 * KIB, b"end")
    view.release(fh)
    view.write("cut", noise(4, 300 * KIB))
    view.truncate("cut", 100 * KIB + 1)
    view.mkdir("many")
    for i in range(150):
        view.write(f"many/{i:03}", b"%d" % i)
    view.setattr("small", mtime_ns=5_000_000_007)


def attributes(view):
    """path -> all that stat says, but the access time."""
    return {
        path: (seen, view.attr(path).ctime_ns, view.attr(path).size) for path, seen in view.walk().items()
    }


def rewrite(device, progress=lambda event: None, name="first"):
    return device.world.run(_reencrypt.reencrypt, device.share(name), progress)


def between_steps(monkeypatch, share, *acts):
    """Have each of ``acts`` done by a program in one of the steps of the rewriting, before it publishes."""
    waiting, real = list(acts), share.flush

    async def flush():
        if waiting:
            await trio.to_thread.run_sync(waiting.pop(0))
        await real()

    monkeypatch.setattr(share, "flush", flush)
    return waiting


@pytest.fixture
def traffic(monkeypatch):
    """The places of data blocks that were read at the provider or sealed."""
    read, sealed = [], []
    real_open, real_seal = BlockReader.open, _sealer.seal_block

    async def open_(self, grant, ref, where):
        if b"mk/blk@1" in where.context:
            read.append(where.context)
        return await real_open(self, grant, ref, where)

    def seal(where, plain, block_size):
        sealed.append(where.context)
        return real_seal(where, plain, block_size)

    monkeypatch.setattr(BlockReader, "open", open_)
    monkeypatch.setattr(_sealer, "seal_block", seal)
    return read, sealed


def test_nothing_the_old_version_named_is_in_the_new_one(alice, traffic):
    view = alice.view()
    fill(view)
    alice.flush()
    before, old = attributes(view), Evidence(alice, alice)
    contents, old_refs = old.read()
    view.forget_all()
    alice.share().services.reader.forget()
    read, sealed = traffic
    read.clear()
    sealed.clear()
    events = []
    done = rewrite(alice, events.append)
    assert done.complete
    new = Evidence(alice, alice)
    again, new_refs = new.read()
    assert again == contents
    assert_apart(old_refs, new_refs)
    assert attributes(view) == before
    # Each block once in, once out; what a hole is stays one.
    count = len(blocks_of(old_refs))
    assert (len(read), len(sealed), done.blocks) == (count, count, count)
    assert len(set(read)) == count
    assert len(blocks_of(new_refs)) == count
    assert (
        done.files == sum(content is not None for content in contents.values()) - 83
    )  # names of links, symlinks
    last = events[-1]
    assert (last["stage"], last["unit"], last["done"]) == ("first", "bytes", last["total"])
    assert done.bytes <= last["total"] <= sum(map(len, filter(None, contents.values())))
    assert [event["done"] for event in events] == sorted(event["done"] for event in events)
    assert done.version == alice.share().base.version


def test_a_walk_through_many_files_does_not_keep_them(alice, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 20)
    view = alice.view()
    for directory in range(6):
        view.mkdir(f"{directory}")
        for i in range(40):
            view.write(f"{directory}/{i}", b"%d" % i)
    alice.flush()
    view.forget_all()
    most = 0

    def look(_):
        nonlocal most
        most = max(most, len(alice.share().tree.nodes))

    done = rewrite(alice, look)
    assert (done.files, done.complete) == (240, True)
    assert most <= 20 + 10
    assert len(alice.share().tree.nodes) == 1


def test_a_file_of_several_index_blocks(alice):
    view = alice.view()
    fh = view.create("large")
    size = (2 * 4096 + 7) * 256 * KIB
    places = {0: b"start", 4095 * 256 * KIB: b"last of the first", size - 5: b"start"}
    for offset, data in places.items():
        view.pwrite(fh, offset, data)
    view.release(fh)
    alice.flush()

    def named(evidence):
        """References of what the file's manifest names, without building its content."""
        head = second_reader.verify(evidence.head, "mk/head@1", [evidence.owner])
        (entry,) = _root_of(evidence, head)["entries"]
        get = evidence.blocks.__getitem__
        manifest = second_reader.load(get, entry["ref"], entry["oid"], entry["epoch"], entry["ver"])
        index = [manifest["index"][at : at + 64] for at in range(0, len(manifest["index"]), 64)]
        refs = [Named(entry["ref"], "man", None)]
        for i, ref in enumerate(index):
            if ref != HOLE:
                plain = second_reader.fetch(get, ref, ["mk/idx@1", entry["oid"], 0, i])
                inner = [bytes(plain[at : at + 64]) for at in range(0, len(plain), 64)]
                refs.append(Named(ref, "idx", None))
                refs += [Named(found, "mk/blk@1", None) for found in inner if any(found)]
        return refs

    old = named(Evidence(alice, alice))
    done = rewrite(alice)
    new = named(Evidence(alice, alice))
    assert (done.complete, done.blocks) == (True, 3)
    assert [item.kind for item in old] == ["man", "idx", "mk/blk@1", "mk/blk@1", "idx", "mk/blk@1"]
    assert [item.kind for item in new] == [item.kind for item in old]
    assert_apart(old, new)
    fh = view.open("large", os.O_RDONLY)
    assert all(view.pread(fh, offset, len(data)) == data for offset, data in places.items())
    assert view.attr("large").size == size
    view.release(fh)


def _root_of(evidence, head):
    label = b"mk/vk@1\0" + head["oid"] + struct.pack(">QQ", head["epoch"], head["ver"])
    key = HKDFExpand(hashes.SHA256(), 32, label).derive(evidence.key)
    return second_reader.load(
        evidence.blocks.__getitem__, head["root"] + key, head["oid"], head["epoch"], head["ver"]
    )


def test_a_copy_that_shares_its_blocks_gets_its_own(world, alice, bob):
    alice.view().write("a", noise(1, 200 * KIB))
    alice.flush()
    alice.grant("first", bob)
    bob.view().write("a", noise(2, 200 * KIB))
    alice.view().write("a", noise(3, 200 * KIB))
    alice.flush()
    bob.flush()
    alice.refresh()
    seen = alice.view().contents()
    assert len(seen) == 2  # and one of them is a conflict copy
    old = Evidence(alice, alice, [bob]).read()
    assert rewrite(alice).complete
    new = Evidence(alice, alice, [bob]).read()
    assert old[0] == new[0] == seen == alice.view().contents()
    assert_apart(old[1], new[1])


# -- going on, and starting over ---------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_killed_in_the_middle_it_goes_on_where_it_was(alice, monkeypatch, traffic):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 10)
    view = alice.view()
    for directory in "abcdef":
        view.mkdir(directory)
        for i in range(10):
            view.write(f"{directory}/{i}", noise(i, 20 * KIB))
    alice.flush()
    contents, old_refs = Evidence(alice, alice).read()
    files = 60
    events = 0
    dying = False
    real = _reencrypt.Done.save

    async def save(self):
        if not dying:
            await real(self)

    def die(_event):
        nonlocal events, dying
        events += 1
        if events == 36:  # one for each file, which has one block
            dying = True
            raise Killed

    monkeypatch.setattr(_reencrypt.Done, "save", save)
    with pytest.raises(Killed):
        rewrite(alice, die)
    alice.crash()
    alice.start()
    dying = False
    traffic[1].clear()
    done = rewrite(alice)
    assert done.complete
    # What the steps before the end had published is not read again; the last step, which did not end, is.
    assert 20 <= done.skipped < 36
    assert len(traffic[1]) == done.files == files - done.skipped
    again, new_refs = Evidence(alice, alice).read()
    assert again == contents
    assert_apart(old_refs, new_refs)


def test_a_commit_that_caught_half_of_a_file_does_not_count_as_all_of_it(world, alice, monkeypatch):
    view = alice.view()
    view.write("a", noise(1, 1024 * KIB))
    alice.flush()
    _, old_refs = Evidence(alice, alice).read()
    share, spool, real = alice.share(), alice.share().services.spool, alice.share().flush
    halted, go_on = threading.Event(), threading.Event()
    real_sync, commits = spool.sync, []

    def sync():
        halted.set()
        assert go_on.wait(60)
        real_sync()

    def half(event):
        if event["done"] == 512 * KIB:
            monkeypatch.setattr(spool, "sync", sync)
            ended = trio.Event()
            commits.append(ended)

            async def commit():
                await real()
                ended.set()

            share.services.nursery.start_soon(commit)

    async def flush():
        # The file is done in memory; the commit that was begun in its middle ends, and then so does the run.
        assert await trio.to_thread.run_sync(halted.wait, 60)
        go_on.set()
        await commits[0].wait()
        raise Killed

    monkeypatch.setattr(share, "flush", flush)
    with pytest.raises(Killed):
        rewrite(alice, half)
    assert blocks_of(Evidence(alice, alice).read()[1]) & blocks_of(old_refs)
    alice.crash()
    alice.start()
    assert rewrite(alice).complete
    assert_apart(old_refs, Evidence(alice, alice).read()[1])
    assert view.read("a") == noise(1, 1024 * KIB)


def test_a_second_run_does_what_came_since_and_a_new_epoch_does_all(world, alice, bob, traffic):
    view = alice.view()
    fill(view)
    alice.flush()
    alice.grant("first", bob)
    first = rewrite(alice)
    again = rewrite(alice)
    assert (again.complete, again.files, again.blocks, again.bytes) == (True, 0, 0, 0)
    assert again.skipped
    view.append("blocks", b"more")
    alice.flush()
    alice.close()
    alice.start()
    third = rewrite(alice)
    assert (third.complete, third.files) == (True, 1)  # nobody watched that change being made
    world.run(alice.session.book.revoke, alice.share(), "bob")
    fourth = rewrite(alice)
    assert (fourth.complete, fourth.files, fourth.skipped) == (True, first.files, 0)
    assert fourth.epoch == first.epoch + 1


def test_somebody_is_shut_out_while_it_runs(world, alice, bob, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 20)
    view = alice.view()
    fill(view)
    alice.flush()
    alice.grant("first", bob)
    share, seen = alice.share(), []

    def revoke():
        share.flush = real
        seen.append(Evidence(alice, bob).read()[1])
        world.run(alice.session.book.revoke, share, "bob")

    real = share.flush
    between_steps(monkeypatch, share, lambda: None, revoke)
    done = rewrite(alice)
    # What was rewritten for the epoch bob still had is rewritten again.
    assert (done.complete, done.epoch) == (True, 2)
    assert_apart(seen[0], Evidence(alice, alice).read()[1])


# -- others at work meanwhile ------------------------------------------------------------------------------


def test_programs_that_write_meanwhile_lose_nothing(alice, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 5)
    monkeypatch.setattr(_reencrypt, "STEP_BYTES", 256 * KIB)
    view = alice.view()
    for i in range(30):
        view.write(f"{i:02}", noise(i, 130 * KIB))
    view.mkdir("z")
    view.write("z/last", noise(99, 600 * KIB))
    alice.flush()
    expected, old_refs = Evidence(alice, alice).read()
    held = view.open("z/last")
    unlinked = view.open("29")

    def first():
        view.append("00", b"appended to what is done")
        view.append("20", b"appended to what is not")
        view.truncate("21", 65 * KIB)
        view.truncate("z/last", 300 * KIB)
        view.truncate("z/last", 500 * KIB)
        view.unlink("29")

    def second():
        view.pwrite(held, 70 * KIB, b"in the middle")
        view.rename("25", "z/aaa")
        view.rename("z/last", "000")
        view.mkdir("new")
        view.write("new/file", noise(98, 70 * KIB))
        view.link("22", "new/22")
        view.write("23", b"")

    waiting = between_steps(monkeypatch, alice.share(), first, second)
    done = rewrite(alice)
    assert not waiting
    assert done.complete
    assert view.pread(unlinked, 0, 5) == expected.pop("29")[:5]
    expected["00"] += b"appended to what is done"
    expected["20"] += b"appended to what is not"
    expected["21"] = expected["21"][: 65 * KIB]
    last = bytearray(expected.pop("z/last")[: 300 * KIB] + bytes(200 * KIB))
    last[70 * KIB : 70 * KIB + 13] = b"in the middle"
    expected |= {"000": bytes(last), "z/aaa": expected.pop("25"), "new": None, "23": b""}
    expected |= {"new/file": noise(98, 70 * KIB), "new/22": expected["22"]}
    view.release(held)
    view.release(unlinked)
    assert view.contents() == expected
    alice.flush()
    contents, new_refs = Evidence(alice, alice).read()
    assert contents == expected
    assert_apart(old_refs, new_refs)


def test_what_another_home_writes_meanwhile_is_kept_and_rewritten(alice, bob, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 5)
    view = alice.view()
    for name in ("aa", "bb", "cc", "dd", "zz"):
        view.mkdir(name)
        for i in range(4):
            view.write(f"{name}/{i}", noise(i, 70 * KIB))
    view.write("aa/gone", b"x" * 100)
    view.write("aa/1 more", b"x" * 100)
    alice.flush()
    alice.grant("first", bob)
    theirs = bob.view()
    expected, old_refs = Evidence(alice, alice).read()
    theirs.contents()

    def edit(what):
        def act():
            for name in ("aa", "zz"):
                theirs.append(f"{name}/1", what)
            theirs.write(f"cc/{what.decode()}", noise(7, 70 * KIB))
            if what == b"one":
                theirs.unlink("aa/gone")
                theirs.rename("zz/2", "aa/moved")
                theirs.setattr("aa/3", mtime_ns=4_000_000_000)
            bob.flush()

        return act

    waiting = between_steps(monkeypatch, alice.share(), edit(b"one"), edit(b"two"), edit(b"three"))
    done = rewrite(alice)
    assert not waiting
    assert done.complete
    del expected["aa/gone"]
    expected["aa/moved"] = expected.pop("zz/2")
    for name in ("aa", "zz"):
        expected[f"{name}/1"] += b"onetwothree"
    expected |= {f"cc/{what}": noise(7, 70 * KIB) for what in ("one", "two", "three")}
    bob.refresh()
    assert view.contents() == theirs.contents() == expected
    assert view.attr("aa/3").mtime_ns == 4_000_000_000
    assert not alice.share().conflicts
    assert not bob.share().conflicts
    contents, new_refs = Evidence(alice, alice, [bob]).read()
    assert contents == expected
    assert_apart(old_refs, new_refs)


def test_a_file_is_replaced_when_its_last_block_was_just_rewritten(alice, bob, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_BYTES", 256 * KIB)
    alice.view().write("a", noise(1, 1024 * KIB))
    alice.flush()
    alice.grant("first", bob)
    theirs = bob.view()
    theirs.contents()
    _, old_refs = Evidence(alice, alice).read()

    def edit():
        theirs.append("a", b"bob's")
        bob.flush()

    idle = [lambda: None] * 3
    waiting = between_steps(monkeypatch, alice.share(), *idle, edit)
    done = rewrite(alice)
    assert not waiting
    assert (done.complete, done.blocks) == (True, 4 + 5)
    contents, new_refs = Evidence(alice, alice, [bob]).read()
    assert contents == alice.view().contents() == {"a": noise(1, 1024 * KIB) + b"bob's"}
    assert_apart(old_refs, new_refs)


@pytest.mark.parametrize("linked", [False, True])
def test_pages_that_a_merge_brings_back_are_sealed_once_more(alice, bob, monkeypatch, linked):
    view, theirs = alice.view(), bob.view()
    # Several pages, of which bob's change touches one; or a link table, which it does not touch.
    for i in range(20 if linked else 400):
        view.symlink(f"{i:03}", b"x")
        if linked:
            view.link(f"{i:03}", f"{i:03} again")
    alice.flush()
    alice.grant("first", bob)
    contents, old_refs = Evidence(alice, alice).read()

    def faster():
        theirs.symlink("zzz", b"x")
        bob.flush()

    # What alice has sealed again in this step is in no version: bob's was first, and it is merged into that.
    waiting = between_steps(monkeypatch, alice.share(), faster)
    assert rewrite(alice).complete
    assert not waiting
    again, new_refs = Evidence(alice, alice, [bob]).read()
    assert again == contents | {"zzz": b"x"}
    assert_apart(old_refs, new_refs)


def test_a_conflict_copy_that_a_merge_makes_meanwhile_is_rewritten_too(alice, bob, monkeypatch):
    monkeypatch.setattr(_reencrypt, "STEP_OBJECTS", 2)
    view, theirs = alice.view(), bob.view()
    for i in range(4):
        view.write(f"{i}", b"x")
    view.mkdir("zz")
    view.write("zz/file", noise(1, 600 * KIB))
    alice.flush()
    alice.grant("first", bob)
    theirs.contents()
    held = view.open("zz/file")
    _, old_refs = Evidence(alice, alice).read()

    def clash():
        theirs.append("zz/file", b"bob's")
        bob.flush()
        view.pwrite(held, 600 * KIB, b"alice's")

    between_steps(monkeypatch, alice.share(), clash)
    assert rewrite(alice).complete
    view.release(held)
    contents, new_refs = Evidence(alice, alice, [bob]).read()
    both = sorted(data for path, data in contents.items() if path.startswith("zz/"))
    assert both == [noise(1, 600 * KIB) + b"alice's", noise(1, 600 * KIB) + b"bob's"]
    assert_apart(old_refs, new_refs)


def test_a_change_that_was_waiting_elsewhere_brings_old_blocks_back_until_the_next_run(alice, bob):
    view = alice.view()
    view.write("a", noise(1, 700 * KIB))
    view.write("b", noise(2, 200 * KIB))
    view.write("c", b"c")
    alice.flush()
    alice.grant("first", bob)
    theirs = bob.view()
    theirs.append("a", b"bob's")
    theirs.unlink("c")
    _, old_refs = Evidence(alice, alice).read()
    assert rewrite(alice).complete
    bob.flush()
    alice.refresh()
    # One file, no conflict copy: sealing a file again is no change of it. But bob's version names old blocks.
    expected = {"a": noise(1, 700 * KIB) + b"bob's", "b": noise(2, 200 * KIB)}
    assert view.contents() == theirs.contents() == expected
    contents, refs = Evidence(alice, alice, [bob]).read()
    assert contents == expected
    assert blocks_of(refs) & blocks_of(old_refs)
    again = rewrite(alice)
    assert (again.complete, again.files, again.skipped) == (True, 1, 1)
    assert_apart(old_refs, Evidence(alice, alice, [bob]).read()[1])


# -- trouble ---------------------------------------------------------------------------------------------


def test_what_is_damaged_is_named_and_the_rest_is_done(alice):
    view = alice.view()
    view.write("a", noise(1, 100 * KIB))
    view.write("e", noise(3, 100 * KIB))
    view.mkdir("d")
    alice.flush()
    sound = blocks_of(Evidence(alice, alice).read()[1])
    view.write("d/bad", noise(2, 100 * KIB))
    alice.flush()
    before = view.contents()
    lost = {ref[:32] for ref in blocks_of(Evidence(alice, alice).read()[1]) - sound}
    assert len(lost) == 1
    delete(alice, lost)
    view.forget_all()
    alice.share().services.reader.forget()
    done = rewrite(alice)
    assert (done.complete, done.unreadable, done.files) == (False, ["d/bad"], 2)
    assert view.read("a") == before["a"]
    assert view.read("e") == before["e"]


def test_only_the_owner_may(alice, bob):
    alice.view().write("a", b"x")
    alice.flush()
    alice.grant("first", bob)
    with pytest.raises(MeshkitError) as refused:
        rewrite(bob)
    assert refused.value.code == "not_owner"


# -- the attack ------------------------------------------------------------------------------------------


def opens(keys, named, blocks):
    """The blocks of ``named`` that one of ``keys`` opens, each tried on its right place: digest -> plaintext."""
    found = {}
    for item in named:
        sealed = blocks.get(item.ref[:32])
        for key in keys if sealed is not None else ():
            try:
                plain = second_reader.fetch(blocks.__getitem__, item.ref[:32] + key, item.context, item.magic)
            except second_reader.FormatError:
                continue
            found[item.ref[:32]] = plain
    return found


def test_what_somebody_who_was_shut_out_still_opens(world, alice, bob):
    view = alice.view()
    view.mkdir("dir")
    view.write("dir/kept", noise(1, 100 * KIB))
    view.write("dir/edited", noise(2, 100 * KIB))
    view.write("note", b"as it was")
    alice.flush()
    alice.grant("first", bob)
    # Bob keeps all there is: his capsule's key, the head, every key that stands below it, every block.
    kept = Evidence(alice, bob)
    old_contents, old_named = kept.read()
    old_keys = {*kept.keys.values(), *(named.ref[32:] for named in old_named)}
    old_refs = {named.ref for named in old_named}
    world.run(alice.session.book.revoke, alice.share(), "bob")
    view.write("dir/edited", b"rewritten " * 9000)
    view.write("dir/after", b"written after " * 9000)
    alice.flush()

    # (a) Without rewriting. He gets no key of the new epoch, and what he has does not open the new root...
    now = Evidence(alice, bob)
    assert set(now.keys) == {1}
    with pytest.raises(second_reader.FormatError):
        now.read()
    # ...the version he had access to opens, from the store as it is now...
    assert now.read(head=kept.head)[0] == old_contents
    # ...and of the new version those blocks, and only those, that were not written anew.
    owner = Evidence(alice, alice)
    contents, named = owner.read()
    assert contents["dir/after"] == b"written after " * 9000
    opened = opens(old_keys, named, now.blocks)
    assert opened.keys() == {item.ref[:32] for item in named if item.ref in old_refs}
    blocks = {item.ref[:32] for item in named if item.kind == "mk/blk@1"}
    assert [bytes(opened[digest])[: 100 * KIB] for digest in opened.keys() & blocks] == [noise(1, 100 * KIB)]
    assert not any(b"after" in bytes(plain) or b"rewritten" in bytes(plain) for plain in opened.values())

    # (b) After rewriting, none of his keys opens anything of the new version.
    assert rewrite(alice).complete
    fresh_contents, fresh = Evidence(alice, alice).read()
    now = Evidence(alice, bob)
    assert fresh_contents == contents == view.contents()
    assert opens(old_keys, fresh, now.blocks) == {}
    with pytest.raises(second_reader.FormatError):
        now.read()
    # The version he had access to still opens: from the store, and from his copy.
    assert now.read(head=kept.head)[0] == old_contents
    assert now.read(head=kept.head, blocks=kept.blocks)[0] == old_contents

    # (c) When the store has let go of what the new version does not name, only a copy of his own helps him.
    delete(alice, stored(alice).keys() - {item.ref[:32] for item in fresh})
    now = Evidence(alice, bob)
    with pytest.raises(KeyError):
        now.read(head=kept.head)
    assert opens(old_keys, [*old_named, *named, *fresh], now.blocks) == {}
    assert now.read(head=kept.head, blocks=kept.blocks)[0] == old_contents
    assert Evidence(alice, alice).read()[0] == contents
