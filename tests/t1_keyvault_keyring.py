"""The Secret Service against a real gnome-keyring: what goes wrong between two steps, and what is beside it."""

from __future__ import annotations

import contextlib
import threading

import pytest
from keyvault_support import SECRET, refused
from secret_service import private_session, secret_service_fixture  # noqa: F401 (a fixture)

from meshkitfs import keyvault


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


def vault_at(home):
    return keyvault.open_vault(keyvault.SECRET_SERVICE, home)


def connection():
    import secretstorage

    return contextlib.closing(secretstorage.dbus_init())


def test_keyrings_alt_beside_it_is_never_used(secret_service, home, monkeypatch):
    """With it, `keyring` alone would choose a chain that ends in a plaintext file."""
    import keyring
    import keyring.backend

    names = {type(backend).__module__ for backend in keyring.backend.get_all_keyring()}
    assert "keyrings.alt.file" in names
    written = []
    from keyrings.alt.file import PlaintextKeyring
    from keyrings.alt.file_base import Keyring as FileKeyring

    for owner in (PlaintextKeyring, FileKeyring):
        monkeypatch.setattr(owner, "set_password", lambda self, *a: written.append(a))
        monkeypatch.setattr(owner, "get_password", lambda self, *a: written.append(a))
    vault_at(home).create(SECRET)
    assert vault_at(home).load() == SECRET
    secret_service.lock()
    with refused("identity_locked"):
        vault_at(home).load()
    secret_service.stop_keyring()
    with refused("keyvault_unavailable"):
        vault_at(home).load()
    with refused("keyvault_unavailable"):
        vault_at(home.parent / "other").create(SECRET)
    assert written == []
    stored = [path for path in secret_service.root.rglob("*") if path.is_file()]
    assert not [path for path in stored if "python_keyring" in str(path)]


def test_keyrings_alt_where_there_is_no_secret_service(home, monkeypatch):
    """On a server it is all that `keyring` has."""
    import keyrings.alt.file  # noqa: F401 - it is installed

    with private_session(keyring=False) as session, session.entered():
        with refused("keyvault_unavailable"):
            vault_at(home).create(SECRET)
        assert keyvault.choose(None, home).kind == keyvault.PASSPHRASE_FILE
        assert not [path for path in session.root.rglob("*") if "keyring" in path.name and path.is_file()]


def test_the_collection_is_deleted_while_the_home_is_in_use(secret_service, home):
    import secretstorage

    vault = vault_at(home)
    vault.create(SECRET)
    with connection() as bus:
        secretstorage.get_default_collection(bus).delete()
    with refused("keyvault_unavailable"):
        vault.load()
    report = vault.report()
    assert (report.available, report.persistent, report.locked) == (False, None, True)
    with refused("already_initialized"):
        vault.create(bytes(32))  # a lost key is not replaced by a new one
    assert keyvault.existing(home) == keyvault.SECRET_SERVICE
    vault.destroy()
    assert keyvault.existing(home) is None


def test_the_item_is_deleted_by_somebody_else(secret_service, home):
    import secretstorage

    vault = vault_at(home)
    vault.create(SECRET)
    with connection() as bus:
        for item in secretstorage.search_items(bus, {"service": "meshkitfs"}):
            item.delete()
    with refused("keyvault_unavailable"):
        vault.load()


class Prompter:
    """Answers as the desktop's password dialog does (org.gnome.keyring.SystemPrompter), and refuses.

    gnome-keyring asks it over D-Bus; there is no display here for the real one.
    """

    NAME = "org.gnome.keyring.SystemPrompter"
    PATH = "/org/gnome/keyring/Prompter"

    def __init__(self, address):
        from jeepney.io.blocking import open_dbus_connection

        self.asked = 0
        self._bus = open_dbus_connection(address)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        from jeepney import message_bus

        self._send(message_bus.RequestName(self.NAME))
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._bus.close()

    def _send(self, message):
        self._bus.send(message)

    def _run(self):
        from jeepney import HeaderFields, MessageType, new_method_return

        with contextlib.suppress(Exception):  # the bus is closed under it at the end
            while True:
                message = self._bus.receive()
                if message.header.message_type != MessageType.method_call:
                    continue
                fields = message.header.fields
                member, sender = fields[HeaderFields.member], fields[HeaderFields.sender]
                self._send(new_method_return(message))
                callback = message.body[0] if message.body else None
                if member == "BeginPrompting":
                    self._ready(sender, callback, "")
                elif member == "PerformPrompt":
                    self.asked += 1
                    self._ready(sender, callback, "no")
                elif member == "StopPrompting":
                    self._call(sender, callback, "PromptDone")

    def _ready(self, sender, callback, answer):
        self._call(sender, callback, "PromptReady", "sa{sv}s", (answer, {}, ""))

    def _call(self, sender, callback, member, signature=None, body=()):
        from jeepney import DBusAddress, new_method_call

        address = DBusAddress(
            callback, bus_name=sender, interface="org.gnome.keyring.internal.Prompter.Callback"
        )
        self._send(new_method_call(address, member, signature, body))


def test_a_person_who_refuses_the_prompt(secret_service, home):
    vault = vault_at(home)
    vault.create(SECRET)
    secret_service.lock()
    with Prompter(secret_service.env["DBUS_SESSION_BUS_ADDRESS"]) as prompter:
        with refused("identity_locked"):
            vault.load()
        assert prompter.asked >= 1
        assert vault.report().locked is True
    assert keyvault.existing(home) == keyvault.SECRET_SERVICE
