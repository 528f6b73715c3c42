"""A store that went back in time, while the other one did not: what still works, and the ways out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import pytest
from devices import Device, Refused, World, pattern, scratch

from meshkitfs.core.blocks import REFS_PER_INDEX
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import LocalStore


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def place():
    place = scratch()
    yield place
    shutil.rmtree(place)


@pytest.fixture
def alice(world, place):
    device = Device(world, f"{place}/alice", "alice").start()
    device.create_share("first")
    yield device
    if device.session is not None:
        device.close()


@pytest.fixture
def bob(world, place, alice):
    device = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", device)
    yield device
    if device.session is not None:
        device.close()


def call(device, method, **params):
    return device.world.run(Service(device.session).call, method, params)


def go_back(device, at):
    return call(device, "restore", path="first", at=at, exact=True)


def verified(device, **params):
    (found,) = call(device, "verify", shares=["first"], **params)["shares"]
    return found


@contextlib.contextmanager
def refused(code):
    with pytest.raises(MeshkitError) as caught:
        yield
    assert caught.value.code == code, caught.value


@contextlib.contextmanager
def fails(code):
    with pytest.raises(Refused) as caught:
        yield
    assert (caught.value.errno, caught.value.code) == (errno.EIO, code)


class Store:
    """The blocks of a device's store, and the ones it had when this was made."""

    def __init__(self, device):
        self.device = device
        self.had = self._now()

    def _now(self):
        return {path: path.read_bytes() for path in self.device.blocks.rglob("*") if len(path.name) > 40}

    def rolled_back(self):
        """Put it back to what it was; returns what is lost."""
        lost = {path: data for path, data in self._now().items() if path not in self.had}
        for path in lost:
            path.unlink()
        return lost


def versions(device):
    return {row["version"]: row["what"] for row in call(device, "history", path="first", limit=0)["versions"]}


def reopen(device):
    device.close()
    device.start()


def three_days(alice, *, linked=True):
    """A share whose last two versions the store has lost: version 2 is whole. Returns what it is."""
    view = alice.view()
    view.mkdir("d")
    view.write("d/kept", pattern(1, 300_000))
    view.write("d/changed", b"old")
    view.write("gone", b"back again")
    alice.flush()
    store = Store(alice)
    whole = view.contents()
    view.write("d/changed", b"new")
    if linked:
        view.link("d/kept", "twin")
    view.unlink("gone")
    alice.flush()
    view.mkdir("new")
    view.write("new/file", pattern(2, 300_000))
    alice.flush()
    return whole, store


def test_what_works_without_the_newest_version(alice):
    _, store = three_days(alice)
    lost = store.rolled_back()
    reopen(alice)
    with fails("block_unavailable"):
        alice.view().listdir()
    # verify says what is missing, repair what it could not find, history what there was.
    found = verified(alice)
    assert found["failure"] is None
    assert sorted(item["versions"] for item in found["broken"]) == [[3], [4]]
    assert {tuple(item["paths"]) for item in found["broken"]} == {("/",)}
    assert {item["code"] for item in found["broken"]} == {"block_unavailable"}
    assert len(verified(alice, live=True)["broken"]) == 1
    empty = alice.root / "empty"
    LocalStore.open(empty, create=True).close()
    done = call(alice, "repair", share="first", sources=[f"local:{empty}"])
    assert (done["repaired"], len(done["broken"])) == (0, 2)
    assert versions(alice) == {4: "unreadable", 2: "changed", 1: "created"}
    assert call(alice, "prune", share="first", last=1, dry_run=True)["given_up"] == 3
    # Nothing is deleted while something that is kept cannot be read.
    with refused("block_unavailable"):
        call(alice, "gc", share="first", grace="0d", delete=True)
    with refused("block_unavailable"):
        call(alice, "restore", path="first", at="v2")
    for path, data in lost.items():
        path.write_bytes(data)
    assert alice.view().read("new/file") == pattern(2, 300_000)
    assert verified(alice)["broken"] == []


def test_back_to_the_newest_version_that_is_whole(alice):
    whole, store = three_days(alice)
    store.rolled_back()
    reopen(alice)
    with fails("block_unavailable"):
        alice.view().listdir()
    (shown,) = call(alice, "status")["shares"]
    assert (shown["state"], shown["reason"]) == ("unreadable", "block_unavailable")
    for when in ("v4", "v3"):
        with refused("block_unavailable"):
            go_back(alice, when)
    done = go_back(alice, "v2")
    assert (done["version"], done["replaced"], done["exact"]) == (2, 4, True)
    assert alice.share().base.version == 5
    (shown,) = call(alice, "status")["shares"]
    assert (shown["state"], shown["reason"]) == ("stored", None)
    assert alice.view().contents() == whole
    alice.view().write("d/changed", b"newer")
    alice.flush()
    reopen(alice)
    assert alice.view().contents() == whole | {"d/changed": b"newer"}
    assert verified(alice, live=True)["broken"] == []
    # What is lost is given up, and then everything is as it should be.
    call(alice, "prune", share="first", last=2)
    call(alice, "gc", share="first", grace="0d", delete=True)
    assert verified(alice)["broken"] == []
    assert alice.view().contents() == whole | {"d/changed": b"newer"}


def test_open_files_and_names_follow(alice):
    """While the share is in use: also names of a link table that the old version did not have."""
    whole, _ = three_days(alice)
    view = alice.view()
    fh = view.open("d/changed", os.O_RDWR)
    assert view.pread(fh, 0, 9) == b"new"
    go_back(alice, "v2")
    assert view.contents() == whole
    assert view.pread(fh, 0, 9) == b"old"
    view.pwrite(fh, 0, b"new")
    view.release(fh)
    view.link("gone", "again")
    alice.flush()
    assert go_back(alice, "v6")["replaced"] == 6  # the newest: nothing to do
    assert alice.share().base.version == 6
    assert go_back(alice, "v4")["replaced"] == 6
    assert view.read("new/file") == pattern(2, 300_000)
    assert sorted(view.listdir()) == ["d", "new", "twin"]
    view.write("twin", b"both")
    assert view.read("d/kept") == b"both"
    alice.flush()
    reopen(alice)
    assert alice.view().read("d/kept") == b"both"
    assert verified(alice)["broken"] == []


def test_one_damaged_directory(alice):
    """The newest version can be opened, but not all of it: what is whole in it is brought back after."""
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", b"old")
    alice.flush()
    view.write("d/a", b"new")
    view.write("d/b", pattern(3, 300_000))
    view.mkdir("lost")
    view.write("lost/file", b"content")
    alice.flush()
    reopen(alice)
    alice.view().listdir()
    lost = alice.share().tree.root.children[b"lost"].entry.ref[:32]
    (alice.blocks / LocalStore.place(lost)).unlink()
    view = alice.view()
    with fails("block_unavailable"):
        view.listdir("lost")
    assert view.read("d/a") == b"new"
    with fails("block_unavailable"):
        view.rmdir("lost")
    view.rename("lost", "out of the way")
    view.rename("out of the way", "lost")
    alice.flush()
    (broken,) = verified(alice)["broken"]
    assert (broken["paths"], broken["kind"], broken["versions"]) == (["lost"], "manifest", [3, 4])
    go_back(alice, "v2")
    assert call(alice, "restore", path="first/d", at="v3")["files"] == 2
    assert view.contents() == {"d": None, "d/a": b"new", "d/b": pattern(3, 300_000)}
    assert verified(alice, live=True)["broken"] == []


def test_unsent_changes_that_stand_on_what_was_lost(alice, bob):
    _, store = three_days(alice, linked=False)
    bob.refresh()
    theirs = bob.view()
    theirs.contents()
    theirs.write("d/changed", b"bob's")
    theirs.write("from bob", b"unsent")
    bob.world.run(bob.share().journal)
    bob.crash()
    store.rolled_back()
    reopen(alice)
    go_back(alice, "v2")
    alice.view().write("from alice", b"after")
    alice.flush()
    bob.start()
    bob.view().listdir()
    bob.flush()
    alice.refresh()
    for view in (bob.view(), alice.view()):
        assert view.read("from bob") == b"unsent"
        assert view.read("from alice") == b"after"
        assert view.read("d/changed") == b"bob's"
        assert view.read("d/kept") == pattern(1, 300_000)
        # What he had seen comes back as what it is: lost.
        with fails("block_unavailable"):
            view.listdir("new")


def test_unsent_changes_here_and_a_newest_version_that_is_lost(alice, bob):
    """What was changed here cannot be merged into what cannot be read: it is kept, on top of the old version."""
    view = alice.view()
    view.write("a", b"1")
    alice.flush()
    store = Store(alice)
    fh = view.open("a", os.O_RDWR)
    bob.refresh()
    bob.view().write("from bob", b"lost")
    bob.flush()
    assert store.rolled_back()
    view.pwrite(fh, 1, b" and unsent")
    view.release(fh)
    with refused("block_unavailable"):
        alice.world.run(alice.share().flush)
    go_back(alice, "v2")
    assert view.contents() == {"a": b"1 and unsent"}
    assert not alice.share().dirty
    bob.refresh()
    assert bob.view().contents() == {"a": b"1 and unsent"}


def test_who_may_go_back(alice, bob):
    three_days(alice)
    alice.grant_again("first", bob, "read")
    bob.refresh()
    with refused("right_not_granted"):
        go_back(bob, "v2")
    for params in ({"path": "first/d"}, {"path": "first", "to": "first/x"}):
        with refused("invalid_argument"):
            call(alice, "restore", at="v2", exact=True, **params)
    with refused("version_not_found"):
        go_back(alice, "v99")


# == a metadata store that went back ===================================================================


@pytest.mark.parametrize("durable", [True, False])
def test_unsent_changes_of_an_epoch_that_the_metadata_store_has_forgotten(world, place, alice, bob, durable):
    """It was restored from a backup made before somebody was shut out: the new epoch's key is not in it."""
    carol = Device(world, f"{place}/carol", "carol", beside=alice).start()
    alice.grant("first", carol)
    view = alice.view()
    view.write("a", pattern(1, 300_000))
    alice.flush()
    for device in (alice, bob, carol):
        device.close()
    backup = alice.metadata.read_bytes()
    for device in (alice, bob):
        device.start()
    people = {alice: b"of alice", bob: b"of bob"}
    view = alice.view()
    view.listdir()
    world.run(alice.session.book.revoke, alice.share(), "carol")
    view.write("gone with the backup", b"published")
    alice.flush()
    for device, data in people.items():
        device.refresh()
        device.view().write(device.name, data)
        device.view().append("a", data)
        if durable:
            world.run(device.share().journal)
            device.crash()
    for extra in ("-wal", "-shm"):
        alice.metadata.with_name(alice.metadata.name + extra).unlink(missing_ok=True)
    alice.metadata.unlink()
    alice.metadata.write_bytes(backup)
    for device in people:
        if durable:
            device.start()
        with pytest.raises(Refused) as refusal:
            device.view().listdir()
        assert refusal.value.code == "roster_rollback"
    for device in people:  # the owner first: that gives the others their keys back
        call(device, "share.accept_rollback", share="first")
        device.flush()
    alice.refresh()
    for device in people:
        seen = device.view().contents()
        assert (seen["alice"], seen["bob"]) == (b"of alice", b"of bob")
        ends = sorted(data[300_000:] for data in seen.values() if len(data) > 300_000)
        assert ends == [b"of alice", b"of bob"]
        assert "gone with the backup" not in seen
    # The next epoch is none of those that there were: its number stands for another key.
    assert alice.share().grant.roster.epoch == 1
    world.run(alice.session.book.revoke, alice.share(), "carol")
    assert alice.share().base.epoch == 3
    bob.refresh()
    bob.view().write("after", b"all")
    bob.flush()
    for device in people:
        assert verified(device)["broken"] == []


# == what is missing in an old version =================================================================


def lose(alice, *refs):
    for ref in refs:
        (alice.blocks / LocalStore.place(ref[:32])).unlink()


def test_a_file_whose_content_is_missing_is_not_brought_back(alice):
    """Its manifest is whole, so nothing but looking for the blocks shows it."""
    view = alice.view()
    had = Store(alice)
    view.write("a", pattern(1, 1_000_000))
    alice.flush()
    reopen(alice)
    view = alice.view()
    biggest = max(had._now().keys() - had.had.keys(), key=lambda path: path.stat().st_size)
    view.write("a", b"new")
    alice.flush()
    biggest.unlink()
    with refused("block_unavailable"):
        call(alice, "restore", path="first/a", at="v2")
    assert view.read("a") == b"new"
    assert alice.share().base.version == 3


def test_a_tree_comes_back_without_what_is_missing_in_it(alice):
    view = alice.view()
    for name in ("d", "d/lost", "d/whole"):
        view.mkdir(name)
    for name in ("d/lost/file", "d/whole/file", "d/a", "d/b"):
        view.write(name, pattern(len(name), 200_000))
    whole = view.contents()
    view.write("d/film", b"start")
    view.truncate("d/film", (REFS_PER_INDEX + 3) * 65536)
    fh = view.open("d/film", os.O_WRONLY)
    view.pwrite(fh, REFS_PER_INDEX * 65536, b"end")
    view.release(fh)
    alice.flush()
    root = alice.share().tree.root
    d = root.children[b"d"]
    directory = d.children[b"lost"]
    lost = directory.entry.ref
    content = d.children[b"a"]
    film = d.children[b"film"]

    async def blocks_of(node):
        grant = await alice.share().use("read")
        content = await alice.share().tree.content(grant, node)
        found = [await content.ref(grant, i) for i in range(content.table.count)]
        return [ref for ref in found if any(ref)]

    a, ends = (alice.world.run(blocks_of, node) for node in (content, film))
    view.remove_tree("d")
    alice.flush()
    reopen(alice)
    alice.view().listdir()
    lose(alice, lost, a[-1], ends[-1])
    done = call(alice, "restore", path="first/d", at="v2")
    assert done["unreadable"] == ["first/d/a", "first/d/film", "first/d/lost"]
    assert (done["files"], done["directories"]) == (2, 2)
    assert alice.view().contents() == {
        path: data for path, data in whole.items() if not path.startswith(("d/a", "d/lost"))
    }
    assert verified(alice, live=True)["broken"] == []
