"""What every command does, in one place: the daemon's control socket and a lone command both call this.

Each method takes and returns plain JSON values. A method raises `MeshkitError`; anything else is a defect.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import trio

from meshkitfs import keyvault
from meshkitfs.core.cid import cid_text
from meshkitfs.core.durations import parse_expiry
from meshkitfs.core.secret_memory import SecretBytes
from meshkitfs.daemon import describe, versions
from meshkitfs.daemon.carrying import Carrying
from meshkitfs.daemon.conditions import Conditions
from meshkitfs.daemon.device_commands import DeviceCommands
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.identity_doctor import IdentityDoctor
from meshkitfs.daemon.inviting import Inviting, checked_demands, checked_grace, checked_rights
from meshkitfs.daemon.keeping import Keeping
from meshkitfs.daemon.locking import Lock, explained, secret_from
from meshkitfs.daemon.opening import open_session
from meshkitfs.daemon.policies import Policies
from meshkitfs.daemon.rotating import Rotating
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import FRESH_S, Trace
from meshkitfs.identity import publish, report, standing, to_text
from meshkitfs.metadata import HttpMetadata
from meshkitfs.net import Secret
from meshkitfs.shares import SNAPSHOTS, DirNode, Node, Share, Terms, grace_of, reencrypt

__all__ = ["Service", "below"]

_log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]

_PROGRESS_S: Final = 0.2
# What can pass without anybody doing something here, and how often `sync` then tries again (s).
_PASSING: Final = frozenset(
    {
        "provider_request_failed", "provider_http_error", "metadata_unavailable", "freshness_unproven",
        "head_conflict", "no_space", "timed_out",
    }
)  # fmt: skip
_AGAIN_S: Final = 1.0


class Service:
    """The commands of one open home."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lock = Lock(session)
        session.devices.shut = self.lock.shut
        # What a mount adds to `status`: its mount point and process id.
        self.mounted: dict[str, Any] = {}
        # The last fault of a node, as the mount remembers it for user.meshkit.reason.
        self.fault_of: Callable[[Node], MeshkitError | None] = lambda node: None
        # One share is rewritten at a time: each fills the spool and the line to the byte store by itself.
        self._rewriting = trio.Lock()
        self._policies = Policies(session)
        # What a method takes are its parameters; one of the name `progress` is given to it, not asked for.
        self._methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "share.create": self._share_create,
            "share.list": self._share_list,
            "share.show": self._share_show,
            "share.add": self._share_add,
            "share.revoke": self._share_revoke,
            "share.reencrypt": self._share_reencrypt,
            "share.accept_rollback": self._share_accept_rollback,
            "inbox.list": self._inbox_list,
            "inbox.accept": self._inbox_accept,
            "inbox.decline": self._inbox_decline,
            "identity.show": self._identity_show,
            "identity.publish": self._identity_publish,
            "contacts.list": self._contacts_list,
            "contacts.add": self._contacts_add,
            "contacts.verify": self._contacts_verify,
            "status": self._status,
            "sync": self.sync,
            "explain": self._explain,
            "lock": self._lock,
            "unlock": self._unlock,
            "clock.reset": self._clock_reset,
            "metadata.trust_key": self._metadata_trust_key,
            **{
                name: partial(function, session, self._relative)
                for name, function in versions.METHODS.items()
            },
            **Keeping(session).methods,
            **Inviting(session).methods,
            **self._policies.methods,
            **Rotating(session, self._identity_show).methods,
            **Carrying(session).methods,
            **DeviceCommands(session).methods,
            **IdentityDoctor(session).methods,
            **Conditions(session, self._bound).methods,
            **session.auditing.methods,
        }

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        home: Home,
        passphrase: keyvault.Passphrase | None,
        *,
        absent: bool = False,
        key: SecretBytes | None = None,
    ) -> AsyncIterator[Service]:
        """Open ``home`` (its lock is held by the caller), as `open_session` does, and serve its commands."""
        async with open_session(home, passphrase, absent=absent, key=key) as session:
            yield cls(session)

    async def call(
        self, method: str, params: dict[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """Do one command. Raises ``invalid_argument`` for an unknown method or parameter."""
        function = self._methods.get(method)
        if function is None:
            raise MeshkitError("invalid_argument", f"no method {method!r}")
        given: dict[str, Any] = {}
        if "progress" in inspect.signature(function).parameters:
            given["progress"] = progress or (lambda _: None)
        try:
            pending = function(**given, **params)
        except TypeError:
            raise MeshkitError("invalid_argument", f"parameters of {method}") from None
        return await pending

    # -- shares ------------------------------------------------------------------------------------

    async def _share_create(
        self, name: str, enforcement: str | None = None, release_service: str | None = None
    ) -> dict[str, Any]:
        share = await self.session.book.create(
            os.fsencode(name), enforcement=enforcement, service=release_service
        )
        return await self._described(share)

    async def _share_list(self) -> dict[str, Any]:
        return {
            "shares": [await self._described(share) for _, share in sorted(self.session.book.shares.items())]
        }

    async def _share_show(self, share: str) -> dict[str, Any]:
        found = self.session.book.find(share.split("/", 1)[0])
        data = await self._described(found)
        members = self.session.book.standing(found) if found.row.mine else []
        me = self.session.identity.handle
        data["recipients"] = [describe.member(member) for member in members if member.handle != me]
        return data

    async def _described(self, share: Share) -> dict[str, Any]:
        with suppress(MeshkitError):  # the description says so itself
            await share.use("list", current=True)
        return describe.share(share)

    async def _share_add(
        self, target: str, recipient: str, rights: list[str] | None = None, expires: str | None = None,
        snapshot: bool = False, policy: str | None = None, vault: str | None = None,
        capability: str | None = None, offline_grace: str | None = None,
        require_key_vault: list[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        names = checked_rights(rights or ["read"])
        until = parse_expiry(expires, int(time.time())) if expires else 0
        pol = self._policies.pol(policy) if policy else None
        vault = self.session.vaults.reference(vault) if vault else ""
        capability = self.session.tokens.reference(capability) if capability else ""
        grace = checked_grace(offline_grace)
        demands = checked_demands(require_key_vault)
        terms = Terms(names, until, policy or "", vault, capability, pol, grace, demands)
        name, _, path = self._relative(target).strip("/").partition("/")
        share = self.session.book.find(name)
        if snapshot:
            if "write" in names:
                raise MeshkitError("invalid_argument", "a snapshot can only be read")
            if not path:
                raise MeshkitError("invalid_argument", "a snapshot names a file or directory inside a share")
            node = await self._walk(share, path)
            member, contact = await self.session.book.add_snapshot(share, path, node, recipient, terms)
        elif path:
            raise MeshkitError(
                "not_supported",
                f"'{path}' alone, live: grant the whole share, or this version of it with --snapshot",
            )
        else:
            member, contact = await self.session.book.add(share, recipient, terms)
        data = describe.member(member) | {"trust": str(contact.trust), "fingerprint": contact.fingerprint}
        if snapshot and node.entry is not None:
            data["cid"] = cid_text(node.entry.ref[:32])
        return data

    async def _share_revoke(self, share: str, recipient: str) -> dict[str, Any]:
        found = self._whole(share)
        ended = await self.session.book.revoke(found, recipient)
        bounds = describe.bounds(self.session)
        return {
            "share": found.name,
            "recipient": recipient,
            "revoked": [describe.member(member) for member in ended],
            "bound_seconds": bounds["noticed_seconds"],
            "unreachable_bound_seconds": max(
                [describe.STEP_BOUND_S + FRESH_S, *(describe.STEP_BOUND_S + grace_of(old) for old in ended)]
            ),
        }

    def _bound(self) -> float:
        """Return how long (s) something that was taken back may go on to be used elsewhere."""
        return describe.bounds(self.session)["noticed_seconds"]

    async def _share_reencrypt(self, share: str, progress: Progress) -> dict[str, Any]:
        found = self._whole(share)
        async with self._rewriting:
            return {"share": found.name} | asdict(await reencrypt(found, progress))

    async def _share_accept_rollback(self, share: str) -> dict[str, Any]:
        found = self.session.book.find(self._relative(share).strip("/"))
        old = await self.session.book.accept_rollback(found)
        return {"was_version": old.head_version, "now": await self._described(found)}

    def _whole(self, target: str) -> Share:
        """Return the share that ``target`` names, refusing a part of one: what is asked is for all of it."""
        name, _, inside = self._relative(target).strip("/").partition("/")
        share = self.session.book.find(name)
        if inside:
            raise MeshkitError(
                "invalid_argument", f"{inside!r} is in the share {name!r}: only that as a whole"
            )
        return share

    def _relative(self, target: str) -> str:
        """Return SHARE[/path] for a path below the mount point; other targets are that already."""
        return below(self.mounted.get("mountpoint"), target)

    async def _walk(self, share: Share, path: str) -> Node:
        """Return the node at ``path`` in ``share``. Raises ``path_not_found``."""
        grant = await share.use("list", current=True)
        tree = share.tree
        assert tree is not None
        node: Node = tree.root
        for part in filter(None, path.split("/")):
            if not isinstance(node, DirNode):
                raise MeshkitError("path_not_found", path)
            await tree.load(grant, node)
            try:
                node = tree.node_of(node, os.fsencode(part))
            except OSError:
                raise MeshkitError("path_not_found", f"{share.name}/{path}") from None
        return node

    # -- people ------------------------------------------------------------------------------------

    async def _inbox_list(self) -> dict[str, Any]:
        invitations, unreadable = await self.session.book.inbox.waiting()
        contacts = {contact.handle: contact for contact in self.session.contacts.list()}
        return {
            "letters": [describe.invitation(item, contacts) for item in invitations],
            "unreadable": unreadable,
        }

    async def _inbox_accept(self, letter: str, name: str | None = None) -> dict[str, Any]:
        share = await self.session.book.inbox.accept(letter, os.fsencode(name) if name else None)
        return await self._described(share)

    async def _inbox_decline(self, letter: str) -> dict[str, Any]:
        declined = await self.session.book.inbox.decline(letter)
        contacts = {contact.handle: contact for contact in self.session.contacts.list()}
        return describe.invitation(declined, contacts)

    async def _identity_show(self) -> dict[str, Any]:
        session = self.session
        data = report(session.identity, int(time.time())).as_dict()
        data["record"] = to_text(session.identity.record)
        data["published"], data["directory"] = None, ""
        try:
            where = await standing(session.identity, session.metadata)
            data["published"] = where in ("current", "ahead")
            if where == "ahead":
                data["problems"].append(
                    "another device has newer keys of it than this home: this is an old copy"
                )
        except MeshkitError as error:
            data["directory"] = error.code
        data["key_vault"] = (await session.watched.look()).as_dict()
        data["recovery"] = session.remembering.report() if session.locked is None else None
        data["rotation"] = None
        if session.locked is None:
            data["rotation"] = session.life.schedule.as_dict(session.identity)
        if data["recovery"] is not None and not data["recovery"]["current"]:
            data["problems"].append(
                f"the recovery file is out of date ({', '.join(data['recovery']['changed'])}): run "
                "'meshkitfs identity recovery create' again"
            )
        return data

    async def _identity_publish(self, join: str | None = None) -> dict[str, Any]:
        metadata = self.session.metadata
        if join is not None and isinstance(metadata, HttpMetadata):
            secret = Secret(join)
            metadata.join = lambda: secret
        await publish(self.session.identity, metadata)
        return await self._identity_show()

    async def _contacts_list(self) -> dict[str, Any]:
        return {"contacts": [contact.as_dict() for contact in self.session.contacts.list()]}

    async def _contacts_add(self, handle: str, record: str | None = None) -> dict[str, Any]:
        contacts, now = self.session.contacts, int(time.time())
        if record is None:
            return (await contacts.resolve(handle, now)).as_dict()
        contact = contacts.add(record, now)
        if contact.handle != handle:
            raise MeshkitError("invalid_argument", f"that record is of '{contact.handle}', not '{handle}'")
        return contact.as_dict()

    async def _contacts_verify(self, handle: str, code: str | None = None) -> dict[str, Any]:
        contacts = self.session.contacts
        if code is None:
            if contacts.get(handle) is None:
                await contacts.resolve(handle, int(time.time()))
            return {"handle": handle, "code": contacts.verification_code(handle)}
        return contacts.verify(handle, code).as_dict()

    # -- looking and waiting -----------------------------------------------------------------------

    async def _status(self) -> dict[str, Any]:
        return describe.status(self.session, self.lock) | self.mounted

    async def _lock(self) -> dict[str, Any]:
        if not self.mounted:
            raise MeshkitError("not_mounted", "only a mounted home has anything to lock")
        return await self.lock.lock()

    async def _unlock(self, key: str | None = None) -> dict[str, Any]:
        return await self.lock.unlock(None if key is None else secret_from(key))

    async def sync(self, progress: Progress, timeout: float = 0, wait: bool = False) -> dict[str, Any]:
        """Publish everything that waits; returns what is left after ``timeout`` seconds (0: no limit).

        A share that cannot be published is given up after one try. With ``wait`` it is tried again until the
        time is over, if what keeps it can pass by itself.
        """
        session = self.session
        if session.locked is not None:
            return {"left": self.lock.left()}  # nothing is sent without the keys
        waiting = session.state.unpublished()
        with trio.move_on_after(timeout or float("inf")):
            async with trio.open_nursery() as reporting:
                reporting.start_soon(self._report, progress)
                async with trio.open_nursery() as nursery:
                    for share in list(session.book.shares.values()):
                        if share.dirty or (share.row.share in waiting and share.row.grant == "live"):
                            nursery.start_soon(self._publish_one, share, wait)
                reporting.cancel_scope.cancel()
        return {"left": self.lock.left()}

    async def _publish_one(self, share: Share, wait: bool) -> None:
        while True:
            try:
                await share.use("list")
                if share.dirty:
                    await share.flush()
                return
            except MeshkitError as error:
                self.session.note(share.name, error)
                if share.tree is None and share.refusal is None:
                    share.stuck = error  # it could not be opened, so nothing else says what keeps it
                if not wait or error.code not in _PASSING:
                    return
            await trio.sleep(_AGAIN_S)

    async def _report(self, progress: Progress) -> None:
        """Tell how much has gone out, and what the rest waits for, until cancelled."""
        total = 0
        while True:
            left = self.lock.left()
            rest = sum(item["bytes"] - item["arrived_bytes"] for item in left)
            total = max(total, sum(item["bytes"] for item in left))
            why = next((item["reason"] for item in left if item["reason"]), "")
            stage = f"waiting ({why})" if why else "publishing"
            if total:
                progress({"stage": stage, "done": total - rest, "total": total, "unit": "bytes"})
            await trio.sleep(_PROGRESS_S)

    async def _explain(self, path: str) -> dict[str, Any]:
        """Walk the gate for the share ``path`` is in, say what each step found, then look at the path itself.

        The failure is that of the first step that refuses; after the gate, what keeps the path from being
        found or what went wrong with it last, and at the end what keeps the share from being published.
        """
        session = self.session
        relative = self._relative(path).strip("/")
        share_name, _, inside = relative.partition("/")
        share = session.book.find(share_name)
        locked = self.lock.status()
        if locked is not None:
            return explained(relative, share.name, locked)
        trace = Trace()
        try:
            await session.gate.open(share.row, "read", trace)
            # A share that was refused takes its grant back up here, as the next open would.
            # The past is open to whoever may open the share.
            past = os.fsencode(inside).partition(b"/")[0] == SNAPSHOTS
            node = await self._walk(share, "" if past else inside)
            failure = self.fault_of(node) or share.stuck or share.unconfirmed
        except MeshkitError as error:
            failure = error
        data: dict[str, Any] = {
            "path": relative,
            "share": share.name,
            "steps": describe.steps(session, trace),
            "code": "",
        }
        return data if failure is None else data | failure.as_dict()

    async def _clock_reset(self) -> dict[str, Any]:
        self.session.clock.reset()
        return {}

    async def _metadata_trust_key(self) -> dict[str, Any]:
        metadata = self.session.metadata
        if not isinstance(metadata, HttpMetadata):
            raise MeshkitError("not_supported", "this home uses no metadata service")
        return {"key": (await metadata.trust_key()).hex()}


def below(point: str | None, target: str) -> str:
    """Return SHARE[/path] for a path below the mount ``point``; other targets are that already."""
    if point and target.startswith("/"):
        relative = os.path.relpath(target, point)
        if not relative.startswith(".."):
            return relative
    return target
