"""Asking somebody outside whether a grant may be used.

A capsule may name a policy. The gate then needs a decision before it unwraps anything: no provider
configured, no answer, a late answer or anything but a clear yes is a no (the gate says which of
``policy_provider_required``, ``policy_provider_error`` and ``policy_denied`` it was).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["Decision", "PolicyProvider", "PolicyRequest"]


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """What is asked: may this identity do this, with this capsule? Field for field MeshKit's request.

    ``cid`` is the CID in text form that the action concerns, None for a live share; ``capability`` is the
    token's context (id and caveats), never its secret.
    """

    policy_id: str
    identity: str
    action: str
    cid: str | None
    capsule_id: bytes
    vault_id: str | None = None
    capability: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer: ``allow`` is a yes only if it is ``True`` itself, and holds for ``ttl_seconds``."""

    allow: bool
    ttl_seconds: int
    reason: str = ""


@runtime_checkable
class PolicyProvider(Protocol):
    """Somebody who decides. `decide` raises ``policy_provider_error`` when there is no usable answer."""

    async def decide(self, request: PolicyRequest) -> Decision: ...

    def close(self) -> None: ...
