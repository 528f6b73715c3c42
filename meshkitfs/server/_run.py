"""Running the service: sockets, TLS, the tasks beside it, and ending it without cutting anybody off."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import ssl
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata.service import Refused, ReleaseKeys, Service
from meshkitfs.net import Secret
from meshkitfs.net.scrape import Place, show
from meshkitfs.net.signing import LIFETIME_S
from meshkitfs.policy import AuthZen, Deciders
from meshkitfs.server._app import build
from meshkitfs.server._demands import Demands
from meshkitfs.server._hub import Hub
from meshkitfs.server._metrics import Metrics
from meshkitfs.server._open import open_home
from meshkitfs.server._sockets import addresses_of, names_of, open_sockets
from meshkitfs.server.settings import Settings

__all__ = ["invite", "serve"]

_log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 10.0  # for the requests that are under way when it ends
HEADER_SECONDS: Final = 30.0  # for the first request of a connection, and between two
READ_SECONDS: Final = 60.0  # of silence of a connection, more than a poll lasts
FLUSH_SECONDS: Final = 1.0
TIDY_SECONDS: Final = 60.0
WAITING_LINES: Final = 20_000  # of the audit log


async def serve(settings: Settings, started: Callable[[list[str]], None]) -> None:
    """Serve until SIGTERM or SIGINT. ``started`` is called with the addresses that are listened on.

    Raises metadata_unavailable, invalid_config.
    """
    token = settings.join_token.load()
    secret = settings.release_key.load()
    release = None if secret is None else ReleaseKeys.derive(secret.reveal())
    policy_token = settings.policy_token.load()
    config = _config(settings)
    home = await trio.to_thread.run_sync(open_home, settings)
    try:
        sockets = open_sockets(settings.listen)
        config.bind = [f"fd://{os.dup(sock.fileno())}" for sock in sockets]
        settings = dataclasses.replace(settings, names=settings.names | names_of(sockets))
        service = Service(
            home,
            settings.quotas,
            audit_days=settings.audit_days,
            release=release,
            release_seconds=settings.release_seconds,
        )
        deciders = Deciders(AuthZen(settings.release_policy) if settings.release_policy else None)
        if service.releasing is not None:
            service.releasing.conditions = Demands(home, deciders)
        hub = Hub(home.database)
        audit = _Audit(service)
        metrics = Metrics() if settings.metrics else None
        app: Any = build(
            service, hub, settings, _bytes(token), _refused(audit, metrics), _bytes(policy_token)
        )
        if metrics is not None:
            home.observe = metrics.transaction
            app = metrics.around(app)
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(_signals, stop)
            await nursery.start(hub.run)
            nursery.start_soon(audit.run)
            nursery.start_soon(_tidy, service)
            if metrics is not None:
                place = Place.parse(settings.metrics, remote=settings.metrics_remote)
                await nursery.start(show, place, metrics.registry)
            async with trio.open_nursery() as serving:
                run = partial(hypercorn_serve, app, config, shutdown_trigger=stop.wait, mode="asgi")
                await serving.start(run)
                started(addresses_of(sockets, settings.tls is not None))
                await stop.wait()
                hub.stop()  # polls are answered now, and the connections can end
                _end_anyway()
            nursery.cancel_scope.cancel()
        await audit.flush()
        await deciders.aclose()
    finally:
        home.close()


async def invite(settings: Settings, seconds: int) -> tuple[str, int]:
    """Make an invitation in the operator's name: its code and its end. Raises metadata_unavailable."""
    if seconds < 60:
        raise MeshkitError("invalid_argument", "an invitation is good for at least a minute")
    home = await trio.to_thread.run_sync(open_home, settings)
    try:
        return await Service(home, settings.quotas).invite(None, seconds)
    finally:
        home.close()


def _refused(audit: _Audit, metrics: Metrics | None) -> Callable[[Refused], None]:
    """Return who is told of each refusal: the audit log, and the metrics if there are any."""
    if metrics is None:
        return audit.add

    def told(line: Refused) -> None:
        metrics.refused(line)
        audit.add(line)

    return told


def _bytes(secret: Secret | None) -> bytes | None:
    return None if secret is None else secret.reveal().encode()


def _end_anyway() -> None:
    """Should a client keep a connection for longer than the grace: what was acknowledged is safe, go."""
    timer = threading.Timer(GRACE_SECONDS + 5, os._exit, (0,))
    timer.daemon = True
    timer.start()


async def _signals(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for _ in received:
            stop.set()


async def _tidy(service: Service) -> None:
    while True:
        try:
            await service.tidy(LIFETIME_S)
        except MeshkitError as error:
            _log.warning("could not tidy up: %s (%s)", error.code, error.detail)
        await trio.sleep(TIDY_SECONDS)


class _Audit:
    """Lines for the audit log that are not part of a transaction: written together, once a second."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lines: deque[Refused] = deque()
        self._lost = 0

    def add(self, line: Refused) -> None:
        """Never waits. More lines than can be written are counted instead."""
        if len(self._lines) >= WAITING_LINES:
            self._lost += 1
        else:
            self._lines.append(line)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await trio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits; on failure it waits on."""
        lines = list(self._lines)
        if self._lost:
            lines.append((self._service.now(), "-", "lost", None, str(self._lost)))
        if not lines:
            return
        lost = self._lost
        try:
            await self._service.note_refusals(lines)
        except MeshkitError as error:
            _log.warning("the audit log waits: %s (%s)", error.code, error.detail)
            return
        self._lost -= lost
        for _ in range(len(lines) - bool(lost)):
            self._lines.popleft()


def _config(settings: Settings) -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("meshkitfs.server.http")
    config.graceful_timeout = GRACE_SECONDS
    config.keep_alive_timeout = HEADER_SECONDS
    config.read_timeout = int(READ_SECONDS)
    config.include_server_header = False
    config.h11_max_incomplete_size = 32 << 10
    config.websocket_max_message_size = 1
    config.max_app_queue_size = 16
    if settings.tls is not None:
        config.certfile, config.keyfile = str(settings.tls.certificate), str(settings.tls.key)
        if settings.tls.client_ca is not None:
            config.ca_certs = str(settings.tls.client_ca)
            config.verify_mode = ssl.CERT_REQUIRED
        try:
            config.create_ssl_context()
        except (OSError, ssl.SSLError, ValueError) as error:
            raise MeshkitError("invalid_config", f"field 'tls': {type(error).__name__}: {error}") from None
    return config
