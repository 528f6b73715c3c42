"""A policy decision point of somebody else's, asked in OpenID AuthZEN 1.0.

All actions of a capsule are asked about in one request. Nothing but HTTP 200 with JSON ``true``, in time,
from the address that the capsule names and, where it pins a key, signed by that key for this very question,
is a yes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from meshkitfs.core.decision import NONCE_BYTES, SignedDecision
from meshkitfs.core.keys import kid_of
from meshkitfs.errors import MeshkitError
from meshkitfs.net import BearerAuth, Codes, Endpoint, Limits, Reply, SecretSource, Tls
from meshkitfs.policy._api import Decision, Demand, PolicyRequest
from meshkitfs.policy._wire import (
    DISCOVERY,
    from_b64,
    loads,
    printable,
    write_question,
)

__all__ = ["TTL_MAX_S", "AuthZen", "AuthZenOptions"]

_CODES: Final = Codes("policy_provider_error", "policy_provider_error")
# No yes is believed for longer than this, whatever it says of itself.
TTL_MAX_S: Final = 300
# How far the clock of who signed may be ahead of ours.
SKEW_S: Final = 60
_CAP: Final = 64 << 10
_KEPT: Final = 256  # answers that are remembered, each until it has run out


@dataclass(frozen=True, slots=True)
class AuthZenOptions:
    """The provider that this home may ask. ``timeout_s`` bounds one answer, and twice that all tries."""

    endpoint: str
    token: SecretSource = field(default_factory=SecretSource)
    tls: Tls = field(default_factory=Tls)
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class _Places:
    """The paths at the host of the endpoint; without ``many`` each action is a request of its own."""

    one: str
    many: str | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """Answers, all of them yes, from when until when they hold (UNIX seconds)."""

    answers: tuple[Decision, ...]
    asked: int
    until: int

    def good(self, now: int) -> bool:
        """Whether to use them: not in their last quarter, when a lease is renewed by new ones."""
        return self.asked <= now < self.until - (self.until - self.asked) / 4

    def at(self, now: int) -> list[Decision]:
        return [replace(answer, ttl_seconds=self.until - now) for answer in self.answers]


class AuthZen:
    """A `PolicyProvider` at a URL. Belongs to one run of trio. Raises invalid_config for unusable options."""

    def __init__(self, options: AuthZenOptions) -> None:
        self.url = options.endpoint.rstrip("/")
        token = options.token.load()
        parts = urlsplit(self.url)
        self._path = parts.path
        self._endpoint = Endpoint(
            f"{parts.scheme}://{parts.netloc}",
            _CODES,
            auth=BearerAuth(token) if token is not None else None,
            limits=Limits(options.timeout_s, 2 * options.timeout_s, tries=2, concurrency=8, cap=_CAP),
            tls=options.tls,
        )
        self._places: _Places | None = None
        self._asking = trio.Lock()
        self._kept: dict[tuple[Demand, tuple[PolicyRequest, ...]], _Kept] = {}
        # How many requests for a decision were sent; tests prove with it what did not happen.
        self.asked = 0

    def __repr__(self) -> str:
        return f"<AuthZen {self.name}>"

    @property
    def name(self) -> str:
        """The provider's address for people."""
        return self._endpoint.name + self._path

    async def aclose(self) -> None:
        """Close the connections. Harmless when repeated."""
        await self._endpoint.aclose()

    async def decide(self, demand: Demand, requests: Sequence[PolicyRequest], now: int) -> Sequence[Decision]:
        """Ask about every request at once; see `PolicyProvider.decide`.

        What was answered with yes, and for how long, is not asked again meanwhile: a share that others write
        is opened anew with every version.
        """
        if demand.url is None or demand.url.rstrip("/") != self.url:
            named = demand.url or "nobody by address"
            raise MeshkitError(
                "policy_provider_required", f"the grant names {named}, configured is {self.url}"
            )
        question = (demand, tuple(requests))
        kept = self._kept.get(question)
        if kept is not None and kept.good(now):
            return kept.at(now)
        self._kept.pop(question, None)
        answers = await self._decided(demand, requests, now)
        lives = [answer.ttl_seconds for answer in answers if answer.allow and answer.ttl_seconds is not None]
        if len(lives) == len(answers) and min(lives) > 0:
            self._kept = {key: item for key, item in self._kept.items() if item.good(now)}
            if len(self._kept) < _KEPT:
                self._kept[question] = _Kept(tuple(answers), now, now + min(lives))
        return answers

    async def _decided(
        self, demand: Demand, requests: Sequence[PolicyRequest], now: int
    ) -> Sequence[Decision]:
        places = await self._discovered()
        if len(requests) == 1 or places.many is None:
            return [await self._one(places.one, demand, request, now) for request in requests]
        nonce = os.urandom(NONCE_BYTES)
        answer = await self._ask(places.many, write_question(requests, nonce))
        found = answer.get("evaluations")
        if not isinstance(found, list) or len(found) != len(requests):
            raise self._wrong("another number of decisions than questions")
        pairs = zip(found, requests, strict=True)
        return [self._decision(item, demand, request, nonce, now) for item, request in pairs]

    async def look(self) -> bool:
        """Ask the provider who it is; returns whether it takes several questions at a time.

        Raises ``policy_provider_error`` if it is none, or says that it belongs to another address.
        """
        self._places = None
        return (await self._discovered()).many is not None

    async def _one(self, path: str, demand: Demand, request: PolicyRequest, now: int) -> Decision:
        nonce = os.urandom(NONCE_BYTES)
        answer = await self._ask(path, write_question([request], nonce))
        return self._decision(answer, demand, request, nonce, now)

    # -- the request -----------------------------------------------------------------------------------

    async def _discovered(self) -> _Places:
        """Return where to ask, as the provider says; it is asked once."""
        async with self._asking:
            if self._places is None:
                reply = await self._endpoint.request("GET", DISCOVERY + self._path, accept={200})
                self._places = self._read_places(self._read(reply))
            return self._places

    def _read_places(self, value: Mapping[str, Any]) -> _Places:
        point = value.get("policy_decision_point")
        if not isinstance(point, str) or point.rstrip("/") != self.url:
            # Metadata of another decision point must not be used (AuthZEN 1.0, section 9.2.3).
            raise self._wrong("it says that it is another decision point")
        one = self._path_of(value.get("access_evaluation_endpoint"))
        if one is None:
            raise self._wrong("it names no place for evaluations")
        return _Places(one, self._path_of(value.get("access_evaluations_endpoint")))

    def _path_of(self, url: Any) -> str | None:
        """Return the path of an address of the provider's; None if it names none."""
        if url is None:
            return None
        path = url.removeprefix(self._endpoint.name) if isinstance(url, str) else ""
        plain = path.isascii() and path.isprintable() and not set(path) & set(" ?#\\")
        if not path.startswith("/") or not plain or path == url:
            raise self._wrong("it names a place at another host")
        return path

    async def _ask(self, path: str, body: dict[str, Any]) -> Mapping[str, Any]:
        request_id = str(uuid.uuid4())
        self.asked += 1
        reply = await self._endpoint.request(
            "POST", path, json=body, headers={"X-Request-ID": request_id}, accept={200}, idempotent=True
        )
        echoed = reply.headers.get("x-request-id")
        # Some providers do not send it back, against the standard; another one is somebody else's answer.
        if echoed is not None and echoed != request_id:
            raise self._wrong("an answer to another request")
        return self._read(reply)

    def _read(self, reply: Reply) -> Mapping[str, Any]:
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise self._wrong("the answer is not JSON")
        try:
            value = loads(reply.body)
        except ValueError:
            raise self._wrong("the answer is not JSON that can be read in one way only") from None
        if not isinstance(value, dict):
            raise self._wrong("the answer is not an object")
        return value

    # -- the answer ------------------------------------------------------------------------------------

    def _decision(
        self, value: Any, demand: Demand, request: PolicyRequest, nonce: bytes, now: int
    ) -> Decision:
        if not isinstance(value, dict):
            raise self._wrong("a decision that is not an object")
        allow, context = value.get("decision"), value.get("context", {})
        if type(allow) is not bool:
            raise self._wrong(f"a decision that is neither true nor false, but a {type(allow).__name__}")
        if not isinstance(context, dict):
            raise self._wrong("a context that is not an object")
        rule = printable(context, "rule")
        by = f"{self.name}{f', rule {rule}' if rule else ''}"
        if demand.key is None:
            return Decision(allow, self._ttl(context), f"{by}, not signed")
        if not allow:
            return Decision(False, None, by)
        return self._signed(context.get("signedDecision"), demand.key, request, nonce, now, by)

    def _ttl(self, context: Mapping[str, Any]) -> int | None:
        ttl = context.get("ttl")
        if ttl is None:
            return None
        if type(ttl) is not int or ttl < 0:
            raise self._wrong("a decision without a usable end")
        return min(ttl, TTL_MAX_S) or None  # good for no time at all: for what it was asked for

    def _signed(
        self, text: Any, key: bytes, request: PolicyRequest, nonce: bytes, now: int, by: str
    ) -> Decision:
        try:
            record = SignedDecision.parse(from_b64(text), {kid_of(key): key})
        except ValueError:
            raise self._wrong("a yes that is not signed") from None
        except MeshkitError as error:
            raise self._wrong(f"a yes that is not signed as the grant demands: {error.detail}") from None
        if record.req != request.hash:
            raise self._wrong("a decision about something else")
        if record.nonce != nonce:
            raise self._wrong("a decision that was made for another question")
        if record.iat > now + SKEW_S:
            raise self._wrong(f"a decision from {record.iat - now} s in the future")
        if not record.allow:
            raise self._wrong("the signed decision is no, and the answer says yes")
        until = min(record.exp, record.iat + TTL_MAX_S)
        return Decision(True, until - now, f"{by}, signed by {record.signer.hex()[:16]}")

    def _wrong(self, what: str) -> MeshkitError:
        return MeshkitError("policy_provider_error", f"{self.name}: {what}")
