"""The daemon's control socket: how a command reaches the process that owns the home.

One connection carries one request. Both directions are JSON, one object a line::

    -> {"id": 1, "method": "share.list", "params": {}}
    <- {"id": 1, "alive": true}                          every few seconds while it works
    <- {"id": 1, "progress": {"done": 3, "total": 10}}   any number of times
    <- {"id": 1, "result": {...}}                        or {"id": 1, "error": {"code": ...}}

Who may speak: the socket is mode 0600 in a directory of mode 0700, and the kernel is asked who connected
(SO_PEERCRED); only the user who runs the daemon is answered. There is no other authentication, because
whoever is that user can read the daemon's memory anyway.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ..core.secret_memory import wipe
from ..errors import MeshkitError
from .failures import as_error
from .home import Home

__all__ = ["INTERRUPTIBLE", "Call", "Progress", "Stop", "serve"]

Progress = Callable[[dict[str, Any]], None]
Call = Callable[[str, dict[str, Any], Progress], Awaitable[dict[str, Any]]]
Stop = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]

MAX_REQUEST: Final = 1024 * 1024
REQUEST_SECONDS: Final = 10.0
ALIVE_SECONDS: Final = 5.0
REPLY_SECONDS: Final = 5.0
MAX_CONNECTIONS: Final = 32
MAX_WAITING_PROGRESS: Final = 64

# Calls that only wait or look, or can be gone on with: when the person who asked goes away (Ctrl-C), so does
# the work. Anything else has begun to change something and is finished.
INTERRUPTIBLE: Final = frozenset(
    {"sync", "doctor", "explain", "status", "history", "verify", "gc", "repair", "share.reencrypt"}
)

_log = logging.getLogger(__name__)


async def serve(
    home: Home,
    call: Call,
    *,
    info: Callable[[], dict[str, Any]],
    stop: Stop,
    owner: int | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests at ``home.socket_path`` until cancelled. The caller must hold the home.

    ``call(method, params, progress)`` does every method but two, which are the daemon's own:
    ``daemon.info`` answers the process id, the version and what ``info()`` adds (``mountpoint``), and
    ``daemon.stop`` awaits ``stop(params, progress)``; a reply that is ready when this is cancelled is
    still sent. ``owner`` is the uid that may speak (default: the uid of this process).
    """
    if not home.held:
        raise RuntimeError("serve() needs the home's lock: it replaces the socket")
    listener = _listen(home)
    server = _Server(call, info, stop, os.getuid() if owner is None else owner)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, server.connection, [trio.SocketListener(listener)])
            task_status.started()
    finally:
        home.socket_path.unlink(missing_ok=True)


def _listen(home: Home) -> trio.socket.SocketType:
    # Only the holder of the home's lock gets here, so a socket that is there is a dead one.
    path = home.socket_path
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with home.socket_address() as address:
            sock.bind(address)
        path.chmod(0o600)
        sock.listen(MAX_CONNECTIONS)
        return trio.socket.from_stdlib_socket(sock)
    except OSError as error:
        sock.close()
        raise MeshkitError("invalid_config", f"control socket {path}: {error.strerror}") from error


class _Server:
    def __init__(self, call: Call, info: Callable[[], dict[str, Any]], stop: Stop, owner: int) -> None:
        self._call = call
        self._info = info
        self._stop = stop
        self._owner = owner
        self._open = 0

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection. Nothing that happens on it may end the daemon."""
        self._open += 1
        try:
            if self._open > MAX_CONNECTIONS:
                _log.warning("too many control connections")
            elif self._allowed(stream):
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side went away; what it asked for was done or given up already
        except Exception:
            _log.exception("control connection failed")
        finally:
            self._open -= 1
            await trio.aclose_forcefully(stream)

    def _allowed(self, stream: trio.SocketStream) -> bool:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _gid = struct.unpack("3i", raw)
        if uid == self._owner:
            return True
        _log.warning("control connection refused", extra={"fields": {"uid": uid, "pid": pid}})
        return False

    async def _converse(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(REQUEST_SECONDS) as waiting:
            line = await _read_line(stream)
        if waiting.cancelled_caught:
            return
        try:
            number, method, params = _parse(line)
            wipe(line)  # it may be an 'unlock', with its key
        except MeshkitError as error:
            await _send(stream, {"id": None, "error": error.as_dict()})
            return
        answer: dict[str, Any] = {}
        try:
            await self._work(stream, number, method, params, answer)
        finally:
            if not answer:
                answer["error"] = MeshkitError("operation_aborted", "the daemon is stopping").as_dict()
            await _send(stream, {"id": number, **answer})

    async def _work(
        self,
        stream: trio.SocketStream,
        number: int,
        method: str,
        params: dict[str, Any],
        answer: dict[str, Any],
    ) -> None:
        """Run one method beside the tasks that report its progress, and put what it came to into ``answer``.

        ``answer`` is filled in rather than returned: the reply to ``daemon.stop`` is ready at the moment
        everything around it is cancelled, and must survive that.
        """
        send, receive = trio.open_memory_channel[dict[str, Any]](MAX_WAITING_PROGRESS)

        def progress(event: dict[str, Any]) -> None:
            # Progress is news, not a log: when nobody reads it, the work goes on and the news is dropped.
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                send.send_nowait(event)

        async with trio.open_nursery() as nursery:
            caller = trio.CancelScope()
            nursery.start_soon(_report, stream, number, receive)
            nursery.start_soon(_watch, stream, caller if method in INTERRUPTIBLE else None)
            with caller:
                answer.update(await self._run(method, params, progress))
            nursery.cancel_scope.cancel()

    async def _run(self, method: str, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        try:
            if method == "daemon.info":
                return {"result": {"pid": os.getpid(), **self._info()}}
            if method == "daemon.stop":
                return {"result": await self._stop(params, progress)}
            result = await self._call(method, params, progress)
            json.dumps(result)  # what cannot be said is found here, where it can still become an error
            return {"result": result}
        except Exception as error:
            failure = as_error(error)
            if failure.code == "internal_error":
                _log.exception("control method failed", extra={"fields": {"method": method}})
            return {"error": failure.as_dict()}


async def _report(
    stream: trio.SocketStream, number: int, events: trio.MemoryReceiveChannel[dict[str, Any]]
) -> None:
    """Send progress as it comes, and a sign of life when there is none."""
    while True:
        line: dict[str, Any] = {"id": number, "alive": True}
        with trio.move_on_after(ALIVE_SECONDS):
            line = {"id": number, "progress": await events.receive()}
        try:
            await _send(stream, line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def _watch(stream: trio.SocketStream, scope: trio.CancelScope | None) -> None:
    """Wait for the other side to go away, and then give up the work if it may be given up."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await stream.receive_some(4096):
            pass  # nothing more is expected on this connection
    if scope is not None:
        scope.cancel()


async def _read_line(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    while b"\n" not in data:
        chunk = await stream.receive_some(65536)
        if not chunk or len(data) + len(chunk) > MAX_REQUEST:
            return b""
        data += chunk
        wipe(chunk)
    with memoryview(data) as whole, whole[: data.index(b"\n")] as line:
        found = bytes(line)
    wipe(data)
    return found


def _parse(line: bytes) -> tuple[int, str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict) or set(request) != {"id", "method", "params"}:
        raise MeshkitError("invalid_argument", "a request is an object with id, method and params")
    number, method, params = request["id"], request["method"], request["params"]
    if type(number) is not int or not isinstance(method, str) or not isinstance(params, dict):
        raise MeshkitError("invalid_argument", "a request has an integer id, a method name and object params")
    return number, method, params


async def _send(stream: trio.SocketStream, line: dict[str, Any]) -> None:
    """Send one whole line, also while being cancelled; a reader that stalls loses its connection instead."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + REPLY_SECONDS) as scope:
        await stream.send_all(_encode(line))
    if scope.cancelled_caught:
        await trio.aclose_forcefully(stream)
        raise trio.BrokenResourceError("the reader of the control connection stalled")


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=_unsendable).encode("ascii") + b"\n"


def _unsendable(value: object) -> Any:
    # Only progress can get here with something odd (results were tried); a number is always safe to show.
    return value if isinstance(value, (int, float)) and math.isfinite(value) else type(value).__name__
