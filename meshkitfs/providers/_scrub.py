"""Checking a whole store without any key: every block against its name. For who runs the store.

What is damaged is only reported: whoever has the keys, or another copy, repairs it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import trio

from meshkitfs.core.cid import cid_text, parse_cid
from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import ByteStore

__all__ = ["Listable", "Scrubbed", "scrub"]

_BATCH: Final = 64
_FORM: Final = 1


@runtime_checkable
class Listable(ByteStore, Protocol):
    """A byte store that can say what it holds."""

    async def count(self) -> int:
        """How many objects it holds, foreign ones included."""

    def digests(
        self, after: bytes = b"", foreign: Callable[[str], None] = lambda _: None
    ) -> AsyncIterator[bytes]:
        """Every block it holds, in an order of its own that does not change, beginning behind ``after``."""
        raise NotImplementedError


@dataclass(slots=True)
class Scrubbed:
    """What `scrub` found: ``blocks`` were read, ``broken`` of them (by CID: a code) are not what their name
    says, and ``foreign`` files are no blocks. ``resumed`` says whether an earlier run was gone on with.
    """

    blocks: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    resumed: bool = False


async def scrub(store: Listable, cursor: Path | None, progress: Callable[[dict[str, Any]], None]) -> Scrubbed:
    """Check every block of ``store`` against its name.

    With a ``cursor`` file, how far it came is kept there, a run that was cut off is gone on with, and the
    file is removed at the end. Raises ``provider_request_failed``; ``invalid_argument`` for a cursor file
    that is something else, or of another store.
    """
    found, after = _load(store, cursor)
    _save(store, cursor, found, after)  # a place that cannot be written is told of now, not after hours
    total = await store.count()
    batch: list[bytes] = []
    try:
        async for digest in store.digests(after, found.foreign.append):
            batch.append(digest)
            if len(batch) == _BATCH:
                await _check(store, batch, found)
                after, batch = batch[-1], []
                _save(store, cursor, found, after)
                progress({"stage": "verifying", "done": found.blocks, "total": total, "unit": "blocks"})
        await _check(store, batch, found)
    except BaseException:
        _save(store, cursor, found, after)
        raise
    _forget(cursor)
    found.foreign = sorted(set(found.foreign))
    return found


async def _check(store: Listable, batch: list[bytes], found: Scrubbed) -> None:
    """Check some blocks side by side; all or none of them count."""
    results: dict[bytes, str] = {}
    errors: list[MeshkitError] = []

    async def one(digest: bytes, scope: trio.CancelScope) -> None:
        try:
            await store.get(digest)
            results[digest] = ""
        except MeshkitError as error:
            if error.code == "cid_mismatch":
                results[digest] = error.code
            elif error.code != "block_unavailable":  # deleted meanwhile
                errors.append(error)
                scope.cancel()

    async with trio.open_nursery() as nursery:
        for digest in batch:
            nursery.start_soon(one, digest, nursery.cancel_scope)
    if errors:
        raise errors[0]
    found.blocks += len(results)
    found.broken |= {cid_text(digest): results[digest] for digest in batch if results.get(digest)}


def _load(store: Listable, cursor: Path | None) -> tuple[Scrubbed, bytes]:
    if cursor is None:
        return Scrubbed(), b""
    try:
        kept = json.loads(cursor.read_bytes())
        if kept["form"] != _FORM or kept["store"] != _place(store):
            raise MeshkitError("invalid_argument", f"{cursor} is the cursor of {kept['store']}")
        found = Scrubbed(int(kept["blocks"]), dict(kept["broken"]), list(kept["foreign"]), True)
        return found, parse_cid(kept["after"]) if kept["after"] else b""
    except FileNotFoundError:
        return Scrubbed(), b""
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{cursor}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise MeshkitError("invalid_argument", f"{cursor} is no cursor file") from None


def _place(store: Listable) -> str:
    return store.name.removeprefix("local-dev:")


def _forget(cursor: Path | None) -> None:
    if cursor is not None:
        cursor.unlink(missing_ok=True)


def _save(store: Listable, cursor: Path | None, found: Scrubbed, after: bytes) -> None:
    if cursor is None:
        return
    kept = {
        "form": _FORM, "store": _place(store), "after": cid_text(after) if after else "",
        "blocks": found.blocks, "broken": found.broken, "foreign": found.foreign,
    }  # fmt: skip
    draft = cursor.with_name(f".{cursor.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(kept))
        os.replace(draft, cursor)
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{cursor}: {error.strerror}") from None
