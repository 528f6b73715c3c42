"""One share at work: its grant, its tree, and the cycle that makes changes durable and public.

Two locks, always taken in this order: ``_cycle`` (one commit, publication or merge at a time) and
``_renewing`` (one walk through the gate at a time). Handlers take neither for reads and writes on a live
grant; they only announce changes with `changing`, so that a merge can wait for a quiet moment.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import ver_key
from meshkitfs.core.manifest import DirManifest, FileManifest
from meshkitfs.core.records import Head
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant, HeadView
from meshkitfs.metadata import Publication
from meshkitfs.shares._changing import Changing
from meshkitfs.shares._commit import freeze, settle, thaw, write_out
from meshkitfs.shares._events import AccessChanged, NodeChanged, PublishFailed
from meshkitfs.shares._graft import Graft
from meshkitfs.shares._history import History
from meshkitfs.shares._merge import Merge, Plan
from meshkitfs.shares._nodes import FileNode, Node, inode_number
from meshkitfs.shares._past import Past
from meshkitfs.shares._planting import plant
from meshkitfs.shares._publishing import PUBLISH_DEADLINE_S, publish, signed_head, upload
from meshkitfs.shares._sealer import Sealer
from meshkitfs.shares._services import Counters, Services
from meshkitfs.shares._tree import Tree
from meshkitfs.shares._versions import Library
from meshkitfs.state import LocalCommit, ShareRow

__all__ = ["Services", "Share"]

_log = logging.getLogger(__name__)

# How soon a change is published after a quiet time, and how often at most while changes go on: a single
# save is seen at once, a flood of files becomes a few heads.
QUICK_DELAY_S = 0.05
BUSY_DELAY_S = 1.0
IDLE_DELAY_S = 5.0
RETRY_DELAY_S = 5.0
# How long before its end a lease is renewed, so that what cannot wait (a listing) does not meet its end.
RENEW_AHEAD_S = 60.0
# How often a refused share is looked at again by itself; an open asks at once.
REFUSED_AGAIN_S = 5.0
# How long to go on merging while others publish faster.
RACE_DEADLINE_S = 30


class Share:
    """A share of this home, opened when it is first used."""

    def __init__(self, row: ShareRow, services: Services) -> None:
        self.row = row
        self.services = services
        self.grant: Grant | None = None
        # Why the last try was refused; None while the share can be used.
        self.refusal: MeshkitError | None = None
        # Why the last publication failed; None when everything is out.
        self.stuck: MeshkitError | None = None
        self.tree: Tree | None = None
        self.base = HeadView()
        self.history = History(services, row)
        self.past = Past(self)
        self.counters = Counters()
        self.conflicts: list[bytes] = []
        self._pending: LocalCommit | None = None
        # Changes were taken out of the tree's dirty set and are not in a local commit yet.
        self._committing = False
        self._refused_at = 0.0
        self._tick = -1
        self._cycle = trio.Lock()
        self._renewing = trio.Lock()
        self._started = 0
        self._succeeded = 0
        self._change = Changing(lambda: self.tree)
        self._wake = trio.Event()
        # Times (trio's clock) of the first change and the first wish to hurry since the last cycle; 0 = none.
        self._urgent_at = 0.0
        self._changed_at = 0.0
        self._last_cycle = 0.0
        self._committer = False
        self.root_ino = inode_number(row.ref, row.oid)

    def __repr__(self) -> str:
        return f"<Share {self.row.share.hex()[:8]}>"

    @property
    def name(self) -> str:
        return self.row.name.decode(errors="surrogateescape")

    # -- the grant ---------------------------------------------------------------------------------

    def live(self, right: str) -> Grant | None:
        """Return the grant if it includes ``right`` and needs no renewal, without asking anybody."""
        grant = self.grant
        if grant is None or not grant.alive or self.tree is None or right not in grant.rights:
            return None
        return grant

    async def use(self, right: str, *, current: bool = False) -> Grant:
        """Return a live grant that includes ``right``, with the tree loaded; walk the gate if need be.

        With ``current`` the metadata store's change counter is looked at first, and a newer head or roster
        is taken in: that is what an open does. Raises the gate's refusal.
        """
        grant = self.live(right)
        if grant is not None and not current:
            return grant
        seen = self.services.metadata.tick() == self._tick
        # The newest head may be known and its tree still on the way here: that is not yet the newest state.
        if grant is not None and seen and grant.head.hash == self.base.hash:
            return grant
        grant = await self._renew()
        if self.tree is None or grant.head.hash != self.base.hash:
            async with self._cycle:
                grant = await self._catch_up(await self._renew())
        grant.require(right)
        return grant

    async def _renew(self, *, ahead: bool = False) -> Grant:
        """Walk the gate and keep the new grant, or the refusal; ``ahead`` does so before the old one ends."""
        async with self._renewing:
            tick = self.services.metadata.tick()
            if self.grant is not None and self.grant.alive and tick == self._tick and not ahead:
                return self.grant
            try:
                grant = await self.services.gate.open(self.row, "list")
            except MeshkitError as error:
                self.refuse(error)
                raise
            self.grant = grant
            self._tick = tick
            if self.refusal is not None:
                self.refusal = None
                self.services.emit(AccessChanged(self.name, ""))
            return grant

    def refuse(self, error: MeshkitError) -> None:
        """End the grant: keys and cached plaintext go, and the kernel is told to drop what it holds."""
        first = self.refusal is None or self.refusal.code != error.code
        if self.grant is not None:
            self.grant.end(error)
            self.grant = None
        self._tick = -1
        self.refusal = error
        self._refused_at = trio.current_time()
        if not first:
            return
        self.services.reader.forget()
        if self.tree is not None:
            for node in self.tree.nodes.values():
                if isinstance(node, FileNode):
                    node.kernel_current = False
                self.services.emit(NodeChanged(node.ino, True))
        self.past.refused()
        self.services.emit(AccessChanged(self.name, error.code))

    async def refresh(self) -> None:
        """Look whether somebody published something or the grant needs renewing. Never raises a refusal."""
        if self.tree is None and self.refusal is None:
            return
        if self.refusal is not None and trio.current_time() < self._refused_at + REFUSED_AGAIN_S:
            return
        try:
            if self.grant is not None and self.grant.ends_within(RENEW_AHEAD_S):
                await self._renew(ahead=True)
            await self.use("list", current=True)
        except MeshkitError as error:
            _log.debug("refresh of %r: %s", self, error.code)

    @property
    def tree_root(self) -> Node | None:
        return None if self.tree is None else self.tree.root

    def forget_tree(self) -> None:
        """Drop grant and tree; the next use starts from what the metadata store shows."""
        if self.tree is not None:
            for node in self.tree.nodes.values():
                self.services.emit(NodeChanged(node.ino, True))
        self.grant, self.tree, self.refusal = None, None, None
        self._tick = -1
        self._pending = None

    # -- the tree ----------------------------------------------------------------------------------

    async def _catch_up(self, grant: Grant) -> Grant:
        """Load the tree, or merge a newer head into it. Returns the grant to go on with. Holds ``_cycle``."""
        if self.tree is None:
            await self._load(grant)
        if self._pending is not None and grant.head.hash != self.base.hash:
            grant = await self._recognize(self._pending, grant)
        if grant.head.hash != self.base.hash and ("write" in grant.rights or not self.dirty):
            # Without the right to write, what was changed here can neither be merged nor published. It stays
            # as it is, and the share where it was, until the right is given again; `stuck` says so.
            await self._merge(grant)
        return grant

    async def _recognize(self, commit: LocalCommit, grant: Grant) -> Grant:
        """Find out whether the local commit was published after all, and only the answer was lost.

        Otherwise it would be merged with itself, and every file in it would be in conflict.
        """
        services, me = self.services, self.services.signing()
        try:
            with trio.fail_after(PUBLISH_DEADLINE_S):
                found = await services.metadata.heads(self.row.share, self.base.version, commit.version)
        except trio.TooSlowError:
            raise MeshkitError("metadata_unavailable", "no answer in time") from None
        for blob in found:
            try:
                head = Head.parse(blob, {me.kid: me.public})
            except MeshkitError:
                continue  # somebody else's
            if (head.ver, head.epoch, head.root) == (commit.version, commit.epoch, commit.root):
                # It was published, so all its blocks were stored. That the chain goes on from it to the
                # newest head is for the gate to check again, with the mark where it is now.
                staged = await trio.to_thread.run_sync(services.state.staged, self.row.share)
                await self._published(commit, blob, [digest for digest, _ in staged])
                self._tick = -1
                return await self._renew()
        return grant

    async def _load(self, grant: Grant) -> None:
        services, row = self.services, self.row
        sealer = Sealer(services.nursery, services.spool, services.reader.spooled, services.budget)
        pending = services.state.local_commit(row.share) if row.grant == "live" else None
        head = grant.head
        if pending is not None:
            # Work of an earlier run that was never published: that is the tree, made from an older head.
            root, epoch, version = pending.root, pending.epoch, pending.version
            self.base = HeadView(
                pending.base_version, pending.base_epoch, pending.base_root, pending.base_hash
            )
        else:
            root, epoch, version = head.root, head.epoch, head.version
            self.base = head
        manifest = await services.reader.open_root(grant, root, epoch, version)
        self.tree = await plant(grant, row, manifest, services.reader, sealer)
        self._pending = pending
        self.tree.on_change = self._on_change
        if pending is not None:
            self._on_change()

    async def _merge(self, grant: Grant) -> None:
        """Bring the tree to ``grant.head``. Holds ``_cycle``."""
        tree = self.tree
        assert tree is not None
        async with self._change.held_off():
            if tree.dirty:
                # What was changed here becomes one of the three versions that are compared.
                await self._commit_locally(grant)
            services, old, new, pending = self.services, self.base, grant.head, self._pending
            reader, library, plan = services.reader, Library(tree, grant), Plan()
            theirs = _directory(await reader.open_root(grant, new.root, new.epoch, new.version))
            if pending is not None:
                base = _directory(await reader.open_root(grant, old.root, old.epoch, old.version))
                ours = _directory(await reader.open_root(grant, pending.root, pending.epoch, pending.version))
                day = datetime.fromtimestamp(services.wall(), UTC).date()
                plan = await Merge(library, base, ours, theirs, services.who, day).run()
            graft = Graft(tree, grant, library, theirs, plan, services.emit)
            await graft.prepare()
            # From here on nothing waits: tree and base change together, or not at all.
            graft.apply()
            self.base = new
            self.conflicts += plan.conflicts
            self.counters.merges += 1
            if pending is not None:
                # The local commit was made on the old base: what it holds is committed anew on this one.
                tree.mark(tree.root)

    def changing(self) -> Changing:
        """Around every change of the tree (``async with``): waits while a merge runs, and makes one wait."""
        return self._change

    # -- making changes durable and public -----------------------------------------------------------

    def _on_change(self) -> None:
        if not self._changed_at:
            self._changed_at = trio.current_time()
        if not self._committer:
            self._committer = True
            self.services.nursery.start_soon(self._commit_when_due)

    def hurry(self) -> None:
        """Publish soon: a file was closed, a name was changed, or memory is full."""
        if not self._urgent_at:
            self._urgent_at = trio.current_time()
            self._wake.set()

    async def _commit_when_due(self) -> None:
        """Publish changes a little after they were made, until there are none left."""
        try:
            while self.dirty:
                await self._pause()
                try:
                    await self.flush()
                except MeshkitError as error:
                    _log.warning("share %r: %s, tried again later (%s)", self, error.code, error.detail)
                except Exception:
                    # A defect in one share must not take the mount down; its changes stay in memory.
                    _log.exception("share %r: the commit failed in a way nobody foresaw", self)
                    self.stuck = MeshkitError("internal_error", "the commit failed; see the log")
        finally:
            self._committer = False

    async def _pause(self) -> None:
        """Wait until the next cycle is due: soon after a close, later while a file is still being written."""
        while True:
            due = self._changed_at + IDLE_DELAY_S
            if self._urgent_at:
                due = min(due, max(self._urgent_at + QUICK_DELAY_S, self._last_cycle + BUSY_DELAY_S))
            if self.stuck is not None:
                due = max(due, self._last_cycle + RETRY_DELAY_S)
            if trio.current_time() >= due:
                return
            self._wake = trio.Event()
            with trio.move_on_at(due):
                await self._wake.wait()

    @property
    def dirty(self) -> bool:
        """Whether anything waits to be committed or published, or is just being so."""
        if self._pending is not None or self._committing:
            return True
        return self.tree is not None and bool(self.tree.dirty)

    async def flush(self) -> None:
        """Return when everything changed before this call is stored by the provider and published.

        Calls that wait together share one cycle. Raises what kept it from being published; the changes
        are safe on this device if a local commit was possible (``stuck`` says).
        """
        wanted = self._started + 1
        async with self._cycle:
            if self._succeeded >= wanted:
                return
            self._started += 1
            number = self._started
            try:
                await self._bring_out("write")
            except MeshkitError as error:
                if self.stuck is None or self.stuck.code != error.code:
                    self.services.emit(PublishFailed(self.name, error))
                self.stuck = error
                raise
            finally:
                self._last_cycle = trio.current_time()
            self.stuck = None
            self._succeeded = number

    async def _bring_out(self, right: str) -> Grant:
        """Commit what changed here and publish it on top of what others publish meanwhile. Holds ``_cycle``.

        Whoever has more to merge is slower and loses each single race, so only time decides when to give up.
        """
        give_up = trio.current_time() + RACE_DEADLINE_S
        while True:
            grant = await self._catch_up(await self._renew())
            grant.require(right)
            await self._commit_locally(grant)
            if await self._publish(grant):
                return grant
            if trio.current_time() > give_up:
                raise MeshkitError("head_conflict", f"others were faster for {RACE_DEADLINE_S} s")

    async def _commit_locally(self, grant: Grant) -> None:
        """Make the tree as it is now durable on this device. Holds ``_cycle``."""
        tree, services = self.tree, self.services
        assert tree is not None
        frozen = freeze(tree)
        if frozen is None:
            return
        self._committing = True
        self._changed_at = self._urgent_at = 0.0
        version, epoch = self.base.version + 1, grant.capsule.epoch
        recording = False
        try:
            await write_out(tree, frozen, services.spool, epoch, version, grant.sealing_key(version))
            await trio.to_thread.run_sync(services.spool.sync)
            commit = LocalCommit(
                self.row.share, frozen.root, epoch, version,
                self.base.hash, self.base.root, self.base.epoch, self.base.version,
            )  # fmt: skip
            recording = True
            await trio.to_thread.run_sync(services.state.record_commit, commit, list(frozen.staged.items()))
        except BaseException as error:
            # A full disk is a clean no; after another error the database may hold the commit all the same.
            full = isinstance(error, MeshkitError) and error.code == "no_space"
            thaw(tree, frozen, named=recording and not full)
            raise
        else:
            tree.sealer.error = None
            settle(tree, frozen, self._clean)
            self._pending = commit
        finally:
            self._committing = False
        self.counters.commits += 1

    def _clean(self, node: Node) -> None:
        assert self.tree is not None
        if isinstance(node, FileNode):
            node.release_content()
        self.tree.evict(node)

    async def _publish(self, grant: Grant) -> bool:
        """Upload and publish the local commit; False if somebody else was faster. Holds ``_cycle``."""
        commit = self._pending
        if commit is None:
            return True
        services, row = self.services, self.row
        stored = [digest for digest, _ in await trio.to_thread.run_sync(services.state.staged, row.share)]
        await upload(services, stored)
        self.counters.uploaded += len(stored)
        head = signed_head(services, row, commit.epoch, commit.version, self.base.hash, commit.root)
        publication = Publication(
            row.share,
            expect_head=self.base.hash,
            head=head,
            head_ver=commit.version,
            head_epoch=commit.epoch,
        )
        try:
            await publish(services, publication)
        except MeshkitError as error:
            if error.code != "head_conflict":
                raise
            self._tick = -1
            return False
        await self._published(commit, head, stored)
        return True

    async def _published(self, commit: LocalCommit, head: bytes, stored: list[bytes]) -> None:
        services = self.services
        self.base = HeadView(
            commit.version,
            commit.epoch,
            commit.root,
            record_hash(head),
            services.signing().kid,
            int(services.wall()),
        )
        self._pending = None
        # A walk since then may have seen an even newer head, which must not be forgotten again.
        if self.grant is not None and self.grant.head.version < self.base.version:
            self.grant.head = self.base
        mark = services.state.mark(self.row.share)
        mark = replace(mark, head_version=self.base.version, head_hash=self.base.hash)

        def settle_state() -> None:
            services.state.published(self.row.share, mark, stored)
            services.reader.spooled.difference_update(stored)
            services.spool.discard(stored)

        await trio.to_thread.run_sync(settle_state)
        self.counters.heads += 1

    async def rotate(self, key: bytes, epoch: int, grants: Publication) -> None:
        """Move the share to a new epoch: re-seal its root under the new ``key`` and publish all at once.

        ``grants`` has the roster and capsules; the head is added here. What is not published yet is
        published first, under the old epoch.
        """
        async with self._cycle:
            give_up = trio.current_time() + RACE_DEADLINE_S
            while True:
                grant = await self._bring_out("reshare")
                try:
                    await self._reseal(key, epoch, grants)
                    return
                except MeshkitError as error:
                    # Somebody may publish in between again and again; another roster is another matter.
                    current = grant.roster.seq == grants.expect_roster
                    if error.code != "head_conflict" or not current or trio.current_time() > give_up:
                        raise
                    self._tick = -1

    async def _reseal(self, key: bytes, epoch: int, grants: Publication) -> None:
        """Publish ``grants`` with a new head, whose root is sealed under ``key``. Holds ``_cycle``."""
        tree, services = self.tree, self.services
        assert tree is not None
        tree.mark(tree.root)
        frozen = freeze(tree)
        assert frozen is not None  # the root was just marked
        version = self.base.version + 1
        try:
            await write_out(
                tree, frozen, services.spool, epoch, version, ver_key(key, self.row.oid, epoch, version)
            )
            await trio.to_thread.run_sync(services.spool.sync)
            digests = list(frozen.staged)
            await upload(services, digests)
            head = signed_head(services, self.row, epoch, version, self.base.hash, frozen.root)
            await publish(
                services,
                replace(grants, expect_head=self.base.hash, head=head, head_ver=version, head_epoch=epoch),
            )
        except BaseException:
            thaw(tree, frozen)
            raise
        settle(tree, frozen, self._clean)
        self.grant = None
        self._tick = -1
        self.base = HeadView(version, epoch, frozen.root, record_hash(head))
        services.reader.spooled.difference_update(digests)
        await trio.to_thread.run_sync(services.spool.discard, digests)


def _directory(manifest: DirManifest | FileManifest) -> DirManifest:
    """Return the root manifest of a share that can have several versions: a directory, not a single file."""
    if not isinstance(manifest, DirManifest):
        raise MeshkitError("invalid_envelope", "the root of a share is not a directory")
    return manifest
