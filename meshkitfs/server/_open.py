"""Opening the database that the settings name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata._stored import StoredMetadata
from meshkitfs.metadata.operator import Operator
from meshkitfs.metadata.postgres import PostgresMetadata
from meshkitfs.server.settings import Settings, is_postgresql

__all__ = ["open_home", "operate"]

# What an operator does may take longer than a request may.
_OPERATOR_SECONDS: Final = 120.0

T = TypeVar("T")


def open_home(settings: Settings) -> StoredMetadata:
    """Open the database, making its tables when they are missing. Raises metadata_unavailable."""
    secret = settings.database_secret.load()
    address = settings.database if secret is None else secret.reveal()
    if is_postgresql(address):
        return PostgresMetadata(address, connections=settings.connections)
    return EmbeddedMetadata.create(address)


async def operate(settings: Settings, work: Callable[[Operator], Awaitable[T]]) -> T:
    """Do an operator's work on the database that the settings name. Raises metadata_unavailable."""

    def opened() -> StoredMetadata:
        secret = settings.database_secret.load()
        address = settings.database if secret is None else secret.reveal()
        if is_postgresql(address):
            return PostgresMetadata(address, connections=1, seconds=_OPERATOR_SECONDS)
        return EmbeddedMetadata(address, busy_seconds=_OPERATOR_SECONDS)

    home = await trio.to_thread.run_sync(opened)
    try:
        return await work(Operator(home))
    finally:
        home.close()
