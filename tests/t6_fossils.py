"""Files that older versions of this program have left behind stay usable. (metadata.db: t1_metadata_contract.)"""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from meshkitfs.errors import MeshkitError
from meshkitfs.state import LocalCommit, Mark, ShareRow, State

KEY = bytes(range(32))
FOSSIL = Path(__file__).parent / "fossils" / "state-1.sql"
SHARE = b"s" * 16
COMMIT = LocalCommit(SHARE, b"r" * 32, 1, 3, b"h" * 32, b"b" * 32, 1, 2)


def connect(path):
    connection = apsw.Connection(str(path))
    connection.pragma("hexkey", KEY.hex())
    return connection


@pytest.fixture
def old(tmp_path):
    """A state.db as version 1 made it, with a share and unsent work in it."""
    path = tmp_path / "state.db"
    connection = connect(path)
    connection.pragma("journal_mode", "wal")
    connection.execute(FOSSIL.read_text())
    connection.execute(
        "INSERT INTO shares VALUES (?, ?, ?, 'first', 0, 'live', ?, 'alice', 1, 448, 5, 6)",
        (SHARE, SHARE, b"o" * 16, b"p" * 32),
    )
    connection.execute("UPDATE shares SET name = CAST(name AS BLOB)")
    connection.execute("INSERT INTO marks VALUES (?, 4, ?, 2, ?)", (SHARE, b"x" * 32, b"h" * 32))
    connection.execute(
        "INSERT INTO commits VALUES (?,?,?,?,?,?,?,?)",
        tuple(getattr(COMMIT, name) for name in LocalCommit.__slots__),
    )
    connection.execute("INSERT INTO staged VALUES (?, ?, 700)", (b"d" * 32, SHARE))
    connection.execute("INSERT INTO settings VALUES ('clock_floor', 1790000000)")
    connection.pragma("user_version", 1)
    connection.close()
    return path


def test_a_state_of_version_1_is_brought_up_to_date(old, tmp_path):
    for _ in range(2):  # the second time there is nothing to do
        state = State.open(old, KEY)
        (row,) = state.shares()
        assert row == ShareRow(
            SHARE, SHARE, b"o" * 16, b"first", 0, "live", b"p" * 32, "alice", True, 448, 5, 6
        )
        assert state.mark(SHARE) == Mark(4, b"x" * 32, 2, b"h" * 32)
        assert state.local_commit(SHARE) == COMMIT
        assert state.staged(SHARE) == [(b"d" * 32, 700)]
        assert state.setting("clock_floor") == 1790000000
        state.add_job_items("verify", [b"one", b"two"])
        state.add_job_items("verify", [b"two"])
        assert state.job_items("verify") == {b"one", b"two"}
        assert state.job_items("other") == set()
        state.end_job("verify")
        assert state.job_items("verify") == set()
        state.close()
    State.open(tmp_path / "new.db", KEY, create=True).close()
    tables = "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite%' ORDER BY name"
    migrated, fresh = connect(old), connect(tmp_path / "new.db")
    assert migrated.execute(tables).fetchall() == fresh.execute(tables).fetchall()
    assert migrated.pragma("user_version") == fresh.pragma("user_version")
    migrated.close()
    fresh.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(old):
    connection = connect(old)
    connection.execute("CREATE TABLE jobs(something)")  # in the way
    connection.close()
    with pytest.raises(MeshkitError) as refused:
        State.open(old, KEY)
    assert refused.value.code == "state_corrupt"
    connection = connect(old)
    assert connection.pragma("user_version") == 1
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert "outgoing" not in names
    connection.execute("DROP TABLE jobs")
    connection.close()
    State.open(old, KEY).close()


def test_a_state_of_a_later_version_is_refused_and_left_alone(old):
    connection = connect(old)
    connection.pragma("user_version", 99)
    connection.close()
    with pytest.raises(MeshkitError) as refused:
        State.open(old, KEY)
    assert refused.value.code == "state_corrupt"
    connection = connect(old)
    assert connection.pragma("user_version") == 99
    connection.close()
