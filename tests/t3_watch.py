"""``status --watch`` as a person sees it: through a real terminal, whose screen is drawn by pyte, and in a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
from control_daemon import running

from meshkitfs.cli._watch import changes

ROOT = Path(__file__).resolve().parents[1]
LEAVES_SCREEN, SHOWS_CURSOR = b"\x1b[?1049l", b"\x1b[?25h"
PATIENCE = 60.0


def status(state: str = "stored", **more):
    share = {"name": "photos", "mine": True, "rights": ["read"], "version": 3, "state": state}
    return {"identity": "alice", "mountpoint": "/mnt/m", "pid": 4, "shares": [share], "pending": {}, **more}


def environment(home: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(ROOT), "MESHKITFS_HOME": str(home), "HOME": str(home.parent), "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
    }  # fmt: skip


class Terminal:
    """A program on a terminal of its own, and the screen as it looks."""

    def __init__(self, home: Path) -> None:
        self.master, self._slave = pty.openpty()
        self.before = termios.tcgetattr(self._slave)
        self.raw = b""
        self.screen = pyte.Screen(100, 24)
        self._stream = pyte.ByteStream(self.screen)
        self._resize(24, 100)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "meshkitfs", "status", "--watch"],
            stdin=self._slave, stdout=self._slave, stderr=self._slave, env=environment(home), start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def _resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        self._resize(rows, columns)
        os.kill(self.process.pid, signal.SIGWINCH)

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def until(self, shown) -> None:
        """Read what is written until the screen is so."""
        deadline = time.monotonic() + PATIENCE
        while not shown(self.text()):
            assert time.monotonic() < deadline, self.text()
            self._read(0.5)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        data = os.read(self.master, 65536)
        self.raw += data
        self._stream.feed(data)
        return True

    def ended(self) -> int:
        deadline = time.monotonic() + PATIENCE
        # Read meanwhile: a terminal takes only so much that nobody reads.
        while self._read(0.05) or self.process.poll() is None:
            assert time.monotonic() < deadline, self.text()
        return self.process.returncode

    def settings(self):
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self._slave)


@pytest.fixture
def terminal(tmp_path):
    made = []

    def make() -> Terminal:
        made.append(Terminal(tmp_path / "home"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_terminal_shows_it_live_and_is_itself_again_after_q(terminal, tmp_path):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = status()
        seen = terminal()
        seen.until(lambda text: "photos" in text and "stored" in text and "(q ends)" in text)
        daemon.service.answers["status"] = status("uploading", locked={"since": 1, "by": "lock"})
        seen.until(lambda text: "uploading" in text and "unlock" in text)
        daemon.service.answers["status"] = status(shares=[{"name": f"s{n}"} for n in range(60)])
        seen.resize(12, 40)
        seen.until(lambda text: "lines more" in text)
        assert all(len(line) <= 40 for line in seen.screen.display)
        assert "(q ends)" in seen.screen.display[0]  # not scrolled away
    seen.until(lambda text: "The daemon does not run" in text)
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = status()
        seen.until(lambda text: "photos" in text)
        os.write(seen.master, b"xq")
        assert seen.ended() == 0
    assert LEAVES_SCREEN in seen.raw
    assert seen.raw.rindex(SHOWS_CURSOR) > seen.raw.rindex(b"\x1b[?25l")
    assert seen.settings() == seen.before


@pytest.mark.parametrize("end", ["ctrl-c", "sigterm"])
def test_it_is_itself_again_however_it_ends(terminal, tmp_path, end):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = status()
        seen = terminal()
        seen.until(lambda text: "photos" in text)
        if end == "ctrl-c":
            os.write(seen.master, b"\x03")
        else:
            os.kill(seen.process.pid, signal.SIGTERM)
        assert seen.ended() == 0
    assert LEAVES_SCREEN in seen.raw
    assert seen.settings() == seen.before


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_in_a_pipe_each_change_is_one_line_and_nothing_is_drawn(tmp_path, form):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = status()
        process = subprocess.Popen(
            [sys.executable, "-m", "meshkitfs", "status", "--watch", *form],
            env=environment(tmp_path / "home"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            first = [process.stdout.readline() for _ in range(1 if form else 2)]
            daemon.service.answers["status"] = status("uploading", counters={"puts": 4})
            then = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert rest == ""
    assert "\x1b" not in "".join([*first, then])
    if form:
        assert [json.loads(line)["shares"][0]["state"] for line in [*first, then]] == ["stored", "uploading"]
    else:
        assert [line.split("  ", 1)[1] for line in [*first, then]] == [
            "mounted at /mnt/m\n", "photos: stored, version 3\n", "photos: uploading, version 3\n",
        ]  # fmt: skip


def test_changes_name_only_what_changed():
    error = {"time": 1, "path": "photos/a\x1b", "code": "share_revoked"}
    assert changes(status(), status()) == []
    assert changes(status(), status(errors=[error])) == ["photos/a\\x1b: share_revoked"]
    assert changes(status(), status(pending={"blocks": 2})) == ["unsent: 2 blocks"]
    assert changes(status(), status(shares=[])) == ["photos: gone"]
    assert changes(status(), status(shares=[], locked={"since": 1})) == ["locked"]
