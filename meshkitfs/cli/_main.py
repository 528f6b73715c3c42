"""From argv to an exit code: the one place where failures of every kind become output."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from ..daemon import logs
from ..daemon.failures import as_error
from ..daemon.home import Home
from ..daemon.hygiene import harden
from ..errors import MeshkitError, exit_code_for
from . import _completion
from ._context import Context
from ._output import Output
from ._parser import build_parser
from ._passphrase import PassphraseSource

__all__ = ["main"]

_USAGE = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never raises for anything a person can cause."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdin is None:  # it was closed (`<&-`), and is as good as empty
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process lives)
    # Without this, Python prints what is logged to stderr. The owner of a home sets up its log file later.
    logs.setup(None, stderr=bool(os.environ.get("MESHKITFS_DEBUG")))
    # Asked of the raw arguments too, so that a usage error of a script comes out as JSON.
    out = Output(json_mode="--json" in arguments)
    try:
        return _run(arguments, out)
    except MeshkitError as error:
        if error.code == "output_failed":
            _give_up_stdout()
        out.failure(error)
        return exit_code_for(error)
    except KeyboardInterrupt:
        out.failure(MeshkitError("operation_aborted", "interrupted"))
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`meshkitfs ... | head`); Python must not complain at exit.
        _give_up_stdout()
        return _BROKEN_PIPE
    except Exception as error:
        logging.getLogger(__name__).exception("command failed")
        failure = as_error(error)
        out.failure(failure)
        out.note("  With MESHKITFS_DEBUG=1 it prints where it happened.")
        return exit_code_for(failure)


def _run(arguments: list[str], out: Output) -> int:
    parser = build_parser()
    if _completion.asked():
        _completion.offer(parser)
    if not arguments:
        parser.print_help(sys.stderr)
        return _USAGE
    try:
        args = parser.parse_args(arguments)
    except SystemExit as leave:  # argparse ends --help and --version this way
        out.flush()
        return leave.code if isinstance(leave.code, int) else 0
    harden()
    context = Context(
        home=Home.locate(getattr(args, "home", None), getattr(args, "config", None)),
        out=out,
        passphrase=PassphraseSource(getattr(args, "passphrase_fd", None)),
    )
    code: int = args.handler(context, args)
    out.flush()
    return code


def _give_up_stdout() -> None:
    """Send what cannot be written nowhere: Python tries again at exit, and would complain."""
    with contextlib.suppress(io.UnsupportedOperation):  # whoever calls this as a function has its own stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
