"""How a service is set up: one strict JSON file, whose fields the command line may override.

Secrets are never in it: it names the environment variables or files that hold them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from meshkitfs.core.release import RELEASE_MAX_S
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata.service import RELEASE_S, Quotas
from meshkitfs.net import SecretSource, Tls
from meshkitfs.net.scrape import Place
from meshkitfs.policy import AuthZenOptions
from meshkitfs.server._limits import Rate

__all__ = ["FIELDS", "JOIN", "Settings", "TlsFiles", "bound_names", "is_postgresql", "load"]

LOG_FORMATS: Final = ("text", "json")
JOIN: Final = ("open", "token", "invite")
DEFAULT_LISTEN: Final = "127.0.0.1:8787"
IDENTITY_RATE: Final = Rate(50.0, 200.0)
ADDRESS_RATE: Final = Rate(200.0, 800.0)
_SLOWEST: Final = 0.001  # of what comes back in a second
_MAX_BYTES: Final = 64 << 10
FIELDS: Final = (
    *("listen", "names", "database", "databaseEnv", "databaseFile", "tls", "join", "proxies"),
    *(
        "quotas",
        "rates",
        "audit",
        "bodySeconds",
        "memoryBytes",
        "connections",
        "policies",
        "release",
        "log",
        "metrics",
    ),
)
_QUOTAS: Final = {"recordBytes": "record_bytes", "shares": "shares", "lettersPerDay": "letters_a_day"}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Certificate chain and key in PEM files; with ``client_ca``, only clients with its certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked configuration.

    ``listen``: ``HOST:PORT`` or ``unix:PATH``; sockets that systemd hands over go before. ``names``: the
    authorities, ``host[:port]``, that requests may be addressed to, beside what is listened on.
    ``database``: a file, or ``postgresql://…``; or it is in ``database_secret``. ``policies``: a directory of
    rules; policy decisions are given by them then, to whoever shows ``policy_token``, if there is one. With a
    ``release_key`` it releases keys, each time for ``release_seconds``, and asks ``release_policy`` about
    grants that name that provider. ``log_format`` is one of `LOG_FORMATS`. ``metrics`` is where
    they are shown, if anywhere; only with ``metrics_remote`` may other machines reach that.
    """

    database: str = ""
    database_secret: SecretSource = field(default_factory=SecretSource)
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    names: frozenset[str] = frozenset()
    tls: TlsFiles | None = None
    join: str = "invite"
    join_token: SecretSource = field(default_factory=SecretSource)
    proxies: frozenset[str] = frozenset()
    quotas: Quotas = field(default_factory=Quotas)
    identity_rate: Rate = IDENTITY_RATE
    address_rate: Rate = ADDRESS_RATE
    audit_reads: bool = False
    audit_days: int = 90
    body_seconds: float = 30.0
    release_key: SecretSource = field(default_factory=SecretSource)
    release_policy: AuthZenOptions | None = None
    release_seconds: int = RELEASE_S
    memory_bytes: int = 256 << 20
    connections: int = 8
    policies: Path | None = None
    policy_token: SecretSource = field(default_factory=SecretSource)
    log_format: str = LOG_FORMATS[0]
    metrics: str = ""
    metrics_remote: bool = False


def load(path: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Read a configuration file (None: only defaults) and put ``overrides``, by field, over it.

    Raises invalid_cli_config when it cannot be read, invalid_config naming the field that is wrong.
    """
    value: Any = {}
    if path is not None:
        try:
            data = path.read_bytes()[: _MAX_BYTES + 1]
            if len(data) > _MAX_BYTES:
                raise ValueError(f"larger than {_MAX_BYTES} bytes")
            value = json.loads(data, object_pairs_hook=_unique)
        except OSError as error:
            raise MeshkitError("invalid_cli_config", f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise MeshkitError("invalid_cli_config", f"{path}: {error}") from None
    base = Path.cwd() if path is None else path.absolute().parent
    settings = _Reader(base, str(path or "options")).settings(value)
    return _checked(dataclasses.replace(settings, **overrides))


def is_postgresql(address: str) -> bool:
    """Whether it is what to reach a PostgreSQL server with (a URL or ``key=value`` words), or else a file."""
    return re.match(r"postgres(ql)?://|[a-z_]+ *=", address) is not None


def _checked(settings: Settings) -> Settings:
    source = settings.database_secret
    given = sum(map(bool, (settings.database, source.env, source.file)))
    if given != 1:
        raise MeshkitError("invalid_config", "name one database: 'database', 'databaseEnv' or 'databaseFile'")
    if is_postgresql(settings.database):
        place = settings.database.partition("//")[2]
        if ":" in place.partition("/")[0].rpartition("@")[0] or "password=" in settings.database:
            raise MeshkitError("invalid_config", "a password does not belong here; use 'databaseFile'")
    if settings.join not in JOIN:
        raise MeshkitError("invalid_config", f"'join.policy' is one of {', '.join(JOIN)}")
    token = settings.join_token
    if (settings.join == "token") != bool(token.env or token.file):
        raise MeshkitError(
            "invalid_config", "'join.tokenEnv' or 'join.tokenFile' goes with the policy 'token'"
        )
    if settings.metrics:
        Place.parse(settings.metrics, remote=settings.metrics_remote)
    for listen in settings.listen:
        _check_listen(listen, bool(settings.names))
    return dataclasses.replace(settings, names=frozenset(map(str.lower, settings.names)))


def _check_listen(listen: str, named: bool) -> None:
    if listen.startswith("unix:/"):
        return
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or not host or int(port) > 65535:
        raise MeshkitError("invalid_config", f"'listen': {listen!r} is neither HOST:PORT nor unix:PATH")
    if host in ("0.0.0.0", "[::]", "::") and not named:  # noqa: S104 - refused, unless its names are known
        raise MeshkitError("invalid_config", f"'names' is needed to listen on {host}: what is it called?")


def bound_names(host: str, port: int) -> set[str]:
    """The authorities of a host and port; a default port may be left out."""
    hosts = {host.lower()} | ({"localhost"} if host in ("127.0.0.1", "[::1]", "::1") else set())
    names = {f"{name}:{port}" for name in hosts}
    return names | (hosts if port in (80, 443) else set())


class _Reader:
    """Checks the JSON field by field."""

    def __init__(self, base: Path, source: str) -> None:
        self._base = base
        self._source = source

    def settings(self, value: Any) -> Settings:
        top = self._object(value, "", FIELDS)
        found: dict[str, Any] = {}
        if "listen" in top:
            found["listen"] = tuple(self._texts(top["listen"], "listen"))
        if "names" in top:
            found["names"] = frozenset(self._texts(top["names"], "names"))
        if "proxies" in top:
            found["proxies"] = frozenset(self._texts(top["proxies"], "proxies"))
        if "database" in top:
            database = self._text(top["database"], "database")
            found["database"] = database if is_postgresql(database) else str(self._path(database))
        found["database_secret"] = self._secret(top, "databaseEnv", "databaseFile")
        if "tls" in top:
            found["tls"] = self._tls(top["tls"])
        if "join" in top:
            join = self._object(top["join"], "join", ("policy", "tokenEnv", "tokenFile"))
            found["join"] = self._text(join.get("policy"), "join.policy")
            found["join_token"] = self._secret(join, "tokenEnv", "tokenFile")
        if "quotas" in top:
            quotas = self._object(top["quotas"], "quotas", tuple(_QUOTAS))
            numbers = {_QUOTAS[k]: self._number(v, f"quotas.{k}") for k, v in quotas.items()}
            found["quotas"] = Quotas(**numbers)
        if "rates" in top:
            rates = self._object(top["rates"], "rates", ("identity", "address"))
            found |= {f"{k}_rate": self._rate(v, f"rates.{k}") for k, v in rates.items()}
        if "audit" in top:
            audit = self._object(top["audit"], "audit", ("reads", "days"))
            if not isinstance(audit.get("reads", False), bool):
                self._fail("audit.reads", "must be true or false")
            found["audit_reads"] = audit.get("reads", False)
            found["audit_days"] = self._number(audit.get("days", 90), "audit.days")
        if "release" in top:
            release = self._object(top["release"], "release", ("keyEnv", "keyFile", "seconds", "policy"))
            if ("keyEnv" in release) == ("keyFile" in release):
                self._fail("release", "needs 'keyEnv' or 'keyFile'")
            found["release_key"] = self._secret(release, "keyEnv", "keyFile")
            seconds = self._number(release.get("seconds", RELEASE_S), "release.seconds")
            if seconds > RELEASE_MAX_S:
                self._fail("release.seconds", f"must be at most {RELEASE_MAX_S}")
            found["release_seconds"] = seconds
            if "policy" in release:
                found["release_policy"] = self._provider(release["policy"])
        for name, attribute in (("memoryBytes", "memory_bytes"), ("connections", "connections")):
            if name in top:
                found[attribute] = self._number(top[name], name)
        if "policies" in top:
            item = self._object(top["policies"], "policies", ("directory", "tokenEnv", "tokenFile"))
            found["policies"] = self._path(self._text(item.get("directory"), "policies.directory"))
            found["policy_token"] = self._secret(item, "tokenEnv", "tokenFile")
        if "log" in top:
            form = self._object(top["log"], "log", ("format",)).get("format", LOG_FORMATS[0])
            if form not in LOG_FORMATS:
                self._fail("log.format", f"is one of {', '.join(LOG_FORMATS)}")
            found["log_format"] = form
        if "metrics" in top:
            metrics = self._object(top["metrics"], "metrics", ("listen", "allowRemote"))
            if not isinstance(metrics.get("allowRemote", False), bool):
                self._fail("metrics.allowRemote", "must be true or false")
            found["metrics"] = self._text(metrics.get("listen"), "metrics.listen")
            found["metrics_remote"] = metrics.get("allowRemote", False)
        if "bodySeconds" in top:
            found["body_seconds"] = float(self._number(top["bodySeconds"], "bodySeconds"))
        return Settings(**found)

    def _provider(self, value: Any) -> AuthZenOptions:
        names = ("endpoint", "tokenEnv", "tokenFile", "caFile")
        item = self._object(value, "release.policy", names)
        endpoint = self._text(item.get("endpoint"), "release.policy.endpoint")
        if not endpoint.startswith(("https://", "http://")):
            self._fail("release.policy.endpoint", "must be an http or https address")
        ca_file = self._path(self._text(item["caFile"], "caFile")) if "caFile" in item else None
        return AuthZenOptions(endpoint, self._secret(item, "tokenEnv", "tokenFile"), Tls(ca_file))

    def _tls(self, value: Any) -> TlsFiles:
        files = self._object(value, "tls", ("certificate", "key", "clientCa"))
        paths = {name: self._path(self._text(files[name], f"tls.{name}")) for name in files}
        if not {"certificate", "key"} <= paths.keys():
            self._fail("tls", "needs 'certificate' and 'key'")
        return TlsFiles(paths["certificate"], paths["key"], paths.get("clientCa"))

    def _secret(self, item: Mapping[str, Any], env: str, file: str) -> SecretSource:
        path = self._path(self._text(item[file], file)) if file in item else None
        return SecretSource(self._text(item[env], env) if env in item else None, path)

    def _rate(self, value: Any, where: str) -> Rate:
        item = self._object(value, where, ("perSecond", "burst"))
        if set(item) != {"perSecond", "burst"}:
            self._fail(where, "needs 'perSecond' and 'burst'")
        per_second, burst = item["perSecond"], self._number(item["burst"], f"{where}.burst")
        if type(per_second) not in (int, float) or not _SLOWEST <= per_second < 2**31:
            self._fail(f"{where}.perSecond", f"must be a number from {_SLOWEST}")
        return Rate(float(per_second), float(burst))

    def _object(self, value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._fail(where, "must be an object")
        for name in value:
            if name not in names:
                self._fail(f"{where}.{name}" if where else name, "is not a known field")
        return value

    def _texts(self, value: Any, where: str) -> list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items:
            self._fail(where, "must be a list of strings")
        return [self._text(item, where) for item in items]

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value or not value.isprintable():
            self._fail(where, "must be a non-empty string of printable characters")
        return value

    def _number(self, value: Any, where: str) -> int:
        if type(value) is not int or not 0 < value < 2**63:
            self._fail(where, "must be a whole number above 0")
        return value

    def _path(self, text: str) -> Path:
        return Path(os.path.normpath(os.path.join(self._base, os.path.expanduser(text))))

    def _fail(self, where: str, problem: str) -> NoReturn:
        what = f"field '{where}' {problem}" if where else f"the configuration {problem}"
        raise MeshkitError("invalid_config", f"{self._source}: {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"field '{name}' appears twice")
        result[name] = value
    return result
