"""The commands around policies: the rules that this home puts into grants, and trying out who decides what.

They are kept in the state database, by name. A grant carries the rules as they are when it is made; changing
them makes every grant that demands them anew, so that a recipient learns of it as of a revocation.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import trio

from meshkitfs.core.durations import parse_expiry
from meshkitfs.core.moments import parse_moment
from meshkitfs.daemon import describe
from meshkitfs.daemon.policy_provider import open_provider, pol_of
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.policy import Decision, Demand, PolicyRequest
from meshkitfs.shares import Share, Terms
from meshkitfs.state import Member

__all__ = ["Policies"]

_SETTING: Final = "policies"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_ACTIONS: Final = ("list", "read", "write")


@dataclass(frozen=True, slots=True)
class _Policy:
    """Rules in Cedar, when they were made and last changed (UNIX seconds)."""

    rules: str
    created: int
    changed: int


class Policies:
    """These commands of one open home; ``methods`` by name, as `Service` has its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        # One change at a time: each rewrites the whole list, and the grants after it.
        self._turn = trio.Lock()
        self.methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "policy.create": self._create,
            "policy.list": self._list,
            "policy.show": self._show,
            "policy.test": self._test,
            "policy.edit": self._edit,
            "policy.delete": self._delete,
        }

    def pol(self, name: str) -> dict[str, Any]:
        """Return what a capsule says that demands the policy ``name``.

        It is one of this home's own, or else one of the provider's that is configured. Raises
        policy_not_found.
        """
        own = self._all().get(name)
        if own is not None:
            return {"id": name, "rules": own.rules}
        if self._session.config.policy is None:
            raise MeshkitError("policy_not_found", name)
        return pol_of(self._session.config.policy, name)

    # -- the commands ----------------------------------------------------------------------------------

    async def _create(
        self, name: str, rules: str = "", members: list[str] | None = None, expires: str | None = None
    ) -> dict[str, Any]:
        if not _NAME.match(name):
            raise MeshkitError(
                "invalid_argument", f"{name!r}: a policy's name is small letters, digits, '.', '_', '-'"
            )
        text, now = self._checked(rules, members, expires), int(time.time())
        async with self._turn:
            known = self._all()
            if name in known:
                raise MeshkitError("policy_exists", name)
            await self._keep(known | {name: _Policy(text, now, now)})
        return self._described(name, _Policy(text, now, now))

    async def _list(self) -> dict[str, Any]:
        policies = [self._described(name, policy) for name, policy in sorted(self._all().items())]
        settings = self._session.config.policy
        return {"policies": policies, "provider": settings.endpoint if settings is not None else None}

    async def _show(self, name: str) -> dict[str, Any]:
        policy = self._find(name)
        grants = [
            {"share": share.name, "handle": member.handle, "grant": member.grant, "path": member.target}
            for share, member in self._grants(name)
        ]
        return self._described(name, policy) | {"text": policy.rules, "recipients": grants}

    async def _edit(
        self, name: str, rules: str = "", members: list[str] | None = None, expires: str | None = None
    ) -> dict[str, Any]:
        text = self._checked(rules, members, expires)
        async with self._turn:
            policy = replace(self._find(name), rules=text, changed=int(time.time()))
            # First here: what fails below is made up for by the same command again.
            await self._keep(self._all() | {name: policy})
            terms = Terms(policy=name, pol={"id": name, "rules": text})
            renewed, ended, failed = 0, [], []
            for share in {id(share): share for share, _ in self._grants(name)}.values():
                try:
                    made, over = await self._session.book.demand(share, terms)
                except MeshkitError as error:
                    failed.append({"share": share.name} | error.as_dict())
                    continue
                renewed += made
                ended += [{"share": share.name, "handle": m.handle, "path": m.target} for m in over]
        return self._described(name, policy) | {
            "renewed": renewed,
            "ended": ended,
            "failed": failed,
            "bound_seconds": describe.bounds(self._session)["noticed_seconds"],
        }

    async def _delete(self, name: str) -> dict[str, Any]:
        async with self._turn:
            self._find(name)
            used = sorted({f"{member.handle} ('{share.name}')" for share, member in self._grants(name)})
            if used:
                raise MeshkitError("policy_in_use", ", ".join(used))
            await self._keep({other: policy for other, policy in self._all().items() if other != name})
        return {"name": name}

    async def _test(
        self, name: str, identity: str, action: str | None = None, at: str | None = None
    ) -> dict[str, Any]:
        """Say what would be decided for ``identity``, with a made-up capsule, and by which rule."""
        now = int(time.time())
        moment = now
        if at is not None:
            named = parse_moment(at, now)
            if named.number is not None:
                raise MeshkitError("invalid_argument", f"{at!r} is a version, and no time")
            moment = named.until
        if action is not None and action not in _ACTIONS:
            raise MeshkitError("invalid_argument", f"an action is {', '.join(_ACTIONS)}")
        actions = _ACTIONS if action is None else (action,)
        kid = await self._kid(identity)
        requests = [PolicyRequest(name, kid, wanted, None, os.urandom(16)) for wanted in actions]
        requests = [replace(request, capsule_id=requests[0].capsule_id) for request in requests]
        answers = await self._answers(name, identity, requests, moment)
        return {
            "name": name,
            "identity": identity,
            "at": moment,
            "decisions": [
                {"action": wanted, "allow": answer.allow is True, "reason": answer.reason}
                for wanted, answer in zip(actions, answers, strict=True)
            ],
        }

    # -- what they share -------------------------------------------------------------------------------

    async def _answers(self, name: str, who: str, requests: list[PolicyRequest], now: int) -> list[Decision]:
        demand = Demand.of(self.pol(name))
        if demand.rules is not None:
            from meshkitfs.policy.rules import decide

            return decide(demand.rules, who, requests, now)
        settings = self._session.config.policy
        assert settings is not None  # `pol` has looked
        provider = open_provider(settings)
        try:
            return list(await provider.decide(demand, requests, now))
        finally:
            with trio.move_on_after(1, shield=True):
                await provider.aclose()

    async def _kid(self, handle: str) -> str:
        """Return how a provider knows a contact; a name that is nobody's here stands for itself."""
        known = self._session.contacts.get(handle)
        if handle == self._session.identity.handle:
            return self._session.identity.encryption.kid.hex()
        return known.public.enc_kid.hex() if known is not None else handle

    def _checked(self, rules: str, members: list[str] | None, expires: str | None) -> str:
        """Return the rules that were given, or made of members and an end. Raises policy_invalid."""
        from meshkitfs.policy.rules import check

        if bool(rules) == bool(members):
            raise MeshkitError("invalid_argument", "a policy has rules, or members")
        if rules and expires:
            raise MeshkitError("invalid_argument", "an end goes with members; rules say it themselves")
        text = rules or _membership(members or [], expires)
        check(text)
        return text

    def _grants(self, name: str) -> list[tuple[Share, Member]]:
        """Return the grants of this home that demand its own policy ``name``."""
        now, state = int(time.time()), self._session.state
        return [
            (share, member)
            for share in self._session.book.shares.values()
            if share.row.mine and share.row.grant == "live"
            for member in state.members(share.row.share)
            if member.policy == name and not member.revoked and member.expires > now
        ]

    def _described(self, name: str, policy: _Policy) -> dict[str, Any]:
        from meshkitfs.policy.rules import check

        return {
            "name": name,
            "created": policy.created,
            "changed": policy.changed,
            "rules": [asdict(rule) for rule in check(policy.rules)],
            "grants": len(self._grants(name)),
        }

    def _find(self, name: str) -> _Policy:
        policy = self._all().get(name)
        if policy is None:
            raise MeshkitError("policy_not_found", name)
        return policy

    def _all(self) -> dict[str, _Policy]:
        text = self._session.state.setting(_SETTING)
        if text is None:
            return {}
        try:
            return {name: _Policy(**row) for name, row in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError):
            raise MeshkitError("state_corrupt", "the list of policies makes no sense") from None

    async def _keep(self, policies: Mapping[str, _Policy]) -> None:
        text = json.dumps({name: asdict(policy) for name, policy in policies.items()})
        await trio.to_thread.run_sync(self._session.state.set_setting, _SETTING, text)


def _membership(members: list[str], expires: str | None) -> str:
    """Return rules that let these handles do what their grants say, until an end."""
    when = ""
    if expires is not None:
        end = time.gmtime(parse_expiry(expires, int(time.time())))
        when = f'\nwhen {{ context.now < datetime("{time.strftime("%Y-%m-%dT%H:%M:%SZ", end)}") }}'
    rules = [
        f"@id({name})\npermit(principal == Identity::{name}, action, resource){when};"
        for name in map(json.dumps, dict.fromkeys(members))
    ]
    return "\n\n".join(rules) + "\n"
