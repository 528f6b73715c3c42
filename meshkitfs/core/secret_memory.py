"""Memory for keys: locked against swapping, left out of core dumps, zeroed when it is let go of.

`SecretBytes` holds one key for as long as it is needed. `wipe` is for the copies that cannot be avoided on
the way in and out, because most libraries want or give `bytes`. What a library copies inside itself is out of
reach: OpenSSL cleans its key objects when they are freed, others do not (docs/security.md says which).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from typing import Final, final

__all__ = ["SecretBytes", "locked", "scrub", "scrub_thread", "wipe", "wipe_text"]

_SLOT: Final = 64
_ARENA: Final = 16 * 1024
# Offset of the data in a `bytes` object of CPython: its header without the closing NUL.
_BYTES_DATA: Final = bytes.__basicsize__ - 1
# CPython shares short strings of bytes between everybody who makes them; no secret is that short.
_SHORTEST: Final = 16
# The largest piece that Python's own allocator gives, and how much of each size `scrub` asks for (bytes).
_SMALL: Final = 512
_SCRUBBED: Final = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_malloc = _libc.malloc
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free = _libc.free
_free.restype, _free.argtypes = None, [ctypes.c_void_p]
# How many pieces of each size `scrub_thread` writes over.
_PIECES: Final = 32


class _Arena:
    """Pages for keys; ``locked`` says whether the kernel keeps them in memory."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _ARENA, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.locked = _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(_ARENA)) == 0
        for advice in ("MADV_DONTDUMP", "MADV_WIPEONFORK"):
            if hasattr(mmap, advice):
                self._map.madvise(getattr(mmap, advice))
        self.free = [self.view[at : at + _SLOT] for at in range(0, _ARENA, _SLOT)]


# A lock that its holder may take again: the garbage collector can let go of a secret at any moment.
_lock = threading.RLock()
_arenas: list[_Arena] = []


def _take() -> tuple[_Arena, memoryview]:
    with _lock:
        for arena in _arenas:
            if arena.free:
                return arena, arena.free.pop()
        arena = _Arena()
        _arenas.append(arena)
        return arena, arena.free.pop()


def locked() -> bool:
    """Return whether all memory of `SecretBytes` is locked, so that no key in it reaches the swap space."""
    with _lock:
        if not _arenas:
            _arenas.append(_Arena())
        return all(arena.locked for arena in _arenas)


@final
class SecretBytes:
    """A key of 1 to 64 bytes. Making one wipes what it is made from; neither repr nor pickle shows it."""

    __slots__ = ("_arena", "_size", "_slot")

    def __init__(self, raw: bytes | bytearray | memoryview) -> None:
        size = len(raw)
        self._size = 0
        if not 0 < size <= _SLOT:
            raise ValueError(f"a secret has 1 to {_SLOT} bytes")
        self._arena, self._slot = _take()
        self._slot[:size] = raw
        self._size = size
        wipe(raw)

    @property
    def view(self) -> memoryview:
        """The bytes themselves, no copy: not to be used after `wipe`. Raises ValueError when wiped."""
        if not self._size:
            raise ValueError("the secret was wiped")
        return self._slot[: self._size].toreadonly()

    @property
    def wiped(self) -> bool:
        return not self._size

    def wipe(self) -> None:
        """Zero the bytes and give the memory back; may be called again."""
        if self._size:
            self._size = 0
            self._slot[:] = bytes(_SLOT)
            with _lock:
                self._arena.free.append(self._slot)

    def __del__(self) -> None:
        self.wipe()

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a SecretBytes cannot be copied or pickled")

    def __repr__(self) -> str:
        return "SecretBytes(redacted)"


def wipe(raw: bytes | bytearray | memoryview) -> None:
    """Zero ``raw`` in place.

    For a buffer that nobody uses any more. `bytes` are written over too, although they "never change": only
    ever for an object that the caller got fresh from a call and has given to nobody who keeps it.
    """
    if isinstance(raw, bytes):
        if len(raw) >= _SHORTEST:
            ctypes.memset(id(raw) + _BYTES_DATA, 0, len(raw))
    elif not memoryview(raw).readonly:
        memoryview(raw).cast("B")[:] = bytes(memoryview(raw).nbytes)


def wipe_text(text: str) -> None:
    """Zero the characters of ``text`` in place, as far as they are ASCII, under the conditions of `wipe`."""
    if len(text) >= 2 and text.isascii():
        # A compact string has its characters at the end, before a closing NUL.
        ctypes.memset(id(text) + sys.getsizeof(text) - len(text) - 1, 0, len(text))


def scrub() -> None:
    """Clean memory that is free: what was let go of without being wiped. Best effort, takes some 50 ms.

    Small pieces are written over: Python's own allocator gives a piece of a size to the next who asks for
    that size, so asking for very many reaches what is free. Whole free pages are given back to the kernel.
    """
    held: list[bytes | bytearray] = []
    for size in range(48, _SMALL + 1, 16):
        held += [bytes(size - _BYTES_DATA - 1) for _ in range(_SCRUBBED // size)]
        held += [bytearray(size) for _ in range(_SCRUBBED // size // 4)]
    held.clear()
    scrub_thread()
    if hasattr(_libc, "malloc_trim"):  # glibc's
        _libc.malloc_trim(ctypes.c_size_t(0))


def scrub_thread() -> None:
    """Write over small free pieces of this thread's part of the C heap.

    For the thread that had a library use a secret: such a piece is given to nobody else, so a copy that the
    library let go of would stay for as long as the thread waits for other work.
    """
    for size in range(24, _SMALL, 16):
        held = [_malloc(size) for _ in range(_PIECES)]
        for address in held:
            if address:
                ctypes.memset(address, 0, size)
                _free(address)
