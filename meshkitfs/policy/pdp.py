"""The other side of `meshkitfs.policy.authzen`: answering AuthZEN questions by rules, and signing the
answers.

Pure: who serves it says where rules come from, what the rules call an identity, and with which key to sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshkitfs.core.decision import NONCE_BYTES, SignedDecision
from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.policy._api import Decision, PolicyRequest
from meshkitfs.policy._wire import (
    DISCOVERY,
    EVALUATION,
    EVALUATIONS,
    RESOURCE_TYPE,
    SUBJECT_TYPE,
    b64,
    from_b64,
    loads,
)
from meshkitfs.policy.rules import decide

__all__ = ["DECISION_S", "DISCOVERY", "EVALUATION", "EVALUATIONS", "Question", "about", "answer", "read"]

# How long a signed yes holds: a rule that is changed bites within it.
DECISION_S: Final = 30
_EVALUATIONS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Question:
    """One request or ``many``, all about one grant; with a ``nonce`` a signed answer is wanted."""

    requests: tuple[PolicyRequest, ...]
    nonce: bytes | None
    many: bool


def about(base: str) -> dict[str, str]:
    """Return what a decision point at ``base`` says of itself."""
    return {
        "policy_decision_point": base,
        "access_evaluation_endpoint": base + EVALUATION,
        "access_evaluations_endpoint": base + EVALUATIONS,
    }


def read(body: bytes, *, many: bool) -> Question:
    """Return the question in ``body``. Raises invalid_argument; fields that are not known are ignored."""
    try:
        value = loads(body)
        subject, resource = value["subject"], value["resource"]
        properties, context = resource["properties"], value.get("context") or {}
        items = value["evaluations"] if many else [value]
        actions = [item.get("action", value.get("action"))["name"] for item in items]
        if (subject["type"], resource["type"]) != (SUBJECT_TYPE, RESOURCE_TYPE):
            raise ValueError("another type of subject or resource")
        if not 0 < len(actions) <= _EVALUATIONS_MAX or any(
            item.keys() - {"action"} for item in items if many
        ):
            raise ValueError("evaluations that differ in more than their action, too many, or none")
        given = [_text(subject["id"]), *map(_text, actions)]
        policy = _text(properties["policyId"])
        capsule = bytes.fromhex(_text(properties["capsuleId"]))
        rest = [_optional(properties, name) for name in ("cid", "vaultId", "capability")]
        nonce = from_b64(context["nonce"]) if "nonce" in context else None
        if len(capsule) != 16 or (nonce is not None and len(nonce) != NONCE_BYTES):
            raise ValueError("a capsule's id or a nonce that is not 16 bytes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        says = str(error) if type(error) is ValueError else "a field is missing or of another type"
        raise MeshkitError("invalid_argument", says[:200]) from None
    identity, *names = given
    requests = tuple(PolicyRequest(policy, identity, name, rest[0], capsule, *rest[1:]) for name in names)
    return Question(requests, nonce, many)


def answer(question: Question, rules: str | None, who: str, key: SigningKey, now: int) -> dict[str, Any]:
    """Return the body of the answer. Without ``rules`` there is no such policy, and everything is a no.

    Raises ``policy_provider_error`` for rules that cannot be evaluated.
    """
    known = [request for request in question.requests if request.action in _KNOWN]
    answers = decide(rules, who, known, now) if rules is not None and known else [_NO] * len(known)
    found = {request.action: decision for request, decision in zip(known, answers, strict=True)}
    values = [
        _value(request, found.get(request.action, _NO), question.nonce, key, now)
        for request in question.requests
    ]
    return {"evaluations": values} if question.many else values[0]


_KNOWN: Final = frozenset({"list", "read", "write", "reshare"})
_NO: Final = Decision(False, None, "no such policy")


def _value(
    request: PolicyRequest, decision: Decision, nonce: bytes | None, key: SigningKey, now: int
) -> dict[str, Any]:
    allow = decision.allow is True
    context: dict[str, Any] = {"rule": decision.reason}
    if allow:
        context["ttl"] = DECISION_S
    if nonce is not None:
        record = SignedDecision(request.hash, nonce, allow, now, now + DECISION_S)
        context["signedDecision"] = b64(record.sign(key))
    return {"decision": allow, "context": context}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise ValueError("a text that is missing or too long")
    return value


def _optional(properties: Mapping[str, Any], name: str) -> str | None:
    value = properties.get(name)
    return None if value is None else _text(value)
