"""From a node to what stat shows of it."""

from __future__ import annotations

import stat

from meshkitfs.core.entries import DIR, FILE
from meshkitfs.shares import AnyShare, DirNode, FileNode, Node, PastShare, Share, SymlinkNode
from meshkitfs.vfs.types import Attr

__all__ = ["absence", "attr_of", "attr_of_past", "attr_of_share", "timeout"]

# How long the kernel may believe names and attributes without asking. Nobody else writes a share that is
# only ours; where others do, or can lose access, changes are pushed and this only bounds a lost push.
ALONE_S = 60.0
SHARED_S = 1.0

_TYPES = (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK)


def timeout(share: AnyShare) -> float:
    """Return for how many seconds the kernel may believe what it is told of ``share``."""
    grant = share.grant
    if grant is None or not grant.alive:
        return 0.0
    if isinstance(share, PastShare):
        return ALONE_S  # nobody writes the past
    return ALONE_S if share.row.mine and len(grant.roster.writers) == 1 else SHARED_S


def absence(share: AnyShare) -> float:
    """Return for how many seconds the kernel may believe that a name is not there: never, if others write."""
    seconds = timeout(share)
    return seconds if seconds == ALONE_S else 0.0


def attr_of(share: AnyShare, node: Node) -> Attr:
    """Return the attributes of a node."""
    seconds = timeout(share)
    if node.ino == share.root_ino and isinstance(share, PastShare):
        return attr_of_past(share, seconds)
    nlink = node.nlink
    if isinstance(node, FileNode):
        size = node.size
        blocks = -(-node.used() // 512)
    elif isinstance(node, DirNode):
        nlink = 2 + node.subdirs if node.nlink else 0
        size, blocks = 4096, 8
    else:
        assert isinstance(node, SymlinkNode)  # there are no other kinds
        size, blocks = len(node.target), 0
    return Attr(
        node.ino, _TYPES[node.kind] | node.mode, nlink, size, blocks, node.atime_ns, node.mtime_ns,
        node.ctime_ns, seconds, seconds,
    )  # fmt: skip


def attr_of_past(share: PastShare, seconds: float) -> Attr:
    """Return the attributes of a past version's root, the same whether its tree is loaded or not.

    Its time is when it was published; ``seconds`` is how long the kernel may believe it.
    """
    when = share.version.time * 1_000_000_000
    # One link: "not counted". With two, some programs would not look for directories in it.
    return Attr(share.root_ino, stat.S_IFDIR | 0o700, 1, 4096, 8, when, when, when, seconds, seconds)


def attr_of_share(share: Share) -> Attr:
    """Return what is shown of a share whose tree is not there, because it was not opened or was refused."""
    row = share.row
    kind = stat.S_IFDIR if row.kind == DIR else stat.S_IFREG
    assert row.kind in (DIR, FILE)
    return Attr(
        share.root_ino, kind | row.mode, 2 if row.kind == DIR else 1, 0, 0,
        row.mtime_ns, row.mtime_ns, row.mtime_ns, 1.0, 0.0,
    )  # fmt: skip
