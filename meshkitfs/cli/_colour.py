"""What colours mean here, and whether anybody wants them.

Text stays text: a `Toned` string is an ordinary string that also knows which parts of it have which
meaning. Only `painted` makes escape sequences of that, at the last moment, so that widths are counted without
them. Joining in other ways than with `joined` loses the meaning, not the text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple, TextIO

from ..errors import TABLE

__all__ = ["Span", "Tone", "Toned", "joined", "meaning", "painted", "toned", "wanted"]


class Tone(StrEnum):
    """What a piece of text tells; the value is its SGR parameter, of the 16 colours that people can set."""

    GOOD = "32"
    WARN = "33"
    BAD = "31"
    ERROR = "1;31"
    HEADING = "1"
    ASIDE = "2"


class Span(NamedTuple):
    """Characters of a string, from ``start`` to before ``end``, and what they tell."""

    start: int
    end: int
    tone: Tone


class Toned(str):
    """Text with `spans`, in order and apart from each other."""

    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: tuple[Span, ...] = ()) -> Toned:
        made = super().__new__(cls, text)
        made.spans = spans
        return made


_WORDS: Final = {
    Tone.GOOD: ("ok", "clean", "stored", "passed", "verified", "allow", "accepted", "done"),
    Tone.WARN: ("warn", "dirty", "uploading", "locked", "changed", "not verified", "unverified"),
    Tone.BAD: ("fail", "refused", "stuck", "unreadable", "quarantined", "deny", "blocked"),
    Tone.ASIDE: ("info", "-", "?", "not required", "not reached"),
}
_TONES: Final = {word: tone for tone, words in _WORDS.items() for word in words}


def toned(text: str, tone: Tone) -> Toned:
    """Return ``text``, all of which tells the same."""
    return Toned(text, (Span(0, len(text), tone),) if text else ())


def meaning(word: object) -> str:
    """Return a word of status with the tone it has everywhere; a stable code of `errors` is a refusal."""
    text = "" if word is None else str(word)
    tone = Tone.BAD if text in TABLE else _TONES.get(text.lower())
    return text if tone is None else toned(text, tone)


def joined(*parts: str) -> Toned:
    """Return the parts as one string that tells what they told."""
    spans: list[Span] = []
    at = 0
    for part in parts:
        if isinstance(part, Toned):
            spans += [Span(at + start, at + end, tone) for start, end, tone in part.spans]
        at += len(part)
    return Toned("".join(parts), tuple(spans))


def painted(line: str) -> str:
    """Return ``line`` with the escape sequences for what it tells."""
    if not isinstance(line, Toned):
        return line
    pieces = []
    at = 0
    for start, end, tone in line.spans:
        pieces += [line[at:start], f"\x1b[{tone}m", line[start:end], "\x1b[0m"]
        at = end
    return "".join([*pieces, line[at:]])


def wanted(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Say whether what goes to ``stream`` is to be coloured.

    ``NO_COLOR`` (not empty) forbids it. ``FORCE_COLOR`` and ``CLICOLOR_FORCE`` (neither empty nor 0) demand
    it, wherever it goes. Otherwise it has to be a terminal that is not ``dumb``, and ``CLICOLOR`` not 0.
    """
    said = os.environ if environment is None else environment
    if said.get("NO_COLOR"):
        return False
    if any(said.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return said.get("TERM", "dumb") != "dumb" and said.get("CLICOLOR") != "0" and stream.isatty()
