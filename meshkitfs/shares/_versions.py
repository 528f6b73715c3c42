"""Versions of a share's tree side by side: reading their directories, and finding what differs.

Objects are followed by their oid, so a file that was moved is the same file. The names of a hard-linked
object are things of their own: such a name is there or is not; the object itself stands in the link table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from meshkitfs.core.entries import DIR, HARDLINK, Entry
from meshkitfs.core.manifest import DirManifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._directories import read_directory, read_pages
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._walk import FAULTS

__all__ = ["LINKS", "Changes", "Directory", "Key", "Library", "Place", "State", "diff", "links_entry"]

# The link table as a place. Each side may have begun a table of its own, but there is only one.
LINKS: Final = b"links"

# An object by its oid; a name of a hard-linked object as (oid of the directory, name, oid of the object).
Key = bytes | tuple[bytes, bytes, bytes]


class Place(NamedTuple):
    """A name in a directory, which is named by its oid, or `LINKS`."""

    directory: bytes
    name: bytes


class State(NamedTuple):
    """Where an object is in one version, and its entry there."""

    place: Place
    entry: Entry


class Directory(NamedTuple):
    """One directory of one version as it was read: its manifest, and the entries of its pages in order."""

    manifest: DirManifest
    pages: list[tuple[Entry, ...]]

    def entries(self) -> Iterator[Entry]:
        if self.manifest.entries is not None:
            yield from self.manifest.entries
        for page in self.pages:
            yield from page

    def listing(self) -> dict[bytes, Entry]:
        return {entry.name: entry for entry in self.entries()}


def _key_of(directory: bytes, entry: Entry) -> Key:
    return (directory, entry.name, entry.oid) if entry.kind == HARDLINK else entry.oid


def links_entry(manifest: DirManifest) -> Entry:
    """Return the entry that a root manifest's link table would have, had it a name."""
    assert manifest.links is not None
    return Entry(
        b"links", DIR, manifest.links_oid, 0o700, 0, 0, 0, manifest.links_epoch, manifest.links_ver,
        manifest.links,
    )  # fmt: skip


class Library:
    """Reads directories of any version, each once."""

    def __init__(self, reader: BlockReader, grant: Grant) -> None:
        self._reader = reader
        self._grant = grant
        self._read: dict[bytes, Directory] = {}
        self._roots: dict[int, Directory] = {}

    async def directory(self, entry: Entry) -> Directory:
        """Return the directory that ``entry`` names."""
        found = self._read.get(entry.ref)
        if found is None:
            found = Directory(*await read_directory(self._reader, self._grant, entry))
            self._read[entry.ref] = found
        return found

    async def root(self, manifest: DirManifest) -> Directory:
        """Return the root directory that ``manifest`` is of."""
        found = self._roots.get(id(manifest))
        if found is None:
            found = Directory(manifest, await read_pages(self._reader, self._grant, manifest))
            self._roots[id(manifest)] = found
        return found

    async def links(self, manifest: DirManifest) -> Directory | None:
        """Return the link table of the version whose root is ``manifest``, if it has one."""
        return None if manifest.links is None else await self.directory(links_entry(manifest))


# A directory to compare: its oid, its entries before and after, and whether it was compared before.
_Pair = tuple[bytes, Entry | None, Entry | None, bool]


class Changes:
    """What differs between two versions: ``before`` and ``after`` by object.

    An object that is in neither is the same in both. One that is in both may still be unchanged.
    """

    def __init__(self) -> None:
        self.before: dict[Key, State] = {}
        self.after: dict[Key, State] = {}
        self._directories: set[bytes] = set()
        # Directories that were compared, with the references of what was.
        self._walked: dict[bytes, tuple[bytes, bytes]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self.before or key in self.after

    def compare(self, directory: bytes, old: Directory | None, new: Directory | None, *, whole: bool) -> None:
        """Note what differs in one directory; with ``whole`` also what does not."""
        befores = old.listing() if old is not None else {}
        afters = new.listing() if new is not None else {}
        for found, here, there in ((self.before, befores, afters), (self.after, afters, befores)):
            for name, entry in here.items():
                if whole or there.get(name) != entry:
                    found[_key_of(directory, entry)] = State(Place(directory, name), entry)
                    if entry.kind == DIR:
                        self._directories.add(entry.oid)

    def due(self) -> list[_Pair]:
        """Return the directories to compare next.

        Those that are gone come only when there are no others, since they may still be found elsewhere.
        """
        found: list[_Pair] = []
        gone: list[_Pair] = []
        for oid in self._directories:
            before, after = self.before.get(oid), self.after.get(oid)
            refs = (before.entry.ref if before else b"", after.entry.ref if after else b"")
            again = oid in self._walked
            if self._walked.get(oid) == refs or (refs[0] == refs[1] and not again):
                continue
            item = (oid, before.entry if before else None, after.entry if after else None, again)
            (found if after else gone).append(item)
        for oid, before_entry, after_entry, _ in found or gone:
            self._walked[oid] = (
                before_entry.ref if before_entry else b"", after_entry.ref if after_entry else b"",
            )  # fmt: skip
        return found or gone


async def diff(library: Library, old: DirManifest, new: DirManifest, *, partly: bool = False) -> Changes:
    """Compare two versions, given their root manifests. Subtrees that are equal are not read.

    With ``partly``, a directory that is in one of them alone may be missing at the store: then it is in the
    result, and what was in it is not.
    """
    changes = Changes()
    changes.compare(old.oid, await library.root(old), await library.root(new), whole=False)
    if old.links != new.links:
        changes.compare(LINKS, await library.links(old), await library.links(new), whole=False)
    while due := changes.due():
        for oid, before, after, again in due:
            try:
                sides = [
                    None if entry is None else await library.directory(entry) for entry in (before, after)
                ]
            except MeshkitError as error:
                if not partly or error.code not in FAULTS or (before is not None and after is not None):
                    raise
                continue
            # What was taken for gone or new as a whole has to be told apart after all.
            changes.compare(oid, *sides, whole=again)
    return changes
