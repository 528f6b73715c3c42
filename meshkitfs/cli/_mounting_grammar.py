"""The grammar of ``mount``, ``umount``, ``lock`` and ``unlock``."""

from __future__ import annotations

import argparse

from ..daemon.config import FSYNC, LOG_FORMATS
from . import _locking, _mounting
from ._grammar import Adder, descriptor, timeout_option

__all__ = ["mount_commands"]


def mount_commands(add: Adder) -> None:
    mount = add.command(
        "mount",
        _mounting.mount,
        "mount your shares",
        "Mount all shares at DIR (default: mount.point of the configuration, else ~/MeshKit) and return\n"
        "when they can be used. Mounting what is mounted is harmless.",
        "meshkitfs mount ~/MeshKit",
    )
    mount.add_argument("dir", metavar="DIR", nargs="?", help="an empty directory")
    mount.add_argument("--foreground", action="store_true", help="stay in this process; Ctrl-C unmounts")
    mount.add_argument(
        "--nonempty", action="store_true", help="allow DIR to have files, which are hidden then"
    )
    mount.add_argument("--read-only", action="store_true", help="refuse every change")
    mount.add_argument("--noexec", action="store_true", help="let no program be run from the mount")
    mount.add_argument(
        "--fsync",
        choices=FSYNC,
        help="when fsync returns: stored and published, or already durable on this device "
        "(default: as configured)",
    )
    mount.add_argument(
        "--locked", action="store_true", help="come up locked, asking nobody for the key: see unlock"
    )
    mount.add_argument(
        "--log-format", choices=LOG_FORMATS, help="how the log is written (default: as configured, else text)"
    )
    mount.add_argument(
        "--metrics",
        metavar="PLACE",
        help="show metrics for Prometheus at HOST:PORT or unix:PATH (default: as configured, else nowhere)",
    )
    mount.add_argument("--ready-fd", type=descriptor, help=argparse.SUPPRESS)

    umount = add.command(
        "umount",
        _mounting.umount,
        "send what is unsent, and unmount",
        "Publish what is not published yet, unmount, and end the daemon. What cannot be published stays on\n"
        "this device, is listed, and is sent after the next mount; the exit code is 7 then.",
        "meshkitfs umount",
    )
    umount.add_argument("dir", metavar="DIR", nargs="?", help="where it is mounted (default: wherever it is)")
    umount.add_argument(
        "--force", action="store_true", help="also while programs use it; their files go dead"
    )
    umount.add_argument("--if-needed", action="store_true", help="succeed if nothing is mounted")
    timeout_option(umount, "how long to try to publish")

    add.command(
        "lock",
        _locking.lock,
        "close the mounted home without unmounting it",
        "Save what is not saved, wipe the keys from memory and have everything in the mount answer\n"
        "'permission denied' (identity_locked), open files included, until 'meshkitfs unlock'.",
        "meshkitfs lock",
    )
    add.command(
        "unlock",
        _locking.unlock,
        "open a locked home again",
        "Ask the key vault for the key again (the passphrase, or the keyring). What was open goes on.",
        "meshkitfs unlock",
    )
