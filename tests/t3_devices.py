"""One identity in several homes: letting a device in, living side by side, and taking one off the list.

Real sessions without a kernel, over the embedded metadata home and over the real service.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from functools import partial

import pytest
import trio
from devices import Device, World, scratch
from homes import wait_until
from inner_service import InnerService

from meshkitfs.core.cose import record_hash
from meshkitfs.core.device import DeviceCode, DeviceLetter, DeviceList, new_code
from meshkitfs.core.keys import kid_of
from meshkitfs.core.memory import seal_memory
from meshkitfs.core.records import Head
from meshkitfs.daemon import device_joining, rotation_schedule
from meshkitfs.daemon.config import MetadataConfig
from meshkitfs.daemon.founding import initialize
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import DeviceKeys, acting_as, prepared, promoted, publish, seal_identity
from meshkitfs.metadata import EmbeddedMetadata, HttpMetadata, Publication
from meshkitfs.providers import ProviderSpec
from meshkitfs.shares import Terms

DATA = b"what is on every device " * 2000


class Twin(Device):
    """Another home of somebody's identity, let in by the code that it shows."""

    def __init__(self, world, root, first, name):
        self.world, self.root, self.name = world, root, first.name
        self.blocks, self.metadata = first.blocks, first.metadata
        self.home = type(first.home)(root)
        self.session = self.fs = self._scope = None
        code = []

        async def join():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                while not code:
                    await trio.sleep(0.01)
                self.approved = await first.session.devices.approve(code[0], name, "desktop")

        async def wait():
            where = MetadataConfig.parse(str(first.metadata))
            carried, device = await device_joining.let_in(where, None, int(time.time()), code.append, 60)
            with self.home.hold():
                await initialize(
                    self.home, carried.identity.handle, ProviderSpec.local(self.blocks), str(self.metadata),
                    "plain-file", None, False, carried=carried, device=device,
                )  # fmt: skip

        world.run(join)
        self.code = code[0]


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["embedded", pytest.param("service", marks=pytest.mark.long)])
def world(request, place):
    """Time goes by itself; where the metadata is stands in ``metadata``."""
    if request.param == "embedded":
        with World(rate=1.0) as world:
            world.place, world.metadata = place, f"{place}/metadata.db"
            yield world
        return
    behind = EmbeddedMetadata.create(f"{place}/service.db")
    with InnerService(behind) as server, World(rate=1.0) as world:
        world.place, world.metadata = place, server.url
        yield world
    behind.close()


@pytest.fixture
def homes(world):
    """Alice's desktop and laptop, and bob, whose share alice has; alice has one that bob may write in."""
    desktop = Device(world, f"{world.place}/desktop", "alice", metadata=world.metadata).start()
    bob = Device(world, f"{world.place}/bob", "bob", beside=desktop).start()
    desktop.create_share("first")
    desktop.view("first").write("file", DATA)
    desktop.flush("first")
    desktop.grant("first", bob)
    bob.create_share("photos")
    bob.view("photos").write("cat", DATA)
    bob.flush("photos")
    bob.grant("photos", desktop)
    laptop = Twin(world, f"{world.place}/laptop", desktop, "laptop").start()
    yield desktop, laptop, bob
    for device in (laptop, desktop, bob):
        if device.session is not None:
            device.close()


def hear(*devices):
    """Each tells what it remembers, and hears the others."""
    for device in devices:
        device.world.run(device.session.remembering.post)
    for device in devices:
        device.world.run(device.session.devices.look)
        device.world.run(device.session.peers.hear)


def names(device):
    return [item["name"] for item in device.session.devices.described()["devices"]]


def code_of(call, *args, **more):
    with pytest.raises(MeshkitError) as caught:
        call(*args, **more)
    return caught.value.code


@pytest.mark.long
def test_a_new_device_has_everything_and_nobody_shares_again(homes):
    desktop, laptop, _ = homes
    assert names(desktop) == names(laptop) == ["desktop", "laptop"]
    assert laptop.session.identity.signing.kid == desktop.session.identity.signing.kid
    assert laptop.view("first").read("file") == DATA
    assert laptop.view("photos").read("cat") == DATA
    laptop.view("first").write("from the laptop", DATA)
    laptop.flush("first")
    assert sees(desktop, "first", "from the laptop") == DATA


def sees(device, share, path):
    """The content of a file that another device or person has published, when it is here."""

    def there():
        device.refresh(share)
        return path in device.view(share).listdir()

    wait_until(there, path)
    return device.view(share).read(path)


@pytest.mark.long
def test_what_one_device_makes_and_grants_appears_on_the_other(homes):
    desktop, laptop, bob = homes
    laptop.create_share("made on the laptop")
    desktop.create_share("made on the desktop")
    laptop.grant("made on the laptop", bob)
    desktop.grant("made on the desktop", bob)
    hear(desktop, laptop)
    hear(desktop, laptop)
    assert set(desktop.session.book.shares) == set(laptop.session.book.shares)
    laptop.view("made on the desktop").write("here", DATA)
    laptop.flush("made on the desktop")
    assert sees(desktop, "made on the desktop", "here") == DATA
    # Either can take back what the other has granted.
    desktop.world.run(desktop.session.book.revoke, desktop.share("made on the laptop"), "bob")
    use = partial(bob.share("made on the laptop").use, "list", current=True)
    assert code_of(bob.world.run, use) == "share_revoked"
    assert no_alarms(desktop, laptop)


@pytest.mark.long
def test_a_roster_made_on_one_device_keeps_what_the_other_has_granted(homes):
    """The other device has not been heard when the next roster is made: it is, before that is published."""
    desktop, laptop, bob = homes
    share = laptop.share("first")
    laptop.world.run(share.use, "list")
    laptop.world.run(laptop.session.book.revoke, share, "bob")
    laptop.grant_again("first", bob, "read")
    carol = Device(desktop.world, f"{desktop.root}-carol", "carol", beside=desktop).start()
    desktop.grant_again("first", carol, "read")
    carol.close()
    roster = desktop.world.run(partial(desktop.share("first").use, "list", current=True)).roster
    standing = {m.handle for m in desktop.session.book.standing(desktop.share("first"))}
    assert standing == {"alice", "bob", "carol"}
    assert len(roster.caps) == 3
    assert no_alarms(desktop, laptop)


def test_a_roster_is_not_made_on_what_was_not_heard(homes, monkeypatch):
    desktop, laptop, bob = homes

    async def silent():
        return False

    monkeypatch.setattr(laptop.session.services.others, "tell", silent)
    monkeypatch.setattr(laptop.session.remembering, "post", silent)
    laptop.world.run(laptop.session.book.revoke, laptop.share("first"), "bob")
    laptop.grant_again("first", bob, "read")
    before = desktop.world.run(desktop.session.metadata.roster, desktop.share("first").row.share)
    terms = Terms(("read",))
    assert (
        code_of(desktop.world.run, desktop.session.book.add, desktop.share("first"), "bob", terms)
        == "device_behind"
    )
    assert desktop.world.run(desktop.session.metadata.roster, desktop.share("first").row.share) == before


@pytest.mark.long
def test_two_devices_change_a_roster_at_once(homes):
    desktop, laptop, _ = homes
    carol = Device(desktop.world, f"{desktop.root}-carol", "carol", beside=desktop).start()
    dave = Device(desktop.world, f"{desktop.root}-dave", "dave", beside=desktop).start()

    async def both():
        async with trio.open_nursery() as nursery:
            for device, who in ((desktop, "carol"), (laptop, "dave")):
                book = device.session.book
                nursery.start_soon(book.add, device.share("first"), who, Terms(("read",)))

    desktop.world.run(both)
    hear(desktop, laptop)
    for device in (desktop, laptop):
        device.world.run(partial(device.share("first").use, "list", current=True))
        standing = {m.handle for m in device.session.book.standing(device.share("first"))}
        assert standing == {"alice", "bob", "carol", "dave"}
    carol.close()
    dave.close()
    assert no_alarms(desktop, laptop)


@pytest.mark.long
def test_the_same_file_written_on_both_is_kept_twice(homes):
    desktop, laptop, _ = homes
    for device in (desktop, laptop):
        device.view("first").read("file")
    desktop.view("first").write("file", b"desktop")
    laptop.view("first").write("file", b"laptop")
    desktop.flush("first")
    laptop.flush("first")
    desktop.refresh("first")
    found = {data for path, data in laptop.view("first").contents().items() if path.startswith("file")}
    assert found == {b"desktop", b"laptop"}
    assert no_alarms(desktop, laptop)


def no_alarms(*devices):
    """Nothing that one device did is taken for an attack by the other."""
    for device in devices:
        for share in device.session.book.shares.values():
            assert device.session.state.quarantine(share.row.share) is None, share
    return True


@pytest.mark.long
def test_a_rotation_on_one_device_is_taken_over_by_the_other(homes):
    desktop, laptop, _ = homes
    desktop.world.run(partial(desktop.session.life.rotate, signing=True, encryption=True))
    new = desktop.session.identity
    laptop.world.run(laptop.session.devices.look)
    me = laptop.session.identity
    assert (me.signing.kid, me.encryption.kid) == (new.signing.kid, new.encryption.kid)
    laptop.view("first").write("after", DATA)
    laptop.flush("first")
    assert sees(desktop, "first", "after") == DATA
    assert laptop.view("photos").read("cat") == DATA


@pytest.mark.long
def test_a_request_that_meets_new_keys_takes_them_first(homes):
    """At a service the old keys are refused; nobody waits for the next look."""
    desktop, laptop, _ = homes
    if not isinstance(laptop.session.metadata, HttpMetadata):
        pytest.skip("a file refuses nobody")
    desktop.world.run(partial(desktop.session.life.rotate, signing=True, encryption=True))
    laptop.world.run(laptop.session.metadata.identity, "bob")
    assert laptop.session.identity.signing.kid == desktop.session.identity.signing.kid


def test_a_revoked_device_is_shut_out_and_the_other_goes_on(homes):
    desktop, laptop, bob = homes
    service = Service(laptop.session)
    laptop.view("first").read("file")
    desktop.world.run(desktop.session.devices.revoke, "laptop")
    assert names(desktop) == ["desktop"]
    desktop.view("first").write("secret", DATA)
    desktop.flush("first")
    wait_until(lambda: laptop.session.locked is not None, "the end of the laptop")
    assert laptop.session.locked.code == "device_revoked"
    with pytest.raises(OSError) as caught:
        laptop.view("first").read("file")
    assert (caught.value.errno, caught.value.code) == (errno.EACCES, "device_revoked")
    assert code_of(laptop.world.run, service.lock.unlock) == "device_revoked"
    laptop.close()
    assert code_of(laptop.start) == "device_revoked"
    # A friend's share is there as ever, and the friend has done nothing.
    assert desktop.view("photos").read("cat") == DATA
    bob.refresh("first")
    assert sees(bob, "first", "secret") == DATA


def test_what_a_revoked_device_tries_with_its_keys(homes):
    """It has everything that it ever had, and hears nothing that it does not want to hear."""
    desktop, laptop, _ = homes
    laptop.view("first").read("file")
    stolen, metadata = laptop.session.identity, laptop.session.metadata
    device = laptop.session.device_keys.identity
    listed = laptop.session.devices.list()
    row = laptop.share("first").row
    old_chain = stolen.chain
    deaf(laptop)
    desktop.world.run(desktop.session.devices.revoke, "laptop")
    desktop.view("first").write("secret", DATA)
    desktop.flush("first")

    def as_thief(method, *args):
        async def ask():
            with acting_as(device.signing if asks_as_device else stolen.signing):
                return await method(*args)

        return laptop.world.run(ask)

    asks_as_device = isinstance(metadata, HttpMetadata)
    # A rotation of its own: the directory has the successor already.
    fork = prepared(stolen, int(time.time()), signing=True, encryption=True)
    with pytest.raises(MeshkitError) as caught:
        as_thief(metadata.publish_identity, "alice", fork.pending.record)
    assert caught.value.code in ("identity_handle_taken", "invalid_record", "metadata_unauthorized")
    # A head, signed with the key of before.
    grant = desktop.world.run(partial(desktop.share("first").use, "list", current=True))
    assert stolen.signing.public not in grant.roster.writers
    head = desktop.world.run(desktop.session.metadata.head, row.share)
    forged = Head(
        row.share, row.oid, grant.roster.epoch, 99, record_hash(head), bytes(32), int(time.time())
    ).sign(stolen.signing)
    with pytest.raises(MeshkitError) as caught:
        as_thief(
            metadata.publish,
            Publication(
                row.share,
                expect_head=record_hash(head),
                head=forged,
                head_ver=99,
                head_epoch=grant.roster.epoch,
            ),
        )
    assert caught.value.code in ("invalid_record", "metadata_unauthorized", "head_conflict")
    # The new content: no capsule that is listed is for a key that it has.
    mine = {key.kid for key in stolen.encryption_keys}
    members = desktop.session.book.standing(desktop.share("first"))
    assert not mine & {member.encryption_kid for member in members}
    # A list in which it is again, in a letter to the desktop: under the key of before, and on a fork.
    to = desktop.session.device_keys.identity.encryption.public
    before = desktop.session.identity.chain
    for me in (stolen, promoted(fork)):
        again = DeviceList.of(me.record, listed.entries, int(time.time())).sign(me.signing)
        key = os.urandom(32)
        letter = DeviceLetter(again, me.chain, key, seal_identity(me, key))
        for signer in (device.signing, me.signing, stolen.signing):
            for part in seal_memory(signer, letter.to_bytes(), int(time.time()), to):
                as_thief(metadata.post_letter, kid_of(to), part)
    desktop.world.run(desktop.session.devices.look)
    assert desktop.session.identity.chain == before
    assert names(desktop) == ["desktop"]
    assert before[: len(old_chain)] == old_chain
    desktop.world.expect_complaints()


def deaf(device):
    """The device's own program does not obey."""

    async def nothing(*_):
        return False

    for name in ("look", "catch_up"):
        setattr(device.session.devices, name, nothing)
    device.session.holder.catch_up = None


@pytest.mark.long
def test_a_letter_of_before_and_a_fork_before_the_revocation_is_heard(homes):
    """A third device is away while the laptop is revoked: the laptop's word comes first, and is not believed."""
    desktop, laptop, _ = homes
    tablet = Twin(desktop.world, f"{desktop.root}-tablet", desktop, "tablet").start()
    laptop.world.run(laptop.session.devices.look)
    stolen, device = laptop.session.identity, laptop.session.device_keys.identity
    listed = laptop.session.devices.list()
    deaf(laptop)
    look = tablet.session.devices.look
    deaf(tablet)
    desktop.world.run(desktop.session.devices.revoke, "laptop")
    fork = promoted(prepared(stolen, int(time.time()), signing=True, encryption=True))
    again = DeviceList.of(fork.record, listed.entries, int(time.time())).sign(fork.signing)
    key = os.urandom(32)
    letter = DeviceLetter(again, fork.chain, key, seal_identity(fork, key))
    to = tablet.session.device_keys.identity.encryption.public

    async def post():
        with acting_as(device.signing):
            for part in seal_memory(device.signing, letter.to_bytes(), int(time.time()), to):
                await laptop.session.metadata.post_letter(kid_of(to), part)

    laptop.world.run(post)
    tablet.world.run(look)
    assert tablet.session.identity.chain == desktop.session.identity.chain
    assert [entry.name for entry in tablet.session.devices.list().entries] == ["desktop", "tablet"]
    desktop.world.expect_complaints()  # a fork is said aloud, if it is the first that is read
    tablet.close()


@pytest.mark.long
def test_two_devices_change_the_list_at_once(homes):
    desktop, laptop, _ = homes
    tablet = Twin(desktop.world, f"{desktop.root}-tablet", desktop, "tablet")
    laptop.world.run(laptop.session.devices.look)
    ended = []

    async def revoke(device, name):
        try:
            await device.session.devices.revoke(name)
        except MeshkitError as error:
            ended.append(error.code)

    async def both():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(revoke, desktop, "tablet")
            nursery.start_soon(revoke, laptop, "tablet")

    desktop.world.run(both)
    for device in (desktop, laptop):
        device.world.run(device.session.devices.look)
        assert names(device) == ["desktop", "laptop"]
    assert desktop.session.identity.chain == laptop.session.identity.chain
    assert set(ended) <= {"device_not_found"}
    del tablet


@pytest.mark.long
def test_what_cannot_be_approved_or_revoked(homes):
    desktop, laptop, _ = homes
    run, devices = desktop.world.run, desktop.session.devices
    assert code_of(run, devices.approve, "not a code") == "invalid_argument"
    stranger = DeviceCode(os.urandom(16), os.urandom(16)).to_text()
    assert code_of(run, devices.approve, stranger) == "device_not_found"
    taken = DeviceKeys.new(int(time.time()))

    async def wait_too():
        with acting_as(taken.signing):
            await publish(taken, desktop.session.metadata)
        await devices.approve(new_code(taken.signing).to_text(), "laptop")

    assert code_of(run, wait_too) == "device_exists"
    assert code_of(run, devices.revoke, "phone") == "device_not_found"
    assert code_of(run, devices.revoke, "desktop") == "invalid_argument"
    chain = desktop.session.identity.chain
    run(devices.approve, laptop.code)  # again: nothing changes
    assert desktop.session.identity.chain == chain
    assert "secret" not in repr(DeviceCode.from_text(laptop.code))


@pytest.mark.long
def test_nobody_without_the_code_lets_a_device_in(world):
    """The directory shows everybody that a device waits; an identity of their own it does not take."""
    mallory = Device(world, f"{world.place}/mallory", "alice", metadata=world.metadata).start()
    device = DeviceKeys.new(int(time.time()))
    guessed = DeviceCode(device.signing.kid, os.urandom(16))

    async def trap():
        with acting_as(device.signing):
            await publish(device, mallory.session.metadata)
        await mallory.session.devices.approve(guessed.to_text())
        with acting_as(device.signing):
            return await device_joining._look(device, mallory.session.metadata)

    assert world.run(trap) is None
    mallory.close()


@pytest.mark.long
def test_a_death_between_the_record_and_the_letters(homes, monkeypatch):
    """The other device is told at the next start."""
    desktop, laptop, _ = homes
    deaf_look = laptop.session.devices.look

    async def dies(*_):
        raise MeshkitError("metadata_unavailable", "in a test")

    monkeypatch.setattr(desktop.session.devices, "_tell_all", dies)
    rotate = partial(desktop.session.life.rotate, signing=True, encryption=True)
    assert code_of(desktop.world.run, rotate) == "metadata_unavailable"
    desktop.crash()
    desktop.start()
    wait_until(lambda: desktop.world.run(deaf_look) or laptop.session.identity.chain
               == desktop.session.identity.chain, "the letter")  # fmt: skip
    assert laptop.session.identity.signing.kid == desktop.session.identity.signing.kid


@pytest.mark.long
def test_keys_are_replaced_when_it_is_time_by_one_device(homes):
    desktop, laptop, _ = homes
    for device in (desktop, laptop):
        device.world.run(Service(device.session).call, "identity.schedule", {"every": "30d"})
    before = desktop.session.identity
    life, other = desktop.session.life, laptop.session.life
    due = life.schedule.next(before)
    assert due == rotation_schedule.keys_since(before) + 30 * 86400
    life._wall = other._wall = lambda: due - 1
    desktop.world.run(partial(life._look, first=False))
    assert desktop.session.identity.chain == before.chain
    life._wall = other._wall = lambda: due + rotation_schedule.APART_S
    desktop.world.run(partial(life._look, first=False))
    laptop.world.run(laptop.session.devices.look)
    laptop.world.run(partial(other._look, first=False))
    now = desktop.session.identity
    assert len(now.chain) == len(before.chain) + 1
    assert {now.signing.kid, now.encryption.kid}.isdisjoint({before.signing.kid, before.encryption.kid})
    assert laptop.session.identity.chain == now.chain
    call = Service(desktop.session).call
    assert code_of(desktop.world.run, call, "identity.schedule", {"every": "1d"}) == "invalid_argument"
    data = desktop.world.run(call, "identity.schedule", {"every": "never"})
    assert data["rotation"] == {"every": None, "next": None}


def test_a_busy_home_waits_with_new_keys(homes):
    desktop, _, _ = homes
    state, me = desktop.session.state, desktop.session.identity
    schedule = rotation_schedule.Schedule(state, lambda: False, lambda: 0)
    schedule.set("7d")
    due = schedule.next(me)
    assert not schedule.due(me, due)
    assert schedule.due(me, due + rotation_schedule.PATIENCE_S)
    assert rotation_schedule.Schedule(state, lambda: True, lambda: 0).due(me, due)
    assert not rotation_schedule.Schedule(state, lambda: True, lambda: 1).due(me, due)
