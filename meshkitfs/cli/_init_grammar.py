"""The grammar of ``init``, and the options that others share with it."""

from __future__ import annotations

import argparse

from ..daemon.config import KEY_VAULTS
from . import _init
from ._grammar import Adder
from ._keyvault import seal_options

__all__ = ["join_option", "moved_options", "setup_commands", "store_options"]


def setup_commands(add: Adder) -> None:
    init = add.command(
        "init",
        _init.init,
        "set up a home: an identity, its key vault and the stores it uses",
        "Create an identity, put its keys into a key vault, write the configuration and publish the "
        "identity\nin the directory, so that others can share with it. Nothing that exists is overwritten.",
        "meshkitfs init --identity bob --provider local:/srv/team/blocks --metadata /srv/team/metadata.db",
    )
    init.add_argument(
        "--identity", metavar="NAME", help="the name others share with (default: your login name)"
    )
    init.add_argument(
        "--invitation",
        metavar="FILE",
        help="an invitation or its link in a file (mode 0600), or - for stdin: uses the metadata service and "
        "the byte store in it, and claims it",
    )
    init.add_argument(
        "--no-publish", action="store_true", help="do not publish the identity in the directory"
    )
    store_options(init)


def store_options(parser: argparse.ArgumentParser) -> None:
    place_options(parser)
    join_option(parser)
    vault_options(parser)
    parser.add_argument("--if-needed", action="store_true", help="succeed if the home is set up already")


def place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider",
        metavar="SPEC",
        help="the byte store: local:DIR, s3:https://HOST/BUCKET[/PREFIX], ipfs-http:URL; others are written "
        "into the configuration file first (default: local:HOME/blocks)",
    )
    parser.add_argument(
        "--metadata",
        metavar="FILE|URL",
        help="the metadata store, or the address of a metadata service (default: HOME/metadata.db)",
    )
    parser.add_argument(
        "--metadata-ca",
        metavar="FILE",
        help="the certificate authority of that service, in place of the system's",
    )


def vault_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key-vault",
        metavar="KIND",
        choices=KEY_VAULTS,
        help=f"what keeps the private keys: {', '.join(KEY_VAULTS)} "
        "(default: secret-service where there is one, else passphrase-file)",
    )
    seal_options(parser)


def moved_options(parser: argparse.ArgumentParser) -> None:
    place_options(parser)
    vault_options(parser)


def join_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--join-file",
        metavar="FILE",
        help="a file of mode 0600 (or - for stdin) with the token or invitation that the metadata service "
        "asks newcomers for (default: the environment variable MESHKITFS_JOIN_TOKEN)",
    )
