"""When a share's changes are committed: a single save at once, a flood of files in a few commits."""

from __future__ import annotations

import trio

__all__ = ["Pace"]

# How soon a change is published after a quiet time, and how often at most while changes go on: a single
# save is seen at once, a flood of files becomes a few heads.
QUICK_DELAY_S = 0.05
BUSY_DELAY_S = 1.0
IDLE_DELAY_S = 5.0
RETRY_DELAY_S = 5.0


class Pace:
    """Knows when the next commit of one share is due. Times are those of trio's clock; 0 means none."""

    def __init__(self) -> None:
        self._changed_at = 0.0
        self._urgent_at = 0.0
        self._pressed = False
        self._last = 0.0
        self._wake = trio.Event()

    def changed(self) -> None:
        """Something changed."""
        if not self._changed_at:
            self._changed_at = trio.current_time()
            self._look_again()

    def hurry(self) -> None:
        """Publish soon: a file was closed, or a name was changed."""
        if not self._urgent_at:
            self._urgent_at = trio.current_time()
            self._look_again()

    def press(self) -> None:
        """Commit now: memory or the spool is full, and only a commit makes room."""
        self._pressed = True
        self._look_again()

    def taken(self) -> None:
        """A commit takes everything that changed until now."""
        self._changed_at = self._urgent_at = 0.0
        self._pressed = False

    def ended(self) -> None:
        """A cycle has ended, well or not."""
        self._last = trio.current_time()

    async def until_due(self, *, stuck: bool) -> None:
        """Wait until the next cycle: soon after a close, later while a file is still being written.

        ``stuck`` says that the last one failed, so that the next is a retry.
        """
        while True:
            due = self._changed_at + IDLE_DELAY_S
            if self._urgent_at:
                due = min(due, max(self._urgent_at + QUICK_DELAY_S, self._last + BUSY_DELAY_S))
            if self._pressed:
                due = 0.0
            if stuck:
                due = max(due, self._last + RETRY_DELAY_S)
            if not await self._wait(due):
                return

    async def until_overdue(self) -> None:
        """Wait until a change must not wait for a publication under way: it is old, or room is short."""
        while not (self._pressed and self._changed_at):
            due = self._changed_at + IDLE_DELAY_S if self._changed_at else float("inf")
            if not await self._wait(due):
                return

    async def _wait(self, due: float) -> bool:
        """Wait for ``due``; True if something new has to be looked at instead."""
        if trio.current_time() >= due:
            return False
        with trio.move_on_at(due):
            await self._wake.wait()
        return True

    def _look_again(self) -> None:
        """Have everybody who waits look again: a commit, and what watches over a publication under way."""
        self._wake.set()
        self._wake = trio.Event()
