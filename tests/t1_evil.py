"""The evil fixtures are as evil as they say, and the honest components notice.

Each fault is shown twice: that it really is one (the answer is wrong in the way it claims), and what the
component that stands behind it makes of it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import evil
import pytest
import trio
from t1_metadata_contract import NOW, Share

from meshkitfs.core.blocks import MAX_SEALED, SealedBlock, Where, seal_block
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.records import Capsule, Head, Roster, Timestamp, record_hash
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata, Metadata
from meshkitfs.providers import ByteStore, LocalStore

OID = bytes(range(16))


def run(function, *args):
    return trio.run(partial(function, *args))


def fails(code: str, function, *args) -> None:
    with pytest.raises(MeshkitError) as excinfo:
        run(function, *args)
    assert excinfo.value.reason.code == code


def invalid(parse, *args) -> None:
    with pytest.raises(MeshkitError) as excinfo:
        parse(*args)
    assert excinfo.value.reason.code == "invalid_record"


# -- the byte store, in the process ----------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> evil.EvilStore:
    return evil.EvilStore(LocalStore.open(tmp_path / "blocks", create=True))


@pytest.fixture
def blocks(store) -> list[SealedBlock]:
    made = [seal_block(Where.block(OID, i), os.urandom(5000))[1] for i in range(3)]
    for block in made:
        run(store.put, block)
    return made


def test_an_evil_store_is_a_byte_store(store, blocks):
    assert isinstance(store, ByteStore)
    assert store.local
    assert bytes(run(store.get, blocks[0].digest).data) == bytes(blocks[0].data)
    assert run(store.has_many, [b.digest for b in blocks]) == {b.digest for b in blocks}
    run(store.delete, blocks[0].digest)
    assert not run(store.has, blocks[0].digest)
    run(store.sync)
    assert store.usage().total_bytes
    assert [method for method, _ in store.log] == ["put"] * 3 + ["get"] + ["has"] * 3 + [
        "delete",
        "has",
        "sync",
    ]


@pytest.mark.parametrize(
    "fault",
    [
        evil.flip(),
        evil.flip(0),
        evil.flip(-1),
        evil.truncate(),
        evil.truncate(5000),
        evil.extend(),
        evil.extend(bytes(MAX_SEALED)),
        evil.instead(b""),
        evil.instead(b"<html>502 Bad Gateway</html>"),
    ],
)
def test_spoiled_bytes_never_become_a_verified_block(store, blocks, fault):
    store.on_get(fault, blocks[0].digest)
    fails("cid_mismatch", store.get, blocks[0].digest)
    assert run(store.get, blocks[1].digest).digest == blocks[1].digest
    store.heal()
    assert run(store.get, blocks[0].digest).digest == blocks[0].digest


def test_swapped_missing_failing(store, blocks):
    first, second, third = (block.digest for block in blocks)
    store.on_get(evil.swap(second), first)
    store.on_get(evil.missing(), second)
    store.on_get(evil.failing(), third)
    fails("cid_mismatch", store.get, first)
    fails("block_unavailable", store.get, second)
    fails("provider_request_failed", store.get, third)


def test_a_lying_provider_returns_a_genuine_block_that_was_not_asked_for(store, blocks):
    first, second, _ = (block.digest for block in blocks)
    store.on_get(evil.lie(second), first)
    assert run(store.get, first).digest == second  # what a reader has to compare


def test_faults_for_all_and_for_a_while(store, blocks):
    store.on_get(evil.missing(), times=2)
    for _ in range(2):
        fails("block_unavailable", store.get, blocks[0].digest)
    assert run(store.get, blocks[0].digest)
    store.on_get(evil.flip(), blocks[0].digest)
    assert run(store.get_many, [b.digest for b in blocks]).keys() == {b.digest for b in blocks[1:]}
    store.on_get(evil.missing())
    store.on_get(evil.missing(), blocks[0].digest)
    for block in blocks:
        fails("block_unavailable", store.get, block.digest)


def test_puts_that_fail_or_are_forgotten(store, tmp_path):
    block = seal_block(Where.block(OID, 9), b"x")[1]
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)
    store.on_put = "no_space"
    fails("no_space", store.put, block)
    fails("no_space", store.put_file, block.digest, spool)
    store.on_sync = "provider_request_failed"
    fails("provider_request_failed", store.sync)
    store.heal()
    store.forgets = True
    run(store.put, block)
    run(store.put_files, [(block.digest, spool)])
    assert not run(store.has, block.digest)
    store.claims.add(block.digest)
    assert run(store.has, block.digest)
    fails("block_unavailable", store.get, block.digest)


# -- the byte store, on disk -----------------------------------------------------------------------


def test_spoiling_the_files_of_a_store(tmp_path, store, blocks):
    place, honest = tmp_path / "blocks", store.inner
    first, second, third = (block.digest for block in blocks)
    assert evil.all_blocks(place).keys() == {first, second, third}

    def restore():
        for block in blocks:
            run(honest.put, block)
            run(honest.get, block.digest)

    for spoil in (evil.flip_file, evil.truncate_file, evil.extend_file):
        spoil(place, first)
        fails("cid_mismatch", honest.get, first)
        restore()
        spoil(place, evil.block_path(place, first).name)  # by its CID
        fails("cid_mismatch", honest.get, first)
        restore()
    evil.swap_files(place, first, second)
    fails("cid_mismatch", honest.get, first)
    fails("cid_mismatch", honest.get, second)
    restore()
    evil.remove_file(place, third)
    fails("block_unavailable", honest.get, third)


def test_spoiling_spares_the_spool_unless_told(tmp_path, store):
    block = seal_block(Where.block(OID, 9), b"x")[1]
    spool = tmp_path / "spool"
    spool.write_bytes(block.data)
    run(store.put_file, block.digest, spool)
    evil.flip_file(tmp_path / "blocks", block.digest, in_place=True)
    assert spool.read_bytes() != bytes(block.data)
    spool.write_bytes(block.data)
    mode = evil.block_path(tmp_path / "blocks", block.digest).stat().st_mode
    evil.flip_file(tmp_path / "blocks", block.digest)
    assert spool.read_bytes() == bytes(block.data)
    assert evil.block_path(tmp_path / "blocks", block.digest).stat().st_mode == mode
    assert list((tmp_path / "blocks").glob("??/.evil*")) == []


# -- metadata, in the process ----------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    opened = evil.EvilMetadata(EmbeddedMetadata.create(tmp_path / "metadata.db", clock=lambda: NOW))
    yield opened
    opened.close()


@pytest.fixture
def bob() -> EncryptionKey:
    return EncryptionKey.generate()


@pytest.fixture
def share(home, bob) -> Share:
    """A share of three heads and two rosters, granted to bob."""
    made = Share.new()
    capsule_id = os.urandom(16)
    capsule = (bob.kid, capsule_id, made.capsule(bob, id=capsule_id))
    made.publish(home, roster=made.roster(), head=made.head(), capsules=[capsule])
    made.publish(home, head=made.head())
    made.publish(home, roster=made.roster(minver=1), head=made.head())
    return made


def test_an_evil_home_is_a_metadata_home(home, share, bob):
    assert isinstance(home, Metadata)
    honest = run(home.inner.share_state, share.share, bob.kid)
    assert run(home.share_state, share.share, bob.kid) == honest
    assert run(home.head, share.share) == honest.head
    assert run(home.roster, share.share) == honest.roster
    assert run(home.timestamp, share.share) == honest.timestamp
    assert tuple(run(home.capsules, share.share, bob.kid)) == honest.capsules
    assert len(run(home.heads, share.share, 0, 9)) == 3
    letter = run(home.post_letter, bob.kid, b"x")
    assert run(home.letters, bob.kid) == [(letter, b"x")]
    run(home.delete_letter, bob.kid, letter)
    assert run(home.service_key) == run(home.inner.service_key)
    assert run(home.identity, "x") == run(home.identity_by_kid, bob.kid) == []
    assert home.tick() == home.tick()


@pytest.mark.parametrize(
    ("method", "field", "nothing"),
    [
        ("roster", "roster", None),
        ("timestamp", "timestamp", None),
        ("head", "head", None),
        ("capsules", "capsules", ()),
    ],
)
def test_withheld_damaged_unavailable(home, share, bob, method, field, nothing):
    honest = run(home.share_state, share.share, bob.kid)
    tick = home.tick()
    home.on(method, evil.withheld, share.share)
    assert home.tick() != tick
    spoiled = run(home.share_state, share.share, bob.kid)
    assert getattr(spoiled, field) == nothing
    assert replace(spoiled, **{field: getattr(honest, field)}) == honest  # and nothing else
    home.on(method, evil.damaged)
    home.heal()
    home.on(method, evil.damaged)
    assert getattr(run(home.share_state, share.share, bob.kid), field) not in (
        nothing,
        getattr(honest, field),
    )
    home.on(method, evil.unavailable(), times=1)
    fails("metadata_unavailable", home.share_state, share.share, bob.kid)
    home.heal()
    assert run(home.share_state, share.share, bob.kid) == honest
    with pytest.raises(ValueError, match="rooster"):
        home.on("rooster", evil.withheld)


def test_damaged_records_do_not_parse(home, share, bob):
    owner = {share.owner.kid: share.owner.public}
    service = {kid_of(run(home.service_key)): run(home.service_key)}
    for method in ("roster", "timestamp", "head", "capsules", "heads"):
        home.on(method, evil.damaged)
    state = run(home.share_state, share.share, bob.kid)
    invalid(Roster.parse, state.roster, owner)
    invalid(Timestamp.parse, state.timestamp, service)
    invalid(Head.parse, state.head, owner)
    invalid(Capsule.parse, state.capsules[0], owner)
    invalid(Head.parse, run(home.heads, share.share, 0, 9)[0], owner)


def test_a_stale_roster_comes_with_a_genuine_timestamp(home, share, bob):
    home.stale_roster(share.share)
    state = run(home.share_state, share.share, bob.kid)
    roster = Roster.parse(state.roster, {share.owner.kid: share.owner.public})
    assert roster.seq == 1
    stamp = Timestamp.parse(state.timestamp, {kid_of(run(home.service_key)): run(home.service_key)})
    assert stamp.roster == record_hash(state.roster)
    assert (stamp.share, stamp.iat) == (share.share, NOW)


def test_a_stale_head_is_genuine_and_old(home, share):
    for back, version in ((1, 2), (2, 1)):
        home.stale_head(share.share, back)
        head = Head.parse(run(home.head, share.share), {share.owner.kid: share.owner.public})
        assert head.ver == version
        assert len(run(home.heads, share.share, 0, 9)) == version


def test_an_old_timestamp_is_genuine_and_expired(home, share):
    home.old_timestamp(share.share, 1000)
    keys = {kid_of(run(home.service_key)): run(home.service_key)}
    stamp = Timestamp.parse(run(home.timestamp, share.share), keys)
    assert stamp.exp == NOW - 700
    assert stamp.roster == record_hash(run(home.roster, share.share))


def test_forged_records(home, share):
    owner, stranger = {share.owner.kid: share.owner.public}, SigningKey.generate()
    genuine = run(home.head, share.share)
    home.on("head", evil.fixed(evil.forged_head(genuine, stranger)))
    invalid(Head.parse, run(home.head, share.share), owner)
    fork = evil.forged_head(genuine, share.owner, root=bytes(32))
    home.on("head", evil.fixed(fork))
    head = Head.parse(run(home.head, share.share), owner)
    assert (head.ver, head.root) == (3, bytes(32))
    assert record_hash(fork) != record_hash(genuine)
    taken_over = evil.forged_roster(run(home.roster, share.share), stranger, writers=(stranger.public,))
    home.on("roster", evil.fixed(taken_over))
    invalid(Roster.parse, run(home.roster, share.share), owner)


def test_a_publish_whose_answer_is_lost_has_taken_place(home, share):
    publication = share.publication(head=share.head())
    home.on("publish", evil.unavailable(), times=1)
    fails("metadata_unavailable", home.publish, publication)
    assert run(home.head, share.share) == publication.head
    run(home.publish, publication)
    assert run(home.head, share.share) == publication.head


# -- metadata.db, on disk --------------------------------------------------------------------------


@pytest.fixture
def file(home):
    return home.inner.path


def test_reading_past_the_rules(file, home, share, bob):
    assert evil.shares(file) == [share.share]
    assert evil.newest_head(file, share.share) == run(home.head, share.share)
    assert evil.newest_roster(file, share.share) == run(home.roster, share.share)
    assert evil.capsules(file, share.share) == run(home.capsules, share.share, bob.kid)
    assert evil.service_key(file).public == run(home.service_key)


def test_rolling_back(file, home, share):
    tick = home.tick()
    evil.roll_back_head(file, share.share, 1)
    assert home.tick() != tick
    assert evil.peek(Head, run(home.head, share.share)).ver == 1
    evil.roll_back_head(file, share.share, 0)
    assert run(home.head, share.share) is None
    evil.roll_back_roster(file, share.share, 1)
    assert evil.peek(Roster, run(home.roster, share.share)).seq == 1
    evil.roll_back_roster(file, share.share, 0)
    assert run(home.roster, share.share) is None
    assert run(home.timestamp, share.share) is None


def test_replacing_and_appending(file, home, share, bob):
    stranger = SigningKey.generate()
    genuine, roster = run(home.head, share.share), run(home.roster, share.share)
    fork = evil.forged_head(genuine, share.owner, root=bytes(32))
    evil.replace_head(file, share.share, fork)
    assert run(home.head, share.share) == fork
    assert len(run(home.heads, share.share, 0, 9)) == 3
    next_one = evil.forged_head(genuine, stranger, ver=4, prev=record_hash(fork))
    evil.append_head(file, share.share, next_one)
    assert run(home.head, share.share) == next_one
    taken_over = evil.forged_roster(roster, stranger)
    evil.replace_roster(file, share.share, taken_over)
    assert run(home.roster, share.share) == taken_over
    # the home itself notices when it is to build on that
    fails("invalid_record", home.publish, share.publication(roster=share.roster()))
    carol = EncryptionKey.generate()
    capsule = evil.capsules(file, share.share)[0]
    evil.replace_capsule(file, capsule, capsule, kid=carol.kid)
    assert run(home.capsules, share.share, bob.kid) == []
    assert run(home.capsules, share.share, carol.kid) == [capsule]
    evil.drop_capsules(file, share.share)
    assert run(home.capsules, share.share, carol.kid) == []


@pytest.mark.parametrize("table", ["heads", "rosters", "capsules"])
def test_flipping_rows(file, home, share, bob, table):
    before = run(home.share_state, share.share, bob.kid)
    evil.flip_rows(file, table, share.share)
    after = run(home.share_state, share.share, bob.kid)
    field = {"heads": "head", "rosters": "roster", "capsules": "capsules"}[table]
    assert getattr(after, field) != getattr(before, field)
    with pytest.raises(ValueError, match="letters"):
        evil.flip_rows(file, "letters", share.share)


def test_another_service_key(file, home, share):
    before = run(home.service_key)
    evil.change_service_key(file)
    stamp = run(home.timestamp, share.share)
    invalid(Timestamp.parse, stamp, {kid_of(before): before})


def test_spoiling_under_another_process(file, home, share):
    """As under a daemon: the file is open there, and spoiled from here."""
    script = (
        "import sys, trio; from meshkitfs.metadata import EmbeddedMetadata\n"
        "home = EmbeddedMetadata(sys.argv[1]); share = bytes.fromhex(sys.argv[2])\n"
        "for line in sys.stdin:\n"
        "    print((trio.run(home.head, share) or b'').hex(), home.tick(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, file, share.share.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask() -> list[str]:
        process.stdin.write("?\n")
        process.stdin.flush()
        return process.stdout.readline().split()

    head, tick = ask()
    assert bytes.fromhex(head) == run(home.head, share.share)
    evil.roll_back_head(file, share.share, 2)
    older, new_tick = ask()
    assert bytes.fromhex(older) == run(home.head, share.share)
    assert (older, new_tick) != (head, tick)
    assert new_tick != tick
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0
