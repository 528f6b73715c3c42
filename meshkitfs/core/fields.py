"""Checks for the fields of signed records, and the base class of those records.

A record type lists its fields with one check each. There are no optional and no unknown fields: what is
absent is null, and a payload with one field more or less is refused.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Self

from meshkitfs.core import cose
from meshkitfs.core.cbor import MAX_INT
from meshkitfs.core.keys import SigningKey, check_ed25519_public
from meshkitfs.errors import MeshkitError

__all__ = [
    "Check",
    "Record",
    "array",
    "blob",
    "check_fields",
    "choice",
    "nullable",
    "public_key",
    "ranges",
    "refuse",
    "text",
    "time",
    "uint",
]

Check = Callable[[Any], bool]
TIME_MAX: Final = 1 << 40  # seconds; far beyond any date, far below 2**53


def refuse(detail: str) -> MeshkitError:
    """Return the error for a record that breaks a rule of the format."""
    return MeshkitError("invalid_record", detail)


def blob(*sizes: int) -> Check:
    """Bytes of one of these lengths."""
    return lambda value: type(value) is bytes and len(value) in sizes


def blob_up_to(limit: int) -> Check:
    """Bytes, 1 to ``limit`` of them."""
    return lambda value: type(value) is bytes and 0 < len(value) <= limit


def text(limit: int, at_least: int = 0) -> Check:
    """Text of at most ``limit`` bytes in UTF-8."""
    return lambda value: type(value) is str and at_least <= len(value.encode(errors="replace")) <= limit


def uint(at_least: int = 0, at_most: int = MAX_INT) -> Check:
    """An integer in this range."""
    return lambda value: type(value) is int and at_least <= value <= at_most


time: Final[Check] = uint(0, TIME_MAX)


def choice(*values: str) -> Check:
    """One of these texts."""
    return lambda value: value in values


def nullable(check: Check) -> Check:
    """Null, or what ``check`` accepts."""
    return lambda value: value is None or check(value)


def array(check: Check, limit: int) -> Check:
    """An array of at most ``limit`` different values, each of which ``check`` accepts."""
    return lambda value: (
        type(value) is list
        and len(value) <= limit
        and all(map(check, value))
        and len(set(value)) == len(value)
    )


def ranges(limit: int) -> Check:
    """At most ``limit`` triples (first, last, time) in one flat array: ascending, apart, none empty."""

    def check(value: Any) -> bool:
        if type(value) is not list or len(value) % 3 or len(value) > 3 * limit:
            return False
        if not all(uint()(number) for number in value):
            return False
        end = 0
        for first, last in zip(value[::3], value[1::3], strict=True):
            if not end < first <= last:
                return False
            end = last
        return all(map(time, value[2::3]))

    return check


def public_key(value: Any) -> bool:
    """An Ed25519 public key that is safe to verify with."""
    check_ed25519_public(value)
    return True


def check_fields(value: Mapping[str, Any], fields: Mapping[str, Check], what: str) -> None:
    """Raise MeshkitError ``invalid_record`` unless ``value`` has exactly ``fields``, each valid."""
    if type(value) is not dict or value.keys() != fields.keys():
        raise refuse(f"fields of {what}")
    for name, check in fields.items():
        if not check(value[name]):
            raise refuse(f"field {name} of {what}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Record:
    """A signed record: the fields of the subclass, and who signed it (``signer``, kid) once parsed.

    ``digest`` is the record hash (SHA-256 of the whole signed blob) once parsed.
    """

    TYPE: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, Check]]

    signer: bytes = dataclasses.field(default=b"", compare=False)
    digest: bytes = dataclasses.field(default=b"", compare=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(digest={self.digest.hex()})"

    def payload(self) -> dict[str, Any]:
        """Return the map that is signed. Raises ``invalid_record`` if a field breaks a rule."""
        value: dict[str, Any] = {}
        for name in self.FIELDS:
            item = getattr(self, name)
            value[name] = list(item) if type(item) is tuple else item
        self._check(value)
        return value | {"t": self.TYPE}

    def sign(self, signer: SigningKey) -> bytes:
        """Return the record signed by ``signer``."""
        return cose.sign1(signer, self.TYPE, self.payload())

    @classmethod
    def parse(cls, blob: bytes, keys: Mapping[bytes, bytes]) -> Self:
        """Return the record in ``blob`` if one of ``keys`` (kid -> public key) signed it.

        Raises MeshkitError ``invalid_record`` otherwise, and for any field missing, unknown or invalid.
        """
        value, kid = cose.verify1(blob, keys, cls.TYPE)
        return cls._from_payload(value, kid, blob)

    @classmethod
    def parse_known(cls, blob: bytes, digest: bytes) -> Self:
        """Return the record in ``blob`` if its record hash is ``digest``, which a verified record named.

        The signature is not looked at: whoever signed then need not be allowed to sign now. Raises
        MeshkitError ``invalid_record`` if it is another record, or breaks a rule of the format.
        """
        if not hmac.compare_digest(cose.record_hash(blob), digest):
            raise refuse(f"not the {cls.TYPE} that was named")
        value, kid = cose.read1(blob, cls.TYPE)
        return cls._from_payload(value, kid, blob)

    @classmethod
    def _from_payload(cls, value: dict[str, Any], kid: bytes, blob: bytes) -> Self:
        del value["t"]
        cls._check(value)
        values = {name: tuple(item) if type(item) is list else item for name, item in value.items()}
        return cls(**values, signer=kid, digest=cose.record_hash(blob))

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
