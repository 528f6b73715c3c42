"""The part of Kubo's RPC (``/api/v0``) that a byte store needs: raw blocks and their pins.

Spoken by Kubo, by the IPFS proxy of IPFS Cluster and by js-ipfs. Every command has a ``timeout`` for the
node, because without one it looks for a block that nobody has for ever; it ends a little before this side
gives up, so that what arrives is the node's own answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

from multiformats import multibase

from meshkitfs.core.blocks import MAX_SEALED
from meshkitfs.core.cid import cid_bytes, cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.net import Endpoint, Reply
from meshkitfs.providers._api import Usage
from meshkitfs.providers._remote import UNBOUNDED

__all__ = ["Kubo", "decoded", "shown"]

# A command's failure is HTTP 500 with a sentence, whatever happened. Only these mean something more.
_LATE: Final = ("timed out", "deadline exceeded")
_ABSENT: Final = ("not found", "could not find")
_NOT_PINNED: Final = ("not pinned",)
_FULL: Final = ("no space left", "disk quota exceeded")
_STATUS: Final = (200, 413, 500)
_ANSWER_CAP: Final = 256 << 10
_SENTENCE: Final = 200
# The node's timeout, as a part of this side's.
_SOONER: Final = 0.8


class Kubo:
    """One node, spoken to through ``endpoint``. Digests are raw SHA-256; every block is CIDv1, raw."""

    def __init__(self, endpoint: Endpoint, lookup_s: float | None = None) -> None:
        self.endpoint = endpoint
        # How long the node may take for a command, and to look for a block, before it says that it gives up.
        self.patience_s = endpoint.limits.deadline_s * _SOONER
        self.lookup_s = min(lookup_s or self.patience_s, self.patience_s)

    async def put(self, digest: bytes, data: bytes, *, pin: bool) -> None:
        """Store a block. Raises cid_mismatch if the node names it otherwise; no_space."""
        reply = await self._ask(
            "block/put",
            # One form for all: Kubo goes by cid-codec, js-ipfs by format and version.
            {
                "cid-codec": "raw",
                "format": "raw",
                "mhtype": "sha2-256",
                "version": "1",
                "pin": "true" if pin else "false",
            },
            block=data,
        )
        if reply.status != 200:
            raise self._failure(reply, len(data))
        told = self._object(reply).get("Key")
        if decoded(told) != cid_bytes(digest):
            raise MeshkitError(
                "cid_mismatch", f"{self.endpoint.name} stored {cid_text(digest)} and calls it {shown(told)}"
            )

    async def get(self, digest: bytes) -> bytes | None:
        """Return what the node has under that name, unchecked; None if it did not find it in time."""
        reply = await self._ask(
            "block/get", {"arg": cid_text(digest)}, cap=MAX_SEALED, patience_s=self.lookup_s
        )
        if reply.status == 200:
            return reply.body
        if self._means(reply, (*_LATE, *_ABSENT)):
            return None
        raise self._failure(reply)

    async def pinned(self, digest: bytes) -> bool:
        """Whether the node keeps the block by a pin of its own, as `put` makes it."""
        # Without a type the node would look through everything that is pinned.
        reply = await self._ask("pin/ls", {"arg": cid_text(digest), "type": "recursive"})
        if reply.status == 200:
            return True
        if self._means(reply, _NOT_PINNED):
            return False
        raise self._failure(reply)

    async def size(self, digest: bytes) -> int | None:
        """Return the size of a block that the node itself has; None if it surely has not."""
        reply = await self._ask("block/stat", {"arg": cid_text(digest), "offline": "true"})
        if reply.status == 200:
            return _count(self._object(reply).get("Size"))
        if self._means(reply, _LATE):
            raise MeshkitError(
                "provider_request_failed",
                f"{self.endpoint.name} did not find {cid_text(digest)} within {self.patience_s:g} s",
            )
        if self._means(reply, _ABSENT):
            return None
        raise self._failure(reply)

    async def unpin(self, digest: bytes) -> None:
        """Remove the pin; it is no error when there is none."""
        reply = await self._ask("pin/rm", {"arg": cid_text(digest)})
        if reply.status != 200 and not self._means(reply, _NOT_PINNED):
            raise self._failure(reply)

    async def remove(self, digest: bytes) -> None:
        """Delete the node's copy of a block, unless something else that it keeps needs it."""
        reply = await self._ask("block/rm", {"arg": cid_text(digest), "force": "true"})
        if reply.status != 200:
            raise self._failure(reply)
        for line in reply.body.splitlines():
            told = _parsed(line)
            problem = told.get("Error") if isinstance(told, dict) else "an answer that is none"
            if problem and "pinned" not in str(problem):
                raise self._refused(f"cannot delete {cid_text(digest)}: {shown(problem)}")

    async def identity(self) -> str:
        """Return the node's peer id. Raises provider_request_failed if this is no IPFS node."""
        reply = await self._ask("id", {})
        if reply.status != 200:
            raise self._failure(reply)
        told = self._object(reply).get("ID")
        if not isinstance(told, str) or not 0 < len(told) <= _SENTENCE:
            raise MeshkitError("provider_request_failed", f"{self.endpoint.name} does not say who it is")
        return told

    async def room(self) -> Usage:
        """Return the room that the node's configuration (``StorageMax``) gives it."""
        reply = await self._ask("repo/stat", {"size-only": "true"})
        if reply.status != 200:
            raise self._failure(reply)
        told = self._object(reply)
        used, most = _count(told.get("RepoSize")), _count(told.get("StorageMax"))
        total = min(most, UNBOUNDED.total_bytes)
        return Usage(total, min(max(most - used, 0), total), UNBOUNDED.free_inodes)

    # -- one command -----------------------------------------------------------------------------------

    async def _ask(
        self,
        command: str,
        params: dict[str, str],
        *,
        block: bytes | None = None,
        cap: int = _ANSWER_CAP,
        patience_s: float | None = None,
    ) -> Reply:
        timeout = f"{int((patience_s or self.patience_s) * 1000)}ms"
        # All of these commands may be repeated: they name their block by its content.
        return await self.endpoint.request(
            "POST",
            f"/api/v0/{command}",
            params={**params, "cid-base": "base32", "timeout": timeout},
            files={"data": ("block", block, "application/octet-stream")} if block is not None else None,
            accept=_STATUS,
            cap=cap,
            idempotent=True,
        )

    def _object(self, reply: Reply) -> dict[str, Any]:
        told = reply.json()
        if not isinstance(told, dict):
            raise MeshkitError(
                "provider_request_failed", f"{self.endpoint.name} is no IPFS node: {told!r:.60}"
            )
        return told

    def _means(self, reply: Reply, sentences: Collection[str]) -> bool:
        said = _message(reply).lower()
        return reply.status == 500 and any(sentence in said for sentence in sentences)

    def _failure(self, reply: Reply, size: int = 0) -> MeshkitError:
        if reply.status == 413:
            return self._refused(
                f"HTTP 413: it, or a proxy before it, does not take a block of {size} bytes; raise its limit "
                "for request bodies to 3 MiB"
            )
        said = _message(reply)
        if any(sentence in said.lower() for sentence in _FULL):
            return MeshkitError("no_space", f"{self.endpoint.name}: {shown(said)}")
        if self._means(reply, _LATE):
            return MeshkitError("provider_request_failed", f"{self.endpoint.name}: {shown(said)}")
        return self._refused(f"HTTP {reply.status}: {shown(said)}")

    def _refused(self, what: str) -> MeshkitError:
        return MeshkitError("provider_http_error", f"{self.endpoint.name}: {what}")


def _message(reply: Reply) -> str:
    told = _parsed(reply.body)
    said = told.get("Message") if isinstance(told, dict) else None
    return said if isinstance(said, str) else ""


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def shown(text: object) -> str:
    """What a server said, in a form that can be shown."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:_SENTENCE].strip() or "no reason given"


def _count(value: object) -> int:
    """A number of bytes: Kubo gives a number, js-ipfs a string."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or value < 0:
        raise MeshkitError("provider_request_failed", "the node gives a size that is none")
    return value


def decoded(text: object) -> bytes:
    """Return the bytes of a CID in any base; nothing for what is no CID."""
    if not isinstance(text, str) or not 0 < len(text) <= 128:
        return b""
    try:
        return bytes(multibase.decode(text))
    except (ValueError, KeyError):
        return b""
