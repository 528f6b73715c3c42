"""Where in a text of Cedar rules something is wrong: its parser says what, and not where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Statement", "spoiled", "statements"]

_TOKEN: Final = re.compile(r'//[^\n]*|\s+|"(?:[^"\\]|\\.)*"|\w+|::|[=!<>]=|&&|\|\||.', re.DOTALL)
# What the parser says while there is nothing wrong yet.
_UNFINISHED: Final = "unexpected end of input"


@dataclass(frozen=True, slots=True)
class Statement:
    """One rule, with what stands before it; ``start`` is where that begins in the ``whole``."""

    text: str
    whole: str
    start: int

    @property
    def line(self) -> int:
        """The line, from 1, in which the rule itself begins."""
        return self.whole.count("\n", 0, self.start + self._first) + 1

    @property
    def _first(self) -> int:
        at = 0
        for token in _TOKEN.findall(self.text):
            if not token.isspace() and not token.startswith("//"):
                break
            at += len(token)
        return at

    def place(self, at: int) -> str:
        """Return line and column of the character ``at`` of this statement; of its first word for 0."""
        spot = self.start + max(at, self._first)
        line_start = self.whole.rfind("\n", 0, spot) + 1
        return f"line {self.whole.count(chr(10), 0, spot) + 1}, column {spot - line_start + 1}"


def statements(text: str) -> list[Statement]:
    """Return the rules in ``text``, in order; what is behind the last semicolon counts if it is a word."""
    found, begin, at, words = [], 0, 0, False
    for token in _TOKEN.findall(text):
        at += len(token)
        words = words or not (token.isspace() or token.startswith("//"))
        if token == ";":  # noqa: S105 - a token of Cedar
            found.append(Statement(text[begin:at], text, begin))
            begin, words = at, False
    if words:
        found.append(Statement(text[begin:], text, begin))
    return found


def spoiled(statement: Statement, parse: Callable[[str], Any]) -> list[tuple[int, str]]:
    """Return where in the statement ``parse`` begins to refuse it, and what it says, if it does."""
    complaint = _complaint(statement.text, parse)
    if not complaint:
        return []
    at = 0
    for token in _TOKEN.findall(statement.text):
        says = "" if token.isspace() else _complaint(statement.text[: at + len(token)], parse)
        if says and _UNFINISHED not in says:
            if says == complaint:
                return [(_inside(statement.text, at, says), says)]
            break
        at += len(token)
    if _UNFINISHED in complaint:
        return [(len(statement.text.rstrip()), "it ends too early; every rule ends with ';'")]
    return [(_inside(statement.text, at, complaint), complaint)]


def _inside(text: str, at: int, says: str) -> int:
    """Return the place of the word that a complaint about the whole statement names, else ``at``."""
    if at + 1 < len(text.rstrip()):
        return at
    word = says.rpartition(": ")[2].strip("`\"' ")
    found = text.find(word) if word else -1
    return found if found >= 0 else at


def _complaint(text: str, parse: Callable[[str], Any]) -> str:
    try:
        parse(text)
    except ValueError as error:
        return str(error) or "it cannot be parsed"
    return ""
