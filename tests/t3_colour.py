"""Colours and columns as a person sees them: on a terminal, whose escape sequences are counted, and in a pipe."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from control_daemon import running

from meshkitfs.cli import _colour, _table
from meshkitfs.cli._colour import Tone, joined, meaning, painted, toned
from meshkitfs.cli._output import fields, table

ROOT = Path(__file__).resolve().parents[1]
LONG = "写真" * 40  # 160 cells in 80 characters
SGR = re.compile(r"\x1b\[[0-9;]*m")
SEVERAL = (("photos", "stored", "32"), (LONG, "share_revoked", "31"), ("drafts", "uploading", "33"))
STATUS = {
    "identity": "alice", "mountpoint": "/mnt/m", "pid": 4, "pending": {}, "rotation": {"every": 1, "next": 86400},
    "shares": [
        {"name": name, "mine": True, "rights": ["read"], "version": 3, "members": 2, "state": state}
        for name, state, _ in SEVERAL
    ],
}  # fmt: skip


def environment(home: Path, said: dict[str, str]) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "MESHKITFS_HOME": str(home), "HOME": str(home.parent),
        "LC_ALL": "C.UTF-8", "TZ": "UTC", "TERM": "xterm", **said,
    }  # fmt: skip


def on_terminal(home: Path, arguments: list[str], said: dict[str, str], columns: int = 80) -> str:
    """Run a command on a terminal of its own, and return what it wrote there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "meshkitfs", *arguments],
        stdin=slave, stdout=slave, stderr=slave, env=environment(home, said), start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    written = b""
    try:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
            if not data:
                break
            written += data
        process.wait(60)
    finally:
        os.close(master)
        if process.poll() is None:
            process.kill()
            process.wait()
    return written.decode().replace("\r\n", "\n")


def in_pipe(home: Path, arguments: list[str], said: dict[str, str]) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "meshkitfs", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment(home, said), check=False,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_on_a_terminal_states_have_colours_and_lines_fit(tmp_path):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = STATUS
        seen = on_terminal(tmp_path / "home", ["status"], {})
    for _, state, colour in SEVERAL:
        assert f"\x1b[{colour}m{state}\x1b[0m" in seen
    lines = SGR.sub("", seen).splitlines()
    head = next(line for line in lines if line.startswith("NAME"))
    rows = [line for line in lines if line.endswith(tuple(state for _, state, _ in SEVERAL))]
    assert len(rows) == len(SEVERAL)
    assert all(_table.width_of(row) <= 80 for row in rows), rows
    # Aligned in cells, of which each wide character has two.
    for row in rows:
        state = row.rpartition(" ")[2]
        assert _table.width_of(row) - len(state) == head.index("STATE")
    assert any("…" in row for row in rows)
    assert "MEMBERS" in head
    assert any(re.fullmatch(r"new keys +1970-01-02 00:00", line) for line in lines)


@pytest.mark.parametrize(
    "said", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=["no", "dumb"]
)
def test_a_terminal_without_colours_gets_none(tmp_path, said):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = STATUS
        seen = on_terminal(tmp_path / "home", ["status"], said)
    assert "share_revoked" in seen
    assert "\x1b" not in seen


@pytest.mark.parametrize(
    ("arguments", "said", "coloured"),
    [
        (["status"], {}, False),
        (["status"], {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        (["status", "--json"], {"CLICOLOR_FORCE": "1"}, False),
    ],
)
def test_in_a_pipe_there_is_colour_only_by_force_and_everything_is_whole(tmp_path, arguments, said, coloured):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers["status"] = STATUS
        out, err = in_pipe(tmp_path / "home", arguments, said)
    assert err == ""
    assert ("\x1b" in out) == coloured
    if "--json" in arguments:
        assert json.loads(out)["shares"][1]["name"] == LONG
    else:
        assert LONG in SGR.sub("", out)  # no terminal, no width


@pytest.mark.parametrize("said", [{}, {"NO_COLOR": "1"}], ids=["colour", "no"])
def test_a_failure_is_red_where_somebody_looks(tmp_path, said):
    seen = on_terminal(tmp_path / "home", ["status"], said)
    assert ("\x1b[1;31merror:\x1b[0m" in seen) == (not said)
    assert "meshkitfs: error: " in SGR.sub("", seen)


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("terminal", "said", "coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {}, False),
        (True, {"TERM": "xterm", "CLICOLOR": "0"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (False, {"TERM": "xterm"}, False),
        (False, {"FORCE_COLOR": "0"}, False),
        (False, {"CLICOLOR_FORCE": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_who_wants_colours(terminal, said, coloured):
    assert _colour.wanted(Stream(terminal), said) == coloured


def test_a_foreign_name_paints_nothing():
    name = "\x1b[32mstored\x1b[0m"
    lines = table(("name", "state"), [(name, meaning(name)), ("stored", meaning("stored"))])
    shown = "\n".join(map(painted, lines))
    assert shown.count("\x1b[32m") == 1  # the true state, and not the name that is called so
    assert "\\x1b[32mstored" in shown
    # What carries a tone is made printable as well.
    assert "\x07" not in painted(fields([("state", toned("a\x07", Tone.BAD))])[0])


def test_parts_keep_what_they_tell():
    line = joined("a ", toned("bad", Tone.BAD), "", meaning("ok"))
    assert line == "a badok"
    assert painted(line) == "a \x1b[31mbad\x1b[0m\x1b[32mok\x1b[0m"
    assert painted("plain") == "plain"


def test_long_text_goes_on_below_itself_and_long_words_stay_whole(monkeypatch):
    rows = [("ok", "disk", "one two three four five six"), ("no", "home", "x" * 40)]
    whole = table(("", "check", "finding"), rows, fold=("finding",))
    assert [line.count("six") for line in whole] == [0, 1, 0]
    monkeypatch.setattr(_table, "room", lambda: 26)
    folded = table(("", "check", "finding"), rows, fold=("finding",))
    assert folded[1:4] == ["ok  disk   one two three", "           four five six", "no  home   " + "x" * 40]
    cut = table(("", "check", "finding"), rows, cut=("finding",))
    assert [len(line) for line in cut[1:]] == [26, 26]
    assert cut[1].endswith("…")
    assert table(("", "check", "finding"), rows) == whole  # nobody has said what may be shortened


def test_widths_are_those_of_a_terminal():
    # A mark that combines, a wide character, one of two cells by its own width.
    assert [_table.width_of(text) for text in ("e\u0301", "写", "🙂", "abc")] == [1, 2, 2, 3]
