"""``capability issue|narrow|list|inspect|add|remove|revoke``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Final

from ..errors import MeshkitError
from ._colour import Tone, toned
from ._context import Context
from ._grammar import Adder, rights
from ._new_file import new_file
from ._output import ago, clock, duration, fields, printable, table

__all__ = ["capability_commands"]

_MAX_BYTES: Final = 200_000
_DEFAULT_EXPIRY: Final = "30d"
_TEXTS: Final = ("meshkit-capability", "meshkit-biscuit")  # how a token's text begins
_FORMATS: Final = ("cose", "biscuit")


def issue(context: Context, args: argparse.Namespace) -> int:
    """``capability issue NAME RECIPIENT``"""
    params = {
        "name": args.name,
        "recipient": args.recipient,
        "rights": args.rights,
        "expires": args.expires,
        "share": args.share,
        "format": args.format,
    }
    return _made(context, args, "capability.issue", params)


def narrow(context: Context, args: argparse.Namespace) -> int:
    """``capability narrow ID RECIPIENT``"""
    params = {
        "capability": args.capability,
        "recipient": args.recipient,
        "rights": args.rights,
        "expires": args.expires,
        "share": args.share,
    }
    return _made(context, args, "capability.narrow", params)


def _made(context: Context, args: argparse.Namespace, method: str, params: dict[str, Any]) -> int:
    """Make a token and put it where it was asked for: into the recipient's mailbox, a new file, or stdout."""
    place = args.out
    if place is None:
        data = context.call(method, params | {"send": True})
        lines = [f"Sent a token to {printable(args.recipient)}.", *_shown(data)]
        context.out.result(data, lines)
        return 0
    if place == "-":
        data = context.call(method, params | {"send": False})
        context.out.result(data, [data["text"]])
        return 0
    with new_file(place) as file:
        data = context.call(method, params | {"send": False})
        file.write(f"{data.pop('text')}\n".encode())
    lines = [f"Wrote a token for {printable(args.recipient)} to {printable(place)}.", *_shown(data)]
    context.out.result(data | {"file": os.path.abspath(place)}, lines)
    return 0


def list_tokens(context: Context, _args: argparse.Namespace) -> int:
    """``capability list``: also takes in what others have sent."""
    data = context.call("capability.list", {})
    held = [
        [item["id"], item["name"], ", ".join(item["rights"]), clock(item["expires"]), item["token"]]
        for item in data["held"]
    ]
    issued = [
        [
            item["token"],
            item["name"],
            item["recipient"],
            ", ".join(item["rights"]),
            clock(item["expires"]),
            toned(f"revoked {clock(item['revoked'])}", Tone.BAD) if item["revoked"] else "",
        ]
        for item in data["issued"]
    ]
    lines = ["Held here:", *table(("id", "name", "rights", "expires", "token"), held)] if held else []
    if issued:
        lines += [""] if lines else []
        lines += ["Issued:", *table(("token", "name", "for", "rights", "expires", ""), issued)]
    context.out.result(data, lines or ["There are no capability tokens."])
    return 0


def inspect(context: Context, args: argparse.Namespace) -> int:
    """``capability inspect ID|FILE|-``"""
    place = args.capability
    if place == "-" or os.path.exists(place) or os.sep in place or place.startswith(_TEXTS):
        data = context.call("capability.inspect", {"text": _read(place)})
    else:
        data = context.call("capability.inspect", {"capability": place})
    rows = [
        [
            "issued" if number == 0 else f"narrowed {number}",
            ", ".join(block["rights"]),
            block["share"] or "any",
            clock(block["expires"]),
            block["holder"],
        ]
        for number, block in enumerate(data["chain"])
    ]
    lines = [
        *_shown(data),
        *fields([("for you", "yes" if data["mine"] else "no"), ("issuer", data["issuer"])]),
    ]
    lines += ["", *table(("block", "rights", "share", "expires", "holder"), rows)]
    context.out.result(data, lines)
    return 0


def add(context: Context, args: argparse.Namespace) -> int:
    """``capability add FILE``"""
    data = context.call("capability.add", {"text": _read(args.file)})
    context.out.result(data, ["Added.", *_shown(data)])
    return 0


def remove(context: Context, args: argparse.Namespace) -> int:
    """``capability remove ID``"""
    data = context.call("capability.remove", {"capability": args.capability})
    context.out.result(data, [f"Forgot the token {printable(data['id'])} of {printable(data['name'])}."])
    return 0


def revoke(context: Context, args: argparse.Namespace) -> int:
    """``capability revoke TOKEN``"""
    data = context.call("capability.revoke", {"token": args.issued})
    lines = [
        f"Revoked {printable(data['token'])}, and whatever was made from it.",
        f"Opens that rest on it fail; what is open ends within {duration(data['bound_seconds'])}.",
    ]
    context.out.result(data, lines)
    return 0


def _read(place: str) -> str:
    if place == "-":
        return sys.stdin.read(_MAX_BYTES)
    if place.startswith(_TEXTS):
        raise MeshkitError("invalid_argument", "a token comes in a file, or with '-' on standard input")
    try:
        with open(place, "rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{place}: {error.strerror}") from None


def _shown(data: dict[str, Any]) -> list[str]:
    return fields(
        [
            ("id", data.get("id")),
            ("capability", data.get("name")),
            ("rights", ", ".join(data.get("rights") or ())),
            ("share", data.get("share") or "any that demands it"),
            ("expires", ago(data.get("expires"))),
            ("format", data.get("format")),
        ]
    )


def capability_commands(add_to: Adder) -> None:
    """Add these commands; ``rights`` parses a list of rights."""
    group = add_to.group("capability", "tokens that a grant can demand, which can be narrowed and passed on")
    make = group.command(
        "issue",
        issue,
        "make a token, and send it",
        "Make a token of the capability NAME for RECIPIENT, and put it into their mailbox. A share that was\n"
        "granted with 'share add --capability NAME' opens for those who hold one, for what it allows. It is\n"
        "of use to nobody but its holder, who can narrow it and pass it on without asking you.",
        "meshkitfs capability issue editors bob --rights read,write --expires 30d",
    )
    make.add_argument("name", metavar="NAME")
    make.add_argument("recipient", metavar="RECIPIENT", help="a contact, or a name in the directory")
    make.add_argument(
        "--rights", metavar="LIST", type=rights, default=["read"], help="as in 'share add' (default: read)"
    )
    make.add_argument(
        "--expires",
        metavar="WHEN",
        default=_DEFAULT_EXPIRY,
        help=f"as in 'share add' (default: {_DEFAULT_EXPIRY})",
    )
    make.add_argument(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="biscuit: for programs that read Biscuits, and homes with that part installed (default: cose)",
    )
    _common(make)
    less = group.command(
        "narrow",
        narrow,
        "make of a token one that allows less, and send it",
        "Make a token that allows less, or the same, of one that you hold, for RECIPIENT: somebody else, or\n"
        "yourself. What is not given stays as it is. It can never allow more.",
        "meshkitfs capability narrow 4f0c carol --rights read --expires 1d",
    )
    less.add_argument("capability", metavar="ID", help="from 'meshkitfs capability list'")
    less.add_argument("recipient", metavar="RECIPIENT", help="a contact, or a name in the directory")
    less.add_argument("--rights", metavar="LIST", type=rights, help="as in 'share add'")
    less.add_argument("--expires", metavar="WHEN", help="as in 'share add'")
    _common(less)
    group.command(
        "list", list_tokens, "list the tokens you hold and have issued; takes in what was sent to you"
    )
    look = group.command("inspect", inspect, "show what a token allows, and through whose hands it went")
    look.add_argument(
        "capability", metavar="ID|FILE", help="a token you hold, a file with one, or - for stdin"
    )
    take = group.command(
        "add", add, "keep a token that somebody gave you", example="meshkitfs capability add from-alice"
    )
    take.add_argument("file", metavar="FILE", help="the file with the token, or - for stdin")
    drop = group.command("remove", remove, "forget a token that you hold")
    drop.add_argument("capability", metavar="ID", help="from 'meshkitfs capability list'")
    end = group.command(
        "revoke",
        revoke,
        "take back a token that you issued, with all that was made from it",
        example="meshkitfs capability revoke 91ab",
    )
    end.add_argument("issued", metavar="TOKEN", help="from 'meshkitfs capability list', under Issued")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--share", metavar="SHARE", help="good for this share only (default: any that demands it)"
    )
    command.add_argument(
        "--out", metavar="FILE", help="write it to a new file, or - for stdout, and send nothing"
    )
