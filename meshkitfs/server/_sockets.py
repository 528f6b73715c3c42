"""The sockets that are listened on: made here, or handed over by systemd."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from meshkitfs.errors import MeshkitError
from meshkitfs.server.settings import bound_names

__all__ = ["addresses_of", "names_of", "open_sockets"]

BACKLOG: Final = 512
# A client that takes nothing for so long is cut off; without that it could hold an answer for ever.
UNSENT_MS: Final = 30_000
_FIRST_FD: Final = 3


def open_sockets(listen: tuple[str, ...]) -> list[socket.socket]:
    """Return listening sockets: those of systemd if there are any, else for ``listen``.

    Raises invalid_config when one cannot be had.
    """
    found = _handed_over()
    if found:
        return found
    for place in listen:
        try:
            found.append(_unix(place[5:]) if place.startswith("unix:") else _tcp(place))
        except (OSError, ValueError) as error:
            for sock in found:
                sock.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise MeshkitError("invalid_config", f"cannot listen on {place}: {reason}") from None
    return found


def names_of(sockets: list[socket.socket]) -> set[str]:
    """The authorities by which they are reached, as far as that can be known."""
    names = {"localhost"}
    for sock in sockets:
        if sock.family != socket.AF_UNIX:
            host, port = sock.getsockname()[:2]
            names |= bound_names(f"[{host}]" if ":" in host else host, port)
    return names


def addresses_of(sockets: list[socket.socket], tls: bool) -> list[str]:
    """What to tell people: URLs, and ``unix:PATH``."""
    found = []
    for sock in sockets:
        if sock.family == socket.AF_UNIX:
            found.append(f"unix:{sock.getsockname()}")
        else:
            host, port = sock.getsockname()[:2]
            found.append(f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
    return found


def _tcp(place: str) -> socket.socket:
    host, _, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    info = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = info[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNSENT_MS)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _unix(path: str) -> socket.socket:
    """A Unix socket at the path; one that nobody listens on any more is replaced, anything else is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ValueError("something else is there")
            if _answers(path):
                raise ValueError("somebody listens there already")
            Path(path).unlink()
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _handed_over() -> list[socket.socket]:
    """The sockets that systemd has opened for us (sd_listen_fds): file descriptors from 3 on."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise MeshkitError("invalid_config", f"file descriptor {fd}: {error.strerror}") from None
        if sock.type != socket.SOCK_STREAM:
            raise MeshkitError("invalid_config", f"file descriptor {fd} is not a stream socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNSENT_MS)
        found.append(sock)
    return found
