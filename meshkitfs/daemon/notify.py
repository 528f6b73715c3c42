"""Telling systemd how it goes (sd_notify): ready, what is mounted, that it still lives, that it is ending.

Only where systemd asks for it: elsewhere there is no `Notifier`. The process id never changes after the
start, so no MAINPID is sent.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Final

import trio

__all__ = ["Notifier", "answers", "keep"]

_log = logging.getLogger(__name__)

# How often the status text is looked at (s), and how long a message may wait for systemd to take it.
LOOK_S: Final = 5.0
_SEND_S: Final = 2.0
# Of the time after which systemd takes us for dead: when we say that we are not.
_SHARE: Final = 1 / 3


class Notifier:
    """The way to the manager. ``watchdog_s``: how long it waits for a sign of life, None if it does not."""

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        # "@" stands for the NUL of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""

    @classmethod
    def take(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier | None:
        """Return the notifier that ``environ`` asks for, and take that out: children are not the service."""
        address = environ.pop("NOTIFY_SOCKET", "")
        wait, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if address[:1] not in ("/", "@"):
            return None
        watched = wait.isascii() and wait.isdigit() and int(wait) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(wait) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """Say that the start is over."""
        self._status = _line(status)
        self._send("READY=1", f"STATUS={self._status}")

    def status(self, status: str) -> None:
        """Say what is to be shown by ``systemctl status``; nothing is sent if that is so already."""
        if (line := _line(status)) != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def stopping(self, status: str) -> None:
        """Say that it is ending by itself, and is not to be taken for hung while it does."""
        self._status = _line(status)
        self._send("STOPPING=1", f"STATUS={self._status}")

    def alive(self) -> None:
        """Say that it lives."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # A manager that reloads takes nothing for a moment; one that hangs must not hang us.
                sock.settimeout(_SEND_S)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            _log.warning("systemd could not be told: %s", os.strerror(error.errno or errno.ETIMEDOUT))


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


def _line(text: str) -> str:
    return " ".join(text.split())
