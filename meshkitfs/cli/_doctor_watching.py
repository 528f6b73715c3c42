"""``doctor`` on what tells of a running home: metrics and notifications."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..daemon import config
from ..daemon.finding import INFO, OK, WARN, Finding

__all__ = ["examine"]


def examine(settings: config.Config, status: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is found. ``status`` is what the running daemon says of itself."""
    shown, wanted = status.get("metrics"), settings.metrics.listen
    if shown:
        yield Finding("metrics", OK, f"shown at {shown}")
    elif wanted:
        remedy = "Run 'meshkitfs umount' and mount again."
        yield Finding("metrics", WARN, f"configured at {wanted}, not shown", remedy)
    told = status.get("notifications") or {}
    if not settings.notifications.enabled:
        yield Finding("notifications", INFO, "off")
    elif told and not told.get("active"):
        yield Finding("notifications", INFO, "off: the mount was not started in a desktop session")
    elif told.get("problem"):
        remedy = "Start a notification daemon, or set 'notifications.enabled' to false."
        yield Finding("notifications", WARN, f"the last one was not shown: {told['problem']}", remedy)
    elif told:
        yield Finding("notifications", OK, f"{told.get('sent', 0)} shown")
