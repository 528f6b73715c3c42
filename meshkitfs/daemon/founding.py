"""Setting up a home, new or for an identity that is carried to it: all of it is there afterwards, or none."""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import trio

from meshkitfs import keyvault
from meshkitfs.daemon import config as configuration
from meshkitfs.daemon.carrying import Carried
from meshkitfs.daemon.device_joining import NewDevice
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.metadata_home import open_metadata
from meshkitfs.daemon.opening import STATE_LABEL
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Holder, create_identity, publish, report, save_identity
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.net import Secret
from meshkitfs.providers import ProviderSpec, open_provider
from meshkitfs.state import State

__all__ = ["initialize"]

_log = logging.getLogger(__name__)


async def initialize(
    home: Home,
    handle: str,
    provider: ProviderSpec,
    metadata: str | configuration.MetadataConfig,
    key_vault: str | None,
    passphrase: keyvault.Passphrase | None,
    publish_it: bool,
    join: Secret | None = None,
    seal: keyvault.Seal | None = None,
    carried: Carried | None = None,
    check: bool = True,
    device: NewDevice | None = None,
) -> dict[str, Any]:
    """Set up ``home`` (its lock is held): stores, key vault, identity, state, configuration.

    A home is either set up or not: what was made is taken away again when something fails. Only when nobody
    knows whether a service took the identity, the home stays, and the failure is raised all the same. A byte
    store or metadata store that exists is used as it is. ``join`` is what a metadata service asks of
    newcomers, ``seal`` how a TPM seals the key. With ``carried`` it is the home of that identity, whose
    stores have to be there; unless ``check`` is false, the directory must know no newer keys of it. With
    ``device`` it is one of several homes of that identity. Raises
    ``already_initialized``, ``identity_handle_taken``, ``invalid_config``, ``keyvault_unavailable``,
    ``keyvault_refused``, ``keyvault_too_weak``, ``metadata_unauthorized``, ``metadata_unavailable``,
    ``identity_outdated``, ``sealed_file_invalid``.
    """
    if home.initialized:
        raise MeshkitError("already_initialized", str(home.root))
    now = int(time.time())
    identity = create_identity(handle, now) if carried is None else carried.identity
    holder = Holder(identity, lambda _: None)  # nothing changes keys in here
    where = configuration.MetadataConfig.parse(metadata) if isinstance(metadata, str) else metadata
    vault = keyvault.choose(key_vault, home.root, passphrase, seal)
    by = "name" if key_vault else "detection"
    _log.info("key vault chosen", extra={"fields": {"kind": vault.kind, "chosen_by": by}})
    vault_settings = await trio.to_thread.run_sync(_vault_settings, home, vault)
    await (await open_provider(provider, create=carried is None)).aclose()
    if where.path is not None and carried is None and not await trio.Path(where.path).exists():
        EmbeddedMetadata.create(where.path).close()
    secret = secrets.token_bytes(keyvault.KEY_BYTES)
    await trio.to_thread.run_sync(vault.create, secret)
    # Whether somebody else may know the identity by now: then its keys must not be lost.
    known, shares = False, list[str]()
    try:
        key = keyvault.derive_key(secret, STATE_LABEL)
        async with AsyncExitStack() as stack:
            state = State.open(home.state_db, key, create=True)
            stack.callback(state.close)
            if carried is not None:
                await trio.to_thread.run_sync(carried.fill, state)
            directory = await stack.enter_async_context(open_metadata(where, holder, state, join))
            # Nothing is made for a service that is none, and its key is remembered from here on.
            await directory.service_key()
            if carried is not None and check:
                await carried.check(directory)
                await carried.catch_up(directory, state)
            shares = sorted(os.fsdecode(row.name) for row in state.shares())
            if publish_it and where.type == "embedded" and await directory.identity(handle):
                raise MeshkitError("identity_handle_taken", handle)
            base = configuration.Config(provider, where) if carried is None else carried.config(home.root)
            chosen = replace(
                base, provider=provider, metadata=where, key_vault=vault_settings, identity=handle
            )
            if await trio.to_thread.run_sync(os.path.lexists, home.config_path):
                # It is never changed: `save` refuses if it names other stores than the ones used here.
                chosen = replace(
                    configuration.load(home.config_path),
                    provider=provider,
                    metadata=where,
                    key_vault=chosen.key_vault,
                    identity=handle,
                )
            configuration.save(home.config_path, chosen)
            save_identity(home.identity_file, identity, secret)
            if device is not None:
                await trio.to_thread.run_sync(device.keep, home.device_file, state, secret)
            if publish_it:
                known = True
                try:
                    await publish(identity, directory)
                except MeshkitError as error:
                    known = error.code == "metadata_unavailable"
                    raise
    except BaseException:
        if not known:
            home.identity_file.unlink(missing_ok=True)
            home.device_file.unlink(missing_ok=True)
            vault.destroy()
            home.state_db.unlink(missing_ok=True)
        raise
    data = report(identity, now).as_dict() | {"key_vault": vault.report().as_dict(), "published": publish_it}
    return data if carried is None else data | {"made": carried.made, "published": None, "shares": shares}


def _vault_settings(home: Home, vault: keyvault.KeyVault) -> configuration.KeyVaultConfig:
    """What the configuration says, or will say, of ``vault``; refused if it is weaker than demanded there."""
    if os.path.lexists(home.config_path):
        given = configuration.load(home.config_path).key_vault
        if given is not None and given.type == vault.kind:
            if given.require:
                keyvault.require(vault.report(), given.require)
            return given
    return configuration.KeyVaultConfig(type=vault.kind)
