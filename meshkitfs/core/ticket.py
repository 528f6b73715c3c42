"""Invitations for somebody who has no identity yet: the ticket they are handed, and the claim they send.

A ticket is a text that the owner of a share hands over by hand. It holds a one-time secret and where to go,
and no key of any content. Whoever has it makes an identity, and sends the owner a claim: their identity
record, with the proof that they hold the secret. The owner then grants to exactly that identity. The metadata
service, which carries the claim, never has the secret, so it cannot put another identity in its place.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from meshkitfs.core import cose, hpke
from meshkitfs.core.blocks import frame, unframe
from meshkitfs.core.fields import Check, Record, blob, blob_up_to, check_fields, refuse, text, time
from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.errors import MeshkitError

__all__ = ["MAGIC", "PREFIX", "Claim", "Ticket", "link_of", "open_claim", "seal_claim"]

PREFIX: Final = "meshkit-invitation1:"
MAGIC: Final = b"MKC1\x01"
_TEXT_MAX: Final = 65536
_CLAIM_MAX: Final = 65536
_LANDING: Final = "/join"
_INFO: Final = b"mk/claim@1\0"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Ticket(Record):
    """What the newcomer is handed. Signed by the owner.

    ``seed`` is the one-time secret: an Ed25519 seed whose public half the owner keeps. ``url`` is the
    metadata service (empty: the owner uses none), ``join`` what it asks newcomers for (or empty),
    ``owner_record`` the owner's signed identity record, ``until`` when the invitation ends (UNIX seconds),
    ``name`` what the owner calls the share, ``store`` the byte store its blocks are at (JSON as in a
    configuration, with no credentials; or empty).
    """

    TYPE: ClassVar[str] = "mk/ticket@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "id": blob(16),
        "seed": blob(32),
        "url": text(1024),
        "join": text(4096),
        "owner_record": blob_up_to(16384),
        "until": time,
        "name": text(255, at_least=1),
        "store": text(8192),
    }

    id: bytes
    seed: bytes
    url: str
    join: str
    owner_record: bytes
    until: int
    name: str
    store: str = ""

    @property
    def owner(self) -> IdentityRecord:
        """The owner's identity record, parsed."""
        return IdentityRecord.parse_self_signed(self.owner_record)

    def to_text(self, signer: SigningKey) -> str:
        """Return the ticket as one line of text, signed by its owner. It is a secret."""
        return PREFIX + base64.urlsafe_b64encode(self.sign(signer)).decode().rstrip("=")

    @classmethod
    def from_text(cls, value: str) -> Ticket:
        """Return the ticket in a text, or in a link (see `link_of`); white space in it is ignored.

        Raises ``invalid_argument`` if it is no such text, ``invalid_record`` if what is in it is not valid.
        Neither repeats any of it.
        """
        place, mark, squeezed = "".join(value[: _TEXT_MAX + 1].split()).rpartition("#")
        encoded = squeezed.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        canonical = PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")
        if not raw or len(value) > _TEXT_MAX or canonical != squeezed:
            raise MeshkitError("invalid_argument", f"not an invitation ({PREFIX}...)")
        owner_record = cose.peek1(raw, cls.TYPE).get("owner_record", b"")
        owner = IdentityRecord.parse_self_signed(owner_record)
        ticket = cls.parse(raw, {owner.kid: owner.sig})
        if mark and place != ticket.url + _LANDING:
            # What a person reads in a link has to be where it leads.
            raise MeshkitError("invalid_argument", "the link names another service than the invitation in it")
        return ticket


def link_of(ticket: str, url: str) -> str:
    """Return an invitation (its text) as a link to its metadata service at ``url``.

    The secret is in the fragment, which programs that follow a link keep to themselves.
    """
    return f"{url}{_LANDING}#{ticket}"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Proof(Record):
    """Signed with the ticket's secret: this identity, to this owner."""

    TYPE: ClassVar[str] = "mk/proof@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {"id": blob(16), "record": blob(32), "to": blob(16)}

    id: bytes
    record: bytes
    to: bytes


_CLAIM_TYPE: Final = "mk/claim@1"
_CLAIM_FIELDS: Final[dict[str, Check]] = {
    "t": lambda value: value == _CLAIM_TYPE,
    "to": blob(16),
    "id": blob(16),
    "record": blob_up_to(16384),
    "proof": blob_up_to(1024),
    "sent": time,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A claim as it arrived: whose it says to be (``record``, signed blob), and for which ticket (``id``).

    ``sender`` is the record, parsed. Nothing is proved before `proved_by` says so.
    """

    id: bytes
    record: bytes = dataclasses.field(repr=False)
    proof: bytes = dataclasses.field(repr=False)
    to: bytes
    sent: int
    sender: IdentityRecord = dataclasses.field(repr=False)

    def proved_by(self, public: bytes) -> bool:
        """Whether the holder of the secret behind ``public`` (32 bytes) made this claim for this identity."""
        try:
            proof = _Proof.parse(self.proof, {kid_of(public): public})
        except MeshkitError:
            return False
        return (proof.id, proof.record, proof.to) == (self.id, cose.record_hash(self.record), self.to)


def seal_claim(signer: SigningKey, record: bytes, ticket: Ticket, now: int) -> bytes:
    """Return the claim of ``ticket`` for the identity of ``record``, signed by it and sealed to the owner."""
    owner = ticket.owner
    secret = SigningKey.from_seed(ticket.seed)
    proof = _Proof(ticket.id, cose.record_hash(record), owner.enc_kid).sign(secret)
    payload = {
        "t": _CLAIM_TYPE, "to": owner.enc_kid, "id": ticket.id, "record": record, "proof": proof, "sent": now,
    }  # fmt: skip
    check_fields(payload, _CLAIM_FIELDS, "a claim")
    signed = cose.sign1(signer, _CLAIM_TYPE, payload)
    return MAGIC + hpke.wrap(owner.enc, _INFO + owner.enc_kid, frame(signed))


def open_claim(key: EncryptionKey, sealed: bytes) -> Claim:
    """Return the claim in ``sealed``, if it is for ``key`` and signed by the identity whose record is in it.

    Raises MeshkitError ``key_unwrap_failed`` if it is not sealed to this key, else ``invalid_record``.
    """
    if not len(MAGIC) < len(sealed) <= _CLAIM_MAX or not sealed.startswith(MAGIC):
        raise refuse("not a claim of a version known here")
    try:
        signed = unframe(hpke.unwrap(key, _INFO + key.kid, sealed[len(MAGIC) :]))
    except MeshkitError as error:
        if error.code == "invalid_envelope":
            raise refuse("a claim that is not framed as it must be") from None
        raise
    sender = IdentityRecord.parse_self_signed(cose.peek1(signed, _CLAIM_TYPE).get("record", b""))
    payload: dict[str, Any]
    payload, _ = cose.verify1(signed, {sender.kid: sender.sig}, _CLAIM_TYPE)
    check_fields(payload, _CLAIM_FIELDS, "a claim")
    if payload["to"] != key.kid:
        raise refuse("a claim to somebody else")
    del payload["t"]
    return Claim(**payload, sender=sender)
