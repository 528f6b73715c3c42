"""The embedded metadata home: one SQLite file that the homes of one machine share by path."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshkitfs.metadata._database import Database, create_file
from meshkitfs.metadata._stored import StoredMetadata

__all__ = ["EmbeddedMetadata"]

_BUSY_SECONDS: Final = 5.0
_THREADS: Final = 4  # short work that takes turns at a lock anyway


class EmbeddedMetadata(StoredMetadata):
    """Metadata in a SQLite file, for one or several homes (and UNIX users) of one machine.

    The key that signs timestamps is in the file. So everybody who may write the file can also vouch for
    the freshness of an old roster: a member who can stop the owner's revocation from being seen. That is
    the accepted risk of a home without a service; it lets nobody forge a roster, capsule or head.

    ``clock`` gives the seconds since the epoch that go into timestamps; ``busy_seconds`` is how long to
    wait for another process's write before answering metadata_unavailable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = _BUSY_SECONDS,
    ) -> None:
        """Open an existing file; raises metadata_unavailable when there is none, and never makes one."""
        self.path = Path(os.path.abspath(path))
        super().__init__(Database(self.path, busy_seconds), _THREADS, clock)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = _BUSY_SECONDS,
    ) -> EmbeddedMetadata:
        """Make the file unless it is there, then open it; its permissions follow the directory's."""
        create_file(Path(os.path.abspath(path)))
        return cls(path, clock=clock, busy_seconds=busy_seconds)
