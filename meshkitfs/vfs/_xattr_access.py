"""Extended attributes: those we make up, and those a person keeps with a file."""

from __future__ import annotations

import errno

from meshkitfs.core.entries import XATTR_NAME_MAX, XATTR_TOTAL_MAX
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import (
    posix,
)
from meshkitfs.vfs._finder import Finder, noted
from meshkitfs.vfs._xattrs import PREFIX, meshkit_names, meshkit_value
from meshkitfs.vfs.types import (
    ROOT_INO,
)

__all__ = ["XattrAccess"]


class XattrAccess(Finder):
    """Extended attributes."""

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        if ino == ROOT_INO or ino in self._control or ino in self._snapshots:
            raise posix(errno.ENODATA)
        share, node = self._known(ino)
        if name.startswith(PREFIX):
            if share.grant is None and share.refusal is None:
                await self._share_attr(share)
            value = meshkit_value(name, share, node, self._runtime, self.faults.of(ino))
        else:
            _, _, _, node = await self._granted(ino, "list")
            value = node.xattrs.get(name)
        if value is None:
            raise posix(errno.ENODATA)
        return value

    async def listxattr(self, ino: int) -> list[bytes]:
        if ino == ROOT_INO or ino in self._control or ino in self._snapshots:
            return []
        share, node = self._known(ino)
        names = meshkit_names(share, node, self._runtime)
        try:
            _, _, _, node = await self._granted(ino, "list")
        except MeshkitError:
            return names  # of a refused share only what says why
        return names + list(node.xattrs)

    @noted
    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        if name.startswith(PREFIX):
            raise posix(errno.EACCES)
        if not name.startswith(b"user."):
            raise posix(errno.EOPNOTSUPP)
        if len(name) > XATTR_NAME_MAX:
            raise posix(errno.ERANGE)
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.EACCES)
        share, grant, tree, node = await self._granted(ino, "write")
        async with share.changing():
            self._still(share, grant, tree, node)
            total = sum(len(key) + len(held) for key, held in node.xattrs.items() if key != name)
            if total + len(name) + len(value) > XATTR_TOTAL_MAX:
                raise posix(errno.ENOSPC)
            node.xattrs[name] = value
            tree.touch(node)
        share.hurry()

    @noted
    async def removexattr(self, ino: int, name: bytes) -> None:
        if name.startswith(PREFIX):
            raise posix(errno.EACCES)
        if ino == ROOT_INO or ino in self._control:
            raise posix(errno.ENODATA)
        share, grant, tree, node = await self._granted(ino, "write")
        async with share.changing():
            self._still(share, grant, tree, node)
            if node.xattrs.pop(name, None) is None:
                raise posix(errno.ENODATA)
            tree.touch(node)
        share.hurry()
