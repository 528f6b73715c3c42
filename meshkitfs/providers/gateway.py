"""Reading through trustless gateways, writing to the storage behind them.

A gateway is asked for one raw block by its CID, and its answer is worth nothing until it was hashed. One that
offers other bytes as the block has lied, and is not asked again; one that is away, busy or in the middle of
something else is passed over for now. What no gateway has is asked of the storage.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trio

from meshkitfs.core.blocks import MAX_SEALED, SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.net import Endpoint, Reply
from meshkitfs.providers._api import ByteStore, Capabilities, Counters, Source, Usage
from meshkitfs.providers._options import BOOLEAN, URL, URLS, TokenOptions, choice, number, option, wrong
from meshkitfs.providers._remote import each_had
from meshkitfs.providers._spec import SPEC, ProviderSpec, open_provider

__all__ = ["GatewayOptions", "GatewayStore"]

_log = logging.getLogger(__name__)

_PATH, _SUBDOMAIN = "path", "subdomain"
_RAW: Final = "application/vnd.ipld.raw"
# Types under which a gateway says: these bytes are the block. A page of text under 200 says something else.
_CLAIMS: Final = (_RAW, "application/octet-stream")
_ABSENT: Final = frozenset({404, 410, 412})
# When gateways race: how long the one before has to itself.
_STAGGER_S: Final = 0.3
# From a path gateway to its subdomain gateway, and a name that has moved.
_REDIRECTS: Final = 2


@dataclass(frozen=True, slots=True)
class GatewayOptions(TokenOptions):
    """``{"type": "gateway-retrieval", "gatewayUrl": URL, "storage": {...}}``, or ``gateways`` in their order.

    The token is for the gateways; the storage has its own.
    """

    gateway_url: str | None = option(URL, default=None)
    gateways: tuple[str, ...] = option(URLS, default=())
    gateway_mode: str = option(choice(_PATH, _SUBDOMAIN), default=_PATH)
    race: bool = option(BOOLEAN, default=False)
    storage: ProviderSpec = option(SPEC)
    # There is always somebody else to ask.
    retries: int = option(number(0, 10), default=0)

    def addresses(self) -> dict[str, str]:
        if self.gateway_url is not None:
            return {"gatewayUrl": self.gateway_url}
        return {f"gateways[{index}]": address for index, address in enumerate(self.gateways)}

    def check(self, where: str) -> None:
        TokenOptions.check(self, where)
        if (self.gateway_url is None) == (not self.gateways):
            wrong(f"{where}.gatewayUrl", "or 'gateways' must be there, and not both")
        for name, address in self.addresses().items():
            host = urlsplit(address).hostname or ""
            if self.gateway_mode == _SUBDOMAIN and re.fullmatch(r"[0-9.]+|.*:.*", host):
                wrong(f"{where}.{name}", "must have a host name: 'gatewayMode' is 'subdomain'")
        if self.storage.type == "gateway-retrieval":
            wrong(f"{where}.storage", "must be a provider that stores")

    def boundaries(self) -> set[str]:
        return TokenOptions.boundaries(self) | self.storage.boundaries()

    def directories(self) -> list[Path]:
        return self.storage.directories()

    async def open(self, *, create: bool) -> GatewayStore:
        """Open the storage, and the gateways, of which nothing is asked yet."""
        endpoints = self._endpoints()
        return GatewayStore(self, endpoints, await open_provider(self.storage, create=create))

    async def open_absent(self) -> GatewayStore:
        """Open the storage even if it is not there."""
        endpoints = self._endpoints()
        return GatewayStore(self, endpoints, await open_provider(self.storage, absent=True))

    def _endpoints(self) -> list[Endpoint]:
        auth = self.auth()
        return [self.endpoint_of(url, auth, redirects=_REDIRECTS) for url in self.addresses().values()]


@dataclass(slots=True)
class _Gateway:
    endpoint: Endpoint
    source: Source


@dataclass(slots=True)
class _Outcome:
    """What is open about one block: who did not say whether it has it, and who offered something else."""

    silent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class GatewayStore:
    """Gateways in front of a byte store. Every method but `get` and `get_many` is the storage's."""

    local = False

    def __init__(self, options: GatewayOptions, endpoints: Sequence[Endpoint], storage: ByteStore) -> None:
        self._gateways = [_Gateway(endpoint, Source(endpoint.name)) for endpoint in endpoints]
        self._subdomain = options.gateway_mode == _SUBDOMAIN
        self._stagger = _STAGGER_S if options.race else math.inf
        self._storage = storage
        self._gets = self._bytes_in = 0
        names = ", ".join(gateway.source.name for gateway in self._gateways)
        self.name = f"gateway-retrieval:{names} (stored at {storage.name})"

    @property
    def counters(self) -> Counters:
        """Reads of this store, writes of its storage."""
        written = self._storage.counters
        return Counters(self._gets, written.puts, self._bytes_in, written.bytes_out)

    # -- reading ---------------------------------------------------------------------------------------

    async def get(self, digest: bytes) -> VerifiedBlock:
        """The block of that digest, from whoever has it.

        Raises block_unavailable when every gateway and the storage say that they do not have it,
        provider_request_failed when one of them did not say, else cid_mismatch when one has offered
        other bytes.
        """
        self._gets += 1
        outcome = _Outcome()
        block = await self._from_gateways(digest, outcome)
        if block is None:
            try:
                block = await self._storage.get(digest)
            except MeshkitError as error:
                if error.code != "block_unavailable" or not (outcome.silent or outcome.wrong):
                    raise
                why = "; ".join(outcome.silent or outcome.wrong)
                code = "provider_request_failed" if outcome.silent else "cid_mismatch"
                raise MeshkitError(code, f"{cid_text(digest)} is not at the storage, and {why}") from None
        self._bytes_in += len(block.data)
        return block

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        """`get` for many side by side; what cannot be had is left out."""
        return await each_had(self.get, digests)

    async def _from_gateways(self, digest: bytes, outcome: _Outcome) -> VerifiedBlock | None:
        """Ask gateway after gateway; the next one also while the one before takes its time, if they race."""
        waiting = []
        for gateway in self._gateways:
            if gateway.source.barred:
                outcome.silent.append(f"{gateway.source.name} is not asked any more")
            else:
                waiting.append(gateway)
        running = 0
        give, take = trio.open_memory_channel[VerifiedBlock | None](len(waiting))

        async def ask(gateway: _Gateway) -> None:
            await give.send(await self._ask(gateway, digest, outcome))

        async with trio.open_nursery() as nursery:
            while waiting or running:
                if waiting:
                    nursery.start_soon(ask, waiting.pop(0))
                    running += 1
                with trio.move_on_after(self._stagger if waiting else math.inf):
                    block = await take.receive()
                    running -= 1
                    if block is not None:
                        nursery.cancel_scope.cancel()
                        return block
        return None

    async def _ask(self, gateway: _Gateway, digest: bytes, outcome: _Outcome) -> VerifiedBlock | None:
        """Ask one gateway. None: it does not have the block, or what it said is not an answer."""
        cid, source = cid_text(digest), gateway.source
        try:
            reply = await gateway.endpoint.request(
                "GET",
                "/" if self._subdomain else f"/ipfs/{cid}",
                subdomain=f"{cid}.ipfs" if self._subdomain else "",
                params={"format": "raw"},
                headers={"Accept": _RAW},
                cap=MAX_SEALED,
                accept={200, *_ABSENT},
            )
            if reply.status in _ABSENT:
                return None
            block = VerifiedBlock.check(digest, reply.body)
        except MeshkitError as error:
            if error.code != "cid_mismatch":
                source.failed += 1
                outcome.silent.append(error.detail)
                return None
            source.wrong += 1
            if _claims_the_block(reply):
                source.barred = f"it answered with other bytes than those of {cid}"
                _log.warning("gateway %s is not asked any more: %s", source.name, source.barred)
                outcome.wrong.append(f"{source.name} answered with something else")
            else:
                outcome.silent.append(f"{source.name} answered with something that is no block")
            return None
        source.served += 1
        return block

    # -- the storage's -----------------------------------------------------------------------------------

    async def put(self, block: SealedBlock) -> None:
        await self._storage.put(block)

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        await self._storage.put_file(digest, path)

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        await self._storage.put_files(files)

    async def has(self, digest: bytes) -> bool:
        return await self._storage.has(digest)

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        return await self._storage.has_many(digests)

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        return await self._storage.sizes(digests)

    async def delete(self, digest: bytes) -> None:
        await self._storage.delete(digest)

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        await self._storage.delete_many(digests)

    async def sync(self) -> None:
        await self._storage.sync()

    async def probe(self) -> Capabilities:
        """What the storage can do. Blocks that are only at gateways are in no listing."""
        return replace(await self._storage.probe(), listing=False)

    def usage(self) -> Usage:
        return self._storage.usage()

    def sources(self) -> list[Source]:
        """The gateways, and the storage."""
        return [*(gateway.source for gateway in self._gateways), *self._storage.sources()]

    async def aclose(self) -> None:
        """Close the connections to all of them."""
        for gateway in self._gateways:
            await gateway.endpoint.aclose()
        await self._storage.aclose()


def _claims_the_block(reply: Reply) -> bool:
    """Whether an answer says that it is the block, all of it. A login page, or half an answer, is no lie."""
    whole = "content-length" in reply.headers or "transfer-encoding" in reply.headers
    kind = reply.headers.get("content-type", _RAW).partition(";")[0].strip().lower()
    return whole and kind in _CLAIMS
