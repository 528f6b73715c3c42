"""Where S3 credentials are: environment variables, or a file as AWS tools write it."""

from __future__ import annotations

import configparser
import os
import stat
from collections.abc import Callable
from pathlib import Path

from meshkitfs.errors import MeshkitError
from meshkitfs.providers._sigv4 import Credentials

__all__ = ["Lookup", "from_environment", "from_file"]

Lookup = Callable[[], Credentials]
_MAX_BYTES = 64 << 10


def from_environment(access_key: str, secret_key: str, session_token: str) -> Lookup:
    """Return the credentials that stand in the variables of those names. Raises invalid_config."""
    key, secret = os.environ.get(access_key, ""), os.environ.get(secret_key, "")
    missing = [name for name, value in ((access_key, key), (secret_key, secret)) if not value]
    if missing:
        raise MeshkitError(
            "invalid_config",
            f"no S3 credentials: the environment variable {' and '.join(missing)} is not set; "
            "set it, or name a file with 'credentialsFile'",
        )
    found = _checked(key, secret, os.environ.get(session_token, ""), "the environment")
    return lambda: found


def from_file(path: Path, profile: str) -> Lookup:
    """Return a look into an AWS credentials file, read again when it has changed.

    Temporary credentials are renewed by other tools, in that file. Raises invalid_config, now and later.
    """
    known: tuple[tuple[int, int, int], Credentials] | None = None

    def lookup() -> Credentials:
        nonlocal known
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                version = (status.st_mtime_ns, status.st_ino, status.st_size)
                if known is not None and known[0] == version:
                    return known[1]
                if stat.S_IMODE(status.st_mode) & 0o077:
                    raise MeshkitError("invalid_config", f"{path} can be read by others: chmod 600 it")
                text = file.read(_MAX_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise MeshkitError("invalid_config", f"{path}: {error.strerror}") from None
        known = version, _parse(text, path, profile)
        return known[1]

    lookup()
    return lookup


def _parse(text: str, path: Path, profile: str) -> Credentials:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error:
        # Its own message would show the line.
        raise MeshkitError("invalid_config", f"{path} is not an AWS credentials file") from None
    if not parser.has_section(profile):
        raise MeshkitError("invalid_config", f"{path} has no profile [{profile}]")
    section = parser[profile]
    return _checked(
        section.get("aws_access_key_id", ""),
        section.get("aws_secret_access_key", ""),
        section.get("aws_session_token", ""),
        f"[{profile}] of {path}",
    )


def _checked(key: str, secret: str, token: str, where: str) -> Credentials:
    for name, value in (("access key", key), ("secret access key", secret), ("session token", token)):
        if not value and name != "session token":
            raise MeshkitError("invalid_config", f"{where} has no {name}")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise MeshkitError("invalid_config", f"the {name} in {where} has characters that no key has")
    return Credentials(key, secret, token or None)
