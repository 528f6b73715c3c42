"""pyfuse3's worker tasks under supervision: the names it takes from trio, with a deadline on each request.

A process whose request is not answered cannot even be killed, so every request needs an end. A trio
cancel scope per request costs half as much as the whole request does. So each worker task lives in one
long-lived scope instead; a watchman looks from time to time whether a worker has been at the same request
for too long, and cancels that worker's scope. The handler then answers ETIMEDOUT, and the worker, whose
scope is spent, starts over in a new one.

pyfuse3 finds trio through a module global, and its own asyncio mode replaces that global; so do we.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from math import inf
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import trio
from trio.lowlevel import Task, current_task

from meshkitfs.fuse.spin import Readiness

__all__ = ["SupervisedNursery", "Workers"]


class _Worker:
    """What the watchman sees of one worker task. ``since`` is infinite while it waits for a request."""

    __slots__ = ("limit", "scope", "since")

    def __init__(self, limit: float) -> None:
        self.scope = trio.CancelScope()
        self.since = inf
        self.limit = limit


class _Done:
    """An awaitable that is already done; awaiting it costs no coroutine."""

    __slots__ = ()

    def __await__(self) -> Iterator[None]:
        return iter(())


_DONE = _Done()


class Workers:
    """Stands in for the ``trio`` module inside pyfuse3, for one mount.

    ``deadline`` (seconds) holds for a request unless its handler asks for another with `allow`;
    ``readiness`` decides how a worker waits for the next request.
    """

    ClosedResourceError = trio.ClosedResourceError

    def __init__(self, deadline: float, readiness: Readiness) -> None:
        self._deadline = deadline
        self._workers: dict[Task, _Worker] = {}
        self.lowlevel = SimpleNamespace(
            wait_readable=readiness.wait_readable,
            notify_closing=readiness.notify_closing,
            current_task=current_task,
            current_trio_token=trio.lowlevel.current_trio_token,
        )

    # -- what the handlers and the mount use -----------------------------------------------------------

    def allow(self, seconds: float) -> None:
        """Give the request the calling task is at work on ``seconds``, counted from its arrival."""
        if worker := self._workers.get(current_task()):
            worker.limit = seconds

    def overdue(self) -> bool:
        """Say whether the calling task was told to give up its request because it took too long."""
        worker = self._workers.get(current_task())
        return worker is not None and worker.scope.cancel_called

    @property
    def busy(self) -> int:
        """How many requests are being worked on."""
        return sum(worker.since != inf for worker in self._workers.values())

    async def watch(self) -> None:
        """End requests that are over their time, at most a quarter of the deadline late; never returns."""
        while True:
            await trio.sleep(self._deadline / 4)
            now = perf_counter()
            for worker in self._workers.values():
                if now - worker.since > worker.limit:
                    worker.scope.cancel()

    # -- what pyfuse3 uses -----------------------------------------------------------------------------

    def Lock(self) -> Workers:  # noqa: N802 - the name pyfuse3 calls
        """Return the "lock" around a worker's wait; `Readiness` does the locking, this notes who is busy."""
        return self

    def __aenter__(self) -> _Done:
        worker = self._workers[current_task()]
        worker.since = inf
        if worker.scope.cancel_called:
            # For pyfuse3 this is the orderly end of the worker; `_supervise` starts the next one.
            raise trio.ClosedResourceError
        return _DONE

    def __aexit__(self, *failure: object) -> _Done:
        worker = self._workers[current_task()]
        worker.since = perf_counter()
        worker.limit = self._deadline
        return _DONE

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[SupervisedNursery]:
        """Open the nursery pyfuse3 starts its workers in."""
        async with trio.open_nursery() as nursery:
            yield SupervisedNursery(nursery, self._supervise)

    async def _supervise(self, loop: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run one worker's ``loop`` in a scope of its own, and again in a new one after each spent scope."""
        task = current_task()
        try:
            while True:
                worker = self._workers[task] = _Worker(self._deadline)
                with worker.scope:
                    await loop(*args)
                if not worker.scope.cancel_called:
                    return
        finally:
            del self._workers[task]


class SupervisedNursery:
    """The part of trio.Nursery that pyfuse3 uses; every task started in it is supervised."""

    def __init__(self, nursery: trio.Nursery, supervise: Callable[..., Awaitable[None]]) -> None:
        self._nursery = nursery
        self._supervise = supervise

    def start_soon(self, loop: Callable[..., Awaitable[None]], *args: Any, name: str | None = None) -> None:
        self._nursery.start_soon(self._supervise, loop, *args, name=name)
