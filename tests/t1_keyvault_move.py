"""Moving a key between key vaults: never weaker unasked, and a kill at any moment costs nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from keyvault_support import SECRET, new_answers, old_answers, refused, stretch_cheaply
from secret_service import secret_service_fixture  # noqa: F401 (a fixture)
from swtpm import shared_tpm_fixture  # noqa: F401 (a fixture)

from meshkitfs import keyvault
from meshkitfs.daemon import config
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import _migrate, _tpm_device
from meshkitfs.keyvault._move import Move, under_way
from meshkitfs.keyvault._tpm_device import Nature

K = keyvault


@pytest.fixture(autouse=True)
def cheap_argon2(monkeypatch):
    stretch_cheaply(monkeypatch.setattr)


@pytest.fixture
def place():
    """A directory in memory where there is one: what is killed here is a process, not the machine."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture
def home(place):
    path = place / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def back_ends(request, tmp_path, monkeypatch):
    """Makes back ends of the given kinds be there."""

    def prepare(*kinds):
        if K.SECRET_SERVICE in kinds:
            request.getfixturevalue("secret_service")
        if K.TPM2 in kinds:
            monkeypatch.setenv("MESHKITFS_TPM", request.getfixturevalue("shared_tpm").tcti)
        if K.SYSTEMD_CREDENTIAL in kinds:
            (tmp_path / "meshkitfs-key").write_bytes(secrets.token_bytes(32))
            (tmp_path / "meshkitfs-key").chmod(0o400)
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    return prepare


def set_up(home, kind):
    """A home with a key and a configuration that names where it is."""
    K.open_vault(kind, home, old_answers).create(SECRET)
    path = home / "meshkit.config.json"
    path.write_text(json.dumps({"version": 1, "identity": "alice", "keyVault": {"type": kind}}))
    return path


def move(home, to, **options):
    options.setdefault("weaker", True)
    return K.migrate(
        home,
        to,
        lambda kind: config.set_key_vault(home / "meshkit.config.json", kind),
        old_passphrase=options.pop("old", old_answers),
        new_passphrase=options.pop("new", new_answers),
        **options,
    )


def opened(home, answers):
    """The key as the next start takes it: by the configuration."""
    chosen = config.load(home / "meshkit.config.json").key_vault
    return K.open_home(home, chosen.type, answers).load()


def left_in(home):
    return sorted(path.name for path in home.iterdir())


PAIRS = [
    (K.PLAIN_FILE, K.PASSPHRASE_FILE),
    (K.PASSPHRASE_FILE, K.SECRET_SERVICE),
    (K.SECRET_SERVICE, K.PASSPHRASE_FILE),
    (K.PASSPHRASE_FILE, K.TPM2),
    (K.TPM2, K.PLAIN_FILE),
    (K.PLAIN_FILE, K.SYSTEMD_CREDENTIAL),
    (K.SYSTEMD_CREDENTIAL, K.SECRET_SERVICE),
]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_the_key_moves_and_the_old_place_is_empty(home, back_ends, old, new):
    back_ends(old, new)
    set_up(home, old)
    report = move(home, new)
    assert report.kind == new
    assert opened(home, new_answers) == SECRET
    assert left_in(home) == [f"keyvault.{new}", "meshkit.config.json"]
    assert K.existing(home) == new
    if old == K.SECRET_SERVICE:
        assert stored_items() == 0


def stored_items():
    import secretstorage

    with contextlib.closing(secretstorage.dbus_init()) as connection:
        return len(list(secretstorage.search_items(connection, {"service": "meshkitfs"})))


# -- a kill between any two steps --------------------------------------------------------------------


@pytest.fixture
def mover():
    """Moves the key of a home and is killed at its n-th step; see key_mover.py. Says whether it was."""
    processes = []

    def killed_at(number, home, to):
        if not processes:  # not before the back ends are there
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("key_mover.py"))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                )
            )
        (process,) = processes
        print(json.dumps({"home": str(home), "to": to, "number": number}), file=process.stdin, flush=True)
        answer = process.stdout.readline().strip()
        assert answer in ("killed", "done"), answer
        return answer == "killed"

    yield killed_at
    for process in processes:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _some_are_long():
    """One of each sort of back end on each side is enough for every day."""
    quick = (PAIRS[0], PAIRS[1], PAIRS[4])
    for old, new in PAIRS:
        marks = () if (old, new) in quick else (pytest.mark.long,)
        yield pytest.param(old, new, marks=marks, id=f"{old}-{new}")


@pytest.mark.parametrize(("old", "new"), list(_some_are_long()))
def test_killed_at_every_step(place, back_ends, mover, old, new):
    back_ends(old, new)
    for number in itertools.count(1):
        one = place / f"home{number}"
        one.mkdir(mode=0o700)
        set_up(one, old)
        if not mover(number, one, new):
            assert opened(one, new_answers) == SECRET
            break
        # It opens as before or as after, by the key vault that counts, with no command in between.
        unfinished = under_way(one)
        switched = unfinished.switched if unfinished else (one / f"keyvault.{new}").exists()
        assert opened(one, new_answers if switched else old_answers) == SECRET, number
        # Whatever else is there holds the same key, or is no key vault yet.
        for kind, answers in ((old, old_answers), (new, new_answers)):
            try:
                assert _migrate.make(kind, one, answers).load() == SECRET, number
            except MeshkitError as error:
                assert error.code in ("identity_not_found", "keyvault_unavailable"), (number, error)
        # The same command again; where all was done but the cleaning up, that is said.
        try:
            move(one, new)
        except MeshkitError as error:
            assert (error.code, unfinished) == ("already_initialized", None), number
        assert opened(one, new_answers) == SECRET, number
        # A half-written configuration may stay; it holds no secret.
        kept = [name for name in left_in(one) if not name.startswith(".meshkit.config.json.")]
        assert kept == [f"keyvault.{new}", "meshkit.config.json"], number
        if old == K.SECRET_SERVICE:
            assert stored_items() == 0, number
    assert number > 12  # there were steps to be killed at


@pytest.mark.parametrize("switched", [False, True])
def test_going_somewhere_else_after_a_cut(home, mover, switched):
    """A move to one kind was cut off; the next command names another."""
    set_up(home, K.PLAIN_FILE)
    _cut(mover, home, K.PASSPHRASE_FILE, switched)
    # passphrase-file may count by now; it is the present one then, and its passphrase the old one.
    answers = new_answers if switched else old_answers
    if switched:
        with refused("already_initialized"):
            move(home, K.PASSPHRASE_FILE, old=answers) and move(home, K.PASSPHRASE_FILE)
    else:
        with refused("already_initialized"):
            move(home, K.PLAIN_FILE, old=answers)
        assert left_in(home) == ["keyvault.plain-file", "meshkit.config.json"]
    assert opened(home, answers) == SECRET


def _cut(mover, home, new, switched):
    """Leave the home as a kill does, before or after the new key vault counts."""
    for number in itertools.count(1):
        before = {path: path.read_bytes() for path in home.iterdir()}
        assert mover(number, home, new)
        state = under_way(home)
        if state is not None and state.switched is switched and (home / f"keyvault.{new}").exists():
            return
        for path in home.iterdir():
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
            path.chmod(0o600)


def test_after_a_cut_the_wrong_passphrase_destroys_nothing(home, mover):
    set_up(home, K.PLAIN_FILE)
    _cut(mover, home, K.PASSPHRASE_FILE, switched=True)
    with refused("wrong_passphrase"):
        move(home, K.PASSPHRASE_FILE, new=lambda prompt: "something else")
    assert (home / "keyvault.plain-file").exists()
    move(home, K.PASSPHRASE_FILE)
    assert opened(home, new_answers) == SECRET


# -- what is refused ---------------------------------------------------------------------------------


def test_nothing_moves_to_a_weaker_place_unasked(home, back_ends):
    kinds = (K.TPM2, K.SECRET_SERVICE, K.PASSPHRASE_FILE, K.SYSTEMD_CREDENTIAL, K.PLAIN_FILE)
    back_ends(*kinds)
    # Without a chip a TPM is no more than a file.
    ranks = {K.SECRET_SERVICE: 3, K.PASSPHRASE_FILE: 2, K.SYSTEMD_CREDENTIAL: 1, K.TPM2: 1, K.PLAIN_FILE: 0}
    for old, new in itertools.permutations(kinds, 2):
        one = home / f"{old}-{new}"
        one.mkdir(mode=0o700)
        set_up(one, old)
        if ranks[new] < ranks[old]:
            with refused("keyvault_refused") as caught:
                move(one, new, weaker=False)
            assert "--weaker" in str(caught.value)
            assert left_in(one) == [f"keyvault.{old}", "meshkit.config.json"]
            assert opened(one, old_answers) == SECRET
        else:
            assert move(one, new, weaker=False).kind == new


def test_from_a_chip_everything_is_weaker(home, back_ends, monkeypatch):
    back_ends(K.TPM2, K.SECRET_SERVICE)
    monkeypatch.setattr(_tpm_device.Tpm, "nature", lambda self: Nature(True, "IFX", 30, False, 600))
    set_up(home, K.TPM2)
    with refused("keyvault_refused"):
        move(home, K.SECRET_SERVICE, weaker=False)


def test_what_is_demanded_is_not_given_up_even_with_weaker(home):
    set_up(home, K.PASSPHRASE_FILE)
    with refused("keyvault_too_weak"):
        move(home, K.PLAIN_FILE, demands=["hardware_backed"])
    assert opened(home, old_answers) == SECRET


def test_a_back_end_that_is_not_there(home, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("MESHKITFS_TPM", "device:/dev/tpmrm99")
    set_up(home, K.PLAIN_FILE)
    for kind in (K.SYSTEMD_CREDENTIAL, K.SECRET_SERVICE, K.TPM2):
        with refused("keyvault_unavailable"):
            move(home, kind)
        assert left_in(home) == ["keyvault.plain-file", "meshkit.config.json"]


def test_the_old_one_that_does_not_open_is_kept(home):
    set_up(home, K.PASSPHRASE_FILE)
    with refused("wrong_passphrase"):
        move(home, K.PLAIN_FILE, old=lambda prompt: "something else")
    assert left_in(home) == ["keyvault.passphrase-file", "meshkit.config.json"]


def test_to_where_it_is_already(home):
    set_up(home, K.PLAIN_FILE)
    with refused("already_initialized"):
        move(home, K.PLAIN_FILE)


def test_a_file_that_no_move_made_is_not_replaced(home):
    set_up(home, K.PASSPHRASE_FILE)
    stranger = home / "keyvault.plain-file"
    stranger.write_bytes(b"a key vault that was copied here by hand")
    stranger.chmod(0o600)
    with refused("already_initialized"):
        move(home, K.PLAIN_FILE)
    assert stranger.read_bytes() == b"a key vault that was copied here by hand"
    assert opened(home, old_answers) == SECRET


def test_a_new_key_vault_that_gives_back_another_key_costs_nothing(home, monkeypatch):
    set_up(home, K.PASSPHRASE_FILE)
    from meshkitfs.keyvault._plain_file import PlainFileVault

    with monkeypatch.context() as patched:
        patched.setattr(PlainFileVault, "load", lambda self: bytes(32))
        with refused("keyvault_unavailable"):
            move(home, K.PLAIN_FILE)
    assert opened(home, old_answers) == SECRET
    assert K.existing(home) == K.PASSPHRASE_FILE


def test_a_full_disk_costs_nothing(home, monkeypatch):
    set_up(home, K.PLAIN_FILE)
    real = os.fsync
    for number in range(1, 8):
        count = itertools.count(1)

        def no_room(fd, number=number, count=count):
            if next(count) >= number:
                raise OSError(28, os.strerror(28))
            real(fd)

        monkeypatch.setattr(os, "fsync", no_room)
        with contextlib.suppress(MeshkitError):
            move(home, K.PASSPHRASE_FILE)
            break
        monkeypatch.setattr(os, "fsync", real)
        switched = K.existing(home) == K.PASSPHRASE_FILE
        assert opened(home, new_answers if switched else old_answers) == SECRET, number
    monkeypatch.setattr(os, "fsync", real)
    with contextlib.suppress(MeshkitError):
        move(home, K.PASSPHRASE_FILE)
    assert opened(home, new_answers) == SECRET


# -- where it stands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"x", b"meshkitfs key move 1\nplain-file$passphrase-file$copying\n" + b"0" * 64 + b"\n"]
)
def test_a_note_that_is_damaged_opens_nothing(home, content):
    """Which key vault counts is not known, so none is taken for it."""
    path = set_up(home, K.PLAIN_FILE)
    (home / "key-move").write_bytes(content)
    (home / "key-move").chmod(0o600)
    with refused("identity_corrupt"):
        K.open_home(home, config.load(path).key_vault.type, old_answers)
    with refused("identity_corrupt"):
        move(home, K.PASSPHRASE_FILE)


def test_a_note_with_other_kinds_is_damaged(home):
    for old, new in (("plain-file", "plain-file"), ("keychain", "plain-file")):
        Move(old, new).write(home)
        with refused("identity_corrupt"):
            under_way(home)


def test_the_configuration_keeps_everything_else(home):
    path = set_up(home, K.PASSPHRASE_FILE)
    value = {
        "version": 1, "identity": "alice", "writing": {"fsync": "journal"}, "mount": {"point": "~/x"},
        "keyVault": {"type": "passphrase-file", "sessionCache": "kernel", "sessionCacheSeconds": 600,
                     "require": ["persistent"]},
    }  # fmt: skip
    path.write_text(json.dumps(value))
    path.chmod(0o640)
    move(home, K.PLAIN_FILE, demands=["persistent"])
    assert json.loads(path.read_text()) == value | {
        "keyVault": {"type": "plain-file", "require": ["persistent"]}
    }
    assert path.stat().st_mode & 0o777 == 0o640
    move(home, K.PASSPHRASE_FILE)
    assert json.loads(path.read_text())["keyVault"] == {"type": "passphrase-file", "require": ["persistent"]}


def test_a_configuration_that_names_no_key_vault_names_it_afterwards(home):
    path = set_up(home, K.PLAIN_FILE)
    path.write_text('{"version": 1}')
    move(home, K.PASSPHRASE_FILE)
    assert json.loads(path.read_text()) == {"version": 1, "keyVault": {"type": "passphrase-file"}}


def test_a_demand_that_nobody_knows_is_not_met(home):
    set_up(home, K.PLAIN_FILE)
    report = K.open_vault(K.PLAIN_FILE, home).report()
    K.require(report, [])
    K.require(report, ["persistent"])
    for demand in ("hardware_backed", "not_exportable", "user_presence", "fireproof"):
        with refused("keyvault_too_weak"):
            K.require(report, ["persistent", demand])
