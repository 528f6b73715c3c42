"""The section ``policy``: which policy provider grants may send this home to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ._fields import Fields, relative

__all__ = ["PolicyConfig"]

TIMEOUT_MS: Final = 2000
_TYPES: Final = ("authzen",)
_TYPES_PLANNED: Final = ("lit-http",)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The policy provider that grants may send this home to: ``authzen``, at ``endpoint``.

    ``token_env`` or ``token_file`` say where its bearer token is, ``ca_file`` takes the place of the system's
    certificate authorities, ``timeout_ms`` bounds one answer. ``key`` (hex) is the key that it signs
    decisions with: grants made here demand that signature.
    """

    endpoint: str
    type: str = "authzen"
    token_env: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_ms: int = TIMEOUT_MS
    key: str | None = None

    @classmethod
    def read(cls, value: Any, fields: Fields) -> PolicyConfig:
        """Check the section, and return it."""
        kind = fields.type(value, "policy", _TYPES, planned=_TYPES_PLANNED)
        names = ("type", "endpoint", "tokenEnv", "tokenFile", "caFile", "timeoutMs", "key")
        item = fields.object(value, "policy", names)
        if "endpoint" not in item:
            fields.fail("policy.endpoint", "is missing: the address of the policy decision point")
        if "tokenEnv" in item and "tokenFile" in item:
            fields.fail("policy.tokenEnv", "and 'tokenFile' are two places for one secret")
        timeout, key = item.get("timeoutMs", TIMEOUT_MS), item.get("key")
        if type(timeout) is not int or not 100 <= timeout <= TIMEOUT_MS:
            fields.fail("policy.timeoutMs", f"must be from 100 to {TIMEOUT_MS}")
        if key is not None and not (isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key)):
            fields.fail("policy.key", "must be an Ed25519 public key: 64 small hex digits")
        files = {
            attribute: fields.path(item, f"policy.{name}", "") if name in item else None
            for name, attribute in (("tokenFile", "token_file"), ("caFile", "ca_file"))
        }
        endpoint = fields.address(item, "endpoint", "policy")
        token_env = fields.variable(item, "tokenEnv", "policy")
        return cls(endpoint, kind, token_env, timeout_ms=timeout, key=key, **files)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form. Paths below ``base`` are written relative."""
        result: dict[str, Any] = {"type": self.type, "endpoint": self.endpoint}
        if self.token_env is not None:
            result["tokenEnv"] = self.token_env
        for name, path in (("tokenFile", self.token_file), ("caFile", self.ca_file)):
            if path is not None:
                result[name] = relative(path, base)
        if self.timeout_ms != TIMEOUT_MS:
            result["timeoutMs"] = self.timeout_ms
        if self.key is not None:
            result["key"] = self.key
        return result
