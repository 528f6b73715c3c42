"""The key vault's contract, for every kind: one set of tests; then what each kind must refuse.

The Secret Service is a real gnome-keyring on a private bus. Argon2id runs at its floor, not at the cost
used in the product, to keep the tests quick.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from secret_service import private_session, secret_service_fixture  # noqa: F401 (a fixture)
from swtpm import shared_tpm_fixture  # noqa: F401 (a fixture)

from meshkitfs import keyvault
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import _passphrase_file, _secret_service
from meshkitfs.keyvault._passphrase_file import FLOOR, Cost, PassphraseFileVault
from meshkitfs.keyvault._secret_service import SecretServiceVault, require_secret_service

PHRASE = "correct horse battery staple"
SECRET = bytes(range(100, 132))


def refused(code: str):
    """Expect a MeshkitError with exactly this code, and nothing secret in its text."""

    @contextlib.contextmanager
    def check():
        with pytest.raises(MeshkitError) as caught:
            yield caught
        assert caught.value.code == code, caught.value
        for canary in (SECRET.hex(), PHRASE):
            assert canary not in str(caught.value)

    return check()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(autouse=True)
def cheap_argon2(monkeypatch):
    monkeypatch.setattr(_passphrase_file, "Cost", lambda *a: Cost(*a) if a else FLOOR)


@pytest.fixture(params=keyvault.KINDS)
def kind(request):
    prepare(request.param, request)
    return request.param


def prepare(kind: str, request) -> None:
    """Make the back end of ``kind`` be there: a keyring, a TPM, a unit's credential."""
    if kind == keyvault.SECRET_SERVICE:
        request.getfixturevalue("secret_service")
    if kind == keyvault.TPM2:
        tpm = request.getfixturevalue("shared_tpm")
        request.getfixturevalue("monkeypatch").setenv("MESHKITFS_TPM", tpm.tcti)
    if kind == keyvault.SYSTEMD_CREDENTIAL:
        directory = request.getfixturevalue("tmp_path") / "credentials"
        directory.mkdir(mode=0o700)
        (directory / "meshkitfs-key").write_bytes(secrets.token_bytes(32))
        (directory / "meshkitfs-key").chmod(0o400)
        request.getfixturevalue("monkeypatch").setenv("CREDENTIALS_DIRECTORY", str(directory))


def vault_at(kind: str, home: Path, phrase: str = PHRASE) -> keyvault.KeyVault:
    return keyvault.open_vault(kind, home, lambda prompt: phrase)


# -- the contract ----------------------------------------------------------------------------------


def test_what_was_created_is_loaded_by_another_object(kind, home):
    vault_at(kind, home).create(SECRET)
    assert vault_at(kind, home).load() == SECRET
    assert keyvault.existing(home) == kind


def test_a_second_create_changes_nothing(kind, home):
    vault_at(kind, home).create(SECRET)
    with refused("already_initialized"):
        vault_at(kind, home).create(bytes(32))
    assert vault_at(kind, home).load() == SECRET


def test_nothing_stored_is_not_found(kind, home):
    with refused("identity_not_found"):
        vault_at(kind, home).load()
    assert keyvault.existing(home) is None


def test_destroy_forgets_and_allows_a_new_key(kind, home):
    vault = vault_at(kind, home)
    vault.destroy()
    vault.create(SECRET)
    vault.destroy()
    assert list(home.iterdir()) == []
    with refused("identity_not_found"):
        vault.load()
    vault.create(bytes(32))
    assert vault.load() == bytes(32)


def test_two_homes_have_two_keys(kind, home, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    vault_at(kind, home).create(SECRET)
    vault_at(kind, other).create(bytes(32))
    assert vault_at(kind, home).load() == SECRET
    vault_at(kind, other).destroy()
    assert vault_at(kind, home).load() == SECRET


def test_a_moved_home_keeps_its_key(kind, home):
    vault_at(kind, home).create(SECRET)
    moved = home.rename(home.with_name("moved"))
    assert vault_at(kind, moved).load() == SECRET


def test_the_key_of_a_home_is_in_one_vault_only(kind, home):
    vault_at(kind, home).create(SECRET)
    for other in keyvault.KINDS:
        if other != kind:
            with refused("already_initialized"):
                vault_at(other, home)
    assert keyvault.choose(None, home, lambda _: PHRASE).kind == kind


@pytest.mark.parametrize("size", [0, 31, 33])
def test_only_32_bytes_are_a_key(kind, home, size):
    with pytest.raises(ValueError, match="32 bytes"):
        vault_at(kind, home).create(bytes(size))
    assert list(home.iterdir()) == []


def test_files_are_private_whatever_the_umask(kind, home):
    before = os.umask(0)
    try:
        vault_at(kind, home).create(SECRET)
    finally:
        os.umask(before)
    (file,) = home.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_secret_in_any_text(kind, home, caplog):
    caplog.set_level("DEBUG")
    vault = vault_at(kind, home)
    vault.create(SECRET)
    vault.load()
    texts = (repr(vault), repr(vault.report()), json.dumps(vault.report().as_dict()), caplog.text)
    for canary in (SECRET.hex(), PHRASE, repr(SECRET)):
        assert all(canary not in text for text in texts)


def test_a_missing_directory_is_a_coded_error(kind, home):
    with refused("keyvault_unavailable"):
        vault_at(kind, home / "nowhere").create(SECRET)
    if kind == keyvault.SECRET_SERVICE:
        assert stored_items() == []


@pytest.mark.parametrize("kind", [keyvault.PASSPHRASE_FILE, keyvault.PLAIN_FILE])
def test_two_creators_at_once_one_wins(kind, home):
    keys = [secrets.token_bytes(32) for _ in range(4)]
    outcomes = {}
    start = threading.Barrier(len(keys))

    def create(key):
        vault = vault_at(kind, home)
        start.wait()
        try:
            vault.create(key)
            outcomes[key] = "won"
        except MeshkitError as error:
            outcomes[key] = error.code

    threads = [threading.Thread(target=create, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["already_initialized"] * 3 + ["won"]
    assert outcomes[vault_at(kind, home).load()] == "won"
    assert len(list(home.iterdir())) == 1


def test_derived_keys_differ_by_label_and_secret():
    labels = ("mk/identity@1", "mk/state-db@1")
    keys = {keyvault.derive_key(secret, label) for secret in (SECRET, bytes(32)) for label in labels}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)
    with pytest.raises(ValueError, match="32 bytes"):
        keyvault.derive_key(SECRET[:16], "mk/identity@1")


def test_derived_key_is_hkdf_expand_as_written_down():
    """RFC 5869, section 2.3, with one block: T(1) = HMAC(PRK, info || 0x01)."""
    import hmac

    expected = hmac.digest(SECRET, b"mk/identity@1\x01", "sha256")
    assert keyvault.derive_key(SECRET, "mk/identity@1") == expected


def test_unknown_kind(home):
    for name in ("keychain", "", "plain_file"):
        with refused("invalid_argument"):
            keyvault.open_vault(name, home)


# -- reports: exactly what the back end gives ------------------------------------------------------


def facts(report: keyvault.KeyVaultReport) -> tuple:
    return (
        report.available,
        report.persistent,
        report.exportable,
        report.hardware_backed,
        report.user_presence,
        report.locked,
    )


NOTHING_KNOWN = (False, None, None, None, None, True)


def test_report_of_each_kind(kind, home):
    vault = vault_at(kind, home)
    vault.create(SECRET)
    assert vault.report().kind == kind
    assert vault.report().fallback is None
    assert vault.report().session_cache is None
    persistent = hardware = None  # of a credential neither can be seen from inside a unit
    if kind != keyvault.SYSTEMD_CREDENTIAL:
        persistent, hardware = True, False  # the TPM of the tests is no chip
    assert facts(vault.report()) == (True, persistent, True, hardware, False, False)
    fresh = vault_at(kind, home)
    assert fresh.asks() == (keyvault.PASSPHRASE_PROMPT if kind == keyvault.PASSPHRASE_FILE else None)
    # Another process needs the passphrase first; the others are open to this whole session.
    assert fresh.report().locked is (kind == keyvault.PASSPHRASE_FILE)


def test_forgetting_locks_again_and_loses_nothing(kind, home):
    vault = vault_at(kind, home)
    vault.forget()
    vault.create(SECRET)
    vault.forget()
    assert vault.report().locked is (kind == keyvault.PASSPHRASE_FILE)
    assert vault.load() == SECRET
    assert vault.report().locked is False


def test_report_before_anything_is_stored(kind, home):
    report = vault_at(kind, home).report()
    assert report.available
    assert report.locked is (kind == keyvault.PASSPHRASE_FILE)


def test_report_says_when_a_file_cannot_be_used(home):
    vault = vault_at(keyvault.PLAIN_FILE, home)
    vault.create(SECRET)
    (home / "keyvault.plain-file").chmod(0o644)
    assert vault.report().available is False
    assert "0644" in vault.report().detail


def test_report_all_lists_every_kind(secret_service, home):
    assert [report.kind for report in keyvault.report_all(home)] == list(keyvault.KINDS)


# -- choosing: nothing becomes weaker by itself ----------------------------------------------------


def test_detect_takes_the_secret_service_where_there_is_one(secret_service, home):
    assert keyvault.detect() == keyvault.SECRET_SERVICE
    vault = keyvault.choose(None, home)
    assert vault.kind == keyvault.SECRET_SERVICE
    assert vault.report().fallback is None


def test_a_missing_back_end_changes_the_report_and_the_choice(secret_service, home):
    named = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
    before = named.report()
    secret_service.stop_keyring()
    after = named.report()
    assert before.available
    assert facts(after) == NOTHING_KNOWN
    assert "org.freedesktop.secrets" in after.detail or "no Secret Service" in after.detail
    assert keyvault.detect() == keyvault.PASSPHRASE_FILE
    chosen = keyvault.choose(None, home, lambda _: PHRASE).report()
    assert (chosen.kind, chosen.fallback) == (keyvault.PASSPHRASE_FILE, keyvault.SECRET_SERVICE)


def test_a_named_back_end_that_is_missing_fails_and_stores_nothing(secret_service, home):
    secret_service.stop_keyring()
    with refused("keyvault_unavailable"):
        keyvault.open_vault(keyvault.SECRET_SERVICE, home, lambda _: PHRASE).create(SECRET)
    assert list(home.iterdir()) == []
    everything = [path for path in secret_service.root.rglob("*") if path.is_file()]
    assert not [path for path in everything if SECRET.hex().encode() in path.read_bytes()]


@pytest.mark.parametrize("address", [None, "unix:path=/nonexistent/bus", "nonsense"])
def test_no_session_bus(monkeypatch, home, address):
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
    vault = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
    assert facts(vault.report()) == NOTHING_KNOWN
    with refused("keyvault_unavailable"):
        vault.create(SECRET)
    assert keyvault.detect() == keyvault.PASSPHRASE_FILE


def test_no_secret_service_library(secret_service, monkeypatch, home):
    for name in [name for name in sys.modules if name.split(".")[0] in ("secretstorage", "jeepney")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "secretstorage", None)
    vault = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
    assert facts(vault.report()) == NOTHING_KNOWN
    assert "secretstorage" in vault.report().detail
    with refused("keyvault_unavailable"):
        vault.create(SECRET)


def test_plain_file_is_never_chosen(monkeypatch, home):
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    assert keyvault.choose(None, home).kind != keyvault.PLAIN_FILE
    with refused("identity_locked"):
        keyvault.choose(None, home).create(SECRET)
    assert list(home.iterdir()) == []


# -- Secret Service --------------------------------------------------------------------------------


def stored_items() -> list:
    import secretstorage

    with contextlib.closing(secretstorage.dbus_init()) as connection:
        return [item.item_path for item in secretstorage.search_items(connection, {"service": "meshkitfs"})]


def set_default_collection(path: str) -> None:
    import secretstorage
    from secretstorage.util import DBusAddressWrapper

    with contextlib.closing(secretstorage.dbus_init()) as connection:
        service = DBusAddressWrapper("/org/freedesktop/secrets", "org.freedesktop.Secret.Service", connection)
        service.call("SetAlias", "so", "default", path)


def test_the_key_survives_a_new_keyring_daemon(secret_service, home):
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    secret_service.stop_keyring()
    secret_service.start_keyring()
    assert vault.load() == SECRET


def test_the_keyring_holds_it_encrypted(secret_service, home):
    import base64

    vault_at(keyvault.SECRET_SERVICE, home).create(SECRET)
    files = list(secret_service.keyring_files.iterdir()) + list(home.iterdir())
    assert len(files) >= 2
    for path in files:
        content = path.read_bytes()
        for form in (SECRET, SECRET.hex().encode(), base64.b64encode(SECRET)):
            assert form not in content


def test_locked_keyring(secret_service, home):
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    secret_service.lock()
    assert facts(vault.report()) == (True, True, True, False, False, True)
    with refused("identity_locked"):
        vault.load()
    with refused("identity_locked"):
        vault.destroy()
    # No display here, so nobody can be asked for the keyring's password.
    assert keyvault.detect() == keyvault.PASSPHRASE_FILE


def test_locked_keyring_is_still_the_choice_where_a_person_can_be_asked(
    secret_service,
    monkeypatch,
    home,
):
    vault_at(keyvault.SECRET_SERVICE, home).create(SECRET)
    secret_service.lock()
    monkeypatch.setenv("DISPLAY", ":99")
    assert keyvault.detect() == keyvault.SECRET_SERVICE


def test_a_home_that_has_a_key_asks_nobody_before_refusing_another(secret_service, home):
    vault_at(keyvault.SECRET_SERVICE, home).create(SECRET)
    secret_service.lock()
    with refused("already_initialized"):
        vault_at(keyvault.SECRET_SERVICE, home).create(bytes(32))


def test_wrong_keyring_password_is_locked_not_lost(secret_service, home):
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    secret_service.stop_keyring()
    secret_service.start_keyring("not the password")
    with refused("identity_locked"):
        vault.load()
    secret_service.stop_keyring()
    secret_service.start_keyring()
    assert vault.load() == SECRET


def test_no_default_keyring(home):
    """What a server has: the daemon answers, but was never unlocked and there is nobody to ask."""
    with private_session(keyring=False) as session, session.entered():
        session.start_keyring(password=None)
        vault = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
        assert facts(vault.report()) == NOTHING_KNOWN
        assert keyvault.detect() == keyvault.PASSPHRASE_FILE
        with refused("keyvault_unavailable"):
            vault.create(SECRET)
        assert list(home.iterdir()) == []


def test_a_keyring_that_forgets_is_refused(secret_service, home):
    set_default_collection("/org/freedesktop/secrets/collection/session")
    vault = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
    assert vault.report().persistent is False
    assert vault.report().available is False
    assert keyvault.detect() == keyvault.PASSPHRASE_FILE
    with refused("keyvault_refused"):
        vault.create(SECRET)
    assert stored_items() == []


def test_the_key_is_found_when_the_default_keyring_changed(secret_service, home):
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    set_default_collection("/org/freedesktop/secrets/collection/session")
    assert vault.load() == SECRET
    assert vault.report().persistent is True


def test_the_environment_cannot_redirect_the_key(secret_service, monkeypatch, home):
    monkeypatch.setenv("KEYRING_PROPERTY_PREFERRED_COLLECTION", "/org/freedesktop/secrets/collection/session")
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    vault_at(keyvault.SECRET_SERVICE, home).create(SECRET)
    (item,) = stored_items()
    assert item.startswith("/org/freedesktop/secrets/collection/login/")
    assert vault_at(keyvault.SECRET_SERVICE, home).load() == SECRET


def test_other_keyring_back_ends_are_refused(home):
    import keyring.backend
    from keyring.backends import SecretService, chainer, fail, null

    class PlaintextKeyring(keyring.backend.KeyringBackend):
        """As keyrings.alt has it: a file, no encryption."""

        priority = 0.5
        taken: list[str] = []

        def get_password(self, service, username):
            return None

        def set_password(self, service, username, password):
            self.taken.append(password)

    class Disguised(SecretService.Keyring):
        priority = 9

        def set_password(self, service, username, password):
            PlaintextKeyring.taken.append(password)

    for backend in (
        PlaintextKeyring(),
        Disguised(),
        chainer.ChainerBackend(),
        null.Keyring(),
        fail.Keyring(),
    ):
        with refused("keyvault_refused"):
            require_secret_service(backend)
    with private_session() as session, session.entered():
        for backend in (PlaintextKeyring(), Disguised(), chainer.ChainerBackend()):
            with refused("keyvault_refused"):
                SecretServiceVault(home, backend=backend).create(SECRET)
    assert PlaintextKeyring.taken == []
    assert list(home.iterdir()) == []


def test_a_reset_keyring_is_not_a_new_home(secret_service, home):
    """The pointer is there, the item is not: say so, and do not make a new key over the old home."""
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    pointer = (home / "keyvault.secret-service").read_bytes()
    vault.destroy()
    (home / "keyvault.secret-service").write_bytes(pointer)
    (home / "keyvault.secret-service").chmod(0o600)
    with refused("keyvault_unavailable"):
        vault.load()
    assert facts(vault.report()) == NOTHING_KNOWN
    with refused("already_initialized"):
        vault.create(bytes(32))


@pytest.mark.parametrize(
    "content", [b"", b"x", b"meshkitfs secret-service key vault 1\n" + b"G" * 32 + b"\n"]
)
def test_a_damaged_pointer(secret_service, home, content):
    vault = vault_at(keyvault.SECRET_SERVICE, home)
    vault.create(SECRET)
    (home / "keyvault.secret-service").write_bytes(content)
    with refused("identity_corrupt"):
        vault.load()
    assert vault.report().available is False


def test_an_item_that_is_not_a_key(secret_service, home):
    import secretstorage

    vault_at(keyvault.SECRET_SERVICE, home).create(SECRET)
    for value in (b"hunter2", b"AAAA", b"\xff"):
        with contextlib.closing(secretstorage.dbus_init()) as connection:
            (item,) = secretstorage.search_items(connection, {"service": "meshkitfs"})
            item.set_secret(value)
        with refused("identity_corrupt") as caught:
            vault_at(keyvault.SECRET_SERVICE, home).load()
        assert "hunter2" not in str(caught.value)


def test_a_service_that_never_answers_ends_at_the_deadline(home, tmp_path, monkeypatch):
    """A socket that accepts and says nothing stands for a wedged keyring."""
    import socket

    path = Path(os.path.relpath(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={path}")
        monkeypatch.setattr(_secret_service, "PROBE_SECONDS", 0.05)
        monkeypatch.setattr(_secret_service, "PROMPT_SECONDS", 0.05)
        vault = keyvault.open_vault(keyvault.SECRET_SERVICE, home)
        assert facts(vault.report()) == NOTHING_KNOWN
        assert keyvault.detect() == keyvault.PASSPHRASE_FILE
        with refused("identity_locked"):
            vault.create(SECRET)


def test_the_bus_is_only_reached_when_needed():
    """Commands that use a file must not pay for, nor depend on, D-Bus."""
    code = (
        "import sys; from pathlib import Path; from meshkitfs import keyvault\n"
        "keyvault.open_vault('plain-file', Path('/nonexistent')).report()\n"
        "sys.exit(any(name in sys.modules for name in ('keyring', 'secretstorage', 'jeepney')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- passphrase file -------------------------------------------------------------------------------


def passphrase_file(home: Path) -> Path:
    return home / "keyvault.passphrase-file"


def rewrite(home: Path, pattern: str, replacement: str, checksum: bool = True) -> None:
    """Change the file as an attacker would: with a right checksum, unless told otherwise."""
    path = passphrase_file(home)
    body, _, _ = path.read_text().rstrip("\n").rpartition("\n")
    changed, count = re.subn(pattern, replacement, body + "\n", count=1)
    assert count == 1
    assert changed != body + "\n"
    total = hashlib.sha256((changed if checksum else body).encode()).hexdigest()
    path.write_text(f"{changed}{total}\n")


def test_wrong_passphrase(home):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    wrong = vault_at(keyvault.PASSPHRASE_FILE, home, PHRASE + "!")
    with refused("wrong_passphrase"):
        wrong.load()
    assert wrong.report().locked is True


def test_the_passphrase_may_be_typed_on_another_keyboard(home):
    vault_at(keyvault.PASSPHRASE_FILE, home, "caf\u00e9 au lait").create(SECRET)
    assert vault_at(keyvault.PASSPHRASE_FILE, home, "cafe\u0301 au lait").load() == SECRET


@pytest.mark.parametrize("phrase", ["", "1234567", "cafe\u0301 12"])
def test_a_short_new_passphrase_is_refused(home, phrase):
    with refused("invalid_argument"):
        vault_at(keyvault.PASSPHRASE_FILE, home, phrase).create(SECRET)
    assert list(home.iterdir()) == []


def test_a_passphrase_that_is_not_text_is_refused(home):
    with refused("invalid_argument"):
        vault_at(keyvault.PASSPHRASE_FILE, home, "12345678\udc80").create(SECRET)


def test_prompts_tell_new_from_known(home):
    prompts: list[str] = []

    def ask(prompt):
        prompts.append(prompt)
        return PHRASE

    vault = keyvault.open_vault(keyvault.PASSPHRASE_FILE, home, ask)
    vault.create(SECRET)
    vault.load()
    assert prompts == [keyvault.NEW_PASSPHRASE_PROMPT, keyvault.PASSPHRASE_PROMPT]


def test_nobody_to_ask_is_locked(home):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    with refused("identity_locked"):
        keyvault.open_vault(keyvault.PASSPHRASE_FILE, home).load()


def test_the_product_does_not_go_below_its_own_cost(home, monkeypatch):
    monkeypatch.undo()
    assert Cost() == Cost(memory=262144, passes=3, lanes=4)
    vault = PassphraseFileVault(home, lambda _: PHRASE)
    vault.create(SECRET)
    assert "$m=262144,t=3,p=4$" in passphrase_file(home).read_text()
    for cost in (Cost(FLOOR.memory - 1, 3, 1), Cost(FLOOR.memory, 2, 1)):
        with refused("keyvault_refused"):
            PassphraseFileVault(home / "other", lambda _: PHRASE, cost=cost).create(SECRET)


@pytest.mark.parametrize(
    "parameters",
    [
        "m=8,t=3,p=1",
        "m=65535,t=3,p=1",
        "m=65536,t=2,p=1",
        "m=65536,t=1,p=1",
        "m=4194305,t=3,p=1",
        "m=4194304,t=64,p=64",
        "m=4194304,t=5,p=1",
        "m=65536,t=65,p=1",
        "m=9999999999,t=9999999999,p=1",
        "m=65536,t=3,p=65",
    ],
)
def test_a_downgraded_or_absurd_header_is_refused_before_the_passphrase_is_asked(home, parameters):
    """Otherwise whoever swaps the file gets a passphrase stretched at a cost of their choosing."""
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    rewrite(home, r"m=\d+,t=\d+,p=\d+", parameters)

    def ask(prompt):
        raise AssertionError("somebody was asked")  # and then it would take gigabytes, or hours

    vault = keyvault.open_vault(keyvault.PASSPHRASE_FILE, home, ask)
    with refused("keyvault_refused"):
        vault.load()
    assert vault.report().available is False


def test_a_weaker_file_made_with_the_right_passphrase_is_refused(home, monkeypatch):
    """A whole, honest file below the floor: only the floor can refuse it."""
    weak = Cost(8, 1, 1)
    monkeypatch.setattr(_passphrase_file, "FLOOR", weak)
    PassphraseFileVault(home, lambda _: PHRASE, cost=weak).create(SECRET)
    assert vault_at(keyvault.PASSPHRASE_FILE, home).load() == SECRET
    monkeypatch.setattr(_passphrase_file, "FLOOR", FLOOR)
    with refused("keyvault_refused"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"m=65536", "m=65537"),
        (r"(p=1\$)(.)", lambda m: m[1] + ("A" if m[2] != "A" else "B")),  # salt
        (r"\n([A-Za-z0-9+/])(?=[^\n]*\n$)", lambda m: "\n" + ("A" if m[1] != "A" else "B")),  # commitment
    ],
    ids=["cost", "salt", "commitment"],
)
def test_a_changed_header_does_not_open(home, pattern, replacement):
    """With a right checksum a changed header cannot be told from a wrong passphrase; it never opens."""
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    rewrite(home, pattern, replacement)
    with refused("wrong_passphrase"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()


@pytest.mark.parametrize("part", ["nonce", "sealed"])
def test_a_changed_seal_is_corrupt_not_a_wrong_passphrase(home, part):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    position = {"nonce": 1, "sealed": 2}[part]
    lines = passphrase_file(home).read_text().split("\n")
    fields = lines[2].split("$")
    fields[position] = ("A" if fields[position][0] != "A" else "B") + fields[position][1:]
    lines[2] = "$".join(fields)
    lines[3] = hashlib.sha256("\n".join([*lines[:3], ""]).encode()).hexdigest()
    passphrase_file(home).write_text("\n".join(lines))
    with refused("identity_corrupt"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()


def test_the_header_is_authenticated_by_the_seal_itself(home, monkeypatch):
    """Take the commitment's check away: the associated data still refuses another header."""
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    real = _passphrase_file._parse

    def other_header(content, path):
        file = real(content, path)
        return _passphrase_file._File(
            file.cost, file.salt, file.aad + b" ", file.commitment, file.nonce, file.sealed
        )

    monkeypatch.setattr(_passphrase_file, "_parse", other_header)
    with refused("wrong_passphrase"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()
    monkeypatch.setattr(_passphrase_file.hmac, "compare_digest", lambda a, b: True)
    with refused("identity_corrupt"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()


def test_every_single_byte_of_damage_is_noticed_without_the_passphrase(home):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    good = passphrase_file(home).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x01
        with pytest.raises(MeshkitError) as caught:
            _passphrase_file._parse(bytes(bad), passphrase_file(home))
        assert caught.value.code == "identity_corrupt", (position, caught.value)
    for length in range(len(good)):
        with refused("identity_corrupt"):
            _passphrase_file._parse(good[:length], passphrase_file(home))
    with refused("identity_corrupt"):
        _passphrase_file._parse(good + b"\n", passphrase_file(home))


def test_damage_is_corrupt_before_the_passphrase_is_asked(home):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    rewrite(home, r"m=65536", "m=65537", checksum=False)
    with refused("identity_corrupt"):
        keyvault.open_vault(keyvault.PASSPHRASE_FILE, home).load()


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"argon2id", "argon2i"),
        (r"v=19", "v=16"),
        (r"m=65536", "m=065536"),
        (r"m=65536", "m=+65536"),
        (r"key vault 1", "key vault 2"),
        (r"p=1\$", "p=1,x=1$"),
        # The same salt in other letters: the unused bits of its last one are not zero.
        (r"([A-Za-z0-9+/])\n(?=[^\n]*\n$)", lambda m: chr(ord(m[1]) + 1) + "\n"),
    ],
)
def test_another_header_grammar_is_refused(home, pattern, replacement):
    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    rewrite(home, pattern, replacement)
    with refused("identity_corrupt"):
        vault_at(keyvault.PASSPHRASE_FILE, home).load()


def test_an_independent_reader_opens_it(home):
    """The documented format, read by code that shares nothing with the product."""
    import base64

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    vault_at(keyvault.PASSPHRASE_FILE, home).create(SECRET)
    magic, header, body, _, _ = passphrase_file(home).read_text().split("\n")
    memory, passes, lanes = map(int, re.findall(r"[mtp]=(\d+)", header))
    salt = base64.b64decode(header.rpartition("$")[2] + "==")
    _, nonce, sealed = (base64.b64decode(part + "==") for part in body.split("$"))
    stretched = Argon2id(salt=salt, length=64, iterations=passes, lanes=lanes, memory_cost=memory).derive(
        PHRASE.encode()
    )
    assert AESGCM(stretched[:32]).decrypt(nonce, sealed, f"{magic}\n{header}\n".encode()) == SECRET


def test_too_little_memory_is_a_coded_error(home):
    code = (
        "import resource, sys; from pathlib import Path; from meshkitfs import keyvault, errors\n"
        "vault = keyvault.open_vault('passphrase-file', Path(sys.argv[1]), lambda p: '12345678')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))\n"
        "try: vault.create(bytes(32))\n"
        "except errors.MeshkitError as error: print(error.code)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True, check=True)
    assert run.stdout == "keyvault_unavailable\n"
    assert list(home.iterdir()) == []


# -- files of either kind --------------------------------------------------------------------------


@pytest.fixture(params=[kind for kind in keyvault.KINDS if kind != keyvault.SECRET_SERVICE])
def stored(request, home):
    prepare(request.param, request)
    vault = vault_at(request.param, home)
    vault.create(SECRET)
    return vault, home / f"keyvault.{request.param}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o666])
def test_a_file_open_to_others_is_refused(stored, mode):
    vault, path = stored
    path.chmod(mode)
    with refused("keyvault_refused"):
        vault.load()
    path.chmod(0o600)
    assert vault.load() == SECRET


def test_a_link_is_refused(stored):
    vault, path = stored
    real = path.rename(path.with_name("real"))
    path.symlink_to(real)
    with refused("keyvault_refused"):
        vault.load()
    real.unlink()
    with refused("keyvault_refused"):
        vault.load()
    with refused("already_initialized"):
        vault.create(SECRET)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_without_hanging(stored, make):
    vault, path = stored
    path.unlink()
    make(path, 0o600)
    with refused("keyvault_refused"):
        vault.load()
    assert vault.report().available is False


def test_another_users_file_is_refused(stored, monkeypatch):
    vault, path = stored
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:  # only root can give a file away; to us it is the same if we are somebody else
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with refused("keyvault_refused"):
        vault.load()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_unavailable(stored):
    vault, path = stored
    path.chmod(0)
    with refused("keyvault_unavailable"):
        vault.load()


def test_a_huge_file_is_refused_unread(stored):
    vault, path = stored
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with refused("identity_corrupt"):
        vault.load()


def test_a_full_disk_leaves_nothing(home, monkeypatch):
    def no_room(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with refused("keyvault_unavailable"):
        vault_at(keyvault.PLAIN_FILE, home).create(SECRET)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x", SECRET, SECRET.hex().encode() + b"\n"])
def test_a_damaged_plain_file(home, content):
    vault = vault_at(keyvault.PLAIN_FILE, home)
    vault.create(SECRET)
    path = home / "keyvault.plain-file"
    good = path.read_bytes()
    for bad in (
        content,
        good[:-1],
        good[:-3] + b"\n",
        good + b"\n",
        good.upper(),
        good.replace(b"1\n", b"2\n", 1),
    ):
        path.write_bytes(bad)
        with refused("identity_corrupt"):
            vault.load()
    path.write_bytes(good)
    assert vault.load() == SECRET
