"""Showing metrics to a Prometheus server: one page, at a loopback address or a Unix socket.

It is no web server: ``GET /metrics`` is answered, anything else refused, and each connection has one request,
a deadline and a small size. Who may connect may read: a Unix socket is for its owner alone, a loopback
address for every user of the machine, so what is shown names nobody and nothing.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import h11
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from meshkitfs.errors import MeshkitError

__all__ = ["Place", "show"]

_log = logging.getLogger(__name__)

DEADLINE_S: Final = 10.0
MAX_CONNECTIONS: Final = 16
MAX_REQUEST: Final = 16 << 10
_PATH_MAX: Final = 100  # sun_path holds 108 bytes with its NUL


@dataclass(frozen=True, slots=True)
class Place:
    """Where metrics are shown: ``path`` of a Unix socket, else an IP address ``host`` and a ``port``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str, *, remote: bool = False) -> Place:
        """Return what ``HOST:PORT`` or ``unix:PATH`` means. Raises ``invalid_config``.

        Other addresses than those of this machine are taken only with ``remote``.
        """

        def fail(problem: str) -> NoReturn:
            raise MeshkitError("invalid_config", f"metrics at {text!r}: {problem}")

        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/") or "\0" in path:
                fail("the path of a socket must be absolute")
            if len(os.fsencode(path)) > _PATH_MAX:
                fail(f"the path is longer than {_PATH_MAX} bytes")
            return cls(path=path)
        host, colon, port = text.rpartition(":")
        host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            fail("neither HOST:PORT nor unix:PATH")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            fail("the host must be an IP address, or localhost")
        if not address.is_loopback and not remote:
            fail("not an address of this machine only; 'metrics.allowRemote' in the configuration allows it")
        return cls(str(address), int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/metrics"


async def show(
    place: Place, registry: CollectorRegistry, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Show ``registry`` at ``place`` until cancelled; ``task_status`` is told the address in use.

    Raises ``invalid_config`` when it cannot listen there.
    """
    listener = _listener(place)
    if not place.path:
        place = Place(place.host, listener.socket.getsockname()[1])
    page = _Page(registry, any_host=not place.path and not ipaddress.ip_address(place.host).is_loopback)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, page.connection, [listener])
            task_status.started(str(place))
    finally:
        if place.path:
            with suppress(OSError):
                os.unlink(place.path)


def _listener(place: Place) -> trio.SocketListener:
    family = socket.AF_UNIX if place.path else socket.AF_INET6 if ":" in place.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if place.path:
            _clear(place.path)
            # Private from the moment it exists; no other thread makes files while a daemon starts.
            before = os.umask(0o177)
            try:
                sock.bind(place.path)
            finally:
                os.umask(before)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((place.host, place.port))
        sock.listen(MAX_CONNECTIONS)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except OSError as error:
        sock.close()
        raise MeshkitError("invalid_config", f"metrics at {place}: {error.strerror}") from None


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on any more; anything else stays, and binding fails."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)


class _Page:
    def __init__(self, registry: CollectorRegistry, *, any_host: bool) -> None:
        self._registry = registry
        self._any_host = any_host
        self._open = 0

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection. Nothing that happens on it may end the process."""
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                with trio.move_on_after(DEADLINE_S):
                    await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception:
            _log.exception("showing metrics failed in a way nobody foresaw")
        finally:
            self._open -= 1
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(4096))
        except h11.RemoteProtocolError:
            return
        if not isinstance(event, h11.Request):
            return
        status, kind, body = self._answer(event)
        headers = [("content-type", kind), ("content-length", str(len(body))), ("connection", "close")]
        answer = http.send(h11.Response(status_code=status, headers=headers)) or b""
        answer += http.send(h11.Data(data=body if event.method != b"HEAD" else b"")) or b""
        await stream.send_all(answer)

    def _answer(self, request: h11.Request) -> tuple[int, str, bytes]:
        headers = {name: value.decode("latin-1") for name, value in request.headers}
        if not self._any_host and not _is_here(headers.get(b"host", "")):
            # A page in a browser that has had its own name point to this machine.
            return 403, "text/plain; charset=utf-8", b"address this by its IP address, or as localhost\n"
        if request.target.partition(b"?")[0] != b"/metrics":
            return 404, "text/plain; charset=utf-8", b"there is only /metrics\n"
        if request.method != b"GET":
            return 405, "text/plain; charset=utf-8", b"only GET\n"
        encoder, kind = choose_encoder(headers.get(b"accept", ""))
        return 200, kind, encoder(self._registry)


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine by address, as localhost, or not at all."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() in ("", "localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
