"""An identity: a name, its private keys, and the signed records by which others know them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.core import cbor, cobblestone
from meshkitfs.core.identity_record import IdentityRecord, first_record, rotate, valid_handle, verify_chain
from meshkitfs.core.keys import EncryptionKey, SigningKey, did_key, fingerprint
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

LIFETIME: Final = 2 * 365 * 86400
"""How long an identity record is valid (seconds); `renewed` extends it."""

_MAGIC: Final = b"MKID\x01"
_LABEL: Final = b"mk/identity@1"
_TYPE: Final = "mk/identity-file@1"


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Private keys of one person or service. ``chain`` holds every record made for it, oldest first.

    After `lock` only what is public is left, and what needs more raises ``identity_locked`` until `unlock`.
    Neither its repr nor its `report` shows anything secret.
    """

    handle: str
    signing: SigningKey
    encryption: EncryptionKey
    chain: tuple[bytes, ...] = dataclasses.field(repr=False)

    @property
    def record(self) -> bytes:
        """The newest signed record: what others need in order to share with this identity."""
        return self.chain[-1]

    @property
    def public(self) -> IdentityRecord:
        """The newest record, parsed."""
        return IdentityRecord.parse_self_signed(self.record)

    def lock(self) -> None:
        """Forget the private keys."""
        self.signing.lock()
        self.encryption.lock()

    def unlock(self, other: Identity) -> None:
        """Take the private keys of ``other``, which is this very identity, loaded anew.

        Raises MeshkitError ``identity_corrupt`` if it is another one.
        """
        mine = (self.handle, self.signing.public, self.encryption.public)
        if (other.handle, other.signing.public, other.encryption.public) != mine:
            raise MeshkitError("identity_corrupt", "the sealed identity is another one than before")
        self.signing.unlock(other.signing)
        self.encryption.unlock(other.encryption)


@dataclasses.dataclass(frozen=True, slots=True)
class IdentityReport:
    """What can be shown of an identity, and what is wrong with it (``problems``: sentences, empty if fine).

    ``kid`` and ``enc_kid`` are key ids in hexadecimal, times are UNIX seconds.
    """

    handle: str
    did: str
    fingerprint: str
    kid: str
    enc_kid: str
    records: int
    created: int
    valid_until: int
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The form of ``identity show --json`` and ``doctor --json``."""
        return dataclasses.asdict(self) | {"problems": list(self.problems)}


def check_handle(handle: str) -> str:
    """Return ``handle`` if it can name a person, else raise MeshkitError ``invalid_argument``."""
    if not valid_handle(handle):
        detail = f"{handle!r} is no name: 1 to 64 of a-z 0-9 . _ - @, beginning with a letter or digit"
        raise MeshkitError("invalid_argument", detail)
    return handle


def create_identity(handle: str, now: int) -> Identity:
    """Make a new identity with new random keys. Raises MeshkitError ``invalid_argument`` for a bad name."""
    check_handle(handle)
    signing, encryption = SigningKey.generate(), EncryptionKey.generate()
    record = first_record(handle, signing, encryption.public, now, LIFETIME)
    return Identity(handle, signing, encryption, (record,))


def renewed(identity: Identity, now: int) -> Identity:
    """Return ``identity`` with a new record if half of the lifetime is over, else ``identity`` itself.

    The keys stay. The caller saves and publishes the result.
    """
    old = identity.public
    if now < old.exp - LIFETIME // 2:
        return identity
    successor = dataclasses.replace(old, nbf=now, exp=now + LIFETIME, created=now)
    record = rotate(identity.record, identity.signing, successor, identity.signing)
    return dataclasses.replace(identity, chain=(*identity.chain, record))


def report(identity: Identity, now: int) -> IdentityReport:
    """Describe ``identity`` as of ``now`` without anything secret."""
    record = identity.public
    problems = []
    if now >= record.exp:
        problems.append("its record has expired: run 'meshkitfs identity publish'")
    elif now >= record.exp - LIFETIME // 4:
        problems.append("its record expires soon: run 'meshkitfs identity publish'")
    if now < record.nbf:
        problems.append("its record is not valid yet: is the clock of this device right?")
    return IdentityReport(
        handle=identity.handle,
        did=did_key(record.root),
        fingerprint=fingerprint(record.root),
        kid=record.kid.hex(),
        enc_kid=record.enc_kid.hex(),
        records=len(identity.chain),
        created=IdentityRecord.parse_self_signed(identity.chain[0]).created,
        valid_until=record.exp,
        problems=tuple(problems),
    )


def seal_identity(identity: Identity, wrapping: bytes) -> bytes:
    """Seal ``identity`` for the disk under the key vault's 32-byte secret (the key used is derived here)."""
    payload: dict[str, Any] = {
        "t": _TYPE,
        "handle": identity.handle,
        "sig": identity.signing.seed,
        "enc": identity.encryption.seed,
        "chain": list(identity.chain),
    }
    plain, key = cbor.encode(payload), _key(wrapping)
    try:
        return bytes(cobblestone.seal(key, _LABEL, plain, prefix=_MAGIC))
    finally:
        for copy in (plain, key, payload["sig"], payload["enc"]):
            wipe(copy)


def open_identity(blob: bytes, wrapping: bytes) -> Identity:
    """Open what `seal_identity` made. Raises MeshkitError ``identity_corrupt``.

    A wrong key and damage cannot be told apart, and neither is a matter of trying again: the key vault has
    checked its passphrase before.
    """
    if not blob.startswith(_MAGIC):
        raise MeshkitError("identity_corrupt", "not a sealed identity of a version known here")
    key, payload = _key(wrapping), None
    try:
        # It is read-only to keep others from changing it; the buffer behind it is ours alone.
        plain = cobblestone.open_(key, _LABEL, memoryview(blob)[len(_MAGIC) :])
        payload = cbor.decode(cast(bytearray, plain.obj), secret=True)
        return _from_payload(payload)
    except MeshkitError as error:
        if error.code not in ("invalid_envelope", "invalid_record"):
            raise
        detail = "the sealed identity is damaged, or was sealed with another key than the key vault holds"
        raise MeshkitError("identity_corrupt", detail) from None
    finally:
        wipe(key)
        for secret in (payload or {}).values() if isinstance(payload, dict) else ():
            if isinstance(secret, bytes):
                wipe(secret)


def _from_payload(payload: Any) -> Identity:
    match payload:
        case {
            "t": str() as typ,
            "handle": str() as handle,
            "sig": bytes() as sig,
            "enc": bytes() as enc,
            "chain": list() as chain,
        } if typ == _TYPE and len(payload) == 5 and len(sig) == len(enc) == 32:
            identity = Identity(handle, SigningKey.from_seed(sig), EncryptionKey.from_seed(enc), tuple(chain))
        case _:
            raise MeshkitError("invalid_record", "not the fields of an identity")
    record = verify_chain(identity.chain)
    own = (identity.handle, identity.signing.public, identity.signing.public, identity.encryption.public)
    if (record.handle, record.root, record.sig, record.enc) != own:
        raise MeshkitError("invalid_record", "keys and record of an identity do not belong together")
    return identity


def _key(wrapping: bytes) -> bytes:
    if len(wrapping) != 32:
        raise ValueError("the wrapping key has 32 bytes")
    return HKDFExpand(hashes.SHA256(), 32, _LABEL).derive(wrapping)
