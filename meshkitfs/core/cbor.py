"""The one encoding of everything structured: a strict subset of dag-cbor.

Values are None, bool, int with ``|x| < 2**53``, bytes, str, list and dict with str keys, nested at most
16 containers deep. There is exactly one byte form for each value (RFC 8949 section 4.2 deterministic
encoding, map keys sorted shorter first, then bytewise), and `decode` accepts no other form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

import cbor2

from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

__all__ = ["MAX_DEPTH", "MAX_INT", "MAX_RECORD", "decode", "encode", "encode_uint", "load_plain"]

MAX_RECORD: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_INT: Final = 2**53 - 1


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not part of the format")


# cbor2 would build dates, regular expressions or MIME messages from these; none of that code has any
# business running on bytes from outside.
_NO_TAGS: Final[Mapping[int, Any]] = dict.fromkeys(
    (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799),
    _refuse_tag,
)


def _lint(value: object, depth: int = 0) -> None:
    kind = type(value)
    if kind is bytes or kind is bool or value is None:
        return
    if kind is str:
        # A lone surrogate has no UTF-8 form; cbor2 would raise its own error while encoding.
        try:
            value.encode()  # type: ignore[attr-defined]
        except UnicodeEncodeError:
            raise MeshkitError("invalid_record", "text that is not valid Unicode") from None
        return
    if kind is int:
        if not -MAX_INT <= value <= MAX_INT:  # type: ignore[operator]
            raise MeshkitError("invalid_record", "integer out of range")
        return
    if depth >= MAX_DEPTH:
        raise MeshkitError("invalid_record", "nested too deeply")
    if kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str:
                raise MeshkitError("invalid_record", "map key that is not text")
            _lint(key)
            _lint(item, depth + 1)
        return
    if kind is list:
        for item in value:  # type: ignore[attr-defined]
            _lint(item, depth + 1)
        return
    raise MeshkitError("invalid_record", f"type {kind.__name__} is not part of the format")


def encode(value: object) -> bytes:
    """Return the one encoding of ``value``.

    Raises MeshkitError ``invalid_record`` if the value is outside the subset (tuples are: pass lists).
    """
    _lint(value)
    return cbor2.dumps(value, canonical=True)


def load_plain(data: bytes) -> Any:
    """Decode without proving the form: the caller lints and re-encodes. Raises ``invalid_record``."""
    try:
        return cbor2.loads(
            data,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            max_depth=MAX_DEPTH,
            semantic_decoders=_NO_TAGS,
        )
    except Exception as error:
        # Whatever the decoder chokes on (RecursionError and MemoryError included) is one answer: no.
        raise MeshkitError("invalid_record", f"not CBOR of this format: {type(error).__name__}") from None


def decode(data: bytes | bytearray | memoryview, *, limit: int = MAX_RECORD, secret: bool = False) -> Any:
    """Return the value that ``data`` encodes, if it is its one encoding and at most ``limit`` bytes long.

    Raises MeshkitError ``invalid_record`` for anything else: duplicate or unsorted keys, non-minimal
    integers or lengths, indefinite lengths, tags, floats, trailing bytes, depth above `MAX_DEPTH`.

    With ``secret`` the copies made on the way, and ``data`` itself, are wiped.
    """
    if len(data) > limit:
        raise MeshkitError("invalid_record", f"{len(data)} bytes, the limit is {limit}")
    raw = bytes(data)
    again = b""
    try:
        value = load_plain(raw)
        _lint(value)
        again = cbor2.dumps(value, canonical=True)
        if again != raw:
            raise MeshkitError("invalid_record", "not in canonical form")
        return value
    finally:
        if secret:
            for copy in (data, raw, again):
                wipe(copy)


def encode_uint(value: int) -> bytes:
    """Return the encoding of ``0 <= value < 2**53`` without going through the codec (hot paths)."""
    if value < 24:
        if value < 0:
            raise ValueError("negative")
        return value.to_bytes(1, "big")
    if value < 0x100:
        return b"\x18" + value.to_bytes(1, "big")
    if value < 0x10000:
        return b"\x19" + value.to_bytes(2, "big")
    if value < 0x100000000:
        return b"\x1a" + value.to_bytes(4, "big")
    if value > MAX_INT:
        raise ValueError("integer out of range")
    return b"\x1b" + value.to_bytes(8, "big")
