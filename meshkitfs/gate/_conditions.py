"""What a capsule can demand beside being valid: vault membership, a capability token, a policy's yes.

Each check returns until when its proof may be believed (UNIX seconds), by the code of what follows when it
ends and is not renewed. All are made before the key is unwrapped.
"""

from __future__ import annotations

import trio

from meshkitfs.core.cid import cid_text
from meshkitfs.core.records import Capsule
from meshkitfs.errors import MeshkitError
from meshkitfs.gate._trace import Step, Trace
from meshkitfs.policy import PolicyProvider, PolicyRequest

__all__ = ["Conditions"]

POLICY_DEADLINE_S = 5


class Conditions:
    """The checks that a grant itself asks for, in the order of the walk."""

    def __init__(self, policy: PolicyProvider | None) -> None:
        self._policy = policy

    async def check(self, capsule: Capsule, action: str, now: int, trace: Trace) -> dict[str, int]:
        """Make every check that ``capsule`` asks for; the first that fails raises.

        Returns the end of each proof by the code that a lease ends with then.
        """
        proofs: dict[str, int] = {}
        if capsule.vault:
            with trace.step("vault") as step:
                proofs["vault_membership_required"] = await self._vault(capsule, now, step)
        else:
            trace.skip("vault", "the grant names no vault")
        if capsule.cap:
            with trace.step("capability") as step:
                proofs["capability_required"] = await self._capability(capsule, now, step)
        else:
            trace.skip("capability", "the grant asks for no capability token")
        if capsule.pol:
            with trace.step("policy") as step:
                proofs["policy_provider_error"] = await self._decide(capsule, action, now, step)
        else:
            trace.skip("policy", "the grant names no policy")
        return proofs

    async def _vault(self, capsule: Capsule, now: int, step: Step) -> int:
        # Membership proofs have no home yet, so a grant that demands one cannot be satisfied.
        raise MeshkitError("vault_membership_required", f"vault '{capsule.vault}'")

    async def _capability(self, capsule: Capsule, now: int, step: Step) -> int:
        raise MeshkitError("capability_required", f"capability '{capsule.cap}'")

    async def _decide(self, capsule: Capsule, action: str, now: int, step: Step) -> int:
        """Ask the policy provider; return until when its yes may be believed."""
        policy_id = str((capsule.pol or {}).get("id"))
        if self._policy is None:
            raise MeshkitError("policy_provider_required", f"policy '{policy_id}'")
        request = PolicyRequest(
            policy_id=policy_id,
            identity=capsule.to.hex(),
            action=action,
            cid=cid_text(capsule.root) if capsule.root else None,
            capsule_id=capsule.id,
            vault_id=capsule.vault,
            capability=capsule.cap,
        )
        try:
            with trio.fail_after(POLICY_DEADLINE_S):
                decision = await self._policy.decide(request)
            allow, until = decision.allow, now + int(decision.ttl_seconds)
        except trio.TooSlowError:
            raise MeshkitError("policy_provider_error", "no answer in time") from None
        except MeshkitError as error:
            raise MeshkitError("policy_provider_error", error.detail or error.code) from error
        except Exception as error:
            # Whatever a provider does wrong is a no, never a crash that somebody might take for a yes.
            raise MeshkitError("policy_provider_error", type(error).__name__) from error
        if allow is not True:
            raise MeshkitError("policy_denied", f"policy '{policy_id}'")
        if until <= now:
            raise MeshkitError("policy_denied", f"policy '{policy_id}': the decision is no longer valid")
        until = min(until, capsule.exp)
        step.note(f"policy '{policy_id}' allows it for {until - now} s")
        return until
