"""The nodes of a share's tree in memory: directories, files, symlinks, and how they are found.

A child that nobody has asked for is just its `Entry`; it becomes a `Node` at its first lookup. ``entry`` is
what the last local commit recorded of a node, ``generation`` counts its changes, so a commit knows whether
a node changed again while it was being written out.

Dirtiness climbs at commit time, not at write time: a write marks only the node itself.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, Final

from meshkitfs.core.entries import DIR, FILE, SYMLINK, Entry
from meshkitfs.core.manifest import DIR_INLINE_ENTRIES, DirManifest
from meshkitfs.shares._content import FileContent

__all__ = ["Child", "DirNode", "FileNode", "Node", "Part", "SymlinkNode", "inode_number", "new_oid"]

# A page of a directory is split past either of these.
PART_ENTRIES: Final = 256
PART_BYTES: Final = 64 * 1024


def new_oid() -> bytes:
    return os.urandom(16)


def inode_number(ref: bytes, oid: bytes) -> int:
    """Return the 63-bit inode number of object ``oid`` under the share row ``ref``; never below 2**32.

    Stable for the object's life on every device, which git, rsync and NFS-style caches count on.
    """
    number = int.from_bytes(hashlib.sha256(b"mk/ino@1" + ref + oid).digest()[:8], "big")
    return (number & 0x7FFF_FFFF_FFFF_FFFF) | 0x1_0000_0000


class Node:
    """What all objects have. ``parent`` is None once the last name is gone; times are nanoseconds."""

    __slots__ = (
        "atime_ns", "clean_generation", "ctime_ns", "entry", "generation", "ino", "linked", "lookups", "mode",
        "mtime_ns", "name", "nlink", "oid", "opens", "parent", "version", "xattrs",
    )  # fmt: skip
    kind = -1

    def __init__(self, oid: bytes, ino: int) -> None:
        self.oid = oid
        self.ino = ino
        self.mode = 0
        self.mtime_ns = self.ctime_ns = self.atime_ns = 0
        self.nlink = 1
        self.xattrs: dict[bytes, bytes] = {}
        self.parent: DirNode | None = None
        self.name = b""
        # The object lives in the share's link table, because it has (or had) several names.
        self.linked = False
        self.lookups = 0
        self.opens = 0
        self.generation = 0
        self.clean_generation = 0
        self.entry: Entry | None = None
        # The manifest version last written; the next one gets version + 1.
        self.version = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.oid.hex()[:8]}>"

    @property
    def dirty(self) -> bool:
        return self.generation != self.clean_generation

    def adopt(self, entry: Entry) -> None:
        """Take the attributes of a committed entry; the node is clean afterwards."""
        self.entry = entry
        self.mode, self.mtime_ns, self.ctime_ns = entry.mode, entry.mtime_ns, entry.ctime_ns
        self.atime_ns = entry.mtime_ns
        self.version = entry.ver
        extra = entry.extra or {}
        self.xattrs = dict(extra.get("x", ()))
        self.nlink = extra.get("nlink", 1)
        self.clean_generation = self.generation

    def extra(self) -> dict[str, Any]:
        """Return the optional fields of this node's entry."""
        extra: dict[str, Any] = {}
        if self.xattrs:
            extra["x"] = [[name, self.xattrs[name]] for name in sorted(self.xattrs)]
        if self.linked:
            extra["nlink"] = max(1, self.nlink)
        return extra


class SymlinkNode(Node):
    __slots__ = ("target",)
    kind = SYMLINK

    def __init__(self, oid: bytes, ino: int, target: bytes = b"") -> None:
        super().__init__(oid, ino)
        self.target = target

    def adopt(self, entry: Entry) -> None:
        super().adopt(entry)
        self.target = (entry.extra or {})["target"]

    def extra(self) -> dict[str, Any]:
        return super().extra() | {"target": self.target}


class FileNode(Node):
    """A file. ``content`` is there while it is open or changed; a clean file needs only its entry."""

    __slots__ = ("_size", "_used", "content", "kernel_current", "past_sizes", "pins")
    kind = FILE

    def __init__(self, oid: bytes, ino: int) -> None:
        super().__init__(oid, ino)
        self.content: FileContent | None = None
        self._size = 0
        self._used = 0
        # Whether pages the kernel has cached of this file are still its content: local writes go through
        # the page cache and keep it so, a change from elsewhere does not.
        self.kernel_current = True
        # Sizes the file had here before others changed it: the kernel may still believe them.
        self.past_sizes: set[int] = set()
        # Something in progress that needs ``content`` to stay.
        self.pins = 0

    def adopt(self, entry: Entry) -> None:
        if self.entry is not None and self.entry.size != entry.size:
            self.past_sizes.add(self.entry.size)
        super().adopt(entry)
        self._size = entry.size
        self._used = (entry.extra or {}).get("used", entry.size)

    @property
    def size(self) -> int:
        return self._size if self.content is None else self.content.size

    def used(self) -> int:
        """Return how many bytes are really stored."""
        return self._used if self.content is None else self.content.stored_bytes()

    def extra(self) -> dict[str, Any]:
        extra = super().extra()
        used = self.used()
        if used != self.size:
            extra["used"] = used
        return extra

    def release_content(self) -> None:
        """Drop the content of a clean file nobody has open."""
        content = self.content
        if content is not None and not (self.opens or self.pins or self.dirty or content.changed):
            self._size, self._used = content.size, content.stored_bytes()
            self.content = None

    def drop_content(self) -> None:
        """Drop the content also of a file that is open, unless something in it is nowhere else."""
        content = self.content
        if content is not None and not (self.pins or self.dirty or content.changed):
            self._size, self._used = content.size, content.stored_bytes()
            self.content = None


Child = Entry | Node


class Part:
    """A run of a directory's names that is stored together: one page, or the whole of a small directory."""

    __slots__ = ("dirty", "first", "names", "page_id", "ref")

    def __init__(self, page_id: int, first: bytes, names: Iterable[bytes] = (), ref: bytes = b"") -> None:
        self.page_id = page_id
        self.first = first
        self.names = set(names)
        self.ref = ref
        self.dirty = not ref


class DirNode(Node):
    """A directory. ``children`` is None until it was loaded."""

    __slots__ = ("_firsts", "_next_page", "children", "parts", "subdirs")
    kind = DIR

    def __init__(self, oid: bytes, ino: int) -> None:
        super().__init__(oid, ino)
        self.children: dict[bytes, Child] | None = None
        self.parts: list[Part] = [Part(0, b"")]
        self._firsts: list[bytes] = [b""]
        self._next_page = 1
        self.subdirs = 0

    def adopt(self, entry: Entry) -> None:
        super().adopt(entry)
        if self.children is None:
            self.subdirs = self.nlink - 2 if self.nlink > 2 else 0

    def extra(self) -> dict[str, Any]:
        # A directory that is not loaded must tell its number of links too: some programs do not look
        # for subdirectories where it is 2.
        return super().extra() | ({"nlink": 2 + self.subdirs} if self.subdirs else {})

    def start_empty(self) -> None:
        self.children = {}
        self.parts = [Part(0, b"")]
        self._firsts = [b""]

    def fill(self, manifest: DirManifest, pages: list[tuple[Entry, ...]], keep: dict[bytes, Child]) -> None:
        """Become what ``manifest`` and its ``pages`` say, with the nodes of ``keep`` in place of entries."""
        runs: list[tuple[int, bytes, tuple[Entry, ...]]] = []
        if manifest.entries is not None:
            self.parts = [Part(0, b"", (entry.name for entry in manifest.entries), b"inline")]
            runs = [(0, b"", manifest.entries)]
            self._next_page = 1
        else:
            self.parts = []
            for page, entries in zip(manifest.pages, pages, strict=True):
                self.parts.append(Part(page.page_id, page.first, (entry.name for entry in entries), page.ref))
                runs.append((page.page_id, page.ref, entries))
            self._next_page = max(page.page_id for page in manifest.pages) + 1
        self._firsts = [part.first for part in self.parts]
        self.children = {entry.name: keep.get(entry.name, entry) for _, _, run in runs for entry in run}
        self.subdirs = sum(1 for child in self.children.values() if child.kind == DIR)

    def _part_of(self, name: bytes) -> Part:
        return self.parts[max(0, bisect.bisect_right(self._firsts, name) - 1)]

    def soil(self, name: bytes) -> None:
        """Note that the stored entry of ``name`` is out of date."""
        self._part_of(name).dirty = True

    def put(self, name: bytes, child: Child) -> None:
        """Bind ``name``, replacing what it meant; nodes are told their place."""
        assert self.children is not None  # callers load first
        old = self.children.get(name)
        if old is not None and old.kind == DIR:
            self.subdirs -= 1
        self.children[name] = child
        if child.kind == DIR:
            self.subdirs += 1
        part = self._part_of(name)
        part.names.add(name)
        part.dirty = True

    def drop(self, name: bytes) -> Child:
        """Unbind ``name`` and return what it meant."""
        assert self.children is not None
        child = self.children.pop(name)
        if child.kind == DIR:
            self.subdirs -= 1
        part = self._part_of(name)
        part.names.discard(name)
        part.dirty = True
        return child

    def arrange(self) -> bool:
        """Bring the parts into the shape they are stored in; True if the directory is stored inline.

        Splits large parts, removes empty ones, and lets a directory that became small again be one part.
        """
        assert self.children is not None
        if len(self.children) <= DIR_INLINE_ENTRIES and self._cost(self.children) <= PART_BYTES // 4:
            if len(self.parts) != 1 or self.parts[0].ref not in (b"", b"inline"):
                self.parts = [Part(0, b"", self.children)]
                self._next_page = 1
            self._firsts = [b""]
            self.parts[0].first = b""
            self.parts[0].dirty = True
            return True
        arranged: list[Part] = []
        for part in self.parts:
            if part.ref == b"inline":
                part.dirty = True
            if not part.names:
                continue
            if part.dirty:
                arranged += self._split(part)
            else:
                arranged.append(part)
        self.parts = arranged
        self._firsts = [part.first for part in arranged]
        return False

    def _split(self, part: Part) -> list[Part]:
        names = sorted(part.names)
        part.first = names[0]
        if len(names) <= PART_ENTRIES and self._cost(names) <= PART_BYTES:
            return [part]
        pieces: list[list[bytes]] = [[]]
        cost = 0
        # Half-full pages leave room for the insertions that tend to follow.
        for name in names:
            weight = self._cost((name,))
            if pieces[-1] and (len(pieces[-1]) >= PART_ENTRIES // 2 or cost + weight > PART_BYTES // 2):
                pieces.append([])
                cost = 0
            pieces[-1].append(name)
            cost += weight
        part.names = set(pieces[0])
        out = [part]
        for piece in pieces[1:]:
            out.append(Part(self._next_page, piece[0], piece))
            self._next_page += 1
        return out

    def _cost(self, names: Iterable[bytes]) -> int:
        """Return about how many bytes the entries of ``names`` take."""
        assert self.children is not None
        total = 0
        for name in names:
            child = self.children[name]
            extra: Any = child.extra if isinstance(child, Entry) else (child.xattrs or child.kind == SYMLINK)
            total += 130 + len(name)
            if extra:
                fields = child.extra if isinstance(child, Entry) else child.extra()
                total += len((fields or {}).get("target", b""))
                total += sum(len(key) + len(value) + 8 for key, value in (fields or {}).get("x", ()))
        return total

    def nodes(self) -> Iterator[tuple[bytes, Node]]:
        """Yield the children that are nodes."""
        for name, child in (self.children or {}).items():
            if isinstance(child, Node):
                yield name, child
