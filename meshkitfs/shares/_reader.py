"""From a block reference to plaintext: spool or byte store, verify, open. The only reader of content.

Plaintext of data blocks is kept in a bounded LRU. A hit still asks the grant first: a lease that ended
must not be served from memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from meshkitfs.core.blocks import VerifiedBlock, Where, open_block
from meshkitfs.core.manifest import DirManifest, FileManifest, parse_manifest
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.providers import ByteStore
from meshkitfs.state import Spool

__all__ = ["BlockReader", "ReadCounters"]

FETCH_DEADLINE_S = 30
# How often a block is asked for when the store fails to answer properly, all within that deadline.
FETCH_TRIES = 6


@dataclass(slots=True)
class ReadCounters:
    """How often a sealed block was opened, how many of those came from this device's spool, and how often the
    plaintext of a data block was in memory (``hits``) or not.
    """

    opens: int = 0
    from_spool: int = 0
    hits: int = 0
    misses: int = 0


class BlockReader:
    """Reads blocks of every share of a home; ``capacity`` bounds the plaintext it keeps, in bytes."""

    def __init__(self, store: ByteStore, spool: Spool, spooled: set[bytes], capacity: int) -> None:
        self.store = store
        self._spool = spool
        # Digests that are in the spool and perhaps nowhere else yet; shared with the writers.
        self.spooled = spooled
        self._capacity = capacity
        self._held = 0
        self._plain: OrderedDict[bytes, memoryview] = OrderedDict()
        self._loading: dict[bytes, trio.Event] = {}
        self.counters = ReadCounters()

    async def verified(self, digest: bytes) -> VerifiedBlock:
        """Return the sealed block of that digest, from wherever it is."""
        if digest in self.spooled:
            self.counters.from_spool += 1
            try:
                return await trio.to_thread.run_sync(self._spool.read, digest)
            except MeshkitError as error:
                # It may just have left for the store between the look and the read.
                if error.code != "block_unavailable":
                    raise
        try:
            with trio.fail_after(FETCH_DEADLINE_S):
                return await self._fetch(digest)
        except trio.TooSlowError:
            raise MeshkitError("provider_request_failed", "no answer in time") from None

    async def _fetch(self, digest: bytes) -> VerifiedBlock:
        """Ask the store, again if it loses requests; what it says of the block itself is final."""
        for _ in range(FETCH_TRIES - 1):
            try:
                return await self.store.get(digest)
            except MeshkitError as error:
                if error.code != "provider_request_failed":
                    raise
        return await self.store.get(digest)

    async def open(self, grant: Grant, ref: bytes, where: Where) -> memoryview:
        """Return the plaintext of a manifest, page or index block (not cached: the caller parses it)."""
        block = await self.verified(ref[:32])
        self.counters.opens += 1
        return open_block(grant.content_key(ref), block, where)

    async def open_root(
        self, grant: Grant, root: bytes, epoch: int, version: int
    ) -> DirManifest | FileManifest:
        """Return the manifest a share's tree starts with, named by its digest."""
        await grant.reach(epoch)
        key = grant.root_key(epoch, version)
        block = await self.verified(root)
        self.counters.opens += 1
        oid = grant.capsule.oid
        return parse_manifest(
            open_block(key, block, Where.manifest(oid, epoch, version)), oid, epoch, version
        )

    def cached(self, grant: Grant, ref: bytes) -> memoryview | None:
        """Return the plaintext of a data block if it is in memory."""
        plain = self._plain.get(ref)
        if plain is not None:
            grant.check()
            self._plain.move_to_end(ref)
            self.counters.hits += 1
        return plain

    async def block(self, grant: Grant, ref: bytes, where: Where) -> memoryview:
        """Return the plaintext of a data block, from memory if it is there; one fetch for many waiters."""
        while True:
            plain = self.cached(grant, ref)
            if plain is not None:
                return plain
            other = self._loading.get(ref)
            if other is None:
                break
            await other.wait()
        self.counters.misses += 1
        done = self._loading[ref] = trio.Event()
        try:
            block = await self.verified(ref[:32])
            self.counters.opens += 1
            plain = open_block(grant.content_key(ref), block, where)
            self._keep(ref, plain)
            return plain
        finally:
            del self._loading[ref]
            done.set()

    async def ahead(self, grant: Grant, wanted: Sequence[tuple[bytes, Where]]) -> None:
        """Bring blocks into memory ahead of a reader, in one trip; trouble is left for the real read."""
        missing = [
            (ref, where)
            for ref, where in wanted
            if ref not in self._plain and ref not in self._loading and ref[:32] not in self.spooled
        ]
        if not missing:
            return
        done = trio.Event()
        self._loading.update((ref, done) for ref, _ in missing)
        try:
            with trio.move_on_after(FETCH_DEADLINE_S):
                blocks = await self.store.get_many([ref[:32] for ref, _ in missing])
                for ref, where in missing:
                    block = blocks.get(ref[:32])
                    if block is not None and ref not in self._plain:
                        self.counters.opens += 1
                        self._keep(ref, open_block(grant.content_key(ref), block, where))
        except MeshkitError:
            return
        finally:
            for ref, _ in missing:
                self._loading.pop(ref, None)
            done.set()

    def _keep(self, ref: bytes, plain: memoryview) -> None:
        self._plain[ref] = plain
        self._held += len(plain)
        while self._held > self._capacity and len(self._plain) > 1:
            self._held -= len(self._plain.popitem(last=False)[1])

    def forget(self, *, wiped: bool = False) -> None:
        """Drop all plaintext (a share was refused), and zero it if ``wiped`` (the identity was locked).

        Nobody has a piece of it then: whoever is given one has used it before anything else runs.
        """
        for plain in self._plain.values() if wiped else ():
            if isinstance(plain.obj, bytearray):
                wipe(plain.obj)
        self._plain.clear()
        self._held = 0
