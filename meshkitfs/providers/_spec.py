"""Naming a byte store.

``local:PATH`` on a command line, ``{"type": "local-dev", "store": PATH}`` in a configuration file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import ByteStore
from meshkitfs.providers.local import LocalStore

__all__ = ["ProviderSpec", "open_provider", "parse_provider"]

LOCAL: Final = "local-dev"  # MeshKit's type name for a store on this machine
_SHORT_NAMES: Final = {"local": LOCAL, LOCAL: LOCAL}


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """Which store is meant: MeshKit's type name and, for ``local-dev``, the absolute directory."""

    type: str
    store: Path

    def to_config(self) -> dict[str, str]:
        """The form that stands in meshkit.config.json."""
        return {"type": self.type, "store": str(self.store)}

    @classmethod
    def from_config(cls, fields: dict[str, Any], base: Path | None = None) -> ProviderSpec:
        """Read the ``provider`` object of a configuration file; a relative store is seen from ``base``.

        Raises invalid_config, naming the field.
        """
        kind = fields.get("type")
        if not isinstance(kind, str):
            raise MeshkitError("invalid_config", "provider.type is missing")
        for field in fields:
            if field not in ("type", "store"):
                raise MeshkitError(
                    "invalid_config", f"provider.{field} is unknown{_hint(field, ['type', 'store'])}"
                )
        store = fields.get("store")
        if not isinstance(store, str):
            raise MeshkitError(
                "invalid_config", "provider.store is missing: the directory that keeps the blocks"
            )
        return cls(_known(kind), _directory(store, base))


def parse_provider(text: str, base: Path | None = None) -> ProviderSpec:
    """Understand ``local:PATH`` or ``local-dev:PATH``; relative to ``base``, or to the working directory.

    Raises invalid_argument for a kind of store this version does not have, or a missing path.
    """
    kind, colon, place = text.partition(":")
    if not colon:
        raise MeshkitError("invalid_argument", f"{text!r} is not of the form local:PATH")
    try:
        return ProviderSpec(_known(kind), _directory(place, base))
    except MeshkitError as error:
        # What is wrong is what somebody typed, not a field of a file.
        raise MeshkitError("invalid_argument", f"{text!r}: {error.detail}") from None


def open_provider(spec: ProviderSpec, *, create: bool = False, absent: bool = False) -> ByteStore:
    """Open the store a spec names, making it first if ``create`` is set and there is none.

    Raises provider_request_failed when it is not there or cannot be used; with ``absent`` its requests do.
    """
    return LocalStore.open(spec.store, create=create, absent=absent)


def _known(kind: str) -> str:
    known = _SHORT_NAMES.get(kind)
    if known is None:
        raise MeshkitError(
            "invalid_config", f"provider type {kind!r} is unknown{_hint(kind, list(_SHORT_NAMES))}"
        )
    return known


def _directory(text: str, base: Path | None) -> Path:
    if not text or "\0" in text:
        raise MeshkitError("invalid_config", "provider.store is empty or not a path")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise MeshkitError("invalid_config", f"provider.store: {error}") from None
    return (base or Path.cwd()) / path


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"
