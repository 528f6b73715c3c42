"""A client that skips every check of its own: what somebody who kept all their bytes can read.

It takes a member's real home for its keys, and works with what was kept: capsules, a head, blocks. It looks at no
roster, no timestamp, no date and no policy. What it cannot do is what the cryptography does not let it.
"""

from __future__ import annotations

import os

import httpx
import second_reader

from meshkitfs import keyvault
from meshkitfs.core import _unwrap
from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Capsule
from meshkitfs.identity import load_identity
from meshkitfs.metadata._wire import b64, from_b64
from meshkitfs.net import SignatureAuth

__all__ = ["HackedClient", "Refused"]


class Refused(Exception):
    """The release service did not give the other half; the text is its answer."""


class HackedClient:
    """``home`` is the directory of a home whose key vault is a plain file; ``clock`` dates its requests."""

    def __init__(self, home, clock):
        secret = keyvault.open_vault("plain-file", home).load()
        self.identity = load_identity(home / "identity.sealed", secret)
        self._clock = clock

    def ask(self, capsule, tokens=(), nonce=None):
        """Have the other half released by the service that the capsule names; ``tokens`` are bytes."""
        nonce = nonce or os.urandom(16)
        reply = httpx.post(
            f"{capsule.rel['url']}/v1/shares/{capsule.share.hex()}/release",
            json={
                "capsule": b64(capsule.id),
                "epoch": capsule.epoch,
                "nonce": b64(nonce),
                "tokens": [b64(token) for token in tokens],
            },
            auth=SignatureAuth(lambda: self.identity.signing, self._clock),
            timeout=60,
        )
        if reply.status_code != 200:
            raise Refused(reply.text)
        record = from_b64(reply.json()["record"], "record")
        return _unwrap.open_release(record, capsule, capsule.digest, nonce, self.identity.encryption)[0]

    def key(self, blob, owner, half=None):
        """The key in a capsule: with ``half``, or with one that is asked for, if there must be one."""
        capsule = Capsule.parse(blob, {kid_of(owner): owner})
        if capsule.rel is not None and half is None:
            half = self.ask(capsule)
        return _unwrap.open_capsule(capsule, self.identity.encryption, half or b"")

    def read(self, blob, owner, head, blocks, half=None):
        """Every file that the key opens, by path. ``blocks`` is a directory of blocks, or a copy of one."""
        key = self.key(blob, owner, half)
        stored = {}
        for path in blocks.rglob("bafkrei*"):
            data = path.read_bytes()
            stored[second_reader.sha256(data)] = data
        writers = [owner, self.identity.signing.public]
        found = second_reader.read_share(owner, key, head, stored.__getitem__, writers)
        return {os.fsdecode(path): bytes(content) for path, _, content in found if content is not None}
