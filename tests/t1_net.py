"""Talking to servers that do anything: each way to misbehave has its code, in time, with bounded memory.

The servers are real sockets on loopback that say, byte for byte, what a test has them say.
"""

import contextlib
import email.utils
import itertools
import socket
import ssl
import time
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing
import trustme

from meshkitfs.errors import MeshkitError
from meshkitfs.net import BearerAuth, Codes, Endpoint, Limits, Secret, SecretSource, Tls
from meshkitfs.net import _breaker as breaker
from meshkitfs.net import _tls as net_tls
from meshkitfs.net._retry import backoff, retry_after

CODES = Codes("provider_request_failed", "provider_http_error")
PATIENT = Limits(deadline_s=10, overall_s=20, tries=1, concurrency=4, cap=1000)
# For servers that never answer: a busy machine may be that late itself.
QUICK = replace(PATIENT, deadline_s=0.3)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def status(code, *headers, body=b""):
    lines = [f"HTTP/1.1 {code} X".encode(), b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Server:
    """Answers each request with the next of ``answers`` (the last one for ever); an answer may be a function."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.connections = 0
        self.busy = self.most_busy = 0

    async def handle(self, stream):
        self.connections += 1
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            rest = b""
            while (got := await self._read(stream, rest)) is not None:
                request, rest = got
                self.requests.append(request)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                self.busy += 1
                self.most_busy = max(self.most_busy, self.busy)
                try:
                    if callable(answer):
                        if await answer(stream) is False:
                            return
                    else:
                        await stream.send_all(answer)
                finally:
                    self.busy -= 1

    async def _read(self, stream, data):
        while b"\r\n\r\n" not in data:
            more = await stream.receive_some(65536)
            if not more:
                return None
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        length = next(
            (int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0
        )
        while len(rest) < length:
            rest += await stream.receive_some(65536)
        return head + b"\r\n\r\n" + rest[:length], rest[length:]


def talk(server, work, **options):
    """Run ``work(endpoint)`` against ``server`` and return its result."""

    async def main():
        error = None
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, server.handle, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            endpoint = Endpoint(f"http://127.0.0.1:{port}/base/", CODES, **({"limits": PATIENT} | options))
            try:
                result = await work(endpoint)
            except MeshkitError as caught:
                error = caught
            await endpoint.aclose()
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return result

    return trio.run(main)


async def until(condition):
    while not condition():
        await trio.sleep(0.01)


def get(path="/x", **options):
    return lambda endpoint: endpoint.request("GET", path, **options)


def refused(server, work=None, code="provider_request_failed", **options):
    with pytest.raises(MeshkitError) as caught:
        talk(server, work or get(), **options)
    assert caught.value.code == code, caught.value
    return caught.value.detail


def test_an_answer():
    server = Server(status(200, b"X-Thing: 1", body=b"hello"))
    reply = talk(server, get("/a%20b", params={"q": "1"}))
    assert (reply.status, reply.body, reply.headers["x-thing"]) == (200, b"hello", "1")
    assert server.requests[0].startswith(b"GET /base/a%20b?q=1 HTTP/1.1\r\n")


def test_connections_are_used_again():
    server = Server(OK)

    async def work(endpoint):
        for _ in range(5):
            await endpoint.request("GET", "/")

    talk(server, work)
    assert (len(server.requests), server.connections) == (5, 1)


def test_no_more_at_a_time_than_allowed():
    async def slow(stream):
        await trio.testing.wait_all_tasks_blocked(0.01)
        await stream.send_all(OK)

    server = Server(slow)

    async def work(endpoint):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(partial(endpoint.request, "GET", "/"))

    talk(server, work, limits=Limits(deadline_s=10, concurrency=3))
    assert server.most_busy == 3


def test_waiting_for_a_turn_is_not_the_servers_slowness():
    deadline = 3.0
    waited = trio.Event()

    async def first_late(stream):
        await waited.wait()
        await stream.send_all(OK)

    server = Server(first_late, OK)

    async def work(endpoint):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(endpoint.request, "GET", "/", deadline_s=600.0))
            await until(lambda: len(server.requests) == 1)
            nursery.start_soon(partial(endpoint.request, "GET", "/"))
            # The second one waits for its turn longer than an answer may take.
            await trio.sleep(deadline + 0.2)
            waited.set()
        return endpoint.failures

    assert talk(server, work, limits=Limits(deadline_s=deadline, tries=1, concurrency=1)) == 0
    assert len(server.requests) == 2


def test_a_subdomain_of_the_server(monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        name = host if isinstance(host, str) else host.decode()
        return real("127.0.0.1" if name.endswith("localhost") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server = Server(OK)

    async def work(endpoint):
        there = Endpoint(f"http://localhost:{endpoint.url.port}", CODES, auth=BearerAuth(Secret("t")))
        await there.request("GET", "/", subdomain="bafk.ipfs")
        await there.aclose()

    talk(server, work)
    assert b"Host: bafk.ipfs.localhost:" in server.requests[0]
    assert b"Authorization: Bearer t" in server.requests[0]


# -- answers that are none ------------------------------------------------------------------------------------


async def silence(stream):
    await trio.sleep_forever()


async def slow_loris(stream):
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    while True:
        await stream.send_all(b"x")
        await trio.sleep(0.01)


async def slow_head(stream):
    for byte in itertools.cycle(b"X"):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.01)


async def endless(stream):
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"10\r\n" + b"x" * 16 + b"\r\n")


async def cut_off(stream):
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nhalf")
    return False


async def reset(stream):
    stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.socket.close()
    return False


async def hang_up(stream):
    return False


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(silence, id="silence"),
        pytest.param(slow_loris, id="slow loris"),
        pytest.param(slow_head, id="slow head"),
        pytest.param(endless, id="endless"),
        pytest.param(cut_off, id="cut off"),
        pytest.param(reset, id="reset"),
        pytest.param(hang_up, id="hang up"),
        pytest.param(b"garbage\r\n\r\n", id="not HTTP"),
        pytest.param(status(200, body=b"x" * 1001), id="too long"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", id="too long announced"),
        pytest.param(status(200, b"Content-Encoding: gzip", body=b"xx"), id="compressed"),
        pytest.param(status(302, b"Location: http://127.0.0.1:1/"), id="redirect"),
    ],
)
def test_what_is_no_answer(answer):
    began = time.monotonic()
    refused(Server(answer), limits=QUICK)
    assert time.monotonic() - began < 10, "the deadline did not end it"


def test_a_body_of_exactly_the_cap_is_an_answer():
    assert len(talk(Server(status(200, body=b"x" * 1000)), get()).body) == 1000


def test_nobody_there():
    async def main():
        endpoint = Endpoint("http://127.0.0.1:1", CODES, limits=PATIENT)
        with pytest.raises(MeshkitError) as caught:
            await endpoint.request("GET", "/")
        assert caught.value.code == "provider_request_failed"
        await endpoint.aclose()

    trio.run(main)


def test_a_page_is_not_json():
    server = Server(status(200, b"Content-Type: text/html", body=b"<html>"))

    async def work(endpoint):
        return (await endpoint.request("GET", "/")).json()

    assert "text/html" in refused(server, work)


# -- statuses --------------------------------------------------------------------------------------------------


def test_a_status_that_means_no():
    server = Server(status(403, body=b"no\x1b[31m entry\n"))
    detail = refused(server, code="provider_http_error")
    assert detail.startswith("HTTP 403 from http://127.0.0.1:")
    assert detail.isprintable()


def test_a_status_that_is_wanted():
    assert talk(Server(status(404)), get(accept={200, 404})).status == 404


# -- again -----------------------------------------------------------------------------------------------------


def test_what_may_be_repeated_is():
    server = Server(status(503), hang_up, OK)
    assert talk(server, get(), limits=Limits(tries=3)).body == b"ok"
    assert len(server.requests) == 3


def test_tries_end():
    server = Server(status(502))
    refused(server, code="provider_http_error", limits=Limits(tries=3))
    assert len(server.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 404, 409, 501])
def test_what_would_not_change_is_not_repeated(code):
    server = Server(status(code))
    refused(server, code="provider_http_error", limits=Limits(tries=3))
    assert len(server.requests) == 1


def test_what_may_not_be_repeated_is_sent_once():
    server = Server(status(503), OK)
    refused(
        server, lambda e: e.request("POST", "/", content=b"x"), "provider_http_error", limits=Limits(tries=3)
    )
    assert len(server.requests) == 1
    server = Server(status(503), OK)
    talk(server, lambda e: e.request("POST", "/", content=b"x", idempotent=True), limits=Limits(tries=3))
    assert [request.endswith(b"x") for request in server.requests] == [True, True]


def test_retry_after_is_kept_if_there_is_time_for_it():
    slept = []

    async def work(endpoint):
        began = trio.current_time()
        reply = await endpoint.request("GET", "/")
        slept.append(trio.current_time() - began)
        return reply

    assert talk(Server(status(429, b"Retry-After: 1"), OK), work, limits=Limits(tries=2)).body == b"ok"
    assert slept[0] >= 1
    server = Server(status(429, b"Retry-After: 3600"), OK)
    refused(server, code="provider_http_error", limits=Limits(tries=2))
    assert len(server.requests) == 1


def test_retry_after_values():
    assert retry_after(None) is None
    assert retry_after("7") == 7
    for junk in ("", "-1", "1.5", "soon", "9" * 30, "\u0661"):
        assert retry_after(junk) is None
    for date in (
        "{many} Jan 2000 00:00:00 GMT",
        "01 Jan {many} 00:00:00 GMT",
        "01 Jan 2000 00:00:00 +{many}",
    ):
        assert retry_after("Thu, " + date.format(many="9" * 20)) is None
    ahead = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < retry_after(ahead) <= 100
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0


def test_backoff_grows_is_bounded_and_differs():
    assert all(0 <= backoff(n) <= 10 for n in range(1, 40))
    assert len({backoff(5) for _ in range(20)}) > 1


# -- a server that is away -------------------------------------------------------------------------------------


def test_a_dead_server_is_not_asked_by_everyone(monkeypatch):
    server = Server(hang_up)
    monkeypatch.setattr(breaker, "FIRST_S", 3600.0)

    async def work(endpoint):
        for _ in range(breaker.THRESHOLD + 20):
            with pytest.raises(MeshkitError, match="provider_request_failed"):
                await endpoint.request("GET", "/")
        assert len(server.requests) == breaker.THRESHOLD
        server.answers = [OK]
        # When its pause is over it is asked again, and everything goes on. Which pauses: the next test.
        endpoint._breaker._open_until = trio.current_time()
        assert (await endpoint.request("GET", "/")).body == b"ok"
        assert endpoint.failures == 0
        await endpoint.request("GET", "/")

    talk(server, work)


def test_the_pause_of_a_breaker():
    async def main():
        circuit = breaker.Breaker()
        for _ in range(breaker.THRESHOLD):
            assert circuit.wait_s() == 0
            circuit.failed()
        pause = breaker.FIRST_S
        for _ in range(8):
            assert circuit.wait_s() == pytest.approx(pause)
            await trio.sleep(pause)
            assert circuit.wait_s() == 0, "one may go"
            assert circuit.wait_s() > 0, "and only one"
            circuit.failed()
            pause = min(breaker.MOST_S, pause * 2)
        await trio.sleep(pause)
        assert circuit.wait_s() == 0
        circuit.abandoned()
        assert circuit.wait_s() == 0, "who gave up took nothing with him"
        circuit.answered()
        assert circuit.wait_s() == circuit.wait_s() == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_refusal_is_an_answer():
    server = Server(status(404))

    async def work(endpoint):
        for _ in range(breaker.THRESHOLD * 2):
            with pytest.raises(MeshkitError, match="provider_http_error"):
                await endpoint.request("GET", "/")

    talk(server, work)
    assert len(server.requests) == breaker.THRESHOLD * 2


# -- redirects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/", "http://user:pw@127.0.0.1/", "", "gopher://x", "http://[bad/"],
)
def test_redirects_that_are_not_followed(location):
    server = Server(status(302, b"Location: " + location.encode()), OK)
    refused(server, redirects=3)
    assert len(server.requests) == 1


@pytest.mark.parametrize("redirects", [0, 2])
@pytest.mark.parametrize(
    "location",
    [
        "https://" + "a" * 70 + ".invalid/", "https://xn--a/", "http://xn--/", "https://.invalid/",
        "https://a..invalid/", "http://@//[", "https:////]n", "https://x/" + "y" * 70_000, "?\x01", "https://%00/",
    ],
)  # fmt: skip
def test_no_address_in_a_redirect_is_more_than_no_answer(location, redirects):
    """Whatever the libraries below raise for it."""
    server = Server(status(302, b"Location: " + location.encode()), OK)
    refused(server, redirects=redirects)
    assert len(server.requests) == 1


@pytest.mark.parametrize("location", ["http://127.0.0.1:{port}/", "//127.0.0.1:{port}/"])
def test_no_redirect_leads_out_of_tls(tmp_path, location):
    """The second one stays within it, and ends at the certificate: nobody who speaks plain HTTP is heard."""
    authority, plain = trustme.CA(), Server(OK)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca")

    async def main():
        async with trio.open_nursery() as nursery:
            there = await nursery.start(partial(trio.serve_tcp, plain.handle, 0, host="127.0.0.1"))
            to = location.format(port=there[0].socket.getsockname()[1])
            first = Server(status(302, b"Location: " + to.encode()))
            serve = partial(trio.serve_ssl_over_tcp, first.handle, 0, context, host="127.0.0.1")
            here = await nursery.start(partial(serve, https_compatible=True))
            url = f"https://localhost:{here[0].transport_listener.socket.getsockname()[1]}"
            endpoint = Endpoint(
                url, CODES, redirects=2, tls=Tls(tmp_path / "ca"), limits=Limits(deadline_s=4.0, tries=1)
            )
            with pytest.raises(MeshkitError) as caught:
                await endpoint.request("GET", "/")
            await endpoint.aclose()
            nursery.cancel_scope.cancel()
            return caught.value, len(first.requests)

    error, asked = trio.run(main)
    assert error.code == "provider_request_failed"
    assert (asked, plain.requests) == (1, [])


def test_redirects_are_followed_as_often_as_said():
    hop = status(307, b"Location: /elsewhere")
    server = Server(hop, hop, OK)
    assert talk(server, get(), redirects=2).body == b"ok"
    assert server.requests[-1].startswith(b"GET /elsewhere ")
    refused(Server(hop), redirects=2)
    refused(Server(hop, OK), lambda e: e.request("PUT", "/", content=b"x"), redirects=2)


def test_credentials_stay_with_their_server():
    other = Server(OK)

    async def main():
        async with trio.open_nursery() as nursery:
            there = await nursery.start(partial(trio.serve_tcp, other.handle, 0, host="127.0.0.1"))
            port = there[0].socket.getsockname()[1]
            first = Server(status(302, b"Location: http://127.0.0.1:%d/there" % port))
            here = await nursery.start(partial(trio.serve_tcp, first.handle, 0, host="127.0.0.1"))
            url = f"http://127.0.0.1:{here[0].socket.getsockname()[1]}"
            endpoint = Endpoint(url, CODES, auth=BearerAuth(Secret("canary")), redirects=1, limits=PATIENT)
            assert (await endpoint.request("GET", "/")).body == b"ok"
            await endpoint.aclose()
            nursery.cancel_scope.cancel()
            return first

    first = trio.run(main)
    assert b"Bearer canary" in first.requests[0]
    assert b"canary" not in other.requests[0]


# -- addresses, TLS, secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "ftp://127.0.0.1",
        "https://user:pw@example.com",
        "https://x/?q=1",
        "https://",
        "x",
        "",
    ],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(MeshkitError) as caught:
        Endpoint(url, CODES)
    assert caught.value.code == "invalid_config"
    assert "pw" not in caught.value.detail


def test_plain_http_elsewhere_only_if_it_is_meant():
    assert Endpoint("http://example.com", CODES, insecure=True).name == "http://example.com"
    for local in ("http://127.0.0.1:5", "http://[::1]:5", "http://localhost"):
        Endpoint(local, CODES)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://localhost:9", "https://localhost:9"])
def test_a_proxy_of_the_environment_hears_nothing_that_is_for_this_machine(monkeypatch, address):
    asked, error = through_a_proxy(monkeypatch, address)
    assert asked == []
    assert "ConnectError" in error.detail


def test_a_proxy_of_the_environment_is_asked_for_other_machines(monkeypatch):
    """And is told a name, not a secret, when what follows is encrypted."""
    asked, error = through_a_proxy(monkeypatch, "https://elsewhere.invalid")
    (request,) = asked
    assert request.startswith(b"CONNECT elsewhere.invalid:443 ")
    assert b"canary" not in request
    assert error.code == "provider_request_failed"


def through_a_proxy(monkeypatch, address):
    """Ask for something with a token, where the environment names a proxy: what that hears, and the failure."""
    proxy = Server(status(502), status(502))

    async def work(endpoint):
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            for spelled in (name, name.upper()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{endpoint.url.port}")
        there = Endpoint(address, CODES, auth=BearerAuth(Secret("canary")), limits=Limits(tries=1))
        with pytest.raises(MeshkitError) as caught:
            await there.request("GET", "/")
        await there.aclose()
        return caught.value

    return proxy.requests, talk(proxy, work)


def test_certificates(tmp_path):
    """The server's is checked against the right authorities and the right name; a client's can be asked for."""
    authority, stranger = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    client = authority.issue_cert("client@example.org")
    for name, ca in (("good", authority), ("bad", stranger)):
        ca.cert_pem.write_to_path(tmp_path / name)
    client.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    client.private_key_pem.write_to_path(tmp_path / "key")
    mine = Tls(tmp_path / "good", tmp_path / "cert", tmp_path / "key")
    server = Server(OK)

    async def main():
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_ssl_over_tcp, server.handle, 0, context, host="127.0.0.1")
            listeners = await nursery.start(partial(serve, https_compatible=True))
            port = listeners[0].transport_listener.socket.getsockname()[1]
            answers = {}
            for what, host, tls in (
                ("right", "localhost", mine),
                (
                    "another authority",
                    "localhost",
                    Tls(tmp_path / "bad", tmp_path / "cert", tmp_path / "key"),
                ),
                ("the system's authorities", "localhost", Tls()),
                ("another name", "127.0.0.1", mine),
                ("no client certificate", "localhost", Tls(tmp_path / "good")),
            ):
                endpoint = Endpoint(f"https://{host}:{port}", CODES, tls=tls, limits=Limits(tries=1))
                try:
                    answers[what] = (await endpoint.request("GET", "/")).status
                except MeshkitError as error:
                    assert error.code == "provider_request_failed"
                    answers[what] = error.detail
                await endpoint.aclose()
            nursery.cancel_scope.cancel()
            return answers

    answers = trio.run(main)
    assert answers.pop("right") == 200
    # It says why: a person has to know which of the two sides to mend.
    for what in ("another authority", "the system's authorities", "another name"):
        assert "CERTIFICATE_VERIFY_FAILED" in answers.pop(what)
    assert len(answers) == 1


def test_the_systems_authorities_are_read_once(tmp_path, monkeypatch):
    """Unless the environment names others; files of the configuration are read each time."""
    authority, read = trustme.CA(), []
    authority.cert_pem.write_to_path(tmp_path / "ca")
    create = ssl.create_default_context
    monkeypatch.setattr(
        net_tls.ssl, "create_default_context", lambda **options: read.append(options) or create(**options)
    )
    net_tls._of_the_system.cache_clear()

    def costs(tls=None, **more):
        before = len(read)
        for _ in range(2):
            Endpoint("https://localhost", CODES, tls=tls, **more)
        return len(read) - before

    assert costs() == 1
    assert costs(Tls()) == 0
    assert costs(uds=tmp_path / "socket") == 0
    assert costs(Tls(tmp_path / "ca")) == 2
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca"))
    assert costs() == 1
    (trusted,) = net_tls.client_context(Tls()).get_ca_certs()
    assert dict(trusted["subject"][0])["organizationName"].startswith("trustme")
    monkeypatch.delenv("SSL_CERT_FILE")
    net_tls._of_the_system.cache_clear()


def test_a_refusal_that_stays_can_be_looked_at():
    no = status(429, b"Retry-After: 0", body=b"why")
    server = Server(no)
    reply = talk(server, get(last={429}), limits=Limits(tries=2, deadline_s=1))
    assert (reply.status, reply.body, len(server.requests)) == (429, b"why", 2)
    server = Server(no, OK)
    assert talk(server, get(last={429}), limits=Limits(tries=2, deadline_s=1)).body == b"ok"
    refused(Server(no), get(last={503}), code="provider_http_error", limits=Limits(tries=1))


def test_tls_files_that_are_none(tmp_path):
    (tmp_path / "junk").write_text("junk")
    for tls in (Tls(tmp_path / "missing"), Tls(tmp_path / "junk"), Tls(certificate=tmp_path / "junk")):
        with pytest.raises(MeshkitError, match="invalid_config"):
            Endpoint("https://localhost", CODES, tls=tls)


def test_secrets(tmp_path, monkeypatch):
    assert SecretSource().load() is None
    monkeypatch.setenv("A_TOKEN", " canary\n")
    secret = SecretSource(env="A_TOKEN").load()
    assert secret.reveal() == "canary"
    assert "canary" not in repr(secret) + str(secret) + f"{secret}"
    file = tmp_path / "token"
    file.write_text("canary\n")
    file.chmod(0o640)
    for source in (
        SecretSource(env="NO_TOKEN"), SecretSource(file=file), SecretSource(file=tmp_path / "none"),
    ):  # fmt: skip
        with pytest.raises(MeshkitError, match="invalid_config") as caught:
            source.load()
        assert "canary" not in str(caught.value)
    file.chmod(0o600)
    assert SecretSource(file=file).load().reveal() == "canary"
    file.write_text("two\nlines")
    with pytest.raises(MeshkitError, match="invalid_config"):
        SecretSource(file=file).load()
