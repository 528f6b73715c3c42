"""Locking a session, seen from inside: what it holds before, meanwhile and after. Without a kernel."""

import os
import shutil

import pytest
from devices import Device, World, scratch

from meshkitfs.core import secret_memory
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.daemon.door import Door
from meshkitfs.daemon.locking import Lock
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._trace import STEPS
from meshkitfs.shares import RefSeal
from meshkitfs.shares._locking import _nodes

DATA = os.urandom(700_000)


@pytest.fixture
def alice():
    place = scratch()
    with World() as world:
        alice = Device(world, f"{place}/alice", "alice").start()
        alice.create_share()
        view = alice.view()
        view.mkdir("directory")
        view.write("directory/file", DATA)
        view.write("small", b"small")
        alice.flush()
        yield alice
        alice.close()
    shutil.rmtree(place)


def refs(share):
    """Every reference in the tree of a share that has a key in it."""
    found = []
    for node in _nodes(share.tree):
        if node.entry is not None:
            found.append(node.entry.ref)
        if node.kind == 0:
            found += [part.ref for part in node.parts]
            found += [
                child.ref for child in (node.children or {}).values() if type(child).__name__ == "Entry"
            ]
    return [ref for ref in found if len(ref) >= 64]


def code_of(call, *args):
    with pytest.raises(MeshkitError) as caught:
        call(*args)
    return caught.value.code


def test_no_key_of_the_tree_is_in_the_clear(alice):
    session, share = alice.session, alice.share()
    lock = Lock(session)
    for number in range(300):  # more than one page of a directory
        alice.view().write(f"directory/{number}", b"")
    alice.flush()
    assert alice.view().read("directory/file") == DATA
    before = refs(share)
    assert len(before) > 300
    alice.world.run(lock.lock)
    sealed = refs(share)
    assert [ref[:32] for ref in sealed] == [ref[:32] for ref in before]
    assert all(len(ref) == 65 for ref in sealed)
    assert not {ref[32:64] for ref in sealed} & {ref[32:] for ref in before}
    assert not {ref[32:] for ref in before} & {ref[i : i + 32] for ref in sealed for i in range(34)}
    assert all(node.content is None for node in share.tree.nodes.values() if hasattr(node, "content"))
    assert share.grant is None
    assert not session.gate._keys
    assert session.services.reader._held == 0
    me = session.identity
    for use in (
        lambda: me.signing.sign(b"x"),
        lambda: me.signing.seed,
        lambda: me.encryption.seed,
        lambda: me.encryption.hpke,
        session.unlocked,
        session.state.shares,
    ):
        assert code_of(use) == "identity_locked"
    assert me.signing.public
    assert code_of(alice.world.run, share.use, "list") == "identity_locked"
    # Nothing of this is lost by locking twice, or by a key that is not the right one.
    alice.world.run(lock.lock)
    assert code_of(alice.world.run, lock.unlock, SecretBytes(os.urandom(32))) == "identity_corrupt"
    assert session.locked is not None
    assert refs(share) == sealed
    alice.world.run(lock.unlock)
    assert refs(share) == before
    assert alice.view().read("directory/file") == DATA
    alice.view().write("small", b"changed")
    alice.flush()


def test_a_lock_while_the_gate_is_being_asked(alice):
    """A walk that began before the lock, and ends after it, gives nothing."""
    session, share = alice.session, alice.share()
    lock, state_of = Lock(session), session.metadata.share_state

    async def slow(*args):
        found = await state_of(*args)
        await lock.lock()
        return found

    share.grant, share._tick = None, -1
    session.metadata.share_state = slow
    try:
        assert code_of(alice.world.run, session.gate.open, share.row, "list") == "identity_locked"
    finally:
        session.metadata.share_state = state_of
    alice.world.run(lock.unlock)
    assert alice.view().read("small") == b"small"


def test_what_cannot_be_saved_stays_and_is_said(alice, monkeypatch):
    session, share = alice.session, alice.share()
    lock = Lock(session)
    alice.view().write("small", b"not saved yet")

    def full(*args):
        raise MeshkitError("no_space", "a full disk")

    monkeypatch.setattr(type(session.services.spool), "write", full)
    (left,) = alice.world.run(lock.lock)["left"]
    assert left["unsaved"] is True
    monkeypatch.undo()
    alice.world.run(lock.unlock)
    assert alice.view().read("small") == b"not saved yet"
    alice.flush()
    assert not share.dirty


# == the memory ======================================================================================


def test_a_seal_opens_for_its_owner_only():
    owner, other = EncryptionKey.generate(), EncryptionKey.generate()
    ref = os.urandom(64)
    seal = RefSeal(owner.public)
    hidden = seal.hide(ref)
    assert hidden[:32] == ref[:32]
    assert len(hidden) == 65
    assert seal.hide(hidden) == hidden
    assert seal.hide(b"inline") == b"inline"
    seal.close()
    assert code_of(seal.open, other) == "key_unwrap_failed"
    seal.open(owner)
    assert seal.show(hidden) == ref
    assert seal.show(ref) == ref


def test_secret_bytes_take_their_origin_away():
    for origin in (os.urandom(32), bytearray(os.urandom(32))):
        value = bytearray(origin)
        secret = SecretBytes(origin)
        assert bytes(secret.view) == value
        assert bytes(origin) == bytes(32)
        assert value.hex() not in repr(secret)
        view = secret.view
        secret.wipe()
        assert bytes(view) == bytes(32)
        with pytest.raises(ValueError):
            _ = secret.view
        secret.wipe()


def test_secrets_do_not_share_memory():
    many = [SecretBytes(bytearray(i.to_bytes(2, "big") * 16)) for i in range(1000)]
    assert all(bytes(secret.view) == i.to_bytes(2, "big") * 16 for i, secret in enumerate(many))
    del many[::2]
    more = [SecretBytes(bytearray(b"\xff" * 64)) for _ in range(500)]
    assert all(
        bytes(secret.view) == i.to_bytes(2, "big") * 16
        for i, secret in zip(range(1, 1000, 2), many, strict=True)
    )
    assert len({id(secret._slot) for secret in [*many, *more]}) == 1000
    for size in (0, 65):
        with pytest.raises(ValueError):
            SecretBytes(bytearray(size))


def test_texts_are_wiped():
    text = "".join(["a secret ", "in a text"])
    secret_memory.wipe_text(text)
    assert text == "\0" * 18


def test_explain_says_what_each_step_would_need(alice):
    """Nothing of a share can be known without the keys; that is said of each step, and nothing is made up."""
    session, service = alice.session, Service(alice.session)
    service.mounted = {"mountpoint": "/mnt"}
    walks = session.gate.counters.walks
    alice.world.run(service.lock.lock)
    found = alice.world.run(service.call, "explain", {"path": "/mnt/first/file"})
    assert (found["path"], found["share"], found["locked"]["by"]) == ("first/file", "first", "lock")
    locked_steps(found)
    assert session.gate.counters.walks == walks
    assert code_of(alice.world.run, service.call, "explain", {"path": "nowhere"}) == "share_not_found"
    alice.world.run(service.lock.unlock, SecretBytes(session.vault.load()))
    found = alice.world.run(service.call, "explain", {"path": "first/file"})
    assert {step["result"] for step in found["steps"]} == {"passed", "not required"}


@pytest.mark.parametrize("watch", [True, False])
def test_explain_where_the_home_was_never_open(alice, watch):
    """As a mount that came up locked answers: it does not even know which shares there are."""
    door = Door(alice.session.home, {"mountpoint": "/mnt"}, watch=watch)
    for path in ("/mnt/first/file", "first/file", "nowhere"):
        found = alice.world.run(door.call, "explain", {"path": path}, lambda _: None)
        assert (found["path"], found["share"]) == (path.removeprefix("/mnt/"), None)
        assert found["locked"]["by"] == ("keyring" if watch else "start")
        locked_steps(found)


def locked_steps(found):
    first, *others = found["steps"]
    assert [step["step"] for step in found["steps"]] == list(STEPS)
    assert (first["result"], first["code"]) == ("refused", "identity_locked")
    assert first["evidence"] == found["detail"]
    assert found["code"] == "identity_locked"
    assert "meshkitfs unlock" in found["suggestion"]
    for step in others:
        assert step["result"] == "not reached"
        assert step["evidence"]
        assert not step["code"] + step["by"] + step["signer"] + step["since"] + step["until"] + step["rule"]
