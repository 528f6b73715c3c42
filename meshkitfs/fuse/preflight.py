"""Looking at a mount point before and after: clear answers instead of the kernel's.

Nothing here touches a mounted filesystem unless it has to, and then not without a time limit: a mount
whose daemon hangs would hang the caller too. What is mounted is read from /proc/self/mountinfo. This
module needs no pyfuse3, so that it can say what is missing where pyfuse3 cannot be installed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from meshkitfs.errors import MeshkitError

__all__ = [
    "FSTYPE",
    "Mount",
    "check_mountpoint",
    "check_system",
    "clear_stale",
    "find",
    "is_ours",
    "is_stale",
    "mounts",
    "resolve",
    "sever",
    "unmount",
]

FSTYPE = "fuse.meshkitfs"
_DEVICE = "/dev/fuse"
_HELPER = "fusermount3"
_ANSWER_SECONDS = 5.0
_UNMOUNT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table. ``device`` is the "major:minor" that stat() reports for its files."""

    path: str
    source: str
    fstype: str
    device: str


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _mount_table() -> list[Mount]:
    """Return every mount this process can see, the topmost of several at one place last."""
    table = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            place, kind = before.split(" "), after.split(" ")
            table.append(Mount(_unescape(place[4]), _unescape(kind[1]), kind[0], place[2]))
    return table


def mounts() -> list[Mount]:
    """Return the meshkitfs mounts of this machine that this process can see."""
    return [mount for mount in _mount_table() if mount.fstype == FSTYPE]


def resolve(path: str | os.PathLike[str]) -> str:
    """Return ``path`` absolute and without symbolic links, not touching what is mounted right there."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    plain = os.path.join(os.path.realpath(parent), name)
    return plain if find(plain) else os.path.realpath(absolute)


def find(place: str) -> Mount | None:
    """Return what is mounted exactly at ``place`` (a resolved path), of any type; the topmost of several.

    Only reads the mount table: safe also for a mount that nobody answers for yet, or any more.
    """
    found = None
    for mount in _mount_table():
        if mount.path == place:
            found = mount
    return found


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Say whether exactly at ``path`` a meshkitfs is mounted (dead or alive)."""
    mount = find(resolve(path))
    return mount is not None and mount.fstype == FSTYPE


def is_stale(path: str | os.PathLike[str]) -> bool:
    """Say whether a FUSE filesystem is mounted at ``path`` whose daemon has died."""
    place = resolve(path)
    mount = find(place)
    return mount is not None and mount.fstype.startswith("fuse") and _probe(place) == errno.ENOTCONN


def _probe(path: str) -> int | None:
    """Return the errno with which statvfs(path) answers, 0 for success, None for no answer in time.

    statvfs and not stat: the kernel may still answer stat from its cache when the daemon is long dead.
    """
    answers: list[int] = []

    def ask() -> None:
        try:
            os.statvfs(path)
            answers.append(0)
        except OSError as error:
            answers.append(error.errno or errno.EIO)

    # A thread, because a filesystem that does not answer cannot be interrupted, only left behind.
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(_ANSWER_SECONDS)
    return answers[0] if answers else None


def check_system() -> None:
    """Raise MeshkitError where this machine or user cannot mount at all.

    ``fuse_missing``: no usable /dev/fuse. ``fusermount_missing``: an ordinary user needs fusermount3,
    and it is not installed or cannot get the rights it needs.
    """
    try:
        if not stat.S_ISCHR(os.stat(_DEVICE).st_mode):
            raise MeshkitError("fuse_missing", f"{_DEVICE} is not a device")
        # Also for those who mount through fusermount3: libfuse tries it itself first, and gives up.
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise MeshkitError("fuse_missing", f"{_DEVICE}: {error.strerror}") from None
    if os.geteuid() == 0:
        return
    helper = shutil.which(_HELPER)
    if helper is None:
        raise MeshkitError("fusermount_missing", f"{_HELPER} is not on the PATH")
    if not os.stat(helper).st_mode & stat.S_ISUID:
        raise MeshkitError("fusermount_missing", f"{helper} is not set-user-ID root")
    if _no_new_privileges():
        raise MeshkitError(
            "fusermount_missing", f"this process runs with no_new_privs, so {helper} gets no rights"
        )


def _no_new_privileges() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in lines)


def check_mountpoint(
    path: str | os.PathLike[str], state_dirs: Iterable[str | os.PathLike[str]], nonempty: bool = False
) -> str:
    """Return ``path`` resolved if a mount may be made there, else raise MeshkitError saying why not.

    ``state_dirs`` are the directories that hold our own state (home, block store): the mount point may
    be neither in one of them nor around one, or the filesystem would wait for itself. ``nonempty``
    permits a directory with files in it, which the mount will hide. Codes: ``mountpoint_missing``,
    ``mountpoint_stale``, ``mountpoint_busy``, ``mountpoint_inside_state``, ``mountpoint_not_empty``,
    ``mount_failed`` (no permission).
    """
    place = resolve(path)
    mount = find(place)
    if mount is not None:
        if is_stale(place):
            raise MeshkitError("mountpoint_stale", f"{place} ({mount.fstype})")
        raise MeshkitError("mountpoint_busy", f"{place} is a mount of type {mount.fstype}")
    try:
        is_directory = stat.S_ISDIR(os.stat(place).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise MeshkitError("mountpoint_missing", f"{place} does not exist") from None
    except OSError as error:
        raise MeshkitError("mount_failed", f"{place}: {error.strerror}") from None
    if not is_directory:
        raise MeshkitError("mountpoint_missing", f"{place} is not a directory")
    for directory in state_dirs:
        state = os.path.realpath(directory)
        if _contains(state, place):
            raise MeshkitError("mountpoint_inside_state", f"{place} is inside {state}")
        if _contains(place, state):
            raise MeshkitError("mountpoint_inside_state", f"{state} is inside {place}")
    if not nonempty:
        _check_empty(place)
    return place


def _contains(outer: str, inner: str) -> bool:
    return os.path.commonpath((outer, inner)) == outer


def _check_empty(place: str) -> None:
    try:
        with os.scandir(place) as entries:
            first = next(entries, None)
    except OSError as error:
        raise MeshkitError("mount_failed", f"{place}: {error.strerror}") from None
    if first is not None:
        raise MeshkitError("mountpoint_not_empty", f"{place} contains {first.name!r}")


def clear_stale(path: str | os.PathLike[str]) -> bool:
    """Take away a dead meshkitfs mount at ``path``; return whether there was one.

    A living mount and anybody else's are left alone. Raises ``mountpoint_stale`` if the dead mount
    cannot be taken away.
    """
    place = resolve(path)
    if not is_ours(place) or not is_stale(place):
        return False
    try:
        # Lazy: a program that still has a file of the dead mount open would hold it otherwise.
        unmount(place, lazy=True)
    except MeshkitError as error:
        raise MeshkitError("mountpoint_stale", f"{place}: {error.detail}") from None
    return True


def sever(mount: Mount) -> None:
    """Cut the connection between the kernel and ``mount``'s daemon: every call waiting in it fails now.

    The last resort against a mount that hangs. Nothing is raised; where neither way is open to this
    user, nothing happens.
    """
    minor = mount.device.rpartition(":")[2]
    try:
        with open(f"/sys/fs/fuse/connections/{minor}/abort", "w", encoding="ascii") as abort:
            abort.write("1")
    except OSError:
        subprocess.run(
            ["umount", "--no-canonicalize", "--force", "--lazy", "--", mount.path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


def unmount(path: str | os.PathLike[str], lazy: bool = False) -> None:
    """End the meshkitfs mount at ``path``; ``lazy`` only detaches it while programs still use it.

    Raises ``not_mounted`` if none of ours is there, ``mountpoint_busy`` if a program is using it,
    ``fusermount_missing`` without the program to do it, ``mount_failed`` for anything else.
    """
    place = resolve(path)
    mount = find(place)
    if mount is None or mount.fstype != FSTYPE:
        raise MeshkitError("not_mounted", place)
    helper = shutil.which(_HELPER)
    if helper is not None:
        command = [helper, "-u", *(["-z"] if lazy else []), "--", place]
    elif os.geteuid() == 0:
        command = ["umount", "--no-canonicalize", *(["--lazy"] if lazy else []), "--", place]
    else:
        raise MeshkitError("fusermount_missing", f"{_HELPER} is not on the PATH")
    try:
        # LC_ALL=C: which failure it was can only be told from the message.
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_UNMOUNT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeshkitError("mount_failed", f"{place}: {error}") from None
    if ended.returncode == 0:
        return
    why = ended.stderr.strip()
    if "busy" in why.lower():
        raise MeshkitError("mountpoint_busy", f"a program is using {place}")
    if find(place) is None:
        return  # somebody else was faster
    raise MeshkitError("mount_failed", why or f"{command[0]} ended with {ended.returncode}")
