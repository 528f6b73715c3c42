"""The release service over real sockets: what it hands out, to whom, and what it refuses; on both databases."""

import contextlib
import json
import os
import sqlite3
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest
import trio
from homes import wait_until
from service import Person, Service, refused, unb64
from t1_metadata_contract import cluster  # noqa: F401 - a fixture

from meshkitfs.core import _unwrap, hpke, release
from meshkitfs.core.keys import EncryptionKey, SigningKey, did_key, kid_of
from meshkitfs.core.records import Capsule, make_capsule
from meshkitfs.core.release import EpochSecret, ReleaseKey, ReleaseService
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata._wire import b64
from meshkitfs.metadata.operator import Operator
from meshkitfs.metadata.postgres import PostgresMetadata
from meshkitfs.metadata.service import ReleaseKeys

NAMES = iter(range(10**6))
STRANGER = did_key(SigningKey.generate().public)
PERMIT_CAROL = 'permit(principal == Identity::"carol", action, resource);'


def key_file(place):
    """A secret of a release service, as an operator makes one."""
    path = place / "release.key"
    path.write_text(os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def running(request, tmp_path_factory):
    """Two instances behind one PostgreSQL, or one on SQLite: (the instances, database, key file)."""
    place = tmp_path_factory.mktemp("release")
    secret = key_file(place)
    options = ("--release-key-file", secret)
    if request.param == "sqlite":
        database = place / "metadata.db"
        with Service(database, *options) as one:
            yield (one, one), database, secret
            assert one.stop() == 0
            assert one.said == ""
    else:
        database = request.getfixturevalue("cluster").fresh()
        with Service(database, *options) as one, Service(database, *options) as other:
            yield (one, other), database, secret


@pytest.fixture
def alice(running):
    return Person(f"alice{next(NAMES)}", running[0][0]).join()


@pytest.fixture
def bob(running):
    """Who asks the other instance."""
    return Person(f"bob{next(NAMES)}", running[0][1]).join()


class Held:
    """A share of which the service holds half of the key: what its owner does with it."""

    def __init__(self, owner):
        self.owner = owner
        self.share = owner.share()
        offer = owner.get("/v1/release-service").json()
        self.key = unb64(offer["key"])
        self.enc = ReleaseKey.parse(unb64(offer["record"]), {kid_of(self.key): self.key}).enc
        self.where = ReleaseService(owner.service.url, self.key)
        self.capsules = {}
        self.secrets = {}

    def secret(self, epoch=None):
        epoch = epoch or self.share.epoch
        return self.secrets.setdefault(
            epoch, EpochSecret(self.share.share, epoch, os.urandom(32), self.where)
        )

    @property
    def path(self):
        return f"/v1/shares/{self.share.share.hex()}"

    def deposit(self, epoch=None, *, by=None, secret=None, to=None, path=None):
        who = by or self.owner
        record = (secret or self.secret(epoch)).deposit(to or self.enc).sign(who.key)
        return who.put(f"{path or self.path}/deposit", {"record": b64(record)})

    def grant(self, to, **changes):
        """A capsule with half of the key for somebody, published with a roster that lists it; returns it."""
        self.publish([*self.capsules.values(), self.make(to, **changes)])
        return self.capsules[to.kid]

    def make(self, to, **changes):
        now = int(time.time())
        header = {
            "id": os.urandom(16), "grant": "live", "share": self.share.share, "oid": self.share.oid,
            "epoch": self.share.epoch, "nbf": now - 60, "exp": now + 1000, "seq": 1, "rights": ["read"],
            "rel": self.where.header("half"),
        } | changes  # fmt: skip
        secret, key = self.secret(header["epoch"]), None
        held = secret.capsule_half
        if header["grant"] == "snapshot":
            key = os.urandom(32)
            held = release.xor(key, release.snapshot_mask(secret.release_half, header["id"]))
        if header["rel"] is None:
            del header["rel"]
            held = b""
        blob = make_capsule(self.owner.key, header, key or secret.key, to.enc.public, held)
        capsule = Capsule.parse(blob, {self.owner.key.kid: self.owner.key.public})
        self.capsules[to.kid] = (capsule, blob)
        return capsule, blob

    def publish(self, listed, **changes):
        now = int(time.time())
        caps = tuple(capsule.digest for capsule, _ in listed)
        roster = self.share.roster(**{"caps": caps, "iat": now, "exp": now + 1000} | changes)
        new = [(c.to, c.id, blob) for c, blob in listed]
        head = None if self.share.ver else self.share.head()
        self.owner.publish(self.share, roster=roster, head=head, capsules=new)


@pytest.fixture
def held(alice, bob):
    """A share of alice's, of which bob has a capsule and the service a half."""
    held = Held(alice)
    assert held.deposit().status_code == 204
    held.grant(bob)
    return held


def ask(who, held, capsule=None, epoch=None, nonce=None):
    capsule = capsule or held.capsules[who.kid][0]
    body = {
        "capsule": b64(capsule.id),
        "epoch": epoch or capsule.epoch,
        "tokens": [],
        "nonce": b64(nonce or os.urandom(16)),
    }
    return who.post(f"{held.path}/release", body)


def opened(who, held, reply, nonce, *, of=None, capsule=None):
    """What the answer gives: the half, and the answer."""
    assert reply.status_code == 200, reply.text
    capsule = capsule or held.capsules[who.kid][0]
    record = unb64(reply.json()["record"])
    return _unwrap.open_release(record, of or capsule, capsule.digest, nonce, who.enc)


def no(reply, about):
    return refused(reply, 403, "key_release_refused", about)


# == what it gives ===================================================================================


def test_the_half_is_released_for_a_time_to_whom_the_capsule_is_for(held, bob):
    nonce, now = os.urandom(16), int(time.time())
    half, answer = opened(bob, held, ask(bob, held, nonce=nonce), nonce)
    capsule, _ = held.capsules[bob.kid]
    assert _unwrap.open_capsule(capsule, bob.enc, half) == held.secret().key
    assert now - 5 <= answer.iat <= now + 60
    assert answer.exp - answer.iat == 300
    # Sealed to bob alone, and anew for each question.
    again, other = os.urandom(16), Person("nobody", bob.service)
    assert opened(bob, held, ask(bob, held, nonce=again), again)[0] == half
    with pytest.raises(Exception, match="key_unwrap_failed"):
        hpke.unwrap(other.enc, answer.info, answer.half)


def test_it_never_lasts_longer_than_what_it_rests_on(held, alice, bob):
    now = int(time.time())
    held.grant(bob, exp=now + 100)
    nonce = os.urandom(16)
    assert opened(bob, held, ask(bob, held, nonce=nonce), nonce)[1].exp == now + 100
    held.publish([held.capsules[bob.kid]], exp=now + 50)
    assert opened(bob, held, ask(bob, held, nonce=nonce), nonce)[1].exp == now + 50


def test_a_snapshot_gets_a_mask_and_never_the_half(held, bob):
    held.deposit()
    capsule, _ = held.grant(bob, grant="snapshot", ver=4, root=os.urandom(32))
    nonce = os.urandom(16)
    mask, _ = opened(bob, held, ask(bob, held, nonce=nonce), nonce)
    assert mask != held.secret().release_half
    assert len(_unwrap.open_capsule(capsule, bob.enc, mask)) == 32
    # It stays good when the share goes on to another epoch.
    held.share.epoch += 1
    held.publish([held.capsules[bob.kid]])
    assert opened(bob, held, ask(bob, held, nonce=nonce), nonce)[0] == mask


def test_halves_of_older_epochs_for_whoever_had_them(held, alice, bob):
    carol = Person(f"carol{next(NAMES)}", bob.service).join()
    first, _ = held.capsules[bob.kid]
    held.share.epoch += 1
    held.deposit()
    now = [held.make(bob), held.make(carol)]
    held.publish(now)
    nonce = os.urandom(16)
    half, _ = opened(bob, held, ask(bob, held, epoch=1, nonce=nonce), nonce, of=first)
    assert _unwrap.open_capsule(first, bob.enc, half) == held.secret(1).key
    no(ask(carol, held, epoch=1), "no capsule of epoch 1")
    no(ask(bob, held, epoch=3), "no capsule of epoch 3")
    # The old capsule itself is over.
    no(ask(bob, held, capsule=first), "share_revoked")


def test_two_at_once_on_all_instances(held, bob, running):
    for number in range(6):
        bob.service, nonce = running[0][number % 2], os.urandom(16)
        assert opened(bob, held, ask(bob, held, nonce=nonce), nonce)[0] == held.secret().release_half


# == what it refuses =================================================================================


def test_revoked(held, bob):
    held.publish([])
    no(ask(bob, held), "share_revoked")


def test_expired_by_its_own_clock(held, bob):
    now = int(time.time())
    held.grant(bob, nbf=now - 100, exp=now - 1)
    no(ask(bob, held), "share_expired")
    held.grant(bob, nbf=now + 500)
    no(ask(bob, held), "share_expired")


def test_a_roster_that_has_run_out(held, bob):
    now = int(time.time())
    held.publish([held.capsules[bob.kid]], iat=now - 100, exp=now - 10)
    no(ask(bob, held), "freshness_unproven")


@pytest.mark.parametrize(
    ("demand", "code"),
    [
        ({"pol": {"id": "office hours", "url": "https://pdp.example"}}, "policy_provider_required"),
        ({"pol": {"id": "office hours", "rules": PERMIT_CAROL, "who": "bob"}}, "policy_denied"),
        ({"vault": f"{'0a' * 16}@{STRANGER}"}, "vault_membership_required"),
        ({"cap": f"printer@{STRANGER}"}, "capability_required"),
        ({"vault": "crew"}, "invalid_record"),
        ({"cap": "printer"}, "invalid_record"),
    ],
)
def test_what_it_cannot_check_it_refuses(held, bob, demand, code):
    held.grant(bob, **demand)
    no(ask(bob, held), code)


def test_rules_in_the_capsule_are_evaluated_here(held, bob):
    """They are the owner's, signed; the release lasts no longer than the yes."""
    rules = 'permit(principal == Identity::"bob", action, resource) when { context.hour >= 0 };'
    held.grant(bob, pol={"id": "always", "rules": rules, "who": "bob"})
    nonce = os.urandom(16)
    half, answer = opened(bob, held, ask(bob, held, nonce=nonce), nonce)
    assert half == held.secret().release_half
    assert answer.exp - answer.iat <= 30  # rules that look at the time
    listing = 'permit(principal == Identity::"bob", action == Action::"list", resource);'
    held.grant(bob, pol={"id": "listing", "rules": listing, "who": "bob"})
    no(ask(bob, held), "policy_denied")  # the key would give more


def test_a_provider_is_asked_by_the_service_itself(tmp_path):
    """A real decision point: another `meshkitfs serve`, whose rules change while it runs."""
    rules, config = tmp_path / "rules", tmp_path / "service.json"
    rules.mkdir()
    (rules / "p1.cedar").write_text("permit(principal, action, resource);")
    decider = tmp_path / "decider.json"
    decider.write_text(json.dumps({"policies": {"directory": str(rules)}}))
    with Service(tmp_path / "decider.db", config=decider) as pdp:
        release = {"keyFile": str(key_file(tmp_path)), "policy": {"endpoint": pdp.url}}
        config.write_text(json.dumps({"release": release}))
        with Service(tmp_path / "db", config=config) as service:
            alice, bob = Person("alice", service).join(), Person("bob", service).join()
            held = Held(alice)
            held.deposit()
            held.grant(
                bob, pol={"id": "p1", "url": pdp.url, "key": unb64(pdp.get("/v1/service").json()["key"])}
            )
            nonce = os.urandom(16)
            half, answer = opened(bob, held, ask(bob, held, nonce=nonce), nonce)
            assert half == held.secret().release_half
            assert answer.exp - answer.iat <= 30
            held.grant(bob, pol={"id": "p2", "url": pdp.url})
            no(ask(bob, held), "policy_denied")  # there is no such policy
            held.grant(bob, pol={"id": "p1", "url": pdp.url, "key": bob.key.public})
            no(ask(bob, held), "policy_provider_error")  # signed by another key
            pdp.kill()
            held.grant(bob, pol={"id": "p3", "url": pdp.url})
            no(ask(bob, held), "policy_provider_error")


def test_what_is_somebody_elses_does_not_exist(held, alice, bob):
    eve = Person(f"eve{next(NAMES)}", bob.service).join()
    capsule, _ = held.capsules[bob.kid]
    nothing = Held(eve)
    unknown = no(ask(eve, nothing, capsule=capsule), "capsule_not_found")
    assert no(ask(eve, held, capsule=capsule), "capsule_not_found") == unknown
    assert no(ask(alice, held, capsule=capsule), "capsule_not_found") == unknown
    # Nor does a capsule help that the owner has not published.
    alone, _ = held.make(eve)
    assert no(ask(eve, held, capsule=alone), "capsule_not_found") == unknown


def test_a_capsule_of_another_service_or_without_one(held, bob):
    other = ReleaseService(held.where.url, bob.key.public)
    held.grant(bob, rel=other.header("half"))
    no(ask(bob, held), "another release service")
    held.grant(bob, rel=None)
    no(ask(bob, held), "needs no release")


def test_without_a_half_there_is_nothing_to_release(alice, bob):
    held = Held(alice)
    held.grant(bob)
    no(ask(bob, held), "left no half of epoch 1")
    # Not even if somebody else leaves one.
    assert held.deposit(by=bob).status_code == 204
    no(ask(bob, held), "left no half of epoch 1")
    assert held.deposit().status_code == 204
    nonce = os.urandom(16)
    assert opened(bob, held, ask(bob, held, nonce=nonce), nonce)[0] == held.secret().release_half


# == depositing ======================================================================================


def test_the_same_half_again_is_harmless_and_another_is_refused(held, alice):
    assert held.deposit().status_code == 204
    another = replace(held.secret(), raw=os.urandom(32))
    refused(held.deposit(secret=another), 409, "head_conflict", "another half")


def test_what_is_no_deposit(held, alice, bob):
    record = held.secret().deposit(held.enc)
    for bad in (
        record.sign(bob.key),
        record.sign(alice.key)[:-1],
        replace(record, half=os.urandom(len(record.half))).sign(alice.key),
        held.secret().deposit(EncryptionKey.generate().public).sign(alice.key),
        replace(record, share=os.urandom(16)).sign(alice.key),
    ):
        reply = alice.put(f"{held.path}/deposit", {"record": b64(bad)})
        refused(reply, 422, "invalid_record")
    refused(alice.put(f"{held.path}/deposit", {"record": "AA"}), 422, "invalid_record")
    refused(alice.put(f"{held.path}/deposit", {"record": b64(bytes(8000))}), 400, "invalid_argument")


# == who has what ====================================================================================


def test_the_database_alone_gives_nothing(running, held, bob, tmp_path):
    """Whoever has the database, and a service with another secret over it, cannot open a half."""
    _, database, _ = running
    half = held.secret().release_half
    if isinstance(database, Path):
        files = b"".join(path.read_bytes() for path in database.parent.glob("metadata.db*"))
        assert b"mk/half@1" in files
        assert half not in files
        assert half.hex().encode() not in files
    with Service(database, "--release-key-file", key_file(tmp_path)) as stranger:
        bob.service = stranger
        reply = ask(bob, held)
        no(reply, "another release service")
        assert bob.get("/v1/release-service").json()["key"] != b64(held.key)


def test_a_service_without_the_secret_releases_nothing(running, held, alice, bob):
    with Service(running[1]) as plain:
        for who in (alice, bob):
            who.service = plain
        refused(alice.get("/v1/release-service"), 404, "path_not_found", "releases no keys")
        refused(held.deposit(), 404, "path_not_found")
        refused(ask(bob, held), 404, "path_not_found")


def test_the_secret_is_checked_and_never_shown(tmp_path):
    for text in ("", "abc", "g" * 64, os.urandom(31).hex(), os.urandom(33).hex(), " ".join(["00"] * 32)):
        with pytest.raises(MeshkitError) as caught:
            ReleaseKeys.derive(text)
        assert caught.value.code == "invalid_config"
        assert not text or text not in str(caught.value)
    good = key_file(tmp_path)
    short = good.with_name("short.key")
    short.write_text(good.read_text()[2:])
    short.chmod(0o600)
    with pytest.raises(AssertionError, match="invalid_config") as started:
        Service(tmp_path / "db", "--release-key-file", short)
    assert short.read_text().strip() not in str(started.value)
    good.chmod(0o644)
    with pytest.raises(AssertionError, match="can be read by others"):
        Service(tmp_path / "db", "--release-key-file", good)
    assert good.read_text().strip() not in repr(ReleaseKeys.derive(good.read_text().strip()))


def test_what_the_operator_removes_takes_its_halves_along(running, held, alice, bob):
    database = running[1]
    home = EmbeddedMetadata(database) if isinstance(database, Path) else PostgresMetadata(database)
    with contextlib.closing(home):
        trio.run(partial(Operator(home).remove_share, held.share.share, apply=True))
    no(ask(bob, held), "capsule_not_found")
    refused(held.deposit(), 403, "metadata_forbidden", "removed")
    connect = sqlite3.connect if isinstance(database, Path) else psycopg.connect
    with contextlib.closing(connect(database)) as looking:
        left = looking.execute("SELECT share FROM deposits").fetchall()
    assert held.share.share not in {bytes(share) for (share,) in left}


def test_releases_are_limited_like_everything_else(tmp_path):
    config = tmp_path / "service.json"
    config.write_text(
        '{"rates": {"identity": {"perSecond": 1, "burst": 8}}, '
        f'"release": {{"keyFile": "{key_file(tmp_path)}", "seconds": 20}}}}'
    )
    with Service(tmp_path / "db", config=config) as service:
        alice, bob = Person("alice", service).join(), Person("bob", service).join()
        held = Held(alice)
        held.deposit()
        held.grant(bob)
        nonce = os.urandom(16)
        answer = opened(bob, held, ask(bob, held, nonce=nonce), nonce)[1]
        assert answer.exp - answer.iat == 20
        replies = [ask(bob, held) for _ in range(30)]
        assert {reply.status_code for reply in replies} == {200, 429}
        limited = next(reply for reply in replies if reply.status_code == 429)
        refused(limited, 429, "rate_limited")


def test_it_notes_who_was_given_and_who_was_refused(running, held, alice, bob):
    ask(bob, held)
    held.publish([])
    no(ask(bob, held), "share_revoked")
    query = f"SELECT kind, outcome FROM audit WHERE who = '{bob.handle}'"  # noqa: S608
    connect = sqlite3.connect if isinstance(running[1], Path) else psycopg.connect

    def lines():
        with contextlib.closing(connect(running[1])) as database:
            return set(database.execute(query).fetchall())

    wait_until(lambda: any(outcome == "key_release_refused" for _, outcome in lines()), "the line")
    assert ("release", "ok") in lines()
    assert ("POST v1/shares/*/release", "key_release_refused") in lines()
