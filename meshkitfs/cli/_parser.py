"""The grammar of the command line: every command, its options and its help."""

from __future__ import annotations

import argparse
import functools
from typing import Final

from .. import __version__
from ._audit import audit_commands
from ._autostart import autostart_commands
from ._capabilities import capability_commands
from ._completion import completion_commands
from ._desktop import desktop_commands
from ._grammar import Adder, Parser, shared_options
from ._init_grammar import setup_commands
from ._keeping_grammar import keeping_commands
from ._keyvault import key_vault_commands
from ._looking_grammar import look_commands, past_commands
from ._mounting_grammar import mount_commands
from ._operator import operator_commands
from ._people_grammar import people_commands
from ._policies import policy_commands
from ._serve import serve_commands
from ._shares_grammar import share_commands
from ._support import support_commands
from ._vaults import vault_commands

__all__ = ["build_parser"]

_EXIT_CODES: Final = """\
exit codes:
  0 done   2 usage   3 configuration   4 identity or key vault   5 access refused   6 integrity
  7 unavailable or not published yet   8 no space   9 conflict   10 mounting   70 internal
  ('doctor' exits with 1 when a check failed)

environment:
  MESHKITFS_HOME             the home directory (default ~/.local/share/meshkitfs)
  MESHKIT_CONFIG             the configuration file (default HOME/meshkit.config.json)
  MESHKITFS_PASSPHRASE_FILE  a file of mode 0600 that holds the passphrase of the key vault
  MESHKITFS_TPM              the TPM for a new key of tpm2 (default device:/dev/tpmrm0)
  MESHKITFS_JOIN_TOKEN       what the metadata service asks newcomers for (see init --join-file)
"""


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; ``args.handler(context, args)`` does the command.

    It is always the same one: nothing may be added to it.
    """
    shared = shared_options()
    parser = Parser(
        prog="meshkitfs",
        description="Mount encrypted, content-addressed shares as ordinary directories.",
        epilog=_EXIT_CODES,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"meshkitfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = Adder(commands, shared)
    setup_commands(add)
    mount_commands(add)
    autostart_commands(add)
    share_commands(add)
    policy_commands(add)
    vault_commands(add)
    capability_commands(add)
    past_commands(add)
    people_commands(add)
    key_vault_commands(add)
    look_commands(add)
    support_commands(add)
    desktop_commands(add)
    audit_commands(add)
    keeping_commands(add)
    completion_commands(add)
    serve_commands(add)
    operator_commands(add)
    return parser
