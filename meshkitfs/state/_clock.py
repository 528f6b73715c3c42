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
# Goes on while the machine sleeps, and nobody can set it.
_RUNNING = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """Wall-clock seconds with a persisted floor, which rises by itself while this runs.

    ``running`` is a clock that goes on evenly, whatever becomes of ``wall``.
    """

    def __init__(
        self,
        state: State,
        wall: Callable[[], float] = time.time,
        running: Callable[[], float] = lambda: time.clock_gettime(_RUNNING),
    ) -> None:
        self._state = state
        self._wall = wall
        self._running = running
        self._seen = int(state.setting("clock_floor") or 0)
        self._seen_at = running()
        self._persisted = self._seen

    @property
    def _floor(self) -> int:
        # Nothing was ever seen: then this device's clock is all there is.
        return self._seen and self._seen + int(self._running() - self._seen_at)

    def now(self) -> int:
        """Return the time in whole seconds, at least the floor.

        Raises MeshkitError ``clock_rollback`` if this device's clock is well behind the floor.
        """
        wall, floor = int(self._wall()), self._floor
        if wall < floor - _TOLERANCE_S:
            raise MeshkitError("clock_rollback", f"the clock is {floor - wall} s behind")
        return max(wall, floor)

    def exact(self) -> float:
        """Return the time as `now` does, with its fraction: what is not rounded down ends when it says."""
        return max(self._wall(), float(self.now()))

    def raise_floor(self, seen: int) -> None:
        """Note that ``seen`` (seconds) has been: a record that passed every check says so, or it was used."""
        floor = self._floor
        seen = min(seen, int(self._wall()) + _MAX_LEAD_S)
        if seen > floor:
            self._seen, self._seen_at, floor = seen, self._running(), seen
        if floor >= self._persisted + _PERSIST_STEP_S:
            self._state.set_setting("clock_floor", floor)
            self._persisted = floor

    def reset(self) -> None:
        """Forget the floor: the person says that the clock was wrong before, and is right now."""
        self._seen = self._persisted = 0
        self._state.set_setting("clock_floor", 0)
