"""What the tests that make mount namespaces have in common: letting go of others' mounts, and where the code lies.

A new namespace has a copy of every mount, and where ``/`` is private nobody takes it away again when the mount is
ended outside. The kernel then keeps the connection, and a daemon of another test, whose mount has been ended by
`fusermount3 -u`, lives on as long as the namespace does. So each of them begins with `LET_GO`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from homes import HERE, usable_python

# A shell command. Lazy, without a look at the mount: its daemon may be stopped.
LET_GO = "umount -a -l -i -t fuse.meshkitfs"
# Where the code and its environment are in there: a clone may lie below /tmp, which a hardened unit does not see, or
# in a directory that is closed to others.
TREE = "/srv/tree"
VENV = "/srv/venv" if sys.prefix != sys.base_prefix else sys.prefix
_PARTS = ("meshkitfs", "systemd", "tests")


def copy_tree(place: Path) -> None:
    """Copy the code that is tested to ``place``, readable for everybody."""
    for part in _PARTS:
        shutil.copytree(
            HERE.parent / part, place / part, ignore=shutil.ignore_patterns("__pycache__", "vectors")
        )
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def python_there(prefix: list[str]) -> tuple[list[str], str]:
    """As `usable_python`, for a program that runs where the code is at `TREE` and the environment at `VENV`."""
    return usable_python(prefix, TREE, VENV)
