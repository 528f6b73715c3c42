"""Open files and directories."""

from __future__ import annotations

from meshkitfs.gate import Grant
from meshkitfs.shares import AnyShare, FileNode, PastShare

__all__ = ["ControlHandle", "DirHandle", "FileHandle"]

# A reader that goes on where it stopped gets this much decrypted ahead of it (bytes of plaintext).
READ_AHEAD = 4 << 20


class FileHandle:
    """One open of a file. ``wrote`` says that closing it should publish soon."""

    __slots__ = ("append", "ino", "next_offset", "node", "prefetched", "share", "wrote")

    def __init__(self, share: AnyShare, node: FileNode, *, append: bool) -> None:
        self.share = share
        self.node = node
        self.ino = node.ino
        self.append = append
        self.wrote = False
        self.next_offset = 0
        # Block number up to which read-ahead was already asked for.
        self.prefetched = 0

    def ahead(self, offset: int, size: int, block_size: int, file_size: int) -> range:
        """Note a read and return the numbers of the blocks to fetch ahead; empty unless reading on."""
        sequential = offset == self.next_offset and offset > 0
        self.next_offset = offset + size
        if not sequential or not block_size:
            if offset == 0:
                self.prefetched = 0
            return range(0)
        here = (offset + size) // block_size
        stop = min(here + READ_AHEAD // block_size, -(-file_size // block_size))
        first = max(self.prefetched, here)
        # Ask again only when a good part of the window is used up, so that requests come in batches.
        if stop - first < max(1, READ_AHEAD // block_size // 2) and stop * block_size < file_size:
            return range(0)
        self.prefetched = max(stop, self.prefetched)
        return range(first, stop)


class DirHandle:
    """One open of a directory: the names as they were at its first read, so that positions stay valid.

    ``grant`` is the one it was opened with; a listing cannot wait for a new one.
    """

    __slots__ = ("grant", "ino", "names", "share", "versions")

    def __init__(
        self,
        ino: int,
        share: AnyShare | None,
        grant: Grant | None = None,
        *,
        versions: list[PastShare] | None = None,
    ) -> None:
        self.ino = ino
        self.share = share
        self.grant = grant
        # What a ``.snapshots`` holds; None for every other directory.
        self.versions = versions
        self.names: list[bytes] = []


class ControlHandle:
    """One open of a file below ``.meshkit``: its content at that moment."""

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content
