"""A mount that came up locked: what it answers until the identity is unlocked, and how it is opened then.

Without the key vault's key nothing of the home can be read, not even the names of its shares.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Final, NoReturn

import trio

from meshkitfs import keyvault
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon import hygiene
from meshkitfs.daemon.failures import as_error
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.locking import DETAIL, explained, secret_from, secret_of
from meshkitfs.daemon.opening import open_vault
from meshkitfs.daemon.service import Service, below
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import Usage
from meshkitfs.shares import Share

__all__ = ["Door", "NoShares", "keyring_is_locked"]

_log = logging.getLogger(__name__)

# How often a locked keyring is looked at: another program may have unlocked it.
LOOK_S: Final = 2.0


async def keyring_is_locked(home: Home, *, away: bool = False) -> bool:
    """Whether the key of ``home`` is in a keyring that is locked now; ``away``: or that is not there yet."""
    home.require_initialized()
    vault = open_vault(home, configuration.load(home.config_path), None)
    if vault.kind != keyvault.SECRET_SERVICE:
        return False
    report = await trio.to_thread.run_sync(vault.report, abandon_on_cancel=True)
    return report.locked is True if report.available else away


class NoShares:
    """What a home shows of its shares while it cannot be read: the part of `ShareBook` that is asked for."""

    def __init__(self) -> None:
        self.shares: dict[bytes, Share] = {}

    async def create(self, name: bytes, mode: int = 0) -> NoReturn:
        raise MeshkitError("identity_locked", DETAIL)

    def usage(self) -> Usage:
        return Usage(0, 0, 0)


class _Attempt:
    """Somebody's wish to unlock, and what became of it."""

    def __init__(self, key: SecretBytes | None) -> None:
        self.key = key
        self.error: MeshkitError | None = None
        self.over = trio.Event()


class Door:
    """Keeps a home locked until somebody unlocks it. ``watch`` says to look at its keyring too."""

    def __init__(self, home: Home, mounted: dict[str, Any], *, watch: bool) -> None:
        self._home = home
        self._mounted = mounted
        self._watching = watch
        self._settings = configuration.load(home.config_path)
        self._vault = open_vault(home, self._settings, None)
        self._report: keyvault.KeyVaultReport | None = None
        self._since = int(time.time())
        self._send, self._wishes = trio.open_memory_channel[_Attempt](0)

    def status(self) -> dict[str, Any]:
        """Return what can be told of the home."""
        return {
            "identity": self._settings.identity,
            "locked": {"since": self._since, "by": "keyring" if self._watching else "start"},
            "pid": os.getpid(),
            "key_vault": self._report.as_dict() if self._report is not None else None,
            "shares": [],
            "left": [],
            "errors": [],
            "pending": {},
        } | self._mounted

    def runtime(self) -> dict[str, Any]:
        return {"key_vault": self._vault.kind} | hygiene.report()

    async def call(
        self, method: str, params: dict[str, Any], progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Do what a locked home can do of `Service.call`."""
        if method == "unlock":
            return await self._unlock(**params)
        if method == "lock":
            await trio.to_thread.run_sync(self._vault.forget)
            return {"locked": self.status()["locked"], "left": []}
        if method == "status":
            return self.status()
        if method == "explain":
            return self._explain(**params)
        if method == "sync":
            return {"left": []}  # what waits is in the state database; it is sent after the unlocking
        raise MeshkitError("identity_locked", DETAIL)

    def _explain(self, path: str) -> dict[str, Any]:
        """Answer for any path: without the keys nobody knows which shares there are."""
        return explained(
            below(self._mounted.get("mountpoint"), path).strip("/"), None, self.status()["locked"]
        )

    async def _unlock(self, key: str | None = None) -> dict[str, Any]:
        await self._try(secret_from(key) if key is not None else await secret_of(self._vault))
        return {"locked": None}

    async def _try(self, key: SecretBytes) -> None:
        attempt = _Attempt(key)
        try:
            await self._send.send(attempt)
        except trio.BrokenResourceError:
            return  # somebody else was faster, and it is open
        await attempt.over.wait()
        if attempt.error is not None:
            raise attempt.error

    async def serve(self, use: Callable[[Service], Awaitable[None]]) -> None:
        """Wait until the home can be opened, open it, and have it used; returns when that is over.

        ``use`` is called with the open home once. Who asked for it is answered before.
        """
        async with self._wishes:
            async for attempt in self._wishes:
                try:
                    async with AsyncExitStack() as stack:
                        try:
                            opening = Service.open(self._home, None, absent=True, key=attempt.key)
                            service = await stack.enter_async_context(opening)
                        except (MeshkitError, ExceptionGroup) as error:
                            attempt.error = as_error(error)
                            _log.warning("could not be unlocked: %s", attempt.error.code)
                            continue
                        self._wishes.close()
                        _log.info("unlocked")
                        attempt.over.set()
                        await use(service)
                        return
                finally:
                    attempt.over.set()

    async def watch(self) -> None:
        """Keep the report of the key vault current; open the home when its keyring was unlocked elsewhere."""
        while True:
            self._report = await trio.to_thread.run_sync(self._vault.report, abandon_on_cancel=True)
            if self._watching and self._report.available and self._report.locked is False:
                with suppress(MeshkitError):
                    await self._try(await secret_of(self._vault))
            await trio.sleep(LOOK_S)
