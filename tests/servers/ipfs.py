"""An IPFS node with Kubo's RPC: Kubo itself if ``MESHKIT_TEST_KUBO`` names its program, else js-ipfs.

Both are the real thing: a block store on disk, pins, bitswap to other nodes. js-ipfs is deprecated and here only
because it can be installed everywhere; where the two differ, the provider's tests say so.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from servers import nodejs
from servers.process import HOST, Server, free_port, responds, says, started


class Node:
    """A node with its repository. It keeps its addresses when it is killed and started again."""

    def __init__(self, repo: Path) -> None:
        self.repo = repo
        self.id = ""
        self.swarm = ""
        self._api_port = self._swarm_port = 0
        self._process = ExitStack()
        # One client, because making one takes longer than asking; no connection that outlives a killed node.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(timeout=30, trust_env=False, limits=limits)
        self.server: Server | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._api_port}"

    def start(self) -> None:
        assert self.server is None
        kubo = os.environ.get("MESHKIT_TEST_KUBO")
        self.server = self._start_kubo(kubo) if kubo else self._start_js()

    def close(self) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        self.server = None
        self._process.close()

    def kill(self) -> None:
        """End it as a crash does."""
        assert self.server is not None
        self.server.kill()
        self.stop()
        # js-ipfs does not recognize the lock of a process that is gone.
        shutil.rmtree(self.repo / "repo.lock", ignore_errors=True)

    def rpc(self, command: str, files: dict[str, bytes] | None = None, **params: str) -> httpx.Response:
        """Ask the node directly, past the provider under test."""
        asked = {"timeout": "10s", "cid-base": "base32", **params}
        return httpx.post(
            f"{self.url}/api/v0/{command}", params=asked, files=files, timeout=30, trust_env=False
        )

    def has(self, cid: str) -> bool:
        """Whether the node itself has a block. js-ipfs does not know that it has not: it looks for it."""
        return self.rpc("block/stat", arg=cid, offline="true", timeout="300ms").status_code == 200

    def block_file(self, digest: bytes) -> Path:
        """Where the node keeps a block. Both kinds name the file by the multihash, in base32."""
        return next(self._files(b"\x12\x20" + digest))

    def block_there(self, cid: str) -> bool:
        """Whether there is a file for a CID (version 1, base32)."""
        return any(self._files(base64.b32decode(cid[1:].upper() + "======")[2:]))

    def _files(self, multihash: bytes) -> Iterator[Path]:
        return self.repo.glob(f"blocks/*/{base64.b32encode(multihash).decode().rstrip('=')}.data")

    def plant(self, digest: bytes, data: bytes) -> None:
        """Put bytes where the node keeps a block, behind its back."""
        self.block_file(digest).write_bytes(data)

    def _start_js(self) -> Server:
        command = [
            *nodejs.script("ipfs_node", "node.mjs"),
            self.repo,
            str(self._api_port),
            str(self._swarm_port),
        ]
        server = self._process.enter_context(started(command, ready=says(" end\n"), name="js-ipfs"))
        told = server.log.read_text()
        addresses = json.loads(told[told.index("ready ") + 6 : told.rindex(" end")])
        self.id, self._api_port = addresses["id"], addresses["api"]
        self.swarm = next(address for address in addresses["swarm"] if "/127.0.0.1/tcp/" in address)
        self._swarm_port = int(self.swarm.split("/")[4])
        return server

    def _start_kubo(self, program: str) -> Server:
        env = {"IPFS_PATH": str(self.repo)}
        if not self._api_port:
            self._api_port, self._swarm_port = free_port(), free_port()
        if not (self.repo / "config").exists():
            subprocess.run(
                [program, "init", "--profile=test,server"],
                env={**os.environ, **env},
                check=True,
                capture_output=True,
            )
            path = self.repo / "config"
            config = json.loads(path.read_text())
            config["Addresses"] |= {
                "API": f"/ip4/{HOST}/tcp/{self._api_port}",
                "Gateway": "",
                "Swarm": [f"/ip4/{HOST}/tcp/{self._swarm_port}"],
            }
            config["Bootstrap"] = []
            config["Routing"] = {"Type": "none"}
            path.write_text(json.dumps(config))
        ready = responds(f"{self.url}/api/v0/version")
        server = self._process.enter_context(started([program, "daemon"], ready=ready, name="Kubo", env=env))
        self.id = self.rpc("id").json()["ID"]
        self.swarm = f"/ip4/{HOST}/tcp/{self._swarm_port}/p2p/{self.id}"
        return server


@contextmanager
def running_node() -> Iterator[Node]:
    """A new node with an empty repository, until the block ends. Skips where there is none to be had."""
    with tempfile.TemporaryDirectory(prefix="mkipfs-", ignore_cleanup_errors=True) as place:
        node = Node(Path(place) / "repo")
        node.start()
        try:
            yield node
        finally:
            node.close()


@pytest.fixture(scope="session")
def ipfs_node() -> Iterator[Node]:
    """A node for everybody. Who kills a node or looks at all it has takes `own_ipfs_node`."""
    with running_node() as node:
        yield node


@pytest.fixture
def own_ipfs_node() -> Iterator[Node]:
    with running_node() as node:
        yield node


@pytest.fixture(scope="session")
def second_ipfs_node() -> Iterator[Node]:
    with running_node() as node:
        yield node
