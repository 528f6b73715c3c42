"""Failures as answers: the status of each code, and the body that says it."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Final

from meshkitfs.errors import MeshkitError
from meshkitfs.server._limits import TooLargeError, TooManyError, TooSlowError

__all__ = ["DOCUMENTED", "as_answer", "status_of"]

_log = logging.getLogger(__name__)

# How often one trouble that lasts is logged.
TELL_SECONDS: Final = 10.0
_STATUS: Final = {
    "invalid_argument": 400,
    "metadata_unauthorized": 401,
    "metadata_forbidden": 403,
    "key_release_refused": 403,
    "quota_exceeded": 403,
    "path_not_found": 404,
    "head_conflict": 409,
    "identity_handle_taken": 409,
    "sync_conflict": 409,
    "invalid_record": 422,
    "rate_limited": 429,
    "internal_error": 500,
    "metadata_unavailable": 503,
    "no_space": 507,
}
# What any signed request may be answered with; OpenAPI lists all of it on every route.
DOCUMENTED: Final = {
    400: "malformed: invalid_argument",
    401: "no signature of a member, or an old or repeated one: metadata_unauthorized",
    403: "not this member's to do: metadata_forbidden, key_release_refused, quota_exceeded",
    404: "no such route, or nothing of that id that this member may see: path_not_found",
    405: "not a method of this route: invalid_argument",
    408: "the body did not arrive in time: timed_out",
    409: "head_conflict, identity_handle_taken, sync_conflict",
    413: "the body is too large: invalid_argument",
    422: "a record that does not verify or fit: invalid_record",
    429: "too many requests, with Retry-After: rate_limited",
    500: "a defect: internal_error",
    503: "the database or the memory is not available: metadata_unavailable",
    507: "the mailbox or the disk is full: no_space",
}


def status_of(error: MeshkitError) -> int:
    """The HTTP status of a failure."""
    if isinstance(error, TooLargeError):
        return 413
    if isinstance(error, TooSlowError):
        return 408
    return _STATUS.get(error.code, 500)


class _Trouble:
    """Tells the operator, but not once for each request, why requests are answered 503."""

    def __init__(self) -> None:
        self._last: tuple[str, float] = ("", 0.0)

    def tell(self, error: MeshkitError) -> None:
        detail, moment = self._last
        now = time.monotonic()
        if error.detail != detail or now - moment >= TELL_SECONDS:
            self._last = (error.detail, now)
            _log.warning("requests are refused: %s (%s)", error.code, error.detail)


_trouble = _Trouble()


def as_answer(error: MeshkitError, status: int | None = None) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return status, header lines and body that say a failure. What is internal is not told to the client."""
    status = status_of(error) if status is None else status
    if status == 503:
        _trouble.tell(error)
    if status == 500:
        error = MeshkitError("internal_error")
    problem = {"code": error.code, "message": error.reason.sentence, "detail": error.detail}
    body = json.dumps({"error": problem}, separators=(",", ":")).encode()
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if isinstance(error, TooManyError):
        lines.append((b"retry-after", str(error.retry_after).encode()))
    if status in (408, 413):
        lines.append((b"connection", b"close"))  # the rest of the body is not waited for
    return status, lines, body


async def send_answer(send: Any, error: MeshkitError, status: int | None = None) -> None:
    """Send it over ASGI."""
    code, lines, body = as_answer(error, status)
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": body})
