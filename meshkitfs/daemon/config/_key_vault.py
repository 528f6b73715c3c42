"""The section ``keyVault``: where the wrapping key of the identity is kept, and what that must give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from ._fields import Fields, instead, near

__all__ = ["CACHE_S", "KEY_VAULTS", "KEY_VAULT_DEMANDS", "KeyVaultConfig"]

KEY_VAULTS: Final = ("tpm2", "secret-service", "passphrase-file", "systemd-credential", "plain-file")
KEY_VAULT_DEMANDS: Final = ("hardware_backed", "not_exportable", "persistent", "user_presence")
_SESSION_CACHES: Final = ("kernel",)
# How long the key stays in a session (s): the default, the least and the most.
CACHE_S, CACHE_LEAST_S, CACHE_MOST_S = 8 * 3600, 60, 30 * 86400
# Those that ask for something; of the others a session's copy would only be one more.
_CACHED_VAULTS: Final = ("passphrase-file", "tpm2")


@dataclass(frozen=True, slots=True)
class KeyVaultConfig:
    """Where the wrapping key of the identity is kept: ``type`` is one of `KEY_VAULTS`.

    ``session_cache`` ("kernel") keeps it in the session for ``session_cache_s`` seconds, so that one is
    asked once; ``require`` (of `KEY_VAULT_DEMANDS`) is what it must give, or the home stays shut.
    """

    type: str
    session_cache: str | None = None
    session_cache_s: int = CACHE_S
    require: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: Any, fields: Fields) -> KeyVaultConfig:
        """Check the section, and return it."""
        kind = fields.type(value, "keyVault", KEY_VAULTS)
        names = ("type", "sessionCache", "sessionCacheSeconds", "require")
        item = fields.object(value, "keyVault", names)
        cache = item.get("sessionCache")
        if cache is not None and cache not in _SESSION_CACHES:
            fields.fail("keyVault.sessionCache", f"{cache!r} is not known; {instead(_SESSION_CACHES)}")
        if cache is not None and kind not in _CACHED_VAULTS:
            fields.fail("keyVault.sessionCache", f"is for {instead(_CACHED_VAULTS).removeprefix('use ')}")
        seconds = item.get("sessionCacheSeconds", CACHE_S)
        if type(seconds) is not int or not CACHE_LEAST_S <= seconds <= CACHE_MOST_S:
            bounds = f"from {CACHE_LEAST_S} to {CACHE_MOST_S}"
            fields.fail("keyVault.sessionCacheSeconds", f"must be a number {bounds}")
        if "sessionCacheSeconds" in item and cache is None:
            fields.fail("keyVault.sessionCacheSeconds", "goes with 'sessionCache'")
        demands = item.get("require", [])
        if not isinstance(demands, list) or not all(isinstance(demand, str) for demand in demands):
            fields.fail("keyVault.require", "must be a list of names")
        for demand in demands:
            if demand not in KEY_VAULT_DEMANDS:
                problem = f"{demand!r} is not known{near(demand, KEY_VAULT_DEMANDS)}"
                fields.fail("keyVault.require", f"{problem}; {instead(KEY_VAULT_DEMANDS)}")
        return cls(kind, cache, seconds, tuple(demands))

    @property
    def cache_seconds(self) -> int | None:
        """How long the key stays in the session; None: not at all."""
        return self.session_cache_s if self.session_cache is not None else None

    def moved_to(self, kind: str) -> KeyVaultConfig:
        """Return the section for a key that is in the key vault ``kind`` now, without a cache it has not."""
        if kind in _CACHED_VAULTS:
            return replace(self, type=kind)
        return replace(self, type=kind, session_cache=None, session_cache_s=CACHE_S)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        result: dict[str, Any] = {"type": self.type}
        if self.session_cache is not None:
            result["sessionCache"] = self.session_cache
        if self.session_cache_s != CACHE_S:
            result["sessionCacheSeconds"] = self.session_cache_s
        if self.require:
            result["require"] = list(self.require)
        return result
