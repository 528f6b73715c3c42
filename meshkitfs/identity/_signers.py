"""The signing keys that a person has had, as a verified chain tells them, and since when each is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from meshkitfs.core.identity_record import verify_links
from meshkitfs.core.keys import kid_of

__all__ = ["OVERLAP_S", "Signer", "Signers"]

# For how long after a rotation a record may still be signed with the key of before: what its owner's devices
# had not signed anew when they died. What is seen later than that, and is not known, is a thief's.
OVERLAP_S: Final = 86400


@dataclass(frozen=True, slots=True)
class Signer:
    """One key of a person: its place in their chain, and since when (UNIX seconds) it is replaced."""

    public: bytes
    place: int
    replaced: int | None

    def over(self, now: int) -> bool:
        """Whether nothing new can be signed with it any more."""
        return self.replaced is not None and now >= self.replaced + OVERLAP_S


class Signers:
    """The signing keys of one person, by kid. ``chain`` is a chain or the end of one, known to be theirs.

    Raises ``invalid_record`` if it does not verify.
    """

    def __init__(self, chain: Sequence[bytes]) -> None:
        self._signers = _signers(tuple(chain))
        self.keys = {kid: signer.public for kid, signer in self._signers.items()}

    def get(self, kid: bytes) -> Signer | None:
        """Return the key of this kid, if it is or was theirs."""
        return self._signers.get(kid)

    @property
    def several(self) -> bool:
        """Whether there is more than one, so that which of them signed makes a difference."""
        return len(self._signers) > 1


@lru_cache(maxsize=1024)
def _signers(chain: tuple[bytes, ...]) -> dict[bytes, Signer]:
    found: dict[bytes, Signer] = {}
    newest: Signer | None = None
    for record in verify_links(chain):
        if newest is not None and newest.public == record.sig:
            continue
        if newest is not None:
            found[kid_of(newest.public)] = Signer(newest.public, newest.place, record.created)
        # A key that comes back is the one it was: nothing makes a replaced key new again.
        newest = None if record.kid in found else Signer(record.sig, record.seq, None)
        if newest is not None:
            found[record.kid] = newest
    return found
