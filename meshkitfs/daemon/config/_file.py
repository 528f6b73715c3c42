"""The file itself: read with all its errors named, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

from ...errors import MeshkitError
from ._config import DEFAULT_IDENTITY, Config
from ._fields import Fields
from ._key_vault import KeyVaultConfig

__all__ = ["load", "loads", "save", "set_key_vault"]

MAX_BYTES: Final = 64 * 1024


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
    return Config.read(value, Fields(base, source))


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

    The session cache goes, if that kind has none. Raises as `load`, and ``invalid_config`` when it cannot
    be written.
    """
    before = load(path).key_vault
    if before is None or before.type != kind:
        _set_section(path, "keyVault", (before or KeyVaultConfig(kind)).moved_to(kind).as_dict())


def _set_section(path: Path, name: str, section: dict[str, Any]) -> None:
    """Change one section. The old file or the new one is there, never half of one."""
    # Taken from the file as it is: only this one section is ours to change.
    value = json.loads(path.read_bytes())
    value[name] = section
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise MeshkitError("invalid_config", f"field '{name}' appears twice")
        result[name] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise MeshkitError("invalid_config", f"{text} is not a JSON value")
