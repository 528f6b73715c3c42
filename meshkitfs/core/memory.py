"""What an identity remembers, in letters to itself: so a recovery file finds shares that are younger than it.

The text is cut into parts, each signed and then sealed to the identity's own encryption key. The metadata
service sees a few letters of padded length, as any others. It can withhold them, and show older ones: then
what is newer is not found, and nothing else; a share is opened by the gate's checks as ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from meshkitfs.core import cose, hpke
from meshkitfs.core.blocks import frame, unframe
from meshkitfs.core.fields import Check, blob, blob_up_to, check_fields, refuse, time, uint
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.errors import MeshkitError

__all__ = ["MEMORY_MAGIC", "Whole", "open_memories", "open_memory", "seal_memory"]

MEMORY_MAGIC: Final = b"MKM1\x01"
TYPE: Final = "mk/memory@1"
_INFO: Final = b"mk/memory@1\0"
# Bytes of the text in one letter, and how many letters there may be.
PART: Final = 48 * 1024
PARTS_MOST: Final = 256

_FIELDS: Final[dict[str, Check]] = {
    "t": lambda value: value == TYPE,
    "to": blob(16),
    "made": time,
    "hash": blob(32),
    "part": uint(),
    "parts": uint(1, PARTS_MOST),
    "text": blob_up_to(PART),
}


def seal_memory(signer: SigningKey, text: bytes, made: int, public: bytes) -> list[bytes]:
    """Return the letters that hold ``text`` as of ``made`` (UNIX seconds), for the X-Wing key ``public``.

    Raises MeshkitError ``no_space`` if it needs more of them than there may be.
    """
    to, digest = kid_of(public), hashlib.sha256(text).digest()
    parts = -(-len(text) // PART)
    if not 0 < parts <= PARTS_MOST:
        raise MeshkitError("no_space", f"{len(text)} bytes to remember")
    letters = []
    for part in range(parts):
        payload = {
            "t": TYPE,
            "to": to,
            "made": made,
            "hash": digest,
            "part": part,
            "parts": parts,
            "text": text[part * PART : (part + 1) * PART],
        }
        signed = cose.sign1(signer, TYPE, payload)
        letters.append(MEMORY_MAGIC + hpke.wrap(public, _INFO + to, frame(signed)))
    return letters


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A text whose letters are all there: when it was ``made`` (UNIX seconds), and where among the letters
    given its ``places`` are."""

    made: int
    text: bytes = dataclasses.field(repr=False)
    places: tuple[int, ...]


def open_memories(
    letters: Iterable[tuple[EncryptionKey, bytes]], signers: Mapping[bytes, bytes]
) -> list[Whole]:
    """Return the whole texts among ``letters``, the newest first.

    Each letter comes with the key whose mailbox it was in. One that is not signed by one of ``signers``
    (kid -> public key), or is not whole, counts as not there: anybody may post to a mailbox.
    """
    found: dict[tuple[int, bytes, int], dict[int, tuple[bytes, int]]] = {}
    for place, (key, letter) in enumerate(letters):
        try:
            made, digest, parts, part, text = _opened(key, letter, signers)
        except MeshkitError:
            continue
        found.setdefault((made, digest, parts), {})[part] = text, place
    wholes = []
    for (made, digest, parts), there in sorted(found.items(), key=lambda item: item[0], reverse=True):
        text = b"".join(there[part][0] for part in sorted(there))
        if len(there) == parts and hashlib.sha256(text).digest() == digest:
            wholes.append(Whole(made, text, tuple(place for _, place in there.values())))
    return wholes


def open_memory(
    letters: Iterable[tuple[EncryptionKey, bytes]], signers: Mapping[bytes, bytes]
) -> tuple[int, bytes] | None:
    """Return when the newest whole text of `open_memories` was made, and the text; None if there is none."""
    wholes = open_memories(letters, signers)
    return (wholes[0].made, wholes[0].text) if wholes else None


def _opened(
    key: EncryptionKey, letter: bytes, signers: Mapping[bytes, bytes]
) -> tuple[int, bytes, int, int, bytes]:
    if not letter.startswith(MEMORY_MAGIC):
        raise refuse("not a letter of this kind")
    signed = unframe(hpke.unwrap(key, _INFO + key.kid, letter[len(MEMORY_MAGIC) :]))
    payload, _ = cose.verify1(signed, signers, TYPE)
    check_fields(payload, _FIELDS, "a letter to oneself")
    if payload["to"] != key.kid or payload["part"] >= payload["parts"]:
        raise refuse("a letter to somebody else")
    return payload["made"], payload["hash"], payload["parts"], payload["part"], payload["text"]
