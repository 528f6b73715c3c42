"""Past versions of a share: looking at them through ``.snapshots``, the history of a path, bringing things back.

The clock of the world stands still, so a version is made exactly where a test flushes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time

import pytest
import trio
from devices import Device, View, World, pattern, scratch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshkitfs.cli._targets import past_path
from meshkitfs.core.blocks import REFS_PER_INDEX
from meshkitfs.core.cid import cid_text
from meshkitfs.core.moments import parse_moment, version_label
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import Terms, _past, _restore
from meshkitfs.vfs.types import ROOT_INO, ForgetEntry, ForgetInode, SetAttr

WRITES = (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_TRUNC)


class PastView(View):
    """The files of a past version, below ``.snapshots``."""

    def __init__(self, device, label, share="first"):
        super().__init__(device, share)
        self.label = label

    def attr(self, path):
        return super().attr(f".snapshots/{self.label}/{path}")


def labels(device, share="first"):
    return device.view(share).listdir(".snapshots")


def past(device, number, share="first"):
    """The view of one version, by its number."""
    found = [label for label in labels(device, share) if label.endswith(f"-v{number}")]
    assert len(found) == 1
    return PastView(device, found[0], share)


def plain(tree):
    """A walk without inode numbers, which are others in each version."""
    return {path: tuple(seen)[1:] for path, seen in tree.items()}


def version(device, share="first"):
    return device.share(share).base.version


@contextlib.contextmanager
def fails(number, code=None):
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, f"{caught.value!r} instead of {errno.errorcode[number]}"
    if code is not None:
        assert caught.value.code == code


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


class Story:
    """Remembers what the tree was at every version that was published."""

    def __init__(self, device, share="first"):
        self.device = device
        self.share = share
        self.trees = {}

    def __enter__(self):
        return self.device.view(self.share)

    def __exit__(self, kind, *_):
        if kind is None:
            self.device.flush(self.share)
            self.trees[version(self.device, self.share)] = plain(self.device.view(self.share).walk())

    def check(self, device=None):
        """Every version must look as it did then."""
        device = device or self.device
        for number, tree in self.trees.items():
            assert plain(past(device, number, self.share).walk()) == tree, number


# == what a version shows ==============================================================================


def test_every_version_is_as_it_was(alice):
    story = Story(alice)
    with story as view:
        view.mkdir("docs")
        view.write("docs/a", b"first")
        view.write("big", pattern(1, 700_000))
        view.symlink("link", b"docs/a")
    with story as view:
        view.write("docs/a", b"second, and longer")
        view.setattr("big", mode=0o600)
        view.setxattr("docs", b"user.colour", b"blue")
        view.link("docs/a", "docs/b")
    with story as view:
        view.rename("docs", "papers")
        view.unlink("big")
        view.unlink("papers/a")
    with story as view:
        view.write("big", pattern(2, 100_000))
        view.unlink("link")
        view.remove_tree("papers")
    story.check()
    alice.close()
    alice.start()
    story.check()
    shown = past(alice, 3)
    assert shown.attr("docs/a").nlink == 2
    assert shown.attr("docs/a").ino == shown.attr("docs/b").ino


def test_large_directories_and_files_with_index_blocks(alice):
    story, view = Story(alice), alice.view()
    with story:
        view.mkdir("many")
        for i in range(700):
            view.write(f"many/file-{i:04}", b"%d" % i)
    # Sparse, so that there are index blocks without a gigabyte of content.
    size = (REFS_PER_INDEX + 3) * 65536
    view.write("film", b"start")
    view.truncate("film", size)
    fh = view.open("film", os.O_RDWR)
    view.pwrite(fh, REFS_PER_INDEX * 65536 + 10, b"in the second segment")
    view.release(fh)
    view.unlink("many/file-0500")
    alice.flush()
    with story:
        view.truncate("film", 5)
        for i in range(0, 700, 7):
            view.unlink(f"many/file-{i:04}")
    story.check()
    before = past(alice, 3)
    assert before.attr("film").size == size
    fh = before.open("film", os.O_RDONLY)
    assert before.pread(fh, REFS_PER_INDEX * 65536, 40)[10:31] == b"in the second segment"
    assert before.pread(fh, 0, 6) == b"start\0"
    before.release(fh)
    assert len(before.listdir("many")) == 699


def test_merged_versions_of_two_devices(world, place, alice):
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    mine, theirs = Story(alice), Story(bob)
    with mine as view:
        view.write("a", b"alice")
        view.mkdir("d")
    bob.refresh()
    with theirs as view:
        view.write("d/b", b"bob")
    alice.view().write("d/c", b"alice again")
    with mine:
        pass  # merges bob's version into hers
    bob.refresh()
    with theirs as view:
        view.rename("d", "e")
    for device in (alice, bob):
        device.refresh()
        mine.check(device)
        theirs.check(device)
        assert len(labels(device)) == version(device)
    bob.close()


def test_inode_numbers_are_of_the_version_and_stay(alice):
    view = alice.view()
    view.write("a", b"1")
    alice.flush()
    view.write("b", b"2")
    alice.flush()
    live = view.attr("a").ino
    first, second = past(alice, 2), past(alice, 3)
    numbers = [v.attr("a").ino for v in (first, second)]
    assert len({live, *numbers}) == 3
    assert len({v.attr("").ino for v in (first, second, view)}) == 3
    for v in (first, second):
        v.forget_all()
    alice.close()
    alice.start()
    assert [past(alice, n).attr("a").ino for n in (2, 3)] == numbers


def test_attributes_say_which_version_it_is(alice):
    view = alice.view()
    view.write("a", b"1")
    alice.flush()
    cid = alice.world.run(alice.fs.getxattr, view.attr("a").ino, b"user.meshkit.cid")
    root = alice.share().base.root
    view.write("a", b"22")
    alice.flush()
    old = past(alice, 2)

    def ask(ino, name):
        return alice.world.run(alice.fs.getxattr, ino, b"user.meshkit." + name)

    assert ask(old.attr("a").ino, b"cid") == cid
    assert ask(old.attr("a").ino, b"version") == b"2"
    assert ask(view.attr("a").ino, b"version") == b"3"
    assert ask(old.attr("a").ino, b"rights") == b"list,read"
    assert ask(old.attr("a").ino, b"reason") == b"ok"
    old.listdir("")
    assert ask(old.attr("").ino, b"cid") == cid_text(root).encode()
    assert old.attr("").mtime_ns == alice.share().history.versions[1].time * 10**9


# == the directory itself ==============================================================================


def test_it_is_found_but_not_listed_and_its_name_is_taken(alice):
    view = alice.view()
    view.write("a", b"1")
    view.mkdir("d")
    assert view.listdir() == ["a", "d"]
    assert stat.S_ISDIR(view.attr(".snapshots").mode)
    with fails(errno.ENOENT):
        view.attr("d/.snapshots")
    view.mkdir("d/.snapshots")  # only the root's is taken
    for taken in (
        lambda: view.mkdir(".snapshots"),
        lambda: view.create(".snapshots"),
        lambda: view.symlink(".snapshots", b"x"),
        lambda: view.link("a", ".snapshots"),
        lambda: view.rename("a", ".snapshots"),
        lambda: view.rename("d", ".snapshots"),
    ):
        with fails(errno.EEXIST):
            taken()
    for kept in (
        lambda: view.rmdir(".snapshots"),
        lambda: view.unlink(".snapshots"),
        lambda: view.rename(".snapshots", "x"),
    ):
        with fails(errno.EACCES):
            kept()
    assert view.listdir() == ["a", "d"]


def test_a_real_entry_of_that_name_is_hidden_but_in_the_versions(alice, monkeypatch):
    view = alice.view()
    monkeypatch.setattr("meshkitfs.vfs._finder.SNAPSHOTS", b"-")  # a program that knows nothing of it
    monkeypatch.setattr("meshkitfs.vfs._listing.SNAPSHOTS", b"-")
    view.mkdir(".snapshots")
    view.write(".snapshots/mine", b"precious")
    alice.flush()
    monkeypatch.undo()
    alice.close()
    alice.start()
    assert alice.view().listdir() == []
    assert past(alice, 2).read(".snapshots/mine") == b"precious"


def test_short_names_are_links_to_the_version(alice):
    view = alice.view()
    for i in range(3):
        view.write("a", b"%d" % i)
        alice.flush()
    last = labels(alice)[-1]
    when = last.partition("-v")[0]
    iso = f"{when[:13]}:{when[13:15]}:{when[15:]}"

    def target(name):
        attr = view.attr(f".snapshots/{name}")
        assert stat.S_ISLNK(attr.mode)
        found = alice.world.run(alice.fs.readlink, attr.ino)
        assert attr.size == len(found)
        assert alice.world.run(alice.fs.getattr, attr.ino).ino == attr.ino
        alice.fs.forget(attr.ino, 1)
        return found.decode()

    assert target("v2").endswith("-v2")
    assert target("3") == target("v3")
    assert target(when[:10]) == target(when[:7]) == target(iso) == target("0s") == last
    view.forget_all()
    assert not alice.fs._snapshots._aliases
    for wrong in (
        "v99", "v0", "0", "v", "-1", "v1 ", "2026", "1999-01-01", "2026-13", "yesterday", "99w", ".git", "9999-12",
        labels(alice)[0] + "0", "2001-01-01T000000Z-v2", "v" + "9" * 16, "٣", "2026-11-25T25", "café",
    ):  # fmt: skip
        with fails(errno.ENOENT):
            view.attr(f".snapshots/{wrong}")


def test_versions_that_were_given_up_are_not_shown(alice, monkeypatch):
    view = alice.view()
    for i in range(4):
        view.write("a", b"%d" % i)
        alice.flush()
    share = alice.share()
    assert [label.rpartition("-v")[2] for label in labels(alice)] == ["1", "2", "3", "4", "5"]

    class Retained:
        seq = 10**6

        @staticmethod
        def ranges():
            return [(2, 3, 1_000_000)]

    monkeypatch.setattr(share.history, "retention", Retained())
    assert [label.rpartition("-v")[2] for label in labels(alice)] == ["1", "4", "5"]
    with fails(errno.ENOENT):
        view.attr(".snapshots/v2")


def test_a_snapshot_share_has_none(world, place, alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", b"1")
    alice.flush()
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    share = alice.share()
    node = share.tree.nodes[view.attr("d").ino]
    world.run(alice.session.book.add_snapshot, share, "d", node, "bob", Terms())
    accepted = world.run(bob.session.book.inbox.accept, "d", b"d")
    assert accepted.row.grant == "snapshot"
    with fails(errno.ENOENT):
        bob.view("d").attr(".snapshots")
    bob.close()


@pytest.mark.parametrize("lie", ["altered", "another", "none"])
def test_heads_that_lie_are_not_believed(alice, monkeypatch, lie):
    view = alice.view()
    for i in range(3):
        view.write("a", b"%d" % i)
        alice.flush()
    alice.create_share("second")
    alice.close()
    alice.start()
    view = alice.view()
    view.listdir()
    heads = alice.session.metadata.heads
    other = alice.share("second").row.share

    async def lied(share, after, upto):
        found = await heads(other if lie == "another" else share, after, upto)
        if lie == "altered":
            found[1] = found[1][:-1] + bytes([found[1][-1] ^ 1])
        return [] if lie == "none" else found

    monkeypatch.setattr(alice.session.metadata, "heads", lied)
    for look in (lambda: view.listdir(".snapshots"), lambda: view.attr(".snapshots/v2")):
        with fails(errno.EIO, "head_fork" if lie == "none" else "invalid_record"):
            look()
    assert view.read("a") == b"2"
    monkeypatch.undo()
    assert len(labels(alice)) == 4


# == read-only =========================================================================================


def test_every_write_is_erofs(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", b"1")
    view.symlink("s", b"d/a")
    alice.flush()
    old, run, fs = past(alice, 2), alice.world.run, alice.fs
    below = ".snapshots/" + old.label
    snapshots = view.attr(".snapshots").ino
    for flags in WRITES:
        with fails(errno.EROFS):
            old.open("d/a", flags)
    changes = [
        lambda: old.create("d/new"),
        lambda: old.create("new"),
        lambda: run(fs.create, old.attr("d").ino, b"a", 0o644, os.O_RDWR | os.O_CREAT),
        lambda: old.mkdir("d/new"),
        lambda: old.symlink("d/new", b"x"),
        lambda: old.link("d/a", "d/b"),
        lambda: old.unlink("d/a"),
        lambda: old.rmdir("d"),
        lambda: old.rename("d", "e"),
        lambda: view.rename(f"{below}/d/a", "out"),
        lambda: view.rename("d/a", f"{below}/in"),
        lambda: view.link("d/a", f"{below}/in"),
        lambda: old.truncate("d/a", 0),
        lambda: old.setattr("d", mode=0o700),
        lambda: old.setattr("", mode=0o700),
        lambda: old.setattr("d/a", mtime_ns=1),
        lambda: old.setattr("d/a", uid=1),
        lambda: old.setxattr("d/a", b"user.x", b"1"),
        lambda: old.removexattr("d/a", b"user.x"),
        lambda: run(fs.mkdir, snapshots, b"mine", 0o755),
        lambda: run(fs.create, snapshots, b"mine", 0o644, os.O_RDWR),
        lambda: run(fs.symlink, snapshots, b"mine", b"x"),
        lambda: run(fs.unlink, snapshots, b"v2"),
        lambda: run(fs.rmdir, snapshots, old.label.encode()),
        lambda: view.rename(below, ".snapshots/other"),
        lambda: view.rename("d", ".snapshots/other"),
        lambda: view.rename(below, "out"),
        lambda: view.setattr(".snapshots", mode=0o700),
        lambda: view.setattr(".snapshots/v2", mode=0o700),
        lambda: view.setxattr(".snapshots", b"user.x", b"1"),
        lambda: view.removexattr(".snapshots", b"user.x"),
    ]
    for i, change in enumerate(changes):
        with fails(errno.EROFS):
            change()
            raise AssertionError(i)
    with fails(errno.EXDEV):
        view.link(f"{below}/d/a", "out")
    assert view.contents() == old.contents() == {"d": None, "d/a": b"1", "s": b"d/a"}
    assert not alice.share().dirty
    assert version(alice) == 2


# == who may look ======================================================================================


def test_an_open_file_of_the_past_dies_with_the_grant(world, place, alice):
    view = alice.view()
    view.write("a", pattern(1, 400_000))
    alice.flush()
    view.write("a", b"now")
    alice.flush()
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    bob.refresh()
    old = past(bob, 2)
    ino = old.attr("a").ino
    fh = old.open("a", os.O_RDONLY)
    assert old.pread(fh, 0, 1000) == pattern(1, 400_000)[:1000]
    drain(bob)
    world.run(alice.session.book.revoke, alice.share(), "bob")
    bob.refresh()
    assert ForgetInode(ino, False) in drain(bob)
    for at in (0, 300_000):
        with fails(errno.EACCES, "share_revoked"):
            old.pread(fh, at, 1000)
    for look in (lambda: old.open("a", os.O_RDONLY), lambda: old.listdir(""), lambda: labels(bob)):
        with fails(errno.EACCES, "share_revoked"):
            look()
    assert world.run(bob.fs.getxattr, ino, b"user.meshkit.reason").startswith(b"share_revoked")
    bob.close()


def drain(device):
    found = []
    while not device.fs.invalidations.empty():
        found.append(device.fs.invalidations.get())
    return found


def test_a_member_sees_the_versions_of_the_epochs_it_has_keys_of(world, place, alice):
    story = Story(alice)
    with story as view:
        view.write("a", b"before")
    carol = Device(world, f"{place}/carol", "carol", beside=alice).start()
    alice.grant("first", carol)
    world.run(alice.session.book.revoke, alice.share(), "carol")  # a new epoch begins: version 3
    with story as view:
        view.write("a", b"after")
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    bob.refresh()
    story.check(alice)
    del story.trees[2]
    story.check(bob)
    old = past(bob, 2)
    assert old.attr("").mtime_ns  # it is listed, and says when it was
    for look in (lambda: old.listdir(""), lambda: old.read("a")):
        with fails(errno.EACCES, "version_not_granted"):
            look()
    bob.close()
    carol.close()


def test_missing_blocks_are_named(alice):
    view = alice.view()
    view.write("a", pattern(1, 400_000))
    alice.flush()
    kept = {path for path in alice.blocks.rglob("*") if path.is_file() and len(path.name) > 40}
    view.write("a", b"now")
    alice.flush()
    alice.close()
    alice.start()
    alice.view().listdir()
    old = past(alice, 2)
    fh = old.open("a", os.O_RDONLY)
    for path in sorted(kept):
        path.unlink()
    with fails(errno.EIO, "block_unavailable"):
        old.pread(fh, 0, 400_000)
    with fails(errno.EIO, "block_unavailable"):
        past(alice, 1).listdir("")
    assert alice.view().read("a") == b"now"


def test_the_past_can_be_looked_at_when_the_present_is_damaged(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", b"1")
    alice.flush()
    kept = set(alice.blocks.rglob("*"))
    view.write("d/a", b"2")
    alice.flush()
    for path in set(alice.blocks.rglob("*")) - kept:
        if len(path.name) > 40:
            path.unlink()
    alice.close()
    alice.start()
    with fails(errno.EIO, "block_unavailable"):
        alice.view().listdir()
    assert len(labels(alice)) == 3
    assert past(alice, 2).contents() == {"d": None, "d/a": b"1"}
    with fails(errno.EIO, "block_unavailable"):
        past(alice, 3).listdir("")


# == what it costs =====================================================================================


def fetches(device):
    return device.session.store.counters.gets


def test_listing_versions_fetches_no_blocks_and_asks_once_for_heads(alice, monkeypatch):
    view = alice.view()
    for i in range(5):
        view.write(f"f{i}", b"%d" % i)
        alice.flush()
    alice.close()
    alice.start()
    alice.view().listdir()
    asked = []
    heads = alice.session.metadata.heads

    async def counted(*args):
        asked.append(args)
        return await heads(*args)

    monkeypatch.setattr(alice.session.metadata, "heads", counted)
    before = fetches(alice)
    listed = labels(alice)
    assert len(listed) == 6
    assert len(asked) == 1
    looked = [alice.view().attr(f".snapshots/{label}") for label in listed]
    assert [alice.world.run(alice.fs.getattr, attr.ino).ino for attr in looked] == [a.ino for a in looked]
    labels(alice)
    assert len(asked) == 1
    assert fetches(alice) == before
    past(alice, 3).listdir("")
    assert fetches(alice) == before + 1  # the root manifest; small files are in entries


def test_attributes_of_a_version_need_no_fetch(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", pattern(1, 300_000))
    alice.flush()
    old = past(alice, 2)
    attrs = [old.attr(path) for path in ("", "d", "d/a")]
    before = fetches(alice)
    for attr in attrs:
        assert alice.world.run(alice.fs.getattr, attr.ino) == attr
    assert fetches(alice) == before


def test_a_tree_goes_when_the_kernel_forgets_it(alice):
    view = alice.view()
    view.mkdir("d")
    for i in range(3):
        view.write(f"d/{i}", b"x" * i)
        alice.flush()
    share = alice.share()
    views = [past(alice, n) for n in (2, 3, 4)]
    for v in views:
        v.walk()
    assert sum(shown.tree is not None for shown in share.past._views.values()) == 3
    fh = views[0].open("d/0", os.O_RDONLY)
    for v in views:
        v.forget_all()
    known = [shown.version.number for shown in share.past._views.values()]
    assert known == [2]  # a file of it is open
    assert views[0].pread(fh, 0, 10) == b""
    views[0].release(fh)
    views[0].attr("d")
    views[0].forget_all()
    assert len(share.past) == 0
    assert not any(isinstance(known, _past.PastShare) for known in alice.fs._shares.values())


def test_with_many_trees_the_kernel_is_asked_to_forget_the_oldest(alice, monkeypatch):
    monkeypatch.setattr(_past, "KEPT_TREES", 2)
    view = alice.view()
    for i in range(3):
        view.write("a", b"%d" % i)
        alice.flush()
    drain(alice)
    views = [past(alice, n) for n in (1, 2, 3)]
    inside = view.attr(".snapshots").ino
    for v in views[:2]:
        v.listdir("")
    assert drain(alice) == []
    views[0].attr("")
    views[2].listdir("")
    assert drain(alice) == [ForgetEntry(inside, views[1].label.encode(), 0)]


# == names of versions =================================================================================


def at(year, month, day, hour=0, minute=0, second=0):
    import calendar

    return calendar.timegm((year, month, day, hour, minute, second))


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("2026-11", at(2026, 12, 1) - 1),
        ("2026-12", at(2027, 1, 1) - 1),
        ("2026-11-25", at(2026, 11, 26) - 1),
        ("2026-11-25T03", at(2026, 11, 25, 4) - 1),
        ("2026-11-25T03Z", at(2026, 11, 25, 4) - 1),
        ("2026-11-25T03:53Z", at(2026, 11, 25, 3, 54) - 1),
        ("2026-11-25 03:53:10", at(2026, 11, 25, 3, 53, 10)),
        ("2026-11-25T035310Z", at(2026, 11, 25, 3, 53, 10)),
        ("2026-11-25T03:53+01:00", at(2026, 11, 25, 2, 54) - 1),
        ("2026-11-25T03:53-0130", at(2026, 11, 25, 5, 24) - 1),
        ("2024-02-29", at(2024, 3, 1) - 1),
        ("2h", at(2026, 11, 25, 10)),
        ("3d", at(2026, 11, 22, 12)),
        ("0s", at(2026, 11, 25, 12)),
    ],
)
def test_a_time_means_the_end_of_what_was_written(text, until):
    moment = parse_moment(text, at(2026, 11, 25, 12))
    assert (moment.number, moment.until) == (None, until)


@pytest.mark.parametrize(("text", "number"), [("v12", 12), ("12", 12), ("v0", 0), ("2026", 2026)])
def test_a_number_means_a_version(text, number):
    assert parse_moment(text, 0) == (number, 0, "")


@pytest.mark.parametrize(
    "text",
    [
        "", "v", "V1", "now", "yesterday", "2026-13", "2026-02-30", "2026-11-25T24", "2026-11-25T03:60",
        "2026-11-25Z", "2026-11-25T03:53+99:99", "2h ago", "-3d", "1y", "v1\n", "v-1", "9999-12", "0000-01", "1e3",
        "v9999999999999999", "٣", "2026-11-25T035310Z-v", "\udc80",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(MeshkitError) as caught:
        parse_moment(text, 1_700_000_000)
    assert caught.value.code == "invalid_argument"


@given(st.integers(1, 10**9), st.integers(0, 2**53))
def test_a_label_means_its_version(number, when):
    label = version_label(number, when)
    moment = parse_moment(label, 0)
    assert (moment.number, moment.label) == (number, label)


@given(st.lists(st.integers(0, 253402300799), min_size=2))
def test_labels_sort_by_time(times):
    times.sort()
    made = [version_label(1, when) for when in times]
    assert made == sorted(made)


def test_a_slow_clock_does_not_hide_newer_versions(alice, monkeypatch):
    view = alice.view()
    clock = {"now": 1000.0}
    monkeypatch.setattr(alice.session.services, "wall", lambda: clock["now"])
    created = alice.share().history
    for moment in (5_000, 4_000, 6_000):
        clock["now"] = moment
        view.write("a", b"%d" % moment)
        alice.flush()
    alice.world.run(alice.fs.lookup, ROOT_INO, b"first")
    labels(alice)
    # Version 1 is of the real time, long after these.
    assert [v.time for v in created.kept[1:]] == [5_000, 4_000, 6_000]
    assert created.at("1970-01-01T01:25Z", 0).number == 3  # the newest of those up to then
    assert created.at("1970-01-01T01:08Z", 0).number == 3
    with pytest.raises(MeshkitError, match="version_not_found"):
        created.at("1970-01-01T00:10Z", 0)
    assert created.at("0s", int(time.time()) + 10).number == 4


def test_places_that_may_be_gone(tmp_path, monkeypatch):
    point = tmp_path / "mnt"
    (point / "first/d").mkdir(parents=True)

    def meant(text):
        return past_path(text, [point])

    assert meant("first/gone") == "first/gone"
    assert meant(f"{point}/first/gone") == "first/gone"
    monkeypatch.chdir(point)
    assert meant("first/gone") == "first/gone"
    monkeypatch.chdir(point / "first/d")
    assert meant("gone") == "first/d/gone"
    assert meant("../gone") == "first/gone"
    assert meant(f"{point}/first/gone") == "first/gone"
    assert meant("/elsewhere") == "/elsewhere"
    (point / "first/d").rmdir()
    assert meant("first/gone") == "first/gone"


# == the history of a path =============================================================================


def call(device, method, progress=None, **params):
    return device.world.run(Service(device.session).call, method, params, progress)


def history(device, path, **params):
    """(version, what, size) of each row, newest first."""
    rows = call(device, "history", path=f"first/{path}".rstrip("/"), **params)["versions"]
    return [(row["version"], row["what"], row["size"]) for row in rows]


def restore(device, path, at, to=None, progress=None):
    params = {"path": f"first/{path}".rstrip("/"), "at": at}
    if to is not None:
        params["to"] = f"first/{to}"
    return call(device, "restore", progress, **params)


@contextlib.contextmanager
def refused(code):
    with pytest.raises(MeshkitError) as caught:
        yield caught
    assert caught.value.code == code, caught.value


def test_the_history_of_a_path_says_what_happened_to_it(alice):
    view = alice.view()

    def step(change, *args, **named):
        change(*args, **named)
        alice.flush()

    step(view.mkdir, "d")  # 2
    step(view.write, "d/a", b"1")  # 3
    step(view.write, "other", b"1")  # 4
    step(view.write, "d/a", b"22")  # 5
    step(view.setattr, "d/a", mode=0o600)  # 6
    step(view.setxattr, "d/a", b"user.x", b"1")  # 7
    step(view.rename, "d/a", "b")  # 8
    step(view.rename, "b", "d/a")  # 9
    step(view.rename, "d", "e")  # 10
    step(view.rename, "e", "d")  # 11
    step(view.unlink, "d/a")  # 12
    step(view.symlink, "d/a", b"x")  # 13
    step(view.unlink, "d/a")  # 14
    step(view.link, "other", "d/a")  # 15
    step(view.write, "other", b"333")  # 16
    step(view.unlink, "d/a")  # 17
    told = [
        (17, "removed", None), (16, "changed", 3), (15, "created", 1), (14, "removed", None), (13, "created", None),
        (12, "removed", None), (11, "moved", 2), (10, "moved", None), (9, "moved", 2), (8, "moved", None),
        (7, "attributes", 2), (6, "attributes", 2), (5, "changed", 2), (3, "created", 1),
    ]  # fmt: skip
    assert history(alice, "d/a") == told
    assert history(alice, "d/a", limit=3) == told[:3]
    answer = call(alice, "history", path="first/d/a", limit=3)
    assert answer["more"]
    assert not call(alice, "history", path="first/d/a", limit=14)["more"]
    assert answer["versions"][1] == {
        "version": 16, "name": alice.share().history.versions[15].label, "time": alice.share().history.versions[15].time,
        "writer": "alice", "what": "changed", "readable": True, "code": "", "kind": "file", "size": 3,
    }  # fmt: skip
    assert call(alice, "history", path="first/d/a")["versions"][4]["kind"] == "symlink"
    assert history(alice, "d")[-1] == (2, "created", None)
    assert [version for version, _, _ in history(alice, "")] == list(range(17, 0, -1))
    assert history(alice, "other") == [(16, "changed", 3), (4, "created", 1)]
    for nothing in ("nothing", "d/a/b", "other/x", "d/nothing/x"):
        with refused("path_not_found"):
            history(alice, nothing)
    with refused("share_not_found"):
        call(alice, "history", path="second/d")
    for wrong in (-1, True, "5"):
        with refused("invalid_argument"):
            history(alice, "d", limit=wrong)


def test_a_file_replaced_by_rename_was_changed(alice):
    view = alice.view()
    view.write("a", b"1")
    alice.flush()
    view.write("a.new", b"two")
    view.rename("a.new", "a")
    alice.flush()
    assert history(alice, "a") == [(3, "changed", 3), (2, "created", 1)]


def test_the_writers_are_named(world, place, alice):
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    alice.view().write("a", b"1")
    alice.flush()
    bob.refresh()
    bob.view().write("a", b"22")
    bob.flush()
    alice.refresh()
    for device in (alice, bob):
        rows = call(device, "history", path="first/a")["versions"]
        assert [row["writer"] for row in rows] == ["bob", "alice"]
    bob.close()


def test_what_cannot_be_read_is_said_once(world, place, alice):
    view = alice.view()
    for i in range(3):
        view.write("a", b"%d" % i)
        alice.flush()
    carol = Device(world, f"{place}/carol", "carol", beside=alice).start()
    alice.grant("first", carol)
    world.run(alice.session.book.revoke, alice.share(), "carol")  # version 5
    view.write("a", b"new")
    alice.flush()
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    bob.refresh()
    rows = call(bob, "history", path="first/a")["versions"]
    assert [
        (row["version"], row.get("first"), row["what"], row["readable"], row["code"]) for row in rows
    ] == [
        (6, None, "changed", True, ""),
        (4, 1, "unreadable", False, "version_not_granted"),
        (5, None, "oldest", True, ""),
    ]
    with refused("version_not_granted"):
        restore(bob, "a", "v2")
    bob.close()
    carol.close()


def test_a_path_s_history_reads_only_what_differs(alice):
    view = alice.view()
    view.mkdir("deep")
    view.mkdir("deep/er")
    view.write("deep/er/file", b"1")
    view.mkdir("many")
    for i in range(600):
        view.write(f"many/{i:04}", b"")
    for name in ("w", "x", "y", "z"):
        view.mkdir(name)
        for i in range(70):
            view.write(f"{name}/{i}", b"")
    alice.flush()
    for i in range(10):
        view.write("w/1", b"%d" % i)  # elsewhere
        alice.flush()
    view.write("deep/er/file", b"2")
    view.write("many/0300", b"1")
    alice.flush()
    alice.close()
    alice.start()
    alice.view().listdir()
    before = fetches(alice)
    assert history(alice, "deep/er/file") == [(13, "changed", 1), (2, "created", 1)]
    # The root of each of the 13 versions, and twice two directories.
    assert fetches(alice) - before == 13 + 4
    before = fetches(alice)
    assert history(alice, "many/0300") == [(13, "changed", 1), (2, "created", 0)]
    # Roots; twice the directory and the page the name is in; what made it appear compares versions 1 and 2 whole.
    assert fetches(alice) - before == 13 + 4


# == bringing back =====================================================================================


def test_a_file_is_brought_back_under_its_inode(alice):
    view = alice.view()
    old = pattern(1, 700_000)
    view.write("a", old)
    view.setattr("a", mode=0o640, mtime_ns=1_234_567_890_000_000_000)
    view.setxattr("a", b"user.x", b"old")
    alice.flush()
    was = view.walk()["a"]
    fh = view.open("a", os.O_RDWR)
    view.write("a", b"new")
    view.setattr("a", mode=0o600)
    view.setxattr("a", b"user.y", b"new")
    drain(alice)
    done = restore(alice, "a", "v2")  # what was not published yet is, as version 3
    assert (done["files"], done["directories"], done["same"], done["replaced"]) == (1, 0, 0, 3)
    assert (done["version"], done["path"], done["to"]) == (2, "first/a", "first/a")
    assert ForgetInode(was.ino, False) in drain(alice)
    assert view.pread(fh, 0, 1 << 20) == old
    assert view.walk()["a"] == was
    assert not alice.share().dirty
    assert past(alice, 3).read("a") == b"new"
    # The open handle goes on writing into what came back.
    view.pwrite(fh, 0, b"edited")
    view.pwrite(fh, 400_000, b"edited")
    view.release(fh)
    alice.flush()
    alice.close()
    alice.start()
    edited = bytearray(old)
    edited[:6] = edited[400_000:400_006] = b"edited"
    assert alice.view().read("a") == bytes(edited)
    assert past(alice, 4).read("a") == old
    assert restore(alice, "a", "v4")["files"] == 1
    for when in ("v6", "v4", "v2"):
        again = restore(alice, "a", when)
        assert (again["files"], again["same"]) == (0, 1)
    assert version(alice) == 6


def test_content_that_looks_alike_is_compared(alice):
    """Of the same size and time, and still not the same."""
    view = alice.view()
    for name, size in (("small", 10), ("large", 200_000)):
        for seed in (1, 2):
            view.write(name, pattern(seed, size))
            view.setattr(name, mtime_ns=10**18)
            alice.flush()
    kept = set(alice.blocks.rglob("*"))
    view.write("damaged", b"1")
    alice.flush()
    view.setattr("damaged", mtime_ns=10**18)
    alice.flush()
    view.write("damaged", b"2")
    view.setattr("damaged", mtime_ns=10**18)
    alice.flush()
    view.forget_all()
    ref = alice.share().tree.root.children[b"damaged"].ref
    (found,) = [
        path
        for path in set(alice.blocks.rglob("*")) - kept
        if ref[:32].hex() in path.name or cid_text(ref[:32]) in path.name
    ]
    found.unlink()
    done = restore(alice, "", "v7")
    assert done["files"] == 1
    assert view.read("damaged") == b"1"
    for number, name, size in ((2, "small", 10), (4, "large", 200_000)):
        assert restore(alice, name, f"v{number}")["files"] == 1
        assert view.read(name) == pattern(1, size)


def test_no_block_is_copied(alice):
    view = alice.view()
    view.mkdir("d")
    for i in range(4):
        view.write(f"d/{i}", pattern(i, 3_000_000))
    alice.flush()
    view.remove_tree("d")
    alice.flush()
    puts, gets = alice.session.store.counters.puts, fetches(alice)
    assert restore(alice, "d", "v2")["files"] == 4
    # Manifests of four files, of their directory and of the root.
    assert alice.session.store.counters.puts - puts == 6
    assert fetches(alice) - gets == 6
    assert alice.view().read("d/3") == pattern(3, 3_000_000)


def test_a_file_with_index_blocks_comes_back(alice):
    view = alice.view()
    size = (REFS_PER_INDEX + 3) * 65536
    view.write("film", b"start")
    view.truncate("film", size)
    fh = view.open("film", os.O_RDWR)
    view.pwrite(fh, REFS_PER_INDEX * 65536 + 10, b"in the second segment")
    alice.flush()
    blocks = view.attr("film").blocks
    view.truncate("film", 3)
    view.pwrite(fh, 1, b"x")
    restore(alice, "film", "v2")
    restore(alice, "film", "v2", to="again")
    alice.close()
    alice.start()
    view = alice.view()
    for name in ("film", "again"):
        assert (view.attr(name).size, view.attr(name).blocks) == (size, blocks)
        fh = view.open(name, os.O_RDWR)
        assert view.pread(fh, REFS_PER_INDEX * 65536, 40)[10:31] == b"in the second segment"
        view.pwrite(fh, 5, b"ed")
        view.release(fh)
    alice.flush()
    alice.close()
    alice.start()
    view = alice.view()
    for name in ("film", "again"):
        fh = view.open(name, os.O_RDONLY)
        assert view.pread(fh, 0, 8) == b"started\0"
        assert view.pread(fh, REFS_PER_INDEX * 65536, 40)[10:31] == b"in the second segment"


def test_a_tree_comes_back_and_what_is_newer_stays(alice):
    story = Story(alice)
    with story as view:
        view.mkdir("d", 0o750)
        view.mkdir("d/sub")
        view.write("d/sub/kept", b"kept")
        view.write("d/sub/changed", pattern(1, 200_000))
        view.write("d/gone", b"gone")
        view.symlink("d/link", b"old")
        view.write("d/twin", b"twin")
        view.link("d/twin", "d/sub/twin")
        view.write("outside", b"1")
    view.write("d/sub/changed", b"x")
    view.unlink("d/gone")
    view.unlink("d/link")
    view.symlink("d/link", b"new")
    view.unlink("d/twin")
    view.unlink("d/sub/twin")
    view.write("d/newer", b"stays")
    view.write("outside", b"22")
    view.setattr("d", mode=0o700)
    seen = []
    done = restore(alice, "d", "v2", progress=seen.append)
    assert seen[-1]["done"] == seen[-1]["total"] > 0
    now, then = plain(view.walk()), story.trees[2]
    assert now.pop("d/newer")[2] == b"stays"
    assert now.pop("outside")[2] == b"22"
    then.pop("outside")
    for path in ("d", "d/sub"):  # their times are of what happened in them
        now[path], then[path] = now[path][:3], then[path][:3]
    assert now == then
    assert view.attr("d/twin").ino == view.attr("d/sub/twin").ino
    assert (done["files"], done["symlinks"], done["directories"]) == (4, 1, 0)
    alice.close()
    alice.start()
    after = plain(alice.view().walk())
    assert after["d/twin"] == then["d/twin"]
    assert after["d/sub/changed"] == then["d/sub/changed"]


def test_a_whole_tree_that_is_gone_comes_back_with_its_times(alice):
    story = Story(alice)
    with story as view:
        view.mkdir("a")
        view.mkdir("a/b", 0o711)
        view.setxattr("a/b", b"user.x", b"1")
        for i in range(100):
            view.write(f"a/b/{i}", b"%d" % i)
        view.setattr("a/b", mtime_ns=5_000_000_000)
        view.setattr("a", mtime_ns=6_000_000_000)
    view.remove_tree("a")
    alice.flush()
    done = restore(alice, "a", "v2")
    assert (done["files"], done["directories"]) == (100, 2)
    assert plain(view.walk()) == story.trees[2]
    alice.close()
    alice.start()
    assert plain(alice.view().walk()) == story.trees[2]


def test_hard_links_then_and_now(alice):
    story = Story(alice)
    with story as view:
        for name in ("apart1", "apart2", "pair1", "pair2", "both1", "symlink1"):
            view.write(name, name.encode() * 30_000) if name != "symlink1" else view.symlink(name, b"x")
        view.unlink("pair2")
        view.link("pair1", "pair2")
        view.link("both1", "both2")
        view.link("symlink1", "symlink2")
    view.unlink("apart2")
    view.link("apart1", "apart2")  # one file of two names now
    view.unlink("pair2")  # the other name comes back
    view.write("both1", b"new")
    view.unlink("symlink2")
    restore(alice, "", "v2")
    assert plain(view.walk()) == story.trees[2]
    heads = version(alice)
    view.write("both1", b"newer")
    restore(alice, "", "v2")
    assert version(alice) == heads + 2  # what was unsent, and the restore
    alice.close()
    alice.start()
    assert plain(alice.view().walk()) == story.trees[2]


def test_missing_parents_are_made(alice):
    view = alice.view()
    view.mkdir("a", 0o750)
    view.mkdir("a/b", 0o710)
    view.write("a/b/c", b"1")
    view.write("a/b/d", b"1")
    alice.flush()
    view.remove_tree("a")
    restore(alice, "a/b/c", "v2")
    assert view.contents() == {"a": None, "a/b": None, "a/b/c": b"1"}
    assert [view.attr(path).mode & 0o777 for path in ("a", "a/b")] == [0o750, 0o710]


def test_to_another_place(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", pattern(1, 100_000))
    alice.flush()
    view.write("d/a", b"now")
    restore(alice, "d/a", "v2", to="new/place/a")
    restore(alice, "d", "v2", to="copy")
    restore(alice, "", "v2", to="all")
    assert view.read("new/place/a") == view.read("copy/a") == view.read("all/d/a") == pattern(1, 100_000)
    assert view.read("d/a") == b"now"
    # The copies are files of their own.
    view.write("copy/a", b"other")
    fh = view.open("all/d/a", os.O_RDWR)
    view.pwrite(fh, 70_000, b"edited")
    view.release(fh)
    alice.flush()
    alice.close()
    alice.start()
    view = alice.view()
    assert view.read("new/place/a") == pattern(1, 100_000)
    assert view.read("all/d/a") == pattern(1, 100_000)[:70_000] + b"edited" + pattern(1, 100_000)[70_006:]
    for taken in ("d", "d/a", "d/a/x", "copy"):
        with refused("path_exists"):
            restore(alice, "d/a", "v2", to=taken)
    with refused("path_exists"):
        call(alice, "restore", path="first/d/a", at="v2", to="first")
    for bad in (".snapshots/x", ".snapshots", "..", "x" * 256):
        with refused("invalid_name"):
            restore(alice, "d/a", "v2", to=bad)
    alice.create_share("second")
    with refused("invalid_argument"):
        call(alice, "restore", path="first/d/a", at="v2", to="second/a")


def test_the_whole_share(alice):
    story = Story(alice)
    with story as view:
        view.mkdir("d")
        view.write("d/a", b"1")
        view.write("b", b"2")
    view.remove_tree("d")
    view.write("b", b"3")
    view.write("c", b"new")
    restore(alice, "", "v2")
    assert view.contents() == {"d": None, "d/a": b"1", "b": b"2", "c": b"new"}


def test_refusals_change_nothing(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", b"1")
    view.write("d/z", b"1")
    view.write("d/zz", b"1")
    view.write("f", b"1")
    view.symlink("s", b"x")
    alice.flush()
    view.unlink("d/z")
    view.mkdir("d/z")
    view.write("d/a", b"2")
    view.write("d/zz", b"2")
    view.unlink("f")
    view.mkdir("f")
    view.unlink("s")
    view.write("s", b"file")
    alice.flush()
    before, number = view.walk(), version(alice)
    for path in ("d", "d/z", "f", "s", ""):
        with refused("path_exists"):
            restore(alice, path, "v2")
    with refused("path_not_found"):
        restore(alice, "nothing", "v2")
    with refused("path_not_found"):
        restore(alice, "d/a", "v1")
    for when in ("v99", "2001-01-01", "99w"):
        with refused("version_not_found"):
            restore(alice, "d/a", when)
    for when in ("", "yesterday", "2026-13"):
        with refused("invalid_argument"):
            restore(alice, "d/a", when)
    assert view.walk() == before
    assert version(alice) == number
    # What stood in the way can be avoided.
    assert restore(alice, "d", "v2", to="old")["files"] == 3


def test_who_may_not_write_cannot_restore(world, place, alice):
    view = alice.view()
    view.write("a", b"1")
    alice.flush()
    view.write("a", b"2")
    alice.flush()
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    alice.grant_again("first", bob, "read")
    bob.refresh()
    assert history(bob, "a") == [(3, "changed", 1), (2, "created", 1)]
    with refused("right_not_granted"):
        restore(bob, "a", "v2")
    bob.close()


def test_while_others_write_and_it_is_merged(world, place, alice):
    bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
    alice.grant("first", bob)
    view = alice.view()
    view.mkdir("d")
    for i in range(70):
        view.write(f"d/{i}", b"old %d" % i)
    alice.flush()
    for i in range(70):
        view.write(f"d/{i}", b"new")
    alice.flush()
    bob.refresh()
    theirs = bob.view()
    theirs.write("d/from bob", b"bob's")
    theirs.rename("d/5", "five")
    bob.flush()  # alice does not know yet
    restore(alice, "d", "v2")
    bob.refresh()
    for seen in (view.contents(), theirs.contents()):
        assert seen["d/from bob"] == b"bob's"
        assert seen["five"] == b"new"
        assert {seen[f"d/{i}"] for i in range(70)} == {b"old %d" % i for i in range(70)}
    assert alice.share().counters.merges == 1
    bob.close()


async def writing(device, ino):
    opened = await device.fs.open(ino, os.O_WRONLY)
    await device.fs.write(opened.fh, 0, b"unseen")
    await device.fs.release(opened.fh)


async def changing_the_mode(device, ino):
    await device.fs.setattr(ino, SetAttr(mode=0o600), None)


@pytest.mark.parametrize("change", [writing, changing_the_mode])
def test_what_changes_between_planning_and_doing_is_published_first(alice, monkeypatch, change):
    """A program saves into the file after the comparison: that too must stay in the history."""
    view = alice.view()
    view.write("a", pattern(1, 100_000))
    alice.flush()
    view.write("a", b"second")
    alice.flush()
    ino, make = view.attr("a").ino, _restore.Plan.make

    async def planned(self, path):
        await make(self, path)
        await change(alice, ino)

    monkeypatch.setattr(_restore.Plan, "make", planned)
    assert restore(alice, "a", "v2")["replaced"] == 4
    assert view.read("a") == pattern(1, 100_000)
    unseen = past(alice, 4)
    assert (unseen.read("a"), unseen.attr("a").mode & 0o777) in ((b"unseen", 0o644), (b"second", 0o600))
    assert [past(alice, n).read("a") for n in (3, 5)] == [b"second", pattern(1, 100_000)]


def test_a_write_under_way_is_waited_for(world, alice):
    """It ends before the old content comes back, is published, and is in the history."""
    view = alice.view()
    view.write("a", pattern(1, 100_000))
    alice.flush()
    view.write("a", b"second")
    alice.flush()
    fh = view.open("a", os.O_RDWR)
    node = alice.share().tree.nodes[view.attr("a").ino]

    holder = world.start(hold_until_awaited, node, alice)
    done = world.start(Service(alice.session).call, "restore", {"path": "first/a", "at": "v2"}, None)
    assert done.wait()["replaced"] == 4
    holder.wait()
    view.release(fh)
    assert [past(alice, n).read("a") for n in (3, 4, 5)] == [b"second", b"unseen", pattern(1, 100_000)]


async def hold_until_awaited(node, device):
    """Hold a file's lock as a write does that waits for a block; end that write when somebody waits for it."""
    async with device.share().changing() as tree, node.content.lock:
        while not node.content.lock.statistics().tasks_waiting:
            await trio.lowlevel.checkpoint()
        await node.content.write(device.share().grant, 0, b"unseen")
        tree.touch(node, content=True)


def test_an_open_file_that_became_another_object(alice):
    view = alice.view()
    view.write("a", pattern(1, 300_000))
    alice.flush()
    view.write("b", pattern(2, 300_000))
    view.rename("b", "a")
    fh = view.open("a", os.O_RDWR)
    view.pread(fh, 0, 10)
    restore(alice, "a", "v2")
    assert view.pread(fh, 0, 1 << 20) == pattern(1, 300_000)
    view.pwrite(fh, 70_000, b"edited")
    view.release(fh)
    alice.flush()
    alice.close()
    alice.start()
    assert alice.view().read("a") == pattern(1, 300_000)[:70_000] + b"edited" + pattern(1, 300_000)[70_006:]


def test_a_missing_block_ends_it_with_its_code(alice):
    view = alice.view()
    view.mkdir("d")
    view.write("d/a", pattern(1, 100_000))
    alice.flush()
    blocks = {path for path in alice.blocks.rglob("*") if len(path.name) > 40}
    view.remove_tree("d")
    alice.flush()
    for path in blocks:
        path.unlink()
    with refused("block_unavailable"):
        restore(alice, "d", "v2")
    assert view.contents() == {}


# == any history =======================================================================================

NAMES = st.sampled_from(["a", "b", "c"])
PLACES = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
STEPS = st.one_of(
    st.tuples(st.just("write"), PLACES, st.integers(0, 5)),
    st.tuples(st.just("mkdir"), PLACES),
    st.tuples(st.just("unlink"), PLACES),
    st.tuples(st.just("rmdir"), PLACES),
    st.tuples(st.just("rename"), PLACES, PLACES),
    st.tuples(st.just("link"), PLACES, PLACES),
    st.tuples(st.just("symlink"), PLACES),
    st.tuples(st.just("chmod"), PLACES),
    st.tuples(st.just("xattr"), PLACES),
    st.tuples(st.just("flush")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("forget")),
    st.tuples(st.just("restart")),
)
SIZES = (0, 3, 5000, 70_000, 300_000, 1_100_000)


def act(device, view, story, step, seed):
    kind, *args = step
    with contextlib.suppress(OSError):
        if kind == "write":
            view.write(args[0], pattern(seed, SIZES[args[1]]))
        elif kind in ("mkdir", "unlink", "rmdir", "rename", "link"):
            getattr(view, kind)(*args)
        elif kind == "symlink":
            view.symlink(args[0], b"target %d" % seed)
        elif kind == "chmod":
            view.setattr(args[0], mode=0o600 + seed % 64)
        elif kind == "xattr":
            view.setxattr(args[0], b"user.x", b"%d" % seed)
        elif kind == "flush":
            with story:
                pass
        elif kind == "forget":
            view.forget_all()
        else:
            with story:
                pass
            device.close()
            device.start()
            return device.view()
    return view


def in_place(device, story, number):
    """A restore of everything: what was there is as it was, and what was not is as it is."""
    before, then = device.view().walk(), story.trees[number]
    try:
        restore(device, "", f"v{number}")
    except MeshkitError as error:
        assert error.code == "path_exists"
        assert device.view().walk() == before
        assert any(
            stat.S_IFMT(before[path].mode) != stat.S_IFMT(then[path][0])
            for path in then.keys() & before.keys()
        )
        return
    after = device.view().walk()
    assert after.keys() == before.keys() | then.keys()
    for path, (mode, _, data, mtime, xattrs) in then.items():
        now = after[path]
        assert (now.mode, now.data, now.xattrs) == (mode, data, xattrs), path
        assert stat.S_ISDIR(mode) or now.mtime_ns == mtime, path
    for path in before.keys() - then.keys():
        # Another name of a file that came back has changed with it.
        if before[path].nlink == 1:
            assert after[path].data == before[path].data, path
    for path in before.keys() & after.keys():
        if before[path].nlink == 1:
            assert after[path].ino == before[path].ino, path


def tell(steps, data):
    place = scratch()
    try:
        with World() as world:
            device = Device(world, f"{place}/alice", "alice").start()
            device.create_share("first")
            story, view = Story(device), device.view()
            for seed, step in enumerate(steps):
                view = act(device, view, story, step, seed)
            with story:
                pass
            story.check()
            number = data.draw(st.sampled_from(sorted(story.trees)))
            restore(device, "", f"v{number}", to="restored")
            below = {
                path[9:]: seen
                for path, seen in plain(device.view().walk()).items()
                if path.startswith("restored/")
            }
            assert below == story.trees[number]
            in_place(device, story, data.draw(st.sampled_from(sorted(story.trees))))
            before = plain(device.view().walk())
            device.close()
            device.start()
            assert plain(device.view().walk()) == before
            story.check()
            device.close()
    finally:
        shutil.rmtree(place)


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=15, deadline=None, suppress_health_check=SLOW)
@given(st.lists(STEPS, max_size=30), st.data())
def test_short_histories(steps, data):
    tell(steps, data)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=400, deadline=None, suppress_health_check=SLOW)
@given(st.lists(STEPS, max_size=80), st.data())
def test_long_histories(steps, data):
    tell(steps, data)
