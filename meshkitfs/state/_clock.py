"""Time that never runs backwards as far as grants are concerned."""

from __future__ import annotations

import time
from collections.abc import Callable

from meshkitfs.errors import MeshkitError
from meshkitfs.state._database import State

__all__ = ["Clock"]

# A clock that NTP pulls back by a little is not an attack.
_TOLERANCE_S = 120
# A signed time may raise the floor only this far past our own clock, so that one wrong server clock
# cannot lock a device out for years.
_MAX_LEAD_S = 60
# The floor is a promise about minutes; writing it more often would only wear the disk.
_PERSIST_STEP_S = 10


class Clock:
    """Wall-clock seconds with a persisted floor."""

    def __init__(self, state: State, wall: Callable[[], float] = time.time) -> None:
        self._state = state
        self._wall = wall
        self._floor = int(state.setting("clock_floor") or 0)
        self._persisted = self._floor

    def now(self) -> int:
        """Return the time in whole seconds, at least the floor.

        Raises MeshkitError ``clock_rollback`` if this device's clock is well behind the floor.
        """
        wall = int(self._wall())
        if wall < self._floor - _TOLERANCE_S:
            raise MeshkitError("clock_rollback", f"the clock is {self._floor - wall} s behind")
        return max(wall, self._floor)

    def exact(self) -> float:
        """Return the time as `now` does, with its fraction: what is not rounded down ends when it says."""
        return max(self._wall(), float(self.now()))

    def raise_floor(self, seen: int) -> None:
        """Note that ``seen`` (seconds, from a record whose every check passed) has been."""
        floor = max(self._floor, min(seen, int(self._wall()) + _MAX_LEAD_S))
        self._floor = floor
        if floor >= self._persisted + _PERSIST_STEP_S:
            self._state.set_setting("clock_floor", floor)
            self._persisted = floor

    def reset(self) -> None:
        """Forget the floor: the person says that the clock was wrong before, and is right now."""
        self._floor = self._persisted = 0
        self._state.set_setting("clock_floor", 0)
