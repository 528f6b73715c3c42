"""Commands that keep a store small and whole: ``prune``, ``gc``, ``verify``, ``repair``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TABLE, MeshkitError, exit_code_for
from ._asking import mount_points
from ._context import Context
from ._output import printable, size, table, utc
from ._progress import ProgressLine
from ._targets import share_path

__all__ = ["gc", "prune", "repair", "verify"]

# The options of prune, by the names the service has for them.
_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly", "within")
_SHOWN_PATHS = 5


def prune(context: Context, args: argparse.Namespace) -> int:
    """``prune SHARE``"""
    rules = {name: value for name in _RULES if (value := getattr(args, f"keep_{name}")) is not None}
    data = context.call("prune", {"share": _share(context, args.share), "dry_run": args.dry_run, **rules})
    rows = [
        [
            item["version"],
            utc(item["time"]),
            "keep" if item["keep"] else "give up",
            ", ".join(item["reasons"]),
        ]
        for item in data["versions"]
    ]
    lines = table(("version", "time", "", "because"), rows, fold=("because",))
    count = data["given_up"]
    if not count:
        lines += ["", "Nothing to give up."]
    elif data["dry_run"]:
        lines += ["", f"{count} of {len(rows)} versions would be given up. Nothing was changed."]
    else:
        lines += [
            "",
            f"{count} of {len(rows)} versions are given up. 'meshkitfs gc' deletes what only they need.",
        ]
    context.out.result(data, lines)
    return 0


def gc(context: Context, args: argparse.Namespace) -> int:
    """``gc SHARE``: without ``--yes`` it only says what it would delete."""
    params = {"share": _share(context, args.share), "grace": args.grace, "delete": args.yes}
    data = context.call("gc", params)
    verb = "Deleted" if data["deleted"] else "Would delete"
    lines = [f"{verb} {data['blocks']} blocks ({size(data['bytes'])}) of {data['versions']} versions."]
    if data["waiting"]:
        lines.append(f"{data['waiting']} versions were given up less than {args.grace} ago and wait.")
    if data["snapshots"]:
        lines.append(f"{data['snapshots']} granted snapshots on given-up versions were left alone.")
    if data["damaged"]:
        lines.append(
            f"{data['damaged']} manifests of given-up versions cannot be read; what only they name stays."
        )
    context.out.result(data, lines)
    if data["blocks"] and not data["deleted"]:
        context.out.note("Nothing was deleted. 'gc --yes' does it.")
    return 0


def verify(context: Context, args: argparse.Namespace) -> int:
    """``verify [SHARE ...]`` of a home, or ``verify --store SPEC`` of a whole store without keys."""
    if args.store is not None:
        return _verify_store(context, args)
    if args.cursor is not None:
        raise MeshkitError(
            "invalid_argument", "--cursor belongs to --store; a share is resumed with --resume"
        )
    shares = [_share(context, name) for name in args.shares]
    params = {"shares": shares, "live": args.versions == "live", "resume": args.resume}
    data = context.call("verify", params)
    lines: list[str] = []
    for item in data["shares"]:
        name = printable(item["share"])
        if item["failure"]:
            lines.append(f"{name}: not verified: {TABLE[item['failure']['code']].sentence}")
            continue
        lines.append(f"{name}: {_extent(item)}, {_verdict(item['broken'])}")
        if item["closed"]:
            lines.append(f"  {item['closed']} versions are older than what you were granted.")
        lines += _broken_lines(item["broken"])
    context.out.result(data, lines or ["There are no shares."])
    if any(item["broken"] for item in data["shares"]):
        return exit_code_for(MeshkitError("verify_failed"))
    failures = [item["failure"]["code"] for item in data["shares"] if item["failure"]]
    return exit_code_for(MeshkitError(failures[0])) if failures else 0


def repair(context: Context, args: argparse.Namespace) -> int:
    """``repair SHARE --from SPEC``"""
    params = {"share": _share(context, args.share), "sources": [_absolute(spec) for spec in args.sources]}
    data = context.call("repair", params)
    lines = [f"{data['repaired']} blocks repaired, {_verdict(data['broken'])}."]
    lines += _broken_lines(data["broken"])
    context.out.result(data, lines)
    return exit_code_for(MeshkitError("verify_failed")) if data["broken"] else 0


def _verify_store(context: Context, args: argparse.Namespace) -> int:
    """Check a store by itself: needs no home, no identity and no daemon."""
    from ..daemon.client import run_async
    from ..providers import Listable, Scrubbed, open_provider, parse_provider, scrub

    if args.shares or args.resume or args.versions != "all":
        raise MeshkitError("invalid_argument", "--store verifies a whole store: no shares, no versions")
    cursor = Path(args.cursor).absolute() if args.cursor else None
    spec = parse_provider(args.store)
    with ProgressLine(enabled=context.out.interactive) as progress:

        async def work() -> tuple[str, Scrubbed]:
            store = await open_provider(spec)
            try:
                if not isinstance(store, Listable):
                    raise MeshkitError("not_supported", f"{store.name} cannot be listed")
                return store.name, await scrub(store, cursor, progress.update)
            finally:
                await store.aclose()

        name, found = run_async(work)
    data = {
        "store": name, "blocks": found.blocks, "resumed": found.resumed, "foreign": found.foreign,
        "broken": [{"cid": cid, "code": code} for cid, code in sorted(found.broken.items())],
    }  # fmt: skip
    lines = [f"{printable(name)}: {found.blocks} blocks, {_verdict(found.broken)}"]
    lines += [f"  {cid}  {code}" for cid, code in sorted(found.broken.items())]
    lines += [f"  not a block, left alone: {printable(path)}" for path in found.foreign]
    context.out.result(data, lines)
    return exit_code_for(MeshkitError("verify_failed")) if found.broken else 0


def _share(context: Context, text: str) -> str:
    """Return the share that was named. Inside a mount, a directory of that name is not meant."""
    if "/" not in text and text not in (".", "..") and not text.startswith("~"):
        return text
    return share_path(text, mount_points(context.home)).strip("/")


def _absolute(spec: str) -> str:
    """Return a store's name that means the same in the daemon's working directory."""
    kind, colon, place = spec.partition(":")
    if kind not in ("local", "local-dev") or not colon or not place:
        return spec
    return f"{kind}:{Path(place).expanduser().absolute()}"


def _extent(item: Mapping[str, Any]) -> str:
    before = f" ({item['before']} of them before)" if item["before"] else ""
    return f"{item['blocks']} blocks of {item['versions']} versions{before}"


def _verdict(broken: Any) -> str:
    return f"{len(broken)} BROKEN" if broken else "all whole"


def _broken_lines(broken: list[dict[str, Any]]) -> list[str]:
    lines = []
    for item in broken:
        lines.append(
            f"  {item['cid']}  {item['code']}  {item['kind']}, versions {_numbers(item['versions'])}"
        )
        lines += [f"    {printable(path)}" for path in item["paths"][:_SHOWN_PATHS]]
        if len(item["paths"]) > _SHOWN_PATHS:
            lines.append(f"    and {len(item['paths']) - _SHOWN_PATHS} more")
    return lines


def _numbers(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}" if numbers else "-"
