"""When to try again: exponential backoff with full jitter, unless the server names a time."""

from __future__ import annotations

import email.utils
import random
import time
from typing import Final

__all__ = ["RETRY_STATUS", "backoff", "retry_after"]

RETRY_STATUS: Final = frozenset({429, 500, 502, 503, 504})
_FIRST_S: Final = 0.2
_MOST_S: Final = 10.0

_dice = random.SystemRandom()


def backoff(failures: int) -> float:
    """Return how many seconds to wait after that many failures (1 is the first), different for each client.

    "Full jitter": clients that failed together do not come back together.
    """
    most: float = min(_MOST_S, _FIRST_S * 2 ** (failures - 1))
    return _dice.uniform(0, most)


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, 10.2.3) asks for; None without a sane one."""
    if not value:
        return None
    if value.isascii() and value.isdigit() and len(value) < 8:
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, moment - time.time())
