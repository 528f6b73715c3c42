"""A metadata service as the contract tests see it: one home, whoever acts.

A service asks who somebody is, and the contract's tests act as owners, writers, recipients and strangers with
keys of their own. `Everybody` sends each call as the person it has to come from: a share's calls as its owner,
a mailbox's as whoever has its key, a record's as the one it is of. Each of them joins at their first call.
"""

from __future__ import annotations

import contextlib
import math

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.identity_record import IdentityRecord, first_record
from meshkitfs.core.keys import EncryptionKey, SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import HttpMetadata
from meshkitfs.metadata import _feed as feed

LIFETIME_S = 10 * 365 * 86400


def believe_silence(monkeypatch):
    """From now on, a client's number moves because the change feed names a share; never because time passes."""
    for name in ("TRUST_S", "STEP_S", "RECHECK_S"):
        monkeypatch.setattr(feed, name, math.inf)


class MemoryPin:
    """A key pin that lives as long as the test."""

    def __init__(self):
        self.key = None

    def get(self):
        return self.key

    def set(self, key):
        self.key = key


class Everybody:
    """``nursery`` runs the change feeds; ``options`` are those of `HttpMetadata`."""

    stranger_code = "metadata_unauthorized"

    def __init__(self, nursery, url, now, **options):
        self._nursery, self._url, self._now, self._options = nursery, url, now, options
        self.pin = MemoryPin()
        self.owners: dict[bytes, SigningKey] = {}  # by share
        self.boxes: dict[bytes, EncryptionKey] = {}  # by kid
        self.keys: dict[bytes, SigningKey] = {}  # by kid
        self._clients: dict[bytes, HttpMetadata] = {}
        self._default = SigningKey.generate()
        self._chains: dict[str, list[bytes]] = {}
        self._published: set[bytes] = set()
        self._scopes: list[trio.CancelScope] = []

    def client(self, signing, mailbox=None):
        """A client that has not joined."""
        return HttpMetadata(self._url, lambda: signing, self.pin, mailbox=mailbox, **self._options)

    async def joined(self, signing, encryption=None):
        """The client of whoever has this key, who joins at the first call; its feed runs and is live."""
        known = self._clients.get(signing.kid)
        if known is None:
            encryption = encryption or EncryptionKey.generate()
            known = self._clients[signing.kid] = self.client(signing, encryption.kid)
            handle = f"p{signing.kid.hex()[:20]}"
            record = first_record(handle, signing, encryption.public, int(self._now()), LIFETIME_S)
            await known.publish_identity(handle, record)
            self._nursery.start_soon(self._follow, known)
            await known.feed.heard.wait()
        return known

    async def _follow(self, client):
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            await client.run()

    async def _of_share(self, share, kid=None):
        """The owner; for a share that is not there, whoever asks about a kid of theirs."""
        if kid in self.boxes and share not in self._published:
            return await self._holder(self.boxes[kid])
        return await self.joined(self.owners.get(share, self._default))

    async def _of_box(self, kid):
        key = self.boxes.get(kid)
        return await (self.joined(self._default) if key is None else self._holder(key))

    async def _holder(self, key):
        signing = self.keys.setdefault(b"box" + key.kid, SigningKey.generate())
        return await self.joined(signing, key)

    async def service_key(self):
        return await (await self.joined(self._default)).service_key()

    async def share_state(self, share, kid):
        return await (await self._of_share(share, kid)).share_state(share, kid)

    async def capsules(self, share, kid):
        return await (await self._of_share(share, kid)).capsules(share, kid)

    async def roster(self, share):
        return await (await self._of_share(share)).roster(share)

    async def timestamp(self, share):
        return await (await self._of_share(share)).timestamp(share)

    async def head(self, share):
        return await (await self._of_share(share)).head(share)

    async def heads(self, share, after_ver, upto_ver):
        return await (await self._of_share(share)).heads(share, after_ver, upto_ver)

    async def retention(self, share):
        return await (await self._of_share(share)).retention(share)

    async def retain(self, share, record):
        await (await self._of_share(share)).retain(share, record)

    async def publish(self, publication):
        await (await self._of_share(publication.share)).publish(publication)
        self._published.add(publication.share)

    async def post_letter(self, to_kid, blob):
        await self._of_box(to_kid)  # a mailbox is somebody's
        return await (await self.joined(self._default)).post_letter(to_kid, blob)

    async def letters(self, kid):
        return await (await self._of_box(kid)).letters(kid)

    async def delete_letter(self, kid, letter_id):
        await (await self._of_box(kid)).delete_letter(kid, letter_id)

    async def publish_identity(self, handle, record):
        """As the one whose chain it belongs to; else as whoever the record is of, joined or not."""
        chain, signing, kid = self._chains.setdefault(handle, []), None, b""
        with contextlib.suppress(MeshkitError):
            parsed = IdentityRecord.parse_self_signed(record)
            kid = parsed.kid
            if record in chain or (chain and parsed.prev == record_hash(chain[-1])):
                kid = IdentityRecord.parse_self_signed(chain[-1]).kid
        signing = self.keys.get(kid)
        client = await self.joined(self._default) if signing is None else self.client(signing)
        await client.publish_identity(handle, record)
        if record not in chain:
            chain.append(record)

    async def identity(self, handle):
        return await (await self.joined(self._default)).identity(handle)

    async def identity_by_kid(self, kid):
        return await (await self.joined(self._default)).identity_by_kid(kid)

    async def _of_list(self, list_id):
        return await self.joined(self.owners.get(list_id, self._default))

    async def access_list(self, list_id):
        return await (await self._of_list(list_id)).access_list(list_id)

    async def put_access_list(self, list_id, expect, record, readers):
        await (await self._of_list(list_id)).put_access_list(list_id, expect, record, readers)

    async def delete_access_list(self, list_id):
        await (await self._of_list(list_id)).delete_access_list(list_id)

    def tick(self, share=None, also=()):
        return sum(client.tick() for client in self._clients.values())

    def close(self):
        for client in self._clients.values():
            client.close()

    async def aclose(self):
        for scope in self._scopes:
            scope.cancel()
        await trio.lowlevel.checkpoint()
        for client in self._clients.values():
            await client.aclose()
