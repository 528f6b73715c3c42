"""``mount.fuse.meshkitfs``: what mount(8) runs for ``-t fuse.meshkitfs HOME DIR`` and for /etc/fstab."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..errors import MeshkitError, exit_code_for
from ._main import main
from ._output import Output

__all__ = ["mount_fstab"]

# Of mount(8), and of whoever reads the table: they say nothing to us.
_OTHERS: Final = frozenset(
    {
        "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail",
        "nosuid", "nodev", "relatime", "noatime", "dev", "suid", "exec",
    }
)  # fmt: skip
_PASSED: Final = {"ro": "--read-only", "noexec": "--noexec", "nonempty": "--nonempty", "locked": "--locked"}


def mount_fstab(argv: Sequence[str] | None = None) -> int:
    """Mount the home SOURCE at DIR as the home's owner, and return the exit code.

    An option that is not known is refused: it may have been meant to forbid something.
    """
    parser = argparse.ArgumentParser(prog="mount.fuse.meshkitfs", description="Run by mount(8).")
    parser.add_argument("source", metavar="HOME")
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS")
    for flag in "sfnv":
        parser.add_argument(f"-{flag}", dest=flag, action="store_true")
    parser.add_argument("-t", dest="type")
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        options = _options(",".join(args.options))
        if not os.path.isabs(args.source):
            raise MeshkitError("invalid_argument", "the first field is the home, as an absolute path")
        if args.f:  # mount --fake: all but the mounting
            return 0
        _become_owner(Path(args.source))
    except MeshkitError as error:
        Output(json_mode=False).failure(error)
        return exit_code_for(error)
    return main(["--home", args.source, "mount", *options, "--", args.dir])


def _options(text: str) -> list[str]:
    found = []
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if item in _PASSED:
            found.append(_PASSED[item])
        elif name == "fsync":
            found += ["--fsync", value]
        elif item not in _OTHERS and not name.lower().startswith(("x-", "comment", "user")):
            raise MeshkitError("invalid_argument", f"mount option '{item}'")
    return found


def _become_owner(home: Path) -> None:
    """Give up root for the owner of ``home``, with that user's environment."""
    if os.geteuid() != 0:
        return
    try:
        owner = pwd.getpwuid(home.stat().st_uid)
    except OSError as error:
        raise MeshkitError("not_initialized", f"{home}: {error.strerror}") from None
    except KeyError:
        raise MeshkitError("invalid_config", f"{home} belongs to nobody who is known here") from None
    for name in [name for name in os.environ if name.startswith(("XDG_", "DBUS_", "MESHKIT", "SUDO_"))]:
        del os.environ[name]
    os.environ |= {"HOME": owner.pw_dir, "USER": owner.pw_name, "LOGNAME": owner.pw_name}
    if owner.pw_uid != 0:
        os.initgroups(owner.pw_name, owner.pw_gid)
        os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
        os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)
    os.chdir("/")
