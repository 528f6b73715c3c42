"""Telling systemd how it goes (sd_notify): ready, what is mounted, that it still lives, that it is ending.

Only where systemd asks for it: elsewhere there is no `Notifier`. The process id never changes after the
start, so no MAINPID is sent. Every command imports this, so it needs no trio; `watchdog` does.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import MutableMapping
from typing import Final

__all__ = ["Notifier"]

_log = logging.getLogger(__name__)

# How long a message may wait for systemd to take it (s).
_SEND_S: Final = 2.0


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


def _line(text: str) -> str:
    return " ".join(text.split())
