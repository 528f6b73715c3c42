"""Homes whose metadata is at a service: joining, sharing, noticing, and what is wrong in words."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import trustme
from devices import Device, World, scratch
from evil_service import evil_service
from homes import Person, wait_until
from http_server import Answer, HttpServer, unused_port
from inner_service import InnerService
from service import Service as ServiceProcess
from service_home import believe_silence

from meshkitfs.core.keys import SigningKey
from meshkitfs.daemon import config, watching
from meshkitfs.daemon.founding import initialize
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import EmbeddedMetadata, _database
from meshkitfs.metadata import _feed as feed
from meshkitfs.metadata import _wire as wire
from meshkitfs.metadata import http as client_module
from meshkitfs.net import Limits, Secret
from meshkitfs.providers import parse_provider
from meshkitfs.shares import Terms

DATA = b"what was written " * 5000


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def served(place):
    """A service with nobody in it."""
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with evil_service(behind) as server:
        yield server
    behind.close()


@pytest.fixture
def two(place, served):
    """Alice with a share, and bob, on homes that use the service; time goes by itself."""
    with World(rate=1.0) as world:
        alice = Device(world, f"{place}/alice", "alice", metadata=served.url).start()
        bob = Device(world, f"{place}/bob", "bob", beside=alice).start()
        alice.create_share()
        alice.view().write("file", DATA)
        alice.flush()
        yield alice, bob
        for device in (bob, alice):
            if device.session is not None:
                device.close()


def live(*devices):
    """The feeds are live, and what the first answer moved has been looked at."""
    for device in devices:
        metadata = device.session.metadata
        wait_until(lambda metadata=metadata: metadata.feed.live, "the feed")
        for share in device.session.book.shares.values():
            wait_until(
                lambda share=share, metadata=metadata: share._tick == metadata.tick(share.row.share), "a look"
            )


def test_two_homes_share_over_a_service(two):
    alice, bob = two
    alice.grant("first", bob)
    assert bob.view().read("file") == DATA
    bob.view().write("file", b"bob's")
    bob.flush()
    wait_until(lambda: alice.view().read("file") == b"bob's", "bob's change")


def test_no_pause_on_the_way_of_a_change_is_long():
    """An instance that looks at a file, the feed between two polls, the watcher: the rest is work, not waiting.

    So what is published is everywhere within a second, unless a machine is too busy for that.
    """
    assert _database._WATCH_SECONDS + feed.PAUSE_S + watching.WATCH_S < 1.0


def test_a_change_and_a_revocation_reach_a_mount_because_the_feed_tells(two, monkeypatch):
    """Nobody asks: the feed tells, and the watcher of the session looks."""
    believe_silence(monkeypatch)
    alice, bob = two
    alice.grant("first", bob)
    assert bob.view().read("file") == DATA
    live(alice, bob)
    for text in (b"one", b"two", b"three"):
        alice.view().write("file", text)
        alice.flush()
        published, version = time.monotonic(), alice.share().base.version
        wait_until(lambda version=version: bob.share().base.version == version, "the change")
        print(f"there {time.monotonic() - published:.3f} s after the publication")
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    revoked = time.monotonic()
    wait_until(lambda: bob.share().refusal is not None, "the revocation")
    print(f"ended {time.monotonic() - revoked:.3f} s after the revocation")
    assert bob.share().refusal.code == "share_revoked"


def test_a_service_that_restarts_is_not_noticed_by_who_uses_what_is_open(two, served, monkeypatch):
    alice, bob = two
    alice.grant("first", bob)
    assert bob.view().read("file") == DATA
    live(alice, bob)
    walks = bob.session.gate.counters.walks
    served.on(None, served.reset)
    wait_until(lambda: bob.session.metadata.feed.problem, "the feed's end", 30)
    assert bob.view().read("file") == DATA
    assert bob.session.gate.counters.walks == walks
    served.heal()
    wait_until(lambda: not bob.session.metadata.feed.problem, "the feed's return", 30)
    alice.view().write("file", b"after")
    alice.flush()
    wait_until(lambda: bob.view().read("file") == b"after", "the change", 10)


def test_a_dead_feed_is_relied_upon_for_the_published_time_only(two, served):
    alice, bob = two
    alice.grant("first", bob)
    assert bob.view().read("file") == DATA
    live(alice, bob)
    served.on("changes", served.reset)
    alice.world.run(alice.session.book.revoke, alice.share(), "bob")
    metadata = bob.session.metadata
    tick = metadata.tick(bob.share().row.share)
    # Let the time pass in which the feed is relied upon, since the last answer that it will have had was asked for.
    heard = metadata.feed._complete
    metadata.feed.clock = lambda: heard + feed.TRUST_S - 1
    assert metadata.tick(bob.share().row.share) == tick
    metadata.feed.clock = lambda: heard + feed.TRUST_S + feed.WAIT_S
    wait_until(lambda: bob.share().refusal is not None, "the revocation")
    assert bob.share().refusal.code == "share_revoked"


def test_looking_at_files_asks_nobody(two, served):
    alice, bob = two
    alice.grant("first", bob)
    bob.view().read("file")
    live(alice, bob)
    time_before, before = time.monotonic(), len(served.log)
    for _ in range(200):
        bob.view().attr("file")
    polls = 2 + 4 * (time.monotonic() - time_before)  # of the feeds; and of leases that end
    assert len(served.log) - before <= polls


def test_a_session_ends_with_its_feed(two, served, monkeypatch):
    """At once, not when the poll that is under way ends: this one never does."""
    _, bob = two
    bob.close()
    monkeypatch.setattr(client_module, "_FEED_LIMITS", Limits(deadline_s=3600.0, tries=1, concurrency=1))
    bob.start()
    live(bob)
    served.on("changes", served.silence)
    bob.close()
    served.heal()
    bob.start()
    live(bob)


# == joining =============================================================================================


def home_at(place, name):
    return Home(f"{place}/{name}")


def join_as(world, place, name, url, join=None):
    home = home_at(place, name)
    with home.hold():
        return world.run(
            initialize, home, name, parse_provider(f"local:{place}/blocks"), url, "plain-file", None, True, join
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["token", "invite"])
def test_a_newcomer_shows_what_the_service_asks_for(place, kind):
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    token = "geheim" if kind == "token" else None
    with World(rate=1.0) as world, InnerService(behind, kind, token) as server:
        secret = token or server.invite()
        with pytest.raises(MeshkitError) as caught:
            join_as(world, place, "bob", server.url)
        assert caught.value.code == "metadata_unauthorized"
        with pytest.raises(MeshkitError) as caught:
            join_as(world, place, "bob", server.url, Secret("falsch"))
        assert caught.value.code == "metadata_unauthorized"
        # Nothing is left that would be in the way.
        assert not home_at(place, "bob").initialized
        made = join_as(world, place, "bob", server.url, Secret(secret))
        assert made["published"] is True
        assert secret not in Path(f"{place}/bob/meshkit.config.json").read_text()
    behind.close()


def test_a_taken_name_leaves_nothing_behind(place, served):
    with World(rate=1.0) as world:
        join_as(world, f"{place}/1", "bob", served.url)
        with pytest.raises(MeshkitError) as caught:
            join_as(world, f"{place}/2", "bob", served.url)
        assert caught.value.code == "identity_handle_taken"
        assert not home_at(f"{place}/2", "bob").initialized


def test_keys_that_a_service_may_know_are_kept(place, served):
    """The answer to the first publication is lost: the home stays, and the same record is published later."""
    with World(rate=1.0) as world:
        served.on("identities", served.mute)
        with pytest.raises(MeshkitError) as caught:
            join_as(world, place, "bob", served.url)
        assert caught.value.code == "metadata_unavailable"
        served.heal()
        home = home_at(place, "bob")
        assert home.initialized
        bob = Device.__new__(Device)
        bob.world, bob.home, bob.session, bob.fs = world, home, None, None
        bob.start()
        shown = world.run(Service(bob.session).call, "identity.publish", {})
        assert shown["published"] is True
        bob.close()


def test_a_page_of_a_hotel_is_no_service(place):
    async def portal(request, stream):
        return Answer(200, b"<html>Please log in</html>", [("Content-Type", "text/html")])

    with World(rate=1.0) as world, HttpServer(portal) as server:
        with pytest.raises(MeshkitError) as caught:
            join_as(world, place, "bob", server.url)
        assert caught.value.code == "metadata_unavailable"
        assert os.listdir(f"{place}/bob") in ([], ["lock"]) or not home_at(place, "bob").initialized


def test_another_key_of_the_service_is_reported(two, served, place):
    alice, _ = two
    key = wire.b64(SigningKey.generate().public)
    served.on("service", served.saying(key=key))
    with pytest.raises(MeshkitError) as caught:
        alice.create_share("second")
    assert caught.value.code == "service_key_changed"
    alice.world.run(Service(alice.session).call, "metadata.trust_key", {})
    served.heal()
    with pytest.raises(MeshkitError) as caught:
        alice.create_share("second")
    assert caught.value.code == "service_key_changed"
    alice.world.run(Service(alice.session).call, "metadata.trust_key", {})
    alice.create_share("second")


# == the program =========================================================================================


def test_the_program_joins_with_a_secret_from_a_file_stdin_or_the_environment(place):
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with InnerService(behind, "token", "geheim") as server:
        secret = f"{place}/secret"
        Path(secret).write_text("geheim\n")
        options = ("--metadata", server.url, "--provider", f"local:{place}/blocks")
        for name, extra, more in (
            ("a", ("--join-file", secret), {}),
            ("b", ("--join-file", "-"), {"stdin": b"geheim\n"}),
            ("c", (), {"env": {"MESHKITFS_JOIN_TOKEN": "geheim"}}),
        ):
            with Person(f"{place}/{name}", name) as person:
                command = ("init", "--identity", name, "--key-vault", "plain-file", *options)
                if name == "a":
                    assert person.cli(*command, check=False).error["code"] == "metadata_unauthorized"
                    refused = person.cli(*command, *extra, check=False)
                    assert refused.error["code"] == "invalid_config"
                    assert "chmod 600" in refused.error["detail"]
                    os.chmod(secret, 0o600)
                assert person.cli(*command, *extra, **more)["published"] is True
                assert person.cli("identity", "show")["published"] is True
                if name == "a":
                    status = person.cli("status")["metadata"]
                    assert (status["type"], status["place"]) == ("http", server.url)
                assert "geheim" not in "".join(person.outputs) + person.logs()
        os.unlink(secret)  # whoever is a member needs it no more
        with Person(f"{place}/a", "a") as person:
            person.cli("identity", "publish")
    behind.close()


def doctor(person):
    """What doctor says about the service: (status, detail, remedy)."""
    result = person.run("--json", "doctor", check=False)
    found = [check for check in result.json["checks"] if check["name"] == "metadata service"]
    return [(check["status"], check["detail"], check["remedy"]) for check in found]


def test_doctor_says_in_words_what_is_wrong(place, served):
    with Person(f"{place}/bob", "bob") as bob:
        bob.cli(
            "init", "--identity", "bob", "--key-vault", "plain-file", "--metadata", served.url,
            "--provider", f"local:{place}/blocks",
        )  # fmt: skip
        assert [status for status, _, _ in doctor(bob)] == ["ok"]
        served.inner.clock = lambda: time.time() - 300
        (_, _, _), (status, detail, _) = doctor(bob)
        assert status == "fail"
        assert "s ahead of the service's" in detail
        served.inner.clock = time.time

        def point_at(url, **more):
            path = bob.home.config_path
            value = json.loads(path.read_text())
            value["metadata"] = {"type": "http", "url": url, **more}
            path.write_text(json.dumps(value))
            assert config.load(path).metadata.url == url

        point_at(f"http://127.0.0.1:{unused_port()}")
        ((status, detail, _),) = doctor(bob)
        assert status == "fail"
        assert "nobody listens" in detail

        async def portal(request, stream):
            return Answer(200, b"<html>Please log in</html>", [("Content-Type", "text/html")])

        with HttpServer(portal) as server:
            point_at(server.url)
            ((status, detail, _),) = doctor(bob)
        assert status == "fail"
        assert "no meshkitfs service" in detail


def test_doctor_and_certificates(place):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(f"{place}/ca.pem")
    certificate.cert_chain_pems[0].write_to_path(f"{place}/cert.pem")
    certificate.private_key_pem.write_to_path(f"{place}/key.pem")
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    files = (f"{place}/cert.pem", f"{place}/key.pem")
    with InnerService(behind, tls=files) as server, Person(f"{place}/bob", "bob") as bob:
        command = ("init", "--identity", "bob", "--key-vault", "plain-file", "--metadata", server.url)
        refused = bob.cli(*command, check=False)
        assert refused.error["code"] == "metadata_unavailable"
        assert "CERTIFICATE_VERIFY_FAILED" in refused.error["detail"]
        assert bob.cli(*command, "--metadata-ca", f"{place}/ca.pem")["published"] is True
        assert [status for status, _, _ in doctor(bob)] == ["ok"]
        trustme.CA().cert_pem.write_to_path(f"{place}/ca.pem")
        ((status, detail, remedy),) = doctor(bob)
        assert status == "fail"
        assert "not one that this device trusts" in detail
        assert "metadata.caFile" in remedy
    behind.close()


def test_terms_are_kept_over_a_service(two):
    alice, bob = two
    alice.world.run(alice.session.book.add, alice.share(), "bob", Terms(("read",)))
    alice.world.run(bob.session.book.inbox.accept, "first", b"first")
    assert bob.view().read("file") == DATA
    with pytest.raises(OSError):
        bob.view().write("file", b"no")


def test_a_service_behind_a_unix_socket(place):
    with (
        ServiceProcess(f"{place}/service.db", listen=f"unix:{place}/mesh.sock"),
        Person(f"{place}/bob", "bob") as bob,
    ):
        bob.root.mkdir(mode=0o700)
        settings = {
            "version": 1,
            "provider": {"type": "local-dev", "store": f"{place}/blocks"},
            "metadata": {"type": "http", "url": "http://localhost", "socket": f"{place}/mesh.sock"},
        }
        bob.home.config_path.write_text(json.dumps(settings))
        assert bob.cli("init", "--identity", "bob", "--key-vault", "plain-file")["published"] is True
        bob.cli("share", "create", "first")
        assert [status for status, _, _ in doctor(bob)] == ["ok"]


def test_a_service_that_wants_a_certificate(place):
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("bob@example.org"), authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(f"{place}/ca.pem")
    for name, certificate in (("bob", ours), ("service", theirs)):
        certificate.cert_chain_pems[0].write_to_path(f"{place}/{name}.pem")
        certificate.private_key_pem.write_to_path(f"{place}/{name}.key")
        os.chmod(f"{place}/{name}.key", 0o600)
    serving = Path(f"{place}/serve.json")
    tls = {
        "certificate": f"{place}/service.pem",
        "key": f"{place}/service.key",
        "clientCa": f"{place}/ca.pem",
    }
    serving.write_text(json.dumps({"tls": tls}))
    with (
        ServiceProcess(f"{place}/service.db", config=serving) as service,
        Person(f"{place}/bob", "bob") as bob,
    ):
        bob.root.mkdir(mode=0o700)
        where = {"type": "http", "url": service.url, "caFile": f"{place}/ca.pem"}
        bare = {
            "version": 1,
            "provider": {"type": "local-dev", "store": f"{place}/blocks"},
            "metadata": where,
        }
        bob.home.config_path.write_text(json.dumps(bare))
        command = ("init", "--identity", "bob", "--key-vault", "plain-file")
        assert bob.cli(*command, check=False).error["code"] == "metadata_unavailable"
        ((status, _, remedy),) = doctor(bob)
        assert status == "fail"
        assert "metadata.clientCert" in remedy
        shown = where | {"clientCert": f"{place}/bob.pem", "clientKey": f"{place}/bob.key"}
        bob.home.config_path.write_text(json.dumps(bare | {"metadata": shown}))
        assert bob.cli(*command)["published"] is True
        assert [status for status, _, _ in doctor(bob)] == ["ok"]
