"""What an examination found: of a machine and its home (``doctor``), of an identity (``identity doctor``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FAIL", "INFO", "OK", "WARN", "Finding"]

OK: Final = "ok"
INFO: Final = "info"
WARN: Final = "warn"
FAIL: Final = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: ``status`` is ok, info, warn (works, but) or fail (something will not work)."""

    name: str
    status: str
    detail: str
    remedy: str = ""
