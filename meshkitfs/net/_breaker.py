"""A memory of servers that do not answer, so that not every caller has to wait for the deadline again."""

from __future__ import annotations

from typing import Final

import trio

__all__ = ["Breaker"]

# How many failures in a row open the circuit, and for how long at first and at most.
THRESHOLD: Final = 5
FIRST_S: Final = 1.0
MOST_S: Final = 30.0


class Breaker:
    """Closed while a server answers, open after `THRESHOLD` failures in a row.

    While it is open nothing is sent. When its time is over one request goes through: an answer closes the
    circuit, a failure opens it for twice as long. Times are those of trio's clock.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._pause = FIRST_S
        self._open_until = 0.0
        self._probing = False

    def wait_s(self) -> float:
        """Return for how many seconds nothing may be sent; 0.0 if one may go, which reports then."""
        if self.failures < THRESHOLD:
            return 0.0
        left = self._open_until - trio.current_time()
        if left > 0:
            return left
        if self._probing:
            return FIRST_S
        self._probing = True
        return 0.0

    def answered(self) -> None:
        """The server gave an answer, whatever it was."""
        self.failures = 0
        self._pause = FIRST_S
        self._probing = False

    def failed(self) -> None:
        """There was no valid answer."""
        self.failures += 1
        self._probing = False
        if self.failures >= THRESHOLD:
            self._open_until = trio.current_time() + self._pause
            self._pause = min(MOST_S, self._pause * 2)

    def abandoned(self) -> None:
        """The caller gave up before anything was known."""
        self._probing = False
