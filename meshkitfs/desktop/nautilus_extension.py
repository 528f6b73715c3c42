"""Shows in Nautilus what state files of a meshkitfs mount are in: an emblem, and a column "MeshKit".

A copy of this file is what runs, inside the file manager, so it needs nothing but the standard library and
nautilus-python. It asks only files below a mount of meshkitfs, which answers such questions from memory.
"""

from __future__ import annotations

import os
import time
from typing import Any

try:
    from gi.repository import GObject, Nautilus
except ImportError:  # not inside a file manager: only `look` is of use
    Nautilus = None

# What is shown, the most important first: its emblem and its word in the column.
STATES = {
    "refused": ("emblem-unreadable", "refused"),
    "unsent": ("emblem-synchronizing", "not stored yet"),
    "readonly": ("emblem-readonly", "read-only"),
    "shared": ("emblem-shared", "shared"),
    "stored": ("", "stored"),
}
_KEPT_S = 2.0
_mounts: tuple[float, list[str]] = (0.0, [])


def mounts() -> list[str]:
    """Return where meshkitfs is mounted; read again every two seconds at most."""
    global _mounts
    if not _mounts[0] or time.monotonic() - _mounts[0] > _KEPT_S:
        found = []
        with open("/proc/self/mountinfo", "rb") as table:
            for line in table:
                before, _, after = line.partition(b" - ")
                if after.startswith(b"fuse.meshkitfs "):
                    point = before.split()[4].decode("unicode_escape").encode("latin-1")
                    found.append(os.fsdecode(point))
        _mounts = time.monotonic(), found
    return _mounts[1]


def look(path: str) -> str | None:
    """Return the state of ``path``, one of `STATES`; None where there is nothing to say."""
    if not any(path.startswith(point + "/") for point in mounts()):
        return None
    state = _attribute(path, "state")
    if state is None:
        return None
    rights = _attribute(path, "rights")
    # Only a share that may be opened has rights.
    if state == "quarantined" or rights is None:
        return "refused"
    if state in ("dirty", "uploading"):
        return "unsent"
    if "write" not in rights.split(","):
        return "readonly"
    # The owner is among the recipients of their own share.
    others = set((_attribute(path, "recipients") or "").split(",")) - {_attribute(path, "owner"), ""}
    return "shared" if others else "stored"


def _attribute(path: str, name: str) -> str | None:
    try:
        return os.getxattr(path, "user.meshkit." + name, follow_symlinks=False).decode(errors="replace")
    except OSError:
        return None


if Nautilus is not None:

    class MeshkitFS(GObject.GObject, Nautilus.InfoProvider, Nautilus.ColumnProvider):  # type: ignore[misc]
        """What nautilus-python looks for in this file."""

        def get_columns(self) -> list[Any]:
            return [
                Nautilus.Column(
                    name="MeshkitFS::state", attribute="meshkit_state", label="MeshKit", description="State"
                )
            ]

        def update_file_info(self, file: Any) -> None:
            place = file.get_location()
            path = place.get_path() if place is not None and file.get_uri_scheme() == "file" else None
            state = look(path) if path else None
            emblem, word = STATES[state] if state is not None else ("", "")
            if emblem:
                file.add_emblem(emblem)
            file.add_string_attribute("meshkit_state", word)
