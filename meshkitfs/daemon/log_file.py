"""The file that a daemon logs into."""

from __future__ import annotations

import os
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler

__all__ = ["PrivateRotatingFile"]


class PrivateRotatingFile(RotatingFileHandler):
    """A rotating file that is 0600 from the moment it exists."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(
            self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")
