"""Three homes write one share, with partitions, crashes and late publication: in the end all see the same.

What somebody wrote and was told to be safe is there, as itself or in a conflict copy, unless somebody who had seen it
replaced or removed it. See t3_merge.py for the outcomes one by one; this file looks for what nobody thought of, and
keeps what it found as tests of their own.
"""

import errno
import os
import random
import shutil
import stat

import pytest
from devices import Refused, World, pattern, scratch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from t3_merge import Play

from meshkitfs.errors import MeshkitError

NAMES = ("alice", "bob", "carol")
STORE = ("get", "get_many", "put", "put_file", "put_files", "has", "has_many", "sync")
METADATA = ("share_state", "capsules", "roster", "timestamp", "head", "heads", "publish")


class Link:
    """The way from one home to the stores, which can be cut."""

    def __init__(self):
        self.metadata = self.store = False
        self.refused = 0

    @property
    def cut(self):
        return self.metadata or self.store

    def install(self, session):
        for name in STORE:
            if hasattr(session.store, name):
                self._guard(session.store, name, "store", "provider_request_failed")
        for name in METADATA:
            self._guard(session.metadata, name, "metadata", "metadata_unavailable")
        tick, last = session.metadata.tick, [session.metadata.tick()]

        def seen(share=None, also=()):
            # Who cannot ask does not notice either that something changed.
            if not self.metadata:
                last[0] = tick(share, also)
            return last[0]

        session.metadata.tick = seen

    def _guard(self, owner, name, what, code):
        real = getattr(owner, name)

        async def guarded(*args, **more):
            if getattr(self, what):
                self.refused += 1
                raise MeshkitError(code, "partition")
            return await real(*args, **more)

        setattr(owner, name, guarded)


class Trio(Play):
    """A share of alice's that bob and carol may write, each behind a `Link`."""

    def __init__(self, world, place):
        super().__init__(world, place, *NAMES[1:])
        self.links = {name: Link() for name in NAMES}
        for name in NAMES:
            self.restart(name)

    def restart(self, name):
        self.devices[name].close()
        self.start(name)

    def crash(self, name):
        self.devices[name].crash()
        self.start(name)

    def start(self, name):
        self.devices[name].start(self.links[name].install)
        self.views[name] = self.devices[name].view()

    def heal(self):
        for link in self.links.values():
            link.metadata = link.store = False

    def close(self):
        for device in self.devices.values():
            if device.session is not None:
                device.close()


@pytest.fixture
def trio(tmp_path):
    place = scratch()
    with World() as world:
        trio = Trio(world, place)
        yield trio
        trio.close()
    shutil.rmtree(place, ignore_errors=True)


# -- told step by step ---------------------------------------------------------------------------------------


def test_no_answer_of_before_is_the_reason_of_a_lost_race(trio):
    """Nobody said what had changed when it was asked; after the partition somebody does, and the two are merged."""
    trio.as_("bob").write("his", b"of bob")
    trio.flush("bob")
    share = trio.devices["alice"].share()
    share._store_tick()  # noticed, and then cut off
    trio.links["alice"].metadata = True
    trio.world.run(share._renew)
    assert share.unconfirmed.code == "freshness_unproven"
    trio.heal()
    trio.as_("alice").write("hers", b"of alice")
    trio.flush("alice")
    assert {"his", "hers"} <= set(trio.settle())


@pytest.mark.parametrize(
    ("what", "order"),
    [("metadata", NAMES), ("store", NAMES[::-1]), ("both", ("bob", "carol", "alice"))],
    ids=["metadata", "store", "both"],
)
def test_each_works_behind_a_partition_of_its_own(trio, what, order):
    """All three are cut off, change the same things, fail to publish, and one dies; then all is put together."""
    alice = trio.as_("alice")
    alice.mkdir("dir")
    for name in ("shared", "dir/moved", "dir/removed"):
        alice.write(name, f"old {name}".encode())
    trio.settle()
    for name in NAMES:
        trio.devices[name].refresh()
        trio.as_(name).walk()
        trio.links[name].metadata = what != "store"
        trio.links[name].store = what != "metadata"
    for name in NAMES:
        view = trio.as_(name)
        # As editors save: nothing of the old file has to be read for it.
        view.write(".shared.swp", f"by {name}".encode())
        view.rename(".shared.swp", "shared")
        view.write(f"dir/new-{name}", name.encode())
        with pytest.raises(MeshkitError) as caught:
            trio.flush(name)
        wanted = "metadata_unavailable" if what == "metadata" else "provider_request_failed"
        assert caught.value.code == wanted
    trio.as_("alice").unlink("dir/removed")
    trio.as_("bob").write("dir/late", b"bob's last")
    trio.as_("carol").rename("dir/moved", "moved")
    # What a refused flush had committed here is safe here.
    trio.crash("bob")
    assert all(link.refused for link in trio.links.values()), "nobody was cut off: this proves nothing"
    trio.heal()
    tree = trio.settle(*order)
    written = sorted(data for path, data in tree.items() if path.startswith("shared"))
    assert written == [b"by alice", b"by bob", b"by carol"]
    assert tree["shared"] == f"by {order[0]}".encode()
    assert tree["moved"] == b"old dir/moved"
    assert "dir/moved" not in tree
    assert {tree[f"dir/new-{name}"] for name in NAMES} == {b"alice", b"bob", b"carol"}
    assert "dir/removed" not in tree
    # What was lost with Bob's process had never been called safe.
    assert "dir/late" not in tree


# -- anything at all -----------------------------------------------------------------------------------------

OPERATIONS = (
    "write", "write", "append", "truncate", "rename", "rename", "rename", "unlink", "mkdir", "mkdir", "rmdir",
    "symlink", "link",
)  # fmt: skip
sides = st.sampled_from(NAMES)
picks = st.integers(0, 1 << 16)
# Errors that a program gets for what it asked, and that are no fault.
ORDINARY = (errno.ELOOP, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL)


class Model(RuleBasedStateMachine):
    """Three people do anything, and are cut off now and then."""

    seen = {"partitions": 0, "kept": 0, "settled": 0}

    def __init__(self):
        super().__init__()
        self.place = scratch()
        self.world = World()
        self.play = Trio(self.world, self.place)
        self.number = 0
        self.acknowledged = set()
        # What each has written, whether or not it is safe yet.
        self.written = {name: set() for name in NAMES}
        # What each has removed or replaced after having seen it.
        self.removed = {name: set() for name in NAMES}
        self.work = 0

    def teardown(self):
        try:
            self.settle(list(NAMES))
            self.play.close()
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

    def paths(self, side, *kinds):
        walked = self.play.as_(side).walk()
        return sorted(path for path, seen in walked.items() if stat.S_IFMT(seen.mode) in kinds)

    @rule(
        side=sides,
        operation=st.sampled_from(OPERATIONS),
        which=picks,
        where=picks,
        name=st.sampled_from(("a", "b", "c")),
        size=st.sampled_from((0, 10, 20_000, 300 * 1024)),
    )
    def work_on(self, side, operation, which, where, name, size):
        view, link = self.play.as_(side), self.play.links[side]
        self.play.devices[side].refresh()
        before = None
        try:
            before = self.visible(side)
            files = self.paths(side, stat.S_IFREG)
            directories = self.paths(side, stat.S_IFDIR)
            parent = directories[where % len(directories)] if directories and where % 3 else ""
            new = f"{parent}/{name}" if parent and parent.count("/") < 3 else name
            getattr(self, "_" + operation)(view, files, directories, which, new, size)
            after = self.visible(side)
            self.removed[side] |= before - after
            self.written[side] |= after - before
            self.work += 1
            self.seen["kept"] += link.cut
        except OSError as error:
            if not isinstance(error, Refused) or not link.cut:
                assert error.errno in ORDINARY, error
            elif before is not None:
                # Cut off in the middle of it: what it replaced may be gone.
                assert error.code in ("provider_request_failed", "freshness_unproven", "metadata_unavailable")
                self.removed[side] |= before

    def _write(self, view, files, directories, which, new, size):
        view.write(new, self.data(size))

    def _append(self, view, files, directories, which, new, size):
        if files:
            view.append(files[which % len(files)], self.data(min(size, 70_000)))

    def _truncate(self, view, files, directories, which, new, size):
        if files:
            path = files[which % len(files)]
            view.truncate(path, view.attr(path).size // 2)

    def _rename(self, view, files, directories, which, new, size):
        old = sorted(files + directories * 2)
        if old and not (new + "/").startswith(old[which % len(old)] + "/"):
            view.rename(old[which % len(old)], new)

    def _unlink(self, view, files, directories, which, new, size):
        if files:
            view.unlink(files[which % len(files)])

    def _mkdir(self, view, files, directories, which, new, size):
        view.mkdir(new)

    def _rmdir(self, view, files, directories, which, new, size):
        if directories:
            view.rmdir(directories[which % len(directories)])

    def _symlink(self, view, files, directories, which, new, size):
        view.symlink(new, self.data(5))

    def _link(self, view, files, directories, which, new, size):
        if files:
            view.link(files[which % len(files)], new)

    @precondition(lambda self: self.work > 2)
    @rule(side=sides)
    def publish(self, side):
        link = self.play.links[side]
        try:
            self.play.flush(side)
        except (MeshkitError, Refused) as error:
            assert link.cut, error
        else:
            self.acknowledged |= self.written[side]

    @precondition(lambda self: self.work > 1 and not any(link.cut for link in self.play.links.values()))
    @rule(side=sides, what=st.sampled_from(("metadata", "store", "both")))
    def partition(self, side, what):
        link = self.play.links[side]
        # It has seen all there is until now, and goes on from that.
        self.play.devices[side].refresh()
        self.visible(side)
        link.metadata = what != "store"
        link.store = what != "metadata"
        self.seen["partitions"] += 1

    @precondition(lambda self: self.work > 5 and any(link.cut for link in self.play.links.values()))
    @rule()
    def heal(self):
        self.play.heal()

    @precondition(lambda self: self.work > 2)
    @rule(side=sides)
    def crash(self, side):
        self.play.crash(side)
        # A removal that died with it is none, and what was not safe yet may have died too.
        try:
            visible = self.visible(side)
        except OSError:
            assert self.play.links[side].cut
            visible = set()
        self.removed[side] -= visible
        self.written[side] &= visible

    @rule(side=sides)
    def forget(self, side):
        self.play.as_(side).forget_all()

    @precondition(lambda self: self.work > 10)
    @rule(order=st.permutations(NAMES))
    def settle(self, order):
        self.work = 0
        self.play.heal()
        self.acknowledged |= set().union(*self.written.values())
        tree = self.play.settle(*order)
        gone = set().union(*self.removed.values())
        missing = self.acknowledged - gone - set(tree.values())
        assert not missing, f"{len(missing)} contents are lost: {[data[:20] for data in missing]}"
        self.seen["settled"] += 1

    @invariant()
    def world_is_well(self):
        assert self.world.well


def converge(examples, steps):
    number = int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"seed {number}")
    Model.seen.update(dict.fromkeys(Model.seen, 0))
    run_state_machine_as_test(
        seed(number)(Model),
        settings=settings(
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            database=None,
            max_examples=examples,
            phases=(Phase.generate,) if os.environ.get("NO_SHRINK") else tuple(Phase),
            stateful_step_count=steps,
        ),
    )
    print(Model.seen)
    assert all(Model.seen.values()), f"not all of it was exercised: {Model.seen}"


def test_any_changes_of_three_with_partitions():
    converge(7, 30)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_changes_of_three_with_partitions():
    converge(300, 80)
