"""A home that reads through a gateway which does every wrong thing there is: what a program gets to see, what
becomes of the share, and that nothing was decrypted. t1_gateway.py has the same of the provider alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from dataclasses import replace

import pytest
from devices import Device, World
from evil_gateway import ABSENT, BEHAVIOURS, EvilGateway
from homes import wait_until

from meshkitfs.core.blocks import SealedBlock
from meshkitfs.core.cid import digest_of
from meshkitfs.providers import LocalStore, ProviderSpec
from meshkitfs.shares import _reader
from meshkitfs.vfs._xattrs import reason_text

SLOW = ("silence", "slow head", "slow loris")


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Alice, who writes to the store behind the gateway; and bob, who has nothing but the gateway to read from."""
    monkeypatch.setattr(_reader, "FETCH_TRIES", 1)
    behind, theirs = tmp_path / "behind", tmp_path / "theirs"
    for directory in (behind, theirs):
        LocalStore.open(directory, create=True)
    with EvilGateway() as gateway, World(rate=1.0) as world:
        provider = ProviderSpec.local(behind)
        alice = Device(world, tmp_path / "alice", "alice", provider=provider)
        bob = Device(world, tmp_path / "bob", "bob", alice, provider=provider)
        through(bob, gateway, theirs)
        alice.start()
        bob.start()
        alice.create_share()
        yield alice, bob, gateway, behind
        alice.close()
        if bob.session is not None:
            bob.close()


def through(device, gateway, storage):
    settings = json.loads(device.home.config_path.read_text())
    settings["provider"] = {
        "type": "gateway-retrieval", "gatewayUrl": gateway.url, "timeoutMs": 20_000,
        "storage": {"type": "local-dev", "store": str(storage)},
    }  # fmt: skip
    device.home.config_path.write_text(json.dumps(settings))


@contextlib.contextmanager
def patience(device, seconds):
    """How long an answer may take: little, where waiting is in vain."""
    (endpoint,) = [one.endpoint for one in device.session.store._gateways]
    before, endpoint.limits = endpoint.limits, replace(endpoint.limits, deadline_s=seconds)
    try:
        yield
    finally:
        endpoint.limits = before


def serve_everything(gateway, directory):
    blocks = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    gateway.serve(*(SealedBlock(digest_of(data), data) for data in blocks))


def fault(device, path):
    """The code that ``user.meshkit.reason`` begins with."""
    ino = device.view().attr(path).ino
    return reason_text(device.share(), device.fs.faults.of(ino)).partition(":")[0]


@pytest.mark.timeout(300)
def test_whatever_a_gateway_answers_is_eio_and_no_plaintext(two):
    alice, bob, gateway, behind = two
    wrongs = [*BEHAVIOURS, *ABSENT]
    data = {name: os.urandom(70_000) for name in wrongs}
    for number, name in enumerate(wrongs):
        alice.view().write(f"{number}", data[name])
    alice.flush()
    serve_everything(gateway, behind)
    alice.grant("first", bob)
    for number, name in enumerate(wrongs):
        view = bob.view()
        fh = view.open(f"{number}", os.O_RDONLY)  # its manifest is here, its content is not
        opens, gets = bob.session.services.reader.counters.opens, bob.session.store.counters.bytes_in
        gateway.behave(name)
        with pytest.raises(OSError) as caught, patience(bob, 0.5 if name in SLOW else 20.0):
            view.pread(fh, 0, 70_000)
        assert caught.value.errno == errno.EIO, name
        lies = name in BEHAVIOURS and BEHAVIOURS[name].lies
        wanted = "cid_mismatch" if lies else "provider_request_failed"
        assert fault(bob, f"{number}") == ("block_unavailable" if name in ABSENT else wanted), name
        counters = bob.session.services.reader.counters
        assert (counters.opens, bob.session.store.counters.bytes_in) == (opens, gets), name
        # It is about that file's bytes: the share stays open, and nobody is shut out of it.
        assert bob.share().refusal is None, name
        assert bob.session.state.quarantine(bob.share().row.share) is None, name
        assert len(view.listdir()) == len(wrongs), name
        gateway.heal()
        if lies:  # it is not asked any more, until the home is opened again
            before = gateway.asked()
            with pytest.raises(OSError):
                view.pread(fh, 0, 70_000)
            assert gateway.asked() == before, name
            bob.close()
            bob.start()
            view = bob.view()
            fh = view.open(f"{number}", os.O_RDONLY)
        wait_until(lambda view=view, fh=fh, name=name: comes(view, fh) == data[name], f"{name}, healed")
        view.release(fh)


def comes(view, fh):
    try:
        return view.pread(fh, 0, 70_000)
    except OSError:
        return None
