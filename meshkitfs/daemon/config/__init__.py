"""``meshkit.config.json``: which stores, which key vault and which mount point a home uses.

The field names are MeshKit's where MeshKit has one (``version``, ``appId``, ``identity``, ``provider``,
``policy``, ``persistence``); ``metadata``, ``keyVault`` and ``mount`` are ours. The file holds no secrets
and has no place for one.

Reading is strict: an unknown field, a wrong type, a duplicate key or a part that is not implemented is
an error that names the field. A setting that is silently ignored is a security setting that is not there.

Each section is a dataclass that reads itself from JSON and writes itself back (``_metadata``, ``_policy``,
``_key_vault``, ``_observing``, ``_sections``); ``_config`` puts them together, ``_file`` reads and writes
the file.
"""

from __future__ import annotations

from ._config import DEFAULT_IDENTITY, FIELDS, Config
from ._file import MAX_BYTES, load, loads, save, set_key_vault
from ._key_vault import CACHE_S, KEY_VAULT_DEMANDS, KEY_VAULTS, KeyVaultConfig
from ._metadata import MetadataConfig
from ._observing import LOG_FORMATS, LogConfig, MetricsConfig, NotificationsConfig
from ._policy import PolicyConfig
from ._sections import (
    ENFORCEMENT,
    FSYNC,
    AccessConfig,
    AuditConfig,
    MountConfig,
    MountOptions,
    ReleaseConfig,
    WritingConfig,
    default_mount_point,
)

__all__ = [
    "CACHE_S",
    "DEFAULT_IDENTITY",
    "ENFORCEMENT",
    "FIELDS",
    "FSYNC",
    "KEY_VAULTS",
    "KEY_VAULT_DEMANDS",
    "LOG_FORMATS",
    "MAX_BYTES",
    "AccessConfig",
    "AuditConfig",
    "Config",
    "KeyVaultConfig",
    "LogConfig",
    "MetadataConfig",
    "MetricsConfig",
    "MountConfig",
    "MountOptions",
    "NotificationsConfig",
    "PolicyConfig",
    "ReleaseConfig",
    "WritingConfig",
    "default_mount_point",
    "load",
    "loads",
    "save",
    "set_key_vault",
]
