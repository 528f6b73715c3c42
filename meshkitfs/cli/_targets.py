"""What a person may write for a place in a share, and how it becomes ``SHARE/path/in/share``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["mounted_at", "past_path", "share_path"]


def mounted_at(path: str, points: Sequence[Path]) -> str | None:
    """Return ``path`` relative to the mount point it is under, or None when it is under none.

    Purely by name: a path that the gate refuses, or whose daemon is dead, must not be touched to learn
    that it is ours.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    # The directory above is resolved (a home may be reached through a link), the last name is not.
    parent = os.path.realpath(os.path.dirname(absolute)) if _outside(absolute, points) else ""
    candidates = [absolute, os.path.join(parent, os.path.basename(absolute))] if parent else [absolute]
    for candidate in candidates:
        for point in points:
            if candidate != str(point) and Path(candidate).is_relative_to(point):
                return os.path.relpath(candidate, point)
    return None


def share_path(text: str, points: Sequence[Path]) -> str:
    """Return ``SHARE[/path]`` for what was typed.

    An absolute or ``~`` path below a mount point is that place. A relative one is a path only if it
    exists (someone working inside the mount); otherwise it is already ``SHARE[/path]``.
    """
    if text.startswith(("/", "~", "./", "../")) or os.path.lexists(text):
        inside = mounted_at(text, points)
        if inside is not None:
            return inside
    return text


def past_path(text: str, points: Sequence[Path]) -> str:
    """As `share_path`, for a place that may not be there any more.

    So a relative one is a path whenever someone works inside the mount.
    """
    try:
        here = mounted_at(os.path.join(os.getcwd(), "x"), points)
    except FileNotFoundError:
        here = None  # the working directory is gone
    if here is not None and not text.startswith(("/", "~")):
        text = os.path.join(os.getcwd(), text)
    return share_path(text, points)


def _outside(absolute: str, points: Sequence[Path]) -> bool:
    return not any(Path(absolute).is_relative_to(point) for point in points)
