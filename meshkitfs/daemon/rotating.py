"""The command that gives an identity new keys, now or from time to time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError

__all__ = ["Rotating"]

# What can be changed, as (signing key, encryption key).
_KEYS: Final = {
    "both": (True, True),
    "signing": (True, False),
    "encryption": (False, True),
    "none": (False, False),
}


class Rotating:
    """This command of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session, show: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._session = session
        self._show = show
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "identity.rotate": self._rotate,
            "identity.schedule": self._schedule,
        }

    async def _schedule(self, every: str) -> dict[str, Any]:
        await trio.to_thread.run_sync(self._session.life.schedule.set, every)
        return await self._show()

    async def _rotate(self, keys: str = "both", again: bool = False) -> dict[str, Any]:
        if keys not in _KEYS:
            raise MeshkitError("invalid_argument", f"keys {keys!r}: one of {', '.join(_KEYS)}")
        signing, encryption = _KEYS[keys]
        done = await self._session.life.rotate(signing=signing, encryption=encryption, again=again)
        return await self._show() | {
            "resumed": done.resumed,
            "signed": list(done.signed),
            "left": [{"share": name} | error.as_dict() for name, error in done.left],
        }
