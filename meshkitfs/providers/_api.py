"""What every byte store promises, whatever stands behind it.

A store keeps sealed blocks under the SHA-256 of their bytes. It is never trusted: what it returns reaches
the rest of the program only as a `VerifiedBlock`, which exists only if the bytes matched the digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol, runtime_checkable

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.core.timings import Timings
from meshkitfs.errors import MeshkitError

__all__ = ["TRIPS", "ByteStore", "Capabilities", "Counters", "Source", "Usage"]

# The trips to a store that are timed: for blocks, and with blocks.
TRIPS: Final = ("get", "put")


class Usage(NamedTuple):
    """Room at a store: bytes in all, bytes this user may still write, files it may still hold."""

    total_bytes: int
    free_bytes: int
    free_inodes: int


@dataclass(slots=True)
class Counters:
    """What was asked of a store since it was opened. Costs and "nothing was fetched" are tested with it.

    ``gets`` and ``puts`` count blocks asked for and offered, whether or not that succeeded;
    ``bytes_in`` counts verified bytes that came in, ``bytes_out`` bytes that were stored. ``times`` has how
    long each kind of trip took, ``errors`` how many of them failed, by code.
    """

    gets: int = 0
    puts: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    times: dict[str, Timings] = field(default_factory=lambda: {kind: Timings() for kind in TRIPS})
    errors: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def trip(self, kind: str) -> Iterator[None]:
        """Count one trip to the store, of a kind in `TRIPS`; belongs into the event loop's thread."""
        with self.times[kind].timed():
            try:
                yield
            except MeshkitError as error:
                self.errors[error.code] = self.errors.get(error.code, 0) + 1
                raise


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store was found to be able to do. None: not asked yet. Nothing is assumed from a name.

    ``conditional_put``: a PUT that must not replace anything is really refused when there is something.
    ``multi_delete``: many blocks can be deleted with one request. ``listing``: blocks can be listed.
    """

    conditional_put: bool | None = None
    multi_delete: bool | None = None
    listing: bool | None = None


@dataclass(slots=True)
class Source:
    """A place blocks are read from: how many it served, how often it failed to answer, how many answers were
    thrown away because they were not the block asked for, and why it is not asked any more ("" if it is).
    """

    name: str
    served: int = 0
    failed: int = 0
    wrong: int = 0
    barred: str = ""

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Count how asking for one block goes. That it does not have the block is a proper answer."""
        try:
            yield
        except MeshkitError as error:
            self.note(error)
            raise
        self.served += 1

    def note(self, error: MeshkitError) -> None:
        """Count a failure."""
        if error.code == "cid_mismatch":
            self.wrong += 1
        elif error.code != "block_unavailable":
            self.failed += 1


@runtime_checkable
class ByteStore(Protocol):
    """A place for sealed blocks. Digests are the 32 raw bytes of SHA-256 over the sealed bytes.

    Every method may raise `MeshkitError`: ``provider_request_failed`` when the store cannot be reached or
    used, ``provider_http_error`` when it refuses (credentials, quota, its own failure), and then nothing is
    known about the block; ``block_unavailable`` only when the store is there and surely does not have it.
    """

    @property
    def name(self) -> str:
        """The MeshKit provider type with its place, for status output; no secret in it."""

    @property
    def local(self) -> bool:
        """Whether blocks are files of this machine, so that storing one is a hard link."""

    @property
    def counters(self) -> Counters: ...

    async def get(self, digest: bytes) -> VerifiedBlock:
        """The block of that digest. Raises block_unavailable, cid_mismatch, provider_request_failed."""

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        """Those of the blocks that could be had, by digest: for reading ahead, where a miss is no error."""

    async def put(self, block: SealedBlock) -> None:
        """Store a block; storing it again is harmless and repairs a damaged copy. Raises no_space.

        Durable only after `sync`.
        """

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        """Store a block that stands in a file, already fsynced by the caller and never changed again.

        The caller answers for the file's bytes having that digest. Durable only after `sync`.
        """

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        """`put_file` for many at once. On an error those before the failing one are stored, perhaps more."""

    async def has(self, digest: bytes) -> bool:
        """Whether the store holds a block of that name; its bytes are not looked at."""

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests the store holds."""

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Those of the digests the store holds, with the bytes that each of them takes."""

    async def delete(self, digest: bytes) -> None:
        """Forget a block; one that is not there is no error."""

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """`delete` for many at once, in any order. On an error each of them may be gone or still there.

        Durable only after `sync`.
        """

    async def sync(self) -> None:
        """Return when what was stored and deleted before this call stays so after a power failure."""

    def usage(self) -> Usage:
        """Room at the store, without waiting on a network (a remote store gives what it last heard)."""

    async def probe(self) -> Capabilities:
        """Find out what the store can do, by trying it; what was tried leaves nothing behind."""

    def sources(self) -> list[Source]:
        """The places blocks are read from, in the order they are asked, and what is known of each."""

    async def aclose(self) -> None:
        """Let go of the store's resources, in the trio run it was opened in. Harmless when repeated."""
