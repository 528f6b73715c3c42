"""prune, gc, verify, repair: what is given up, what is deleted, and that nothing that is kept is ever lost."""

from __future__ import annotations

import random
import shutil
from datetime import UTC, datetime

import evil
import pytest
import trio
from devices import Device, World, pattern, scratch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keeping import BIG, DAY, Keeper

from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Retention
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import Rules, Terms, _prune, collect, prune
from meshkitfs.shares._history import Version
from meshkitfs.shares._prune import RANGES_MAX, choose, give_up
from meshkitfs.shares._verify import verify
from meshkitfs.shares._walk import Walk, root_piece


@pytest.fixture
def keeper(tmp_path):
    keeper = Keeper(tmp_path / "alice")
    yield keeper
    keeper.world.close()


@pytest.fixture
def refuses():
    def refuses(code, work, *args, **options):
        with pytest.raises(MeshkitError) as refused:
            work(*args, **options)
        assert refused.value.code == code, refused.value
        return refused.value

    return refuses


def moment(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


# == prune: which versions stay ==========================================================================

TIMES = [
    "2026-01-01T00:00", "2026-06-30T10:00", "2026-10-01T09:00", "2026-11-16T00:00", "2026-11-22T23:59:59",
    "2026-11-23T00:00", "2026-11-24T08:00", "2026-11-24T08:59", "2026-11-24T09:00", "2026-11-25T12:00",
]  # fmt: skip


def made(times):
    return [Version(i + 1, 1, bytes(32), moment(text), b"", b"") for i, text in enumerate(times)]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"last": 1}, {10}),
        ({"last": 3}, {8, 9, 10}),
        ({"last": 99}, set(range(1, 11))),
        ({"hourly": 1}, {10}),
        ({"hourly": 3}, {8, 9, 10}),  # hours that have any, not hours of the clock
        ({"daily": 2}, {9, 10}),
        ({"daily": 4}, {5, 6, 9, 10}),
        ({"weekly": 1}, {10}),  # Monday the 23rd to now is one week
        ({"weekly": 2}, {5, 10}),
        ({"weekly": 3}, {3, 5, 10}),
        ({"monthly": 2}, {3, 10}),
        ({"monthly": 99}, {1, 2, 3, 10}),
        ({"yearly": 1}, {10}),
        ({"within": DAY}, {10}),
        ({"within": 2 * DAY}, {7, 8, 9, 10} - {7, 8, 9} | {10}),
        ({"within": 28 * 3600}, {7, 8, 9, 10}),
        ({"last": 2, "monthly": 2, "within": 3600}, {3, 9, 10}),
    ],
)
def test_rules_are_united(rules, kept):
    if rules == {"within": 2 * DAY}:
        kept = {7, 8, 9, 10}
    chosen = choose(made(TIMES), Rules(**rules), moment("2026-11-25T13:00"))
    assert [version.number for version, _ in chosen] == list(range(10, 0, -1))
    assert {version.number for version, why in chosen if why} == kept
    assert "newest" in chosen[0][1]


def test_a_clock_that_is_ahead_makes_nothing_else_old():
    versions = made([*TIMES, "2031-01-01T00:00"])
    chosen = choose(versions, Rules(within=2 * DAY), moment("2026-11-25T13:00"))
    assert {version.number for version, why in chosen if why} == {7, 8, 9, 10, 11}
    far = [*versions, Version(12, 1, bytes(32), (1 << 40) - 1, b"", b"")]
    assert choose(far, Rules(yearly=2), moment("2026-11-25T13:00"))[0][1] == ["newest", "yearly"]


def record_of(flat):
    """The list as everybody else will read it."""
    owner = SigningKey.from_seed(bytes(32))
    blob = Retention(b"s" * 16, 1, flat, 1).sign(owner)
    return Retention.parse(blob, {owner.kid: owner.public}).ranges()


def test_ranges_grow_and_keep_their_times():
    versions = [Version(number, 1, bytes(32), 0, b"", b"") for number in (1, 2, 3, 5, 8, 9, 10)]
    first = record_of(give_up((), versions, {1, 3, 5}, 100))
    assert first == [(1, 1, 100), (3, 5, 100)]  # there is no version 4
    second = record_of(give_up(first, versions, {2, 8}, 200))
    assert second == [(1, 1, 100), (2, 2, 200), (3, 5, 100), (8, 8, 200)]
    third = record_of(give_up(second, versions, {9}, 300))
    assert third == [(1, 1, 100), (2, 2, 200), (3, 5, 100), (8, 8, 200), (9, 9, 300)]
    assert record_of(give_up(third, versions, set(), 400)) == third


def test_the_number_of_ranges_is_bounded():
    versions = [Version(number + 1, 1, bytes(32), 0, b"", b"") for number in range(2 * RANGES_MAX + 5)]
    old = [(number, number, number) for number in range(1, RANGES_MAX + 1)]
    more = record_of(give_up(old, versions, {RANGES_MAX + 1}, 10**6))
    assert more == [(1, RANGES_MAX + 1, 10**6)]  # joined as of the latest: nothing goes earlier than it may
    with pytest.raises(MeshkitError):
        give_up((), versions, set(range(1, 2 * RANGES_MAX + 3, 2)), 1)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_was_given_up_stays_so_and_nothing_else_is(data):
    numbers = sorted(data.draw(st.sets(st.integers(1, 60), min_size=2, max_size=30)))
    versions = [Version(number, 1, bytes(32), 0, b"", b"") for number in numbers]
    ranges, given, at = [], {}, 0
    for _ in range(data.draw(st.integers(1, 5))):
        at += 10
        gone = data.draw(st.sets(st.sampled_from(numbers[:-1]))) - given.keys()
        given |= dict.fromkeys(gone, at)
        before = ranges
        ranges = record_of(give_up(ranges, versions, gone, at))
        inside = {n: when for n in numbers for first, last, when in ranges if first <= n <= last}
        assert inside == given
        covered = {n for first, last, _ in ranges for n in range(first, last + 1)}
        assert covered >= {n for first, last, _ in before for n in range(first, last + 1)}


# == prune on a share ====================================================================================


def test_prune_gives_up_by_rule_and_says_so(keeper, refuses):
    now = moment("2026-11-20T12:00")
    for i in range(4):
        keeper.save(("file", b"%d" % i), at=now - (4 - i) * DAY)
    shown = keeper.call("prune", share="first", daily=2, dry_run=True)
    assert shown["given_up"] == 3
    assert [item["version"] for item in shown["versions"]] == [5, 4, 3, 2, 1]
    # Version 1 was made by the test's real clock when the share was created.
    assert keeper.world.run(keeper.device.session.metadata.retention, keeper.share().row.share) is None
    done = keeper.call("prune", share="first", last=2)
    assert done["given_up"] == 3
    history = keeper.share().history
    assert [version.number for version in history.kept] == [4, 5]
    assert keeper.call("prune", share="first", last=2)["given_up"] == 0
    assert history.retention.seq == 1  # nothing new, no new record
    keeper.save(("file", b"more"))
    assert keeper.prune(last=1) == [4, 5]
    assert history.retention.seq == 2
    assert [r[:2] for r in history.retention.ranges()] in ([(1, 3), (4, 5)], [(1, 5)])
    refuses("invalid_argument", keeper.call, "prune", share="first")
    refuses("invalid_argument", keeper.call, "prune", share="first", within="soon")


def test_a_dry_run_is_refused_what_the_real_one_would_be(keeper, refuses, monkeypatch):
    for i in range(6):
        keeper.save(("a", b"%d" % i), at=moment(f"2026-11-{10 + i // 2}T0{i % 2}:00"))
    monkeypatch.setattr(_prune, "RANGES_MAX", 1)
    for dry_run in (True, False):
        refuses("invalid_argument", keeper.call, "prune", share="first", daily=9, dry_run=dry_run)
    assert keeper.share().history.retention is None


def test_only_the_owner_prunes_and_collects(keeper, tmp_path, refuses):
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    world = keeper.world
    refuses("not_owner", world.run, lambda: prune(bob.share(), Rules(last=1), dry_run=False))
    refuses("not_owner", world.run, lambda: collect(bob.share(), 0, dry_run=True, progress=keeper.progress))


def test_a_lost_race_is_decided_again(keeper):
    for i in range(4):
        keeper.save(("file", b"%d" % i))
    metadata, share = keeper.device.session.metadata, keeper.share().row.share
    owner = keeper.device.session.identity.signing
    real = type(metadata).retain
    raced = []

    async def late(record):
        """Another device of the owner's was first."""
        if not raced:
            raced.append(True)
            await real(metadata, share, Retention(share, 1, (1, 1, 77), 77).sign(owner))
        await real(metadata, share, record)

    wrapped = evil.EvilMetadata(metadata)
    wrapped.retain = lambda _, record: late(record)
    keeper.device.session.services.metadata = wrapped
    assert keeper.prune(last=2) == [2, 3]
    retention = keeper.share().history.retention
    assert retention.seq == 2
    assert retention.ranges()[0] == (1, 1, 77)


# == gc ==================================================================================================


def busy_history(keeper):
    """Versions with every kind of block: large and small files, links, pages, moves, changed blocks."""
    view = keeper.view()
    keeper.save(("large", pattern(1, BIG)), ("small", b"one"))
    view.mkdir("many")
    keeper.save(*((f"many/{i:03}", b"%d" % i) for i in range(90)))
    view.link("small", "many/second name")
    keeper.save(("many/050", b"changed"), ("large", None))
    keeper.save(("large", pattern(2, BIG)), ("gone", pattern(3, 100_000)))
    fh = view.open("large")
    view.pwrite(fh, 70_000, b"in the middle")
    view.release(fh)
    keeper.save(("gone", None))
    view.rename("many", "renamed")
    return keeper.save(("last", pattern(4, 80_000)))


def test_gc_removes_exactly_what_nothing_kept_needs(keeper):
    newest = busy_history(keeper)
    assert newest == 7
    every = keeper.needs(range(1, 8))
    kept = {number: keeper.need(number) for number in (4, 7)}
    needed = kept[4][0] | kept[7][0]
    before = keeper.stored()
    assert every == before.keys()

    history = keeper.share().history
    keeper.world.run(history.refresh, keeper.share().grant)
    share, owner = keeper.share().row.share, keeper.device.session.identity.signing
    record = Retention(share, 1, (1, 3, 50, 5, 6, 50), 50).sign(owner)
    keeper.world.run(keeper.device.session.metadata.retain, share, record)

    shown = keeper.gc(delete=False)
    garbage = every - needed
    assert shown["blocks"] == len(garbage) > 10
    assert shown["bytes"] == sum(len(before[digest]) for digest in garbage)
    assert (shown["versions"], shown["kept"], shown["waiting"]) == (5, 2, 0)
    assert keeper.stored() == before  # only said

    done = keeper.gc()
    assert done == shown | {"deleted": True}
    assert keeper.stored().keys() == needed
    assert {number: keeper.need(number) for number in (4, 7)} == kept
    keeper.restart()
    assert keeper.view().read("last") == pattern(4, 80_000)
    again = keeper.gc()
    assert (again["blocks"], again["versions"]) == (0, 0)


def test_what_was_given_up_just_now_waits(keeper):
    busy_history(keeper)
    before = keeper.stored()
    assert keeper.prune(last=1) == [1, 2, 3, 4, 5, 6]
    waiting = keeper.gc(grace="7d")
    assert (waiting["blocks"], waiting["versions"], waiting["waiting"]) == (0, 0, 6)
    assert keeper.stored() == before
    keeper.shift(6 * DAY)
    assert keeper.gc(grace="7d")["blocks"] == 0
    keeper.shift(8 * DAY)
    assert keeper.gc(grace="7d")["versions"] == 6
    assert keeper.stored().keys() == keeper.need(7)[0]
    # What was collected early does not come in the way of a longer grace.
    keeper.save(("small", b"two"))
    keeper.prune(last=1)
    keeper.gc(grace="0d")
    assert keeper.gc(grace="7d")["waiting"] == 0


def test_other_shares_and_homes_in_the_same_store_are_not_touched(keeper, tmp_path):
    bob = Keeper(tmp_path / "bob", keeper.world, "bob", beside=keeper)
    bob.save(("theirs", pattern(9, BIG)))
    bob.save(("theirs", pattern(10, BIG)))
    busy_history(keeper)
    strange = keeper.device.blocks / "aa" / "something"
    strange.parent.mkdir(exist_ok=True)
    strange.write_bytes(b"of somebody else")
    others = bob.needs([1, 2, 3])
    keeper.prune(last=1)
    keeper.gc()
    assert keeper.stored().keys() == keeper.need(7)[0] | others
    assert bob.need(2)[1] == {"theirs": pattern(9, BIG)}
    assert strange.read_bytes() == b"of somebody else"


# -- what else protects


def granted_snapshot(keeper, tmp_path, path, expires=0):
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    world, share = keeper.world, keeper.share()

    async def give():
        view_node = await node_at(share, path)
        until = int(share.services.wall()) + expires if expires else 0
        await keeper.device.session.book.add_snapshot(share, path, view_node, "bob", Terms(("read",), until))

    world.run(give)
    keeper.device.refresh()
    world.run(bob.session.book.inbox.accept, path.rsplit("/", 1)[-1], b"snap")
    return bob


async def node_at(share, path):
    grant = await share.use("list", current=True)
    node = share.tree.root
    for part in path.split("/"):
        await share.tree.load(grant, node)
        node = share.tree.node_of(node, part.encode())
    return node


@pytest.mark.parametrize("end", ["expires", "revoked"])
def test_a_granted_snapshot_lives_and_is_collected_when_it_ends(keeper, tmp_path, end):
    view = keeper.view()
    view.mkdir("dir")
    view.mkdir("dir/inner")
    keeper.save(("dir/inner/large", pattern(1, BIG)), ("dir/other", pattern(2, 90_000)))
    bob = granted_snapshot(keeper, tmp_path, "dir/inner", 30 * DAY)
    keeper.save(("dir/inner/large", pattern(3, BIG)))
    keeper.save(("dir/inner/large", None), ("dir/other", None))
    newest = keeper.share().base.version
    keeper.prune(last=1)
    before = keeper.stored().keys()
    for _ in range(2):  # the second time the way to it is full of holes
        done = keeper.gc()
        assert done["snapshots"] == 1
        assert bob.view("snap").read("large") == pattern(1, BIG)
        bob.close()
        bob.start()
    after = keeper.stored().keys()
    assert len(after) < len(before)
    assert done["blocks"] == 0
    kept = keeper.need(newest)[0]
    if end == "expires":
        keeper.shift(31 * DAY)
    else:
        keeper.world.run(keeper.device.session.book.revoke, keeper.share(), "bob")
        newest = keeper.share().base.version
        kept = keeper.need(newest)[0] | kept
    last = keeper.gc()
    assert (last["snapshots"], last["versions"]) == (0, 1)
    assert keeper.stored().keys() == kept
    if end == "revoked":
        # What the revocation replaced is a version of its own, still kept.
        assert keeper.prune(last=1) == [newest - 1]


def test_a_snapshot_that_cannot_be_found_stops_the_collection(keeper, tmp_path, refuses):
    view = keeper.view()
    view.mkdir("dir")
    view.mkdir("dir/inner")
    keeper.save(("dir/inner/large", pattern(1, BIG)))
    granted_snapshot(keeper, tmp_path, "dir/inner")
    directory = keeper.world.run(node_at, keeper.share(), "dir").entry.ref[:32]
    keeper.save(("dir/inner/large", None))
    keeper.prune(last=1)
    lost = evil.block_path(keeper.device.blocks, directory).read_bytes()
    evil.remove_file(keeper.device.blocks, directory)
    before = keeper.stored()
    refuses("gc_unsafe", keeper.gc)
    assert keeper.stored() == before
    evil.block_path(keeper.device.blocks, directory).write_bytes(lost)
    assert keeper.gc()["snapshots"] == 1


def test_grants_that_this_device_forgot_stop_the_collection(keeper, tmp_path, refuses):
    """A state.db from a backup does not know of snapshots granted since."""
    busy_history(keeper)
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    state = shutil.copytree(keeper.device.root, tmp_path / "backup", ignore=shutil.ignore_patterns("blocks"))
    granted_snapshot_to(keeper, bob, "last")
    keeper.prune(last=1)
    members = keeper.device.session.state.members(keeper.share().row.share)
    snapshot = next(member for member in members if member.grant == "snapshot")
    with keeper.device.session.state._transaction() as db:
        db.execute("DELETE FROM members WHERE capsule_id = ?", (snapshot.capsule_id,))
    before = keeper.stored()
    refuses("gc_unsafe", keeper.gc)
    assert keeper.stored() == before
    assert state


def granted_snapshot_to(keeper, device, path):
    async def give():
        node = await node_at(keeper.share(), path)
        await keeper.device.session.book.add_snapshot(
            keeper.share(), path, node, device.name, Terms(("read",))
        )

    keeper.world.run(give)


@pytest.mark.parametrize("again", [False, True], ids=["running", "restarted"])
def test_unsent_work_on_this_device_is_kept(keeper, tmp_path, again):
    """A local commit that could not be published stands on a version that is given up meanwhile."""
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    keeper.save(("large", pattern(1, BIG)), ("other", pattern(2, BIG)))
    bob.refresh()
    session = keeper.device.session
    wrapped = evil.EvilMetadata(session.services.metadata)

    async def away(_):
        raise MeshkitError("metadata_unavailable", "evil")

    wrapped.publish = away
    session.services.metadata = wrapped
    view = keeper.view()
    fh = view.open("large")
    view.pwrite(fh, 0, b"unsent")
    view.release(fh)
    with pytest.raises(MeshkitError):
        keeper.device.flush()
    bob.view().unlink("large")
    bob.view().unlink("other")
    bob.flush()
    if again:
        keeper.device.crash()
        keeper.device.start()
    given_up = keeper.prune(last=1)
    assert keeper.device.session.state.local_commit(keeper.share().row.share).base_version in given_up
    assert keeper.gc()["versions"] > 0
    if not again:
        session.services.metadata = wrapped.inner
    number = keeper.publish()
    found = keeper.need(number, [bob.session.identity.signing.public])[1]
    assert b"unsent" + pattern(1, BIG)[6:] in found.values()


def test_what_was_brought_back_and_is_in_memory_alone_is_kept(keeper, refuses, monkeypatch):
    """A restore whose commit failed: what it refers to is in no version that is kept, nor on any record."""
    data = pattern(1, BIG)
    keeper.save(("a", data))
    keeper.save(("a", b"newer"))
    keeper.save(("b", b"newest"))
    with monkeypatch.context() as patch:

        def full(*_):
            raise MeshkitError("no_space", "the home is full")

        patch.setattr(type(keeper.device.session.state), "record_commit", full)
        refuses("no_space", keeper.call, "restore", path="first/a", at="v2")
        assert keeper.prune(last=1) == [1, 2, 3]
        before = keeper.stored()
        for delete in (False, True):
            refuses("no_space", keeper.gc, delete=delete)
        assert keeper.stored() == before
    assert keeper.gc()["deleted"]
    keeper.publish()
    keeper.restart()
    assert keeper.view().read("a") == data
    assert keeper.call("verify", shares=["first"])["shares"][0]["broken"] == []


def test_a_version_that_is_given_up_while_a_restore_waits_is_not_brought_back(keeper):
    keeper.save(("a", pattern(1, BIG)))
    keeper.save(("a", b"newer"))
    share, refusals = keeper.share(), []

    async def bring_back():
        try:
            await Service(keeper.device.session).call("restore", {"path": "first/a", "at": "v2"})
        except MeshkitError as error:
            refusals.append(error.code)

    async def meanwhile():
        async with trio.open_nursery() as nursery, share.upkeep:
            nursery.start_soon(bring_back)
            while not share.upkeep.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
            await prune(share, Rules(last=1), dry_run=False)
            await collect(share, 0, dry_run=False, progress=keeper.progress)

    keeper.world.run(meanwhile)
    assert refusals == ["version_not_found"]
    assert keeper.view().read("a") == b"newer"


def test_a_device_with_unsent_work_that_comes_back_within_the_grace(keeper, tmp_path):
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    keeper.save(("large", pattern(1, BIG)))
    bob.refresh()
    view = bob.view()
    fh = view.open("large")  # made on this version, and not sent
    view.pwrite(fh, 0, b"unsent")
    view.release(fh)
    keeper.save(("large", None), ("new", b"x"))
    keeper.prune(last=1)
    keeper.shift(6 * DAY)
    assert keeper.gc(grace="7d")["blocks"] == 0
    bob.refresh()
    bob.flush()
    keeper.device.refresh()
    contents = keeper.view().contents()
    assert b"unsent" + pattern(1, BIG)[6:] in contents.values()
    keeper.shift(8 * DAY)
    keeper.gc(grace="7d")
    number = keeper.share().base.version
    bobs = bob.session.identity.signing.public
    assert keeper.need(number, [bobs])[1].keys() == contents.keys()


def test_a_version_published_while_gc_looks_is_kept(keeper, tmp_path):
    """Bob takes up again, unsent till now, what only a given-up version has: the last look sees it."""
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    keeper.save(("large", pattern(1, BIG)))
    bob.refresh()
    fh = bob.view().open("large")
    bob.view().pwrite(fh, 0, b"unsent")
    bob.view().release(fh)
    keeper.save(("large", None), ("new", b"x"))
    keeper.prune(last=1)
    store = keeper.device.session.store
    services = keeper.device.session.services
    wrapped = evil.EvilStore(store)
    real, published = wrapped.sizes, []

    async def sizes(digests):
        # The first look at the garbage: all was walked, nothing is deleted yet.
        if not published:
            published.append(True)
            await bob.share().use("list", current=True)
            await bob.share().flush()
        return await real(digests)

    wrapped.sizes = sizes
    services.reader.store = wrapped
    try:
        keeper.gc()
    finally:
        services.reader.store = store
    assert published
    number = max(keeper.blobs())
    found = keeper.need(number, [bob.session.identity.signing.public])[1]
    assert b"unsent" + pattern(1, BIG)[6:] in found.values()


def test_a_conflict_copy_keeps_the_blocks_it_shares(keeper, tmp_path):
    """Two files of one share consist of the same blocks; one of them goes."""
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    keeper.save(("file", pattern(1, BIG)))
    bob.refresh()
    for view, at in ((keeper.view(), 0), (bob.view(), 200_000)):
        fh = view.open("file")
        view.pwrite(fh, at, b"changed")
        view.release(fh)
    keeper.device.flush()
    bob.flush()
    keeper.device.refresh()
    (copy,) = (name for name in keeper.view().listdir() if "conflict" in name)
    expected = keeper.view().read(copy)
    number = keeper.save(("file", None))
    writers = [bob.session.identity.signing.public]
    every = keeper.needs(range(1, number + 1), writers)
    keeper.prune(last=1)
    assert keeper.gc()["versions"] == number - 1
    asked, content = keeper.need(number, writers)
    assert content == {copy: expected}
    # What bob's device uploaded before the merge, no version has ever named.
    assert keeper.stored().keys() & every == asked
    (found,) = keeper.call("verify", shares=["first"])["shares"]
    assert (found["broken"], found["blocks"]) == ([], len(asked))


def test_two_writers_go_on_while_gc_deletes(keeper, tmp_path):
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    keeper.device.grant("first", bob)
    for i in range(6):
        keeper.save(("large", pattern(i, BIG)), (f"file {i}", pattern(i, 90_000)))
    keeper.prune(last=2)
    bob.refresh()
    session = keeper.device.session
    store, services = session.store, session.services
    wrapped = evil.EvilStore(store)
    steps = []

    async def delete_many(digests):
        """Between two deletions, both publish: one what it was about to, one something new."""
        for digest in digests:
            steps.append(digest)
            if len(steps) in (2, 5, 9):
                await bob.share().flush()
                await keeper.share().flush()
            await store.delete_many([digest])

    wrapped.delete_many = delete_many
    services.reader.store = wrapped
    for device, at in ((keeper.device, 0), (bob, 100_000)):
        view = device.view()
        fh = view.open("large")
        view.pwrite(fh, at, b"changed meanwhile")
        view.release(fh)
    keeper.view().write("new here", pattern(70, 80_000))
    bob.view().write("new there", pattern(71, 80_000))
    assert keeper.gc()["versions"] > 0
    services.reader.store = store
    assert len(steps) > 9
    bob.flush()
    keeper.device.refresh()
    keeper.restart()
    contents = keeper.view().contents()
    writers = [bob.session.identity.signing.public]
    assert keeper.need(max(keeper.blobs()), writers)[1] == contents
    assert contents["new there"] == pattern(71, 80_000)
    keeper.world.run(lambda: keeper.share().history.refresh(keeper.share().grant))
    kept = [version.number for version in keeper.share().history.kept]
    assert len(kept) >= 3
    assert keeper.needs(kept, writers) <= keeper.stored().keys()


def test_gc_that_is_killed_goes_on_where_it_was(keeper):
    busy_history(keeper)
    keeper.prune(last=1)
    kept = keeper.need(7)
    total = keeper.gc(delete=False)["blocks"]
    services, store = keeper.device.session.services, keeper.device.session.store
    begin = len(keeper.stored())
    for step in (0, 1, 2, 5, 8):
        wrapped = evil.EvilStore(store)
        wrapped.deletes = step
        services.reader.store = wrapped
        with pytest.raises(MeshkitError):
            keeper.gc()
        services.reader.store = store
        keeper.restart()
        services, store = keeper.device.session.services, keeper.device.session.store
        # What is left is found again, all of it: nothing leaks.
        assert keeper.gc(delete=False)["blocks"] == total - (begin - len(keeper.stored()))
        assert keeper.need(7) == kept
    assert keeper.gc()["blocks"] > 0
    assert keeper.stored().keys() == kept[0]


@pytest.mark.parametrize("fault", ["missing", "damaged", "away"])
def test_an_unreadable_kept_manifest_stops_everything(keeper, refuses, fault):
    busy_history(keeper)
    directory = keeper.world.run(node_at, keeper.share(), "renamed").entry.ref[:32]
    keeper.prune(last=1)
    keeper.restart()
    wrapped = evil.EvilStore(keeper.device.session.store)
    how = {"missing": evil.missing(), "damaged": evil.flip(), "away": evil.failing()}[fault]
    code = {
        "missing": "block_unavailable", "damaged": "cid_mismatch", "away": "provider_request_failed",
    }[fault]  # fmt: skip
    wrapped.on_get(how, directory)
    keeper.device.session.services.reader.store = wrapped
    before = keeper.stored()
    refuses(code, keeper.gc)
    assert keeper.stored() == before
    assert not [entry for entry in wrapped.log if entry[0] == "delete"]
    wrapped.heal()
    assert keeper.gc()["versions"] == 6


@pytest.mark.parametrize("fault", ["missing", "damaged", "away"])
def test_an_unreadable_given_up_manifest(keeper, refuses, fault):
    view = keeper.view()
    view.mkdir("dir")
    keeper.save(("dir/large", pattern(1, BIG)))
    directory = keeper.world.run(node_at, keeper.share(), "dir").entry.ref[:32]
    file = keeper.world.run(node_at, keeper.share(), "dir/large").entry.ref[:32]
    keeper.save(("dir/large", None))
    keeper.prune(last=1)
    wrapped = evil.EvilStore(keeper.device.session.store)
    how = {"missing": evil.missing(), "damaged": evil.flip(), "away": evil.failing()}[fault]
    wrapped.on_get(how, directory)
    keeper.device.session.services.reader.store = wrapped
    before = keeper.stored()
    if fault == "away":  # unknown
        refuses("provider_request_failed", keeper.gc)
        assert keeper.stored() == before
        return
    done = keeper.gc()
    assert done["damaged"] == (fault == "damaged")
    after = keeper.stored()
    assert directory not in after
    assert file in after  # nothing says any more whose it was
    assert keeper.need(3)


# -- a metadata store that lies


def test_an_older_retention_record_deletes_less(keeper):
    for i in range(5):
        keeper.save(("file", pattern(i, 70_000)))
    metadata, share = keeper.device.session.metadata, keeper.share().row.share
    keeper.prune(last=4)
    old = keeper.world.run(metadata.retention, share)
    keeper.prune(last=1)
    kept = keeper.needs(range(3, 7))
    keeper.restart()
    wrapped = evil.EvilMetadata(keeper.device.session.metadata)
    wrapped.on("retention", evil.fixed(old), share)
    keeper.device.session.services.metadata = wrapped
    assert keeper.gc()["versions"] == 2
    assert keeper.stored().keys() == kept


@pytest.mark.parametrize("lie", ["withheld", "forged", "other share", "damaged", "newest", "beyond"])
def test_a_lie_about_retention_deletes_nothing_that_is_kept(keeper, refuses, lie):
    for i in range(3):
        keeper.save(("file", pattern(i, 70_000)))
    session, share = keeper.device.session, keeper.share().row.share
    owner = session.identity.signing
    everything = (1, 3, 5)
    answers = {
        "withheld": None,
        "forged": Retention(share, 1, everything, 5).sign(SigningKey.generate()),
        "other share": Retention(b"x" * 16, 1, everything, 5).sign(owner),
        "damaged": evil.flipped(Retention(share, 1, everything, 5).sign(owner), 90),
        # Only an owner who has seen a newer version signs these: newer ones are hidden.
        "newest": Retention(share, 1, (1, 4, 5), 5).sign(owner),
        "beyond": Retention(share, 1, (1, 3, 5, 6, 6, 5), 5).sign(owner),
    }
    codes = {
        "forged": "invalid_record", "other share": "invalid_record", "damaged": "invalid_record",
        "newest": "gc_unsafe", "beyond": "gc_unsafe",
    }  # fmt: skip
    wrapped = evil.EvilMetadata(session.metadata)
    wrapped.on("retention", evil.fixed(answers[lie]), share)
    session.services.metadata = wrapped
    before = keeper.stored()
    if lie in codes:
        refuses(codes[lie], keeper.gc)
    else:
        assert keeper.gc()["blocks"] == 0
    assert keeper.stored() == before


def test_a_history_without_its_beginning_stops_the_collection(keeper, refuses):
    """A hidden version that is kept would not be protected."""
    for i in range(4):
        keeper.save(("file", pattern(i, 70_000)))
    session, share = keeper.device.session, keeper.share().row.share
    record = Retention(share, 1, (3, 4, 5), 5).sign(session.identity.signing)
    keeper.world.run(session.metadata.retain, share, record)
    keeper.restart()
    session = keeper.device.session
    wrapped = evil.EvilMetadata(session.metadata)
    wrapped.on("heads", lambda blobs: blobs[2:], share)
    session.services.metadata = wrapped
    before = keeper.stored()
    refuses("gc_unsafe", keeper.gc)
    assert keeper.stored() == before


def test_a_rollback_collects_nothing(keeper, refuses):
    for i in range(4):
        keeper.save(("file", pattern(i, 70_000)))
    keeper.prune(last=1)
    keeper.device.close()
    share_id = evil.shares(keeper.device.metadata)[0]
    evil.roll_back_head(keeper.device.metadata, share_id, 4)
    keeper.device.start()
    before = keeper.stored()
    refuses("head_rollback", keeper.gc)
    assert keeper.stored() == before


def test_pruning_goes_on_after_an_accepted_rollback(keeper):
    """With the home open all the time: what it remembers of the newer store must not come in the way."""
    for i in range(4):
        keeper.save(("file", pattern(i, 70_000)))
    metadata, share = keeper.device.session.metadata, keeper.share().row.share
    keeper.prune(last=2)
    old = keeper.world.run(metadata.retention, share)
    for i in range(3):
        keeper.save(("file", pattern(10 + i, 70_000)))
    keeper.prune(last=1)
    evil.roll_back_head(keeper.device.metadata, share, 5)
    with evil.opened(keeper.device.metadata) as db:
        db.execute("UPDATE retentions SET seq = 1, blob = ? WHERE share = ?", (old, share))
    with pytest.raises(MeshkitError) as refused:
        keeper.gc()
    assert refused.value.code == "head_rollback"
    keeper.world.run(keeper.device.session.book.accept_rollback, keeper.share())
    assert keeper.prune(last=1) == [4]
    assert keeper.gc()["versions"] == 4
    assert keeper.need(5)[1] == {"file": pattern(3, 70_000)}


# -- the walk itself


def test_what_is_staged_is_found_without_reading_anything_else(keeper):
    """As the share itself asks it: which blocks of the spool does a root still need?"""
    view = keeper.view()
    view.mkdir("dir")
    keeper.save(("dir/untouched", pattern(1, BIG)), ("dir/changed", pattern(2, BIG)), ("small", b"x"))
    session, row = keeper.device.session, keeper.share().row
    honest = session.services.metadata
    wrapped = evil.EvilMetadata(honest)

    async def away(_):
        raise MeshkitError("metadata_unavailable", "evil")

    wrapped.publish = away
    session.services.metadata = wrapped
    fh = view.open("dir/changed")
    view.pwrite(fh, 0, b"unsent")
    view.release(fh)
    with pytest.raises(MeshkitError):
        keeper.device.flush()
    commit = session.state.local_commit(row.share)
    staged = {digest for digest, _ in session.state.staged(row.share)}
    visited, fetched = [], []

    async def fetch(digest):
        fetched.append(digest)
        return await session.services.reader.verified(digest)

    async def lease():
        return await keeper.share().use("read")

    walk = Walk(lease, fetch, visit=visited.append, descend=staged.__contains__)
    keeper.world.run(walk.run, [root_piece(row.oid, commit.root, commit.epoch, commit.version)])
    assert set(fetched) < staged  # the changed block itself is content: named, not opened
    assert staged <= {piece.digest for piece in visited}
    depths = [piece.depth for piece in visited]
    assert len({piece.digest for piece in visited}) == len(visited)
    assert depths[0] == 0
    assert pattern(1, 4).hex() not in repr(visited)
    session.services.metadata = honest


# -- anything


def play(place, seed, steps):
    """A random history, pruned and collected at random; kept versions stay as they were, to the byte."""
    chance = random.Random(seed)
    with World() as world:
        keeper = Keeper(place, world)
        view, content = keeper.view(), {}
        truth: dict[int, dict[str, bytes]] = {1: {}}
        writers: list[bytes] = []
        given_up: set[int] = set()
        for step in range(steps):
            what = chance.choice(["write", "write", "patch", "remove", "rename", "link", "prune", "gc"])
            name = f"file {chance.randrange(4)}"
            there = sorted(content)
            if what == "write":
                data = pattern(chance.randrange(1 << 16), chance.choice([10, 20_000, 150_000]))
                view.write(name, data)
                for other in [n for n in there if view.attr(n).ino == view.attr(name).ino]:
                    content[other] = data
                content[name] = data
            elif what == "patch" and there:
                name = chance.choice(there)
                data = content[name]
                at = chance.randrange(len(data))
                fh = view.open(name)
                view.pwrite(fh, at, b"patched %d" % step)
                view.release(fh)
                changed = view.read(name)
                for other in [n for n in there if view.attr(n).ino == view.attr(name).ino]:
                    content[other] = changed
            elif what == "remove" and there:
                name = chance.choice(there)
                view.unlink(name)
                del content[name]
            elif what == "rename" and there:
                old = chance.choice(there)
                view.rename(old, f"moved {step}")
                content[f"moved {step}"] = content.pop(old)
            elif what == "link" and there:
                old = chance.choice(there)
                view.link(old, f"link {step}")
                content[f"link {step}"] = content[old]
            elif what == "prune":
                given_up |= set(keeper.prune(last=chance.randrange(1, 4), hourly=chance.randrange(3)))
            elif what == "gc":
                keeper.gc()
                kept = sorted(truth.keys() - given_up)
                assert keeper.stored().keys() == keeper.needs(kept)
            number = keeper.publish()
            truth.setdefault(number, dict(content))
            if chance.randrange(5) == 0:
                keeper.restart()
                view = keeper.view()
        keeper.gc()
        kept = sorted(truth.keys() - given_up)
        for number in kept:
            assert keeper.need(number, writers)[1] == truth[number], number
        assert keeper.stored().keys() == keeper.needs(kept)
        found = world.run(lambda: verify(keeper.share(), live=False, resume=False, progress=keeper.progress))
        assert (found.broken, found.versions) == ([], len(kept))
        keeper.device.close()


@settings(deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_any_history(seed):
    place = scratch()
    try:
        play(place, seed, 14)
    finally:
        shutil.rmtree(place)


@pytest.mark.long
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_any_long_history(seed):
    place = scratch()
    try:
        play(place, seed, 40)
    finally:
        shutil.rmtree(place)
