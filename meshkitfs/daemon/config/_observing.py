"""The sections about what a running home tells, and to whom: ``log``, ``metrics`` and ``notifications``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import MeshkitError
from ._fields import Fields, instead

__all__ = ["LOG_FORMATS", "LogConfig", "MetricsConfig", "NotificationsConfig"]

LOG_FORMATS: Final = ("text", "json")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How the log is written: ``form`` is one of `LOG_FORMATS`."""

    form: str = LOG_FORMATS[0]

    @classmethod
    def read(cls, value: Any, fields: Fields) -> LogConfig:
        """Check the section, and return it."""
        form = fields.object(value, "log", ("format",)).get("format", LOG_FORMATS[0])
        if form not in LOG_FORMATS:
            fields.fail("log.format", f"{form!r} is not known; {instead(LOG_FORMATS)}")
        return cls(form)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        return {"format": self.form} if self.form != LOG_FORMATS[0] else {}


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Where metrics are shown: ``listen`` is ``HOST:PORT``, ``unix:PATH`` (absolute), or "" for nowhere.

    Only with ``allow_remote`` may that be an address that other machines reach.
    """

    listen: str = ""
    allow_remote: bool = False

    @classmethod
    def read(cls, value: Any, fields: Fields) -> MetricsConfig:
        """Check the section, and return it."""
        item = fields.object(value, "metrics", ("listen", "allowRemote"))
        listen, remote = item.get("listen", ""), item.get("allowRemote", False)
        if not isinstance(remote, bool):
            fields.fail("metrics.allowRemote", "must be true or false")
        if not isinstance(listen, str) or ("listen" in item and not listen):
            fields.fail("metrics.listen", "must be HOST:PORT or unix:PATH")
        if listen.startswith("unix:"):
            path = fields.path({"listen": listen.removeprefix("unix:")}, "metrics.listen", "")
            listen = f"unix:{path}"
        if listen:
            # Loaded here: it comes with what serves it, which no home without metrics needs.
            from ...net.scrape import Place

            try:
                Place.parse(listen, remote=remote)
            except MeshkitError as error:
                fields.fail("metrics.listen", f"cannot be used: {error.detail}")
        return cls(listen, remote)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        result: dict[str, Any] = {"listen": self.listen} if self.listen else {}
        return result | ({"allowRemote": True} if self.allow_remote else {})


@dataclass(frozen=True, slots=True)
class NotificationsConfig:
    """What is shown at the desktop: anything at all (``enabled``), with names of shares and people in it
    (``details``), and after how many minutes it is said that changes wait (``stuck_minutes``).
    """

    enabled: bool = True
    details: bool = False
    stuck_minutes: int = 15

    @classmethod
    def read(cls, value: Any, fields: Fields) -> NotificationsConfig:
        """Check the section, and return it."""
        item = fields.object(value, "notifications", ("enabled", "details", "stuckMinutes"))
        for name in ("enabled", "details"):
            if not isinstance(item.get(name, False), bool):
                fields.fail(f"notifications.{name}", "must be true or false")
        minutes = item.get("stuckMinutes", 15)
        if type(minutes) is not int or not 1 <= minutes <= 1440:
            fields.fail("notifications.stuckMinutes", "must be a number of minutes, 1 to 1440")
        return cls(item.get("enabled", True), item.get("details", False), minutes)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        written = {"enabled": self.enabled, "details": self.details, "stuckMinutes": self.stuck_minutes}
        usual = {"enabled": True, "details": False, "stuckMinutes": 15}
        return {name: value for name, value in written.items() if value != usual[name]}
