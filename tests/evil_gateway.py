"""A trustless gateway that is honest until it is told otherwise: a real socket on loopback.

    with EvilGateway() as gateway:
        gateway.serve(block)
        gateway.behave("wrong block")          # or behave(name, digest) for one block
        ... configure a provider with gateway.url ...

`BEHAVIOURS` lists every way to misbehave, and what a reader has to make of it.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import trio

from meshkitfs.core.blocks import MAX_SEALED
from meshkitfs.core.cid import cid_text

RAW = "application/vnd.ipld.raw"
HOST = "127.0.0.1"


class Request(NamedTuple):
    """What was asked: the method, the CID, the query and the headers (names in lower case)."""

    method: str
    cid: str
    query: str
    headers: dict[str, str]


Answer = Callable[[trio.SocketStream, bytes], Awaitable[None]]


class Behaviour(NamedTuple):
    """``lies``: the answer says that other bytes are the block, so the gateway is not to be asked again."""

    answer: Answer
    lies: bool = False


def reply(status: int, body: bytes = b"", kind: str = RAW, *more: str, length: int | None = None) -> bytes:
    """An answer, byte for byte. A negative ``length`` leaves the header out."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Type: {kind}", *more]
    if size >= 0:
        lines.append(f"Content-Length: {size}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def says(status: int, body: bytes | None = None, kind: str = RAW, *more: str) -> Answer:
    """Always this answer; without a body, the right block."""

    async def answer(stream: trio.SocketStream, block: bytes) -> None:
        await stream.send_all(reply(status, block if body is None else body, kind, *more))

    return answer


async def _silence(stream: trio.SocketStream, _: bytes) -> None:
    await trio.sleep_forever()


async def _slow_head(stream: trio.SocketStream, _: bytes) -> None:
    for byte in itertools.cycle(b"X"):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.02)


async def _slow_loris(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, length=len(block)))
    for byte in block:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.02)


async def _endless(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, b"", RAW, "Transfer-Encoding: chunked", length=-1))
    chunk = b"%x\r\n%s\r\n" % (65536, bytes(65536))
    while True:
        await stream.send_all(chunk)


async def _half(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, block[: len(block) // 2], length=len(block)))
    await stream.aclose()


async def _half_without_length(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, block[: len(block) // 2], RAW, "Connection: close", length=-1))
    await stream.aclose()


async def _too_short_a_length(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, block, length=len(block) - 7))
    await stream.aclose()


async def _reset(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, block[:10], length=len(block)))
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, linger)
    stream.socket.close()


async def _flipped(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, block[:-1] + bytes([block[-1] ^ 1])))


async def _compressed(stream: trio.SocketStream, block: bytes) -> None:
    await stream.send_all(reply(200, gzip.compress(block), RAW, "Content-Encoding: gzip"))


async def _garbage(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    await stream.aclose()


_PAGE = b"<!DOCTYPE html><html><title>Welcome</title><body>Please accept the terms.</body></html>"

BEHAVIOURS: dict[str, Behaviour] = {
    "html page": Behaviour(says(200, _PAGE, "text/html; charset=utf-8")),
    "html page that claims to be the block": Behaviour(says(200, _PAGE), lies=True),
    "wrong block": Behaviour(says(200, b"another block altogether"), lies=True),
    "one bit": Behaviour(_flipped, lies=True),
    "empty": Behaviour(says(200, b""), lies=True),
    "silence": Behaviour(_silence),
    "slow head": Behaviour(_slow_head),
    "slow loris": Behaviour(_slow_loris),
    "endless body": Behaviour(_endless),
    "too large": Behaviour(says(200, bytes(MAX_SEALED + 1))),
    "truncated body": Behaviour(_half),
    "truncated body without a length": Behaviour(_half_without_length),
    "wrong content length": Behaviour(_too_short_a_length, lies=True),
    "connection reset": Behaviour(_reset),
    "not HTTP": Behaviour(_garbage),
    "compressed": Behaviour(_compressed),
    "redirect to file:": Behaviour(says(302, b"", "text/html", "Location: file:///etc/passwd")),
    "redirect to itself": Behaviour(says(302, b"", "text/html", "Location: ?again")),
    "server error": Behaviour(says(500, b"<html>Oops</html>", "text/html")),
    "too many requests": Behaviour(says(429, b"slow down", "text/plain", "Retry-After: 0")),
    "forbidden": Behaviour(says(403, b"not for you", "text/plain")),
}
# Ways to say that the block is not there; only 404 is what the specification wants.
ABSENT = {"not found": 404, "gone": 410, "not cached": 412}


@dataclass(slots=True)
class _Told:
    answer: Answer
    times: int | None


class EvilGateway:
    """One gateway. ``requests`` lists what was asked of it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._blocks: dict[str, bytes] = {}
        self._told: dict[str | None, _Told] = {}

    def __enter__(self) -> EvilGateway:
        ready = threading.Event()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    serve = partial(trio.serve_tcp, self._handle, 0, host=HOST)
                    [listener] = await nursery.start(serve)
                    self.url = f"http://{HOST}:{listener.socket.getsockname()[1]}"
                    ready.set()

        self._thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join()

    def serve(self, *blocks: Any) -> None:
        """Have these blocks (anything with ``digest`` and ``data``)."""
        self._blocks.update({cid_text(block.digest): bytes(block.data) for block in blocks})

    def behave(self, name: str, digest: bytes | None = None, *, times: int | None = None) -> None:
        """Misbehave from now on, for one block or all, a number of times or for good."""
        answer = BEHAVIOURS[name].answer if name in BEHAVIOURS else says(ABSENT[name], b"no", "text/plain")
        self._told[None if digest is None else cid_text(digest)] = _Told(answer, times)

    def heal(self) -> None:
        """Be honest from now on."""
        self._told.clear()

    def asked(self, digests: Iterable[bytes] = ()) -> int:
        """How often it was asked, for these blocks or for any."""
        wanted = {cid_text(digest) for digest in digests}
        return sum(not wanted or request.cid in wanted for request in self.requests)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                pairs = (line.partition(":") for line in lines)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                # A body is read, since whoever sends it would wait; what it says is nobody's business here.
                length = int(headers.get("content-length", "0"))
                while len(data) < length:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += more
                data = data[length:]
                await self._answer(stream, first, headers)

    async def _answer(self, stream: trio.SocketStream, first: str, headers: dict[str, str]) -> None:
        method, target, _ = first.split(" ")
        target, _, query = target.partition("?")
        host = headers.get("host", "")
        cid = host.split(".")[0] if ".ipfs." in host else target.rpartition("/")[2]
        self.requests.append(Request(method, cid, query, headers))
        block = self._blocks.get(cid)
        for key in (cid, None):
            told = self._told.get(key)
            if told is not None:
                if told.times is not None:
                    told.times -= 1
                    if told.times < 0:
                        continue
                await told.answer(stream, block or b"a block that nobody stored")
                return
        if headers.get("accept") != RAW or "format=raw" not in query.split("&"):
            await stream.send_all(reply(400, b"say what you want", "text/plain"))
        elif block is None:
            await stream.send_all(reply(404, b"not here", "text/plain"))
        else:
            more = (f'Etag: "{cid}.raw"', f'Content-Disposition: attachment; filename="{cid}.bin"')
            await stream.send_all(reply(200, block, RAW, *more))
