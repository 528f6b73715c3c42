"""Giving everything in a share new keys: each block, manifest and page is sealed again, its bytes unchanged.

A new epoch keeps those who lost access out of what is written from then on. What was written before still
stands under the keys they may have kept; after this, the newest version names no such block any more.

The tree is walked until a walk finds nothing left to do, since others go on working in it. What proves that
an object is done is the digest of its manifest: this device saw that manifest being made, and every block
below it. Digests do not change their meaning, so they are remembered in any order, and for a whole epoch: an
interrupted run goes on with what is not done, and a later one looks only at what came since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from meshkitfs.core.blocks import HOLE, REFS_PER_INDEX, Where
from meshkitfs.core.entries import DIR, FILE, Entry
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._nodes import Child, DirNode, FileNode, Node
from meshkitfs.shares._resealed import Done
from meshkitfs.shares._share import Share
from meshkitfs.shares._tree import Tree

__all__ = ["Rewritten", "reencrypt"]

# A version is published after so much (plaintext bytes, objects), so that the spool never holds more of it.
STEP_BYTES = 64 << 20
STEP_OBJECTS = 512
# Walks before giving up on what others change faster than it can be rewritten.
WALKS = 8
# What is wrong with one object alone; the others can still be done.
_DAMAGED: Final = frozenset({"block_unavailable", "cid_mismatch", "invalid_envelope"})
_ENTRIES_PER_SLICE = 256


@dataclass(slots=True)
class Rewritten:
    """What a run did. ``bytes`` are plaintext. ``complete``: nothing that was there before is left.

    ``skipped`` objects were done by an earlier run. ``unreadable`` are the names of what is damaged, and
    so keeps its old keys.
    """

    files: int = 0
    directories: int = 0
    blocks: int = 0
    bytes: int = 0
    skipped: int = 0
    epoch: int = 0
    version: int = 0
    complete: bool = False
    unreadable: list[str] = field(default_factory=list)


class _NewEpochError(Exception):
    """Somebody else was shut out meanwhile: what was done so far counts for nothing."""


async def reencrypt(share: Share, progress: Callable[[dict[str, Any]], None]) -> Rewritten:
    """Seal everything in ``share`` again under new keys and publish it; the owner may, while others work.

    ``progress`` is given bytes of plaintext done, and found so far. Raises ``not_owner``, the gate's refusal,
    and what keeps a version from being stored or published; the next run goes on where this one ended.
    """
    if not share.row.mine:
        raise MeshkitError("not_owner", f"'{share.name}' belongs to {share.row.owner_handle}")
    while True:
        grant = await share.use("write", current=True)
        tree, epoch = share.tree, grant.capsule.epoch
        assert tree is not None  # `use` loads it
        done = await trio.to_thread.run_sync(Done, share.services.state, share.row.share, epoch)
        run = _Run(share, tree, epoch, done, progress)
        tree.on_settled = run.settled
        try:
            return await run.all()
        except _NewEpochError:
            continue
        finally:
            tree.on_settled = None
            with trio.CancelScope(shield=True):
                await done.save()


class _Run:
    def __init__(
        self, share: Share, tree: Tree, epoch: int, done: Done, progress: Callable[[dict[str, Any]], None]
    ) -> None:
        self._share = share
        self._tree = tree
        self._epoch = epoch
        self._done = done
        self._progress = progress
        self._result = Rewritten(epoch=epoch)
        # Files whose blocks all have new keys in memory, by oid: the generation a commit must have caught.
        self._rewritten: dict[bytes, int] = {}
        # Pages and directory manifests as they were found: by digest, and the oids of those looked at.
        self._old: set[bytes] = set()
        self._visited: set[bytes] = set()
        self._damaged: set[bytes] = set()
        # This is the first walk; and in this one, something was found to do.
        self._first = True
        self._busy = False
        self._found = 0
        self._passed = 0
        self._step_bytes = 0
        self._step_objects = 0

    async def all(self) -> Rewritten:
        result = self._result
        for _ in range(WALKS):
            self._busy = False
            await self._walk(self._tree.links)
            await self._walk(self._tree.root)
            self._first = False
            await self._step()
            result.complete = self._complete()
            if result.complete or (self._damaged and not self._busy):
                break
        result.version = self._share.base.version
        return result

    # -- what is done ------------------------------------------------------------------------------

    def settled(self, node: Node, generation: int, old: Entry | None, new: Entry) -> None:
        """A commit has written ``node``: is all that its manifest names new?"""
        if not isinstance(node, FileNode):
            return
        due = self._rewritten.get(node.oid)
        if due is not None and generation >= due:
            del self._rewritten[node.oid]
            self._done.add(new.ref)
        elif old is not None and old.ref in self._done:
            # Changed here, on top of what was done: that has new keys by itself.
            self._done.add(new.ref)
        elif old is None and node.content is not None and node.content.oid == node.oid:
            self._done.add(new.ref)  # made here just now, and no copy that shares blocks

    def _is_done(self, child: Child) -> bool:
        if child.kind not in (FILE, DIR):
            return True
        entry = child if isinstance(child, Entry) else child.entry
        return entry is not None and entry.ref in self._done

    def _has_old_pages(self, node: DirNode) -> bool:
        return any(part.ref[:8] in self._old for part in node.parts)

    def _whole(self, node: DirNode) -> bool:
        """Whether nothing in a loaded directory, and nothing below it, has an older key."""
        if node.children is None or self._has_old_pages(node):
            return False
        return all(self._is_done(child) for child in node.children.values())

    def _complete(self) -> bool:
        tree, root = self._tree, self._tree.root
        assert isinstance(root, DirNode)
        entry = tree.links.entry
        links = entry is None or (entry.ref[:8] not in self._old and self._whole(tree.links))
        return self._share.tree is tree and links and self._whole(root)

    # -- walking -----------------------------------------------------------------------------------

    async def _walk(self, top: Node) -> None:
        """Go through a directory and all below it, depth first, in the order of names."""
        assert isinstance(top, DirNode)
        if top is self._tree.links and top.entry is None and not top.children:
            return
        stack: list[tuple[DirNode, Iterator[bytes]]] = []
        self._enter(stack, top, await self._open(top))
        try:
            while stack:
                node, names = stack[-1]
                below = await self._next_directory(node, names)
                if below is not None:
                    self._enter(stack, below, await self._open(below))
                    continue
                stack.pop()
                self._leave(node)
                await self._step_if_due()
        finally:
            for node, _ in stack:
                node.opens -= 1

    def _enter(self, stack: list[tuple[DirNode, Iterator[bytes]]], node: DirNode, names: list[bytes]) -> None:
        stack.append((node, iter(names)))
        # Held like an open directory, or a commit would let go of it while it is walked.
        node.opens += 1

    async def _open(self, node: DirNode) -> list[bytes]:
        """Have a directory sealed again, and return the names in it; none if it is damaged."""
        grant = await self._grant()
        node.opens += 1
        try:
            async with self._share.changing() as tree:
                self._same(tree)
                await tree.load(grant, node)
                if not tree.is_named(node):
                    return []  # removed since it was found
                self._renew_directory(tree, node)
                children = node.children or {}
                if self._first:
                    self._found += sum(_size(child) for child in children.values())
                return sorted(children)
        except MeshkitError as error:
            self._note_damage(node, error)
            return []
        finally:
            node.opens -= 1

    def _renew_directory(self, tree: Tree, node: DirNode) -> None:
        """Mark what has to be sealed again: all of it at the first visit, later what a merge brought back."""
        first = node.oid not in self._visited
        manifest = b"" if node.entry is None else node.entry.ref
        if first:
            self._visited.add(node.oid)
            self._old.update(part.ref[:8] for part in node.parts if part.ref not in (b"", b"inline"))
            if manifest:
                self._old.add(manifest[:8])
            self._result.directories += 1
        stale = [part for part in node.parts if first or part.ref[:8] in self._old]
        if stale or manifest[:8] in self._old:
            for part in stale:
                part.dirty = True
            tree.mark(node)
            self._busy = True
            self._step_objects += 1

    async def _next_directory(self, node: DirNode, names: Iterator[bytes]) -> DirNode | None:
        """Deal with the files among ``names``; returns the first directory that is not done."""
        for seen, name in enumerate(names):
            if seen % _ENTRIES_PER_SLICE == 0:
                await trio.lowlevel.checkpoint()
            child = (node.children or {}).get(name)
            if child is None or child.kind not in (FILE, DIR) or child.oid in self._damaged:
                continue
            if self._is_done(child):
                if self._first:
                    self._result.skipped += 1
                    self._pass(_size(child))
                continue
            found = self._tree.node_of(node, name)
            if isinstance(found, DirNode):
                return found
            if isinstance(found, FileNode) and found.oid not in self._rewritten:
                await self._file(found)
                await self._step_if_due()
        return None

    def _leave(self, node: DirNode) -> None:
        node.opens -= 1
        entry = node.entry
        top = node is self._tree.root or node is self._tree.links
        described = not top and not node.dirty and entry is not None and entry.ref[:8] not in self._old
        if described and entry is not None and self._whole(node):
            # Its manifest names exactly this, by digest; so it stands for all that is below it, too.
            self._done.add(entry.ref)
        if self._tree.nodes.get(node.ino) is node:
            self._tree.evict(node)

    # -- files -------------------------------------------------------------------------------------

    async def _file(self, node: FileNode) -> None:
        """Seal all of a file again. Left undone if a merge or a removal comes in between."""
        self._busy = True
        node.opens += 1
        try:
            await self._contents(node)
        except MeshkitError as error:
            self._note_damage(node, error)
        finally:
            node.opens -= 1
            node.release_content()
            if self._tree.nodes.get(node.ino) is node:
                self._tree.evict(node)

    async def _contents(self, node: FileNode) -> None:
        grant = await self._grant()
        async with self._share.changing() as tree:
            self._same(tree)
            content = await tree.content(grant, node)
            content.revision += 1
            tree.mark(node)
            size, before = node.used(), self._passed
            if not self._first:
                self._found += size
            self._count(0 if content.block_size else content.size)
        number = 0
        while number * REFS_PER_INDEX < content.table.count:
            for i in await self._stored(node, number):
                if not await self._block(node, i):
                    return
                await self._step_if_due()
            number += 1
        async with self._share.changing() as tree:
            self._same(tree)
            if node.content is not content or not tree.is_named(node):
                return
            if node.dirty:
                self._rewritten[node.oid] = node.generation
            else:
                assert node.entry is not None  # clean, so a commit has written it
                self._done.add(node.entry.ref)
        self._result.files += 1
        self._step_objects += 1
        self._pass(before + size - self._passed)

    async def _stored(self, node: FileNode, number: int) -> list[int]:
        """Return the blocks of one segment of references that are not holes."""
        grant = await self._grant()
        async with self._share.changing() as tree:
            self._same(tree)
            content = node.content
            if content is None:
                return []
            async with content.lock:
                first, table = number * REFS_PER_INDEX, content.table
                await content.ref(grant, first)
                last = min(first + REFS_PER_INDEX, table.count)
                return [i for i in range(first, last) if table.peek(i) != HOLE]

    async def _block(self, node: FileNode, i: int) -> bool:
        """Hand one block to the sealer again; False if the file is not what it was any more."""
        share, grant, content = self._share, await self._grant(), node.content
        sealer = self._tree.sealer
        await share.services.budget.room(lambda: share.tree is None or sealer.error is not None)
        if sealer.error is not None:
            error, sealer.error = sealer.error, None
            share.hurry()
            raise error
        async with share.changing() as tree:
            self._same(tree)
            if content is None or node.content is not content or not tree.is_named(node):
                return False
            async with content.lock:
                if i >= content.table.count or i in content.dirty or i in content.sealing:
                    return True  # cut off, or about to be sealed anyway
                ref = await content.ref(grant, i)
                if ref == HOLE:
                    return True
                reader = share.services.reader
                # Not kept: a walk through everything would push out what is really being read.
                plain = reader.cached(grant, ref) or await reader.open(
                    grant, ref, Where.block(content.oid, i)
                )
                if node.content is not content or content.table.peek(i) != ref:
                    return True
                kept = min(content.block_size, content.size - i * content.block_size)
                content.dirty[i] = bytearray(plain[:kept])
                sealer.hold(kept)
                content.seal(i)
                content.revision += 1
                tree.mark(node)
        self._result.blocks += 1
        self._count(kept)
        return True

    def _note_damage(self, node: Node, error: MeshkitError) -> None:
        if error.code not in _DAMAGED:
            raise error
        self._damaged.add(node.oid)
        self._result.unreadable.append(_path(node))

    # -- steps -------------------------------------------------------------------------------------

    async def _grant(self) -> Grant:
        grant = await self._share.use("write")
        if grant.capsule.epoch != self._epoch:
            raise _NewEpochError
        return grant

    def _same(self, tree: Tree) -> None:
        if tree is not self._tree:
            raise MeshkitError("operation_aborted", f"'{self._share.name}' was opened anew meanwhile")

    def _count(self, size: int) -> None:
        self._result.bytes += size
        self._step_bytes += size
        self._pass(size)

    def _pass(self, size: int) -> None:
        self._passed += size
        if size:
            self._progress(
                {"stage": self._share.name, "done": self._passed, "total": self._found, "unit": "bytes"}
            )

    async def _step_if_due(self) -> None:
        if self._step_bytes >= STEP_BYTES or self._step_objects >= STEP_OBJECTS:
            await self._step()

    async def _step(self) -> None:
        """Publish what was rewritten so far, and remember it."""
        self._step_bytes = self._step_objects = 0
        if self._share.dirty:
            await self._share.flush()
        await self._done.save()
        await self._grant()


def _size(child: Child) -> int:
    """Return about how many bytes of a child there are to seal; holes are none."""
    if isinstance(child, FileNode):
        return child.used()
    if isinstance(child, Entry) and child.kind == FILE:
        return int((child.extra or {}).get("used", child.size))
    return 0


def _path(node: Node) -> str:
    parts: list[bytes] = []
    at: Node | None = node
    while at is not None:
        parts.append(at.name)
        at = at.parent
    return b"/".join(reversed(parts)).decode(errors="surrogateescape").lstrip("/")
