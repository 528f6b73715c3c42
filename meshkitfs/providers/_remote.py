"""What all byte stores behind a network have in common: counting, checking, many at a time.

A subclass says how one block is read, written, measured and removed. Blocks are hashed on both ways: what
comes in reaches the caller as a `VerifiedBlock` only, and what is not what its name says is not sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import trio

from meshkitfs.core.blocks import MAX_SEALED, SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_text, digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import Capabilities, Counters, Source, Usage

__all__ = ["UNBOUNDED", "RemoteStore", "each", "each_had"]

T = TypeVar("T")
R = TypeVar("R")

# What a service without a quota that can be asked for reports: more than anybody checks for before writing.
UNBOUNDED: Final = Usage(1 << 50, 1 << 50, 1 << 32)
# How many blocks of one call are on their way at a time; the endpoint bounds requests of all calls together.
WIDTH: Final = 8


class RemoteStore(ABC):
    """A byte store of other machines. Everything but `usage` belongs to the trio run it was opened in."""

    local = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.counters = Counters()
        self.capabilities = Capabilities()
        self._source = Source(name)

    # -- what a subclass says --------------------------------------------------------------------------

    @abstractmethod
    async def _read(self, digest: bytes) -> VerifiedBlock:
        """Return one block. Raises as `ByteStore.get`."""

    @abstractmethod
    async def _write(self, digest: bytes, data: bytes) -> None:
        """Store one block, whose bytes were checked, so that it stays after the call."""

    @abstractmethod
    async def _measure(self, digest: bytes) -> int | None:
        """Return the size of one block, None if the store surely does not have it."""

    @abstractmethod
    async def _remove(self, digest: bytes) -> None:
        """Forget one block; one that is not there is no error."""

    # -- the ByteStore methods -------------------------------------------------------------------------

    async def get(self, digest: bytes) -> VerifiedBlock:
        """The block of that digest. Raises block_unavailable, cid_mismatch, provider_request_failed."""
        self.counters.gets += 1
        with self._source.asked(), self.counters.trip("get"):
            block = await self._read(digest)
        self.counters.bytes_in += len(block.data)
        return block

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        """`get` for many side by side; what cannot be had is left out."""
        return await each_had(self.get, digests)

    async def put(self, block: SealedBlock) -> None:
        """Store a block. Raises cid_mismatch for one that is not what its name says."""
        self.counters.puts += 1
        if not 0 < len(block.data) <= MAX_SEALED:
            raise MeshkitError(
                "invalid_envelope", f"a sealed block of {len(block.data)} bytes cannot be stored"
            )
        data = bytes(block.data)
        if digest_of(data) != block.digest:
            raise MeshkitError("cid_mismatch", f"{cid_text(block.digest)} is damaged here, and was not sent")
        with self.counters.trip("put"):
            await self._write(block.digest, data)
        self.counters.bytes_out += len(data)

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        """Store a block that stands in a file."""
        try:
            data = await trio.to_thread.run_sync(_contents, path, abandon_on_cancel=True)
        except OSError as error:
            self.counters.puts += 1
            detail = f"the file of block {cid_text(digest)} cannot be read: {error.strerror}"
            raise MeshkitError("block_unavailable", detail) from None
        await self.put(SealedBlock(digest, data))

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        """`put_file` for many side by side. Raises the first failure after all have had their try."""

        async def one(file: tuple[bytes, str | Path]) -> None:
            await self.put_file(*file)

        await each(one, files)

    async def has(self, digest: bytes) -> bool:
        """Whether the store holds a block of that name."""
        return await self._measure(digest) is not None

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests the store holds."""
        return set(await self.sizes(digests))

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Those of the digests the store holds, with the bytes of each."""
        found: dict[bytes, int] = {}

        async def one(digest: bytes) -> None:
            size = await self._measure(digest)
            if size is not None:
                found[digest] = size

        await each(one, list(digests))
        return found

    async def delete(self, digest: bytes) -> None:
        """Forget a block; one that is not there is no error."""
        await self._remove(digest)

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """`delete` for many side by side. Raises the first failure after all have had their try."""
        await each(self._remove, digests)

    async def sync(self) -> None:
        """Nothing to wait for: a write is acknowledged when it is stored."""
        await trio.lowlevel.checkpoint()

    async def probe(self) -> Capabilities:
        """Find out what the service can do, by asking it, and remember it."""
        return self.capabilities

    def sources(self) -> list[Source]:
        """The places blocks are read from, and what is known of each."""
        return [self._source]

    def usage(self) -> Usage:
        """No known bound."""
        return UNBOUNDED

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections. Harmless when repeated."""


async def each(function: Callable[[T], Awaitable[object]], items: Sequence[T]) -> None:
    """Call ``function`` with every item, several at a time, and raise the first item's failure at the end.

    One failure does not keep the others from their try: what could be done is done.
    """
    failures: dict[int, MeshkitError] = {}
    queue = iter(enumerate(items))

    async def work() -> None:
        for index, item in queue:
            try:
                await function(item)
            except MeshkitError as error:
                failures[index] = error

    async with trio.open_nursery() as nursery:
        for _ in range(min(WIDTH, len(items))):
            nursery.start_soon(work)
    if failures:
        raise failures[min(failures)]


async def each_had(
    get: Callable[[bytes], Awaitable[VerifiedBlock]], digests: Sequence[bytes]
) -> dict[bytes, VerifiedBlock]:
    """Get several blocks side by side; what cannot be had is left out."""
    found: dict[bytes, VerifiedBlock] = {}

    async def one(digest: bytes) -> None:
        try:
            found[digest] = await get(digest)
        except MeshkitError:
            return

    await each(one, digests)
    return found


def _contents(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        # One byte more than may be: a file that is too long is found to be so.
        return file.read(MAX_SEALED + 1)
