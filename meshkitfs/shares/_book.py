"""The shares of a home, and what their owner does with them: create, grant, revoke, renew; and acceptance.

A roster is numbered and lists what is valid, so every change here ends in one publication that either
happens entirely or not at all, on top of the roster it was made from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.entries import DIR, FILE
from meshkitfs.core.keys import kid_of, ver_key
from meshkitfs.core.manifest import DirManifest, RootAttrs, seal_manifest
from meshkitfs.core.records import Capsule, Head, Letter, Roster, seal_letter
from meshkitfs.core.release import EpochSecret
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.identity import Contact, ContactBook, Identity, Signers
from meshkitfs.metadata import Publication
from meshkitfs.providers import Usage
from meshkitfs.shares._events import RosterOverdue
from meshkitfs.shares._granting import (
    ROSTER_LIFETIME_S,
    Terms,
    demands_of,
    grace_of,
    make_member,
    make_roster,
    own_grant,
)
from meshkitfs.shares._hearing import Hearing
from meshkitfs.shares._inbox import Inbox, check_share_name
from meshkitfs.shares._nodes import DirNode, FileNode, Node, new_oid
from meshkitfs.shares._publishing import publish
from meshkitfs.shares._releasing import choose_service, deposit
from meshkitfs.shares._retaining import resign_retention
from meshkitfs.shares._rollback import accept_rollback, remembered
from meshkitfs.shares._services import Services
from meshkitfs.shares._share import Share
from meshkitfs.shares._together import current, redone
from meshkitfs.state import Mark, Member, ShareRow

__all__ = ["ShareBook"]

_log = logging.getLogger(__name__)

# When its owner's daemon renews a roster: this long before the end of its lifetime.
ROSTER_RENEW_S = 4 * 86400
# How often the owner's daemon looks whether a grant has run out, or a roster soon will.
LOOK_S = 5
# How long it waits after a renewal that failed.
ROSTER_AGAIN_S = 60


class ShareBook:
    """All shares of a home. ``identity`` returns the unlocked identity or raises why there is none."""

    def __init__(
        self, services: Services, identity: Callable[[], Identity], contacts: Callable[[], ContactBook]
    ) -> None:
        self._services = services
        self._identity = identity
        self._contacts = contacts
        self.shares: dict[bytes, Share] = {row.name: Share(row, services) for row in services.state.shares()}
        # One change of a roster at a time: each is built on the one before.
        self._rosters = trio.Lock()
        self._next_look = 0
        self._hearing = Hearing(identity, contacts)
        self.inbox = Inbox(self.shares, services, identity, contacts)

    def find(self, name: str) -> Share:
        """Return a share by the name it has here. Raises ``share_not_found``."""
        share = self.shares.get(os.fsencode(name))
        if share is None:
            raise MeshkitError("share_not_found", name)
        return share

    def usage(self) -> Usage:
        """Return the room at the byte store."""
        return self._services.reader.store.usage()

    def _mine(self, share: Share) -> Share:
        if not share.row.mine:
            raise MeshkitError("not_owner", f"'{share.name}' belongs to {share.row.owner_handle}")
        return share

    @property
    def shared_with_others(self) -> bool:
        """Whether other devices of the same identity may change rosters, too."""
        return self._services.others is not None and self._services.others.any

    @property
    def _now(self) -> int:
        return int(self._services.wall())

    # -- creating and removing ---------------------------------------------------------------------

    async def create(
        self, name: bytes, mode: int = 0o700, enforcement: str | None = None, service: str | None = None
    ) -> Share:
        """Create an empty share owned by this identity and publish it.

        With the ``enforcement`` "release" the key is in two halves, and the release ``service`` at that
        address holds one of them; "client" is without. What is None is as this home is configured. Raises
        ``invalid_argument``, ``not_supported`` for a service that cannot be used so.
        """
        check_share_name(name)
        if name in self.shares:
            raise MeshkitError("share_exists", name.decode(errors="replace"))
        services, me, now = self._services, self._identity(), self._now
        share_id, oid = os.urandom(16), new_oid()
        service_key = await services.metadata.service_key()
        holder = await choose_service(services, service_key, enforcement, service)
        with EpochSecret(share_id, 1, os.urandom(32), holder) as secret:
            key = secret.key
            member = make_member(
                me, now, share_id, oid, DIR, "live", Terms(("read", "write", "reshare")),
                handle=me.handle, to=me.encryption.public, signing=me.signing.public, epoch=1, seq=1,
                secret=secret,
            )  # fmt: skip
            await deposit(services, secret)
        roster = make_roster(share_id, oid, 1, 1, [member], now, (service_key,)).sign(me.signing)
        moment = now * 1_000_000_000
        manifest = DirManifest(oid, 1, 1, 0, (), root=RootAttrs(mode, moment, moment))
        ref, block = seal_manifest(manifest, ver_key(key, oid, 1, 1))
        # From here on it is in the capsule, and taken from there by the gate.
        wipe(key)
        await services.reader.store.put(block)
        await services.reader.store.sync()
        head = Head(share_id, oid, 1, 1, b"", ref[:32], now).sign(me.signing)
        await publish(
            services,
            Publication(
                share_id,
                expect_head=b"",
                head=head,
                head_ver=1,
                head_epoch=1,
                expect_roster=0,
                roster=roster,
                roster_seq=1,
                roster_epoch=1,
                capsules=((member.encryption_kid, member.capsule_id, member.blob),),
            ),
        )
        row = ShareRow(
            share_id, share_id, oid, name, DIR, "live", me.signing.public, me.handle, True, mode, moment, now
        )
        await trio.to_thread.run_sync(services.state.set_members, [member])
        await trio.to_thread.run_sync(services.state.add_share, row)
        share = self.shares[name] = Share(row, services)
        share.roster_until = now + ROSTER_LIFETIME_S
        return share

    def add_known(self, row: ShareRow) -> None:
        """Show a share that the state has got from another device of this identity."""
        self.shares[row.name] = Share(row, self._services)

    async def rename(self, share: Share, name: bytes) -> None:
        """Change what a share is called here (other members have their own names for it)."""
        check_share_name(name)
        await trio.to_thread.run_sync(self._services.state.rename_share, share.row.ref, name)
        del self.shares[share.row.name]
        share.row = replace(share.row, name=name)
        self.shares[name] = share

    async def remove(self, share: Share) -> None:
        """Forget a share here. Its blocks stay at the provider; nobody else loses anything."""
        state = self._services.state
        await trio.to_thread.run_sync(state.remove_share, share.row.ref)
        if share.row.grant == "live":
            await trio.to_thread.run_sync(state.drop_commit, share.row.share)
        del self.shares[share.row.name]
        share.refuse(MeshkitError("share_not_found", share.name))

    # -- granting ----------------------------------------------------------------------------------

    @redone
    async def add(self, share: Share, recipient: str, terms: Terms) -> tuple[Member, Contact]:
        """Grant the whole of ``share``, live, to a contact, and put the invitation into their mailbox.

        A grant the contact already has is replaced. Raises ``contact_unknown``, ``contact_key_changed``.
        """
        self._mine(share)
        me = self._identity()
        contact = await self._contacts().resolve(recipient, self._now)
        who = contact.public
        async with self._rosters:
            grant = await self._turn(share)
            roster = grant.roster
            with grant.epoch_secret(roster.epoch) as secret:
                # Once more: a service that was restored from a backup may have lost it.
                await deposit(self._services, secret)
                member = make_member(
                    me, self._now, share.row.share, share.row.oid, DIR, "live", terms,
                    handle=contact.handle, to=who.enc, signing=who.sig, epoch=roster.epoch,
                    seq=roster.seq + 1, secret=secret,
                )  # fmt: skip
            others = [
                old
                for old in self._standing(share, roster)
                if old.grant != "live" or old.encryption_kid != member.encryption_kid
            ]
            await self._publish(share, grant, [*others, member], [member])
        await self._post(share.row.name, DIR, 0o700, 0, 0, member, who.enc)
        return member, contact

    @redone
    async def add_snapshot(
        self, share: Share, path: str, node: Node, recipient: str, terms: Terms
    ) -> tuple[Member, Contact]:
        """Grant one file or directory of ``share`` as exactly the version it has now."""
        self._mine(share)
        if isinstance(node, DirNode) and node is share.tree_root:
            raise MeshkitError("not_supported", "a snapshot of a whole share: name a file or directory in it")
        if not isinstance(node, FileNode | DirNode):
            raise MeshkitError("not_supported", "a snapshot of a symbolic link")
        me = self._identity()
        contact = await self._contacts().resolve(recipient, self._now)
        who = contact.public
        kind = FILE if isinstance(node, FileNode) else DIR
        async with self._rosters:
            grant = await self._turn(share)
            await share.flush()
            entry = node.entry
            if entry is None or node.dirty:
                raise MeshkitError("commit_pending", path)
            # The key of an epoch is in no snapshot; only with a release service anything of it is needed.
            epoch = EpochSecret(share.row.share, entry.epoch, b"")
            with grant.epoch_secret(entry.epoch) if grant.capsule.service else epoch as secret:
                await deposit(self._services, secret)
                member = make_member(
                    me, self._now, share.row.share, entry.oid, kind, "snapshot",
                    replace(terms, rights=("read",)), handle=contact.handle, to=who.enc, signing=who.sig,
                    epoch=entry.epoch, seq=grant.roster.seq + 1, ver=entry.ver, root=entry.ref[:32],
                    target=path, secret=secret, snapshot_key=entry.ref[32:],
                )  # fmt: skip
            await self._publish(share, grant, [*self._standing(share, grant.roster), member], [member])
        name = path.rsplit("/", 1)[-1].encode(errors="surrogateescape")
        await self._post(name, kind, node.mode, node.mtime_ns // 1_000_000_000, entry.size, member, who.enc)
        return member, contact

    @redone
    async def revoke(self, share: Share, recipient: str) -> list[Member]:
        """Take back every grant of ``share`` to a contact: new roster, new epoch key for what follows.

        Returns the grants that ended. Raises ``not_shared`` if there were none.
        """
        self._mine(share)
        if recipient == self._identity().handle:
            raise MeshkitError("not_shared", f"'{share.name}' is {recipient}'s own")
        async with self._rosters:
            grant = await current(self._services, share)
            standing = self._standing(share, grant.roster)
            await self._hearing.hear(standing, self._now)
            gone = [old for old in standing if old.handle == recipient]
            if not gone:
                raise MeshkitError("not_shared", f"'{share.name}' is not shared with '{recipient}'")
            await self._rekey(share, grant, [old for old in standing if old.handle != recipient])
        return [replace(old, revoked=self._now) for old in gone]

    async def renew_rosters(self) -> None:
        """Shut out those whose time is over, and sign rosters anew before they run out; cheap to call often.

        Also where a member, or the owner, has other keys than the roster was made for.

        Of this home's own shares, also those that nobody has opened since it was mounted. What cannot be done
        is said (`Share.roster_problem`, `RosterOverdue`) and tried again.
        """
        if self._now < self._next_look:
            return
        self._next_look = self._now + LOOK_S
        for share in list(self.shares.values()):
            if share.row.mine and share.row.grant == "live":
                await self._keep_valid(share)

    async def _keep_valid(self, share: Share) -> None:
        """Renew the roster of ``share`` if that is due, or somebody's time is over."""
        roster = share.grant.roster if share.grant is not None else None
        if roster is None and not share.roster_until:
            roster = await self._services.gate.remembered_roster(share.row)
        if roster is not None:
            share.roster_until = roster.exp
        # Of a share that this device has not opened yet nothing is known, so it is looked at.
        due = share.roster_until - self._now < ROSTER_RENEW_S
        outlived = False
        if roster is not None and share.tree is not None:
            # Read once: this is done for each share of one's own at every step of the watcher.
            listed = self._listed(share, roster)
            await self._hearing.hear(self._standing(share, roster, listed), self._now)
            outlived = self._outdated(share, roster, listed)
        if not due:
            share.roster_problem = None
        if (not due and not outlived) or self._now < share.roster_again:
            return
        try:
            async with self._rosters:
                grant = await self._turn(share)
                if grant.roster.exp - self._now < ROSTER_RENEW_S:
                    await self._publish(share, grant, self._standing(share, grant.roster), [])
                grant = await share.use("reshare", current=True)
        except MeshkitError as error:
            share.roster_again = self._now + ROSTER_AGAIN_S
            self._overdue(share, error, due=due)
        else:
            share.roster_until, share.roster_problem, share.roster_again = grant.roster.exp, None, 0

    def _overdue(self, share: Share, error: MeshkitError, *, due: bool) -> None:
        """Say that a roster could not be renewed; once for each cause."""
        _log.warning("the roster of %r could not be renewed: %s (%s)", share, error.code, error.detail)
        if not due:
            return  # only somebody whose time is over waits to be shut out; their own program does that
        left = share.roster_until - self._now
        what = f"it runs out in {left // 3600} h" if left > 0 else "it has run out"
        if not share.roster_until:
            what = "until when it is good could not be found out"
        problem = MeshkitError("roster_not_renewed", f"{what}; {error.code}: {error.detail}")
        first = share.roster_problem is None
        share.roster_problem = problem
        if first:
            self._services.emit(RosterOverdue(share.name, problem))

    @redone
    async def resign(self, share: Share) -> bool:
        """Sign ``share`` with this identity's newest keys, if it is not; returns whether that was to be done.

        It begins a new epoch: whoever had an old encryption key of the owner's has the keys up to now.
        """
        self._mine(share)
        async with self._rosters:
            grant = await current(self._services, share)
            if not self._outdated(share, grant.roster):
                return False
            await self._turn(share)
            return True

    def standing(self, share: Share) -> list[Member]:
        """Return the grants of ``share`` that are in force, as far as is known without asking anybody."""
        if share.grant is not None:
            return self._standing(share, share.grant.roster)
        members = self._services.state.members(share.row.share)
        return [member for member in members if not member.revoked and member.expires > self._now]

    def _listed(self, share: Share, roster: Roster) -> list[Member]:
        """Return the grants that ``roster`` lists, also those that have run out.

        The published roster counts, not what this device remembers of having revoked: it may have died
        between publishing and noting that down.
        """
        listed = frozenset(roster.caps)
        return [m for m in self._services.state.members(share.row.share) if m.capsule_hash in listed]

    def _standing(self, share: Share, roster: Roster, listed: list[Member] | None = None) -> list[Member]:
        """Return those of the grants that ``roster`` lists (``listed``, if at hand) that have not run out."""
        listed = self._listed(share, roster) if listed is None else listed
        standing = [m for m in listed if m.expires > self._now]
        me = self._identity()
        mine = {key.kid for key in me.encryption_keys}
        if share.grant is not None and not any(m.encryption_kid in mine for m in standing):
            # This device's memory is older than the owner's own capsule (it was restored from a backup).
            # A roster without the owner would close the share for good.
            standing.append(own_grant(share.grant, me))
        return standing

    def _outdated(self, share: Share, roster: Roster, listed: list[Member] | None = None) -> bool:
        """Whether ``roster`` lists a live grant that has run out, or one made for keys that are replaced.

        ``listed`` is what `_listed` says of it, if that is at hand.
        """
        listed = self._listed(share, roster) if listed is None else listed
        return (
            any(m.grant == "live" and m.expires <= self._now for m in listed)
            or roster.signer != self._identity().signing.kid
            or any(self._hearing.changed(m) for m in self._standing(share, roster, listed))
        )

    async def _turn(self, share: Share) -> Grant:
        """Return a grant to share with, in which everything is of today: those whose time is over are shut
        out, and all keys are the newest. Holds ``_rosters``."""
        grant = await current(self._services, share)
        await self._hearing.hear(self._standing(share, grant.roster), self._now)
        if self._outdated(share, grant.roster):
            if grant.roster.signer != self._identity().signing.kid:
                await resign_retention(share, grant)
            await self._rekey(share, grant, self._standing(share, grant.roster))
            grant = await share.use("reshare", current=True)
        return grant

    async def _rekey(self, share: Share, grant: Grant, kept: list[Member]) -> None:
        """Move ``share`` to a new epoch that only ``kept`` have the key of. Holds ``_rosters``."""
        me = self._identity()
        # Above epochs that a restored metadata store has forgotten, too: a number means one key for good.
        epoch = 1 + max(
            grant.roster.epoch,
            *(capsule.epoch for _, capsule in remembered(self._services, self._identity(), share)),
            0,
        )
        secret = EpochSecret(share.row.share, epoch, os.urandom(32), grant.capsule.service)
        fresh = {}
        for old in kept:
            if old.grant == "live":
                to, signing = self._hearing.keys_of(old)
                fresh[old.capsule_id] = make_member(
                    me, self._now, share.row.share, share.row.oid, DIR, "live",
                    self._terms(share, old), handle=old.handle,
                    to=to, signing=signing, epoch=epoch, seq=grant.roster.seq + 1, secret=secret,
                )  # fmt: skip
        members = [fresh.get(old.capsule_id, old) for old in kept]
        with secret:
            await self._publish(share, grant, members, list(fresh.values()), secret)

    def _terms(self, share: Share, member: Member) -> Terms:
        """Return what a grant of ``share`` says, to grant it again."""
        pol = None
        if member.policy:
            pol = Capsule.parse(member.blob, Signers(self._identity().chain).keys).pol
        grace = grace_of(member)
        return Terms(
            member.rights, member.expires, member.policy, member.vault, member.capability, pol, grace,
            demands_of(member),
        )  # fmt: skip

    @redone
    async def demand(self, share: Share, terms: Terms) -> tuple[int, list[Member]]:
        """Have every grant of ``share`` that demands ``terms.policy`` demand what ``terms.pol`` says now.

        Returns how many live grants were made anew, and the snapshots that were taken back: a snapshot's
        grant is one capsule for good, and nobody goes on under the rules of before.
        """
        self._mine(share)
        me = self._identity()
        async with self._rosters:
            grant = await self._turn(share)
            standing = self._standing(share, grant.roster)
            affected = [
                old
                for old in standing
                if old.policy == terms.policy
                and self._terms(share, old).policy_for(old.handle) != terms.policy_for(old.handle)
            ]
            ended = [old for old in affected if old.grant != "live"]
            with grant.epoch_secret(grant.roster.epoch) as secret:
                fresh = [
                    make_member(
                        me, self._now, share.row.share, share.row.oid, DIR, "live",
                        replace(self._terms(share, old), pol=terms.pol), handle=old.handle,
                        to=old.encryption_public, signing=old.signing_public, epoch=grant.roster.epoch,
                        seq=grant.roster.seq + 1, secret=secret,
                    )
                    for old in affected
                    if old.grant == "live"
                ]  # fmt: skip
            if affected:
                kept = [old for old in standing if old not in affected]
                await self._publish(share, grant, kept + fresh, fresh)
        return len(fresh), ended

    async def _publish(
        self, share: Share, grant: Grant, members: list[Member], fresh: list[Member],
        secret: EpochSecret | None = None,
    ) -> None:  # fmt: skip
        """Make ``members`` the ones with access: publish the next roster, and the capsules of ``fresh``.

        With ``secret`` it begins a new epoch under that. ``fresh`` is remembered first, so that there is
        never a published grant that this device knows nothing of. Holds ``_rosters``.
        """
        services, old, now = self._services, grant.roster, self._now
        before = self._standing(share, old)
        roster = make_roster(
            share.row.share, share.row.oid, old.seq + 1, secret.epoch if secret else old.epoch, members, now,
            old.timestamp_keys, old.minver,
        )  # fmt: skip
        signed = roster.sign(self._identity().signing)
        publication = Publication(
            share.row.share,
            expect_roster=old.seq,
            roster=signed,
            roster_seq=roster.seq,
            roster_epoch=roster.epoch,
            capsules=tuple((m.encryption_kid, m.capsule_id, m.blob) for m in fresh),
        )
        await trio.to_thread.run_sync(services.state.set_members, fresh)
        try:
            if services.others is not None:
                await services.others.tell()
            if secret is not None:
                await deposit(services, secret)
            if secret is None and set(old.writers) <= set(roster.writers):
                await publish(services, publication)
            else:
                # The newest head must be signed by a writer of the newest roster, so it is replaced with it.
                again = grant.epoch_key() if secret is None else secret.key
                try:
                    await share.rotate(again, roster.epoch, publication, roster.writers)
                finally:
                    wipe(again)
        except MeshkitError:
            await trio.to_thread.run_sync(
                services.state.set_members, [replace(member, revoked=now) for member in fresh]
            )
            raise
        # This device has seen the roster it made: no other may take its place, not even of the same number.
        seen = Mark(roster.seq, record_hash(signed), share.base.version, share.base.hash)
        await trio.to_thread.run_sync(services.state.raise_mark, share.row.share, seen)
        mine = [m.blob for m in fresh if m.encryption_kid == self._identity().encryption.kid]
        await services.gate.note_published(share.row, roster=signed, capsules=mine)
        kept = {member.capsule_id for member in members}
        ended = [replace(member, revoked=now) for member in before if member.capsule_id not in kept]
        await trio.to_thread.run_sync(services.state.set_members, ended)

    async def _post(
        self, name: bytes, kind: int, mode: int, mtime: int, size: int, member: Member, to: bytes
    ) -> None:
        me = self._identity()
        letter = Letter(member.blob, me.record, name, kind, mode, mtime, size, "", self._now)
        await self._services.metadata.post_letter(kid_of(to), seal_letter(me.signing, letter, to))

    async def accept_rollback(self, share: Share) -> Mark:
        """Take what the metadata store shows now as the truth; see `accept_rollback`."""
        return await accept_rollback(self._services, self._identity, share)
