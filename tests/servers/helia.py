"""A trustless gateway that is not ours: Helia, over the directory of a byte store (`helia/gateway.mjs`)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshkitfs.providers import LocalStore
from servers import install
from servers.process import HOST, Server, free_port, not_tested, says, started


@pytest.fixture(name="helia", scope="session")
def helia_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of one gateway for all tests, and the store directory it serves."""
    directory = tmp_path_factory.mktemp("helia") / "blocks"
    LocalStore.open(directory, create=True)
    with helia_gateway(directory) as (url, _):
        yield url, directory


@contextlib.contextmanager
def helia_gateway(store: Path) -> Iterator[tuple[str, Server]]:
    """The address of a gateway over a store directory, and its process."""
    why = install.missing(install.TARGET, "node", "helia")
    if why:
        not_tested("gateway-retrieval with Helia", why)
    port = free_port()
    # Node looks for packages beside the script, and the one here may be newer than the installation.
    shutil.copy2(install.HERE / "helia" / "gateway.mjs", install.TARGET / "helia")
    command = [*install.node_command(), install.TARGET / "helia" / "gateway.mjs", store, str(port)]
    with started(command, ready=says("ready "), name="Helia gateway") as server:
        yield f"http://{HOST}:{port}", server
