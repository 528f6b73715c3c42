"""From a share's root manifest to its tree in memory."""

from __future__ import annotations

from meshkitfs.core.manifest import DirManifest, FileManifest
from meshkitfs.gate import Grant
from meshkitfs.shares._content import FileContent
from meshkitfs.shares._directories import read_pages
from meshkitfs.shares._nodes import DirNode, FileNode, inode_number
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._sealer import Sealer
from meshkitfs.shares._tree import Tree
from meshkitfs.shares._versions import links_entry
from meshkitfs.state import ShareRow

__all__ = ["plant"]


async def plant(
    grant: Grant, row: ShareRow, manifest: DirManifest | FileManifest, reader: BlockReader, sealer: Sealer
) -> Tree:
    """Return the tree of ``row`` whose root is ``manifest``, root directory and link table loaded."""
    ino = inode_number(row.ref, row.oid)
    if isinstance(manifest, FileManifest):
        return Tree(
            row.ref, reader, sealer, _single_file(row, ino, FileContent(row.oid, reader, sealer, manifest))
        )
    root = DirNode(row.oid, ino)
    tree = Tree(row.ref, reader, sealer, root)
    pages = await read_pages(reader, grant, manifest)
    if manifest.root is not None:
        root.mode, root.mtime_ns, root.ctime_ns, extra = manifest.root
        root.xattrs = dict((extra or {}).get("x", ()))
    else:
        # A directory granted as a snapshot has its attributes in its parent, which is not granted.
        root.mode, root.mtime_ns, root.ctime_ns = row.mode, row.mtime_ns, row.mtime_ns
    root.atime_ns = root.mtime_ns
    if manifest.links is not None:
        tree.links.oid = manifest.links_oid
        tree.links.entry = links_entry(manifest)
        tree.links.version = manifest.links_ver
        tree.links.children = None
        await tree.load(grant, tree.links)
    root.fill(manifest, pages, {})
    return tree


def _single_file(row: ShareRow, ino: int, content: FileContent) -> FileNode:
    node = FileNode(row.oid, ino)
    node.mode = row.mode
    node.mtime_ns = node.ctime_ns = node.atime_ns = row.mtime_ns
    node.content = content
    # Nothing but this node knows the content's manifest, so it stays.
    node.pins = 1
    return node
