"""What all routes have in common: parameters, the member who asks, bytes in JSON, documented refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Request

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _wire
from meshkitfs.metadata.service import Member, Service
from meshkitfs.server._models import Refusal
from meshkitfs.server._problems import DOCUMENTED

__all__ = ["HexId", "The", "Who", "b64", "blob", "gone", "key", "members_only", "router"]

b64 = _wire.b64
RETRY_AFTER: Final = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
ALLOW: Final = {"Allow": {"schema": {"type": "string"}}}

HexId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="16 bytes, small hex digits")]
Handle = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$", description="of an identity")]


def members_only(request: Request) -> Member:
    """The member whose request this is. The gate has seen to it that there is one."""
    requester = request.state.requester
    if requester is None or requester.member is None:
        raise MeshkitError("metadata_unauthorized", "this is for members")
    member: Member = requester.member
    return member


def the_service(request: Request) -> Service:
    """What does the work."""
    service: Service = request.app.state.service
    return service


Who = Annotated[Member, Depends(members_only)]
The = Annotated[Service, Depends(the_service)]


def documented(statuses: Iterable[int] = DOCUMENTED) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for OpenAPI."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": Refusal, "description": DOCUMENTED[status]}
        if status == 429:
            found[status]["headers"] = RETRY_AFTER
        if status == 405:
            found[status]["headers"] = ALLOW
    return found


def router(tag: str) -> APIRouter:
    """A router whose routes may all be refused in every documented way."""
    return APIRouter(prefix="/v1", tags=[tag], responses=documented())


def blob(value: str, what: str) -> bytes:
    """The bytes of base64url. Raises invalid_argument."""
    return _wire.from_b64(value, what)


def key(value: str, what: str) -> bytes:
    """The 16 bytes of an id in JSON. Raises invalid_argument."""
    data = blob(value, what)
    if len(data) != _wire.ID_BYTES:
        raise MeshkitError("invalid_argument", f"{what} is not 16 bytes")
    return data


def gone(what: str) -> MeshkitError:
    """What is said of an id that is nobody's, or somebody else's."""
    return MeshkitError("path_not_found", f"there is no such {what}")
