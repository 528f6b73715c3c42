"""A real TPM 2.0 made of software (swtpm), on a Unix socket, for tests of the key vault `tpm2`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_DEADLINE = 20.0


def missing() -> list[str]:
    """What this needs that is not installed."""
    absent = [name for name in ("swtpm",) if shutil.which(name) is None]
    return absent + [name for name in ("tpm2_pytss",) if importlib.util.find_spec(name) is None]


class Swtpm:
    """One software TPM. Its memory is the directory ``state``; `clear` makes it another TPM."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "tpm"
        self.tcti = f"swtpm:path={self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None
        state = self.root / "state"
        state.mkdir(exist_ok=True)
        control = Path(f"{self.socket}.ctrl")
        for path in (self.socket, control):
            path.unlink(missing_ok=True)
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"),
                    *("--ctrl", f"type=unixio,path={control}", "--server", f"type=unixio,path={self.socket}"),
                    *("--flags", "not-need-init,startup-clear"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _DEADLINE
        while not (self.socket.exists() and control.exists()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"swtpm did not start: {(self.root / 'log').read_text()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """The TPM is away; what it remembers stays."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def replace(self) -> None:
        """Put another TPM in its place, as a new main board has it."""
        self.stop()
        shutil.rmtree(self.root / "state")
        self.start()

    def extend(self, register: int) -> None:
        """Measure something, as a changed boot loader would be."""
        from tpm2_pytss import ESAPI
        from tpm2_pytss.constants import ESYS_TR, TPM2_ALG
        from tpm2_pytss.types import TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

        value = TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=b"x" * 32))
        with ESAPI(self.tcti) as esapi:
            esapi.pcr_extend(ESYS_TR(register), TPML_DIGEST_VALUES([value]))

    def end_lockout(self) -> None:
        """What `tpm2_dictionarylockout --clear-lockout` does."""
        from tpm2_pytss import ESAPI
        from tpm2_pytss.constants import ESYS_TR

        with ESAPI(self.tcti) as esapi:
            esapi.dictionary_attack_lock_reset(ESYS_TR.LOCKOUT)

    def objects(self) -> int:
        """How many objects and sessions are loaded in it: what a program has left behind."""
        from tpm2_pytss import ESAPI
        from tpm2_pytss.constants import TPM2_CAP

        count = 0
        with ESAPI(self.tcti) as esapi:
            for first in (0x80000000, 0x02000000, 0x03000000):
                _, data = esapi.get_capability(TPM2_CAP.HANDLES, first, 16)
                count += len(list(data.data.handles))
        return count


@contextlib.contextmanager
def software_tpm() -> Iterator[Swtpm]:
    """A new software TPM, gone when the block ends. Skips where it cannot be had."""
    if missing():
        pytest.skip(f"NOT TESTED: the TPM; not installed: {', '.join(missing())}")
    # Not pytest's tmp_path: a socket's path may have 107 bytes only.
    root = Path(tempfile.mkdtemp(prefix="mktpm-"))
    tpm = Swtpm(root)
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    try:
        tpm.start()
        yield tpm
    finally:
        tpm.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(name="shared_tpm", scope="module")
def shared_tpm_fixture() -> Iterator[Swtpm]:
    """One for all tests of a file that leave it as it was."""
    with software_tpm() as tpm:
        yield tpm


@pytest.fixture(name="own_tpm")
def own_tpm_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Swtpm]:
    """One of this test's own, chosen."""
    with software_tpm() as tpm:
        monkeypatch.setenv("MESHKITFS_TPM", tpm.tcti)
        yield tpm
