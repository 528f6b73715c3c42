"""``providers test``: is the byte store what it should be, and if not, what is wrong with it."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..daemon import config
from ..daemon.client import run_async
from ..errors import MeshkitError, exit_code_for
from ._colour import meaning
from ._context import Context
from ._output import printable, table
from ._wrong import STORE, explained

__all__ = ["source_lines", "test"]

_STEPS = {
    "open": "can be used as configured",
    "put": "stores a block",
    "has": "says that it has it",
    "get": "gives it back, unchanged",
    "delete": "deletes it",
    "gone": "does not have it any more",
    "capabilities": "what else it can do",
}
_CAPABILITIES = {
    "conditional_put": "refuses to replace, when asked to",
    "multi_delete": "deletes many with one request",
    "listing": "lists what it holds",
}


def test(context: Context, args: argparse.Namespace) -> int:
    """``providers test [SPEC]``: exit 0 when every step went well."""
    from ..providers import examine, parse_provider

    if args.spec is not None:
        spec = parse_provider(args.spec, Path.cwd())
    else:
        spec = config.load(context.home.config_path).provider
    found = run_async(partial(examine, spec, write=True))
    data = found.as_dict()
    lines = [printable(found.name), *table(("", "step", "took"), [_row(step) for step in data["steps"]])]
    if data["capabilities"] is not None:
        lines += ["", *(_capability(name, data["capabilities"][name]) for name in _CAPABILITIES)]
    lines += source_lines(data["sources"])
    failed = [step for step in found.steps if step.error is not None]
    if failed and failed[0].error is not None:
        error = failed[0].error
        sentence, remedy = explained(error, STORE) or (error.reason.sentence, error.remedy)
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}", f"  {printable(error.detail)}", f"  {remedy}"]
        data |= {"problem": sentence, "remedy": remedy}
    context.out.result(data, lines)
    return exit_code_for(failed[0].error or MeshkitError("provider_request_failed")) if failed else 0


def _row(step: dict[str, Any]) -> tuple[str, str, str]:
    words = _STEPS.get(step["name"], step["name"])
    return (meaning("ok" if step["ok"] else "FAIL"), words, f"{step['ms']:.0f} ms")


def _capability(name: str, value: bool | None) -> str:
    return f"  {'not known' if value is None else 'yes' if value else 'no'}: {_CAPABILITIES[name]}"


def source_lines(sources: list[dict[str, Any]]) -> list[str]:
    """Return what is known of the places blocks come from, where there are several."""
    if len(sources) < 2:
        return []
    lines = ["", "Read from, in this order:"]
    for source in sources:
        barred = f"; NOT ASKED ANY MORE: {source['barred']}" if source["barred"] else ""
        lines.append(
            f"  {printable(source['name'])}: {source['served']} served, {source['failed']} without answer, "
            f"{source['wrong']} wrong{printable(barred)}"
        )
    return lines
