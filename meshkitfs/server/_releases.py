"""The routes of the release service. A service without its key has them, and releases nothing."""

from __future__ import annotations

from typing import Any

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata.service import Asker, Releasing, Service
from meshkitfs.server import _models as m
from meshkitfs.server._common import HexId, The, Who, b64, blob, key, router

__all__ = ["routes"]

routes = router("release")


def _releasing(service: Service) -> Releasing:
    if service.releasing is None:
        raise MeshkitError("path_not_found", "this service releases no keys")
    return service.releasing


@routes.get("/release-service", response_model=m.ReleaseServiceOut)
async def offer(who: Who, service: The) -> dict[str, Any]:
    """Who releases keys here, and the encryption key that halves are sealed to."""
    releasing = _releasing(service)
    return {
        "key": b64(releasing.keys.signing.public),
        "record": b64(releasing.keys.record(service.now())),
        "home": b64(await service.home.service_key()),
        "seconds": releasing.seconds,
    }


@routes.put("/shares/{share}/deposit", status_code=204)
async def deposit(who: Who, service: The, share: HexId, body: m.DepositIn) -> None:
    """Leave the service's half of an epoch of one's own share. Repeating it is harmless."""
    await _releasing(service).deposit(who, bytes.fromhex(share), blob(body.record, "record"))


@routes.post("/shares/{share}/release", response_model=m.ReleaseOut)
async def release(who: Who, service: The, share: HexId, body: m.ReleaseIn) -> dict[str, Any]:
    """Have the half of an epoch released, if the capsule is in force and all that it demands is given."""
    capsule, nonce = key(body.capsule, "capsule"), key(body.nonce, "nonce")
    asker = Asker(who, tuple(blob(token, "tokens") for token in body.tokens))
    record = await _releasing(service).release(asker, bytes.fromhex(share), capsule, body.epoch, nonce)
    return {"record": b64(record)}
