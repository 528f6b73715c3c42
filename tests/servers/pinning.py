"""A pinning service: the npm package ``mock-ipfs-pinning-service``, which holds requests to the API's document.

It is not ours, and it fetches and keeps no blocks: only the requests and their states are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from servers import nodejs
from servers.process import HOST, Server, says, started

TOKEN = "s3cr3t-canary-pinning"


@dataclass(slots=True)
class Service:
    """A running service, and a way to ask it past the provider."""

    url: str
    server: Server
    client: httpx.Client
    token: str = TOKEN

    def pins(self, *cids: str) -> list[dict[str, Any]]:
        """The requests for these blocks."""
        asked = {"cid": ",".join(cids), "status": "queued,pinning,pinned,failed", "limit": 1000}
        reply = self.client.get(f"{self.url}/pins", params=asked)
        reply.raise_for_status()
        return list(reply.json()["results"])

    def turn(self, cid: str, status: str) -> None:
        """Bring the request for a block into another state; the service goes by the request's name."""
        [request] = self.pins(cid)
        changed = {"cid": cid, "name": f"{status}-"}
        self.client.post(f"{self.url}/pins/{request['requestid']}", json=changed).raise_for_status()


@pytest.fixture(scope="session")
def pinning_service() -> Iterator[Service]:
    command = [*nodejs.script("npm_clients", "pinning_service.mjs"), TOKEN]
    with started(command, ready=says(" end\n"), name="the pinning service") as server:
        port = server.said().partition("ready ")[2].split()[0]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(headers=headers, trust_env=False, timeout=30) as client:
            yield Service(f"http://{HOST}:{port}", server, client)
