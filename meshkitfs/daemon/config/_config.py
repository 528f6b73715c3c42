"""The whole configuration: its sections together, and what they say about each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import MeshkitError
from ._fields import Fields
from ._key_vault import KeyVaultConfig
from ._metadata import MetadataConfig
from ._observing import LogConfig, MetricsConfig, NotificationsConfig
from ._policy import PolicyConfig
from ._sections import AccessConfig, AuditConfig, MountConfig, ReleaseConfig, WritingConfig

if TYPE_CHECKING:
    from ...providers import ProviderSpec

__all__ = ["DEFAULT_IDENTITY", "FIELDS", "Config"]

VERSION: Final = 1
DEFAULT_IDENTITY: Final = "self"  # MeshKit's
# MeshKit's own, then ours.
_MESHKIT_FIELDS: Final = ("version", "appId", "identity", "provider", "policy", "persistence")
FIELDS: Final = (
    *_MESHKIT_FIELDS,
    *(
        "metadata",
        "keyVault",
        "mount",
        "writing",
        "audit",
        "access",
        "release",
        "log",
        "metrics",
        "notifications",
    ),
)
_PERSISTENCE_PLANNED: Final = ("filecoin-http",)


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration. All paths in it are absolute."""

    provider: ProviderSpec
    metadata: MetadataConfig
    key_vault: KeyVaultConfig | None = None
    identity: str = DEFAULT_IDENTITY
    app_id: str | None = None
    mount: MountConfig = field(default_factory=MountConfig)
    writing: WritingConfig = field(default_factory=WritingConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    policy: PolicyConfig | None = None
    audit: AuditConfig = field(default_factory=AuditConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    notifications: NotificationsConfig = field(default_factory=NotificationsConfig)

    @classmethod
    def read(cls, value: Any, fields: Fields) -> Config:
        """Check a whole configuration, as JSON has it, and return it. Raises ``invalid_config``."""
        top = fields.object(value, "", FIELDS)
        version = top.get("version")
        if version is None:
            fields.fail("version", "is missing (the current version is 1)")
        if type(version) is not int or version != VERSION:
            fields.fail("version", f"{version!r} is not known; this program reads version {VERSION}")
        fields.planned(top, "persistence", _PERSISTENCE_PLANNED)
        app_id, identity = fields.text(top, "appId"), fields.text(top, "identity")
        metadata = MetadataConfig.read(top.get("metadata", {"type": "embedded"}), fields)
        return cls(
            provider=_provider(top.get("provider", {"type": "local-dev"}), metadata, fields),
            metadata=metadata,
            key_vault=KeyVaultConfig.read(top["keyVault"], fields) if "keyVault" in top else None,
            identity=identity if identity is not None else DEFAULT_IDENTITY,
            app_id=app_id,
            mount=MountConfig.read(top.get("mount", {}), fields),
            writing=WritingConfig.read(top.get("writing", {}), fields),
            release=ReleaseConfig.read(top.get("release", {}), fields, metadata_url=metadata.url),
            policy=PolicyConfig.read(top["policy"], fields) if "policy" in top else None,
            audit=AuditConfig.read(top.get("audit", {}), fields),
            access=AccessConfig.read(top.get("access", {}), fields),
            log=LogConfig.read(top.get("log", {}), fields),
            metrics=MetricsConfig.read(top.get("metrics", {}), fields),
            notifications=NotificationsConfig.read(top.get("notifications", {}), fields),
        )

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form. Paths below ``base`` are written relative, so that a home can be moved."""
        result: dict[str, Any] = {"version": VERSION}
        if self.app_id is not None:
            result["appId"] = self.app_id
        result["identity"] = self.identity
        result["provider"] = self.provider.to_config(base)
        result["metadata"] = self.metadata.as_dict(base)
        if self.policy is not None:
            result["policy"] = self.policy.as_dict(base)
        if self.key_vault is not None:
            result["keyVault"] = self.key_vault.as_dict()
        sections = {
            "mount": self.mount.as_dict(base),
            "writing": self.writing.as_dict(base),
            "audit": self.audit.as_dict(base),
            "access": self.access.as_dict(base),
            "release": self.release.as_dict(base),
            "log": self.log.as_dict(base),
            "metrics": self.metrics.as_dict(base),
            "notifications": self.notifications.as_dict(base),
        }
        return result | {name: section for name, section in sections.items() if section}


def _provider(value: Any, metadata: MetadataConfig, fields: Fields) -> ProviderSpec:
    # Loaded here: commands that a running daemon answers read no configuration, and start quickly.
    from ...providers import ProviderSpec

    try:
        spec = ProviderSpec.from_config(value, fields.base)
    except MeshkitError as error:
        raise MeshkitError(error.code, f"{fields.source}: {error.detail}") from None
    for address in spec.boundaries():
        # Blocks and what is known of them belong together: read from the same boundary that wrote.
        if address.rstrip("/") != metadata.url:
            fields.fail(
                "provider.metadataApiUrl",
                f"is {address}, and this home's metadata is at {metadata.place}; they must be the same",
            )
    return spec
