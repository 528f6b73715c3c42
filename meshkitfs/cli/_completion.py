"""Completion in a shell: ``completion bash|zsh|fish``, and what that script asks at each Tab.

The script only calls this program with ``_ARGCOMPLETE`` set; what may stand where is read from the grammar
itself, so a new option completes as soon as it is there. Names come from the running daemon, which has them
in its memory. Without one, or while it is locked or slow, there are none: completing never asks for a
passphrase, never opens a home, and never makes anything.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from ..daemon import client
from ..daemon.home import Home
from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder

__all__ = ["asked", "completion_commands", "offer"]

SHELLS: Final = ("bash", "zsh", "fish")
# A person who pressed Tab waits no longer than this for names (s).
_PATIENCE_S: Final = 0.3

# Where names stand in the result of a method: the list in it, and the field of each item.
_SHARES: Final = ("share.list", "shares", "name")
_CONTACTS: Final = ("contacts.list", "contacts", "handle")
_LETTERS: Final = ("inbox.list", "letters", "id")
_POLICIES: Final = ("policy.list", "policies", "name")
_VAULTS: Final = ("vault.list", "vaults", "name")
_TOKENS: Final = ("capability.list", "held", "id")

# What an argument names, by the beginning of its command and its `dest`; the first that fits counts.
_NAMES: Final = (
    ("share create", "*", None),
    ("policy create", "name", None),
    ("vault create", "name", None),
    ("service", "*", None),
    ("accept", "name", None),
    ("capability issue", "name", None),
    ("policy", "name", _POLICIES),
    ("vault", "name", _VAULTS),
    ("capability", "capability", _TOKENS),
    ("contacts verify", "handle", _CONTACTS),
    ("", "share", _SHARES),
    ("", "shares", _SHARES),
    ("", "recipient", _CONTACTS),
    ("", "member", _CONTACTS),
    ("", "policy", _POLICIES),
    ("", "vault", _VAULTS),
    ("", "letter", _LETTERS),
)
# Arguments that are a share or a path: both are offered.
_PLACES: Final = ("path", "target")
_DIRECTORIES: Final = ("DIR",)
_FILES: Final = ("FILE", "ID|FILE", "RECORD", "FILE|URL")


def asked() -> bool:
    """Whether it is a shell that calls, to complete what somebody is typing."""
    return "_ARGCOMPLETE" in os.environ


def offer(parser: argparse.ArgumentParser) -> NoReturn:
    """Tell the shell what may stand at the cursor, and end the process: ``parser`` is of no other use then.

    Says nothing of what goes wrong.
    """
    import argcomplete

    _prepare(parser, ())
    argcomplete.autocomplete(parser, always_complete_options="long")
    raise SystemExit(1)  # whatever set the variable, it was not such a script


def _prepare(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> None:
    """Give every argument of ``parser`` and those below it what finds its values."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                _prepare(below, (*path, name))
        elif action.choices is None and action.nargs != 0:
            action.completer = _finder(" ".join(path), action)  # type: ignore[attr-defined]


def _finder(command: str, action: argparse.Action) -> Any:
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter

    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if metavar in _DIRECTORIES:
        return DirectoriesCompleter()
    if metavar in _FILES:
        return FilesCompleter()
    if action.dest in _PLACES:
        files = FilesCompleter()
        return lambda prefix, parsed_args, **_: [*_known(_SHARES, parsed_args), *files(prefix)]
    for beginning, dest, names in _NAMES:
        if command.startswith(beginning) and dest in ("*", action.dest):
            return _names(names) if names is not None else SuppressCompleter()
    return SuppressCompleter()


def _names(where: tuple[str, str, str]) -> Callable[..., list[str]]:
    return lambda parsed_args, **_: list(_known(where, parsed_args))


def _known(where: tuple[str, str, str], args: argparse.Namespace) -> Iterator[str]:
    """Yield the names that the daemon knows. One that a terminal would not show as it is, is left out."""
    method, items, field = where
    home = Home.locate(getattr(args, "home", None), getattr(args, "config", None))
    try:
        data = client.ask_daemon(home, method, {}, silence=_PATIENCE_S) or {}
    except MeshkitError:
        return  # locked, slow, ending: there is nothing to offer
    for item in data.get(items) or ():
        name = item.get(field)
        if isinstance(name, str) and name.isprintable():
            yield name


def completion_commands(add: Adder) -> None:
    """Add ``completion``."""
    parser = add.command(
        "completion",
        _completion,
        "print the script that makes a shell complete this program's commands",
        "Print the script for your shell: commands and options complete, and names of shares, contacts,\n"
        "vaults and policies while the home is mounted. For good: put the line of the example into\n"
        "~/.bashrc or ~/.zshrc; for fish, write the output to ~/.config/fish/completions/meshkitfs.fish.",
        'eval "$(meshkitfs completion bash)"',
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")


def _completion(context: Context, args: argparse.Namespace) -> int:
    """``completion SHELL``"""
    from argcomplete.shell_integration import shellcode

    script = shellcode(["meshkitfs"], shell=args.shell)
    context.out.result({"shell": args.shell, "script": script}, script.splitlines())
    return 0
