"""Devices: homes that share one identity, each with a key pair of its own that never leaves it.

The device list says which they are. It is bound to the newest identity record, signed by the key in that,
and made anew with every record: so the directory, which takes one successor of a record and no other, also
decides which of two lists made at once is the list. It goes from device to device in sealed letters
(`core.memory`), together with the identity's private keys; nobody else sees it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.core import cbor
from meshkitfs.core.cose import record_hash
from meshkitfs.core.fields import Check, Record, blob, blob_up_to, check_fields, refuse, time, uint
from meshkitfs.core.identity_record import IdentityRecord, valid_handle
from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError

__all__ = [
    "DEVICES_MOST",
    "DeviceCode",
    "DeviceEntry",
    "DeviceLetter",
    "DeviceList",
    "new_code",
    "valid_device_name",
]

DEVICES_MOST: Final = 16
"""How many devices one identity may have."""
LETTER_MOST: Final = 32 << 20
_PREFIX: Final = "meshkit-device1:"
_SECRET: Final = 16
_CODE_LABEL: Final = b"mk/device-code@1"


def valid_device_name(name: object) -> bool:
    """Return whether a device may be called ``name``: as a handle, of at most 32 characters."""
    return valid_handle(name) and len(str(name)) <= 32


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One device: its ``name``, its self-signed identity ``record``, when (UNIX seconds) and by the device of
    which kid it was ``added``."""

    name: str
    record: bytes = dataclasses.field(repr=False)
    added: int
    by: bytes

    @property
    def public(self) -> IdentityRecord:
        """The device's record, parsed."""
        return IdentityRecord.parse_self_signed(self.record)

    @property
    def kid(self) -> bytes:
        """The kid of the device's signing key."""
        return self.public.kid


_ENTRY: Final[dict[str, Check]] = {
    "name": valid_device_name,
    "record": blob_up_to(16384),
    "added": time,
    "by": blob(16),
}


def _entries(value: Any) -> bool:
    if type(value) is not list or not 0 < len(value) <= DEVICES_MOST:
        return False
    for item in value:
        check_fields(item, _ENTRY, "a device")
    kids = {IdentityRecord.parse_self_signed(item["record"]).kid for item in value}
    return len(kids) == len({item["name"] for item in value}) == len(value)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class DeviceList(Record):
    """The devices of the identity ``handle`` as of its record number ``seq``, whose record hash is ``at``.

    Signed by the signing key of that record. Names and keys differ from one device to the next.
    """

    TYPE: ClassVar[str] = "mk/devices@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "handle": valid_handle,
        "at": blob(32),
        "seq": uint(1),
        "made": time,
        "devices": _entries,
    }

    handle: str
    at: bytes
    seq: int
    made: int
    devices: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, record: bytes, entries: tuple[DeviceEntry, ...], now: int) -> DeviceList:
        """Return the list of ``entries`` that belongs to the identity record ``record``; not signed yet."""
        newest = IdentityRecord.parse_self_signed(record)
        devices = tuple(dataclasses.asdict(entry) for entry in entries)
        return cls(newest.handle, newest.digest, newest.seq, now, devices)

    @classmethod
    def parse_for(cls, blob: bytes, record: bytes) -> DeviceList:
        """Return the list if it belongs to the identity record ``record``. Raises ``invalid_record``."""
        newest = IdentityRecord.parse_self_signed(record)
        found = cls.parse(blob, {newest.kid: newest.sig})
        if (found.handle, found.at, found.seq) != (newest.handle, newest.digest, newest.seq):
            raise refuse("a device list of another identity record")
        return found

    @classmethod
    def peek(cls, blob: bytes) -> DeviceList:
        """Return a list that was verified before it was kept."""
        return cls.parse_known(blob, record_hash(blob))

    @property
    def entries(self) -> tuple[DeviceEntry, ...]:
        """The devices."""
        return tuple(DeviceEntry(**item) for item in self.devices)

    def find(self, kid: bytes) -> DeviceEntry | None:
        """Return the device whose signing key has this kid."""
        return next((entry for entry in self.entries if entry.kid == kid), None)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceCode:
    """What a person carries from a new device to one that is there: which key it has, and a secret.

    Whoever knows the ``secret`` can make the new device believe that it is let in; whoever does not cannot.
    So the code proves each of them to the other, and is good for one device.
    """

    kid: bytes
    secret: bytes = dataclasses.field(repr=False)

    def to_text(self) -> str:
        """Return the code as one line of text. It is a secret."""
        return _PREFIX + base64.urlsafe_b64encode(self.kid + self.secret).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> DeviceCode:
        """Return the code in ``text``; white space in it is ignored. Raises ``invalid_argument``."""
        squeezed = "".join(text[:512].split())
        encoded = squeezed.removeprefix(_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        code = cls(raw[:16], raw[16:])
        if len(raw) != 16 + _SECRET or code.to_text() != squeezed:
            raise MeshkitError("invalid_argument", f"not the code of a new device ({_PREFIX}...)")
        return code

    def signer(self) -> SigningKey:
        """Return the key that the letter which lets this device in is signed with."""
        return SigningKey.from_seed(_derived(self.secret, 32, self.kid))


def _derived(secret: bytes, size: int, kid: bytes = b"") -> bytes:
    return HKDFExpand(hashes.SHA256(), size, _CODE_LABEL + kid).derive(secret)


def new_code(device: SigningKey) -> DeviceCode:
    """Return the code of a new device with the signing key ``device``: always the same one."""
    secret = _derived(device.seed, _SECRET)
    return DeviceCode(device.kid, secret)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLetter:
    """What one device tells another: the signed device ``list``, the identity's whole ``chain``, its keys.

    ``identity`` is the identity sealed under ``key``; both are empty for a device that is no longer one.
    ``stores`` (JSON) and ``state`` (as `state.CarriedRows` gives it) are for a new device, else "" and {}.
    """

    list: bytes
    chain: tuple[bytes, ...]
    key: bytes = dataclasses.field(default=b"", repr=False)
    identity: bytes = dataclasses.field(default=b"", repr=False)
    stores: str = ""
    state: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def to_bytes(self) -> bytes:
        """Return the text of the letter."""
        return cbor.encode(
            {
                "t": _LETTER,
                "list": self.list,
                "chain": list(self.chain),
                "key": self.key,
                "identity": self.identity,
                "stores": self.stores,
                "state": self.state,
            }
        )

    @classmethod
    def from_bytes(cls, text: bytes) -> DeviceLetter:
        """Return the letter in ``text``. Raises ``invalid_record``; nothing in it is proved by this."""
        value = cbor.decode(text, limit=LETTER_MOST)
        if not isinstance(value, dict) or value.get("t") != _LETTER:
            raise refuse("not a letter between devices")
        check_fields(value, _FIELDS, "a letter between devices")
        del value["t"]
        return cls(**value | {"chain": tuple(value["chain"])})

    def proved(self) -> DeviceList:
        """Return the device list, if it belongs to the end of the chain. Raises ``invalid_record``."""
        return DeviceList.parse_for(self.list, self.chain[-1])


_LETTER: Final = "mk/device-letter@1"
_FIELDS: Final[dict[str, Check]] = {
    "t": lambda value: value == _LETTER,
    "list": blob_up_to(1 << 20),
    "chain": lambda value: (
        type(value) is list and 0 < len(value) <= 1000 and all(map(blob_up_to(16384), value))
    ),
    "key": blob(0, 32),
    "identity": lambda value: type(value) is bytes,
    "stores": lambda value: type(value) is str,
    "state": lambda value: type(value) is dict,
}
