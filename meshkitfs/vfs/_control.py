"""The read-only files below ``.meshkit``: what this mount is doing, what went wrong, what it really gives."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable

from meshkitfs.vfs.types import Attr

__all__ = ["CONTROL_INO", "CONTROL_NAME", "ControlFiles"]

CONTROL_NAME = b".meshkit"
CONTROL_INO = 2
# A reader stats, opens and reads: those must agree on the size, so a text is kept for this long.
_KEEP_S = 0.5


class ControlFiles:
    """Files by name, each made by a function when it is looked at."""

    def __init__(self, makers: dict[bytes, Callable[[], bytes]]) -> None:
        self._makers = makers
        self._names = sorted(makers)
        self._made: dict[int, tuple[float, bytes]] = {}

    def names(self) -> list[tuple[bytes, int]]:
        return [(name, CONTROL_INO + 1 + i) for i, name in enumerate(self._names)]

    def ino_of(self, name: bytes) -> int | None:
        return CONTROL_INO + 1 + self._names.index(name) if name in self._makers else None

    def content(self, ino: int) -> bytes:
        """Return the text of a file, at most half a second old."""
        made = self._made.get(ino)
        now = time.monotonic()
        if made is None or now - made[0] > _KEEP_S:
            made = self._made[ino] = (now, self._makers[self._names[ino - CONTROL_INO - 1]]())
        return made[1]

    def attr(self, ino: int) -> Attr:
        now = time.time_ns()
        if ino == CONTROL_INO:
            return Attr(ino, stat.S_IFDIR | 0o500, 2, 0, 0, now, now, now, 60.0, 60.0)
        size = len(self.content(ino))
        return Attr(ino, stat.S_IFREG | 0o400, 1, size, -(-size // 512), now, now, now, 60.0, 0.0)

    def __contains__(self, ino: int) -> bool:
        return CONTROL_INO <= ino <= CONTROL_INO + len(self._names)
