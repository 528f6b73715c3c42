"""The small sections: ``mount``, ``writing``, ``audit``, ``access`` and ``release``.

Each writes only what differs from its defaults; one that has nothing to say is left out of the file.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ._fields import Fields, instead, relative

__all__ = [
    "ENFORCEMENT",
    "FSYNC",
    "AccessConfig",
    "AuditConfig",
    "MountConfig",
    "MountOptions",
    "ReleaseConfig",
    "WritingConfig",
    "default_mount_point",
]

FSYNC: Final = ("published", "journal")
# Who sees to it that a share is opened only by whom its owner means: the program of whoever opens it, or a
# release service, without which the key is not whole.
ENFORCEMENT: Final = ("client", "release")
# A proof of freshness is good for no longer; less would end with every answer that is a little late.
LEASE_LEAST: Final = 15
LEASE_MOST: Final = 300
# Less would make every larger file wait for the provider block by block.
SPOOL_LEAST: Final = 16 << 20


def default_mount_point() -> Path:
    """Return where a home is mounted when nobody says otherwise: ``~/MeshKit``."""
    return Path(os.path.expanduser("~")) / "MeshKit"


@dataclass(frozen=True, slots=True)
class MountConfig:
    """How this home is mounted. ``point`` is the directory that ``mount`` and ``umount`` mean by default."""

    point: Path = field(default_factory=default_mount_point)

    @classmethod
    def read(cls, value: Any, fields: Fields) -> MountConfig:
        """Check the section, and return it."""
        item = fields.object(value, "mount", ("point",))
        return cls(fields.path(item, "mount.point", str(default_mount_point())))

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form; the mount point is written as it is, a home that moves keeps it."""
        return {"point": str(self.point)} if self.point != default_mount_point() else {}


@dataclass(frozen=True, slots=True)
class WritingConfig:
    """What is promised to a writer, and how much may wait for the provider.

    ``fsync`` is one of `FSYNC`: it returns when the data is stored and published, or already when it is
    durable on this device. ``spool_limit`` bounds the sealed blocks that wait here, in bytes; None leaves it
    to the room on the disk.
    """

    fsync: str = FSYNC[0]
    spool_limit: int | None = None

    @classmethod
    def read(cls, value: Any, fields: Fields) -> WritingConfig:
        """Check the section, and return it."""
        item = fields.object(value, "writing", ("fsync", "spoolLimit"))
        fsync = item.get("fsync", FSYNC[0])
        if fsync not in FSYNC:
            fields.fail("writing.fsync", f"{fsync!r} is not known; {instead(FSYNC)}")
        limit = item.get("spoolLimit")
        if limit is not None and (type(limit) is not int or limit < SPOOL_LEAST):
            fields.fail("writing.spoolLimit", f"must be a number of bytes, at least {SPOOL_LEAST}")
        return cls(fsync, limit)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        result: dict[str, Any] = {}
        if self.fsync != FSYNC[0]:
            result["fsync"] = self.fsync
        if self.spool_limit is not None:
            result["spoolLimit"] = self.spool_limit
        return result


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """What this device keeps of who opened what: ``enabled`` at all, with ``names`` of files and programs."""

    enabled: bool = True
    names: bool = True
    days: int = 90

    @classmethod
    def read(cls, value: Any, fields: Fields) -> AuditConfig:
        """Check the section, and return it."""
        item = _AUDIT | fields.object(value, "audit", tuple(_AUDIT))
        for name in ("enabled", "names"):
            if not isinstance(item[name], bool):
                fields.fail(f"audit.{name}", "must be true or false")
        if type(item["days"]) is not int or not 1 <= item["days"] <= 3650:
            fields.fail("audit.days", "must be a number of days, 1 to 3650")
        return cls(**item)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: value for name, value in asdict(self).items() if value != _AUDIT[name]}


_AUDIT: Final = asdict(AuditConfig())


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """How long access goes on while nobody confirms it: ``lease_seconds``, `LEASE_LEAST` to `LEASE_MOST`."""

    lease_seconds: int = LEASE_MOST

    @classmethod
    def read(cls, value: Any, fields: Fields) -> AccessConfig:
        """Check the section, and return it."""
        item = fields.object(value, "access", ("leaseSeconds",))
        seconds = item.get("leaseSeconds", LEASE_MOST)
        if type(seconds) is not int or not LEASE_LEAST <= seconds <= LEASE_MOST:
            fields.fail("access.leaseSeconds", f"must be a number from {LEASE_LEAST} to {LEASE_MOST}")
        return cls(seconds)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form."""
        return {"leaseSeconds": self.lease_seconds} if self.lease_seconds != LEASE_MOST else {}


@dataclass(frozen=True, slots=True)
class ReleaseConfig:
    """Release services: which one this home knows beside its metadata service, and what new shares use.

    ``enforcement`` is one of `ENFORCEMENT`. ``ca_file`` takes the place of the system's certificate
    authorities for ``service``.
    """

    service: str = ""
    ca_file: Path | None = None
    enforcement: str = ENFORCEMENT[0]

    @classmethod
    def read(cls, value: Any, fields: Fields, *, metadata_url: str) -> ReleaseConfig:
        """Check the section, and return it. A home with a metadata service need not name another."""
        item = fields.object(value, "release", ("service", "caFile", "enforcement"))
        enforcement = item.get("enforcement", ENFORCEMENT[0])
        if enforcement not in ENFORCEMENT:
            fields.fail("release.enforcement", f"{enforcement!r} is not known; {instead(ENFORCEMENT)}")
        if "caFile" in item and "service" not in item:
            fields.fail("release.service", "is missing; it goes with 'caFile'")
        if enforcement == "release" and "service" not in item and not metadata_url:
            fields.fail("release.service", "is missing: which service is to hold the halves of keys?")
        return cls(
            fields.address(item, "service", "release") if "service" in item else "",
            fields.path(item, "release.caFile", "") if "caFile" in item else None,
            enforcement,
        )

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form. Paths below ``base`` are written relative."""
        result: dict[str, Any] = {}
        if self.service:
            result["service"] = self.service
        if self.ca_file is not None:
            result["caFile"] = relative(self.ca_file, base)
        if self.enforcement != ENFORCEMENT[0]:
            result["enforcement"] = self.enforcement
        return result


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What one mount is told on the command line.

    ``nonempty`` allows a mount point that has files (they are hidden while mounted); ``read_only`` makes
    every write fail with EROFS; ``fsync`` takes the place of `WritingConfig.fsync`; ``locked`` asks nobody
    for the key, and leaves everything closed until it is unlocked; ``noexec`` lets no program be run from it;
    ``log_format`` takes the place of `LogConfig.form`, ``metrics`` that of `MetricsConfig.listen`.
    """

    nonempty: bool = False
    read_only: bool = False
    fsync: str | None = None
    locked: bool = False
    noexec: bool = False
    log_format: str | None = None
    metrics: str | None = None
