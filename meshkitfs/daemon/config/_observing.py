"""The sections about what a running home tells: ``log``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ._fields import Fields, instead

__all__ = ["LOG_FORMATS", "LogConfig"]

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
