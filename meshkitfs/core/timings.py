"""How long something took, many times over: counts by upper bound, as monitoring systems want them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["BOUNDS_S", "Timings"]

# Upper bounds of the counts, in seconds: from a local disk to a deadline that was reached.
BOUNDS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Timings:
    """A histogram of durations. ``counts`` has one number for each bound, and one more for what took longer.

    It belongs to one thread.
    """

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def note(self, seconds: float) -> None:
        """Count one that took so long."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count how long the block takes, however it ends."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.note(time.monotonic() - begun)

    def cumulated(self) -> list[tuple[str, float]]:
        """Return the counts as Prometheus has them: up to each bound and, last, up to any ("+Inf")."""
        found: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found
