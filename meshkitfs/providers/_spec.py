"""Naming a byte store: ``local:PATH`` on a command line, ``{"type": "s3", ...}`` in a configuration file."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from meshkitfs.errors import MeshkitError
from meshkitfs.providers._api import ByteStore
from meshkitfs.providers._options import ENVIRONMENT, PATH, Form, Options, _json_name, hint, wrong

__all__ = ["KINDS", "SPEC", "SPECS", "ProviderSpec", "open_provider", "parse_provider", "shareable"]

# MeshKit's type names, and the `Options` class of each. A module is loaded only when its type is named: a
# store on this machine needs no HTTP client.
KINDS: Final[dict[str, str]] = {
    "local-dev": "meshkitfs.providers.local:LocalOptions",
    "s3": "meshkitfs.providers.s3:S3Options",
    "gateway-retrieval": "meshkitfs.providers.gateway:GatewayOptions",
    "fallback": "meshkitfs.providers.fallback:FallbackOptions",
    "ipfs-http": "meshkitfs.providers.ipfs:HttpIpfsOptions",
    "ipfs-cluster": "meshkitfs.providers.ipfs_cluster:ClusterOptions",
    "pinning-service": "meshkitfs.providers.pinning:PinningOptions",
}
# Fields that say who one is, or how careful: everybody decides on these alone.
_OWN: Final = frozenset({"username", "profile", "allowInsecure"})
_SHORT_NAMES: Final = {"local": "local-dev", "ipfs": "ipfs-http"}


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """Which store is meant: MeshKit's type name, and what the options of that type say."""

    type: str
    options: Options

    @classmethod
    def local(cls, directory: str | Path) -> ProviderSpec:
        """Return the spec of a store in a directory of this machine (absolute)."""
        return cls("local-dev", _options("local-dev").read({"store": str(directory)}, "provider", Path("/")))

    @classmethod
    def from_config(cls, value: Any, base: Path, where: str = "provider") -> ProviderSpec:
        """Check the provider object at ``where``; relative paths in it are seen from ``base``.

        Raises invalid_config, naming the field.
        """
        if not isinstance(value, dict):
            wrong(where, "must be an object")
        kind = value.get("type")
        if not isinstance(kind, str):
            wrong(f"{where}.type", "must be a string" if "type" in value else "is missing")
        if kind not in KINDS:
            known = " or ".join(repr(name) for name in KINDS)
            wrong(f"{where}.type", f"{kind!r} is not known{hint(kind, KINDS)}; use {known}")
        fields = {name: item for name, item in value.items() if name != "type"}
        return cls(kind, _options(kind).read(fields, where, base))

    def boundaries(self) -> set[str]:
        """Return the metadata services that this provider, or a part of it, says its blocks belong to."""
        return self.options.boundaries()

    def directories(self) -> list[Path]:
        """Return the directories of this machine that keep blocks."""
        return self.options.directories()

    def to_config(self, base: Path = Path("/")) -> dict[str, Any]:
        """Return the form that stands in meshkit.config.json; paths below ``base`` are relative."""
        return {"type": self.type, **self.options.as_dict(base)}


def shareable(spec: ProviderSpec) -> dict[str, Any] | None:
    """Return what others need to use the same store, in the form of a configuration; None if they cannot.

    Only where it is, and how it is addressed: no credentials, nor where they are, nothing of this machine,
    and no permission to be less careful.
    """
    options = spec.options
    if options.local:
        return None
    found: dict[str, Any] = {"type": spec.type}
    written = options.as_dict(Path("/"))
    for field in dataclasses.fields(options):
        name, form = _json_name(field.name), field.metadata["form"]
        if name not in written or form in (PATH, ENVIRONMENT) or name in _OWN:
            continue
        value = getattr(options, field.name)
        parts = (value,) if form is SPEC else value if form is SPECS else ()
        inner = [shareable(part) for part in parts]
        if None in inner:
            return None
        found[name] = written[name] if not parts else inner if form is SPECS else inner[0]
    return found


def parse_provider(text: str, base: Path | None = None) -> ProviderSpec:
    """Understand the short form ``TYPE:PLACE``; a path is relative to ``base``, or the working directory.

    Raises invalid_argument for a kind of store this version does not have, or a place that is none.
    """
    kind, colon, place = text.partition(":")
    if not colon:
        raise MeshkitError("invalid_argument", f"{text!r} is not of the form local:PATH")
    name = _SHORT_NAMES.get(kind, kind)
    if name not in KINDS:
        near = hint(kind, (*_SHORT_NAMES, *KINDS))
        raise MeshkitError("invalid_argument", f"provider type {kind!r} is unknown{near}")
    try:
        return ProviderSpec(name, _options(name).parse(place, base or Path.cwd()))
    except MeshkitError as error:
        # What is wrong is what somebody typed, not a field of a file. It is not repeated: there may be a
        # password in an address.
        raise MeshkitError("invalid_argument", f"provider {kind}: {error.detail}") from None


async def open_provider(spec: ProviderSpec, *, create: bool = False, absent: bool = False) -> ByteStore:
    """Open the store that a spec names; end it with `ByteStore.aclose`, in the same run of trio.

    With ``create`` it is being set up: a store of this machine is made if there is none, a remote one has to
    answer. Otherwise a remote store that is away now opens all the same, and with ``absent`` so does one of
    this machine: its requests fail then.
    Raises provider_request_failed, provider_http_error, invalid_config.
    """
    return await (spec.options.open_absent() if absent else spec.options.open(create=create))


def _options(kind: str) -> type[Options]:
    module, _, name = KINDS[kind].partition(":")
    return cast("type[Options]", getattr(importlib.import_module(module), name))


def _specs(value: Any, where: str, base: Path) -> tuple[ProviderSpec, ...]:
    if not isinstance(value, list) or not value:
        wrong(where, "must be a list of providers")
    return tuple(ProviderSpec.from_config(item, base, f"{where}[{i}]") for i, item in enumerate(value))


def _spec(value: Any, where: str, base: Path) -> ProviderSpec:
    return ProviderSpec.from_config(value, base, where)


# A field that holds a provider, or several.
SPEC: Final[Form[ProviderSpec]] = Form(_spec, ProviderSpec.to_config)
SPECS: Final[Form[tuple[ProviderSpec, ...]]] = Form(
    _specs, lambda specs, base: [spec.to_config(base) for spec in specs]
)
