"""Reading one JSON value field by field, strictly: whatever is not known, or not as it must be, is an error
that names its field. Used by every section of the configuration."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ...errors import MeshkitError

__all__ = ["Fields", "instead", "near", "relative"]


class Fields:
    """Checks values, and knows where they stand, so that a message can say so.

    Relative paths are taken from ``base``; ``source`` is what the configuration is called in messages.
    Everything raises ``invalid_config``.
    """

    def __init__(self, base: Path, source: str) -> None:
        self._base = base
        self._source = source

    @property
    def base(self) -> Path:
        """The directory that relative paths are taken from."""
        return self._base

    @property
    def source(self) -> str:
        """What the configuration is called in messages."""
        return self._source

    def fail(self, where: str, problem: str) -> NoReturn:
        """Raise ``invalid_config``: what is wrong with the field ``where`` ("": with all of it)."""
        what = f"field '{where}' {problem}" if where else problem
        raise MeshkitError("invalid_config", f"{self._source}: {what}")

    def object(self, value: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
        """Return ``value``, an object with none but these fields."""
        if not isinstance(value, dict):
            self.fail(where, "must be an object")
        for name in value:
            if name not in fields:
                place = f"{where}.{name}" if where else name
                if name in ("token", "password", "passphrase", "secret"):
                    self.fail(place, "secrets do not belong in this file")
                self.fail(place, f"is not a known field{near(name, fields)}")
        return value

    def type(self, value: Any, where: str, known: tuple[str, ...], *, planned: tuple[str, ...] = ()) -> str:
        """Return the ``type`` of the section ``value``: one of ``known``.

        Those that are ``planned`` are refused in words of their own.
        """
        if not isinstance(value, dict):
            self.fail(where, "must be an object")
        kind = value.get("type")
        if not isinstance(kind, str):
            self.fail(f"{where}.type", "must be a string" if "type" in value else "is missing")
        if kind not in known:
            what = (
                "is not implemented yet" if kind in planned else f"is not known{near(kind, known + planned)}"
            )
            self.fail(f"{where}.type", f"{kind!r} {what}; {instead(known)}")
        return kind

    def planned(self, top: Mapping[str, Any], name: str, kinds: tuple[str, ...]) -> None:
        """Refuse a section that MeshKit has and this version has not: ignoring it would open doors."""
        if name in top:
            self.type(top[name], name, (), planned=kinds)

    def text(self, item: Mapping[str, Any], name: str) -> str | None:
        """Return a short printable text; None where there is none."""
        if name not in item:
            return None
        value = item[name]
        if not isinstance(value, str) or not value or not value.isprintable():
            self.fail(name, "must be a non-empty string of printable characters")
        if len(value.encode("utf-8")) > 128:
            self.fail(name, "is longer than 128 bytes")
        return value

    def path(self, item: Mapping[str, Any], where: str, default: str) -> Path:
        """Return the path, absolute, in the last part of the name ``where``."""
        value = item.get(where.rpartition(".")[2], default)
        if not isinstance(value, str) or not value or "\0" in value:
            self.fail(where, "must be a path")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            self.fail(where, "must be a path")
        return Path(os.path.normpath(os.path.join(self._base, os.path.expanduser(value))))

    def address(self, item: Mapping[str, Any], name: str, section: str) -> str:
        """Return an http(s) address without credentials, query and fragment."""
        url, where = item[name], f"{section}.{name}"
        if not isinstance(url, str) or not url.isascii() or not url.isprintable() or len(url) > 1024:
            self.fail(where, "must be an address")
        try:
            # What else is wrong with an address, its user finds; what it may never have is checked here.
            parts = urlsplit(url)
        except ValueError:
            self.fail(where, "is not an address")
        if parts.username is not None or parts.password is not None:
            self.fail(where, "has credentials in it; secrets do not belong in this file")
        if parts.scheme not in ("https", "http") or not parts.hostname:
            self.fail(where, "must begin with https:// (http:// only on this machine)")
        if parts.query or parts.fragment:
            self.fail(where, "must end with the host or a path: no '?', no '#'")
        return url.rstrip("/")

    def variable(self, item: Mapping[str, Any], name: str, section: str) -> str | None:
        """Return the name of an environment variable; None where there is none."""
        value = item.get(name)
        if value is not None and not (isinstance(value, str) and value.isascii() and value.isidentifier()):
            self.fail(f"{section}.{name}", "must be the name of an environment variable")
        return value


def relative(path: Path, base: Path) -> str:
    """Return how ``path`` is written in a file in ``base``: relative below it, so that homes can move."""
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def near(word: str, known: tuple[str, ...]) -> str:
    """Return " (did you mean 'X'?)" when one of the known words is close, else nothing."""
    lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[match[0]]}'?)" if match else ""


def instead(known: tuple[str, ...]) -> str:
    """Return what to write in place of what was refused."""
    if not known:
        return "leave this section out"
    return "use " + " or ".join(f"'{word}'" for word in known)
