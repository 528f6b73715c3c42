"""What an operator does while the service runs, on SQLite and on PostgreSQL: look, remove, and what comes of it."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import psycopg
import pytest
from postgres import binaries
from service import HERE, Person, Service, refused, unb64
from t1_metadata_contract import cluster, identity  # noqa: F401 - a fixture

from meshkitfs import cli
from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import SigningKey
from meshkitfs.metadata import _desk
from meshkitfs.metadata._wire import b64

NAMES = iter(range(10**6))
CID = "bafkreif4nk5hnawxlkvrjxgpeyzvcf7xxvq6nfbzgegyiuuu5dcluxzv6q"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(request, tmp_path_factory):
    if request.param == "sqlite":
        database = tmp_path_factory.mktemp("service") / "metadata.db"
    else:
        database = request.getfixturevalue("cluster").fresh()
    with Service(database) as running:
        yield running
        assert running.stop() == 0
        assert running.said == ""


@pytest.fixture
def operate(service):
    def command(*arguments, code=0, person=False):
        out, err = io.StringIO(), io.StringIO()
        words = [*([] if person else ["--json"]), "service", *arguments, "--database", service.database]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            left = cli.main(words)
        assert left == code, err.getvalue()
        if person:
            return out.getvalue()
        return json.loads(out.getvalue() if code == 0 else err.getvalue())

    return command


def newcomer(service, name):
    return Person(f"{name}{next(NAMES)}", service).join()


@pytest.fixture
def alice(service):
    return newcomer(service, "alice")


@pytest.fixture
def bob(service):
    return newcomer(service, "bob")


def used(operate, person):
    (line,) = [m for m in operate("members")["members"] if m["handle"] == person.handle]
    return line


def test_members_shares_and_numbers(operate, alice, bob):
    before = operate("stats")
    share = alice.new_share()
    alice.grant(share, bob)
    alice.post(f"/v1/mailboxes/{bob.kid.hex()}", {"letter": b64(b"x")})
    after = operate("stats")
    assert {n: after[n] - before[n] for n in ("members", "shares", "heads", "capsules", "letters")} == {
        "members": 0, "shares": 1, "heads": 1, "capsules": 1, "letters": 1
    }  # fmt: skip
    assert after["record_bytes"] > before["record_bytes"]
    (line,) = operate("shares", "--owner", alice.handle)["shares"]
    assert line["share"] == share.share.hex()
    assert (line["version"], line["heads"], line["recipients"]) == (1, 1, 1)
    owner = used(operate, alice)
    assert owner["bytes"] == line["bytes"]
    assert (owner["shares"], owner["removed"]) == (1, None)
    assert used(operate, bob)["letters"] == 1
    assert share.share.hex() in operate("shares", person=True)
    assert alice.handle in operate("members", person=True)


def test_the_audit_log(operate, service, alice, bob):
    share = alice.new_share()
    refused(bob.publish(share, head=share.head(bob.key), check=False), 409, "head_conflict")
    everything = operate("audit", "--limit", "0")["lines"]
    (line,) = [x for x in everything if x["kind"] == "publish" and x["who"] == alice.handle]
    assert (line["subject"], line["outcome"]) == (share.share.hex(), "ok")
    assert operate("audit", "--who", alice.handle, "--limit", "1")["lines"] == [line]
    _until(lambda: operate("audit", "--who", bob.handle, "--refused")["lines"], "the refusal")
    (line,) = operate("audit", "--who", bob.handle, "--refused")["lines"]
    assert line["outcome"] == "head_conflict"
    assert operate("audit", "--since", "2100-01-01")["lines"] == []
    assert operate("audit", "--since", "1h", "--who", bob.handle)["lines"]
    assert operate("audit", "--since", "yesterday", code=2)["error"]["code"] == "invalid_argument"


def _until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"


def test_a_share_is_removed_for_everybody_and_the_quota_comes_back(operate, alice, bob):
    kept, share = alice.new_share(), alice.new_share()
    alice.grant(share, bob)
    alice.publish(share, roster=share.roster(writers=(alice.key.public, bob.key.public)))
    bob.publish(share, head=share.head(bob.key))  # bob pays for his own head
    bob.put(f"/v1/proofs/{CID}", {"share": b64(share.share), "provider": "p", "bytes": 1,
                                  "envelope": "e", "algorithms": [], "operations": [], "verified": True})  # fmt: skip
    cursor = bob.changes([share])["cursor"]
    paid = used(operate, alice)["bytes"], used(operate, bob)["bytes"]
    assert paid[1] > 0

    tried = operate("remove-share", share.share.hex())
    assert not tried["applied"]
    assert tried["affected"] == [bob.handle]
    assert alice.state(share).json()["roster"] is not None, "only tried"
    assert (used(operate, alice)["bytes"], used(operate, bob)["bytes"]) == paid

    done = operate("remove-share", share.share.hex(), "--yes")
    assert done == tried | {"applied": True}
    for person in (alice, bob):
        assert person.state(share).json() == {"capsules": [], "roster": None, "timestamp": None, "head": None}
    assert used(operate, bob)["bytes"] == 0
    (left,) = operate("shares", "--owner", alice.handle)["shares"]
    assert left["share"] == kept.share.hex()
    line = used(operate, alice)
    assert (line["bytes"], line["shares"]) == (left["bytes"], 1)
    assert done["given_back"] == {alice.handle: paid[0] - left["bytes"], bob.handle: paid[1]}
    # It stays removed, also for its owner.
    again = alice.share()
    again.share, again.oid = share.share, share.oid
    answer = alice.publish(again, roster=again.roster(), head=again.head(), check=False)
    refused(answer, 403, "metadata_forbidden", "removed")
    assert bob.changes([share, kept], after=cursor)["shares"] == []
    assert operate("remove-share", share.share.hex(), code=2)["error"]["code"] == "share_not_found"
    assert operate("remove-share", "12", code=2)["error"]["code"] == "invalid_argument"
    (line,) = [x for x in operate("audit", "--who", "-")["lines"] if x["subject"] == share.share.hex()]
    assert line["kind"] == "remove-share"


def test_a_removed_member_is_nobody_and_may_come_back(operate, service, alice, bob):
    share, theirs = bob.new_share(), alice.new_share()
    bob.grant(share, alice)
    alice.grant(theirs, bob)
    alice.post(f"/v1/mailboxes/{bob.kid.hex()}", {"letter": b64(b"x")})
    bob.post("/v1/invitations", {"expires_in": 60})
    bob.put(f"/v1/vaults/{os.urandom(16).hex()}", {"expect": 0, "record": b64(b"r" * 100), "members": []})

    tried = operate("remove-member", bob.handle)
    assert not tried["applied"]
    assert tried["left"] == [share.share.hex()]
    assert tried["granted"] == [theirs.share.hex()]
    assert tried["affected"] == [alice.handle]
    assert (tried["deleted"]["letters"], tried["deleted"]["invitations"]) == (1, 1)
    assert tried["given_back"] == {bob.handle: 100}
    assert len(bob.get(f"/v1/mailboxes/{bob.kid.hex()}").json()["letters"]) == 1, "only tried"

    assert operate("remove-member", bob.handle, "--yes") == tried | {"applied": True}
    refused(bob.get("/v1/invitations"), 401, "metadata_unauthorized", "no member")
    answer = bob.post(f"/v1/identities/{bob.handle}", {"record": b64(bob.record)})
    refused(answer, 403, "metadata_forbidden", "ended")
    assert alice.get(f"/v1/identities/{bob.handle}").json() == {"chain": []}
    assert alice.state(share).json()["roster"] is not None, "what bob has granted stays"
    stranger = Person(bob.handle, service)
    answer = stranger.post(f"/v1/identities/{bob.handle}", {"record": b64(stranger.record)})
    refused(answer, 403, "metadata_forbidden")
    assert used(operate, bob)["removed"] is not None

    operate("readmit", bob.handle)
    assert bob.get(f"/v1/mailboxes/{bob.kid.hex()}").json()["letters"] == []
    assert alice.get(f"/v1/identities/{bob.handle}").json()["chain"] == [b64(bob.record)]
    assert operate("readmit", bob.handle, code=2)["error"]["code"] == "contact_unknown"
    assert operate("remove-member", "nobody", code=2)["error"]["code"] == "contact_unknown"


def test_a_member_is_removed_with_their_shares(operate, alice, bob):
    share = bob.new_share()
    bob.grant(share, alice)
    done = operate("remove-member", bob.handle, "--shares", "--yes")
    assert (done["shares"], done["left"]) == ([share.share.hex()], [])
    assert alice.state(share).json()["roster"] is None
    line = used(operate, bob)
    assert (line["bytes"], line["shares"]) == (0, 0)


def test_a_handle_is_released_and_gives_nothing_of_the_one_before(operate, service, alice, bob):
    share, granted = bob.new_share(), alice.new_share()
    alice.grant(granted, bob)
    answer = operate("release-handle", bob.handle, code=2)
    assert answer["error"]["code"] == "invalid_argument"
    operate("remove-member", bob.handle, "--yes")
    alice.post(f"/v1/mailboxes/{bob.kid.hex()}", {"letter": b64(b"late")})
    assert not operate("release-handle", bob.handle)["applied"]
    assert alice.get(f"/v1/identities/{bob.handle}").json() == {"chain": []}
    stranger = Person(bob.handle, service)
    refused(stranger.post(f"/v1/identities/{bob.handle}", {"record": b64(stranger.record)}), 403,
            "metadata_forbidden")  # fmt: skip
    assert operate("release-handle", bob.handle, "--yes")["applied"]
    stranger.join()
    assert stranger.state(share).json()["roster"] is None
    assert stranger.state(granted).json()["roster"] is None
    refused(stranger.get(f"/v1/mailboxes/{bob.kid.hex()}"), 403, "metadata_forbidden")
    assert alice.get(f"/v1/identities/{bob.handle}").json()["chain"] == [b64(stranger.record)]
    assert used(operate, stranger)["bytes"] == 0
    # The keys of the one before are nobody's to publish again.
    refused(bob.get("/v1/invitations"), 401, "metadata_unauthorized")
    thief = Person(f"thief{next(NAMES)}", service)
    thief.enc = bob.enc
    thief.record = identity(thief.handle, thief.key, enc=bob.enc.public)
    refused(thief.post(f"/v1/identities/{thief.handle}", {"record": b64(thief.record)}), 409,
            "identity_handle_taken")  # fmt: skip


def test_what_is_replaced_counts_once(operate, service, alice):
    path = f"/v1/vaults/{os.urandom(16).hex()}"
    kid = b64(SigningKey.generate().kid)
    for expect, size in enumerate((100, 400, 50)):
        body = {"expect": expect, "record": b64(b"r" * size), "members": [kid]}
        assert alice.put(path, body).status_code == 200
        assert used(operate, alice)["bytes"] == size + 16
    assert alice.delete(path).status_code == 204
    assert used(operate, alice)["bytes"] == 0


def test_superseded_rosters_are_not_kept_for_ever(operate, alice):
    share = alice.new_share()
    for _ in range(_desk.KEPT_ROSTERS + 3):
        alice.publish(share, roster=share.roster())
    (line,) = operate("shares", "--owner", alice.handle)["shares"]
    assert used(operate, alice)["bytes"] == line["bytes"]
    assert operate("stats")["rosters"] >= _desk.KEPT_ROSTERS
    one = len(share.roster())
    assert line["bytes"] <= (_desk.KEPT_ROSTERS + 1) * one
    # The newest is in force, and can be repeated.
    assert alice.state(share).json()["roster"] is not None


def test_an_unknown_database_is_not_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "meshkitfs", "service", "stats", "--database", tmp_path / "none.db"],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert "metadata_unavailable" in done.stderr
    assert not (tmp_path / "none.db").exists()


def test_a_dump_of_the_database_is_a_service_again(cluster, tmp_path):  # noqa: F811
    """As docs/operations.md says: dumped while it runs, restored into a new database, served again."""
    before = cluster.address.replace("dbname=postgres", "dbname=before")
    after = cluster.address.replace("dbname=postgres", "dbname=after")
    tools = binaries()
    with psycopg.connect(cluster.address, autocommit=True) as connection:
        connection.execute("CREATE DATABASE before")
        connection.execute("CREATE DATABASE after")
    with Service(before) as running:
        alice = newcomer(running, "alice")
        share = alice.new_share()
        state = alice.state(share).json()
        dump = tmp_path / "dump"
        subprocess.run([tools / "pg_dump", "-Fc", "-f", dump, before], check=True, capture_output=True)
        alice.publish(share, head=share.head())  # lost: it came after the dump
    subprocess.run([tools / "pg_restore", "-d", after, dump], check=True, capture_output=True)
    with Service(after) as running:
        alice.service = running
        cursor = alice.changes([share])["cursor"]
        restored = alice.state(share).json()
        assert {name: restored[name] for name in ("capsules", "roster", "head")} == {
            name: state[name] for name in ("capsules", "roster", "head")
        }
        share.ver, share.prev = 1, record_hash(unb64(restored["head"]))
        alice.publish(share, head=share.head())
        assert alice.changes([share], after=cursor)["shares"] == [b64(share.share)]
        assert running.stop() == 0


def test_an_instance_does_not_touch_a_database_of_a_later_release(cluster, tmp_path):  # noqa: F811
    place = cluster.fresh()
    with Service(place) as running:
        assert running.stop() == 0
    with psycopg.connect(place, autocommit=True) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    late = Service(place, check=False)
    with pytest.raises(AssertionError, match="metadata_unavailable"):
        late.start()
    with psycopg.connect(place) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(99,)]
