"""Keys of which a release service gave one half: asked for in the key step, kept until the release ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from meshkitfs.core._unwrap import open_capsule, open_release
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.records import Capsule
from meshkitfs.core.secret_memory import SecretBytes, wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._evidence import SKEW_S
from meshkitfs.gate._grant import lease_now
from meshkitfs.metadata import ReleaseSource
from meshkitfs.state import Clock

__all__ = ["Released"]

RELEASE_DEADLINE_S: Final = 10
# With less than this part of its time left, a release is asked for anew: a lease is renewed before it ends.
_LAST_PART: Final = 1 / 3


@dataclass(frozen=True, slots=True, repr=False)
class _Held:
    """A whole key; ``exp`` is its end by the wall clock, ``deadline`` by the clock that nobody can set."""

    key: SecretBytes
    exp: int
    deadline: float
    lifetime: int


class Released:
    """The keys that this gate holds because a service released its half.

    ``tokens`` gives the capability tokens that a capsule asks for; ``unwrapped`` is told of each key.
    """

    def __init__(
        self,
        source: ReleaseSource | None,
        clock: Clock,
        tokens: Callable[[Capsule], list[bytes]],
        unwrapped: Callable[[], None],
    ) -> None:
        self._source = source
        self._tokens = tokens
        self._clock = clock
        self._unwrapped = unwrapped
        self._held: dict[bytes, dict[bytes, _Held]] = {}

    @staticmethod
    def needed(capsule: Capsule) -> bool:
        """Whether ``capsule`` holds only half of its key."""
        return capsule.rel is not None and capsule.rel["part"] == "half"

    async def obtain(self, capsule: Capsule, digest: bytes, shown: Capsule, key: EncryptionKey) -> _Held:
        """Return the key of ``capsule`` (record hash ``digest``), from memory or with the service's half.

        ``shown`` is the capsule in force, which the service looks at; the same unless ``capsule`` is of an
        older epoch. Raises ``key_release_refused``, ``key_release_unavailable``, ``key_unwrap_failed``.
        """
        held = self._held.get(capsule.share, {}).get(digest)
        if held is not None and self._left(held) > held.lifetime * _LAST_PART:
            return held
        held = await self._ask(capsule, shown, key)
        self._held.setdefault(capsule.share, {})[digest] = held
        return held

    def key(self, capsule: Capsule, digest: bytes) -> SecretBytes:
        """Return the key of ``capsule`` if it is held now. Raises ``key_release_unavailable``."""
        held = self._held.get(capsule.share, {}).get(digest)
        if held is None or self._left(held) <= 0:
            raise MeshkitError("key_release_unavailable", f"epoch {capsule.epoch} was not released")
        return held.key

    def forget(self, share: bytes) -> None:
        """Drop the keys of a share."""
        self._held.pop(share, None)

    def forget_all(self) -> None:
        """Wipe every key. Grants that hold one must have ended."""
        for held in self._held.values():
            for one in held.values():
                one.key.wipe()
        self._held.clear()

    def drop_ended(self) -> None:
        """Drop the keys whose release is over; to be called every now and then."""
        for share, held in list(self._held.items()):
            for digest in [digest for digest, one in held.items() if self._left(one) <= 0]:
                del held[digest]
            if not held:
                del self._held[share]

    def _left(self, held: _Held) -> float:
        try:
            return min(held.exp - self._clock.exact(), held.deadline - lease_now())
        except MeshkitError:
            return 0.0  # a clock that went back says nothing

    async def _ask(self, capsule: Capsule, shown: Capsule, key: EncryptionKey) -> _Held:
        service = capsule.service
        assert service is not None  # the caller looked whether it is needed
        if self._source is None:
            raise MeshkitError("key_release_unavailable", f"this home cannot ask {service.url}")
        nonce, asked = os.urandom(16), lease_now()
        try:
            with trio.fail_after(RELEASE_DEADLINE_S):
                record = await self._source.release(
                    service, capsule.share, shown.id, capsule.epoch, nonce, self._tokens(shown)
                )
        except trio.TooSlowError:
            raise MeshkitError("key_release_unavailable", f"{service.url}: no answer in time") from None
        try:
            half, answer = open_release(record, capsule, shown.digest, nonce, key)
        except MeshkitError as error:
            detail = f"{service.url}: not a usable answer: {error.detail or error.code}"
            raise MeshkitError("key_release_unavailable", detail) from None
        now = self._clock.now()
        if answer.iat > now + SKEW_S or answer.exp <= now:
            raise MeshkitError(
                "key_release_unavailable",
                f"{service.url}: a release from {answer.iat - now} s to {answer.exp - now} s from now",
            )
        self._unwrapped()
        try:
            whole = SecretBytes(open_capsule(capsule, key, half))
        finally:
            wipe(half)
        lifetime = answer.exp - answer.iat
        # Counted from before it was asked for: the service's clock may go after ours.
        return _Held(whole, answer.exp, asked + lifetime, lifetime)
