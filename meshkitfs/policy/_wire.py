"""The JSON of AuthZEN 1.0 as it is spoken here: one question for each action, in one request.

What of it is ours (the properties, and what stands in ``context``) is in docs/format.md.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from meshkitfs.policy._api import PolicyRequest

__all__ = [
    "DISCOVERY",
    "EVALUATION",
    "EVALUATIONS",
    "b64",
    "from_b64",
    "loads",
    "printable",
    "write_question",
]

DISCOVERY: Final = "/.well-known/authzen-configuration"
EVALUATION: Final = "/access/v1/evaluation"
EVALUATIONS: Final = "/access/v1/evaluations"
SUBJECT_TYPE: Final = "identity"
RESOURCE_TYPE: Final = "capsule"
_SAID_MAX: Final = 200


def b64(data: bytes) -> str:
    """Return bytes as they stand in JSON: base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def from_b64(text: Any) -> bytes:
    """Return the bytes of a JSON string, if that is their one spelling. Raises ValueError."""
    if not isinstance(text, str) or not text.isascii():
        raise ValueError("not base64url")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise ValueError("not base64url") from None
    if b64(data) != text:
        raise ValueError("not base64url without padding")
    return data


def loads(body: bytes) -> Any:
    """Return what ``body`` says in JSON. Raises ValueError, also for a field that is there twice.

    Two readers would take different ones of the two.
    """
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_question(requests: Sequence[PolicyRequest], nonce: bytes) -> dict[str, Any]:
    """Return the body of an evaluation of one request, or of evaluations of several."""
    first = requests[0]
    properties = {
        "policyId": first.policy_id,
        "capsuleId": first.capsule_id.hex(),
        "cid": first.cid,
        "vaultId": first.vault_id,
        "capability": first.capability,
    }
    body: dict[str, Any] = {
        "subject": {"type": SUBJECT_TYPE, "id": first.identity},
        "resource": {
            "type": RESOURCE_TYPE,
            "id": first.capsule_id.hex(),
            "properties": {name: value for name, value in properties.items() if value is not None},
        },
        "context": {"nonce": b64(nonce)},
    }
    if len(requests) == 1:
        return body | {"action": {"name": first.action}}
    return body | {"evaluations": [{"action": {"name": request.action}} for request in requests]}


def printable(context: Mapping[str, Any], name: str) -> str:
    """Return what somebody else says in ``context`` for people to read: short, on one line."""
    text = context.get(name)
    if not isinstance(text, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in text[:_SAID_MAX]).strip()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a field that is there twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")
