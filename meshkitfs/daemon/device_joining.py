"""A new device that waits to be let in: it has keys of its own, a code to show, and no home yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from meshkitfs.core.device import DeviceLetter, DeviceList, new_code
from meshkitfs.core.memory import MEMORY_MAGIC, open_memories
from meshkitfs.core.secret_memory import wipe
from meshkitfs.daemon.carrying import Carried
from meshkitfs.daemon.config import MetadataConfig
from meshkitfs.daemon.metadata_home import open_metadata
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import DeviceKeys, Holder, Identity, open_identity, publish, save_identity
from meshkitfs.metadata import Metadata
from meshkitfs.net import Secret
from meshkitfs.state import State

__all__ = ["NewDevice", "let_in"]

# How often the mailbox is looked into (s).
LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device that was let in: its own keys, and the signed list that it is on."""

    identity: Identity
    list: bytes = field(repr=False)

    def keep(self, path: Path, state: State, wrapping: bytes) -> None:
        """Save its keys in the file ``path`` under the key vault's secret, and the list in ``state``."""
        save_identity(path, self.identity, wrapping)
        state.set_setting("device_list", self.list)
        # Whoever let it in has told the others.
        state.set_setting("device_told", DeviceList.peek(self.list).at)


async def let_in(
    where: MetadataConfig, join: Secret | None, now: int, show: Callable[[str], None], wait_s: float
) -> tuple[Carried, NewDevice]:
    """Make a device known at the metadata home ``where``, ``show`` its code, and wait to be let in.

    ``join`` is what the service asks of newcomers. Raises ``timed_out`` after ``wait_s`` seconds, and what
    the metadata home raises.
    """
    device = DeviceKeys.new(now)
    async with open_metadata(where, Holder(device, lambda _: None), None, join) as metadata:
        await metadata.service_key()
        await publish(device, metadata)
        show(new_code(device.signing).to_text())
        with trio.move_on_after(wait_s):
            while True:
                letter = await _look(device, metadata)
                if letter is not None:
                    return _taken(device, letter)
                await trio.sleep(LOOK_S)
    raise MeshkitError("timed_out", "nobody has approved this device")


async def _look(device: Identity, metadata: Metadata) -> tuple[int, DeviceLetter] | None:
    """Return the letter of whoever knows the code, and when it was made."""
    key = device.encryption
    signer = new_code(device.signing).signer()
    found = await metadata.letters(key.kid)
    letters = [(key, blob) for _, blob in found if blob.startswith(MEMORY_MAGIC)]
    wholes = await trio.to_thread.run_sync(open_memories, letters, {signer.kid: signer.public})
    if not wholes:
        return None
    for letter_id, _ in found:
        await metadata.delete_letter(key.kid, letter_id)
    return wholes[0].made, DeviceLetter.from_bytes(wholes[0].text)


def _taken(device: Identity, arrived: tuple[int, DeviceLetter]) -> tuple[Carried, NewDevice]:
    made, letter = arrived
    listed = letter.proved()
    try:
        identity = open_identity(letter.identity, letter.key)
        stores: Any = json.loads(letter.stores)
    except ValueError:
        raise MeshkitError("invalid_record", "the stores in the letter of another device") from None
    finally:
        wipe(letter.key)
    if identity.chain != letter.chain or listed.find(device.signing.kid) is None:
        raise MeshkitError("invalid_record", "a letter that lets in somebody else")
    return Carried(identity, made, stores, letter.state), NewDevice(device, letter.list)
