"""A deadline for libraries that have none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from meshkitfs.errors import MeshkitError

_T = TypeVar("_T")


def within(seconds: float, work: Callable[[], _T], late: MeshkitError) -> _T:
    """Run ``work``, which raises nothing but `MeshkitError`, and raise ``late`` if it takes too long.

    After the deadline the thread is left to itself: it waits for what only a person or a device can end.
    """
    results: list[_T] = []
    failures: list[MeshkitError] = []

    def run() -> None:
        try:
            results.append(work())
        except MeshkitError as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="key vault", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise late
    return results[0]
