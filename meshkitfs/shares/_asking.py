"""Asking a byte store, with a deadline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from meshkitfs.errors import MeshkitError

__all__ = ["in_time"]

T = TypeVar("T")


async def in_time(seconds: float, call: Callable[[], Awaitable[T]]) -> T:
    """Return what ``call`` gives. Raises ``provider_request_failed`` when that takes too long."""
    try:
        with trio.fail_after(seconds):
            return await call()
    except trio.TooSlowError:
        raise MeshkitError("provider_request_failed", "no answer in time") from None
