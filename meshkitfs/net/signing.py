"""HTTP requests signed by an identity: RFC 9421 message signatures, in the one form that is used here.

A request is signed with the identity's Ed25519 signing key, under the label ``mk`` and the tag
``meshkitfs-1``. Covered are the method, the authority, the path, the query and, with every body, its
Content-Digest (RFC 9530). ``keyid`` is the key's kid in hex, ``nonce`` 16 random bytes. Whoever
verifies also has to see to it that a nonce counts once (`Signed.nonce`, for as long as `LIFETIME_S`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    InvalidSignature,
    algorithms,
)

from meshkitfs.core.keys import SigningKey, check_ed25519_public
from meshkitfs.errors import MeshkitError

__all__ = ["LIFETIME_S", "SignatureAuth", "Signed", "verify_request"]

LABEL: Final = "mk"
TAG: Final = "meshkitfs-1"
# How far the clocks of the two sides may be apart, both ways: a nonce has to be remembered for twice that.
SKEW_S: Final = 120
LIFETIME_S: Final = 2 * SKEW_S
_COVERED: Final = ("@method", "@authority", "@path", "@query")
_PARAMETERS: Final = {"created", "nonce", "keyid", "alg", "tag"}
_NONCE_TEXT: Final = 22  # 16 bytes, base64url without padding
_KEYID_TEXT: Final = 32  # 16 bytes, hex


@dataclass(frozen=True, slots=True)
class Signed:
    """Who signed a request, and its nonce, which may be used once."""

    kid: bytes
    nonce: bytes


class SignatureAuth(httpx.Auth):
    """Signs each request anew when it is sent. ``key`` is asked for every time: it may be locked by then.

    ``clock`` gives UNIX seconds. Raises what ``key`` raises.
    """

    requires_request_body = True

    def __init__(self, key: Callable[[], SigningKey], clock: Callable[[], float]) -> None:
        self._key = key
        self._clock = clock

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        key = self._key()
        signer = HTTPMessageSigner(signature_algorithm=algorithms.ED25519)
        body: bytes | None = request.content or None
        prepared = signer.prepare(
            request,
            key_id=key.kid.hex(),
            created=datetime.fromtimestamp(int(self._clock()), UTC),
            nonce=base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("="),
            label=LABEL,
            tag=TAG,
            covered_component_ids=_COVERED,
            body=body,
        )
        signer.apply(request, prepared, key.sign(prepared.signature_base))
        yield request


@dataclass(frozen=True, slots=True)
class _Message:
    method: str
    url: str
    headers: _Fields


class _Fields:
    """Header lines as they came: a name that is repeated stays repeated."""

    def __init__(self, lines: Iterable[tuple[bytes, bytes]]) -> None:
        self._lines = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in lines]

    def items(self) -> list[tuple[str, str]]:
        return self._lines


class _Keys(HTTPSignatureKeyResolver):
    def __init__(self, public_of: Callable[[bytes], bytes | None]) -> None:
        self._public_of = public_of

    def resolve_public_key(self, key_id: str) -> Ed25519PublicKey | None:
        if len(key_id) != _KEYID_TEXT:
            return None
        public = self._public_of(bytes.fromhex(key_id))
        if public is None:
            return None
        check_ed25519_public(public)
        return Ed25519PublicKey.from_public_bytes(public)

    def resolve_private_key(self, key_id: str) -> Any:
        raise NotImplementedError


class _Verifier(HTTPMessageVerifier):
    max_clock_skew = timedelta(seconds=SKEW_S)


def verify_request(
    method: str,
    url: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    public_of: Callable[[bytes], bytes | None],
) -> Signed:
    """Return who signed a request; ``url`` is absolute, with the authority that the client named.

    ``public_of`` gives the 32-byte public key of a kid, or None if nobody known has it. Raises
    metadata_unauthorized, saying in general what is wrong, for anything but exactly one good signature of the
    form above that is not too old and covers the whole request.
    """
    try:
        message = _Message(method, url, _Fields(headers))
        results = _Verifier(signature_algorithm=algorithms.ED25519, key_resolver=_Keys(public_of)).verify(
            message,
            max_age=timedelta(0),
            expect_tag=TAG,
            expect_label=LABEL,
            require_components=(*_COVERED, "content-digest") if body else _COVERED,
            body=body,
        )
        if len(results) != 1:
            raise InvalidSignature("more than one signature")
        return _signed(results[0].parameters)
    except MeshkitError:
        raise
    except Exception as error:  # the library's, and what malformed headers make others raise
        raise MeshkitError("metadata_unauthorized", _says(error)) from None


def _signed(parameters: Mapping[str, Any]) -> Signed:
    if set(parameters) != _PARAMETERS:
        raise InvalidSignature("the signature's parameters are not the ones asked for")
    text = parameters["nonce"]
    nonce = base64.urlsafe_b64decode(text + "==")
    if len(text) != _NONCE_TEXT or len(nonce) != 16:
        raise InvalidSignature("the nonce is not 16 bytes")
    return Signed(bytes.fromhex(parameters["keyid"]), nonce)


def _says(error: Exception) -> str:
    """Return the library's sentence: it names headers and parameters, never values of keys."""
    return str(error)[:120] if isinstance(error, InvalidSignature) else "the signature cannot be read"
