"""AWS Signature Version 4 for S3: pure functions, and the same as an `httpx.Auth`.

Only what S3 needs: one chunk, header authentication, the path encoded once. The secret key never leaves this
process; what is sent is a signature over the request, good for a few minutes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

import httpx

__all__ = ["Credentials", "SigV4Auth", "authorization", "canonical_request", "encode_path"]

ALGORITHM: Final = "AWS4-HMAC-SHA256"
SERVICE: Final = "s3"
CONTENT_HASH: Final = "x-amz-content-sha256"
# What is signed, if it is in the request; a proxy may change others on the way.
_SIGNED: Final = frozenset(
    {"host", "date", "content-type", "content-md5", "range", "if-match", "if-none-match"}
)
_UNRESERVED: Final = "-_.~"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key with its secret, and the token of a temporary one. Does not show itself."""

    access_key: str
    secret_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"


def encode_path(path: str) -> str:
    """Return a path percent-encoded once, as S3 signs it: everything but unreserved characters and '/'."""
    return quote(path, safe=f"/{_UNRESERVED}")


def canonical_request(
    method: str,
    path: str,
    query: Iterable[tuple[str, str]],
    headers: Mapping[str, str],
    payload_hash: str,
) -> str:
    """Return the text that stands for a request.

    ``path`` and ``query`` are decoded; ``headers``, with lower-case names, are those to be signed.
    """
    pairs = sorted((quote(name, safe=_UNRESERVED), quote(value, safe=_UNRESERVED)) for name, value in query)
    lines = [f"{name}:{' '.join(headers[name].split())}\n" for name in sorted(headers)]
    return "\n".join(
        [
            method,
            encode_path(path),
            "&".join(f"{name}={value}" for name, value in pairs),
            "".join(lines),
            ";".join(sorted(headers)),
            payload_hash,
        ]
    )


def authorization(credentials: Credentials, region: str, moment: str, request: str) -> str:
    """Return the Authorization header for a canonical request; ``moment`` is ``YYYYMMDDTHHMMSSZ``."""
    day = moment[:8]
    scope = f"{day}/{region}/{SERVICE}/aws4_request"
    text = "\n".join([ALGORITHM, moment, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_key}".encode()
    for part in (day, region, SERVICE, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    names = request.split("\n")[-2]
    who = f"{credentials.access_key}/{scope}"
    return f"{ALGORITHM} Credential={who}, SignedHeaders={names}, Signature={signature}"


class SigV4Auth(httpx.Auth):
    """Signs each request as it is sent, so that a retry carries its own time.

    ``credentials`` is asked every time: temporary ones change. A caller that knows the SHA-256 of its body
    gives it in the header ``x-amz-content-sha256``, and the body is not hashed again.
    """

    requires_request_body = True

    def __init__(
        self,
        credentials: Callable[[], Credentials],
        region: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._credentials = credentials
        self._region = region
        self._now = now

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        credentials = self._credentials()
        headers = request.headers
        headers["x-amz-date"] = moment = self._now().strftime("%Y%m%dT%H%M%SZ")
        if CONTENT_HASH not in headers:
            headers[CONTENT_HASH] = hashlib.sha256(request.content).hexdigest()
        if credentials.session_token:
            headers["x-amz-security-token"] = credentials.session_token
        path, _, query = request.url.raw_path.decode("ascii").partition("?")
        text = canonical_request(
            request.method,
            unquote(path),
            parse_qsl(query, keep_blank_values=True),
            {name: value for name, value in headers.items() if name in _SIGNED or name.startswith("x-amz-")},
            headers[CONTENT_HASH],
        )
        headers["authorization"] = authorization(credentials, self._region, moment, text)
        yield request
