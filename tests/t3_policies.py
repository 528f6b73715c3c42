"""Policies at work: what a grant may be used for is what somebody says now, right by right, and what that costs.

Real sessions without a kernel. Rules are the owner's own, decision points are real servers on loopback.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
from pathlib import Path

import pytest
from devices import Device, World, scratch
from homes import fails, wait_until
from http_server import Answer
from pdp import Pdp

from meshkitfs.core.keys import SigningKey
from meshkitfs.daemon.config import PolicyConfig
from meshkitfs.daemon.policy_provider import pol_of
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.policy import AuthZen, AuthZenOptions, rules
from meshkitfs.policy import _asking as asking
from meshkitfs.shares import Terms

DATA = b"what is decided about " * 100
PATIENCE_S = 60
BOB_READS = 'permit(principal == Identity::"bob", action in [Action::"list", Action::"read"], resource);'
BOB_MAY = 'permit(principal == Identity::"bob", action, resource);'
NOBODY = "forbid(principal, action, resource);"


class Home(Device):
    """A home with the commands of its service."""

    def command(self, method, **params):
        return self.world.run(self.service.call, method, params)

    def start(self, prepare=None):
        super().start(prepare)
        self.service = Service(self.session)
        return self

    def walk(self, action="read", trace=None):
        return self.world.run(self.session.gate.open, self.share().row, action, trace)

    @property
    def walks(self):
        return self.session.gate.counters.walks

    def asks(self, pdp):
        """Let this home ask the decision point, with patience: a busy machine is not what is tested."""
        provider = AuthZen(AuthZenOptions(pdp.url, timeout_s=PATIENCE_S))
        self.session.gate._conditions._policy.external = provider
        return provider


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(asking, "POLICY_DEADLINE_S", PATIENCE_S)
    place = scratch()
    # The clock goes by itself: servers are asked.
    with World(rate=1.0) as world:
        alice = Home(world, f"{place}/alice", "alice").start()
        bob = Home(world, f"{place}/bob", "bob", beside=alice).start()
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        bob.close()
        alice.close()
    shutil.rmtree(place)


def give(alice, bob, policy, *rights, pol=None):
    """Alice grants the share under a policy, her own or what ``pol`` says, and bob takes it."""
    rights = rights or ("read", "write")
    if pol is None:
        alice.command("share.add", target="first", recipient="bob", rights=list(rights), policy=policy)
    else:
        terms = Terms(tuple(sorted(rights)), policy=policy, pol=pol)
        alice.world.run(alice.session.book.add, alice.share(), "bob", terms)
    bob.world.run(bob.session.book.inbox.accept, "first", b"first")


def code_of(work, *args):
    with pytest.raises(MeshkitError) as caught:
        work(*args)
    return caught.value.code


def refused(bob, action="read"):
    """The code with which an open is refused, as the error and as what a program gets."""
    with pytest.raises(MeshkitError) as caught:
        bob.world.run(lambda: bob.share().use(action, current=True))
    with fails(errno.EACCES):
        bob.view().read("file") if action == "read" else bob.view().write("file", b"x")
    return caught.value.code


# == rules of the owner ==============================================================================


def test_the_owners_rules_decide_on_the_recipients_device(two):
    alice, bob = two
    made = alice.command("policy.create", name="office", rules=BOB_READS)
    assert [rule["effect"] for rule in made["rules"]] == ["permit"]
    give(alice, bob, "office")
    assert bob.view().read("file") == DATA
    trace = Trace()
    bob.walk(trace=trace)
    (step,) = [step for step in trace.steps if step.name == "policy"]
    assert "policy 'office' allows list, read for 300 s" in step.evidence
    assert "rule 1 (line 1)" in step.evidence
    assert "not write" in step.evidence
    grant = bob.share().grant
    assert grant.rights == {"list", "read"}
    assert grant.capsule.pol == {"id": "office", "rules": BOB_READS, "who": "bob"}


def test_a_write_needs_a_yes_of_its_own(two):
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_READS)
    give(alice, bob, "office")
    assert bob.view().read("file") == DATA
    assert refused(bob, "write") == "policy_denied"
    # That was a no to writing, and nobody who reads has to notice.
    assert bob.view().read("file") == DATA
    assert bob.share().refusal is None
    # Nor is a descriptor that was opened before served by the lease that reads live on.
    assert bob.share().live("read") is not None
    assert bob.share().live("write") is None
    grant = bob.share().grant
    assert code_of(grant.sealing_key, 9) == "policy_denied"


def test_listing_serves_no_read(two):
    alice, bob = two
    alice.command(
        "policy.create", name="names", rules='permit(principal, action == Action::"list", resource);'
    )
    give(alice, bob, "names")
    assert bob.view().listdir() == ["file"]
    assert refused(bob, "read") == "policy_denied"
    assert bob.view().listdir() == ["file"]


def test_nobody_is_let_in_by_a_rule_for_somebody_else(two):
    alice, bob = two
    alice.command("policy.create", name="carols", rules=BOB_MAY.replace("bob", "carol"))
    give(alice, bob, "carols")
    unwraps = bob.session.gate.counters.unwraps
    assert refused(bob) == "policy_denied"
    assert bob.session.gate.counters.unwraps == unwraps


def test_members_and_an_end(two):
    alice, bob = two
    alice.command("policy.create", name="team", members=["bob", "carol"], expires="200s")
    text = alice.command("policy.show", name="team")["text"]
    assert 'Identity::"bob"' in text
    assert "context.now < datetime(" in text
    give(alice, bob, "team", "read")
    assert bob.view().read("file") == DATA
    assert 0 < bob.share().grant.lifetime <= 31  # it looks at the time
    decided = alice.command("policy.test", name="team", identity="bob", at="2090-01-01")
    assert not any(item["allow"] for item in decided["decisions"])
    bob.session.clock._wall = lambda: time.time() + 250
    assert code_of(bob.walk) == "policy_denied"


def test_changed_rules_reach_the_recipient(two):
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_MAY)
    give(alice, bob, "office")
    assert bob.view().read("file") == DATA
    changed = alice.command("policy.edit", name="office", rules=NOBODY)
    assert (changed["renewed"], changed["ended"], changed["failed"]) == (1, [], [])
    assert refused(bob) == "policy_denied"
    alice.command("policy.edit", name="office", rules=BOB_READS)
    assert bob.view().read("file") == DATA
    assert refused(bob, "write") == "policy_denied"
    # The same again changes nothing, so it costs no publication.
    alice.refresh()
    seq = alice.share().grant.roster.seq
    assert alice.command("policy.edit", name="office", rules=BOB_READS)["renewed"] == 0
    alice.walk()
    alice.refresh()
    assert alice.share().grant.roster.seq == seq


def test_a_change_is_noticed_by_the_watcher_too(two):
    """Nobody opens anything: what was read is dropped all the same."""
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_MAY)
    give(alice, bob, "office")
    assert bob.view().read("file") == DATA
    alice.command("policy.edit", name="office", rules=NOBODY)
    wait_until(lambda: bob.share().refusal is not None, "the watcher's refusal")
    assert bob.share().refusal.code == "policy_denied"
    assert bob.share().grant is None


def test_losing_the_right_to_read_drops_what_was_read(two):
    """The grant goes on, to list; what the kernel and the cache hold of the content does not."""
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_MAY)
    give(alice, bob, "office")
    assert bob.view().read("file") == DATA
    told = []
    bob.session.listeners.append(told.append)
    alice.command(
        "policy.edit", name="office", rules='permit(principal, action == Action::"list", resource);'
    )
    bob.refresh()
    assert bob.share().grant.rights == {"list"}
    assert any(getattr(event, "ino", None) == bob.share().root_ino for event in told)
    assert refused(bob, "read") == "policy_denied"
    assert bob.view().listdir() == ["file"]


def test_a_rotation_keeps_what_is_demanded(two):
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_READS)
    give(alice, bob, "office")
    carol = Home(alice.world, f"{alice.root}.carol", "carol", beside=alice).start()
    alice.command("share.add", target="first", recipient="carol")
    alice.command("share.revoke", share="first", recipient="carol")
    carol.close()
    assert bob.view().read("file") == DATA
    assert bob.share().grant.capsule.epoch == 2
    assert bob.share().grant.capsule.pol == {"id": "office", "rules": BOB_READS, "who": "bob"}
    assert refused(bob, "write") == "policy_denied"


def test_snapshots_under_changed_rules_are_taken_back(two):
    alice, bob = two
    alice.command("policy.create", name="office", rules=BOB_READS)
    alice.command("share.add", target="first/file", recipient="bob", snapshot=True, policy="office")
    letter = bob.command("inbox.list")["letters"][0]
    name = bob.command("inbox.accept", letter=letter["id"])["name"]
    share = bob.session.book.find(name)
    bob.world.run(lambda: share.use("read", current=True))
    changed = alice.command("policy.edit", name="office", rules=BOB_MAY)
    assert changed["renewed"] == 0
    assert [(item["handle"], item["path"]) for item in changed["ended"]] == [("bob", "file")]
    with pytest.raises(MeshkitError) as caught:
        bob.world.run(lambda: share.use("read", current=True))
    assert caught.value.code == "share_revoked"


def test_a_rule_that_cannot_be_evaluated_is_no_yes(two):
    """Cedar leaves such a rule out, and a forbid that is left out permits."""
    alice, bob = two
    overflow = "forbid(principal, action, resource) when { context.hour + 9223372036854775807 > 0 };"
    alice.command("policy.create", name="office", rules=f"{BOB_MAY}\n{overflow}")
    give(alice, bob, "office")
    hour = time.gmtime().tm_hour
    bob.session.clock._wall = lambda: time.time() if hour else time.time() + 3600
    assert refused(bob) == "policy_provider_error"


def test_rules_that_a_strange_owner_wrote_are_no_yes(two):
    """Nobody checked them: the owner's program may be another one."""
    alice, bob = two
    codes = []
    for text in ("permit(principal", "permit(principal == ?principal, action, resource);", "\n", "// x"):
        terms = Terms(("read",), policy="odd", pol={"id": "odd", "rules": text})
        alice.world.run(alice.session.book.add, alice.share(), "bob", terms)
        if not codes:
            bob.world.run(bob.session.book.inbox.accept, "first", b"first")
        codes.append(refused(bob))
    assert codes == ["policy_provider_error"] * 2 + ["policy_denied"] * 2


def test_the_rules_in_the_document_are_valid():
    text = (Path(__file__).parents[1] / "docs" / "policies.md").read_text()
    (example,) = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "permit(" in block]
    assert [(rule.name, rule.effect) for rule in rules.check(example)] == [
        ("office hours", "permit"),
        ("until the end of the project", "forbid"),
    ]


# == the commands ====================================================================================


def test_what_is_refused(two):
    alice, _ = two
    assert code_of(lambda: alice.command("policy.show", name="none")) == "policy_not_found"
    with pytest.raises(MeshkitError) as caught:
        alice.command("policy.create", name="p", rules="permit(principal, action, resource)\nwhen { foo };")
    assert caught.value.code == "policy_invalid"
    assert caught.value.detail == "line 2, column 8: invalid variable: foo"
    alice.command("policy.create", name="p", rules=BOB_MAY)
    assert code_of(lambda: alice.command("policy.create", name="p", rules=BOB_MAY)) == "policy_exists"
    for params in ({}, {"rules": BOB_MAY, "members": ["bob"]}, {"rules": BOB_MAY, "expires": "7d"}):
        assert code_of(lambda p=params: alice.command("policy.create", name="q", **p)) == "invalid_argument"
    for name in ("", "Upper", "a/b", "x" * 65, "-a"):
        made = code_of(lambda n=name: alice.command("policy.create", name=n, rules=BOB_MAY))
        assert made == "invalid_argument"
    unknown = lambda: alice.command("share.add", target="first", recipient="bob", policy="typo")  # noqa: E731
    assert code_of(unknown) == "policy_not_found"


def test_a_policy_in_use_stays(two):
    alice, bob = two
    alice.command("policy.create", name="p", rules=BOB_MAY)
    give(alice, bob, "p")
    listed = alice.command("policy.list")
    assert [(item["name"], item["grants"]) for item in listed["policies"]] == [("p", 1)]
    assert code_of(lambda: alice.command("policy.delete", name="p")) == "policy_in_use"
    alice.command("share.revoke", share="first", recipient="bob")
    alice.command("policy.delete", name="p")
    assert alice.command("policy.list")["policies"] == []


def test_trying_out_says_which_rule(two):
    alice, _ = two
    night = "forbid(principal, action, resource) when { context.hour < 8 };"
    alice.command("policy.create", name="day", rules=f'@id("in")\n{BOB_READS}\n\n@id("night")\n{night}')

    def tried(**params):
        decisions = alice.command("policy.test", name="day", identity="bob", **params)["decisions"]
        return [(item["action"], item["allow"], item["reason"]) for item in decisions]

    assert tried(at="2026-12-01T09:30Z") == [
        ("list", True, "permitted by rule in (line 1)"),
        ("read", True, "permitted by rule in (line 1)"),
        ("write", False, "no rule permits it"),
    ]
    assert tried(at="2026-12-01T07:30Z", action="read") == [
        ("read", False, "forbidden by rule night (line 4)")
    ]
    assert code_of(lambda: tried(action="fly")) == "invalid_argument"
    assert code_of(lambda: tried(at="v12")) == "invalid_argument"


# == a decision point, and what it costs ===============================================================


@pytest.fixture
def pdp():
    with Pdp(ttl=300) as pdp:
        yield pdp


def under(alice, bob, pdp, *rights):
    key = pdp.signing.public.hex() if pdp.signing is not None else None
    give(alice, bob, "p1", *rights, pol=pol_of(PolicyConfig(pdp.url, key=key), "p1"))
    bob.asks(pdp)


def test_one_request_for_each_lease(two, pdp):
    alice, bob = two
    under(alice, bob, pdp)
    for _ in range(5):
        assert bob.view().read("file") == DATA
        bob.view().listdir()
    bob.view().write("file", b"by bob")
    assert pdp.rounds == 1
    names = [item["action"]["name"] for item in pdp.seen[0]["evaluations"]]
    assert names == ["list", "read", "write"]
    assert pdp.seen[0]["subject"]["id"] == bob.session.identity.encryption.kid.hex()
    bob.flush()
    assert pdp.rounds == 1


def test_what_others_write_costs_no_decision(two, pdp):
    """Every version is a walk through the gate; the answer allows to be used meanwhile."""
    alice, bob = two
    under(alice, bob, pdp)
    walks = bob.walks
    for number in range(4):
        alice.view().write("file", b"%d" % number)
        alice.flush()
        assert bob.view().read("file") == b"%d" % number
    assert bob.walks - walks >= 4
    assert pdp.rounds == 1
    # Another grant is another question.
    alice.command("share.add", target="first", recipient="bob", rights=["read"])
    give_again = Terms(("read",), policy="p1", pol=pol_of(PolicyConfig(pdp.url), "p1"))
    alice.world.run(alice.session.book.add, alice.share(), "bob", give_again)
    assert bob.view().read("file") == b"3"
    assert pdp.rounds == 2


def test_a_yes_without_an_end_is_for_one_open(two, pdp):
    alice, bob = two
    pdp.ttl = None
    under(alice, bob, pdp, "read")
    assert bob.view().read("file") == DATA

    def renewals(since):
        """How often the watcher may have renewed the lease by itself, in its last quarter."""
        return 1 + int((time.monotonic() - since) / (0.7 * asking.UNSAID_S))

    before, start = pdp.rounds, time.monotonic()
    for _ in range(3):
        assert bob.view().read("file") == DATA
    spent = pdp.rounds - before
    assert 3 <= spent <= 3 + renewals(start)
    before, start = pdp.rounds, time.monotonic()
    for _ in range(20):
        bob.view().listdir()
    assert pdp.rounds - before <= renewals(start)
    assert bob.share().grant.lifetime <= asking.UNSAID_S
    pdp.allow = set()
    assert refused(bob) == "policy_denied"
    pdp.allow = {"list", "read"}
    assert bob.view().read("file") == DATA


def test_a_no_is_asked_again_at_the_next_open(two, pdp):
    alice, bob = two
    under(alice, bob, pdp)
    pdp.allow = {"list", "read"}
    assert bob.view().read("file") == DATA
    assert refused(bob, "write") == "policy_denied"
    pdp.allow = {"list", "read", "write"}
    bob.view().write("file", b"now")
    assert bob.view().read("file") == b"now"


def test_asking_for_more_ends_nothing_that_was_allowed(two, pdp):
    """Somebody tries to write while the decision point is in trouble; whoever reads has a yes that is good."""
    alice, bob = two
    under(alice, bob, pdp)
    pdp.allow = {"list", "read"}
    assert bob.view().read("file") == DATA
    pdp.spoil = lambda request, answer: Answer(500)
    assert refused(bob, "write") == "policy_provider_error"
    assert bob.view().read("file") == DATA
    assert bob.share().refusal is None


def test_a_lease_ends_with_the_decision(two, pdp):
    alice, bob = two
    pdp.ttl = 2
    under(alice, bob, pdp, "read")
    assert bob.view().read("file") == DATA
    assert bob.share().grant.lifetime <= 2
    assert bob.share().grant._lapse == "policy_provider_error"
    pdp.allow = set()
    # The lease ends on time; what the answer is now may come a moment later.
    wait_until(
        lambda: bob.share().refusal is not None and bob.share().refusal.code == "policy_denied", "the answer"
    )
    pdp.allow = {"list", "read"}
    assert bob.view().read("file") == DATA


def test_a_signed_decision_ends_the_lease_too(two):
    alice, bob = two
    with Pdp(signing=SigningKey.generate()) as pdp:
        pdp.life = 40
        under(alice, bob, pdp, "read")
        assert bob.view().read("file") == DATA
        assert 0 < bob.share().grant.lifetime <= 41
        trace = Trace()
        bob.walk(trace=trace)
        (step,) = [step for step in trace.steps if step.name == "policy"]
        assert f"signed by {pdp.signing.kid.hex()[:16]}" in step.evidence
        pdp.signing = SigningKey.generate()
        # Another grant is another question, and nobody whom it names answers it.
        assert bob.share().refusal is None
        pol = bob.share().grant.capsule.pol
        alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",), policy="p1", pol=pol))
        assert refused(bob) == "policy_provider_error"


def test_a_decision_point_that_is_away_closes_the_share(two, pdp):
    alice, bob = two
    pdp.ttl = None
    under(alice, bob, pdp, "read")
    assert bob.view().read("file") == DATA
    pdp.close()
    assert refused(bob) == "policy_provider_error"


def test_a_home_without_a_provider_opens_nothing(two, pdp):
    alice, bob = two
    give(alice, bob, "p1", pol=pol_of(PolicyConfig(pdp.url), "p1"))
    assert refused(bob) == "policy_provider_required"
    with Pdp() as other:
        bob.asks(other)
        assert refused(bob) == "policy_provider_required"
        assert other.requests == pdp.requests == []
    bob.asks(pdp)
    assert bob.view().read("file") == DATA
