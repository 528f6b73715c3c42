"""What a maintainer needs to know of a home, without what is nobody's business.

`collect` returns files by name. Only fields that are named here are taken from the configuration and the
status, so that what is added to those later stays out until somebody has thought about it. Names of shares,
people and places are replaced in every text, and what looks like a secret is taken out last.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .. import __version__
from .home import Home
from .logs import redact

__all__ = ["collect"]

LOG_LINES: Final = 400
_OUT: Final = "[left out]"
_PACKAGES: Final = (
    "apsw-sqlite3mc", "cbor2", "cryptography", "h11", "http-message-signatures", "httpx", "jeepney",
    "keyring", "multiformats", "prometheus-client", "pyfuse3", "SecretStorage", "trio",
)  # fmt: skip
# Strings of the configuration that are shown: kinds of things, none of them a name or a place.
_CONFIG_SHOWN: Final = frozenset({"type", "fsync", "format"})
_CONFIG_PLACES: Final = frozenset({"url", "endpoint"})
_STATUS_SHOWN: Final = frozenset({"counters", "pending", "fsync", "spool", "locked", "rotation"})
_SHARE_SHOWN: Final = (
    "kind", "grant", "mine", "rights", "expires", "version", "epoch", "state", "reason", "entries",
    "members",
)  # fmt: skip
_LEFT_SHOWN: Final = (
    "state", "blocks", "bytes", "unsaved", "arrived", "arrived_bytes", "age_seconds", "reason",
)  # fmt: skip
_VAULT_SHOWN: Final = (
    "kind", "available", "persistent", "exportable", "hardware_backed", "user_presence", "locked", "fallback",
)  # fmt: skip
_NOTIFICATIONS_SHOWN: Final = ("active", "details", "sent", "failed", "dropped")
_SOURCE_SHOWN: Final = ("served", "failed", "wrong", "barred")
# Findings of the doctor whose text names nothing of the home.
_FINDINGS_SHOWN: Final = frozenset(
    {"python", "pyfuse3", "kernel", "/dev/fuse", "fusermount3", "clock", "unsent", "notifications"}
)
_URL: Final = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^/?\s\"',;)]+)([/?][^\s\"',;)]*)?")
_PATH: Final = re.compile(r"(?<![\w.~:/])(?:~|\$HOME)?/(?:[^\s\"'/,;:)]+/)*[^\s\"'/,;:)]+")


def collect(
    home: Home,
    settings: Mapping[str, Any],
    status: Mapping[str, Any],
    checks: Iterable[Mapping[str, Any]],
    *,
    names: bool = False,
    hosts: bool = False,
) -> dict[str, bytes]:
    """Return the files of a support bundle.

    ``settings`` is the configuration as JSON, ``status`` what the daemon says of itself (empty without one),
    ``checks`` the findings of ``doctor``. With ``names`` names and places stay in, with ``hosts`` the
    addresses of services.
    """
    veil = _Veil(home, status, names=names, hosts=hosts)
    files: dict[str, Any] = {
        "about.json": {
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "names": "included" if names else "replaced",
            "hosts": "included" if hosts else "left out",
        },
        "versions.json": _versions(),
        "config.json": _config(settings, "", names=names, hosts=hosts),
        "status.json": _status(status, names=names) if status else {"daemon": "not running"},
        "doctor.json": [_finding(check, names=names) for check in checks],
        "mounts.json": _mounts(),
    }
    made = {
        name: veil.over(json.dumps(value, indent=2, sort_keys=True)).encode() + b"\n"
        for name, value in files.items()
    }
    made["log.txt"] = veil.over_log(_log(home)).encode(errors="backslashreplace")
    return made


class _Veil:
    """Takes names, places and secrets out of a text."""

    def __init__(self, home: Home, status: Mapping[str, Any], *, names: bool, hosts: bool) -> None:
        self._hosts = hosts
        self._names = names
        known: dict[str, str] = {}
        if not names:
            known |= {str(home.root): "HOME", str(status.get("mountpoint") or ""): "MOUNTPOINT"}
            known |= {str(Path.home()): "~"}
            shares = status.get("shares") or []
            known |= {str(share["name"]): f"share-{i}" for i, share in enumerate(shares, 1)}
            people = [status.get("identity"), *(share.get("owner") for share in shares)]
            known |= {str(who): f"person-{i}" for i, who in enumerate(dict.fromkeys(filter(None, people)), 1)}
        # The longest first: one may be a part of another. JSON spells some characters otherwise.
        spelled = {json.dumps(text)[1:-1]: alias for text, alias in known.items()} | known
        self._known = sorted(
            ((text, alias) for text, alias in spelled.items() if len(text) > 1 and text != "/"),
            key=lambda pair: -len(pair[0]),
        )

    def over(self, text: str) -> str:
        for known, alias in self._known:
            # As a whole word: a share may be called "in".
            text = re.sub(rf"(?<![\w-]){re.escape(known)}(?![\w-])", alias, text)
        text = _URL.sub(self._address, text)
        if not self._names:
            text = _PATH.sub(lambda match: match[0] if match[0] in ("/dev/fuse",) else "/PATH", text)
        return redact(text)

    def over_log(self, text: str) -> str:
        """The same for a log, in which a line that is JSON stays JSON."""
        lines = text.splitlines(keepends=True)
        if not any(line.startswith("{") for line in lines):
            return self.over(text)
        return "".join(map(self._line, lines))

    def _line(self, line: str) -> str:
        try:
            value = json.loads(line)
        except ValueError:
            return self.over(line)
        return json.dumps(self._within(value)) + "\n"

    def _within(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {self.over(key): self._within(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._within(item) for item in value]
        return self.over(value) if isinstance(value, str) else value

    def _address(self, match: re.Match[str]) -> str:
        host = match[2].rpartition("@")[2] if self._hosts else "HOST"
        rest = (match[3] if self._names else "/PATH") if match[3] else ""
        return match[1] + host + rest


def _versions() -> dict[str, Any]:
    from importlib import metadata  # other commands do without it

    found: dict[str, Any] = {
        "meshkitfs": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _mounts() -> list[dict[str, str]]:
    """Return the options of this program's mounts, as the kernel has them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "fuse.meshkitfs":
            found.append({"mount": before.split()[5], "filesystem": options})
    return found


def _config(value: Any, name: str, *, names: bool, hosts: bool) -> Any:
    """Return the configuration with every text left out that is not known to be harmless."""
    if isinstance(value, Mapping):
        return {key: _config(item, key, names=names, hosts=hosts) for key, item in value.items()}
    if isinstance(value, list):
        return [_config(item, name, names=names, hosts=hosts) for item in value]
    if not isinstance(value, str) or name in _CONFIG_SHOWN:
        return value
    if name in _CONFIG_PLACES and hosts:
        parts = urlsplit(value)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    return value if names and name in ("identity", "path", "point") else _OUT


def _status(status: Mapping[str, Any], *, names: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {key: status[key] for key in _STATUS_SHOWN if key in status}
    shown["metrics"] = bool(status.get("metrics"))
    shown["notifications"] = _some(status.get("notifications") or {}, _NOTIFICATIONS_SHOWN)
    shown["mounted"] = bool(status.get("mountpoint"))
    shown["key_vault"] = _some(status.get("key_vault") or {}, _VAULT_SHOWN)
    shown["sources"] = [_some(source, _SOURCE_SHOWN) for source in status.get("sources") or []]
    metadata = status.get("metadata") or {}
    shown["metadata"] = _some(metadata, ("type", "feed", "problem"))
    extra = ("name", "owner") if names else ()
    numbers = {share["name"]: i for i, share in enumerate(status.get("shares") or [], 1)}
    shown["shares"] = [
        {"share": numbers[share["name"]]} | _some(share, (*_SHARE_SHOWN, *extra))
        for share in status.get("shares") or []
    ]
    shown["left"] = [
        {"share": numbers.get(item.get("share"))} | _some(item, _LEFT_SHOWN)
        for item in status.get("left") or []
    ]
    shown["errors"] = [
        _some(item, ("time", "code", *(("path", "detail") if names else ())))
        for item in status.get("errors") or []
    ]
    return shown


def _some(value: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value}


def _finding(check: Mapping[str, Any], *, names: bool) -> dict[str, Any]:
    name = str(check["name"])
    if names:
        return _some(check, ("name", "status", "detail"))
    if name.startswith("share "):
        return {"name": "share", "status": check["status"]}
    return {"name": name, "status": check["status"]} | (
        {"detail": check["detail"]} if name in _FINDINGS_SHOWN else {}
    )


def _log(home: Home) -> str:
    """Return the last lines of the log, over the change to a new file if need be."""
    lines: list[str] = []
    for path in (home.log_file, home.log_file.with_name(home.log_file.name + ".1")):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        lines = text.splitlines(keepends=True)[len(lines) - LOG_LINES :] + lines
        if len(lines) >= LOG_LINES:
            break
    return "".join(lines[-LOG_LINES:])
