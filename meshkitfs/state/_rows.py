"""The rows of the state database, as values."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LocalCommit", "Mark", "Member", "Quarantine", "ShareRow"]


@dataclass(frozen=True, slots=True)
class ShareRow:
    """A share this home can mount: one of its own, or one that somebody granted to it.

    ``ref`` names the row: the share id of a live grant, the capsule id of a snapshot (one share can be
    held live and, beside it, as any number of snapshots). ``name`` is what the mount shows, unique in
    this home. ``kind`` is an entry kind of `core.manifest` (a directory, or a single file). ``mode`` and
    ``mtime_ns`` are what a single-file snapshot is shown with; directories carry their own.
    """

    ref: bytes
    share: bytes
    oid: bytes
    name: bytes
    kind: int
    grant: str
    owner_public: bytes
    owner_handle: str
    mine: bool
    mode: int
    mtime_ns: int
    created: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The newest signed records of a share this device has acted on; older ones are an attack.

    ``roster_seq``/``head_version`` are 0 and the hashes empty when none was seen. ``root`` is the digest
    and ``epoch`` the epoch of the head that was seen.
    """

    roster_seq: int = 0
    roster_hash: bytes = b""
    head_version: int = 0
    head_hash: bytes = b""


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody the owner of a share granted it to, with the capsule that does so.

    Rights are sorted. ``target`` is the path of a snapshot inside its share, empty for a live grant.
    ``blob`` is the signed capsule; ``signing_public`` is listed as a writer when the rights say write.
    """

    share: bytes
    handle: str
    capsule_id: bytes
    capsule_hash: bytes
    encryption_kid: bytes
    encryption_public: bytes
    signing_public: bytes
    rights: tuple[str, ...]
    not_before: int
    expires: int
    grant: str
    target: str
    policy: str
    vault: str
    capability: str
    blob: bytes
    revoked: int


@dataclass(frozen=True, slots=True)
class LocalCommit:
    """A complete tree of a share, sealed and durable on this device, waiting to be published.

    ``root`` is the digest of its root manifest, sealed for ``epoch`` and ``version``; ``base_hash`` is
    the record hash of the head it was made from (empty for a share's first) and ``base_root``,
    ``base_epoch``, ``base_version`` that head's tree, which a merge needs.
    """

    share: bytes
    root: bytes
    epoch: int
    version: int
    base_hash: bytes
    base_root: bytes
    base_epoch: int
    base_version: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A share this device refuses to read because its history went backwards or split."""

    share: bytes
    code: str
    detail: str
    since: int
