"""Directory entries: names and attributes of children, in one array form each.

``[name, kind, oid, mode, mtime_s, mtime_ns, ctime_s, ctime_ns, size, epoch, ver, ref, extra]``. Entries carry
the child's attributes, so that listing a directory fetches nothing per child.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from meshkitfs.core.blocks import HOLE, OID_SIZE, REF_SIZE
from meshkitfs.core.cbor import MAX_INT
from meshkitfs.errors import MeshkitError

__all__ = [
    "DIR",
    "FILE",
    "HARDLINK",
    "NAME_MAX",
    "SYMLINK",
    "TARGET_MAX",
    "XATTR_NAME_MAX",
    "XATTR_TOTAL_MAX",
    "Entry",
    "decode_entries",
    "encode_entries",
    "invalid",
    "valid_extra",
    "valid_name",
]

DIR: Final = 0
FILE: Final = 1
SYMLINK: Final = 2
HARDLINK: Final = 3

NAME_MAX: Final = 255
TARGET_MAX: Final = 4095
XATTR_NAME_MAX: Final = 255
XATTR_TOTAL_MAX: Final = 131072  # names and values of one object together
_NS: Final = 1_000_000_000


class Entry(NamedTuple):
    """One name in a directory.

    ``mode`` has the permission bits (0o7777), times are nanoseconds since the epoch, ``size`` is in bytes;
    ``epoch`` and ``ver`` say as what the child's manifest was sealed and ``ref`` (64 bytes) is its reference;
    symlinks and hard links have no manifest and ``ref`` is empty. ``extra`` may hold: ``target`` (symlink,
    bytes), ``x`` (user xattrs: sorted [name, value] pairs of bytes), ``used`` (bytes really stored),
    ``nlink``.
    """

    name: bytes
    kind: int
    oid: bytes
    mode: int
    mtime_ns: int
    ctime_ns: int
    size: int
    epoch: int
    ver: int
    ref: bytes
    extra: dict[str, Any] | None = None

    def __repr__(self) -> str:
        # The reference contains a key, and names do not belong into logs either.
        return f"Entry(kind={self.kind}, oid={self.oid.hex()}, size={self.size}, ver={self.ver})"


def invalid(detail: str) -> MeshkitError:
    """Return the error for sealed content that breaks a rule of the format."""
    return MeshkitError("invalid_envelope", detail)


def valid_name(name: object) -> bool:
    """Return whether ``name`` may stand in a directory: 1 to 255 bytes, no '/' or NUL, not '.' or '..'."""
    return (
        type(name) is bytes
        and 0 < len(name) <= NAME_MAX
        and b"/" not in name
        and b"\0" not in name
        and name != b"."
        and name != b".."
    )


def _valid_xattrs(pairs: object) -> bool:
    if type(pairs) is not list or not pairs:
        return False
    last = b""
    total = 0
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2:
            return False
        name, value = pair
        if type(name) is not bytes or type(value) is not bytes or len(name) > XATTR_NAME_MAX:
            return False
        if name <= last or b"\0" in name:
            return False
        last = name
        total += len(name) + len(value)
    return total <= XATTR_TOTAL_MAX


def valid_extra(extra: object) -> bool:
    """Return whether ``extra`` has known keys in canonical order (shorter first) and valid values."""
    if type(extra) is not dict:
        return False
    last = (0, "")
    for key, value in extra.items():
        if type(key) is not str or (len(key), key) <= last:
            return False
        last = (len(key), key)
        if key == "x":
            ok = _valid_xattrs(value)
        elif key == "used":
            ok = type(value) is int and 0 <= value <= MAX_INT
        elif key == "nlink":
            ok = type(value) is int and 1 <= value <= MAX_INT
        elif key == "target":
            ok = type(value) is bytes and 0 < len(value) <= TARGET_MAX and b"\0" not in value
        else:
            return False
        if not ok:
            return False
    return True


def encode_entries(entries: Iterable[Entry]) -> list[list[Any]]:
    """Return the array form of ``entries``, ready for the encoder (extra keys in canonical order)."""
    out = []
    for name, kind, oid, mode, mtime, ctime, size, epoch, ver, ref, extra in entries:
        mtime_s, mtime_ns = divmod(mtime, _NS)
        ctime_s, ctime_ns = divmod(ctime, _NS)
        if extra:
            extra = {key: extra[key] for key in sorted(extra, key=lambda key: (len(key), key))}
        out.append(
            [name, kind, oid, mode, mtime_s, mtime_ns, ctime_s, ctime_ns, size, epoch, ver, ref, extra or {}]
        )
    return out


def _decode_entry(item: object) -> Entry:
    if type(item) is not list or len(item) != 13:
        raise invalid("entry")
    name, kind, oid, mode, mtime_s, mtime_ns, ctime_s, ctime_ns, size, epoch, ver, ref, extra = item
    # One pass over exact types: bool is not int here, and nothing else may pass for a number.
    if not (
        type(kind) is type(mode) is type(mtime_s) is type(mtime_ns) is type(ctime_s) is type(ctime_ns) is int
        and type(size) is type(epoch) is type(ver) is int
        and type(oid) is type(ref) is bytes
        and type(extra) is dict
    ):
        raise invalid("type of a field of an entry")
    if not valid_name(name):
        raise invalid("name")
    if not (
        0 <= mode <= 0o7777
        and 0 <= mtime_ns < _NS
        and 0 <= ctime_ns < _NS
        and -MAX_INT <= mtime_s <= MAX_INT
        and -MAX_INT <= ctime_s <= MAX_INT
        and 0 <= size <= MAX_INT
        and 0 <= epoch <= MAX_INT
        and 0 <= ver <= MAX_INT
        and len(oid) == OID_SIZE
    ):
        raise invalid("value of a field of an entry")
    if kind in (DIR, FILE):
        if len(ref) != REF_SIZE or ref == HOLE:
            raise invalid("reference of an entry")
    elif kind not in (SYMLINK, HARDLINK) or ref:
        raise invalid("kind of an entry")
    if extra and not valid_extra(extra):
        raise invalid("extra fields of an entry")
    if ("target" in extra) != (kind == SYMLINK):
        raise invalid("a target belongs to a symlink")
    return Entry(
        name,
        kind,
        oid,
        mode,
        mtime_s * _NS + mtime_ns,
        ctime_s * _NS + ctime_ns,
        size,
        epoch,
        ver,
        ref,
        extra or None,
    )


def decode_entries(items: object) -> tuple[Entry, ...]:
    """Return the entries of a decoded array, strictly ascending by name. Raises ``invalid_envelope``."""
    if type(items) is not list:
        raise invalid("entries")
    entries = tuple(map(_decode_entry, items))
    last = b""
    for entry in entries:
        if entry.name <= last:
            raise invalid("entries out of order, or a name twice")
        last = entry.name
    return entries
