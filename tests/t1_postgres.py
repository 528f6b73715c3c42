"""What is particular to the PostgreSQL home: several processes, a server that goes away, stops or is full.

What it has in common with every metadata home is in t1_metadata_contract.py.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import evil
import postgres
import psycopg
import pytest
import trio
from t1_metadata_contract import NOW, Share, cluster, fails, identity, run  # noqa: F401 - a fixture

from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Head, IdentityRecord, record_hash
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _postgres, _queries, _schema
from meshkitfs.metadata.postgres import PostgresMetadata

HERE = Path(__file__).resolve().parent


@pytest.fixture
def address(cluster):  # noqa: F811
    return cluster.fresh()


@pytest.fixture
def home(address):
    opened = PostgresMetadata(address, clock=lambda: NOW)
    yield opened
    opened.close()


@pytest.fixture
def share(home):
    made = Share.new()
    made.publish(home, roster=made.roster(), head=made.head())
    return made


@pytest.fixture
def own_cluster():
    """A server that this test may kill."""
    with postgres.Cluster() as running:
        yield running


def wait_until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


# -- several processes -------------------------------------------------------------------------------


def test_two_openers_see_each_other(address, home):
    other = PostgresMetadata(address)
    ticks = {other.tick()}
    share = Share.new()
    share.publish(home, roster=share.roster(), head=share.head())
    wait_until(lambda: other.tick() not in ticks, "an announcement of another opener")
    assert run(other.head, share.share) == run(home.head, share.share)
    assert run(other.service_key) == run(home.service_key)
    other.close()


def test_announcements_name_what_has_changed(address, home, share):
    other = PostgresMetadata(address)
    heard = []
    forget = other.database.listen(heard.append)
    share.publish(home, head=share.head())
    run(home.post_letter, bytes(16), b"x")
    wait_until(lambda: b"m" + bytes(16) in heard, "the second announcement")
    assert [subject for subject in heard if subject] == [b"s" + share.share, b"m" + bytes(16)]
    forget()
    share.publish(home, head=share.head())
    stop = len(heard)
    share.publish(other, head=share.head())
    assert len(heard) == stop
    other.close()


def test_racing_openers_make_one_set_of_tables(address):
    homes, threads = [], []
    for _ in range(5):
        threads.append(threading.Thread(target=lambda: homes.append(PostgresMetadata(address))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len({run(opened.service_key) for opened in homes}) == 1
    assert len(homes) == 5
    for opened in homes:
        opened.close()


RACER = """
import sys
sys.path[:0] = [sys.argv[1]]
from t1_metadata_contract import *
address, share_hex, oid_hex, seed_hex, writes = sys.argv[2:7]
owner = SigningKey.from_seed(bytes.fromhex(seed_hex))
home = PostgresMetadata(address, seconds=60)
share = Share(owner, bytes.fromhex(share_hex), bytes.fromhex(oid_hex), seq=1)
won = lost = 0
while won < int(writes):
    newest = run(home.head, share.share)
    share.ver, share.prev = evil.peek(Head, newest).ver, record_hash(newest)
    try:
        run(home.publish, share.publication(head=share.head()))
        won += 1
    except MeshkitError as error:
        assert error.reason.code == "head_conflict", (error.reason.code, error.detail)
        lost += 1
home.close()
print(won, lost)
"""


def test_racing_processes_lose_no_head(address, home, share):
    arguments = [address, share.share.hex(), share.oid.hex(), share.owner.seed.hex(), "25"]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, HERE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outcomes = [process.communicate(timeout=200) for process in racers]
    for process, (_, said) in zip(racers, outcomes, strict=True):
        assert process.returncode == 0, said
    heads = run(home.heads, share.share, 0, 10**9)
    assert len(heads) == 1 + 3 * 25  # every success is in the chain
    for previous, following in itertools.pairwise(heads):
        assert evil.peek(Head, following).prev == record_hash(previous)
        assert evil.peek(Head, following).ver == evil.peek(Head, previous).ver + 1


def test_two_writers_with_different_versions_do_not_fork(home, share):
    """Nothing but the lock keeps these apart: their rows have different keys."""
    rivals = [share.publication(head=share.head(ver=share.ver + i)) for i in range(1, 9)]
    outcomes = []

    async def one(publication):
        try:
            await home.publish(publication)
            outcomes.append("won")
        except MeshkitError as error:
            outcomes.append(error.code)

    async def main():
        async with trio.open_nursery() as nursery:
            for publication in rivals:
                nursery.start_soon(one, publication)

    run(main)
    assert sorted(outcomes) == ["head_conflict"] * 7 + ["won"]
    assert len(run(home.heads, share.share, 0, 10**9)) == 2


def test_whoever_follows_the_numbers_misses_nothing(address, home):
    """Numbers are taken in the order of the commits: none appears behind one that was seen already."""
    writers, stop = [PostgresMetadata(address) for _ in range(4)], threading.Event()
    boxes = [os.urandom(16) for _ in range(4)]

    def write(writer, box):
        while not stop.is_set():
            run(writer.post_letter, box, b"x")
            run(writer.post_letter, os.urandom(16), b"x")

    threads = [threading.Thread(target=write, args=pair) for pair in zip(writers, boxes, strict=True)]
    seen, since = {}, 0

    def look(db):
        newest = _queries.changed(db, _queries.EVERYTHING)
        return newest, db.rows("SELECT subject, n FROM changes WHERE n > ? AND subject <> ?", since, b"")

    for thread in threads:
        thread.start()
    try:
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            since, found = run(home.read, look)
            seen.update(found)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    since, found = run(home.read, look)
    seen.update(found)
    everything = dict(
        run(home.read, lambda db: db.rows("SELECT subject, n FROM changes WHERE subject <> ?", b""))
    )
    assert len(everything) > 50
    assert seen == everything
    for writer in writers:
        writer.close()


def test_one_key_cannot_become_two_people_at_once(home):
    key = SigningKey.generate()
    first = [identity(f"person{i}", key) for i in range(6)]
    outcomes = []

    async def one(i):
        try:
            await home.publish_identity(f"person{i}", first[i])
            outcomes.append("won")
        except MeshkitError as error:
            outcomes.append(error.code)

    async def main():
        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(one, i)

    run(main)
    assert sorted(outcomes) == ["identity_handle_taken"] * 5 + ["won"]


def test_a_reader_sees_one_moment(address, home, share):
    """Somebody publishes between two queries of a reader."""
    other = PostgresMetadata(address)

    def work(db):
        before = db.rows("SELECT count(*) FROM heads")
        run_in_thread = threading.Thread(target=lambda: share.publish(other, head=share.head()))
        run_in_thread.start()
        run_in_thread.join(20)
        return before, db.rows("SELECT count(*) FROM heads")

    before, after = run(home.read, work)
    assert before == after
    assert run(home.read, lambda db: db.rows("SELECT count(*) FROM heads")) == [(before[0][0] + 1,)]
    other.close()


def test_a_reader_cannot_write(home):
    error = fails("metadata_unavailable", home.read, lambda db: db.run("DELETE FROM heads"))
    assert "ReadOnlySqlTransaction" in error.detail


# -- deadlines ---------------------------------------------------------------------------------------------


def test_a_lock_that_is_held_is_waited_for_until_the_deadline(address, home, share):
    impatient = PostgresMetadata(address, seconds=0.5)
    locked, release = threading.Event(), threading.Event()

    def hold(db):
        db.lock("share", share.share)
        locked.set()
        assert release.wait(30)

    thread = threading.Thread(target=lambda: home.database.write(hold))
    thread.start()
    try:
        assert locked.wait(30)
        publication = share.publication(head=share.head())
        fails("metadata_unavailable", impatient.publish, publication)
        assert run(impatient.head, share.share)  # reading goes on
        run(impatient.post_letter, bytes(16), b"another thing is not locked")
    finally:
        release.set()
        thread.join(30)
    run(impatient.publish, publication)
    impatient.close()


def test_a_statement_that_takes_too_long_ends(address):
    impatient = PostgresMetadata(address, seconds=0.5)
    started = time.monotonic()
    fails("metadata_unavailable", impatient.read, lambda db: db.rows("SELECT pg_sleep(30)"))
    assert time.monotonic() - started < 10
    impatient.close()


def test_a_server_that_stopped_is_unavailable_after_the_deadline(own_cluster):
    home = PostgresMetadata(own_cluster.fresh(), seconds=1.0)
    share = Share.new()
    share.publish(home, roster=share.roster(), head=share.head())
    own_cluster.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        fails("metadata_unavailable", home.head, share.share)
        publication = share.publication(head=share.head())
        fails("metadata_unavailable", home.publish, publication)
        assert time.monotonic() - started < 20
    finally:
        own_cluster.signal(signal.SIGCONT)
    wait_until(lambda: attempt(home, publication), "the server to be back")
    assert run(home.head, share.share) == publication.head
    home.close()


def attempt(home, publication):
    try:
        run(home.publish, publication)
    except MeshkitError as error:
        assert error.code == "metadata_unavailable"
        return False
    return True


# -- lost connections ----------------------------------------------------------------------------------------


def test_a_restart_of_the_server_is_not_noticed(own_cluster):
    home = PostgresMetadata(own_cluster.fresh(), seconds=20)
    share = Share.new()
    share.publish(home, roster=share.roster(), head=share.head())

    async def several():
        async with trio.open_nursery() as nursery:
            for _ in range(6):  # all connections of the pool are in use once
                nursery.start_soon(home.head, share.share)

    run(several)
    for mode in ("fast", "immediate"):
        own_cluster.stop(mode)
        assert home.tick() is not None
        own_cluster.start()
        share.publish(home, head=share.head())
        assert evil.peek(Head, run(home.head, share.share)).ver == share.ver
    home.close()


def test_a_server_that_is_away_is_unavailable_and_comes_back(own_cluster):
    home = PostgresMetadata(own_cluster.fresh(), seconds=1.0)
    share = Share.new()
    share.publish(home, roster=share.roster(), head=share.head())
    own_cluster.stop("immediate")
    for _ in range(3):
        fails("metadata_unavailable", home.head, share.share)
        fails("metadata_unavailable", home.post_letter, bytes(16), b"x")
    wait_until(lambda: home.tick() != home.tick(), "the listener to notice")
    own_cluster.start()
    publication = share.publication(head=share.head())
    wait_until(lambda: attempt(home, publication), "the server to be back")
    assert run(home.letters, bytes(16)) == []
    home.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_lost_at_the_commit(home, share, monkeypatch, when):
    """Nobody knows then whether it took place: it is repeated, and takes place once."""
    real = _postgres._Bounded.execute
    lost = []

    def execute(self, query, *args, **options):
        if query == "COMMIT" and not lost:
            lost.append(when)
            if when == "after":
                real(self, query)
            self.pgconn.finish()
            raise psycopg.OperationalError("the connection was lost")
        return real(self, query, *args, **options)

    monkeypatch.setattr(_postgres._Bounded, "execute", execute)
    publication = share.publication(head=share.head())
    run(home.publish, publication)
    assert run(home.head, share.share) == publication.head
    assert lost == [when]
    lost.clear()
    run(home.post_letter, bytes(16), b"once")
    assert [blob for _, blob in run(home.letters, bytes(16))] == [b"once"]
    assert lost == [when]


# -- the database ------------------------------------------------------------------------------------------


def refused_to_open(address):
    with pytest.raises(MeshkitError) as caught:
        PostgresMetadata(address, seconds=1).close()
    return caught.value


def test_a_database_that_is_not_durable_is_refused(address):
    error = refused_to_open(address.replace("'-c ", "'-c synchronous_commit=off -c "))
    assert error.code == "metadata_unavailable"
    assert "synchronous_commit" in error.detail


def test_no_server_no_database_and_nonsense(tmp_path, own_cluster):
    assert refused_to_open(f"host={tmp_path} user=mk").code == "metadata_unavailable"
    assert refused_to_open(f"{own_cluster.address} dbname=other").code == "metadata_unavailable"
    error = refused_to_open("this is = = no address hunter2")
    assert error.code == "invalid_config"
    assert "hunter2" not in str(error)


def test_a_password_is_in_no_error(tmp_path):
    error = refused_to_open(f"host={tmp_path} user=mk password=hunter2")
    assert "hunter2" not in f"{error} {error.detail} {error!r}"


def test_a_newer_database_is_refused_and_not_changed(address, home):
    run(home.write, lambda db: db.run("UPDATE schema_version SET version = 99"))
    assert "format 99" in refused_to_open(address).detail
    assert run(home.read, lambda db: db.rows("SELECT version FROM schema_version")) == [(99,)]


def test_a_strangers_tables_are_left_alone(address):
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE TABLE rosters (mine int)")
    assert "something else" in refused_to_open(address).detail
    with psycopg.connect(address, autocommit=True) as connection:
        assert connection.execute("SELECT * FROM rosters").description[0].name == "mine"


def test_a_database_of_version_1_is_brought_up_to_date(cluster, address):  # noqa: F811
    alice = SigningKey.generate()
    record = identity("alice", alice)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(_schema.for_postgresql((HERE / "fossils" / "metadata-1.sql").read_text()))
        connection.execute("INSERT INTO service (seed) VALUES (%s)", (os.urandom(32),))
        connection.execute("INSERT INTO identities VALUES ('alice', 0, %s)", (record,))
        connection.execute("INSERT INTO identity_keys VALUES (%s, 'alice')", (alice.kid,))
        connection.execute("CREATE TABLE schema_version (version BIGINT NOT NULL)")
        connection.execute("INSERT INTO schema_version VALUES (1)")
    old = PostgresMetadata(address)
    assert run(old.identity, "alice") == [record]
    kid = evil.peek(IdentityRecord, record).enc_kid
    assert run(old.read, lambda db: db.rows("SELECT * FROM recipients")) == [(kid, "alice")]
    new = PostgresMetadata(cluster.fresh())
    columns = (
        "SELECT table_name, ordinal_position, column_name, data_type, is_nullable "
        "FROM information_schema.columns WHERE table_schema = current_schema() ORDER BY 1, 2"
    )
    indexes = "SELECT tablename, indexname FROM pg_indexes WHERE schemaname = current_schema() ORDER BY 1, 2"
    for query in (columns, indexes):
        tables = [run(home.read, lambda db, query=query: db.rows(query)) for home in (old, new)]
        assert tables[0] == tables[1]
        assert len(tables[0]) > 10
    old.close()
    new.close()
