"""The wrapping key in a file sealed with a passphrase (Argon2id, AES-256-GCM).

The file is four lines of ASCII:

    meshkitfs passphrase key vault 1
    $argon2id$v=19$m=262144,t=3,p=4$<salt>
    <commitment>$<nonce>$<sealed key>
    <SHA-256 of the three lines above, with their newlines, in hexadecimal>

Salt (16 bytes), commitment (32), nonce (12) and sealed key (48) are unpadded standard base64, as in a PHC
string. Argon2id (RFC 9106) gives 64 bytes: the first 32 are the AES key, the others the key of the
commitment, HMAC-SHA-256 over lines one and two, which are also the associated data of the seal.

The checksum tells damage from a wrong passphrase: it is no protection, anybody can recompute it. The
commitment tells a wrong passphrase from a changed seal, and makes the seal open under one passphrase only
(AES-GCM alone does not promise that).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from meshkitfs.core.secret_memory import scrub_thread, wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import (
    KEY_BYTES,
    NEW_PASSPHRASE_PROMPT,
    PASSPHRASE_FILE,
    PASSPHRASE_PROMPT,
    KeyVaultReport,
    Passphrase,
    ask,
    check_size,
)
from meshkitfs.keyvault._files import create_private, read_private, remove, vault_file
from meshkitfs.keyvault._text import b64, unb64

MIN_PASSPHRASE: Final = 8
"""Fewest characters of a new passphrase (NIST SP 800-63B)."""

_MAGIC: Final = "meshkitfs passphrase key vault 1"
_SALT, _COMMITMENT, _NONCE, _SEALED = 16, 32, 12, KEY_BYTES + 16
_HEADER: Final = re.compile(
    r"\$argon2id\$v=19\$m=([1-9]\d{0,9}),t=([1-9]\d{0,9}),p=([1-9]\d{0,9})\$([A-Za-z0-9+/]+)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Argon2id's cost: memory in KiB, passes, lanes."""

    memory: int = 256 * 1024
    passes: int = 3
    lanes: int = 4


# Nobody but us writes this file, so a header below the floor was put there to make guessing cheap. The
# ceiling keeps a changed header from taking all memory or hours.
FLOOR: Final = Cost(memory=64 * 1024, passes=3, lanes=1)
_CEILING: Final = Cost(memory=4 * 1024 * 1024, passes=64, lanes=64)
# Memory times passes (KiB): twenty times the product's own. Each of the two may be large, not both.
_MOST_WORK: Final = 16 * 1024 * 1024


class PassphraseFileVault:
    """``keyvault.passphrase-file``; the passphrase is asked for at each `create` and `load`."""

    kind: Final = PASSPHRASE_FILE

    def __init__(
        self,
        directory: Path,
        passphrase: Passphrase | None = None,
        fallback: str | None = None,
        cost: Cost | None = None,
    ) -> None:
        self._path = vault_file(directory, self.kind)
        self._passphrase = passphrase
        self._fallback = fallback
        self._cost = cost or Cost()
        self._unlocked = False

    def report(self) -> KeyVaultReport:
        detail = f"{self._path} is sealed with a passphrase (Argon2id); it is asked for at each start"
        available = True
        try:
            _parse(read_private(self._path), self._path)
        except MeshkitError as error:
            if error.code != "identity_not_found":
                available, detail = False, error.detail
        return KeyVaultReport(
            kind=self.kind,
            available=available,
            persistent=True,
            exportable=True,
            hardware_backed=False,
            # A passphrase proves knowledge; it may come from a file. That is not a person being there.
            user_presence=False,
            locked=not self._unlocked,
            fallback=self._fallback,
            detail=detail,
        )

    def create(self, secret: bytes) -> None:
        check_size(secret)
        sealed = seal_with_passphrase(self._ask(NEW_PASSPHRASE_PROMPT), secret, self._cost, self._path)
        create_private(self._path, sealed)
        self._unlocked = True

    def load(self) -> bytes:
        content = read_private(self._path)
        secret = open_with_passphrase(content, lambda: self._ask(PASSPHRASE_PROMPT), self._path)
        self._unlocked = True
        return secret

    def destroy(self) -> None:
        remove(self._path)
        self._unlocked = False

    def asks(self) -> str:
        return PASSPHRASE_PROMPT

    def forget(self) -> None:
        self._unlocked = False

    def _ask(self, prompt: str) -> str:
        return ask(self._passphrase, prompt)

    def __repr__(self) -> str:
        return f"PassphraseFileVault({str(self._path)!r})"


def seal_with_passphrase(phrase: str, secret: bytes, cost: Cost | None = None, path: Path = Path()) -> bytes:
    """Return the 32 bytes ``secret`` sealed with a new passphrase, in the form of this module's file.

    Raises MeshkitError: ``invalid_argument`` for a passphrase that is too short, ``keyvault_unavailable``
    without the memory for it, ``keyvault_refused`` for a ``cost`` out of bounds; ``path`` is for its detail.
    """
    cost = cost or Cost()
    if len(phrase) < MIN_PASSPHRASE:
        raise MeshkitError("invalid_argument", f"a passphrase has at least {MIN_PASSPHRASE} characters")
    _require_cost(cost, path)
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    header = f"$argon2id$v=19$m={cost.memory},t={cost.passes},p={cost.lanes}${b64(salt)}"
    aad = f"{_MAGIC}\n{header}\n".encode()
    key, commit_key = _stretch(phrase, salt, cost)
    try:
        commitment = hmac.digest(commit_key, aad, "sha256")
        sealed = AESGCM(key).encrypt(nonce, secret, aad)
    finally:
        wipe(key)
        wipe(commit_key)
    body = aad + f"{b64(commitment)}${b64(nonce)}${b64(sealed)}\n".encode()
    return body + f"{hashlib.sha256(body).hexdigest()}\n".encode()


def open_with_passphrase(content: bytes, phrase: Callable[[], str], path: Path) -> bytes:
    """Return the secret in what `seal_with_passphrase` made; ``phrase`` is asked when it looks whole.

    Raises MeshkitError: ``identity_corrupt`` for damage, ``keyvault_refused`` for a cost out of bounds,
    ``wrong_passphrase``; ``path`` is for their details.
    """
    file = _parse(content, path)
    key, commit_key = _stretch(phrase(), file.salt, file.cost)
    try:
        if not hmac.compare_digest(hmac.digest(commit_key, file.aad, "sha256"), file.commitment):
            raise MeshkitError("wrong_passphrase", str(path))
        return AESGCM(key).decrypt(file.nonce, file.sealed, file.aad)
    except InvalidTag:
        raise MeshkitError("identity_corrupt", f"{path} was changed") from None
    finally:
        wipe(key)
        wipe(commit_key)


@dataclass(frozen=True, slots=True)
class _File:
    cost: Cost
    salt: bytes
    aad: bytes
    commitment: bytes
    nonce: bytes
    sealed: bytes


def _parse(content: bytes, path: Path) -> _File:
    """Split the file. Damage is ``identity_corrupt``, a cost out of bounds ``keyvault_refused``."""
    try:
        magic, header, body, checksum, end = content.decode("ascii").split("\n")
        covered = f"{magic}\n{header}\n{body}\n".encode()
        commitment, nonce, sealed = body.split("$")
        match = _HEADER.fullmatch(header)
        if match is None or magic != _MAGIC or end or hashlib.sha256(covered).hexdigest() != checksum:
            raise ValueError
        cost = Cost(*(int(number) for number in match.group(1, 2, 3)))
        file = _File(
            cost=cost,
            salt=unb64(match.group(4), _SALT),
            aad=f"{magic}\n{header}\n".encode(),
            commitment=unb64(commitment, _COMMITMENT),
            nonce=unb64(nonce, _NONCE),
            sealed=unb64(sealed, _SEALED),
        )
    except ValueError:
        raise MeshkitError("identity_corrupt", f"{path} is damaged or of another kind") from None
    _require_cost(cost, path)
    return file


def _require_cost(cost: Cost, path: Path) -> None:
    for name in ("memory", "passes", "lanes"):
        value, lowest, highest = getattr(cost, name), getattr(FLOOR, name), getattr(_CEILING, name)
        if not lowest <= value <= highest:
            raise MeshkitError(
                "keyvault_refused", f"{path}: Argon2id {name} {value}, not {lowest}..{highest}"
            )
    if cost.memory * cost.passes > _MOST_WORK:
        raise MeshkitError(
            "keyvault_refused",
            f"{path}: Argon2id {cost.memory} KiB x {cost.passes}, not at most {_MOST_WORK}",
        )


def _stretch(phrase: str, salt: bytes, cost: Cost) -> tuple[bytes, bytes]:
    kdf = Argon2id(
        salt=salt,
        length=2 * KEY_BYTES,
        iterations=cost.passes,
        lanes=cost.lanes,
        memory_cost=cost.memory,
    )
    encoded = phrase.encode()
    try:
        both = kdf.derive(encoded)
    except MemoryError:
        raise MeshkitError(
            "keyvault_unavailable",
            f"opening it takes {cost.memory // 1024} MiB of memory, and they are not free",
        ) from None
    finally:
        wipe(encoded)
        scrub_thread()
    try:
        return both[:KEY_BYTES], both[KEY_BYTES:]
    finally:
        wipe(both)
