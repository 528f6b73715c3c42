"""The key vault `systemd-credential`: with the files that systemd makes, and under a real systemd."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import pytest
from keyvault_support import SECRET, refused
from user_manager import user_manager

from meshkitfs import keyvault
from meshkitfs.keyvault import _systemd_credential
from meshkitfs.keyvault._text import checked

NAME = "meshkitfs-key"


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def unit(tmp_path, monkeypatch):
    """The credentials directory of a unit; returns it with a credential in it."""
    directory = tmp_path / "credentials"
    directory.mkdir(mode=0o700)
    give(directory, os.urandom(32))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    return directory


def give(directory: Path, content: bytes, mode: int = 0o400) -> None:
    path = directory / NAME
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def vault_at(home):
    return keyvault.open_vault(keyvault.SYSTEMD_CREDENTIAL, home)


def test_outside_a_unit_it_says_how_to_make_one(home, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with refused("keyvault_unavailable") as caught:
        vault_at(home).create(SECRET)
    for part in ("systemd-creds encrypt --name=meshkitfs-key", "LoadCredentialEncrypted=meshkitfs-key:"):
        assert part in str(caught.value)
    report = vault_at(home).report()
    assert (report.available, report.exportable, report.hardware_backed, report.locked) == (
        False,
        None,
        None,
        True,
    )
    assert list(home.iterdir()) == []


def test_a_unit_without_the_credential(home, unit):
    (unit / NAME).unlink()
    with refused("keyvault_unavailable") as caught:
        vault_at(home).create(SECRET)
    assert "LoadCredential" in str(caught.value)


@pytest.mark.parametrize("value", ["", "credentials", "../x"])
def test_a_directory_that_is_none(home, unit, monkeypatch, value):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", value)
    with refused("keyvault_unavailable"):
        vault_at(home).create(SECRET)


def test_what_cannot_be_seen_is_not_claimed(home, unit):
    vault_at(home).create(SECRET)
    report = vault_at(home).report()
    assert (report.hardware_backed, report.persistent, report.exportable) == (None, None, True)
    assert "cannot be seen from here" in report.detail
    for demand in ("hardware_backed", "persistent", "not_exportable", "user_presence"):
        with refused("keyvault_too_weak"):
            keyvault.require(report, [demand])


def test_the_credential_is_only_read(home, unit):
    before = (unit / NAME).read_bytes(), os.stat(unit / NAME).st_mtime_ns, sorted(os.listdir(unit))
    vault = vault_at(home)
    vault.create(SECRET)
    assert vault.load() == SECRET
    vault.destroy()
    assert ((unit / NAME).read_bytes(), os.stat(unit / NAME).st_mtime_ns, sorted(os.listdir(unit))) == before


def test_the_home_holds_neither_the_key_nor_the_credential(home, unit):
    vault_at(home).create(SECRET)
    content = (home / "keyvault.systemd-credential").read_bytes()
    for secret in (SECRET, (unit / NAME).read_bytes()):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"=")):
            assert form not in content


def test_another_credential(home, unit):
    vault_at(home).create(SECRET)
    give(unit, os.urandom(32))
    with refused("keyvault_replaced"):
        vault_at(home).load()


def test_without_the_credential_the_key_stays_shut(home, unit, monkeypatch):
    vault_at(home).create(SECRET)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with refused("keyvault_unavailable"):
        vault_at(home).load()
    assert keyvault.existing(home) == keyvault.SYSTEMD_CREDENTIAL


@pytest.mark.parametrize("size", [0, 16, 31, 4097])
def test_a_credential_that_can_be_no_random_key_is_refused(home, unit, size):
    give(unit, os.urandom(size))
    with refused("keyvault_refused"):
        vault_at(home).create(SECRET)


@pytest.mark.parametrize("mode", [0o404, 0o440, 0o460, 0o402, 0o666])
def test_a_credential_open_to_others_is_refused(home, unit, mode):
    give(unit, os.urandom(32), mode)
    if mode == 0o440 and os.geteuid() == 0:
        vault_at(home).create(SECRET)  # root's: the group's bits are the mask of systemd's access list
        os.chown(unit / NAME, 1234, 0)
        (home / "keyvault.systemd-credential").unlink()
    with refused("keyvault_refused"):
        vault_at(home).create(SECRET)


def test_a_link_or_a_pipe_is_refused_without_hanging(home, unit, tmp_path):
    real = (unit / NAME).rename(tmp_path / "real")
    (unit / NAME).symlink_to(real)
    with refused("keyvault_unavailable"):
        vault_at(home).create(SECRET)
    (unit / NAME).unlink()
    os.mkfifo(unit / NAME, 0o600)
    with refused("keyvault_refused"):
        vault_at(home).create(SECRET)


def test_every_single_byte_of_damage_is_noticed(home, unit):
    vault_at(home).create(SECRET)
    path = home / "keyvault.systemd-credential"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x01
        with refused("identity_corrupt"):
            _systemd_credential._parse(bytes(bad), path)
    for length in range(len(good)):
        with refused("identity_corrupt"):
            _systemd_credential._parse(good[:length], path)


@pytest.mark.parametrize("name", ["other", "../meshkitfs-key", "", "meshkitfs-key/"])
def test_the_file_names_no_other_credential(home, unit, name):
    vault_at(home).create(SECRET)
    path = home / "keyvault.systemd-credential"
    magic, head, body = path.read_text().split("\n")[:3]
    path.write_bytes(checked(magic, head.replace(NAME, name), body))
    with refused("identity_corrupt"):
        vault_at(home).load()


def test_a_changed_file_does_not_open(home, unit):
    vault_at(home).create(SECRET)
    path = home / "keyvault.systemd-credential"
    magic, head, body = path.read_text().split("\n")[:3]
    nonce, sealed = body.split("$")
    path.write_bytes(checked(magic, head, f"{nonce}${'A' if sealed[0] != 'A' else 'B'}{sealed[1:]}"))
    with refused("keyvault_replaced"):
        vault_at(home).load()


def test_an_independent_reader_opens_it(home, unit):
    """The documented format, read by code that shares nothing with the product."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    vault_at(home).create(SECRET)
    magic, head, body, _, _ = (home / "keyvault.systemd-credential").read_text().split("\n")
    salt = base64.b64decode(head.split("$")[1] + "=")
    nonce, sealed = (base64.b64decode(part + "==") for part in body.split("$"))
    prk = hmac.digest(salt, (unit / NAME).read_bytes(), hashlib.sha256)
    key = hmac.digest(prk, b"mk/systemd-credential@1\x01", hashlib.sha256)
    assert AESGCM(key).decrypt(nonce, sealed, f"{magic}\n{head}\n".encode()) == SECRET


CODE = """
import json, sys
from pathlib import Path
from meshkitfs import errors, keyvault
vault = keyvault.open_vault("systemd-credential", Path(sys.argv[2]))
try:
    if sys.argv[1] == "create":
        vault.create(bytes(range(100, 132)))
    code = "" if vault.load() == bytes(range(100, 132)) else "another key"
except errors.MeshkitError as error:
    code = error.code
print(json.dumps({"code": code, **vault.report().as_dict()}))
"""


def test_under_a_real_systemd(home, tmp_path):
    """Its credentials are in memory that is never swapped out, and are gone with the unit."""
    with user_manager() as manager:
        good, other = tmp_path / "good", tmp_path / "other"
        for path in (good, other):
            path.write_bytes(os.urandom(32))
        repository = str(Path(__file__).resolve().parent.parent)

        def run(action, *properties):
            done = manager.run(
                *(sys.executable, "-c", CODE, action, str(home)),
                properties=properties,
                env={"PYTHONPATH": repository},
            )
            assert done.returncode == 0, done
            return json.loads(done.stdout)

        absent = run("create")
        assert (absent["code"], absent["available"]) == ("keyvault_unavailable", False)
        assert list(home.iterdir()) == []
        made = run("create", f"LoadCredential={NAME}:{good}")
        assert (made["code"], made["available"], made["hardware_backed"]) == ("", True, None)
        assert "in memory that is never swapped out" in made["detail"]
        again = run("load", f"LoadCredential={NAME}:{good}")
        assert (again["code"], again["locked"]) == ("", False)
        assert run("load", f"LoadCredential={NAME}:{other}")["code"] == "keyvault_replaced"
        assert run("load")["code"] == "keyvault_unavailable"
        assert run("load", f"SetCredential={NAME}:too short")["code"] == "keyvault_refused"
