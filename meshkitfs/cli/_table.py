"""Aligned columns: how wide text is on a terminal, and how a table is made to fit into one.

In a pipe nothing is shortened or folded: a row is a line, and its cells are whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from ._colour import Span, Tone, Toned, joined, toned

__all__ = ["drawn", "room", "width_of"]

# Narrower than this (in cells) a column says nothing any more; the line is rather too long.
_LEAST: Final = 12
_GAP: Final = "  "
_CUT: Final = "…"


def width_of(text: str) -> int:
    """Return how many cells of a terminal ``text`` takes: none for a combining mark, two for a wide one."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # its tables are needed for few names only

    return cell_len(text)


def room() -> int | None:
    """Return how many cells a line on the terminal has; None if the results do not go to one."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def drawn(
    headings: Sequence[str], cells: Sequence[Sequence[str]], cut: Collection[str], fold: Collection[str]
) -> list[str]:
    """Return the lines of a table whose ``cells`` can be printed as they are.

    Where it is too wide for the terminal, the columns whose headings are in ``cut`` end in an ellipsis, and
    those in ``fold`` go on in the next line; the widest first. The others stay whole: an id is there to be
    copied.
    """
    titles = [toned(heading.upper(), Tone.HEADING) for heading in headings]
    rows: list[Sequence[str]] = [titles, *cells]
    widths = [max(width_of(row[column]) for row in rows) for column in range(len(headings))]
    elastic = [column for column, heading in enumerate(headings) if heading in cut or heading in fold]
    _shrink(widths, elastic, room())
    lines: list[str] = []
    for row in rows:
        pieces = [
            _folded(cell, width) if heading in fold else [_shortened(cell, width) if heading in cut else cell]
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        for number in range(max(len(piece) for piece in pieces)):
            lines.append(_line([p[number] if number < len(p) else "" for p in pieces], widths))
    return lines


def _line(cells: list[str], widths: list[int]) -> str:
    while cells and not cells[-1]:
        cells.pop()  # nothing but blanks would follow
    parts: list[str] = []
    for number, cell in enumerate(cells):
        last = number == len(cells) - 1
        parts += [cell] if last else [cell, " " * (widths[number] - width_of(cell)), _GAP]
    return joined(*parts)


def _shrink(widths: list[int], elastic: list[int], available: int | None) -> None:
    if available is None:
        return
    over = sum(widths) + len(_GAP) * (len(widths) - 1) - available
    while over > 0 and elastic:
        widest = max(elastic, key=lambda column: widths[column])
        if widths[widest] <= _LEAST:
            return
        widths[widest] -= 1
        over -= 1


def _piece(text: str, start: int, end: int) -> str:
    """Return a part of ``text`` that tells what it told there."""
    if not isinstance(text, Toned):
        return text[start:end]
    spans = ((max(s, start) - start, min(e, end) - start, tone) for s, e, tone in text.spans)
    return Toned(text[start:end], tuple(Span(s, e, tone) for s, e, tone in spans if s < e))


def _shortened(text: str, width: int) -> str:
    if width_of(text) <= width:
        return text
    end = len(text)
    while end and width_of(text[:end]) > width - 1:
        end -= 1
    return joined(_piece(text, 0, end), _CUT)


def _folded(text: str, width: int) -> list[str]:
    """Return ``text`` in lines that end between words; a word that is too long stays whole."""
    if width_of(text) <= width:
        return [text]
    lines = []
    begin = end = 0
    for start, stop in _words(text):
        if end and width_of(text[begin:stop]) > width:
            lines.append(_piece(text, begin, end))
            begin = start
        end = stop
    return [*lines, _piece(text, begin, end)]


def _words(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    for word in text.split(" "):
        if word:
            yield at, at + len(word)
        at += len(word) + 1
