"""A file with an identity in it: exported under a passphrase, or for recovery under words.

    magic (5) | kind (1) | size of the header (2) | header | sealed content | SHA-256 of all that (32)

``kind`` is ``X`` or ``R``. The content is sealed with Cobblestone-256. Of an export, the header is a random
key sealed with the passphrase, as the passphrase key vault keeps its own (Argon2id with its floor and
ceiling). Of a recovery file, it is a salt, and the key comes from 256 random bits that the words spell.

The checksum tells damage from a wrong key: it is no protection, anybody can recompute it. The seal is bound
to the header by its context, and its commitment makes it open under one key only.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshkitfs import keyvault
from meshkitfs.core import cbor, cobblestone
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

__all__ = ["EXPORT", "RECOVERY", "finish", "open_export", "open_recovery", "recovery_key", "seal"]

EXPORT: Final = b"X"
RECOVERY: Final = b"R"
SALT_BYTES: Final = 32
WORDS_BYTES: Final = 32

_MAGIC: Final = b"MKIX\x01"
_LABEL: Final = b"mk/identity-export@1\0"
_WORDS_INFO: Final = b"mk/recovery-words@1"
_SUM: Final = 32
_HEADER_MOST: Final = 4096
# More than any home remembers, and little enough to be held in memory (bytes).
FILE_MOST: Final = 256 << 20


def recovery_key(secret: bytes, salt: bytes) -> bytes:
    """Return the key of a recovery file from the 32 bytes that its words spell."""
    return HKDF(hashes.SHA256(), 32, salt, _WORDS_INFO).derive(secret)


def seal(kind: bytes, header: bytes, key: bytes | memoryview, content: dict[str, Any]) -> bytes:
    """Return the sealed part for `finish`. ``content`` has what cbor can say."""
    plain, copied = cbor.encode(content), bytes(bytearray(key))
    try:
        return bytes(cobblestone.seal(copied, _context(kind, header), plain))
    finally:
        wipe(plain)
        wipe(copied)


def finish(kind: bytes, header: bytes, sealed: bytes) -> bytes:
    """Return the whole file."""
    body = _MAGIC + kind + len(header).to_bytes(2, "big") + header + sealed
    return body + hashlib.sha256(body).digest()


def _read(path: Path) -> bytes:
    """Return the content of a file somebody names. Raises ``invalid_argument``, ``sealed_file_invalid``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MeshkitError("invalid_argument", f"{path} is not a file")
            content = file.read(FILE_MOST + 1)
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{path}: {error.strerror}") from None
    if len(content) > FILE_MOST:
        raise _invalid(path, "is too long")
    return content


def open_export(path: Path, passphrase: Callable[[], str]) -> dict[str, Any]:
    """Return what is in an export. The passphrase is asked for only if the file is whole.

    Raises ``sealed_file_invalid``, ``sealed_file_version``, ``wrong_passphrase``, ``keyvault_refused`` (a
    header that would make guessing cheap, or take all memory).
    """
    header, sealed = _split(path, EXPORT)
    try:
        key = keyvault.open_with_passphrase(header, passphrase, path)
    except MeshkitError as error:
        if error.code != "identity_corrupt":
            raise
        raise _invalid(path, "has a damaged header") from None
    return _open(path, EXPORT, header, key, sealed, "its parts are not of one file")


def open_recovery(path: Path, secret: Callable[[], bytes]) -> dict[str, Any]:
    """Return what is in a recovery file; ``secret`` gives the 32 bytes of the words, if the file is whole.

    Raises ``sealed_file_invalid``, ``sealed_file_version``, ``wrong_words``.
    """
    header, sealed = _split(path, RECOVERY)
    if len(header) != SALT_BYTES:
        raise _invalid(path, "has a damaged header")
    words = secret()
    try:
        key = recovery_key(words, header)
    finally:
        wipe(words)
    return _open(path, RECOVERY, header, key, sealed, "")


def _split(path: Path, kind: bytes) -> tuple[bytes, bytes]:
    """Return header and sealed part of a whole file of this kind."""
    content = _read(path)
    if content[:4] == _MAGIC[:4] and content[4:5] > _MAGIC[4:5]:
        raise MeshkitError("sealed_file_version", str(path))
    body, checksum = content[:-_SUM], content[-_SUM:]
    start = len(_MAGIC) + 3
    if not body.startswith(_MAGIC) or len(body) < start or hashlib.sha256(body).digest() != checksum:
        raise _invalid(path, "is damaged, cut short, or of another kind")
    found = body[len(_MAGIC) : len(_MAGIC) + 1]
    if found != kind:
        what = "a recovery file" if found == RECOVERY else "an export"
        raise _invalid(path, f"is {what}")
    size = int.from_bytes(body[start - 2 : start], "big")
    if size > _HEADER_MOST or start + size > len(body):
        raise _invalid(path, "has a damaged header")
    return body[start : start + size], body[start + size :]


def _open(
    path: Path, kind: bytes, header: bytes, key: bytes, sealed: bytes, wrong: str
) -> dict[str, Any]:  # fmt: skip
    """Return the content. ``wrong`` is what it means that the key does not fit; "" for wrong words."""
    try:
        plain = cobblestone.open_(key, _context(kind, header), sealed)
    except MeshkitError:
        if wrong:
            raise _invalid(path, wrong) from None
        raise MeshkitError("wrong_words", str(path)) from None
    finally:
        wipe(key)
    try:
        content = cbor.decode(cast(bytearray, plain.obj), limit=FILE_MOST, secret=True)
    except MeshkitError:
        content = None
    if not isinstance(content, dict):
        raise _invalid(path, "holds something else")
    return content


def _context(kind: bytes, header: bytes) -> bytes:
    return _LABEL + kind + hashlib.sha256(header).digest()


def _invalid(path: Path, what: str) -> MeshkitError:
    return MeshkitError("sealed_file_invalid", f"{path} {what}")
