"""Several byte stores in an order: what one does not have, or cannot give, is asked of the next.

A block counts as stored when ``copies`` of the stores have acknowledged it (one, unless the configuration
says more) and `sync` has returned at all stores that took something since the last one. The stores are tried
in their order, so usually the first ``copies`` of them have it; one that is away or refuses is passed over,
and gets no copy later. A block is gone when every store has deleted it, and absent when every store says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import ByteStore, Capabilities, Counters, Source, Usage
from meshkitfs.providers._options import Options, number, option, wrong
from meshkitfs.providers._remote import each, each_had
from meshkitfs.providers._spec import SPECS, ProviderSpec, open_provider

__all__ = ["FallbackOptions", "FallbackStore"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
# A block that is not what its name says, or no block at all, is as wrong at the next store.
_FINAL: Final = frozenset({"cid_mismatch", "invalid_envelope"})


@dataclass(frozen=True, slots=True)
class FallbackOptions(Options):
    """``{"type": "fallback", "providers": [{...}, {...}]}``, and how many of them a block has to reach.

    All of them belong to one metadata service. A store of this machine is never a fallback for one that other
    people can reach: what would be written there nobody else could read.
    """

    providers: tuple[ProviderSpec, ...] = option(SPECS)
    copies: int = option(number(1, 16), default=1)

    def check(self, where: str) -> None:
        kept_here = [bool(spec.directories()) for spec in self.providers]
        if any(kept_here) and not all(kept_here):
            wrong(
                f"{where}.providers[{kept_here.index(True)}]",
                "is kept on this machine, and others are not: nothing falls back to a local store",
            )
        first: tuple[int, set[str]] | None = None
        for index, spec in enumerate(self.providers):
            found = spec.boundaries()
            if found and first is not None and found != first[1]:
                wrong(
                    f"{where}.providers[{index}].metadataApiUrl",
                    f"is another than that of {where}.providers[{first[0]}]; "
                    "all of them must belong to one metadata service",
                )
            if found and first is None:
                first = index, found
            if spec in self.providers[:index]:
                wrong(f"{where}.providers[{index}]", "is in the list already")
        if self.copies > len(self.providers):
            wrong(f"{where}.copies", f"is more than the {len(self.providers)} providers there are")

    def boundaries(self) -> set[str]:
        return {address for spec in self.providers for address in spec.boundaries()}

    def directories(self) -> list[Path]:
        return [directory for spec in self.providers for directory in spec.directories()]

    async def open(self, *, create: bool) -> FallbackStore:
        """Open all of them. One that is away is passed over later, unless this is the setting up."""
        stores: list[ByteStore] = []
        try:
            for spec in self.providers:
                stores.append(await open_provider(spec, create=create, absent=not create))
        except BaseException:
            for store in stores:
                await store.aclose()
            raise
        return FallbackStore(stores, self.copies)


class FallbackStore:
    """Byte stores in an order. See the module for when a block counts as stored, absent and gone."""

    local = False

    def __init__(self, stores: Sequence[ByteStore], copies: int = 1) -> None:
        self._stores = tuple(stores)
        self._copies = copies
        self._sources = {store.name: Source(store.name) for store in stores}
        # For each store: how often it took or deleted something, and how much of that its syncs have covered.
        self._written = [0] * len(stores)
        self._synced = [0] * len(stores)
        self.counters = Counters()
        self.name = f"fallback:{', then '.join(store.name for store in stores)}"

    # -- reading ---------------------------------------------------------------------------------------

    async def get(self, digest: bytes) -> VerifiedBlock:
        """The block of that digest, from the first store that gives it.

        Raises block_unavailable when every store says that it does not have it. When one did not answer, that
        is raised instead, since it may have the block; and a damaged copy only when nobody has a whole one.
        """
        self.counters.gets += 1
        problems: list[MeshkitError] = []
        for store in self._stores:
            source = self._sources[store.name]
            try:
                with source.asked(), self.counters.trip("get"):
                    block = await store.get(digest)
            except MeshkitError as error:
                problems.append(error)
                continue
            if problems:
                _log.info("a block came from %s: %s", store.name, ", ".join(e.code for e in problems))
            self.counters.bytes_in += len(block.data)
            return block
        raise _worst(problems, digest)

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        """`get` for many side by side; what cannot be had is left out."""
        return await each_had(self.get, digests)

    # -- writing ---------------------------------------------------------------------------------------

    async def put(self, block: SealedBlock) -> None:
        """Store a block at the first stores that take it. Raises the first failure if too few did."""
        await self._spread(len(block.data), lambda store: partial(store.put, block))

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        """`put` for a block that stands in a file."""
        try:
            size = (await trio.Path(path).stat()).st_size
        except OSError as error:
            self.counters.puts += 1
            detail = f"the file of block {cid_text(digest)} cannot be read: {error.strerror}"
            raise MeshkitError("block_unavailable", detail) from None
        await self._spread(size, lambda store: partial(store.put_file, digest, path))

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        """`put_file` for many side by side. Raises the first failure after all have had their try."""

        async def one(file: tuple[bytes, str | Path]) -> None:
            await self.put_file(*file)

        await each(one, files)

    async def _spread(
        self, size: int, action: Callable[[ByteStore], Callable[[], Coroutine[Any, Any, None]]]
    ) -> None:
        self.counters.puts += 1
        taken, problems = 0, []
        for index, store in enumerate(self._stores):
            try:
                with self.counters.trip("put"):
                    await action(store)()
            except MeshkitError as error:
                if error.code in _FINAL:
                    raise
                self._sources[store.name].failed += 1
                problems.append(error)
                continue
            # At the end: a sync that began before does not cover it. What a store refused is not counted on.
            self._written[index] += 1
            taken += 1
            if taken == self._copies:
                self.counters.bytes_out += size
                return
        raise problems[0]

    async def delete(self, digest: bytes) -> None:
        """Forget a block at every store. Raises the first failure after all have been asked."""
        await self.delete_many((digest,))

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """`delete` for many."""

        async def one(index: int) -> None:
            await self._stores[index].delete_many(digests)
            self._written[index] += 1

        await each(one, range(len(self._stores)))

    async def sync(self) -> None:
        """Return when what was stored and deleted before is durable wherever that was.

        A store that has failed in the meantime fails this too: what it had taken has to be offered again.
        """

        async def one(index: int) -> None:
            covered = self._written[index]
            await self._stores[index].sync()
            self._synced[index] = max(self._synced[index], covered)

        behind = [index for index, count in enumerate(self._written) if count > self._synced[index]]
        await each(one, behind)

    # -- asking ----------------------------------------------------------------------------------------

    async def has(self, digest: bytes) -> bool:
        """Whether one of the stores holds a block of that name."""
        return bool(await self.has_many((digest,)))

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests that one of the stores holds."""
        return set(await self.sizes(digests))

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Those of the digests that one of the stores holds, with the bytes of each.

        Raises what a store raised that was needed for the answer: one that may hold what the others do not.
        """
        left = list(digests)
        found: dict[bytes, int] = {}
        problems: list[MeshkitError] = []
        for store in self._stores:
            if not left:
                break
            try:
                found |= await store.sizes(left)
            except MeshkitError as error:
                self._sources[store.name].failed += 1
                problems.append(error)
            left = [digest for digest in left if digest not in found]
        if left and problems:
            raise problems[0]
        return found

    async def probe(self) -> Capabilities:
        """What all of them can do."""
        found = [await store.probe() for store in self._stores]
        return Capabilities(
            conditional_put=all(one.conditional_put for one in found),
            multi_delete=all(one.multi_delete for one in found),
            listing=False,
        )

    def usage(self) -> Usage:
        """Room at the first of them that can be asked: that is where the next block goes."""
        for store in self._stores[:-1]:
            try:
                return store.usage()
            except MeshkitError:
                continue
        return self._stores[-1].usage()

    def sources(self) -> list[Source]:
        """The stores in their order, with what each has served; a gateway's own sources come with it."""
        found: list[Source] = []
        for store in self._stores:
            found.append(self._sources[store.name])
            inner = store.sources()
            if len(inner) > 1:
                found += inner
        return found

    async def aclose(self) -> None:
        """Close all of them."""
        for store in self._stores:
            await store.aclose()


def _worst(problems: Sequence[MeshkitError], digest: bytes) -> MeshkitError:
    """Return what to say of a block that nobody gave: that somebody did not answer comes first."""
    for code in ("provider_request_failed", "provider_http_error", "cid_mismatch"):
        for error in problems:
            if error.code == code:
                return error
    return problems[0] if problems else MeshkitError("block_unavailable", cid_text(digest))
