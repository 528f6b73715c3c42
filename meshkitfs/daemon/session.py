"""A home at work: everything of it that is open, and what its parts tell each other.

The same session serves a mount and a single command; only the mount adds FUSE on top.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from meshkitfs import keyvault
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon import hygiene
from meshkitfs.daemon.auditing import Auditing
from meshkitfs.daemon.devices import Devices
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.identity_life import IdentityLife
from meshkitfs.daemon.peers import Peers
from meshkitfs.daemon.remembering import Remembering
from meshkitfs.daemon.vault_watch import VaultWatch
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Gate
from meshkitfs.identity import ContactBook, DeviceKeys, Holder, Identity, Sealer
from meshkitfs.metadata import Metadata
from meshkitfs.providers import ByteStore
from meshkitfs.shares import (
    AccessChanged,
    Event,
    OwnLists,
    PublishFailed,
    RosterOverdue,
    Services,
    ShareBook,
    Tokens,
    Vaults,
    Welcome,
)
from meshkitfs.state import Clock, State

__all__ = ["CLOSE_DEADLINE_S", "Incident", "Session"]

_log = logging.getLogger(__name__)

INCIDENTS: Final = 200
TOO_WEAK: Final = "keyvault_strength_required"
CLOSE_DEADLINE_S: Final = 120


@dataclass(frozen=True, slots=True)
class Incident:
    """A refusal or fault that a person may want to know of; ``time`` is UNIX seconds."""

    time: int
    path: str
    code: str
    detail: str


@dataclass(slots=True)
class Session:
    """Everything of one open home. Made by `open_session`."""

    home: Home
    config: configuration.Config
    watched: VaultWatch
    holder: Holder
    state: State
    clock: Clock
    store: ByteStore
    metadata: Metadata
    gate: Gate
    services: Services
    book: ShareBook
    contacts: ContactBook
    welcome: Welcome
    lists: OwnLists
    vaults: Vaults
    tokens: Tokens
    life: IdentityLife
    sealer: Sealer
    auditing: Auditing
    remembering: Remembering
    device_keys: DeviceKeys
    devices: Devices
    peers: Peers
    incidents: deque[Incident] = field(default_factory=lambda: deque(maxlen=INCIDENTS))
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    # How long (s) the end of the session may go on publishing; 0 where that was tried already.
    closing_s: float = CLOSE_DEADLINE_S
    # Why nothing can be opened: the identity is locked (see `Lock`); None while it is not.
    locked: MeshkitError | None = None

    @property
    def vault(self) -> keyvault.KeyVault:
        """What keeps the private keys of this home."""
        return self.watched.vault

    def unlocked(self) -> Identity:
        """Return the identity with its private keys. Raises ``identity_locked``."""
        if self.locked is not None:
            raise self.locked
        return self.identity

    @property
    def identity(self) -> Identity:
        """Who this home is, with the keys of now."""
        return self.holder.identity

    def hurry(self) -> None:
        for share in self.book.shares.values():
            share.press()

    def on_event(self, event: Event) -> None:
        if isinstance(event, PublishFailed | RosterOverdue):
            self.note(event.share, event.error)
        if isinstance(event, AccessChanged) and event.code:
            share = self.book.shares.get(event.share.encode(errors="surrogateescape"))
            # A share that was just removed on purpose is refused too, and that is nobody's incident.
            if share is not None:
                detail = share.refusal.detail if share.refusal is not None else ""
                self.note(event.share, MeshkitError(event.code, detail))
        for listener in self.listeners:
            listener(event)

    def note(self, path: str, error: MeshkitError) -> None:
        """Remember a refusal or fault for ``errors.txt`` and ``status``; repeats of the last one are one."""
        last = self.incidents[-1] if self.incidents else None
        if last is None or (last.path, last.code, last.detail) != (path, error.code, error.detail):
            self.incidents.append(Incident(int(time.time()), path, error.code, error.detail))
            # Without the path: names are secrets, and the log is a plain file.
            _log.warning("fault", extra={"fields": {"code": error.code, "errno": error.errno}})

    @property
    def vault_report(self) -> keyvault.KeyVaultReport | None:
        """What the key vault gave when it was last asked; None if it never was."""
        return self.watched.report

    def vault_changed(self) -> None:
        """Have each share that depends on the key vault looked at again: what it gives has changed."""
        for share in self.book.shares.values():
            demanded = share.grant is not None and share.grant.capsule.keyvault
            if demanded or (share.refusal is not None and share.refusal.code == TOO_WEAK):
                share.reconsider()

    async def secure(self) -> None:
        """Make every change durable on this device, whatever the stores do."""
        for share in list(self.book.shares.values()):
            if share.dirty:
                try:
                    await share.journal()
                except MeshkitError as error:
                    _log.warning("not journaled: share %r: %s (%s)", share, error.code, error.detail)
                except Exception:
                    _log.exception("not journaled: share %r", share)

    def runtime(self) -> dict[str, Any]:
        """Return what this runtime really gives: how keys are kept and what memory protection there is."""
        report = self.vault_report
        if report is None:
            return {"key_vault": self.vault.kind} | hygiene.report()
        return {
            "key_vault": report.kind,
            "persistent": report.persistent,
            "exportable": report.exportable,
            "hardware_backed": report.hardware_backed,
            "user_presence": report.user_presence,
            "fallback": report.fallback,
            "session_cache": report.session_cache,
            "available": report.available,
        } | hygiene.report()
