"""Asking whether a grant may be used: an external provider, or rules that the owner put into the grant.

A capsule may name a policy. The gate then needs a decision before it unwraps anything: no provider
configured, no answer, a late answer or anything but a clear yes is a no (the gate says which of
``policy_provider_required``, ``policy_provider_error`` and ``policy_denied`` it was).
"""

from meshkitfs.policy._api import Decision, Demand, PolicyProvider, PolicyRequest
from meshkitfs.policy._asking import POLICY_DEADLINE_S, UNSAID_S, ask, lasts
from meshkitfs.policy._deciders import Deciders
from meshkitfs.policy.authzen import AuthZen, AuthZenOptions

__all__ = [
    "POLICY_DEADLINE_S",
    "UNSAID_S",
    "AuthZen",
    "AuthZenOptions",
    "Deciders",
    "Decision",
    "Demand",
    "PolicyProvider",
    "PolicyRequest",
    "ask",
    "lasts",
]
