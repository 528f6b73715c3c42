"""The record of one walk through the gate: what was checked, with which evidence, and what it gave.

`meshkitfs explain` prints it; the refusal that a program meets is its first failed step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from meshkitfs.errors import TABLE, MeshkitError

__all__ = ["STEPS", "Step", "Trace"]

# In the order in which they are walked; docs/concepts.md explains each.
STEPS = (
    "identity",
    "capsule",
    "roster",
    "freshness",
    "validity",
    "rights",
    "keyvault",
    "vault",
    "capability",
    "policy",
    "key",
    "head",
)

# What each step needs of the keys, said of those that a locked home cannot take. Nothing of a share can be
# known without: its grant, the rosters and heads that were seen, and the tokens held are in the sealed state,
# the questions to the metadata store are signed.
_NEEDS_KEYS = {
    "capsule": "needs the signing key to ask the metadata store, and the sealed state to know the owner",
    "roster": "needs the sealed state: it says which roster was seen last",
    "freshness": "needs the signing key to ask the metadata store",
    "validity": "is in the capsule",
    "rights": "are in the capsule",
    "vault": "the capsule says whether one is asked for",
    "capability": "the capsule says whether one is asked for; the tokens held are in the sealed state",
    "policy": "the capsule says whether one is asked for",
    "key": "needs the encryption key, to unwrap it",
    "head": "needs the sealed state: it says which version was seen last",
}


@dataclass(slots=True)
class Step:
    """One check. ``result`` is "passed", "not required", "refused" or "not reached"."""

    name: str
    result: str = "not reached"
    evidence: str = ""
    code: str = ""
    # Who vouches for it, as this home calls them, and the kid of the key that signed.
    by: str = ""
    signer: bytes = b""
    # From when and until when it may be believed (UNIX seconds, or 0), and what was asked for.
    since: int = 0
    until: int = 0
    rule: str = ""

    def note(
        self,
        evidence: str,
        *,
        by: str = "",
        signer: bytes = b"",
        since: int = 0,
        until: int = 0,
        rule: str = "",
    ) -> None:
        """Say what was found; what a step raises after this stands beside it."""
        self.evidence, self.by, self.signer = evidence, by, signer
        self.since, self.until, self.rule = since, until, rule

    def as_dict(self) -> dict[str, str]:
        """The form of ``explain --json``: times as ISO 8601 in UTC, and the way out of a refusal."""
        reason = TABLE.get(self.code)
        return {
            "step": self.name,
            "result": self.result,
            "evidence": self.evidence,
            "by": self.by,
            "signer": self.signer.hex(),
            "since": _iso(self.since),
            "until": _iso(self.until),
            "rule": self.rule,
            "code": self.code,
            "message": reason.sentence if reason is not None else "",
            "suggestion": reason.remedy if reason is not None else "",
        }


def _iso(seconds: int) -> str:
    if not seconds:
        return ""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


class Trace:
    """All steps of one walk, in order."""

    def __init__(self) -> None:
        self.steps = [Step(name) for name in STEPS]
        self._by_name = {step.name: step for step in self.steps}

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Run one check: it passes unless the body raises a MeshkitError, which goes on to the caller."""
        step = self._by_name[name]
        try:
            yield step
        except MeshkitError as error:
            step.result, step.code = "refused", error.code
            step.evidence = error.detail or step.evidence
            raise
        if step.result == "not reached":
            step.result = "passed"

    def again(self, *names: str) -> None:
        """Note that these checks are made once more, with other evidence."""
        for name in names:
            step = self._by_name[name]
            step.note("")
            step.result, step.code = "not reached", ""

    @classmethod
    def locked(cls, detail: str) -> Trace:
        """Return the walk of a home that is locked: the first step refuses, and the rest say what they need.

        ``detail`` is what is known of the lock.
        """
        trace = cls()
        with suppress(MeshkitError), trace.step("identity"):
            raise MeshkitError("identity_locked", detail)
        for step in trace.steps:
            step.evidence = _NEEDS_KEYS.get(step.name, step.evidence)
        return trace

    def skip(self, name: str, why: str) -> None:
        """Note that a check is not asked for by this grant."""
        step = self._by_name[name]
        step.result, step.evidence = "not required", why

    def as_list(self) -> list[dict[str, str]]:
        """Every step as `Step.as_dict` gives it."""
        return [step.as_dict() for step in self.steps]
