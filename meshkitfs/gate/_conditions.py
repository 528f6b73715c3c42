"""What a capsule can demand beside being valid: a key vault's strength, membership, a token, a policy's yes.

Each check returns until when its proof may be believed (UNIX seconds), by the code of what follows when it
ends and is not renewed. All are made before the key is unwrapped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from meshkitfs.core.keys import kid_of
from meshkitfs.core.records import Capsule, Roster
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._lists import AccessLists
from meshkitfs.gate._trace import Step, Trace
from meshkitfs.keyvault import KeyVaultReport, unmet
from meshkitfs.policy import Decision, Demand, PolicyProvider, ask, lasts

__all__ = ["Conditions", "KeyVaultNow", "Met"]

KeyVaultNow = Callable[[], Awaitable[KeyVaultReport | None]]
"""Says what this home's key vault gives now; None: it does not say."""


@dataclass(slots=True)
class Met:
    """What the checks came to.

    ``proofs`` is the end of each proof (UNIX seconds) by the code that a lease ends with then. ``withheld``
    are rights of the capsule that the grant must not have, with the refusal of each. With ``one_open`` the
    next open has to ask again. ``lists`` are the ids of the access lists that were relied on, ``caveats``
    what limits the tokens, for people.
    """

    proofs: dict[str, int] = field(default_factory=dict)
    withheld: dict[str, MeshkitError] = field(default_factory=dict)
    one_open: bool = False
    lists: tuple[bytes, ...] = ()
    caveats: tuple[dict[str, Any], ...] = ()


class Conditions:
    """The checks that a grant itself asks for, in the order of the walk."""

    def __init__(
        self, policy: PolicyProvider | None, lists: AccessLists, key_vault: KeyVaultNow | None = None
    ) -> None:
        self._policy = policy
        self._lists = lists
        self._key_vault = key_vault
        # Questions to policies, one for each right, by what came of them.
        self.questions = {"allowed": 0, "denied": 0, "failed": 0}

    async def check(
        self,
        capsule: Capsule,
        roster: Roster,
        rights: Iterable[str],
        action: str | None,
        now: int,
        trace: Trace,
    ) -> Met:
        """Make every check that ``capsule`` asks for; the first that fails raises.

        ``rights`` is everything that the capsule grants, ``action`` the one that is wanted now, or any.
        ``roster`` names the keys whose timestamps count.
        """
        met = Met()
        proofs = met.proofs
        if capsule.keyvault:
            with trace.step("keyvault") as step:
                step.rule = ", ".join(capsule.keyvault)
                await self._strength(capsule, step)
        else:
            trace.skip("keyvault", "the grant demands nothing of the key vault")
        if capsule.vault:
            with trace.step("vault") as step:
                step.rule = str(capsule.vault)
                proved = await self._lists.vault(capsule, roster, now, step)
                proofs["vault_membership_required"] = proved.until
                met.lists += (proved.list_id,)
        else:
            trace.skip("vault", "the grant names no vault")
        if capsule.cap:
            with trace.step("capability") as step:
                step.rule = str(capsule.cap)
                await self._capability(capsule, roster, rights, action, now, step, met)
        else:
            trace.skip("capability", "the grant asks for no capability token")
        if capsule.pol:
            with trace.step("policy") as step:
                step.rule = str(capsule.pol.get("id"))
                await self._policies(capsule, sorted(rights), action, now, step, met)
        else:
            trace.skip("policy", "the grant names no policy")
        if met.withheld.keys() >= set(rights):
            # Each check left something, and together they leave nothing.
            raise next(iter(met.withheld.values()))
        return met

    async def _strength(self, capsule: Capsule, step: Step) -> None:
        """Hold what is demanded against what the key vault is known to give; silence meets no demand."""
        report = await self._key_vault() if self._key_vault is not None else None
        if report is None:
            raise MeshkitError("keyvault_strength_required", "the key vault does not say what it gives")
        missing = unmet(report, capsule.keyvault)
        if missing:
            raise MeshkitError("keyvault_strength_required", missing)
        step.note(f"a {report.kind} key vault, by its own report", by="this program", rule=step.rule)

    async def _capability(
        self, capsule: Capsule, roster: Roster, rights: Iterable[str], action: str | None, now: int,
        step: Step, met: Met,
    ) -> None:  # fmt: skip
        """Withhold every right of the capsule that no token gives; refuse if that is the one wanted."""
        proved = await self._lists.capability(capsule, roster, now, step)
        allowed = proved.rights or frozenset()
        for right in sorted(set(rights) - allowed):
            detail = f"'{right}' is not among {', '.join(sorted(allowed))}, which the token allows"
            met.withheld[right] = MeshkitError("capability_denied", detail)
        if action is not None and action in met.withheld:
            raise met.withheld[action]
        if not allowed & set(rights):
            raise next(iter(met.withheld.values()))
        met.proofs["capability_denied"] = proved.until
        met.lists += (proved.list_id,)
        met.caveats += proved.caveats

    async def _policies(
        self, capsule: Capsule, rights: list[str], action: str | None, now: int, step: Step, met: Met
    ) -> None:
        """Ask about every right at once: each needs a yes of its own, and those without one are withheld."""
        demand = Demand.of(capsule.pol or {})
        if self._policy is None:
            raise MeshkitError("policy_provider_required", f"policy '{demand.id}'")
        try:
            found = await ask(self._policy, demand, capsule, rights, now)
        except MeshkitError:
            self.questions["failed"] += len(rights)
            raise
        allowed = {right: answer for right, answer in found.items() if answer.allow is True}
        self.questions["allowed"] += len(allowed)
        self.questions["denied"] += len(found) - len(allowed)
        if not allowed:
            # One refusal, whatever was wanted: what is shown of the share is what an open meets.
            raise _denied(demand, found["read" if "read" in found else min(found)])
        for right in sorted(found.keys() - allowed.keys()):
            met.withheld[right] = _denied(demand, found[right], right)
        if action is not None and action in met.withheld:
            raise met.withheld[action]
        until = capsule.exp
        for answer in allowed.values():
            met.one_open = met.one_open or answer.ttl_seconds is None
            until = min(until, now + lasts(answer))
        if until <= now:
            raise MeshkitError("policy_denied", f"policy '{demand.id}': the decision is no longer valid")
        met.proofs["policy_provider_error"] = until
        # Said of what was wanted, else of the first: they come from one answer.
        reason = found[action or min(allowed)].reason
        step.note(
            f"policy '{demand.id}' allows {', '.join(sorted(allowed))} for {until - now} s"
            + (", asked again at the next open" if met.one_open else "")
            + (f"; {reason}" if reason else "")
            + (f"; not {', '.join(sorted(met.withheld))}" if met.withheld else ""),
            by=demand.url or ("the rules in the grant" if demand.rules else "the policy provider"),
            signer=kid_of(demand.key) if demand.key else b"",
            until=until,
            rule=demand.id,
        )


def _denied(demand: Demand, answer: Decision, right: str = "") -> MeshkitError:
    what = f"policy '{demand.id}'" + (f", {right}" if right else "")
    return MeshkitError("policy_denied", f"{what}: {answer.reason}" if answer.reason else what)
