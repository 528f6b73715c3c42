"""A small HTTP server for tests: real sockets, one handler, full control over what goes out.

    with HttpServer(handler) as server:     # async def handler(request, connection) -> Answer | None
        ... server.url ...

It runs in a trio loop of its own thread, so that a server that hangs does not hang the test. A handler that
returns None has said everything itself, byte for byte, through ``connection``; that connection is then closed.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
from dataclasses import dataclass, field
from functools import partial

import h11
import trio


@dataclass
class Request:
    """One request; header names in lower case."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def path(self):
        return self.target.partition("?")[0]

    def header(self, name):
        return next((value.decode() for key, value in self.headers if key == name.encode()), None)


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)

    def to_bytes(self, status_line=b""):
        lines = [b"HTTP/1.1 %d X" % self.status]
        lines += [f"{name}: {value}".encode() for name, value in self.headers]
        if not any(name.lower() == "content-length" for name, _ in self.headers):
            lines.append(b"Content-Length: %d" % len(self.body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


class HttpServer:
    """``handler`` answers each request; ``tls`` is an `ssl.SSLContext` to speak TLS with."""

    def __init__(self, handler, tls: ssl.SSLContext | None = None):
        self._handler = handler
        self._tls = tls
        self._started = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="http server", daemon=True)
        self._thread.start()
        self.port = self._started.get(timeout=30)
        if isinstance(self.port, BaseException):
            raise self.port

    @property
    def url(self):
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def _run(self):
        async def main():
            self._token = trio.lowlevel.current_trio_token()
            self._end = trio.Event()
            async with trio.open_nursery() as self.nursery:
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                if self._tls:
                    listeners = [trio.SSLListener(listener, self._tls) for listener in listeners]
                serve = partial(trio.serve_listeners, self._serve, listeners)
                self.nursery.start_soon(serve)
                plain = listeners[0].transport_listener if self._tls else listeners[0]
                self._started.put(plain.socket.getsockname()[1])
                await self._end.wait()
                self.nursery.cancel_scope.cancel()

        try:
            trio.run(main)
        except BaseException as error:
            self._started.put(error)
            raise

    async def _serve(self, stream):
        gone = (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError, OSError)
        with contextlib.suppress(*gone):
            async with stream:
                while await self._exchange(stream):
                    pass

    async def _exchange(self, stream):
        parser = h11.Connection(h11.SERVER)
        head, body = None, b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        headers = [(bytes(name), bytes(value)) for name, value in head.headers]
        request = Request(head.method.decode(), head.target.decode(), headers, body)
        answer = await self._handler(request, stream)
        if answer is None:
            return False
        await stream.send_all(answer.to_bytes())
        return True

    def run(self, work, *args):
        """Run something in the server's loop."""
        return trio.from_thread.run(work, *args, trio_token=self._token)

    def close(self):
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._end.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def unused_port():
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reset(stream):
    """Break a connection with a TCP reset instead of an orderly end."""
    while not isinstance(stream, trio.SocketStream):
        stream = stream.transport_stream
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()
