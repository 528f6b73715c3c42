"""The commands about the devices of an identity."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from meshkitfs.core.keys import fingerprint
from meshkitfs.daemon.session import Session

__all__ = ["DeviceCommands"]


class DeviceCommands:
    """These commands of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "device.list": self._list,
            "device.approve": self._approve,
            "device.revoke": self._revoke,
        }

    async def _list(self) -> dict[str, Any]:
        await self._session.devices.catch_up()
        return self._session.devices.described()

    async def _approve(self, code: str, name: str | None = None, this: str | None = None) -> dict[str, Any]:
        entry = await self._session.devices.approve(code, name, this)
        root = self._session.identity.public.root
        return {"device": entry.name, "identity": fingerprint(root)} | self._session.devices.described()

    async def _revoke(self, device: str) -> dict[str, Any]:
        entry = await self._session.devices.revoke(device)
        return {"device": entry.name} | self._session.devices.described()
