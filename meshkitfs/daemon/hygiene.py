"""What a process that holds keys does with itself: no core dump, and no other process in its memory."""

from __future__ import annotations

import ctypes
import resource
from typing import Any, Final

from ..core import secret_memory

__all__ = ["harden", "report"]

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


def harden() -> None:
    """Keep this process's memory to itself. Before any key is loaded; a program that is executed begins anew.

    No core dump is written, and processes of the same user can neither trace this one nor read its memory or
    environment. Root can.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def report() -> dict[str, Any]:
    """Say how far that goes here, for ``user.meshkit.capabilities``.

    ``locked_memory``: the memory that holds keys for long is locked against swapping (copies that libraries
    make are not). ``traceable``: processes of the same user may read this one's memory.
    ``core_dumps``: a crash may write it to a disk.
    """
    return {
        "locked_memory": secret_memory.locked(),
        "traceable": _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0,
        "core_dumps": resource.getrlimit(resource.RLIMIT_CORE)[0] != 0,
    }
