"""Keeping systemd informed while a mount lives: its status, and that it answers.

A process that runs and a filesystem that hangs look alike from outside, so the filesystem itself is asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from meshkitfs.daemon.notify import Notifier

__all__ = ["LOOK_S", "answers", "keep"]

# How often the status text is looked at (s).
LOOK_S: Final = 5.0
# Of the time after which systemd takes us for dead: when we say that we are not.
_SHARE: Final = 1 / 3


async def keep(notifier: Notifier, status: Callable[[], str], alive: Callable[[], Awaitable[bool]]) -> None:
    """Keep the status current, and say that it lives while it does; until cancelled.

    ``alive`` is waited for no longer than the watchdog would: what does not answer is not said to live.
    """
    wait = notifier.watchdog_s
    every = LOOK_S if wait is None else min(LOOK_S, wait * _SHARE)
    while True:
        if wait is not None:
            with trio.move_on_after(wait):
                if await alive():
                    notifier.alive()
        notifier.status(status())
        await trio.sleep(every)


async def answers(path: str) -> bool:
    """Whether the filesystem at ``path`` answers: asked through the kernel, as every program does.

    So it is not only this loop that is seen to run, but the whole way of a request.
    """
    try:
        await trio.to_thread.run_sync(os.statvfs, path, abandon_on_cancel=True)
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True
