"""A pinning service beside a byte store (IPFS Pinning Service API): what is stored is pinned there too.

The service keeps another copy, which it fetches from the IPFS network by itself. Blocks are never stored at
it nor read from it: all of that is the storage's. A block is offered to it after the storage has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_bytes, cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.net import Endpoint
from meshkitfs.providers._api import ByteStore, Capabilities, Counters, Source, Usage
from meshkitfs.providers._kubo import decoded, shown
from meshkitfs.providers._options import URL, TokenOptions, choice, number, option, wrong
from meshkitfs.providers._remote import each
from meshkitfs.providers._spec import SPEC, ProviderSpec, open_provider

__all__ = ["PinningOptions", "PinningStore"]

_ACCEPTED, _PINNED = "accepted", "pinned"
_EVERY: Final = "queued,pinning,pinned,failed"
_NAME: Final = "meshkitfs"
# How many CIDs the API lets one ask for at a time, and how many answers.
_BATCH: Final = 10
_LIMIT: Final = 1000
_CAP: Final = 4 << 20
_SOON_S: Final = 0.1
_LATER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class PinningOptions(TokenOptions):
    """``{"type": "pinning-service", "endpoint": URL, "storage": {...}}``; the token is for the service.

    A block counts as stored when the storage has it and the service has ``accepted`` to pin it, or with
    ``wait`` ``pinned`` when it has done so, which must not take longer than ``pin_timeout_ms``.
    """

    endpoint: str = option(URL)
    storage: ProviderSpec = option(SPEC)
    wait: str = option(choice(_ACCEPTED, _PINNED), default=_ACCEPTED)
    pin_timeout_ms: int = option(number(100, 600_000), default=120_000)

    def addresses(self) -> dict[str, str]:
        return {"endpoint": self.endpoint}

    def check(self, where: str) -> None:
        TokenOptions.check(self, where)
        if self.storage.directories():
            wrong(f"{where}.storage", "is kept on this machine, where a pinning service cannot fetch from")
        if self.storage.type == "pinning-service":
            wrong(f"{where}.storage", "must be a provider that stores")

    def boundaries(self) -> set[str]:
        return TokenOptions.boundaries(self) | self.storage.boundaries()

    def directories(self) -> list[Path]:
        return self.storage.directories()

    async def open(self, *, create: bool) -> PinningStore:
        service = self.endpoint_of(self.endpoint, self.auth())
        store = PinningStore(self, service, await open_provider(self.storage, create=create))
        if create:
            try:
                await store.reach()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await store.aclose()
                raise
        return store


class _Request(NamedTuple):
    """One pin request as the service tells of it."""

    id: str
    status: str


class PinningStore:
    """A byte store whose blocks a pinning service pins."""

    local = False

    def __init__(self, options: PinningOptions, service: Endpoint, storage: ByteStore) -> None:
        self.name = f"pinning-service:{service.url} (stored at {storage.name})"
        self._service = service
        self._storage = storage
        self._until_pinned = options.wait == _PINNED
        self._patience_s = options.pin_timeout_ms / 1000
        # What was offered to the service and no `sync` has confirmed yet.
        self._pending: set[bytes] = set()

    # -- reading is the storage's ----------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        return self._storage.counters

    async def get(self, digest: bytes) -> VerifiedBlock:
        return await self._storage.get(digest)

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        return await self._storage.get_many(digests)

    async def has(self, digest: bytes) -> bool:
        return await self._storage.has(digest)

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        return await self._storage.has_many(digests)

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        return await self._storage.sizes(digests)

    def usage(self) -> Usage:
        return self._storage.usage()

    def sources(self) -> list[Source]:
        return self._storage.sources()

    # -- writing is both's -----------------------------------------------------------------------------

    async def put(self, block: SealedBlock) -> None:
        """Store a block, then have it pinned."""
        await self._storage.put(block)
        await self._pin([block.digest])

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        """Store a block that stands in a file, then have it pinned."""
        await self._storage.put_file(digest, path)
        await self._pin([digest])

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        """`put_file` for many side by side. If some cannot be stored, nothing of this call is pinned yet."""
        await self._storage.put_files(files)
        await self._pin([digest for digest, _ in files])

    async def delete(self, digest: bytes) -> None:
        """Give up the pin, then the block; if the service cannot be reached both stay."""
        await self.delete_many((digest,))

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """`delete` for many side by side."""
        await each(self._unpin, _batches(digests))
        await self._storage.delete_many(digests)

    async def sync(self) -> None:
        """Return when the storage's part is durable, and the service's part as far as it is waited for.

        Raises provider_http_error when the service has failed to pin a block, provider_request_failed when it
        takes too long. Such a block has to be stored again.
        """
        await self._storage.sync()
        pending = list(self._pending)
        with trio.move_on_after(self._patience_s) as scope:
            await each(self._settle, _batches(pending))
        left = [digest for digest in pending if digest in self._pending] if scope.cancelled_caught else []
        if left:
            raise MeshkitError(
                "provider_request_failed",
                f"{self.name}: after {self._patience_s:g} s, {len(left)} of {len(pending)} blocks are not "
                f"pinned, among them {cid_text(left[0])}",
            )

    async def probe(self) -> Capabilities:
        """Find out whether the service can be used; what can be done is the storage's."""
        await self.reach()
        return await self._storage.probe()

    async def reach(self) -> None:
        """Ask the service for something. Raises provider_request_failed, provider_http_error."""
        self._results(await self._ask({"limit": "1"}))

    async def aclose(self) -> None:
        await self._storage.aclose()
        await self._service.aclose()

    # -- the service -----------------------------------------------------------------------------------

    async def _pin(self, digests: Sequence[bytes]) -> None:
        await each(self._offer, _batches(digests))

    async def _offer(self, digests: Sequence[bytes]) -> None:
        """Have at most `_BATCH` blocks pinned, unless they are or will be."""
        known = await self._known(digests)
        for digest in digests:
            failed = [request for request in known.get(digest, ()) if request.status == "failed"]
            if digest not in known or len(failed) == len(known[digest]):
                for request in failed:
                    await self._forget(request)
                await self._request(digest)
            self._pending.add(digest)

    async def _request(self, digest: bytes) -> None:
        wanted = {"cid": cid_text(digest), "name": _NAME}
        # Asked once too often it is only pinned twice, and given up twice.
        reply = await self._service.request("POST", "/pins", json=wanted, cap=_CAP, idempotent=True)
        told = reply.json()
        pin = told.get("pin") if isinstance(told, dict) else None
        if not isinstance(pin, dict) or decoded(pin.get("cid")) != cid_bytes(digest):
            raise self._nonsense("it answers a pin request with something else")

    async def _unpin(self, digests: Sequence[bytes]) -> None:
        for digest, requests in (await self._known(digests)).items():
            for request in requests:
                await self._forget(request)
            self._pending.discard(digest)
        self._pending.difference_update(digests)

    async def _settle(self, digests: Sequence[bytes]) -> None:
        """Wait for these blocks as long as the options say. Raises for one that the service failed to pin."""
        pause = _SOON_S
        while waiting := [digest for digest in digests if digest in self._pending]:
            known = await self._known(waiting)
            for digest in waiting:
                states = {request.status for request in known.get(digest, ())}
                if states == {"failed"}:
                    raise MeshkitError(
                        "provider_http_error", f"{self.name}: it failed to pin {cid_text(digest)}"
                    )
                # A service may take a moment to list what it has accepted.
                if _PINNED in states or (states and not self._until_pinned):
                    self._pending.discard(digest)
            if not self._pending.isdisjoint(waiting):
                await trio.sleep(pause)
                pause = min(2 * pause, _LATER_S)

    async def _known(self, digests: Collection[bytes]) -> dict[bytes, list[_Request]]:
        """Return what the service has been asked for concerning these blocks, in any state."""
        cids = {cid_bytes(digest): digest for digest in digests}
        asked = ",".join(cid_text(digest) for digest in digests)
        found: dict[bytes, list[_Request]] = {}
        for item in self._results(await self._ask({"cid": asked, "status": _EVERY, "limit": str(_LIMIT)})):
            pin = item.get("pin")
            digest = cids.get(decoded(pin.get("cid") if isinstance(pin, dict) else None))
            identifier, status = item.get("requestid"), item.get("status")
            if digest is None or not isinstance(identifier, str) or not isinstance(status, str):
                raise self._nonsense("it answers something else than the pins that were asked for")
            found.setdefault(digest, []).append(_Request(identifier, status))
        return found

    async def _forget(self, request: _Request) -> None:
        if not request.id.replace("-", "").replace("_", "").isalnum() or not request.id.isascii():
            raise self._nonsense(f"a request is named {shown(request.id)}")
        await self._service.request("DELETE", f"/pins/{request.id}", accept=(200, 202, 204, 404))

    async def _ask(self, params: dict[str, str]) -> Any:
        return (await self._service.request("GET", "/pins", params=params, cap=_CAP)).json()

    def _results(self, told: Any) -> list[dict[str, Any]]:
        results = told.get("results") if isinstance(told, dict) else None
        if not isinstance(results, list) or not all(isinstance(item, dict) for item in results):
            raise self._nonsense("it is no pinning service")
        return results

    def _nonsense(self, what: str) -> MeshkitError:
        return MeshkitError("provider_request_failed", f"{self.name}: {what}")


def _batches(digests: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [digests[at : at + _BATCH] for at in range(0, len(digests), _BATCH)]
