"""The real service in the test's own process: its application behind Hypercorn, in a trio loop of its own thread.

    with InnerService(home) as service:        # home: EmbeddedMetadata or PostgresMetadata
        ... service.url ...

Against tests/service.py, which starts `meshkitfs serve`, a test can put its clock and its limits into it, and it
is there in a tenth of a second. Sockets, HTTP, application and database are the same.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from meshkitfs.metadata.service import Quotas, Service
from meshkitfs.server._app import build
from meshkitfs.server._hub import Hub
from meshkitfs.server._limits import Rate
from meshkitfs.server._sockets import names_of, open_sockets
from meshkitfs.server.settings import Settings

UNLIMITED = Rate(1e6, 1e6)


class InnerService:
    """``join`` is the policy, ``token`` what ``token`` asks for; ``names`` are authorities beside its own.

    ``tls`` is a pair of PEM files (certificate chain, key). ``clock`` may be replaced at any time. ``more`` is
    for `Service`: what makes it a release service too.
    """

    def __init__(self, home, join="open", token=None, names=(), tls=None, **more):
        self.home = home
        self.clock = time.time
        self.refused = []
        self._join, self._token, self._names, self._tls, self._more = join, token, names, tls, more
        self._started = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self._thread.start()
        started = self._started.get(timeout=30)
        if isinstance(started, BaseException):
            raise started
        self.port = started

    @property
    def url(self):
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def _run(self):
        try:
            trio.run(self._main)
        except BaseException as error:
            self._started.put(error)
            raise

    async def _main(self):
        self._trio = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        self.service = Service(self.home, Quotas(), clock=lambda: self.clock(), **self._more)
        sockets = open_sockets(("127.0.0.1:0",))
        settings = Settings(
            join=self._join, names=names_of(sockets) | set(self._names), identity_rate=UNLIMITED,
            address_rate=UNLIMITED,
        )  # fmt: skip
        hub = Hub(self.home.database)
        token = None if self._token is None else self._token.encode()
        app = build(self.service, hub, settings, token, self.refused.append)
        config = Config()
        config.bind = [f"fd://{os.dup(sock.fileno())}" for sock in sockets]
        config.accesslog, config.errorlog = None, None
        config.graceful_timeout = 1.0
        if self._tls:
            config.certfile, config.keyfile = map(str, self._tls)
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            run = partial(serve, app, config, shutdown_trigger=self._stop.wait, mode="asgi")
            await nursery.start(run)
            self._started.put(sockets[0].getsockname()[1])
            await self._stop.wait()
            hub.stop()
            nursery.cancel_scope.cancel()
        for sock in sockets:
            sock.close()

    def run(self, work, *args):
        """Run something in the service's loop."""
        return trio.from_thread.run(work, *args, trio_token=self._trio)

    def invite(self):
        """An invitation of the operator's."""
        return self.run(self.service.invite, None, 3600)[0]

    def close(self):
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the service does not end"

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
