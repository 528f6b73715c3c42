"""The section ``metadata``: where the metadata store is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ._fields import Fields, relative

__all__ = ["MetadataConfig"]

# The fields of a metadata service that name files.
_FILES: Final = {
    "caFile": "ca_file",
    "clientCert": "client_cert",
    "clientKey": "client_key",
    "socket": "socket",
    "joinTokenFile": "join_token_file",
}


@dataclass(frozen=True, slots=True)
class MetadataConfig:
    """The metadata store: ``embedded``, a file at ``path``; or ``http``, a service at ``url``.

    For a service: ``ca_file`` takes the place of the system's certificate authorities, ``client_cert`` and
    ``client_key`` are shown to it, ``socket`` is a Unix socket to reach it by. ``join_token_env`` or
    ``join_token_file`` say where the secret is that it asks newcomers for.
    """

    path: Path | None = None
    type: str = "embedded"
    url: str = ""
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    socket: Path | None = None
    join_token_env: str | None = None
    join_token_file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> MetadataConfig:
        """Return what the form of the ``--metadata`` option means: an http(s) address, or a file."""
        if text.startswith(("http://", "https://")):
            return cls(type="http", url=text)
        return cls(Path(os.path.abspath(os.path.expanduser(text))))

    @classmethod
    def read(cls, value: Any, fields: Fields) -> MetadataConfig:
        """Check the section, and return it."""
        kind = fields.type(value, "metadata", ("embedded", "http"))
        if kind == "embedded":
            item = fields.object(value, "metadata", ("type", "path"))
            return cls(fields.path(item, "metadata.path", "metadata.db"), kind)
        # MeshKit's word for the address is taken too.
        item = fields.object(value, "metadata", ("type", "url", "metadataApiUrl", *_FILES, "joinTokenEnv"))
        if ("url" in item) == ("metadataApiUrl" in item):
            fields.fail("metadata.url", "must be there once, under this name or as 'metadataApiUrl'")
        for one, other in (("clientCert", "clientKey"), ("clientKey", "clientCert")):
            if one in item and other not in item:
                fields.fail(f"metadata.{other}", f"is missing; it goes with '{one}'")
        if "joinTokenEnv" in item and "joinTokenFile" in item:
            fields.fail("metadata.joinTokenEnv", "and 'joinTokenFile' are two places for one secret")
        files = {
            attribute: fields.path(item, f"metadata.{name}", "")
            for name, attribute in _FILES.items()
            if name in item
        }
        return cls(
            type=kind,
            url=fields.address(item, "url" if "url" in item else "metadataApiUrl", "metadata"),
            join_token_env=fields.variable(item, "joinTokenEnv", "metadata"),
            **files,
        )

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.url or str(self.path)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form. Paths below ``base`` are written relative."""
        if self.type == "embedded":
            assert self.path is not None
            return {"type": self.type, "path": relative(self.path, base)}
        result: dict[str, Any] = {"type": self.type, "url": self.url}
        for name, attribute in _FILES.items():
            if (value := getattr(self, attribute)) is not None:
                result[name] = relative(value, base)
        if self.join_token_env is not None:
            result["joinTokenEnv"] = self.join_token_env
        return result
