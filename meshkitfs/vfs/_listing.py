"""Reading directories, and how much room there is."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from meshkitfs.core.entries import HARDLINK, Entry
from meshkitfs.errors import MeshkitError
from meshkitfs.shares import (
    SNAPSHOTS,
    AnyShare,
    DirNode,
    PastShare,
    posix,
)
from meshkitfs.vfs._attributes import attr_of, attr_of_share
from meshkitfs.vfs._finder import Finder, noted
from meshkitfs.vfs._handles import DirHandle
from meshkitfs.vfs._snapshots import has_snapshots
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
    StatFs,
)

__all__ = ["Listing"]


_STATFS_BLOCK = 4096
# Positions of a listing that "." and ".." take.
_DOTS = 2


class Listing(Finder):
    """Open directories."""

    @noted
    async def opendir(self, ino: int) -> int:
        if ino == ROOT_INO or ino in self._control:
            closed = self.closed()
            if closed is not None and ino == ROOT_INO:
                raise closed
            return self._handle(DirHandle(ino, None))
        versioned = self._snapshots.share_of(ino)
        if versioned is not None:
            views = [versioned.past.view(version) for version in await self._snapshots.versions(versioned)]
            self._shares |= {view.root_ino: view for view in views}
            return self._handle(DirHandle(ino, None, versions=views))
        share, grant, tree, node = await self._granted(ino, "list", current=True)
        if not isinstance(node, DirNode):
            raise posix(errno.ENOTDIR)
        await tree.load(grant, node)
        self.faults.clear(ino)
        self.opens.allowed(share, node, "list")
        return self._handle(DirHandle(ino, share, grant))

    def readdir(self, fh: int, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        handle = self._handles[fh]
        assert isinstance(handle, DirHandle)
        if handle.share is not None:
            yield from self._read_directory(handle, handle.share, start)
            return
        if handle.versions is not None:
            yield from self._read_versions(handle, handle.versions, start)
            return
        own = self._root_attr() if handle.ino == ROOT_INO else self._control.attr(handle.ino)
        yield from _dots(start, own, self._root_attr())
        start = max(start, _DOTS)
        if handle.ino == ROOT_INO:
            yield from self._read_root(handle, start)
        else:
            for i, (name, ino) in enumerate(self._control.names()[start - _DOTS :], start):
                yield name, self._control.attr(ino), i + 1

    def _read_root(self, handle: DirHandle, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        closed = self.closed()
        if closed is not None:
            raise closed
        if start == _DOTS:
            handle.names = sorted(self.book.shares)
        for i in range(start, len(handle.names) + _DOTS):
            name = handle.names[i - _DOTS]
            share = self.book.shares.get(name)
            if share is not None:
                self._shares[share.root_ino] = share
                root = share.tree_root
                attr = attr_of_share(share) if root is None else attr_of(share, root)
                yield name, attr, i + 1

    def _read_versions(
        self, handle: DirHandle, versions: list[PastShare], start: int
    ) -> Iterator[tuple[bytes, Attr, int]]:
        share = self._snapshots.share_of(handle.ino)
        assert share is not None  # it is never forgotten
        if share.past.live("list") is None:
            raise share.refusal or MeshkitError("freshness_unproven", share.name)
        above = attr_of_share(share) if share.tree_root is None else attr_of(share, share.tree_root)
        yield from _dots(start, self._snapshots.attr(handle.ino), above)
        start = max(start, _DOTS)
        for i in range(start, len(versions) + _DOTS):
            # The kernel may have forgotten it since this listing began.
            view = versions[i - _DOTS] = share.past.view(versions[i - _DOTS].version)
            self._shares[view.root_ino] = view
            yield view.version.label.encode(), self._snapshots.listed(view), i + 1

    def _read_directory(
        self, handle: DirHandle, share: AnyShare, start: int
    ) -> Iterator[tuple[bytes, Attr, int]]:
        tree = share.tree
        if share.refusal is not None:
            raise share.refusal
        # Between a revocation here and the next walk the share has no grant; that of the handle lives on.
        if tree is None or not (share.live("list") or (handle.grant is not None and handle.grant.alive)):
            raise MeshkitError("freshness_unproven", share.name)
        node = tree.nodes.get(handle.ino)
        if not isinstance(node, DirNode) or node.children is None:
            raise posix(errno.ESTALE)
        above = self._root_attr() if node is tree.root else attr_of(share, node.parent or node)
        yield from _dots(start, attr_of(share, node), above)
        start = max(start, _DOTS)
        if start == _DOTS:
            # `.snapshots` is there without being listed, also where an older program made a real one.
            hidden = SNAPSHOTS if has_snapshots(share, node.ino) else None
            handle.names = [name for name in node.children if name != hidden]
        for i in range(start, len(handle.names) + _DOTS):
            name = handle.names[i - _DOTS]
            child = node.children.get(name)
            if child is None:
                continue
            if isinstance(child, Entry) and child.kind == HARDLINK and tree.links.children is None:
                continue
            yield name, self._hand_out(share, tree.node_of(node, name)), i + 1

    @noted
    async def fsyncdir(self, fh: int) -> None:
        handle = self._handles[fh]
        if isinstance(handle, DirHandle) and handle.share is not None and handle.share.dirty:
            await handle.share.fsync()

    async def releasedir(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if isinstance(handle, DirHandle):
            for view in handle.versions or ():
                self._let_go(view)

    async def statfs(self) -> StatFs:
        usage = self.book.usage()
        files = sum(len(share.tree.nodes) for share in self.book.shares.values() if share.tree is not None)
        return StatFs(
            _STATFS_BLOCK, usage.total_bytes, usage.free_bytes, files + usage.free_inodes, usage.free_inodes
        )


def _dots(start: int, own: Attr, above: Attr) -> Iterator[tuple[bytes, Attr, int]]:
    """Yield "." and ".." of a listing, which stand before everything else in it."""
    for i, (name, attr) in enumerate(((b".", own), (b"..", above)), 1):
        if start < i:
            yield name, attr, i
