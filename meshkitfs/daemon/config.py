"""``meshkit.config.json``: which stores, which key vault and which mount point a home uses.

The field names are MeshKit's where MeshKit has one (``version``, ``appId``, ``identity``, ``provider``,
``policy``, ``persistence``); ``metadata``, ``keyVault`` and ``mount`` are ours. The file holds no secrets
and has no place for one.

Reading is strict: an unknown field, a wrong type, a duplicate key or a part that is not implemented is
an error that names the field. A setting that is silently ignored is a security setting that is not there.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlsplit

from ..errors import MeshkitError

if TYPE_CHECKING:
    from ..providers import ProviderSpec

__all__ = [
    "ENFORCEMENT",
    "FSYNC",
    "KEY_VAULTS",
    "KEY_VAULT_DEMANDS",
    "AccessConfig",
    "AuditConfig",
    "Config",
    "KeyVaultConfig",
    "MetadataConfig",
    "MountConfig",
    "MountOptions",
    "PolicyConfig",
    "ReleaseConfig",
    "WritingConfig",
    "default_mount_point",
    "load",
    "loads",
    "save",
    "set_key_vault",
]

VERSION: Final = 1
DEFAULT_IDENTITY: Final = "self"  # MeshKit's
MAX_BYTES: Final = 64 * 1024
KEY_VAULTS: Final = ("tpm2", "secret-service", "passphrase-file", "systemd-credential", "plain-file")
KEY_VAULT_DEMANDS: Final = ("hardware_backed", "not_exportable", "persistent", "user_presence")
SESSION_CACHES: Final = ("kernel",)
# How long the key stays in a session (s): the default, the least and the most.
CACHE_S, CACHE_LEAST_S, CACHE_MOST_S = 8 * 3600, 60, 30 * 86400
# Those that ask for something; of the others a session's copy would only be one more.
_CACHED_VAULTS: Final = ("passphrase-file", "tpm2")
_FIELDS: Final = (
    *("version", "appId", "identity", "provider", "policy", "persistence"),  # MeshKit's
    *("metadata", "keyVault", "mount", "writing", "audit", "access", "release"),  # ours
)
# A proof of freshness is good for no longer; less would end with every answer that is a little late.
LEASE_LEAST: Final = 15
LEASE_MOST: Final = 300
FSYNC: Final = ("published", "journal")
# Who sees to it that a share is opened only by whom its owner means: the program of whoever opens it, or a
# release service, without which the key is not whole.
ENFORCEMENT: Final = ("client", "release")
# Less would make every larger file wait for the provider block by block.
SPOOL_LEAST: Final = 16 << 20
_POLICIES: Final = ("authzen",)
_POLICIES_PLANNED: Final = ("lit-http",)
POLICY_TIMEOUT_MS: Final = 2000
_PERSISTENCE: Final = ("filecoin-http",)


def default_mount_point() -> Path:
    """Return where a home is mounted when nobody says otherwise: ``~/MeshKit``."""
    return Path(os.path.expanduser("~")) / "MeshKit"


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

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.url or str(self.path)

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form, as `Config.as_dict` does."""
        if self.type == "embedded":
            assert self.path is not None
            return {"type": self.type, "path": _relative(self.path, base)}
        result: dict[str, Any] = {"type": self.type, "url": self.url}
        for name, attribute in _SERVICE_FILES.items():
            if (value := getattr(self, attribute)) is not None:
                result[name] = _relative(value, base)
        if self.join_token_env is not None:
            result["joinTokenEnv"] = self.join_token_env
        return result


# The fields of a metadata service that name files.
_SERVICE_FILES: Final = {
    "caFile": "ca_file",
    "clientCert": "client_cert",
    "clientKey": "client_key",
    "socket": "socket",
    "joinTokenFile": "join_token_file",
}


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The policy provider that grants may send this home to: ``authzen``, at ``endpoint``.

    ``token_env`` or ``token_file`` say where its bearer token is, ``ca_file`` takes the place of the system's
    certificate authorities, ``timeout_ms`` bounds one answer. ``key`` (hex) is the key that it signs
    decisions with: grants made here demand that signature.
    """

    endpoint: str
    type: str = "authzen"
    token_env: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_ms: int = POLICY_TIMEOUT_MS
    key: str | None = None

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form, as `Config.as_dict` does."""
        result: dict[str, Any] = {"type": self.type, "endpoint": self.endpoint}
        if self.token_env is not None:
            result["tokenEnv"] = self.token_env
        for name, path in (("tokenFile", self.token_file), ("caFile", self.ca_file)):
            if path is not None:
                result[name] = _relative(path, base)
        if self.timeout_ms != POLICY_TIMEOUT_MS:
            result["timeoutMs"] = self.timeout_ms
        if self.key is not None:
            result["key"] = self.key
        return result


@dataclass(frozen=True, slots=True)
class KeyVaultConfig:
    """Where the wrapping key of the identity is kept: ``type`` is one of `KEY_VAULTS`.

    ``session_cache`` (one of `SESSION_CACHES`) keeps it in the session for ``session_cache_s`` seconds, so
    that one is asked once; ``require`` (of `KEY_VAULT_DEMANDS`) is what it must give, or the home stays shut.
    """

    type: str
    session_cache: str | None = None
    session_cache_s: int = CACHE_S
    require: tuple[str, ...] = ()

    @property
    def cache_seconds(self) -> int | None:
        """How long the key stays in the session; None: not at all."""
        return self.session_cache_s if self.session_cache is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        result: dict[str, Any] = {"type": self.type}
        if self.session_cache is not None:
            result["sessionCache"] = self.session_cache
        if self.session_cache_s != CACHE_S:
            result["sessionCacheSeconds"] = self.session_cache_s
        if self.require:
            result["require"] = list(self.require)
        return result


@dataclass(frozen=True, slots=True)
class MountConfig:
    """How this home is mounted. ``point`` is the directory that ``mount`` and ``umount`` mean by default."""

    point: Path = field(default_factory=default_mount_point)


@dataclass(frozen=True, slots=True)
class WritingConfig:
    """What is promised to a writer, and how much may wait for the provider.

    ``fsync`` is one of `FSYNC`: it returns when the data is stored and published, or already when it is
    durable on this device. ``spool_limit`` bounds the sealed blocks that wait here, in bytes; None leaves it
    to the room on the disk.
    """

    fsync: str = FSYNC[0]
    spool_limit: int | None = None


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """How long access goes on while nobody confirms it: ``lease_seconds``, `LEASE_LEAST` to `LEASE_MOST`."""

    lease_seconds: int = LEASE_MOST


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """What this device keeps of who opened what: ``enabled`` at all, with ``names`` of files and programs."""

    enabled: bool = True
    names: bool = True
    days: int = 90


@dataclass(frozen=True, slots=True)
class ReleaseConfig:
    """Release services: which one this home knows beside its metadata service, and what new shares use.

    ``enforcement`` is one of `ENFORCEMENT`. ``ca_file`` takes the place of the system's certificate
    authorities for ``service``.
    """

    service: str = ""
    ca_file: Path | None = None
    enforcement: str = ENFORCEMENT[0]


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What one mount is told on the command line.

    ``nonempty`` allows a mount point that has files (they are hidden while mounted); ``read_only`` makes
    every write fail with EROFS; ``fsync`` takes the place of `WritingConfig.fsync`; ``locked`` asks nobody
    for the key, and leaves everything closed until it is unlocked.
    """

    nonempty: bool = False
    read_only: bool = False
    fsync: str | None = None
    locked: bool = False


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
        if self.mount.point != default_mount_point():
            result["mount"] = {"point": str(self.mount.point)}
        writing: dict[str, Any] = {}
        if self.writing.fsync != FSYNC[0]:
            writing["fsync"] = self.writing.fsync
        if self.writing.spool_limit is not None:
            writing["spoolLimit"] = self.writing.spool_limit
        if writing:
            result["writing"] = writing
        audit = {name: value for name, value in asdict(self.audit).items() if value != _AUDIT[name]}
        if audit:
            result["audit"] = audit
        if self.access != AccessConfig():
            result["access"] = {"leaseSeconds": self.access.lease_seconds}
        release: dict[str, Any] = {}
        if self.release.service:
            release["service"] = self.release.service
        if self.release.ca_file is not None:
            release["caFile"] = _relative(self.release.ca_file, base)
        if self.release.enforcement != ENFORCEMENT[0]:
            release["enforcement"] = self.release.enforcement
        if release:
            result["release"] = release
        return result


_AUDIT: Final = asdict(AuditConfig())


def load(path: Path) -> Config:
    """Read and check the configuration file at ``path``.

    Raises ``not_initialized`` when there is none, ``invalid_cli_config`` when it cannot be read or is not
    JSON, and ``invalid_config`` naming the field when its content is wrong.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise MeshkitError("not_initialized", f"there is no {path}") from None
    except OSError as error:
        raise MeshkitError("invalid_cli_config", f"{path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise MeshkitError("invalid_cli_config", f"{path}: larger than {MAX_BYTES} bytes")
    return loads(data, path.parent, str(path))


def loads(data: bytes, base: Path, source: str = "configuration") -> Config:
    """Check a configuration in memory; relative paths in it are taken from ``base``. Raises as `load`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except MeshkitError as error:
        raise MeshkitError(error.code, f"{source}: {error.detail}") from None
    except RecursionError:
        raise MeshkitError("invalid_cli_config", f"{source}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MeshkitError(
            "invalid_cli_config", f"{source}: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except UnicodeDecodeError:
        raise MeshkitError("invalid_cli_config", f"{source}: not UTF-8") from None
    return _Reader(base, source).config(value)


def save(path: Path, config: Config) -> None:
    """Write a new configuration file, readable by its owner only, all or nothing.

    A file that is there is never overwritten, because a person may have written it: if it says the same,
    all is well, else it raises ``already_initialized``. Saying nothing of the identity or the key vault is
    no contradiction.
    """
    try:
        with _draft(path, config.as_dict(path.parent), 0o600) as draft:
            os.link(draft, path)
        _sync_directory(path.parent)
    except FileExistsError:
        there = load(path)
        if there.identity == DEFAULT_IDENTITY:
            there = replace(there, identity=config.identity)
        if there.key_vault is None:
            there = replace(there, key_vault=config.key_vault)
        if there != config:
            raise MeshkitError("already_initialized", f"{path} is there and says something else") from None
    except OSError as error:
        raise MeshkitError("invalid_config", f"{path}: {error.strerror}") from error


def set_key_vault(path: Path, kind: str) -> None:
    """Make the configuration at ``path`` name the key vault ``kind``; everything else in it stays.

    The session cache goes, if that kind has none. The old file or the new one is there, never half of one.
    Raises as `load`, and ``invalid_config`` when it cannot be written.
    """
    before = load(path)
    there = before.key_vault or KeyVaultConfig(kind)
    if before.key_vault is not None and there.type == kind:
        return
    cached = kind in _CACHED_VAULTS
    changed = replace(
        there,
        type=kind,
        session_cache=there.session_cache if cached else None,
        session_cache_s=there.session_cache_s if cached else CACHE_S,
    )
    # Taken from the file as it is: only this one section is ours to change.
    value = json.loads(path.read_bytes())
    value["keyVault"] = changed.as_dict()
    loads(_text_of(value), path.parent, str(path))
    # Where a link points to: the file there is meant, not the link.
    target = path.resolve()
    try:
        with _draft(target, value, stat.S_IMODE(target.stat().st_mode)) as draft:
            draft.rename(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise MeshkitError("invalid_config", f"{path}: {error.strerror}") from error


def _text_of(value: Any) -> bytes:
    # A path that is not UTF-8 becomes a \\u escape, which JSON reads back as the same path.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def _draft(path: Path, value: Any, mode: int) -> Iterator[Path]:
    """A file beside ``path`` with ``value`` as JSON, on the disk; gone afterwards if it is there still."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(_text_of(value))
            file.flush()
            os.fsync(descriptor)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Reader:
    """Checks one JSON value field by field; knows where it is, so that messages can say so."""

    def __init__(self, base: Path, source: str) -> None:
        self._base = base
        self._source = source

    def config(self, value: Any) -> Config:
        top = self._object(
            value,
            "",
            _FIELDS,
        )
        version = top.get("version")
        if version is None:
            self._fail("version", "is missing (the current version is 1)")
        if type(version) is not int or version != VERSION:
            self._fail("version", f"{version!r} is not known; this program reads version {VERSION}")
        self._planned(top, "persistence", _PERSISTENCE)
        app_id = self._text(top, "appId")
        identity = self._text(top, "identity")
        metadata = self._metadata(top.get("metadata", {"type": "embedded"}))
        return Config(
            provider=self._provider(top.get("provider", {"type": "local-dev"}), metadata),
            metadata=metadata,
            key_vault=self._key_vault(top["keyVault"]) if "keyVault" in top else None,
            identity=identity if identity is not None else DEFAULT_IDENTITY,
            app_id=app_id,
            mount=self._mount(top.get("mount", {})),
            writing=self._writing(top.get("writing", {})),
            release=self._release(top.get("release", {}), metadata),
            policy=self._policy(top["policy"]) if "policy" in top else None,
            audit=self._audit(top.get("audit", {})),
            access=self._access(top.get("access", {})),
        )

    def _policy(self, value: Any) -> PolicyConfig:
        kind = self._type(value, "policy", _POLICIES, planned=_POLICIES_PLANNED)
        names = ("type", "endpoint", "tokenEnv", "tokenFile", "caFile", "timeoutMs", "key")
        item = self._object(value, "policy", names)
        if "endpoint" not in item:
            self._fail("policy.endpoint", "is missing: the address of the policy decision point")
        if "tokenEnv" in item and "tokenFile" in item:
            self._fail("policy.tokenEnv", "and 'tokenFile' are two places for one secret")
        timeout, key = item.get("timeoutMs", POLICY_TIMEOUT_MS), item.get("key")
        if type(timeout) is not int or not 100 <= timeout <= POLICY_TIMEOUT_MS:
            self._fail("policy.timeoutMs", f"must be from 100 to {POLICY_TIMEOUT_MS}")
        if key is not None and not (isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key)):
            self._fail("policy.key", "must be an Ed25519 public key: 64 small hex digits")
        files = {
            attribute: self._path(item, f"policy.{name}", "") if name in item else None
            for name, attribute in (("tokenFile", "token_file"), ("caFile", "ca_file"))
        }
        endpoint = self._address(item, "endpoint", "policy")
        token_env = self._variable(item, "tokenEnv", "policy")
        return PolicyConfig(endpoint, kind, token_env, timeout_ms=timeout, key=key, **files)

    def _provider(self, value: Any, metadata: MetadataConfig) -> ProviderSpec:
        # Loaded here: commands that a running daemon answers read no configuration, and start quickly.
        from ..providers import ProviderSpec

        try:
            spec = ProviderSpec.from_config(value, self._base)
        except MeshkitError as error:
            raise MeshkitError(error.code, f"{self._source}: {error.detail}") from None
        for address in spec.boundaries():
            # Blocks and what is known of them belong together: read from the same boundary that wrote.
            if address.rstrip("/") != metadata.url:
                self._fail(
                    "provider.metadataApiUrl",
                    f"is {address}, and this home's metadata is at {metadata.place}; they must be the same",
                )
        return spec

    def _metadata(self, value: Any) -> MetadataConfig:
        kind = self._type(value, "metadata", ("embedded", "http"))
        if kind == "embedded":
            item = self._object(value, "metadata", ("type", "path"))
            return MetadataConfig(self._path(item, "metadata.path", "metadata.db"), kind)
        # MeshKit's word for the address is taken too.
        names = ("type", "url", "metadataApiUrl", *_SERVICE_FILES, "joinTokenEnv")
        item = self._object(value, "metadata", names)
        if ("url" in item) == ("metadataApiUrl" in item):
            self._fail("metadata.url", "must be there once, under this name or as 'metadataApiUrl'")
        for one, other in (("clientCert", "clientKey"), ("clientKey", "clientCert")):
            if one in item and other not in item:
                self._fail(f"metadata.{other}", f"is missing; it goes with '{one}'")
        if "joinTokenEnv" in item and "joinTokenFile" in item:
            self._fail("metadata.joinTokenEnv", "and 'joinTokenFile' are two places for one secret")
        files = {
            attribute: self._path(item, f"metadata.{name}", "")
            for name, attribute in _SERVICE_FILES.items()
            if name in item
        }
        return MetadataConfig(
            type=kind,
            url=self._address(item, "url" if "url" in item else "metadataApiUrl"),
            join_token_env=self._variable(item, "joinTokenEnv"),
            **files,
        )

    def _address(self, item: Mapping[str, Any], name: str, section: str = "metadata") -> str:
        url = item[name]
        if not isinstance(url, str) or not url.isascii() or not url.isprintable() or len(url) > 1024:
            self._fail(f"{section}.{name}", "must be an address")
        try:
            # What else is wrong with an address, its user finds; what it may never have is checked here.
            parts = urlsplit(url)
        except ValueError:
            self._fail(f"{section}.{name}", "is not an address")
        if parts.username is not None or parts.password is not None:
            self._fail(f"{section}.{name}", "has credentials in it; secrets do not belong in this file")
        if parts.scheme not in ("https", "http") or not parts.hostname:
            self._fail(f"{section}.{name}", "must begin with https:// (http:// only on this machine)")
        if parts.query or parts.fragment:
            self._fail(f"{section}.{name}", "must end with the host or a path: no '?', no '#'")
        return url.rstrip("/")

    def _variable(self, item: Mapping[str, Any], name: str, section: str = "metadata") -> str | None:
        value = item.get(name)
        if value is not None and not (isinstance(value, str) and value.isascii() and value.isidentifier()):
            self._fail(f"{section}.{name}", "must be the name of an environment variable")
        return value

    def _key_vault(self, value: Any) -> KeyVaultConfig:
        kind = self._type(value, "keyVault", KEY_VAULTS)
        item = self._object(value, "keyVault", ("type", "sessionCache", "sessionCacheSeconds", "require"))
        cache = item.get("sessionCache")
        if cache is not None and cache not in SESSION_CACHES:
            self._fail("keyVault.sessionCache", f"{cache!r} is not known; {_instead(SESSION_CACHES)}")
        if cache is not None and kind not in _CACHED_VAULTS:
            self._fail("keyVault.sessionCache", f"is for {_instead(_CACHED_VAULTS).removeprefix('use ')}")
        seconds = item.get("sessionCacheSeconds", CACHE_S)
        if type(seconds) is not int or not CACHE_LEAST_S <= seconds <= CACHE_MOST_S:
            self._fail(
                "keyVault.sessionCacheSeconds", f"must be a number from {CACHE_LEAST_S} to {CACHE_MOST_S}"
            )
        if "sessionCacheSeconds" in item and cache is None:
            self._fail("keyVault.sessionCacheSeconds", "goes with 'sessionCache'")
        demands = item.get("require", [])
        if not isinstance(demands, list) or not all(isinstance(demand, str) for demand in demands):
            self._fail("keyVault.require", "must be a list of names")
        for demand in demands:
            if demand not in KEY_VAULT_DEMANDS:
                near = _near(demand, KEY_VAULT_DEMANDS)
                self._fail(
                    "keyVault.require", f"{demand!r} is not known{near}; {_instead(KEY_VAULT_DEMANDS)}"
                )
        return KeyVaultConfig(kind, cache, seconds, tuple(demands))

    def _mount(self, value: Any) -> MountConfig:
        item = self._object(value, "mount", ("point",))
        return MountConfig(self._path(item, "mount.point", str(default_mount_point())))

    def _writing(self, value: Any) -> WritingConfig:
        item = self._object(value, "writing", ("fsync", "spoolLimit"))
        fsync = item.get("fsync", FSYNC[0])
        if fsync not in FSYNC:
            self._fail("writing.fsync", f"{fsync!r} is not known; {_instead(FSYNC)}")
        limit = item.get("spoolLimit")
        if limit is not None and (type(limit) is not int or limit < SPOOL_LEAST):
            self._fail("writing.spoolLimit", f"must be a number of bytes, at least {SPOOL_LEAST}")
        return WritingConfig(fsync, limit)

    def _audit(self, value: Any) -> AuditConfig:
        item = _AUDIT | self._object(value, "audit", tuple(_AUDIT))
        for name in ("enabled", "names"):
            if not isinstance(item[name], bool):
                self._fail(f"audit.{name}", "must be true or false")
        if type(item["days"]) is not int or not 1 <= item["days"] <= 3650:
            self._fail("audit.days", "must be a number of days, 1 to 3650")
        return AuditConfig(**item)

    def _access(self, value: Any) -> AccessConfig:
        item = self._object(value, "access", ("leaseSeconds",))
        seconds = item.get("leaseSeconds", LEASE_MOST)
        if type(seconds) is not int or not LEASE_LEAST <= seconds <= LEASE_MOST:
            self._fail("access.leaseSeconds", f"must be a number from {LEASE_LEAST} to {LEASE_MOST}")
        return AccessConfig(seconds)

    def _release(self, value: Any, metadata: MetadataConfig) -> ReleaseConfig:
        item = self._object(value, "release", ("service", "caFile", "enforcement"))
        enforcement = item.get("enforcement", ENFORCEMENT[0])
        if enforcement not in ENFORCEMENT:
            self._fail("release.enforcement", f"{enforcement!r} is not known; {_instead(ENFORCEMENT)}")
        if "caFile" in item and "service" not in item:
            self._fail("release.service", "is missing; it goes with 'caFile'")
        if enforcement == "release" and "service" not in item and not metadata.url:
            self._fail("release.service", "is missing: which service is to hold the halves of keys?")
        return ReleaseConfig(
            self._address(item, "service", "release") if "service" in item else "",
            self._path(item, "release.caFile", "") if "caFile" in item else None,
            enforcement,
        )

    def _planned(self, top: Mapping[str, Any], name: str, kinds: tuple[str, ...]) -> None:
        """A section MeshKit has and this version has not: refused, because ignoring it would open doors."""
        if name in top:
            self._type(top[name], name, (), planned=kinds)

    def _type(self, value: Any, where: str, known: tuple[str, ...], *, planned: tuple[str, ...] = ()) -> str:
        if not isinstance(value, dict):
            self._fail(where, "must be an object")
        kind = value.get("type")
        if not isinstance(kind, str):
            self._fail(f"{where}.type", "must be a string" if "type" in value else "is missing")
        if kind not in known:
            what = (
                "is not implemented yet" if kind in planned else f"is not known{_near(kind, known + planned)}"
            )
            self._fail(f"{where}.type", f"{kind!r} {what}; {_instead(known)}")
        return kind

    def _object(self, value: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(where, "must be an object")
        for name in value:
            if name not in fields:
                place = f"{where}.{name}" if where else name
                if name in ("token", "password", "passphrase", "secret"):
                    self._fail(place, "secrets do not belong in this file")
                self._fail(place, f"is not a known field{_near(name, fields)}")
        return value

    def _text(self, item: Mapping[str, Any], name: str) -> str | None:
        if name not in item:
            return None
        value = item[name]
        if not isinstance(value, str) or not value or not value.isprintable():
            self._fail(name, "must be a non-empty string of printable characters")
        if len(value.encode("utf-8")) > 128:
            self._fail(name, "is longer than 128 bytes")
        return value

    def _path(self, item: Mapping[str, Any], where: str, default: str) -> Path:
        value = item.get(where.rpartition(".")[2], default)
        if not isinstance(value, str) or not value or "\0" in value:
            self._fail(where, "must be a path")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            self._fail(where, "must be a path")
        return Path(os.path.normpath(os.path.join(self._base, os.path.expanduser(value))))

    def _fail(self, where: str, problem: str) -> NoReturn:
        what = f"field '{where}' {problem}" if where else problem
        raise MeshkitError("invalid_config", f"{self._source}: {what}")


def _relative(path: Path, base: Path) -> str:
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def _near(word: str, known: tuple[str, ...]) -> str:
    """Return " (did you mean X?)" when one of the known words is close, else nothing."""
    lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[match[0]]}'?)" if match else ""


def _instead(known: tuple[str, ...]) -> str:
    if not known:
        return "leave this section out"
    return "use " + " or ".join(f"'{word}'" for word in known)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise MeshkitError("invalid_config", f"field '{name}' appears twice")
        result[name] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise MeshkitError("invalid_config", f"{text} is not a JSON value")
