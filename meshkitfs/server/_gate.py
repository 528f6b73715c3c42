"""What stands before every route: limits, size, signature, replay, membership. In this order:

1. rate of the address · 2. is it addressed to this service · 3. does it name a key · 4. the body, capped ·
5. one good signature over all of it by a member's newest key · 6. rate of the member · 7. a nonce never seen.

Only then does the application see it. A newcomer's first record carries the key of its own request.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from meshkitfs.core.records import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _wire
from meshkitfs.metadata.service import Member, Refused, Service
from meshkitfs.net import verify_request
from meshkitfs.server._decisions import DECISION_BYTES, Decisions
from meshkitfs.server._limits import Buckets, Memory, read_body
from meshkitfs.server._problems import send_answer
from meshkitfs.server.settings import Settings

__all__ = ["Gate", "Requester", "noted"]

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN: Final = ("/v1/service", "/v1/health", "/openapi.json", "/join")
PUBLICATION_BYTES: Final = 24 << 20
RECORD_BYTES: Final = 2 << 20
IDENTITY_BYTES: Final = 128 << 10  # it is read before anybody is known
_KEYID: Final = re.compile(rb'[;,]\s*keyid="([0-9a-f]{32})"')
_IDENTITY: Final = re.compile(r"^/v1/identities/[^/]+$")
_SHARE: Final = re.compile(r"^/v1/(?:shares|mailboxes)/([0-9a-f]{32})(?:/|$)")
# What a request that was not even signed well costs its address.
_FAILED_COST: Final = 5.0
# A large body is as much work as several requests.
_BYTES_PER_TOKEN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Requester:
    """Whose request this is: a member, or (on their first record) the kid of the key that signed."""

    member: Member | None
    kid: bytes


class Gate:
    """ASGI around the application. ``refused`` is told of everything that did not get through."""

    def __init__(
        self,
        app: App,
        service: Service,
        settings: Settings,
        refused: Callable[[Refused], None],
        decisions: Decisions | None = None,
    ) -> None:
        self._app = app
        self._service = service
        self._settings = settings
        self._refused = refused
        self._decisions = decisions
        self._addresses = Buckets(settings.address_rate, "address")
        self._members = Buckets(settings.identity_rate, "identity")
        self._memory = Memory(settings.memory_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here: closed before they are accepted
            await send({"type": "websocket.close", "code": 1008})
            return
        held = 0
        who = ""
        try:
            address = client_address(scope, self._settings.proxies)
            self._addresses.take(address)
            if scope["path"] in OPEN:
                scope.setdefault("state", {})["requester"] = None
                await self._app(scope, _bounded(receive), send)
                return
            if self._decisions is not None and scope["path"] in self._decisions.paths:
                self._check_host(scope)
                body, held = await read_body(
                    receive, DECISION_BYTES, self._settings.body_seconds, self._memory
                )
                await self._decide(self._decisions, scope, body, send)
                return
            try:
                kid, known = await self._announced(scope)
                cap = _cap(scope["method"], scope["path"])
                body, held = await read_body(receive, cap, self._settings.body_seconds, self._memory)
                requester, nonce = self._verified(scope, body, kid, known)
            except MeshkitError as error:
                if error.code == "metadata_unauthorized":
                    self._addresses.charge(address, _FAILED_COST)
                raise
            who = requester.member.handle if requester.member else ""
            self._members.take(who or requester.kid.hex(), 1.0 + len(body) / _BYTES_PER_TOKEN)
            if not await self._service.claim_nonce(requester.kid, nonce):
                raise MeshkitError("metadata_unauthorized", "this request was made before")
            scope.setdefault("state", {})["requester"] = requester
            await self._app(scope, _replayed(body, receive), send)
            if self._settings.audit_reads and scope["method"] == "GET":
                self._refused(noted(self._service, scope, who, "read"))
        except MeshkitError as error:
            self._refused(noted(self._service, scope, who, error.code))
            await send_answer(send, error)
        finally:
            self._memory.give(held)

    async def _announced(self, scope: Scope) -> tuple[bytes, Member | None]:
        """The kid that the request says has signed it, and its member: nothing is believed yet.

        Who is nobody's is sent away before the body is read.
        """
        self._check_host(scope)
        lines = [value for name, value in scope["headers"] if name == b"signature-input"]
        found = _KEYID.search(lines[0]) if len(lines) == 1 else None
        if found is None:
            raise MeshkitError("metadata_unauthorized", "the request is not signed")
        kid = bytes.fromhex(found[1].decode())
        member = await self._service.member(kid)
        if member is None and not _is_introduction(scope):
            raise MeshkitError("metadata_unauthorized", "signed with a key that no member has now")
        return kid, member

    def _check_host(self, scope: Scope) -> str:
        """Return the authority that a request is addressed to, if it is one of this service's."""
        host = b"".join(value for name, value in scope["headers"] if name == b"host").decode("latin-1")
        if host.lower() not in self._settings.names:
            raise MeshkitError("metadata_unauthorized", "the request is addressed to another service")
        return host

    async def _decide(self, decisions: Decisions, scope: Scope, body: bytes, send: Send) -> None:
        base = f"{scope['scheme']}://{self._check_host(scope)}"
        lines, answer = await decisions.answer(scope["method"], scope["path"], base, scope["headers"], body)
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        await send({"type": "http.response.body", "body": answer})

    def _verified(
        self, scope: Scope, body: bytes, kid: bytes, member: Member | None
    ) -> tuple[Requester, bytes]:
        public = member.key if member is not None else _introduced(body, kid)

        def public_of(wanted: bytes) -> bytes | None:
            return public if wanted == kid else None

        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        query = scope["query_string"].decode("latin-1")
        host = next(value for name, value in scope["headers"] if name == b"host").decode("latin-1")
        url = f"{scope['scheme']}://{host}{path}{'?' + query if query else ''}"
        signed = verify_request(scope["method"], url, scope["headers"], body, public_of)
        return Requester(member, signed.kid), signed.nonce


def noted(service: Service, scope: Scope, who: str, outcome: str) -> Refused:
    """The line of the audit log for a request: who, which route, which share or mailbox, how it ended."""
    found = _SHARE.match(scope["path"])
    subject = bytes.fromhex(found[1]) if found else None
    return service.now(), who, f"{scope['method']} {_family(scope['path'])}"[:64], subject, outcome


def client_address(scope: Scope, proxies: Iterable[str]) -> str:
    """The address that is asking: the connection's, or what a trusted proxy says of it.

    An IPv6 address counts as its /64, which is what one customer has.
    """
    client = scope.get("client")
    address = client[0] if client and client[0] else "unix"
    if address in proxies:
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        # The last one is the proxy's own word; what stands before it, the client may have made up.
        address = b",".join(lines).decode("latin-1").rpartition(",")[2].strip() or address
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _is_introduction(scope: Scope) -> bool:
    return scope["method"] == "POST" and bool(_IDENTITY.match(scope["path"]))


def _introduced(body: bytes, kid: bytes) -> bytes | None:
    """The signing key in the identity record of the body, if that is the one meant."""
    try:
        record = _wire.from_b64(json.loads(body)["record"], "record")
        parsed = IdentityRecord.parse_self_signed(record)
    except (MeshkitError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return parsed.sig if parsed.kid == kid else None


def _cap(method: str, path: str) -> int:
    if method in ("GET", "DELETE", "HEAD"):
        return 0
    if _IDENTITY.match(path):
        return IDENTITY_BYTES
    return PUBLICATION_BYTES if path.endswith("/publications") else RECORD_BYTES


def _family(path: str) -> str:
    """The route without the ids in it, for the audit log: what a stranger sends is not written there."""
    words = path.split("/")
    known = {"v1", "shares", "mailboxes", "identities", "identity-keys", "changes", "invitations", "proofs"}
    known |= {"sync", "jobs", "vaults", "capabilities", "logs", "state", "capsules", "roster", "timestamp"}
    known |= {"head", "heads", "retention", "publications", "deposit", "release", "release-service"}
    return "/".join(word if word in known else "*" for word in words[1:7])


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read once more, then whatever else comes (that the client has gone)."""
    sent = False

    async def again() -> Any:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _bounded(receive: Receive) -> Receive:
    """An unsigned request has no body: one that has is cut off."""

    async def nothing() -> Any:
        message = await receive()
        if message["type"] == "http.request" and message.get("body"):
            await trio.lowlevel.checkpoint()
            return {"type": "http.disconnect"}
        return message

    return nothing
