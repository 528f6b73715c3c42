"""The mount helper: mounts for a hardened daemon of the same user, and hands /dev/fuse over.

It may do what that daemon may not, so it does little: meshkitfs mounts with fixed options, on an empty
directory of this user, named without symbolic links. A daemon that was taken over cannot hide ~/.ssh behind a
mount, nor by exchanging directories while it is at work.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
from typing import Any, Final

from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import handover, preflight

__all__ = ["main"]

_FIRST_FD: Final = 3
_REQUEST_SECONDS: Final = 10.0
_MOUNT_SECONDS: Final = 30.0
# As `mount._mount` has them. Without default_permissions the kernel would check no mode bits at all.
_OPTIONS: Final = "default_permissions,nosuid,nodev,fsname=meshkitfs,subtype=meshkitfs"


def main() -> int:
    """Answer the one request of the connection that systemd has handed over; returns the exit code."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise MeshkitError("not_supported", "the mount helper is started by systemd, through its socket")
    with socket.socket(fileno=_FIRST_FD) as sock:
        os.set_inheritable(_FIRST_FD, False)
        return _answer(sock)


def _answer(sock: socket.socket) -> int:
    sock.settimeout(_REQUEST_SECONDS)
    descriptors: list[int] = []
    try:
        if handover.peer(sock) != os.getuid():
            raise MeshkitError("mount_failed", "the mount helper works for its own user only")
        request = _request(sock.recv(handover.MESSAGE_MAX))
        answer: dict[str, Any] = {"ok": _do(request, descriptors)}
        code = 0
    except MeshkitError as error:
        answer, code = {"error": {"code": error.code, "detail": error.detail}}, 1
    try:
        # With it goes the last copy but the daemon's: when that dies, the mount is dead, and refuses.
        socket.send_fds(sock, [json.dumps(answer).encode("ascii")], descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return code


def _request(data: bytes) -> dict[str, Any]:
    try:
        request = json.loads(data)
        kinds = {"do": str, "point": str} | ({"read_only": bool} if request["do"] == "mount" else {})
        if request.keys() != kinds.keys() or any(
            type(request[key]) is not kind for key, kind in kinds.items()
        ):
            raise ValueError
        return dict(request)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MeshkitError("invalid_argument", "the mount helper does not understand") from None


def _do(request: dict[str, Any], descriptors: list[int]) -> bool:
    point = request["point"]
    if not os.path.isabs(point) or "\0" in point or preflight.resolve(point) != point:
        raise MeshkitError("mount_failed", "the mount helper wants a path without symbolic links")
    if request["do"] == "clear":
        return preflight.clear_stale(point)
    if request["do"] == "umount":
        preflight.unmount(point, lazy=True)
        return True
    if request["do"] != "mount":
        raise MeshkitError("invalid_argument", "the mount helper does not understand")
    preflight.check_system()
    preflight.check_mountpoint(point, ())
    descriptors.append(_mount_over(point, "ro" if request["read_only"] else "rw"))
    return True


def _mount_over(point: str, access: str) -> int:
    """Mount over the directory that is at ``point`` now, and over no other; returns the descriptor.

    Until it is mounted, whoever may write to where ``point`` is can put another directory there, and
    fusermount3 takes nothing but a path. So the directory is held open, and looked at again afterwards.
    """
    try:
        directory = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MeshkitError("mount_failed", f"{point}: {error.strerror}") from None
    try:
        info = os.fstat(directory)
        if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise MeshkitError("mount_failed", f"{point} must be yours, and not writable for others")
        if os.listdir(directory):
            raise MeshkitError("mountpoint_not_empty", f"{point} was exchanged meanwhile")
        before = preflight.mounts()
        descriptor = _mount(point, access)
        made = [mount for mount in preflight.mounts() if mount not in before]
        if not _covered(directory, point, made):
            os.close(descriptor)  # the mount is dead with it, wherever it is
            for mount in made:
                preflight.clear_stale(mount.path)
            raise MeshkitError("mount_failed", f"{point} was exchanged meanwhile")
    finally:
        os.close(directory)
    return descriptor


def _covered(directory: int, point: str, made: list[preflight.Mount]) -> bool:
    """Say whether one of the mounts ``made`` is over ``directory``, which was and is at ``point``."""
    return any(mount.path == point for mount in made) and os.readlink(f"/proc/self/fd/{directory}") == point


def _mount(point: str, access: str) -> int:
    """Have fusermount3 mount, which gives the descriptor of the mount over a socket of its own."""
    program = shutil.which("fusermount3")
    if program is None:
        raise MeshkitError("fusermount_missing", "fusermount3 is not on the PATH")
    ours, its = socket.socketpair()
    with ours:
        with its:
            try:
                ended = subprocess.run(
                    [program, "-o", f"{access},{_OPTIONS}", "--", point],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    pass_fds=[its.fileno()],
                    env={**os.environ, "_FUSE_COMMFD": str(its.fileno())},
                    timeout=_MOUNT_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise MeshkitError("mount_failed", "fusermount3 does not end") from None
        if ended.returncode != 0:
            raise MeshkitError("mount_failed", ended.stderr.strip() or f"fusermount3: {ended.returncode}")
        ours.settimeout(_REQUEST_SECONDS)
        _, descriptors, _, _ = socket.recv_fds(ours, 16, 4)
    if len(descriptors) != 1:
        raise MeshkitError("mount_failed", "fusermount3 gave no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
