"""The commands around vaults and capability tokens: what a grant can demand beside being valid."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from meshkitfs.core.capability import FORMATS, Token
from meshkitfs.core.durations import parse_expiry
from meshkitfs.core.keys import KID_SIZE, did_key
from meshkitfs.core.membership import VaultRecord
from meshkitfs.daemon.inviting import checked_rights
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.state import IssuedRow, OwnList

__all__ = ["Conditions"]

DEFAULT_EXPIRY: Final = "30d"


class Conditions:
    """These commands of one open home, by name in ``methods``. ``bound``: when a removal has bitten (s)."""

    def __init__(self, session: Session, bound: Callable[[], float]) -> None:
        self._session = session
        self._bound = bound
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "vault.create": self._vault_create,
            "vault.list": self._vault_list,
            "vault.show": self._vault_show,
            "vault.add": self._vault_add,
            "vault.remove": self._vault_remove,
            "vault.delete": self._vault_delete,
            "capability.issue": self._issue,
            "capability.narrow": self._narrow,
            "capability.list": self._list,
            "capability.inspect": self._inspect,
            "capability.add": self._add,
            "capability.remove": self._remove,
            "capability.revoke": self._revoke,
        }

    # -- vaults ----------------------------------------------------------------------------------------------

    async def _vault_create(self, name: str) -> dict[str, Any]:
        return self._vault(await self._session.vaults.create(name))

    async def _vault_list(self) -> dict[str, Any]:
        return {"vaults": [self._vault(row) for row in self._session.vaults.list()]}

    async def _vault_show(self, name: str) -> dict[str, Any]:
        return self._vault(self._session.vaults.find(name))

    async def _vault_add(self, name: str, member: str) -> dict[str, Any]:
        return self._vault(await self._session.vaults.add(name, member))

    async def _vault_remove(self, name: str, member: str) -> dict[str, Any]:
        row = await self._session.vaults.remove(name, member)
        return self._vault(row) | {"removed": member, "bound_seconds": self._bound()}

    async def _vault_delete(self, name: str) -> dict[str, Any]:
        await self._session.vaults.delete(name)
        return {"name": name, "bound_seconds": self._bound()}

    def _vault(self, row: OwnList) -> dict[str, Any]:
        record = VaultRecord.parse_owned(row.record)
        return {
            "name": row.name,
            "id": row.list_id.hex(),
            "vault": self._session.vaults.pinned(row).text,
            "seq": record.seq,
            "valid_until": record.exp,
            "members": sorted(
                row.handles.get(member.hex(), member[:KID_SIZE].hex()) for member in record.members
            ),
        }

    # -- capabilities ----------------------------------------------------------------------------------------

    async def _issue(
        self, name: str, recipient: str, rights: list[str] | None = None, expires: str = DEFAULT_EXPIRY,
        share: str | None = None, send: bool = True, format: str = Token.FORMAT,  # noqa: A002 - as on the wire
    ) -> dict[str, Any]:  # fmt: skip
        tokens, names = self._session.tokens, checked_rights(rights or ["read"])
        if format not in FORMATS:
            raise MeshkitError("invalid_argument", f"the format of a token is {' or '.join(FORMATS)}")
        until = parse_expiry(expires, int(time.time()))
        made = await tokens.issue(
            name, recipient, names, self._share_id(share), until, biscuit=format != Token.FORMAT
        )
        return await self._handed_over(made, recipient, send)

    async def _narrow(
        self, capability: str, recipient: str, rights: list[str] | None = None, expires: str | None = None,
        share: str | None = None, send: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        names = checked_rights(rights) if rights else None
        until = parse_expiry(expires, int(time.time())) if expires else None
        tokens = self._session.tokens
        made = await tokens.narrow(capability, recipient, names, self._share_id(share), until)
        return await self._handed_over(made, recipient, send)

    async def _handed_over(self, token: Token, recipient: str, send: bool) -> dict[str, Any]:
        if not send:
            return _token(token) | {"recipient": recipient, "text": token.to_text()}
        await self._session.tokens.send(token, recipient)
        self._reconsider()
        return _token(token) | {"recipient": recipient}

    async def _list(self) -> dict[str, Any]:
        taken = await self._collect()
        tokens = self._session.tokens
        return {
            "held": [_token(token) for token in tokens.held()],
            "issued": [_issued(row) for row in tokens.issued()],
            "received": taken,
        }

    async def _inspect(self, capability: str | None = None, text: str | None = None) -> dict[str, Any]:
        if (capability is None) == (text is None):
            raise MeshkitError("invalid_argument", "the id of a token that is held here, or the token itself")
        tokens = self._session.tokens
        token = tokens.find(capability) if capability is not None else Token.from_text(text or "")
        mine = {key.public for key in self._session.identity.signing_keys}
        steps = [
            {
                "rights": list(block.rights),
                "share": block.share.hex() if block.share is not None else None,
                "expires": block.exp,
                "made": block.iat,
                "holder": did_key(block.holder),
            }
            for block in token.blocks
        ]
        return _token(token) | {"mine": token.last.holder in mine, "chain": steps}

    async def _add(self, text: str) -> dict[str, Any]:
        made = await self._session.tokens.add(Token.from_text(text))
        self._reconsider()
        return _token(made)

    async def _remove(self, capability: str) -> dict[str, Any]:
        gone = await self._session.tokens.remove(capability)
        self._reconsider()
        return _token(gone)

    async def _revoke(self, token: str) -> dict[str, Any]:
        row = await self._session.tokens.revoke(token)
        self._reconsider()
        return _issued(row) | {"bound_seconds": self._bound()}

    async def _collect(self) -> int:
        taken = await self._session.tokens.collect()
        if taken:
            self._reconsider()
        return taken

    def _reconsider(self) -> None:
        for share in self._session.book.shares.values():
            share.reconsider()

    def _share_id(self, name: str | None) -> bytes | None:
        return self._session.book.find(name).row.share if name is not None else None


def _token(token: Token) -> dict[str, Any]:
    """Describe a token: what it allows and to whom, never the token itself."""
    last = token.last
    return {
        "id": last.digest.hex()[:8],
        "token": token.id.hex()[:8],
        "name": token.name,
        "issuer": did_key(token.issuer),
        "holder": did_key(last.holder),
        "rights": sorted(token.rights),
        "share": last.share.hex() if last.share is not None else None,
        "expires": last.exp,
        "blocks": len(token.blocks),
        "format": token.FORMAT,
    }


def _issued(row: IssuedRow) -> dict[str, Any]:
    return {
        "token": row.id.hex()[:8],
        "name": row.name,
        "recipient": row.handle,
        "rights": list(row.rights),
        "share": row.share.hex() or None,
        "expires": row.expires,
        "revoked": row.revoked or None,
    }
