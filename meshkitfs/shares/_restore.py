"""Bringing back what a past version had: old content under live names, without copying a block.

First the past is compared with the present, and nothing is changed if the two cannot be brought together.
Then it is brought back in small batches, each of them one change of the tree; what a batch replaces was
published before, so that it stays in the history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from meshkitfs.core.blocks import Where
from meshkitfs.core.entries import DIR, FILE, SYMLINK, Entry
from meshkitfs.core.manifest import FileManifest, parse_manifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._content import FileContent
from meshkitfs.shares._directories import in_parallel
from meshkitfs.shares._events import NameChanged, NodeChanged
from meshkitfs.shares._history import Version
from meshkitfs.shares._lookback import open_directory
from meshkitfs.shares._nodes import DirNode, FileNode, Node, SymlinkNode
from meshkitfs.shares._past import SNAPSHOTS
from meshkitfs.shares._presence import require_blocks
from meshkitfs.shares._restore_plan import Item, Path, Plan, Twins, reach, text_of
from meshkitfs.shares._tree import Tree, check_name
from meshkitfs.shares._walk import FAULTS

if TYPE_CHECKING:
    from meshkitfs.shares._share import Share

__all__ = ["Restored", "go_back", "restore"]

# Objects that are brought back in one change of the tree; a merge waits for at most this.
BATCH: Final = 32
# How often a file that is written at this very moment is tried again.
_TRIES: Final = 20


@dataclass(slots=True)
class Restored:
    """What was brought back: how many of each kind were made or changed; ``same`` were so already.

    ``replaced`` is the version that has what was there before. ``unreadable`` are the paths of what was left
    out, in the old version: some of it is missing at the store, or damaged.
    """

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    same: int = 0
    replaced: int = 0
    unreadable: list[Path] = field(default_factory=list)


async def restore(
    share: Share, version: Version, path: Path, to: Path | None, progress: Callable[[int, int], None]
) -> Restored:
    """Bring ``path`` of ``version`` back to its place, or to the free place ``to``; returns when published.

    ``progress`` is told how many of how many objects are done. Raises ``path_not_found``, ``path_exists``
    (something else is in the way), ``version_not_granted``, ``right_not_granted``, ``block_unavailable`` (for
    ``path`` itself; what is in it is left out) and what can keep a change from being published. If it fails
    on the way, what was done until then stays.
    """
    target = path if to is None else to
    for name in target:
        try:
            check_name(name)
        except OSError:
            raise MeshkitError("invalid_name", repr(name.decode(errors="replace"))) from None
    if target[:1] == (SNAPSHOTS,):
        raise MeshkitError("invalid_name", "'.snapshots' is where the versions are")
    await share.use("write", current=True)
    # What this replaces is to be found in the history.
    await share.flush()
    replaced, twins = share.base.version, Twins()
    try:
        plan = Plan(share, version, target, fresh=to is not None, twins=twins)
        await plan.make(path)
        work = _Restore(share, plan, to, twins)
        work.done.replaced = replaced
        await work.carry_out(progress)
    finally:
        twins.let_go(share.tree)
    await share.flush()
    work.done.unreadable.sort()
    return work.done


async def go_back(share: Share, version: Version) -> Restored:
    """Make the whole of ``share`` exactly what it was in ``version``; returns when published.

    This needs nothing of the newest version, so it is the way out when that cannot be read any more. What was
    changed here and could not be published for that reason stays, on top of the old version. Raises
    ``version_not_granted``, ``right_not_granted``, ``block_unavailable`` if the old version cannot be read
    either, and what can keep a change from being published.
    """
    grant = await share.past.use("write", current=True)
    await open_directory(share, grant, version)
    if version.hash == grant.head.hash and not share.dirty:
        return Restored(replaced=version.number)
    try:
        # What this replaces is to be found in the history.
        await share.flush()
    except MeshkitError as error:
        if error.code not in FAULTS:
            raise
    grant = await share.past.use("write", current=True)
    replaced = grant.head.version
    await share.go_back(version.head)
    await share.flush()
    return Restored(replaced=replaced)


class _Restore:
    """Carries out a plan."""

    def __init__(self, share: Share, plan: Plan, taken: Path | None, twins: Twins) -> None:
        self._share = share
        self._plan = plan
        # A place that must be free.
        self._taken = taken
        self._twins = twins
        # Directories that were made.
        self._made: list[Item] = []
        # Nodes that were there and are as they were again, perhaps by another of their names.
        self._brought: set[int] = set()
        self.done = Restored(same=plan.same, unreadable=list(plan.unreadable))

    async def _read_contents(self, grant: Grant, items: Sequence[Item]) -> None:
        tree = self._share.tree
        assert tree is not None
        files = [item for item in items if item.entry.kind == FILE and item.manifest is None]

        async def manifest_of(entry: Entry) -> FileManifest:
            where = Where.manifest(entry.oid, entry.epoch, entry.ver)
            plain = await tree.reader.open(grant, entry.ref, where)
            manifest = parse_manifest(plain, entry.oid, entry.epoch, entry.ver)
            if not isinstance(manifest, FileManifest) or manifest.size != entry.size:
                raise MeshkitError("invalid_envelope", "a file's manifest does not fit its entry")
            return manifest

        async def read(i: int) -> None:
            item = files[i]
            try:
                old = item.manifest = await manifest_of(item.entry)
                if item.now is not None:
                    # What is there now may be damaged: that is then replaced.
                    with suppress(MeshkitError):
                        item.same = _same_content(old, await manifest_of(item.now))
                if not item.same:
                    await require_blocks(tree.reader, grant, old)
            except MeshkitError as error:
                if error.code not in FAULTS or item is self._plan.items[0]:
                    raise
                item.lost = True
                self.done.unreadable.append(item.path)

        await in_parallel(read, len(files))

    async def carry_out(self, progress: Callable[[int, int], None]) -> None:
        """Bring everything back, a batch at a time, directories before what is in them."""
        share, total = self._share, len(self._plan.items)
        for at in range(0, total, BATCH):
            batch = self._plan.items[at : at + BATCH]
            progress(at, total)
            for _ in range(_TRIES):
                grant = await share.use("write")
                await self._read_contents(grant, batch)
                batch = await self._change(grant, [item for item in batch if not item.lost])
                if not batch:
                    break
                # Somebody has written there meanwhile. That is published first, so that it is not lost.
                await share.flush()
                self.done.replaced = share.base.version
            else:
                raise MeshkitError("timed_out", f"{text_of(batch[0].path)!r} is written all the time")
            share.hurry()
        progress(total, total)
        await self._date_directories()

    async def _change(self, grant: Grant, batch: Sequence[Item]) -> list[Item]:
        """Bring a batch back in one change of the tree. Returns those that have to wait for a commit."""
        later = []
        async with self._share.changing() as tree:
            grant.check()
            if tree.links.children is None:
                await tree.load(grant, tree.links)
            for item in batch:
                if not await self._bring(tree, grant, item):
                    later.append(item)
                item.manifest = None
        return later

    async def _bring(self, tree: Tree, grant: Grant, item: Item) -> bool:
        if not item.path:
            assert isinstance(tree.root, DirNode)
            self._attributes(tree, tree.root, item.entry)
            return True
        parent = await self._parent(tree, grant, item.path)
        name = item.path[-1]
        # From here on nothing waits until the name means what it is to mean (or its content is locked).
        if name not in (parent.children or ()):
            self._make(tree, parent, name, item)
            return True
        node = tree.node_of(parent, name)
        if node.kind != item.entry.kind or item.path == self._taken:
            raise MeshkitError("path_exists", f"{text_of(item.path)!r} was made meanwhile")
        if isinstance(node, DirNode):
            self._attributes(tree, node, item.entry)
            return True
        if node.nlink > 1 and node.oid != item.entry.oid:
            # This name was of another object then; the other names of this one are not to change with it.
            tree.remove(parent, name, directory=False)
            self._make(tree, parent, name, item)
            return True
        if node.ino in self._brought:
            return True
        if item.same and node.entry is item.now and not node.dirty:
            self.done.same += 1
            self._twins.hold(item, node)
            return True
        if node.dirty or (isinstance(node, FileNode) and not await self._replace(tree, node, item)):
            return False
        if isinstance(node, SymlinkNode):
            node.target = (item.entry.extra or {})["target"]
            self._attributes(tree, node, item.entry)
            self.done.symlinks += 1
        self._brought.add(node.ino)
        self._twins.hold(item, node)
        return True

    async def _parent(self, tree: Tree, grant: Grant, path: Path) -> DirNode:
        """Return the directory that ``path`` is in, making those that are missing."""
        node: Node = tree.root
        for depth, name in enumerate(path[:-1]):
            assert isinstance(node, DirNode)  # checked below, and the root is one
            await tree.load(grant, node)
            if name in (node.children or ()):
                child = tree.node_of(node, name)
            else:
                old = self._plan.above[depth] if depth < len(self._plan.above) else None
                child = tree.new_directory(0o755 if old is None else old.mode)
                self._put(tree, node, name, child)
                if old is not None:
                    child.xattrs = dict((old.extra or {}).get("x", ()))
                self.done.directories += 1
            if not isinstance(child, DirNode):
                raise MeshkitError("path_exists", f"{text_of(path[: depth + 1])!r} is no directory now")
            node = child
        assert isinstance(node, DirNode)
        await tree.load(grant, node)
        return node

    def _put(self, tree: Tree, parent: DirNode, name: bytes, node: Node) -> None:
        tree.create(parent, name, node)
        emit = self._share.services.emit
        emit(NameChanged(parent.ino, name, 0))
        emit(NodeChanged(parent.ino, False))

    def _make(self, tree: Tree, parent: DirNode, name: bytes, item: Item) -> None:
        entry = item.entry
        twin = self._twins.of(tree, item)
        if twin is not None:
            tree.link(twin, parent, name)
            self._share.services.emit(NameChanged(parent.ino, name, 0))
            self._share.services.emit(NodeChanged(twin.ino, False))
            self.done.files += 1
            return
        node: Node
        if entry.kind == DIR:
            node = tree.new_directory(entry.mode)
            self._made.append(item)
            self.done.directories += 1
        elif entry.kind == SYMLINK:
            node = tree.new_symlink((entry.extra or {})["target"])
            self.done.symlinks += 1
        else:
            assert item.manifest is not None  # read before
            file = tree.new_file(entry.mode)
            file.content = self._content(tree, file, item.manifest, entry)
            node = file
            self.done.files += 1
        self._put(tree, parent, name, node)
        self._attributes(tree, node, entry)
        self._twins.hold(item, node)

    @staticmethod
    def _content(tree: Tree, node: FileNode, manifest: FileManifest, entry: Entry) -> FileContent:
        used = (entry.extra or {}).get("used", entry.size)
        content = FileContent(node.oid, tree.reader, tree.sealer, manifest, used)
        # Its blocks stay bound to the object they were written for.
        content.fork(manifest.lineage or entry.oid)
        return content

    async def _replace(self, tree: Tree, node: FileNode, item: Item) -> bool:
        """Give a file its old content, under the same inode. False if it has changes of no version yet."""
        entry, manifest = item.entry, item.manifest
        assert manifest is not None  # read before
        changed = node.entry is None or node.entry.ref != entry.ref
        if changed:
            old_size = node.size
            if node.content is None:
                node.content = self._content(tree, node, manifest, entry)
            else:
                content = node.content
                # Whoever writes waits for this, and then writes into the old content that came back.
                async with content.lock:
                    if node.dirty or content.changed or not tree.is_named(node):
                        return False
                    used = (entry.extra or {}).get("used", entry.size)
                    content.become(manifest, used, manifest.lineage or entry.oid)
            node.past_sizes.add(old_size)
            node.kernel_current = False
        self._attributes(tree, node, entry, content=changed)
        self.done.files += 1
        return True

    def _attributes(self, tree: Tree, node: Node, entry: Entry, *, content: bool = False) -> None:
        xattrs = dict((entry.extra or {}).get("x", ()))
        if isinstance(node, DirNode) and (node.mode, node.xattrs) == (entry.mode, xattrs):
            return
        node.mode, node.xattrs = entry.mode, xattrs
        if not isinstance(node, DirNode):
            node.mtime_ns = node.atime_ns = entry.mtime_ns
        tree.touch(node)
        self._share.services.emit(NodeChanged(node.ino, content))

    async def _date_directories(self) -> None:
        """Give the directories that were made their old times, now that they are filled."""
        for at in range(0, len(self._made), BATCH):
            grant = await self._share.use("write")
            async with self._share.changing() as tree:
                grant.check()
                for item in self._made[at : at + BATCH]:
                    node = await reach(tree, grant, item.path)
                    if isinstance(node, DirNode):
                        node.mtime_ns = node.atime_ns = item.entry.mtime_ns
                        tree.mark(node)


def _same_content(a: FileManifest, b: FileManifest) -> bool:
    """Return whether two manifests are of the same bytes, as far as their blocks are the same ones."""
    if a.inline is not None or b.inline is not None:
        return a.inline == b.inline
    return (a.size, a.block_size, a.refs, a.index, a.lineage or a.oid) == (
        b.size, b.block_size, b.refs, b.index, b.lineage or b.oid,
    )  # fmt: skip
