"""Blocks at an IPFS node, over Kubo's RPC: each one a raw block, pinned.

What the store *has* is what the node keeps by a pin; an unpinned block may go with the node's next garbage
collection. What it can be *asked for* is more: the node looks for a block at its peers too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import trio

from meshkitfs.core.blocks import VerifiedBlock
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.net import SecretSource
from meshkitfs.providers._api import Capabilities, Usage
from meshkitfs.providers._kubo import Kubo
from meshkitfs.providers._options import TEXT, URL, TokenOptions, number, option, wrong
from meshkitfs.providers._remote import UNBOUNDED, RemoteStore

__all__ = ["HttpIpfsOptions", "IpfsStore", "LoginOptions"]

# How old the room that `usage` gives may be when something is stored.
_USAGE_AGE_S: Final = 60
# How many failed reads are remembered.
_FAILED_MOST: Final = 4096


@dataclass(frozen=True, slots=True)
class LoginOptions(TokenOptions):
    """What a provider has that takes HTTP basic authentication too: the token is then the password."""

    username: str | None = option(TEXT, default=None)

    def check(self, where: str) -> None:
        TokenOptions.check(self, where)
        if self.username is not None and self.token_env is None and self.token_file is None:
            wrong(f"{where}.username", "needs 'tokenEnv' or 'tokenFile' beside it: the place of the password")

    def auth(self) -> httpx.Auth | None:
        if self.username is None:
            return TokenOptions.auth(self)
        secret = SecretSource(self.token_env, self.token_file).load()
        assert secret is not None
        return httpx.BasicAuth(self.username, secret.reveal())


@dataclass(frozen=True, slots=True)
class HttpIpfsOptions(LoginOptions):
    """``{"type": "ipfs-http", "ipfsApiUrl": URL}``: a node that speaks Kubo's RPC.

    ``lookup_ms`` is how long the node may look for a block at its peers; by default nearly as long as an
    answer may take.
    """

    ipfs_api_url: str = option(URL)
    lookup_ms: int | None = option(number(100, 600_000), default=None)

    @classmethod
    def parse(cls, text: str, base: Path) -> HttpIpfsOptions:
        """``ipfs-http:URL``"""
        return cls.read({"ipfsApiUrl": text}, "provider", base)

    def addresses(self) -> dict[str, str]:
        return {"ipfsApiUrl": self.ipfs_api_url}

    def node(self) -> Kubo:
        """Return the node, not asked yet."""
        endpoint = self.endpoint_of(self.ipfs_api_url, self.auth())
        return Kubo(endpoint, None if self.lookup_ms is None else self.lookup_ms / 1000)

    async def open(self, *, create: bool) -> IpfsStore:
        store = IpfsStore(self.node())
        if create:
            try:
                await store.probe()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await store.aclose()
                raise
        return store


class IpfsStore(RemoteStore):
    """The byte store of one node."""

    def __init__(self, node: Kubo) -> None:
        super().__init__(f"ipfs-http:{node.endpoint.url}")
        # A block's name is its content: there is nothing to replace it with.
        self.capabilities = Capabilities(conditional_put=False, multi_delete=False, listing=False)
        self._node = node
        # Blocks whose copy at the node was found to be damaged, and some that did not come: a node does not
        # write what it believes to have, so a damaged copy has to go before it is stored again.
        self._damaged: set[bytes] = set()
        self._failed: set[bytes] = set()
        self._usage = UNBOUNDED
        self._usage_at = float("-inf")

    async def sync(self) -> None:
        """Nothing to wait for: a node acknowledges what is on its disk (Kubo: ``sync`` in its datastore).

        From time to time the node is asked for its room; one that does not tell it is none the worse.
        """
        await trio.lowlevel.checkpoint()
        if trio.current_time() - self._usage_at > _USAGE_AGE_S:
            self._usage_at = trio.current_time()
            with contextlib.suppress(MeshkitError):
                self._usage = await self._node.room()

    def usage(self) -> Usage:
        """What the node last said of its room; without a bound before it was asked."""
        return self._usage

    async def probe(self) -> Capabilities:
        """Find out whether the node can be reached and used, and how much room it has."""
        await self._node.identity()
        self._usage_at = trio.current_time()
        self._usage = await self._node.room()
        return self.capabilities

    async def aclose(self) -> None:
        await self._node.endpoint.aclose()

    async def _read(self, digest: bytes) -> VerifiedBlock:
        try:
            data = await self._node.get(digest)
        except MeshkitError:
            if len(self._failed) < _FAILED_MOST:
                self._failed.add(digest)
            raise
        if data is not None:
            try:
                return VerifiedBlock.check(digest, data)
            except MeshkitError:
                self._damaged.add(digest)
                raise
        if not await self._node.pinned(digest):
            where = f"neither at {self.name} nor at its peers"
        elif await self._node.size(digest) is None:
            where = f"pinned at {self.name}, which has lost it"
        else:
            raise MeshkitError(
                "provider_request_failed",
                f"{self.name} has {cid_text(digest)} and did not give it within {self._node.lookup_s:g} s",
            )
        raise MeshkitError("block_unavailable", f"{cid_text(digest)} is {where}")

    async def _write(self, digest: bytes, data: bytes) -> None:
        await self.clear(digest, len(data))
        await self._node.put(digest, data, pin=True)

    async def clear(self, digest: bytes, size: int) -> None:
        """Remove the node's copy of a block of that size, if it was found to be a wrong one."""
        wrong = digest in self._damaged
        if digest in self._failed:
            # It may be a copy that is too long to be let in; a good one is left alone.
            wrong = wrong or await self._node.size(digest) not in (None, size)
        if wrong:
            await self._remove(digest)
        self._damaged.discard(digest)
        self._failed.discard(digest)

    async def _measure(self, digest: bytes) -> int | None:
        # A pin is not the block: a node whose disk was restored can have one without the other.
        return await self._node.size(digest) if await self._node.pinned(digest) else None

    async def _remove(self, digest: bytes) -> None:
        await self._node.unpin(digest)
        await self._node.remove(digest)
