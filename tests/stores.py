"""The byte stores that the contract (t1_store_contract.py) is held against: one entry each.

An entry is a context manager. It starts or finds its server, opens the store in the trio run of a `Portal`, and
gives an `Opened`: the store and a way to put any bytes at the place of a block, behind the store's back.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from servers.pinning import TOKEN
from servers.s3 import S3Server

from meshkitfs.core.cid import cid_text
from meshkitfs.providers import ByteStore, LocalStore, ProviderSpec, open_provider


class Portal:
    """One run of trio in a thread, for tests that are not asynchronous: a remote store belongs to one run."""

    def __init__(self) -> None:
        ready = threading.Event()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            self._end = trio.Event()
            ready.set()
            await self._end.wait()

        self._thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
        self._thread.start()
        ready.wait()

    def run(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Call an async function in that run, and wait for it."""
        return trio.from_thread.run(functools.partial(function, *args), trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join()


@dataclass(slots=True)
class Opened:
    """``plant`` puts bytes where the block of a digest is looked for; None where that is impossible.

    What is deleted ``lingers`` where it can still be read for a while, if somebody asks, but is not had any more.
    """

    store: ByteStore
    plant: Callable[[bytes, bytes], None] | None
    lingers: bool = False


@contextlib.contextmanager
def opened(portal: Portal, config: dict[str, Any], base: Path) -> Iterator[ByteStore]:
    """The store of a provider object, set up as ``init`` does."""
    spec = ProviderSpec.from_config(config, base)
    store = portal.run(functools.partial(open_provider, spec, create=True))
    try:
        yield store
    finally:
        portal.run(store.aclose)


@contextlib.contextmanager
def local(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    with opened(portal, {"type": "local-dev"}, tmp_path) as store:
        yield Opened(store, functools.partial(_plant_file, tmp_path / "blocks"))


def _plant_file(directory: Path, digest: bytes, data: bytes) -> None:
    path = directory / LocalStore.place(digest)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


@contextlib.contextmanager
def _s3(portal: Portal, server: S3Server, tmp_path: Path, **more: Any) -> Iterator[Opened]:
    client = server.client()
    prefix = os.urandom(8).hex()
    with server.credentials(), opened(portal, server.config(prefix=prefix, **more), tmp_path) as store:

        def plant(digest: bytes, data: bytes) -> None:
            client.put_object(Bucket=server.bucket, Key=f"{prefix}/{cid_text(digest)}", Body=data)

        yield Opened(store, plant)


def s3_rclone(portal: Portal, request: Any, tmp_path: Path) -> contextlib.AbstractContextManager[Opened]:
    return _s3(portal, request.getfixturevalue("rclone_s3"), tmp_path)


def s3_moto(portal: Portal, request: Any, tmp_path: Path) -> contextlib.AbstractContextManager[Opened]:
    return _s3(portal, request.getfixturevalue("moto_s3"), tmp_path)


@contextlib.contextmanager
def gateway_helia(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    """Helia's gateway over the directory that is written to."""
    url, directory = request.getfixturevalue("helia")
    below = {"type": "local-dev", "store": str(directory)}
    config = {"type": "gateway-retrieval", "gatewayUrl": url, "storage": below}
    with opened(portal, config, tmp_path) as store:
        yield Opened(store, functools.partial(_plant_file, directory))


@contextlib.contextmanager
def fallback(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    """Two S3 servers, the first with other credentials than the second."""
    rclone, moto = request.getfixturevalue("rclone_s3"), request.getfixturevalue("moto_s3")
    files = []
    for server in (rclone, moto):
        file = tmp_path / f"{server.access_key}.credentials"
        file.write_text(
            f"[default]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
        )
        file.chmod(0o600)
        files.append(str(file))
    prefix = os.urandom(8).hex()
    config = {
        "type": "fallback",
        "copies": 2,
        "providers": [
            server.config(prefix=prefix, credentialsFile=file)
            for server, file in zip((rclone, moto), files, strict=True)
        ],
    }
    with opened(portal, config, tmp_path) as store:

        def plant(digest: bytes, data: bytes) -> None:
            for server in (rclone, moto):
                key = f"{prefix}/{cid_text(digest)}"
                server.client().put_object(Bucket=server.bucket, Key=key, Body=data)

        yield Opened(store, plant)


# Short, because a block that nobody has is looked for that long.
LOOKUP_MS = 500


@contextlib.contextmanager
def ipfs_http(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    node = request.getfixturevalue("ipfs_node")
    config = {"type": "ipfs-http", "ipfsApiUrl": node.url, "lookupMs": LOOKUP_MS}
    with opened(portal, config, tmp_path) as store:
        yield Opened(store, node.plant)


@contextlib.contextmanager
def ipfs_cluster(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    cluster = request.getfixturevalue("cluster")
    node = next(iter(cluster.nodes.values()))
    config = {
        "type": "ipfs-cluster",
        "clusterApiUrl": cluster.url,
        "replicationMin": 2,
        "node": {"type": "ipfs-http", "ipfsApiUrl": node.url, "lookupMs": LOOKUP_MS},
    }
    with opened(portal, config, tmp_path) as store:

        def plant(digest: bytes, data: bytes) -> None:
            cluster.settled()
            node.plant(digest, data)

        yield Opened(store, plant, lingers=True)


@contextlib.contextmanager
def pinning(portal: Portal, request: Any, tmp_path: Path) -> Iterator[Opened]:
    node, service = request.getfixturevalue("ipfs_node"), request.getfixturevalue("pinning_service")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    config = {
        "type": "pinning-service",
        "endpoint": service.url,
        "tokenFile": str(token),
        "storage": {"type": "ipfs-http", "ipfsApiUrl": node.url, "lookupMs": LOOKUP_MS},
    }
    with opened(portal, config, tmp_path) as store:
        yield Opened(store, node.plant)


Entry = Callable[[Portal, Any, Path], contextlib.AbstractContextManager[Opened]]
# A new provider joins the contract here.
STORES: dict[str, Entry] = {
    "local": local,
    "s3-rclone": s3_rclone,
    "s3-moto": s3_moto,
    "gateway-helia": gateway_helia,
    "fallback": fallback,
    "ipfs-http": ipfs_http,
    "ipfs-cluster": ipfs_cluster,
    "pinning-service": pinning,
}
