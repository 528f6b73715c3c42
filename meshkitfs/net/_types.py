"""What a caller tells an endpoint, and what it gets back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshkitfs.errors import MeshkitError

__all__ = ["Codes", "Limits", "Reply", "Tls"]

DEFAULT_CAP: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Codes:
    """Which error codes this server's failures have.

    ``unreachable``: there was no valid answer (network, TLS, deadline, a body too long or cut off), so
    nothing is known. ``refused``: the server answered, with a status that means no.
    """

    unreachable: str
    refused: str


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, how often, how much at a time.

    ``deadline_s`` bounds one try, from connecting to the last byte; ``overall_s`` all tries with the waiting
    between them. ``tries`` counts the first one too, and only what may be repeated is. ``cap`` bounds an
    answer's body in bytes, ``concurrency`` the requests under way.
    """

    deadline_s: float = 15.0
    overall_s: float = 60.0
    tries: int = 3
    concurrency: int = 8
    cap: int = DEFAULT_CAP


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server proves who it is, and this client who it is. There is no way to leave the check out.

    ``ca_file`` takes the place of the system's certificate authorities; ``certificate`` and ``key`` are PEM
    files for servers that want to see one (mutual TLS).
    """

    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that arrived whole. ``body`` is untrusted, and never longer than the cap."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    codes: Codes

    def json(self) -> Any:
        """Return the body as JSON. Raises the ``unreachable`` code: a page of text is no answer."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            kind = self.headers.get("content-type", "nothing said what")[:60]
            raise MeshkitError(self.codes.unreachable, f"the answer is not JSON ({kind})") from None
