"""How a capsule names a vault or a capability: ``NAME@did:key:…``, which pins the key that signs for it.

The key itself is in the text, so whoever reads a capsule needs no directory to check what it asks for, and
a vault or capability of the same name under another key is another one.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from meshkitfs.core.keys import did_key, public_of_did
from meshkitfs.errors import MeshkitError

__all__ = ["Pinned", "valid_label"]

_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", re.ASCII)


def valid_label(text: str) -> bool:
    """Whether a vault or a capability may be called this: 1 to 64 letters, digits, ``.``, ``_``, ``-``."""
    return _LABEL.match(text) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Pinned:
    """``label`` (a vault's id in hex, or a capability's name) and the 32-byte Ed25519 key of who signs."""

    label: str
    public: bytes

    @property
    def text(self) -> str:
        return f"{self.label}@{did_key(self.public)}"

    @property
    def vault_id(self) -> bytes:
        """The 16 bytes of a vault's id. Raises MeshkitError ``invalid_record`` if the label is none."""
        if not re.fullmatch(r"[0-9a-f]{32}", self.label, re.ASCII):
            raise MeshkitError("invalid_record", "not the id of a vault")
        return bytes.fromhex(self.label)

    @classmethod
    def parse(cls, text: str) -> Pinned:
        """Return what ``text`` names. Raises MeshkitError ``invalid_record`` for any other form."""
        label, at, did = text.partition("@")
        if not at or not valid_label(label):
            raise MeshkitError("invalid_record", "not of the form NAME@did:key:…")
        return cls(label, public_of_did(did))
