"""Telling who keeps the log of this device what was opened, and what was refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from meshkitfs.errors import MeshkitError
from meshkitfs.shares import AnyShare, Node
from meshkitfs.state import AuditLine
from meshkitfs.vfs._faults import path_of

__all__ = ["CALLER", "Opens"]

# The process that the request under way comes from, as the kernel tells; 0 if it is not known.
CALLER: Final[ContextVar[int]] = ContextVar("caller", default=0)

_WRITES: Final = os.O_WRONLY | os.O_RDWR
# Operations that are asked for by what they do to a name or handle are called by what is wanted of it.
_ACTIONS: Final = {"opendir": "list", "open": "read"}


class Opens:
    """``record`` is given a line for each open of a file or directory and for each refusal, and is quick."""

    def __init__(self, record: Callable[[AuditLine], None] | None) -> None:
        self._record = record

    def allowed(self, share: AnyShare, node: Node, action: str) -> None:
        """Somebody opened ``node`` to do ``action``: read, write, create or list."""
        if self._record is not None:
            self._say(share, node, action, "")

    def refused(
        self, share: AnyShare, node: Node | None, operation: str, flags: object, error: MeshkitError
    ) -> None:
        """``operation`` on ``node`` failed with a refusal or fault; ``flags`` are those of an open."""
        if self._record is not None:
            action = _ACTIONS.get(operation, operation)
            if operation == "open" and isinstance(flags, int) and flags & _WRITES:
                action = "write"
            self._say(share, node, action, error.code)

    def _say(self, share: AnyShare, node: Node | None, action: str, code: str) -> None:
        assert self._record is not None
        now = int(time.time())
        path = path_of(share, node).partition("/")[2]
        self._record(AuditLine(now, now, share.row.share, path, action, code, _program(CALLER.get())))


def _program(pid: int) -> str:
    if pid <= 0:
        return ""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read(64).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""  # it has ended, or lives in another PID namespace
