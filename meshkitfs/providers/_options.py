"""The fields of a ``provider`` object: declared once per type, read strictly, written back.

    @dataclass(frozen=True, slots=True)
    class S3Options(HttpOptions):
        bucket: str = option(TEXT)
        prefix: str = option(TEXT, default="")

A field of the class is a field of the JSON object, ``ipfs_api_url`` being ``ipfsApiUrl``. Whatever is wrong
raises ``invalid_config`` with the field's full name; nothing is ignored, and nothing that looks like a secret
is accepted or repeated.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NoReturn, Self, TypeVar, cast
from urllib.parse import urlsplit

from meshkitfs.errors import MeshkitError

if TYPE_CHECKING:
    import httpx

    from meshkitfs.net import Endpoint
    from meshkitfs.providers._api import ByteStore

__all__ = [
    "BOOLEAN",
    "ENVIRONMENT",
    "PATH",
    "TEXT",
    "URL",
    "URLS",
    "Form",
    "HttpOptions",
    "Options",
    "TokenOptions",
    "choice",
    "hint",
    "is_loopback",
    "number",
    "option",
    "read_path",
    "write_path",
    "wrong",
]

T = TypeVar("T")
_MAX_TEXT: Final = 1024
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Names that people put secrets under; whatever stands there is not even looked at.
_SECRETS: Final = re.compile(
    r"(?i)(token|password|passphrase|secret|bearer|authorization|credentials|api_?key|"
    r"(secret_?)?access_?key(_?id)?|secret_?key|session_?token|basic|username|user)"
)
TIMEOUT_MS: Final = 15_000
RETRIES: Final = 2


def wrong(where: str, problem: str) -> NoReturn:
    """Raise invalid_config about a field."""
    raise MeshkitError("invalid_config", f"field '{where}' {problem}")


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How one kind of field is read and written.

    ``read(value, where, base)`` checks a JSON value; relative paths are seen from ``base``.
    ``write(value, base)`` gives the JSON value back; paths below ``base`` become relative.
    """

    read: Callable[[Any, str, Path], T]
    write: Callable[[T, Path], Any] = lambda value, _base: value


def _text(value: Any, where: str, _base: Path) -> str:
    if not isinstance(value, str) or not value or not value.isprintable() or len(value) > _MAX_TEXT:
        wrong(where, "must be a non-empty string of printable characters")
    return value


def _boolean(value: Any, where: str, _base: Path) -> bool:
    if not isinstance(value, bool):
        wrong(where, "must be true or false")
    return value


def _url(value: Any, where: str, _base: Path) -> str:
    """An http or https address: a host and perhaps a port and a path, nothing more."""
    text = _text(value, where, _base)
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        wrong(where, "is not a URL")
    # Not repeated: what stands in such a place may be a password.
    if parts.username is not None or parts.password is not None:
        wrong(where, "has credentials in it; secrets do not belong in this file")
    if parts.scheme not in ("http", "https") or not host or not text.isascii():
        wrong(where, "must be an http:// or https:// address")
    if "?" in text or "#" in text:
        wrong(where, "must end with the host or the path: no '?', no '#'")
    return text.rstrip("/")


def _urls(value: Any, where: str, base: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        wrong(where, "must be a list of addresses")
    found = tuple(_url(item, f"{where}[{index}]", base) for index, item in enumerate(value))
    for index, item in enumerate(found):
        if item in found[:index]:
            wrong(f"{where}[{index}]", "is in the list already")
    return found


def _variable(value: Any, where: str, base: Path) -> str:
    # The value is not repeated: somebody may have put the secret itself there.
    if not _VARIABLE.fullmatch(_text(value, where, base)):
        wrong(where, "must be the name of an environment variable")
    return str(value)


def read_path(value: Any, where: str, base: Path) -> Path:
    """Return an absolute path; ``~`` is the home directory, a relative one is seen from ``base``."""
    if not isinstance(value, str) or not value or "\0" in value:
        wrong(where, "must be a path")
    try:
        os.fsencode(value)
        return Path(os.path.normpath(os.path.join(base, os.path.expanduser(value))))
    except UnicodeEncodeError:
        wrong(where, "must be a path")


def write_path(path: Path, base: Path) -> str:
    """Return a path as it is written: relative below ``base``, so that a home can be moved."""
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


TEXT: Final[Form[str]] = Form(_text)
BOOLEAN: Final[Form[bool]] = Form(_boolean)
URL: Final[Form[str]] = Form(_url)
URLS: Final[Form[tuple[str, ...]]] = Form(_urls, lambda value, _base: list(value))
PATH: Final[Form[Path]] = Form(read_path, write_path)
ENVIRONMENT: Final[Form[str]] = Form(_variable)


def number(least: int, most: int) -> Form[int]:
    """Return the form of a whole number within bounds."""

    def read(value: Any, where: str, _base: Path) -> int:
        if type(value) is not int or not least <= value <= most:
            wrong(where, f"must be a whole number from {least} to {most}")
        return int(value)

    return Form(read)


def choice(*words: str) -> Form[str]:
    """Return the form of one of some words."""

    def read(value: Any, where: str, _base: Path) -> str:
        if value not in words:
            wrong(where, f"must be {' or '.join(repr(word) for word in words)}")
        return str(value)

    return Form(read)


_REQUIRED: Final = object()


def option(form: Form[Any], *, default: Any = _REQUIRED) -> Any:
    """Declare a field of an `Options` class; without a default it has to be in the object."""
    metadata = {"form": form, "required": default is _REQUIRED}
    return dataclasses.field(
        default=None if default is _REQUIRED else default, metadata=metadata, kw_only=True
    )


@dataclass(frozen=True, slots=True)
class Options:
    """What the object of one provider type says, checked. Subclasses declare fields and can be opened."""

    # Whether blocks are kept on this machine only, so that other people cannot have them.
    local: ClassVar[bool] = False

    @classmethod
    def read(cls, fields: dict[str, Any], where: str, base: Path) -> Self:
        """Check the object at ``where`` (without its ``type``). Raises invalid_config, naming the field."""
        known = {_json_name(field.name): field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                if _SECRETS.fullmatch(name):
                    wrong(
                        f"{where}.{name}", f"is refused: secrets do not belong in this file{cls._instead()}"
                    )
                wrong(f"{where}.{name}", f"is not a known field{hint(name, known)}")
        values = {}
        fields = {**cls.defaults(), **fields}
        for name, field in known.items():
            if name in fields:
                form = cast(Form[Any], field.metadata["form"])
                values[field.name] = form.read(fields[name], f"{where}.{name}", base)
            elif field.metadata["required"]:
                wrong(f"{where}.{name}", "is missing")
        options = cls(**values)
        options.check(where)
        return options

    def as_dict(self, base: Path) -> dict[str, Any]:
        """Return the JSON form, without what has its default value."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["required"] or value != field.default:
                found[_json_name(field.name)] = field.metadata["form"].write(value, base)
        return found

    @classmethod
    def parse(cls, text: str, base: Path) -> Self:
        """Understand what follows the colon of the ``--provider`` option. Raises invalid_config."""
        raise MeshkitError(
            "invalid_config", "this type of provider has no short form; write it into the configuration file"
        )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return JSON values for fields that are left out, where they depend on where the file lies."""
        return {}

    @classmethod
    def _instead(cls) -> str:
        """Where a secret of this type of provider is named, for the message that refuses one."""
        names = {_json_name(field.name) for field in dataclasses.fields(cls)}
        places = sorted(names & {"tokenEnv", "tokenFile", "credentialsFile", "accessKeyIdEnv"})
        return f"; name their place with {' or '.join(places)}" if places else ""

    def check(self, where: str) -> None:
        """Check the fields against each other. Raises invalid_config."""

    def boundaries(self) -> set[str]:
        """Return the metadata services that this object says its blocks belong to."""
        return set()

    def directories(self) -> list[Path]:
        """Return the directories of this machine that keep blocks; nothing may be mounted over them."""
        return []

    async def open(self, *, create: bool) -> ByteStore:
        """Open the store. A remote one that is away now opens all the same, unless it is being set up.

        With ``create`` a store of this machine is made if there is none, and a remote one has to answer.
        Raises provider_request_failed, provider_http_error, invalid_config.
        """
        raise NotImplementedError

    async def open_absent(self) -> ByteStore:
        """Open the store even if it is of this machine and not there: its requests fail until it is."""
        return await self.open(create=False)


@dataclass(frozen=True, slots=True)
class HttpOptions(Options):
    """What every provider that is spoken to over HTTP has.

    ``metadata_api_url`` is MeshKit's: the metadata service that these blocks belong to.
    """

    timeout_ms: int = option(number(100, 600_000), default=TIMEOUT_MS)
    retries: int = option(number(0, 10), default=RETRIES)
    allow_insecure: bool = option(BOOLEAN, default=False)
    ca_file: Path | None = option(PATH, default=None)
    client_certificate: Path | None = option(PATH, default=None)
    client_key: Path | None = option(PATH, default=None)
    metadata_api_url: str | None = option(URL, default=None)

    def addresses(self) -> dict[str, str]:
        """Return the addresses that blocks go to or come from, by JSON field."""
        return {}

    def check(self, where: str) -> None:
        for name, address in self.addresses().items():
            if address.startswith("http:") and not self.allow_insecure and not is_loopback(address):
                wrong(
                    f"{where}.{name}",
                    "would not be encrypted on its way; use https, or 'allowInsecure': true if that is meant",
                )
        if self.client_key is not None and self.client_certificate is None:
            wrong(f"{where}.clientKey", "needs 'clientCertificate' beside it")

    def boundaries(self) -> set[str]:
        return {self.metadata_api_url} if self.metadata_api_url is not None else set()

    def endpoint_of(self, address: str, auth: httpx.Auth | None = None, *, redirects: int = 0) -> Endpoint:
        """Return a new endpoint for one of the addresses, with these options' limits and TLS files."""
        from meshkitfs.net import Codes, Endpoint, Limits, Tls

        seconds = self.timeout_ms / 1000
        tries = self.retries + 1
        return Endpoint(
            address,
            Codes(unreachable="provider_request_failed", refused="provider_http_error"),
            auth=auth,
            limits=Limits(deadline_s=seconds, overall_s=seconds * tries, tries=tries),
            tls=Tls(self.ca_file, self.client_certificate, self.client_key),
            insecure=self.allow_insecure,
            redirects=redirects,
        )


@dataclass(frozen=True, slots=True)
class TokenOptions(HttpOptions):
    """What a provider has that is shown a bearer token: where the token is, never the token."""

    token_env: str | None = option(ENVIRONMENT, default=None)
    token_file: Path | None = option(PATH, default=None)

    def check(self, where: str) -> None:
        HttpOptions.check(self, where)
        if self.token_env is not None and self.token_file is not None:
            wrong(f"{where}.tokenFile", "and 'tokenEnv' cannot both be there")

    def auth(self) -> httpx.Auth | None:
        """Return the bearer token, ready for an endpoint. Raises invalid_config when its place is empty."""
        from meshkitfs.net import BearerAuth, SecretSource

        token = SecretSource(self.token_env, self.token_file).load()
        return BearerAuth(token) if token is not None else None


def is_loopback(address: str) -> bool:
    """Whether an address is surely this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hint(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" when one of the known words is close, else nothing."""
    lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[match[0]]}'?)" if match else ""


def _json_name(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
