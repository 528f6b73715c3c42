"""Commands that look: ``status``, ``sync``, ``explain``, ``version``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import TABLE, MeshkitError, exit_code_for
from ._asking import mount_points
from ._colour import Tone, joined, meaning, toned
from ._context import Context
from ._output import ago, clock, fields, printable, size, table
from ._providers import source_lines
from ._shown import amount, left_lines, share_table
from ._targets import share_path

__all__ = ["explain", "status", "sync", "version"]

_MARKS = {"passed": "ok", "refused": "REFUSED", "not required": "-", "not reached": "?"}


def status(context: Context, args: argparse.Namespace) -> int:
    """``status``; with ``--watch`` until it is ended."""
    if args.watch:
        from ._watch import watch

        return watch(context, lambda data: _status_lines(context, data))
    data = context.call("status", {})
    context.out.result(data, _status_lines(context, data))
    return 0


def _status_lines(context: Context, data: Mapping[str, Any]) -> list[str]:
    pending = data.get("pending") or {}
    lines = fields(
        [
            ("identity", data.get("identity")),
            ("home", context.home.root),
            ("mounted at", data.get("mountpoint") or "(not mounted)"),
            ("daemon", f"process {data['pid']}" if data.get("mountpoint") and data.get("pid") else None),
            ("locked", _unlock_it(since) if (since := _locked(data)) else None),
            ("byte store", data.get("provider")),
            ("unsent", _unsent(pending)),
            ("oldest unsent", ago(min(times)) if (times := _since(data)) else None),
            ("new keys", clock(due) if (due := (data.get("rotation") or {}).get("next")) else None),
            ("metrics", data.get("metrics")),
            ("notifications", _untold(data)),
            ("fsync", "durable on this device" if data.get("fsync") == "journal" else None),
        ]
    )
    shares = data.get("shares") or []
    if shares:
        lines += ["", *share_table(shares)]
    elif not data.get("locked"):
        lines += ["", "There are no shares."]
    left = data.get("left") or []
    if left:
        lines += ["", *left_lines(left)]
    lines += source_lines(data.get("sources") or [])
    errors = data.get("errors") or []
    if errors:
        lines += ["", "Recent refusals and faults ('meshkitfs explain PATH' says more):"]
        lines += [
            joined(
                f"  {ago(item.get('time'))}  {printable(item.get('path', ''))}: ",
                meaning(printable(item.get("code", ""))),
            )
            for item in errors
        ]
    return lines


def _untold(data: Mapping[str, Any]) -> str | None:
    """Say why the last notification was not shown, if it was not."""
    problem = (data.get("notifications") or {}).get("problem")
    return f"the last one was not shown: {printable(problem)}" if problem else None


def sync(context: Context, args: argparse.Namespace) -> int:
    """``sync``: exit 0 when nothing is left to send, else as ``commit_pending``."""
    data = context.call("sync", {"timeout": args.timeout, "wait": True})
    left = data.get("left") or []
    context.out.result(data, left_lines(left) if left else ["Everything is published."])
    return exit_code_for(MeshkitError("commit_pending")) if left else 0


def explain(context: Context, args: argparse.Namespace) -> int:
    """``explain PATH``: the walk through the gate, step by step. A refusal is an answer, so exit 0."""
    path = share_path(args.path, mount_points(context.home))
    if path.startswith(("/", "~")):
        raise MeshkitError("share_not_found", f"{path} is not in a share of this home's mount")
    data = context.call("explain", {"path": path})
    steps = data.get("steps") or []
    rows = [
        [
            step.get("step"),
            meaning(_MARKS.get(str(step.get("result")), step.get("result"))),
            _evidence(step),
            step.get("by"),
            step.get("since"),
            step.get("until"),
        ]
        for step in steps
    ]
    lines = [f"{printable(data.get('path') or path)}", ""]
    lines += table(("step", "result", "evidence", "by", "since", "until"), rows, fold=("evidence",))
    signers = {step["by"]: step for step in steps if step.get("fingerprint")}
    lines += [""] if signers else []
    lines += [
        f"{printable(who)} has the fingerprint {step['fingerprint']} ({printable(step['trust'])})"
        for who, step in sorted(signers.items())
    ]
    code = data.get("code") or next((step["code"] for step in steps if step.get("code")), "")
    lines.append("")
    if not code:
        lines.append(toned("It may be opened.", Tone.GOOD))
    elif code in TABLE:
        detail = f" ({printable(data['detail'])})" if data.get("detail") else ""
        lines += [joined(meaning(code), f": {TABLE[code].sentence}{detail}"), TABLE[code].remedy]
    else:
        lines.append(printable(code))
    context.out.result(data, lines)
    return 0


def version(context: Context, _args: argparse.Namespace) -> int:
    """``version``"""
    data = {"version": __version__, "python": platform.python_version(), "system": platform.platform()}
    context.out.result(data, [f"meshkitfs {__version__} (Python {data['python']}, {data['system']})"])
    return 0


def _unlock_it(since: int) -> str:
    return toned(f"since {ago(since)}: run 'meshkitfs unlock'", Tone.WARN)


def _locked(data: Mapping[str, Any]) -> int:
    return int((data.get("locked") or {}).get("since") or 0)


def _since(data: Mapping[str, Any]) -> list[int]:
    return [item["since"] for item in data.get("left") or [] if item.get("since")]


def _unsent(pending: Mapping[str, Any]) -> str:
    sealed, memory = amount(pending), pending.get("memory")
    if not memory:
        return sealed
    return f"{size(memory)} in memory" if sealed == "nothing" else f"{sealed}; {size(memory)} in memory"


def _evidence(step: Mapping[str, Any]) -> str:
    parts = [": ".join(str(part) for part in (step.get("code"), step.get("evidence")) if part)]
    if step.get("rule"):
        parts.append(f"asked for: {step['rule']}")
    return "; ".join(filter(None, parts))
