"""A key vault that asks once per session: its key stays in the kernel's session keyring for a while.

What the kernel holds is sealed with AES-256-GCM under a key derived (HKDF, ``mk/session-cache@1``) from a
random token in the home's file ``session-cache``; the associated data are the key vault's kind and the hash
of its file. So neither part is of use alone, removing the token locks every session at once, and a key vault
that was changed is asked again. Nothing here is persistent: the kernel's part is gone with the session, the
machine's restart, or the time, whichever is first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import _kernel_keyring as kernel
from meshkitfs.keyvault._api import KEY_BYTES, KeyVault, KeyVaultReport, derive_key
from meshkitfs.keyvault._files import create_private, read_private, remove, vault_file

CACHE_SECONDS: Final = 8 * 3600
"""How long the key stays in the session, unless told otherwise."""
KERNEL: Final = "kernel"

_log = logging.getLogger(__name__)
_TOKEN_FILE: Final = "session-cache"  # noqa: S105
_MAGIC: Final = "meshkitfs session cache 1\n"
_LABEL: Final = "mk/session-cache@1"
_NONCE: Final = 12
_PAYLOAD: Final = _NONCE + KEY_BYTES + 16


class SessionCache:
    """Another key vault, with its key kept in this session for ``seconds`` after it was opened.

    Where the kernel has no keyring (some containers), it asks each time, and the report says so.
    """

    def __init__(self, inner: KeyVault, directory: Path, seconds: int = CACHE_SECONDS) -> None:
        self._inner = inner
        self._file = vault_file(directory, inner.kind)
        self._token = directory / _TOKEN_FILE
        self._seconds = seconds
        self._problem = ""

    @property
    def kind(self) -> str:
        return self._inner.kind

    def report(self) -> KeyVaultReport:
        report = self._inner.report()
        held = report.available and self._holds()
        detail = (
            f"{report.detail}; once opened, it stays in this session's kernel keyring for {self._seconds} s"
        )
        if self._problem:
            detail = f"{report.detail}; it is NOT kept in this session: {self._problem}"
        return replace(
            report,
            locked=report.locked and not held,
            session_cache=None if self._problem else KERNEL,
            detail=detail,
        )

    def create(self, secret: bytes) -> None:
        self._inner.create(secret)
        self._keep(secret)

    def load(self) -> bytes:
        secret = self._cached()
        if secret is None:
            secret = self._inner.load()
            self._keep(secret)
        return secret

    def destroy(self) -> None:
        self.forget()
        self._inner.destroy()

    def asks(self) -> str | None:
        return None if self._holds() else self._inner.asks()

    def forget(self) -> None:
        """Take the key out of this session, and make what other sessions keep useless."""
        try:
            if (token := self._read_token()) is not None:
                kernel.drop(_name(token))
        except (OSError, MeshkitError) as error:
            if not isinstance(error, OSError) or error.errno not in kernel.GONE:
                _log.warning("the session's key could not be dropped: %s", error)
        try:
            remove(self._token)
        except MeshkitError as error:
            _log.warning("the session's key could not be locked: %s (%s)", error.code, error.detail)
        self._inner.forget()

    def _holds(self) -> bool:
        """Whether this session has the key, and it may be used."""
        try:
            secret = self._cached()
        except MeshkitError:
            return False
        if secret is None:
            return False
        wipe(secret)
        return True

    def _cached(self) -> bytes | None:
        """Return the key if this session has it. Raises MeshkitError if the key vault's file is refused."""
        bound = self._bound()
        token = self._read_token()
        if token is None:
            return None
        try:
            payload = kernel.get(_name(token), _PAYLOAD)
        except OSError as error:
            if error.errno not in kernel.GONE:
                self._problem = error.strerror or type(error).__name__
            return None
        try:
            secret = AESGCM(derive_key(token, _LABEL)).decrypt(payload[:_NONCE], payload[_NONCE:], bound)
        except (InvalidTag, ValueError):
            return None
        return secret if len(secret) == KEY_BYTES else None

    def _keep(self, secret: bytes) -> None:
        """Keep the key in this session; where that is not possible it is asked for again, no more."""
        try:
            token = self._read_token()
            if token is None:
                token = secrets.token_bytes(KEY_BYTES)
                remove(self._token)
                create_private(self._token, f"{_MAGIC}{token.hex()}\n".encode())
            nonce = os.urandom(_NONCE)
            sealed = AESGCM(derive_key(token, _LABEL)).encrypt(nonce, secret, self._bound())
            kernel.put(_name(token), nonce + sealed, self._seconds)
            self._problem = ""
        except OSError as error:
            self._problem = error.strerror or type(error).__name__
        except MeshkitError as error:
            self._problem = error.detail
        if self._problem:
            _log.warning("the key is not kept in this session: %s", self._problem)

    def _read_token(self) -> bytes | None:
        """Return the token; None if there is none, or none that may be used."""
        try:
            content = read_private(self._token)
        except MeshkitError:
            return None
        try:
            token = bytes.fromhex(content.removeprefix(_MAGIC.encode()).decode("ascii"))
        except ValueError:
            return None
        return token if content == f"{_MAGIC}{token.hex()}\n".encode() and len(token) == KEY_BYTES else None

    def _bound(self) -> bytes:
        return f"{self.kind}\n".encode() + hashlib.sha256(read_private(self._file)).digest()

    def __repr__(self) -> str:
        return f"SessionCache({self._inner!r})"


def _name(token: bytes) -> str:
    return f"meshkitfs:{hashlib.sha256(token).hexdigest()[:32]}"
