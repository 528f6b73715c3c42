"""The configuration file, the home directory and the log: strict, private, and clear about what is wrong."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import textwrap
from base64 import b64encode, urlsafe_b64encode
from dataclasses import replace
from pathlib import Path

import pytest

from meshkitfs import keyvault
from meshkitfs.daemon import config, logs
from meshkitfs.daemon.home import Home
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ProviderSpec

BASE = Path("/srv/home")


def check(value, base=BASE):
    return config.loads(json.dumps(value).encode(), base, "meshkit.config.json")


def test_a_minimal_file_is_the_embedded_default():
    settings = check({"version": 1})
    assert settings.provider == ProviderSpec.local(BASE / "blocks")
    assert settings.metadata.path == BASE / "metadata.db"
    assert settings.identity == "self"
    assert settings.key_vault is None
    assert settings.mount.point == Path.home() / "MeshKit"


def test_every_field_is_read():
    settings = check(
        {
            "version": 1,
            "appId": "mk_production_app",
            "identity": "alice",
            "provider": {"type": "local-dev", "store": "/mnt/blocks"},
            "metadata": {"type": "embedded", "path": "../team/metadata.db"},
            "keyVault": {"type": "passphrase-file"},
            "mount": {"point": "~/Shares"},
        }
    )
    assert settings.app_id == "mk_production_app"
    assert settings.identity == "alice"
    assert settings.provider == ProviderSpec.local(Path("/mnt/blocks"))
    assert settings.metadata.path == Path("/srv/team/metadata.db")
    assert settings.key_vault is not None
    assert settings.key_vault.type == "passphrase-file"
    assert settings.mount.point == Path.home() / "Shares"


def test_what_is_said_of_a_key_vault_is_read_and_written(tmp_path):
    written = {
        "type": "passphrase-file",
        "sessionCache": "kernel",
        "sessionCacheSeconds": 600,
        "require": ["persistent"],
    }
    settings = check({"version": 1, "keyVault": written})
    assert settings.key_vault == config.KeyVaultConfig("passphrase-file", "kernel", 600, ("persistent",))
    assert settings.key_vault.cache_seconds == 600
    assert settings.as_dict(BASE)["keyVault"] == written
    config.save(tmp_path / "meshkit.config.json", settings)
    assert config.load(tmp_path / "meshkit.config.json") == settings
    plain = check({"version": 1, "keyVault": {"type": "tpm2"}}).key_vault
    assert (plain.cache_seconds, plain.require) == (None, ())
    assert plain.as_dict() == {"type": "tpm2"}


def test_a_metadata_service_is_read_and_written(tmp_path):
    files = {"caFile": "ca.pem", "clientCert": "c.pem", "clientKey": "k.pem", "socket": "/run/mesh.sock"}
    value = {"version": 1, "metadata": {"type": "http", "url": "https://mesh.example/base/", **files}}
    value["metadata"]["joinTokenFile"] = "token"
    settings = check(value)
    where = settings.metadata
    assert (where.type, where.url, where.path) == ("http", "https://mesh.example/base", None)
    assert (where.ca_file, where.client_key) == (BASE / "ca.pem", BASE / "k.pem")
    assert (where.socket, where.join_token_file) == (Path("/run/mesh.sock"), BASE / "token")
    config.save(tmp_path / "meshkit.config.json", settings)
    assert config.load(tmp_path / "meshkit.config.json") == settings
    # MeshKit's own word for the address is understood.
    theirs = {"version": 1, "metadata": {"type": "http", "metadataApiUrl": "https://mesh.example"}}
    assert check(theirs).metadata == config.MetadataConfig.parse("https://mesh.example")
    environment = {"type": "http", "url": "https://mesh.example", "joinTokenEnv": "MESH_TOKEN"}
    settings = check({"version": 1, "metadata": environment})
    assert settings.as_dict(BASE)["metadata"] == environment


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "must be an object"),
        ({}, "field 'version' is missing"),
        ({"version": 2}, "field 'version' 2 is not known"),
        ({"version": True}, "field 'version' True is not known"),
        ({"version": "1"}, "field 'version' '1' is not known"),
        ({"version": 1, "identiy": "a"}, "field 'identiy' is not a known field (did you mean 'identity'?)"),
        ({"version": 1, "keyvault": {}}, "(did you mean 'keyVault'?)"),
        ({"version": 1, "keyVault": {"type": "tpm"}}, "(did you mean 'tpm2'?)"),
        ({"version": 1, "keyVault": {"type": "tpm2", "pin": "1234"}}, "'keyVault.pin' is not a known field"),
        ({"version": 1, "keyVault": {"type": "tpm2", "sessionCache": "disk"}}, "use 'kernel'"),
        ({"version": 1, "keyVault": {"type": "tpm2", "sessionCache": ["kernel"]}}, "is not known"),
        (
            {"version": 1, "keyVault": {"type": "plain-file", "sessionCache": "kernel"}},
            "'passphrase-file' or",
        ),
        (
            {"version": 1, "keyVault": {"type": "tpm2", "sessionCacheSeconds": 600}},
            "goes with 'sessionCache'",
        ),
        (
            {"version": 1, "keyVault": {"type": "tpm2", "sessionCache": "kernel", "sessionCacheSeconds": 59}},
            "must be a number from 60 to 2592000",
        ),
        (
            {
                "version": 1,
                "keyVault": {"type": "tpm2", "sessionCache": "kernel", "sessionCacheSeconds": True},
            },
            "must be a number",
        ),
        (
            {"version": 1, "keyVault": {"type": "tpm2", "require": "hardware_backed"}},
            "must be a list of names",
        ),
        ({"version": 1, "keyVault": {"type": "tpm2", "require": [1]}}, "must be a list of names"),
        (
            {"version": 1, "keyVault": {"type": "tpm2", "require": ["hardware"]}},
            "(did you mean 'hardware_backed'?)",
        ),
        ({"version": 1, "zzz": 1}, "field 'zzz' is not a known field"),
        ({"version": 1, "identity": 5}, "field 'identity' must be a non-empty string"),
        ({"version": 1, "identity": ""}, "field 'identity' must be a non-empty string"),
        ({"version": 1, "identity": "a\x1b[2J"}, "field 'identity' must be a non-empty string"),
        ({"version": 1, "identity": "a" * 129}, "field 'identity' is longer than 128 bytes"),
        ({"version": 1, "provider": "local"}, "field 'provider' must be an object"),
        ({"version": 1, "provider": {}}, "field 'provider.type' is missing"),
        ({"version": 1, "provider": {"type": "local"}}, "(did you mean 'local-dev'?)"),
        (
            {"version": 1, "provider": {"type": "ipfs-http"}},
            "'provider.ipfsApiUrl' is missing",
        ),
        ({"version": 1, "provider": {"type": "local-dev", "stor": "x"}}, "did you mean 'store'?"),
        (
            {"version": 1, "provider": {"type": "local-dev", "store": 3}},
            "field 'provider.store' must be a path",
        ),
        ({"version": 1, "provider": {"type": "local-dev", "store": "a\0b"}}, "must be a path"),
        (
            {"version": 1, "provider": {"type": "local-dev", "token": "t"}},
            "secrets do not belong in this file",
        ),
        ({"version": 1, "metadata": {"type": "http"}}, "field 'metadata.url' must be there once"),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "metadataApiUrl": "https://a"}},
            "must be there once",
        ),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://ulla:geheim@a"}},
            "'metadata.url' has credentials in it",
        ),
        ({"version": 1, "metadata": {"type": "http", "url": "ftp://a"}}, "must begin with https://"),
        ({"version": 1, "metadata": {"type": "http", "metadataApiUrl": "a"}}, "'metadata.metadataApiUrl'"),
        ({"version": 1, "metadata": {"type": "http", "url": "https://a/?token=x"}}, "no '?', no '#'"),
        ({"version": 1, "metadata": {"type": "http", "url": ["https://a"]}}, "must be an address"),
        ({"version": 1, "metadata": {"type": "http", "url": "https://[a"}}, "is not an address"),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "clientCert": "c"}},
            "field 'metadata.clientKey' is missing",
        ),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "clientKey": "c"}},
            "field 'metadata.clientCert' is missing",
        ),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "joinTokenEnv": "a=b"}},
            "must be the name of an environment variable",
        ),
        (
            {
                "version": 1,
                "metadata": {"type": "http", "url": "https://a", "joinTokenEnv": "A", "joinTokenFile": "f"},
            },
            "two places for one secret",
        ),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "token": "geheim"}},
            "secrets do not belong in this file",
        ),
        (
            {"version": 1, "metadata": {"type": "http", "url": "https://a", "path": "metadata.db"}},
            "field 'metadata.path' is not a known field",
        ),
        ({"version": 1, "keyVault": {"type": "secret-servce"}}, "did you mean 'secret-service'?"),
        (
            {"version": 1, "mount": {"pont": "x"}},
            "field 'mount.pont' is not a known field (did you mean 'point'?)",
        ),
        (
            {"version": 1, "policy": {"type": "lit-http", "endpoint": "x"}},
            "'lit-http' is not implemented yet",
        ),
        ({"version": 1, "policy": {"type": "authzen"}}, "field 'policy.endpoint' is missing"),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "http"}},
            "field 'policy.endpoint' must begin with https://",
        ),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "https://u:p@pdp"}},
            "field 'policy.endpoint' has credentials in it",
        ),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "https://pdp", "timeoutMs": 60000}},
            "field 'policy.timeoutMs' must be from 100 to 2000",
        ),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "https://pdp", "key": "ab"}},
            "field 'policy.key' must be an Ed25519 public key",
        ),
        (
            {
                "version": 1,
                "policy": {"type": "authzen", "endpoint": "https://p", "tokenEnv": "A", "tokenFile": "b"},
            },
            "field 'policy.tokenEnv' and 'tokenFile' are two places for one secret",
        ),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "https://pdp", "tokenEnv": "A B"}},
            "field 'policy.tokenEnv' must be the name of an environment variable",
        ),
        (
            {"version": 1, "policy": {"type": "authzen", "endpoint": "https://pdp", "endpiont": "x"}},
            "field 'policy.endpiont' is not a known field (did you mean 'endpoint'?)",
        ),
        ({"version": 1, "policy": {"type": "allow-all"}}, "field 'policy.type' 'allow-all' is not known"),
        ({"version": 1, "policy": {}}, "field 'policy.type' is missing"),
        ({"version": 1, "persistence": {"type": "filecoin-http"}}, "'filecoin-http' is not implemented yet"),
    ],
)
def test_what_is_wrong_is_named(value, says):
    with pytest.raises(MeshkitError) as caught:
        check(value)
    assert caught.value.code == "invalid_config"
    assert says in caught.value.detail
    assert caught.value.detail.startswith("meshkit.config.json: ")


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "invalid_cli_config", "line 1, column 1"),
        (b'{"version": 1,\n "identity"}', "invalid_cli_config", "line 2"),
        (b"\xff\xfe", "invalid_cli_config", "not UTF-8"),
        (b"[" * 30000, "invalid_cli_config", "nested too deeply"),
        (b'{"version": 1, "version": 1}', "invalid_config", "field 'version' appears twice"),
        (b'{"version": NaN}', "invalid_config", "NaN is not a JSON value"),
    ],
)
def test_what_is_not_json_is_said_with_its_place(data, code, says):
    with pytest.raises(MeshkitError) as caught:
        config.loads(data, BASE, "the file")
    assert caught.value.code == code
    assert says in caught.value.detail


def test_a_policy_provider_is_read_as_it_is_written():
    value = {
        "type": "authzen",
        "endpoint": "https://pdp.example.org/team",
        "tokenFile": "policy.token",
        "caFile": "ca.pem",
        "timeoutMs": 500,
        "key": "ab" * 32,
    }
    read = check({"version": 1, "policy": value})
    assert read.policy.token_file == BASE / "policy.token"
    assert read.as_dict(BASE)["policy"] == value
    short = {"type": "authzen", "endpoint": "https://pdp.example.org", "tokenEnv": "PDP_TOKEN"}
    assert check({"version": 1, "policy": short}).as_dict(BASE)["policy"] == short


def test_a_secret_in_the_file_is_refused_without_being_repeated():
    canary = secrets.token_urlsafe(24)
    with pytest.raises(MeshkitError) as caught:
        check({"version": 1, "policy": {"type": "lit-http", "token": canary}})
    assert canary not in str(caught.value)
    with pytest.raises(MeshkitError) as caught:
        check({"version": 1, "provider": {"type": "local-dev", "token": canary}})
    assert canary not in str(caught.value)


def test_loading_names_the_file(tmp_path):
    with pytest.raises(MeshkitError) as caught:
        config.load(tmp_path / "none.json")
    assert caught.value.code == "not_initialized"
    large = tmp_path / "large.json"
    large.write_bytes(b" " * (config.MAX_BYTES + 1))
    with pytest.raises(MeshkitError) as caught:
        config.load(large)
    assert caught.value.code == "invalid_cli_config"
    assert str(large) in caught.value.detail
    with pytest.raises(MeshkitError) as caught:
        config.load(tmp_path)
    assert caught.value.code == "invalid_cli_config"


def test_saved_is_private_whole_and_never_overwritten(tmp_path):
    path = tmp_path / "meshkit.config.json"
    settings = config.Config(
        provider=ProviderSpec.local(tmp_path / "blocks"),
        metadata=config.MetadataConfig(Path("/srv/Müller/metadata.db")),
        key_vault=config.KeyVaultConfig("plain-file"),
        identity="bob",
        mount=config.MountConfig(Path(os.fsdecode(b"/mnt/caf\xe9"))),
    )
    config.save(path, settings)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [path.name]
    assert config.load(path) == settings
    written = json.loads(path.read_text())
    assert written["provider"] == {"type": "local-dev", "store": "blocks"}  # relative: a home can be moved
    assert "Müller" in path.read_text()
    before = path.read_bytes()
    config.save(path, settings)  # it says the same already
    settings = replace(settings, identity="mallory")
    with pytest.raises(MeshkitError) as caught:
        config.save(path, settings)
    assert caught.value.code == "already_initialized"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_written_before_init_is_kept_if_it_fits(tmp_path):
    path = tmp_path / "meshkit.config.json"
    text = '{"version": 1, "provider": {"type": "local-dev", "store": "mine"}}'
    path.write_text(text)
    chosen = replace(config.load(path), identity="bob", key_vault=config.KeyVaultConfig("plain-file"))
    config.save(path, chosen)
    assert path.read_text() == text
    with pytest.raises(MeshkitError) as caught:
        config.save(path, replace(chosen, provider=ProviderSpec.local(tmp_path / "other")))
    assert caught.value.code == "already_initialized"
    path.write_text("{")
    with pytest.raises(MeshkitError) as caught:
        config.save(path, chosen)
    assert caught.value.code == "invalid_cli_config"
    assert path.read_text() == "{"


def test_the_key_vaults_are_those_there_are():
    assert config.KEY_VAULTS == keyvault.KINDS
    assert config.KEY_VAULT_DEMANDS == keyvault.DEMANDS
    assert config.CACHE_S == keyvault.CACHE_SECONDS


# -- the home ---------------------------------------------------------------------------------------------


def test_which_home_is_meant():
    assert Home.locate("/a", environ={"MESHKITFS_HOME": "/b"}).root == Path("/a")
    assert Home.locate(environ={"MESHKITFS_HOME": "/b", "XDG_DATA_HOME": "/c"}).root == Path("/b")
    assert Home.locate(environ={"XDG_DATA_HOME": "/c"}).root == Path("/c/meshkitfs")
    default = Path.home() / ".local/share/meshkitfs"
    assert Home.locate(environ={}).root == default
    assert Home.locate(environ={"XDG_DATA_HOME": "relative"}).root == default
    assert Home.locate("/a", environ={"MESHKIT_CONFIG": "/etc/mk.json"}).config_path == Path("/etc/mk.json")
    assert Home.locate("/a", "/x.json", {"MESHKIT_CONFIG": "/y.json"}).config_path == Path("/x.json")
    assert Home.locate("/a", environ={}).config_path == Path("/a/meshkit.config.json")


def test_a_home_is_private(tmp_path):
    home = Home(tmp_path / "deep" / "home")
    old = os.umask(0)
    try:
        home.ensure()
    finally:
        os.umask(old)
    for directory in (home.root, home.run_dir, home.log_dir):
        assert directory.stat().st_mode & 0o777 == 0o700
    home.log_dir.chmod(0o755)
    home.ensure()
    assert home.log_dir.stat().st_mode & 0o777 == 0o700
    home.root.chmod(0o770)
    with pytest.raises(MeshkitError) as caught:
        home.ensure()
    assert caught.value.code == "invalid_config"
    assert "chmod go-w" in caught.value.detail


def test_a_home_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MeshkitError) as caught:
        Home(tmp_path / "file").ensure()
    assert caught.value.code == "invalid_config"
    assert str(tmp_path / "file") in caught.value.detail


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_somebody_elses_home_is_refused(tmp_path):
    home = Home(tmp_path / "home")
    home.ensure()
    os.chown(home.root, 65534, 65534)
    with pytest.raises(MeshkitError) as caught:
        home.ensure()
    assert caught.value.code == "invalid_config"
    assert "65534" in caught.value.detail


def test_one_process_holds_a_home_and_its_death_frees_it(tmp_path):
    home = Home(tmp_path / "home")
    script = textwrap.dedent(
        """
        import sys
        from meshkitfs.daemon.home import Home
        with Home(sys.argv[1]).hold():
            print("held", flush=True)
            sys.stdin.read()
        """
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(home.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert home.holder() == other.pid
        with pytest.raises(MeshkitError) as caught, home.hold(wait=0):
            pytest.fail("two processes hold one home")
        assert caught.value.code == "home_busy"
        assert str(other.pid) in caught.value.detail
        assert not home.wait_released(0)
        other.send_signal(signal.SIGKILL)
        assert home.wait_released(20)
    finally:
        other.kill()
        other.communicate()
    with home.hold():
        assert home.held
        with home.hold():  # the daemon and its service may both ask
            assert home.held
        assert home.held
        assert Home(home.root).holder() == os.getpid()
    assert not home.held
    assert home.holder() is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    home = Home(tmp_path / "home")
    home.ensure()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    home.lock_path.symlink_to(victim)
    with pytest.raises(MeshkitError) as caught, home.hold():
        pytest.fail("locked through a link")
    assert caught.value.code == "invalid_config"
    assert victim.read_text() == "precious"


# -- the log ----------------------------------------------------------------------------------------------

RAW = bytes(range(200, 232))
CID = "bafkreiduvmry7u6uwubbw3x6tuxzvch4n52n5z52ybssr6tpwsbaqr7wxi"
DID = "did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK"


@pytest.mark.parametrize(
    "secret",
    [
        RAW.hex(),
        RAW.hex().upper(),
        "0x" + RAW.hex(),
        b64encode(RAW).decode(),
        urlsafe_b64encode(bytes(range(32))).decode().rstrip("="),
        urlsafe_b64encode(RAW + RAW).decode(),
        repr(RAW),
        repr(bytearray(RAW)),
        "Bearer abcdefgh.ijkl",
    ],
)
@pytest.mark.parametrize("around", ["{}", "key={} end", "ContentKey({})", '{{"k": "{}"}}', "x:{},y"])
def test_what_looks_like_a_key_is_taken_out(secret, around):
    text = logs.redact(around.format(secret))
    core = secret.removeprefix("Bearer ").strip("'\"b()=")
    assert core not in text
    assert "[redacted]" in text


@pytest.mark.parametrize(
    "text",
    [
        "passphrase: hunter2",
        "password=hunter2",
        '{"secret": "hunter2"}',
        "token = 'hunter2'",
        "API_KEY=hunter2",
    ],
)
def test_what_is_called_a_secret_is_taken_out(text):
    assert "hunter2" not in logs.redact(text)
    assert "[redacted]" in logs.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        f"block {CID} is missing",
        f"/srv/blocks/xi/{CID}",
        f"signed by {DID}",
        "share 00112233445566778899aabbccddeeff",
        "/home/alice/MeshKit/first/lib/python3.11/site-packages/cryptography/hazmat/primitives.py",
        "key vault secret-service is locked",
        "the passphrase is wrong",
        "read b'name' and b'caf\\xc3\\xa9'",
        "ABCDE-FGHIJ-KLMNO-PQRST-UVWXY",
    ],
)
def test_what_an_operator_needs_stays(text):
    assert logs.redact(text) == text


def test_redaction_is_linear():
    # A pattern that tries every split of such text would not come back.
    for hostile in ("b'" + "\\x00" * 50000, "A" * 200000, "b'" * 50000, "passphrase" * 20000):
        logs.redact(hostile)


@pytest.fixture
def _quiet_log():
    yield
    logs.setup(None)


@pytest.mark.usefixtures("_quiet_log")
def test_log_lines_are_structured_private_and_redacted(tmp_path):
    file = tmp_path / "meshkitfs.log"
    old = os.umask(0)
    try:
        logs.setup(file)
    finally:
        os.umask(old)
    log = logging.getLogger("meshkitfs.test")
    log.warning(
        "refused \x1b[2J", extra={"fields": {"code": "share_revoked", "path": "a b", "key": RAW.hex()}}
    )
    try:
        raise ValueError(f"bad key {RAW!r} {RAW.hex()}")
    except ValueError:
        log.exception("failed with %s", b64encode(RAW).decode())
    log.debug("not at this level")
    text = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    first, *rest = text.splitlines()
    assert first.startswith("time=20")
    assert (
        'level=warning logger=meshkitfs.test msg="refused \\u001b[2J" code=share_revoked path="a b"' in first
    )
    assert "Traceback" in "".join(rest)
    assert RAW.hex() not in text
    assert b64encode(RAW).decode() not in text
    assert "\\xc8\\xc9" not in text
    assert "\x1b" not in text
    assert "not at this level" not in text


@pytest.mark.usefixtures("_quiet_log")
def test_a_json_log_has_stable_keys_and_the_same_redaction(tmp_path):
    file = tmp_path / "meshkitfs.log"
    logs.setup(file, form="json")
    log = logging.getLogger("meshkitfs.test")
    log.warning("left: share %r: %s (%s)", Named(), "share_revoked", "a\nb \u2028 token=hunter2")
    fields = {"errno": 5, "left": 0.5, "on": True, "none": None, "level": "mine", "token": 1234}
    fields |= {
        "deep": {"password": ["hunter2"], "key": [RAW.hex(), RAW]},
        "long": int(RAW.hex(), 16),
        "cid": CID,
    }
    log.warning("fault", extra={"fields": fields | {"code": "head_fork"}})
    try:
        raise ValueError(f"bad key {RAW!r} {RAW.hex()}")
    except ValueError:
        log.exception("failed with %s", b64encode(RAW).decode())
    text = file.read_text(encoding="ascii")
    first, second, third = map(json.loads, text.splitlines())
    assert set(first) == {"time", "level", "logger", "event", "message", "code", "share"}
    assert first["time"].startswith("20")
    assert first["time"].endswith("Z")
    assert (first["level"], first["logger"], first["code"]) == ("warning", "meshkitfs.test", "share_revoked")
    assert (first["event"], first["share"]) == ("left: share %r: %s (%s)", "0badcafe")
    assert first["message"].startswith("left: share <Share 0badcafe>: share_revoked (a\nb")
    assert (second["errno"], second["left"], second["on"], second["none"]) == (5, 0.5, True, None)
    assert (second["level"], second["level_"], second["code"]) == ("warning", "mine", "head_fork")
    assert (second["token"], second["cid"]) == ("[redacted]", CID)
    assert "ValueError" in third["traceback"]
    for secret in ("hunter2", "1234", RAW.hex(), str(int(RAW.hex(), 16)), b64encode(RAW).decode(), "\\xc8"):
        assert secret not in text


def test_a_json_log_has_names_that_are_not_utf8_in_ascii():
    # Not logged: the test runner's own copy of the log could not be written down.
    record = logging.LogRecord("meshkitfs.test", logging.WARNING, __file__, 1, "left: %s", ("b\udce9",), None)
    text = logs.JsonFormatter().format(record)
    assert text.isascii()
    assert json.loads(text)["message"] == "left: b\udce9"


class Named:
    """Names itself as a share does."""

    def __repr__(self):
        return "<Share 0badcafe>"


@pytest.mark.usefixtures("_quiet_log")
def test_the_format_of_the_log_is_configured_and_an_option_takes_its_place(tmp_path):
    home = Home(tmp_path / "home")
    home.ensure()
    for configured, option, expected in (("json", None, True), ("json", "text", False), (None, "json", True)):
        section = {"log": {"format": configured}} if configured else {}
        home.config_path.write_text(json.dumps({"version": 1, **section}))
        home.log_file.unlink(missing_ok=True)
        logs.setup_home(home, form=option)
        logging.getLogger("meshkitfs.test").warning("line")
        assert home.log_file.read_text().startswith("{") is expected
    with pytest.raises(MeshkitError) as caught:
        check({"version": 1, "log": {"format": "xml"}})
    assert "use 'text' or 'json'" in caught.value.detail
    assert check({"version": 1, "log": {"format": "json"}}).as_dict(BASE)["log"] == {"format": "json"}


@pytest.mark.usefixtures("_quiet_log")
def test_the_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    logs.setup(tmp_path / "meshkitfs.log")
    for number in range(200):
        logging.getLogger("meshkitfs.test").warning("line %d", number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == logs.BACKUPS + 1
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o077 == 0 for file in files)


def test_a_log_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(MeshkitError) as caught:
        logs.setup(tmp_path / "no" / "log")
    assert caught.value.code == "invalid_config"


def test_the_length_of_a_lease(tmp_path):
    assert check({"version": 1}).access.lease_seconds == 300
    for wrong in (14, 301, 0, True, 20.0, "20s", None):
        with pytest.raises(MeshkitError) as caught:
            check({"version": 1, "access": {"leaseSeconds": wrong}})
        assert (caught.value.code, "field 'access.leaseSeconds'" in caught.value.detail) == (
            "invalid_config",
            True,
        )
    chosen = check({"version": 1, "access": {"leaseSeconds": 15}})
    assert chosen.access.lease_seconds == 15
    config.save(tmp_path / "meshkit.config.json", chosen)
    assert config.load(tmp_path / "meshkit.config.json") == chosen
