"""Signed policy decisions: a provider's answer to exactly one question, asked once.

``req`` is the hash of what was asked and ``nonce`` what the asker has just made up, so an answer fits no
other question and cannot be given a second time. Which key may sign one is said by the capsule.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from meshkitfs.core import cbor
from meshkitfs.core.fields import Check, Record, blob, check_fields, refuse, time

__all__ = ["NONCE_BYTES", "SignedDecision", "question_hash"]

NONCE_BYTES: Final = 16
_QUESTION: Final = "mk/question@1"


def question_hash(
    *,
    policy: str,
    identity: str,
    action: str,
    cid: str | None,
    capsule: bytes,
    vault: str | None,
    capability: str | None,
) -> bytes:
    """Return the SHA-256 of a question in its one encoding (docs/format.md): what a decision is about."""
    question = {
        "t": _QUESTION, "policy": policy, "identity": identity, "action": action, "cid": cid,
        "capsule": capsule, "vault": vault, "capability": capability,
    }  # fmt: skip
    return hashlib.sha256(cbor.encode(question)).digest()


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class SignedDecision(Record):
    """``allow`` for the question of hash ``req``, from ``iat`` until ``exp`` (UNIX seconds)."""

    TYPE: ClassVar[str] = "mk/dec@1"
    FIELDS: ClassVar[Mapping[str, Check]] = {
        "req": blob(32),
        "nonce": blob(NONCE_BYTES),
        "allow": lambda value: type(value) is bool,
        "iat": time,
        "exp": time,
    }

    req: bytes
    nonce: bytes
    allow: bool
    iat: int
    exp: int

    @classmethod
    def _check(cls, value: dict[str, Any]) -> None:
        check_fields(value, cls.FIELDS, cls.TYPE)
        if value["iat"] >= value["exp"]:
            raise refuse("a decision that ends before it begins")
