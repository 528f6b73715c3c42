"""The owner's side of key release: which service a new share uses, and leaving halves of keys there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from meshkitfs.core.release import EpochSecret, ReleaseService
from meshkitfs.errors import MeshkitError
from meshkitfs.shares._services import Services

__all__ = ["choose_service", "deposit"]

RELEASE_DEADLINE_S: Final = 30

T = TypeVar("T")


async def choose_service(
    services: Services, service_key: bytes, enforcement: str | None, url: str | None
) -> ReleaseService | None:
    """Return the release service of a new share; None if its key is not in halves.

    ``service_key`` is that of the metadata home's timestamps: a release service that looks at other rosters
    would not see who has access. Raises ``invalid_argument``, ``not_supported``, ``metadata_unavailable``.
    """
    if enforcement is None:
        enforcement = "release" if services.release_service or url else "client"
    if enforcement not in ("client", "release"):
        raise MeshkitError("invalid_argument", f"enforcement {enforcement!r}: client or release")
    if enforcement == "client":
        if url:
            raise MeshkitError("invalid_argument", "a release service, and enforcement by the client")
        return None
    places = services.releases.places if services.releases is not None else []
    url = url or services.release_service or next(iter(places), None)
    if url is None or services.releases is None:
        raise MeshkitError("invalid_argument", "this home knows no release service")
    url = url.rstrip("/")
    offer = await _in_time(services.releases.offer, url)
    if offer.home != service_key:
        raise MeshkitError("invalid_argument", f"{url} does not keep the metadata of this home")
    return ReleaseService(url, offer.key)


async def deposit(services: Services, secret: EpochSecret) -> None:
    """Leave the service's half of an epoch there, before any capsule needs it; nothing without a service.

    Raises ``metadata_unavailable``, ``service_key_changed``, ``head_conflict``, and what the service refuses.
    """
    if secret.service is None:
        return
    if services.releases is None:
        raise MeshkitError("key_release_unavailable", f"this home cannot ask {secret.service.url}")
    await _in_time(services.releases.deposit, secret, services.signing())


async def _in_time(work: Callable[..., Awaitable[T]], *args: object) -> T:
    try:
        with trio.fail_after(RELEASE_DEADLINE_S):
            return await work(*args)
    except trio.TooSlowError:
        raise MeshkitError("metadata_unavailable", "no answer from the release service in time") from None
