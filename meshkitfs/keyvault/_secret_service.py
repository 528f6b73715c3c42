"""The wrapping key in the desktop's Secret Service (gnome-keyring, KWallet, KeePassXC) over D-Bus.

The `keyring` package does the storing, but never the choosing: left alone it may pick a chain of back ends
that ends in a plaintext file, or whatever an environment variable or keyringrc.cfg names. Here the one
class is named, its type is checked, and what it took from the environment is dropped.

The home directory keeps ``keyvault.secret-service``, which holds no secret: the random name of the item,
so that a home can be moved and two homes never share a key.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from meshkitfs.core.secret_memory import wipe_text
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import KEY_BYTES, SECRET_SERVICE, KeyVaultReport, check_size
from meshkitfs.keyvault._deadline import within
from meshkitfs.keyvault._files import create_private, read_private, remove, vault_file

# The keyring and D-Bus libraries are imported where they are used: they cost a tenth of a second, and most
# commands never need them.
if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

PROBE_SECONDS: Final = 10.0
"""Longest wait for a question that asks no person."""
PROMPT_SECONDS: Final = 120.0
"""Longest wait for a person to answer the keyring's own prompt."""

_SERVICE: Final = "meshkitfs"
_POINTER: Final = "meshkitfs secret-service key vault 1\n"
_NO_OBJECT: Final = "/"
# Defined by the Secret Service specification as the one that is forgotten at the end of the session.
_SESSION_COLLECTION: Final = "/org/freedesktop/secrets/collection/session"
_FORGOTTEN: Final = "the default keyring is forgotten at the end of the session"
_NO_KEY: Final = "the keyring's item for this home is not a key"

_T = TypeVar("_T")


class _Look(NamedTuple):
    """What the service shows without asking anybody."""

    collection: str | None  # D-Bus path of the collection the item is in, else of the default one
    locked: bool
    found: bool  # the item is in `collection`


class SecretServiceVault:
    """One item in the default collection of the Secret Service on the session bus."""

    kind: Final = SECRET_SERVICE

    def __init__(self, directory: Path, fallback: str | None = None, backend: object | None = None) -> None:
        """``backend`` replaces the back end; anything but `keyring`'s Secret Service is refused when used."""
        self._pointer = vault_file(directory, self.kind)
        self._fallback = fallback
        self._backend = backend

    def report(self) -> KeyVaultReport:
        absent = partial(KeyVaultReport.absent, self.kind, self._fallback)
        try:
            item = self._item()
        except MeshkitError as error:
            if error.code != "identity_not_found":
                return absent(error.detail)
            item = None
        try:
            look = _within(PROBE_SECONDS, lambda: _look(item))
        except MeshkitError as error:
            return absent(error.detail)
        if look.collection is None:
            return KeyVaultReport.absent(
                self.kind, self._fallback, "the Secret Service has no default keyring"
            )
        if item is not None and not look.found and not look.locked:
            return KeyVaultReport.absent(
                self.kind, self._fallback, "the Secret Service answers, but has no key for this home"
            )
        persistent = look.collection != _SESSION_COLLECTION
        return KeyVaultReport(
            kind=self.kind,
            available=persistent,
            persistent=persistent,
            exportable=True,
            hardware_backed=False,
            user_presence=False,
            locked=look.locked,
            fallback=self._fallback,
            detail=f"in {look.collection}: encrypted with the keyring's password when locked; while it is "
            "unlocked every program of this session can ask for the key",
        )

    def create(self, secret: bytes) -> None:
        check_size(secret)
        if os.path.lexists(self._pointer):
            raise MeshkitError("already_initialized", f"{self._pointer} exists")
        item = secrets.token_hex(16)
        _within(PROMPT_SECONDS, lambda: self._store(item, secret))
        try:
            # Last, so that a pointer never points at a key that was not stored.
            create_private(self._pointer, f"{_POINTER}{item}\n".encode())
        except MeshkitError:
            _within(PROMPT_SECONDS, lambda: self._delete(item))
            raise

    def load(self) -> bytes:
        item = self._item()
        text = _within(PROMPT_SECONDS, lambda: self._fetch(item))
        if text is None:
            raise MeshkitError(
                "keyvault_unavailable",
                f"the Secret Service answers, but has no key for this home (item {item}): was its keyring "
                "reset, or is this another user's session?",
            )
        try:
            return _decode(text)
        finally:
            wipe_text(text)

    def destroy(self) -> None:
        try:
            item = self._item()
        except MeshkitError as error:
            if error.code == "identity_not_found":
                return
            raise
        _within(PROMPT_SECONDS, lambda: self._delete(item))
        remove(self._pointer)

    def asks(self) -> None:
        """The keyring asks by itself, where there is a display."""
        return

    def forget(self) -> None:
        """Nothing is kept here. The keyring is the session's: locking it would lock everybody's."""

    def _item(self) -> str:
        content = read_private(self._pointer).decode("ascii", "replace")
        item = content.removeprefix(_POINTER).removesuffix("\n")
        if len(item) != 32 or set(item) - set("0123456789abcdef") or content != f"{_POINTER}{item}\n":
            raise MeshkitError("identity_corrupt", f"{self._pointer} is damaged")
        return item

    # -- the rest runs inside _within() --------------------------------------------------------------

    def _store(self, item: str, secret: bytes) -> None:
        if _look(None).collection == _SESSION_COLLECTION:
            raise MeshkitError(
                "keyvault_refused", "the default keyring is forgotten at the end of the session"
            )
        backend = self._keyring(None)
        backend.set_password(_SERVICE, _username(item), b64encode(secret).decode())
        stored = self._fetch(item)
        if stored is None or _decode(stored) != secret:
            raise MeshkitError("keyvault_unavailable", "the Secret Service did not keep the key")

    def _fetch(self, item: str) -> str | None:
        try:
            return self._keyring(_look(item).collection).get_password(_SERVICE, _username(item))
        except UnicodeDecodeError:
            raise MeshkitError("identity_corrupt", _NO_KEY) from None

    def _delete(self, item: str) -> None:
        look = _look(item)
        # Where there is no collection at all, there is nothing to delete.
        if look.collection is not None and (look.found or look.locked):
            self._keyring(look.collection).delete_password(_SERVICE, _username(item))

    def _keyring(self, collection: str | None) -> KeyringBackend:
        from keyring.backends import SecretService

        # The default is reached over its alias, which also creates it (with a prompt) where there is none.
        choice: type[KeyringBackend] = SecretService.Keyring
        backend = require_secret_service(choice() if self._backend is None else self._backend)
        own = backend.with_properties()
        # KEYRING_PROPERTY_* of the environment became attributes; they could redirect the key.
        vars(own).clear()
        vars(own)["appid"] = _SERVICE
        if collection is not None:
            vars(own)["preferred_collection"] = collection
        return own

    def __repr__(self) -> str:
        return f"SecretServiceVault({str(self._pointer)!r})"


def require_secret_service(backend: object) -> KeyringBackend:
    """Return ``backend`` if it is `keyring`'s Secret Service itself; ``keyvault_refused`` for all others.

    Exactly that class: chains, plaintext and null back ends, and subclasses of unknown doing, are refused.
    """
    from keyring.backends import SecretService

    if type(backend) is not SecretService.Keyring:
        kind = type(backend)
        raise MeshkitError(
            "keyvault_refused", f"{kind.__module__}.{kind.__qualname__} is not the Secret Service"
        )
    return backend


def unusable_because() -> str | None:
    """Why a new key should not go to the Secret Service of this session; None if it can. Asks nobody."""
    try:
        look = _within(PROBE_SECONDS, lambda: _look(None))
    except MeshkitError as error:
        return error.detail
    if look.collection == _SESSION_COLLECTION:
        return _FORGOTTEN
    can_ask = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if look.locked and not can_ask:
        return "its keyring is locked or missing, and there is no display to ask for its password on"
    return None


def _look(item: str | None) -> _Look:
    import secretstorage
    from secretstorage.util import DBusAddressWrapper

    with contextlib.closing(secretstorage.dbus_init()) as connection:
        service = DBusAddressWrapper("/org/freedesktop/secrets", "org.freedesktop.Secret.Service", connection)
        path, found = _NO_OBJECT, False
        if item is not None:
            # In every collection: the default may be another one today than when the key was stored.
            attributes = {"service": _SERVICE, "username": _username(item)}
            for match in secretstorage.search_items(connection, attributes):
                path, found = match.item_path.rpartition("/")[0], True
                break
        if not found:
            (path,) = service.call("ReadAlias", "s", "default")
        if path == _NO_OBJECT:
            return _Look(None, locked=True, found=False)
        return _Look(path, secretstorage.Collection(connection, path).is_locked(), found)


def _username(item: str) -> str:
    return f"key of home {item}"


def _decode(text: str) -> bytes:
    try:
        secret = b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != KEY_BYTES:
        raise MeshkitError("identity_corrupt", _NO_KEY)
    return secret


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """Run ``work`` with a deadline (the D-Bus library has none) and every failure classified."""

    def run() -> _T:
        with _classified():
            return work()

    late = MeshkitError("identity_locked", f"the Secret Service did not answer within {seconds:.0f} s")
    return within(seconds, run, late)


@contextlib.contextmanager
def _classified() -> Iterator[None]:
    try:
        yield
    except MeshkitError:
        raise
    except ImportError as error:
        raise MeshkitError("keyvault_unavailable", f"Python's {error.name} is not installed") from None
    # What a peer on the bus can make the libraries raise cannot be listed, and whatever it is, the key is
    # not available. The text is kept only where it cannot quote what was sent: a secret, in one case.
    except Exception as error:
        raise _classify(error) from None


def _classify(error: Exception) -> MeshkitError:
    from keyring.errors import InitError, KeyringLocked
    from secretstorage.exceptions import LockedException, SecretServiceNotAvailableException

    if isinstance(error, KeyringLocked | LockedException):
        return MeshkitError("identity_locked", "the keyring is locked, and nobody unlocked it")
    if isinstance(error, InitError):
        return MeshkitError("keyvault_unavailable", "there is no default keyring, and none was made")
    if isinstance(error, SecretServiceNotAvailableException):
        return MeshkitError("keyvault_unavailable", f"no Secret Service on the session bus: {error}")
    if isinstance(error, OSError):
        return MeshkitError(
            "keyvault_unavailable", f"no session bus: {error.strerror or type(error).__name__}"
        )
    return MeshkitError("keyvault_unavailable", f"the Secret Service failed ({type(error).__name__})")
