"""A remote byte store as a person meets it: configured, tried out, set up, used by two homes, and away."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from devices import Device, World
from servers.helia import helia_fixture  # noqa: F401
from servers.moto import moto_s3_fixture  # noqa: F401
from servers.process import free_port
from servers.rclone import rclone_s3_fixture, rclone_server  # noqa: F401

from meshkitfs.cli import main
from meshkitfs.daemon import config
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import LocalStore, ProviderSpec


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that is not set up, for commands in this process."""
    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MESHKIT_CONFIG", raising=False)
    (tmp_path / "home").mkdir(mode=0o700)
    return tmp_path / "home"


@pytest.fixture
def run(home, capsys):
    def run(*arguments):
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def configure(home, provider):
    (home / "meshkit.config.json").write_text(json.dumps({"version": 1, "provider": provider}))


def tried(run, *arguments):
    code, out, _err = run("providers", "test", "--json", *arguments)
    return code, json.loads(out)


STEPS = ["open", "put", "has", "get", "delete", "gone", "capabilities"]


# -- providers test ------------------------------------------------------------------------------------------


def test_a_local_store_is_tried(home, run):
    configure(home, {"type": "local-dev"})
    code, found = tried(run)
    assert (code, found["ok"]) == (7, False)
    assert [step["name"] for step in found["steps"]] == ["open"]
    assert found["steps"][0]["failure"]["code"] == "provider_request_failed"
    assert run("init", "--key-vault", "plain-file", "--identity", "ada")[0] == 0
    code, found = tried(run)
    assert (code, found["ok"]) == (0, True)
    assert [step["name"] for step in found["steps"]] == STEPS
    assert found["capabilities"] == {"conditional_put": True, "multi_delete": True, "listing": True}
    assert list((home / "blocks").glob("??/*")) == []


@pytest.mark.parametrize("kind", ["rclone", "moto"])
def test_s3_is_tried(home, run, request, kind):
    server = request.getfixturevalue(f"{kind}_s3")
    prefix = os.urandom(6).hex()
    configure(home, server.config(prefix=prefix))
    with server.credentials():
        code, found = tried(run)
        assert (code, found["ok"]) == (0, True), found
        assert found["provider"] == f"s3:{server.endpoint}/blocks/{prefix}"
        assert found["capabilities"]["conditional_put"] is (kind == "moto")
        code, out, _ = run("providers", "test", f"s3:{server.endpoint}/blocks/{prefix}")
        assert code == 0
        assert ("no: refuses to replace" in out) is (kind == "rclone")
        assert "yes: deletes many with one request" in out
    assert "Contents" not in server.client().list_objects_v2(Bucket="blocks", Prefix=prefix)


def test_what_is_wrong_is_said_in_words(home, run, rclone_s3):
    with rclone_s3.credentials(secret_key="not-the-secret"):
        configure(home, rclone_s3.config())
        code, out, err = run("providers", "test")
        assert code == 7
        assert "secret access key is wrong" in out
        assert "not-the-secret" not in out + err
        code, found = tried(run)
        assert found["steps"][-1]["failure"]["code"] == "provider_http_error"
    with rclone_s3.credentials():
        configure(home, rclone_s3.config() | {"bucket": "elsewhere"})
        assert "there is no such bucket; create it first" in run("providers", "test")[1]
        configure(home, rclone_s3.config(retries=0) | {"endpoint": f"http://127.0.0.1:{free_port()}"})
        code, found = tried(run)
        assert code == 7
        assert found["steps"][-1]["failure"]["code"] == "provider_request_failed"


def test_without_credentials(home, run, rclone_s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    configure(home, rclone_s3.config())
    code, found = tried(run)
    assert code == 3
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in found["steps"][0]["failure"]["detail"]


def test_an_ipfs_node_a_cluster_and_a_pinning_service_are_tried(
    home, run, ipfs_node, cluster, pinning_service, monkeypatch
):
    node = {"type": "ipfs-http", "ipfsApiUrl": ipfs_node.url, "lookupMs": 300}
    wanted = {"conditional_put": False, "multi_delete": False, "listing": False}
    configure(home, node)
    code, found = tried(run)
    assert (code, found["ok"], found["capabilities"]) == (0, True, wanted), found
    assert run("providers", "test", f"ipfs-http:{ipfs_node.url}")[0] == 0
    monkeypatch.setenv("MK_TEST_TOKEN", pinning_service.token)
    service = {"type": "pinning-service", "endpoint": pinning_service.url, "tokenEnv": "MK_TEST_TOKEN"}
    configure(home, {**service, "storage": node})
    code, found = tried(run)
    assert (code, found["ok"]) == (0, True), found
    monkeypatch.setenv("MK_TEST_TOKEN", "canary-of-a-wrong-token")
    code, out, err = run("providers", "test")
    assert code == 7
    assert "HTTP 401" in out
    assert "canary" not in out + err
    configure(home, {"type": "ipfs-cluster", "clusterApiUrl": cluster.url, "node": node})
    code, found = tried(run)
    assert (code, found["ok"]) == (0, True), found


def test_several_sources_are_listed(home, run, helia, tmp_path):
    url, directory = helia
    gateway = {
        "type": "gateway-retrieval",
        "gateways": [url],
        "storage": {"type": "local-dev", "store": str(directory)},
    }
    configure(home, gateway)
    code, found = tried(run)
    assert (code, found["ok"]) == (0, True), found
    assert [source["name"] for source in found["sources"]] == [url, f"local-dev:{directory}"]
    assert found["sources"][0]["served"] == 1
    assert f"{url}: 1 served" in run("providers", "test")[1]


# -- doctor --------------------------------------------------------------------------------------------------


def checks(run):
    _code, out, _err = run("doctor", "--json")
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_doctor_asks_the_endpoint_and_changes_nothing(home, run, rclone_s3):
    prefix = os.urandom(6).hex()
    configure(home, rclone_s3.config(prefix=prefix))
    with rclone_s3.credentials():
        found = checks(run)["byte store"]
        assert found["status"] == "ok", found
        assert rclone_s3.endpoint in found["detail"]
    with rclone_s3.credentials(secret_key="wrong"):
        found = checks(run)["byte store"]
        assert found["status"] == "fail"
        assert "secret access key is wrong" in found["detail"]
        assert "providers test" in found["remedy"]
    assert "Contents" not in rclone_s3.client().list_objects_v2(Bucket="blocks", Prefix=prefix)


# -- init ----------------------------------------------------------------------------------------------------


def test_init_with_the_short_form(home, run, rclone_s3):
    prefix = os.urandom(6).hex()
    short = f"s3:{rclone_s3.endpoint}/blocks/{prefix}"
    with rclone_s3.credentials(secret_key="wrong"):
        code, _, err = run("init", "--identity", "ada", "--key-vault", "plain-file", "--provider", short)
        assert code == 7
        assert "secret access key is wrong" in err
        assert not (home / "identity.sealed").exists()
    with rclone_s3.credentials():
        code, _, err = run("init", "--identity", "ada", "--key-vault", "plain-file", "--provider", short)
        assert code == 0, err
    written = json.loads((home / "meshkit.config.json").read_text())
    assert written["provider"] == rclone_s3.config(prefix=prefix)
    assert rclone_s3.secret_key not in (home / "meshkit.config.json").read_text()
    with rclone_s3.credentials():
        code, out, err = run("verify", "--store", short, "--json")
        assert code == 0, err
        assert json.loads(out)["store"] == short


def test_init_follows_a_configuration_that_is_there(home, run, rclone_s3, moto_s3, tmp_path):
    provider = {"type": "fallback", "providers": [rclone_s3.config(prefix="a"), rclone_s3.config(prefix="b")]}
    configure(home, provider)
    with rclone_s3.credentials():
        code, _, err = run("init", "--identity", "ada", "--key-vault", "plain-file")
        assert code == 0, err
    assert json.loads((home / "meshkit.config.json").read_text())["provider"] == provider


# -- the configuration ------------------------------------------------------------------------------------------


def loads(provider, **more):
    value = {"version": 1, "provider": provider, **more}
    return config.loads(json.dumps(value).encode(), Path("/srv/home"), "meshkit.config.json")


def test_the_file_is_named_and_the_field(run):
    with pytest.raises(MeshkitError) as caught:
        loads(
            {
                "type": "fallback",
                "providers": [{"type": "s3", "endpoint": "http://a.example", "bucket": "bbb"}],
            }
        )
    assert caught.value.detail.startswith(
        "meshkit.config.json: field 'provider.providers[0].endpoint' would not be encrypted on its way"
    )


@pytest.mark.parametrize("metadata", [{"type": "embedded"}, {"type": "http", "url": "https://other.example"}])
def test_blocks_and_metadata_belong_to_one_boundary(metadata):
    provider = {
        "type": "s3", "endpoint": "https://a.example", "bucket": "bbb", "metadataApiUrl": "https://m.example",
    }  # fmt: skip
    loads(provider, metadata={"type": "http", "url": "https://m.example/"})
    with pytest.raises(MeshkitError) as caught:
        loads(provider, metadata=metadata)
    assert caught.value.code == "invalid_config"
    assert "field 'provider.metadataApiUrl' is https://m.example, and this home's metadata is at" in (
        caught.value.detail
    )


def test_a_token_has_one_place(monkeypatch, home, run):
    gateway = {
        "type": "gateway-retrieval", "gatewayUrl": "https://gw.example", "storage": {"type": "local-dev"},
    }  # fmt: skip
    assert loads({**gateway, "tokenEnv": "GATEWAY_TOKEN"}).provider.options.token_env == "GATEWAY_TOKEN"
    for fields, says in (
        ({"tokenEnv": "A", "tokenFile": "b"}, "'provider.tokenFile' and 'tokenEnv' cannot both be there"),
        ({"token": "topsecret"}, "name their place with tokenEnv or tokenFile"),
        (
            {"gateways": ["https://b.example"]},
            "'provider.gatewayUrl' or 'gateways' must be there, and not both",
        ),
        ({"gatewayMode": "dns"}, "'provider.gatewayMode' must be 'path' or 'subdomain'"),
        ({"storage": gateway}, "'provider.storage' must be a provider that stores"),
        ({"gatewayUrl": "https://10.0.0.1", "gatewayMode": "subdomain"}, "must have a host name"),
    ):
        with pytest.raises(MeshkitError) as caught:
            loads({**gateway, **fields})
        assert says in caught.value.detail
        assert "topsecret" not in caught.value.detail
    monkeypatch.delenv("GATEWAY_TOKEN", raising=False)
    configure(home, {**gateway, "tokenEnv": "GATEWAY_TOKEN"})
    code, found = tried(run)
    assert code == 3
    assert "GATEWAY_TOKEN holds no token" in found["steps"][0]["failure"]["detail"]


# -- used by homes ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def two_homes(provider, tmp_path, change=None):
    """Alice and Bob, set up with one provider; ``change(config)`` edits what their files say afterwards."""
    with World() as world:
        alice = Device(world, tmp_path / "alice", "alice", provider=provider)
        bob = Device(world, tmp_path / "bob", "bob", alice, provider=provider)
        for device in (alice, bob):
            if change is not None:
                settings = json.loads(device.home.config_path.read_text())
                change(settings["provider"])
                device.home.config_path.write_text(json.dumps(settings))
            device.start()
        yield alice, bob
        alice.close()
        bob.close()


def share_and_answer(alice, bob):
    """A share goes from one to the other, and a change comes back."""
    alice.create_share()
    data = os.urandom(300_000)
    alice.view().mkdir("deep")
    alice.view().write("deep/file", data)
    alice.flush()
    alice.grant("first", bob)
    assert bob.view().read("deep/file") == data
    bob.view().write("answer", b"yes")
    bob.flush()
    alice.refresh()
    assert alice.view().read("answer") == b"yes"
    assert bob.session.store.counters.gets > 0


def test_two_homes_share_through_s3_which_goes_away_and_comes_back(tmp_path):
    port, place = free_port(), tmp_path / "bucket"
    with rclone_server(port=port, place=place) as (server, process), server.credentials():
        spec = ProviderSpec.from_config(server.config(retries=0), tmp_path)
        with two_homes(spec, tmp_path) as (alice, bob):
            share_and_answer(alice, bob)
            process.kill()
            alice.view().write("later", b"kept here")
            with pytest.raises(MeshkitError) as caught:
                alice.flush()
            assert caught.value.code == "provider_request_failed"
            assert alice.view().read("later") == b"kept here"
            alice.close()
            alice.start()  # the server is away, and it starts all the same
            assert alice.view().read("later") == b"kept here"
            with rclone_server(port=port, place=place):
                alice.world.pass_time(600)  # what is known of a dead server ends
                alice.flush()
                bob.refresh()
                assert bob.view().read("later") == b"kept here"


def test_two_homes_share_through_a_fallback(tmp_path, rclone_s3, moto_s3):
    """The bucket of the first of them is lost after the setting up."""
    file = tmp_path / "credentials"
    for server in (rclone_s3, moto_s3):
        with file.open("a") as out:
            out.write(
                f"[{server.access_key}]\naws_access_key_id = {server.access_key}\n"
                f"aws_secret_access_key = {server.secret_key}\n"
            )
    file.chmod(0o600)
    prefix = os.urandom(6).hex()
    providers = [
        server.config(credentialsFile=str(file), profile=server.access_key, prefix=prefix)
        for server in (rclone_s3, moto_s3)
    ]
    spec = ProviderSpec.from_config({"type": "fallback", "providers": providers}, tmp_path)

    def lose(provider):
        provider["providers"][0]["bucket"] = "elsewhere"

    with two_homes(spec, tmp_path, lose) as (alice, bob):
        share_and_answer(alice, bob)
        first, second = bob.session.store.sources()
    assert (first.served, second.served > 0) == (0, True)
    assert "Contents" not in rclone_s3.client().list_objects_v2(Bucket="blocks", Prefix=prefix)


def test_a_home_reads_through_a_gateway_what_another_has_stored(tmp_path, helia):
    """Only Alice writes to the store that the gateway serves; Bob has another storage, which is empty."""
    url, directory = helia
    provider = ProviderSpec.local(directory)
    theirs = tmp_path / "theirs"

    def through(settings):
        settings.clear()
        settings |= {
            "type": "gateway-retrieval", "gatewayUrl": url, "storage": {"type": "local-dev", "store": str(theirs)},
        }  # fmt: skip

    LocalStore.open(theirs, create=True)
    with World() as world:
        alice = Device(world, tmp_path / "alice", "alice", provider=provider)
        bob = Device(world, tmp_path / "bob", "bob", alice, provider=provider)
        settings = json.loads(bob.home.config_path.read_text())
        through(settings["provider"])
        bob.home.config_path.write_text(json.dumps(settings))
        alice.start()
        bob.start()
        alice.create_share()
        data = os.urandom(300_000)
        alice.view().write("file", data)
        alice.flush()
        alice.grant("first", bob)
        assert bob.view().read("file") == data
        gateway, storage = bob.session.store.sources()
        assert gateway.served > 1
        assert storage.served == 0
        alice.close()
        bob.close()


def test_two_homes_share_through_an_ipfs_node_which_is_killed_and_comes_back(tmp_path, own_ipfs_node):
    fields = {"type": "ipfs-http", "ipfsApiUrl": own_ipfs_node.url, "retries": 0}
    spec = ProviderSpec.from_config(fields, tmp_path)
    with two_homes(spec, tmp_path) as (alice, bob):
        share_and_answer(alice, bob)
        own_ipfs_node.kill()
        alice.view().write("later", b"kept here")
        with pytest.raises(MeshkitError) as caught:
            alice.flush()
        assert caught.value.code == "provider_request_failed"
        own_ipfs_node.start()
        alice.world.pass_time(600)  # what is known of a dead server ends
        alice.flush()
        bob.refresh()
        assert bob.view().read("later") == b"kept here"
