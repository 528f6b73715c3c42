"""The control socket, the client that uses it or does without, and the start of the background process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import trio
from control_daemon import SmallService, running

from meshkitfs.daemon import background, client, control
from meshkitfs.daemon.config import MountOptions
from meshkitfs.daemon.home import Home
from meshkitfs.errors import MeshkitError


@contextlib.contextmanager
def refusal(code: str):
    with pytest.raises(MeshkitError) as caught:
        yield caught
    assert caught.value.code == code


@contextlib.contextmanager
def connection(home: Home):
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(20)
    with raw, home.socket_address() as address:
        raw.connect(address)
        yield raw


def lines(raw: socket.socket) -> list[dict]:
    data = b""
    while chunk := raw.recv(65536):
        data += chunk
    return [json.loads(line) for line in data.splitlines()]


def flood(raw: socket.socket) -> None:
    for _ in range(128):
        raw.sendall(b"x" * 65536)
    raw.recv(1)


def talk(home: Home, data: bytes) -> list[dict]:
    with connection(home) as raw:
        raw.sendall(data)
        return lines(raw)


# -- one request ---------------------------------------------------------------------------------------


def test_a_result_comes_back(tmp_path):
    with running(tmp_path) as daemon:
        assert client.ask_daemon(daemon.home, "share.list", {"a": [1, None]}) == {"method": "share.list"}
        assert daemon.service.calls == [("share.list", {"a": [1, None]})]


def test_names_that_are_not_utf8_survive_both_ways(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with running(tmp_path) as daemon:
        daemon.service.answers["echo"] = lambda params, _progress: params
        assert client.ask_daemon(daemon.home, "echo", {"name": name}) == {"name": name}


def test_a_large_result_comes_back_whole(tmp_path):
    shares = [{"name": f"share {number}" * 10} for number in range(20000)]
    with running(tmp_path) as daemon:
        daemon.service.answers["share.list"] = {"shares": shares}
        assert client.ask_daemon(daemon.home, "share.list", {}) == {"shares": shares}


def test_progress_arrives_while_the_work_goes_on(tmp_path):
    events: list[dict] = []
    seen = threading.Event()
    service = SmallService()

    async def call(_method, _params, progress):
        progress({"done": 1, "total": 2, "unit": object()})
        await trio.to_thread.run_sync(seen.wait)
        return {"ended": True}

    def note(event: dict) -> None:
        events.append(event)
        seen.set()

    service.call = call
    with running(tmp_path, service) as daemon:
        assert client.ask_daemon(daemon.home, "sync", {}, note) == {"ended": True}
    assert events == [{"done": 1, "total": 2, "unit": "object"}]


def test_a_flood_of_progress_is_dropped_and_the_work_goes_on(tmp_path):
    def work(_params, progress):
        for number in range(10000):
            progress({"done": number})
        return {"done": True}

    with running(tmp_path) as daemon:
        daemon.service.answers["sync"] = work
        events: list[dict] = []
        assert client.ask_daemon(daemon.home, "sync", {}, events.append) == {"done": True}
        assert len(events) <= control.MAX_WAITING_PROGRESS


def test_a_classified_failure_comes_back_as_itself(tmp_path):
    with running(tmp_path) as daemon:
        daemon.service.answers["share.add"] = MeshkitError("contact_unknown", "zoe")
        with refusal("contact_unknown") as caught:
            client.ask_daemon(daemon.home, "share.add", {})
        assert caught.value.detail == "zoe"


def test_a_failure_inside_groups_is_found(tmp_path):
    inner = ExceptionGroup("tasks", [ValueError("x"), MeshkitError("no_space", "blocks")])
    with running(tmp_path) as daemon:
        daemon.service.answers["sync"] = ExceptionGroup("nursery", [inner])
        with refusal("no_space"):
            client.ask_daemon(daemon.home, "sync", {})


def test_an_unclassified_failure_tells_only_its_type(tmp_path, caplog):
    canary = secrets.token_hex(32)
    with running(tmp_path) as daemon, caplog.at_level(logging.ERROR):
        daemon.service.answers["sync"] = ValueError(f"key was {canary}")
        with refusal("internal_error") as caught:
            client.ask_daemon(daemon.home, "sync", {})
        assert caught.value.detail == "ValueError"
        assert canary not in str(caught.value)
        assert any(record.name == "meshkitfs.daemon.control" for record in caplog.records)
        # and the daemon is still there
        daemon.service.answers["sync"] = {"left": []}
        assert client.ask_daemon(daemon.home, "sync", {}) == {"left": []}


def test_a_result_that_is_no_json_is_an_error_not_a_hang(tmp_path):
    with running(tmp_path) as daemon:
        daemon.service.answers["status"] = {"raw": b"bytes"}
        with refusal("internal_error"):
            client.ask_daemon(daemon.home, "status", {})


@pytest.mark.parametrize(
    "request_line",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"id": 1, "method": "status"}\n',
        b'{"id": "1", "method": "status", "params": {}}\n',
        b'{"id": true, "method": "status", "params": {}}\n',
        b'{"id": 1, "method": 5, "params": {}}\n',
        b'{"id": 1, "method": "status", "params": []}\n',
        b'{"id": 1, "method": "status", "params": {}, "uid": 0}\n',
        b"[" * 100000 + b"\n",
    ],
)
def test_a_malformed_request_is_refused_and_never_reaches_the_service(tmp_path, request_line):
    with running(tmp_path) as daemon:
        (answer,) = talk(daemon.home, request_line)
        assert answer["error"]["code"] == "invalid_argument"
        assert daemon.service.calls == []


def test_an_endless_request_is_cut_off(tmp_path):
    with running(tmp_path) as daemon:
        with connection(daemon.home) as raw, pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood(raw)
        assert daemon.service.calls == []
        assert client.ask_daemon(daemon.home, "status", {}) == {"method": "status"}


def test_a_silent_connection_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "REQUEST_SECONDS", 0.05)
    with running(tmp_path) as daemon, connection(daemon.home) as raw:
        assert lines(raw) == []
        assert daemon.service.calls == []


def test_signs_of_life_keep_a_long_call_going(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "ALIVE_SECONDS", 0.01)
    with running(tmp_path) as daemon:
        daemon.service.answers["share.create"] = "wait"
        with connection(daemon.home) as raw:
            raw.sendall(b'{"id": 7, "method": "share.create", "params": {}}\n')
            stream = raw.makefile("rb")
            for _ in range(3):
                assert json.loads(stream.readline()) == {"id": 7, "alive": True}
            daemon.service.go_on.set()
            last = [json.loads(line) for line in stream][-1]
            assert last == {"id": 7, "result": {"waited": True}}


# -- who may speak -------------------------------------------------------------------------------------


def test_the_socket_is_private(tmp_path):
    old = os.umask(0)
    try:
        with running(tmp_path / "home") as daemon:
            mode = daemon.home.socket_path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert stat.S_IMODE(daemon.home.run_dir.stat().st_mode) == 0o700
    finally:
        os.umask(old)


def test_another_user_is_not_answered_even_when_the_socket_is_open_to_all(tmp_path, caplog):
    # The peer is this very user, and the daemon expects another: the uid really comes from the kernel.
    with running(tmp_path, owner=os.getuid() + 1) as daemon, caplog.at_level(logging.WARNING):
        daemon.home.socket_path.chmod(0o666)
        with refusal("daemon_unreachable"):
            client.ask_daemon(daemon.home, "status", {})
        assert daemon.service.calls == []
        assert "control connection refused" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_not_answered():
    # Not in pytest's own directory, which each run of it closes to others again.
    with tempfile.TemporaryDirectory(prefix="meshkit-control-") as place, running(Path(place)) as daemon:
        for path in (Path(place), daemon.home.run_dir):
            path.chmod(0o711)
        daemon.home.socket_path.chmod(0o666)
        script = textwrap.dedent(
            """
            import socket, sys
            s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            s.settimeout(20)
            s.connect(sys.argv[1])
            try:
                s.sendall(b'{"id": 1, "method": "status", "params": {}}\\n')
                print(s.recv(1000))
            except (BrokenPipeError, ConnectionResetError):
                print(b"")
            """
        )
        ended = subprocess.run(
            ["/usr/bin/env", "python3", "-c", script, str(daemon.home.socket_path)],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            check=True,
        )
        assert ended.stdout == "b''\n"
        assert daemon.service.calls == []


# -- coming and going ------------------------------------------------------------------------------------


def ask_and_leave(daemon, method: str) -> None:
    """Send a request, wait until the service works on it, and go away."""
    with connection(daemon.home) as raw:
        raw.sendall(json.dumps({"id": 1, "method": method, "params": {}}).encode() + b"\n")
        assert daemon.service.started.wait(20)


def test_waiting_ends_when_the_caller_goes(tmp_path):
    with running(tmp_path) as daemon:
        daemon.service.answers["sync"] = "wait"
        ask_and_leave(daemon, "sync")
        assert daemon.service.cancelled.wait(20)


def test_a_change_is_finished_when_the_caller_goes(tmp_path):
    with running(tmp_path) as daemon:
        daemon.service.answers["share.revoke"] = "wait"
        ask_and_leave(daemon, "share.revoke")
        # An answered request shows that the loop had every chance to cancel the other.
        assert client.ask_daemon(daemon.home, "status", {}) == {"method": "status"}
        daemon.service.go_on.set()
        assert daemon.service.finished.wait(20)
        assert not daemon.service.cancelled.is_set()


def test_stopping_is_answered_although_everything_is_cancelled_by_it(tmp_path):
    with running(tmp_path, mountpoint="/mnt/x") as daemon:
        info = client.ask_daemon(daemon.home, "daemon.info", {})
        assert info == {"pid": os.getpid(), "mountpoint": "/mnt/x"}
        daemon.stop_result = {"left": [{"share": "first", "blocks": 2}]}
        answer = client.ask_daemon(daemon.home, "daemon.stop", {"timeout": 5, "force": False})
        assert answer == daemon.stop_result
        assert daemon.stop_params == {"timeout": 5, "force": False}
        daemon.stop()
        assert not daemon.home.socket_path.exists()
        assert Home(tmp_path).holder() is None


def test_a_call_that_is_cut_off_by_stopping_is_told_so(tmp_path):
    with running(tmp_path) as daemon:
        daemon.service.answers["share.add"] = "wait"
        failures: list[str] = []

        def ask() -> None:
            try:
                client.ask_daemon(daemon.home, "share.add", {})
            except MeshkitError as error:
                failures.append(error.code)

        asker = threading.Thread(target=ask)
        asker.start()
        assert daemon.service.started.wait(20)
        daemon.stop()
        asker.join(20)
        assert failures == ["operation_aborted"]


def test_a_dead_socket_is_no_daemon_and_is_replaced(tmp_path):
    home = Home(tmp_path)
    home.ensure()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(home.socket_path))
    left.close()
    assert client.ask_daemon(home, "status", {}) is None
    with running(tmp_path) as daemon:
        assert client.ask_daemon(daemon.home, "status", {}) == {"method": "status"}
    assert client.ask_daemon(home, "status", {}) is None


def test_a_second_daemon_cannot_take_the_socket(tmp_path):
    with running(tmp_path):
        with refusal("home_busy"), running(tmp_path):
            pytest.fail("two daemons")
        assert client.ask_daemon(Home(tmp_path), "status", {}) == {"method": "status"}

    async def without_the_lock() -> None:
        home = Home(tmp_path)
        await control.serve(home, SmallService().call, info=dict, stop=SmallService().call)

    with pytest.raises(RuntimeError):
        trio.run(without_the_lock)


def test_a_home_deeper_than_a_socket_address_works(tmp_path):
    deep = tmp_path.joinpath(*["d" * 40] * 4)
    with running(deep) as daemon:
        assert len(os.fsencode(daemon.home.socket_path)) > 108
        assert client.ask_daemon(daemon.home, "status", {}) == {"method": "status"}
        assert stat.S_IMODE(daemon.home.socket_path.stat().st_mode) == 0o600


def test_a_daemon_that_hangs_is_given_up(tmp_path):
    home = Home(tmp_path)
    home.ensure()
    with socket.socket(socket.AF_UNIX) as hung, home.socket_address() as address:
        hung.bind(address)
        hung.listen(5)
        with refusal("daemon_unreachable") as caught:
            client.ask_daemon(home, "status", {}, silence=0.1)
        assert "no answer to status" in caught.value.detail


@pytest.mark.parametrize(
    "reply", [b"", b"not json\n", b"[]\n", b'{"id":1,"result":5}\n', b'{"id":1,"error":{}}\n']
)
def test_a_daemon_that_dies_or_babbles_is_given_up(tmp_path, reply):
    home = Home(tmp_path)
    home.ensure()
    with socket.socket(socket.AF_UNIX) as broken, home.socket_address() as address:
        broken.bind(address)
        broken.listen(5)

        def answer() -> None:
            peer, _ = broken.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with refusal("daemon_unreachable"):
            client.ask_daemon(home, "status", {})
        thread.join(20)


def test_a_newer_daemons_error_code_is_not_lost(tmp_path):
    failure = client._error({"code": "from_the_future", "message": "New trouble.", "detail": "d"})
    assert failure.code == "internal_error"
    assert "from_the_future: New trouble. d" in failure.detail


# -- doing without a daemon ------------------------------------------------------------------------------


def opener(service: SmallService, log: list[str]):
    @contextlib.asynccontextmanager
    async def open_service(home: Home, passphrase):
        log.append(f"open held={home.held} {passphrase('?') if passphrase else None}")
        async with trio.open_nursery():  # a real service has tasks, so failures come in groups
            yield service
        log.append("close")

    return open_service


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.ensure()
    home.identity_file.touch()
    return home


def test_without_a_daemon_the_work_is_done_here_and_the_home_is_held(home):
    service, log = SmallService(), []
    result = client.run(
        home, "share.list", {"x": 1}, passphrase=lambda _prompt: "pw", open_service=opener(service, log)
    )
    assert result == {"method": "share.list"}
    assert service.calls == [("share.list", {"x": 1})]
    assert log == ["open held=True pw", "close"]
    assert home.holder() is None


def test_a_failure_here_comes_out_bare_and_frees_the_home(home):
    service = SmallService()
    service.answers["share.show"] = MeshkitError("share_not_found", "x")
    with refusal("share_not_found"):
        client.run(home, "share.show", {}, open_service=opener(service, []))
    service.answers["share.show"] = ZeroDivisionError()
    with pytest.raises(ExceptionGroup):
        client.run(home, "share.show", {}, open_service=opener(service, []))
    service.answers["share.show"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        client.run(home, "share.show", {}, open_service=opener(service, []))
    assert home.holder() is None


def test_with_a_daemon_nothing_is_opened_here(tmp_path):
    with running(tmp_path) as daemon:
        log: list[str] = []
        result = client.run(Home(tmp_path), "status", {}, open_service=opener(SmallService(), log))
        assert result == {"method": "status"}
        assert log == []
        assert daemon.service.calls == [("status", {})]


def test_a_home_that_is_not_set_up_is_said_and_left_alone(tmp_path):
    with refusal("not_initialized"):
        client.run(Home(tmp_path / "none"), "status", {})
    assert not (tmp_path / "none").exists()


def test_a_home_held_by_another_command_is_waited_for_and_then_said(home, monkeypatch):
    monkeypatch.setattr(client, "BUSY_SECONDS", 0.0)
    with Home(home.root).hold(), refusal("home_busy") as caught:
        client.run(home, "status", {}, open_service=opener(SmallService(), []))
    assert str(os.getpid()) in caught.value.detail
    monkeypatch.setattr(client, "BUSY_SECONDS", 60.0)
    other = Home(home.root)
    held = contextlib.ExitStack()
    held.enter_context(other.hold())
    asked = threading.Event()
    real = client.ask_daemon

    def ask(*args, **kwargs):
        # The second look shows that the first found the home held.
        if asked.is_set():
            held.close()
        asked.set()
        return real(*args, **kwargs)

    monkeypatch.setattr(client, "ask_daemon", ask)
    assert client.run(home, "status", {}, open_service=opener(SmallService(), [])) == {"method": "status"}


# -- the background process ------------------------------------------------------------------------------

PHRASE = f"correct horse {secrets.token_hex(8)}"


@pytest.fixture
def child(home, monkeypatch):
    """Start a script instead of the daemon; it gets the descriptors as its arguments."""

    def start(script: str, passphrase: str | None = None, wait: float = 30.0):
        program = textwrap.dedent(
            "import json, os, sys\nready, secret = map(int, sys.argv[1:3])\n"
        ) + textwrap.dedent(script)

        def command(_home, _point, _options, ready, secret):
            return [sys.executable, "-c", program, str(ready), str(-1 if secret is None else secret)]

        monkeypatch.setattr(background, "_command", command)
        return background.start(home, Path("/mnt"), MountOptions(), passphrase, wait=wait)

    return start


def test_ready_means_ready_and_the_daemon_stays(child):
    # The child waits for our signal after it has said it is ready, so it is alive when start() returns.
    info = child(
        """
        import signal
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        ids = {"sid": os.getsid(0), "cwd": os.getcwd(), "stdin": os.readlink("/proc/self/fd/0")}
        os.write(ready, json.dumps({"ready": ids}).encode() + b"\\n")
        signal.pause()
        """
    )
    assert info["sid"] == info["pid"] != os.getsid(0)
    assert info["cwd"] == "/"
    assert info["stdin"] == "/dev/null"
    os.kill(info["pid"], signal.SIGTERM)
    os.waitpid(info["pid"], 0)


def test_the_passphrase_goes_by_descriptor_and_nowhere_else(child, home):
    info = child(
        """
        phrase = os.read(secret, 5000).decode()
        args = open("/proc/self/cmdline").read()
        environment = open("/proc/self/environ").read()
        message = {"got": phrase, "leaks": [phrase.strip() in args, phrase.strip() in environment]}
        os.write(ready, json.dumps({"ready": message}).encode() + b"\\n")
        """,
        PHRASE,
    )
    os.waitpid(info["pid"], 0)
    assert info["got"] == PHRASE + "\n"
    assert info["leaks"] == [False, False]
    assert PHRASE not in (home.log_dir / "startup.log").read_text()


def test_the_real_command_line_carries_no_passphrase_and_no_module_path(home):
    command = background._command(home, Path("-odd name"), MountOptions(nonempty=True, read_only=True), 5, 6)
    assert command[1:4] == ["-P", "-m", "meshkitfs"]
    assert command[-2:] == ["--", "-odd name"]
    assert command[command.index("--passphrase-fd") + 1] == "6"
    assert {"--foreground", "--nonempty", "--read-only"} <= set(command)


def test_an_overlong_passphrase_is_refused_before_anything_starts(child):
    with refusal("invalid_argument"):
        child("raise SystemExit", "x" * 5000)


def test_what_kept_it_from_starting_comes_back_classified(child):
    with refusal("wrong_passphrase"):
        child(
            """
            error = {"code": "wrong_passphrase", "message": "", "detail": "", "suggestion": ""}
            os.write(ready, json.dumps({"error": error}).encode() + b"\\n")
            """
        )


def test_a_death_without_a_word_is_told_with_what_it_printed(child):
    canary = secrets.token_hex(32)
    with refusal("mount_failed") as caught:
        child(f"print('Fatal: no luck, key {canary}', file=sys.stderr)\nos._exit(3)")
    assert "exit code 3" in caught.value.detail
    assert "Fatal: no luck" in caught.value.detail
    assert canary not in caught.value.detail
    with refusal("mount_failed") as caught:
        child("os.kill(os.getpid(), 9)")
    assert "signal 9" in caught.value.detail


def test_one_that_is_never_ready_is_ended(child, tmp_path):
    note = tmp_path / "pid"
    with refusal("timed_out"):
        child(
            f"""
            import signal
            open({str(note)!r}, "w").write(str(os.getpid()))
            signal.pause()
            """,
            wait=2.0,
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_ready_pipe_speaks_once_and_is_not_inherited():
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    pipe = background.ReadyPipe(write_end)
    assert not os.get_inheritable(write_end)
    pipe.ready({"mountpoint": "/mnt"})
    pipe.failed(MeshkitError("mount_failed"))
    assert os.read(read_end, 1000) == b'{"ready": {"mountpoint": "/mnt"}}\n'
    assert os.read(read_end, 1000) == b""
    os.close(read_end)
    background.ReadyPipe(None).ready({})
    # the command that started us may have gone
    read_end, write_end = os.pipe()
    os.close(read_end)
    background.ReadyPipe(write_end).ready({})


def test_megabyte_buffers_are_recycled_with_the_allocator_settings():
    script = textwrap.dedent(
        """
        import resource
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        before = faults()
        for _ in range(100):
            buffer = bytearray(1 << 20)
            buffer[:] = b"x" * (1 << 20)
        print(faults() - before)
        """
    )
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", script], env={**os.environ, **extra}, capture_output=True, check=True
            ).stdout
        )
        for extra in ({}, background._ALLOCATOR)
    ]
    assert counts[1] * 10 < counts[0]


def test_the_program_is_run_again_with_the_allocator_settings_once():
    script = textwrap.dedent(
        """
        import os, sys
        from meshkitfs.daemon.background import tune_allocator
        mine = os.environ.get("RUNS", "")
        os.environ["RUNS"] = mine + "x"
        tune_allocator()
        print(mine + "x", os.environ.get("MALLOC_TOP_PAD_"), sys.argv[1:])
        """
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ended = subprocess.run(
        [sys.executable, "-c", script, "an argument"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "xx 67108864 ['an argument']\n"


def test_no_core_dump_can_be_written():
    script = "import resource; from meshkitfs.daemon import hygiene; hygiene.harden(); "
    script += "print(resource.getrlimit(resource.RLIMIT_CORE))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "(0, 0)\n"
