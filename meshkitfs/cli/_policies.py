"""Commands around policies: ``policy create|list|show|test|edit|delete``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any, Final

from ..errors import MeshkitError, exit_code_for
from ._colour import meaning
from ._context import Context
from ._grammar import Adder
from ._output import clock, count, duration, fields, printable, table, utc

__all__ = ["policy_commands"]

_MAX_BYTES: Final = 65536


def create(context: Context, args: argparse.Namespace) -> int:
    """``policy create NAME [FILE] [--member NAME ...] [--expires WHEN]``"""
    data = context.call("policy.create", {"name": args.name, **_content(args)})
    lines = [f"Created the policy {printable(data['name'])}: {_rules(data)}."]
    lines.append(f"'meshkitfs share add SHARE WHO --policy {printable(data['name'])}' demands it.")
    context.out.result(data, lines)
    return 0


def list_policies(context: Context, _args: argparse.Namespace) -> int:
    """``policy list``"""
    data = context.call("policy.list", {})
    rows = [
        [item["name"], len(item["rules"]), item["grants"], clock(item["changed"])]
        for item in data["policies"]
    ]
    lines = table(("name", "rules", "grants", "changed"), rows) if rows else ["There are no policies."]
    if data["provider"]:
        lines += ["", f"Other names are asked of {printable(data['provider'])}."]
    context.out.result(data, lines)
    return 0


def show(context: Context, args: argparse.Namespace) -> int:
    """``policy show NAME``"""
    data = context.call("policy.show", {"name": args.name})
    lines = fields([("changed", clock(data["changed"])), ("rules", _rules(data))])
    lines += ["", *(printable(line) for line in data["text"].splitlines()), ""]
    rows = [[item["handle"], item["share"], item["path"] or "/"] for item in data["recipients"]]
    lines += table(("recipient", "share", "path"), rows) if rows else ["No grant demands it."]
    context.out.result(data, lines)
    return 0


def test(context: Context, args: argparse.Namespace) -> int:
    """``policy test NAME WHO``: exit 0 when it was decided, whatever the decision is."""
    params = {"name": args.name, "identity": args.identity, "action": args.action, "at": args.at}
    data = context.call("policy.test", params)
    rows = [
        [item["action"], meaning("allow" if item["allow"] else "deny"), item["reason"]]
        for item in data["decisions"]
    ]
    lines = [f"{printable(data['name'])} for {printable(data['identity'])} at {utc(data['at'])}:"]
    context.out.result(data, lines + table(("action", "decision", "because"), rows, fold=("because",)))
    return 0


def edit(context: Context, args: argparse.Namespace) -> int:
    """``policy edit NAME [FILE] ...``: exit as the first grant that could not be made anew."""
    data = context.call("policy.edit", {"name": args.name, **_content(args)})
    name = printable(data["name"])
    lines = [f"Changed the policy {name}: {_rules(data)}."]
    if data["renewed"]:
        made = count(data["renewed"], "grant demands", "grants demand")
        lines.append(
            f"{made} it as it is now. Opens see it at once; what is open ends within "
            f"{duration(data['bound_seconds'])}."
        )
    for item in data["ended"]:
        lines.append(
            f"The snapshot {printable(item['share'])}/{printable(item['path'])} for "
            f"{printable(item['handle'])} was taken back; grant it again if it is still meant."
        )
    for item in data["failed"]:
        lines.append(
            f"{printable(item['share'])}: still demands it as it was: {printable(item['message'])} "
            f"Run the same command again."
        )
    context.out.result(data, lines)
    return exit_code_for(MeshkitError(data["failed"][0]["code"])) if data["failed"] else 0


def delete(context: Context, args: argparse.Namespace) -> int:
    """``policy delete NAME``"""
    data = context.call("policy.delete", {"name": args.name})
    context.out.result(data, [f"Deleted the policy {printable(data['name'])}."])
    return 0


def _content(args: argparse.Namespace) -> dict[str, Any]:
    rules = "" if args.file is None else _read(args.file)
    if args.file is not None and not rules.strip():
        raise MeshkitError("policy_invalid", f"{args.file} is empty")
    return {"rules": rules, "members": args.member, "expires": args.expires}


def _read(place: str) -> str:
    try:
        if place == "-":
            data = sys.stdin.buffer.read(_MAX_BYTES)
        else:
            with open(place, "rb") as file:
                data = file.read(_MAX_BYTES)
        return data.decode("utf-8")
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{place}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MeshkitError("policy_invalid", f"{place} is not UTF-8") from None


def _rules(data: Mapping[str, Any]) -> str:
    return count(len(data["rules"]), "rule", "rules")


def policy_commands(add: Adder) -> None:
    """Add these commands."""
    policy = add.group("policy", "rules that decide at every open whether a grant may be used")
    make = policy.command(
        "create",
        create,
        "make a policy of rules, or of members",
        "Make a policy from rules in FILE (Cedar), or one that lets only its members in. Grants demand it\n"
        "with 'share add --policy NAME'. Rules that are wrong are refused with line and column.",
        "meshkitfs policy create team --member bob --expires 30d",
    )
    _content_options(make)
    policy.command("list", list_policies, "list your policies")
    _name(policy.command("show", show, "show the rules of a policy, and which grants demand it"))
    trial = policy.command(
        "test",
        test,
        "say what a policy would decide, and by which rule",
        "Decide about a made-up grant to WHO, by the rules or by the configured provider. Nothing is opened.",
        "meshkitfs policy test team bob --action read",
    )
    _name(trial)
    trial.add_argument("identity", metavar="WHO", help="a contact, or any name that the rules use")
    trial.add_argument("--action", metavar="ACTION", help="list, read or write (default: each of them)")
    trial.add_argument("--at", metavar="TIME", help="as if it were then: 2026-12-01T07:30Z (default: now)")
    change = policy.command(
        "edit",
        edit,
        "replace the rules or members of a policy",
        "Replace what a policy says, and have every grant that demands it demand the new rules. It reaches\n"
        "recipients as a revocation does. Snapshots that demand it are taken back.",
        "meshkitfs policy edit team --member bob --member carol",
    )
    _content_options(change)
    _name(policy.command("delete", delete, "delete a policy that no grant demands"))


def _name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def _content_options(parser: argparse.ArgumentParser) -> None:
    _name(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="the rules, or - for stdin")
    parser.add_argument(
        "--member", metavar="WHO", action="append", help="instead of rules: who may; may be given again"
    )
    parser.add_argument(
        "--expires", metavar="WHEN", help="with --member: when it ends, as in 'share add' (default: never)"
    )
