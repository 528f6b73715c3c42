"""``rclone serve s3``: a real S3 server over a directory, which checks signatures.

It is chosen for what it does not do, too: ``If-None-Match`` is ignored, and ``x-amz-content-sha256`` is not checked.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import install
from servers.process import HOST, Server, answers, free_port, not_tested, started
from servers.s3 import S3Server

ACCESS_KEY, SECRET_KEY = "AKIDRCLONE", "rclone-secret/+key"


@contextlib.contextmanager
def rclone_server(*, port: int | None = None, place: Path | None = None) -> Iterator[tuple[S3Server, Server]]:
    """A server with one bucket, and its process; at a ``port``, over a directory ``place``, if they matter."""
    why = install.missing(install.TARGET, "rclone")
    if why:
        not_tested("S3 with rclone", why)
    with tempfile.TemporaryDirectory(prefix="mkrclone-") as own:
        port, place = port or free_port(), place or Path(own)
        command = [
            install.TARGET / "rclone" / "rclone", "serve", "s3", "--config", "/dev/null", "--addr", f"{HOST}:{port}",
            "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", place,
        ]  # fmt: skip
        server = S3Server(f"http://{HOST}:{port}", "blocks", ACCESS_KEY, SECRET_KEY)
        (place / server.bucket).mkdir(parents=True, exist_ok=True)
        with started(command, ready=answers(port), name="rclone serve s3") as process:
            yield server, process


@pytest.fixture(name="rclone_s3", scope="session")
def rclone_s3_fixture() -> Iterator[S3Server]:
    with rclone_server() as (server, _):
        yield server
