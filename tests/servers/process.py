"""Starting one server process, waiting until it answers, and ending it by its process id.

    with started([program, "--port", str(port)], ready=answers(port), name="rclone") as server:
        ...

The process runs in its own session with a home of its own, so that nothing of the person who runs the tests
is read or written, and what it says is shown when it does not come up.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HOST = "127.0.0.1"
START_S = 60.0  # reached only by a server that never comes up; a loaded machine is slow
STOP_S = 15.0
_LOG_TAIL = 4000


@dataclass(slots=True)
class Server:
    """A running process. ``log`` is the file with what it wrote to stdout and stderr."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """The end of what the process has written so far."""
        return self.log.read_text(errors="replace")[-_LOG_TAIL:]

    def pause(self) -> None:
        """Stop it as a network that has gone away does: connections stay open and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)
        # The signal is sent, which is not yet stopped: all its threads have to be.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without warning (SIGKILL), as a crash does, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in order (SIGTERM), with force if it does not listen. Harmless when it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # Helpers that the server started and left behind are of its process group, and of nobody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def free_port() -> int:
    """A loopback port that nobody listens on now. Another process may take it first: start, then look."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> Callable[[Server], bool]:
    """Ready when somebody accepts connections on the port."""
    return functools.partial(_accepts, port)


def responds(url: str) -> Callable[[Server], bool]:
    """Ready when the URL gives any HTTP answer, be it an error."""

    def ready(_server: Server) -> bool:
        try:
            # Never through a proxy of the environment: the targets are on this machine.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            opener.open(url, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            return False
        return True

    return ready


def says(text: str) -> Callable[[Server], bool]:
    """Ready when the process has written this."""
    return lambda server: text in server.log.read_text(errors="replace")


@contextlib.contextmanager
def started(
    command: Sequence[str | Path],
    *,
    ready: Callable[[Server], bool],
    name: str,
    env: dict[str, str] | None = None,
    deadline: float = START_S,
) -> Iterator[Server]:
    """Run a server until the block ends. ``env`` is added to a small environment of its own.

    Raises RuntimeError, with the end of the log, when the process ends or does not become ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="mksrv-") as place:
        log = Path(place, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                env={"PATH": os.environ.get("PATH", ""), "HOME": place, "TMPDIR": place, "LANG": "C.UTF-8"}
                | (env or {}),
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(name, process, log)
        try:
            _wait(server, ready, deadline)
            yield server
        finally:
            server.stop()


def not_tested(what: str, why: str) -> None:
    """Skip, loudly: a skipped server proves nothing, and the summary has to say so."""
    pytest.skip(f"NOT TESTED: {what}; {why}")


def _accepts(port: int, _server: Server) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait(server: Server, ready: Callable[[Server], bool], deadline: float) -> None:
    end = time.monotonic() + deadline
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(f"{server.name} ended with {server.process.returncode}: {server.said()}")
        if ready(server):
            return
        if time.monotonic() > end:
            raise RuntimeError(f"{server.name} was not ready after {deadline:.0f} s: {server.said()}")
        time.sleep(0.05)  # between two looks at a condition that sends no signal
