"""Capability tokens: a chain of signed blocks that can be narrowed and passed on without asking the issuer.

The issuer signs the first block and names its holder's key in it; each holder can add a block, signed with
that key, which names the next holder (who may be themselves) and can only take away. The same chain can be
a Biscuit (`meshkitfs.core.biscuit`). A token is of no use to anybody but the holder that its last block
names: to use it, one has to hold that private key. It holds no secret; who sees a token learns what it
allows, not how to use it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final

from meshkitfs.core import hpke
from meshkitfs.core.blocks import frame, unframe
from meshkitfs.core.capsule import RIGHTS
from meshkitfs.core.fields import (
    Check,
    Record,
    array,
    blob,
    check_fields,
    choice,
    nullable,
    public_key,
    refuse,
    time,
    uint,
)
from meshkitfs.core.keys import EncryptionKey, SigningKey, kid_of
from meshkitfs.core.membership import Revocations
from meshkitfs.core.pinned import Pinned, valid_label
from meshkitfs.errors import MeshkitError

__all__ = [
    "BISCUIT_MAGIC",
    "BISCUIT_PREFIX",
    "BLOCKS_MAX",
    "FORMATS",
    "LETTER_MAGIC",
    "PREFIX",
    "TOKEN_MAX",
    "Block",
    "Token",
    "check_token",
    "implied_rights",
    "issuing",
    "open_token",
    "seal_token",
    "usable_tokens",
]

PREFIX: Final = "meshkit-capability1:"
BLOCKS_MAX: Final = 16
_MAGIC: Final = b"MKT1\x01"
# The same token as a Biscuit; see `meshkitfs.core.biscuit`.
BISCUIT_PREFIX: Final = "meshkit-biscuit1:"
BISCUIT_MAGIC: Final = b"MKB1\x01"
FORMATS: Final = ("cose", "biscuit")
# A token in a mailbox, sealed to the one who may use it.
LETTER_MAGIC: Final = b"MKV1\x01"
_INFO: Final = b"mk/capability@1\0"
_BLOCK_MAX: Final = 4096
TOKEN_MAX: Final = len(_MAGIC) + BLOCKS_MAX * (2 + _BLOCK_MAX)
_SKEW_S: Final = 60

# What each right lets an identity do: reading implies listing, writing implies both.
_IMPLIED: Final[Mapping[str, frozenset[str]]] = {
    "list": frozenset({"list"}),
    "read": frozenset({"read", "list"}),
    "write": frozenset({"read", "list", "write"}),
    "reshare": frozenset({"reshare"}),
}


def implied_rights(rights: Sequence[str]) -> frozenset[str]:
    """Return everything that ``rights`` let an identity do."""
    return frozenset().union(*(_IMPLIED.get(right, frozenset()) for right in rights))


def _label(value: Any) -> bool:
    return type(value) is str and valid_label(value)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Block(Record):
    """One block. ``id`` and ``name`` are the same in all blocks of a token, ``n`` counts from 0.

    ``prev`` is the record hash of the block before (b"" in the first), ``holder`` the Ed25519 public key of
    who holds the token from here on. The caveats: ``rights`` (sorted), ``share`` (16 bytes, or None for any
    share that asks for this capability), ``exp`` (UNIX seconds, from when it is good for nothing).
    """

    TYPE: ClassVar[str] = "mk/capability@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "id": blob(16),
        "n": uint(0, BLOCKS_MAX - 1),
        "prev": blob(0, 32),
        "name": _label,
        "holder": public_key,
        "rights": array(choice(*RIGHTS), len(RIGHTS)),
        "share": nullable(blob(16)),
        "iat": time,
        "exp": time,
    }

    id: bytes
    n: int
    prev: bytes
    name: str
    holder: bytes
    rights: tuple[str, ...]
    share: bytes | None
    iat: int
    exp: int

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if (value["n"] == 0) != (value["prev"] == b""):
            raise refuse("only the first block has no predecessor")
        if value["iat"] >= value["exp"]:
            raise refuse("a capability that ends before it begins")
        if not value["rights"] or list(value["rights"]) != sorted(value["rights"]):
            raise refuse("rights out of order, or none")

    def check_follows(self, parent: Block) -> None:
        """Raise ``invalid_record`` unless this is the next block after ``parent``, and allows no more."""
        if self.prev != parent.digest or (self.id, self.name) != (parent.id, parent.name):
            raise refuse("a block that does not follow the one before it")
        if not self.narrows(parent):
            raise refuse("a block that allows more than the one before it")

    def narrows(self, parent: Block) -> bool:
        """Whether this block allows nothing that ``parent`` does not."""
        return (
            implied_rights(self.rights) <= implied_rights(parent.rights)
            and self.exp <= parent.exp
            and (parent.share is None or self.share == parent.share)
        )


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A token whose chain was verified from ``issuer`` (a public key) on; ``blobs`` are its signed blocks."""

    # How its text begins.
    TEXT: ClassVar[str] = PREFIX
    FORMAT: ClassVar[str] = "cose"

    issuer: bytes
    blobs: tuple[bytes, ...]
    blocks: tuple[Block, ...]

    def __repr__(self) -> str:
        return f"Token(id={self.id.hex()}, blocks={len(self.blocks)})"

    @property
    def id(self) -> bytes:
        return self.blocks[0].id

    @property
    def name(self) -> str:
        return self.blocks[0].name

    @property
    def last(self) -> Block:
        """The block with what is left of it, and who holds it."""
        return self.blocks[-1]

    @property
    def pinned(self) -> Pinned:
        """How a capsule asks for it."""
        return Pinned(self.name, self.issuer)

    @property
    def rights(self) -> frozenset[str]:
        """Everything that it lets its holder do."""
        return frozenset.intersection(*(implied_rights(block.rights) for block in self.blocks))

    @classmethod
    def issue(
        cls, issuer: SigningKey, *, token_id: bytes, name: str, holder: bytes, rights: Sequence[str],
        share: bytes | None, iat: int, exp: int,
    ) -> Token:  # fmt: skip
        """Return a new token. Raises MeshkitError ``invalid_record`` for a field that breaks a rule."""
        block = Block(token_id, 0, b"", name, holder, tuple(sorted(set(rights))), share, iat, exp)
        return cls.verify([block.sign(issuer)], issuer.public)

    def narrow(
        self, signer: SigningKey, *, holder: bytes, rights: Sequence[str] | None = None,
        share: bytes | None = None, exp: int | None = None, iat: int,
    ) -> Token:  # fmt: skip
        """Return this token with one more block, for ``holder``; what is not given stays as it is.

        Raises MeshkitError ``capability_denied`` if ``signer`` does not hold it, if it would allow more than
        this one, or if there are `BLOCKS_MAX` blocks already.
        """
        block = self._next(signer, holder, rights, share, exp, iat)
        return type(self).verify([*self.blobs, block.sign(signer)], self.issuer)

    def _next(
        self, signer: SigningKey, holder: bytes, rights: Sequence[str] | None, share: bytes | None,
        exp: int | None, iat: int,
    ) -> Block:  # fmt: skip
        """Return the block that `narrow` adds, if it may."""
        last = self.last
        if signer.public != last.holder:
            raise MeshkitError("capability_denied", "only its holder can narrow it or pass it on")
        if len(self.blocks) >= BLOCKS_MAX:
            raise MeshkitError("capability_denied", f"it has {BLOCKS_MAX} blocks already")
        block = Block(
            self.id, last.n + 1, last.digest, self.name, holder,
            last.rights if rights is None else tuple(sorted(set(rights))),
            last.share if share is None else share, iat, last.exp if exp is None else exp,
        )  # fmt: skip
        if not block.narrows(last):
            raise MeshkitError("capability_denied", "a token can only be narrowed, never widened")
        return block

    @classmethod
    def verify(cls, blobs: Sequence[bytes], issuer: bytes) -> Token:
        """Return the token in these signed blocks, if the chain holds from ``issuer`` to its last holder.

        Raises MeshkitError ``invalid_record``: a block that its place's key did not sign, that is missing,
        out of order, of another token, or that allows more than the one before it.
        """
        if not 0 < len(blobs) <= BLOCKS_MAX or any(len(signed) > _BLOCK_MAX for signed in blobs):
            raise refuse("a token with no blocks, too many, or one too large")
        blocks: list[Block] = []
        signer = issuer
        for number, signed in enumerate(blobs):
            block = Block.parse(signed, {kid_of(signer): signer})
            if block.n != number:
                raise refuse("blocks of a token out of order")
            if blocks:
                block.check_follows(blocks[-1])
            blocks.append(block)
            signer = block.holder
        return cls(issuer, tuple(blobs), tuple(blocks))

    # -- its form ----------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Return the token as bytes: magic, the issuer's key, then each block behind its length."""
        parts = [len(signed).to_bytes(2, "big") + signed for signed in self.blobs]
        return _MAGIC + self.issuer + b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Token:
        """Return the token in ``data``, its chain verified from the issuer that it names itself.

        Whether that issuer is the right one is for `check_token`. Raises MeshkitError ``invalid_record``, and
        ``biscuit_not_installed`` for a Biscuit where nothing can read one.
        """
        if data.startswith(BISCUIT_MAGIC):
            return _biscuits().from_bytes(data)
        if not len(_MAGIC) + 32 < len(data) <= TOKEN_MAX + 32 or not data.startswith(_MAGIC):
            raise refuse("not a capability token of a version known here")
        at = len(_MAGIC) + 32
        issuer, blobs = data[len(_MAGIC) : at], []
        while at < len(data):
            size = int.from_bytes(data[at : at + 2], "big")
            blobs.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        if at != len(data):
            raise refuse("a capability token that is cut off")
        return cls.verify(blobs, issuer)

    def to_text(self) -> str:
        """Return the token as one line of text."""
        return self.TEXT + base64.urlsafe_b64encode(self.to_bytes()).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> Token:
        """Return the token in a text; white space in it is ignored.

        Raises ``invalid_argument`` if it is no such text, ``invalid_record`` as `from_bytes`. Neither repeats
        any of it.
        """
        squeezed = "".join(text[: 2 * TOKEN_MAX].split())
        kind, colon, encoded = squeezed.partition(":")
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raw = b""
        if (
            kind + colon not in (PREFIX, BISCUIT_PREFIX)
            or base64.urlsafe_b64encode(raw).decode().rstrip("=") != encoded
        ):
            raise MeshkitError("invalid_argument", "that is not the text of a capability token")
        if (kind + colon == BISCUIT_PREFIX) != raw.startswith(BISCUIT_MAGIC):
            raise MeshkitError("invalid_argument", "a capability token of another kind than its text says")
        return cls.from_bytes(raw)


def issuing(biscuit: bool) -> type[Token]:
    """Return the class that issues tokens: as Biscuits, or in the format of this module.

    Raises MeshkitError ``biscuit_not_installed``.
    """
    return _biscuits() if biscuit else Token


def _biscuits() -> type[Token]:
    """Return the class of tokens that are Biscuits, which needs an optional library."""
    try:
        from meshkitfs.core.biscuit import BiscuitToken
    except ImportError:
        raise MeshkitError("biscuit_not_installed") from None
    return BiscuitToken


def check_token(
    token: Token, *, asked: Pinned, holder: bytes, share: bytes, revoked: Revocations, now: int
) -> int:
    """Return until when ``token`` (verified) gives ``holder`` what a capsule of ``share`` asks for.

    ``asked`` is the capsule's capability, ``holder`` the signing key of who wants to use it and has proved to
    have it, ``revoked`` the issuer's newest revocation list (`newest_revocations`), ``now`` UNIX seconds.
    Raises MeshkitError ``capability_denied``. What it allows is `Token.rights`.
    """
    if token.pinned != asked:
        raise MeshkitError("capability_denied", "the token is of another name or issuer than is asked for")
    if revoked.owner != token.issuer:
        raise MeshkitError("capability_denied", "the revocation list is another issuer's")
    last = token.last
    if last.holder != holder:
        raise MeshkitError("capability_denied", "the token is another holder's")
    if last.share is not None and last.share != share:
        raise MeshkitError("capability_denied", "the token is for another share")
    if token.id in revoked.tokens:
        raise MeshkitError("capability_denied", f"token {token.id.hex()[:8]} was revoked by its issuer")
    if now >= last.exp:
        raise MeshkitError("capability_denied", f"token {token.id.hex()[:8]} ran out {now - last.exp} s ago")
    if any(block.iat > now + _SKEW_S for block in token.blocks):
        raise MeshkitError("capability_denied", f"token {token.id.hex()[:8]} is from the future")
    return last.exp


def usable_tokens(
    tokens: Iterable[Token], *, asked: Pinned, holders: Sequence[bytes], share: bytes, revoked: Revocations,
    now: int,
) -> tuple[list[Token], list[MeshkitError]]:  # fmt: skip
    """Return those of ``tokens`` that `check_token` passes, and why each of the others does not.

    ``holders`` are the signing keys of who wants to use them, of now first and then of before.
    """
    good: list[Token] = []
    refused: list[MeshkitError] = []
    for token in tokens:
        holder = token.last.holder if token.last.holder in holders else holders[0]
        try:
            check_token(token, asked=asked, holder=holder, share=share, revoked=revoked, now=now)
        except MeshkitError as error:
            refused.append(error)
        else:
            good.append(token)
    return good, refused


def seal_token(token: Token, recipient_public: bytes) -> bytes:
    """Return ``token`` sealed to an X-Wing public key, to be put into a mailbox."""
    info = _INFO + kid_of(recipient_public)
    return LETTER_MAGIC + hpke.wrap(recipient_public, info, frame(token.to_bytes()))


def open_token(key: EncryptionKey, blob: bytes) -> Token:
    """Return the token in a sealed ``blob``, its chain verified.

    Raises MeshkitError ``key_unwrap_failed`` if it is not sealed to this key, ``invalid_record`` as
    `Token.from_bytes`.
    """
    if not blob.startswith(LETTER_MAGIC):
        raise refuse("not a sealed token of a version known here")
    try:
        data = unframe(hpke.unwrap(key, _INFO + key.kid, blob[len(LETTER_MAGIC) :]))
    except MeshkitError as error:
        if error.code == "invalid_envelope":
            raise refuse("a sealed token that is not framed as it must be") from None
        raise
    return Token.from_bytes(data)
