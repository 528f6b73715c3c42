"""The contract of every metadata home, and what is particular to the embedded one (t1_postgres.py: PostgreSQL).

A new home joins the first part by adding itself to `home`.
"""

import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import apsw
import evil
import postgres
import pytest
import trio
import trio.testing

from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.membership import VaultRecord
from meshkitfs.core.records import (
    Head,
    IdentityRecord,
    Retention,
    Roster,
    Timestamp,
    make_capsule,
    record_hash,
    rotate,
)
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata, Metadata, Publication, ShareState
from meshkitfs.metadata import _database as database
from meshkitfs.metadata.postgres import PostgresMetadata

NOW = 1_790_000_000


def run(function, *args):
    return trio.run(partial(function, *args))


def fails(code: str, function, *args) -> MeshkitError:
    with pytest.raises(MeshkitError) as excinfo:
        run(function, *args)
    assert excinfo.value.reason.code == code, excinfo.value.detail
    return excinfo.value


@dataclass
class Share:
    """A share seen by somebody who makes its records: each method gives the record that would come next."""

    owner: SigningKey
    share: bytes
    oid: bytes
    seq: int = 0
    epoch: int = 1
    ver: int = 0
    prev: bytes = b""

    @classmethod
    def new(cls) -> "Share":
        return cls(SigningKey.generate(), os.urandom(16), os.urandom(16))

    def roster(self, signer: SigningKey | None = None, **changes) -> bytes:
        record = Roster(
            share=self.share,
            oid=self.oid,
            seq=self.seq + 1,
            epoch=self.epoch,
            caps=(),
            writers=(self.owner.public,),
            minver=0,
            iat=NOW,
            exp=NOW + 1000,
            timestamp_keys=(),
        )
        return replace(record, **changes).sign(signer or self.owner)

    def head(self, signer: SigningKey | None = None, **changes) -> bytes:
        record = Head(
            share=self.share,
            oid=self.oid,
            epoch=self.epoch,
            ver=self.ver + 1,
            prev=self.prev,
            root=os.urandom(32),
            ts=NOW,
        )
        return replace(record, **changes).sign(signer or self.owner)

    def retention(self, *ranges: tuple[int, int], signer: SigningKey | None = None, **changes) -> bytes:
        flat = tuple(number for first, last in ranges for number in (first, last, NOW))
        record = Retention(share=self.share, seq=1, pruned=flat, iat=NOW)
        return replace(record, **changes).sign(signer or self.owner)

    def capsule(self, to: EncryptionKey, owner: SigningKey | None = None, **changes) -> bytes:
        header = {
            "id": os.urandom(16),
            "grant": "live",
            "share": self.share,
            "oid": self.oid,
            "epoch": self.epoch,
            "nbf": NOW,
            "exp": NOW + 100,
            "seq": 1,
            "rights": ["read"],
        } | changes
        return make_capsule(owner or self.owner, header, bytes(32), to.public)

    def publication(self, *, roster=None, head=None, capsules=()) -> Publication:
        """What the publisher believes goes with these blobs."""
        new_roster = evil.peek(Roster, roster) if roster else None
        new_head = evil.peek(Head, head) if head else None
        return Publication(
            share=self.share,
            expect_head=self.prev if head else None,
            head=head,
            head_ver=new_head.ver if new_head else 0,
            head_epoch=new_head.epoch if new_head else 0,
            expect_roster=self.seq if roster else None,
            roster=roster,
            roster_seq=new_roster.seq if new_roster else 0,
            roster_epoch=new_roster.epoch if new_roster else 0,
            capsules=tuple(capsules),
        )

    def publish(self, metadata: Metadata, *, roster=None, head=None, capsules=()) -> None:
        run(metadata.publish, self.publication(roster=roster, head=head, capsules=capsules))
        if roster:
            self.seq += 1
            self.epoch = evil.peek(Roster, roster).epoch
        if head:
            self.ver = evil.peek(Head, head).ver
            self.prev = record_hash(head)


@pytest.fixture(scope="session")
def cluster():
    with postgres.Cluster() as running:
        yield running


@pytest.fixture(params=["embedded", "postgresql"])
def home(request, tmp_path):
    if request.param == "embedded":
        opened = EmbeddedMetadata.create(tmp_path / "metadata.db", clock=lambda: NOW)
    else:
        opened = PostgresMetadata(request.getfixturevalue("cluster").fresh(), clock=lambda: NOW)
    yield opened
    opened.close()


embedded_only = pytest.mark.parametrize("home", ["embedded"], indirect=True)


@pytest.fixture
def share(home) -> Share:
    """A share with its first roster and head published."""
    made = Share.new()
    made.publish(home, roster=made.roster(), head=made.head())
    return made


# -- every home: reading -----------------------------------------------------------------------------


def test_is_a_metadata_home(home):
    assert isinstance(home, Metadata)


def test_an_unknown_share_is_nothing(home):
    share, kid = os.urandom(16), mailbox()
    assert run(home.share_state, share, kid) == ShareState((), None, None, None)
    assert run(home.capsules, share, kid) == []
    assert run(home.roster, share) is None
    assert run(home.timestamp, share) is None
    assert run(home.head, share) is None
    assert run(home.heads, share, 0, 1000) == []
    assert run(home.letters, kid) == []
    assert run(home.identity, "nobody") == []
    assert run(home.identity_by_kid, kid) == []


def test_publish_and_read_back(home):
    share, bob, carol = Share.new(), EncryptionKey.generate(), EncryptionKey.generate()
    roster, head = share.roster(), share.head()
    capsules = [(key.kid, os.urandom(16), key) for key in (bob, carol, bob)]
    capsules = [(kid, i, share.capsule(key, id=i)) for kid, i, key in capsules]
    share.publish(home, roster=roster, head=head, capsules=capsules)
    assert run(home.roster, share.share) == roster
    assert run(home.head, share.share) == head
    assert run(home.capsules, share.share, bob.kid) == [capsules[0][2], capsules[2][2]]
    assert run(home.capsules, share.share, carol.kid) == [capsules[1][2]]
    state = run(home.share_state, share.share, bob.kid)
    assert state.capsules == (capsules[0][2], capsules[2][2])
    assert (state.roster, state.head) == (roster, head)
    assert state.timestamp is not None


def test_shares_are_apart(home, share):
    other = Share.new()
    other.publish(home, roster=other.roster(), head=other.head())
    assert run(home.head, share.share) != run(home.head, other.share)
    assert len(run(home.heads, share.share, 0, 100)) == 1


def test_newest_and_ranges_of_heads(home, share):
    blobs = [run(home.head, share.share)]
    for _ in range(4):
        blobs.append(share.head())
        share.publish(home, head=blobs[-1])
    assert run(home.head, share.share) == blobs[-1]
    assert run(home.heads, share.share, 0, 5) == blobs
    assert run(home.heads, share.share, 1, 3) == blobs[1:3]
    assert run(home.heads, share.share, 5, 9) == []


def test_timestamp_is_fresh_and_over_the_newest_roster(home, share):
    service = run(home.service_key)
    share.publish(home, roster=share.roster())
    roster = run(home.roster, share.share)
    stamp = Timestamp.parse(run(home.timestamp, share.share), {kid_of(service): service})
    assert stamp.roster == record_hash(roster)
    assert stamp.share == share.share
    assert (stamp.iat, stamp.exp) == (NOW, NOW + 300)


# -- every home: what publish refuses -----------------------------------------------------------------


def refused(code, home, publication, share):
    """The publication is refused, and nothing of it stays."""
    everything = (home.roster, home.head, partial(home.heads, after_ver=0, upto_ver=10**9))
    before = [run(partial(read, share.share)) for read in everything]
    kids = {kid for kid, _, _ in publication.capsules}
    drawers = [run(home.capsules, share.share, kid) for kid in kids]
    error = fails(code, home.publish, publication)
    assert [run(partial(read, share.share)) for read in everything] == before
    assert [run(home.capsules, share.share, kid) for kid in kids] == drawers
    return error


def test_a_lost_race_is_a_head_conflict(home, share):
    mine = share.publication(head=share.head())
    share.publish(home, head=share.head())
    refused("head_conflict", home, mine, share)
    stale_roster = share.publication(roster=share.roster(minver=1))
    share.publish(home, roster=share.roster())
    refused("head_conflict", home, stale_roster, share)


def test_expectations_guard_what_is_not_changed(home, share):
    roster_seen = replace(share.publication(head=share.head()), expect_roster=share.seq)
    head_seen = replace(share.publication(roster=share.roster()), expect_head=share.prev)
    share_before = replace(share)
    share.publish(home, roster=share.roster())
    refused("head_conflict", home, roster_seen, share)
    share.publish(home, head=share.head())
    late = replace(
        head_seen, expect_roster=share.seq, roster=share.roster(), roster_seq=share.seq + 1, roster_epoch=1
    )
    refused("head_conflict", home, late, share)
    assert share_before.prev != share.prev


def test_expectations_cannot_be_left_out(home, share):
    publication = share.publication(roster=share.roster(), head=share.head())
    refused("invalid_record", home, replace(publication, expect_head=None), share)
    refused("invalid_record", home, replace(publication, expect_roster=None), share)


def test_all_or_nothing(home, share):
    stranger = SigningKey.generate()
    bob = EncryptionKey.generate()
    capsule_id = os.urandom(16)
    good = (bob.kid, capsule_id, share.capsule(bob, id=capsule_id))
    bad = share.publication(roster=share.roster(), head=share.head(stranger), capsules=[good])
    refused("invalid_record", home, bad, share)
    other = os.urandom(16)
    forged = (bob.kid, other, share.capsule(bob, stranger, id=other))
    bad = share.publication(roster=share.roster(), head=share.head(), capsules=[good, forged])
    refused("invalid_record", home, bad, share)


def test_repeating_a_publication_is_harmless_even_later(home, share):
    publication = share.publication(roster=share.roster(), head=share.head())
    share.publish(home, roster=publication.roster, head=publication.head)
    run(home.publish, publication)
    assert run(home.head, share.share) == publication.head
    newer = share.head()
    share.publish(home, head=newer)
    run(home.publish, publication)
    assert run(home.head, share.share) == newer


def test_half_a_repetition_is_not_one(home, share):
    known = run(home.head, share.share)
    publication = share.publication(roster=share.roster(), head=known)
    refused("head_conflict", home, replace(publication, expect_head=b""), share)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_only_the_owner_signs_rosters(home, share, first):
    target = Share.new() if first else share
    stranger = SigningKey.generate()
    refused("invalid_record", home, target.publication(roster=target.roster(stranger)), target)


def test_a_writer_who_is_not_the_owner_cannot_sign_rosters(home, share):
    writer = SigningKey.generate()
    both = (share.owner.public, writer.public)
    share.publish(home, roster=share.roster(writers=both))
    share.publish(home, head=share.head(writer))  # heads he may
    refused("invalid_record", home, share.publication(roster=share.roster(writer, writers=both)), share)


def test_the_owner_need_not_be_the_first_writer(home):
    share, writer = Share.new(), SigningKey.generate()
    share.publish(home, roster=share.roster(writers=(writer.public, share.owner.public)))
    refused("invalid_record", home, share.publication(roster=share.roster(writer)), share)
    share.publish(home, roster=share.roster())


def test_a_share_cannot_be_taken_over_by_a_new_first_roster(home, share):
    eve = SigningKey.generate()
    roster = share.roster(eve, seq=1, writers=(eve.public,))
    refused("head_conflict", home, replace(share.publication(roster=roster), expect_roster=0), share)
    roster = share.roster(eve, writers=(eve.public,))
    refused("invalid_record", home, share.publication(roster=roster), share)


@pytest.fixture
def old_share(home, share) -> Share:
    """A share with 20 versions."""
    for _ in range(19):
        share.publish(home, head=share.head())
    assert share.ver == 20
    return share


def not_retained(code, home, share, blob):
    before = run(home.retention, share.share)
    fails(code, home.retain, share.share, blob)
    assert run(home.retention, share.share) == before


def test_retention_is_replaced_by_the_next(home, old_share):
    share = old_share
    assert run(home.retention, share.share) is None
    before = home.tick()
    first = share.retention((1, 3))
    run(home.retain, share.share, first)
    assert home.tick() != before
    assert run(home.retention, share.share) == first
    run(home.retain, share.share, first)  # its answer was lost
    second = share.retention((1, 3), (5, 8), seq=2)
    run(home.retain, share.share, second)
    assert run(home.retention, share.share) == second
    not_retained("head_conflict", home, share, first)
    # Ranges may be put together differently, as long as they hold what they held.
    run(home.retain, share.share, share.retention((1, 2), (3, 3), (4, 6), (7, 19), seq=3))
    run(home.retain, share.share, share.retention((1, 19), seq=4))


def vault(of, seq=1, before=b"", signer=None, **changes):
    """The record numbered ``seq`` of the vault that has the id and owner of the share ``of``."""
    fields = {
        "id": of.share, "seq": seq, "prev": record_hash(before) if before else b"", "owner": of.owner.public,
        "iat": NOW, "exp": NOW + 1000, "members": (os.urandom(32),),
    }  # fmt: skip
    return VaultRecord(**fields | changes).sign(signer or of.owner)


def test_an_access_list_is_replaced_by_the_next(home):
    mine = Share.new()
    assert run(home.access_list, mine.share) is None
    first = vault(mine)
    second = vault(mine, 2, first)
    run(home.put_access_list, mine.share, 0, first, [])
    run(home.put_access_list, mine.share, 0, first, [])  # its answer was lost
    fails("head_conflict", home.put_access_list, mine.share, 0, second, [])
    run(home.put_access_list, mine.share, 1, second, [])
    found = run(home.access_list, mine.share)
    assert found.record == second
    service = run(home.service_key)
    stamp = Timestamp.parse(found.timestamp, {kid_of(service): service})
    assert (stamp.share, stamp.roster) == (mine.share, record_hash(second))
    assert (stamp.iat, stamp.exp) == (NOW, NOW + 300)
    fails("head_conflict", home.put_access_list, mine.share, 1, vault(mine, 3, second), [])
    fails("invalid_record", home.put_access_list, mine.share, 2, vault(mine, 2, first), [])
    # A store that was restored has forgotten some; the owner goes on behind the newest.
    run(home.put_access_list, mine.share, 2, vault(mine, 7, os.urandom(9)), [])
    run(home.delete_access_list, mine.share)
    run(home.delete_access_list, mine.share)
    assert run(home.access_list, mine.share) is None


def test_nobody_vouches_for_what_is_not_the_list_of_that_id(home, share):
    """Or an old roster, kept as a vault under the id of its share, would be given a fresh timestamp."""
    old = run(home.roster, share.share)
    share.publish(home, roster=share.roster())
    other = Share.new()
    for record in (old, vault(other), vault(share, signer=other.owner), os.urandom(40)):
        try:
            run(home.put_access_list, share.share, 0, record, [])
        except MeshkitError as error:
            assert error.code == "invalid_record"
            continue
        found = run(home.access_list, share.share)
        assert (found.record, found.timestamp) == (record, None)
        run(home.delete_access_list, share.share)


@pytest.mark.parametrize("seq", [2, 5])
def test_retention_is_numbered_without_gaps(home, old_share, seq):
    not_retained("head_conflict", home, old_share, old_share.retention((1, 3), seq=seq))
    run(home.retain, old_share.share, old_share.retention((1, 3)))
    not_retained("head_conflict", home, old_share, old_share.retention((1, 4)))
    not_retained("head_conflict", home, old_share, old_share.retention((1, 4), seq=3))


@pytest.mark.parametrize(
    "ranges",
    [
        (), ((1, 3),), ((6, 9),), ((1, 2), (6, 9)), ((2, 3), (6, 9)), ((1, 3), (6, 7), (9, 9)),
        ((1, 3), (7, 9)), ((1, 1), (3, 3), (6, 9)), ((1, 6), (8, 19)), ((4, 19),), ((10, 19),),
    ],
)  # fmt: skip
def test_what_was_given_up_cannot_be_taken_back(home, old_share, ranges):
    run(home.retain, old_share.share, old_share.retention((1, 3), (6, 9)))
    not_retained("invalid_record", home, old_share, old_share.retention(*ranges, seq=2))


@pytest.mark.parametrize("ranges", [((20, 20),), ((1, 20),), ((1, 3), (19, 25)), ((21, 30),)])
def test_the_newest_version_cannot_be_given_up(home, old_share, ranges):
    not_retained("invalid_record", home, old_share, old_share.retention(*ranges))


def test_only_the_owner_gives_up(home, old_share):
    share, writer = old_share, SigningKey.generate()
    share.publish(home, roster=share.roster(writers=(share.owner.public, writer.public)))
    not_retained("invalid_record", home, share, share.retention((1, 3), signer=writer))
    not_retained("invalid_record", home, share, share.retention((1, 3), share=bytes(16)))
    not_retained("invalid_record", home, share, evil.flipped(share.retention((1, 3)), 80))
    not_retained("invalid_record", home, share, b"")
    nobodys = Share.new()
    not_retained("invalid_record", home, nobodys, nobodys.retention((1, 3)))
    other = Share.new()
    other.publish(home, roster=other.roster(), head=other.head())
    fails("invalid_record", home.retain, other.share, share.retention((1, 3)))


@pytest.mark.parametrize(
    "changes",
    [
        {"seq": 1},
        {"seq": 2, "minver": 1},
        {"seq": 4},
        {"share": bytes(16)},
        {"oid": bytes(16)},
        {"epoch": 1},
    ],
    ids=["first-number", "same-number", "skipped-number", "share", "oid", "old-epoch"],
)
def test_rosters_that_do_not_follow(home, share, changes):
    share.publish(home, roster=share.roster(epoch=2))
    assert share.seq == 2
    refused("invalid_record", home, share.publication(roster=share.roster(**changes)), share)


@pytest.mark.parametrize(
    "changes",
    [{"share": bytes(16)}, {"oid": bytes(16)}, {"ver": 2}, {"prev": bytes(32)}],
    ids=["share", "oid", "same-version", "prev"],
)
def test_heads_that_do_not_follow(home, share, changes):
    share.publish(home, head=share.head())
    assert share.ver == 2
    refused("invalid_record", home, share.publication(head=share.head(**changes)), share)


def test_versions_may_skip(home, share):
    share.publish(home, head=share.head(ver=7))
    assert evil.peek(Head, run(home.head, share.share)).ver == 7


def test_the_numbers_beside_must_be_the_numbers_inside(home, share):
    head = share.publication(head=share.head())
    roster = share.publication(roster=share.roster())
    for wrong in (
        replace(head, head_ver=9),
        replace(head, head_epoch=2),
        replace(roster, roster_seq=9),
        replace(roster, roster_epoch=2),
    ):
        refused("invalid_record", home, wrong, share)


def test_heads_are_signed_by_a_writer_of_the_newest_roster(home, share):
    writer, stranger = SigningKey.generate(), SigningKey.generate()
    refused("invalid_record", home, share.publication(head=share.head(stranger)), share)
    share.publish(home, roster=share.roster(writers=(share.owner.public, writer.public)))
    share.publish(home, head=share.head(writer))
    share.publish(home, roster=share.roster())  # the writer is out
    refused("invalid_record", home, share.publication(head=share.head(writer)), share)
    # and a new writer counts from the very publication that names him
    both = (share.owner.public, stranger.public)
    share.publish(home, roster=share.roster(writers=both), head=share.head(stranger))


def test_a_head_of_a_left_epoch_is_a_conflict(home, share):
    old = share.head()
    share.publish(home, roster=share.roster(epoch=2))
    refused("head_conflict", home, share.publication(head=old), share)
    refused("head_conflict", home, share.publication(head=share.head(epoch=3)), share)
    share.publish(home, head=share.head(epoch=2))


def test_nothing_is_published_for_a_share_without_a_roster(home):
    share, bob = Share.new(), EncryptionKey.generate()
    refused("invalid_record", home, share.publication(head=share.head()), share)
    capsule_id = os.urandom(16)
    capsules = [(bob.kid, capsule_id, share.capsule(bob, id=capsule_id))]
    refused("invalid_record", home, share.publication(capsules=capsules), share)


def test_capsules_are_the_owners_and_in_the_right_drawer(home, share):
    bob, stranger = EncryptionKey.generate(), SigningKey.generate()
    capsule_id = os.urandom(16)
    good = share.capsule(bob, id=capsule_id)
    for kid, i, blob in (
        (bob.kid, capsule_id, share.capsule(bob, stranger, id=capsule_id)),
        (bob.kid, capsule_id, share.capsule(bob, id=capsule_id, share=bytes(16))),
        (bytes(16), capsule_id, good),
        (bob.kid, bytes(16), good),
        (bob.kid, capsule_id, evil.flipped(good, 300)),
        (bob.kid, capsule_id, share.roster()),
    ):
        refused("invalid_record", home, share.publication(capsules=[(kid, i, blob)]), share)
    share.publish(home, capsules=[(bob.kid, capsule_id, good)])
    share.publish(home, capsules=[(bob.kid, capsule_id, good)])
    assert run(home.capsules, share.share, bob.kid) == [good]
    again = share.capsule(bob, id=capsule_id)
    refused("invalid_record", home, share.publication(capsules=[(bob.kid, capsule_id, again)]), share)


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x00", b"\xff" * 100, b"\x84" * 50, bytes(1 << 16)],
    ids=["empty", "zero", "ones", "nested", "long"],
)
def test_junk_is_refused(home, share, junk):
    fresh = Share.new()
    base = Publication(share.share, expect_head=share.prev, expect_roster=share.seq)
    refused("invalid_record", home, replace(base, head=junk, head_ver=2, head_epoch=1), share)
    refused("invalid_record", home, replace(base, roster=junk, roster_seq=2, roster_epoch=1), share)
    refused("invalid_record", home, replace(base, capsules=((bytes(16), bytes(16), junk),)), share)
    first = Publication(fresh.share, expect_roster=0, roster=junk, roster_seq=1, roster_epoch=1)
    refused("invalid_record", home, first, fresh)
    short = junk[:1024]  # no service reads more of somebody it does not know
    fails(not_theirs(home) if short else "invalid_record", home.publish_identity, "alice", short)


# -- every home: letters --------------------------------------------------------------------------------


def mailbox() -> bytes:
    """The kid of a new encryption key, which is somebody's mailbox."""
    return EncryptionKey.generate().kid


def test_letters(home):
    bob, carol = mailbox(), mailbox()
    first = run(home.post_letter, bob, b"one")
    second = run(home.post_letter, bob, b"two")
    other = run(home.post_letter, carol, b"three")
    assert len({first, second, other}) == 3
    assert all(len(i) == 16 for i in (first, second, other))
    assert run(home.letters, bob) == [(first, b"one"), (second, b"two")]
    run(home.delete_letter, carol, first)  # not hers
    assert run(home.letters, bob) == [(first, b"one"), (second, b"two")]
    run(home.delete_letter, bob, first)
    run(home.delete_letter, bob, first)
    assert run(home.letters, bob) == [(second, b"two")]
    assert run(home.letters, carol) == [(other, b"three")]


def test_mailboxes_are_bounded(home, monkeypatch):
    monkeypatch.setattr("meshkitfs.metadata._queries.MAX_LETTERS", 3)
    bob = os.urandom(16)
    for _ in range(3):
        run(home.post_letter, bob, b"spam")
    fails("no_space", home.post_letter, bob, b"spam")
    run(home.post_letter, os.urandom(16), b"somebody else's is not full")
    for blob in (b"", bytes((256 << 10) + 1)):
        fails("invalid_argument", home.post_letter, os.urandom(16), blob)


# -- every home: identities -------------------------------------------------------------------------------


def identity(handle: str, key: SigningKey, **changes) -> bytes:
    record = IdentityRecord(
        handle=handle,
        root=key.public,
        sig=key.public,
        enc=EncryptionKey.generate().public,
        seq=0,
        prev=b"",
        nbf=NOW,
        exp=NOW + 1000,
        created=NOW,
    )
    return replace(record, **changes).sign(key)


def not_theirs(home) -> str:
    """How a record is refused that nobody has signed: a service asks first whose request that is."""
    return getattr(home, "stranger_code", "invalid_record")


def test_identity_chain(home):
    key, new_key = SigningKey.generate(), SigningKey.generate()
    first = identity("alice", key)
    run(home.publish_identity, "alice", first)
    run(home.publish_identity, "alice", first)
    assert run(home.identity, "alice") == [first]
    second = rotate(first, key, evil.peek(IdentityRecord, identity("alice", new_key)), new_key)
    run(home.publish_identity, "alice", second)
    run(home.publish_identity, "alice", first)
    assert run(home.identity, "alice") == [first, second]
    for kid in (key.kid, new_key.kid):
        assert run(home.identity_by_kid, kid) == [first, second]


def test_identity_cannot_be_taken(home):
    alice, eve = SigningKey.generate(), SigningKey.generate()
    first = identity("alice", alice)
    run(home.publish_identity, "alice", first)
    fails("identity_handle_taken", home.publish_identity, "alice", identity("alice", eve))
    unendorsed = identity("alice", eve, seq=1, prev=record_hash(first))
    fails("invalid_record", home.publish_identity, "alice", unendorsed)
    fails("invalid_record", home.publish_identity, "bob", identity("alice", eve))
    fails(not_theirs(home), home.publish_identity, "alice", evil.flipped(first, 500))
    fails("identity_handle_taken", home.publish_identity, "alice2", identity("alice2", alice))
    assert run(home.identity, "alice") == [first]
    assert run(home.identity, "bob") == run(home.identity, "alice2") == []
    assert run(home.identity_by_kid, eve.kid) == []


# -- every home: tick -----------------------------------------------------------------------------------


def test_tick_stands_still_and_moves(home, share):
    before = home.tick()
    run(home.head, share.share)
    assert home.tick() == home.tick() == before
    share.publish(home, head=share.head())
    after = home.tick()
    assert after != before
    assert home.tick() == after


# -- the embedded home: its file -----------------------------------------------------------------------


def test_open_never_makes_a_file(tmp_path):
    with pytest.raises(MeshkitError) as excinfo:
        EmbeddedMetadata(tmp_path / "metadata.db")
    assert excinfo.value.reason.code == "metadata_unavailable"
    assert os.listdir(tmp_path) == []


def strange_files(tmp_path):
    (tmp_path / "text").write_text("x" * 5000)
    (tmp_path / "empty").touch()
    stranger = "CREATE TABLE mine (x); PRAGMA user_version = 1"
    for name, statement in (("stranger", stranger), ("newer", "PRAGMA user_version = 99")):
        if name == "newer":
            EmbeddedMetadata.create(tmp_path / name).close()
        with apsw.Connection(str(tmp_path / name)) as db:
            db.execute(statement).fetchall()
        db.close()
    (tmp_path / "directory").mkdir()
    return [tmp_path / name for name in ("text", "empty", "stranger", "newer", "directory")]


def test_open_and_create_refuse_strange_files(tmp_path):
    for path in strange_files(tmp_path):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(MeshkitError) as excinfo:
            EmbeddedMetadata(path)
        assert excinfo.value.reason.code == "metadata_unavailable", path
        if path.name == "empty":
            continue  # an empty file is what a killed create leaves: create finishes it
        with pytest.raises(MeshkitError) as excinfo:
            EmbeddedMetadata.create(path)
        assert excinfo.value.reason.code == "metadata_unavailable", path
        assert (path.read_bytes() if path.is_file() else b"") == before
    EmbeddedMetadata.create(tmp_path / "empty").close()


def test_create_is_repeatable_and_keeps_the_key(tmp_path):
    first = EmbeddedMetadata.create(tmp_path / "deep" / "metadata.db")
    second = EmbeddedMetadata.create(tmp_path / "deep" / "metadata.db")
    assert run(first.service_key) == run(second.service_key)
    first.close()
    first.close()
    second.close()


@embedded_only
def test_a_closed_home_is_unavailable(home, share):
    home.close()
    fails("metadata_unavailable", home.head, share.share)
    assert home.tick() != home.tick()
    copy = home.path.with_name("copy")
    shutil.copy(home.path, copy)
    copy.rename(home.path)  # a file to follow must not bring it back to life
    fails("metadata_unavailable", home.head, share.share)


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o755])
def test_permissions_follow_the_directory(tmp_path, mode):
    place = tmp_path / "place"
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, -1, 12345)
    place.chmod(mode)
    old = os.umask(0o077)
    try:
        opened = EmbeddedMetadata.create(place / "metadata.db")
        run(opened.post_letter, bytes(16), b"x")
    finally:
        os.umask(old)
    files = sorted(place.iterdir())
    assert [path.name for path in files] == ["metadata.db", "metadata.db-shm", "metadata.db-wal"]
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == mode & 0o666
        if mode & stat.S_ISGID:
            assert path.stat().st_gid == place.stat().st_gid
    opened.close()


@embedded_only
def test_a_removed_file_is_noticed_and_a_restored_one_too(tmp_path, home, share):
    path, aside = home.path, tmp_path / "aside"
    backup = tmp_path / "backup"
    copier = apsw.Connection(str(path))
    copier.execute("VACUUM INTO ?", (str(backup),))
    copier.close()
    old_head = run(home.head, share.share)
    share.publish(home, head=share.head())
    tick = home.tick()
    path.rename(aside)
    assert home.tick() != tick
    fails("metadata_unavailable", home.head, share.share)
    fails("metadata_unavailable", home.post_letter, bytes(16), b"x")
    tick = home.tick()
    for suffix in ("-wal", "-shm"):
        os.unlink(f"{path}{suffix}")
    backup.rename(path)
    other = EmbeddedMetadata(path)
    run(other.post_letter, bytes(16), b"first")
    journal = os.stat(f"{path}-wal").st_ino
    assert run(home.head, share.share) == old_head
    run(home.post_letter, bytes(16), b"x")
    assert home.tick() != tick
    assert home.tick() == home.tick()
    # giving up the old file has not removed the journal of the new one
    assert os.stat(f"{path}-wal").st_ino == journal
    assert [blob for _, blob in run(other.letters, bytes(16))] == [b"first", b"x"]
    other.close()


@embedded_only
def test_a_broken_file_in_between_is_survived(tmp_path, home, share):
    aside = tmp_path / "aside"
    checkpointer = apsw.Connection(str(home.path))
    checkpointer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    checkpointer.close()
    home.path.rename(aside)
    home.path.write_bytes(b"not a database" * 100)
    for _ in range(2):
        fails("metadata_unavailable", home.head, share.share)
        fails("metadata_unavailable", home.post_letter, bytes(16), b"x")
        assert home.tick() != home.tick()
    aside.rename(home.path)
    assert run(home.head, share.share) is not None
    run(home.post_letter, bytes(16), b"x")
    assert home.tick() == home.tick()


@embedded_only
def test_damage_is_unavailable_not_nothing(home, share):
    home.close()
    db = apsw.Connection(str(home.path))
    query = "SELECT rootpage FROM sqlite_schema WHERE type = 'table' AND name IN ('heads', 'rosters')"
    pages = [row[0] for row in db.execute(query)]
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.close()
    with open(home.path, "r+b") as f:
        for page in pages:
            f.seek((page - 1) * 4096)
            f.write(os.urandom(4096))
    opened = EmbeddedMetadata(home.path)
    fails("metadata_unavailable", opened.head, share.share)
    fails("metadata_unavailable", opened.share_state, share.share, bytes(16))
    opened.close()


@embedded_only
def test_triggers_of_others_do_not_run(home, share):
    with evil.opened(home.path) as db:
        db.execute("CREATE TRIGGER t AFTER INSERT ON letters BEGIN DELETE FROM rosters; END")
    run(home.post_letter, bytes(16), b"x")
    assert run(home.roster, share.share) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small filesystem")
def test_a_full_disk_is_no_space(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        opened = EmbeddedMetadata.create(small / "metadata.db")

        async def fill_up():
            for _ in range(20):
                await opened.post_letter(bytes(16), bytes(100_000))

        error = fails("no_space", fill_up)
        assert error.reason.errno == errno.ENOSPC
        assert run(opened.letters, bytes(16))
        opened.close()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


# -- the embedded home: several processes ---------------------------------------------------------------


@embedded_only
def test_two_openers_see_each_other(tmp_path, home):
    other = EmbeddedMetadata(home.path)
    tick = other.tick()
    share = Share.new()
    share.publish(home, roster=share.roster(), head=share.head())
    assert other.tick() != tick
    assert run(other.head, share.share) == run(home.head, share.share)
    assert run(other.service_key) == run(home.service_key)
    other.close()


@embedded_only
def test_a_locked_store_is_unavailable_after_the_deadline(home, share):
    impatient = EmbeddedMetadata(home.path, busy_seconds=0.2)
    holder = apsw.Connection(str(home.path))
    holder.execute("BEGIN IMMEDIATE")
    try:
        tick = impatient.tick()
        fails("metadata_unavailable", impatient.post_letter, bytes(16), b"x")
        assert run(impatient.head, share.share)  # reading goes on
        assert impatient.tick() == tick
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    run(impatient.post_letter, bytes(16), b"x")
    impatient.close()


RACER = """
import sys, os, trio
sys.path[:0] = [sys.argv[1]]
from t1_metadata_contract import *
path, share_hex, oid_hex, seed_hex, writes = sys.argv[2:7]
owner = SigningKey.from_seed(bytes.fromhex(seed_hex))
home = EmbeddedMetadata(path, busy_seconds=60)
share = Share(owner, bytes.fromhex(share_hex), bytes.fromhex(oid_hex), seq=1)
won = lost = 0
while won < int(writes):
    newest = run(home.head, share.share)
    share.ver, share.prev = evil.peek(Head, newest).ver, record_hash(newest)
    try:
        run(home.publish, share.publication(head=share.head()))
        won += 1
    except MeshkitError as error:
        assert error.reason.code == "head_conflict", error.reason.code
        lost += 1
print(won, lost)
"""


def racer(home, share, writes):
    here = os.path.dirname(__file__)
    arguments = [home.path, share.share.hex(), share.oid.hex(), share.owner.seed.hex(), str(writes)]
    return subprocess.Popen(
        [sys.executable, "-c", RACER, here, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@embedded_only
def test_racing_processes_lose_no_head(home, share):
    racers = [racer(home, share, 25) for _ in range(3)]
    outcomes = [process.communicate(timeout=120) for process in racers]
    for process, (_, errors) in zip(racers, outcomes, strict=True):
        assert process.returncode == 0, errors
    heads = run(home.heads, share.share, 0, 10**9)
    assert len(heads) == 1 + 3 * 25  # every success is in the chain
    for previous, following in itertools.pairwise(heads):
        assert evil.peek(Head, following).prev == record_hash(previous)
        assert evil.peek(Head, following).ver == evil.peek(Head, previous).ver + 1


@embedded_only
def test_racing_threads_of_one_home(home, share):
    publications = [share.publication(head=share.head()) for _ in range(8)]
    outcomes: list[str] = []

    async def one(publication):
        try:
            await home.publish(publication)
            outcomes.append("won")
        except MeshkitError as error:
            outcomes.append(error.reason.code)

    async def main():
        async with trio.open_nursery() as nursery:
            for publication in publications:
                nursery.start_soon(one, publication)

    trio.run(main)
    assert sorted(outcomes) == ["head_conflict"] * 7 + ["won"]


def test_racing_creators(tmp_path):
    script = (
        "import sys, trio; from meshkitfs.metadata import EmbeddedMetadata;"
        "print(trio.run(EmbeddedMetadata.create(sys.argv[1]).service_key).hex())"
    )
    path = tmp_path / "metadata.db"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    keys = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(keys) == 1


ENDLESS = """
import sys, os, trio
from meshkitfs.metadata import EmbeddedMetadata
home = EmbeddedMetadata(sys.argv[1])
async def main():
    n = 0
    while True:
        await home.post_letter(bytes(16), n.to_bytes(4, "big") * 500)
        os.write(1, n.to_bytes(4, "big"))
        n += 1
trio.run(main)
"""


@embedded_only
def test_kill_9_keeps_everything_acknowledged(home):
    for round_ in range(3):
        before = len(run(home.letters, bytes(16)))
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, home.path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        acknowledged = process.stdout.read(4 * (5 + 13 * round_))
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read()
        process.stdout.close()
        process.wait()
        kept = [blob for _, blob in run(home.letters, bytes(16))][before:]
        assert len(acknowledged) // 4 >= 5  # else this proves nothing
        assert len(acknowledged) // 4 <= len(kept) <= len(acknowledged) // 4 + 1
        assert kept == [n.to_bytes(4, "big") * 500 for n in range(len(kept))]
        with evil.opened(home.path) as db:
            assert db.execute("PRAGMA integrity_check").get == "ok"


AS_USER = """
import os, sys, trio
from meshkitfs.metadata import EmbeddedMetadata
os.setgroups([]); os.setgid(12345); os.setuid(int(sys.argv[2])); os.umask(0o077)
home = EmbeddedMetadata(sys.argv[1])
trio.run(home.post_letter, bytes(16), sys.argv[2].encode())
print(len(trio.run(home.letters, bytes(16))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become two other users")
def test_two_users_of_one_group():
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are closed to other users
        os.chown(place, -1, 12345)
        os.chmod(place, 0o2770)
        EmbeddedMetadata.create(f"{place}/metadata.db").close()
        for count, uid in enumerate(("12346", "12347", "12346"), 1):
            arguments = [sys.executable, "-c", AS_USER, f"{place}/metadata.db", uid]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == [str(count)]


# -- the embedded home: durability and cost, as facts ----------------------------------------------------


@embedded_only
def test_every_writing_connection_is_wal_and_full(home):
    for link in (home._database._writer, home._database._reader):
        assert link.connection.execute("PRAGMA journal_mode").get == "wal"
        assert link.connection.execute("PRAGMA synchronous").get == 2


@embedded_only
def test_share_state_is_one_trip_and_one_moment(home, share, monkeypatch):
    trips = 0
    real = trio.to_thread.run_sync

    async def counted(*args, **kwargs):
        nonlocal trips
        trips += 1
        return await real(*args, **kwargs)

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    run(home.share_state, share.share, bytes(16))
    assert trips == 1
    monkeypatch.undo()

    # Somebody publishes roster and head between two of its queries: they must not be mixed.
    from meshkitfs.metadata import _queries

    real_head, old = _queries.newest_head, run(home.share_state, share.share, bytes(16))
    other = EmbeddedMetadata(home.path)

    def meanwhile(db, wanted):
        monkeypatch.undo()
        thread = threading.Thread(
            target=lambda: share.publish(other, roster=share.roster(), head=share.head())
        )
        thread.start()
        thread.join(30)
        return real_head(db, wanted)

    monkeypatch.setattr(_queries, "newest_head", meanwhile)
    assert run(home.share_state, share.share, bytes(16)) == old
    assert run(home.share_state, share.share, bytes(16)).head != old.head
    other.close()


@embedded_only
def test_tick_never_waits(home, share):
    link = home._database._ticker
    with link.lock:  # as when another thread follows a replaced file
        first, second = home.tick(), home.tick()
    assert first != second  # "look yourself", at once
    holder = apsw.Connection(str(home.path))
    holder.execute("BEGIN EXCLUSIVE")
    try:
        started = time.monotonic()
        ticks = {home.tick() for _ in range(100)}
        assert time.monotonic() - started < database._CREATE_WAIT_SECONDS
        assert len(ticks) == 1
    finally:
        holder.execute("ROLLBACK")
        holder.close()


@embedded_only
def test_a_cancelled_reader_stops_and_a_publisher_does_not(home, share, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    real = database.in_transaction

    def slow(connection, begin, work):
        entered.set()
        assert release.wait(30)
        return real(connection, begin, work)

    monkeypatch.setattr(database, "in_transaction", slow)

    async def comes_back_at_once(function, *args):
        entered.clear()
        release.clear()
        at_once = []

        async def call():
            try:
                await function(*args)
            finally:
                at_once.append(not release.is_set())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.to_thread.run_sync(entered.wait)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked(0.05)
            release.set()
        return at_once

    assert run(comes_back_at_once, home.head, share.share) == [True]
    publication = share.publication(head=share.head())
    assert run(comes_back_at_once, home.publish, publication) == [False]
    assert run(home.head, share.share) == publication.head


# -- files of older versions ---------------------------------------------------------------------------


def old_file(path) -> None:
    """A metadata.db as version 1 of this program made it, with a share in it."""
    connection = apsw.Connection(str(path))
    connection.execute((Path(__file__).parent / "fossils" / "metadata-1.sql").read_text()).fetchall()
    connection.execute("INSERT INTO service (seed) VALUES (?)", (bytes(32),))
    connection.execute(f"PRAGMA application_id = {0x4D4B6D64}").fetchall()
    connection.execute("PRAGMA user_version = 1").fetchall()
    connection.execute("PRAGMA journal_mode = wal").fetchall()
    connection.close()


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path):
    path = tmp_path / "metadata.db"
    old_file(path)
    share = Share.new()
    roster, head, alice = share.roster(), share.head(), identity("alice", SigningKey.generate())
    with evil.opened(path) as db:
        db.execute(
            "INSERT INTO rosters VALUES (?, 1, ?, ?, ?)",
            (share.share, share.owner.public, record_hash(roster), roster),
        )
        db.execute("INSERT INTO heads VALUES (?, 1, ?, ?)", (share.share, record_hash(head), head))
        db.execute("INSERT INTO identities VALUES ('alice', 0, ?)", (alice,))
    share.seq, share.ver, share.prev = 1, 1, record_hash(head)
    home = EmbeddedMetadata(path, clock=lambda: NOW)
    assert run(home.head, share.share) == head
    assert run(home.retention, share.share) is None
    # Whose encryption key it is was in no table then: nobody else can claim it now.
    eve = identity("eve", SigningKey.generate(), enc=evil.peek(IdentityRecord, alice).enc)
    fails("identity_handle_taken", home.publish_identity, "eve", eve)
    share.publish(home, head=share.head())
    record = share.retention((1, 1))
    run(home.retain, share.share, record)
    home.close()
    again = EmbeddedMetadata(path, clock=lambda: NOW)
    assert run(again.retention, share.share) == record
    assert run(again.roster, share.share) == roster
    again.close()
    fresh = EmbeddedMetadata.create(tmp_path / "new.db", clock=lambda: NOW)
    fresh.close()
    tables = "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite%' ORDER BY name"
    with evil.opened(path) as old, evil.opened(tmp_path / "new.db") as new:
        # The statements are the same but for the place where they stand.
        assert old.execute(tables).fetchall() == new.execute(tables).fetchall()
        assert old.execute("PRAGMA user_version").get == new.execute("PRAGMA user_version").get == 5


def test_several_homes_meet_an_old_file_at_once(tmp_path):
    path = tmp_path / "metadata.db"
    old_file(path)
    homes, threads = [], []
    for _ in range(6):
        threads.append(threading.Thread(target=lambda: homes.append(EmbeddedMetadata(path))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(homes) == 6
    for home in homes:
        assert run(home.retention, bytes(16)) is None
        home.close()
