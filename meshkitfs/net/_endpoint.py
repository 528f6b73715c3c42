"""One server: its connections, and the rules every request to it goes by."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.net._breaker import Breaker
from meshkitfs.net._retry import RETRY_STATUS, backoff, retry_after
from meshkitfs.net._tls import client_context
from meshkitfs.net._types import Codes, Limits, Reply, Tls

__all__ = ["Endpoint"]

_log = logging.getLogger(__name__)

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_SUCCESS: Final = range(200, 300)
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
_AGENT: Final = "meshkitfs"
# Of what a server says about its refusal, how much is shown.
_SAYS: Final = 200


class _NoAnswerError(Exception):
    """There was no valid answer; the text says why, without anything secret."""


class Endpoint:
    """A server at ``base_url``. Use it in one trio run, and `aclose` it there.

    Plain HTTP is for this machine (loopback, or a Unix socket ``uds``), unless ``insecure`` says that it is
    meant. Proxies that the environment names are used for other machines only. ``redirects`` is how many are
    followed, for GET and HEAD only: to https, or from http to http, and without credentials when they lead to
    another server. Raises invalid_config for an unusable address.
    """

    def __init__(
        self,
        base_url: str,
        codes: Codes,
        *,
        auth: httpx.Auth | None = None,
        limits: Limits | None = None,
        tls: Tls | None = None,
        uds: Path | None = None,
        insecure: bool = False,
        redirects: int = 0,
    ) -> None:
        self.url = _checked(base_url, insecure or uds is not None)
        self.codes = codes
        self.limits = limits or Limits()
        self._auth = auth
        self._redirects = redirects
        self._limiter = trio.CapacityLimiter(self.limits.concurrency)
        self._breaker = Breaker()
        # Our own deadlines bound every try; httpx's would only count the silence between two bytes.
        context = client_context(tls or Tls())
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(verify=context, uds=str(uds)) if uds is not None else None,
            verify=context,
            timeout=None,  # noqa: S113
            # HTTP_PROXY and the like are for other machines. What is said to this one, in plain HTTP and with
            # credentials, must not be carried to a proxy.
            trust_env=not _is_loopback(self.url.host),
            follow_redirects=False,
            limits=httpx.Limits(
                max_connections=self.limits.concurrency,
                max_keepalive_connections=self.limits.concurrency,
                keepalive_expiry=30,
            ),
        )

    def __repr__(self) -> str:
        return f"<Endpoint {self.name}>"

    @property
    def name(self) -> str:
        """The server's address for people: scheme, host and port; nothing secret is in it."""
        return f"{self.url.scheme}://{self.url.netloc.decode('ascii')}"

    @property
    def failures(self) -> int:
        """How many requests in a row had no valid answer."""
        return self._breaker.failures

    async def aclose(self) -> None:
        """Close the connections. Harmless when repeated."""
        await self._client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        files: Mapping[str, tuple[str, bytes, str]] | None = None,
        json: Any = None,
        accept: Collection[int] = _SUCCESS,
        last: Collection[int] = (),
        cap: int | None = None,
        idempotent: bool | None = None,
        deadline_s: float | None = None,
        subdomain: str = "",
    ) -> Reply:
        """Send a request and return its answer, whole.

        ``path`` is below the base URL, at its host or at a ``subdomain`` of it; ``accept`` are the statuses
        that the caller wants to see, every other one raises the ``refused`` code; those in ``last`` are
        tried again like others, and returned in the end. ``cap`` and ``deadline_s`` (for each try) take the
        place of the limits'. ``idempotent`` says that it may be repeated; by default the method tells.

        Raises the ``unreachable`` code when there is no valid answer, after the tries that are allowed.
        """
        url = self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + path.encode("ascii"))
        if subdomain:
            url = url.copy_with(host=f"{subdomain}.{self.url.host}")
        repeatable = method in _IDEMPOTENT if idempotent is None else idempotent
        tries = self.limits.tries if repeatable else 1
        fields = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **(headers or {})}
        failures = 0
        ends = trio.current_time() + self.limits.overall_s

        async def send() -> Reply:
            request = self._client.build_request(
                method, url, params=params, headers=fields, content=content, files=files, json=json
            )
            return await self._try(request, cap or self.limits.cap, deadline_s or self.limits.deadline_s)

        while True:
            reply: Reply | None = None
            try:
                reply = await send()
                if reply.status in accept:
                    return reply
                problem = MeshkitError(self.codes.refused, f"{self._what(reply)}")
            except _NoAnswerError as error:
                problem = MeshkitError(self.codes.unreachable, f"{self.name}: {error}")
            failures += 1
            again = reply is None or reply.status in RETRY_STATUS
            pause = backoff(failures)
            if reply is not None:
                pause = max(pause, retry_after(reply.headers.get("retry-after")) or 0.0)
            if not again or failures >= tries or trio.current_time() + pause > ends:
                if reply is not None and reply.status in last:
                    return reply
                raise problem
            _log.debug("%s: tried again in %.1f s: %s", self.name, pause, problem.detail)
            await trio.sleep(pause)

    async def _try(self, request: httpx.Request, cap: int, deadline_s: float) -> Reply:
        """Send once, within the deadline, if the server is not known to be away."""
        pause = self._breaker.wait_s()
        if pause:
            raise _NoAnswerError(
                f"did not answer {self._breaker.failures} times in a row, asked again in {pause:.0f} s"
            )
        try:
            # Waiting for one's turn is not the server's slowness.
            async with self._limiter:
                with trio.fail_after(deadline_s):
                    reply = await self._exchange(request, cap)
        except trio.TooSlowError:
            self._breaker.failed()
            raise _NoAnswerError(f"no answer within {deadline_s:g} s") from None
        except httpx.HTTPError as error:
            self._breaker.failed()
            raise _NoAnswerError(_reason(error)) from None
        except _NoAnswerError:
            self._breaker.failed()
            raise
        except BaseException:
            self._breaker.abandoned()
            raise
        self._breaker.answered()
        return reply

    async def _exchange(self, request: httpx.Request, cap: int) -> Reply:
        asked = request.url
        for _ in range(self._redirects + 1):
            home = request.url.netloc == asked.netloc and request.url.scheme == asked.scheme
            try:
                response = await self._client.send(request, stream=True, auth=self._auth if home else None)
            except (httpx.InvalidURL, ValueError) as error:
                # httpx reads the address in a redirect even if nobody follows it, and the name in an address
                # is encoded when it is looked up: what it meets there it raises as it is.
                raise _NoAnswerError(f"an address that is not one ({type(error).__name__})") from None
            try:
                if response.status_code not in _REDIRECTS:
                    return Reply(
                        response.status_code,
                        response.headers,
                        b"" if request.method == "HEAD" else await _body(response, cap),
                        self.codes,
                    )
            finally:
                await response.aclose()
            request = self._follow(request, response)
        raise _NoAnswerError(f"more than {self._redirects} redirects")

    def _follow(self, request: httpx.Request, response: httpx.Response) -> httpx.Request:
        """Return the request a redirect leads to, or raise why it is not followed."""
        if not self._redirects or request.method not in ("GET", "HEAD"):
            raise _NoAnswerError(f"a redirect (HTTP {response.status_code}), which is not followed")
        location = response.headers.get("location", "")
        try:
            # Also what is only found out when the parts of the address are looked at.
            target = httpx.URL(str(request.url.join(location)))
            named = bool(location) and target.host is not None
        except (httpx.InvalidURL, ValueError):
            named = False
        if not named:
            raise _NoAnswerError("a redirect to nowhere")
        if target.scheme != "https" and not (target.scheme == "http" and request.url.scheme == "http"):
            raise _NoAnswerError(f"a redirect to {target.scheme or 'nothing'}:, which is not followed")
        if not target.host or target.userinfo:
            raise _NoAnswerError("a redirect to an address that is not one")
        kept = {
            name: value
            for name, value in request.headers.items()
            if name not in ("host", "authorization", "cookie")
        }
        return self._client.build_request(request.method, target, headers=kept)

    def _what(self, reply: Reply) -> str:
        """Return the status and what the server says, short and printable: it goes to people and logs."""
        kind = reply.headers.get("content-type", "")
        says = "" if "html" in kind else reply.body[:_SAYS].decode("utf-8", "replace")
        says = "".join(c if c.isprintable() else " " for c in says).strip()
        return f"HTTP {reply.status} from {self.name}" + (f": {says}" if says else "")


async def _body(response: httpx.Response, cap: int) -> bytes:
    """Return the body, refusing one longer than ``cap`` as soon as that is known."""
    if response.headers.get("content-encoding", "identity") not in ("identity", ""):
        raise _NoAnswerError("a compressed answer, which was not asked for")
    length = response.headers.get("content-length")
    if length is not None and length.isdigit() and int(length) > cap:
        raise _NoAnswerError(f"an answer of {length} bytes where {cap} are the most")
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > cap:
            raise _NoAnswerError(f"an answer of more than {cap} bytes")
        parts.append(part)
    return b"".join(parts)


def _checked(text: str, insecure: bool) -> httpx.URL:
    """Return the base URL, if it is one that may be used. Raises invalid_config."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError, ValueError):
        raise MeshkitError("invalid_config", "an address is not a URL") from None
    if url.userinfo:
        raise MeshkitError("invalid_config", f"credentials do not belong into the address of {url.host}")
    if url.scheme not in ("http", "https") or not url.host:
        raise MeshkitError("invalid_config", f"{text!r} is not an http or https address")
    if url.query or url.fragment:
        raise MeshkitError("invalid_config", f"{text!r} has more than a path")
    if url.scheme == "http" and not insecure and not _is_loopback(url.host):
        raise MeshkitError("invalid_config", f"{text!r} would not be encrypted on its way; use https")
    return url


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _reason(error: httpx.HTTPError) -> str:
    """Return what went wrong below HTTP. The texts of httpx name hosts and system errors, never headers."""
    text = str(error).strip() or _cause(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cause(error: BaseException) -> str:
    """Return what TLS or the system said below an error that says nothing itself."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ssl.SSLError | OSError) and str(below):
            return str(below)
        below = below.__cause__ or below.__context__
    return ""
