"""Telling the kernel to forget what it cached, from a thread that may block.

The kernel holds a notification back until the requests it collides with are answered: dropping the pages
of a file waits for reads of it, dropping a name waits for operations in its directory. Sent from the event
loop, that stops the very loop which has to answer them, for ever and beyond the reach of SIGKILL. So
nothing else in the project calls pyfuse3's invalidation functions, and these calls are made by one thread,
which holds no lock of ours.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pyfuse3
import trio

from meshkitfs.vfs.types import ForgetEntry, ForgetInode, Invalidation

__all__ = ["Invalidator"]

_log = logging.getLogger(__name__)

# Nothing was cached; a directory that still has names; a busy mount point below the name.
_HARMLESS = frozenset({errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY})
# The mount is gone, and every cache of it.
_GONE = frozenset({errno.ENOTCONN, errno.ENODEV, errno.EBADF})


@dataclass(frozen=True, slots=True)
class _Mark(ForgetInode):
    """A place in the queue: no request to the kernel, but a call when everything before it is done."""

    reached: Callable[[], None] = lambda: None


class Invalidator:
    """Delivers everything put into ``requests`` to the kernel, in order, until `close`.

    Start it only while a pyfuse3 session is mounted, and see it `finished` before the session is
    destroyed: the thread uses the session without asking.
    """

    def __init__(self, requests: queue.SimpleQueue[Invalidation]) -> None:
        self._requests = requests
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="meshkitfs-invalidate", daemon=True)
        self.delivered = 0

    def start(self) -> None:
        self._thread.start()

    async def drained(self) -> None:
        """Return when everything that was in the queue at the call has been delivered."""
        reached = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._requests.put(_Mark(0, reached=lambda: token.run_sync_soon(reached.set)))
        await reached.wait()

    def close(self) -> None:
        """Begin no further delivery; does not wait for one the kernel is holding back."""
        self._closing = True
        self._requests.put(_Mark(0))

    async def finished(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the thread to end after `close`; say whether it has."""
        await trio.to_thread.run_sync(self._thread.join, timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._closing:
            request = self._requests.get()
            if isinstance(request, _Mark):
                request.reached()
            elif not self._closing:
                self._deliver(request)

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
        self.delivered += 1
