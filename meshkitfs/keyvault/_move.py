"""Where a home's key is while it is being moved from one key vault to another.

The home's file ``key-move`` is there from before the first copy is made until after the old one is gone:

    meshkitfs key move 1
    <old kind>$<new kind>$<copying|switched>
    <SHA-256 of the lines above, in hexadecimal>

``copying``: the old key vault counts, the new one may be half made. ``switched``: the new one counts, it was
read back, and the old one may be half removed. It changes from one to the other in one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import KINDS
from meshkitfs.keyvault._files import read_private, remove, replace_private
from meshkitfs.keyvault._text import checked, damaged, lines_of

_NAME: Final = "key-move"
_MAGIC: Final = "meshkitfs key move 1"
_COPYING, _SWITCHED = "copying", "switched"


@dataclass(frozen=True, slots=True)
class Move:
    """An unfinished move of a key; ``old`` and ``new`` are kinds of key vault."""

    old: str
    new: str
    switched: bool = False

    @property
    def now(self) -> str:
        """The kind of the key vault that counts."""
        return self.new if self.switched else self.old

    def write(self, directory: Path) -> None:
        """Note in the home ``directory`` that this is how far it has come; durable when it returns."""
        stage = _SWITCHED if self.switched else _COPYING
        replace_private(directory / _NAME, checked(_MAGIC, f"{self.old}${self.new}${stage}"))


def under_way(directory: Path) -> Move | None:
    """Return the unfinished move of the home's key, or None.

    Raises MeshkitError ``identity_corrupt``, ``keyvault_refused``, ``keyvault_unavailable``: then it is not
    known which key vault counts.
    """
    path = directory / _NAME
    try:
        content = read_private(path)
    except MeshkitError as error:
        if error.code == "identity_not_found":
            return None
        raise
    try:
        (line,) = lines_of(content, _MAGIC, path)
        old, new, stage = line.split("$")
    except ValueError:
        raise damaged(path) from None
    if {old, new} - set(KINDS) or old == new or stage not in (_COPYING, _SWITCHED):
        raise damaged(path)
    return Move(old, new, stage == _SWITCHED)


def finished(directory: Path) -> None:
    """Note that nothing is being moved any more."""
    remove(directory / _NAME)
