"""Speaking to release services: what they offer, leaving a half there, and having one handed out.

A home asks only services that it knows: the metadata service it uses, and the one that its configuration
names. The address in a capsule is its owner's word, and nobody's device goes wherever somebody else says.
Where the address is not known, a known service that shows the same key is meant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.core.release import EpochSecret, ReleaseKey, ReleaseService
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _answers as answers
from meshkitfs.metadata._wire import b64, from_b64, read_blob, read_fields
from meshkitfs.net import Codes, Endpoint, Limits, Reply, SignatureAuth, Tls

__all__ = ["KnownService", "ReleaseOffer", "ReleaseSource", "Releases"]

_CODES: Final = Codes("metadata_unavailable", "metadata_unavailable")
# The gate waits 10 s: within that, a lost answer is asked for again.
_LIMITS: Final = Limits(deadline_s=4.0, overall_s=9.0, tries=3, concurrency=4, cap=64 << 10)


class ReleaseSource(Protocol):
    """Where the gate gets the other half of a key."""

    async def release(
        self, service: ReleaseService, share: bytes, capsule_id: bytes, epoch: int, nonce: bytes,
        tokens: Sequence[bytes],
    ) -> bytes:  # fmt: skip
        """Return the service's answer, a signed record that is still to be verified.

        ``tokens`` are the capability tokens that the capsule asks for. Raises ``key_release_refused``,
        ``key_release_unavailable``.
        """


@dataclass(frozen=True, slots=True)
class KnownService:
    """A service that this home may ask: address, and how it is reached."""

    url: str
    tls: Tls | None = None
    uds: Path | None = None


@dataclass(frozen=True, slots=True)
class ReleaseOffer:
    """What a release service says of itself: its Ed25519 ``key``, the X-Wing public key ``enc`` that halves
    are sealed to, and the key of the timestamps of the ``home`` in whose rosters it looks."""

    key: bytes
    enc: bytes
    home: bytes


class Releases:
    """The release services of a home. Belongs to one run of trio.

    ``signing`` gives the identity's signing key, or raises why it cannot be had; ``clock`` is UNIX seconds.
    """

    def __init__(
        self,
        known: Sequence[KnownService],
        signing: Callable[[], SigningKey],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._known = {place.url.rstrip("/"): place for place in known}
        self._auth = SignatureAuth(signing, clock)
        self._endpoints: dict[str, Endpoint] = {}
        self._offers: dict[str, ReleaseOffer] = {}
        # How often a half was asked for since start; tests count it.
        self.asked = 0

    @property
    def places(self) -> list[str]:
        """The addresses that this home knows."""
        return list(self._known)

    async def offer(self, url: str) -> ReleaseOffer:
        """Ask the service at ``url`` what it offers.

        Raises ``invalid_argument`` for an address that this home does not know, ``not_supported`` if the
        service releases no keys, ``metadata_unavailable``.
        """
        if url.rstrip("/") not in self._known:
            raise MeshkitError("invalid_argument", f"{url}: this home does not know that release service")
        endpoint = self._endpoint(url)
        reply = await endpoint.request(
            "GET", "/v1/release-service", accept={200, *answers.ANSWERED}, last=answers.LAST
        )
        if reply.status == 404:
            raise MeshkitError("not_supported", f"{endpoint.name} releases no keys")
        if reply.status != 200:
            raise answers.refusal(reply, (), endpoint.name)
        return answers.read(reply, _read_offer, endpoint.name)

    async def deposit(self, secret: EpochSecret, signing: SigningKey) -> None:
        """Leave the service's half of an epoch there. Leaving the same again is harmless.

        Raises ``head_conflict`` if it has another half for that epoch, ``service_key_changed`` if it is not
        the service that the share names, ``metadata_unavailable`` and what else the service refuses.
        """
        assert secret.service is not None  # there is a half only then
        service = secret.service
        url = await self._place(service)
        offer = self._offers.get(url) or await self.offer(url)
        if offer.key != service.key:
            raise MeshkitError(
                "service_key_changed",
                f"{url} releases keys as {offer.key.hex()[:16]}, the share names {service.key.hex()[:16]}",
            )
        self._offers[url] = offer
        record = secret.deposit(offer.enc).sign(signing)
        endpoint = self._endpoint(url)
        reply = await endpoint.request(
            "PUT", f"/v1/shares/{secret.share.hex()}/deposit", json={"record": b64(record)},
            accept={204, *answers.ANSWERED}, last=answers.LAST,
        )  # fmt: skip
        if reply.status != 204:
            codes = {"head_conflict", "invalid_record", *answers.PUBLISHING}
            raise answers.refusal(reply, codes, endpoint.name)

    async def release(
        self, service: ReleaseService, share: bytes, capsule_id: bytes, epoch: int, nonce: bytes,
        tokens: Sequence[bytes],
    ) -> bytes:  # fmt: skip
        """See `ReleaseSource`."""
        body = {
            "capsule": b64(capsule_id), "epoch": epoch, "nonce": b64(nonce),
            "tokens": [b64(token) for token in tokens],
        }  # fmt: skip
        try:
            endpoint = self._endpoint(await self._place(service))
            self.asked += 1
            reply = await endpoint.request(
                "POST", f"/v1/shares/{share.hex()}/release",
                json=body,
                accept={200, *answers.ANSWERED}, last=answers.LAST, idempotent=True,
            )  # fmt: skip
            return _released(reply, endpoint.name)
        except MeshkitError as error:
            if error.code == "key_release_refused":
                raise
            # Whatever the trouble is, nothing was released, and nothing was refused either.
            raise MeshkitError("key_release_unavailable", error.detail or error.code) from error

    async def aclose(self) -> None:
        """Close the connections. Harmless when repeated."""
        for endpoint in self._endpoints.values():
            await endpoint.aclose()

    async def _place(self, service: ReleaseService) -> str:
        """Return the address by which this home knows ``service``."""
        url = service.url.rstrip("/")
        if url in self._known:
            return url
        for place in self._known:
            if place not in self._offers:
                try:
                    self._offers[place] = await self.offer(place)
                except MeshkitError as error:
                    if error.code != "not_supported":
                        raise
                    continue
            if self._offers[place].key == service.key:
                return place
        raise MeshkitError(
            "key_release_unavailable", f"{service.url}: this home does not know that release service"
        )

    def _endpoint(self, url: str) -> Endpoint:
        url = url.rstrip("/")
        endpoint = self._endpoints.get(url)
        if endpoint is None:
            place = self._known[url]
            endpoint = self._endpoints[url] = Endpoint(
                place.url, _CODES, auth=self._auth, limits=_LIMITS, tls=place.tls, uds=place.uds
            )
        return endpoint


def _read_offer(value: Any) -> ReleaseOffer:
    fields = read_fields(value, ("key", "record", "home", "seconds"), "what a release service offers")
    key, home = from_b64(fields["key"], "key"), from_b64(fields["home"], "home")
    record = from_b64(fields["record"], "record")
    return ReleaseOffer(key, ReleaseKey.parse(record, {kid_of(key): key}).enc, home)


def _released(reply: Reply, name: str) -> bytes:
    if reply.status != 200:
        raise answers.refusal(reply, {"key_release_refused"}, name)
    record = answers.read(reply, _read_release, name)
    if record is None:
        raise MeshkitError("metadata_unavailable", f"{name}: no release in the answer")
    return record


def _read_release(value: Any) -> bytes | None:
    return read_blob(read_fields(value, ("record",), "a release")["record"], "record")
