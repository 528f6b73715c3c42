"""What the shares of a home have in common, and what one of them has cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from meshkitfs.core.keys import SigningKey
from meshkitfs.gate import Gate
from meshkitfs.metadata import Metadata, Releases
from meshkitfs.shares._events import Event
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._sealer import Budget
from meshkitfs.shares._together import OtherDevices
from meshkitfs.state import Spool, State

__all__ = ["Counters", "Services"]


@dataclass(slots=True)
class Services:
    """What all shares of a home have in common."""

    gate: Gate
    metadata: Metadata
    reader: BlockReader
    spool: Spool
    state: State
    budget: Budget
    nursery: trio.Nursery
    signing: Callable[[], SigningKey]
    who: str
    emit: Callable[[Event], None]
    wall: Callable[[], float] = time.time
    # Whether fsync waits for the provider and the publication, or only for this device.
    fsync_publishes: bool = True
    # The release services that this home may ask, and the one that new shares use by default (or "").
    releases: Releases | None = None
    release_service: str = ""
    # The signing keys this identity had before, the newest first.
    signed_before: Callable[[], Sequence[SigningKey]] = tuple
    # The other devices of this identity.
    others: OtherDevices | None = None

    def signing_keys(self) -> dict[bytes, SigningKey]:
        """Every key this identity signs or has signed with, by kid, the newest first."""
        return {key.kid: key for key in (self.signing(), *self.signed_before())}

    def writing_key(self, writers: Sequence[bytes]) -> SigningKey:
        """Return the key to sign heads with where ``writers`` (public keys) may.

        Until a share's owner has heard of a rotation, that is a key of before.
        """
        keys = self.signing_keys().values()
        return next((key for key in keys if key.public in writers), self.signing())


@dataclass(slots=True)
class Counters:
    """What one share has cost since start."""

    commits: int = 0
    heads: int = 0
    merges: int = 0
    uploaded: int = 0
