"""Deciding what becomes of a share that two sides changed at once. Nothing is changed here; see `_graft`.

Three versions are compared object by object: the base that both sides started from, theirs (published
first), and ours (the last local commit). Where an object is, what its attributes are and what it contains
are decided apart, so a rename here and an edit there are both kept. What both sides changed stays theirs, and
ours stays beside it under a conflict name. Removing a file loses against changing it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from meshkitfs.core.entries import DIR, FILE, HARDLINK, SYMLINK, Entry
from meshkitfs.core.manifest import DirManifest, RootAttrs
from meshkitfs.errors import MeshkitError
from meshkitfs.shares._versions import LINKS, Changes, Key, Library, Place, State, diff

__all__ = ["Merge", "Plan", "conflict_name"]

_T = TypeVar("_T")


def conflict_name(name: bytes, who: str, when: datetime.date, taken: Callable[[bytes], bool]) -> bytes:
    """Return ``name`` with "(conflict WHO DATE)" before its extension, unlike any name that is ``taken``."""
    stem, extension = os.path.splitext(name)
    if len(extension) > 64:
        stem, extension = name, b""
    for number in range(1, 10_000):
        again = "" if number == 1 else f" {number}"
        mark = f" (conflict {who} {when.isoformat()}{again})".encode()
        candidate = stem[: 255 - len(mark) - len(extension)] + mark + extension
        if not taken(candidate):
            return candidate
    raise MeshkitError("head_conflict", "no free name for a conflict copy")


@dataclass(slots=True)
class Plan:
    """What to do to their tree: ``edits`` by directory and name, None for a name that goes.

    ``copies`` are files and symlinks of ours that become new ones: where, and the entry of what they get.
    ``above`` says where the directories on the way to an edit are. ``root`` are the attributes of the root
    if they are not theirs. A plan without anything takes over their tree as it is.
    """

    edits: dict[bytes, dict[bytes, Entry | None]] = field(default_factory=dict)
    copies: dict[Place, Entry] = field(default_factory=dict)
    above: set[bytes] = field(default_factory=set)
    root: RootAttrs | None = None
    conflicts: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Object:
    """One object in the three versions, and its fate: where it ends up, None if it is gone."""

    base: State | None
    ours: State | None
    theirs: State | None
    fate: State | None = None


class Merge:
    """One merge of ``ours`` into ``theirs``, as root manifests. Conflict copies are named after ``who``."""

    def __init__(
        self, library: Library, base: DirManifest, ours: DirManifest, theirs: DirManifest, who: str,
        day: datetime.date, *, partly: bool = False,
    ) -> None:  # fmt: skip
        self._library = library
        # Whether some of it may be missing; see `diff`.
        self._partly = partly
        self._base, self._ours, self._theirs = base, ours, theirs
        self._who = who
        self._day = day
        self._objects: dict[Key, _Object] = {}
        # Ours of what both sides wrote.
        self._clashes: list[bytes] = []
        self._plan = Plan()

    async def run(self) -> Plan:
        """Return the plan. Reads directories of all three versions; raises what that raises."""
        mine = await diff(self._library, self._base, self._ours, partly=self._partly)
        others = await diff(self._library, self._base, self._theirs, partly=self._partly)
        for key in {*mine.before, *mine.after, *others.before, *others.after}:
            base = mine.before.get(key) or others.before.get(key)
            self._objects[key] = _Object(base, _in(mine, key, base), _in(others, key, base))
        await self._add_linked()
        for key, item in self._objects.items():
            item.fate = self._fate(key, item)
        self._follow_renames_of_linked()
        self._count_links()
        self._revive_directories()
        while self._break_cycle():
            self._revive_directories()
        await self._settle_clashes_of_names()
        await self._copy_clashes()
        self._write_edits()
        self._merge_root()
        return self._plan

    # -- objects -----------------------------------------------------------------------------------

    def _fate(self, key: Key, item: _Object) -> State | None:
        base, ours, theirs = item.base, item.ours, item.theirs
        if isinstance(key, tuple):
            gone = base is not None and (ours is None or theirs is None)
            return None if gone else theirs or ours
        if ours is None or theirs is None:
            left = ours or theirs
            if left is None or base is None:
                return left
            # Removed on one side. A directory lives on only for what lives in it.
            same = left == base or (left.place == base.place and _resealed(base.entry, left.entry))
            return left if not same and left.entry.kind != DIR else None
        entry, clash = _merged(base and base.entry, ours.entry, theirs.entry)
        if clash:
            self._clashes.append(key)
        return State(self._place(base, ours, theirs), entry)

    @staticmethod
    def _place(base: State | None, ours: State, theirs: State) -> Place:
        if base is None or ours.place == base.place or ours.place == theirs.place:
            return theirs.place
        if theirs.place == base.place or ours.place.directory == LINKS:
            return ours.place
        return theirs.place

    # -- hard links ----------------------------------------------------------------------------------

    async def _add_linked(self) -> None:
        """Add the objects that changed names of hard links mean, where only the names changed."""
        missing = {key[2] for key in self._objects if isinstance(key, tuple)} - self._objects.keys()
        if not missing:
            return
        for manifest in (self._theirs, self._ours):
            table = await self._library.links(manifest)
            for entry in table.entries() if table is not None else ():
                if entry.oid in missing:
                    missing.discard(entry.oid)
                    state = State(Place(LINKS, entry.name), entry)
                    self._objects[entry.oid] = _Object(state, state, state)

    def _follow_renames_of_linked(self) -> None:
        """One side gave a file a second name while the other renamed it: the first name is the new one."""
        for key, item in list(self._objects.items()):
            if isinstance(key, tuple) or item.fate is None or item.fate.place.directory != LINKS:
                continue
            base = item.base
            if base is None or base.place.directory == LINKS:
                continue
            old = self._objects.get((*base.place, key))
            for side in (item.ours, item.theirs):
                moved = side is not None and side.place.directory != LINKS and side.place != base.place
                if side is not None and moved and old is not None and old.fate is not None:
                    name = old.fate.entry._replace(name=side.place.name)
                    self._objects[(*side.place, key)] = _Object(None, None, None, State(side.place, name))
                    old.fate = None

    def _count_links(self) -> None:
        """Give each linked object the number of its names; without one it goes.

        Unless it was changed, or each side has removed only what the other kept: then theirs stay.
        """
        names: dict[bytes, list[_Object]] = {}
        for key, item in self._objects.items():
            if isinstance(key, tuple):
                names.setdefault(key[2], []).append(item)
        for oid, item in list(self._objects.items()):
            if isinstance(oid, tuple):
                continue
            base, fate, mine = item.base, item.fate, names.get(oid, [])
            if fate is None or fate.place.directory != LINKS:
                continue
            count = 0
            if base is not None and base.place.directory == LINKS:
                count = (base.entry.extra or {}).get("nlink", 1)
            count += sum((name.fate is not None) - (name.base is not None) for name in mine)
            if count < 1:
                sides = [side for side in (item.ours, item.theirs) if side is not None]
                kept = len(sides) == 2
                if (
                    base is not None
                    and not kept
                    and all(
                        _content(side.entry) == _content(base.entry) or _resealed(base.entry, side.entry)
                        for side in sides
                    )
                ):
                    item.fate = None
                    continue
                for name in mine:
                    name.fate = name.fate or name.theirs or (None if kept else name.ours)
                count = sum(name.fate is not None for name in mine)
            extra = (fate.entry.extra or {}) | {"nlink": max(1, count)}
            item.fate = State(fate.place, fate.entry._replace(extra=extra))

    # -- directories ---------------------------------------------------------------------------------

    def _top(self, directory: bytes) -> bool:
        return directory in (self._base.oid, LINKS)

    def _revive_directories(self) -> None:
        """A directory that one side removed comes back if something in it lives."""
        waiting = [item.fate for item in self._objects.values() if item.fate is not None]
        while waiting:
            directory = waiting.pop().place.directory
            item = self._objects.get(directory)
            if not self._top(directory) and item is not None and item.fate is None:
                item.fate = item.theirs or item.ours
                if item.fate is not None:
                    waiting.append(item.fate)

    def _break_cycle(self) -> bool:
        """Find a directory that both sides' moves have put below itself, and take one of ours back."""
        sound: set[bytes] = set()
        for key, item in self._objects.items():
            if isinstance(key, tuple) or item.fate is None or item.fate.entry.kind != DIR:
                continue
            path: list[bytes] = []
            at = key
            while at not in sound and at not in path:
                above = self._objects.get(at)
                if above is None or above.fate is None:
                    break
                path.append(at)
                at = above.fate.place.directory
            if at in path:
                for oid in path[path.index(at) :]:
                    member = self._objects[oid]
                    assert member.fate is not None  # it is on the path
                    if member.theirs is not None and member.fate.place != member.theirs.place:
                        member.fate = State(member.theirs.place, member.fate.entry)
                        return True
                raise MeshkitError("invalid_envelope", "a directory stands below itself")
            sound.update(path)
        return False

    # -- names -----------------------------------------------------------------------------------------

    async def _settle_clashes_of_names(self) -> None:
        """Where two objects want one name: directories become one, of others ours takes a conflict name."""
        while True:
            wanted: dict[Place, list[Key]] = {}
            for key, item in self._objects.items():
                if item.fate is not None:
                    wanted.setdefault(item.fate.place, []).append(key)
            clashes = [(place, keys) for place, keys in wanted.items() if len(keys) > 1]
            if not clashes:
                return
            united = [self._unite(keys) for _, keys in clashes]
            if any(united):
                continue  # with new clashes in there, perhaps
            for place, keys in clashes:
                keys.sort(key=lambda key: self._claim(key, place))
                for key in keys[1:]:
                    item = self._objects[key]
                    assert item.fate is not None  # it wants a name
                    spare = await self._spare(place, wanted)
                    wanted[spare] = [key]
                    item.fate = State(spare, item.fate.entry)

    def _claim(self, key: Key, place: Place) -> tuple[int, str]:
        """Rank a claim on ``place``: theirs that is there already, then theirs, then ours."""
        item = self._objects[key]
        rank = 0 if item.theirs is not None and item.theirs.place == place else 1 if item.theirs else 2
        return rank, repr(key)

    def _unite(self, keys: list[Key]) -> bool:
        """Both made a directory of that name: what is in ours goes into theirs."""
        new = [key for key in keys if isinstance(key, bytes) and self._is_new_directory(self._objects[key])]
        mine = [key for key in new if self._objects[key].theirs is None]
        others = [key for key in new if self._objects[key].theirs is not None]
        if not others or not mine:
            return False
        for item in self._objects.values():
            if item.fate is not None and item.fate.place.directory in mine:
                item.fate = State(Place(others[0], item.fate.place.name), item.fate.entry)
        for key in mine:
            self._objects[key].fate = None
        return True

    @staticmethod
    def _is_new_directory(item: _Object) -> bool:
        return item.base is None and item.fate is not None and item.fate.entry.kind == DIR

    async def _spare(self, place: Place, wanted: dict[Place, list[Key]]) -> Place:
        """Return a free conflict name beside ``place``."""
        there = await self._listing(place.directory)

        def taken(name: bytes) -> bool:
            return name in there or Place(place.directory, name) in wanted

        spare = Place(place.directory, conflict_name(place.name, self._who, self._day, taken))
        self._plan.conflicts.append(spare.name)
        return spare

    async def _listing(self, directory: bytes) -> dict[bytes, Entry]:
        """Return the names of a directory before it is edited."""
        if directory == self._base.oid:
            return (await self._library.root(self._theirs)).listing()
        item = self._objects.get(directory)
        assert item is not None  # only what changed has clashes in it
        assert item.fate is not None
        return (await self._library.directory(item.fate.entry)).listing()

    async def _copy_clashes(self) -> None:
        """What both sides wrote goes on as theirs; ours becomes a new file beside it."""
        wanted = {item.fate.place: [key] for key, item in self._objects.items() if item.fate is not None}
        for oid in self._clashes:
            item = self._objects[oid]
            assert item.fate is not None  # both sides have it
            assert item.ours is not None
            place = item.fate.place
            if place.directory == LINKS:
                place = await self._some_name(oid)
            spare = await self._spare(place, wanted)
            wanted[spare] = [oid]
            self._plan.copies[spare] = item.ours.entry

    async def _some_name(self, oid: bytes) -> Place:
        """Return a name of a hard-linked object, looking through their whole tree if need be."""
        for key, item in self._objects.items():
            if isinstance(key, tuple) and key[2] == oid and item.fate is not None:
                return item.fate.place
        waiting = [(self._base.oid, await self._library.root(self._theirs))]
        seen: dict[bytes, State] = {}
        while waiting:
            directory, found = waiting.pop()
            for entry in found.entries():
                place = Place(directory, entry.name)
                if entry.kind == HARDLINK and entry.oid == oid and self._alive(directory):
                    while not self._top(directory):
                        state = seen[directory]
                        self._objects.setdefault(directory, _Object(state, state, state, state))
                        directory = state.place.directory
                    return place
                if entry.kind == DIR and entry.oid not in seen:
                    seen[entry.oid] = State(place, entry)
                    waiting.append((entry.oid, await self._library.directory(entry)))
        return Place(self._base.oid, oid.hex().encode())

    # -- the result ------------------------------------------------------------------------------------

    def _alive(self, directory: bytes) -> bool:
        item = self._objects.get(directory)
        return item is None or item.fate is not None

    def _from_theirs(self, directory: bytes) -> bool:
        """Whether a directory is made from theirs; else it exists in ours only, and is made from that."""
        if directory == LINKS:
            return self._theirs.links is not None
        item = self._objects.get(directory)
        return item is None or item.theirs is not None

    def _write_edits(self) -> None:
        edits = self._plan.edits
        for item in self._objects.values():
            fate = item.fate
            if fate is not None:
                fate = State(fate.place, fate.entry._replace(name=fate.place.name))
            stands = [
                state
                for state, from_theirs in ((item.theirs, True), (item.ours, False))
                if state is not None
                and self._alive(state.place.directory)
                and self._from_theirs(state.place.directory) is from_theirs
            ]
            for state in stands:
                if fate is None or fate.place != state.place:
                    edits.setdefault(state.place.directory, {}).setdefault(state.place.name, None)
            if fate is not None and fate not in stands:
                edits.setdefault(fate.place.directory, {})[fate.place.name] = fate.entry
        for directory in [*edits, *(place.directory for place in self._plan.copies)]:
            while not self._top(directory) and directory not in self._plan.above:
                self._plan.above.add(directory)
                fate = self._objects[directory].fate
                assert fate is not None  # edits are made in what lives
                directory = fate.place.directory

    def _merge_root(self) -> None:
        base, ours, theirs = (_root_entry(version) for version in (self._base, self._ours, self._theirs))
        if base is None or ours is None or theirs is None:
            return
        entry, _ = _merged(base, ours, theirs)
        if entry != theirs:
            self._plan.root = RootAttrs(entry.mode, entry.mtime_ns, entry.ctime_ns, entry.extra)


def _in(changes: Changes, key: Key, base: State | None) -> State | None:
    return changes.after.get(key) if key in changes else base


def _resealed(base: Entry, side: Entry) -> bool:
    """Whether one side did no more to a file than to seal it again: any change sets the ctime."""
    same = (side.ctime_ns, side.mtime_ns, side.size) == (base.ctime_ns, base.mtime_ns, base.size)
    return same and side.kind == base.kind == FILE and side.ref != base.ref


def _content(entry: Entry) -> bytes:
    """Return what stands for the content of an entry's object: a symlink has no manifest, only its target."""
    target: bytes = (entry.extra or {}).get("target", b"")
    return target if entry.kind == SYMLINK else entry.ref


def _root_entry(manifest: DirManifest) -> Entry | None:
    """Return the root's attributes in the form of an entry."""
    if manifest.root is None:
        return None
    mode, mtime, ctime, extra = manifest.root
    return Entry(b"", DIR, manifest.oid, mode, mtime, ctime, 0, 0, 0, b"", extra or None)


def _pick(base: _T, ours: _T, theirs: _T) -> _T:
    """Return what was changed; theirs, if both were."""
    return ours if theirs == base else theirs


def _merged(base: Entry | None, ours: Entry, theirs: Entry) -> tuple[Entry, bool]:
    """Merge two entries of one object; also say whether both sides wrote it, so that ours needs a copy.

    A directory's reference is always theirs: what ours has in it is decided object by object.
    """
    clash = False
    source = theirs
    mine_resealed = base is not None and _resealed(base, ours)
    theirs_resealed = base is not None and _resealed(base, theirs)
    mine, others = _content(ours), _content(theirs)
    if theirs.kind != DIR and mine != others and (base is None or mine != _content(base)):
        if base is not None and (others == _content(base) or (theirs_resealed and not mine_resealed)):
            source = ours
        elif not mine_resealed:
            clash = True
    if base is None:
        return theirs, clash
    if theirs.kind == FILE and ours.ref != theirs.ref and not (mine_resealed or theirs_resealed):
        mtime = source.mtime_ns
    elif base.mtime_ns in (ours.mtime_ns, theirs.mtime_ns):
        mtime = _pick(base.mtime_ns, ours.mtime_ns, theirs.mtime_ns)
    else:
        mtime = max(ours.mtime_ns, theirs.mtime_ns)
    extra: dict[str, Any] = {k: v for k, v in (source.extra or {}).items() if k != "x"}
    old, here, there = (dict((entry.extra or {}).get("x", ())) for entry in (base, ours, theirs))
    xattrs = {name: _pick(old.get(name), here.get(name), there.get(name)) for name in {*here, *there}}
    pairs = [[name, value] for name, value in sorted(xattrs.items()) if value is not None]
    if pairs:
        extra["x"] = pairs
    return source._replace(
        name=theirs.name,
        mode=_pick(base.mode, ours.mode, theirs.mode),
        mtime_ns=mtime,
        ctime_ns=max(ours.ctime_ns, theirs.ctime_ns),
        extra=extra or None,
    ), clash
