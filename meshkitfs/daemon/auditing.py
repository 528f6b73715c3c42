"""The log of this device, of one open home: what the mount tells it, and ``meshkitfs audit``."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import trio

from meshkitfs.core.durations import parse_since
from meshkitfs.daemon.config import AuditConfig
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import ShareBook
from meshkitfs.state import AuditLine, AuditLog, State

__all__ = ["Auditing"]

_log = logging.getLogger(__name__)

AUDIT_FLUSH_S: Final = 10.0


class Auditing:
    """Keeps the log as the configuration says; ``methods`` by name, as `Service` has its own."""

    def __init__(self, state: State, settings: AuditConfig, book: ShareBook) -> None:
        self._audit = AuditLog(state, settings.days)
        self._settings = settings
        self._book = book
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "audit.list": self._list,
            "audit.clear": self._clear,
        }

    @property
    def record(self) -> Callable[[AuditLine], None] | None:
        """What the mount calls for each open; None if nothing is to be kept."""
        if not self._settings.enabled:
            return None
        if self._settings.names:
            return self._audit.add
        return lambda line: self._audit.add(replace(line, path="", program=""))

    async def run(self) -> None:
        """Write what waits, every now and then, until cancelled."""
        while True:
            await trio.sleep(AUDIT_FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits; on failure it waits on. Nothing is touched if nothing waits."""
        if not self._audit.waiting:
            return
        try:
            await trio.to_thread.run_sync(self._audit.flush, int(time.time()))
        except MeshkitError as error:
            level = logging.DEBUG if error.code == "identity_locked" else logging.WARNING
            _log.log(level, "the audit log must wait: %s (%s)", error.code, error.detail)

    async def _list(
        self, since: str | None = None, share: str | None = None, refused: bool = False, limit: int = 0
    ) -> dict[str, Any]:
        start = parse_since(since, int(time.time())) if since else 0
        wanted = self._book.find(share).row.share if share else None
        await self.flush()

        def read() -> list[AuditLine]:
            return self._audit.read(since=start, share=wanted, refused=refused, limit=limit)

        lines = await trio.to_thread.run_sync(read)
        names = {found.row.share: found.name for found in self._book.shares.values()}
        return {
            "enabled": self._settings.enabled,
            "names": self._settings.names,
            "lines": [
                {
                    "first": line.first,
                    "last": line.last,
                    "share": line.share.hex(),
                    "name": names.get(line.share, "") if self._settings.names else "",
                    "path": line.path,
                    "action": line.action,
                    "allowed": not line.code,
                    "code": line.code,
                    "program": line.program,
                    "times": line.times,
                }
                for line in lines
            ],
        }

    async def _clear(self) -> dict[str, Any]:
        return {"cleared": await trio.to_thread.run_sync(self._audit.clear)}
