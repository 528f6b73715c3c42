"""How people say which version: ``v12``, a time, or how long ago; and how a version is called by its time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from meshkitfs.core.durations import match_span
from meshkitfs.errors import MeshkitError

__all__ = ["Moment", "parse_moment", "version_label"]

_NUMBER: Final = re.compile(r"v?([0-9]{1,15})\Z", re.ASCII)
_LABEL: Final = re.compile(r"[0-9-]{10}T[0-9]{6}Z-v([0-9]{1,15})\Z", re.ASCII)
_TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})(?:-([0-9]{2})(?:[T ]([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2}))?)?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2})?)?)?\Z",
    re.ASCII,
)
# The last second that has a date.
_LAST: Final = 253402300799


class Moment(NamedTuple):
    """What was asked for: version ``number``, or else the newest one published not after ``until``.

    ``until`` is UNIX seconds, the last of them included. ``label`` is there if the version was named by its
    whole label, whose time has to be right too.
    """

    number: int | None
    until: int = 0
    label: str = ""


def version_label(number: int, time: int) -> str:
    """Return the name of a version that was published at ``time`` (UNIX seconds). Sorted, it is by time."""
    moment = datetime.fromtimestamp(min(max(time, 0), _LAST), UTC)
    return f"{moment:%Y-%m-%dT%H%M%SZ}-v{number}"


def parse_moment(text: str, now: int) -> Moment:
    """Return what ``text`` means when said at ``now`` (UNIX seconds).

    ``v12`` and ``12`` are a version; so is a whole label as `version_label` makes it. A month, a day, an
    hour, a minute or a second (``2026-11``, ``2026-11-25``, ``2026-11-25T03:53Z``; UTC unless it names an
    offset) means its end. ``2h`` or ``3d`` is that long ago. Raises MeshkitError ``invalid_argument`` for
    anything else.
    """
    number = _NUMBER.match(text)
    if number:
        return Moment(int(number[1]))
    label = _LABEL.match(text)
    if label:
        return Moment(int(label[1]), label=text)
    span = match_span(text)
    if span is not None:
        return Moment(None, now - span)
    found = _TIME.match(text)
    if found:
        try:
            return Moment(None, _end(found))
        except (ValueError, OverflowError):
            pass
    raise MeshkitError(
        "invalid_argument", f"{text!r}: say v12, 2026-11-25, 2026-11-25T03:53Z, or 2h, 3d for so long ago"
    )


def _end(found: re.Match[str]) -> int:
    """Return the last second of the period that was written."""
    year, month, day, hour, minute, second = (int(part) if part else None for part in found.groups()[:6])
    assert year is not None  # the pattern demands both
    assert month is not None
    start = datetime(year, month, day or 1, hour or 0, minute or 0, second or 0, tzinfo=UTC)
    if found[7] and found[7] != "Z":
        start = start.replace(tzinfo=datetime.strptime(found[7], "%z").tzinfo)
    if day is None:
        after = start.replace(year=year + month // 12, month=month % 12 + 1)
    elif hour is None:
        after = start + timedelta(days=1)
    elif minute is None:
        after = start + timedelta(hours=1)
    else:
        after = start + (timedelta(minutes=1) if second is None else timedelta(seconds=1))
    return int(after.timestamp()) - 1
