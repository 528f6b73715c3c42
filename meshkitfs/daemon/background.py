"""Starting the daemon: in the background with a pipe that says when it is ready, or in the foreground.

The background process is the same program run again as ``meshkitfs mount --foreground`` in a session of
its own. It tells the command that started it, over an inherited pipe, one JSON line: ``{"ready": {...}}``
or ``{"error": {...}}``. A passphrase travels over a second pipe: never as an argument, which every user
can read, and never in the environment, which children inherit.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import TABLE, MeshkitError
from .config import MountOptions
from .home import Home
from .logs import redact

__all__ = ["ReadyPipe", "start", "tune_allocator"]

READY_SECONDS: Final = 90.0
_STOP_SECONDS: Final = 10.0
_TAIL_BYTES: Final = 2000

# glibc gives every megabyte-sized buffer back to the kernel and then pays a page fault for each 4 KiB of
# the next one. Kept in the heap, buffers cost a 60th of that. glibc reads these at program start only,
# and as plain byte counts: a suffix such as "1g" is read as 1.
_ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class ReadyPipe:
    """The daemon's end of the pipe; says once how starting went. Without a descriptor it says nothing."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            # Programs this process starts must not keep the pipe open after us.
            os.set_inheritable(descriptor, False)

    def ready(self, info: Mapping[str, Any]) -> None:
        self._say({"ready": dict(info)})

    def failed(self, error: MeshkitError) -> None:
        self._say({"error": error.as_dict()})

    def _say(self, message: dict[str, Any]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.write(descriptor, json.dumps(message).encode("ascii") + b"\n")
        except OSError:
            pass  # whoever started us has gone; the mount is none the worse for it
        finally:
            os.close(descriptor)


def start(
    home: Home,
    point: Path,
    options: MountOptions,
    passphrase: str | None,
    *,
    wait: float = READY_SECONDS,
) -> dict[str, Any]:
    """Mount ``home`` at ``point`` in a background process; return what it says when it is ready.

    Raises what kept the daemon from starting, ``mount_failed`` when it died without a word (with the end
    of what it printed), and ``timed_out`` after ``wait`` seconds; then the process was ended again.
    """
    home.ensure()
    output_path = home.log_dir / "startup.log"
    read_end, write_end = os.pipe()
    secret_end = None if passphrase is None else _pipe_holding(passphrase)
    passed = [write_end] if secret_end is None else [write_end, secret_end]
    output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            _command(home, point, options, write_end, secret_end),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",  # a daemon that stays in a directory keeps it from being unmounted
            env=_environment(),
            pass_fds=passed,
            start_new_session=True,
        )
    except OSError as error:
        os.close(read_end)
        raise MeshkitError("mount_failed", f"{sys.executable}: {error.strerror}") from error
    finally:
        for descriptor in (*passed, output):
            os.close(descriptor)
    try:
        line = _first_line(read_end, wait)
    except BaseException:  # Ctrl-C included: nobody would know about a daemon that is left behind
        _end(process)
        raise
    finally:
        os.close(read_end)
    if line is None:
        _end(process)
        raise MeshkitError("timed_out", f"not ready after {wait:.0f} seconds; see {home.log_file}")
    if not line:
        status = process.wait()
        raise MeshkitError("mount_failed", f"the daemon ended with {_status(status)}{_tail(output_path)}")
    message = json.loads(line)
    if "ready" in message:
        # The daemon outlives us on purpose; without this, Popen warns about a child that still runs.
        process.returncode = 0
        return {"pid": process.pid, **message["ready"]}
    process.wait()
    failure = message["error"]
    code = failure["code"] if failure["code"] in TABLE else "internal_error"
    raise MeshkitError(code, failure["detail"])


def tune_allocator() -> None:
    """Run this program again, once, with the allocator set up for megabyte buffers.

    Does nothing when the environment has the settings (the background start gave them, or a person did).
    Descriptors that are inheritable stay open.
    """
    if any(name in os.environ for name in _ALLOCATOR) or not sys.executable:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_ALLOCATOR})  # noqa: S606


def _command(home: Home, point: Path, options: MountOptions, ready: int, secret: int | None) -> Sequence[str]:
    # -P: the directory of whoever runs the command must not be searched for modules.
    command = [sys.executable, "-P", "-m", "meshkitfs", "--home", str(home.root)]
    command += ["--config", str(home.config_path), "mount", "--foreground", "--ready-fd", str(ready)]
    if secret is not None:
        command += ["--passphrase-fd", str(secret)]
    if options.nonempty:
        command.append("--nonempty")
    if options.read_only:
        command.append("--read-only")
    if options.fsync is not None:
        command += ["--fsync", options.fsync]
    if options.log_format is not None:
        command += ["--log-format", options.log_format]
    if options.metrics is not None:
        command += ["--metrics", options.metrics]
    if options.locked:
        command.append("--locked")
    if options.noexec:
        command.append("--noexec")
    return [*command, "--", str(point)]


def _environment() -> dict[str, str]:
    # The daemon must be the very code that starts it, also when that is a source tree.
    code = str(Path(__file__).resolve().parents[2])
    search = os.environ.get("PYTHONPATH")
    return {
        **_ALLOCATOR,
        **os.environ,
        "PYTHONPATH": f"{code}{os.pathsep}{search}" if search else code,
    }


def _pipe_holding(text: str) -> int:
    """Return the read end of a pipe that holds ``text``, which must fit into the pipe's buffer."""
    data = text.encode("utf-8", "surrogateescape") + b"\n"
    if len(data) > select.PIPE_BUF:
        raise MeshkitError("invalid_argument", f"the passphrase is longer than {select.PIPE_BUF} bytes")
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    return read_end


def _first_line(descriptor: int, wait: float) -> bytes | None:
    """Return what arrives up to a newline or the end of the pipe; None when nothing ended in time."""
    deadline = time.monotonic() + wait
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return b""
        data += chunk
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _tail(path: Path) -> str:
    try:
        text = path.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip()
    except OSError:
        return ""
    return f": {redact(text)}" if text else f" (it printed nothing; see {path.parent})"
