"""A home: the one directory that holds an identity, this device's memory and the daemon's socket.

Everything a person owns here lies below one root, so that ``MESHKITFS_HOME`` is enough to be somebody
else on the same machine::

    meshkit.config.json   what is used (no secrets)        blocks/       the default byte store
    identity.sealed       the sealed private keys          metadata.db   the default metadata store
    device.sealed         the keys of this one of several devices
    keyvault.*            the key vault's file             cache/        sealed blocks on their way
    state.db              this device's encrypted memory   log/  run/    logs; the control socket
    lock                  held by the one process that may write here
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from ..errors import MeshkitError

__all__ = ["Home"]

CONFIG_NAME: Final = "meshkit.config.json"
_ADDRESS_MAX: Final = 100  # sun_path holds 108 bytes with its NUL; some tools stop earlier
_POLL_SECONDS: Final = 0.05


class Home:
    """The paths of one home directory and the lock that makes one process its owner.

    The object itself touches nothing until `ensure` or `hold` is called.
    """

    def __init__(
        self, root: str | os.PathLike[str], config_path: str | os.PathLike[str] | None = None
    ) -> None:
        self.root: Final = Path(os.path.abspath(os.path.expanduser(root)))
        self.config_path: Final = (
            Path(os.path.abspath(os.path.expanduser(config_path))) if config_path else self.root / CONFIG_NAME
        )
        self.identity_file: Final = self.root / "identity.sealed"
        self.device_file: Final = self.root / "device.sealed"
        self.state_db: Final = self.root / "state.db"
        self.cache_dir: Final = self.root / "cache"
        self.blocks_dir: Final = self.root / "blocks"
        self.metadata_db: Final = self.root / "metadata.db"
        self.log_dir: Final = self.root / "log"
        self.log_file: Final = self.log_dir / "meshkitfs.log"
        self.run_dir: Final = self.root / "run"
        # Inside the home and nowhere else: a path below XDG_RUNTIME_DIR would differ between a login
        # session, cron and sudo, and the command would then not find the daemon that holds the lock.
        self.socket_path: Final = self.run_dir / "control.sock"
        self.lock_path: Final = self.root / "lock"
        self._depth = 0

    def __repr__(self) -> str:
        return f"Home({str(self.root)!r})"

    @classmethod
    def locate(
        cls,
        home: str | None = None,
        config: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Home:
        """Return the home that is meant: the option, ``MESHKITFS_HOME``, or the XDG data directory.

        ``config`` (or ``MESHKIT_CONFIG``) names another configuration file than the one in the home.
        """
        root = home or environ.get("MESHKITFS_HOME")
        if not root:
            data = environ.get("XDG_DATA_HOME", "")
            # The XDG specification says that a relative value is to be ignored.
            base = data if os.path.isabs(data) else os.path.join(os.path.expanduser("~"), ".local", "share")
            root = os.path.join(base, "meshkitfs")
        return cls(root, config or environ.get("MESHKIT_CONFIG") or None)

    @property
    def initialized(self) -> bool:
        """Whether an identity was created here."""
        return self.identity_file.is_file()

    def require_initialized(self) -> None:
        """Raise ``not_initialized`` unless there is an identity here."""
        if not self.initialized:
            raise MeshkitError("not_initialized", f"no identity in {self.root}")

    def ensure(self) -> None:
        """Create the directories that are missing, private to this user, and check the ones that are there.

        Raises ``invalid_config`` when the root belongs to somebody else, may be written by others, or
        cannot be created.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = self.root.stat()
            if not stat.S_ISDIR(info.st_mode):
                raise NotADirectoryError(20, "not a directory", str(self.root))
            if info.st_uid != os.geteuid():
                raise MeshkitError(
                    "invalid_config", f"the home directory {self.root} is owned by uid {info.st_uid}"
                )
            if info.st_mode & 0o022:
                raise MeshkitError(
                    "invalid_config",
                    f"others may write in the home directory {self.root}; run 'chmod go-w {self.root}'",
                )
            for directory in (self.log_dir, self.run_dir):
                directory.mkdir(mode=0o700, exist_ok=True)
                directory.chmod(0o700)
        except OSError as error:
            raise MeshkitError(
                "invalid_config", f"home directory {self.root}: {error.strerror or error}"
            ) from error

    @contextlib.contextmanager
    def socket_address(self) -> Iterator[str]:
        """Yield an address for the control socket that fits into ``sun_path``, however deep the home is.

        A path that is too long is reached through its directory's descriptor in /proc. Raises OSError.
        """
        if len(os.fsencode(self.socket_path)) <= _ADDRESS_MAX:
            yield str(self.socket_path)
            return
        directory = os.open(self.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{directory}/{self.socket_path.name}"
        finally:
            os.close(directory)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._depth > 0

    @contextlib.contextmanager
    def hold(self, wait: float = 1.0) -> Iterator[None]:
        """Own this home for the duration of the block; entering it again in the same process is free.

        ``wait`` is how many seconds to wait for another process to let go (not 0 by default: `holder` in
        another process takes the lock for an instant to look). Raises ``home_busy``, whose detail names the
        other process. The kernel releases the lock when a process dies, however it does.
        """
        if self._depth == 0:
            descriptor = self._acquire(wait)
        else:
            descriptor = -1
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if descriptor >= 0:
                os.close(descriptor)

    def holder(self) -> int | None:
        """Return the process id of whoever holds this home now, or None when nobody does."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_pid(descriptor) or 0
        finally:
            os.close(descriptor)
        return None

    def wait_released(self, wait: float) -> bool:
        """Wait up to ``wait`` seconds until no process holds this home; say whether that happened."""
        deadline = time.monotonic() + wait
        while self.holder() is not None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _acquire(self, wait: float) -> int:
        self.ensure()
        deadline = time.monotonic() + wait
        try:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise MeshkitError("invalid_config", f"{self.lock_path}: {error.strerror}") from error
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        pid = _read_pid(descriptor)
                        raise MeshkitError(
                            "home_busy", f"{self.root} is held by process {pid or 'unknown'}"
                        ) from None
                    time.sleep(_POLL_SECONDS)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).encode() + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _read_pid(descriptor: int) -> int | None:
    """Return the process id the lock file names; it is only for the message, the lock is the fact."""
    try:
        pid = json.loads(os.pread(descriptor, 200, 0))["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) else None
