"""The keys of earlier epochs that a member in good standing may still use, each from a capsule of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshkitfs.core._unwrap import open_secret
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.records import Capsule
from meshkitfs.core.release import EpochSecret
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._released import Released

__all__ = ["Epochs"]


@dataclass(frozen=True, slots=True)
class Epochs:
    """What a grant reaches beside its own epoch.

    ``capsules`` are all that were found for this identity, by record hash, ``current`` the one that was
    granted, ``mine`` the identity's keys by kid; ``unwrap`` gives the key of a capsule that needs no release.
    """

    capsules: Mapping[bytes, Capsule]
    current: Capsule
    mine: Mapping[bytes, EncryptionKey]
    released: Released
    unwrap: Callable[[Capsule, bytes, Mapping[bytes, EncryptionKey]], SecretBytes]

    def key(self, epoch: int) -> SecretBytes:
        """Return the key of ``epoch``. Raises ``right_not_granted``; a released one must be reached first."""
        digest, past = self._capsule(epoch)
        if Released.needed(past):
            return self.released.key(past, digest)
        return self.unwrap(past, digest, self.mine)

    async def reach(self, epoch: int) -> None:
        """Make `key` work for ``epoch``: have a release service give its half, where it has one."""
        digest, past = self._capsule(epoch)
        if Released.needed(past):
            await self.released.obtain(past, digest, self.current, self.mine[past.to])

    def secret(self, epoch: int) -> EpochSecret:
        """Return what the owner's own capsule of ``epoch`` holds, to give away."""
        past = self._capsule(epoch)[1]
        return open_secret(past, self.mine[past.to])

    def _capsule(self, epoch: int) -> tuple[bytes, Capsule]:
        for digest, past in self.capsules.items():
            if past.epoch == epoch:
                return digest, past
        raise MeshkitError("right_not_granted", f"no capsule of epoch {epoch} is kept for this identity")
