"""The wrapping key sealed by a TPM 2.0: only that one opens it again.

The home keeps ``keyvault.tpm2``, four lines of ASCII:

    meshkitfs tpm2 key vault 1
    <where the TPM is>$pin=<0|1>$pcrs=<numbers, comma-separated>
    <public part>$<private part>$<name of the storage key>
    <SHA-256 of the lines above, in hexadecimal>

The parts are the TPM's own (TPM2B_PUBLIC, TPM2B_PRIVATE), in unpadded base64. Nothing in the file is secret,
and nothing in it is believed: with another PIN, other registers or another TPM the key does not come out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import (
    NEW_PIN_PROMPT,
    PIN_PROMPT,
    TPM2,
    KeyVaultReport,
    Passphrase,
    ask,
    check_size,
)
from meshkitfs.keyvault._deadline import within
from meshkitfs.keyvault._files import create_private, read_private, remove, vault_file
from meshkitfs.keyvault._text import b64, checked, damaged, lines_of, unb64
from meshkitfs.keyvault._tpm_device import DEFAULT_TPM, Nature, Sealed, Tpm, checked_tcti

TPM_VARIABLE: Final = "MESHKITFS_TPM"
"""The environment variable that names the TPM for a new key."""
MIN_PIN: Final = 6
"""Fewest characters of a new PIN. The TPM itself limits guessing."""
TPM_SECONDS: Final = 30.0
"""Longest wait for a TPM."""
MAX_PCR: Final = 23

_MAGIC: Final = "meshkitfs tpm2 key vault 1"
_HEAD: Final = re.compile(r"([^$]+)\$pin=([01])\$pcrs=((?:\d{1,2}(?:,\d{1,2})*)?)", re.ASCII)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Seal:
    """What a new key is sealed under: a PIN or not, and registers (PCRs, 0 to 23) that must not change."""

    pin: bool = False
    pcrs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.pcrs)) != len(self.pcrs) or not all(0 <= number <= MAX_PCR for number in self.pcrs):
            raise MeshkitError("invalid_argument", f"registers of a TPM are numbers from 0 to {MAX_PCR}")


@dataclass(frozen=True, slots=True)
class _File:
    tcti: str
    seal: Seal
    sealed: Sealed


class Tpm2Vault:
    """``keyvault.tpm2``; a PIN is asked for at each `create` and `load`, if there is one."""

    kind: Final = TPM2

    def __init__(
        self,
        directory: Path,
        passphrase: Passphrase | None = None,
        fallback: str | None = None,
        seal: Seal | None = None,
    ) -> None:
        """``seal`` says how a new key is sealed; one that exists says it itself."""
        self._path = vault_file(directory, self.kind)
        self._passphrase = passphrase
        self._fallback = fallback
        self._seal = seal or Seal()
        self._unlocked = False

    def report(self) -> KeyVaultReport:
        try:
            file = self._read()
        except MeshkitError as error:
            if error.code != "identity_not_found":
                return KeyVaultReport.absent(self.kind, self._fallback, error.detail)
            file = None
        try:
            tcti = file.tcti if file else _chosen()
            nature = _within(tcti, lambda: _with(tcti, Tpm.nature))
        except MeshkitError as error:
            return KeyVaultReport.absent(self.kind, self._fallback, error.detail)
        pin = (file.seal if file else self._seal).pin
        return KeyVaultReport(
            kind=self.kind,
            available=True,
            persistent=True,
            # The chip hands the key out, to any program that has what it is sealed under.
            exportable=True,
            hardware_backed=nature.chip,
            # A PIN proves knowledge; it may come from a file. That is not a person being there.
            user_presence=False,
            locked=pin and not self._unlocked,
            fallback=self._fallback,
            detail=_described(tcti, nature, file.seal if file else self._seal),
        )

    def create(self, secret: bytes) -> None:
        check_size(secret)
        if os.path.lexists(self._path):
            raise MeshkitError("already_initialized", f"{self._path} exists")
        tcti, seal = _chosen(), self._seal
        pin = None
        if seal.pin:
            pin = ask(self._passphrase, NEW_PIN_PROMPT)
            if len(pin) < MIN_PIN:
                raise MeshkitError("invalid_argument", f"a PIN has at least {MIN_PIN} characters")

        def work(tpm: Tpm) -> Sealed:
            sealed = tpm.seal(secret, pin, seal.pcrs)
            if tpm.unseal(sealed, pin, seal.pcrs) != secret:
                raise MeshkitError("keyvault_unavailable", f"the TPM at {tcti} did not keep the key")
            return sealed

        sealed = _within(tcti, lambda: _with(tcti, work))
        numbers = ",".join(map(str, sorted(seal.pcrs)))
        head = f"{tcti}$pin={int(seal.pin)}$pcrs={numbers}"
        body = "$".join(b64(part) for part in (sealed.public, sealed.private, sealed.parent))
        create_private(self._path, checked(_MAGIC, head, body))
        self._unlocked = True

    def load(self) -> bytes:
        file = self._read()
        tcti, seal = file.tcti, file.seal
        nature = _within(tcti, lambda: _with(tcti, Tpm.nature))
        if seal.pin and nature.lockout:
            raise MeshkitError("keyvault_locked_out", _wait(tcti, nature))  # before anybody is asked
        pin = ask(self._passphrase, PIN_PROMPT) if seal.pin else None
        try:
            secret = _within(tcti, lambda: _with(tcti, lambda tpm: tpm.unseal(file.sealed, pin, seal.pcrs)))
        except MeshkitError as error:
            if error.code not in ("wrong_passphrase", "keyvault_locked_out"):
                raise
            nature = _within(tcti, lambda: _with(tcti, Tpm.nature))
            raise MeshkitError(error.code, _wait(tcti, nature)) from None
        self._unlocked = True
        return secret

    def destroy(self) -> None:
        """Remove the home's file; the TPM keeps nothing of the key."""
        remove(self._path)
        self._unlocked = False

    def asks(self) -> str | None:
        try:
            return PIN_PROMPT if self._read().seal.pin else None
        except MeshkitError:
            return None

    def forget(self) -> None:
        self._unlocked = False

    def _read(self) -> _File:
        return _parse(read_private(self._path), self._path)

    def __repr__(self) -> str:
        return f"Tpm2Vault({str(self._path)!r})"


def _parse(content: bytes, path: Path) -> _File:
    try:
        head, body = lines_of(content, _MAGIC, path)
        match = _HEAD.fullmatch(head)
        if match is None:
            raise ValueError
        public, private, parent = (unb64(part) for part in body.split("$"))
        numbers = tuple(int(number) for number in match[3].split(",") if number)
        return _File(checked_tcti(match[1]), Seal(match[2] == "1", numbers), Sealed(public, private, parent))
    except (ValueError, MeshkitError):
        raise damaged(path) from None


def _chosen() -> str:
    return checked_tcti(os.environ.get(TPM_VARIABLE) or DEFAULT_TPM)


def _described(tcti: str, nature: Nature, seal: Seal) -> str:
    what = "a chip" if nature.chip else "software that answers as a TPM, NOT a chip"
    text = f"sealed by the TPM {nature.name} at {tcti} ({what})"
    if seal.pin:
        text += f", with a PIN ({nature.tries} wrong ones until it takes no more)"
        text += "; it is locked out now" if nature.lockout else ""
    else:
        text += ", without a PIN: every program that may use the TPM and read this home can open it"
    if seal.pcrs:
        text += f", bound to how this machine starts (registers {', '.join(map(str, seal.pcrs))})"
    return text


def _wait(tcti: str, nature: Nature) -> str:
    if nature.lockout or not nature.tries:
        return f"the TPM at {tcti} takes no PIN now; one more every {nature.interval} s"
    return f"the TPM at {tcti} takes {nature.tries} more wrong ones before it locks itself"


def _with(tcti: str, work: Callable[[Tpm], _T]) -> _T:
    with Tpm.opened(tcti) as tpm:
        return work(tpm)


def _within(tcti: str, work: Callable[[], _T]) -> _T:
    late = MeshkitError(
        "keyvault_unavailable", f"the TPM at {tcti} did not answer within {TPM_SECONDS:.0f} s"
    )
    return within(TPM_SECONDS, work, late)
