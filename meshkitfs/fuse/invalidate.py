"""Telling the kernel to forget what it cached, from threads that may block.

The kernel holds a notification back until the requests it collides with are answered: dropping the pages
of a file waits for reads of it, dropping a name waits for operations in its directory. Sent from the event
loop, that stops the very loop which has to answer them, for ever and beyond the reach of SIGKILL. So
nothing else in the project calls pyfuse3's invalidation functions, and these calls are made by threads of
their own, which hold no lock of ours meanwhile. There are several, so that one slow read of one file does
not keep the kernel from forgetting all others: a revocation must not wait for it.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import pyfuse3
import trio

from meshkitfs.vfs.types import ForgetEntry, ForgetInode, Invalidation

__all__ = ["Invalidator"]

_log = logging.getLogger(__name__)

# Nothing was cached; a directory that still has names; a busy mount point below the name.
_HARMLESS = frozenset({errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY})
# The mount is gone, and every cache of it.
_GONE = frozenset({errno.ENOTCONN, errno.ENODEV, errno.EBADF})
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Mark(ForgetInode):
    """A place in the queue: no request to the kernel, but a call when everything before it is done."""

    reached: Callable[[], None] = lambda: None


class Invalidator:
    """Delivers everything put into ``requests`` to the kernel until `close`.

    Deliveries begin in the order of the queue; one that the kernel holds back is overtaken by the next.
    Start it only while a pyfuse3 session is mounted, and see it `finished` before the session is destroyed:
    its threads use the session without asking. ``delivered`` counts what the kernel has been told.
    """

    def __init__(self, requests: queue.SimpleQueue[Invalidation]) -> None:
        self._requests = requests
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._take = threading.Lock()  # held to take a request and number it, in one step
        self._state = threading.Condition()  # guards the numbers below
        self._idle = 0
        self._taken = 0
        self._under_way: set[int] = set()
        self.delivered = 0

    def start(self) -> None:
        """Begin to deliver."""
        with self._state:
            self._hire()

    async def drained(self) -> None:
        """Return when everything that was in the queue at the call has been delivered."""
        reached = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._requests.put(_Mark(0, reached=lambda: token.run_sync_soon(reached.set)))
        await reached.wait()

    def close(self) -> None:
        """Begin no further delivery; does not wait for those the kernel is holding back."""
        self._closing = True
        self._requests.put(_Mark(0))

    async def finished(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the threads to end after `close`; say whether they have."""
        return await trio.to_thread.run_sync(self._join, timeout)

    def _join(self, timeout: float) -> bool:
        until = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _hire(self) -> None:
        self._threads.append(threading.Thread(target=self._work, name="meshkitfs-invalidate", daemon=True))
        self._idle += 1
        self._threads[-1].start()

    def _work(self) -> None:
        while True:
            with self._take:
                request = self._requests.get()
                with self._state:
                    self._idle -= 1
                    if self._closing:
                        self._requests.put(_Mark(0))  # for the next thread
                        return
                    if not self._idle and len(self._threads) < _MOST_THREADS:
                        self._hire()
                    self._taken += 1
                    number = self._taken
                    self._under_way.add(number)
            if isinstance(request, _Mark):
                with self._state:
                    while min(self._under_way) != number:
                        self._state.wait()
                request.reached()
            else:
                self._deliver(request)
            with self._state:
                self.delivered += not isinstance(request, _Mark)
                self._idle += 1
                self._under_way.remove(number)
                self._state.notify_all()

    def _deliver(self, request: Invalidation) -> None:
        try:
            if isinstance(request, ForgetEntry):
                pyfuse3.invalidate_entry(request.parent, request.name, request.deleted)
            else:
                pyfuse3.invalidate_inode(request.ino, request.attr_only)
        except OSError as error:
            if error.errno in _GONE:
                self._closing = True
            elif error.errno not in _HARMLESS:
                _log.warning("the kernel refused to forget something: %s", error)
        except Exception:
            _log.exception("an invalidation failed in a way nobody foresaw")
