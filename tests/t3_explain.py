"""What is said of a refusal: each step of the gate with its evidence, and one record in all places."""

from __future__ import annotations

import logging
from datetime import datetime

import pytest
from devices import Device, World

from meshkitfs.daemon import describe
from meshkitfs.daemon.service import Service
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate._trace import STEPS
from meshkitfs.identity import report
from meshkitfs.shares import Terms
from meshkitfs.vfs import ControlFiles, MeshFilesystem
from meshkitfs.vfs._xattrs import reason_text
from meshkitfs.vfs.types import ROOT_INO


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("explain")
    with World() as world:
        alice = Device(world, base / "alice", "alice").start()
        bob = Device(world, base / "bob", "bob", alice).start()
        alice.create_share()
        view = alice.view()
        view.release(view.create("file"))
        alice.flush()
        alice.grant("first", bob)
        yield alice, bob
        bob.close()
        alice.close()


def explain(device, path="first/file"):
    found = device.world.run(Service(device.session).call, "explain", {"path": path})
    assert [step["step"] for step in found["steps"]] == list(STEPS)
    return found, {step["step"]: step for step in found["steps"]}


def fingerprint_of(device):
    return report(device.session.identity, 0).fingerprint


def is_time(text):
    return text.endswith("Z") and datetime.fromisoformat(text).utcoffset() is not None


def test_each_step_that_passed_says_who_vouches_and_until_when(pair):
    alice, bob = pair
    found, steps = explain(bob)
    assert found["code"] == ""
    assert {step["result"] for step in steps.values()} == {"passed", "not required"}
    for name in ("capsule", "roster", "validity", "rights"):
        assert (steps[name]["by"], steps[name]["fingerprint"]) == ("alice", fingerprint_of(alice)), name
        assert steps[name]["trust"] == "pinned", name
    assert (steps["identity"]["by"], steps["identity"]["fingerprint"]) == ("bob", fingerprint_of(bob))
    assert (steps["head"]["by"], steps["head"]["fingerprint"]) == ("alice", fingerprint_of(alice))
    for name in ("roster", "freshness", "validity"):
        assert is_time(steps[name]["since"]), name
        assert is_time(steps[name]["until"]), name
        assert steps[name]["since"] < steps[name]["until"], name
    grant = bob.share().grant
    assert steps["validity"]["until"] == describe_time(grant.capsule.exp)
    assert steps["roster"]["until"] == describe_time(grant.roster.exp)
    assert steps["freshness"]["until"] <= describe_time(grant.fresh_until)
    assert steps["freshness"]["by"] == "the metadata store"
    assert steps["freshness"]["signer"]
    assert steps["rights"]["rule"] == "read"
    # The owner's own walk says that it is oneself who vouches.
    _, own = explain(alice)
    assert (own["roster"]["by"], own["roster"]["trust"]) == ("alice", "self")


def describe_time(seconds):
    from meshkitfs.gate._trace import _iso

    return _iso(seconds)


def test_a_step_that_refuses_keeps_its_evidence_and_names_the_way_out(pair):
    alice, bob = pair
    alice.create_share("ruled")
    terms = Terms(("read",), policy="staff-only")
    alice.world.run(alice.session.book.add, alice.share("ruled"), "bob", terms)
    bob.world.run(bob.session.book.inbox.accept, "ruled", b"ruled")
    found, steps = explain(bob, "ruled")
    step = steps["policy"]
    assert found["code"] == step["code"] == "policy_provider_required"
    assert (step["result"], step["rule"]) == ("refused", "staff-only")
    assert step["message"] == TABLE[step["code"]].sentence
    assert step["suggestion"] == TABLE[step["code"]].remedy
    assert steps["key"]["result"] == steps["head"]["result"] == "not reached"

    alice.world.run(alice.session.book.revoke, alice.share("ruled"), "bob")
    _, steps = explain(bob, "ruled")
    assert (steps["roster"]["result"], steps["roster"]["code"]) == ("refused", "share_revoked")
    # Who took it away, and when they said so.
    assert steps["roster"]["by"] == "alice"
    assert steps["roster"]["fingerprint"] == fingerprint_of(alice)
    assert is_time(steps["roster"]["since"])
    assert steps["validity"]["result"] == "not reached"


@pytest.mark.parametrize("code", sorted(TABLE))
def test_all_places_tell_the_same_of_every_code(pair, code, caplog):
    """A fault of a file: the attribute, errors.txt, status, explain and the log have it from one record."""
    alice, _ = pair
    session, service = alice.session, Service(alice.session)
    fs = MeshFilesystem(session.book, ControlFiles({}), session.runtime, session.note)
    service.fault_of = lambda node: fs.faults.of(node.ino)
    share = alice.share()
    error = MeshkitError(code, f"what happened, {code}")

    async def happen():
        attr = await fs.lookup(ROOT_INO, b"first")
        node = share.tree.node_of(share.tree.root, b"file")
        fs._shares[node.ino] = share
        fs._note(node.ino, error, "read", None)
        return attr, node

    with caplog.at_level(logging.WARNING, "meshkitfs"):
        _, node = alice.world.run(happen)
    row, detail = TABLE[code], error.detail
    told = reason_text(share, fs.faults.of(node.ino))
    assert told == f"{code}: {row.sentence} ({detail}) {row.remedy}"
    lines = describe.errors_text(session).decode().split("\n\n")[-1]
    assert f"first/file\n    {code}: {row.sentence} ({detail})\n    {row.remedy}\n" in lines
    newest = alice.world.run(service.call, "status", {})["errors"][-1]
    assert (newest["path"], newest["code"], newest["detail"]) == ("first/file", code, detail)
    explained, _ = explain_with(alice, service)
    assert {name: explained[name] for name in ("code", "message", "detail", "suggestion")} == {
        "code": code, "message": row.sentence, "detail": detail, "suggestion": row.remedy
    }  # fmt: skip
    fields = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("code") == code]
    assert fields == [{"code": code, "errno": row.errno}]
    assert not any("file" in record.getMessage() for record in caplog.records), "names are not for the log"


def explain_with(device, service):
    found = device.world.run(service.call, "explain", {"path": "first/file"})
    return found, found["steps"]
