"""Who decides about a capsule: the rules in it, the provider of this home, or nobody."""

from __future__ import annotations

from collections.abc import Sequence

from meshkitfs.errors import MeshkitError
from meshkitfs.policy._api import Decision, Demand, PolicyProvider, PolicyRequest

__all__ = ["Deciders"]


class Deciders:
    """A `PolicyProvider` that does what the capsule says. ``external`` is the provider that may be asked."""

    def __init__(self, external: PolicyProvider | None = None) -> None:
        self.external = external

    async def decide(self, demand: Demand, requests: Sequence[PolicyRequest], now: int) -> Sequence[Decision]:
        """Answer every request, in order; see `PolicyProvider.decide`."""
        if demand.rules is not None:
            # Loaded here: most homes never meet a rule, and the library takes longer than the rest of a
            # start.
            from meshkitfs.policy.rules import decide

            return decide(demand.rules, demand.who, requests, now)
        if self.external is None:
            where = demand.url or "no address of one"
            raise MeshkitError("policy_provider_required", f"policy '{demand.id}': the grant names {where}")
        return await self.external.decide(demand, requests, now)

    async def aclose(self) -> None:
        """Let go of the provider's connections. Harmless when repeated."""
        if self.external is not None:
            await self.external.aclose()
