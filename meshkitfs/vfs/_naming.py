"""Making, removing and renaming: the operations on names."""

from __future__ import annotations

import errno

from meshkitfs.core.entries import DIR, TARGET_MAX
from meshkitfs.shares import (
    DirNode,
    posix,
)
from meshkitfs.vfs._finder import Finder, noted
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
)

__all__ = ["Naming"]


class Naming(Finder):
    """Changes of names: of files inside shares, and of the shares themselves."""

    @noted
    async def mkdir(self, parent: int, name: bytes, mode: int) -> Attr:
        if parent == ROOT_INO:
            return await self._share_attr(await self.book.create(name, mode & 0o777))
        self._not_reserved(parent, name)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.new_directory(mode & 0o7777)
            self._create(tree, directory, name, node)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @noted
    async def symlink(self, parent: int, name: bytes, target: bytes) -> Attr:
        if not 0 < len(target) <= TARGET_MAX:
            raise posix(errno.ENAMETOOLONG)
        self._not_reserved(parent, name)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.new_symlink(target)
            self._create(tree, directory, name, node)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @noted
    async def link(self, ino: int, parent: int, name: bytes) -> Attr:
        self._not_past(parent)
        self._not_reserved(parent, name)
        if parent == ROOT_INO or self._shares.get(parent) is not self._shares.get(ino):
            raise posix(errno.EXDEV)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            if tree.links.children is None:
                await tree.load(grant, tree.links)
            _, node = self._known(ino)
            if node is None:
                raise posix(errno.EPERM)
            self._still(share, grant, tree, directory)
            tree.link(node, directory, name)
            node.lookups += 1
        share.hurry()
        return self._hand_out(share, node)

    @noted
    async def unlink(self, parent: int, name: bytes) -> None:
        if parent == ROOT_INO:
            await self._remove_share(name, DIR, errno.EISDIR, wanted=False)
            return
        self._not_reserved(parent, name, errno.EACCES)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            tree.remove(directory, name, directory=False)
        share.hurry()

    @noted
    async def rmdir(self, parent: int, name: bytes) -> None:
        if parent == ROOT_INO:
            await self._remove_share(name, DIR, errno.ENOTDIR, wanted=True)
            return
        self._not_reserved(parent, name, errno.EACCES)
        share, grant, tree, directory = await self._directory(parent, "write")
        async with share.changing():
            self._still(share, grant, tree, directory)
            node = tree.node_of(directory, name)
            if isinstance(node, DirNode):
                await tree.load(grant, node)
            tree.remove(directory, name, directory=True)
        share.hurry()

    async def _remove_share(self, name: bytes, kind: int, mismatch: int, *, wanted: bool) -> None:
        """Removing an empty share of one's own, or a snapshot file, forgets it; anything else is refused."""
        share = self.book.shares.get(name)
        if share is None:
            raise posix(errno.ENOENT)
        if (share.row.kind == kind) is not wanted:
            raise posix(mismatch)
        if share.row.kind == DIR:
            await share.use("list", current=True)
            root = share.tree_root
            if isinstance(root, DirNode) and root.children:
                raise posix(errno.ENOTEMPTY)
            if not share.row.mine:
                raise posix(errno.EPERM)
            if len(self.book.standing(share)) > 1:
                # Forgotten here, it could never be revoked again: the grants have to end first.
                raise posix(errno.EBUSY)
        await self.book.remove(share)

    @noted
    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        if old_parent == ROOT_INO and new_parent == ROOT_INO:
            await self._rename_share(old_name, new_name, flags)
            return
        self._not_past(old_parent, new_parent)
        self._not_reserved(old_parent, old_name, errno.EACCES)
        self._not_reserved(new_parent, new_name)
        if ROOT_INO in (old_parent, new_parent) or self._shares.get(old_parent) is not self._shares.get(
            new_parent
        ):
            raise posix(errno.EXDEV)
        share, grant, tree, source = await self._directory(old_parent, "write")
        _, _, _, target = await self._directory(new_parent, "write")
        async with share.changing():
            self._still(share, grant, tree, source, target)
            replaced = (target.children or {}).get(new_name)
            if replaced is not None and replaced.kind == DIR:
                directory = tree.node_of(target, new_name)
                if isinstance(directory, DirNode):
                    await tree.load(grant, directory)
            tree.rename(source, old_name, target, new_name, flags)
        share.hurry()

    async def _rename_share(self, old_name: bytes, new_name: bytes, flags: int) -> None:
        share = self.book.shares.get(old_name)
        if share is None:
            raise posix(errno.ENOENT)
        if flags & ~1:
            raise posix(errno.EINVAL)
        if old_name != new_name:
            await self.book.rename(share, new_name)
