"""Tokens for servers: taken from the environment or a file when they are needed, and never shown."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from meshkitfs.errors import MeshkitError

__all__ = ["BearerAuth", "Secret", "SecretSource"]

_MAX_BYTES: Final = 16384


class Secret:
    """A string that does not show itself in logs, exceptions or reprs; `reveal` is for the wire only."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def checked(cls, text: str, where: str) -> Secret:
        """Return the secret in ``text``, without the white space around it.

        Raises invalid_config, naming ``where`` it is from, if it is empty or could not be sent as a header.
        """
        text = text.strip()
        if not text or not text.isascii() or not text.isprintable():
            raise MeshkitError("invalid_config", f"{where} holds no token")
        return cls(text)

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a Secret cannot be copied or pickled")


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where a secret is: the name of an environment variable, or a file that only its owner can read."""

    env: str | None = None
    file: Path | None = None

    def load(self) -> Secret | None:
        """Return the secret; None if no place was named.

        Raises invalid_config: the place is empty or unreadable, or the file is open to others. A server that
        should see a token is never asked without one.
        """
        if self.env is not None:
            text = os.environ.get(self.env, "")
            where = f"the environment variable {self.env}"
        elif self.file is not None:
            where = str(self.file)
            text = self._read()
        else:
            return None
        return Secret.checked(text, where)

    def _read(self) -> str:
        assert self.file is not None
        try:
            with self.file.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise MeshkitError("invalid_config", f"{self.file} can be read by others: chmod 600 it")
                return file.read(_MAX_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise MeshkitError("invalid_config", f"{self.file}: {error.strerror}") from None


class BearerAuth(httpx.Auth):
    """``Authorization: Bearer …`` (RFC 6750)."""

    def __init__(self, token: Secret) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token.reveal()}"
        yield request
