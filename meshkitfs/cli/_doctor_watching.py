"""``doctor`` on what tells of a running home: metrics and notifications."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..daemon import config

__all__ = ["examine"]


def examine(settings: config.Config, status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield findings: what, status (ok, info, warn), what was found, what to do.

    ``status`` is what the running daemon says of itself.
    """
    shown, wanted = status.get("metrics"), settings.metrics.listen
    if shown:
        yield "metrics", "ok", f"shown at {shown}", ""
    elif wanted:
        yield (
            "metrics",
            "warn",
            f"configured at {wanted}, not shown",
            "Run 'meshkitfs umount' and mount again.",
        )
    told = status.get("notifications") or {}
    if not settings.notifications.enabled:
        yield "notifications", "info", "off", ""
    elif told and not told.get("active"):
        yield "notifications", "info", "off: the mount was not started in a desktop session", ""
    elif told.get("problem"):
        remedy = "Start a notification daemon, or set 'notifications.enabled' to false."
        yield "notifications", "warn", f"the last one was not shown: {told['problem']}", remedy
    elif told:
        yield "notifications", "ok", f"{told.get('sent', 0)} shown", ""
