"""Showing metrics: who is answered, what is refused, and where it may listen at all."""

from __future__ import annotations

import os
import socket
import stat

import pytest
import trio
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from meshkitfs.core.timings import BOUNDS_S, Timings
from meshkitfs.errors import MeshkitError
from meshkitfs.net import scrape
from meshkitfs.net.scrape import Place

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: %s\r\n\r\n"


def shown(work, place, registry=None):
    """Show a registry at ``place`` and run ``work(address)`` meanwhile; returns what it returns."""
    registry = registry or CollectorRegistry()
    found = []

    async def main():
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                address = await nursery.start(scrape.show, place, registry)
                found.append(await work(address))
                nursery.cancel_scope.cancel()

    trio.run(main)
    return found[0]


async def said(address, request):
    """Send raw bytes, and return everything that comes back."""
    if address.startswith("unix:"):
        stream = await trio.open_unix_socket(address.removeprefix("unix:"))
    else:
        host, _, port = address.removeprefix("http://").removesuffix("/metrics").rpartition(":")
        stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
    async with stream:
        await stream.send_all(request)
        answer = b""
        while data := await stream.receive_some(65536):
            answer += data
    return answer


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_one_page(tmp_path, kind):
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc(3)
    place = Place.parse("127.0.0.1:0") if kind == "tcp" else Place.parse(f"unix:{tmp_path}/metrics")

    async def work(address):
        if kind == "unix":
            assert stat.S_IMODE(os.stat(tmp_path / "metrics").st_mode) == 0o600
        return await said(address, REQUEST % b"localhost")

    head, _, body = shown(work, place, registry).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"text/plain" in head
    (family,) = [f for f in text_string_to_metric_families(body.decode()) if f.name == "things"]
    assert [s.value for s in family.samples if s.name == "things_total"] == [3]
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize(
    ("request_line", "host", "status"),
    [
        (b"GET /metrics", b"127.0.0.1:9464", b"200"),
        (b"GET /metrics", b"[::1]:9464", b"200"),
        (b"GET /metrics?x=1", b"LOCALHOST:1", b"200"),
        (b"GET /", b"localhost", b"404"),
        (b"GET /metrics/", b"localhost", b"404"),
        (b"POST /metrics", b"localhost", b"405"),
        (b"HEAD /metrics", b"localhost", b"405"),
        # What a page in a browser could do, whose name was made to point here.
        (b"GET /metrics", b"evil.example:9464", b"403"),
        (b"GET /metrics", b"127.0.0.1.evil.example", b"403"),
    ],
)
def test_what_is_answered(request_line, host, status):
    request = request_line + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
    answer = shown(lambda address: said(address, request), Place.parse("127.0.0.1:0"))
    assert answer.split(b" ")[1] == status


def test_nonsense_and_silence_end_nothing(monkeypatch):
    monkeypatch.setattr(scrape, "DEADLINE_S", 0.2)

    async def work(address):
        assert await said(address, b"\x16\x03\x01\x00\x00nonsense\r\n\r\n") == b""
        assert await said(address, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 40000) == b""
        assert await said(address, b"GET /metr") == b""  # and then nothing, until the deadline
        return await said(address, REQUEST % b"localhost")

    async def patient(address):
        try:
            return await work(address)
        except trio.BrokenResourceError:
            return await said(address, REQUEST % b"localhost")

    assert shown(patient, Place.parse("127.0.0.1:0")).startswith(b"HTTP/1.1 200 ")


def test_a_collector_that_fails_ends_nothing():
    class Broken:
        def collect(self):
            raise ValueError("a defect")
            yield

        def describe(self):
            return []

    registry = CollectorRegistry()
    registry.register(Broken())

    async def work(address):
        first = await said(address, REQUEST % b"localhost")
        return first, await said(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    first, second = shown(work, Place.parse("127.0.0.1:0"), registry)
    assert first == b""
    assert second.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "text",
    ["", "9464", "0.0.0.0:9464", "[::]:9464", "192.0.2.7:1", "example.org:80", "127.0.0.1:x", "127.0.0.1:65536",
     "unix:relative", "unix:/" + "a" * 120, "127.0.0.1:\u0661"],
)  # fmt: skip
def test_only_this_machine(text):
    with pytest.raises(MeshkitError) as caught:
        Place.parse(text)
    assert caught.value.code == "invalid_config"


def test_other_machines_when_somebody_says_so():
    assert Place.parse("192.0.2.7:9464", remote=True) == Place("192.0.2.7", 9464)
    assert str(Place.parse("[::1]:1")) == "http://[::1]:1/metrics"
    assert Place.parse("localhost:5").host == "127.0.0.1"


def test_a_place_that_is_taken(tmp_path):
    async def nothing(address):
        return address

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ExceptionGroup) as caught:
            shown(nothing, Place("127.0.0.1", taken.getsockname()[1]))
        assert caught.group_contains(MeshkitError, match="in use")
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(ExceptionGroup):
            shown(nothing, Place(path=str(path)))
    # Nobody listens there any more.
    assert shown(nothing, Place(path=str(path))) == f"unix:{path}"
    path.write_text("precious")
    with pytest.raises(ExceptionGroup):
        shown(nothing, Place(path=str(path)))
    assert path.read_text() == "precious"


def test_durations_are_counted_up_to_each_bound():
    times = Timings()
    for seconds in (0.0, BOUNDS_S[0], 0.5, 1e6):
        times.note(seconds)
    found = dict(times.cumulated())
    assert (found["0.001"], found["0.3"], found["1.0"], found["30.0"], found["+Inf"]) == (2, 2, 3, 3, 4)
    with pytest.raises(ValueError, match="ends"), times.timed():
        raise ValueError("ends")
    assert dict(times.cumulated())["+Inf"] == 5
