"""A reverse proxy before a real server: it wants credentials, as Kubo does, and spoils answers on command.

What is not spoiled is what the server behind it says.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from servers.process import HOST


class Answer(Exception):
    """What a rule raises to answer in the server's place."""

    def __init__(
        self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str
    ) -> None:
        self.status, self.body, self.headers = status, body, {"Content-Type": kind, **headers}


# Gets method, path with query, and body; may raise `Answer`, or return how to change the server's answer.
Rule = Callable[[str, str, bytes], Callable[[bytes], bytes] | None]


class Proxy:
    """Runs in a thread. ``authorization`` is the header's value that is let through, if any; ``rule`` spoils."""

    def __init__(self, target: str, authorization: str | None = None) -> None:
        self.authorization = authorization
        self.rule: Rule = lambda method, path, body: None
        self.asked: list[str] = []
        parts = urlsplit(target)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.asked.append(f"{self.command} {self.path}")
                try:
                    if proxy.authorization not in (None, self.headers.get("Authorization")):
                        raise Answer(403, b"403 - Forbidden", "text/plain")
                    change = proxy.rule(self.command, self.path, body)
                    status, headers, data = self.forward(body)
                    self.answer(status, headers, change(data) if change is not None else data)
                except Answer as answer:
                    self.answer(answer.status, answer.headers, answer.body)

            def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
                try:
                    # Credentials are for the proxy, if it wants some, or for the server.
                    dropped = ("host", "authorization") if proxy.authorization else ("host",)
                    passed = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                    connection.request(self.command, self.path, body, passed)
                    reply = connection.getresponse()
                    kind = reply.headers.get("Content-Type") or "text/plain"
                    return reply.status, {"Content-Type": kind}, reply.read()
                finally:
                    connection.close()

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign] # clients that left
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
