"""Asking a provider about a capsule, by whoever must know: a device's gate, and a service that releases keys.

Whatever is not an answer in time is a no with its reason; nothing that a provider does wrong gets further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from meshkitfs.core.capsule import Capsule
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.policy._api import Decision, Demand, PolicyProvider, PolicyRequest

__all__ = ["POLICY_DEADLINE_S", "UNSAID_S", "ask", "lasts"]

POLICY_DEADLINE_S = 5
# A yes that does not say how long it holds is for what it was asked for. What is open then is asked about
# again after so many seconds.
UNSAID_S: Final = 10
# What a provider may answer with; everything else it raises says that there was no usable answer.
_ANSWERS: Final = frozenset({"policy_provider_required", "policy_provider_error", "policy_denied"})


async def ask(
    provider: PolicyProvider, demand: Demand, capsule: Capsule, rights: Sequence[str], now: int
) -> dict[str, Decision]:
    """Return the provider's answer for each of ``rights``; ``now`` is UNIX seconds.

    Raises ``policy_provider_required``, ``policy_provider_error``, ``policy_denied``.
    """
    cid = cid_text(capsule.root) if capsule.root else None
    requests = [
        PolicyRequest(demand.id, capsule.to.hex(), right, cid, capsule.id, capsule.vault, capsule.cap)
        for right in rights
    ]
    try:
        with trio.fail_after(POLICY_DEADLINE_S):
            answers = await provider.decide(demand, requests, now)
        found = dict(zip(rights, answers, strict=True))
        for answer in found.values():
            # Touched here, so that an answer of another shape fails here.
            _ = answer.allow, answer.reason, lasts(answer)
    except trio.TooSlowError:
        raise MeshkitError("policy_provider_error", "no answer in time") from None
    except MeshkitError as error:
        if error.code in _ANSWERS:
            raise
        raise MeshkitError("policy_provider_error", error.detail or error.code) from error
    except Exception as error:
        # Whatever a provider does wrong is a no, never a crash that somebody might take for a yes.
        raise MeshkitError("policy_provider_error", type(error).__name__) from error
    return found


def lasts(answer: Decision) -> int:
    """Return for how many seconds an answer may be believed."""
    return UNSAID_S if answer.ttl_seconds is None else int(answer.ttl_seconds)
