"""Waiting for the next request of the kernel without going to sleep between two that follow closely.

A request costs a Python daemon little; falling asleep in epoll and being woken costs it much: five
system calls through trio's scheduler, and on an idle processor tens of microseconds until it runs
again. A program that uses a file sends its next request within microseconds of the last answer, so a
worker that has just answered polls the device for a moment before it goes through trio. On the machine
this was written on that halves the time of every metadata operation.

Three things keep that from doing harm:

- patience adapts: polls that found nothing are cut short, down to a single look;
- after `BUDGET` seconds of back-to-back requests the worker passes through trio once, so that timers,
  sockets and every other task get their turn;
- between the look that finds a request and pyfuse3's read of it nothing is awaited, so two workers
  cannot go for the same request.
"""

from __future__ import annotations

import select
from time import perf_counter

import trio

__all__ = ["BUDGET", "PATIENCE", "Readiness"]

PATIENCE = 50e-6
BUDGET = 2e-3
# Below this a further look is not worth the clock reading.
_LEAST_PATIENCE = 2e-6
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Readiness:
    """One per mount; every worker task waits here. ``patience`` 0 turns the polling off.

    One worker at a time waits in epoll ("armed"), the others are parked. Whoever leaves with a request
    while nobody is armed wakes one parked worker first: the request may turn out to be slow, and the
    next one must still be read.

    For an observer: ``hits`` requests were found by polling, ``sleeps`` times a worker slept, and
    ``patience`` is the present one.
    """

    __slots__ = (
        "_armed",
        "_closed",
        "_hot",
        "_idle_since",
        "_lot",
        "_most",
        "_poll",
        "_waking",
        "_yielded",
        "hits",
        "patience",
        "sleeps",
    )

    def __init__(self, patience: float = PATIENCE) -> None:
        self._most = patience
        self.patience = patience
        self._poll: select.poll | None = None
        self._lot = trio.lowlevel.ParkingLot()
        self._armed = False  # a worker waits in epoll
        self._waking = False  # a worker was unparked and has not run yet
        self._hot = False  # the last request was so recent that polling may pay
        self._closed = False
        self._yielded = 0.0
        self._idle_since = 0.0
        self.hits = 0
        self.sleeps = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when ``fd`` has a request to read, or raise trio.ClosedResourceError."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        look = self._poll.poll
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            if self._hot:
                now = perf_counter()
                if now - self._yielded < BUDGET:
                    give_up = now + self.patience
                    while True:
                        if found := look(0):
                            self.hits += 1
                            self._leave(found[0][1])
                            return
                        if perf_counter() >= give_up:
                            break
                    self.patience = max(self.patience / 2, _LEAST_PATIENCE)
                self._idle_since = now
                self._hot = False
            if self._armed:
                try:
                    await self._lot.park()
                finally:
                    self._waking = False
                continue
            self._armed = True
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                self._armed = False
            self.sleeps += 1
            self._yielded = now = perf_counter()
            if found := look(0):
                if self._most:
                    self._hot = True
                    if now - self._idle_since < 2 * self._most:
                        # It came so soon after we fell asleep that staying awake would have paid.
                        self.patience = self._most
                self._leave(found[0][1])
                return

    def _leave(self, events: int) -> None:
        if events & _GONE:
            # Unmounted or aborted: the read fails for everybody now, so everybody has to go and see.
            self._closed = True
            self._lot.unpark_all()
        elif not self._armed and not self._waking and self._lot:
            self._waking = True
            self._lot.unpark()

    def notify_closing(self, fd: int) -> None:
        """Make every waiting worker stop: `wait_readable` raises from now on."""
        self._closed = True
        self._lot.unpark_all()
        trio.lowlevel.notify_closing(fd)
