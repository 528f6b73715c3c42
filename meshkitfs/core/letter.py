"""Letters: an invitation, signed by the sender and then sealed to one recipient's encryption key.

The metadata service sees who a letter is for and its padded length; who sent it and what is offered is
inside. The recipient's kid stands in the signed part (and in the capsule), so that a letter cannot be passed
on to a third person as if it were meant for them. The capsule inside is not unwrapped here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from meshkitfs.core import cose, hpke
from meshkitfs.core.blocks import frame, unframe
from meshkitfs.core.capsule import Capsule
from meshkitfs.core.entries import DIR, FILE, valid_name
from meshkitfs.core.fields import TIME_MAX, Check, blob, blob_up_to, check_fields, refuse, time, uint
from meshkitfs.core.fields import text as text_field
from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.errors import MeshkitError

__all__ = ["LETTER_MAX", "MAGIC", "Letter", "open_letter", "seal_letter"]

MAGIC: Final = b"MKL1\x01"
LETTER_MAX: Final = 65536
TYPE: Final = "mk/letter@1"
_INFO: Final = b"mk/letter@1\0"


def _signed_time(value: Any) -> bool:
    return type(value) is int and abs(value) <= TIME_MAX


_FIELDS: Final[dict[str, Check]] = {
    "t": lambda value: value == TYPE,
    "to": blob(16),
    "capsule": blob_up_to(16384),
    "owner_record": blob_up_to(16384),
    "name": valid_name,
    "kind": uint(DIR, FILE),
    "mode": uint(0, 0o7777),
    "mtime": _signed_time,
    "size": uint(),
    "note": text_field(4096),
    "sent": time,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Letter:
    """An invitation: a capsule and the sender's identity record (both signed blobs), and a description.

    ``name`` is what the sender calls it (bytes, a valid file name), ``kind`` DIR or FILE, ``mode``, ``mtime``
    (seconds) and ``size`` describe a single file, ``note`` is free text, ``sent`` UNIX seconds. ``sender``
    and ``offer`` are the parsed record and capsule, set by `open_letter`.
    """

    capsule: bytes = dataclasses.field(repr=False)
    owner_record: bytes = dataclasses.field(repr=False)
    name: bytes = dataclasses.field(repr=False)
    kind: int
    mode: int
    mtime: int
    size: int
    note: str = dataclasses.field(repr=False)
    sent: int
    sender: IdentityRecord | None = dataclasses.field(default=None, compare=False, repr=False)
    offer: Capsule | None = dataclasses.field(default=None, compare=False, repr=False)


def seal_letter(signer: SigningKey, letter: Letter, recipient_public: bytes) -> bytes:
    """Return ``letter`` signed by ``signer`` (the capsule's owner) and sealed to an X-Wing public key.

    Raises MeshkitError ``invalid_record`` for a field that breaks a rule or an unusable recipient key.
    """
    to = kid_of(recipient_public)
    payload = {name: getattr(letter, name) for name in _FIELDS if name not in ("t", "to")}
    payload |= {"t": TYPE, "to": to}
    check_fields(payload, _FIELDS, "a letter")
    sealed = hpke.wrap(recipient_public, _INFO + to, frame(cose.sign1(signer, TYPE, payload)))
    return MAGIC + sealed


def open_letter(key: EncryptionKey, blob: bytes) -> Letter:
    """Return the letter in ``blob``, if it is for ``key`` and everything in it comes from one sender.

    Raises MeshkitError ``key_unwrap_failed`` if it is not sealed to this key, ``invalid_record`` if its
    signature, its identity record or its capsule is not valid, or the three are not of the same person.
    """
    if not len(MAGIC) < len(blob) <= LETTER_MAX or blob[:5] != MAGIC:
        raise refuse("not a letter of a version known here")
    try:
        signed = unframe(hpke.unwrap(key, _INFO + key.kid, blob[5:]))
    except MeshkitError as error:
        if error.code == "invalid_envelope":
            raise refuse("a letter that is not framed as it must be") from None
        raise
    sender = IdentityRecord.parse_self_signed(cose.peek1(signed, TYPE).get("owner_record", b""))
    keys = {sender.kid: sender.sig}
    payload, _ = cose.verify1(signed, keys, TYPE)
    check_fields(payload, _FIELDS, "a letter")
    if payload.pop("to") != key.kid:
        raise refuse("a letter to somebody else")
    del payload["t"]
    offer = Capsule.parse(payload["capsule"], keys)
    if offer.to != key.kid:
        raise refuse("a letter with somebody else's capsule")
    if offer.kind != payload["kind"]:
        raise refuse("a letter that describes another kind of thing than it offers")
    return Letter(**payload, sender=sender, offer=offer)
