"""The daemon's log: one line for each event, rotated, readable by its owner only, and with secrets taken out.

A line is ``key=value`` pairs (values with spaces are quoted as JSON strings)::

    time=2026-11-23T15:04:05.123Z level=warning logger=meshkitfs.gate msg="refused" code=share_revoked

Extra pairs come from ``logging``'s ``extra={"fields": {...}}``. The redaction is the last step, over the
finished text with its traceback: no caller has to remember it, and no caller may rely on it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import MeshkitError

__all__ = ["JournalFormatter", "LineFormatter", "redact", "setup"]

MAX_BYTES: Final = 2 * 1024 * 1024
BACKUPS: Final = 4
_HIDDEN: Final = "[redacted]"
# From which level on a line has which priority of syslog (3: error, 4: warning, 6: information).
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

# What must stay readable: a raw sha2-256 CID is 59 characters of base32, a did:key is base58.
_PUBLIC: Final = re.compile(r"(?:bafkrei[a-z2-7]{52}|z6Mk[1-9A-HJ-NP-Za-km-z]{44})\Z")
_NAMED: Final = re.compile(
    r"(?i)\b(passphrase|password|passwd|secret|token|authorization|wrapping_key|private_key|api_key)"
    r"(\"?\s*[=:]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}\]]+)"
)
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[0-9A-Za-z._~+/=-]{8,}")
_HEX: Final = re.compile(r"(?<![0-9A-Za-z])(?:0x)?[0-9a-fA-F]{40,}(?![0-9A-Za-z])")
_BASE64_PADDED: Final = re.compile(r"(?<![0-9A-Za-z+/_-])[0-9A-Za-z+/_-]{32,}={1,2}")
_BASE64: Final = re.compile(r"(?<![0-9A-Za-z+/_-])[0-9A-Za-z+_-]{40,}(?![0-9A-Za-z+_-])")
_BYTES: Final = re.compile(r"\bb(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")")


def redact(text: str) -> str:
    """Return ``text`` with everything that looks like a key, a token or a passphrase replaced.

    Long hexadecimal, long base64 and reprs of raw bytes go; CIDs, did:keys, 16-byte ids and paths stay.
    Where it cannot tell, it hides: a log line that lost a file name can be repaired, a leaked key cannot.
    """
    text = _BYTES.sub(lambda match: _HIDDEN if match[0].count("\\x") >= 4 else match[0], text)
    text = _BEARER.sub(lambda match: f"{match[1]} {_HIDDEN}", text)
    text = _NAMED.sub(lambda match: f"{match[1]}{match[2]}{_HIDDEN}", text)
    text = _HEX.sub(_HIDDEN, text)
    text = _BASE64_PADDED.sub(_HIDDEN, text)
    return _BASE64.sub(_hide_unless_public, text)


def _hide_unless_public(match: re.Match[str]) -> str:
    run = match[0]
    if _PUBLIC.match(run):
        return run
    # A random value of this length has all three kinds of characters; a long word or rule has not.
    mixed = any(c.isdigit() for c in run) and any(c.islower() for c in run) and any(c.isupper() for c in run)
    return _HIDDEN if mixed else run


class LineFormatter(logging.Formatter):
    """Formats one record as one ``key=value`` line (tracebacks follow, indented) and redacts the result."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = [
            f"time={moment}.{int(record.msecs):03d}Z",
            f"level={record.levelname.lower()}",
            f"logger={record.name}",
            f"msg={_quoted(record.getMessage())}",
        ]
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            pairs += [f"{name}={_quoted(value)}" for name, value in fields.items()]
        text = " ".join(pairs)
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            text += "\n" + "\n".join(f"    {line}" for line in trace.splitlines())
        return redact(text)


class JournalFormatter(LineFormatter):
    """Formats for the journal, which knows the time, and takes each line's priority from its beginning."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).partition(" ")[2]
        level = next((p for floor, p in _PRIORITIES if record.levelno >= floor), 7)
        return "\n".join(f"<{level}>{line}" for line in text.splitlines())


def _stderr_is_the_journal() -> bool:
    """Whether stderr is what systemd says it has connected to the journal (it may be redirected since)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


def setup(file: Path | None, *, stderr: bool = False, level: int | None = None) -> None:
    """Send the log of this process to ``file`` (rotated at 2 MiB, four old ones kept) and/or to stderr.

    Without a ``level`` it is INFO, or DEBUG where ``MESHKITFS_DEBUG`` is set. With neither file nor stderr,
    the log goes nowhere. Lines for the journal have priorities. A file is for whoever holds the home: two
    processes must not rotate one file. Calling it again replaces what the last call set up. Raises
    ``invalid_config`` when the file cannot be opened.
    """
    if level is None:
        level = logging.DEBUG if os.environ.get("MESHKITFS_DEBUG") else logging.INFO
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler.formatter, LineFormatter):  # of an earlier call; others' handlers stay
            root.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = []
    if file is not None:
        try:
            from .log_file import PrivateRotatingFile  # only who holds the home writes a file

            handlers.append(PrivateRotatingFile(file, maxBytes=MAX_BYTES, backupCount=BACKUPS))
        except OSError as error:
            raise MeshkitError("invalid_config", f"log file {file}: {error.strerror}") from error
    if stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
        if _stderr_is_the_journal():
            handlers[-1].setFormatter(JournalFormatter())
    if not handlers:
        # With no handler at all, logging would print warnings to stderr, unredacted.
        handlers.append(logging.NullHandler())
    for handler in handlers:
        if handler.formatter is None:
            handler.setFormatter(LineFormatter())
        root.addHandler(handler)
    root.setLevel(level)
    # Libraries log requests and their headers below WARNING; none of that belongs in this log.
    for name in ("httpx", "httpcore", "keyring", "asyncio", "secretstorage", "jeepney"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.raiseExceptions = False  # a full disk under the log must not write tracebacks to stderr


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=\\' for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)
