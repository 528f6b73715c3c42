"""When the keys of an identity are to be replaced without anybody asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from meshkitfs.core.durations import parse_span
from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Identity
from meshkitfs.state import State

__all__ = ["NEVER", "Schedule", "keys_since"]

NEVER: Final = "never"
_SETTING: Final = "rotate_every"
LEAST_S: Final = 7 * 86400
MOST_S: Final = 10 * 365 * 86400
# For how long (s) it waits for a moment at which nothing is unsent, and how much later each further device of
# an identity does it: by then the first one has.
PATIENCE_S: Final = 86400
APART_S: Final = 3600


def keys_since(identity: Identity) -> int:
    """Return when (UNIX seconds) the identity got the keys that it has: the younger pair counts as both."""
    records = [IdentityRecord.parse_self_signed(record) for record in identity.chain]
    newest = records[-1]
    since = newest.created
    for record in reversed(records):
        if (record.sig, record.enc) != (newest.sig, newest.enc):
            break
        since = record.created
    return since


class Schedule:
    """What one home has been told. ``place`` is the place of this device among those of its identity."""

    def __init__(self, state: State, quiet: Callable[[], bool], place: Callable[[], int]) -> None:
        self._state = state
        self._quiet = quiet
        self._place = place

    @property
    def every(self) -> int:
        """How often (seconds); 0 for never."""
        value = self._state.setting(_SETTING)
        return value if type(value) is int else 0

    def set(self, text: str) -> None:
        """Replace the keys every ``text`` ("180d") from now on, or "never". Blocks.

        Raises ``invalid_argument`` for anything else, and for less than a week or more than ten years.
        """
        if text == NEVER:
            self._state.drop_setting(_SETTING)
            return
        span = parse_span(text)
        if not LEAST_S <= span <= MOST_S:
            raise MeshkitError("invalid_argument", f"{text!r}: 7d at least and 3650d at most, or never")
        self._state.set_setting(_SETTING, span)

    def next(self, identity: Identity) -> int:
        """Return when (UNIX seconds) it is to be done next; 0 for never."""
        return keys_since(identity) + self.every if self.every else 0

    def due(self, identity: Identity, now: int) -> bool:
        """Return whether it is to be done now."""
        at = self.next(identity)
        if not at or now < at + APART_S * self._place():
            return False
        return self._quiet() or now >= at + PATIENCE_S

    def as_dict(self, identity: Identity) -> dict[str, Any]:
        """Return ``every`` (seconds) and ``next`` (time), both None for never."""
        return {"every": self.every or None, "next": self.next(identity) or None}
