"""``doctor`` on the places of a home: the mount point, room on the disks, and the times of its files."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..daemon import config
from ..daemon.finding import FAIL, INFO, OK, WARN, Finding
from ..daemon.home import Home
from ..errors import MeshkitError
from ..fuse import preflight
from ._output import clock, size

__all__ = ["clock_of", "mount_point", "space"]

_LOW_SPACE: Final = 256 * 1024 * 1024
# Less than this has no room for one block of 1 MiB, its place in the spool, and the databases' journals.
_NO_SPACE: Final = 4 * 1024 * 1024
# As `state` lets a clock be behind the time that it has shown already.
_TOLERANCE_S: Final = 120


def space(name: str, path: Path) -> Finding:
    """Say how much room there is at ``path``, and what its lack means."""
    free = shutil.disk_usage(path).free
    if free >= _LOW_SPACE:
        return Finding(name, OK, f"{size(free)} free")
    remedy = f"Free some space on the disk of {path}; 'df {path}' shows which that is."
    if free >= _NO_SPACE:
        return Finding(name, WARN, f"{size(free)} free: writing will soon be refused (ENOSPC)", remedy)
    detail = f"{size(free)} free: writing is refused (ENOSPC), what was acknowledged stays"
    return Finding(name, FAIL, detail, remedy)


def clock_of(home: Home) -> Iterator[Finding]:
    """Compare this device's clock with when the home was written last; nothing if that is in the past.

    The floor under the clock is sealed in the home and cannot be read without its key.
    """
    try:
        written = home.state_db.stat().st_mtime
        # While the home is open, what is written last is in the database's log.
        with contextlib.suppress(FileNotFoundError):
            log = home.state_db.with_name(f"{home.state_db.name}-wal").stat()
            written = log.st_mtime if log.st_size else written
    except OSError:
        return
    now = time.time()
    if now < written - _TOLERANCE_S:
        yield Finding(
            "clock",
            WARN,
            f"it says {clock(now)}, and this home was written at {clock(written)}: behind a time that it has "
            "shown, every share stays closed (clock_rollback)",
            MeshkitError("clock_rollback").remedy,
        )


def mount_point(home: Home) -> Iterator[Finding]:
    """Say what is at the configured mount point, and whether a mount could be made there."""
    try:
        settings = config.load(home.config_path)
    except MeshkitError:  # told by the check of the home
        point, state = config.default_mount_point(), [home.root]
    else:
        point, state = settings.mount.point, [home.root, *settings.provider.directories()]
    mount = preflight.find(preflight.resolve(point))
    if mount is None:
        yield _free(point, state)
    elif preflight.is_stale(point):
        detail = f"{point} is the mount of a dead daemon: everything in it fails with ENOTCONN"
        remedy = f"Run 'meshkitfs umount {point}' (or '... mount', which clears it by itself where it may)."
        yield Finding("mount point", FAIL, detail, remedy)
    elif mount.fstype != preflight.FSTYPE:
        detail = f"{point} is a mount of type {mount.fstype}: nothing can be mounted there as well"
        remedy = "Choose another, as 'meshkitfs mount DIR' or 'mount.point' in the configuration."
        yield Finding("mount point", WARN, detail, remedy)
    else:
        yield Finding("mount point", OK, f"{point} is mounted")
    for other in preflight.mounts():
        if other.path != preflight.resolve(point) and preflight.is_stale(other.path):
            remedy = f"Run 'meshkitfs umount {other.path}'."
            yield Finding("stale mount", WARN, f"{other.path} is the mount of a dead daemon", remedy)


def _free(point: Path, state: list[Path]) -> Finding:
    """Say whether a mount could be made at ``point``, where none is."""
    if not os.path.lexists(point):
        # 'meshkitfs mount' makes the configured one.
        return Finding("mount point", INFO, f"{point}: does not exist yet")
    try:
        preflight.check_mountpoint(point, state)
    except MeshkitError as error:
        return Finding("mount point", WARN, f"{error.detail}: {error.reason.sentence}", error.remedy)
    return Finding("mount point", INFO, f"{point}: not mounted")
