"""Having somebody else mount: for a daemon that cannot run fusermount3 (no_new_privs).

The helper (`meshkitfs.fuse.helper`) listens on a Unix socket of the same user. One connection, one request: a
JSON object, ``{"do": "mount", "point": …, "read_only": …}`` or ``{"do": "clear"|"umount", "point": …}``. The
answer is ``{"ok": true|false}``, with the descriptor of /dev/fuse for "mount", or ``{"error": {...}}``.
This module needs no pyfuse3.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any, Final

from meshkitfs.errors import TABLE, MeshkitError

__all__ = ["MESSAGE_MAX", "VARIABLE", "clear_stale", "mount", "peer", "unmount", "wanted"]

VARIABLE: Final = "MESHKITFS_MOUNT_HELPER"
MESSAGE_MAX: Final = 16384
_ANSWER_SECONDS: Final = 60.0
_PEER: Final = struct.Struct("3i")


def wanted() -> bool:
    """Whether this process is to have its mounts made by the helper, and not to try by itself."""
    return bool(os.environ.get(VARIABLE))


def peer(sock: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    uid: int = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
    return uid


def mount(point: str, *, read_only: bool) -> int:
    """Have it mounted at ``point``; returns the descriptor of /dev/fuse. Raises what the helper says."""
    answer, descriptors = _ask({"do": "mount", "point": point, "read_only": read_only})
    if not answer.get("ok") or len(descriptors) != 1:
        _close(descriptors)
        raise MeshkitError("mount_failed", "the mount helper handed nothing over")
    return descriptors[0]


def clear_stale(point: str) -> bool:
    """Have a dead meshkitfs mount at ``point`` taken away; returns whether there was one."""
    return _plain({"do": "clear", "point": point})


def unmount(point: str) -> None:
    """Have the meshkitfs mount at ``point`` taken away, though programs use it."""
    _plain({"do": "umount", "point": point})


def _plain(request: dict[str, Any]) -> bool:
    answer, descriptors = _ask(request)
    _close(descriptors)
    return bool(answer.get("ok"))


def _ask(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    path = os.environ.get(VARIABLE, "")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(_ANSWER_SECONDS)
            sock.connect(path)
            if peer(sock) != os.getuid():
                raise MeshkitError("mount_failed", f"{path} is another user's")
            sock.send(json.dumps(request).encode("ascii"))
            data, descriptors, _, _ = socket.recv_fds(sock, MESSAGE_MAX, 4)
    except OSError as error:
        reason = error.strerror or "no answer in time"
        raise MeshkitError("mount_failed", f"the mount helper ({VARIABLE}={path}): {reason}") from None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    try:
        answer = json.loads(data)
        failure = answer.get("error")
        if failure is not None:
            code = failure["code"] if failure["code"] in TABLE else "mount_failed"
            raise MeshkitError(code, str(failure["detail"]))
    except MeshkitError:
        _close(descriptors)
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        _close(descriptors)
        raise MeshkitError("mount_failed", "the mount helper ended without an answer") from None
    return answer, descriptors


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
