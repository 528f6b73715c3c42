"""An identity: a name, its private keys, and the signed records by which others know them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, NamedTuple, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.core import cbor, cobblestone
from meshkitfs.core.identity_record import IdentityRecord, first_record, rotate, valid_handle, verify_chain
from meshkitfs.core.keys import EncryptionKey, SigningKey, did_key, fingerprint
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

LIFETIME: Final = 2 * 365 * 86400
"""How long an identity record is valid (seconds); it is renewed when half of that is over."""

_MAGIC: Final = b"MKID\x01"
_LABEL: Final = b"mk/identity@1"
_TYPE: Final = "mk/identity-file@1"
# With keys of before, or a rotation that is not finished.
_TYPE_2: Final = "mk/identity-file@2"


class Pending(NamedTuple):
    """The next record of an identity and its keys, stored here before anybody else can have seen it."""

    signing: SigningKey
    encryption: EncryptionKey
    record: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Private keys of one person or service. ``chain`` holds every record made for it, oldest first.

    ``old_signing`` and ``old_encryption`` are the keys it had before, oldest first. ``pending`` is a record
    that is being published and may be public or not. ``unfinished`` says that shares of its own may still be
    signed with an old key. After `lock` only what is public is left, and what needs more raises
    ``identity_locked`` until `unlock`. Neither its repr nor its `report` shows anything secret.
    """

    handle: str
    signing: SigningKey
    encryption: EncryptionKey
    chain: tuple[bytes, ...] = dataclasses.field(repr=False)
    old_signing: tuple[SigningKey, ...] = ()
    old_encryption: tuple[EncryptionKey, ...] = ()
    pending: Pending | None = dataclasses.field(default=None, repr=False)
    unfinished: bool = False

    @property
    def signing_keys(self) -> tuple[SigningKey, ...]:
        """Every signing key it has or had, the newest first."""
        return (self.signing, *reversed(self.old_signing))

    @property
    def encryption_keys(self) -> tuple[EncryptionKey, ...]:
        """Every encryption key it has or had, the newest first: what was sealed to it opens with one."""
        return (self.encryption, *reversed(self.old_encryption))

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
        for key in self._private:
            key.lock()

    def unlock(self, other: Identity) -> None:
        """Take the private keys of ``other``, which is this very identity, loaded anew.

        Raises MeshkitError ``identity_corrupt`` if it is another one.
        """
        mine, theirs = self._private, other._private
        if self.handle != other.handle or [key.kid for key in mine] != [key.kid for key in theirs]:
            raise MeshkitError("identity_corrupt", "the sealed identity is another one than before")
        for signing, loaded in zip(self._signing_keys, other._signing_keys, strict=True):
            signing.unlock(loaded)
        for encryption, opened in zip(self._encryption_keys, other._encryption_keys, strict=True):
            encryption.unlock(opened)

    @property
    def _signing_keys(self) -> tuple[SigningKey, ...]:
        # One that a pending record keeps is the same object, or a second one of the same key.
        return (*self.signing_keys, *(() if self.pending is None else (self.pending.signing,)))

    @property
    def _encryption_keys(self) -> tuple[EncryptionKey, ...]:
        return (*self.encryption_keys, *(() if self.pending is None else (self.pending.encryption,)))

    @property
    def _private(self) -> tuple[SigningKey | EncryptionKey, ...]:
        return (*self._signing_keys, *self._encryption_keys)


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


def renewal_due(identity: Identity, now: int) -> bool:
    """Return whether half of the time for which the newest record is valid is over."""
    return now >= identity.public.exp - LIFETIME // 2


def prepared(identity: Identity, now: int, *, signing: bool = False, encryption: bool = False) -> Identity:
    """Return ``identity`` with a pending record: of a new signing key, encryption key, both, or neither.

    The record is signed by the new signing key, and carries the old one's endorsement of it. The caller saves
    the result before anybody sees the record.
    """
    new_signing = SigningKey.generate() if signing else identity.signing
    new_encryption = EncryptionKey.generate() if encryption else identity.encryption
    successor = dataclasses.replace(
        identity.public,
        root=new_signing.public,
        sig=new_signing.public,
        enc=new_encryption.public,
        nbf=now,
        exp=now + LIFETIME,
        created=now,
    )
    record = rotate(identity.record, identity.signing, successor, new_signing)
    return dataclasses.replace(identity, pending=Pending(new_signing, new_encryption, record))


def promoted(identity: Identity) -> Identity:
    """Return ``identity`` with its pending record as the newest, and the keys that it replaces kept."""
    following = identity.pending
    if following is None:
        return identity
    old_signing, old_encryption = identity.old_signing, identity.old_encryption
    if following.signing.kid != identity.signing.kid:
        old_signing = (*old_signing, identity.signing)
    if following.encryption.kid != identity.encryption.kid:
        old_encryption = (*old_encryption, identity.encryption)
    changed = (old_signing, old_encryption) != (identity.old_signing, identity.old_encryption)
    return dataclasses.replace(
        identity,
        signing=following.signing,
        encryption=following.encryption,
        chain=(*identity.chain, following.record),
        old_signing=old_signing,
        old_encryption=old_encryption,
        pending=None,
        unfinished=identity.unfinished or changed,
    )


def report(identity: Identity, now: int) -> IdentityReport:
    """Describe ``identity`` as of ``now`` without anything secret."""
    record = identity.public
    problems = []
    if now >= record.exp:
        problems.append("its record has expired: run 'meshkitfs identity rotate --replace none'")
    elif now >= record.exp - LIFETIME // 4:
        problems.append("its record expires soon: run 'meshkitfs identity rotate --replace none'")
    if now < record.nbf:
        problems.append("its record is not valid yet: is the clock of this device right?")
    if identity.pending is not None or identity.unfinished:
        problems.append("a rotation of its keys is not finished: run 'meshkitfs identity rotate'")
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
    key = sealing_key(wrapping)
    try:
        return seal_identity_with(identity, key)
    finally:
        wipe(key)


def seal_identity_with(identity: Identity, key: bytes | memoryview) -> bytes:
    """Seal ``identity`` under what `sealing_key` gave."""
    payload: dict[str, Any] = {
        "t": _TYPE,
        "handle": identity.handle,
        "sig": identity.signing.seed,
        "enc": identity.encryption.seed,
        "chain": list(identity.chain),
    }
    if identity.old_signing or identity.old_encryption or identity.pending or identity.unfinished:
        following = identity.pending
        payload |= {
            "t": _TYPE_2,
            "old_sig": [key.seed for key in identity.old_signing],
            "old_enc": [key.seed for key in identity.old_encryption],
            "next": None
            if following is None
            else [following.signing.seed, following.encryption.seed, following.record],
            "unfinished": identity.unfinished,
        }
    plain, copied = cbor.encode(payload), bytes(bytearray(key))
    try:
        return bytes(cobblestone.seal(copied, _LABEL, plain, prefix=_MAGIC))
    finally:
        for copy in (plain, copied, *_secrets_in(payload)):
            wipe(copy)


def open_identity(blob: bytes, wrapping: bytes) -> Identity:
    """Open what `seal_identity` made. Raises MeshkitError ``identity_corrupt``.

    A wrong key and damage cannot be told apart, and neither is a matter of trying again: the key vault has
    checked its passphrase before.
    """
    if not blob.startswith(_MAGIC):
        raise MeshkitError("identity_corrupt", "not a sealed identity of a version known here")
    key, payload = sealing_key(wrapping), None
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
        for secret in _secrets_in(payload):
            wipe(secret)


def _secrets_in(payload: Any) -> list[bytes]:
    """Return the private keys in the payload of a sealed identity, wherever they stand."""
    if not isinstance(payload, dict):
        return []
    found = [payload.get("sig"), payload.get("enc")]
    for name in ("old_sig", "old_enc", "next"):
        listed = payload.get(name)
        found += listed if isinstance(listed, list) else []
    return [seed for seed in found if isinstance(seed, bytes) and len(seed) == 32]


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
        case {
            "t": str() as typ,
            "handle": str() as handle,
            "sig": bytes() as sig,
            "enc": bytes() as enc,
            "chain": list() as chain,
            "old_sig": list() as old_sig,
            "old_enc": list() as old_enc,
            "next": following,
            "unfinished": bool() as unfinished,
        } if typ == _TYPE_2 and len(payload) == 9 and all(map(_is_seed, (sig, enc, *old_sig, *old_enc))):
            identity = Identity(
                handle, SigningKey.from_seed(sig), EncryptionKey.from_seed(enc), tuple(chain),
                tuple(map(SigningKey.from_seed, old_sig)), tuple(map(EncryptionKey.from_seed, old_enc)),
                _pending(following), unfinished,
            )  # fmt: skip
        case _:
            raise MeshkitError("invalid_record", "not the fields of an identity")
    record = verify_chain(identity.chain)
    own = (identity.handle, identity.signing.public, identity.signing.public, identity.encryption.public)
    if (record.handle, record.root, record.sig, record.enc) != own:
        raise MeshkitError("invalid_record", "keys and record of an identity do not belong together")
    if identity.pending is not None:
        following = verify_chain([*identity.chain, identity.pending.record])
        if (following.sig, following.enc) != (
            identity.pending.signing.public,
            identity.pending.encryption.public,
        ):
            raise MeshkitError("invalid_record", "the keys of the next record are not those in it")
    return identity


def _is_seed(value: Any) -> bool:
    return type(value) is bytes and len(value) == 32


def _pending(value: Any) -> Pending | None:
    match value:
        case None:
            return None
        case [bytes() as sig, bytes() as enc, bytes() as record] if len(sig) == len(enc) == 32:
            return Pending(SigningKey.from_seed(sig), EncryptionKey.from_seed(enc), record)
    raise MeshkitError("invalid_record", "not the next record of an identity")


def sealing_key(wrapping: bytes) -> bytes:
    if len(wrapping) != 32:
        raise ValueError("the wrapping key has 32 bytes")
    return HKDFExpand(hashes.SHA256(), 32, _LABEL).derive(wrapping)
