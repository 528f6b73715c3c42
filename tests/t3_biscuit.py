"""Biscuits where tokens are used: issued, sent, passed on, taken back, and met by a home that cannot read them."""

from __future__ import annotations

import sys

import pytest
import t3_conditions
from t3_conditions import DENIED, REQUIRED, ask, give, issue, opens, refusal, refused

place, people = t3_conditions.place, t3_conditions.people

MISSING = "biscuit_not_installed"


@pytest.fixture
def missing(monkeypatch):
    """Take the library away, as long as the returned function is not called."""

    def take_away():
        monkeypatch.delitem(sys.modules, "meshkitfs.core.biscuit", raising=False)
        monkeypatch.setitem(sys.modules, "biscuit_auth", None)

    yield take_away
    monkeypatch.undo()


def test_a_biscuit_opens_is_narrowed_passed_on_and_taken_back(people):
    alice, bob, carol = people
    for person in (bob, carol):
        give(alice, person, ["write"], capability="editors")
    made = issue(alice, rights=("write",), format="biscuit")
    assert (made["format"], made["blocks"]) == ("biscuit", 1)
    (held,) = ask(bob, "capability.list")["held"]
    assert (held["id"], held["format"]) == (made["id"], "biscuit")
    opens(bob)
    assert bob.share().grant.caveats[0]["rights"] == ["list", "read", "write"]
    given = ask(
        bob, "capability.narrow", capability=held["id"], recipient="carol", rights=["read"], send=False
    )
    assert given["text"].startswith("meshkit-biscuit1:")
    assert refusal(bob, "capability.add", text=given["text"]).code == DENIED
    refused(carol, REQUIRED, "capability")
    ask(carol, "capability.add", text=given["text"])
    opens(carol)
    refused(carol, DENIED, "capability", "'write'", action="write")
    seen = ask(carol, "capability.inspect", text=given["text"])
    assert (seen["mine"], [block["rights"] for block in seen["chain"]]) == (
        True,
        [["list", "read", "write"], ["list", "read"]],
    )
    ask(alice, "capability.revoke", token=held["token"])
    for person in (bob, carol):
        refused(person, DENIED, "capability", "revoked by its issuer")
    # And beside it one of the built-in format.
    issue(alice)
    ask(bob, "capability.list")
    opens(bob)


def test_a_home_that_cannot_read_biscuits_says_so(people, missing, monkeypatch):
    alice, bob, _ = people
    give(alice, bob, capability="editors")
    issue(alice, format="biscuit")
    text = issue(alice, format="biscuit", send=False)["text"]
    missing()
    # It waits in the mailbox, it cannot be added, and none can be made.
    assert ask(bob, "capability.list")["received"] == 0
    assert bob.world.run(bob.session.metadata.letters, bob.session.identity.encryption.kid)
    assert refusal(bob, "capability.add", text=text).code == MISSING
    assert refusal(bob, "capability.inspect", text=text).code == MISSING
    before = ask(alice, "capability.list")["issued"]
    assert (
        refusal(alice, "capability.issue", name="editors", recipient="bob", format="biscuit").code == MISSING
    )
    assert ask(alice, "capability.list")["issued"] == before
    monkeypatch.undo()
    assert ask(bob, "capability.list")["received"] == 1
    opens(bob)
    # One that is held is not a condition that is not there: the share is closed, and why is said.
    missing()
    refused(bob, MISSING, "capability")
    issue(alice)
    ask(bob, "capability.list")
    opens(bob)


def test_a_format_that_is_none(people):
    alice, _, _ = people
    error = refusal(alice, "capability.issue", name="editors", recipient="bob", format="jwt")
    assert (error.code, error.detail) == ("invalid_argument", "the format of a token is cose or biscuit")
