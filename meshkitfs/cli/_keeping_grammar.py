"""The grammar of the commands that keep a store small and whole; see `_grammar`."""

from __future__ import annotations

import argparse
from typing import Final

from . import _keeping
from ._grammar import Adder

__all__ = ["keeping_commands"]

DEFAULT_GRACE: Final = "7d"
_UNITS: Final = {
    "hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years",
}  # fmt: skip


def keeping_commands(add: Adder) -> None:
    """Add ``prune``, ``gc``, ``verify`` and ``repair``."""
    prune = add.command(
        "prune",
        _keeping.prune,
        "give up old versions of a share by rule",
        "Keep the newest version of each of the last N hours, days, weeks, months or years that have any\n"
        "(UTC), and give up the others. All rules together decide; the newest version always stays. This\n"
        "deletes nothing: 'meshkitfs gc' does, and leaves alone what granted snapshots need.",
        "meshkitfs prune photos --keep-daily 14 --keep-monthly 24 --dry-run",
    )
    prune.add_argument("share", metavar="SHARE")
    prune.add_argument("--keep-last", metavar="N", type=_count, help="the N newest versions")
    for unit, what in _UNITS.items():
        prune.add_argument(
            f"--keep-{unit}",
            metavar="N",
            type=_count,
            help=f"one for each of the last N {what} that have any",
        )
    prune.add_argument(
        "--keep-within", metavar="DURATION", help="all of so long before the newest: 12h, 30d, 8w"
    )
    prune.add_argument("--dry-run", action="store_true", help="only show what would be given up")
    gc = add.command(
        "gc",
        _keeping.gc,
        "delete the blocks that only given-up versions of a share need",
        "Delete from the byte store what only versions need that 'prune' gave up. Without --yes it only\n"
        "says what that is. If anything that is kept cannot be read, nothing is deleted.",
        "meshkitfs gc photos --yes",
    )
    gc.add_argument("share", metavar="SHARE")
    gc.add_argument(
        "--grace",
        metavar="DURATION",
        default=DEFAULT_GRACE,
        help="leave versions alone that were given up less than this ago: somebody who was offline may have "
        f"unsent work based on them (default: {DEFAULT_GRACE})",
    )
    gc.add_argument("--yes", action="store_true", help="delete")
    verify = add.command(
        "verify",
        _keeping.verify,
        "check every block of shares, or of a whole store",
        "Fetch every block of every kept version, check its hash, and open it under its key for its place.\n"
        "With --store, check every block of a store against its name: that needs no key, home or identity.\n"
        "Exits with 6 if something is broken.",
        "meshkitfs verify photos",
    )
    verify.add_argument("shares", metavar="SHARE", nargs="*", help="(default: all shares)")
    verify.add_argument(
        "--versions", choices=("all", "live"), default="all", help="every kept version, or the newest alone"
    )
    verify.add_argument(
        "--resume", action="store_true", help="go on with a run that was cut off or found something broken"
    )
    verify.add_argument("--store", metavar="local:DIR", help="check this store instead, without keys")
    verify.add_argument(
        "--cursor", metavar="FILE", help="with --store: keep there how far it came, and go on from there"
    )
    repair = add.command(
        "repair",
        _keeping.repair,
        "fetch what 'verify' found broken from another copy of the store",
        "Store again what is missing or damaged, from this device's spool or another copy of the byte\n"
        "store, and verify again. Exits with 6 if something is still broken.",
        "meshkitfs repair photos --from local:/mnt/backup/blocks",
    )
    repair.add_argument("share", metavar="SHARE")
    repair.add_argument(
        "--from",
        dest="sources",
        metavar="local:DIR",
        action="append",
        required=True,
        help="a store that has copies; may be given again",
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 up")
    return int(text)
