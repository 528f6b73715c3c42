"""A metadata service that lies, stalls or talks nonsense, in front of real homes: what a program gets to see, what
becomes of the share, and that nothing was unwrapped, fetched or decrypted before the refusal.

The service is a real one behind `EvilService`; the homes are real sessions without a kernel (t4_evil_service.py has
some of it on real mounts).
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil

import evil
import pytest
from devices import Device, World, scratch
from evil_service import NO_ANSWERS, evil_service, forked
from homes import wait_until

from meshkitfs.core.cose import record_hash
from meshkitfs.core.identity_record import first_record
from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.daemon.home import Home
from meshkitfs.errors import TABLE, MeshkitError
from meshkitfs.gate._grant import lease_now
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata import _feed as feed
from meshkitfs.metadata import http as client_module
from meshkitfs.net import Limits
from meshkitfs.shares import Terms

DATA = b"what must not come out " * 3000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits for a liar longer than a test can."""
    monkeypatch.setattr(
        client_module, "_LIMITS", Limits(deadline_s=0.7, overall_s=3.0, tries=2, concurrency=8, cap=1 << 20)
    )
    monkeypatch.setattr(
        client_module, "_FEED_LIMITS", Limits(deadline_s=8.0, tries=1, concurrency=1, cap=1 << 20)
    )
    monkeypatch.setattr(client_module, "_PUBLISH_DEADLINE_S", 0.7)
    monkeypatch.setattr(feed, "WAIT_S", 2)


@pytest.fixture
def world():
    with World(rate=1.0) as running:
        yield running


@pytest.fixture
def service(place):
    """The evil service, honest so far."""
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with evil_service(behind) as between:
        yield between
    behind.close()


@pytest.fixture
def two(world, place, service):
    """Alice, who owns a share and speaks to the service too; and bob, who was granted it and has accepted."""
    with contextlib.ExitStack() as stack:
        alice = Device(world, f"{place}/alice", "alice", metadata=service.url).start()
        stack.callback(ended, alice, service)
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
        stack.callback(ended, bob, service)
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read", "write")))
        alice.world.run(bob.session.book.inbox.accept, "first", b"first")
        yield alice, bob


def ended(device, service):
    service.heal()
    if device.session is not None:
        device.close()


def spent(device):
    """What an open of anything costs: unwraps, blocks fetched, blocks decrypted."""
    session = device.session
    return session.gate.counters.unwraps, session.store.counters.gets, session.services.reader.counters.opens


def look_again(device):
    """As when the feed says that the share has changed."""

    async def changed():
        device.session.metadata.feed.changed(device.share().row.share)

    device.world.run(changed)


def refused(device, code, number=None):
    """A program's read fails with ``code``'s errno, the share says why, and nothing was spent on it."""
    look_again(device)
    before = spent(device)
    with pytest.raises(OSError) as seen:
        device.view().read("file")
    assert seen.value.errno == TABLE[code].errno == (number or TABLE[code].errno)
    assert device.share().refusal.code == code, device.share().refusal
    assert spent(device) == before


def quarantine(device):
    kept = device.session.state.quarantine(device.share().row.share)
    return None if kept is None else kept.code


def comes_back(device, service, data=DATA):
    """Honest again, the share opens by itself."""
    service.heal()

    def opens():
        with contextlib.suppress(OSError):
            return device.view().read("file") == data
        return False

    wait_until(opens, "the share", 60)
    assert quarantine(device) is None


# == no answer ===========================================================================================


def test_no_answer_opens_nothing(two, service):
    """Never opened before: there is no key in memory, and none is made, whatever stands in place of an answer."""
    _, bob = two
    for kind, make in NO_ANSWERS.items():
        service.on("state", make(service))
        asked = _asked(service)
        refused(bob, "freshness_unproven", errno.EACCES)
        assert _asked(service) > asked, kind
        assert spent(bob) == (0, 0, 0), kind
        assert quarantine(bob) is None, kind
        # Something else answers, so the next kind is not taken for a server that is known to be away.
        service.heal()
        wait_until(lambda: _answers(bob), "an answer", 30)
    comes_back(bob, service)


def _asked(service):
    return sum(path.endswith("/state") for _, path in service.log)


def _answers(device):
    with contextlib.suppress(MeshkitError):
        device.world.run(device.session.metadata.roster, device.share().row.share)
        return True
    return False


@pytest.mark.parametrize("kind", ["a page of HTML", "silence", "truncated", "reset", "redirect to file:"])
def test_no_answer_closes_what_was_open(two, service, kind):
    """Not at once, for it proves nothing, but when the lease ends; nothing is unwrapped anew meanwhile."""
    _, bob = two
    assert bob.view().read("file") == DATA
    before = bob.session.gate.counters.unwraps
    service.on("state", NO_ANSWERS[kind](service))
    look_again(bob)
    assert bob.view().read("file") == DATA
    assert bob.share().unconfirmed.code == "freshness_unproven"
    assert bob.session.gate.counters.unwraps == before
    bob.share().grant.deadline = lease_now()
    refused(bob, "freshness_unproven", errno.EACCES)
    # The key is gone with the refusal: coming back needs a new unwrap.
    unwraps = bob.session.gate.counters.unwraps
    comes_back(bob, service)
    assert bob.session.gate.counters.unwraps == unwraps + 1


# == lies about the state ================================================================================


def test_a_withheld_timestamp(two, service):
    _, bob = two
    service.on("state", service.changed(timestamp=None))
    refused(bob, "freshness_unproven", errno.EACCES)
    assert "no timestamp" in bob.share().refusal.detail
    assert quarantine(bob) is None
    comes_back(bob, service)


def test_a_stale_roster(two, service):
    alice, bob = two
    assert bob.view().read("file") == DATA
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    look_again(bob)
    assert bob.view().read("file") == DATA  # and the newer roster was seen
    service.on("state", service.roster_of(back=1))
    refused(bob, "roster_rollback", errno.EIO)
    comes_back(bob, service)


def test_a_revocation_cannot_be_taken_back_by_the_service(two, service):
    alice, bob = two
    assert bob.view().read("file") == DATA
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    refused(bob, "share_revoked", errno.EACCES)
    service.on("state", service.roster_of(back=1))
    refused(bob, "roster_rollback", errno.EIO)
    service.heal()
    wait_until(lambda: _refusal(bob) == "share_revoked", "the revocation again", 60)


def _refusal(device):
    look_again(device)
    with contextlib.suppress(OSError):
        device.view().read("file")
    return device.share().refusal and device.share().refusal.code


def test_an_old_head(two, service):
    alice, bob = two
    alice.view().write("file", b"newer")
    alice.flush()
    wait_until(lambda: bob.view().read("file") == b"newer", "the newer version")
    service.on("state", service.head_of(back=1))
    refused(bob, "head_rollback", errno.EIO)
    assert quarantine(bob) == "head_rollback"
    # It stays shut until a person decides, whatever the service shows then.
    service.heal()
    refused(bob, "head_rollback", errno.EIO)
    bob.close()
    bob.start()
    with pytest.raises(OSError) as seen:
        bob.view().read("file")
    assert seen.value.errno == errno.EIO


def test_a_head_that_is_withheld(two, service):
    _, bob = two
    assert bob.view().read("file") == DATA
    service.on("state", service.changed(head=None))
    refused(bob, "head_rollback", errno.EIO)
    assert quarantine(bob) == "head_rollback"


def test_a_fork_that_is_shown_to_two(world, place, two, service):
    """A writer signs two heads of the same number, and the service shows one to each: whoever sees the other one
    later knows, and stays with what was seen first."""
    alice, bob = two
    carol = Device(world, f"{place}/carol", "carol", beside=alice).start()
    try:
        alice.world.run(alice.session.book.add, alice.share(), "carol", Terms(("read",)))
        alice.world.run(carol.session.book.inbox.accept, "first", b"first")
        assert bob.view().read("file") == carol.view().read("file") == DATA
        share = alice.share().row.share
        alice.view().write("file", b"the head that is published")
        genuine = lambda: service.published_heads[share][-1]  # noqa: E731
        first = genuine()
        other = None

        async def fork(request, honest, stream):
            return await service.heads_for(
                {carol.session.identity.encryption.kid: other} if other is not None else {}
            )(request, honest, stream)

        service.on("state", service.heads_for({carol.session.identity.encryption.kid: first}))
        alice.flush()
        wait_until(lambda: bob.view().read("file") == b"the head that is published", "bob's view")
        parsed = evil.peek(evil.Head, genuine())
        other = forked(genuine(), alice.session.identity.signing, ts=parsed.ts + 1)
        service.on("state", fork)
        # Both are well signed and chained: each of them alone proves nothing wrong.
        look_again(carol)
        assert carol.view().read("file") == b"the head that is published"
        assert quarantine(carol) is quarantine(bob) is None
        service.heal()
        refused(carol, "head_fork", errno.EIO)
        assert quarantine(carol) == "head_fork"
        assert bob.view().read("file") == b"the head that is published"
    finally:
        ended(carol, service)


def test_a_history_with_a_hole(two, service):
    alice, bob = two
    assert bob.view().read("file") == DATA
    bob.close()
    for text in (b"1", b"2", b"3"):
        alice.view().write("file", text)
        alice.flush()

    async def hole(request, honest, stream):
        value = json.loads(honest.body)
        return type(honest)(200, json.dumps(value | {"heads": value["heads"][1:]}).encode(), honest.headers)

    service.on("heads", hole)
    bob.start()
    with pytest.raises(OSError) as seen:
        bob.view().read("file")
    assert seen.value.errno == errno.EIO
    assert quarantine(bob) == "head_fork"
    assert spent(bob)[1:] == (0, 0)


@pytest.mark.parametrize("kind", ["a page of HTML", "silence", "truncated", "404"])
def test_a_history_that_cannot_be_had(two, service, kind):
    """Unknown is not forked: the share is shut, and not quarantined."""
    alice, bob = two
    assert bob.view().read("file") == DATA
    bob.close()
    for text in (b"1", b"2", b"3"):
        alice.view().write("file", text)
        alice.flush()
    service.on("heads", NO_ANSWERS[kind](service))
    bob.start()
    with pytest.raises(OSError) as seen:
        bob.view().read("file")
    assert seen.value.errno == errno.EACCES
    assert bob.share().refusal.code == "freshness_unproven"
    assert spent(bob)[1:] == (0, 0)
    comes_back(bob, service, b"3")


# == lies about capsules =================================================================================


def test_a_foreign_capsule(two, service):
    """A capsule for bob, of another share."""
    alice, bob = two
    alice.create_share("other")
    alice.world.run(alice.session.book.add, alice.share("other"), "bob", Terms(("read",)))
    share, kid = bob.share().row.share, bob.session.identity.encryption.kid
    service.on("state", service.capsules_of(lambda of, to: of != share and to == kid))
    refused(bob, "capsule_not_found", errno.EACCES)
    assert spent(bob) == (0, 0, 0)
    comes_back(bob, service)


def test_a_capsule_for_another_key(two, service):
    """A capsule of this share, which is alice's own."""
    _, bob = two
    share, kid = bob.share().row.share, bob.session.identity.encryption.kid
    service.on("state", service.capsules_of(lambda of, to: of == share and to != kid))
    refused(bob, "recipient_not_authorized", errno.EACCES)
    assert spent(bob) == (0, 0, 0)
    comes_back(bob, service)


def test_no_capsule(two, service):
    _, bob = two
    service.on("state", service.changed(capsules=[]))
    refused(bob, "capsule_not_found", errno.EACCES)
    comes_back(bob, service)


# == lies of the directory ===============================================================================


def test_a_directory_that_shows_another_key(two, service):
    """Alice knows bob already: nothing is granted to the key that is shown, and bob is blocked."""
    alice, _ = two
    eve = SigningKey.generate()
    now = alice.session.identity.public.created
    service.on(
        "identities", service.chain_of(first_record("bob", eve, EncryptionKey.generate().public, now, 10**7))
    )
    granted = len(service.capsules)
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read", "write")))
    assert caught.value.code == "contact_key_changed"
    assert len(service.capsules) == granted
    # For good: only the record, given by hand, lifts it.
    service.heal()
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read", "write")))
    assert caught.value.code == "contact_key_changed"
    assert len(service.capsules) == granted


@pytest.mark.parametrize("kind", ["a page of HTML", "silence", "truncated", "404", "redirect to file:"])
def test_a_directory_that_gives_no_answer(two, service, kind):
    """Nobody is granted anything, and nobody is blocked: nothing was learned."""
    alice, bob = two
    service.on("identities", NO_ANSWERS[kind](service))
    granted = len(service.capsules)
    with pytest.raises(MeshkitError) as caught:
        alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    assert caught.value.code == "metadata_unavailable"
    assert len(service.capsules) == granted
    service.heal()
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    assert alice.session.contacts.get("bob").trust == "pinned"
    assert alice.session.contacts.get("bob").public.root == bob.session.identity.public.root


# == what is sent ========================================================================================


@pytest.mark.parametrize(
    "kind",
    [
        "a page of HTML",
        "silence",
        "truncated",
        "reset",
        "redirect to itself",
        "200 with an error",
        "500",
        "401",
    ],
)
def test_a_publication_without_an_answer_is_not_lost_and_not_doubled(two, service, kind):
    """It took place, and nobody says so: the change stays here until it is known to be out."""
    alice, bob = two
    share = alice.share()
    heads = len(service.published_heads[share.row.share])
    service.on("publications", NO_ANSWERS[kind](service))
    alice.view().write("file", b"a change")
    with pytest.raises(MeshkitError) as caught:
        alice.flush()
    assert caught.value.code in ("metadata_unavailable", "metadata_unauthorized")
    # It waits here; or it was found at the service meanwhile, which is the other way to know that it is out.
    assert share.dirty or share.base.hash == record_hash(service.published_heads[share.row.share][-1])
    service.heal()

    def out():
        with contextlib.suppress(MeshkitError):
            alice.flush()
        return not share.dirty

    wait_until(out, "the publication", 60)
    wait_until(lambda: bob.view().read("file") == b"a change", "bob's view", 60)
    # One head was published, and every one that was is a new version.
    found = [evil.peek(evil.Head, blob).ver for blob in service.published_heads[share.row.share]]
    assert len(found) == heads + 1
    assert found == sorted(set(found))


# == the feed ============================================================================================

FEEDS = ("a page of HTML", "silence", "slow loris", "endless body", "truncated", "reset", "redirect to file:")


@pytest.mark.parametrize("kind", FEEDS)
def test_a_feed_that_gives_no_answer_hides_a_revocation_for_the_published_time_only(two, service, kind):
    alice, bob = two
    assert bob.view().read("file") == DATA
    metadata = bob.session.metadata
    wait_until(lambda: metadata.feed.live, "the feed")
    service.on("changes", NO_ANSWERS[kind](service))
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    real = metadata.feed.clock
    metadata.feed.clock = lambda: real() + feed.TRUST_S
    wait_until(lambda: bob.share().refusal is not None, "the revocation", 15)
    assert bob.share().refusal.code == "share_revoked"


def test_a_feed_that_conceals_hides_a_revocation_for_the_published_time_only(two, service):
    alice, bob = two
    assert bob.view().read("file") == DATA
    metadata = bob.session.metadata
    wait_until(lambda: metadata.feed.live, "the feed")
    service.on("changes", service.no_news)
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    settled = metadata.tick(bob.share().row.share)
    polls = service.log.count(("POST", "/v1/changes"))
    wait_until(lambda: service.log.count(("POST", "/v1/changes")) >= polls + 4, "some polls", 30)
    assert metadata.feed.live
    assert metadata.tick(bob.share().row.share) == settled  # it does conceal
    real = metadata.feed.clock
    offset = [0.0]
    metadata.feed.clock = lambda: real() + offset[0]
    for _ in range(int(feed.RECHECK_S) + 1):
        offset[0] += 1.0
        if bob.share().refusal is not None:
            break
        wait_until(lambda: metadata.feed.live, "the feed", 30)
    wait_until(lambda: bob.share().refusal is not None, "the revocation", 15)
    assert bob.share().refusal.code == "share_revoked"


def test_everything_is_nonsense_from_the_start(place, world, service):
    """No home is set up for a service that never made sense."""
    for kind in ("a page of HTML", "garbage", "truncated", "redirect to file:", "204"):
        service.on(None, NO_ANSWERS[kind](service))
        with pytest.raises(MeshkitError) as caught:
            Device(world, f"{place}/new", "new", metadata=service.url)
        assert caught.value.code == "metadata_unavailable"
        assert not Home(f"{place}/new").initialized
    service.heal()
    Device(world, f"{place}/new", "new", metadata=service.url)
