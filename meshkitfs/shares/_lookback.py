"""Paths in past versions: finding one with as little reading as possible, and how it changed over time.

Versions share what did not change between them, so what two neighbours both refer to is read once, and a
subtree that is the same in both is not read at all.
"""

from __future__ import annotations

import bisect
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import DIR, HARDLINK, Entry
from meshkitfs.core.manifest import DirManifest, parse_manifest, parse_page
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._history import Version
from meshkitfs.shares._past import open_version
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._versions import LINKS, Changes, Library, Place, links_entry

if TYPE_CHECKING:
    from meshkitfs.shares._share import Share

__all__ = ["Change", "Found", "Lookback", "open_directory", "path_changes"]


class Found(NamedTuple):
    """What a path was in one version: its entry (of the object, if it is a hard link), and those above it.

    ``name`` is the entry of the name itself, which for a hard link is another one.
    """

    entry: Entry
    name: Entry
    above: tuple[Entry, ...] = ()


class Change(NamedTuple):
    """A version in which a path changed, and what it was then (None: it is gone).

    ``what`` is ``created``, ``changed``, ``attributes``, ``moved`` (here from elsewhere, or away),
    ``removed``, ``oldest`` (it was there already in the oldest version that can be looked at), or
    ``unreadable``: then ``code`` says why.
    """

    version: Version
    what: str
    found: Found | None
    code: str = ""


async def open_directory(share: Share, grant: Grant, version: Version) -> DirManifest:
    """Return the root of a past version. Raises as `open_version`."""
    manifest = await open_version(share, grant, version)
    if not isinstance(manifest, DirManifest):
        raise MeshkitError("not_supported", "this share is a single file, of one version")
    return manifest


class Lookback:
    """Finds paths in versions. What the last two looked-at versions consist of is not read again."""

    def __init__(self, reader: BlockReader, grant: Grant) -> None:
        self._reader = reader
        self.grant = grant
        self._now: dict[bytes, Any] = {}
        self._before: dict[bytes, Any] = {}

    async def find(self, root: DirManifest, path: Sequence[bytes]) -> Found | None:
        """Return what ``path`` is in the version whose root is ``root``, None if it is not there."""
        self._before, self._now = self._now, {}
        manifest = root
        name = entry = _root_entry(root)
        above: list[Entry] = []
        for part in path:
            if entry.kind != DIR:
                return None
            if above:
                manifest = await self._manifest(entry)
            above.append(entry)
            found = await self._entry(manifest, part)
            if found is None:
                return None
            name = entry = found
            if entry.kind == HARDLINK:
                entry = await self._linked(root, entry)
        return Found(entry, name, tuple(above[1:]))

    async def _linked(self, root: DirManifest, name: Entry) -> Entry:
        """Return the entry of the object that a hard link names."""
        if root.links is not None:
            found = await self._entry(await self._manifest(links_entry(root)), name.oid.hex().encode())
            if found is not None:
                return found
        raise MeshkitError("invalid_envelope", "a hard link names an object that is not there")

    def _known(self, ref: bytes) -> Any:
        value = self._now.get(ref) or self._before.get(ref)
        if value is not None:
            self._now[ref] = value
        return value

    async def _manifest(self, entry: Entry) -> DirManifest:
        manifest = self._known(entry.ref)
        if manifest is None:
            where = Where.manifest(entry.oid, entry.epoch, entry.ver)
            plain = await self._reader.open(self.grant, entry.ref, where)
            manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
            if not isinstance(manifest, DirManifest):
                raise MeshkitError("invalid_envelope", "a directory's entry names a file")
            self._now[entry.ref] = manifest
        assert isinstance(manifest, DirManifest)  # only manifests are kept under their references
        return manifest

    async def _entry(self, manifest: DirManifest, name: bytes) -> Entry | None:
        """Return one entry of a directory; of a large one only the page it is in is read."""
        entries: tuple[Entry, ...] | None = manifest.entries
        if entries is None:
            firsts = [page.first for page in manifest.pages]
            i = max(0, bisect.bisect_right(firsts, name) - 1)
            page = manifest.pages[i]
            entries = self._known(page.ref)
            if entries is None:
                upper = firsts[i + 1] if i + 1 < len(firsts) else None
                where = Where.page(manifest.oid, page.page_id)
                plain = await self._reader.open(self.grant, page.ref, where)
                entries = self._now[page.ref] = parse_page(plain, page, upper)
        return next((entry for entry in entries if entry.name == name), None)


def _root_entry(root: DirManifest) -> Entry:
    """Return the entry that a root directory would have, had it a name. Its reference is never followed."""
    attributes = root.root
    mode, mtime_ns, ctime_ns, extra = attributes if attributes is not None else (0o700, 0, 0, None)
    ref = root.ver.to_bytes(32, "big") + root.epoch.to_bytes(32, "big")
    return Entry(b"", DIR, root.oid, mode, mtime_ns, ctime_ns, 0, root.epoch, root.ver, ref, extra)


async def path_changes(
    share: Share, path: Sequence[bytes], versions: Sequence[Version], looked: Callable[[], None]
) -> AsyncGenerator[Change]:
    """Yield the versions, newest first, in which ``path`` became what it was.

    ``versions`` are oldest first; ``looked`` is called for each that is looked at. A version that cannot be
    read is yielded with the reason; what happened between its neighbours is then told of the newer one.
    Raises the gate's refusals.
    """
    newer: tuple[Version, DirManifest, Found | None] | None = None
    reader = share.services.reader
    look: Lookback | None = None
    for version in reversed(versions):
        # Also if the newest version cannot be read: what happened before is to be seen all the same.
        grant = await share.past.use("list")
        look = look or Lookback(reader, grant)
        look.grant = grant
        looked()
        try:
            root = await open_directory(share, grant, version)
            found = await look.find(root, path)
        except MeshkitError as error:
            if not grant.alive:
                raise
            yield Change(version, "unreadable", None, error.code)
            continue
        if newer is not None:
            what = await _difference(reader, grant, (root, found), newer[1:])
            if what:
                yield Change(newer[0], what, newer[2])
        newer = (version, root, found)
    if newer is not None and newer[2] is not None:
        first = newer[0].number == 1
        yield Change(newer[0], "created" if first else "oldest", newer[2])


_Side = tuple[DirManifest, Found | None]


async def _difference(reader: BlockReader, grant: Grant, old: _Side, new: _Side) -> str:
    """Return what happened to a path between two versions, empty if nothing did."""
    before, after = old[1], new[1]
    if before is None and after is None:
        return ""
    if before is None or after is None:
        return await _appeared(reader, grant, old, new)
    a, b = before.entry, after.entry
    extra, other = a.extra or {}, b.extra or {}
    if (a.kind, a.ref, extra.get("target")) != (b.kind, b.ref, other.get("target")):
        return "changed"
    if (a.mode, a.mtime_ns, extra.get("x")) != (b.mode, b.mtime_ns, other.get("x")):
        return "attributes"
    return ""


async def _appeared(reader: BlockReader, grant: Grant, old: _Side, new: _Side) -> str:
    """Say whether what is only in one of two versions is the same object as somewhere in the other."""
    gained = old[1] is None
    there = new[1] if gained else old[1]
    assert there is not None  # it is in exactly one of them
    library, changes = Library(reader, grant), Changes()
    changes.compare(old[0].oid, await library.root(old[0]), await library.root(new[0]), whole=False)
    if old[0].links != new[0].links:
        tables = await library.links(old[0]), await library.links(new[0])
        changes.compare(LINKS, *tables, whole=False)
    while due := changes.due():
        for oid, before, after, again in due:
            # What is in the other version is looked for there: what is only in this one need not be read.
            if (before if gained else after) is not None:
                sides = [
                    None if entry is None else await library.directory(entry) for entry in (before, after)
                ]
                changes.compare(oid, *sides, whole=again)
    other = changes.before if gained else changes.after
    # A name of an object that has several comes and goes without the object.
    chain = there.above if there.name.kind == HARDLINK else (*there.above, there.entry)
    directory = new[0].oid
    for entry in chain:
        found = other.get(entry.oid)
        if found is not None and found.place != Place(directory, entry.name):
            return "moved"
        directory = entry.oid
    return "created" if gained else "removed"
