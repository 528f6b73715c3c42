"""The manual pages and the synopses of docs/cli.md are what the grammar says now, and a manual can be read."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from meshkitfs.cli import reference
from meshkitfs.cli._parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
STALE = "the grammar has changed: run 'make docs' and commit what it writes"
PAGES = reference.manual(build_parser())


def test_the_synopses_are_those_of_the_grammar():
    text = (ROOT / reference.CLI_PAGE).read_text(encoding="utf-8")
    assert text == reference.with_synopses(text, build_parser()), STALE
    for leaf in reference.leaves(build_parser()):
        assert f"```text\n{reference.synopsis(leaf)}\n```" in text, STALE


def test_the_manual_pages_are_those_of_the_grammar():
    kept = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / reference.MAN_DIRECTORY).glob("*.1")}
    assert kept.keys() == PAGES.keys(), STALE
    assert [name for name in PAGES if kept[name] != PAGES[name]] == [], STALE


def test_every_command_and_option_is_in_the_manual():
    for leaf in reference.leaves(build_parser()):
        page = PAGES[f"meshkitfs-{leaf.prog.split()[1]}.1"].replace("\\-", "-")
        options = [option for action in reference._own(leaf) for option in action.option_strings]
        assert [option for option in options if option not in page] == [], leaf.prog


def test_a_synopsis_says_what_must_be_given_and_what_may_be_repeated():
    parser = argparse.ArgumentParser(prog="meshkitfs do", add_help=False)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("more", metavar="MORE", nargs="*")
    parser.add_argument("--from", required=True, metavar="FILE")
    parser.add_argument("--kind", choices=("a", "b"))
    parser.add_argument("--secretly", help=argparse.SUPPRESS)
    assert reference.synopsis(parser) == "meshkitfs do --from FILE [--kind a|b] NAME [MORE ...]"


def test_text_is_no_instruction_to_the_formatter():
    assert reference._roff(".so /etc/passwd\n'ft \\f a-b") == "\\&.so /etc/passwd\n\\(aqft \\ef a\\-b"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_formatter_has_nothing_to_complain_of():
    for name in PAGES:
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Tutf8"],
            input=PAGES[name], capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stderr == "", name
