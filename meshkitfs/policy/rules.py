"""Rules in Cedar: evaluated on the device of whoever opens, or by a service that is asked.

They are checked against one schema before they go anywhere, so a mistyped name is found by who wrote it and
not by who is locked out. A rule that cannot be evaluated makes the whole answer unusable: Cedar itself would
leave it out, and a ``forbid`` that is left out permits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import cedarpy

from meshkitfs.core.capsule import RULES_MAX
from meshkitfs.errors import MeshkitError
from meshkitfs.policy._api import Decision, PolicyRequest
from meshkitfs.policy._places import Statement, spoiled, statements

__all__ = ["STEADY_S", "TIMED_S", "Rule", "check", "decide"]

# How long a yes holds: of rules that look at the time, and of rules that only a new grant can change.
TIMED_S: Final = 30
STEADY_S: Final = 300
# Documented in docs/policies.md, for who writes rules.
_SCHEMA: Final = """
entity Identity { kid: String };
entity Capsule { policy: String, snapshot: Bool, cid?: String, vault?: String, capability?: String };
type Moment = { now: datetime, hour: Long, weekday: Long };
action "list", "read", "write", "reshare" appliesTo {
    principal: Identity, resource: Capsule, context: Moment
};
"""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its ``@id``, or its number; its effect (permit, forbid), and the line it begins in."""

    name: str
    effect: str
    line: int


@dataclass(frozen=True, slots=True)
class _Compiled:
    policies: cedarpy.PolicySet
    rules: dict[str, Rule]  # by the names that Cedar gives them
    timed: bool


@lru_cache(maxsize=1)
def _schema() -> cedarpy.Schema:
    return cedarpy.Schema.from_str(_SCHEMA)


def check(text: str) -> list[Rule]:
    """Return the rules in ``text``. Raises policy_invalid with line and column of what is wrong."""
    if len(text.encode(errors="replace")) > RULES_MAX:
        raise MeshkitError("policy_invalid", f"longer than {RULES_MAX} bytes")
    parts = statements(text)
    problems = [f"{part.place(at)}: {says}" for part in parts for at, says in spoiled(part, _parse)]
    if not problems:
        problems = _wrong_names(text, parts)
    if not problems and not parts:
        problems = ["line 1, column 1: there is no rule in it"]
    if problems:
        rest = len(problems) - _SHOWN
        more = [f"and {rest} more"] if rest > 0 else []
        raise MeshkitError("policy_invalid", "\n".join(problems[:_SHOWN] + more))
    return list(_compiled(text).rules.values())


def decide(rules: str, who: str, requests: Sequence[PolicyRequest], now: int) -> list[Decision]:
    """Answer every request, in order, for the identity that ``rules`` call ``who``; ``now`` is UNIX seconds.

    Raises ``policy_provider_error`` for rules that cannot be read or evaluated.
    """
    compiled = _compiled(rules)
    answers = cedarpy.is_authorized_batch(
        [_request(who, request, now) for request in requests],
        compiled.policies,
        _entities(who, requests[0]),
        _schema(),
    )
    return [_decision(compiled, answer) for answer in answers]


def _decision(compiled: _Compiled, answer: cedarpy.AuthzResult) -> Decision:
    if answer.diagnostics.errors:
        raise MeshkitError("policy_provider_error", f"a rule cannot be evaluated: {_first(answer)}")
    names = [_shown(compiled.rules[name]) for name in answer.diagnostics.reasons if name in compiled.rules]
    if answer.decision is cedarpy.Decision.Allow:
        return Decision(True, TIMED_S if compiled.timed else STEADY_S, f"permitted by {', '.join(names)}")
    if answer.decision is not cedarpy.Decision.Deny:
        raise MeshkitError("policy_provider_error", "the rules give no decision")
    return Decision(False, None, f"forbidden by {', '.join(names)}" if names else "no rule permits it")


def _shown(rule: Rule) -> str:
    return f"rule {rule.name} (line {rule.line})"


def _first(answer: cedarpy.AuthzResult) -> str:
    return str(answer.diagnostics.errors[0])[:200]


def _request(who: str, request: PolicyRequest, now: int) -> dict[str, Any]:
    moment = datetime.fromtimestamp(now, UTC)
    return {
        "principal": {"type": "Identity", "id": who},
        "action": {"type": "Action", "id": request.action},
        "resource": {"type": "Capsule", "id": request.capsule_id.hex()},
        "context": {
            "now": {"__extn": {"fn": "datetime", "arg": moment.strftime("%Y-%m-%dT%H:%M:%SZ")}},
            "hour": moment.hour,
            "weekday": moment.isoweekday(),
        },
    }


def _entities(who: str, request: PolicyRequest) -> list[dict[str, Any]]:
    attributes = {
        "policy": request.policy_id,
        "snapshot": request.cid is not None,
        "cid": request.cid,
        "vault": request.vault_id,
        "capability": request.capability,
    }
    return [
        {"uid": {"type": "Identity", "id": who}, "attrs": {"kid": request.identity}, "parents": []},
        {
            "uid": {"type": "Capsule", "id": request.capsule_id.hex()},
            "attrs": {name: value for name, value in attributes.items() if value is not None},
            "parents": [],
        },
    ]


@lru_cache(maxsize=64)
def _compiled(text: str) -> _Compiled:
    try:
        policies = cedarpy.PolicySet.from_str(text)
        found = _parse(text)
    except ValueError as error:
        raise MeshkitError("policy_provider_error", f"the rules cannot be read: {error}") from None
    if found["templates"]:
        raise MeshkitError("policy_provider_error", "the rules have slots that nobody fills")
    parts = statements(text)
    rules = {}
    for name, policy in found["staticPolicies"].items():
        number = int(name.removeprefix("policy"))
        title = policy.get("annotations", {}).get("id") or str(number + 1)
        shown = "".join(c if c.isprintable() else " " for c in title[:80])
        rules[name] = Rule(shown, policy["effect"], parts[number].line)
    return _Compiled(policies, rules, '"Var": "context"' in json.dumps(found))


def _parse(text: str) -> dict[str, Any]:
    """Return Cedar's own JSON form of rules. Raises ValueError, which says what is wrong and not where."""
    found: dict[str, Any] = json.loads(cedarpy.policies_to_json_str(text))
    return found


def _wrong_names(text: str, parts: list[Statement]) -> list[str]:
    """Return what the schema has against rules that can be parsed."""
    if _parse(text)["templates"]:
        slot = next((part, part.text.find("?")) for part in parts if "?" in part.text)
        return [f"{slot[0].place(slot[1])}: slots (?principal, ?resource) are not supported"]
    found = cedarpy.validate_policies(text, _schema())
    problems: dict[str, None] = {}
    for item in found.errors:
        number = int(item.policy_id.removeprefix("policy"))
        part = parts[number]
        says = item.error.removeprefix(f"for policy `{item.policy_id}`, ")
        if "unable to find an applicable action" in says and problems:
            continue  # said already: it follows from a name that is not known
        quoted = says.split("`")[1] if says.count("`") >= 2 else ""
        # One word is reported for each action that it is wrong for.
        says = re.sub(r' for Action::"\w+"', "", says)
        problems[f"{part.place(max(part.text.find(quoted), 0))}: {says}"] = None
    if not problems and not found.validation_passed:
        problems["line 1, column 1: the rules do not fit the schema"] = None
    return list(problems)
