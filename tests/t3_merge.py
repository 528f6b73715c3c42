"""Two people write one share at the same time: what becomes of it, told step by step.

Nobody's changes are published before `flush`, because the clock stands still; so what is written between two
flushes was written without knowing of the other's. `settle` publishes both sides, and then both must see the
same tree, also after a restart, when nothing is left in memory or in a spool.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections import Counter
from datetime import UTC, datetime

import pytest
from devices import Device, World, pattern, scratch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from meshkitfs.errors import MeshkitError

BIG = 300 * 1024


class Play:
    """A share of alice's that she and the others may write."""

    def __init__(self, world, place, *others):
        self.world = world
        alice = Device(world, f"{place}/alice", "alice").start()
        self.devices = {"alice": alice}
        alice.create_share("first")
        for name in others:
            other = self.devices[name] = Device(world, f"{place}/{name}", name, beside=alice).start()
            alice.grant("first", other)
            other.refresh()
        self.views = {name: device.view() for name, device in self.devices.items()}

    def as_(self, name):
        return self.views[name]

    def flush(self, name):
        self.devices[name].flush()

    def restart(self, name):
        self.devices[name].close()
        self.devices[name].start()
        self.views[name] = self.devices[name].view()

    def settle(self, *order):
        """Publish everything, the first named first; then all must see the same. Returns path -> content."""
        order = order or tuple(self.devices)
        for name in order:
            self.flush(name)
        trees = []
        for name in self.devices:
            self.devices[name].refresh()
            trees.append(self.views[name].walk())
            assert not self.devices[name].share().dirty
        for tree in trees[1:]:
            assert tree == trees[0]
        names = Counter(seen.ino for seen in trees[0].values())
        for path, seen in trees[0].items():
            assert stat.S_ISDIR(seen.mode) or seen.nlink == names[seen.ino], path
        for name in self.devices:
            self.restart(name)
            assert self.views[name].walk() == trees[0]
        return {path: seen.data for path, seen in trees[0].items()}

    def heads(self):
        return [device.share().base.version for device in self.devices.values()]


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def play(world, place):
    play = Play(world, place, "bob")
    yield play
    for device in play.devices.values():
        if device.session is not None:
            device.close()


@pytest.fixture
def alice(play):
    return play.as_("alice")


@pytest.fixture
def bob(play):
    return play.as_("bob")


def today():
    return datetime.now(UTC).date().isoformat()


def conflict_of(tree, name, who):
    """The one conflict copy that ``who`` left of ``name``."""
    stem, extension = os.path.splitext(name)
    wanted = re.escape(stem) + rf" \(conflict {who} \d{{4}}-\d\d-\d\d\)" + re.escape(extension)
    found = [path for path in tree if re.fullmatch(wanted, path)]
    assert len(found) == 1, f"conflict copies of {name}: {found} among {sorted(tree)}"
    return found[0]


def start_with(play, **files):
    """Both know these files, closed and published."""
    for name, data in files.items():
        play.as_("alice").write(name, data)
    play.flush("alice")
    play.devices["bob"].refresh()
    for name in files:
        play.as_("bob").read(name)


# -- changes that do not touch each other --------------------------------------------------------------


def test_two_new_files_in_one_directory(play, alice, bob):
    alice.write("from-alice", b"a" * 100)
    bob.write("from-bob", pattern(1, BIG))
    assert play.settle() == {"from-alice": b"a" * 100, "from-bob": pattern(1, BIG)}


def test_changes_of_different_files_and_removals(play, alice, bob):
    start_with(play, one=b"1", two=b"2", three=b"3", four=b"4")
    alice.write("one", b"one by alice")
    alice.unlink("three")
    bob.write("two", b"two by bob")
    bob.unlink("four")
    assert play.settle() == {"one": b"one by alice", "two": b"two by bob"}


def test_changes_deep_in_different_directories(play, alice, bob):
    for path in ("a", "a/b", "x", "x/y"):
        alice.mkdir(path)
    alice.write("a/b/file", b"old")
    alice.write("x/y/file", b"old")
    play.flush("alice")
    assert bob.read("a/b/file") == b"old"
    alice.write("a/b/file", b"by alice")
    bob.write("x/y/file", b"by bob")
    bob.mkdir("x/y/z")
    tree = play.settle()
    assert tree["a/b/file"] == b"by alice"
    assert tree["x/y/file"] == b"by bob"
    assert "x/y/z" in tree


def test_both_work_in_a_large_directory(play, alice, bob):
    alice.mkdir("many")
    for i in range(300):
        alice.release(alice.create(f"many/{i:03}"))
    play.flush("alice")
    play.devices["bob"].refresh()
    for i in range(0, 300, 3):
        alice.write(f"many/{i:03}", b"alice")
    for i in range(1, 300, 3):
        bob.unlink(f"many/{i:03}")
    bob.write("many/new", b"bob")
    tree = play.settle()
    files = {path: data for path, data in tree.items() if path.startswith("many/")}
    assert len(files) == 201
    assert all(files[f"many/{i:03}"] == b"alice" for i in range(0, 300, 3))
    assert files["many/new"] == b"bob"


def test_one_renames_a_file_and_the_other_changes_it(play, alice, bob):
    start_with(play, draft=b"first words")
    alice.rename("draft", "final")
    bob.append("draft", b" and more")
    assert play.settle() == {"final": b"first words and more"}


def test_one_renames_a_file_and_the_other_changes_it_the_other_way_round(play, alice, bob):
    start_with(play, draft=b"first words")
    alice.rename("draft", "final")
    bob.append("draft", b" and more")
    assert play.settle("bob", "alice") == {"final": b"first words and more"}


def test_one_moves_a_directory_and_the_other_works_in_it(play, alice, bob):
    alice.mkdir("work")
    alice.mkdir("archive")
    alice.write("work/old", b"old")
    play.flush("alice")
    assert bob.read("work/old") == b"old"
    alice.rename("work", "archive/work")
    bob.write("work/new", b"new")
    bob.write("work/old", b"changed")
    tree = play.settle()
    assert tree == {
        "archive": None,
        "archive/work": None,
        "archive/work/new": b"new",
        "archive/work/old": b"changed",
    }


def test_one_moves_a_file_away_and_the_other_changes_it_in_place(play, alice, bob):
    alice.mkdir("here")
    alice.mkdir("there")
    alice.write("here/file", b"old")
    play.flush("alice")
    assert bob.read("here/file") == b"old"
    alice.rename("here/file", "there/file")
    bob.write("here/file", b"new")
    bob.setattr("here/file", mode=0o640)
    tree = play.settle()
    assert tree == {"here": None, "there": None, "there/file": b"new"}
    assert play.as_("alice").attr("there/file").mode & 0o7777 == 0o640


def test_attributes_and_content_of_one_file(play, alice, bob):
    start_with(play, file=b"old")
    alice.setattr("file", mode=0o751)
    alice.setxattr("file", b"user.from", b"alice")
    bob.write("file", b"new content")
    bob.setxattr("file", b"user.tag", b"bob")
    play.settle()
    seen = play.as_("bob").walk()["file"]
    assert seen.data == b"new content"
    assert seen.mode & 0o7777 == 0o751
    assert dict(seen.xattrs) == {b"user.from": b"alice", b"user.tag": b"bob"}


@pytest.mark.parametrize("order", [("alice", "bob"), ("bob", "alice")], ids="-".join)
def test_the_same_attribute_changed_twice_is_theirs(play, alice, bob, order):
    start_with(play, file=b"content")
    alice.mkdir("dir")
    play.flush("alice")
    play.devices["bob"].refresh()
    for name, mode, moment in (("alice", 0o600, 5_000_000_000), ("bob", 0o640, 7_000_000_000)):
        for path in ("file", "dir"):
            play.as_(name).setattr(path, mode=mode)
            play.as_(name).setxattr(path, b"user.who", name.encode())
            play.as_(name).setattr(path, mtime_ns=moment)
    play.settle(*order)
    seen = play.as_("alice").walk()
    for path in ("file", "dir"):
        assert seen[path].mode & 0o777 == (0o600 if order[0] == "alice" else 0o640)
        assert dict(seen[path].xattrs) == {b"user.who": order[0].encode()}
        assert seen[path].mtime_ns == 7_000_000_000


# -- conflicts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 20_000, BIG], ids=["inline", "block", "blocks"])
def test_the_same_file_changed_twice_keeps_both(play, alice, bob, size):
    start_with(play, **{"paper.txt": pattern(0, size)})
    alice.write("paper.txt", pattern(1, size))
    bob.write("paper.txt", pattern(2, size))
    bob.setattr("paper.txt", mode=0o600)
    tree = play.settle()
    copy = conflict_of(tree, "paper.txt", "bob")
    assert copy == f"paper (conflict bob {today()}).txt"
    assert tree == {"paper.txt": pattern(1, size), copy: pattern(2, size)}


def test_a_conflict_copy_can_be_in_conflict_again(play, alice, bob):
    """Its blocks are bound to the object it came from, and that must survive the next copy."""
    start_with(play, file=pattern(0, BIG))
    alice.write("file", pattern(1, BIG))
    bob.write("file", pattern(2, BIG))
    copy = conflict_of(play.settle(), "file", "bob")
    alice, bob = play.as_("alice"), play.as_("bob")
    alice.append(copy, b"by alice")
    bob.append(copy, b"by bob")
    tree = play.settle()
    assert tree["file"] == pattern(1, BIG)
    assert tree[copy] == pattern(2, BIG) + b"by alice"
    assert tree[conflict_of(tree, copy, "bob")] == pattern(2, BIG) + b"by bob"


def test_the_same_new_name_keeps_both(play, alice, bob):
    alice.write("new", b"alice's")
    bob.write("new", b"bob's")
    tree = play.settle()
    assert tree == {"new": b"alice's", conflict_of(tree, "new", "bob"): b"bob's"}


def test_three_of_a_kind(play, alice, bob):
    """A conflict name that is taken gets a number."""
    for round_ in range(3):
        play.as_("alice").write(f"new{round_}", b"alice")
        play.as_("bob").write(f"new{round_}", b"bob")
    taken = f"new1 (conflict bob {today()})"
    play.as_("alice").write(taken, b"in the way")
    tree = play.settle()
    assert tree[taken] == b"in the way"
    assert tree[f"new1 (conflict bob {today()} 2)"] == b"bob"


def test_both_save_by_renaming_over(play, alice, bob):
    """As editors do: on both sides the old object is gone and a new one has its name."""
    start_with(play, file=b"old")
    for view, data in ((alice, b"by alice"), (bob, b"by bob")):
        view.write(".file.swp", data)
        view.rename(".file.swp", "file")
    tree = play.settle()
    assert tree == {"file": b"by alice", conflict_of(tree, "file", "bob"): b"by bob"}


@pytest.mark.parametrize("editor", ["alice", "bob"])
def test_one_saves_by_renaming_over_what_the_other_changes_in_place(play, alice, bob, editor):
    start_with(play, file=b"old")
    writer, saver = (alice, bob) if editor == "alice" else (bob, alice)
    writer.write("file", b"in place")
    saver.write("tmp", b"renamed over")
    saver.rename("tmp", "file")
    tree = play.settle()
    copy = conflict_of(tree, "file", "bob")
    assert sorted(tree) == sorted(["file", copy])
    assert {tree["file"], tree[copy]} == {b"in place", b"renamed over"}
    assert tree["file"] == (b"in place" if editor == "alice" else b"renamed over")


@pytest.mark.parametrize("first", ["alice", "bob"])
def test_a_removed_file_that_was_changed_lives(play, alice, bob, first):
    start_with(play, file=b"old")
    alice.unlink("file")
    bob.write("file", b"still needed")
    order = (first, "bob" if first == "alice" else "alice")
    assert play.settle(*order) == {"file": b"still needed"}


@pytest.mark.parametrize("first", ["alice", "bob"])
def test_a_removed_tree_keeps_what_was_changed_in_it(play, alice, bob, first):
    alice.mkdir("tree")
    alice.mkdir("tree/deep")
    alice.write("tree/deep/changed", b"old")
    alice.write("tree/deep/untouched", b"old")
    alice.write("tree/other", b"old")
    play.flush("alice")
    assert bob.read("tree/deep/changed") == b"old"
    for path in ("tree/deep/changed", "tree/deep/untouched", "tree/other"):
        alice.unlink(path)
    alice.rmdir("tree/deep")
    alice.rmdir("tree")
    bob.write("tree/deep/changed", b"needed")
    bob.write("tree/deep/new", b"new")
    order = (first, "bob" if first == "alice" else "alice")
    tree = play.settle(*order)
    assert tree == {"tree": None, "tree/deep": None, "tree/deep/changed": b"needed", "tree/deep/new": b"new"}


def test_both_rename_a_file_to_different_names(play, alice, bob):
    start_with(play, file=b"content")
    alice.rename("file", "by-alice")
    bob.rename("file", "by-bob")
    tree = play.settle()
    assert tree == {"by-alice": b"content"}


def test_both_rename_and_change_a_file(play, alice, bob):
    start_with(play, file=b"content")
    alice.rename("file", "by-alice")
    alice.append("by-alice", b" a")
    bob.rename("file", "by-bob")
    bob.append("by-bob", b" b")
    tree = play.settle()
    assert sorted(tree.values()) == [b"content a", b"content b"]


def test_both_move_a_directory_and_work_in_it(play, alice, bob):
    alice.mkdir("dir")
    alice.write("dir/file", b"content")
    play.flush("alice")
    assert bob.read("dir/file") == b"content"
    alice.rename("dir", "to-alice")
    alice.write("to-alice/a", b"a")
    bob.rename("dir", "to-bob")
    bob.write("to-bob/b", b"b")
    tree = play.settle()
    assert tree == {"to-alice": None, "to-alice/a": b"a", "to-alice/b": b"b", "to-alice/file": b"content"}


def test_directories_moved_into_each_other(play, alice, bob):
    for name in ("left", "right"):
        alice.mkdir(name)
        alice.write(f"{name}/file", name.encode())
    play.flush("alice")
    assert bob.read("left/file") == b"left"
    assert bob.read("right/file") == b"right"
    alice.rename("left", "right/left")
    bob.rename("right", "left/right")
    tree = play.settle()
    assert sorted(data for data in tree.values() if data is not None) == [b"left", b"right"]


def test_both_make_the_same_directory(play, alice, bob):
    for view, name in ((alice, "alice"), (bob, "bob")):
        view.mkdir("new")
        view.mkdir("new/deep")
        view.write(f"new/deep/{name}", name.encode())
        view.write("new/same", name.encode())
    tree = play.settle()
    copy = conflict_of({path[4:]: 0 for path in tree if path.startswith("new/")}, "same", "bob")
    assert tree == {
        "new": None,
        "new/deep": None,
        "new/deep/alice": b"alice",
        "new/deep/bob": b"bob",
        "new/same": b"alice",
        f"new/{copy}": b"bob",
    }


def test_a_file_here_and_a_directory_there(play, alice, bob):
    alice.write("name", b"a file")
    bob.mkdir("name")
    bob.write("name/inside", b"in it")
    tree = play.settle()
    copy = conflict_of([path for path in tree if "/" not in path], "name", "bob")
    assert tree == {"name": b"a file", copy: None, f"{copy}/inside": b"in it"}


def test_symlinks(play, alice, bob):
    alice.symlink("link", b"to alice")
    bob.symlink("link", b"to bob")
    bob.symlink("other", b"elsewhere")
    tree = play.settle()
    assert tree == {"link": b"to alice", conflict_of(tree, "link", "bob"): b"to bob", "other": b"elsewhere"}


# -- hard links --------------------------------------------------------------------------------------------


def test_both_link_the_same_file(play, alice, bob):
    start_with(play, file=b"content")
    alice.link("file", "by-alice")
    bob.link("file", "by-bob")
    assert play.settle() == dict.fromkeys(("file", "by-alice", "by-bob"), b"content")
    seen = play.as_("alice").walk()
    assert {entry.ino for entry in seen.values()} == {seen["file"].ino}
    assert [entry.nlink for entry in seen.values()] == [3, 3, 3]


def test_one_links_a_file_and_the_other_changes_it(play, alice, bob):
    start_with(play, file=b"content")
    alice.link("file", "second")
    bob.write("file", b"changed")
    assert play.settle() == {"file": b"changed", "second": b"changed"}


def test_one_links_a_file_and_the_other_renames_it(play, alice, bob):
    start_with(play, file=b"content")
    alice.link("file", "second")
    bob.rename("file", "renamed")
    tree = play.settle()
    assert tree == {"renamed": b"content", "second": b"content"}
    assert {entry.nlink for entry in play.as_("bob").walk().values()} == {2}


def test_a_linked_file_changed_twice_keeps_both(play, alice, bob):
    start_with(play, file=b"content")
    alice.link("file", "second")
    play.flush("alice")
    assert bob.read("second") == b"content"
    alice.write("file", b"by alice")
    bob.write("second", b"by bob")
    tree = play.settle()
    assert tree["file"] == tree["second"] == b"by alice"
    assert sorted(tree.values()) == [b"by alice", b"by alice", b"by bob"]


def test_names_of_a_linked_file_come_and_go(play, alice, bob):
    start_with(play, file=b"content")
    for name in ("a", "b", "c"):
        alice.link("file", name)
    play.flush("alice")
    play.devices["bob"].refresh()
    alice.unlink("a")
    alice.unlink("b")
    alice.link("file", "d")
    bob.unlink("b")
    bob.unlink("c")
    bob.link("file", "e")
    tree = play.settle()
    assert sorted(tree) == ["d", "e", "file"]
    assert {entry.nlink for entry in play.as_("alice").walk().values()} == {3}


@pytest.mark.parametrize("how", ["unlink", "replace"])
def test_each_removes_the_name_that_the_other_kept(play, alice, bob, how):
    start_with(play, file=b"content", other=b"other")
    alice.link("file", "second")
    play.flush("alice")
    play.devices["bob"].refresh()
    alice.unlink("file")
    if how == "unlink":
        bob.unlink("second")
    else:
        bob.rename("other", "second")
    tree = play.settle("alice", "bob")
    assert b"content" in tree.values()
    assert b"other" in tree.values()
    assert "second" in tree
    assert all(entry.nlink == 1 for entry in play.as_("alice").walk().values())


def test_all_names_removed_here_and_the_content_changed_there(play, alice, bob):
    start_with(play, file=b"content")
    alice.link("file", "second")
    play.flush("alice")
    play.devices["bob"].refresh()
    alice.unlink("file")
    alice.unlink("second")
    bob.write("file", b"needed")
    tree = play.settle()
    assert set(tree.values()) == {b"needed"}
    assert {entry.nlink for entry in play.as_("alice").walk().values()} == {len(tree)}


# -- what is open, and what the kernel knows -----------------------------------------------------------------


def test_an_open_file_shows_what_the_other_published(play, alice, bob):
    start_with(play, file=b"old content")
    fh = bob.open("file", os.O_RDONLY)
    assert bob.pread(fh, 0, 100) == b"old content"
    alice.write("file", b"new")
    play.flush("alice")
    play.devices["bob"].refresh()
    assert bob.pread(fh, 0, 100) == b"new"
    bob.release(fh)


def test_an_open_file_outlives_its_removal_by_another(play, alice, bob):
    start_with(play, file=pattern(5, BIG))
    fh = bob.open("file", os.O_RDONLY)
    alice.unlink("file")
    play.flush("alice")
    play.devices["bob"].refresh()
    with pytest.raises(OSError) as gone:
        bob.attr("file")
    assert gone.value.errno == errno.ENOENT
    assert bob.pread(fh, 0, 1 << 20) == pattern(5, BIG)
    bob.release(fh)


def test_a_file_that_was_moved_by_another_is_found(play, alice, bob):
    """Bob's kernel still knows the inode by its old name, and the new place was never loaded."""
    alice.mkdir("there")
    alice.mkdir("there/deep")
    alice.write("file", b"content")
    play.flush("alice")
    fh = bob.open("file", os.O_RDONLY)
    ino = bob.attr("file").ino
    alice.rename("file", "there/deep/file")
    play.flush("alice")
    play.devices["bob"].refresh()
    assert bob.read("there/deep/file") == b"content"
    assert bob.attr("there/deep/file").ino == ino
    assert bob.pread(fh, 0, 100) == b"content"
    bob.release(fh)


def test_a_directory_that_was_moved_by_another_is_found(play, alice, bob):
    for path in ("there", "there/deep", "dir"):
        alice.mkdir(path)
    alice.write("dir/file", b"content")
    play.flush("alice")
    assert bob.read("dir/file") == b"content"
    alice.rename("dir", "there/deep/dir")
    play.flush("alice")
    play.devices["bob"].refresh()
    assert bob.read("there/deep/dir/file") == b"content"
    bob.write("there/deep/dir/file", b"and on")
    assert play.settle()["there/deep/dir/file"] == b"and on"


def test_a_write_after_a_merge_goes_where_it_should(play, alice, bob):
    """The handle was opened before the merge; the file was renamed in it."""
    start_with(play, file=b"0123456789")
    fh = bob.open("file")
    alice.rename("file", "renamed")
    play.flush("alice")
    play.devices["bob"].refresh()
    bob.pwrite(fh, 3, b"xyz")
    bob.fsync(fh)
    bob.release(fh)
    assert play.settle() == {"renamed": b"012xyz6789"}


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_a_write_to_a_file_that_another_took_away_says_so(play, alice, bob, how):
    """It would be acknowledged, and nobody would ever find it."""
    alice.mkdir("unseen")
    start_with(play, file=b"content")
    bob.forget_all()
    fh = bob.open("file")
    if how == "removed":
        alice.unlink("file")
    else:
        alice.write("other", b"other")
        alice.rename(*(("other", "file") if how == "replaced" else ("file", "unseen/file")))
    play.flush("alice")
    play.devices["bob"].refresh()
    assert bob.pread(fh, 0, 100) == b"content"
    with pytest.raises(OSError) as stale:
        bob.pwrite(fh, 0, b"into the void")
    assert stale.value.errno == errno.ESTALE
    bob.release(fh)
    play.settle()


def test_a_write_to_a_file_that_was_removed_here_is_what_a_program_expects(play, alice, bob):
    start_with(play, file=b"content")
    fh = bob.open("file")
    bob.unlink("file")
    bob.pwrite(fh, 0, b"temporary")
    bob.fsync(fh)
    assert bob.pread(fh, 0, 100) == b"temporary"
    bob.release(fh)
    assert play.settle() == {}


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("theirs", ["nothing of it", "its attributes", "its target"])
def test_a_symlink_that_was_restored(play, alice, bob, links, theirs):
    """Only restoring changes the target of a symlink; a merge keeps it as it keeps what was written to a file."""
    alice.symlink("link", b"old")
    if links > 1:
        alice.link("link", "second")
    play.flush("alice")
    point(play, "alice", b"new")
    play.flush("alice")
    play.devices["bob"].refresh()
    bob.write("file", b"bob's")
    if theirs == "its attributes":
        bob.setattr("link", mtime_ns=10**18)
    elif theirs == "its target":
        point(play, "bob", b"bob's")
    play.flush("bob")
    point(play, "alice", b"old")
    tree = play.settle("alice")
    assert tree.pop("file") == b"bob's"
    names = {"link", "second"} if links > 1 else {"link"}
    if theirs == "its target":
        assert {tree.pop(name) for name in names} == {b"bob's"}
        assert list(tree.values()) == [b"old"]
    else:
        assert tree == dict.fromkeys(names, b"old")


def point(play, name, target):
    """Change the target of the symlink, under its inode, as restoring does."""
    device = play.devices[name]

    async def change():
        share = device.share()
        grant = await share.use("write")
        async with share.changing() as tree:
            if tree.links.children is None:
                await tree.load(grant, tree.links)
            node = tree.node_of(tree.root, b"link")
            node.target = target
            tree.touch(node)

    play.world.run(change)


# -- when something fails on the way -------------------------------------------------------------------------


def test_a_merge_that_cannot_read_everything_changes_nothing(play, alice, bob):
    """It is tried again later, and then nothing of either side is missing."""
    for path in ("dir", "dir/sub"):
        alice.mkdir(path)
    alice.write("dir/sub/file", b"old")
    play.flush("alice")
    assert bob.read("dir/sub/file") == b"old"
    alice.write("dir/sub/file", b"by alice")
    alice.write("dir/alice", b"alice")
    play.flush("alice")
    # Bob works on without having seen that, in the directories that will be merged.
    bob_share = play.devices["bob"].share()
    store = bob_share.services.reader.store
    real, allowed = store.get, [0]

    async def get(digest):
        if allowed[0] <= 0:
            raise MeshkitError("block_unavailable", "away")
        allowed[0] -= 1
        return await real(digest)

    store.get = get
    # Each time one more of the reads that the merge needs succeeds.
    failures = 0
    tree = bob_share.tree
    before = {}
    for enough in range(20):
        allowed[0] = 10**6
        if not failures:
            create_without_looking(play, "dir", b"bob", b"bob")
            create_without_looking(play, "dir/sub", b"bob2", b"bob2")
        allowed[0] = enough
        try:
            play.flush("bob")
        except MeshkitError as error:
            assert error.code == "block_unavailable"
            failures += 1
            names = {ino: set(getattr(node, "children", None) or ()) for ino, node in tree.nodes.items()}
            assert not before or names == before, "a failed merge changed the tree"
            before = names
            continue
        break
    assert failures > 1, "nothing failed, so nothing was tested"
    store.get = real
    assert play.settle() == {
        "dir": None,
        "dir/sub": None,
        "dir/alice": b"alice",
        "dir/bob": b"bob",
        "dir/sub/bob2": b"bob2",
        "dir/sub/file": b"by alice",
    }


def create_without_looking(play, directory, name, data):
    """Make a file as a handler would that had its directory just before somebody else published."""
    device = play.devices["bob"]
    share = device.share()
    ino = share.tree.root.ino
    for part in directory.split("/"):
        children = next(node for node in share.tree.nodes.values() if node.ino == ino).children
        ino = children[part.encode()].ino
    parent = share.tree.nodes[ino]

    async def make():
        grant = share.live("write")
        async with share.changing() as tree:
            node = tree.new_file(0o644)
            tree.create(parent, name, node)
            await (await tree.content(grant, node)).write(grant, 0, data)
            tree.touch(node, content=True)

    device.world.run(make)


def test_publication_whose_answer_was_lost_is_no_conflict_with_oneself(play, alice, bob):
    start_with(play, file=b"old")
    metadata = play.devices["alice"].session.metadata
    real = metadata.publish

    async def publish(publication):
        await real(publication)
        raise MeshkitError("metadata_unavailable", "the answer was lost")

    services = play.devices["alice"].share().services
    metadata.publish = publish
    alice.write("file", b"second")
    alice.write("other", b"other")
    with pytest.raises(MeshkitError):
        play.flush("alice")
    assert services.metadata is metadata
    metadata.publish = real
    alice.write("file", b"third")
    assert play.settle() == {"file": b"third", "other": b"other"}


def test_the_same_with_a_crash_and_somebody_else_in_between(play, alice, bob):
    start_with(play, file=b"old")
    metadata = play.devices["alice"].session.metadata
    real = metadata.publish

    async def publish(publication):
        await real(publication)
        raise MeshkitError("metadata_unavailable", "the answer was lost")

    metadata.publish = publish
    alice.write("file", b"second")
    with pytest.raises(MeshkitError):
        play.flush("alice")
    play.devices["alice"].crash()
    bob.append("file", b" and bob's")
    play.flush("bob")
    play.devices["alice"].start()
    play.views["alice"] = play.devices["alice"].view()
    play.as_("alice").append("file", b" and third")
    assert play.settle() == {"file": b"second and bob's and third"}


def test_changes_of_somebody_who_may_no_longer_write_are_kept_until_he_may_again(play, alice, bob):
    start_with(play, file=b"old")
    bob.write("bobs", b"not published in time")
    bob.write("file", b"by bob")
    play.devices["alice"].grant_again("first", play.devices["bob"], "read")
    alice.write("other", b"by alice")
    play.flush("alice")
    with pytest.raises(MeshkitError) as refused:
        play.flush("bob")
    assert refused.value.code == "right_not_granted"
    assert bob.read("bobs") == b"not published in time"
    assert bob.read("file") == b"by bob"
    assert alice.contents() == {"file": b"old", "other": b"by alice"}
    play.devices["alice"].grant_again("first", play.devices["bob"], "read", "write")
    assert play.settle() == {"file": b"by bob", "bobs": b"not published in time", "other": b"by alice"}


@pytest.mark.parametrize("change", ["write", "append", "truncate"])
def test_the_first_hard_link_of_all_and_a_change_of_that_file(play, alice, bob, change):
    start_with(play, file=b"old")
    bob.link("file", "second")
    {
        "write": lambda: alice.write("file", b"new"),
        "append": lambda: alice.append("file", b" and new"),
        "truncate": lambda: alice.truncate("file", 1),
    }[change]()
    play.flush("alice")
    expected = alice.read("file")
    assert expected != b"old"
    assert play.settle("alice", "bob") == {"file": expected, "second": expected}


def test_three_people(world, place):
    play = Play(world, place, "bob", "carol")
    alice, bob, carol = (play.as_(name) for name in ("alice", "bob", "carol"))
    alice.write("file", b"0")
    play.flush("alice")
    for view in (bob, carol):
        assert view.read("file") == b"0"
    alice.write("file", b"alice")
    bob.write("file", b"bob")
    carol.write("file", b"carol")
    carol.write("more", b"more")
    tree = play.settle()
    assert tree == {
        "file": b"alice",
        conflict_of(tree, "file", "bob"): b"bob",
        conflict_of(tree, "file", "carol"): b"carol",
        "more": b"more",
    }
    for device in play.devices.values():
        device.close()


# -- any changes at all ------------------------------------------------------------------------------

sides = st.sampled_from(("alice", "bob"))
names = st.sampled_from(("a", "b", "c", "d"))
picks = st.integers(0, 1 << 16)
sizes = st.sampled_from((0, 10, 50, 20_000, 70_000, BIG))


class Model(RuleBasedStateMachine):
    """Two people do anything. In the end both see the same, and nothing that was acknowledged is missing.

    Every write has a content of its own. One may be missing in the end only if somebody who saw it removed
    or overwrote it.
    """

    def __init__(self):
        super().__init__()
        self.place = scratch()
        self.world = World()
        self.play = Play(self.world, self.place, "bob")
        self.number = 0
        self.acknowledged = set()
        self.removed = set()
        self.work = 0

    def teardown(self):
        try:
            if all(device.session is not None for device in self.play.devices.values()):
                self.settle(["alice", "bob"])
                for device in self.play.devices.values():
                    device.close()
        finally:
            try:
                self.world.close()
            finally:
                shutil.rmtree(self.place, ignore_errors=True)

    def data(self, size):
        self.number += 1
        return f"<{self.number}>".encode() + pattern(self.number, size)

    def visible(self, side):
        return {data for data in self.play.as_(side).contents().values() if data}

    def act(self, side, call):
        """Do something as ``side``, up to date with what is published; note what it removes thereby."""
        self.play.devices[side].refresh()
        before = self.visible(side)
        call(self.play.as_(side))
        self.removed |= before - self.visible(side)
        self.work += 1

    def pick(self, side, number, *kinds):
        found = sorted(
            path for path, seen in self.play.as_(side).walk().items() if stat.S_IFMT(seen.mode) in kinds
        )
        return found[number % len(found)] if found else None

    def new_path(self, side, number, name):
        directory = self.pick(side, number, stat.S_IFDIR) if number % 3 else None
        return f"{directory}/{name}" if directory and directory.count("/") < 3 else name

    def free(self, side, path):
        try:
            self.play.as_(side).attr(path)
        except OSError:
            return True
        return False

    @rule(side=sides, where=picks, name=names, size=sizes)
    def write(self, side, where, name, size):
        self.play.devices[side].refresh()
        path = self.new_path(side, where, name)
        if self.free(side, path) or stat.S_ISREG(self.play.as_(side).attr(path).mode):
            self.act(side, lambda view: view.write(path, self.data(size)))

    @rule(side=sides, which=picks, size=sizes)
    def append(self, side, which, size):
        self.play.devices[side].refresh()
        path = self.pick(side, which, stat.S_IFREG)
        if path is not None:
            self.act(side, lambda view: view.append(path, self.data(min(size, 70_000))))

    @rule(side=sides, where=picks, name=names)
    def mkdir(self, side, where, name):
        self.play.devices[side].refresh()
        path = self.new_path(side, where, name)
        if self.free(side, path):
            self.act(side, lambda view: view.mkdir(path))

    @rule(side=sides, where=picks, name=names)
    def symlink(self, side, where, name):
        self.play.devices[side].refresh()
        path = self.new_path(side, where, name)
        if self.free(side, path):
            self.act(side, lambda view: view.symlink(path, self.data(5)))

    @rule(side=sides, which=picks, where=picks, name=names)
    def link(self, side, which, where, name):
        self.play.devices[side].refresh()
        old, new = self.pick(side, which, stat.S_IFREG, stat.S_IFLNK), self.new_path(side, where, name)
        if old is not None and self.free(side, new):
            self.act(side, lambda view: view.link(old, new))

    @rule(side=sides, which=picks)
    def unlink(self, side, which):
        self.play.devices[side].refresh()
        path = self.pick(side, which, stat.S_IFREG, stat.S_IFLNK)
        if path is not None:
            self.act(side, lambda view: view.unlink(path))

    @rule(side=sides, which=picks)
    def remove_tree(self, side, which):
        self.play.devices[side].refresh()
        path = self.pick(side, which, stat.S_IFDIR)
        if path is not None:
            self.act(side, lambda view: view.remove_tree(path))

    @rule(side=sides, which=picks, where=picks, name=names, flags=st.sampled_from((0, 0, 2)))
    def rename(self, side, which, where, name, flags):
        self.play.devices[side].refresh()
        old = self.pick(side, which, stat.S_IFREG, stat.S_IFDIR, stat.S_IFDIR, stat.S_IFLNK)
        new = self.new_path(side, where, name)
        if old is None or (flags and self.free(side, new)):
            return
        if new == old or new.startswith(old + "/") or old.startswith(new + "/"):
            return

        def move(view):
            try:
                view.rename(old, new, flags)
            except OSError as error:
                assert error.errno in (errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)

        self.act(side, move)

    @rule(side=sides, which=picks, mode=st.sampled_from((0o600, 0o755)), value=picks)
    def attributes(self, side, which, mode, value):
        self.play.devices[side].refresh()
        path = self.pick(side, which, stat.S_IFREG, stat.S_IFDIR)
        if path is not None:
            self.play.as_(side).setattr(path, mode=mode)
            self.play.as_(side).setxattr(path, f"user.{side}".encode(), str(value).encode())

    @precondition(lambda self: self.work > 3)
    @rule(side=sides)
    def publish(self, side):
        self.acknowledged |= self.visible(side)
        self.play.flush(side)

    @rule(side=sides)
    def forget(self, side):
        self.play.as_(side).forget_all()

    @precondition(lambda self: self.work > 3)
    @rule(side=sides)
    def crash(self, side):
        device = self.play.devices[side]
        device.crash()
        device.start()
        self.play.views[side] = device.view()

    @precondition(lambda self: self.work > 5)
    @rule(order=st.permutations(("alice", "bob")))
    def settle(self, order):
        self.work = 0
        for side in order:
            self.acknowledged |= self.visible(side)
        tree = self.play.settle(*order)
        missing = self.acknowledged - self.removed - set(tree.values())
        assert not missing, f"{len(missing)} contents are lost: {[data[:20] for data in missing]}"

    @invariant()
    def world_is_well(self):
        assert self.world.well


BASE = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def test_any_changes_of_two():
    run_state_machine_as_test(Model, settings=settings(BASE, max_examples=20, stateful_step_count=30))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_changes_of_two():
    run_state_machine_as_test(Model, settings=settings(BASE, max_examples=500, stateful_step_count=60))
