"""Completion under a real shell: what it offers, whom it asks, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from control_daemon import running

from meshkitfs.cli import _completion, main
from meshkitfs.errors import MeshkitError

ROOT = Path(__file__).resolve().parents[1]
# What readline does at a Tab: it sets these and calls the function that the script registered.
TAB = """
eval "$(meshkitfs completion bash)"
complete -p meshkitfs > /dev/null || exit 9
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n"><=;|&(:'
_python_argcomplete meshkitfs
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def tab(tmp_path):
    """Press Tab after a line in a bash that has read the script; give the offers."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "meshkitfs"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m meshkitfs "$@"\n')
    program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "user"),
        "MESHKITFS_HOME": str(tmp_path / "home"), "LC_ALL": "C.UTF-8",
    }  # fmt: skip

    def tab(line: str) -> set[str]:
        done = subprocess.run(
            ["bash", "--norc", "--noprofile", "-c", TAB, "bash", line],
            env=environment, cwd=work, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return {offer.rstrip() for offer in done.stdout.splitlines() if offer}

    tab.work = work
    return tab


@pytest.fixture
def daemon(tmp_path):
    with running(tmp_path / "home") as daemon:
        daemon.service.answers = {
            "share.list": {"shares": [{"name": "photos"}, {"name": "papers"}, {"name": "p\x1b[2J"}]},
            "contacts.list": {"contacts": [{"handle": "bob"}]},
            "vault.list": {"vaults": [{"name": "board"}]},
            "policy.list": {"policies": [{"name": "office-hours"}]},
        }
        yield daemon


def test_bash_completes_commands_and_options_without_a_home(tab, tmp_path):
    assert {"create", "list", "show", "add", "revoke"} <= tab("meshkitfs share ")
    assert tab("meshkitfs share add photos bob --sn") == {"--snapshot"}
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "user").exists()
    assert list(tab.work.iterdir()) == []


def test_bash_completes_names_that_the_daemon_knows(tab, daemon):
    assert tab("meshkitfs share show p") == {"photos", "papers"}  # and not the one that drives the terminal
    assert tab("meshkitfs share add photos bob --vault b") == {"board"}
    assert {method for method, _ in daemon.service.calls} == {"share.list", "vault.list"}


def offers(line: str, monkeypatch, tmp_path) -> set[str]:
    """As a shell's script would ask, in this process."""
    import argcomplete

    from meshkitfs.cli._parser import build_parser

    monkeypatch.setenv("MESHKITFS_HOME", str(tmp_path / "home"))
    parser = build_parser.__wrapped__()  # not the one of the process: completing changes it
    _completion._prepare(parser, ())
    finder = argcomplete.CompletionFinder(parser, always_complete_options="long")
    words = line.split()
    return {offer.rstrip() for offer in finder._get_completions(["meshkitfs", *words], "", "", None)}


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("policy show", {"office-hours"}), ("policy create", set()), ("vault add", {"board"}),
        ("vault add board", {"bob"}), ("vault create", set()), ("share create", set()),
        ("share invite", {"photos", "papers"}), ("verify", {"photos", "papers"}),
        ("share add", {"photos", "papers"}), ("history", {"photos", "papers"}),
        ("service remove-share --database x", set()), ("mount --fsync", {"published", "journal"}),
        ("init --key-vault", {"tpm2", "secret-service"}),
    ],
)  # fmt: skip
def test_each_place_has_its_names(daemon, monkeypatch, tmp_path, line, some):
    monkeypatch.chdir(tmp_path)
    found = {offer for offer in offers(line, monkeypatch, tmp_path) if not offer.startswith("-")}
    assert some <= found
    if not some:
        assert found == set()


@pytest.mark.parametrize("answer", [MeshkitError("identity_locked"), "wait"], ids=["locked", "slow"])
def test_a_daemon_that_cannot_say_offers_nothing_and_asks_nothing(daemon, monkeypatch, tmp_path, answer):
    daemon.service.answers["share.list"] = answer
    assert {o for o in offers("share show", monkeypatch, tmp_path) if not o.startswith("-")} == set()


@pytest.mark.parametrize("shell", _completion.SHELLS)
def test_the_script_is_one_that_the_shell_can_read(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "meshkitfs" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, env=os.environ, timeout=60)
