"""Blocks in an IPFS Cluster: one REST service that has its peers' nodes pin them, each several times.

Writing goes to the cluster, which hands the block to the nodes it chose and pins it there. A cluster cannot
be read from; that is done at an IPFS node, one of its own or one that is connected to them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from meshkitfs.core.blocks import VerifiedBlock
from meshkitfs.core.cid import cid_bytes, cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.net import Endpoint, Reply
from meshkitfs.providers._api import Capabilities, Source
from meshkitfs.providers._kubo import decoded, shown
from meshkitfs.providers._options import URL, number, option, wrong
from meshkitfs.providers._remote import RemoteStore, each
from meshkitfs.providers._spec import SPEC, ProviderSpec
from meshkitfs.providers.ipfs import HttpIpfsOptions, IpfsStore, LoginOptions

__all__ = ["ClusterOptions", "ClusterStore"]

EVERYWHERE: Final = -1
# The name of the pins, and where their size stands: a cluster does not know the size of what it pins.
_NAME: Final = "meshkitfs"
_SIZE: Final = "meshkitfs-size"
# How many blocks are asked for in one request: their CIDs stand in its address.
_BATCH: Final = 64
# Each block comes with a line for each of the cluster's peers.
_CAP: Final = 16 << 20
_SOON_S: Final = 0.05
_LATER_S: Final = 2.0
_PINNED: Final = "pinned"
_UNDERWAY: Final = frozenset({"pinning", "pin_queued", "queued"})
_FAILED: Final = frozenset({"pin_error", "error", "unexpectedly_unpinned"})


@dataclass(frozen=True, slots=True)
class ClusterOptions(LoginOptions):
    """``{"type": "ipfs-cluster", "clusterApiUrl": URL, "node": {"type": "ipfs-http", ...}}``.

    A block counts as stored when ``replication_min`` peers have pinned it; ``replication_max`` is how many
    the cluster tries for, as many if it is left out. -1, the default, means all peers. ``pin_timeout_ms`` is
    how long that may take.
    """

    cluster_api_url: str = option(URL)
    node: ProviderSpec = option(SPEC)
    replication_min: int = option(number(EVERYWHERE, 1000), default=EVERYWHERE)
    replication_max: int | None = option(number(EVERYWHERE, 1000), default=None)
    pin_timeout_ms: int = option(number(100, 600_000), default=120_000)

    def addresses(self) -> dict[str, str]:
        return {"clusterApiUrl": self.cluster_api_url}

    def check(self, where: str) -> None:
        LoginOptions.check(self, where)
        if not isinstance(self.node.options, HttpIpfsOptions):
            wrong(f"{where}.node.type", "must be 'ipfs-http': the node that blocks are read from")
        least, most = self.replication_min, self.replication_max
        if 0 in (least, most):
            wrong(f"{where}.replicationMin", "and 'replicationMax' are at least 1, or -1 for all peers")
        if most is not None and EVERYWHERE in (least, most) and least != most:
            wrong(f"{where}.replicationMax", "must be -1 if and only if 'replicationMin' is")
        if most is not None and most < least:
            wrong(f"{where}.replicationMax", "is less than 'replicationMin'")

    def boundaries(self) -> set[str]:
        return LoginOptions.boundaries(self) | self.node.boundaries()

    async def open(self, *, create: bool) -> ClusterStore:
        assert isinstance(self.node.options, HttpIpfsOptions)
        node = await self.node.options.open(create=create)
        store = ClusterStore(self, self.endpoint_of(self.cluster_api_url, self.auth()), node)
        if create:
            try:
                await store.probe()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await store.aclose()
                raise
        return store


@dataclass(slots=True)
class _Status:
    """What the cluster says of one block: what state it is in at each peer, and its size if that is noted."""

    peers: list[str] = field(default_factory=list)
    size: int | None = None

    @property
    def held(self) -> bool:
        return _PINNED in self.peers

    @property
    def coming(self) -> bool:
        return not _UNDERWAY.isdisjoint(self.peers)

    def enough(self, replicas: int) -> bool:
        if replicas == EVERYWHERE:
            return self.held and set(self.peers) == {_PINNED}
        return self.peers.count(_PINNED) >= replicas


class ClusterStore(RemoteStore):
    """The byte store of one cluster, read through ``node``."""

    def __init__(self, options: ClusterOptions, cluster: Endpoint, node: IpfsStore) -> None:
        super().__init__(f"ipfs-cluster:{cluster.url} (read at {node.name})")
        self.capabilities = node.capabilities
        self._cluster = cluster
        self._node = node
        self._replicas = options.replication_min
        self._patience_s = options.pin_timeout_ms / 1000
        most = options.replication_min if options.replication_max is None else options.replication_max
        # Always both: a cluster refuses one of them beside its own -1 for the other.
        self._wanted = {"replication-min": str(options.replication_min), "replication-max": str(most)}
        # What the cluster took and no `sync` has confirmed yet.
        self._pending: set[bytes] = set()

    # -- the ByteStore methods that differ -------------------------------------------------------------

    async def sync(self) -> None:
        """Wait until what was stored is pinned by as many peers as it should be.

        Raises provider_request_failed when that takes too long.
        """
        pending = list(self._pending)
        batches = [pending[at : at + _BATCH] for at in range(0, len(pending), _BATCH)]
        with trio.move_on_after(self._patience_s) as scope:
            await each(self._settle, batches)
        short = [digest for digest in pending if digest in self._pending] if scope.cancelled_caught else []
        if short:
            # They stay pending: whoever else waits for one of them must not be told that it is safe.
            raise MeshkitError(
                "provider_request_failed",
                f"{self.name}: after {self._patience_s:g} s, {len(short)} of {len(pending)} blocks are "
                f"pinned by fewer peers than asked for, among them {cid_text(short[0])}",
            )

    async def sizes(self, digests: Sequence[bytes] | Any) -> dict[bytes, int]:
        """Those of the digests that some peer has pinned, with their sizes; many are asked for at once."""
        wanted = list(dict.fromkeys(digests))
        found: dict[bytes, int] = {}

        async def some(batch: Sequence[bytes]) -> None:
            for digest, status in (await self._status(batch)).items():
                if self._is_kept(digest, status):
                    found[digest] = await self._size(digest, status)

        await each(some, [wanted[at : at + _BATCH] for at in range(0, len(wanted), _BATCH)])
        return found

    async def probe(self) -> Capabilities:
        """Find out whether the cluster can be used, and has enough peers; and the same of the node."""
        told = self._object(await self._cluster.request("GET", "/id"))
        peers = told.get("cluster_peers")
        if not isinstance(peers, list):
            raise self._nonsense("it does not say who its peers are")
        if len(peers) < self._replicas:
            raise MeshkitError(
                "provider_http_error",
                f"{self.name}: it has {len(peers)} peers, and blocks have to be at {self._replicas}",
            )
        await self._node.probe()
        return self.capabilities

    def sources(self) -> list[Source]:
        """The node."""
        return self._node.sources()

    async def aclose(self) -> None:
        await self._node.aclose()
        await self._cluster.aclose()

    # -- one block -------------------------------------------------------------------------------------

    async def _read(self, digest: bytes) -> VerifiedBlock:
        try:
            return await self._node.get(digest)
        except MeshkitError as error:
            if error.code != "block_unavailable":
                raise
            status = (await self._status((digest,)))[digest]
            if self._is_kept(digest, status):
                detail = f"{self.name} keeps {cid_text(digest)}, and the node does not find it"
                raise MeshkitError("provider_request_failed", detail) from None
            raise

    async def _write(self, digest: bytes, data: bytes) -> None:
        await self._node.clear(digest, len(data))
        reply = await self._cluster.request(
            "POST",
            "/add",
            # Without stream-channels a failure comes as a status, not behind the body of a success.
            params={
                "format": "car",
                "stream-channels": "false",
                "name": _NAME,
                f"meta-{_SIZE}": str(len(data)),
                **self._wanted,
            },
            files={"file": ("block.car", _archive(digest, data), "application/vnd.ipld.car")},
            accept=(200, 500),
            idempotent=True,
        )
        if reply.status != 200:
            raise self._failure(reply)
        told = reply.json()
        roots = [item.get("cid") for item in told if isinstance(item, dict)] if isinstance(told, list) else []
        if [decoded(_link(root)) for root in roots] != [cid_bytes(digest)]:
            names = ", ".join(shown(_link(root)) for root in roots) or "nothing"
            raise MeshkitError("cid_mismatch", f"{self.name} stored {cid_text(digest)} and calls it {names}")
        self._pending.add(digest)

    async def _measure(self, digest: bytes) -> int | None:
        return (await self.sizes((digest,))).get(digest)

    async def _remove(self, digest: bytes) -> None:
        self._pending.discard(digest)
        reply = await self._cluster.request("DELETE", f"/pins/{cid_text(digest)}", accept=(200, 404, 500))
        if reply.status == 500:
            raise self._failure(reply)

    # -- what the cluster says -------------------------------------------------------------------------

    async def _settle(self, digests: Sequence[bytes]) -> None:
        """Wait until all of these are safe, or deleted; peers that failed are told once to try again."""
        told: set[bytes] = set()
        pause = _SOON_S
        while waiting := [digest for digest in digests if digest in self._pending]:
            for digest, status in (await self._status(waiting)).items():
                if status.enough(self._replicas):
                    self._pending.discard(digest)
                elif digest not in told and not _FAILED.isdisjoint(status.peers):
                    told.add(digest)
                    await self._cluster.request("POST", f"/pins/{cid_text(digest)}/recover", idempotent=True)
            if not self._pending.isdisjoint(waiting):
                await trio.sleep(pause)
                pause = min(2 * pause, _LATER_S)

    async def _status(self, digests: Collection[bytes]) -> dict[bytes, _Status]:
        """Return what the cluster says of each of these blocks, at most `_BATCH`."""
        if not digests:
            return {}
        cids = ",".join(cid_text(digest) for digest in digests)
        reply = await self._cluster.request("GET", "/pins", params={"cids": cids}, cap=_CAP)
        found: dict[bytes, _Status] = {}
        for line in reply.body.splitlines():
            told = _parsed(line)
            peers = told.get("peer_map") if isinstance(told, dict) else None
            if not isinstance(peers, dict):
                raise self._nonsense("it answers something else than the status of pins")
            states = [str(peer.get("status")) for peer in peers.values() if isinstance(peer, dict)]
            meta = told.get("metadata")
            size = meta.get(_SIZE) if isinstance(meta, dict) else None
            known = int(size) if isinstance(size, str) and size.isascii() and size.isdigit() else None
            found[decoded(_link(told.get("cid")))[-32:]] = _Status(states, known)
        missing = [digest for digest in digests if digest not in found]
        if missing:
            # A stream that broke off looks like one that ended. What is not spoken of is unknown.
            raise self._nonsense(f"it says nothing of {cid_text(missing[0])}")
        return found

    def _is_kept(self, digest: bytes, status: _Status) -> bool:
        """Whether a block is there. One that was just stored is, before the first peer says so."""
        return status.held or (digest in self._pending and status.coming)

    async def _size(self, digest: bytes, status: _Status) -> int:
        # Pinned by somebody else, without our note: only the block itself tells.
        return status.size if status.size is not None else len((await self._node.get(digest)).data)

    def _object(self, reply: Reply) -> dict[str, Any]:
        told = reply.json()
        if not isinstance(told, dict):
            raise self._nonsense("it is no IPFS Cluster")
        return told

    def _failure(self, reply: Reply) -> MeshkitError:
        told = _parsed(reply.body)
        said = shown(told.get("message") if isinstance(told, dict) else "")
        code = "no_space" if "no space left" in said else "provider_http_error"
        return MeshkitError(code, f"{self.name}: HTTP {reply.status}: {said}")

    def _nonsense(self, what: str) -> MeshkitError:
        return MeshkitError("provider_request_failed", f"{self.name}: {what}")


def _archive(digest: bytes, data: bytes) -> bytes:
    """Return a CAR (version 1) with one block, which is its root."""
    cid = cid_bytes(digest)
    # DAG-CBOR of {"roots": [CID], "version": 1}; a CID is a byte string with a zero before it, under tag 42.
    header = b"\xa2\x65roots\x81\xd8\x2a\x58\x25\x00" + cid + b"\x67version\x01"
    return _varint(len(header)) + header + _varint(len(cid) + len(data)) + cid + data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _link(value: object) -> object:
    """A CID as clusters write it: text, or in older versions an object with one field."""
    return value.get("/") if isinstance(value, dict) else value


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
