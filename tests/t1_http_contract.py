"""The contract of every metadata home, kept by the HTTP client and the service together, on both databases."""

import os
import time
from functools import partial

import pytest
import t1_metadata_contract as contract
from devices import World
from inner_service import InnerService
from service_home import Everybody

from meshkitfs.core.keys import EncryptionKey
from meshkitfs.metadata import EmbeddedMetadata
from meshkitfs.metadata.postgres import PostgresMetadata

share = contract.share
old_share = contract.old_share

# Everything that stands before what is particular to the embedded home.
_END = contract.test_open_never_makes_a_file.__code__.co_firstlineno
EVERY_HOME = {
    name: test
    for name, test in vars(contract).items()
    if name.startswith("test_") and test.__code__.co_firstlineno < _END
}
globals().update(EVERY_HOME)


cluster = contract.cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request, tmp_path, monkeypatch):
    """Everybody there is, at a service of their own."""
    if request.param == "sqlite":
        behind = EmbeddedMetadata.create(tmp_path / "metadata.db", clock=lambda: contract.NOW)
    else:
        behind = PostgresMetadata(request.getfixturevalue("cluster").fresh(), clock=lambda: contract.NOW)
    with World(rate=1.0) as world:
        with InnerService(behind) as server:
            opened = Everybody(world.nursery, server.url, time.time)
            _act_as_everybody(opened, world, monkeypatch)
            yield opened
            world.run(opened.aclose)
        behind.close()


def _act_as_everybody(home, world, monkeypatch):
    """Make the contract's tests run in ``world``, and tell ``home`` of every key they make."""

    def run(function, *args):
        return world.run(partial(function, *args))

    def new_share(cls):
        made = cls(contract.SigningKey.generate(), os.urandom(16), os.urandom(16))
        home.owners[made.share] = made.owner
        home.keys[made.owner.kid] = made.owner
        return made

    def mailbox():
        key = EncryptionKey.generate()
        home.boxes[key.kid] = key
        return key.kid

    granted = contract.Share.capsule

    def capsule(self, to, *args, **changes):
        home.boxes[to.kid] = to
        return granted(self, to, *args, **changes)

    made = contract.identity

    def identity(handle, key, **changes):
        home.keys[key.kid] = key
        return made(handle, key, **changes)

    monkeypatch.setattr(contract, "run", run)
    monkeypatch.setattr(contract.Share, "new", classmethod(new_share))
    monkeypatch.setattr(contract.Share, "capsule", capsule)
    monkeypatch.setattr(contract, "mailbox", mailbox)
    monkeypatch.setattr(contract, "identity", identity)
