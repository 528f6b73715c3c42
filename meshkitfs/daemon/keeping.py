"""The commands that keep a store small and whole: prune, gc, verify, repair."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from meshkitfs.core.cid import cid_text
from meshkitfs.core.durations import parse_span
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import open_provider, parse_provider
from meshkitfs.shares import Broken, Rules, Share, collect, prune, repair, verify

__all__ = ["Keeping"]

Progress = Callable[[dict[str, Any]], None]


class Keeping:
    """These commands of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "prune": self._prune,
            "gc": self._gc,
            "verify": self._verify,
            "repair": self._repair,
        }

    async def _prune(
        self, share: str, last: int = 0, hourly: int = 0, daily: int = 0, weekly: int = 0, monthly: int = 0,
        yearly: int = 0, within: str = "", dry_run: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        found = self._session.book.find(share)
        rules = Rules(last, hourly, daily, weekly, monthly, yearly, parse_span(within) if within else 0)
        async with found.upkeep:
            result = await prune(found, rules, dry_run=dry_run)
        return {
            "share": found.name,
            "dry_run": dry_run,
            "versions": [
                {"version": version.number, "time": version.time, "keep": bool(why), "reasons": why}
                for version, why in result.reasons
            ],
            "given_up": len(result.given_up),
        }

    async def _gc(self, progress: Progress, share: str, grace: str, delete: bool = False) -> dict[str, Any]:
        found = self._session.book.find(share)
        async with found.upkeep:
            done = await collect(found, parse_span(grace), dry_run=not delete, progress=progress)
        return {
            "share": found.name,
            "deleted": delete,
            "versions": done.versions,
            "blocks": done.blocks,
            "bytes": done.size,
            "kept": done.kept,
            "waiting": done.waiting,
            "snapshots": done.protected,
            "damaged": done.damaged,
        }

    async def _verify(
        self, progress: Progress, shares: list[str], live: bool = False, resume: bool = False
    ) -> dict[str, Any]:
        book = self._session.book
        chosen = [book.find(name) for name in shares] or [share for _, share in sorted(book.shares.items())]
        return {"shares": [await self._verify_one(progress, share, live, resume) for share in chosen]}

    async def _verify_one(self, progress: Progress, share: Share, live: bool, resume: bool) -> dict[str, Any]:
        try:
            async with share.upkeep:
                found = await verify(share, live=live, resume=resume, progress=progress)
        except MeshkitError as error:
            # One share that cannot be looked at does not keep the others from it.
            return {"share": share.name, "failure": error.as_dict(), "broken": []}
        return {
            "share": share.name,
            "failure": None,
            "versions": found.versions,
            "blocks": found.blocks,
            "before": found.before,
            "closed": found.closed,
            "broken": [_broken(item) for item in found.broken],
        }

    async def _repair(self, progress: Progress, share: str, sources: list[str]) -> dict[str, Any]:
        found = self._session.book.find(share)
        async with AsyncExitStack() as stack:
            stores = []
            for source in sources:
                store = await open_provider(parse_provider(source))
                stack.push_async_callback(store.aclose)
                stores.append(store)
            async with found.upkeep:
                done = await repair(found, stores, progress)
        return {
            "share": found.name,
            "repaired": done.repaired,
            "broken": [_broken(item) for item in done.left],
        }


def _broken(item: Broken) -> dict[str, Any]:
    return {
        "cid": cid_text(item.digest),
        "kind": item.kind,
        "code": item.code,
        "paths": [os.fsdecode(path) for path in item.paths],
        "versions": item.versions,
    }
