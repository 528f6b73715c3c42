"""What a policy provider is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from meshkitfs.core.decision import question_hash

__all__ = ["Decision", "Demand", "PolicyProvider", "PolicyRequest"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a capsule says about who decides: its field ``pol``, signed by the share's owner.

    With ``rules`` (Cedar) they are evaluated here, and ``who`` is the recipient's name in them. Otherwise the
    provider at ``url`` is asked; with ``key`` (Ed25519, 32 bytes) only what that key signed is an answer.
    """

    id: str
    key: bytes | None = None
    url: str | None = None
    rules: str | None = None
    who: str = ""

    @classmethod
    def of(cls, pol: Mapping[str, Any]) -> Demand:
        """Return the demand of a capsule's ``pol``."""
        return cls(**pol)


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """What is asked: may this identity do this, with this capsule? Field for field MeshKit's request.

    ``identity`` is the kid of the recipient's encryption key in hex, ``cid`` the CID in text form that the
    action concerns, None for a live share; ``capability`` is the token's context, never its secret.
    """

    policy_id: str
    identity: str
    action: str
    cid: str | None
    capsule_id: bytes
    vault_id: str | None = None
    capability: str | None = None

    @property
    def hash(self) -> bytes:
        """What a signed decision about this names."""
        return question_hash(
            policy=self.policy_id, identity=self.identity, action=self.action, cid=self.cid,
            capsule=self.capsule_id, vault=self.vault_id, capability=self.capability,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer: ``allow`` is a yes only if it is ``True`` itself, and holds for ``ttl_seconds``.

    Without ``ttl_seconds`` the provider did not say for how long: the yes is for what it was asked for, and
    the next open asks again. ``reason`` says who decided and by which rule, for people.
    """

    allow: bool
    ttl_seconds: int | None = None
    reason: str = ""


@runtime_checkable
class PolicyProvider(Protocol):
    """Somebody who decides."""

    async def decide(self, demand: Demand, requests: Sequence[PolicyRequest], now: int) -> Sequence[Decision]:
        """Answer every request, in order; they differ in their action only. ``now`` is UNIX seconds.

        Raises ``policy_provider_error`` when there is no usable answer, ``policy_provider_required`` when
        this home has nobody who may be asked.
        """

    async def aclose(self) -> None: ...
