"""Small text files with a checksum: what damage is, is known before anybody is asked for a secret."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

from meshkitfs.errors import MeshkitError


def checked(*lines: str) -> bytes:
    """Return the lines, and a last one with the SHA-256 of them all in hexadecimal.

    The checksum tells damage from a wrong secret. It is no protection: anybody can recompute it.
    """
    body = "".join(f"{line}\n" for line in lines).encode()
    return body + f"{hashlib.sha256(body).hexdigest()}\n".encode()


def lines_of(content: bytes, magic: str, path: Path) -> list[str]:
    """Return the lines of such a file between its first, which must be ``magic``, and the checksum.

    Raises MeshkitError ``identity_corrupt``.
    """
    lines = content.decode("ascii", "replace").split("\n")
    if lines[0] != magic or len(lines) < 3 or checked(*lines[:-2]) != content:
        raise damaged(path)
    return lines[1:-2]


def damaged(path: Path) -> MeshkitError:
    return MeshkitError("identity_corrupt", f"{path} is damaged or of another kind")


def b64(data: bytes) -> str:
    """Unpadded standard base64, as in a PHC string."""
    return base64.b64encode(data).decode().rstrip("=")


def unb64(text: str, size: int | None = None) -> bytes:
    """The reverse of `b64`, and of nothing else; ValueError, also for another ``size``."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError from error
    if b64(data) != text or (size is not None and len(data) != size):
        raise ValueError
    return data
