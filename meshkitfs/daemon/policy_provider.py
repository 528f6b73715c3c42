"""The policy provider that a configuration names, opened; and what grants made here say about it."""

from __future__ import annotations

from typing import Any

from meshkitfs.daemon.config import PolicyConfig
from meshkitfs.net import SecretSource, Tls
from meshkitfs.policy import AuthZen, AuthZenOptions, Deciders

__all__ = ["open_deciders", "open_provider", "pol_of"]


def open_provider(settings: PolicyConfig) -> AuthZen:
    """Open the provider; nothing is asked yet. Raises invalid_config (address, TLS file, token)."""
    return AuthZen(
        AuthZenOptions(
            settings.endpoint,
            SecretSource(settings.token_env, settings.token_file),
            Tls(settings.ca_file),
            settings.timeout_ms / 1000,
        )
    )


def open_deciders(settings: PolicyConfig | None) -> Deciders:
    """Return who decides about grants in this home, with the provider that is configured."""
    return Deciders(open_provider(settings) if settings is not None else None)


def pol_of(settings: PolicyConfig, policy: str) -> dict[str, Any]:
    """Return the ``pol`` of a capsule that demands this provider's decision about ``policy``."""
    key = bytes.fromhex(settings.key) if settings.key is not None else None
    return {"id": policy, "key": key, "url": settings.endpoint}
