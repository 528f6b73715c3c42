"""Trying a configured byte store out, step by step, and saying in words what is wrong."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import trio

from meshkitfs.core.blocks import SealedBlock
from meshkitfs.core.cid import digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import ByteStore, Capabilities, Source
from meshkitfs.providers._spec import ProviderSpec, open_provider

__all__ = ["Examined", "Step", "examine"]

DEADLINE_S: Final = 60.0
_PROBE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried: how it went, in milliseconds, and the failure if it did not."""

    name: str
    ms: float
    error: MeshkitError | None = None

    def as_dict(self) -> dict[str, Any]:
        failure = self.error.as_dict() if self.error is not None else None
        return {"name": self.name, "ok": self.error is None, "ms": round(self.ms, 1), "failure": failure}


@dataclass(slots=True)
class Examined:
    """What `examine` found; ``capabilities`` is None if it did not get as far as that."""

    name: str
    steps: list[Step] = field(default_factory=list)
    capabilities: Capabilities | None = None
    sources: list[Source] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(step.error is None for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        return {
            "provider": self.name,
            "ok": self.ok,
            "steps": [step.as_dict() for step in self.steps],
            "capabilities": asdict(self.capabilities) if self.capabilities is not None else None,
            "sources": [asdict(source) for source in self.sources],
        }


async def examine(spec: ProviderSpec, *, write: bool, deadline_s: float = DEADLINE_S) -> Examined:
    """Open the provider and try it: with ``write`` a block of random bytes is stored, read and deleted.

    Without, nothing is changed: a block that cannot exist is asked for. Stops at the first step that fails,
    but tries to delete what it has stored. Raises nothing: what is wrong is in the result.
    """
    found = Examined(spec.type)
    opened: list[ByteStore] = []

    async def open_it() -> None:
        opened.append(await open_provider(spec))

    if await _step(found, "open", open_it, deadline_s):
        store = opened[0]
        found.name = store.name
        try:
            await (_tried(found, store, deadline_s) if write else _looked(found, store, deadline_s))
        finally:
            found.sources = store.sources()
            with trio.move_on_after(5, shield=True):
                await store.aclose()
    return found


async def _looked(found: Examined, store: ByteStore, deadline_s: float) -> None:
    async def absent() -> None:
        try:
            await store.get(digest_of(secrets.token_bytes(32)))
        except MeshkitError as error:
            if error.code != "block_unavailable":
                raise

    await _step(found, "ask", absent, deadline_s)


async def _tried(found: Examined, store: ByteStore, deadline_s: float) -> None:
    data = secrets.token_bytes(_PROBE_BYTES)
    block = SealedBlock(digest_of(data), data)

    async def put() -> None:
        await store.put(block)
        await store.sync()

    async def has() -> None:
        if not await store.has(block.digest):
            raise MeshkitError("block_unavailable", "what was just stored is not there")

    async def get() -> None:
        await store.get(block.digest)

    async def delete() -> None:
        await store.delete(block.digest)
        await store.sync()

    async def gone() -> None:
        if await store.has(block.digest):
            raise MeshkitError("provider_request_failed", "what was just deleted is still there")

    async def probe() -> None:
        found.capabilities = await store.probe()

    for name, action in (("put", put), ("has", has), ("get", get), ("delete", delete), ("gone", gone)):
        if not await _step(found, name, action, deadline_s):
            if name in ("put", "has", "get"):
                with trio.move_on_after(5, shield=True):
                    await _quietly(delete)
            return
    await _step(found, "capabilities", probe, deadline_s)


async def _step(found: Examined, name: str, action: Callable[[], Awaitable[None]], deadline_s: float) -> bool:
    error: MeshkitError | None = None
    started = time.perf_counter()
    try:
        with trio.fail_after(deadline_s):
            await action()
    except MeshkitError as failure:
        error = failure
    except trio.TooSlowError:
        error = MeshkitError("provider_request_failed", f"no answer within {deadline_s:.0f} s")
    found.steps.append(Step(name, (time.perf_counter() - started) * 1000, error))
    return error is None


async def _quietly(action: Callable[[], Awaitable[None]]) -> None:
    try:
        await action()
    except MeshkitError:
        return
