"""A contract server for IPFS Cluster's REST API (as of 1.1.6) over real nodes. It is not IPFS Cluster.

It has what a client of that API can see: the pinset, allocations, states that change a while after a request was
answered, errors in the API's form. Blocks and pins are real, at the nodes. What it does not have: consensus, more
than one server, metrics, sharding, and everything that is not about single raw blocks.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from servers.ipfs import Node
from servers.process import HOST

EVERYWHERE = -1
_STAMP = "2026-01-01T00:00:00Z"


class Refusal(Exception):
    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message


class Cluster:
    """Runs in a thread. ``allow`` holds pinning back while it is clear; ``broken`` are peers that cannot pin."""

    def __init__(self, nodes: Sequence[Node], authorization: str | None = None) -> None:
        self.nodes = {f"12D3KooWpeer{index}": node for index, node in enumerate(nodes)}
        self.authorization = authorization
        self.allow = threading.Event()
        self.allow.set()
        self.broken: set[str] = set()
        self.asked: list[str] = []
        self.pins: dict[str, dict[str, Any]] = {}
        self.states: dict[tuple[str, str], str] = {}
        # Which peers were handed a block by the request that added it.
        self.handed: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._workers = ThreadPoolExecutor(8)
        self._server = ThreadingHTTPServer((HOST, 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign] # clients that left
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        self._thread.start()
        try:
            yield self
        finally:
            self.allow.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._workers.shutdown()

    def settled(self) -> None:
        """Wait until nothing is on its way."""
        while any(state in ("pin_queued", "pinning") for state in list(self.states.values())):
            time.sleep(0.02)  # between two looks at a condition that sends no signal

    # -- the routes ------------------------------------------------------------------------------------

    def route(
        self, method: str, path: str, query: dict[str, str], file: bytes
    ) -> tuple[int, list[Any], bool]:
        """The status, the objects to answer with, and whether they are a stream."""
        parts = path.strip("/").split("/")
        match (method, *parts):
            case ("GET", "version"):
                return 200, [{"version": "1.1.6"}], False
            case ("GET", "health"):
                return 204, [], False
            case ("GET", "id"):
                return 200, [self._peer(next(iter(self.nodes)))], False
            case ("GET", "peers"):
                return 200, [self._peer(peer) for peer in self.nodes], True
            case ("POST", "add"):
                return 200, self._add(file, query), query.get("stream-channels") != "false"
            case ("GET", "pins"):
                cids = (
                    [self._checked(cid) for cid in query["cids"].split(",")]
                    if "cids" in query
                    else list(self.pins)
                )
                return 200, [self._status(cid) for cid in cids], True
            case ("POST", "pins", cid):
                return 200, [self._pin(self._checked(cid), query)], False
            case ("GET", "pins", cid):
                return 200, [self._status(self._checked(cid))], False
            case ("DELETE", "pins", cid):
                return 200, [self._unpin(self._checked(cid))], False
            case ("POST", "pins", cid, "recover"):
                self._checked(cid)
                for peer in self.pins[cid]["allocations"] if cid in self.pins else ():
                    if self.states.get((cid, peer)) == "pin_error":
                        self._start(cid, peer)
                return 200, [self._status(cid)], False
            case ("GET", "allocations"):
                return 200, list(self.pins.values()), True
            case ("GET", "allocations", cid):
                if self._checked(cid) not in self.pins:
                    raise Refusal(404, "not found")
                return 200, [self.pins[cid]], False
        raise Refusal(404, "not found")

    def _add(self, file: bytes, query: dict[str, str]) -> list[Any]:
        if query.get("format") != "car":
            raise Refusal(500, "this contract server takes format=car only")
        cid, data = _block(file)
        with self._lock:
            pin = self._make(cid, query)
        for peer in pin["allocations"]:
            if peer not in self.broken:
                self._store(self.nodes[peer], cid, data)
                self.handed.add((cid, peer))
        self._begin(pin)
        return [
            {"name": query.get("name", ""), "cid": cid, "bytes": len(data), "allocations": pin["allocations"]}
        ]

    def _pin(self, cid: str, query: dict[str, str]) -> dict[str, Any]:
        with self._lock:
            pin = self._make(cid, query)
        self._begin(pin)
        return pin

    def _make(self, cid: str, query: dict[str, str]) -> dict[str, Any]:
        either = query.get("replication") or EVERYWHERE
        least, most = (int(query.get(f"replication-{end}") or either) for end in ("min", "max"))
        peers = list(self.nodes)
        if least > most:
            raise Refusal(500, "cluster.replication_factor_min is larger than cluster.replication_factor_max")
        if EVERYWHERE in (least, most) and least != most:
            raise Refusal(500, "cluster.replication_factor_min and max must be -1 when one of them is")
        if least > len(peers):
            raise Refusal(
                500, f"not enough peers to allocate CID. Needed at least: {least}. Wanted at most: {most}"
            )
        # Not always the same ones.
        start = sum(cid.encode()) % len(peers)
        turned = peers[start:] + peers[:start]
        pin = {
            "cid": cid,
            "name": query.get("name", ""),
            "type": "pin",
            "mode": query.get("mode", "recursive"),
            "max_depth": -1,
            "reference": None,
            "allocations": peers if most == EVERYWHERE else turned[:most],
            "replication_factor_min": least,
            "replication_factor_max": most,
            "metadata": {key[5:]: value for key, value in query.items() if key.startswith("meta-")},
            "origins": [],
            "user_allocations": [],
            "shard_size": 0,
            "expire_at": "0001-01-01T00:00:00Z",
            "timestamp": _STAMP,
        }
        self.pins[cid] = pin
        return pin

    def _begin(self, pin: dict[str, Any]) -> None:
        for peer in pin["allocations"]:
            if self.states.get((pin["cid"], peer)) != "pinned":
                self._start(pin["cid"], peer)

    def _start(self, cid: str, peer: str) -> None:
        self.states[cid, peer] = "pin_queued"
        self._workers.submit(self._carry_out, cid, peer)

    def _carry_out(self, cid: str, peer: str) -> None:
        self.allow.wait()
        if cid not in self.pins:
            return
        self.states[cid, peer] = "pinning"
        node = self.nodes[peer]
        try:
            if peer in self.broken:
                raise OSError("this peer is broken")
            if (cid, peer) not in self.handed and not node.has(cid):
                # What bitswap does between the nodes of a cluster.
                holder = next(other for other in self.nodes.values() if other is not node and other.has(cid))
                self._store(node, cid, holder.rpc("block/get", arg=cid).content)
            node.rpc("pin/add", arg=cid).raise_for_status()
            self.states[cid, peer] = "pinned"
        except Exception:  # any failure of a node is the pin's
            self.states[cid, peer] = "pin_error"

    @staticmethod
    def _store(node: Node, cid: str, data: bytes) -> None:
        form = {"format": "raw", "cid-codec": "raw", "mhtype": "sha2-256", "version": "1", "pin": "false"}
        reply = node.rpc("block/put", {"data": data}, **form)
        if reply.status_code != 200 or reply.json()["Key"] != cid:
            raise Refusal(500, f"block/put: {reply.text[:100]}")

    def _unpin(self, cid: str) -> dict[str, Any]:
        with self._lock:
            pin = self.pins.pop(cid, None)
        if pin is None:
            raise Refusal(404, "not found")
        for peer in pin["allocations"]:
            self.states.pop((cid, peer), None)
            self.handed.discard((cid, peer))
            self._workers.submit(self.nodes[peer].rpc, "pin/rm", arg=cid)
        return pin

    def _status(self, cid: str) -> dict[str, Any]:
        pin = self.pins.get(cid)
        return {
            "cid": cid,
            "name": pin["name"] if pin else "",
            "allocations": pin["allocations"] if pin else [],
            "origins": [],
            "created": _STAMP,
            "metadata": pin["metadata"] if pin else None,
            "peer_map": {
                peer: {
                    "peername": f"peer{index}",
                    "ipfs_peer_id": node.id,
                    "ipfs_peer_addresses": [node.swarm],
                    "status": self._state(cid, peer, pin),
                    "timestamp": _STAMP,
                    "error": "this peer is broken" if self.states.get((cid, peer)) == "pin_error" else "",
                    "attempt_count": 0,
                    "priority_pin": False,
                }
                for index, (peer, node) in enumerate(self.nodes.items())
            },
        }

    def _state(self, cid: str, peer: str, pin: dict[str, Any] | None) -> str:
        if pin is None:
            return "unpinned"
        return self.states.get((cid, peer), "pin_queued") if peer in pin["allocations"] else "remote"

    def _peer(self, peer: str) -> dict[str, Any]:
        node = self.nodes[peer]
        return {
            "id": peer,
            "addresses": [],
            "cluster_peers": list(self.nodes),
            "cluster_peers_addresses": None,
            "version": "1.1.6",
            "commit": "",
            "rpc_protocol_version": "/ipfscluster/1.0/rpc",
            "error": "",
            "ipfs": {"id": node.id, "addresses": [node.swarm], "error": ""},
            "peername": peer,
        }

    @staticmethod
    def _checked(cid: str) -> str:
        if not cid.startswith("bafkrei") or len(cid) != 59:
            raise Refusal(400, "error decoding Cid: " + cid)
        return cid

    # -- HTTP ------------------------------------------------------------------------------------------

    def _handler(cluster) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                cluster.asked.append(f"{self.command} {self.path}")
                try:
                    if cluster.authorization not in (None, self.headers.get("Authorization")):
                        raise Refusal(401, "unauthorized: no valid credentials")
                    file = _part(self.headers.get("Content-Type", ""), body) if parts.path == "/add" else b""
                    status, found, stream = cluster.route(self.command, parts.path, query, file)
                    if stream and not found:
                        status = 204
                    if parts.path == "/add" and not stream:
                        text = json.dumps(found)
                    else:
                        text = "".join(json.dumps(item) + "\n" for item in found)
                    self.answer(status, text.encode())
                except Refusal as refusal:
                    said = {"code": refusal.code, "message": refusal.message}
                    self.answer(refusal.code, json.dumps(said).encode())

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                if status == 401:
                    self.send_header("WWW-Authenticate", 'Basic realm="Restricted IPFS Cluster API"')
                if status != 204:
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if status != 204:
                    self.wfile.write(body)

            do_GET = do_POST = do_DELETE = handle_one  # noqa: N815

            def log_message(self, *args: object) -> None: ...

        return Handler


@pytest.fixture
def cluster(ipfs_node: Node, second_ipfs_node: Node) -> Iterator[Cluster]:
    """A cluster without any pin over two nodes."""
    with Cluster([ipfs_node, second_ipfs_node]).running() as running:
        yield running


def _part(kind: str, body: bytes) -> bytes:
    """The one file of a multipart form."""
    header = Message()
    header["Content-Type"] = kind
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str):
        raise Refusal(500, "request Content-Type isn't multipart/form-data")
    _, *parts, end = body.split(b"--" + boundary.encode())
    if len(parts) != 1 or end.strip() != b"--":
        raise Refusal(500, "multipart: one file was expected")
    _, _, content = parts[0].partition(b"\r\n\r\n")
    return content[:-2]


def _block(car: bytes) -> tuple[str, bytes]:
    """The root and the block of a CAR that has one block; read with a library that the provider does not use."""
    import dag_cbor
    from multiformats import CID, varint

    size, _, rest = varint.decode_raw(car)
    header = dag_cbor.decode(bytes(rest[:size]))
    assert isinstance(header, dict)
    roots: Any = header["roots"]
    if header["version"] != 1 or len(roots) != 1:
        raise Refusal(500, "only CAR files with a single root are supported")
    size, _, rest = varint.decode_raw(bytes(rest[size:]))
    section = bytes(rest)
    if len(section) != size:
        raise Refusal(500, "unexpected EOF")
    cid = CID.decode(section[:36])
    if cid != roots[0]:
        raise Refusal(500, "the root is not in the CAR")
    return str(cid.set(base="base32")), section[36:]
