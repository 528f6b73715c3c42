"""Key vaults as a person has them: real commands, real daemons and mounts."""

from __future__ import annotations

import json
import os

import pytest
from homes import Person, needs_fuse
from keyvault_support import NEW_PHRASE, PHRASE, PIN
from swtpm import own_tpm_fixture  # noqa: F401 (a fixture)
from t1_keyvault_cache import no_keyring

pytestmark = needs_fuse


@pytest.fixture
def pat(tmp_path):
    with Person(tmp_path / "pat", "pat") as person:
        person.root.mkdir(mode=0o700)
        yield person


def phrase(person, *lines):
    """The environment in which these lines answer what is asked."""
    path = person.root.with_name(f"{person.root.name}.phrase")
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(0o600)
    return {"MESHKITFS_PASSPHRASE_FILE": str(path)}


def configure(person, **key_vault):
    (person.root / "meshkit.config.json").write_text(json.dumps({"version": 1, "keyVault": key_vault}))


def mount(person, **options):
    person.mnt.mkdir(exist_ok=True)
    result = person.run("--json", "mount", person.mnt, check=False, **options)
    if result.code == 0:
        person.daemons.append(result.json["pid"])
    return result


def nothing_said(person, *secrets):
    said = person.logs() + "".join(person.outputs)
    for secret in secrets:
        assert secret not in said


@pytest.mark.skipif(bool(no_keyring()), reason=f"NOT TESTED: the kernel's keyring; {no_keyring()}")
def test_a_passphrase_once_per_session(pat):
    configure(pat, type="passphrase-file", sessionCache="kernel", sessionCacheSeconds=600)
    pat.cli("init", "--identity", "pat", env=phrase(pat, PHRASE))
    assert json.loads((pat.root / "meshkit.config.json").read_text())["keyVault"]["sessionCache"] == "kernel"
    assert mount(pat).error["code"] == "identity_locked"
    shown = pat.cli("keyvault", "show")["key_vault"]
    assert (shown["session_cache"], shown["locked"]) == ("kernel", True)
    try:
        assert mount(pat, env=phrase(pat, PHRASE)).code == 0
        capabilities = json.loads((pat.mnt / ".meshkit/capabilities.json").read_bytes())
        assert (capabilities["key_vault"], capabilities["session_cache"]) == ("passphrase-file", "kernel")
        pat.umount()
        assert pat.cli("keyvault", "show")["key_vault"]["locked"] is False
        assert mount(pat).code == 0  # asks nobody
        pat.umount()
    finally:
        (pat.root / "session-cache").unlink()  # as locking does
    assert mount(pat).error["code"] == "identity_locked"
    nothing_said(pat, PHRASE)


@pytest.mark.long  # in parts in t1_keyvault_move, and from a TPM below; here each step costs an Argon2id or two
def test_moving_the_key(pat):
    pat.init()
    pat.cli("share", "create", "first")
    pat.mount()
    (pat.mnt / "first" / "file").write_text("content")
    busy = pat.cli("keyvault", "migrate", "--to", "passphrase-file", check=False, env=phrase(pat, PHRASE))
    assert (busy.error["code"], busy.code) == ("home_busy", 9)
    pat.umount()
    moved = pat.cli("keyvault", "migrate", "--to", "passphrase-file", env=phrase(pat, PHRASE))
    assert (moved["before"], moved["key_vault"]["kind"]) == ("plain-file", "passphrase-file")
    assert not (pat.root / "keyvault.plain-file").exists()
    assert mount(pat).error["code"] == "identity_locked"
    assert mount(pat, env=phrase(pat, PHRASE)).code == 0
    assert (pat.mnt / "first" / "file").read_text() == "content"
    pat.umount()
    back = pat.cli("keyvault", "migrate", "--to", "plain-file", check=False, env=phrase(pat, PHRASE))
    assert (back.error["code"], back.code) == ("keyvault_refused", 4)
    pat.cli("keyvault", "migrate", "--to", "plain-file", "--weaker", env=phrase(pat, PHRASE))
    assert mount(pat).code == 0
    assert (pat.mnt / "first" / "file").read_text() == "content"
    pat.umount()
    nothing_said(pat, PHRASE)


def test_a_tpm_with_a_pin(pat, own_tpm):
    pat.env["MESHKITFS_TPM"] = own_tpm.tcti
    made = pat.cli("init", "--identity", "pat", "--key-vault", "tpm2", "--tpm-pin", env=phrase(pat, PIN))
    assert made["key_vault"]["hardware_backed"] is False
    assert mount(pat, env=phrase(pat, "314159")).error["code"] == "wrong_passphrase"
    assert mount(pat, env=phrase(pat, PIN)).code == 0
    capabilities = json.loads((pat.mnt / ".meshkit/capabilities.json").read_bytes())
    assert (capabilities["key_vault"], capabilities["hardware_backed"]) == ("tpm2", False)
    pat.umount()
    # Two questions: the PIN of now, and the passphrase of then.
    pat.cli("keyvault", "migrate", "--to", "passphrase-file", "--weaker", env=phrase(pat, PIN, NEW_PHRASE))
    assert mount(pat, env=phrase(pat, PIN)).error["code"] == "wrong_passphrase"
    assert mount(pat, env=phrase(pat, NEW_PHRASE)).code == 0
    pat.umount()
    nothing_said(pat, PIN, NEW_PHRASE)


def test_a_back_end_that_is_lost_between_two_starts_moves_nothing(pat, own_tpm):
    pat.env["MESHKITFS_TPM"] = own_tpm.tcti
    pat.cli("init", "--identity", "pat", "--key-vault", "tpm2")
    assert mount(pat).code == 0
    pat.umount()
    before = {path.name: path.read_bytes() for path in pat.root.iterdir() if path.name.startswith("keyvault")}
    own_tpm.stop()
    gone = mount(pat)
    assert (gone.error["code"], gone.code) == ("keyvault_unavailable", 4)
    shown = pat.cli("keyvault", "show")["key_vault"]
    assert (shown["kind"], shown["available"], shown["hardware_backed"]) == ("tpm2", False, None)
    checks = {check["name"]: check for check in pat.cli("doctor", check=False).json["checks"]}
    assert checks["key vault tpm2"]["status"] == "fail"
    after = {path.name: path.read_bytes() for path in pat.root.iterdir() if path.name.startswith("keyvault")}
    assert before == after
    assert not os.path.ismount(pat.mnt)
    own_tpm.start()
    assert mount(pat).code == 0
    pat.umount()


def test_what_is_demanded_and_not_given_keeps_the_home_shut(pat):
    configure(pat, type="plain-file", require=["hardware_backed"])
    refused = pat.cli("init", "--identity", "pat", check=False)
    assert (refused.error["code"], refused.code) == ("keyvault_too_weak", 4)
    assert not (pat.root / "keyvault.plain-file").exists()
    configure(pat, type="plain-file", require=["persistent"])
    pat.cli("init", "--identity", "pat")
    settings = json.loads((pat.root / "meshkit.config.json").read_text())
    settings["keyVault"]["require"] = ["persistent", "not_exportable"]
    (pat.root / "meshkit.config.json").write_text(json.dumps(settings))
    shut = mount(pat)
    assert (shut.error["code"], shut.code) == ("keyvault_too_weak", 4)
    assert "not_exportable" in shut.error["detail"]
    assert pat.cli("keyvault", "show")["require"] == ["persistent", "not_exportable"]


def test_which_key_vault_it_is_stands_in_the_log(pat):
    pat.init()
    pat.cli("share", "list")
    log = pat.logs()
    assert 'msg="key vault chosen" kind=plain-file chosen_by=name' in log
    assert 'msg="opening the key vault" kind=plain-file chosen_by=configuration' in log
    line = next(line for line in log.splitlines() if 'msg="key vault" ' in line)
    assert "exportable=True hardware_backed=False" in line
    assert str(pat.root) not in line


def test_list_shows_every_kind_without_a_home(tmp_path):
    with Person(tmp_path / "new", "new") as new:
        listed = new.cli("keyvault", "list")
        assert listed["used"] is None
        kinds = ["tpm2", "secret-service", "passphrase-file", "systemd-credential", "plain-file"]
        assert [report["kind"] for report in listed["key_vaults"]] == kinds
        text = new.run("keyvault", "list").out
        assert "not known" in text
        new.init()
        assert new.cli("keyvault", "list")["used"] == "plain-file"
        assert "used by this home" in new.run("keyvault", "list").out
        assert "exportable" in new.run("keyvault", "show").out


@pytest.mark.skipif(bool(no_keyring()), reason=f"NOT TESTED: the kernel's keyring; {no_keyring()}")
def test_locking_takes_the_key_out_of_the_session(pat):
    """Otherwise whoever finds the session could unlock without the passphrase."""
    configure(pat, type="passphrase-file", sessionCache="kernel")
    pat.cli("init", "--identity", "pat", env=phrase(pat, PHRASE))
    assert mount(pat, env=phrase(pat, PHRASE)).code == 0
    assert pat.cli("keyvault", "show")["key_vault"]["locked"] is False
    pat.cli("lock")
    assert pat.cli("keyvault", "show")["key_vault"]["locked"] is True
    refused = pat.cli("unlock", check=False)
    assert (refused.error["code"], refused.code) == ("identity_locked", 4)
    pat.cli("unlock", env=phrase(pat, PHRASE))
    assert pat.cli("keyvault", "show")["key_vault"]["locked"] is False  # it was opened again
    pat.umount()
    # Nothing is mounted, and the session still has it.
    assert pat.cli("lock") == {"locked": None, "left": []}
    assert mount(pat).error["code"] == "identity_locked"
    nothing_said(pat, PHRASE)


def test_locking_with_a_pin_in_a_tpm(pat, own_tpm):
    pat.env["MESHKITFS_TPM"] = own_tpm.tcti
    pat.cli("init", "--identity", "pat", "--key-vault", "tpm2", "--tpm-pin", env=phrase(pat, PIN))
    assert mount(pat, env=phrase(pat, PIN)).code == 0
    pat.cli("lock")
    assert pat.cli("unlock", check=False).error["code"] == "identity_locked"
    assert pat.cli("unlock", check=False, env=phrase(pat, "314159")).error["code"] == "wrong_passphrase"
    pat.cli("unlock", env=phrase(pat, PIN))
    assert pat.cli("share", "list") == {"shares": []}
    pat.umount()
    nothing_said(pat, PIN)
