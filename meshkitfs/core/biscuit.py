"""Capability tokens as Biscuits: the same chain of blocks, in a format that other programs read too.

Anybody who sees a Biscuit can append a block to it, without any key. So no block here counts unless its
holder signed it: the first is the authority block, signed by the issuer, and every other is a third-party
block, whose external signature is by the ``holder`` of the block before it and is bound to that place of
that token.

Each block says in Datalog what a `Block` has, in one spelling, and nothing else: there is nothing in a
token to evaluate, so nothing in it can run for long, and one place decides what it gives (`usable_tokens`).
Other programs may have a Biscuit authorizer evaluate it: the caveats are checks that hold there as well.

Needs the optional library ``biscuit-python``; nothing but `meshkitfs.core.capability` imports this, when
asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

from biscuit_auth import Algorithm, Biscuit, BiscuitBuilder, BlockBuilder, PrivateKey, PublicKey

from meshkitfs.core.capability import (
    BISCUIT_MAGIC,
    BISCUIT_PREFIX,
    BLOCKS_MAX,
    TOKEN_MAX,
    Block,
    Token,
    implied_rights,
)
from meshkitfs.core.fields import refuse
from meshkitfs.core.keys import SigningKey, check_ed25519_public
from meshkitfs.errors import MeshkitError

__all__ = ["BiscuitToken"]

_FIRST: Final = len(BISCUIT_MAGIC) + 32
_STATEMENTS: Final = re.compile(
    r'(?:capability\("([A-Za-z0-9._-]{1,64})", hex:([0-9a-f]{32})\);\n)?'
    r"holder\(hex:([0-9a-f]{64})\);\n"
    r"issued\(([0-9TZ:-]{20})\);\n"
    r'check if ((?:operation\("[a-z]{1,16}"\)(?: or )?){1,8});\n'
    r"(?:check if share\(hex:([0-9a-f]{32})\);\n)?"
    r"check if time\(\$time\), \$time < ([0-9TZ:-]{20});\n",
    re.ASCII,
)
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class BiscuitToken(Token):
    """A token that is a Biscuit: ``blobs`` is its bytes, ``blocks`` what each of its blocks says.

    The digest of a block is the SHA-256 of its Biscuit revocation id, which is its signature.
    """

    TEXT: ClassVar[str] = BISCUIT_PREFIX
    FORMAT: ClassVar[str] = "biscuit"

    @classmethod
    def issue(
        cls, issuer: SigningKey, *, token_id: bytes, name: str, holder: bytes, rights: Sequence[str],
        share: bytes | None, iat: int, exp: int,
    ) -> Token:  # fmt: skip
        """See `Token.issue`."""
        block = Block(token_id, 0, b"", name, holder, tuple(sorted(set(rights))), share, iat, exp)
        made = BiscuitBuilder(_statements(block)).build(_private(issuer))
        return cls.verify([bytes(made.to_bytes())], issuer.public)

    def narrow(
        self, signer: SigningKey, *, holder: bytes, rights: Sequence[str] | None = None,
        share: bytes | None = None, exp: int | None = None, iat: int,
    ) -> Token:  # fmt: skip
        """See `Token.narrow`."""
        block = self._next(signer, holder, rights, share, exp, iat)
        known = _read(self.blobs[0], self.issuer)
        with _refusing():
            signed = known.third_party_request().create_block(
                _private(signer), BlockBuilder(_statements(block))
            )
            longer = known.append_third_party(_public(signer.public), signed)
        return type(self).verify([bytes(longer.to_bytes())], self.issuer)

    @classmethod
    def verify(cls, blobs: Sequence[bytes], issuer: bytes) -> Token:
        """See `Token.verify`; ``blobs`` is the one Biscuit.

        Raises MeshkitError ``invalid_record``, too, for a block that says anything in another way, or that
        its place's holder has not signed.
        """
        if len(blobs) != 1 or not 0 < len(blobs[0]) <= TOKEN_MAX:
            raise refuse("a Biscuit that is empty or too large")
        found = _read(blobs[0], issuer)
        with _refusing():
            count, ids = found.block_count(), found.revocation_ids
            if not 0 < count <= BLOCKS_MAX or len(ids) != count:
                raise refuse("a Biscuit with no blocks, or too many")
            # Printed, a key is its algorithm and its bytes, and no key is "None".
            said = [(found.block_source(n), str(found.block_external_key(n))) for n in range(count)]
            if bytes(found.to_bytes()) != blobs[0]:
                raise refuse("a Biscuit in another encoding than it has to have")
        blocks: list[Block] = []
        for (source, signer), signature in zip(said, ids, strict=True):
            parent = blocks[-1] if blocks else None
            if signer != ("None" if parent is None else f"ed25519/{parent.holder.hex()}"):
                raise refuse("a block of a Biscuit that its holder has not signed")
            block = _block(source, parent, hashlib.sha256(bytes.fromhex(signature)).digest())
            if parent is not None:
                block.check_follows(parent)
            blocks.append(block)
        return cls(issuer, (blobs[0],), tuple(blocks))

    def to_bytes(self) -> bytes:
        """Return the token as bytes: magic, the issuer's key, the Biscuit."""
        return BISCUIT_MAGIC + self.issuer + self.blobs[0]

    @classmethod
    def from_bytes(cls, data: bytes) -> Token:
        """See `Token.from_bytes`."""
        if not data.startswith(BISCUIT_MAGIC) or len(data) <= _FIRST:
            raise refuse("not a Biscuit of a version known here")
        return cls.verify([data[_FIRST:]], data[len(BISCUIT_MAGIC) : _FIRST])


def _statements(block: Block) -> str:
    """Return what a block says, as the library prints it. Raises ``invalid_record`` for a wrong field."""
    block.payload()
    lines = [f'capability("{block.name}", hex:{block.id.hex()})'] if block.n == 0 else []
    lines += [f"holder(hex:{block.holder.hex()})", f"issued({_time(block.iat)})"]
    # All that the rights imply: an authorizer elsewhere does not know what implies what.
    rights = " or ".join(f'operation("{right}")' for right in sorted(implied_rights(block.rights)))
    lines.append(f"check if {rights}")
    if block.share is not None:
        lines.append(f"check if share(hex:{block.share.hex()})")
    lines.append(f"check if time($time), $time < {_time(block.exp)}")
    return "".join(f"{line};\n" for line in lines)


def _block(source: str, parent: Block | None, digest: bytes) -> Block:
    """Return what the statements of one block say. Raises ``invalid_record`` for any other spelling."""
    found = _STATEMENTS.fullmatch(source)
    if found is None or (found[1] is None) != (parent is not None):
        raise refuse("a block of a Biscuit that says something else than a capability token does")
    _, _, holder, iat, rights, share, exp = found.groups()
    block = Block(
        bytes.fromhex(found[2]) if parent is None else parent.id,
        0 if parent is None else parent.n + 1,
        b"" if parent is None else parent.digest,
        found[1] if parent is None else parent.name,
        bytes.fromhex(holder),
        tuple(re.findall(r'"([a-z]+)"', rights)),
        bytes.fromhex(share) if share is not None else None,
        _seconds(iat),
        _seconds(exp),
        digest=digest,
    )
    if _statements(block) != source:
        raise refuse("a block of a Biscuit in another spelling than it has to have")
    return block


def _time(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(_TIME)
    except (ValueError, OverflowError, OSError):
        raise refuse("a time that a Biscuit cannot say") from None


def _seconds(text: str) -> int:
    try:
        return int(datetime.strptime(text, _TIME).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise refuse("a time in a Biscuit that is none") from None


def _read(data: bytes, issuer: bytes) -> Biscuit:
    """Return the Biscuit whose signatures, the external ones too, hold from ``issuer`` on."""
    check_ed25519_public(issuer)
    with _refusing():
        return Biscuit.from_bytes(data, _public(issuer))


def _public(key: bytes) -> PublicKey:
    return PublicKey.from_bytes(key, Algorithm.Ed25519)


def _private(key: SigningKey) -> PrivateKey:
    # The library's `repr` of it is the key: it must stay a temporary value.
    return PrivateKey.from_bytes(key.seed, Algorithm.Ed25519)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Take whatever the library raises, also where it gives up, as a refusal, and repeat none of it."""
    try:
        yield
    except MeshkitError:
        raise
    except BaseException as error:
        # A panic of the library derives from BaseException and has no name of its own to be caught by.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise refuse("not a Biscuit, or one whose signatures do not hold") from None
        raise
