"""What a service tells a Prometheus server of itself: requests, refusals, times. Nobody's names or ids."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from meshkitfs import __version__
from meshkitfs.core.timings import BOUNDS_S
from meshkitfs.errors import TABLE
from meshkitfs.metadata.service import Refused

__all__ = ["Metrics"]

App = Callable[[Any, Any, Any], Awaitable[None]]

# Of a request that got no further than the door: it was refused before anybody looked where it goes.
_NO_ROUTE: Final = "none"
_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Metrics:
    """The metrics of one instance."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge("meshkitfs_service_build", "Which version this is", ["version"], registry=registry)
        build.labels(__version__).set(1)
        self._requests = Counter(
            "meshkitfs_service_requests",
            "Requests answered, by method, route and status",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "meshkitfs_service_request_seconds",
            "Time to the end of the answer, by route; a poll waits on purpose",
            ["route"],
            buckets=BOUNDS_S,
            registry=registry,
        )
        self._open = Gauge("meshkitfs_service_requests_open", "Requests under way", registry=registry)
        self._refusals = Counter(
            "meshkitfs_service_refusals",
            "Requests refused, by code; rate_limited are those over a rate",
            ["code"],
            registry=registry,
        )
        self._database = Histogram(
            "meshkitfs_service_database_seconds",
            "Time of one transaction, waiting for its turn included",
            ["kind"],
            buckets=BOUNDS_S,
            registry=registry,
        )

    def around(self, app: App) -> App:
        """Return ``app`` (ASGI) with its requests counted."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            answered = False

            def count(status: str) -> None:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._requests.labels(method, _route(scope), status).inc()

            async def noted(message: Any) -> None:
                nonlocal answered
                if message["type"] == "http.response.start":
                    # Before it is sent: who has the answer finds it counted.
                    answered = True
                    count(str(message["status"]))
                await send(message)

            begun = time.monotonic()
            self._open.inc()
            try:
                await app(scope, receive, noted)
            finally:
                self._open.dec()
                if not answered:
                    count("none")
                self._seconds.labels(_route(scope)).observe(time.monotonic() - begun)

        return counted

    def refused(self, line: Refused) -> None:
        """Count a line of the audit log about somebody who was refused."""
        outcome = line[-1]
        if outcome in TABLE:
            self._refusals.labels(outcome).inc()

    def transaction(self, kind: str, seconds: float) -> None:
        """Count one transaction: ``kind`` is ``read`` or ``write``."""
        self._database.labels(kind).observe(seconds)


def _route(scope: Any) -> str:
    """The route as it is declared, never the path that was sent."""
    return str(getattr(scope.get("route"), "path", _NO_ROUTE))
