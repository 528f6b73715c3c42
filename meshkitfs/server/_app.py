"""The ASGI application: the routes behind the gate, failures as documented answers, OpenAPI."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from meshkitfs import __version__
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _queries
from meshkitfs.metadata.service import Refused, Service
from meshkitfs.server import _join, _people, _records, _releases, _shares
from meshkitfs.server import _models as m
from meshkitfs.server._common import The, b64, documented
from meshkitfs.server._decisions import Decisions
from meshkitfs.server._gate import PUBLICATION_BYTES, RECORD_BYTES, Gate, noted
from meshkitfs.server._hub import Hub
from meshkitfs.server._problems import as_answer
from meshkitfs.server.settings import Settings

__all__ = ["build"]

_log = logging.getLogger(__name__)
_SIGNED = {"signature": {"type": "apiKey", "in": "header", "name": "Signature", "description": "RFC 9421"}}
_DESCRIPTION = """\
Metadata of encrypted shares: signed records, mailboxes, an identity directory. Requests are signed by members
(RFC 9421); docs/service.md says how, and what is shown to whom."""


def build(
    service: Service,
    hub: Hub,
    settings: Settings,
    join_token: bytes | None,
    refused: Callable[[Refused], None],
    policy_token: bytes | None = None,
) -> Gate:
    """Return the application. ``refused`` is given a line for the audit log whenever somebody is.

    Raises policy_invalid and invalid_config for the directory of rules.
    """
    app = FastAPI(
        title="meshkitfs service",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.hub, app.state.polls = service, hub, Counter()
    app.state.join, app.state.join_token = settings.join, join_token

    @app.get("/v1/service", response_model=m.ServiceInfo, responses=documented((405, 429, 500, 503)))
    async def about(the: The) -> dict[str, Any]:
        """Who this is, its clock, the key of its timestamps, and how to join. Needs no signature."""
        key = await the.home.service_key()
        return {
            "key": b64(key),
            "time": the.now(),
            "join": settings.join,
            "limits": {
                "publication_bytes": PUBLICATION_BYTES,
                "letter_bytes": _queries.MAX_LETTER,
                "record_bytes": RECORD_BYTES,
                "poll_shares": 1000,
                "poll_seconds": 30,
            },
        }

    @app.get("/v1/health", response_model=m.Health, responses=documented((405, 429, 500, 503)))
    async def health(the: The) -> dict[str, Any]:
        """Whether it works, with its database. Needs no signature."""
        await the.home.service_key()
        return {"status": "ok"}

    for routes in (_join.routes, _shares.routes, _releases.routes, _people.routes, _records.routes):
        app.include_router(routes)

    def refuse(request: Request, error: MeshkitError, status: int | None = None) -> Response:
        requester = getattr(request.state, "requester", None)
        who = requester.member.handle if requester is not None and requester.member is not None else ""
        refused(noted(service, request.scope, who, error.code))
        code, lines, body = as_answer(error, status)
        response = Response(body, code)
        response.raw_headers = lines
        return response

    @app.exception_handler(MeshkitError)
    async def classified(request: Request, error: MeshkitError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # Where and what is wrong, never the value.
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['type']}" for e in error.errors()[:3]]
        return refuse(request, MeshkitError("invalid_argument", "; ".join(problems)[:300]))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        code = "path_not_found" if error.status_code == 404 else "invalid_argument"
        response = refuse(request, MeshkitError(code, str(error.detail)[:100]), error.status_code)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        _log.error("a request failed in a way nobody foresaw", exc_info=error)
        return refuse(request, MeshkitError("internal_error"))

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            schema["components"]["securitySchemes"] = _SIGNED
            for path, methods in schema["paths"].items():
                if path not in ("/v1/service", "/v1/health"):
                    for method in methods.values():
                        method["security"] = [{"signature": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    decisions = Decisions(service, settings.policies, policy_token) if settings.policies else None
    return Gate(app, service, settings, refused, decisions)
