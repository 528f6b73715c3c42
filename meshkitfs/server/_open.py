"""Opening the database that the settings name."""

from __future__ import annotations

from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata._stored import StoredMetadata
from meshkitfs.metadata.postgres import PostgresMetadata
from meshkitfs.server.settings import Settings, is_postgresql

__all__ = ["open_home"]


def open_home(settings: Settings) -> StoredMetadata:
    """Open the database, making its tables when they are missing. Raises metadata_unavailable."""
    secret = settings.database_secret.load()
    address = settings.database if secret is None else secret.reveal()
    if is_postgresql(address):
        return PostgresMetadata(address, connections=settings.connections)
    return EmbeddedMetadata.create(address)
