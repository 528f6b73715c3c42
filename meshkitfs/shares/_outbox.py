"""The local commits of one share that are not public yet, and the head they stand on.

``pending`` is the newest. Others matter only once their publication has begun: a device goes on committing
during a long upload, and whether something was published can be unknown for a while (the answer was lost,
the process died). They are looked for among the heads before anything is merged, because merging a commit
with itself finds conflicts everywhere. Once one of them is public, ``pending`` stands on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import trio

from meshkitfs.core.cose import record_hash, signer_of
from meshkitfs.core.entries import Entry
from meshkitfs.core.records import Head
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant, HeadView
from meshkitfs.metadata import Publication
from meshkitfs.shares._publishing import PUBLISH_DEADLINE_S, publish, signed_head, upload
from meshkitfs.shares._services import Counters, Services
from meshkitfs.shares._walk import Walk, file_piece, root_piece
from meshkitfs.state import LocalCommit, ShareRow

__all__ = ["Outbox"]

# How many commits of unknown fate are remembered: tries to publish, each with its deadline, in a row.
BEGUN_MAX = 16
# How much is uploaded at a time: what is done then is not done again, and makes room for waiting writers.
ROUND_BYTES = 64 << 20
# How much more must wait before superseded blocks are looked for again while the provider is away.
DROP_STEP = 16 << 20


class Outbox:
    """All methods but `upload` and `publish` are called by whoever holds the share's cycle."""

    def __init__(self, services: Services, row: ShareRow, counters: Counters) -> None:
        self._services = services
        self._row = row
        self._counters = counters
        # The head that the tree stands on.
        self.base = HeadView()
        self.pending: LocalCommit | None = None
        # What was or is being published on this base, and so may be public; older ones are past all delay.
        self._begun: list[LocalCommit] = []
        # Blocks of unpublished commits that the store was found to hold: a retry need not offer them again.
        self._arrived: set[bytes] = set()
        # Local commits since the last publication, or -1 if it is not known what an earlier run has uploaded
        # of them; and the bytes that were left when superseded blocks were dropped last.
        self._commits = 0
        self._dropped_at = 0
        # Unpublished blocks that left the spool early: a walk still has to go through them.
        self._left_early: set[bytes] = set()
        # What is to be noted of the last publication; None when it was.
        self.unsettled: Callable[[], None] | None = None
        # How many blocks, and bytes of them, the store has got of what waits; it is asked to keep them next.
        self.got = self.got_bytes = 0
        self._sizes: dict[bytes, int] = {}

    def load(self) -> None:
        """Take up what an earlier run left: its newest commit, and one that may be public."""
        self.pending = self._services.state.local_commit(self._row.share)
        self._begun = self._services.state.begun_commits(self._row.share)
        if self.pending is not None:
            self.base = _base_of(self.pending)
            self._commits = -1

    @property
    def next_version(self) -> int:
        """The version of the next local commit: above every one whose root was sealed already."""
        return max([self.base.version, *(commit.version for commit in self._known())]) + 1

    def _known(self) -> list[LocalCommit]:
        """Return every local commit on this base that may be public, or become so; the newest first."""
        newest = [self.pending] if self.pending is not None else []
        return newest + [commit for commit in reversed(self._begun) if commit not in newest]

    def commit(self, root: bytes, epoch: int, version: int) -> LocalCommit:
        """Return the local commit of that tree on the base as it is now."""
        base = self.base
        return LocalCommit(
            self._row.share, root, epoch, version, base.hash, base.root, base.epoch, base.version
        )

    async def record(self, commit: LocalCommit, staged: Sequence[tuple[bytes, int]]) -> None:
        """Make ``commit`` the pending one, durably, with the blocks it has added."""
        # What is noted late would undo this.
        await self.settle()
        # Those that may be public have to be known after a crash too.
        await trio.to_thread.run_sync(
            self._services.state.record_commit, commit, list(staged), list(self._begun)
        )
        if self._commits >= 0:
            self._commits += 1

    async def drop_superseded(
        self, grant: Grant, open_files: set[bytes], entries: Sequence[Entry], *, stuck: bool
    ) -> None:
        """Forget staged blocks that only commits before the pending one named: they need no upload.

        ``open_files`` are blocks that open files without a name still need, as they do all that is below the
        manifests of ``entries``. While the provider is away (``stuck``) this is done only as often as what
        waits has doubled. Raises what reading raises.
        """
        services, pending = self._services, self.pending
        if pending is None or self._commits < 2:
            return
        rows = dict(await trio.to_thread.run_sync(services.state.staged, self._row.share))
        if stuck and sum(rows.values()) < 2 * self._dropped_at + DROP_STEP:
            return

        async def lease() -> Grant:
            return grant

        walk = Walk(lease, services.reader.verified, descend=self._left_early.union(rows).__contains__)
        root = root_piece(self._row.oid, pending.root, pending.epoch, pending.version)
        await walk.run([root, *(file_piece(entry) for entry in entries)])
        superseded = rows.keys() - walk.seen - open_files
        # Of commits that lost their race: only this device ever knew of them. While one may still be public,
        # its blocks are not touched.
        strays = [] if self._begun else list(superseded & self._arrived)
        self._arrived -= superseded

        def drop() -> None:
            services.state.unstage(superseded)
            services.reader.spooled.difference_update(superseded)
            services.spool.discard(superseded)

        await trio.to_thread.run_sync(drop)
        self._commits = 1
        self._dropped_at = sum(rows.values()) - sum(rows[digest] for digest in superseded)
        if strays:
            await services.reader.store.delete_many(strays)

    async def upload(self) -> None:
        """Bring every staged block to the byte store. Does not need the cycle."""
        services = self._services
        rows = await trio.to_thread.run_sync(services.state.staged, self._row.share)
        self._sizes = sizes = dict(rows)
        staged = list(sizes)
        known = [digest for digest in staged if digest in self._arrived]
        # A store that lost what it had (it was restored from a backup) is given it once more.
        self._arrived = await services.reader.store.has_many(known) if known else set()
        missing = [digest for digest in staged if digest not in self._arrived]
        self.got = self.got_bytes = 0
        self._note_got(self._arrived)
        for batch in _rounds(missing, sizes):
            await upload(services, batch, self._note_stored, self._note_got)
            self._counters.uploaded += len(batch)
            if services.budget.spool_full:
                await self._make_room()

    async def _make_room(self) -> None:
        """Give up the copies here of what the store holds durably: writers wait for the room.

        Otherwise they stay until the commit is public, in case the store loses them before.
        """
        services = self._services
        arrived, self._arrived = self._arrived, set()

        def unstage() -> None:
            services.state.unstage(arrived)
            services.reader.spooled.difference_update(arrived)
            services.spool.discard(arrived)

        await trio.to_thread.run_sync(unstage)
        self._left_early |= arrived
        self._note_got(arrived, -1)
        services.budget.look_again()

    async def announce(self, commit: LocalCommit) -> bool:
        """Note, durably, that ``commit`` is about to be published; False if its base is history meanwhile."""
        if self.base.hash != commit.base_hash:
            return False
        if commit not in self._begun:
            self.begin(commit)
            if commit is not self.pending:
                await trio.to_thread.run_sync(self._services.state.note_begun, commit)
        return True

    def begin(self, commit: LocalCommit) -> None:
        """Note that ``commit`` is about to be published, and so may be public from now on."""
        self._begun = [*self._begun[1 - BEGUN_MAX :], commit]

    def awaits(self, commit: LocalCommit) -> bool:
        """Whether it is still open what became of an announced ``commit``."""
        return commit in self._begun

    async def publish(self, commit: LocalCommit, writers: Sequence[bytes]) -> bytes | None:
        """Publish an announced ``commit``; returns its head, None if somebody else was faster.

        ``writers`` are the keys that the roster lists. Does not need the cycle: the tree may change, and be
        committed, meanwhile.
        """
        row = self._row
        head = signed_head(
            self._services, row, commit.epoch, commit.version, commit.base_hash, commit.root, writers
        )
        publication = Publication(
            row.share,
            expect_head=commit.base_hash,
            head=head,
            head_ver=commit.version,
            head_epoch=commit.epoch,
        )
        try:
            await publish(self._services, publication)
        except MeshkitError as error:
            if error.code != "head_conflict":
                raise
            return None
        return head

    def _note_stored(self, digests: Sequence[bytes]) -> None:
        self._arrived.update(digests)

    def _note_got(self, digests: Iterable[bytes], sign: int = 1) -> None:
        for digest in digests:
            self.got += sign
            self.got_bytes += sign * self._sizes.get(digest, 0)

    async def published(self, commit: LocalCommit, head: bytes, *, all_stored: bool) -> None:
        """``commit`` is public as ``head`` (the record): the base is there now, and its blocks may go.

        ``all_stored`` says that everything staged belongs to it, and so is at the store.
        """
        await self.settle()
        services, share = self._services, self._row.share
        mark = services.state.mark(share)
        self.base = HeadView(
            commit.version,
            commit.epoch,
            commit.root,
            record_hash(head),
            signer_of(head, Head.TYPE),
            int(services.wall()),
        )
        self._begun = []
        rest = self.pending
        if rest is not None and rest.root == commit.root:
            rest = None
        if rest is not None:
            rest = replace(
                rest,
                base_hash=self.base.hash,
                base_root=self.base.root,
                base_epoch=self.base.epoch,
                base_version=self.base.version,
            )
        self.pending = rest
        arrived, self._arrived = self._arrived, set()
        if rest is None:
            self._commits = self._dropped_at = 0
            self._left_early.clear()
        else:
            # Some of what arrived is the newer commit's.
            self._commits = min(self._commits, 1)
            self._left_early |= arrived
        mark = replace(mark, head_version=self.base.version, head_hash=self.base.hash)
        every = all_stored and rest is None

        def settle_state() -> None:
            stored = [digest for digest, _ in services.state.staged(share)] if every else list(arrived)
            services.state.published(share, mark, stored, rest)
            services.reader.spooled.difference_update(stored)
            services.spool.discard(stored)

        self._counters.heads += 1
        self.unsettled = settle_state
        await self.settle()
        await services.gate.note_published(self._row, head=head)

    async def settle(self) -> None:
        """Note in the state database what was published, if that is still to be done (its disk was full)."""
        if self.unsettled is not None:
            await trio.to_thread.run_sync(self.unsettled)
            self.unsettled = None

    async def recognize(self, upto: int) -> bool:
        """Find out whether a local commit was published after all, and only the answer was lost.

        ``upto`` is the version of the newest head. True if one was: the base has moved to it then.
        """
        commits = self._known()
        if not commits:
            return False
        services = self._services
        me = {kid: key.public for kid, key in services.signing_keys().items()}
        last = min(upto, max(commit.version for commit in commits))
        try:
            with trio.fail_after(PUBLISH_DEADLINE_S):
                found = await services.metadata.heads(self._row.share, self.base.version, last)
        except trio.TooSlowError:
            raise MeshkitError("metadata_unavailable", "no answer in time") from None
        for blob in reversed(found):
            try:
                head = Head.parse(blob, me)
            except MeshkitError:
                continue  # somebody else's
            for commit in commits:
                if (head.ver, head.epoch, head.root) == (commit.version, commit.epoch, commit.root):
                    # All its blocks were stored before. That the chain goes on from it to the newest head
                    # is for the gate to check again, with the mark where it is now.
                    await self.published(commit, blob, all_stored=True)
                    return True
        return False

    def merged_into(self, head: HeadView) -> None:
        """The tree stands on ``head`` now; whatever was on its way can never be published any more."""
        self.base = head
        self._begun = []


def _rounds(digests: Sequence[bytes], sizes: dict[bytes, int]) -> Iterator[list[bytes]]:
    """Divide blocks into rounds of about `ROUND_BYTES`, each made durable at the store by itself."""
    batch: list[bytes] = []
    waiting = 0
    for digest in digests:
        batch.append(digest)
        waiting += sizes[digest]
        if waiting >= ROUND_BYTES:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _base_of(commit: LocalCommit) -> HeadView:
    return HeadView(commit.base_version, commit.base_epoch, commit.base_root, commit.base_hash)
