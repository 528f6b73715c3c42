"""Everything that is printed: results, tables and failures, for people or (``--json``) for programs.

Names come from other people, so whatever is printed for a terminal goes through `printable` first: a file
name must not be able to move the cursor, recolour a warning or reverse the writing direction.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import MeshkitError
from ._colour import Tone, Toned, joined, painted, toned, wanted
from ._table import drawn, width_of

__all__ = [
    "Output",
    "ago",
    "clock",
    "count",
    "distance",
    "duration",
    "fields",
    "printable",
    "size",
    "table",
    "utc",
    "written",
]

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Output:
    """Where the results of one invocation go. Results on stdout, everything else on stderr."""

    def __init__(self, *, json_mode: bool) -> None:
        self.json_mode = json_mode

    @property
    def interactive(self) -> bool:
        """Whether a person is looking: progress and hints are for them only."""
        return not self.json_mode and sys.stderr.isatty()

    def result(self, data: Mapping[str, Any], lines: Iterable[str]) -> None:
        """Print the result of a command: ``data`` as JSON, or ``lines`` for a person."""
        with written():
            if self.json_mode:
                print(json.dumps(data, separators=(",", ":")))
            else:
                coloured = wanted(sys.stdout)
                for line in lines:
                    print(_encodable(painted(line) if coloured else line))

    def flush(self) -> None:
        """Write out what was printed. Raises ``output_failed``, such as for a full disk."""
        with written():
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something beside the result; silent for programs."""
        if not self.json_mode:
            print(_encodable(text), file=sys.stderr)

    def failure(self, error: MeshkitError) -> None:
        """Say what went wrong and what to do about it, on stderr."""
        if self.json_mode:
            print(json.dumps({"error": error.as_dict()}, separators=(",", ":")), file=sys.stderr)
            return
        headline, *details = error.detail.splitlines() or [""]
        code = ""
        if error.code != "invalid_argument" or not headline:  # there the detail says it all
            details.insert(0, headline)
            headline = error.reason.sentence
            code = toned(f" [{error.code}]", Tone.ASIDE)
        said = joined("meshkitfs: ", toned("error:", Tone.ERROR), " ", printable(headline), code)
        lines: list[str] = [said]
        lines += [f"  {printable(line)}" for line in (*details, error.remedy) if line]
        coloured = wanted(sys.stderr)
        print(_encodable("\n".join(map(painted, lines) if coloured else lines)), file=sys.stderr)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Around what writes to stdout. Raises ``output_failed``, such as for a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read it has seen enough
    except OSError as error:
        raise MeshkitError("output_failed", os.strerror(error.errno or 0)) from error


def printable(value: object) -> str:
    """Return ``value`` as text in which control, format and undecodable characters are visible escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in str(value))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _encodable(text: str) -> str:
    """Replace what this terminal's encoding cannot write; a listing must not end at an umlaut."""
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    cut: Collection[str] = (),
    fold: Collection[str] = (),
) -> list[str]:
    """Return the lines of a table with aligned columns; an empty cell shows as ``-``.

    On a terminal that is too narrow for it the columns named in ``cut`` are shortened, those in ``fold`` go
    on in the next line.
    """
    cells = [[_cell(cell) or toned("-", Tone.ASIDE) for cell in row] for row in rows]
    return drawn(headings, cells, cut, fold)


def fields(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Return ``name  value`` lines, aligned; pairs whose value is None or empty are left out."""
    shown = [(name, _cell(value)) for name, value in pairs if value is not None and value != ""]
    width = max((width_of(name) for name, _ in shown), default=0)
    return [
        joined(toned(name, Tone.ASIDE), " " * (width - width_of(name)), "  ", value) for name, value in shown
    ]


def _cell(value: object) -> str:
    """Return what can be printed of ``value``, with its tone if it has one: a cell has one for all of it."""
    text = printable("" if value is None else value)
    return toned(text, value.spans[0].tone) if isinstance(value, Toned) and value.spans else text


def size(count: int | None) -> str:
    """Return a byte count for people: ``1.4 MiB``."""
    if count is None:
        return ""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def count(number: int | None, one: str, many: str) -> str:
    """Return a number of things: ``1 file``, ``3 files``."""
    return f"{number or 0} {one if number == 1 else many}"


def clock(moment: float | None) -> str:
    """Return a time (seconds since the epoch) in local time, to the minute."""
    if moment is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return str(moment)


def utc(moment: float | None) -> str:
    """Return a version's time (seconds since the epoch) in UTC, as ``--at`` takes it."""
    if moment is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(moment))
    except (OverflowError, ValueError, OSError):
        return str(moment)


def duration(seconds: float) -> str:
    """Return a length of time in its one or two largest units: ``6d 23h``, ``45s``."""
    left = max(0, round(seconds))
    parts = []
    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{name}")
    return " ".join(parts[:2]) or "0s"


def ago(moment: float | None, now: float | None = None) -> str:
    """Return a time with its distance from now: ``2026-11-30 15:09 (in 6d 23h)``."""
    if moment is None:
        return ""
    return f"{clock(moment)} ({distance(moment, now)})"


def distance(moment: float, now: float | None = None) -> str:
    """Return how far a time is from now: ``in 6d 23h``, ``20s ago``."""
    difference = moment - (time.time() if now is None else now)
    return f"in {duration(difference)}" if difference >= 0 else f"{duration(-difference)} ago"
