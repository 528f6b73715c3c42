"""The record of one walk through the gate: what was checked, with which evidence, and what it gave.

`meshkitfs explain` prints it; the refusal that a program meets is its first failed step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from meshkitfs.errors import MeshkitError

__all__ = ["STEPS", "Step", "Trace"]

# In the order in which they are walked; docs/concepts.md explains each.
STEPS = (
    "identity",
    "capsule",
    "roster",
    "freshness",
    "validity",
    "rights",
    "vault",
    "capability",
    "policy",
    "key",
    "head",
)


@dataclass(slots=True)
class Step:
    """One check. ``result`` is "passed", "not required", "refused" or "not reached"."""

    name: str
    result: str = "not reached"
    evidence: str = ""
    code: str = ""

    def note(self, evidence: str) -> None:
        self.evidence = evidence


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
            step.result, step.evidence, step.code = "not reached", "", ""

    def skip(self, name: str, why: str) -> None:
        """Note that a check is not asked for by this grant."""
        step = self._by_name[name]
        step.result, step.evidence = "not required", why

    def as_list(self) -> list[dict[str, str]]:
        return [
            {"step": step.name, "result": step.result, "evidence": step.evidence, "code": step.code}
            for step in self.steps
        ]
