"""An identity on its way to another home: what is put into a file, and the home that is made from one."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core.secret_memory import wipe
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon import remembering, sealed_file
from meshkitfs.daemon.locking import secret_from
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Directory, Identity, open_identity, seal_identity, standing
from meshkitfs.metadata import Metadata
from meshkitfs.providers import LocalOptions
from meshkitfs.state import State

__all__ = ["Carried", "Carrying", "opened"]

_log = logging.getLogger(__name__)

_TYPE: Final = "mk/identity-export@1"
_KINDS: Final = {"export": sealed_file.EXPORT, "recovery": sealed_file.RECOVERY}


@dataclass(frozen=True, slots=True)
class Carried:
    """What a file held: an identity with all its keys, where its stores are, and what its home remembered.

    ``made`` is when (UNIX seconds). ``stores`` is a configuration with the byte store and metadata store,
    whose relative paths are in the home. ``state`` is in the form of `state.CarriedRows`.
    """

    identity: Identity
    made: int
    stores: dict[str, Any]
    state: dict[str, Any]

    def config(self, base: Path) -> configuration.Config:
        """Return the stores, as a configuration in the home ``base``. Raises ``invalid_config``."""
        return configuration.loads(json.dumps(self.stores).encode(), base, "the file")

    def fill(self, state: State) -> None:
        """Put what was remembered into an empty ``state``. Raises ``sealed_file_invalid``."""
        try:
            state.carried.take(self.state)
        except MeshkitError as error:
            if error.code != "invalid_record":
                raise
            raise MeshkitError("sealed_file_invalid", f"its state: {error.detail}") from None

    async def check(self, directory: Directory) -> None:
        """Raise ``identity_outdated`` if the directory knows newer keys, or does not know these."""
        try:
            where = await standing(self.identity, directory)
        except MeshkitError as error:
            if error.code != "metadata_unauthorized":
                raise
            raise MeshkitError("identity_outdated", "the metadata service does not know these keys") from None
        if where == "ahead":
            raise MeshkitError("identity_outdated", "the directory has newer records of this identity")
        if where == "other":
            raise MeshkitError("identity_handle_taken", self.identity.handle)

    async def catch_up(self, metadata: Metadata, state: State) -> None:
        """Take what the lost home remembered after the file was written, if it left that for a recovery."""
        newer = await remembering.latest(self.identity, metadata, self.made)
        if newer is None:
            return
        take = partial(state.carried.take, newer, keep=("service_key",))
        try:
            await trio.to_thread.run_sync(take)
        except MeshkitError as error:
            if error.code != "invalid_record":
                raise
            _log.warning("what was remembered last cannot be taken: %s", error.detail)


def opened(content: dict[str, Any]) -> Carried:
    """Return what the content of a file says. Raises ``sealed_file_invalid``, ``sealed_file_version``."""
    match content:
        case {
            "t": str() as typ,
            "made": int() as made,
            "key": bytes() as key,
            "identity": bytes() as sealed,
            "stores": str() as stores,
            "state": dict() as state,
        } if typ == _TYPE and len(key) == keyvault.KEY_BYTES:
            try:
                return Carried(open_identity(sealed, key), made, json.loads(stores), state)
            except (MeshkitError, ValueError):
                raise MeshkitError("sealed_file_invalid", "the identity in it") from None
            finally:
                wipe(key)
    if str(content.get("t", "")).startswith(_TYPE.partition("@")[0]):
        raise MeshkitError("sealed_file_version")
    raise MeshkitError("sealed_file_invalid", "it holds something else")


class Carrying:
    """The commands of one open home that write such a file; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.methods: dict[str, Callable[..., Any]] = {
            "identity.seal": self._seal,
            "identity.recovery_made": self._recovery_made,
        }

    async def _seal(self, kind: str, header: str, key: str) -> dict[str, Any]:
        """Return the sealed part of a file, under the 32-byte ``key`` (hex) and its ``header`` (base64)."""
        if kind not in _KINDS:
            raise MeshkitError("invalid_argument", f"kind {kind!r}")
        session, secret = self._session, secret_from(key)
        try:
            content = await trio.to_thread.run_sync(_content, session.unlocked(), session)
            sealed = await trio.to_thread.run_sync(
                sealed_file.seal, _KINDS[kind], base64.b64decode(header), secret.view, content
            )
            wipe(content["key"])
        finally:
            secret.wipe()
        left = session.state.unpublished()
        shares = session.book.shares.values()
        return {
            "handle": session.identity.handle,
            "sealed": base64.b64encode(sealed).decode(),
            "made": content["made"],
            "unsent": sorted(share.name for share in shares if share.dirty or share.row.share in left),
            "inside": _inside(session),
        }

    async def _recovery_made(self, made: int) -> dict[str, Any]:
        """Note that a recovery file with what `_seal` gave at ``made`` is on a disk."""
        return {"recovery": await self._session.remembering.made(made)}


def _content(identity: Identity, session: Session) -> dict[str, Any]:
    stores = replace(session.config, key_vault=None, mount=configuration.MountConfig())
    key = os.urandom(keyvault.KEY_BYTES)
    return {
        "t": _TYPE,
        "made": int(time.time()),
        "key": key,
        "identity": seal_identity(identity, key),
        "stores": json.dumps(stores.as_dict(session.home.root)),
        "state": session.state.carried.give(),
    }


def _inside(session: Session) -> list[str]:
    """Return which stores are in the home itself, and so do not go along."""
    root, found = session.home.root, []
    options, path = session.config.provider.options, session.config.metadata.path
    if isinstance(options, LocalOptions) and options.store.is_relative_to(root):
        found.append("byte store")
    if path is not None and path.is_relative_to(root):
        found.append("metadata store")
    return found
