"""What each refusal of the gate means for a grant that lives: that it is over, or that nobody could say.

Unknown is not yes, so a walk that ends with it opens nothing. It is not no either: a grant whose proofs are
still good was not taken back by somebody's silence, and ends when they do.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ENDS", "ends"]

# By code: whether it ends a grant that lives. Ends: the owner's signature, this device or a decider that the
# grant names has said no, or the metadata store was caught at lying. Does not: an answer is missing, or is
# none that anybody who has a say stands behind.
ENDS: Final = {
    # This device itself.
    "identity_not_found": True,
    "identity_locked": True,
    "clock_rollback": True,
    "key_unwrap_failed": True,
    "state_corrupt": True,
    "keyvault_strength_required": True,
    # A newer roster could not be noted down, and it may be the one that ends this grant.
    "no_space": True,
    "home_busy": True,
    # The owner's signature, against a clock that does not go back.
    "share_revoked": True,
    "share_expired": True,
    "right_not_granted": True,
    # Whoever the owner has named as having a say.
    "policy_denied": True,
    "policy_provider_required": True,
    "vault_membership_required": True,
    "capability_required": True,
    "capability_denied": True,
    "biscuit_not_installed": True,
    "key_release_refused": True,
    # The metadata store shows what cannot be true beside what was seen, or what no writer has signed.
    "head_rollback": True,
    "head_fork": True,
    "roster_rollback": True,
    "roster_fork": True,
    "invalid_record": True,
    # Somebody signs with a key that its owner has replaced, or that no chain of theirs leads to.
    "key_replaced": True,
    "contact_key_changed": True,
    # Nobody answered, or with nothing that proves anything.
    "freshness_unproven": False,
    "policy_provider_error": False,
    "key_release_unavailable": False,
    # A store can leave a capsule out, or show another one. Only a roster says that it is not valid any more.
    "capsule_not_found": False,
    "recipient_not_authorized": False,
}


def ends(code: str) -> bool:
    """Return whether a refusal with ``code`` ends a grant that lives. A code that is not known does."""
    return ENDS.get(code, True)
