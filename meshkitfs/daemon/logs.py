"""The daemon's log: one line for each event, rotated, readable by its owner only, and with secrets taken out.

A line is ``key=value`` pairs (values with spaces are quoted as JSON strings)::

    time=2026-11-23T15:04:05.123Z level=warning logger=meshkitfs.gate msg="refused" code=share_revoked

Extra pairs come from ``logging``'s ``extra={"fields": {...}}``. As ``json`` it is an object in one line,
with the same pairs; see `JsonFormatter`. The redaction is the last step, over the finished text with its
traceback, or over each value of the object: no caller has to remember it, and no caller may rely on it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import TABLE, MeshkitError
from .home import Home

__all__ = ["JournalFormatter", "JsonFormatter", "LineFormatter", "redact", "setup", "setup_home"]

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
# How a share names itself in a log.
_SHARE: Final = re.compile(r"<Share ([0-9a-f]{8})>")
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
        pairs = [
            f"time={_moment(record)}",
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


class JsonFormatter(logging.Formatter):
    """Formats one record as one JSON object in one line, each value redacted.

    Always there: ``time`` (UTC), ``level``, ``logger``, ``event`` (what happened, in words that do not change
    from one time to the next) and ``message`` (the same with its particulars). Where it has one: ``code`` of
    the error table, ``share`` (the first digits of its id), ``traceback``, and the record's own fields
    under their names.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line: dict[str, Any] = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": redact(str(record.msg)),
            "message": redact(message),
        }
        args = record.args if isinstance(record.args, tuple) else ()
        code = next((arg for arg in args if isinstance(arg, str) and arg in TABLE), None)
        if code is not None:
            line["code"] = code
        if (share := _SHARE.search(message)) is not None:
            line["share"] = share[1]
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            for name, value in fields.items():
                key = redact(str(name))
                line[f"{key}_" if key in line and key != "code" else key] = _shown(str(name), value)
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        # ASCII only: a name that is not UTF-8 must not make a line that is no JSON.
        return json.dumps(line)


class JournalFormatter(LineFormatter):
    """Formats for the journal, which knows the time, and takes each line's priority from its beginning."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).partition(" ")[2]
        return "\n".join(f"<{_priority(record)}>{line}" for line in text.splitlines())


class JournalJsonFormatter(JsonFormatter):
    """The same as JSON, complete."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_priority(record)}>{super().format(record)}"


_FORMATTERS: Final[Mapping[str, Callable[[], logging.Formatter]]] = {
    "text": LineFormatter,
    "json": JsonFormatter,
}
_JOURNAL: Final[Mapping[str, Callable[[], logging.Formatter]]] = {
    "text": JournalFormatter,
    "json": JournalJsonFormatter,
}


def _priority(record: logging.LogRecord) -> int:
    return next((p for floor, p in _PRIORITIES if record.levelno >= floor), 7)


def _stderr_is_the_journal() -> bool:
    """Whether stderr is what systemd says it has connected to the journal (it may be redirected since)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        info = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return (device, inode) == (str(info.st_dev), str(info.st_ino))


def setup_home(home: Home, *, stderr: bool = False, form: str | None = None) -> None:
    """Send the log to the file of ``home``, which the caller holds, in the ``form`` that is configured there.

    ``form`` takes its place. Raises as `setup`; a configuration that cannot be used is for others to report.
    """
    if form is None:
        from . import config  # a command that a daemon answers reads no configuration

        try:
            form = config.load(home.config_path).log.form
        except MeshkitError:
            form = config.LOG_FORMATS[0]
    setup(home.log_file, stderr=stderr, form=form)


def setup(file: Path | None, *, stderr: bool = False, level: int | None = None, form: str = "text") -> None:
    """Send the log of this process to ``file`` (rotated at 2 MiB, four old ones kept) and/or to stderr.

    ``form`` is ``text`` or ``json``. Without a ``level`` it is INFO, or DEBUG where ``MESHKITFS_DEBUG`` is
    set. With neither file nor stderr, the log goes nowhere. Lines for the journal have priorities. A file is
    for whoever holds the home: two processes must not rotate one file. Calling it again replaces what the
    last call set up. Raises ``invalid_config`` when the file cannot be opened.
    """
    if level is None:
        level = logging.DEBUG if os.environ.get("MESHKITFS_DEBUG") else logging.INFO
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(
            handler.formatter, LineFormatter | JsonFormatter
        ):  # of an earlier call; others' handlers stay
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
            handlers[-1].setFormatter(_JOURNAL[form]())
    if not handlers:
        # With no handler at all, logging would print warnings to stderr, unredacted.
        handlers.append(logging.NullHandler())
    for handler in handlers:
        if handler.formatter is None:
            handler.setFormatter(_FORMATTERS[form]())
        root.addHandler(handler)
    root.setLevel(level)
    # Libraries log requests and their headers below WARNING; none of that belongs in this log.
    for name in ("httpx", "httpcore", "keyring", "asyncio", "secretstorage", "jeepney"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.raiseExceptions = False  # a full disk under the log must not write tracebacks to stderr


def _moment(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _shown(name: str, value: object) -> Any:
    """Return ``value`` of the field ``name`` for JSON: numbers as they are, everything redacted."""
    if isinstance(value, Mapping):
        return {redact(str(key)): _shown(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(name, item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    # A name such as "token" says of any value that it is none to be shown.
    text = str(value)
    hidden = _HIDDEN if redact(f"{name}=x") != f"{name}=x" else redact(text)
    return value if hidden == text and isinstance(value, int | float) else hidden


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=\\' for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)
