"""The kernel's keyring as a session cache in front of a key vault that asks: real keys in the real kernel."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from keyvault_support import PHRASE, PIN, SECRET, refused
from swtpm import own_tpm_fixture  # noqa: F401 (a fixture)

from meshkitfs import keyvault
from meshkitfs.keyvault import _kernel_keyring, _passphrase_file
from meshkitfs.keyvault._passphrase_file import FLOOR, Cost, PassphraseFileVault
from meshkitfs.keyvault._session_cache import SessionCache


def no_keyring() -> str:
    """Why the kernel's keyring cannot be used here; empty if it can."""
    try:
        _kernel_keyring.put("meshkitfs:probe", b"x", 60)
        _kernel_keyring.drop("meshkitfs:probe")
    except OSError as error:
        return error.strerror or str(error)
    return ""


pytestmark = pytest.mark.skipif(
    bool(no_keyring()),
    reason=f"NOT TESTED: the kernel's keyring; {no_keyring()} (containers often forbid it)",
)


@pytest.fixture(autouse=True)
def cheap_argon2(monkeypatch):
    monkeypatch.setattr(_passphrase_file, "Cost", lambda *a: Cost(*a) if a else FLOOR)


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    yield path
    SessionCache(PassphraseFileVault(path), path).forget()  # leave nothing in this session


class Asked:
    """Somebody who answers, and counts how often."""

    def __init__(self, answer=PHRASE):
        self.answer, self.count = answer, 0

    def __call__(self, prompt):
        self.count += 1
        return self.answer


def cached(home, asked, seconds=600):
    return keyvault.open_home(home, keyvault.PASSPHRASE_FILE, asked, seconds)


def wait_until(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def test_a_passphrase_is_asked_for_once_per_session(home):
    asked = Asked()
    keyvault.open_vault(keyvault.PASSPHRASE_FILE, home, asked).create(SECRET)
    before = asked.count
    assert cached(home, asked).asks() == keyvault.PASSPHRASE_PROMPT
    for _ in range(3):
        assert cached(home, asked).load() == SECRET
    assert asked.count == before + 1
    assert cached(home, asked).asks() is None


def test_making_a_key_is_opening_it(home):
    asked = Asked()
    cached(home, asked).create(SECRET)
    assert cached(home, None).load() == SECRET
    assert asked.count == 1


def test_it_is_reported_as_what_it_is(home):
    cached(home, Asked()).create(SECRET)
    fresh = cached(home, None)
    report = fresh.report()
    assert (report.kind, report.session_cache, report.locked) == ("passphrase-file", "kernel", False)
    assert "600 s" in report.detail
    fresh.forget()
    report = cached(home, None).report()
    assert (report.session_cache, report.locked) == ("kernel", True)
    plain = keyvault.open_home(home, keyvault.PASSPHRASE_FILE, None).report()
    assert (plain.session_cache, plain.locked) == (None, True)


def test_forget_locks(home):
    vault = cached(home, Asked())
    vault.create(SECRET)
    vault.forget()
    assert not (home / "session-cache").exists()
    with refused("identity_locked"):
        cached(home, None).load()
    assert vault.load() == SECRET  # asks again
    assert cached(home, None).load() == SECRET


def test_forget_twice_and_with_nothing_kept(home):
    vault = cached(home, Asked())
    for _ in range(2):
        vault.forget()
    vault.create(SECRET)
    for _ in range(2):
        vault.forget()
    assert vault.load() == SECRET


def test_it_ends_by_itself(home):
    cached(home, Asked(), 1).create(SECRET)
    wait_until(lambda: cached(home, None).asks() is not None, "the end of its time")
    with refused("identity_locked"):
        cached(home, None).load()


CODE = """
import sys
from pathlib import Path
from meshkitfs import errors, keyvault
vault = keyvault.open_home(Path(sys.argv[1]), "passphrase-file", None, 600)
try:
    print("open" if vault.load() == bytes(range(100, 132)) else "another key")
except errors.MeshkitError as error:
    print(error.code)
"""


def elsewhere(home, *prefix):
    """Open the home in a process of its own, without anybody to ask."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", CODE, str(home)], capture_output=True, text=True, check=True, env=env
    )
    return done.stdout.strip()


@pytest.mark.skipif(
    shutil.which("keyctl") is None, reason="NOT TESTED: another session; keyctl is not installed"
)
def test_this_session_has_it_and_another_has_not(home):
    cached(home, Asked()).create(SECRET)
    assert elsewhere(home) == "open"
    assert elsewhere(home, "keyctl", "session", "-") == "identity_locked"


@pytest.mark.skipif(
    shutil.which("keyctl") is None, reason="NOT TESTED: another session; keyctl is not installed"
)
def test_another_session_cannot_even_read_what_is_kept(home):
    """Only who has the session's keyring may: not another program of the same user, not root."""
    cached(home, Asked()).create(SECRET)
    library = ctypes.CDLL("libkeyutils.so.1", use_errno=True)
    (name,) = names(home)
    key = library.keyctl_search(-3, b"user", name.encode(), 0)
    assert key > 0
    mine = subprocess.run(["keyctl", "pipe", str(key)], capture_output=True, check=False)
    assert mine.returncode == 0
    assert SECRET not in mine.stdout  # and what it reads is sealed
    theirs = subprocess.run(
        ["keyctl", "session", "-", "keyctl", "pipe", str(key)], capture_output=True, check=False
    )
    assert theirs.returncode != 0
    assert b"Permission denied" in theirs.stderr


def names(home):
    token = bytes.fromhex((home / "session-cache").read_text().split("\n")[1])
    from meshkitfs.keyvault._session_cache import _name

    yield _name(token)


def test_locking_in_one_session_locks_the_others(home):
    """The token in the home is half of what each session has."""
    cached(home, Asked()).create(SECRET)
    (name,) = names(home)
    payload = _kernel_keyring.get(name, 1000)
    (home / "session-cache").unlink()  # as somebody else's `forget` does
    assert _kernel_keyring.get(name, 1000) == payload
    with refused("identity_locked"):
        cached(home, None).load()
    assert SECRET not in payload
    _kernel_keyring.drop(name)


def test_nothing_of_the_key_is_on_the_disk(home):
    cached(home, Asked()).create(SECRET)
    for path in home.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        for form in (SECRET, SECRET.hex().encode()):
            assert form not in path.read_bytes()
    assert SECRET.hex() not in repr(cached(home, None))


def test_a_key_vault_that_was_changed_is_asked_again(home):
    cached(home, Asked()).create(SECRET)
    (home / "keyvault.passphrase-file").unlink()
    keyvault.open_vault(keyvault.PASSPHRASE_FILE, home, Asked()).create(bytes(32))
    with refused("identity_locked"):
        cached(home, None).load()
    assert cached(home, Asked()).load() == bytes(32)


def test_a_key_vault_that_is_refused_is_not_passed_by(home):
    cached(home, Asked()).create(SECRET)
    (home / "keyvault.passphrase-file").chmod(0o644)
    with refused("keyvault_refused"):
        cached(home, None).load()
    assert cached(home, None).report().available is False
    (home / "keyvault.passphrase-file").chmod(0o600)
    assert cached(home, None).load() == SECRET
    (home / "keyvault.passphrase-file").unlink()
    with refused("identity_not_found"):
        cached(home, None).load()


def test_what_somebody_else_put_there_is_not_taken(home):
    cached(home, Asked()).create(SECRET)
    (name,) = names(home)
    good = _kernel_keyring.get(name, 1000)
    for bad in (b"x", good[:-1], bytes(len(good)), bytes([good[0] ^ 1]) + good[1:], SECRET):
        _kernel_keyring.put(name, bad, 600)
        with refused("identity_locked"):
            cached(home, None).load()
    _kernel_keyring.put(name, good, 600)
    assert cached(home, None).load() == SECRET


@pytest.mark.parametrize(
    "content", [b"", b"x", b"meshkitfs session cache 1\n\n", b"meshkitfs session cache 1\n00\n"]
)
def test_a_damaged_token_only_means_asking(home, content):
    vault = cached(home, Asked())
    vault.create(SECRET)
    vault.forget()
    (home / "session-cache").write_bytes(content)
    (home / "session-cache").chmod(0o600)
    assert vault.load() == SECRET
    assert cached(home, None).load() == SECRET


def test_a_token_open_to_others_is_not_used(home):
    vault = cached(home, Asked())
    vault.create(SECRET)
    (home / "session-cache").chmod(0o644)
    with refused("identity_locked"):
        cached(home, None).load()
    vault.load()
    assert (home / "session-cache").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EDQUOT])
def test_a_kernel_without_a_keyring_asks_each_time_and_says_so(home, monkeypatch, number):
    def refuse(name, *arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_kernel_keyring, "_call", refuse)
    asked = Asked()
    vault = cached(home, asked)
    vault.create(SECRET)
    assert vault.load() == SECRET
    assert asked.count == 2
    report = vault.report()
    assert report.session_cache is None
    assert "NOT kept in this session" in report.detail
    vault.forget()
    with refused("identity_locked"):
        cached(home, None).load()


def test_a_time_that_cannot_be_set_keeps_nothing(home, monkeypatch):
    """Otherwise it would stay for as long as the session."""
    real = _kernel_keyring._call

    def refuse(name, *arguments):
        if name == "keyctl_set_timeout":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return real(name, *arguments)

    monkeypatch.setattr(_kernel_keyring, "_call", refuse)
    vault = cached(home, Asked())
    vault.create(SECRET)
    (name,) = names(home)
    with pytest.raises(OSError) as caught:
        _kernel_keyring.get(name, 1000)
    assert caught.value.errno in _kernel_keyring.GONE
    assert vault.report().session_cache is None


def test_in_front_of_a_tpm_with_a_pin(own_tpm, home):
    keyvault.open_vault(keyvault.TPM2, home, Asked(PIN), keyvault.Seal(pin=True)).create(SECRET)
    asked = Asked(PIN)
    for _ in range(3):
        assert keyvault.open_home(home, keyvault.TPM2, asked, 600).load() == SECRET
    assert asked.count == 1
    own_tpm.stop()
    # What the kernel keeps needs no TPM; the report does not hide that it is away.
    assert keyvault.open_home(home, None, None, 600).load() == SECRET
    assert keyvault.open_home(home, None, None, 600).report().available is False
    with contextlib.suppress(Exception):
        keyvault.open_home(home, None, None, 600).forget()


def test_destroy_leaves_nothing(home):
    vault = cached(home, Asked())
    vault.create(SECRET)
    (name,) = names(home)
    vault.destroy()
    assert list(home.iterdir()) == []
    with pytest.raises(OSError):
        _kernel_keyring.get(name, 1000)
