"""How people say how long, and until when: ``30m``, ``12h``, ``7d``, ``2w``, or a date."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from meshkitfs.errors import MeshkitError

__all__ = ["match_span", "parse_expiry", "parse_since", "parse_span"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SPAN: Final = re.compile(r"([0-9]{1,6})([smhdw])\Z")
_LIMIT: Final = 100 * 366 * 86400


def match_span(text: str) -> int | None:
    """Return how many seconds ``text`` says: a number with s, m, h, d or w; None if it says nothing such."""
    span = _SPAN.match(text)
    return int(span[1]) * _UNITS[span[2]] if span else None


def parse_span(text: str) -> int:
    """Return the seconds in a length of time such as ``90s``, ``12h``, ``7d``, ``2w``; ``0d`` is none.

    Raises MeshkitError ``invalid_argument`` for anything else, and for more than 100 years.
    """
    span = match_span(text)
    if span is None or span > _LIMIT:
        raise MeshkitError("invalid_argument", f"{text!r}: say 90s, 30m, 12h, 7d, 2w")
    return span


def parse_expiry(text: str, now: int) -> int:
    """Return the UNIX time (seconds) that ``text`` means when said at ``now``.

    A number with s, m, h, d or w counts from now; an ISO date means its first moment, UTC; an ISO date and
    time is UTC unless it names an offset. Raises MeshkitError ``invalid_argument`` for anything else, for
    a time that is not in the future and for one more than 100 years away.
    """
    span = match_span(text)
    if span is not None:
        when = now + span
    else:
        try:
            moment = datetime.fromisoformat(text)
            when = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError):
            raise MeshkitError(
                "invalid_argument", f"{text!r}: say 30m, 12h, 7d, 2w, or a date such as 2027-01-31"
            ) from None
    if not now < when <= now + _LIMIT:
        raise MeshkitError("invalid_argument", f"{text!r} is not in the future, or too far in it")
    return when


def parse_since(text: str, now: int) -> int:
    """Return the UNIX time (seconds) that ``text`` means when it says from when on, at ``now``.

    A number with s, m, h, d or w is that long ago; an ISO date means its first moment, UTC; an ISO date and
    time is UTC unless it names an offset. Raises MeshkitError ``invalid_argument`` for anything else.
    """
    span = match_span(text)
    if span is not None:
        return max(0, now - span)
    try:
        moment = datetime.fromisoformat(text)
        return max(0, int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()))
    except (ValueError, OverflowError):
        raise MeshkitError(
            "invalid_argument", f"{text!r}: say 2h, 3d for so long ago, or a date such as 2026-11-25"
        ) from None
