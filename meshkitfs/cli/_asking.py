"""What a command asks the daemon of its home, if there is one, about the daemon itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..daemon import client
from ..daemon.home import Home

__all__ = ["daemon_info", "mount_points"]

_INFO_SECONDS: Final = 10.0


def daemon_info(home: Home) -> dict[str, Any] | None:
    """Return what the daemon of this home says of itself, or None when there is no daemon."""
    return client.ask_daemon(home, "daemon.info", {}, silence=_INFO_SECONDS)


def mount_points(home: Home) -> list[Path]:
    """Return where this home is mounted now."""
    info = daemon_info(home)
    return [Path(info["mountpoint"])] if info and info.get("mountpoint") else []
