"""Opening a home: key vault, identity, state, stores, gate and shares, in order; closed in reverse."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core.secret_memory import SecretBytes, scrub_thread, wipe
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon.auditing import Auditing
from meshkitfs.daemon.devices import REVOKED, Devices
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.identity_life import IdentityLife
from meshkitfs.daemon.metadata_home import default_release_service, open_metadata, open_releases
from meshkitfs.daemon.peers import Peers
from meshkitfs.daemon.policy_provider import open_deciders
from meshkitfs.daemon.remembering import Remembering
from meshkitfs.daemon.rotation_schedule import Schedule
from meshkitfs.daemon.session import Session
from meshkitfs.daemon.vault_watch import VaultWatch
from meshkitfs.daemon.watching import watch
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Gate, Owners
from meshkitfs.identity import ContactBook, DeviceKeys, Holder, Sealer, load_identity
from meshkitfs.metadata import HttpMetadata, Metadata, Releases
from meshkitfs.policy import Deciders
from meshkitfs.providers import ByteStore, open_provider
from meshkitfs.shares import (
    SPOOL_LIMIT,
    BlockReader,
    Budget,
    OwnLists,
    Services,
    ShareBook,
    Tokens,
    Vaults,
    Welcome,
)
from meshkitfs.state import Clock, Spool, State

__all__ = ["STATE_LABEL", "open_session", "open_vault"]

_log = logging.getLogger(__name__)

# Plaintext of blocks that was read, kept for the next read (bytes, all shares together).
READ_CACHE: Final = 64 << 20
# The least that may wait for the provider where the disk is nearly full (bytes).
SPOOL_FLOOR: Final = 256 << 20
STORE_CLOSE_S: Final = 5
# What the key of state.db is derived with.
STATE_LABEL: Final = "mk/state-db@1"


@asynccontextmanager
async def open_session(
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
        holder, sealer, keys, state = await trio.to_thread.run_sync(_unlocked, home, settings, vault, key)
        stack.callback(sealer.lock)
        stack.callback(keys.lock)
        stack.callback(lambda: holder.identity.lock())
        stack.callback(state.close)
        if state.setting(REVOKED) is not None:
            raise MeshkitError("device_revoked", f"{home.root}")
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
        session = _assemble(
            home,
            settings,
            vault,
            holder,
            sealer,
            keys,
            state,
            store,
            metadata,
            releases,
            deciders,
            spool,
            nursery,
        )
        gates.append(session.gate)
        _log.info("key vault", extra={"fields": _facts(await session.watched.look())})
        if isinstance(metadata, HttpMetadata):
            nursery.start_soon(metadata.run)
        watch(session, nursery)
        stack.push_async_callback(_close, session)
        yield session


def _assemble(
    home: Home, settings: configuration.Config, vault: keyvault.KeyVault, holder: Holder,
    sealer: Sealer, keys: DeviceKeys, state: State, store: ByteStore, metadata: Metadata,
    releases: Releases, deciders: Deciders, spool: Spool, nursery: trio.Nursery,
) -> Session:  # fmt: skip
    clock = Clock(state)
    contacts = ContactBook(holder.identity.public.root, state, metadata)
    for known in holder.identity.signing_keys[::-1]:
        contacts.own(known.public)
    owners = Owners(lambda: holder.identity, lambda: contacts, state)
    gate = Gate(
        lambda: made[0].unlocked().encryption_keys, lambda: made[0].unlocked().signing_keys, metadata,
        state, clock, owners, deciders, releases, lease_s=settings.access.lease_seconds,
        key_vault=lambda: made[0].watched.now(),
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
        emit=lambda event: made[0].on_event(event) if made else None,
        fsync_publishes=settings.writing.fsync == "published",
        releases=releases,
        release_service=default_release_service(settings),
    )
    book = ShareBook(services, lambda: made[0].unlocked(), lambda: contacts)
    welcome = Welcome(book, services, lambda: made[0].unlocked(), lambda: contacts)
    lists = OwnLists(services, lambda: made[0].unlocked())
    vaults = Vaults(services, lists, lambda: made[0].unlocked(), lambda: contacts)
    tokens = Tokens(services, lists, lambda: made[0].unlocked(), lambda: contacts)
    watched = VaultWatch(vault, lambda: made[0].vault_changed())
    unlocked = lambda: made[0].unlocked()  # noqa: E731
    devices = Devices(state, metadata, holder, unlocked, keys, contacts, settings, home.root)
    remembering = Remembering(
        state, metadata, lambda: holder.identity, unlocked, settings, lambda: devices.kid
    )
    schedule = Schedule(
        state, lambda: not any(share.dirty for share in book.shares.values()), lambda: devices.place
    )
    peers = Peers(state, metadata, unlocked, book, contacts, devices, remembering)
    services.others = peers
    session = Session(
        home, settings, watched, holder, state, clock, store, metadata, gate, services, book, contacts,
        welcome, lists, vaults, tokens,
        IdentityLife(holder, unlocked, metadata, book, contacts, schedule), sealer,
        Auditing(state, settings.audit, book), remembering, keys, devices, peers,
    )  # fmt: skip
    session.life.announce = devices.announce
    devices.rotate = session.life.rotate
    holder.catch_up = devices.catch_up
    services.budget.on_pressure = session.hurry
    made.append(session)
    return session


async def _close(session: Session) -> None:
    """Publish what is not published yet; what cannot be stays in the spool for the next start."""
    with trio.CancelScope(shield=True):
        await session.secure()
        await session.auditing.flush()
    with trio.move_on_after(session.closing_s, shield=True):
        for share in list(session.book.shares.values()):
            if share.dirty:
                try:
                    await share.flush()
                except MeshkitError as error:
                    _log.warning("left unsent: share %r: %s (%s)", share, error.code, error.detail)
                except Exception:
                    _log.exception("left unsent: share %r", share)
    if session.locked is None:
        await session.remembering.close()


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
) -> tuple[Holder, Sealer, DeviceKeys, State]:
    """Open with the key vault's key what is sealed with it, and keep no copy of that key."""
    _admit(vault, settings)
    secret = vault.load() if given is None else bytes(given.view)
    try:
        identity, sealer = load_identity(home.identity_file, secret), Sealer(home.identity_file)
        sealer.unlock(secret)
        keys = DeviceKeys(home.device_file)
        keys.unlock(secret)
        key = keyvault.derive_key(secret, STATE_LABEL)
        try:
            return Holder(identity, sealer), sealer, keys, State.open(home.state_db, key)
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
