"""``vault create|list|show|add|remove|delete``."""

from __future__ import annotations

import argparse
from typing import Any

from ._context import Context
from ._grammar import Adder
from ._output import clock, count, duration, fields, printable, table

__all__ = ["vault_commands"]


def create(context: Context, args: argparse.Namespace) -> int:
    """``vault create NAME``"""
    data = context.call("vault.create", {"name": args.name})
    lines = [f"Created the vault {printable(args.name)}. Nobody is in it yet."]
    context.out.result(data, [*lines, *fields([("named to others", data.get("vault"))])])
    return 0


def list_vaults(context: Context, _args: argparse.Namespace) -> int:
    """``vault list``"""
    data = context.call("vault.list", {})
    rows = [
        [
            item["name"],
            count(len(item["members"]), "member", "members"),
            item["seq"],
            clock(item["valid_until"]),
        ]
        for item in data["vaults"]
    ]
    lines = table(("name", "members", "record", "valid until"), rows) if rows else ["There are no vaults."]
    context.out.result(data, lines)
    return 0


def show(context: Context, args: argparse.Namespace) -> int:
    """``vault show NAME``"""
    data = context.call("vault.show", {"name": args.name})
    context.out.result(data, _shown(data))
    return 0


def add(context: Context, args: argparse.Namespace) -> int:
    """``vault add NAME MEMBER``"""
    data = context.call("vault.add", {"name": args.name, "member": args.member})
    context.out.result(data, [f"{printable(args.member)} is in {printable(args.name)}."])
    return 0


def remove(context: Context, args: argparse.Namespace) -> int:
    """``vault remove NAME MEMBER``"""
    data = context.call("vault.remove", {"name": args.name, "member": args.member})
    lines = [f"{printable(args.member)} is not in {printable(args.name)} any more.", *_bites(data)]
    context.out.result(data, lines)
    return 0


def delete(context: Context, args: argparse.Namespace) -> int:
    """``vault delete NAME``"""
    data = context.call("vault.delete", {"name": args.name})
    lines = [f"Deleted the vault {printable(args.name)}: what demands it opens for nobody.", *_bites(data)]
    context.out.result(data, lines)
    return 0


def _bites(data: dict[str, Any]) -> list[str]:
    bound = data.get("bound_seconds")
    if not isinstance(bound, int | float):
        return []
    return [f"Opens that demand it fail; what is open ends within {duration(bound)}."]


def _shown(data: dict[str, Any]) -> list[str]:
    members = ", ".join(printable(member) for member in data.get("members") or ())
    return fields(
        [
            ("name", data.get("name")),
            ("named to others", data.get("vault")),
            ("members", members or "nobody"),
            ("record", data.get("seq")),
            ("valid until", clock(data.get("valid_until"))),
        ]
    )


def vault_commands(add_to: Adder) -> None:
    """Add these commands."""
    vault = add_to.group("vault", "sets of people that a grant can demand membership of")
    make = vault.command(
        "create",
        create,
        "make a vault, with nobody in it",
        "Make a set of people that 'meshkitfs share add --vault NAME' can demand membership of. Taking\n"
        "somebody out of it ends their access to everything that demands it.",
        "meshkitfs vault create team",
    )
    make.add_argument("name", metavar="NAME")
    vault.command("list", list_vaults, "list your vaults")
    shown = vault.command("show", show, "show who is in a vault, and how it is named to others")
    shown.add_argument("name", metavar="NAME")
    put = vault.command("add", add, "put someone into a vault", example="meshkitfs vault add team bob")
    put.add_argument("name", metavar="NAME")
    put.add_argument("member", metavar="MEMBER", help="a contact, or a name in the directory")
    take = vault.command(
        "remove", remove, "take someone out of a vault", example="meshkitfs vault remove team bob"
    )
    take.add_argument("name", metavar="NAME")
    take.add_argument("member", metavar="MEMBER")
    end = vault.command("delete", delete, "delete a vault: what demands it opens for nobody any more")
    end.add_argument("name", metavar="NAME")
