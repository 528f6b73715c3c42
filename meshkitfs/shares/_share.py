"""One share at work: its tree, and the cycle that makes changes durable and public.

Three locks, always taken in this order: ``_sending`` (one publication at a time), ``_cycle`` (one local
commit or merge at a time) and ``_renewing`` (one walk through the gate at a time). An upload holds only the
first, so that changes go on being committed on this device while a slow store takes its time. Handlers take
none of them for reads and writes on a live grant; they only announce changes with `changing`, so that a merge
can wait for a quiet moment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from math import inf

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import ver_key
from meshkitfs.core.manifest import DirManifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant, HeadView
from meshkitfs.metadata import Publication
from meshkitfs.shares._access import Access
from meshkitfs.shares._changing import Changing
from meshkitfs.shares._commit import freeze, settle, thaw, write_out
from meshkitfs.shares._events import NodeChanged, PublishFailed
from meshkitfs.shares._graft import Graft
from meshkitfs.shares._history import History
from meshkitfs.shares._locking import RefSeal, drop_content, seal_refs, unseal_refs
from meshkitfs.shares._merge import Merge, Plan
from meshkitfs.shares._nodes import FileNode, Node, inode_number
from meshkitfs.shares._outbox import Outbox
from meshkitfs.shares._pace import RETRY_DELAY_S, Pace
from meshkitfs.shares._past import Past
from meshkitfs.shares._planting import plant
from meshkitfs.shares._publishing import publish, signed_head, upload
from meshkitfs.shares._sealer import Sealer
from meshkitfs.shares._services import Counters, Services
from meshkitfs.shares._tree import Tree
from meshkitfs.shares._versions import Library
from meshkitfs.shares._walk import FAULTS
from meshkitfs.state import LocalCommit, ShareRow

__all__ = ["Services", "Share"]

_log = logging.getLogger(__name__)

# How often a share that is refused, or that nobody confirms, is asked about again by itself.
REFUSED_AGAIN_S = 5.0
# How long an open waits for a metadata store that gave no answer the last time.
BRIEFLY_S = 1.0
# How long to go on merging while others publish faster.
RACE_DEADLINE_S = 30
# How long locking waits for what is under way, for instance for a block of a slow store.
LOCK_S = 15
# How many versions before a missing one are tried as what two sides of a merge have in common.
BASES_TRIED = 4


class Share(Access):
    """A share of this home, opened when it is first used."""

    def __init__(self, row: ShareRow, services: Services) -> None:
        super().__init__(row, services)
        # Why the last publication failed; None when everything is out.
        self.stuck: MeshkitError | None = None
        # Why the newest version could not be read when it was last wanted; None when it could.
        self.unread: MeshkitError | None = None
        # Of a share of one's own: until when its newest known roster vouches (UNIX seconds, 0: not known),
        # why it could not be renewed, and when that is tried again.
        self.roster_until = 0
        self.roster_problem: MeshkitError | None = None
        self.roster_again = 0
        self.history = History(services, row)
        self.past = Past(self)
        self.on_refusal = self.past.refused
        self.counters = Counters()
        self.conflicts: list[bytes] = []
        # When what is not public yet began to change (UNIX seconds); 0 when everything is.
        self.unsent_since = 0.0
        self._outbox = Outbox(services, row, self.counters)
        # Changes were taken out of the tree's dirty set and are not in a local commit yet.
        self._committing = False
        # The last try to publish failed, but may have had its effect all the same.
        self._unsure = False
        self._cycle = trio.Lock()
        self._sending = trio.Lock()
        self._started = 0
        self._succeeded = 0
        # Held by what looks at, rewrites, brings back or deletes much of the history, each of which relies on
        # what the others change.
        self.upkeep = trio.Lock()
        self._change = Changing(lambda: self.tree)
        self._pace = Pace()
        self._committer = False
        self.root_ino = inode_number(row.ref, row.oid)

    def __repr__(self) -> str:
        return f"<Share {self.row.share.hex()[:8]}>"

    @property
    def base(self) -> HeadView:
        """The head that the tree stands on."""
        return self._outbox.base

    # -- the grant ---------------------------------------------------------------------------------

    async def use(self, right: str, *, current: bool = False) -> Grant:
        """Return a live grant that includes ``right``, with the tree loaded; walk the gate if need be.

        With ``current`` the metadata store's change counter is looked at first, and a newer head or roster
        is taken in: that is what an open does. Raises the gate's refusal.
        """
        grant = self.live(right)
        if grant is not None and not current:
            return grant
        anew = current and self._undecided(right)
        seen = self._store_tick() == self._tick
        # The newest head may be known and its tree still on the way here: that is not yet the newest state.
        if grant is not None and seen and not anew and grant.head.hash == self.base.hash:
            return grant
        held = self.grant
        # Whoever asks for more than was allowed must not end what was.
        needed = anew or (held is not None and right not in held.rights)
        if held is not None and held.alive and self.unconfirmed is not None and not needed:
            # Nobody answered the last time: this lease is good whether somebody answers now or not.
            with trio.move_on_after(BRIEFLY_S):
                await self._renew()
            grant = self.grant if self.grant is not None and self.grant.alive else await self._renew()
        else:
            grant = await self._renew(ahead=anew, needed=needed)
        if self.tree is None or grant.head.hash != self.base.hash:
            async with self._cycle:
                grant = await self._catch_up(await self._renew())
        grant.require(right)
        return grant

    def _undecided(self, right: str) -> bool:
        """Whether an open for ``right`` has to ask again, although the lease lives.

        So it is when nobody said how long the last yes holds, or when the last answer was no. Listing goes
        with the lease: names are looked up far more often than anything is opened.
        """
        grant = self.grant
        if grant is None or right not in ("read", "write"):
            return False
        return grant.one_open or grant.withholds(right)

    async def refresh(self) -> None:
        """Look whether somebody published something or the grant needs renewing. Never raises a refusal."""
        if self.tree is None and self.refusal is None:
            return
        if self.refusal is not None and trio.current_time() < self._refused_at + REFUSED_AGAIN_S:
            return
        try:
            if self.unconfirmed is not None:
                if self.grant is not None and trio.current_time() < self._asked_at + REFUSED_AGAIN_S:
                    return
                await self._renew(ahead=True)
            elif self.grant is not None and self.grant.due(self.services.gate.renew_ahead_s):
                await self._renew(ahead=True)
            await self.use("list", current=True)
        except MeshkitError as error:
            _log.debug("refresh of %r: %s", self, error.code)

    # -- locking -----------------------------------------------------------------------------------

    async def lock(self, error: MeshkitError, seal: RefSeal) -> None:
        """End the grant with ``error`` (the identity is being locked), after what is unsaved was saved.

        Content and keys go from memory, except of what could not be saved: that would be lost. If a commit or
        a merge is under way and does not end, the keys in the tree stay too. The gate must be refusing
        already, so that nothing begins anew.
        """
        with trio.move_on_after(LOCK_S):
            async with self._cycle, self._change.held_off():
                await self._save_for_lock()
                self.refuse(error)
                for tree in self._trees():
                    seal_refs(tree, seal)
        self.refuse(error)
        for tree in self._trees():
            drop_content(tree)

    def _trees(self) -> list[Tree]:
        return [*([self.tree] if self.tree is not None else []), *self.past.trees()]

    async def _save_for_lock(self) -> None:
        """Save what changed, under the grant as it is. Holds ``_cycle``, and nothing changes meanwhile."""
        tree, grant = self.tree, self.grant
        if tree is None:
            return
        tree.spill_nameless()
        if tree.dirty and grant is not None and grant.alive and "write" in grant.rights:
            try:
                await self._commit_locally(grant)
            except MeshkitError as error:
                _log.warning("share %r: not saved before locking: %s (%s)", self, error.code, error.detail)

    def unseal(self, seal: RefSeal) -> None:
        """Undo what `lock` did to the tree; the grant is for the next use to get."""
        for tree in self._trees():
            unseal_refs(tree, seal)
        self._refused_at = -inf

    @property
    def tree_root(self) -> Node | None:
        return None if self.tree is None else self.tree.root

    def forget_tree(self) -> None:
        """Drop grant and tree; the next use starts from what the metadata store shows."""
        if self.tree is not None:
            for node in self.tree.nodes.values():
                self.services.emit(NodeChanged(node.ino, True))
        self.grant, self.tree, self.refusal, self.unconfirmed = None, None, None, None
        self._tick = -1
        self._outbox = Outbox(self.services, self.row, self.counters)

    # -- the tree ----------------------------------------------------------------------------------

    async def _catch_up(self, grant: Grant) -> Grant:
        """Load the tree, or merge a newer head into it. Returns the grant to go on with. Holds ``_cycle``."""
        try:
            grant = await self._take_in(grant)
        except MeshkitError as error:
            self.unread = error if self.refusal is None else None
            raise
        self.unread = None
        return grant

    async def _take_in(self, grant: Grant) -> Grant:
        if self.tree is None:
            await self._load(grant)
        if grant.head.hash != self.base.hash and await self._outbox.recognize(grant.head.version):
            self._is_out()
            self._tick = -1
            grant = await self._renew()
        pending = self._outbox.pending
        if pending is not None and pending.epoch != grant.capsule.epoch and "write" in grant.rights:
            # What was published began a new epoch: the root needs another key.
            assert self.tree is not None
            self.tree.mark(self.tree.root)
        if grant.head.hash != self.base.hash and ("write" in grant.rights or not self.dirty):
            # Without the right to write, what was changed here can neither be merged nor published. It stays
            # as it is, and the share where it was, until the right is given again; `stuck` says so.
            await self._merge(grant)
        return grant

    async def _load(self, grant: Grant, instead: HeadView | None = None) -> None:
        """Load the tree of the newest local commit, or else of the head, or of the version ``instead``."""
        services, row = self.services, self.row
        sealer = Sealer(services.nursery, services.spool, services.reader.spooled, services.budget)
        outbox, head = self._outbox, grant.head
        if row.grant == "live":
            outbox.load()
        pending = outbox.pending
        if pending is not None:
            # Work of an earlier run that was never published: that is the tree, made from an older head.
            root, epoch, version = pending.root, pending.epoch, pending.version
        else:
            shown = instead or head
            root, epoch, version = shown.root, shown.epoch, shown.version
            outbox.base = head
        manifest = await services.reader.open_root(grant, root, epoch, version)
        self.tree = await plant(grant, row, manifest, services.reader, sealer)
        self.tree.on_change = self._on_change
        if pending is not None:
            self.unsent_since = services.spool.written(pending.root) or services.wall()
            self._on_change()
        elif instead is not None:
            self.tree.mark(self.tree.root)

    async def go_back(self, version: HeadView) -> None:
        """Let the tree be that of a past ``version``, on top of the newest head, which need not be readable.

        What was changed here and is not public yet is merged into it. Still to be published.
        """
        async with self._cycle:
            await self._outbox.settle()
            grant = await self._renew()
            grant.require("write")
            if self.tree is None:
                await self._load(grant, version)
                if self._outbox.pending is None:
                    return
            if grant.head.hash != self.base.hash and await self._outbox.recognize(grant.head.version):
                self._tick = -1
                grant = await self._renew()
            await self._merge(grant, version)

    async def _merge(self, grant: Grant, instead: HeadView | None = None) -> None:
        """Bring the tree to ``grant.head``, or to ``instead`` on top of it. Holds ``_cycle``."""
        tree = self.tree
        assert tree is not None
        async with self._change.held_off():
            if tree.dirty:
                # What was changed here becomes one of the three versions that are compared.
                await self._commit_locally(grant)
            services, new, pending = self.services, grant.head, self._outbox.pending
            library, plan = Library(services.reader, grant), Plan()
            theirs = await self._root_of(grant, instead or new)
            if pending is not None:
                plan = await self._compare(grant, library, pending, theirs)
            graft = Graft(tree, grant, library, theirs, plan, services.emit, alone=pending is None)
            await graft.prepare()
            # From here on nothing waits: tree and base change together, or not at all.
            graft.apply()
            self._outbox.merged_into(new)
            self.conflicts += plan.conflicts
            self.counters.merges += 1
            if pending is not None or instead is not None:
                # The local commit was made on the old base: what it holds is committed anew on this one.
                tree.mark(tree.root)

    async def _compare(
        self, grant: Grant, library: Library, pending: LocalCommit, theirs: DirManifest
    ) -> Plan:
        """Plan the merge of the local commit into ``theirs``.

        If what it was made on is not at the store any more (it was restored from a backup), the newest
        version before that can be read stands in for it: more may clash then, and nothing written is lost.
        """
        services, old = self.services, self.base
        ours = await self._root_of(grant, pending)
        day = datetime.fromtimestamp(services.wall(), UTC).date()
        bases = [old]
        missing: MeshkitError | None = None
        while bases:
            try:
                base = await self._root_of(grant, bases.pop())
                partly = missing is not None
                return await Merge(library, base, ours, theirs, services.who, day, partly=partly).run()
            except MeshkitError as error:
                if error.code not in (FAULTS if missing is None else FAULTS | {"right_not_granted"}):
                    raise
                if missing is None:
                    missing = error
                    await self.history.refresh(grant)
                    earlier = [v.head for v in self.history.versions if v.number < old.version]
                    bases += earlier[-BASES_TRIED:]
        assert missing is not None  # the loop was left by it
        raise missing

    async def _root_of(self, grant: Grant, version: HeadView | LocalCommit) -> DirManifest:
        """Return the root manifest of a version of a share that can have several: a directory."""
        reader = self.services.reader
        manifest = await reader.open_root(grant, version.root, version.epoch, version.version)
        if not isinstance(manifest, DirManifest):
            raise MeshkitError("invalid_envelope", "the root of a share is not a directory")
        return manifest

    def changing(self) -> Changing:
        """Around every change of the tree (``async with``): waits while a merge runs, and makes one wait."""
        return self._change

    # -- making changes durable and public -----------------------------------------------------------

    def _on_change(self) -> None:
        self._pace.changed()
        if not self.unsent_since:
            self.unsent_since = self.services.wall()
        if not self._committer:
            self._committer = True
            self.services.nursery.start_soon(self._commit_when_due)

    def hurry(self) -> None:
        """Publish soon: a file was closed, or a name was changed."""
        self._pace.hurry()

    def press(self) -> None:
        """Commit as soon as possible: memory or the spool is full."""
        self._pace.press()

    async def _commit_when_due(self) -> None:
        """Publish changes a little after they were made, until there are none left."""
        try:
            while self.dirty:
                await self._pace.until_due(stuck=self.stuck is not None)
                try:
                    await self.flush()
                except MeshkitError as error:
                    level = logging.DEBUG if error.code == "identity_locked" else logging.WARNING
                    _log.log(level, "share %r: %s, tried again later (%s)", self, error.code, error.detail)
                except Exception:
                    # A defect in one share must not take the mount down; its changes stay in memory.
                    _log.exception("share %r: the commit failed in a way nobody foresaw", self)
                    self.stuck = MeshkitError("internal_error", "the commit failed; see the log")
        finally:
            self._committer = False

    @property
    def dirty(self) -> bool:
        """Whether anything waits to be committed or published, or is just being so."""
        if self._outbox.pending is not None or self._outbox.unsettled is not None:
            return True
        return self.unsaved

    @property
    def unsaved(self) -> bool:
        """Whether some of what waits is in memory only, and so would end with this process."""
        return self._committing or (self.tree is not None and bool(self.tree.dirty))

    @property
    def uploading(self) -> tuple[int, int] | None:
        """How many blocks, and bytes of them, have arrived in the publication under way; None without one."""
        return (self._outbox.got, self._outbox.got_bytes) if self._sending.locked() else None

    @property
    def waiting(self) -> tuple[int, int]:
        """How many sealed blocks, and bytes of them, wait here until what they belong to is published."""
        blocks, size = self.services.state.waiting(self.row.share)
        fresh = self.tree.sealer.fresh if self.tree is not None else (0, 0)
        return blocks + fresh[0], size + fresh[1]

    async def fsync(self) -> None:
        """Return when everything changed before this call is as safe as this home's ``fsync`` promises."""
        if self.services.fsync_publishes:
            await self.flush()
        else:
            await self.journal()

    async def journal(self) -> None:
        """Return when everything changed before this call is durable on this device."""
        async with self._cycle:
            if self.tree is None or not self.tree.dirty:
                self._pace.taken()
                return  # a commit takes everything, and ends before the cycle does
            grant = await self._renew()
            grant.require("write")
            await self._commit_locally(grant)

    async def flush(self) -> None:
        """Return when everything changed before this call is stored by the provider and published.

        Calls that wait together share one cycle. Raises what kept it from being published; the changes
        are safe on this device if a local commit was possible (``stuck`` says).
        """
        wanted = self._started + 1
        async with self._sending:
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
                self._pace.ended()
                self.services.budget.look_again()
            self.stuck = None
            self._succeeded = number

    async def _bring_out(self, right: str, *, alone: bool = False) -> Grant:
        """Commit what changed here and publish it on top of what others publish. Holds ``_sending``.

        Whoever has more to merge is slower and loses each single race, so only time decides when to give up.
        With ``alone`` the caller holds ``_cycle`` too, and nothing is committed meanwhile.
        """
        give_up = trio.current_time() + RACE_DEADLINE_S
        lost = False
        while True:
            async with nullcontext() if alone else self._cycle:
                await self._outbox.settle()
                if self._unsure:
                    # Look before anything else is decided. Only here: a lease that lives goes on meanwhile.
                    if await self._outbox.recognize(self._outbox.next_version):
                        self._is_out()
                        self._tick = -1
                    self._unsure = False
                grant = await self._catch_up(await self._renew())
                if lost and self.unconfirmed is not None:
                    raise self.unconfirmed  # somebody was faster, and nobody says with what
                grant.require(right)
                await self._commit_locally(grant)
                await self._drop_superseded(grant)
                commit = self._outbox.pending
            if commit is None or await self._publish(commit, grant.roster.writers, alone=alone):
                self._is_out()
                return grant
            lost = True
            if self.unconfirmed is not None:
                self._tick = -1  # that nobody answered was before; now somebody may say what is newer
            if trio.current_time() > give_up:
                raise MeshkitError("head_conflict", f"others were faster for {RACE_DEADLINE_S} s")

    async def _commit_locally(self, grant: Grant) -> None:
        """Make the tree as it is now durable on this device. Holds ``_cycle``."""
        tree, services, outbox = self.tree, self.services, self._outbox
        assert tree is not None
        frozen = freeze(tree)
        self._pace.taken()
        if frozen is None:
            return
        self._committing = True
        version, epoch = outbox.next_version, grant.capsule.epoch
        recording = False
        try:
            await write_out(tree, frozen, services.spool, epoch, version, grant.sealing_key(version))
            await trio.to_thread.run_sync(services.spool.sync)
            commit = outbox.commit(frozen.root, epoch, version)
            recording = True
            await outbox.record(commit, list(frozen.staged.items()))
        except BaseException as error:
            # A full disk is a clean no; after another error the database may hold the commit all the same.
            full = isinstance(error, MeshkitError) and error.code == "no_space"
            thaw(tree, frozen, named=recording and not full)
            self._pace.changed()
            raise
        else:
            tree.sealer.error = None
            settle(tree, frozen, self._clean)
            outbox.pending = commit
        finally:
            self._committing = False
        self.counters.commits += 1

    async def _drop_superseded(self, grant: Grant) -> None:
        """Spare the provider what newer commits have replaced; never a reason to fail. Holds ``_cycle``."""
        assert self.tree is not None
        try:
            await self._outbox.drop_superseded(
                grant,
                self.tree.nameless_digests(),
                self.tree.nameless_entries(),
                stuck=self.stuck is not None,
            )
        except MeshkitError as error:
            _log.info("share %r: superseded blocks stay: %s (%s)", self, error.code, error.detail)

    def _clean(self, node: Node) -> None:
        assert self.tree is not None
        if isinstance(node, FileNode):
            node.release_content()
        self.tree.evict(node)

    async def _publish(self, commit: LocalCommit, writers: Sequence[bytes], *, alone: bool) -> bool:
        """Upload and publish a local commit; False if somebody else was faster. See `_bring_out`."""
        over = trio.Event()
        if not alone:
            self.services.nursery.start_soon(self._journal_meanwhile, over)
        try:
            await self._outbox.upload()
            async with nullcontext() if alone else self._cycle:
                if not await self._outbox.announce(commit):
                    return False
            try:
                head = await self._outbox.publish(commit, writers)
            except MeshkitError:
                self._unsure = True
                raise
        finally:
            over.set()
        if head is None:
            self._tick = -1
            return False
        async with nullcontext() if alone else self._cycle:
            if self._outbox.awaits(commit):
                await self._outbox.published(commit, head, all_stored=False)
            # A walk since then may have seen an even newer head, which must not be forgotten again.
            if self.grant is not None and self.grant.head.version < self.base.version:
                self.grant.head = self.base
            self.unsent_since = self.services.wall()
        return True

    def _is_out(self) -> None:
        """After everything was published: nothing waits any more, unless it was changed since."""
        if not self.dirty:
            self.unsent_since, self.stuck = 0.0, None

    async def _journal_meanwhile(self, over: trio.Event) -> None:
        """While an upload takes long, make on this device durable what must not wait for it."""
        async with trio.open_nursery() as nursery:

            async def until_over() -> None:
                await over.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_over)
            while True:
                await self._pace.until_overdue()
                await trio.lowlevel.checkpoint()  # the rest is shielded: here is where this ends
                with trio.CancelScope(shield=True):
                    try:
                        await self.journal()
                    except MeshkitError as error:
                        _log.warning("share %r: not journaled: %s (%s)", self, error.code, error.detail)
                        with trio.move_on_after(RETRY_DELAY_S):
                            await over.wait()  # the cycle after this one meets the error itself
                    except Exception:
                        _log.exception("share %r: journaling failed in a way nobody foresaw", self)
                        await over.wait()

    async def rotate(self, key: bytes, epoch: int, grants: Publication, writers: Sequence[bytes]) -> None:
        """Move the share to a new epoch: re-seal its root under the new ``key`` and publish all at once.

        ``grants`` has the roster, which lists ``writers``, and capsules; the head is added here. What is not
        published yet is published first, under the old epoch.
        """
        async with self._sending:
            give_up = trio.current_time() + RACE_DEADLINE_S
            while True:
                grant = await self._bring_out("reshare")
                try:
                    async with self._cycle:
                        if self._outbox.pending is not None:
                            # Journaled meanwhile; that is published first too. Now nothing more is journaled:
                            # beside a busy writer and a slow store, this would never end.
                            grant = await self._bring_out("reshare", alone=True)
                        await self._reseal(key, epoch, grants, writers)
                        self._is_out()
                        return
                except MeshkitError as error:
                    # Somebody may publish in between again and again; another roster is another matter.
                    current = grant.roster.seq == grants.expect_roster
                    if error.code != "head_conflict" or not current or trio.current_time() > give_up:
                        raise
                    self._tick = -1

    async def _reseal(self, key: bytes, epoch: int, grants: Publication, writers: Sequence[bytes]) -> None:
        """Publish ``grants`` with a new head, whose root is sealed under ``key``. Holds both locks."""
        tree, services, base = self.tree, self.services, self.base
        assert tree is not None
        tree.mark(tree.root)
        frozen = freeze(tree)
        assert frozen is not None  # the root was just marked
        version = self._outbox.next_version
        # What changed is in no dirty set now, and not published yet: an fsync has to wait for it.
        self._committing = True
        try:
            await write_out(
                tree, frozen, services.spool, epoch, version, ver_key(key, self.row.oid, epoch, version)
            )
            await trio.to_thread.run_sync(services.spool.sync)
            digests = list(frozen.staged)
            await upload(services, digests)
            # It may be public although the answer is lost.
            self._outbox.begin(self._outbox.commit(frozen.root, epoch, version))
            head = signed_head(services, self.row, epoch, version, base.hash, frozen.root, writers)
            await publish(
                services,
                replace(grants, expect_head=base.hash, head=head, head_ver=version, head_epoch=epoch),
            )
        except BaseException:
            thaw(tree, frozen)
            raise
        finally:
            self._committing = False
        await services.gate.note_published(self.row, head=head)
        settle(tree, frozen, self._clean)
        self.grant = None
        self._tick = -1
        self._outbox.merged_into(HeadView(version, epoch, frozen.root, record_hash(head)))
        services.reader.spooled.difference_update(digests)
        await trio.to_thread.run_sync(services.spool.discard, digests)
