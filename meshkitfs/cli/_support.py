"""``support-bundle``: collect what a maintainer needs, show it, and write it only then."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import zipfile
from dataclasses import asdict
from typing import Any

from ..daemon import client, support
from ..errors import MeshkitError
from ._context import Context
from ._doctor import examine_all
from ._grammar import Adder
from ._new_file import new_file
from ._output import printable, size, table

__all__ = ["support_bundle", "support_commands"]

_STATUS_SECONDS = 10.0


def support_bundle(context: Context, args: argparse.Namespace) -> int:
    """``support-bundle``: lists what is in it; writes it after a yes, or with ``--yes``."""
    files = support.collect(
        context.home,
        _configuration(context),
        _status(context),
        [asdict(check) for check in examine_all(context)],
        names=args.names,
        hosts=args.hosts,
    )
    lines = table(("file", "size"), [(name, size(len(content))) for name, content in files.items()])
    if args.show:
        for name, content in files.items():
            lines += ["", f"== {name}", *map(printable, content.decode(errors="replace").splitlines())]
    data: dict[str, Any] = {
        "files": [{"name": name, "bytes": len(content)} for name, content in files.items()],
        "written": None,
    }
    if args.show:
        data["content"] = {name: content.decode(errors="replace") for name, content in files.items()}
    target = args.output or f"meshkitfs-support-{time.strftime('%Y%m%d-%H%M%S')}.zip"
    if not context.out.json_mode:
        context.out.result({}, lines)
        lines = []
    if args.yes or _agreed(context, target):
        _write(target, files)
        data["written"] = os.path.abspath(target)
        lines.append(f"Wrote {printable(target)}. Look at it before you give it to anybody.")
    else:
        lines.append("Nothing was written. 'support-bundle --yes' writes it, '--show' prints all of it.")
    context.out.result(data, lines)
    return 0


def _status(context: Context) -> dict[str, Any]:
    """Return what the daemon says; a home that is not mounted is not opened for this."""
    try:
        return client.ask_daemon(context.home, "status", {}, silence=_STATUS_SECONDS) or {}
    except MeshkitError as error:
        return {"errors": [{"code": error.code}]}


def _configuration(context: Context) -> dict[str, Any]:
    try:
        found = json.loads(context.home.config_path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _agreed(context: Context, target: str) -> bool:
    if context.out.json_mode or not sys.stdin.isatty():
        return False
    print(f"Write this to {printable(target)}? [y/N] ", end="", flush=True, file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _write(target: str, files: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"meshkitfs-support/{name}", content)
    with new_file(target) as file:
        file.write(packed.getvalue())


def support_commands(add: Adder) -> None:
    """Add the command to the grammar."""
    bundle = add.command(
        "support-bundle",
        support_bundle,
        "collect what a maintainer needs to know, without your names and secrets",
        "List what would be collected, and write it to a zip file after a yes, or with --yes. Versions, the\n"
        "configuration's kinds and numbers, status, doctor's findings, the end of the log. It has no file\n"
        "contents, no names of files, and no keys.",
        "meshkitfs support-bundle --show",
    )
    bundle.add_argument("--output", metavar="FILE", help="where to write it (default: here, with the time)")
    bundle.add_argument("--show", action="store_true", help="print all that is in it")
    bundle.add_argument("--yes", action="store_true", help="write it without asking")
    bundle.add_argument(
        "--names", action="store_true", help="leave in the names of shares, people and places"
    )
    bundle.add_argument("--hosts", action="store_true", help="leave in the addresses of services")
