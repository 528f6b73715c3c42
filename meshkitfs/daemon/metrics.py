"""What a mount tells a Prometheus server of itself: counts, amounts and durations; nobody's names.

Everything is read from what the parts count anyway, at the moment somebody asks. The labels are of small,
closed sets: kinds of requests, codes of the error table, errnos, states; never a share, a path or a person.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from meshkitfs import __version__
from meshkitfs.core.timings import Timings
from meshkitfs.daemon import describe
from meshkitfs.daemon.service import Service
from meshkitfs.fuse.operations import Counters
from meshkitfs.metadata import HttpMetadata
from meshkitfs.shares import AccessChanged, Event, PublishFailed

__all__ = ["Metrics"]

# Further sources of blocks than these are counted together: a configuration may name any number.
_SOURCES: Final = 16


class Metrics(Collector):
    """The metrics of one mount. ``service`` gives the open home, or None while there is none to be read."""

    def __init__(self, service: Callable[[], Service | None], requests: Counters) -> None:
        self._service = service
        self._requests = requests
        self._ended: Counter[str] = Counter()
        self._unpublished: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def on_event(self, event: Event) -> None:
        """Count what a share tells."""
        if isinstance(event, AccessChanged) and event.code:
            self._ended[event.code] += 1
        elif isinstance(event, PublishFailed):
            self._unpublished[event.error.code] += 1

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: a registry would read everything once to learn the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read all metrics."""
        yield _gauge("build", "Which version this is", {__version__: 1}, "version")
        yield _count("requests", "Requests of the kernel", self._requests.done, "operation")
        failed = {errno.errorcode.get(code, str(code)): n for code, n in self._requests.failed.items()}
        yield _count("request_failures", "Requests that failed, by errno", failed, "errno")
        sizes = {"read": self._requests.bytes_read, "written": self._requests.bytes_written}
        yield _count("file_bytes", "Bytes of files that programs read and wrote", sizes, "direction")
        service = self._service()
        locked = service is None or service.session.locked is not None
        yield GaugeMetricFamily("meshkitfs_locked", "Whether the home is locked", locked)
        if service is not None:
            yield from self._gate(service)
            yield from self._provider(service)
            yield from _publishing(service)
            yield from _rest(service)

    def _gate(self, service: Service) -> Iterator[Metric]:
        gate, releases = service.session.gate.counters, service.session.services.releases
        yield _count("gate_walks", "Walks through the gate's checks", gate.walks)
        yield _count("refusals", "Walks that ended with a refusal, by code", gate.refusals, "code")
        yield _count("unwraps", "Keys unwrapped", gate.unwraps)
        yield _count("policy_questions", "Questions to policies, by answer", gate.questions, "answer")
        asked = releases.asked if releases is not None else 0
        yield _count("key_releases", "Requests to release services", asked)
        yield _count("access_ended", "Shares that could not be used any more, by code", self._ended, "code")

    def _provider(self, service: Service) -> Iterator[Metric]:
        store, reader = service.session.store, service.session.services.reader.counters
        counters = store.counters
        times = {kind: counters.times[kind] for kind in sorted(counters.times)}
        yield _times("provider_seconds", "Duration of trips to the byte store", times, "operation")
        yield _count("provider_errors", "Trips that failed, by code", counters.errors, "code")
        blocks = {"get": counters.gets, "put": counters.puts}
        yield _count("provider_blocks", "Blocks asked for and offered", blocks, "operation")
        sizes = {"in": counters.bytes_in, "out": counters.bytes_out}
        yield _count("provider_bytes", "Sealed bytes that came in and went out", sizes, "direction")
        served = CounterMetricFamily(
            "meshkitfs_source_blocks",
            "Blocks by source (its number in the configuration's order) and outcome",
            labels=("source", "outcome"),
        )
        found: Counter[tuple[str, str]] = Counter()
        for index, source in enumerate(store.sources()):
            number = str(index) if index < _SOURCES else "more"
            for outcome, value in (
                ("served", source.served),
                ("failed", source.failed),
                ("wrong", source.wrong),
            ):
                found[number, outcome] += value
        for labels, value in found.items():
            served.add_metric(labels, value)
        yield served
        reads = {"memory": reader.hits, "elsewhere": reader.misses}
        yield _count("block_reads", "Reads of file blocks, by where the block was", reads, "place")
        yield _count("blocks_opened", "Blocks decrypted", reader.opens)
        yield _count("spool_reads", "Blocks read from this device's spool", reader.from_spool)
        failures = self._unpublished
        yield _count(
            "publish_failures", "Times that changes could not be published, by code", failures, "code"
        )


def _publishing(service: Service) -> Iterator[Metric]:
    session, pending = service.session, service.lock.pending()
    ages = [item["age_seconds"] or 0 for item in service.lock.left()]
    waiting = {"spool": pending.get("bytes", 0), "memory": pending.get("memory", 0)}
    yield _gauge("unpublished_bytes", "Bytes that wait to be stored, by where they are", waiting, "place")
    yield _gauge("unpublished_blocks", "Sealed blocks that wait to be stored", pending.get("blocks", 0))
    yield _gauge("unpublished_shares", "Shares with changes that are not published", len(ages))
    yield _gauge("unpublished_age_seconds", "Age of the oldest unpublished change", max(ages, default=0))
    yield _gauge("spool_bytes", "Bytes in the spool", session.services.spool.used)
    yield _gauge("spool_limit_bytes", "Most bytes in the spool", session.services.budget.spool_limit)
    shares = session.book.shares.values()
    done = {
        "commits": sum(item.counters.commits for item in shares),
        "heads": sum(item.counters.heads for item in shares),
        "merges": sum(item.counters.merges for item in shares),
    }
    yield _count("published", "Local commits, published versions and merges", done, "what")


def _rest(service: Service) -> Iterator[Metric]:
    session = service.session
    states = Counter(describe.state(item) for item in session.book.shares.values())
    yield _gauge("shares", "Shares of the home, by state", states, "state")
    if isinstance(session.metadata, HttpMetadata):
        yield _gauge("feed_live", "Whether the change feed can be relied upon", session.metadata.feed.live)
    if session.vault_report is not None:
        available = session.vault_report.available
        yield _gauge("key_vault_available", "Whether the key vault can be used", available)


def _count(
    name: str, text: str, values: Mapping[str, float] | float, label: str | None = None
) -> CounterMetricFamily:
    if not isinstance(values, Mapping):
        return CounterMetricFamily(f"meshkitfs_{name}", text, value=values)
    family = CounterMetricFamily(f"meshkitfs_{name}", text, labels=[label or "kind"])
    for key in sorted(values):
        family.add_metric([key], values[key])
    return family


def _gauge(
    name: str, text: str, values: Mapping[str, float] | float, label: str | None = None
) -> GaugeMetricFamily:
    if not isinstance(values, Mapping):
        return GaugeMetricFamily(f"meshkitfs_{name}", text, value=values)
    family = GaugeMetricFamily(f"meshkitfs_{name}", text, labels=[label or "kind"])
    for key in sorted(values):
        family.add_metric([key], values[key])
    return family


def _times(name: str, text: str, values: Mapping[str, Timings], label: str) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"meshkitfs_{name}", text, labels=[label])
    for key, times in values.items():
        family.add_metric([key], times.cumulated(), times.total_s)
    return family
