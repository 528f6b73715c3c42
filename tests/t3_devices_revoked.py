"""Who was taken off the list of devices stays off it, whatever else happens meanwhile.

Each test ends with what the revoked device has in its mailbox: nothing there may hold keys that it has not.
"""

from __future__ import annotations

import contextlib
import time

import pytest
import t3_devices
import trio
from t3_devices import Twin, code_of, deaf, names

from meshkitfs.core.device import DeviceLetter, DeviceList, new_code
from meshkitfs.core.keys import kid_of
from meshkitfs.core.memory import MEMORY_MAGIC, open_memories, seal_memory
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import DeviceKeys, acting_as, publish

place, world, homes = t3_devices.place, t3_devices.world, t3_devices.homes


def letters_to(device, *senders):
    """The letters of ``senders`` that lie in a device's mailbox, read with its own key."""
    mine = device.session.device_keys.identity
    signers = {key.kid: key.public for key in (at.session.device_keys.identity.signing for at in senders)}

    async def ask():
        with acting_as(mine.signing):
            return await device.session.metadata.letters(mine.encryption.kid)

    found = [(mine.encryption, blob) for _, blob in device.world.run(ask) if blob.startswith(MEMORY_MAGIC)]
    return [DeviceLetter.from_bytes(whole.text) for whole in open_memories(found, signers)]


def new_keys_for(device, *senders):
    """For each letter that gives ``device`` keys: which record they are of, beyond those that it knows."""
    known = len(device.session.identity.chain)
    return [
        len(letter.chain)
        for letter in letters_to(device, *senders)
        if letter.key and len(letter.chain) > known
    ]


def waiting_device(home):
    """The code of one more new device, which waits at the metadata home."""
    keys = DeviceKeys.new(int(time.time()))

    async def wait_too():
        with acting_as(keys.signing):
            await publish(keys, home.session.metadata)

    home.world.run(wait_too)
    return new_code(keys.signing).to_text()


def fails_once(monkeypatch, device):
    """The disk of ``device`` has no room for the next list of devices."""
    keep = device.session.devices._keep

    async def full(*_):
        monkeypatch.setattr(device.session.devices, "_keep", keep)
        raise MeshkitError("no_space", "in a test")

    monkeypatch.setattr(device.session.devices, "_keep", full)


def test_two_commands_at_once_do_not_bring_a_revoked_device_back(homes):
    """The second waits for the first, and knows the list of before it: as somebody does who runs both."""
    desktop, laptop, _ = homes
    deaf(laptop)
    code = waiting_device(desktop)
    devices, turn = desktop.session.devices, desktop.session.life._turn

    async def waits(count):
        while turn.statistics().tasks_waiting < count:
            await trio.sleep(0)

    async def both():
        async with trio.open_nursery() as nursery, turn:
            nursery.start_soon(devices.revoke, "laptop")
            await waits(1)
            nursery.start_soon(devices.approve, code, "phone")
            await waits(2)

    desktop.world.run(both)
    assert names(desktop) == ["desktop", "phone"]
    assert new_keys_for(laptop, desktop) == []


@pytest.mark.parametrize("then", ["rotate", "approve"])
def test_a_list_that_could_not_be_kept_is_the_list_all_the_same(homes, monkeypatch, then):
    """The record of a revocation is out, and its list is not on the disk when the next change begins."""
    desktop, laptop, _ = homes
    deaf(laptop)
    fails_once(monkeypatch, desktop)
    assert code_of(desktop.world.run, desktop.session.devices.revoke, "laptop") == "no_space"
    if then == "rotate":
        life = desktop.session.life
        desktop.world.run(lambda: life.rotate(signing=True, encryption=True, again=True))
        assert names(desktop) == ["desktop"]
    else:
        desktop.world.run(desktop.session.devices.approve, waiting_device(desktop), "phone")
        assert names(desktop) == ["desktop", "phone"]
    assert new_keys_for(laptop, desktop) == []


def test_a_device_that_half_heard_of_a_revocation_tells_nobody_else(homes, monkeypatch):
    """It has the new keys on its disk, and the list of before: what it says next must not be that list."""
    desktop, laptop, _ = homes
    tablet = Twin(desktop.world, f"{desktop.root}-tablet", desktop, "tablet").start()
    laptop.world.run(laptop.session.devices.look)
    deaf(laptop)
    look, before = tablet.session.devices.look, tablet.session.identity.chain
    deaf(tablet)
    desktop.world.run(desktop.session.devices.revoke, "laptop")
    fails_once(monkeypatch, tablet)
    assert code_of(tablet.world.run, look) == "no_space"
    assert tablet.session.identity.chain != before
    tablet.crash()
    tablet.start()
    tablet.world.run(tablet.session.devices.announce)
    assert names(tablet) == ["desktop", "tablet"]
    assert new_keys_for(laptop, desktop, tablet) == []
    tablet.close()


def test_keys_of_before_take_nobody_off_the_list(homes):
    """A revoked device knows the key of a record that an absent one has not heard of, and says who is off it."""
    desktop, laptop, _ = homes
    tablet = Twin(desktop.world, f"{desktop.root}-tablet", desktop, "tablet").start()
    laptop.world.run(laptop.session.devices.look)
    look = tablet.session.devices.look
    deaf(tablet)
    # A record with the same keys; what the laptop makes of it is the first that the tablet hears.
    desktop.world.run(desktop.session.devices.approve, waiting_device(desktop), "phone")
    laptop.world.run(laptop.session.devices.look)
    stolen, device = laptop.session.identity, laptop.session.device_keys.identity
    mine = tablet.session.device_keys.identity
    deaf(laptop)
    desktop.world.run(desktop.session.devices.revoke, "laptop")
    left = tuple(entry for entry in laptop.session.devices.list().entries if entry.name == "laptop")
    listed = DeviceList.of(stolen.record, left, int(time.time())).sign(stolen.signing)
    to = mine.encryption.public

    async def lie():
        with acting_as(mine.signing):
            for letter_id, blob in await tablet.session.metadata.letters(mine.encryption.kid):
                held.append(blob)
                await tablet.session.metadata.delete_letter(mine.encryption.kid, letter_id)
        parts = seal_memory(
            device.signing, DeviceLetter(listed, stolen.chain).to_bytes(), int(time.time()) + 60, to
        )
        with acting_as(device.signing):
            for part in (*parts, *held):
                await laptop.session.metadata.post_letter(kid_of(to), part)

    held = []
    desktop.world.run(lie)
    tablet.world.run(look)
    assert tablet.session.locked is None
    assert names(tablet) == ["desktop", "tablet", "phone"]
    assert tablet.session.identity.chain == desktop.session.identity.chain
    tablet.close()


def test_a_letter_that_comes_while_new_keys_are_made_is_not_lost(homes):
    """What the other device sent must not be written over by keys that were made from those of before."""
    desktop, laptop, _ = homes
    look, life, holder = laptop.session.devices.look, laptop.session.life, laptop.session.holder
    deaf(laptop)
    desktop.world.run(lambda: desktop.session.life.rotate(signing=True, encryption=True))
    ended = []

    async def both():
        async def hears():
            await look()
            ended.append(True)

        async def until_it_waits():
            while not ended and not holder._turn.statistics().tasks_waiting:
                await trio.sleep(0.01)

        def prepare(_):
            trio.from_thread.run_sync(nursery.start_soon, hears)
            trio.from_thread.run(until_it_waits)

        async with trio.open_nursery() as nursery:
            with contextlib.suppress(MeshkitError):
                await life.rotate(signing=True, encryption=True, again=True, prepare=prepare)

    laptop.world.run(both)
    assert laptop.session.identity.chain == desktop.session.identity.chain
    assert laptop.session.identity.signing.kid == desktop.session.identity.signing.kid
