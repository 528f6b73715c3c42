"""The reference that is written from the grammar: the manual pages, and the synopses in ``docs/cli.md``.

``python -m meshkitfs.cli.reference`` (``make docs``) writes both into the source tree it is run in. They are
kept there, so that a package needs no running program to have its manual; a test says when they are stale.
Nothing in them depends on the width of a terminal or on the version of Python.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .. import __version__
from ._parser import build_parser

__all__ = ["leaves", "manual", "synopsis", "with_synopses", "write"]

CLI_PAGE: Final = Path("docs/cli.md")
MAN_DIRECTORY: Final = Path("docs/man")

_SHARED: Final = frozenset({"json", "home", "config", "passphrase_fd", "help", "version"})
_HEADING: Final = re.compile(
    r"^### `meshkitfs (?P<name>[a-z -]+)`\n\n(?:```text\nmeshkitfs [^`]*```\n\n)?", re.MULTILINE
)
_WIDTH: Final = 100


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command below ``parser``, in the order of the help; itself if it is one."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for below in group.choices.values():
            yield from leaves(below)


def synopsis(parser: argparse.ArgumentParser) -> str:
    """Return how a command is written, without the options that every command has: ``NAME [--x Y] PLACE``."""
    words = [_words(action) for action in _own(parser) if action.option_strings]
    words += [_words(action) for action in _own(parser) if not action.option_strings]
    lines, indent = [parser.prog], " " * (len("meshkitfs") + 1)
    for word in words:
        if len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append(indent + word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _own(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if action.dest not in _SHARED and action.help is not argparse.SUPPRESS
    ]


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def _words(action: argparse.Action) -> str:
    if action.option_strings:
        word = action.option_strings[-1] + ("" if action.nargs == 0 else f" {_value(action)}")
        return word if action.required else f"[{word}]"
    value = _value(action)
    return {"?": f"[{value}]", "*": f"[{value} ...]", "+": f"{value} [...]"}.get(str(action.nargs), value)


def with_synopses(text: str, parser: argparse.ArgumentParser) -> str:
    """Return the page ``text`` with the synopsis of each command below its heading, as it is now."""
    found = {leaf.prog.removeprefix("meshkitfs "): synopsis(leaf) for leaf in leaves(parser)}

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        block = f"```text\n{found[name]}\n```\n\n" if name in found else ""
        return f"### `meshkitfs {name}`\n\n{block}"

    return _HEADING.sub(put, text)


def manual(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the manual pages by file name: of the program, and of each command or group of commands."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    names = [f"meshkitfs-{name}" for name in commands.choices]
    first = [
        *_head("meshkitfs", "mount encrypted, content-addressed shares as ordinary directories"),
        ".SH SYNOPSIS", f".B {_roff('meshkitfs')}", _roff("COMMAND [OPTIONS] [ARGUMENTS]"),
        ".SH DESCRIPTION", *_text(parser.description or ""),
        ".SH COMMANDS", *_items((name, summaries[name]) for name in commands.choices),
        ".SH OPTIONS FOR EVERY COMMAND", *_options(a for a in parser._actions if a.dest in _SHARED),
        *_epilog(parser.epilog or ""),
        ".SH SEE ALSO", _roff(", ".join(f"{name}(1)" for name in names)),
    ]  # fmt: skip
    pages = {"meshkitfs.1": "\n".join(first) + "\n"}
    for name, command in commands.choices.items():
        lines = _head(f"meshkitfs-{name}", summaries[name])
        below = list(leaves(command))
        lines += [".SH SYNOPSIS", ".nf", *(_roff(synopsis(leaf)) for leaf in below), ".fi"]
        if below == [command]:
            lines += [".SH DESCRIPTION", *_text(command.description or "")]
            lines += [".SH OPTIONS", *_options(_own(command))] if _own(command) else []
            lines += _epilog(command.epilog or "")
        else:
            lines += [".SH DESCRIPTION", *_text(command.description or ""), ".SH COMMANDS"]
            for leaf in below:
                lines += [f".SS {_roff(leaf.prog)}", *_text(leaf.description or ""), *_options(_own(leaf))]
                lines += _example(leaf.epilog or "")
        lines += [".SH SEE ALSO", _roff("meshkitfs(1), which has the options for every command")]
        pages[f"meshkitfs-{name}.1"] = "\n".join(lines) + "\n"
    return pages


def _head(name: str, summary: str) -> list[str]:
    title = f'.TH {_roff(name.upper())} 1 "" "meshkitfs {__version__}" "User Commands"'
    return [title, ".SH NAME", f"{_roff(name)} \\- {_roff(summary)}"]


def _items(pairs: Iterator[tuple[str, str]]) -> Iterator[str]:
    for term, text in pairs:
        yield from (".TP", f".B {_roff(term)}", _roff(text) or "\\&")


def _options(actions: Iterator[argparse.Action] | list[argparse.Action]) -> Iterator[str]:
    def term(action: argparse.Action) -> str:
        if not action.option_strings:
            return _value(action)
        return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {_value(action)}")

    return _items((term(action), action.help or "") for action in actions if action.help)


def _text(text: str) -> list[str]:
    return [_roff(text)]


def _example(epilog: str) -> list[str]:
    return [".PP", ".nf", _roff(epilog), ".fi"] if epilog else []


def _epilog(epilog: str) -> Iterator[str]:
    """Yield the sections of an epilog: a line that ends with a colon, and what is indented below it."""
    for part in epilog.strip().split("\n\n"):
        title, _, body = part.partition("\n")
        if body:
            yield from (f".SH {_roff(title.rstrip(':').upper())}", ".nf", _roff(body), ".fi")


def _roff(text: str) -> str:
    """Return ``text`` so that it is shown as it is: nothing in it is an instruction to the formatter."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in escaped.splitlines())


def write(root: Path) -> None:
    """Write all of it into the source tree at ``root``; pages of commands that are gone are removed."""
    parser = build_parser()
    page = root / CLI_PAGE
    page.write_text(with_synopses(page.read_text(encoding="utf-8"), parser), encoding="utf-8")
    pages = manual(parser)
    directory = root / MAN_DIRECTORY
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.1"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path.cwd())
