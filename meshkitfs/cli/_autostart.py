"""Commands about systemd: ``autostart install``, ``uninstall``, ``status``, and its ``mount-helper``.

Not called ``service``, which is the name of the commands for who runs a metadata service.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from ..daemon import autostart
from ..errors import MeshkitError
from ._context import Context
from ._mounting import daemon_info
from ._output import fields, printable

__all__ = ["autostart_commands"]

_WHAT: Final = ("mount", "serve")


def _units(context: Context, args: argparse.Namespace) -> autostart.Units:
    if args.what == "serve":
        return autostart.Units.of_service()
    home = context.home
    if home.config_path != type(home)(home.root).config_path:
        raise MeshkitError("not_supported", "a unit uses the configuration in its home: leave out --config")
    return autostart.Units.of_home(home)


def _install(context: Context, args: argparse.Namespace) -> int:
    if args.hardened and args.what == "serve":
        raise MeshkitError("invalid_argument", "the unit of 'serve' is hardened anyway")
    units = _units(context, args)
    if units.home is not None and not args.no_start:
        units.home.require_initialized()
        info = daemon_info(units.home)
        if info is not None and info["pid"] != autostart.status(units)["pid"]:
            where = printable(info.get("mountpoint") or "nowhere yet")
            raise MeshkitError(
                "home_busy",
                f"it is mounted at {where}, by process {info['pid']}: 'meshkitfs umount' it first",
            )
    data = autostart.install(units, hardened=args.hardened, start=not args.no_start)
    _show(context, data)
    if not data["linger"]:
        context.out.note("It starts when you log in. To have it from boot on: loginctl enable-linger")
    return 0


def _uninstall(context: Context, args: argparse.Namespace) -> int:
    _show(context, autostart.uninstall(_units(context, args)))
    return 0


def _status(context: Context, args: argparse.Namespace) -> int:
    _show(context, autostart.status(_units(context, args)))
    return 0


def _show(context: Context, data: dict[str, Any]) -> None:
    installed = "no"
    if data["installed"]:
        installed = "hardened" if data["hardened"] else "yes"
    lines = fields(
        [
            ("unit", data["unit"]),
            ("installed", installed),
            ("at login", "yes" if data["enabled"] else "no"),
            ("at boot", "yes" if data["enabled"] and data["linger"] else "no"),
            ("now", f"{data['active']} ({data['state']})"),
            ("says", data["status"]),
            ("restarts", data["restarts"] or None),
        ]
    )
    context.out.result(data, lines)


def _help_mounting(context: Context, args: argparse.Namespace) -> int:
    from ..fuse import helper

    return helper.main()


def autostart_commands(add: Any) -> None:
    """Add them to the grammar."""
    group = add.group("autostart", "have systemd mount a home, or run the metadata service, from login on")
    install = group.command(
        "install",
        _install,
        "put systemd units in place, and start them",
        "Have the systemd of your login session mount this home now and at every login, restart it after a\n"
        "crash, and end it in order. 'serve' is the metadata service in place of the mount.",
        "meshkitfs autostart install --hardened",
    )
    _what(install)
    install.add_argument(
        "--hardened", action="store_true", help="keep the daemon from everything that it does not need"
    )
    install.add_argument("--no-start", action="store_true", help="only from the next login on")
    _what(group.command("uninstall", _uninstall, "stop the units, and take them away"))
    _what(group.command("status", _status, "show the unit, and what systemd says of it"))
    add.command(
        "mount-helper",
        _help_mounting,
        "mount for a hardened daemon; systemd runs it",
        "Answer one request of a hardened daemon, on the connection that systemd hands over.",
    )


def _what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", nargs="?", choices=_WHAT, default="mount",
        help="mount (default) or serve")  # fmt: skip
