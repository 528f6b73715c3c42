"""Locking a home at work, and unlocking it: the mount stays, what opens shares goes from memory.

Locking first makes every change durable on this device, then refuses, then wipes: the identity's private
keys, the keys of epochs, the state database with its key, cached plaintext; what stays of the trees is sealed
(`meshkitfs.shares._locking`). The kernel is told to drop what it holds. Unlocking asks the key vault again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core.secret_memory import SecretBytes, scrub, wipe, wipe_text
from meshkitfs.daemon import describe
from meshkitfs.daemon.opening import STATE_LABEL
from meshkitfs.daemon.session import Session
from meshkitfs.daemon.watching import resume
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.identity import load_identity
from meshkitfs.shares import RefSeal

__all__ = ["Lock", "explained", "secret_from", "secret_of"]

_log = logging.getLogger(__name__)

# How long to wait for the kernel: to hand over pages that were changed through a mapping, and to drop pages.
KERNEL_S: Final = 10
DETAIL: Final = "run 'meshkitfs unlock'"
# What has locked a home, in words.
_BY: Final = {
    "lock": "'meshkitfs lock'",
    "start": "'mount --locked'",
    "keyring": "the keyring, which was locked at the start",
}


async def _nothing() -> None:
    pass


class Lock:
    """Locks and unlocks one session.

    ``before`` has the kernel hand over what it has not written yet, ``after`` returns when it has dropped
    what it was told to drop.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._turn = trio.Lock()
        self._seal: RefSeal | None = None
        self._since = 0
        self._left: list[dict[str, Any]] = []
        self._pending: dict[str, Any] = {}
        # Why it cannot be unlocked again: this device was taken off the list.
        self._for_good: MeshkitError | None = None
        self.before: Callable[[], Awaitable[None]] = _nothing
        self.after: Callable[[], Awaitable[None]] = _nothing

    def status(self) -> dict[str, Any] | None:
        """Describe the lock for ``status``; None while the home is not locked."""
        if self._session.locked is None:
            return None
        return {"since": self._since, "by": "lock" if self._for_good is None else "device_revoked"}

    def left(self) -> list[dict[str, Any]]:
        """Return what is not published yet: while locked, what it was then."""
        return describe.left(self._session) if self._session.locked is None else self._left

    def pending(self) -> dict[str, Any]:
        """Return how much waits to be stored: while locked, how much it was then."""
        return describe.pending(self._session) if self._session.locked is None else self._pending

    async def lock(self) -> dict[str, Any]:
        """Lock the home; returns what is unsent, and of that what could not even be saved on this device."""
        async with self._turn:
            if self._session.locked is None:
                with trio.CancelScope(shield=True):
                    await self._lock()
            return {"locked": self.status(), "left": self._left}

    async def shut(self, error: MeshkitError) -> None:
        """Lock the home for good: everything is refused with ``error``, and nothing unlocks it."""
        async with self._turn:
            self._for_good = error
            with trio.CancelScope(shield=True):
                if self._session.locked is None:
                    await self._lock()
                self._session.locked = error

    async def _lock(self) -> None:
        session = self._session
        with trio.move_on_after(KERNEL_S):
            await self.before()
        await session.secure()
        self._since = int(time.time())
        error = self._for_good or MeshkitError("identity_locked", DETAIL)
        session.locked = error
        # First of all, because each share that is refused has it forgotten, which wipes nothing.
        session.services.reader.forget(wiped=True)
        self._seal = seal = RefSeal(session.identity.encryption.public)
        async with trio.open_nursery() as nursery:
            for share in list(session.book.shares.values()):
                nursery.start_soon(share.lock, error, seal)
        # While the state database can still be asked.
        self._left, self._pending = describe.left(session), describe.pending(session)
        seal.close()
        session.services.reader.forget(wiped=True)
        session.gate.forget_keys()
        session.identity.lock()
        session.device_keys.lock()
        # And what a session may keep of the key vault's key: unlocking asks again.
        await trio.to_thread.run_sync(session.vault.forget)
        await session.auditing.flush()
        session.sealer.lock()
        await trio.to_thread.run_sync(session.state.close)
        await trio.to_thread.run_sync(scrub)
        with trio.move_on_after(KERNEL_S):
            await self.after()
        _log.info("locked")

    async def unlock(self, key: SecretBytes | None = None) -> dict[str, Any]:
        """Unlock the home with the key vault's ``key``, or have the vault give it; harmless when unlocked.

        Raises what the key vault raises, and ``identity_corrupt`` or ``state_corrupt`` for another key.
        """
        async with self._turn:
            if self._for_good is not None:
                raise self._for_good
            if self._session.locked is not None:
                key = key or await secret_of(self._session.vault)
                try:
                    with trio.CancelScope(shield=True):
                        await self._unlock(key)
                finally:
                    key.wipe()
            return {"locked": self.status()}

    async def _unlock(self, key: SecretBytes) -> None:
        session, seal = self._session, self._seal
        assert seal is not None  # made when it was locked
        path = session.home.identity_file
        wrapping = bytes(key.view)
        derived = keyvault.derive_key(wrapping, STATE_LABEL)
        try:
            other = await trio.to_thread.run_sync(load_identity, path, wrapping)
            await trio.to_thread.run_sync(session.state.reopen, derived)
            session.sealer.unlock(wrapping)
            await trio.to_thread.run_sync(session.device_keys.unlock, wrapping)
        finally:
            wipe(wrapping)
            wipe(derived)
        # From here on nothing waits: all of it is unlocked, or nothing.
        session.identity.unlock(other)
        seal.open(session.identity.encryption)
        for share in session.book.shares.values():
            share.unseal(seal)
        seal.close()
        self._seal, session.locked = None, None
        _log.info("unlocked")
        nursery = session.services.nursery
        for share in session.book.shares.values():
            nursery.start_soon(share.refresh)
        nursery.start_soon(resume, session)


def secret_from(text: str) -> SecretBytes:
    """Return the key that ``text`` spells in hexadecimal, and wipe ``text``. Raises ``invalid_argument``."""
    try:
        raw = bytes.fromhex(text)
        if len(raw) != keyvault.KEY_BYTES:
            raise ValueError
        return SecretBytes(raw)
    except (ValueError, TypeError):
        raise MeshkitError("invalid_argument", "the key of a key vault has 64 hexadecimal digits") from None
    finally:
        if isinstance(text, str):
            wipe_text(text)


def explained(path: str, share: str | None, locked: dict[str, Any]) -> dict[str, Any]:
    """Return what ``explain`` says of a path while the home is locked: nothing of it can be known.

    ``share`` is the name of the share it is in, if that is known; ``locked`` since when and by what.
    """
    since = datetime.fromtimestamp(locked["since"], UTC).isoformat().replace("+00:00", "Z")
    error = MeshkitError("identity_locked", f"since {since}, by {_BY[locked['by']]}; {DETAIL}")
    plain = {"fingerprint": "", "trust": ""}
    steps = [step | plain for step in Trace.locked(error.detail).as_list()]
    return {"path": path, "share": share, "steps": steps, "locked": locked} | error.as_dict()


async def secret_of(vault: keyvault.KeyVault) -> SecretBytes:
    """Have the key vault give its key, which may ask a person. Raises what it raises."""
    if await trio.to_thread.run_sync(vault.asks) is not None:
        # The daemon has nobody to ask, and must not use again what it was once told.
        raise MeshkitError("identity_locked", "its passphrase or PIN is needed")
    return await trio.to_thread.run_sync(lambda: SecretBytes(vault.load()), abandon_on_cancel=True)
