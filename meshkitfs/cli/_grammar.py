"""What the grammar of the command line is made of: parsers, groups of commands, types of arguments."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ..errors import MeshkitError
from ._context import Context
from ._output import written

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = [
    "RIGHTS",
    "Adder",
    "Handler",
    "Parser",
    "UsageError",
    "descriptor",
    "number",
    "rights",
    "seconds",
    "shared_options",
    "timeout_option",
]

RIGHTS: Final = ("list", "read", "write")
DEFAULT_TIMEOUT: Final = 300.0
_OF_AUTOSTART: Final = ("install", "uninstall", "status")

Handler = Callable[[Context, argparse.Namespace], int]


class UsageError(MeshkitError):
    """An ``invalid_argument`` whose remedy names the help of the very command."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__("invalid_argument", message)
        self._command = command

    @property
    def remedy(self) -> str:
        return f"Try '{self._command} --help'."


class Parser(argparse.ArgumentParser):
    """A parser that raises usage errors as classified failures, so that ``--json`` covers them too."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print a help or version; unlike argparse's own, not as if it was printed when it was not."""
        with written():
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            choices = [choice.strip(" '") for choice in wrong[2].split(",")]
            near = difflib.get_close_matches(wrong[1], choices, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices)}"
            # What many other programs call `service install` is not about who runs a service here.
            if self.prog.endswith(" service") and wrong[1] in _OF_AUTOSTART:
                hint = f"systemd units are 'meshkitfs autostart {wrong[1]}'"
            message = f"'{wrong[1]}' is not known here: {hint}"
        raise UsageError(message, self.prog)


def shared_options() -> argparse.ArgumentParser:
    """Options that may stand before or after the command. SUPPRESS keeps one place from undoing the other."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = shared.add_argument_group("options for every command")
    group.add_argument("--json", action="store_true", help="print the result, or the failure, as JSON")
    group.add_argument("--home", metavar="DIR", help="use this home directory instead of MESHKITFS_HOME")
    group.add_argument("--config", metavar="FILE", help="use this configuration file")
    group.add_argument(
        "--passphrase-fd", metavar="N", type=descriptor, help="read the passphrase from file descriptor N"
    )
    return shared


class Adder:
    """Adds commands to one level of the grammar."""

    def __init__(self, level: Any, shared: argparse.ArgumentParser) -> None:
        self._level = level
        self._shared = shared

    def command(
        self, name: str, handler: Handler, summary: str, description: str = "", example: str = ""
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self._level.add_parser(
            name,
            help=summary,
            description=description or f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}" if example else None,
            parents=[self._shared],
        )
        parser.set_defaults(handler=handler)
        return parser

    def group(self, name: str, summary: str) -> Adder:
        description = f"{summary[0].upper()}{summary[1:]}."
        parser = self._level.add_parser(name, help=summary, description=description, parents=[self._shared])
        return Adder(parser.add_subparsers(title="commands", metavar="COMMAND", required=True), self._shared)


def timeout_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=DEFAULT_TIMEOUT,
        help=f"{what} (default: {DEFAULT_TIMEOUT:.0f})",
    )


def descriptor(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a file descriptor")
    return int(text)


def number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400 * 365:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return value


def rights(text: str) -> list[str]:
    rights = [right.strip() for right in text.split(",")]
    for right in rights:
        if right not in RIGHTS:
            near = difflib.get_close_matches(right, RIGHTS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(RIGHTS)}"
            raise argparse.ArgumentTypeError(f"'{right}' is not a right: {hint}")
    return sorted(set(rights), key=RIGHTS.index)
