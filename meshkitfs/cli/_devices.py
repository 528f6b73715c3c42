"""Several devices of one identity: ``device request|approve|list|revoke``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from ..core.durations import parse_span
from ..daemon import client, logs
from ..errors import MeshkitError
from . import _joining as joining
from ._context import Context
from ._init import agreed_stores, named_metadata
from ._keyvault import seal_of
from ._output import clock, fields, printable, table
from ._people import qr_lines

if TYPE_CHECKING:
    from ._grammar import Adder

__all__ = ["device_commands"]

_HOLD_SECONDS: Final = 20.0
_CODE_MOST: Final = 512


def request(context: Context, args: argparse.Namespace) -> int:
    """``device request``: waits until another device approves the code that is shown."""
    from ..daemon import device_joining, founding

    home = context.home
    if home.initialized:
        raise MeshkitError("already_initialized", str(home.root))
    wait_s, where = parse_span(args.wait), named_metadata(context, args)
    join = joining.join(args.join_file)

    def show(code: str) -> None:
        context.out.note("Run 'meshkitfs device approve' where the identity is, and give it this code.")
        context.out.note("Show it to nobody else: whoever has it can make this device believe to be let in.")
        # Not the result, which comes when it is approved; a program that waits reads it from here.
        print(code, file=sys.stderr)
        if args.qr:
            print("\n".join(qr_lines(code, sys.stderr.isatty())), file=sys.stderr)
        sys.stderr.flush()

    with home.hold(wait=_HOLD_SECONDS):
        logs.setup(home.log_file)
        carried, device = client.run_async(
            partial(device_joining.let_in, where, join, int(time.time()), show, wait_s)
        )
        provider, metadata, kind = agreed_stores(context, args, carried.config(home.root))
        data = client.run_async(
            partial(
                founding.initialize,
                home,
                carried.identity.handle,
                provider,
                metadata,
                kind,
                context.passphrase,
                False,
                None,
                seal_of(args),
                carried,
                True,
                device,
            )
        )
    vault = data.get("key_vault") or {}
    lines = [f"This home is a device of {printable(data['handle'])} now."]
    lines += fields(
        [
            ("fingerprint", data.get("fingerprint")),
            ("home", home.root),
            ("key vault", vault.get("kind")),
            ("", vault.get("detail")),
            ("shares", len(data["shares"])),
        ]
    )
    lines.append("The other device shows the same fingerprint: if it does not, take this home away again.")
    context.out.result(data | {"home": str(home.root)}, lines)
    return 0


def approve(context: Context, args: argparse.Namespace) -> int:
    """``device approve``: the code comes from stdin, and never from an argument, which others can read."""
    if sys.stdin.isatty():
        context.out.note("The code that the new device shows:")
        code = sys.stdin.readline(_CODE_MOST)
    else:
        code = sys.stdin.read(_CODE_MOST)
    data = context.call("device.approve", {"code": code, "name": args.name, "this": args.this})
    lines = [f"'{printable(data['device'])}' is a device of {printable(data['handle'])} now."]
    lines += fields([("fingerprint", data["identity"])])
    lines.append("The new device shows the same fingerprint.")
    context.out.result(data, lines)
    return 0


def list_(context: Context, _args: argparse.Namespace) -> int:
    """``device list``"""
    data = context.call("device.list", {})
    rows = [
        [
            item["name"] + (" (this one)" if item["this"] else ""),
            clock(item["added"]),
            item["added_by"],
            item["fingerprint"],
        ]
        for item in data["devices"]
    ]
    headings = ("device", "added", "by", "fingerprint")
    context.out.result(data, table(headings, rows) if rows else ["This home is the only one."])
    return 0


def revoke(context: Context, args: argparse.Namespace) -> int:
    """``device revoke NAME``"""
    data = context.call("device.revoke", {"device": args.name})
    lines = [
        f"'{printable(data['device'])}' is no device of {printable(data['handle'])} any more.",
        "The identity has new keys, which the other devices take by themselves.",
    ]
    context.out.result(data, lines)
    return 0


def device_commands(
    add: Adder,
    stores: Callable[[argparse.ArgumentParser], None],
    join: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add them; ``stores`` and ``join`` add the options about stores, key vault and joining."""
    group = add.group("device", "several homes with your identity: add one, list them, shut one out")
    ask = group.command(
        "request",
        request,
        "make this new home a device of an identity that you have elsewhere",
        "Show a code, and wait until 'meshkitfs device approve' is given it where the identity is.\n"
        "Then this home has the identity, its contacts, and all its shares. The code goes to stderr.\n"
        "--metadata names the store that both use; the byte store is the other device's unless one is\n"
        "named.",
        "meshkitfs device request --metadata https://meta.example",
    )
    ask.add_argument("--wait", metavar="TIME", default="15m", help="for how long to wait (default: 15m)")
    ask.add_argument("--qr", action="store_true", help="show the code as a QR code too")
    stores(ask)
    join(ask)
    yes = group.command(
        "approve",
        approve,
        "let a new device have your identity, by the code that it shows",
        "Read the code that the new device shows from the terminal or stdin. It gets the keys of your\n"
        "identity, its contacts and its shares.",
        "meshkitfs device approve --name laptop",
    )
    yes.add_argument(
        "--name", metavar="NAME", help="what to call the new device (default: made from its key)"
    )
    yes.add_argument(
        "--this",
        metavar="NAME",
        help="what to call this one, if it was the only one (default: its host name)",
    )
    group.command("list", list_, "list the devices of your identity")
    no = group.command(
        "revoke",
        revoke,
        "take a device off the list, and give the identity new keys that it does not get",
        example="meshkitfs device revoke laptop",
    )
    no.add_argument("name", metavar="NAME", help="the device, as 'device list' calls it")
