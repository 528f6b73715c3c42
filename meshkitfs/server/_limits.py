"""How much anybody may ask for: requests a second, bytes of a body, seconds to send it, bytes in memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from meshkitfs.errors import MeshkitError

__all__ = ["Buckets", "Memory", "Rate", "TooLargeError", "TooManyError", "TooSlowError", "read_body"]

Receive = Callable[[], Awaitable[Any]]
_REMEMBERED: Final = 100_000  # addresses or members


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: ``per_second`` on average, ``burst`` at once."""

    per_second: float
    burst: float


class TooManyError(MeshkitError):
    """rate_limited, with the seconds after which it is worth trying again."""

    def __init__(self, detail: str, retry_after: int) -> None:
        super().__init__("rate_limited", detail)
        self.retry_after = retry_after


class TooLargeError(MeshkitError):
    """invalid_argument, as 413."""

    def __init__(self, cap: int) -> None:
        super().__init__("invalid_argument", f"the body is larger than {cap} bytes")


class TooSlowError(MeshkitError):
    """timed_out, as 408."""

    def __init__(self, seconds: float) -> None:
        super().__init__("timed_out", f"the body did not arrive within {seconds:.0f} s")


class Buckets:
    """One token bucket for each name. Those not heard of for longest are forgotten first."""

    def __init__(self, rate: Rate, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._what = what
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, cost: float = 1.0) -> None:
        """Take ``cost`` tokens, or all that there can be if that is less.

        Raises `TooManyError` when they are not there.
        """
        level = self._level(name)
        cost = min(cost, self._rate.burst)
        if level < cost:
            self._levels[name] = (level, self._clock())
            wait = math.ceil((cost - level) / self._rate.per_second)
            raise TooManyError(f"too many requests of this {self._what}", max(1, wait))
        self._levels[name] = (level - cost, self._clock())

    def charge(self, name: str, cost: float) -> None:
        """Take tokens whether or not they are there: what came in was worse than a request."""
        self._levels[name] = (max(0.0, self._level(name) - cost), self._clock())

    def _level(self, name: str) -> float:
        level, at = self._levels.pop(name, (self._rate.burst, self._clock()))
        while len(self._levels) >= _REMEMBERED:
            self._levels.popitem(last=False)
        return min(self._rate.burst, level + (self._clock() - at) * self._rate.per_second)


class Memory:
    """How many bytes of bodies may be in memory at once, of all requests together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        """Raises metadata_unavailable when there is no room now."""
        if size > self._left:
            raise MeshkitError("metadata_unavailable", "the service is busy with large requests")
        self._left -= size

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self._left += size


async def read_body(receive: Receive, cap: int, seconds: float, memory: Memory) -> tuple[bytes, int]:
    """Return the body, and how much of ``memory`` it holds until that is given back.

    Raises `TooLargeError` at the first byte over ``cap``, `TooSlowError`, and metadata_unavailable also when
    the client has gone.
    """
    parts: list[bytes] = []
    size = 0
    try:
        with trio.fail_after(seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise MeshkitError("metadata_unavailable", "the client has gone")
                part: bytes = message.get("body", b"")
                if size + len(part) > cap:
                    raise TooLargeError(cap)
                memory.take(len(part))
                size += len(part)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts), size
    except trio.TooSlowError:
        memory.give(size)
        raise TooSlowError(seconds) from None
    except BaseException:
        memory.give(size)
        raise
