"""Commands about the past: ``history``, ``restore``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import MeshkitError, exit_code_for
from ._asking import mount_points
from ._context import Context
from ._output import count, distance, printable, size, table, utc
from ._targets import past_path

__all__ = ["history", "restore"]

_WHAT = {"oldest": "there already", "attributes": "attributes changed"}


def history(context: Context, args: argparse.Namespace) -> int:
    """``history PATH``"""
    path = past_path(args.path, mount_points(context.home))
    data = context.call("history", {"path": path, "limit": args.limit})
    rows = data.get("versions") or []
    lines = [printable(data.get("path") or path), ""]
    lines += table(("version", "time", "by", "what", "size"), [_cells(row) for row in rows])
    if data.get("more"):
        lines += ["", f"There is more; --limit 0 shows all. (Shown: {len(rows)})"]
    context.out.result(data, lines)
    return 0


def _cells(row: dict[str, Any]) -> list[object]:
    version = f"v{row.get('version')}"
    if row.get("first"):
        version = f"v{row['first']} to {version}"
    what = str(row.get("what"))
    if not row.get("readable"):
        return [version, utc(row.get("time")), None, f"cannot be read: {row.get('code')}", None]
    return [version, utc(row.get("time")), row.get("writer"), _WHAT.get(what, what), size(row.get("size"))]


def restore(context: Context, args: argparse.Namespace) -> int:
    """``restore PATH --at WHEN [--to NEWPATH | --exact]``"""
    points = mount_points(context.home)
    params = {"path": past_path(args.path, points), "at": args.at, "exact": args.exact}
    if args.to is not None:
        params["to"] = past_path(args.to, points)
    data = context.call("restore", params)
    done = ", ".join(count(data[name], one, many) for name, one, many in _COUNTED if data.get(name))
    place, version = printable(data.get("to")), f"version {data.get('version')}"
    if args.exact and data.get("replaced") != data.get("version"):
        lines = [
            f"{place} is exactly what it was in {version}{_when(data.get('time'))}.",
            f"What was there before stays in the history, in version {data.get('replaced')}.",
        ]
    elif done:
        lines = [
            f"Brought back to {place} from {version}{_when(data.get('time'))}: {done}.",
            f"What was there before stays in the history, in version {data.get('replaced')}.",
        ]
    else:
        lines = [f"{place} is as it was in {version} already; nothing was changed."]
    unreadable = data.get("unreadable") or []
    if unreadable:
        lines.append("Left out, because some of it is missing at the store or damaged:")
        lines += [f"  {printable(path)}" for path in unreadable]
    context.out.result(data, lines)
    return exit_code_for(MeshkitError("block_unavailable")) if unreadable else 0


_COUNTED = (
    ("files", "file", "files"),
    ("directories", "directory", "directories"),
    ("symlinks", "symbolic link", "symbolic links"),
)


def _when(moment: int | None) -> str:
    return "" if moment is None else f", {utc(moment)} ({distance(moment)})"
