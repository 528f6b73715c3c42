"""A home at work: key vault, identity, state, stores, gate and shares, opened in order and closed in reverse.

The same session serves a mount and a single command; only the mount adds FUSE on top.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core.secret_memory import SecretBytes, scrub_thread, wipe
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon import hygiene
from meshkitfs.daemon.auditing import Auditing
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.identity_life import IdentityLife
from meshkitfs.daemon.metadata_home import default_release_service, open_metadata, open_releases
from meshkitfs.daemon.policy_provider import open_deciders
from meshkitfs.daemon.remembering import Remembering
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Gate, Owners
from meshkitfs.identity import ContactBook, Holder, Identity, Sealer, load_identity
from meshkitfs.metadata import HttpMetadata, Metadata, Releases
from meshkitfs.policy import Deciders
from meshkitfs.providers import ByteStore, open_provider
from meshkitfs.shares import (
    SPOOL_LIMIT,
    AccessChanged,
    BlockReader,
    Budget,
    Event,
    OwnLists,
    PublishFailed,
    RosterOverdue,
    Services,
    Share,
    ShareBook,
    Tokens,
    Vaults,
    Welcome,
)
from meshkitfs.state import Clock, Spool, State

__all__ = ["Incident", "Session", "open_vault"]

_log = logging.getLogger(__name__)

# Plaintext of blocks that was read, kept for the next read (bytes, all shares together).
READ_CACHE: Final = 64 << 20
# How often the metadata store is asked whether something changed. This bounds how long a revocation, an
# expiry or a remote change can go unnoticed on a mount that nobody opens anything in.
WATCH_S: Final = 0.5
# How often it is asked whether the mailbox may have changed while an invitation is out, and how often it is
# looked into whatever the answer is.
CLAIMS_S: Final = 1.0
CLAIMS_LEAST_S: Final = 60.0
# How old the reported capabilities of the key vault may be.
VAULT_LOOK_S: Final = 5
INCIDENTS: Final = 200
# The least that may wait for the provider where the disk is nearly full (bytes).
SPOOL_FLOOR: Final = 256 << 20
CLOSE_DEADLINE_S: Final = 120
STORE_CLOSE_S: Final = 5
# What the key of state.db is derived with.
STATE_LABEL: Final = "mk/state-db@1"
# How often a share with unsent changes of an earlier run is tried to be opened, while a store is away.
TAKE_UP_AGAIN_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Incident:
    """A refusal or fault that a person may want to know of; ``time`` is UNIX seconds."""

    time: int
    path: str
    code: str
    detail: str


@dataclass(slots=True)
class Session:
    """Everything of one open home. Made by `Session.open`."""

    home: Home
    config: configuration.Config
    vault: keyvault.KeyVault
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
    vault_report: keyvault.KeyVaultReport | None = None
    incidents: deque[Incident] = field(default_factory=lambda: deque(maxlen=INCIDENTS))
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    # How long (s) the end of the session may go on publishing; 0 where that was tried already.
    closing_s: float = CLOSE_DEADLINE_S
    # Why nothing can be opened: the identity is locked (see `Lock`); None while it is not.
    locked: MeshkitError | None = None

    def unlocked(self) -> Identity:
        """Return the identity with its private keys. Raises ``identity_locked``."""
        if self.locked is not None:
            raise self.locked
        return self.identity

    @property
    def identity(self) -> Identity:
        """Who this home is, with the keys of now."""
        return self.holder.identity

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        home: Home,
        passphrase: keyvault.Passphrase | None,
        *,
        absent: bool = False,
        key: SecretBytes | None = None,
    ) -> AsyncIterator[Session]:
        """Open ``home``, whose lock the caller holds. Leaving it sends what is unsent, as far as possible.

        With ``absent`` the byte store need not be there. With ``key`` the key vault is not asked for its key.

        Raises MeshkitError: ``not_initialized``, ``invalid_config``, the key vault's refusals,
        ``state_corrupt``, ``provider_request_failed``, ``metadata_unavailable``.
        """
        home.require_initialized()
        settings = configuration.load(home.config_path)
        async with AsyncExitStack() as stack:
            vault = open_vault(home, settings, passphrase)
            holder, sealer, state = await trio.to_thread.run_sync(_unlocked, home, settings, vault, key)
            stack.callback(sealer.lock)
            stack.callback(lambda: holder.identity.lock())
            stack.callback(state.close)
            store = await open_provider(settings.provider, absent=absent)
            stack.push_async_callback(_close_store, store)
            metadata = await stack.enter_async_context(open_metadata(settings.metadata, holder, state))
            releases = await stack.enter_async_context(open_releases(settings, holder.request_key))
            deciders = open_deciders(settings.policy)
            stack.push_async_callback(_close_deciders, deciders)
            spool = await trio.to_thread.run_sync(_spool, home, state)
            gates: list[Gate] = []
            stack.callback(_forget_keys, gates)
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            session = cls._assemble(
                home,
                settings,
                vault,
                holder,
                sealer,
                state,
                store,
                metadata,
                releases,
                deciders,
                spool,
                nursery,
            )
            gates.append(session.gate)
            _log.info("key vault", extra={"fields": _facts(await session.look_at_vault())})
            if isinstance(metadata, HttpMetadata):
                nursery.start_soon(metadata.run)
            nursery.start_soon(session._watch)
            nursery.start_soon(session._watch_leases)
            nursery.start_soon(session._watch_rosters)
            nursery.start_soon(session._watch_vault)
            nursery.start_soon(session._watch_claims)
            nursery.start_soon(session.resume)
            nursery.start_soon(session._watch_tokens)
            nursery.start_soon(session.life.run)
            nursery.start_soon(session.auditing.run)
            nursery.start_soon(session.remembering.run)
            stack.push_async_callback(session._close)
            yield session

    @classmethod
    def _assemble(
        cls, home: Home, settings: configuration.Config, vault: keyvault.KeyVault, holder: Holder,
        sealer: Sealer, state: State, store: ByteStore, metadata: Metadata, releases: Releases,
        deciders: Deciders, spool: Spool, nursery: trio.Nursery,
    ) -> Session:  # fmt: skip
        clock = Clock(state)
        contacts = ContactBook(holder.identity.public.root, state, metadata)
        for known in holder.identity.signing_keys[::-1]:
            contacts.own(known.public)
        owners = Owners(lambda: holder.identity, lambda: contacts, state)
        gate = Gate(
            lambda: made[0].unlocked().encryption_keys, lambda: made[0].unlocked().signing_keys, metadata,
            state, clock, owners, deciders, releases, lease_s=settings.access.lease_seconds,
        )  # fmt: skip
        spooled = state.staged_digests()
        # Services and session refer to each other through this: events arrive only once it is filled.
        made: list[Session] = []
        services = Services(
            gate=gate,
            metadata=metadata,
            reader=BlockReader(store, spool, spooled, READ_CACHE),
            spool=spool,
            state=state,
            budget=Budget(
                spool_limit=_spool_limit(home, settings.writing.spool_limit), spooled=lambda: spool.used
            ),
            nursery=nursery,
            signing=lambda: holder.identity.signing,
            signed_before=lambda: holder.identity.signing_keys[1:],
            who=holder.identity.handle,
            emit=lambda event: made[0]._on_event(event) if made else None,
            fsync_publishes=settings.writing.fsync == "published",
            releases=releases,
            release_service=default_release_service(settings),
        )
        book = ShareBook(services, lambda: made[0].unlocked(), lambda: contacts)
        welcome = Welcome(book, services, lambda: made[0].unlocked(), lambda: contacts)
        lists = OwnLists(services, lambda: made[0].unlocked())
        vaults = Vaults(services, lists, lambda: made[0].unlocked(), lambda: contacts)
        tokens = Tokens(services, lists, lambda: made[0].unlocked(), lambda: contacts)
        session = cls(
            home, settings, vault, holder, state, clock, store, metadata, gate, services, book, contacts,
            welcome, lists, vaults, tokens,
            IdentityLife(holder, lambda: made[0].unlocked(), metadata, book, contacts), sealer,
            Auditing(state, settings.audit, book),
            Remembering(state, metadata, lambda: holder.identity, lambda: made[0].unlocked(), settings),
        )  # fmt: skip
        services.budget.on_pressure = session._hurry_all
        made.append(session)
        return session

    def _hurry_all(self) -> None:
        for share in self.book.shares.values():
            share.press()

    def _on_event(self, event: Event) -> None:
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

    async def look_at_vault(self) -> keyvault.KeyVaultReport:
        """Ask the key vault what it gives now. In a thread: a keyring may take its time, or hang."""
        self.vault_report = await trio.to_thread.run_sync(self.vault.report, abandon_on_cancel=True)
        return self.vault_report

    async def _watch_vault(self) -> None:
        """Keep the key vault's report current, for attributes that file managers ask for by the hundred."""
        while True:
            await trio.sleep(VAULT_LOOK_S)
            await self.look_at_vault()

    async def _watch(self) -> None:
        """Notice what others did, and renew leases."""
        busy: set[Share] = set()

        async def look(share: Share) -> None:
            try:
                await share.refresh()
            except Exception:
                _log.exception("the watcher failed in a way nobody foresaw")
            finally:
                busy.discard(share)

        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(WATCH_S)
                for share in list(self.book.shares.values()):
                    # One that must wait for an answer keeps none of the others waiting.
                    if share not in busy:
                        busy.add(share)
                        nursery.start_soon(look, share)

    async def _watch_leases(self) -> None:
        """Let what is over end, whoever is being waited for elsewhere."""
        while True:
            await trio.sleep(WATCH_S)
            for share in list(self.book.shares.values()):
                share.lapse()
            self.gate.drop_ended()

    async def _watch_rosters(self) -> None:
        """Keep this home's own rosters valid, and those whose time is over out."""
        while True:
            await trio.sleep(WATCH_S)
            if self.locked is not None:
                continue
            try:
                await self.book.renew_rosters()
            except Exception:
                _log.exception("renewing rosters failed in a way nobody foresaw")
            try:
                await self.lists.renew()
                await self.vaults.follow()
            except MeshkitError as error:
                _log.warning(
                    "a vault or revocation list could not be renewed: %s (%s)", error.code, error.detail
                )
            except Exception:
                _log.exception("the watcher failed in a way nobody foresaw")

    async def _watch_claims(self) -> None:
        """Let in who comes back with an invitation; nobody is asked while none is out."""
        seen, looked = -1, 0.0
        while True:
            await trio.sleep(CLAIMS_S)
            try:
                if self.locked is not None or not self.welcome.awaited:
                    continue
                tick = self.metadata.tick()
                if tick == seen and trio.current_time() < looked + CLAIMS_LEAST_S:
                    continue
                looked = trio.current_time()
                for item in await self.welcome.look():
                    _log.info("an invitation was claimed", extra={"fields": {"invitation": item.id[:8]}})
                seen = tick
            except MeshkitError as error:
                _log.info("the claims must wait: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("looking for claims failed in a way nobody foresaw")

    async def _watch_tokens(self) -> None:
        """Take in tokens that come by mail while a share waits for one; nobody is asked otherwise."""
        seen = -1
        while True:
            await trio.sleep(CLAIMS_S)
            waiting = [
                share
                for share in self.book.shares.values()
                if share.refusal is not None and share.refusal.code.startswith("capability_")
            ]
            tick = self.metadata.tick()
            if not waiting or tick == seen:
                continue
            try:
                if await self.tokens.collect():
                    for share in waiting:
                        share.reconsider()
                seen = tick
            except MeshkitError as error:
                _log.info("tokens in the mailbox must wait: %s (%s)", error.code, error.detail)
            except Exception:
                _log.exception("looking for tokens failed in a way nobody foresaw")

    async def resume(self) -> None:
        """Go on with the changes that an earlier run could not publish."""
        waiting = self.state.unpublished()
        for share in list(self.book.shares.values()):
            if share.row.share in waiting and share.row.grant == "live":
                self.services.nursery.start_soon(self._take_up, share)

    async def _take_up(self, share: Share) -> None:
        """Open a share with unsent changes, which then go out by themselves."""
        while True:
            try:
                await share.use("list")
                return
            except MeshkitError as error:
                _log.warning("unsent changes of share %r must wait: %s", share, error.code)
                if share.refusal is not None:
                    return  # the watcher looks at it again
                share.stuck = error
            await trio.sleep(TAKE_UP_AGAIN_S)

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

    async def _close(self) -> None:
        """Publish what is not published yet; what cannot be stays in the spool for the next start."""
        with trio.CancelScope(shield=True):
            await self.secure()
            await self.auditing.flush()
        with trio.move_on_after(self.closing_s, shield=True):
            for share in list(self.book.shares.values()):
                if share.dirty:
                    try:
                        await share.flush()
                    except MeshkitError as error:
                        _log.warning("left unsent: share %r: %s (%s)", share, error.code, error.detail)
                    except Exception:
                        _log.exception("left unsent: share %r", share)
        if self.locked is None:
            await self.remembering.close()

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


async def _close_store(store: ByteStore) -> None:
    """Close the connections, also while being cancelled; an unwilling server does not hold it up."""
    with trio.move_on_after(STORE_CLOSE_S, shield=True):
        await store.aclose()


async def _close_deciders(deciders: Deciders) -> None:
    with trio.move_on_after(STORE_CLOSE_S, shield=True):
        await deciders.aclose()


def open_vault(
    home: Home, settings: configuration.Config, passphrase: keyvault.Passphrase | None
) -> keyvault.KeyVault:
    """Return the key vault of ``home``. Raises ``identity_not_found``."""
    chosen = settings.key_vault
    if chosen is None:
        return keyvault.open_home(home.root, None, passphrase)
    return keyvault.open_home(home.root, chosen.type, passphrase, chosen.cache_seconds)


def _facts(report: keyvault.KeyVaultReport) -> dict[str, Any]:
    """What the key vault gives, for the log: without the sentence, which names paths."""
    return {name: value for name, value in report.as_dict().items() if name != "detail"}


def _admit(vault: keyvault.KeyVault, settings: configuration.Config) -> None:
    """Say in the log which key vault was chosen, and refuse one that gives less than is demanded."""
    chosen = settings.key_vault
    by = "configuration" if chosen is not None else "home"
    _log.info("opening the key vault", extra={"fields": {"kind": vault.kind, "chosen_by": by}})
    if chosen is not None and chosen.require:
        keyvault.require(vault.report(), chosen.require)


def _unlocked(
    home: Home, settings: configuration.Config, vault: keyvault.KeyVault, given: SecretBytes | None
) -> tuple[Holder, Sealer, State]:
    """Open with the key vault's key what is sealed with it, and keep no copy of that key."""
    _admit(vault, settings)
    secret = vault.load() if given is None else bytes(given.view)
    try:
        identity, sealer = load_identity(home.identity_file, secret), Sealer(home.identity_file)
        sealer.unlock(secret)
        key = keyvault.derive_key(secret, STATE_LABEL)
        try:
            return Holder(identity, sealer), sealer, State.open(home.state_db, key)
        finally:
            wipe(key)
    finally:
        wipe(secret)
        scrub_thread()


def _spool_limit(home: Home, configured: int | None) -> int:
    """Return how much may wait for the provider: what is configured, else a part of the room on the disk."""
    if configured is not None:
        return configured
    room = os.statvfs(home.cache_dir)
    return max(SPOOL_FLOOR, min(SPOOL_LIMIT, room.f_bavail * room.f_frsize // 2))


def _spool(home: Home, state: State) -> Spool:
    spool = Spool(home.cache_dir)
    # What a crash left behind before its commit was recorded is nobody's.
    spool.sweep(state.staged_digests())
    return spool


def _forget_keys(gates: list[Gate]) -> None:
    for gate in gates:
        gate.forget_keys()
