"""The log of this device: what was opened and refused, what it costs, what is kept, and what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from devices import Device, World

from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.state import AuditLine, AuditLog, State, _audit
from meshkitfs.vfs._opens import CALLER, Opens

KEY = bytes(range(32))


@pytest.fixture
def world():
    with World() as world:
        yield world


def start(world, root, name="alice", beside=None, **audit):
    device = Device(world, root, name, beside) if beside else Device(world, root, name)
    if audit:
        path = device.home.config_path
        path.write_text(json.dumps(json.loads(path.read_text()) | {"audit": audit}))
    device.start()
    device.fs.opens = Opens(device.session.auditing.record)
    return device


def audit(device, **choice):
    return device.world.run(Service(device.session).call, "audit.list", choice)["lines"]


def seen(lines):
    return [(line["name"], line["path"], line["action"], line["code"], line["times"]) for line in lines]


def test_what_is_opened_is_noted(world, tmp_path):
    device = start(world, tmp_path / "alice")
    device.create_share()
    view = device.view()
    view.mkdir("trip")
    view.release(view.create("trip/note.txt"))
    for _ in range(3):
        view.release(view.open("trip/note.txt", os.O_RDONLY))
    view.release(view.open("trip/note.txt", os.O_RDWR))
    assert seen(audit(device)) == [
        ("first", "trip/note.txt", "create", "", 1),
        ("first", "trip/note.txt", "read", "", 3),
        ("first", "trip/note.txt", "write", "", 1),
    ]
    assert all(line["allowed"] for line in audit(device))
    assert audit(device, refused=True) == []
    assert len(audit(device, limit=1)) == 1
    assert len(audit(device, share="first", since="1h")) == 3
    assert audit(device, since="2100-01-01") == []
    device.close()
    device.start()  # it is kept
    assert len(audit(device)) == 3
    with pytest.raises(MeshkitError) as wrong:
        audit(device, share="none")
    assert wrong.value.code == "share_not_found"
    cleared = device.world.run(Service(device.session).call, "audit.clear", {})
    assert cleared == {"cleared": 3}
    assert audit(device) == []
    device.close()


def test_a_refusal_is_noted_with_its_code(world, tmp_path):
    alice = start(world, tmp_path / "alice")
    bob = start(world, tmp_path / "bob", "bob", alice)
    alice.create_share()
    theirs = alice.view()
    theirs.release(theirs.create("note.txt"))
    alice.flush()
    alice.grant("first", bob)
    view = bob.view()
    view.release(view.open("note.txt", os.O_RDONLY))
    ino = view.attr("note.txt").ino
    world.run(alice.session.book.revoke, alice.share(), "bob")
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(MeshkitError):
            world.run(bob.fs.open, ino, flags)
    refusals = [line for line in audit(bob, refused=True) if line["action"] in ("read", "write")]
    assert seen(refusals) == [
        ("first", "note.txt", "read", "share_revoked", 1),
        ("first", "note.txt", "write", "share_revoked", 1),
    ]
    assert not any(line["allowed"] for line in refusals)
    bob.close()
    alice.close()


def test_an_open_costs_no_transaction(world, tmp_path):
    device = start(world, tmp_path / "alice")
    device.create_share()
    view = device.view()
    view.release(view.create("file"))
    device.flush()
    audit(device)
    commits = []
    device.session.state._db.set_commit_hook(lambda: commits.append(1) or False)
    for _ in range(1000):
        view.release(view.open("file", os.O_RDONLY))
    assert commits == []
    world.run(device.session.auditing.flush)
    assert len(commits) == 1, "all of them are one transaction"
    world.run(device.session.auditing.flush)
    assert len(commits) == 1, "nothing waits, so nothing is touched"
    assert [line["times"] for line in audit(device) if line["action"] == "read"] == [1000]
    device.session.state._db.set_commit_hook(None)
    device.close()


def test_it_is_written_by_itself(world, tmp_path):
    device = start(world, tmp_path / "alice")
    device.create_share()
    view = device.view()
    view.release(view.create("file"))
    log = device.session.auditing._audit
    assert log.waiting == 1
    world.pass_time(11)
    while log.waiting:
        world.pass_time(0.1)
    assert len(log.read()) == 1
    device.close()


@pytest.mark.parametrize("names", [True, False])
def test_names_are_kept_only_if_they_may_be_and_never_in_plain(world, tmp_path, names):
    device = start(world, tmp_path / "alice", names=names)
    device.create_share()
    view = device.view()
    view.release(view.create("canary-of-a-name.txt"))
    (line,) = audit(device)
    assert (line["path"], line["name"]) == (("canary-of-a-name.txt", "first") if names else ("", ""))
    assert line["share"] == device.share().row.share.hex()
    device.close()
    assert not any(
        b"canary-of-a-name" in file.read_bytes() for file in (tmp_path / "alice").glob("state.db*")
    )


def test_it_can_be_turned_off(world, tmp_path):
    device = start(world, tmp_path / "alice", enabled=False)
    device.create_share()
    view = device.view()
    view.release(view.create("file"))
    assert audit(device) == []
    assert world.run(Service(device.session).call, "audit.list", {})["enabled"] is False
    device.close()


@pytest.mark.parametrize("wrong", [{"enabled": 1}, {"days": 0}, {"days": True}, {"lines": 5}, []])
def test_the_configuration_is_strict(wrong):
    from meshkitfs.daemon import config

    text = json.dumps({"version": 1, "audit": wrong})
    with pytest.raises(MeshkitError) as refused:
        config.loads(text.encode(), Path("/"))
    assert refused.value.code == "invalid_config"
    assert "audit" in refused.value.detail


@pytest.fixture
def state(tmp_path):
    state = State.open(tmp_path / "state.db", KEY, create=True)
    yield state
    state.close()


def line(at, path="a", **changes):
    return AuditLine(at, at, b"s" * 16, path, "read", **changes)


def test_it_is_bounded_in_number_and_age(state, monkeypatch):
    monkeypatch.setattr(_audit, "AUDIT_LINES", 10)
    log = AuditLog(state, days=2)
    for n in range(25):
        log.add(line(1_000_000 + n, str(n)))
    log.flush(1_000_100)
    assert [kept.path for kept in log.read()] == [str(n) for n in range(15, 25)]
    log.add(line(1_000_000 + 3 * 86400, "late"))
    log.flush(1_000_000 + 3 * 86400)
    assert [kept.path for kept in log.read()] == ["late"]


def test_what_is_too_much_for_memory_is_counted(state, monkeypatch):
    monkeypatch.setattr(_audit, "WAITING_LINES", 3)
    log = AuditLog(state, days=90)
    for n in range(5):
        log.add(line(100, str(n)))
    log.add(line(101, "0"))  # known, so there is room
    log.flush(102)
    assert [(kept.path, kept.action, kept.times) for kept in log.read()] == [
        ("0", "read", 2), ("1", "read", 1), ("2", "read", 1), ("", "lost", 2)
    ]  # fmt: skip


def test_what_cannot_be_written_waits(state, monkeypatch):
    log = AuditLog(state, days=90)
    log.add(line(100))
    write = log._write

    def full(rows, now):
        log.add(line(101))  # more comes meanwhile
        raise MeshkitError("no_space", "state.db")

    monkeypatch.setattr(log, "_write", full)
    with pytest.raises(MeshkitError):
        log.flush(102)
    monkeypatch.setattr(log, "_write", write)
    log.flush(103)
    (kept,) = log.read()
    assert (kept.first, kept.last, kept.times) == (100, 101, 2)


def test_a_name_that_is_not_utf8_is_kept(state):
    log = AuditLog(state, days=90)
    log.add(line(100, os.fsdecode(b"\xff.txt")))
    log.flush(101)
    assert os.fsencode(log.read()[0].path) == b"\xff.txt"


def test_the_program_is_that_of_the_request(world, tmp_path):
    device = start(world, tmp_path / "alice")
    device.create_share()
    view = device.view()

    async def opened(pid):
        CALLER.set(pid)
        return await device.fs.open(view.attr_of_file, os.O_RDONLY)

    view.release(view.create("file"))
    view.attr_of_file = view.attr("file").ino
    for pid in (os.getpid(), 0, 2**22 + 1):
        view.release(world.run(opened, pid).fh)
    with open("/proc/self/comm") as file:
        own = file.read().strip()
    assert [(found["program"], found["times"]) for found in audit(device) if found["action"] == "read"] == [
        (own, 1), ("", 2)
    ]  # fmt: skip
    device.close()
