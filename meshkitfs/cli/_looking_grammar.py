"""The grammar of the commands that look, and of those that look back: ``status``, ``history``, ``doctor``."""

from __future__ import annotations

from typing import Final

from . import _doctor, _history, _inspect, _providers
from ._grammar import Adder, number, timeout_option

__all__ = ["look_commands", "past_commands"]

DEFAULT_LIMIT: Final = 20


def past_commands(add: Adder) -> None:
    history = add.command(
        "history",
        _history.history,
        "show the versions in which a path changed",
        "Show the versions in which PATH changed: when, by whom, and how. It need not be there any more.\n"
        "The versions themselves are in SHARE/.snapshots, which is not listed.",
        "meshkitfs history ~/MeshKit/photos/beach.jpg",
    )
    history.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    history.add_argument(
        "--limit",
        metavar="N",
        type=number,
        default=DEFAULT_LIMIT,
        help=f"the newest N of them; 0 for all (default: {DEFAULT_LIMIT})",
    )
    restore = add.command(
        "restore",
        _history.restore,
        "bring back a file or directory as it was",
        "Bring back PATH as it was in an earlier version, into the share of now. A file gets its old\n"
        "content; in a directory, what changed or is missing comes back, and what is newer stays. What is\n"
        "replaced stays in the history. WHEN is a version (v12), a time (2026-11-25,\n"
        "2026-11-25T03:53Z: the newest version at its end, UTC), or how long ago (2h, 3d).",
        "meshkitfs restore photos/trip --at 2d",
    )
    restore.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    restore.add_argument("--at", metavar="WHEN", required=True, help="which version: v12, a time, or 3d")
    restore.add_argument("--to", metavar="NEWPATH", help="bring it back to this free place in the same share")
    restore.add_argument(
        "--exact",
        action="store_true",
        help="PATH is a whole share: what the version did not have goes. Works also if the newest version "
        "cannot be read any more",
    )


def look_commands(add: Adder) -> None:
    status = add.command(
        "status",
        _inspect.status,
        "show the mount, the shares, what is unsent and recent refusals",
        example="meshkitfs status --watch",
    )
    status.add_argument(
        "--watch",
        action="store_true",
        help="go on showing it as it changes, until q or Ctrl-C; not on a terminal, print what changes",
    )
    sync = add.command("sync", _inspect.sync, "publish what is unsent")
    timeout_option(sync, "how long to try")
    explain = add.command(
        "explain",
        _inspect.explain,
        "show every check that decides whether a path may be opened",
        example="meshkitfs explain ~/MeshKit/photos/beach.jpg",
    )
    explain.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    doctor = add.command(
        "doctor",
        _doctor.doctor,
        "check this machine, this home and its stores",
        "Check this machine, this home and its stores. Asks for no passphrase and changes nothing, unless\n"
        "told to reset the clock: forget the latest time this device has seen, after its clock was wrong.",
    )
    doctor.add_argument(
        "--reset-clock", action="store_true", help="the clock was wrong before; it is right now"
    )
    doctor.add_argument(
        "--trust-service",
        action="store_true",
        help="take the key that the metadata service shows now; ask whoever runs it first",
    )
    providers = add.group("providers", "the byte store that this home uses")
    test = providers.command(
        "test",
        _providers.test,
        "try the byte store out, and say what is wrong with it",
        "Store a probe block at the byte store of this home, or of SPEC, read it, delete it, and see what\n"
        "else the store can do. Needs no passphrase and no mount.",
        "meshkitfs providers test s3:https://s3.example.org/team-blocks",
    )
    test.add_argument("spec", metavar="SPEC", nargs="?", help="(default: as configured)")
    add.command("version", _inspect.version, "print the version")
