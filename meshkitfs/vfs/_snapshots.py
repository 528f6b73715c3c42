"""The directory ``.snapshots`` of each share: its versions by name, and short names that lead to them.

A version has one name, its label. Whatever else `parse_moment` understands is found too, as a symbolic link
to the label, so that a directory never has two names.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from meshkitfs.core.entries import DIR
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import SNAPSHOTS, AnyShare, PastShare, Share, Version
from meshkitfs.shares import inode_number as numbered
from meshkitfs.vfs._attributes import attr_of_past, timeout
from meshkitfs.vfs.types import Attr

__all__ = ["Snapshots", "has_snapshots"]

_NS: Final = 1_000_000_000
# The directory itself says nothing that is secret, and never changes what it is.
_DIRECTORY_S: Final = 60.0


def has_snapshots(share: AnyShare | None, ino: int) -> bool:
    """Whether ``ino`` is the root of a ``share`` that has versions: a live one, of a directory."""
    if not isinstance(share, Share) or share.root_ino != ino:
        return False
    return share.row.grant == "live" and share.row.kind == DIR


class _Alias:
    """A short name that the kernel was told of."""

    __slots__ = ("lookups", "name", "share", "size")

    def __init__(self, share: Share, name: bytes) -> None:
        self.share = share
        self.name = name
        # How long what it leads to was when it was looked up.
        self.size = 0
        self.lookups = 0


class Snapshots:
    """Knows the inodes of these directories and of the short names in them."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}
        self._aliases: dict[int, _Alias] = {}

    def __contains__(self, ino: int) -> bool:
        return ino in self._shares or ino in self._aliases

    def share_of(self, ino: int) -> Share | None:
        """Return the share whose versions the directory ``ino`` holds; None if it is no such directory."""
        return self._shares.get(ino)

    def enter(self, share: Share) -> Attr:
        """Return the attributes of a share's ``.snapshots``, which from now on is known by its inode."""
        ino = share.past.directory_ino
        self._shares[ino] = share
        return self.attr(ino)

    def attr(self, ino: int) -> Attr:
        alias = self._aliases.get(ino)
        if alias is not None:
            now = alias.share.row.created * _NS
            return Attr(ino, stat.S_IFLNK | 0o777, 1, alias.size, 0, now, now, now, 0.0, 0.0)
        share = self._shares[ino]
        versions = share.history.versions
        when = (versions[-1].time if versions else share.row.created) * _NS
        # Writable by its mode: the refusal is to be EROFS, and not that of the kernel for a mode.
        return Attr(ino, stat.S_IFDIR | 0o700, 1, 4096, 0, when, when, when, _DIRECTORY_S, 0.0)

    @staticmethod
    async def versions(share: Share) -> list[Version]:
        """Return the versions that are kept now, oldest first."""
        grant = await share.past.use("list", current=True)
        await share.history.refresh(grant)
        return share.history.kept

    async def lookup(self, ino: int, name: bytes) -> PastShare | Attr | None:
        """Return what a name in ``.snapshots`` means: a version, or (its attributes) a link to one."""
        share = self._shares[ino]
        await self.versions(share)
        version = self._meant(share, name)
        if version is None or version.label.encode() == name:
            return None if version is None else share.past.view(version)
        number = numbered(share.row.ref, SNAPSHOTS + b"/" + name)
        alias = self._aliases.setdefault(number, _Alias(share, name))
        alias.lookups += 1
        alias.size = len(version.label)
        return self.attr(number)

    @staticmethod
    def _meant(share: Share, name: bytes) -> Version | None:
        try:
            return share.history.at(os.fsdecode(name), int(share.services.wall()))
        except MeshkitError:
            return None

    async def target(self, ino: int) -> bytes | None:
        """Return what the symbolic link ``ino`` leads to now; None if it is none, or nothing is meant."""
        alias = self._aliases.get(ino)
        if alias is None:
            return None
        await self.versions(alias.share)
        version = self._meant(alias.share, alias.name)
        return None if version is None else version.label.encode()

    def forget(self, ino: int, count: int) -> None:
        alias = self._aliases.get(ino)
        if alias is not None:
            alias.lookups -= count
            if alias.lookups <= 0:
                del self._aliases[ino]

    @staticmethod
    def listed(view: PastShare) -> Attr:
        """Return the attributes of a version in a listing."""
        return attr_of_past(view, timeout(view))
