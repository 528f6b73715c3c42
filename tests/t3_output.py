"""What every command prints, whatever it is: one document with --json, plain text in a pipe, and no silence
when it cannot be written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from meshkitfs.cli import _output, _watch, main, reference
from meshkitfs.cli._colour import meaning
from meshkitfs.cli._parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {leaf.prog.removeprefix("meshkitfs "): leaf for leaf in reference.leaves(build_parser())}
# These make a home, wait, or work on a service's database: they have tests of their own.
APART = {"init", "identity create", "identity import", "identity recovery restore", "serve", "support-bundle"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MESHKIT_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)


def words(name: str) -> list[str]:
    """A line of this command that the grammar takes."""
    given = []
    for action in COMMANDS[name]._actions:
        value = str(action.choices[0]) if isinstance(action.choices, (list, tuple)) else "x"
        if action.option_strings and action.required:
            given += [action.option_strings[-1], value]
        elif not action.option_strings and action.nargs not in ("?", "*"):
            given.append(value)
    return [*name.split(), *given]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - APART))
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_without_a_home_each_command_says_one_thing(name, form, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code = main([*words(name), *form])
    out, err = capsys.readouterr()
    assert code not in (70, 141), err
    assert "\x1b" not in out + err  # nobody is looking
    if form:
        said = json.loads(out if code in (0, 1) else err)  # exactly one document
        assert ("error" in said) == (code not in (0, 1))
        assert bool(out) != bool(err)
    elif code not in (0, 1):
        assert out == ""
        first, *more = err.splitlines()
        assert first.startswith("meshkitfs: error: ")
        assert more, "no remedy"


@pytest.mark.parametrize(
    "arguments", [["version"], ["--help"], ["version", "--json"], ["share", "add", "--help"]]
)
def test_output_that_cannot_be_written_is_an_error_and_not_a_success(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "meshkitfs", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 7
    assert "output_failed" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_watched_state_has_colours_only_where_they_are_wanted(variables, coloured):
    environment = {"TERM": "xterm-256color", **variables}
    console = Console(file=io.StringIO(), force_terminal=True, _environ=environment, width=80, height=20)
    console.print(_watch._drawn(console, _output.table(("name", "state"), [("a", meaning("share_revoked"))])))
    assert ("\x1b[31m" in console.file.getvalue()) == coloured


def test_a_command_whose_stdin_is_closed_reads_nothing_from_it(tmp_path):
    command = f"{sys.executable} -m meshkitfs --home {tmp_path / 'home'} device approve <&-"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode not in (0, 70), done.stderr
    assert "internal_error" not in done.stderr
