"""The shares of a home, and what their owner does with them: create, grant, revoke, renew; and acceptance.

A roster is numbered and lists what is valid, so every change here ends in one publication that either
happens entirely or not at all, on top of the roster it was made from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from meshkitfs.core.cose import record_hash
from meshkitfs.core.entries import DIR, FILE
from meshkitfs.core.keys import kid_of, ver_key
from meshkitfs.core.manifest import DirManifest, RootAttrs, seal_manifest
from meshkitfs.core.records import Head, Letter, Roster, make_capsule, open_letter, seal_letter
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Trace
from meshkitfs.identity import Contact, ContactBook, Identity
from meshkitfs.metadata import Publication
from meshkitfs.shares._nodes import DirNode, FileNode, Node, new_oid
from meshkitfs.shares._share import Services, Share
from meshkitfs.state import Mark, Member, ShareRow

__all__ = ["Invitation", "ShareBook", "Terms", "check_share_name"]

_log = logging.getLogger(__name__)

# How long a roster vouches without being renewed, and when its owner's daemon renews it. This bounds how
# long a dishonest metadata service can hide a revocation from somebody who has seen nothing newer.
ROSTER_LIFETIME_S = 7 * 86400
ROSTER_RENEW_S = 4 * 86400
# The owner's own capsule, and grants without --expires.
NO_EXPIRY_S = 20 * 365 * 86400
# Grants begin a little in the past, so that a recipient's slow clock does not find them not yet valid.
BACKDATE_S = 60


@dataclass(frozen=True, slots=True)
class Terms:
    """What a grant says beside whom it is for. ``expires`` is UNIX seconds, 0 for none."""

    rights: tuple[str, ...] = ("read",)
    expires: int = 0
    policy: str = ""
    vault: str = ""
    capability: str = ""


@dataclass(frozen=True, slots=True)
class Invitation:
    """A letter in the inbox, opened: ``id`` is short and unique in the inbox."""

    id: str
    letter_id: bytes
    letter: Letter
    accepted: bool


def check_share_name(name: bytes) -> bytes:
    """Return ``name`` if a share may have it. Raises ``invalid_name``."""
    if not 0 < len(name) <= 255 or b"/" in name or b"\0" in name or name.startswith(b"."):
        raise MeshkitError("invalid_name", repr(name.decode(errors="replace")))
    return name


class ShareBook:
    """All shares of a home. ``identity`` returns the unlocked identity or raises why there is none."""

    def __init__(
        self, services: Services, identity: Callable[[], Identity], contacts: Callable[[], ContactBook]
    ) -> None:
        self._services = services
        self._identity = identity
        self._contacts = contacts
        self.shares: dict[bytes, Share] = {row.name: Share(row, services) for row in services.state.shares()}

    def find(self, name: str) -> Share:
        """Return a share by the name it has here. Raises ``share_not_found``."""
        share = self.shares.get(os.fsencode(name))
        if share is None:
            raise MeshkitError("share_not_found", name)
        return share

    def _mine(self, share: Share) -> Share:
        if not share.row.mine:
            raise MeshkitError("right_not_granted", f"'{share.name}' belongs to {share.row.owner_handle}")
        return share

    @property
    def _now(self) -> int:
        return int(self._services.wall())

    # -- creating and removing ---------------------------------------------------------------------

    async def create(self, name: bytes, mode: int = 0o700) -> Share:
        """Create an empty share owned by this identity and publish it."""
        check_share_name(name)
        if name in self.shares:
            raise MeshkitError("share_exists", name.decode(errors="replace"))
        services, me, now = self._services, self._identity(), self._now
        share_id, oid, key = os.urandom(16), new_oid(), os.urandom(32)
        member = self._grant(
            me, share_id, oid, DIR, key, "live", Terms(("read", "write", "reshare")),
            handle=me.handle, to=me.encryption.public, signing=me.signing.public, epoch=1, seq=1,
        )  # fmt: skip
        service_key = await services.metadata.service_key()
        roster = _roster(share_id, oid, 1, 1, [member], now, (service_key,)).sign(me.signing)
        moment = now * 1_000_000_000
        manifest = DirManifest(oid, 1, 1, 0, (), root=RootAttrs(mode, moment, moment))
        ref, block = seal_manifest(manifest, ver_key(key, oid, 1, 1))
        await services.reader.store.put(block)
        await services.reader.store.sync()
        head = Head(share_id, oid, 1, 1, b"", ref[:32], now).sign(me.signing)
        await services.metadata.publish(
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
            )
        )
        row = ShareRow(
            share_id, share_id, oid, name, DIR, "live", me.signing.public, me.handle, True, mode, moment, now
        )
        await trio.to_thread.run_sync(services.state.set_members, [member])
        await trio.to_thread.run_sync(services.state.add_share, row)
        share = self.shares[name] = Share(row, services)
        return share

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

    def _grant(
        self, me: Identity, share_id: bytes, oid: bytes, kind: int, key: bytes, grant: str, terms: Terms, *,
        handle: str, to: bytes, signing: bytes, epoch: int, seq: int, ver: int = 0, root: bytes = b"",
        target: str = "",
    ) -> Member:  # fmt: skip
        """Make and sign one capsule; returns it as the row that remembers it."""
        now = self._now
        capsule_id = os.urandom(16)
        expires = terms.expires or now + NO_EXPIRY_S
        header = {
            "id": capsule_id, "grant": grant, "kind": kind, "share": share_id, "oid": oid, "epoch": epoch,
            "ver": ver, "root": root, "nbf": now - BACKDATE_S, "exp": expires, "seq": seq,
            "rights": sorted(terms.rights), "pol": {"id": terms.policy} if terms.policy else None,
            "vault": terms.vault or None, "cap": terms.capability or None,
        }  # fmt: skip
        blob = make_capsule(me.signing, header, key, to)
        return Member(
            share_id, handle, capsule_id, record_hash(blob), kid_of(to), to, signing,
            tuple(sorted(terms.rights)), now - BACKDATE_S, expires, grant, target, terms.policy, terms.vault,
            terms.capability, blob, 0,
        )  # fmt: skip

    async def add(self, share: Share, recipient: str, terms: Terms) -> tuple[Member, Contact]:
        """Grant the whole of ``share``, live, to a contact, and put the invitation into their mailbox.

        A grant the contact already has is replaced. Raises ``contact_unknown``, ``contact_key_changed``.
        """
        self._mine(share)
        me = self._identity()
        contact = await self._contacts().resolve(recipient, self._now)
        grant = await share.use("reshare", current=True)
        who = contact.public
        roster = grant.roster
        member = self._grant(
            me, share.row.share, share.row.oid, DIR, grant.epoch_key(), "live", terms,
            handle=contact.handle, to=who.enc, signing=who.sig, epoch=roster.epoch, seq=roster.seq + 1,
        )  # fmt: skip
        standing = self._standing(share)
        replaced = [
            replace(old, revoked=self._now)
            for old in standing
            if old.grant == "live" and old.encryption_kid == member.encryption_kid
        ]
        kept = [old for old in standing if all(old.capsule_id != gone.capsule_id for gone in replaced)]
        await self._publish_roster(share, [*kept, member], roster, (member,))
        await trio.to_thread.run_sync(self._services.state.set_members, [*replaced, member])
        await self._post(share.row.name, DIR, 0o700, 0, 0, member, who.enc)
        return member, contact

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
        await share.flush()
        grant = await share.use("reshare", current=True)
        grant.require("reshare")
        entry = node.entry
        if entry is None or node.dirty:
            raise MeshkitError("commit_pending", path)
        who = contact.public
        kind = FILE if isinstance(node, FileNode) else DIR
        member = self._grant(
            me, share.row.share, entry.oid, kind, entry.ref[32:], "snapshot",
            replace(terms, rights=("read",)), handle=contact.handle, to=who.enc, signing=who.sig,
            epoch=entry.epoch, seq=grant.roster.seq + 1, ver=entry.ver, root=entry.ref[:32], target=path,
        )  # fmt: skip
        await self._publish_roster(share, [*self._standing(share), member], grant.roster, (member,))
        await trio.to_thread.run_sync(self._services.state.set_members, [member])
        name = path.rsplit("/", 1)[-1].encode(errors="surrogateescape")
        await self._post(name, kind, node.mode, node.mtime_ns // 1_000_000_000, entry.size, member, who.enc)
        return member, contact

    async def revoke(self, share: Share, recipient: str) -> list[Member]:
        """Take back every grant of ``share`` to a contact: new roster, new epoch key for what follows.

        Returns the grants that ended. Raises ``contact_unknown`` if there were none.
        """
        self._mine(share)
        me = self._identity()
        gone = [old for old in self._standing(share) if old.handle == recipient]
        if not gone or recipient == me.handle:
            raise MeshkitError("contact_unknown", f"'{share.name}' is not shared with '{recipient}'")
        kept = [old for old in self._standing(share) if old.handle != recipient]
        grant = await share.use("reshare", current=True)
        old_roster = grant.roster
        key, epoch, seq = os.urandom(32), old_roster.epoch + 1, old_roster.seq + 1
        renewed: list[Member] = []
        rewrapped: list[Member] = []
        for old in kept:
            if old.grant != "live":
                renewed.append(old)
                continue
            terms = Terms(old.rights, old.expires, old.policy, old.vault, old.capability)
            fresh = self._grant(
                me, share.row.share, share.row.oid, DIR, key, "live", terms, handle=old.handle,
                to=old.encryption_public, signing=old.signing_public, epoch=epoch, seq=seq,
            )  # fmt: skip
            rewrapped.append(fresh)
            renewed.append(fresh)
        now = self._now
        roster = _roster(
            share.row.share,
            share.row.oid,
            seq,
            epoch,
            renewed,
            now,
            old_roster.timestamp_keys,
            old_roster.minver,
        ).sign(me.signing)
        await share.rotate(
            key,
            epoch,
            Publication(
                share.row.share,
                expect_roster=old_roster.seq,
                roster=roster,
                roster_seq=seq,
                roster_epoch=epoch,
                capsules=tuple((m.encryption_kid, m.capsule_id, m.blob) for m in rewrapped),
            ),  # fmt: skip
        )
        ended = [replace(old, revoked=now) for old in gone]
        superseded = [replace(old, revoked=now) for old in kept if old.grant == "live"]
        await trio.to_thread.run_sync(self._services.state.set_members, [*superseded, *ended, *rewrapped])
        return ended

    async def renew_rosters(self) -> None:
        """Sign the rosters of this home's own shares anew before they run out."""
        for share in list(self.shares.values()):
            if share.row.mine and share.grant is not None and share.grant.alive:
                roster = share.grant.roster
                if roster.exp - self._now < ROSTER_RENEW_S:
                    await self._publish_roster(share, self._standing(share), roster, ())

    def _standing(self, share: Share) -> list[Member]:
        """Return the grants of ``share`` that are neither revoked nor expired."""
        members = self._services.state.members(share.row.share)
        return [member for member in members if not member.revoked and member.expires > self._now]

    async def _publish_roster(
        self, share: Share, members: list[Member], old: Roster, capsules: tuple[Member, ...]
    ) -> None:
        roster = _roster(
            share.row.share,
            share.row.oid,
            old.seq + 1,
            old.epoch,
            members,
            self._now,
            old.timestamp_keys,
            old.minver,
        )
        await self._services.metadata.publish(
            Publication(
                share.row.share,
                expect_roster=old.seq,
                roster=roster.sign(self._identity().signing),
                roster_seq=roster.seq,
                roster_epoch=roster.epoch,
                capsules=tuple((m.encryption_kid, m.capsule_id, m.blob) for m in capsules),
            )
        )

    async def _post(
        self, name: bytes, kind: int, mode: int, mtime: int, size: int, member: Member, to: bytes
    ) -> None:
        me = self._identity()
        letter = Letter(member.blob, me.record, name, kind, mode, mtime, size, "", self._now)
        await self._services.metadata.post_letter(kid_of(to), seal_letter(me.signing, letter, to))

    # -- receiving ---------------------------------------------------------------------------------

    async def inbox(self) -> tuple[list[Invitation], int]:
        """Return the invitations waiting here, and how many letters could not be opened."""
        me = self._identity()
        held = {share.row.ref for share in self.shares.values()}
        found, unreadable = [], 0
        for letter_id, blob in await self._services.metadata.letters(me.encryption.kid):
            try:
                letter = open_letter(me.encryption, blob)
            except MeshkitError:
                unreadable += 1
                continue
            offer = letter.offer
            assert offer is not None  # open_letter sets it
            ref = offer.id if offer.grant == "snapshot" else offer.share
            found.append(Invitation(letter_id.hex()[:8], letter_id, letter, ref in held))
        return found, unreadable

    async def accept(self, wanted: str, name: bytes | None = None) -> Share:
        """Take an invitation: by its id, or by the share's name if that is unmistakable.

        The sender becomes a contact. Raises ``letter_not_found``, ``contact_key_changed``.
        """
        me = self._identity()
        invitations, _ = await self.inbox()
        matches = [item for item in invitations if item.id == wanted]
        matches = matches or [item for item in invitations if os.fsdecode(item.letter.name) == wanted]
        if len(matches) != 1:
            detail = f"'{wanted}' fits {len(matches)} invitations" if matches else wanted
            raise MeshkitError("letter_not_found", detail)
        letter = matches[0].letter
        offer, sender = letter.offer, letter.sender
        assert offer is not None  # open_letter sets both
        assert sender is not None
        await self._contacts().meet(letter.owner_record, self._now)
        ref = offer.id if offer.grant == "snapshot" else offer.share
        row = ShareRow(
            ref, offer.share, offer.oid, self._free_name(name, letter, sender.handle), offer.kind,
            offer.grant, sender.sig, sender.handle, sender.sig == me.signing.public, letter.mode,
            letter.mtime * 1_000_000_000, self._now,
        )  # fmt: skip
        held = next((share for share in self.shares.values() if share.row.ref == ref), None)
        if held is None:
            await trio.to_thread.run_sync(self._services.state.add_share, row)
            held = self.shares[row.name] = Share(row, self._services)
        await self._services.metadata.delete_letter(me.encryption.kid, matches[0].letter_id)
        return held

    def _free_name(self, name: bytes | None, letter: Letter, owner: str) -> bytes:
        """Return ``name``, or the sender's name for it with the sender's own behind ("photos (bob)")."""
        if name is not None:
            if check_share_name(name) in self.shares:
                raise MeshkitError("share_exists", name.decode(errors="replace"))
            return name
        stem, extension = os.path.splitext(letter.name) if letter.kind == FILE else (letter.name, b"")
        stem = stem.lstrip(b".") or b"share"
        for number in range(1, 1000):
            again = "" if number == 1 else f" {number}"
            mark = f" ({owner}{again})".encode()
            candidate = stem[: 255 - len(mark) - len(extension)] + mark + extension
            if candidate not in self.shares:
                return candidate
        raise MeshkitError("share_exists", os.fsdecode(letter.name))

    async def accept_rollback(self, share: Share) -> Mark:
        """Take what the metadata store shows now as the truth and lift the quarantine; return the old marks.

        What was changed here and is not published yet is merged into it. Raises ``invalid_argument`` if the
        store shows nothing older or different: there is nothing to accept then, and forgetting what was seen
        would only weaken the next check. Raises what else keeps the share closed.
        """
        services, row, trace = self._services, share.row, Trace()
        try:
            await services.gate.open(row, "list", trace)
        except MeshkitError:
            if not any(step.code for step in trace.steps if step.name in ("roster", "head")):
                raise
        else:
            raise MeshkitError("invalid_argument", f"'{share.name}' shows nothing older than was seen here")
        old = services.state.mark(row.share)
        await trio.to_thread.run_sync(services.state.forget_mark, row.share)
        _log.warning("a rollback was accepted", extra={"fields": {"share": row.share.hex()[:8]}})
        if not share.dirty:
            share.forget_tree()
        await share.use("list", current=True)
        return old


def _roster(
    share_id: bytes, oid: bytes, seq: int, epoch: int, members: list[Member], now: int,
    timestamp_keys: tuple[bytes, ...], minver: int = 0,
) -> Roster:  # fmt: skip
    writers = dict.fromkeys(
        member.signing_public for member in members if member.grant == "live" and "write" in member.rights
    )
    return Roster(
        share_id, oid, seq, epoch, tuple(member.capsule_hash for member in members), tuple(writers), minver,
        now, now + ROSTER_LIFETIME_S, timestamp_keys,
    )  # fmt: skip
