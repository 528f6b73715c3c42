"""Capability tokens of a home: those it holds, and those it has issued."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import trio

from meshkitfs.core.capability import LETTER_MAGIC, Token, issuing, open_token, seal_token
from meshkitfs.core.keys import SigningKey, kid_of
from meshkitfs.core.pinned import Pinned, valid_label
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import ContactBook, Identity
from meshkitfs.shares._own_lists import OwnLists
from meshkitfs.shares._services import Services
from meshkitfs.state import IssuedRow

__all__ = ["Tokens"]

_log = logging.getLogger(__name__)

# So many tokens are kept; what comes by mail beyond that stays in the mailbox.
_HELD_MAX: Final = 1000
# The shortest unmistakable beginning of an id.
_PREFIX: Final = 4


class Tokens:
    """``identity`` returns the unlocked identity or raises why there is none."""

    def __init__(
        self,
        services: Services,
        lists: OwnLists,
        identity: Callable[[], Identity],
        contacts: Callable[[], ContactBook],
    ) -> None:
        self._services = services
        self._lists = lists
        self._identity = identity
        self._contacts = contacts

    # -- holding -------------------------------------------------------------------------------------------

    def held(self) -> list[Token]:
        """Return the tokens that are kept here."""
        return self._services.gate.lists.tokens()

    def find(self, wanted: str) -> Token:
        """Return the one token whose id (of its last block) begins so. Raises ``capability_not_found``."""
        found = [token for token in self.held() if token.last.digest.hex().startswith(wanted)]
        if len(wanted) < _PREFIX or len(found) != 1:
            raise _not_one(wanted, len(found))
        return found[0]

    async def add(self, token: Token) -> Token:
        """Keep a verified token. Raises ``capability_denied`` if it is not for this identity."""
        if self._holder(token) is None:
            raise MeshkitError("capability_denied", "the token is another holder's")
        if len(self._services.state.conditions.tokens()) >= _HELD_MAX:
            raise MeshkitError("no_space", f"{_HELD_MAX} capability tokens are kept here already")
        add = self._services.state.conditions.add_token
        await trio.to_thread.run_sync(add, token.last.digest, token.to_bytes())
        return token

    async def remove(self, wanted: str) -> Token:
        """Forget a token; whoever made it can hand it out again. Raises ``capability_not_found``."""
        token = self.find(wanted)
        await trio.to_thread.run_sync(self._services.state.conditions.drop_token, token.last.digest)
        return token

    async def collect(self) -> int:
        """Take in the tokens that others have put into the mailbox; returns how many."""
        me, metadata = self._identity(), self._services.metadata
        taken = 0
        letters = [(key, *item) for key in me.encryption_keys for item in await metadata.letters(key.kid)]
        for key, letter_id, blob in letters:
            if not blob.startswith(LETTER_MAGIC):
                continue
            try:
                await self.add(open_token(key, blob))
            except MeshkitError as error:
                if error.code == "no_space":
                    break
                if error.code == "biscuit_not_installed":
                    _log.warning("a token in the mailbox waits there: %s", error.code)
                    continue
                # Nothing that ever becomes a token of this identity.
                _log.info("a token in the mailbox is of no use: %s", error.code)
            else:
                taken += 1
            await metadata.delete_letter(key.kid, letter_id)
        return taken

    # -- making --------------------------------------------------------------------------------------------

    def reference(self, text: str) -> str:
        """Return what a capsule says to demand a capability: one of this identity's own by name, or any.

        Raises ``invalid_argument``.
        """
        if "@" not in text:
            if not valid_label(text):
                raise MeshkitError("invalid_argument", f"'{text}' is no name for a capability")
            return Pinned(text, self._identity().signing.public).text
        try:
            return Pinned.parse(text).text
        except MeshkitError as error:
            raise MeshkitError("invalid_argument", f"'{text}': {error.detail}") from None

    async def issue(
        self, name: str, recipient: str, rights: Sequence[str], share: bytes | None, expires: int,
        *, biscuit: bool = False,
    ) -> Token:  # fmt: skip
        """Make a token for a contact or this identity itself. ``share`` is the one it is for, None for any.

        With ``biscuit`` it is one; raises ``biscuit_not_installed`` where none can be made.

        It is noted down before anybody has it, so that it can always be revoked; and there is a revocation
        list from the first token on, since without one no token is believed.
        """
        if not valid_label(name):
            raise MeshkitError("invalid_argument", f"'{name}' is no name for a capability")
        kind = issuing(biscuit)
        me, token_id = self._identity(), os.urandom(16)
        holder, _ = await self._keys(recipient)
        await self._lists.begin_revocations()
        token = kind.issue(
            me.signing, token_id=token_id, name=name, holder=holder, rights=rights, share=share,
            iat=self._lists.now, exp=expires,
        )  # fmt: skip
        row = IssuedRow(token_id, name, recipient, token.last.rights, share or b"", expires, 0)
        await trio.to_thread.run_sync(self._services.state.conditions.set_issued, row)
        return token

    async def narrow(
        self,
        wanted: str,
        recipient: str,
        rights: Sequence[str] | None,
        share: bytes | None,
        expires: int | None,
    ) -> Token:
        """Make of a token that is held here one that allows less, for a contact or this identity itself."""
        holder, _ = await self._keys(recipient)
        token = self.find(wanted)
        return token.narrow(
            self._holder(token) or self._identity().signing, holder=holder, rights=rights,
            share=share, exp=expires, iat=self._lists.now,
        )  # fmt: skip

    async def send(self, token: Token, recipient: str) -> None:
        """Put a token into the mailbox of who may use it; kept at once if that is this identity."""
        if recipient == self._identity().handle:
            await self.add(token)
            return
        _, encryption = await self._keys(recipient)
        await self._services.metadata.post_letter(kid_of(encryption), seal_token(token, encryption))

    def issued(self) -> list[IssuedRow]:
        """Return what this identity has issued."""
        return self._services.state.conditions.issued()

    async def revoke(self, wanted: str) -> IssuedRow:
        """Take back a token that was issued here, with all that was made from it.

        ``wanted`` is how its id begins. Raises ``capability_not_found``.
        """
        found = [row for row in self.issued() if len(wanted) >= _PREFIX and row.id.hex().startswith(wanted)]
        if len(found) != 1:
            raise _not_one(wanted, len(found))
        row, now = found[0], self._lists.now
        # What has run out is good for nothing anyway, and the list stays short.
        over = {other.id for other in self.issued() if other.expires <= now}
        await self._lists.change_revocations(
            lambda tokens: (*(token for token in tokens if token != row.id and token not in over), row.id)
        )
        ended = replace(row, revoked=row.revoked or now)
        await trio.to_thread.run_sync(self._services.state.conditions.set_issued, ended)
        return ended

    def _holder(self, token: Token) -> SigningKey | None:
        """Return the key of this identity, of now or before, that ``token`` is bound to."""
        keys = self._identity().signing_keys
        return next((key for key in keys if key.public == token.last.holder), None)

    async def _keys(self, recipient: str) -> tuple[bytes, bytes]:
        """Return the public signing and encryption key of a contact, or of this identity."""
        me = self._identity()
        if recipient == me.handle:
            return me.signing.public, me.encryption.public
        who = (await self._contacts().resolve(recipient, self._lists.now)).public
        return who.sig, who.enc


def _not_one(wanted: str, found: int) -> MeshkitError:
    if len(wanted) < _PREFIX:
        return MeshkitError("capability_not_found", f"say {_PREFIX} digits of its id, or more")
    how_many = f"{found} ids begin" if found else "no id begins"
    return MeshkitError("capability_not_found", f"{how_many} with '{wanted[:64]}'")
