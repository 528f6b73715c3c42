"""A private D-Bus session with a real, unlocked gnome-keyring in it, for tests of the Secret Service.

Nothing of the person running the tests is touched: the bus, HOME and XDG_RUNTIME_DIR are new and are
removed afterwards, and both daemons are our own children, ended by their process id. The bus has no
activation directory, so "no Secret Service on this bus" can be tested as well.

Use `private_session()` in any test, or import `secret_service_fixture` and ask for `secret_service`;
`session.env` is a whole environment for subprocesses, and `session.entered()` puts it into this process.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "the keyring's own password"
_DEADLINE = 20.0  # seconds for a daemon to come up; reached only when it never will
_BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
_REMOVED = ("DISPLAY", "WAYLAND_DISPLAY", "GNOME_KEYRING_CONTROL", "PYTHON_KEYRING_BACKEND")
_MOVED = ("HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")


def missing() -> list[str]:
    """The programs this needs that are not installed."""
    return [name for name in ("dbus-daemon", "gnome-keyring-daemon") if shutil.which(name) is None]


class Session:
    """One private bus. `start_keyring` and `stop_keyring` decide whether it has a Secret Service."""

    def __init__(self, root: Path) -> None:
        self.root = root
        runtime = root / "run"
        runtime.mkdir(mode=0o700)
        (root / "home").mkdir(mode=0o700)
        self._keyring: subprocess.Popen[bytes] | None = None
        self.env = {k: v for k, v in os.environ.items() if k not in _REMOVED}
        self.env |= {
            "HOME": str(root / "home"),
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_DATA_HOME": str(root / "home" / ".local" / "share"),
            "XDG_CONFIG_HOME": str(root / "home" / ".config"),
            "XDG_CACHE_HOME": str(root / "home" / ".cache"),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
        }
        config = root / "bus.conf"
        config.write_text(_BUS_CONFIG.format(socket=runtime / "bus"))
        log = root / "bus.log"
        with log.open("wb") as stderr:
            self._bus = subprocess.Popen(
                ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        assert self._bus.stdout is not None
        _wait_readable(self._bus.stdout.fileno(), "dbus-daemon")
        if not self._bus.stdout.readline().startswith(b"unix:path="):
            raise RuntimeError(f"dbus-daemon did not start: {log.read_text()}")

    @property
    def keyring_files(self) -> Path:
        """Where gnome-keyring keeps its (encrypted) collections."""
        return self.root / "home" / ".local" / "share" / "keyrings"

    def start_keyring(self, password: str | None = PASSWORD) -> None:
        """Start the keyring daemon; without a password it comes up locked, as on a machine without login."""
        assert self._keyring is None
        command = ["gnome-keyring-daemon", "--foreground", "--components=secrets"]
        command += ["--unlock"] if password is not None else []
        with self._name_owner_changes() as wait_for_owner:
            self._keyring = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            assert self._keyring.stdin is not None
            self._keyring.stdin.write((password or "").encode())
            self._keyring.stdin.close()
            wait_for_owner()

    def stop_keyring(self) -> None:
        """End the keyring daemon, leaving the bus: the back end has gone missing."""
        if self._keyring is not None:
            _end(self._keyring)
            self._keyring = None

    def lock(self) -> None:
        """Lock the default collection, as closing the lid or `seahorse` does."""
        import secretstorage

        with self.entered(), contextlib.closing(secretstorage.dbus_init()) as connection:
            secretstorage.get_default_collection(connection).lock()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make this session the one that code in this process sees."""
        names = (*_REMOVED, *_MOVED, "DBUS_SESSION_BUS_ADDRESS")
        before = {name: os.environ.get(name) for name in names}
        try:
            for name in names:
                os.environ.pop(name, None)
                if name in self.env:
                    os.environ[name] = self.env[name]
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def close(self) -> None:
        self.stop_keyring()
        _end(self._bus)

    @contextlib.contextmanager
    def _name_owner_changes(self):
        """Yield a function that returns once somebody owns the Secret Service's name."""
        from jeepney import MatchRule, message_bus
        from jeepney.io.blocking import Proxy, open_dbus_connection

        rule = MatchRule(
            type="signal",
            interface="org.freedesktop.DBus",
            member="NameOwnerChanged",
            path="/org/freedesktop/DBus",
        )
        rule.add_arg_condition(0, "org.freedesktop.secrets")
        with open_dbus_connection(self.env["DBUS_SESSION_BUS_ADDRESS"]) as connection:
            Proxy(message_bus, connection).AddMatch(rule)
            with connection.filter(rule) as queue:
                yield lambda: connection.recv_until_filtered(queue, timeout=_DEADLINE)


@contextlib.contextmanager
def private_session(keyring: bool = True) -> Iterator[Session]:
    """A bus, by default with an unlocked keyring, gone when the block ends. Skips where it cannot be had."""
    if missing():
        pytest.skip(f"NOT TESTED: the Secret Service; not installed: {', '.join(missing())}")
    # Not pytest's tmp_path: a socket's path may have 107 bytes only.
    root = Path(tempfile.mkdtemp(prefix="mkss-"))
    try:
        session = Session(root)
        try:
            if keyring:
                session.start_keyring()
            yield session
        finally:
            session.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(name="secret_service")
def secret_service_fixture() -> Iterator[Session]:
    """A private session with an unlocked keyring, entered."""
    with private_session() as session, session.entered():
        yield session


def _wait_readable(descriptor: int, what: str) -> None:
    readable, _, _ = select.select([descriptor], [], [], _DEADLINE)
    if not readable:
        raise RuntimeError(f"{what} said nothing for {_DEADLINE:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
