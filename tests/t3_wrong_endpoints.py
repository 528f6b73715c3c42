"""Ways in which an endpoint can be wrong, each over a real socket, and the words that a person gets for it."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from meshkitfs import cli

HTML = (200, "text/html", "<html>Please log in</html>", {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, kind, body, headers = self.server.answer
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - the library's names

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_):  # half of these clients hang up, which is the point
        pass


@contextlib.contextmanager
def answering(answer, tls=None):
    """A server that gives one answer to everything; its port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.answer = answer
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def talking(data):
    """Something that is no HTTP server: says ``data`` (None: nothing) to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def run():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    if data is not None:
                        connection.recv(65536)
                        connection.sendall(data)
                        connection.shutdown(socket.SHUT_WR)
                        # What came and was not read would have the kernel take back what was said.
                        connection.settimeout(10)
                        with contextlib.suppress(OSError):
                            while connection.recv(65536):
                                pass
                        connection.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = trustme.CA()
    made.file = tmp_path_factory.mktemp("ca") / "ca.pem"
    made.cert_pem.write_to_path(made.file)
    return made


def tls_of(authority, *names, **more):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **more).configure_cert(context)
    return context


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A function that asks `providers test` and `doctor` about a provider; both have to say the same."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)

    def ask(*words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
        assert "canary" not in out.getvalue() + err.getvalue()
        return code, out.getvalue()

    def tell(provider, *, doctor=True):
        config = {"version": 1, "provider": {"retries": 0, "timeoutMs": 3000, **provider}}
        (tmp_path / "home" / "meshkit.config.json").write_text(json.dumps(config))
        code, out = ask("--json", "providers", "test")
        assert code in (3, 7), out
        data = json.loads(out)
        shown = ask("providers", "test")[1]
        assert data["problem"][1:] in shown
        assert data["remedy"] in shown
        if doctor:
            code, out = ask("--json", "doctor")
            (found,) = [check for check in json.loads(out)["checks"] if check["name"] == "byte store"]
            assert (code, found["status"]) == (1, "fail")
            assert found["remedy"].startswith(data["remedy"])
        return f"{data['problem']} | {data['steps'][-1]['failure']['detail']}", data["remedy"]

    return tell


def s3(port, scheme="http", **more):
    return {"type": "s3", "endpoint": f"{scheme}://127.0.0.1:{port}", "bucket": "team", **more}


def kubo(port, **more):
    return {"type": "ipfs-http", "ipfsApiUrl": f"http://127.0.0.1:{port}", **more}


def xml(status, code):
    return status, "application/xml", f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>", {}


def test_nobody_listens(told):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words, remedy = told(s3(port))
    assert "nobody listens at that address" in words
    assert "host and port" in remedy


def test_nobody_knows_the_host(told):
    words, _ = told({"type": "ipfs-http", "ipfsApiUrl": "https://no-such-host.invalid"})
    assert "nobody knows that host" in words


@pytest.mark.parametrize(
    ("names", "ended", "known", "says"),
    [
        (("127.0.0.1",), False, False, "not one that this device trusts"),
        (("other.example",), False, True, "is for another host"),
        (("127.0.0.1",), True, True, "has run out"),
    ],
    ids=["unknown", "other-host", "expired"],
)
def test_certificates(told, authority, names, ended, known, says):
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    tls = tls_of(authority, *names, **({"not_after": past} if ended else {}))
    with answering(HTML, tls) as port:
        words, _ = told(s3(port, "https", **({"caFile": str(authority.file)} if known else {})))
    assert says in words


def test_https_where_http_is_spoken(told):
    with answering(HTML) as port:
        words, remedy = told(s3(port, "https"))
    assert "does not speak TLS there" in words
    assert "scheme" in remedy


def test_http_where_https_is_spoken(told, authority):
    with answering(HTML, tls_of(authority, "127.0.0.1")) as port:
        words, remedy = told(s3(port))
    assert "breaks off" in words
    assert "scheme" in remedy


@pytest.mark.parametrize("make", [s3, kubo])
def test_a_login_page(told, make):
    with answering(HTML) as port:
        words, remedy = told(make(port), doctor=False)
    assert "a login page" in words
    assert "in a browser" in remedy


def test_doctor_is_not_fooled_by_a_login_page(told, tmp_path):
    """It only asks for a block that cannot exist, and gets an answer."""
    with answering(HTML) as port:
        told(kubo(port), doctor=False)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            cli.main(["--json", "doctor"])
    (found,) = [check for check in json.loads(out.getvalue())["checks"] if check["name"] == "byte store"]
    assert found["status"] == "fail"
    assert "login page" in found["detail"]


def test_a_redirect_to_a_login_page(told):
    elsewhere = (302, "text/html", "", {"Location": "https://login.example/"})
    with answering(elsewhere) as port:
        assert "sends elsewhere" in told(s3(port))[0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (xml(404, "NoSuchBucket"), "there is no such bucket"),
        (xml(403, "SignatureDoesNotMatch"), "the secret access key is wrong"),
        (xml(403, "InvalidAccessKeyId"), "this access key is not known there"),
        (xml(403, "RequestTimeTooSkewed"), "clock and the server's differ"),
        (xml(403, "AccessDenied"), "this access key may not do that"),
        (xml(400, "AuthorizationHeaderMalformed"), "the region is wrong"),
        ((407, "text/html", "<html>proxy</html>", {}), "a proxy on the way"),
        ((502, "text/html", "<html>bad gateway</html>", {}), "cannot reach it"),
        ((500, "text/plain", "oops", {}), "in trouble"),
    ],
)
def test_what_s3_answers(told, answer, says):
    with answering(answer) as port:
        # A store that is only asked for a block that is not there may say so by 404.
        assert says in told(s3(port), doctor=answer[0] != 404)[0]


@pytest.mark.parametrize(
    ("status", "says", "do"),
    [
        (401, "wants to know who you are", "token"),
        (403, "for reading only", "right to write"),
        (404, "has no such interface", "5001"),
        (405, "has no such interface", "8080"),
    ],
)
def test_what_an_ipfs_node_answers(told, status, says, do):
    with answering((status, "text/plain", "no", {})) as port:
        words, remedy = told(kubo(port))
    assert says in words
    assert do in remedy


def test_something_that_is_no_http_server(told):
    with talking(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        assert "speak HTTP" in told(s3(port))[0]


def test_something_that_says_nothing(told):
    with talking(None) as port:
        assert "does not answer in time" in told(s3(port, timeoutMs=300))[0]


@pytest.mark.parametrize("kind", ["pinning-service", "ipfs-cluster", "gateway-retrieval"])
def test_a_part_of_a_provider(told, kind):
    """The parts have addresses of their own: what is said names the one that is wrong."""
    with answering(HTML) as port, socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
        listener.close()
        inner = kubo(closed, retries=0)
        provider = {
            "pinning-service": {"type": kind, "endpoint": f"http://127.0.0.1:{port}", "storage": inner},
            "ipfs-cluster": {"type": kind, "clusterApiUrl": f"http://127.0.0.1:{port}", "node": inner},
            "gateway-retrieval": {"type": kind, "gatewayUrl": f"http://127.0.0.1:{port}", "storage": inner},
        }[kind]
        words, _ = told(provider, doctor=False)
    assert "nobody listens" in words or "login page" in words
    assert str(closed) in words or str(port) in words or "text/html" in words
