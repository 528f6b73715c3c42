"""The metadata home that a configuration names, opened; and how late what it tells may be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from meshkitfs.core.keys import SigningKey
from meshkitfs.daemon.config import Config, MetadataConfig
from meshkitfs.identity import Holder
from meshkitfs.metadata import (
    RECHECK_S,
    EmbeddedMetadata,
    HttpMetadata,
    KnownService,
    Metadata,
    Releases,
)
from meshkitfs.net import Secret, SecretSource, Tls
from meshkitfs.state import State

__all__ = ["StatePin", "default_release_service", "lateness", "open_metadata", "open_releases"]

_PIN: Final = "service_key"


class StatePin:
    """The key of the metadata service's timestamps, in this home's state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def get(self) -> bytes | None:
        value = self._state.setting(_PIN)
        return value if isinstance(value, bytes) else None

    def set(self, key: bytes) -> None:
        self._state.set_setting(_PIN, key)


class _Meanwhile:
    """The key of a service that is asked before there is a state; whoever goes on pins it for good."""

    def __init__(self) -> None:
        self._key: bytes | None = None

    def get(self) -> bytes | None:
        return self._key

    def set(self, key: bytes) -> None:
        self._key = key


@asynccontextmanager
async def open_metadata(
    settings: MetadataConfig, holder: Holder, state: State | None, join: Secret | None = None
) -> AsyncIterator[Metadata]:
    """Open the metadata home, and close it at the end. The feed of a service is its user's to run.

    Without a ``state`` its key is remembered for as long as it is open. ``join`` takes the place of the
    secret for newcomers that ``settings`` name. Raises invalid_config, and metadata_unavailable for a file
    that is not there.
    """
    if settings.type == "embedded":
        assert settings.path is not None
        embedded = EmbeddedMetadata(settings.path)
        try:
            yield embedded
        finally:
            embedded.close()
        return
    source = SecretSource(settings.join_token_env, settings.join_token_file)
    named = source.env is not None or source.file is not None
    service = HttpMetadata(
        settings.url,
        holder.request_key,
        _Meanwhile() if state is None else StatePin(state),
        mailbox=holder.identity.encryption.kid,
        tls=_tls(settings),
        uds=settings.socket,
        # Asked for when it is needed: nobody who has joined needs the file any more.
        join=(lambda: join) if join is not None else source.load if named else None,
        steady=holder.steady,
    )
    try:
        yield service
    finally:
        await service.aclose()


def _tls(settings: MetadataConfig) -> Tls:
    return Tls(settings.ca_file, settings.client_cert, settings.client_key)


@asynccontextmanager
async def open_releases(settings: Config, signing: Callable[[], SigningKey]) -> AsyncIterator[Releases]:
    """Yield the release services that a home knows: its metadata service, and the one it names."""
    known = []
    if settings.metadata.url:
        known.append(KnownService(settings.metadata.url, _tls(settings.metadata), settings.metadata.socket))
    if settings.release.service and settings.release.service != settings.metadata.url:
        known.append(KnownService(settings.release.service, Tls(settings.release.ca_file)))
    releases = Releases(known, signing)
    try:
        yield releases
    finally:
        await releases.aclose()


def default_release_service(settings: Config) -> str:
    """Return the release service that new shares use unless that is said; "" if they use none."""
    if settings.release.enforcement != "release":
        return ""
    return settings.release.service or settings.metadata.url


def lateness(metadata: Metadata, lease_s: float, ahead_s: float) -> float:
    """Return for how many seconds a change may go unnoticed, whatever becomes of the notifications.

    A service is asked about each share in use every `RECHECK_S`, and when a lease of ``lease_s`` is renewed,
    ``ahead_s`` before its end.
    """
    return min(RECHECK_S, lease_s - ahead_s) if isinstance(metadata, HttpMetadata) else 0.0
