"""The session keyring of the Linux kernel, through libkeyutils: small secrets that never reach a disk.

Every call raises OSError; ENOKEY, EKEYEXPIRED and EKEYREVOKED all mean that there is no such key now.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from typing import Any, Final

_SESSION: Final = -3  # KEY_SPEC_SESSION_KEYRING
# Everything for whoever has the session keyring, nothing for other processes, not even of the same user.
_POSSESSOR_ONLY: Final = 0x3F000000
GONE: Final = frozenset({errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED})


def put(name: str, payload: bytes, seconds: int) -> None:
    """Keep ``payload`` as ``name`` in this session, in place of an earlier one, for ``seconds``."""
    key = _call("add_key", b"user", name.encode(), payload, len(payload), _SESSION)
    try:
        _call("keyctl_setperm", key, _POSSESSOR_ONLY)
        _call("keyctl_set_timeout", key, seconds)
    except OSError:
        # It would stay longer, or be open to more, than was said.
        _call("keyctl_invalidate", key)
        raise


def get(name: str, size: int) -> bytes:
    """Return what is kept as ``name``, at most ``size`` bytes of it."""
    key = _call("keyctl_search", _SESSION, b"user", name.encode(), 0)
    buffer = ctypes.create_string_buffer(size)
    length = _call("keyctl_read", key, buffer, size)
    return buffer.raw[: min(length, size)]


def drop(name: str) -> None:
    """Wipe the key at once, for everybody who has it."""
    key = _call("keyctl_search", _SESSION, b"user", name.encode(), 0)
    _call("keyctl_revoke", key)


def _call(name: str, *arguments: Any) -> int:
    function = getattr(_library(), name)
    function.restype = ctypes.c_long
    converted = [
        ctypes.c_size_t(a) if name in _SIZED and i == _SIZED[name] else a for i, a in enumerate(arguments)
    ]
    result = int(function(*converted))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# Which argument is a size_t; ctypes takes every other int for a C int, which is right here.
_SIZED: Final = {"add_key": 3, "keyctl_read": 2}


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libkeyutils.so.1", use_errno=True)
    except OSError:
        raise OSError(errno.ENOSYS, "libkeyutils1 is not installed") from None
