"""The key vault `tpm2` against a real TPM 2.0 made of software: what it promises, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

import pytest
from keyvault_support import PIN, SECRET, refused
from swtpm import own_tpm_fixture, shared_tpm_fixture  # noqa: F401 (fixtures)

from meshkitfs import keyvault
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import _tpm2, _tpm_device
from meshkitfs.keyvault._text import checked
from meshkitfs.keyvault._tpm_device import Nature, is_tpm_device


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def tpm(shared_tpm, monkeypatch):
    monkeypatch.setenv("MESHKITFS_TPM", shared_tpm.tcti)
    yield shared_tpm
    assert shared_tpm.objects() == 0  # a TPM without a resource manager has room for three


def vault_at(home, pin=PIN, **seal):
    seal.setdefault("pin", True)
    return keyvault.open_vault(keyvault.TPM2, home, lambda prompt: pin, keyvault.Seal(**seal))


def test_with_a_pin(tpm, home):
    vault_at(home).create(SECRET)
    fresh = vault_at(home)
    assert fresh.report().locked is True
    assert fresh.asks() == keyvault.PIN_PROMPT
    assert fresh.load() == SECRET
    assert fresh.report().locked is False
    fresh.forget()
    assert fresh.report().locked is True


def test_software_is_never_called_hardware(tpm, home):
    vault_at(home).create(SECRET)
    report = vault_at(home).report()
    assert report.hardware_backed is False
    assert "NOT a chip" in report.detail
    with refused("keyvault_too_weak"):
        keyvault.require(report, ["hardware_backed"])


def test_only_a_device_on_a_bus_counts_as_one(tmp_path):
    """There is no chip here: the kernel's list of devices is one that this test makes."""
    status = os.stat("/dev/null")
    entry = tmp_path / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    entry.mkdir()
    classes = tmp_path / "class"
    for name in ("tpmrm", "mem"):
        (classes / name).mkdir(parents=True)
    (entry / "subsystem").symlink_to(classes / "tpmrm")
    assert not is_tpm_device("/dev/null", tmp_path)  # on no bus: a program's proxy
    (entry / "device").mkdir()
    assert is_tpm_device("/dev/null", tmp_path)
    assert not is_tpm_device(str(tmp_path / "absent"), tmp_path)
    assert not is_tpm_device(__file__, tmp_path)
    (entry / "subsystem").unlink()
    (entry / "subsystem").symlink_to(classes / "mem")
    assert not is_tpm_device("/dev/null", tmp_path)
    assert not is_tpm_device("/dev/null")


def test_an_emulated_tpm_in_a_virtual_machine_is_no_chip(tpm, monkeypatch):
    """It is a device there, and says of itself what it is."""
    monkeypatch.setattr(_tpm_device, "is_tpm_device", lambda path: True)
    with _tpm_device.Tpm.opened(tpm.tcti) as open_tpm:
        assert open_tpm.nature().chip is False
        monkeypatch.setattr(_tpm_device, "_SIMULATORS", ())
        assert open_tpm.nature().chip is True


def test_a_chip_is_reported_and_ranks_first(tpm, home, monkeypatch):
    vault_at(home).create(SECRET)
    monkeypatch.setattr(_tpm_device.Tpm, "nature", lambda self: Nature(True, "IFX", 30, False, 600))
    report = vault_at(home).report()
    assert report.hardware_backed is True
    keyvault.require(report, ["hardware_backed", "persistent"])
    with refused("keyvault_too_weak"):
        keyvault.require(report, ["not_exportable"])  # the chip hands the key out
    assert keyvault.rank(report) > max(
        keyvault.rank(other) for other in keyvault.report_all(home.parent) if other.kind != keyvault.TPM2
    )


def test_wrong_pin_then_lockout_then_the_right_one(own_tpm, home):
    vault_at(home).create(SECRET)
    for left in ("takes 2 more wrong ones", "takes 1 more wrong ones", "takes no PIN now"):
        with refused("wrong_passphrase") as caught:
            vault_at(home, "314159").load()
        assert left in str(caught.value)
    with refused("keyvault_locked_out") as caught:
        vault_at(home, "314159").load()
    assert "1000 s" in str(caught.value)  # this TPM's recovery time
    asked = []
    vault = keyvault.open_vault(keyvault.TPM2, home, lambda prompt: asked.append(prompt) or PIN)
    with refused("keyvault_locked_out"):
        vault.load()
    assert asked == []  # before a person types it in vain
    assert "locked out" in vault.report().detail
    own_tpm.end_lockout()
    assert vault.load() == SECRET


def test_without_a_pin_another_programs_lockout_does_not_matter(own_tpm, home, tmp_path):
    with_pin = tmp_path / "other"
    with_pin.mkdir()
    vault_at(with_pin).create(SECRET)
    keyvault.open_vault(keyvault.TPM2, home).create(SECRET)
    for code in (*["wrong_passphrase"] * 3, "keyvault_locked_out"):
        with refused(code):
            vault_at(with_pin, "314159").load()
    assert keyvault.open_vault(keyvault.TPM2, home).load() == SECRET


@pytest.mark.parametrize("with_pin", [True, False])
def test_bound_to_how_the_machine_starts(own_tpm, home, with_pin):
    ask = (lambda prompt: PIN) if with_pin else None
    vault = keyvault.open_vault(keyvault.TPM2, home, ask, keyvault.Seal(with_pin, (16, 7)))
    vault.create(SECRET)
    assert vault.load() == SECRET
    assert "registers 7, 16" in vault_at(home).report().detail
    own_tpm.extend(8)
    assert vault.load() == SECRET
    own_tpm.extend(7)
    with refused("keyvault_pcr_changed"):
        vault.load()
    assert own_tpm.objects() == 0
    if with_pin:  # that was no wrong PIN
        assert "3 wrong ones" in vault.report().detail


def test_another_tpm(own_tpm, home):
    vault_at(home).create(SECRET)
    own_tpm.replace()
    with refused("keyvault_replaced") as caught:
        vault_at(home).load()
    assert "another storage key" in str(caught.value)
    assert "3 wrong ones" in vault_at(home).report().detail  # the PIN was not tried there


def test_a_key_of_another_tpm_in_this_ones_place(own_tpm, home, tmp_path):
    """The storage key's name says this TPM; the sealed part is another's."""
    vault_at(home).create(SECRET)
    theirs = (home / "keyvault.tpm2").read_text().split("\n")
    own_tpm.replace()
    other = tmp_path / "other"
    other.mkdir()
    vault_at(other).create(bytes(32))
    ours = (other / "keyvault.tpm2").read_text().split("\n")
    parts = [*theirs[2].split("$")[:2], ours[2].split("$")[2]]
    (home / "keyvault.tpm2").write_bytes(checked(*theirs[:2], "$".join(parts)))
    with refused("keyvault_replaced"):
        vault_at(home).load()


def test_a_tpm_that_was_restarted_is_the_same(own_tpm, home):
    vault_at(home, pcrs=(7,)).create(SECRET)
    own_tpm.stop()
    report = vault_at(home).report()
    assert (report.available, report.hardware_backed, report.locked) == (False, None, True)
    with refused("keyvault_unavailable"):
        vault_at(home).load()
    own_tpm.start()
    assert vault_at(home).load() == SECRET


def test_neither_the_pin_nor_the_key_crosses_the_bus_in_the_clear(own_tpm, home, monkeypatch, tmp_path):
    """Somebody listens between us and the TPM."""
    heard = bytearray()
    place = own_tpm.root / "tap"
    listeners = []

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard.extend(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(name):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{place}{name}")
        listener.listen()
        listeners.append(listener)

        def accept():
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                far = socket.socket(socket.AF_UNIX)
                far.connect(f"{own_tpm.socket}{name}")
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    for name in ("", ".ctrl"):
        serve(name)
    monkeypatch.setenv("MESHKITFS_TPM", f"swtpm:path={place}")
    try:
        vault_at(home).create(SECRET)
        assert vault_at(home).load() == SECRET
    finally:
        for listener in listeners:
            listener.close()
    assert len(heard) > 1000
    for secret in (SECRET[:12], PIN.encode(), _tpm_device._authorization(PIN)[:12]):
        assert secret not in heard


def test_a_short_new_pin_is_refused(tpm, home):
    with refused("invalid_argument"):
        vault_at(home, "12345").create(SECRET)
    assert list(home.iterdir()) == []


def test_nobody_to_ask_for_the_pin(tpm, home):
    vault_at(home).create(SECRET)
    with refused("identity_locked"):
        keyvault.open_vault(keyvault.TPM2, home).load()


@pytest.mark.parametrize(
    "tcti",
    [
        "cmd:touch /tmp/x", "tabrmd", "device:/etc/passwd", "swtpm:host=10.0.0.1,port=1", "swtpm:path=a",
        "swtpm:path=/a,port=1", "device:/dev/tpm0\n", "libtpms:", "pcap:device", "",
    ],
)  # fmt: skip
def test_nothing_that_runs_programs_or_leaves_this_machine_is_a_tpm(home, monkeypatch, tcti):
    monkeypatch.setenv("MESHKITFS_TPM", tcti)
    if not tcti:  # as if it were not set
        assert _tpm2._chosen() == _tpm_device.DEFAULT_TPM
        return
    with refused("invalid_argument"):
        vault_at(home).create(SECRET)
    # Nor out of a file that somebody has put there.
    (home / "keyvault.tpm2").write_bytes(checked(_tpm2._MAGIC, f"{tcti}$pin=1$pcrs=", "AA$AA$AA"))
    (home / "keyvault.tpm2").chmod(0o600)
    with refused("identity_corrupt"):
        vault_at(home).load()


@pytest.mark.parametrize("pcrs", [(24,), (-1,), (7, 7)])
def test_registers_that_are_none(pcrs):
    with refused("invalid_argument"):
        keyvault.Seal(pcrs=pcrs)


def test_no_tpm_on_this_machine(home, monkeypatch):
    monkeypatch.setenv("MESHKITFS_TPM", "device:/dev/tpmrm99")
    report = keyvault.open_vault(keyvault.TPM2, home).report()
    assert (report.available, report.hardware_backed) == (False, None)
    assert "/dev/tpmrm99 is not there" in report.detail
    with refused("keyvault_unavailable"):
        vault_at(home).create(SECRET)
    assert list(home.iterdir()) == []


def test_the_library_is_not_installed(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "tpm2_pytss", None)
    with refused("keyvault_unavailable") as caught:
        vault_at(home).create(SECRET)
    assert "meshkitfs[tpm]" in str(caught.value)


def test_a_tpm_that_never_answers(home, monkeypatch, tmp_path):
    """A socket that accepts and says nothing stands for a wedged one."""
    path = tmp_path / "t"
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    directory = os.open(tmp_path, os.O_PATH)
    try:
        short = f"/proc/self/fd/{directory}/t"
        for listener, name in zip(listeners, (short, f"{short}.ctrl"), strict=True):
            listener.bind(name)
            listener.listen()
        monkeypatch.setenv(
            "MESHKITFS_TPM", f"swtpm:path={path}" if len(str(path)) < 90 else f"swtpm:path={short}"
        )
        monkeypatch.setattr(_tpm2, "TPM_SECONDS", 0.2)
        with refused("keyvault_unavailable") as caught:
            vault_at(home).create(SECRET)
        assert "did not answer" in str(caught.value)
    finally:
        for listener in listeners:
            listener.close()
        os.close(directory)


def test_every_single_byte_of_damage_is_noticed_without_the_tpm(tpm, home):
    vault_at(home).create(SECRET)
    path = home / "keyvault.tpm2"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x01
        with refused("identity_corrupt"):
            _tpm2._parse(bytes(bad), path)
    for length in range(len(good)):
        with refused("identity_corrupt"):
            _tpm2._parse(good[:length], path)


@pytest.mark.parametrize(("old", "new"), [("pin=1", "pin=0"), ("pcrs=7", "pcrs="), ("pcrs=7", "pcrs=7,8")])
def test_a_file_that_asks_for_less_opens_nothing(own_tpm, home, old, new):
    """What it is sealed under is in the TPM's part; a right checksum does not help."""
    vault_at(home, pcrs=(7,)).create(SECRET)
    path = home / "keyvault.tpm2"
    lines = path.read_text().split("\n")[:3]
    assert old in lines[1]
    path.write_bytes(checked(lines[0], lines[1].replace(old, new), lines[2]))
    with pytest.raises(MeshkitError) as caught:
        vault_at(home).load()
    # Which of its checks the TPM makes first is its own affair.
    assert caught.value.code in ("wrong_passphrase", "keyvault_pcr_changed", "keyvault_unavailable")
