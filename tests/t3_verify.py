"""verify and repair: every kind of damage is found and named, and mended from another copy of the store."""

from __future__ import annotations

import json
import re
import shutil
import time

import evil
import pytest
from devices import Device, pattern
from keeping import BIG, Keeper

from meshkitfs.cli import main
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import LocalStore, _scrub
from meshkitfs.shares import Rules, _sealer, _verify, collect, prune


@pytest.fixture
def keeper(tmp_path):
    keeper = Keeper(tmp_path / "alice")
    view = keeper.view()
    view.mkdir("dir")
    keeper.save(("dir/large", pattern(1, BIG)), ("dir/small", b"small"))  # version 2
    view.link("dir/large", "dir/again")
    view.mkdir("many")
    keeper.save(*((f"many/{i:03}", b"%d" % i) for i in range(90)))  # 3: with pages
    keeper.save(("dir/small", b"changed"))  # 4
    keeper.save(("dir/other", pattern(2, 100_000)))  # 5
    yield keeper
    keeper.world.close()


def check(keeper, **options):
    (found,) = keeper.call("verify", shares=[keeper.name], **options)["shares"]
    return found


def digests_of(keeper, path, *, data=True):
    """The blocks of a file: of its manifest (``data`` false) or of its content."""
    from meshkitfs.shares._walk import Walk, root_piece

    found, share = [], keeper.share()
    keeper.world.run(lambda: share.use("read", current=True))
    base = share.base

    async def lease():
        return await share.use("read")

    walk = Walk(lease, share.services.reader.verified, visit=found.append)
    keeper.world.run(walk.run, [root_piece(share.row.oid, base.root, base.epoch, base.version)])
    return [
        piece.digest
        for piece in found
        if walk.names.get(piece.path, piece.path) == path and (piece.below is None) == data
    ]


def test_a_whole_share(keeper):
    before = keeper.stored()
    data = sum(len(digests_of(keeper, path)) for path in (b"dir/again", b"dir/other"))
    assert data >= 3
    store = keeper.device.session.store
    keeper.world.run(lambda: keeper.share().use("read", current=True))
    store.counters.gets = 0
    found = check(keeper)
    assert found == {
        "share": "first", "failure": None, "versions": 5, "blocks": len(before), "before": 0, "closed": 0,
        "broken": [],
    }  # fmt: skip
    # Manifests and pages are read once to count and once to verify, data blocks once.
    assert store.counters.gets == 2 * len(before) - data
    live = check(keeper, live=True)
    assert live["versions"] == 1
    assert live["blocks"] == len(keeper.need(5)[0])


DAMAGE = {
    "bit": (lambda store, one, other: evil.flip_file(store, one), "cid_mismatch"),
    "missing": (lambda store, one, other: evil.remove_file(store, one), "block_unavailable"),
    "truncated": (lambda store, one, other: evil.truncate_file(store, one), "cid_mismatch"),
    "extended": (lambda store, one, other: evil.extend_file(store, one), "cid_mismatch"),
    "empty": (lambda store, one, other: evil.overwrite(evil.block_path(store, one), b""), "cid_mismatch"),
    "another": (
        lambda store, one, other: evil.overwrite(
            evil.block_path(store, one), evil.block_path(store, other).read_bytes()
        ),
        "cid_mismatch",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_every_damage_is_found_with_what_needs_it(keeper, tmp_path, how):
    damage, code = DAMAGE[how]
    shutil.copytree(keeper.device.blocks, tmp_path / "copy")
    (linked, *_) = digests_of(keeper, b"dir/again")
    (manifest,) = digests_of(keeper, b"many/050", data=False)
    page = digests_of(keeper, b"many", data=False)[-1]
    keeper.restart()
    other = digests_of(keeper, b"dir/other")[0]
    damage(keeper.device.blocks, linked, other)
    damage(keeper.device.blocks, manifest, other)
    assert check(keeper)["broken"] == [
        {
            "cid": cid_text(linked), "kind": "block", "code": code,
            "paths": ["dir/again", "dir/large"], "versions": [2, 3, 4, 5],
        },
        {
            "cid": cid_text(manifest), "kind": "manifest", "code": code, "paths": ["many/050"],
            "versions": [3, 4, 5],
        },
    ]  # fmt: skip
    damage(keeper.device.blocks, page, other)
    kinds = {item["kind"] for item in check(keeper)["broken"]}
    assert "page" in kinds
    done = keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'copy'}"])
    assert done == {"share": "first", "repaired": 3, "broken": []}
    assert check(keeper)["broken"] == []
    whole = {digest: path.read_bytes() for digest, path in evil.all_blocks(tmp_path / "copy").items()}
    assert keeper.stored() == whole


def test_the_root_of_an_old_version(keeper):
    root = keeper.share().history
    keeper.world.run(root.refresh, keeper.share().grant)
    third = root.versions[2]
    evil.flip_file(keeper.device.blocks, third.root)
    assert check(keeper)["broken"] == [
        {
            "cid": cid_text(third.root), "kind": "manifest", "code": "cid_mismatch", "paths": ["/"],
            "versions": [3],
        }
    ]  # fmt: skip
    assert check(keeper, live=True)["broken"] == []
    # A version that was given up is nobody's concern any more.
    keeper.prune(last=2)
    assert check(keeper)["broken"] == []


def test_a_block_that_was_sealed_for_another_place(keeper, monkeypatch, tmp_path):
    """Its name is right; only who has the key can see it."""
    real = _sealer.seal_block

    def careless(where, plain, size):
        return real(type(where).block(bytes(16), 7), plain, size)

    monkeypatch.setattr(_sealer, "seal_block", careless)
    keeper.save(("careless", pattern(5, 60_000)))
    monkeypatch.undo()
    keeper.restart()
    (broken,) = check(keeper)["broken"]
    assert (broken["code"], broken["paths"], broken["versions"]) == ("invalid_envelope", ["careless"], [6])
    # No copy of it is any better.
    shutil.copytree(keeper.device.blocks, tmp_path / "copy")
    done = keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'copy'}"])
    assert done == {"share": "first", "repaired": 0, "broken": [broken]}


def test_a_store_that_is_away_is_no_damage(keeper):
    (away, *_) = digests_of(keeper, b"dir/other")
    keeper.restart()
    wrapped = evil.EvilStore(keeper.device.session.store)
    wrapped.on_get(evil.failing(), away)
    keeper.device.session.services.reader.store = wrapped
    found = check(keeper)
    assert found["failure"]["code"] == "provider_request_failed"
    assert found["broken"] == []
    job = f"broken:{keeper.share().row.ref.hex()}"
    assert keeper.device.session.state.job_items(job) == set()


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_was_cut_off_is_gone_on_with(keeper, monkeypatch, resume):
    names = [f"file {i}" for i in range(24)]
    keeper.save(*((name, pattern(i, 20_000)) for i, name in enumerate(names)))
    data = {digest for name in names for digest in digests_of(keeper, name.encode())}
    assert len(data) == 24
    data |= {*digests_of(keeper, b"dir/again"), *digests_of(keeper, b"dir/other")}
    monkeypatch.setattr(_verify, "_NOTE", 1)
    keeper.restart()
    session = keeper.device.session
    wrapped = evil.EvilStore(session.store)
    session.services.reader.store = wrapped
    asked = []

    async def cut_off(inner, digest):
        asked.append(digest)
        if len(data.intersection(asked)) > 16:
            raise MeshkitError("provider_request_failed", "evil")
        return await inner.get(digest)

    wrapped.on_get(cut_off)
    assert check(keeper)["failure"]["code"] == "provider_request_failed"
    done = session.state.job_items(f"verify:{keeper.share().row.ref.hex()}")
    assert 8 <= len(done) < len(data)
    assert done <= data
    wrapped.heal()
    keeper.restart()
    session = keeper.device.session
    wrapped = evil.EvilStore(session.store)
    session.services.reader.store = wrapped
    found = check(keeper, resume=resume)
    read = {digest for what, digest in wrapped.log if what == "get"}
    assert found["broken"] == []
    assert found["blocks"] == len(keeper.stored())
    if resume:
        assert not read & done
        assert found["before"] == len(done) > 0
    else:
        assert read >= data
        assert found["before"] == 0
    # It came to its end: the next one begins anew.
    assert check(keeper, resume=True)["before"] == 0


def test_what_is_given_up_and_collected_meanwhile_is_no_damage(keeper):
    keeper.save(("dir/other", pattern(7, 100_000)))
    session = keeper.device.session
    wrapped = evil.EvilStore(session.store)
    done = []

    async def collect_first(inner, digest):
        if len(done) == 60:  # well after it has learnt which versions are kept
            session.services.reader.store = inner
            await prune(keeper.share(), Rules(last=1), dry_run=False)
            await collect(keeper.share(), 0, dry_run=False, progress=keeper.progress)
            session.services.reader.store = wrapped
        done.append(digest)
        return await inner.get(digest)

    wrapped.on_get(collect_first)
    session.services.reader.store = wrapped
    before = len(keeper.stored())
    found = keeper.world.run(
        lambda: _verify.verify(keeper.share(), live=False, resume=False, progress=keeper.progress)
    )
    assert len(keeper.stored()) < before
    assert found.broken == []
    assert session.state.job_items(f"broken:{keeper.share().row.ref.hex()}") == set()
    session.services.reader.store = session.store


def test_versions_older_than_a_grant_are_closed(keeper, tmp_path):
    bob = Device(keeper.world, tmp_path / "bob", "bob", beside=keeper.device).start()
    carol = Device(keeper.world, tmp_path / "carol", "carol", beside=keeper.device).start()
    keeper.device.grant("first", carol)
    keeper.world.run(keeper.device.session.book.revoke, keeper.share(), "carol")
    keeper.device.grant("first", bob)
    found = keeper.world.run(
        lambda: _verify.verify(bob.share(), live=False, resume=False, progress=keeper.progress)
    )
    assert (found.versions, found.closed, found.broken) == (1, 5, [])
    assert check(keeper)["versions"] == 6


def test_a_snapshot_is_verified_too(keeper, tmp_path):
    from t3_keeping import granted_snapshot

    bob = granted_snapshot(keeper, tmp_path, "dir")
    (linked, *_) = digests_of(keeper, b"dir/other")
    world = keeper.world

    def run():
        return world.run(
            lambda: _verify.verify(bob.share("snap"), live=False, resume=False, progress=keeper.progress)
        )

    assert run().broken == []
    evil.flip_file(keeper.device.blocks, linked)
    (broken,) = run().broken
    assert (broken.digest, broken.paths) == (linked, [b"other"])


# == repair ==============================================================================================


def test_what_is_behind_something_missing_is_repaired_too(keeper, tmp_path):
    keeper.restart()
    (directory,) = digests_of(keeper, b"dir", data=False)
    other = digests_of(keeper, b"dir/other")
    manifest = digests_of(keeper, b"dir/other", data=False)
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        shutil.copytree(keeper.device.blocks, copy)
    for digest in (directory, *manifest, *other):
        evil.remove_file(keeper.device.blocks, digest)
    evil.remove_file(copies[0], other[0])
    evil.flip_file(copies[0], manifest[0])
    keeper.restart()
    assert [item["cid"] for item in check(keeper)["broken"]] == [cid_text(directory)]
    done = keeper.call("repair", share="first", sources=[f"local:{copies[0]}"])
    assert done["repaired"] == 1
    assert [item["cid"] for item in done["broken"]] == [cid_text(manifest[0])]
    assert manifest[0] not in keeper.stored()  # a damaged copy is never stored
    done = keeper.call("repair", share="first", sources=[f"local:{copy}" for copy in copies])
    assert done == {"share": "first", "repaired": 1 + len(other), "broken": []}
    assert keeper.need(5)


def test_repair_without_a_verify_before_finds_out_itself(keeper, tmp_path):
    shutil.copytree(keeper.device.blocks, tmp_path / "copy")
    assert keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'copy'}"])["repaired"] == 0
    (block, *_) = digests_of(keeper, b"dir/other")
    evil.flip_file(keeper.device.blocks, block)
    assert keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'copy'}"])["repaired"] == 1


def test_the_spool_is_asked_before_anything_else(keeper, tmp_path):
    LocalStore.open(tmp_path / "nothing", create=True)
    (block, *_) = digests_of(keeper, b"dir/other")
    stored = keeper.device.session.store.get_now(block)
    keeper.device.session.services.spool.write(stored)
    evil.flip_file(keeper.device.blocks, block)
    assert keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'nothing'}"])["repaired"] == 1


def test_a_source_that_is_not_there_is_an_error(keeper, tmp_path):
    with pytest.raises(MeshkitError) as refused:
        keeper.call("repair", share="first", sources=[f"local:{tmp_path / 'nothing'}"])
    assert refused.value.code == "provider_request_failed"


# == the commands ========================================================================================


@pytest.fixture
def run(keeper, capsys, monkeypatch):
    """The command line on the keeper's home, without a daemon."""
    keeper.device.close()
    for name in ("MESHKIT_CONFIG", "MESHKITFS_HOME", "MESHKITFS_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, home=True):
        where = ("--home", str(keeper.device.root)) if home else ()
        code = main([*where, "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, json.loads(out or err)

    yield run
    if keeper.device.session is None:
        keeper.device.start()


def test_the_commands_from_prune_to_repair(run, keeper, tmp_path):
    blocks = keeper.device.blocks
    assert run("prune", "first")[0] == 2
    assert run("prune", "nosuch", "--keep-last", 1)[0] == 2
    assert run("prune", "first", "--keep-last", 0)[0] == 2
    assert run("prune", "first", "--keep-within", "long")[0] == 2
    code, shown = run("prune", "first", "--keep-last", 2, "--dry-run")
    assert (code, shown["given_up"], shown["dry_run"]) == (0, 3, True)
    assert run("prune", "first", "--keep-last", 2, "--keep-yearly", 1)[1]["given_up"] == 3
    count = len(evil.all_blocks(blocks))
    code, shown = run("gc", "first")
    assert (code, shown["waiting"], shown["blocks"]) == (0, 3, 0)
    code, shown = run("gc", "first", "--grace", "0d")
    assert (code, shown["deleted"], shown["versions"]) == (0, False, 3)
    assert len(evil.all_blocks(blocks)) == count
    code, done = run("gc", "first", "--grace", "0d", "--yes")
    assert (code, done) == (0, shown | {"deleted": True})
    assert len(evil.all_blocks(blocks)) == count - shown["blocks"]
    code, found = run("verify")
    assert (code, found["shares"][0]["versions"], found["shares"][0]["broken"]) == (0, 2, [])
    shutil.copytree(blocks, tmp_path / "copy")
    victim = sorted(evil.all_blocks(blocks))[0]
    evil.flip_file(blocks, victim)
    code, found = run("verify", "first", "--versions", "all")
    assert (code, found["shares"][0]["broken"][0]["cid"]) == (6, cid_text(victim))
    LocalStore.open(tmp_path / "nothing", create=True)
    code, done = run("repair", "first", "--from", f"local:{tmp_path / 'nothing'}")
    assert (code, done["repaired"], len(done["broken"])) == (6, 0, 1)
    code, done = run(
        "repair", "first", "--from", f"local:{tmp_path / 'nothing'}", "--from", f"local:{tmp_path / 'copy'}"
    )
    assert (code, done["repaired"], done["broken"]) == (0, 1, [])
    assert run("verify", "first", "--resume")[0] == 0
    assert run("verify", "first", "--cursor", tmp_path / "x")[0] == 2
    evil.remove_file(blocks, victim)
    blocks.rename(tmp_path / "away")
    assert run("verify", "first")[0] == 7
    (tmp_path / "away").rename(blocks)


def test_what_a_person_reads(run, keeper, capsys, tmp_path):
    victim = sorted(evil.all_blocks(keeper.device.blocks))[0]

    def said(*arguments):
        code = main(["--home", str(keeper.device.root), *arguments])
        return code, capsys.readouterr().out

    code, out = said("prune", "first", "--keep-last", "1")
    assert (code, "4 of 5 versions are given up" in out, "give up" in out) == (0, True, True)
    code, out = said("gc", "first")
    assert "4 versions were given up less than 7d ago and wait." in out
    assert "all whole" in said("verify")[1]
    evil.flip_file(keeper.device.blocks, victim)
    code, out = said("verify", "--store", f"local:{keeper.device.blocks}")
    assert code == 6
    assert f"  {cid_text(victim)}  cid_mismatch" in out


def test_a_time_that_is_shown_means_the_version_it_is_shown_for(run, keeper, capsys, monkeypatch):
    """Wherever the machine is, and in the hour that a clock shows twice when summer ends."""
    keeper.device.start()
    twice = 1792888200  # 2026-10-25T00:30:00Z: in Berlin half past two, and an hour later again
    times = {keeper.save(("a", b"%d" % i), at=twice + i * 3600): i for i in range(2)}
    keeper.device.close()
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert main(["--home", str(keeper.device.root), "history", "first"]) == 0
        shown = re.findall(r"v([0-9]+) +([0-9-]{10} [0-9:]{8}Z)", capsys.readouterr().out)
        assert [int(number) for number, _ in shown] == [7, 6, 5, 4, 3, 2, 1]
        for number, when in shown[:2]:
            assert when == f"2026-10-25 0{times[int(number)]}:30:00Z"
            code, done = run("restore", "first/a", "--at", when, "--to", f"first/as of {number}")
            assert (code, done["version"]) == (0, int(number))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_operator_verifies_a_store_without_keys(run, keeper, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    blocks = keeper.device.blocks
    spec = f"local:{blocks}"
    code, found = run("verify", "--store", spec, home=False)
    every = evil.all_blocks(blocks)
    assert (code, found["blocks"], found["broken"], found["foreign"]) == (0, len(every), [], [])
    one, two, three = sorted(every)[:3]
    evil.flip_file(blocks, one)
    evil.truncate_file(blocks, two)
    evil.swap_files(blocks, three, sorted(every)[3])
    stranger = blocks / "aa" / "notes.txt"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"mine")
    code, found = run("verify", "--store", spec, home=False)
    assert code == 6
    wrong = {cid_text(digest) for digest in sorted(every)[:4]}
    assert {item["cid"] for item in found["broken"]} == wrong
    assert found["foreign"] == ["aa/notes.txt"]
    assert stranger.read_bytes() == b"mine"
    assert not (tmp_path / "nobody").exists()
    assert run("verify", "--store", f"local:{tmp_path / 'nothing'}", home=False)[0] == 7
    assert run("verify", "first", "--store", spec, home=False)[0] == 2


def test_an_operator_goes_on_where_it_was_cut_off(run, keeper, tmp_path, monkeypatch):
    blocks, cursor = keeper.device.blocks, tmp_path / "cursor"
    every = evil.all_blocks(blocks)
    order = sorted(every, key=LocalStore.place)
    evil.flip_file(blocks, order[0])
    monkeypatch.setattr(_scrub, "_BATCH", 4)
    read, real = [], LocalStore.get

    async def get(store, digest):
        if len(read) == 10:
            raise MeshkitError("provider_request_failed", "cut off")
        read.append(digest)
        return await real(store, digest)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", get)
        assert run("verify", "--store", f"local:{blocks}", "--cursor", cursor, home=False)[0] == 7
    first = set(order[:8])
    again = []

    async def count(store, digest):
        again.append(digest)
        return await real(store, digest)

    monkeypatch.setattr(LocalStore, "get", count)
    assert run("verify", "--store", f"local:{tmp_path / 'x'}", "--cursor", cursor, home=False)[0] in (2, 7)
    code, found = run("verify", "--store", f"local:{blocks}", "--cursor", cursor, home=False)
    assert (code, found["resumed"], found["blocks"]) == (6, True, len(every))
    assert [item["cid"] for item in found["broken"]] == [cid_text(order[0])]  # found before the cut
    assert set(again) == set(order) - first
    assert not cursor.exists()
    cursor.write_text("something else")
    assert run("verify", "--store", f"local:{blocks}", "--cursor", cursor, home=False)[0] == 2
    assert cursor.read_text() == "something else"
    # Where it cannot be kept is told before anything is read, however small the store.
    nowhere = tmp_path / "nowhere" / "cursor"
    assert run("verify", "--store", f"local:{blocks}", "--cursor", nowhere, home=False)[0] == 2
