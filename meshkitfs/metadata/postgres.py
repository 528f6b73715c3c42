"""The metadata home of a service that one machine is too small for: a PostgreSQL database.

Needs the packages of the extra ``server``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from meshkitfs.metadata._postgres import PostgresDatabase
from meshkitfs.metadata._stored import StoredMetadata

__all__ = ["PostgresMetadata"]

_CONNECTIONS: Final = 8
_SECONDS: Final = 5.0


class PostgresMetadata(StoredMetadata):
    """Metadata in a PostgreSQL database that any number of processes on any number of machines share.

    ``conninfo`` is libpq's, a URL or ``key=value`` words; the tables are made when they are missing. At most
    ``connections`` transactions are under way at once (one more connection listens); each takes at most
    ``seconds``, then it is metadata_unavailable. ``clock`` gives the time that goes into timestamps.
    """

    def __init__(
        self,
        conninfo: str,
        *,
        clock: Callable[[], float] = time.time,
        connections: int = _CONNECTIONS,
        seconds: float = _SECONDS,
    ) -> None:
        """Open the database. Raises metadata_unavailable, invalid_config."""
        database = PostgresDatabase(conninfo, connections=connections, seconds=seconds)
        super().__init__(database, connections, clock)
