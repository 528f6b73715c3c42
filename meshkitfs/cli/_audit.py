"""``audit``: who opened what on this device, and whether they were let."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder, number
from ._output import count, printable, table, utc

__all__ = ["audit_commands"]


def audit(context: Context, args: argparse.Namespace) -> int:
    """``audit [clear]``"""
    if args.action == "clear":
        if args.since or args.share or args.refused:
            raise MeshkitError("invalid_argument", "'audit clear' forgets everything: it takes no choice")
        data = context.call("audit.clear", {})
        context.out.result(data, [f"Forgot {count(data['cleared'], 'line', 'lines')}."])
        return 0
    data = context.call(
        "audit.list",
        {"since": args.since, "share": args.share, "refused": args.refused, "limit": args.limit},
    )
    rows = [
        [
            utc(line["last"]),
            line["program"],
            line["action"],
            _place(line),
            f"refused: {line['code']}" if line["code"] else "allowed",
            line["times"],
        ]
        for line in data["lines"]
    ]
    headings = ("time", "program", "to", "what", "result", "times")
    lines = table(headings, rows) if rows else ["There is nothing of that kind."]
    if not data["enabled"]:
        lines.append("Nothing is noted: audit.enabled is false in the configuration.")
    context.out.result(data, lines)
    return 0


def _place(line: dict[str, Any]) -> str:
    name = line["name"] or line["share"][:8]
    return printable(f"{name}/{line['path']}" if line["path"] else name)


def audit_commands(add: Adder) -> None:
    """Add ``audit``."""
    parser = add.command(
        "audit",
        audit,
        "show who opened what on this device, and whether they were let",
        "Show what was opened through the mount of this device, by which program, and what was refused. The\n"
        "log is sealed in the home, bounded, and has no content in it; 'audit clear' forgets it, and the\n"
        "configuration can leave out names, or all of it.",
        "meshkitfs audit --since 2h --refused",
    )
    parser.add_argument(
        "action", metavar="clear", nargs="?", choices=("clear",), help="forget everything instead"
    )
    parser.add_argument(
        "--since", metavar="WHEN", help="2h, 3d for so long ago, or a date such as 2026-11-25"
    )
    parser.add_argument("--share", metavar="SHARE", help="only of one share")
    parser.add_argument("--refused", action="store_true", help="only what was refused")
    parser.add_argument(
        "--limit", metavar="N", type=number, default=100, help="the newest N; 0 for all (default: 100)"
    )
