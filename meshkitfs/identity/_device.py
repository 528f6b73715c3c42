"""A device's own keys, beside the identity's: device.sealed in a home directory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from meshkitfs.core.device import DeviceLetter
from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.identity._files import Sealer, load_identity
from meshkitfs.identity._identity import Identity, create_identity, open_identity

__all__ = ["DeviceKeys", "followed"]


class DeviceKeys:
    """The key pair of this home as a device, if it is one of several: an identity that owns nothing.

    It is in the directory under a name that says nothing, so that the home has a mailbox of its own, which
    it can read whatever becomes of the keys of the identity that it shares.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sealer = Sealer(path)
        self.identity: Identity | None = None

    def unlock(self, wrapping: bytes) -> None:
        """Take the keys from the file, if there is one. Raises as `load_identity`. Blocks."""
        self._sealer.unlock(wrapping)
        self.identity = load_identity(self._path, wrapping) if self._path.exists() else None

    def lock(self) -> None:
        """Forget the private keys; may be called again."""
        self._sealer.lock()
        if self.identity is not None:
            self.identity.lock()

    def keep(self, device: Identity) -> Identity:
        """Make ``device`` what this home is, durably. Raises ``identity_locked``. Blocks."""
        self._sealer(device)
        self.identity = device
        return device

    @staticmethod
    def new(now: int) -> Identity:
        """Return new keys under a name that says nothing; on no disk yet."""
        return create_identity(f"device-{os.urandom(10).hex()}", now)


def followed(me: Identity, letter: DeviceLetter) -> Identity:
    """Return the identity in a ``letter``, which must be what became of ``me``, key after key.

    Raises ``invalid_record`` if its chain does not go on from this one's, ``identity_corrupt`` if the keys in
    it are not those of the chain.
    """
    if letter.chain[: len(me.chain)] != me.chain or len(letter.chain) <= len(me.chain):
        raise MeshkitError("invalid_record", "a letter about another identity, or about what is known")
    new = open_identity(letter.identity, letter.key)
    newest = IdentityRecord.parse_self_signed(letter.chain[-1])
    if new.chain != letter.chain or (new.signing.kid, new.encryption.kid) != (newest.kid, newest.enc_kid):
        raise MeshkitError("identity_corrupt", "the keys in a letter are not those of its records")
    for mine, theirs in (
        (me.signing_keys, new.signing_keys),
        (me.encryption_keys, new.encryption_keys),
    ):
        if not {key.kid for key in mine} <= {key.kid for key in theirs}:
            raise MeshkitError("identity_corrupt", "a letter lacks keys that this identity had")
    changed = (me.signing.kid, me.encryption.kid) != (new.signing.kid, new.encryption.kid)
    return dataclasses.replace(new, pending=None, unfinished=me.unfinished or new.unfinished or changed)
