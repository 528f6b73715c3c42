"""How a command gets its work done: by the daemon of its home if there is one, else in this process.

Either way the work is the same ``Service.call`` and there is exactly one owner of the home at a time:
the daemon holds its lock, or this process does until the answer is there.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from ..errors import TABLE, MeshkitError
from . import logs
from .failures import as_error
from .home import Home

__all__ = ["OpenService", "Passphrase", "ask_daemon", "run", "run_async"]

T = TypeVar("T")
Passphrase = Callable[[str], str]
Progress = Callable[[dict[str, Any]], None]

# Longer than the daemon needs between two signs of life, shorter than a person's patience.
SILENCE_SECONDS: Final = 30.0
# Another command in progress, or a daemon that is starting: both let go, or answer, within this.
BUSY_SECONDS: Final = 20.0
MAX_REPLY: Final = 256 * 1024 * 1024
_POLL_SECONDS: Final = 0.05


class _Calls(Protocol):
    async def call(
        self, method: str, params: dict[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]: ...


OpenService = Callable[[Home, Passphrase | None], AbstractAsyncContextManager[_Calls]]


def run(
    home: Home,
    method: str,
    params: dict[str, Any],
    *,
    passphrase: Passphrase | None = None,
    on_progress: Progress | None = None,
    open_service: OpenService | None = None,
) -> dict[str, Any]:
    """Do ``method`` for ``home`` and return its result.

    Raises ``not_initialized``, ``home_busy`` (another process works in this home and does not end),
    ``daemon_unreachable``, and whatever the method itself raises. ``on_progress`` is called with plain
    dicts, in this thread.
    """
    home.require_initialized()
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        answer = ask_daemon(home, method, params, on_progress)
        if answer is not None:
            return answer
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(home.hold(wait=0.0))
            except MeshkitError as error:
                if error.code != "home_busy" or time.monotonic() >= deadline:
                    raise
            else:
                if open_service is None:
                    from .service import Service  # the whole of the filesystem: only loaded when needed

                    # What waits here can be told, and waited for, while the byte store is away.
                    open_service = partial(Service.open, absent=method in ("status", "sync"))
                logs.setup_home(home)
                return run_async(
                    partial(_in_process, open_service, home, method, params, passphrase, on_progress)
                )
        time.sleep(_POLL_SECONDS)


async def _in_process(
    open_service: OpenService,
    home: Home,
    method: str,
    params: dict[str, Any],
    passphrase: Passphrase | None,
    on_progress: Progress | None,
) -> dict[str, Any]:
    async with open_service(home, passphrase) as service:
        return await service.call(method, params, on_progress)


def run_async(function: Callable[[], Awaitable[T]]) -> T:
    """Run ``function`` under trio; a classified failure inside exception groups comes out bare."""
    import trio

    try:
        return trio.run(function)
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[0] is not None:
            raise KeyboardInterrupt from None
        failure = as_error(group)
        if failure.code == "internal_error":
            raise
        raise failure from group


def ask_daemon(
    home: Home,
    method: str,
    params: dict[str, Any],
    on_progress: Progress | None = None,
    *,
    silence: float = SILENCE_SECONDS,
) -> dict[str, Any] | None:
    """Send one request to the daemon of ``home`` and return its result; None when there is no daemon.

    ``silence`` is how many seconds without any line count as "does not answer" (``daemon_unreachable``).
    """
    connection = _connect(home, silence)
    if connection is None:
        return None
    with connection:
        request = {"id": 1, "method": method, "params": params}
        try:
            connection.sendall(json.dumps(request, separators=(",", ":")).encode("ascii") + b"\n")
            for line in _lines(connection):
                message = json.loads(line)
                if "result" in message:
                    return _checked(message["result"])
                if "error" in message:
                    raise _error(message["error"])
                if "progress" in message and on_progress is not None:
                    on_progress(message["progress"])
        except TimeoutError:
            detail = f"no answer to {method} for {silence:.0f} seconds"
            raise MeshkitError("daemon_unreachable", detail) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise MeshkitError("daemon_unreachable", f"{method}: {type(error).__name__}") from error
    raise MeshkitError("daemon_unreachable", f"it ended during {method}")


def _connect(home: Home, timeout: float) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        with home.socket_address() as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except TimeoutError:
        connection.close()
        raise MeshkitError("daemon_unreachable", "its control socket is full") from None
    except OSError as error:
        connection.close()
        raise MeshkitError("daemon_unreachable", f"{home.socket_path}: {error.strerror}") from error
    return connection


def _lines(connection: socket.socket) -> Iterator[bytes]:
    data = bytearray()
    while chunk := connection.recv(1 << 16):
        start = len(data)
        data += chunk
        if len(data) > MAX_REPLY:
            raise ValueError("reply too long")
        if data.find(b"\n", start) < 0:
            continue
        *whole, rest = data.split(b"\n")
        yield from (bytes(line) for line in whole)
        data = rest


def _checked(result: Any) -> dict[str, Any]:
    if not isinstance(result, dict):
        raise TypeError("a result is an object")
    return result


def _error(value: Any) -> MeshkitError:
    code = value["code"]
    if code not in TABLE:  # a newer daemon than this command: keep what it said
        return MeshkitError("internal_error", f"{code}: {value.get('message', '')} {value.get('detail', '')}")
    return MeshkitError(code, str(value.get("detail", "")))
