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
    """``plant`` puts bytes where the block of a digest is looked for; None where that is impossible."""

    store: ByteStore
    plant: Callable[[bytes, bytes], None] | None


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
        assert isinstance(store, LocalStore)

        def plant(digest: bytes, data: bytes) -> None:
            path = store.directory / store.place(digest)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

        yield Opened(store, plant)


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


Entry = Callable[[Portal, Any, Path], contextlib.AbstractContextManager[Opened]]
# A new provider joins the contract here.
STORES: dict[str, Entry] = {
    "local": local,
    "s3-rclone": s3_rclone,
    "s3-moto": s3_moto,
}
