"""Changing the keys of an identity that is in use, one durable step after the other.

1. The new keys and the record that names them are stored (`prepared`): nobody else has seen them.
2. The record is published. The directory takes one successor of a record and no other, so of two devices that
   do this at once, one is told that it came too late, and gives its keys up.
3. The new keys become the identity's, and the old ones are kept (`promoted`).

Killed between any two steps, the identity is the old one, and `settle` finds out what became of the record.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar

import trio

from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.identity._directory import Directory
from meshkitfs.identity._identity import Identity, Pending, promoted

__all__ = ["Holder", "acting_as", "settle"]

# The key that this task asks the directory with, where it is not the identity's newest.
_acting: ContextVar[SigningKey | None] = ContextVar("acting", default=None)


class Holder:
    """The identity of an open home, as it is now. ``save`` makes a changed one durable; it may block."""

    def __init__(self, identity: Identity, save: Callable[[Identity], None]) -> None:
        self._identity = identity
        self._save = save
        self._turn = trio.Lock()
        # Hears whether another device has given the identity new keys; made by whoever knows of devices.
        self.catch_up: Callable[[], Awaitable[None]] | None = None

    @property
    def identity(self) -> Identity:
        return self._identity

    def request_key(self) -> SigningKey:
        """Return the key to sign requests with."""
        return _acting.get() or self._identity.signing

    async def steady(self) -> None:
        """Return when no change of keys is under way here, and what another device changed is taken in.

        At once for whoever makes such a change.
        """
        if _acting.get() is None:
            async with self._turn:
                pass
            if self.catch_up is not None:
                await self.catch_up()

    async def replace(self, identity: Identity) -> None:
        """Make ``identity`` the one that is used, once it is on the disk."""
        await trio.to_thread.run_sync(self._save, identity)
        self._identity = identity

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """One change of keys at a time; others' requests that fail meanwhile wait for its end (`steady`)."""
        async with self._turn:
            yield


@contextlib.contextmanager
def acting_as(key: SigningKey) -> Iterator[None]:
    """Ask the directory with ``key`` in this task, and wait for no change of keys."""
    token = _acting.set(key)
    try:
        yield
    finally:
        _acting.reset(token)


async def settle(holder: Holder, directory: Directory) -> None:
    """Publish the pending record of ``holder``'s identity, unless it is public, and take its keys into use.

    Harmless without one. Raises ``identity_handle_taken`` if another device was faster: the pending keys are
    forgotten then, which nobody has seen. Raises what the directory raises; everything is as before then.
    """
    async with holder.changing():
        me = holder.identity
        if me.pending is None:
            return
        try:
            out = await _bring_out(me, me.pending, directory)
        except MeshkitError as error:
            if error.code not in ("identity_handle_taken", "invalid_record", "metadata_unauthorized"):
                raise
            # It was another's record that is in the way, or our own whose answer was lost.
            there = await _look(me, me.pending, directory)
            if me.pending.record in there:
                out = True
            elif there != list(me.chain)[: len(there)]:
                out = False
            else:
                raise
        if not out:
            await holder.replace(dataclasses.replace(me, pending=None))
            raise MeshkitError(
                "identity_handle_taken",
                f"another device has published the next keys of {me.handle!r}: this one has old ones now",
            )
        await holder.replace(promoted(me))


async def _bring_out(me: Identity, following: Pending, directory: Directory) -> bool:
    """See to it that the directory has the pending record; False if it has another in its place."""
    there = await _look(me, following, directory)
    if following.record in there:
        return True
    if there != list(me.chain)[: len(there)]:
        return False
    if not there:
        return True  # an identity that was never published is not published by this
    with acting_as(me.signing):
        for record in (*me.chain[len(there) :], following.record):
            await directory.publish_identity(me.handle, record)
    return True


async def _look(me: Identity, following: Pending, directory: Directory) -> list[bytes]:
    """Return the directory's chain. A service answers the newest key only, whichever of the two that is."""
    try:
        with acting_as(me.signing):
            return await directory.identity(me.handle)
    except MeshkitError as error:
        if error.code != "metadata_unauthorized" or following.signing.kid == me.signing.kid:
            raise
    with acting_as(following.signing):
        return await directory.identity(me.handle)
