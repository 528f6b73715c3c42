"""What keeps the private keys: ``keyvault show|list|migrate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ..daemon import config, logs
from ..daemon.config import KEY_VAULT_DEMANDS, KEY_VAULTS
from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder
from ._output import fields, table

if TYPE_CHECKING:
    from .. import keyvault

__all__ = [
    "demands_option",
    "key_vault_commands",
    "list_key_vaults",
    "migrate",
    "open_key_vault",
    "seal_of",
    "seal_options",
    "show",
    "warn_of",
]

_HOLD_SECONDS: Final = 20.0
_FACTS: Final = ("available", "persistent", "exportable", "hardware_backed", "user_presence", "locked")


def key_vault_commands(add: Adder) -> None:
    """Add ``keyvault``."""
    group = add.group("keyvault", "what keeps the private keys, and moving them to something else")
    group.command("show", show, "show what keeps the keys of this home, and what that really gives")
    group.command("list", list_key_vaults, "show every kind of key vault, and what it would give here")
    move = group.command(
        "migrate",
        migrate,
        "move the key of this home to another key vault",
        "Move the wrapping key to a key vault of another kind: made, read back, made the one that counts,\n"
        "and only then is the old one destroyed. The home must not be mounted. If it is cut off, run it\n"
        "again.\n"
        "With --passphrase-fd the first line is for the present key vault, the second for the new one.",
        "meshkitfs keyvault migrate --to passphrase-file",
    )
    move.add_argument("--to", metavar="KIND", choices=KEY_VAULTS, required=True, help=", ".join(KEY_VAULTS))
    move.add_argument("--weaker", action="store_true", help="also to a kind that protects the key less")
    seal_options(move)


def demands_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--require-key-vault``, for what makes a grant."""
    parser.add_argument(
        "--require-key-vault",
        metavar="LIST",
        type=_demanded,
        help=f"demand of the recipient's key vault: {', '.join(KEY_VAULT_DEMANDS)} (comma-separated)",
    )


def _demanded(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in KEY_VAULT_DEMANDS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"'{unknown}' is not one of {', '.join(KEY_VAULT_DEMANDS)}")
    return names


def seal_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tpm-pin", action="store_true", help="with tpm2: seal the key with a PIN too")
    parser.add_argument(
        "--tpm-pcrs",
        metavar="LIST",
        type=_pcrs,
        default=(),
        help="with tpm2: bind it to how this machine starts, by these registers, such as 7",
    )


def seal_of(args: argparse.Namespace) -> keyvault.Seal | None:
    """Return how a TPM seals the new key; None where nothing was said of it."""
    from .. import keyvault

    return keyvault.Seal(args.tpm_pin, args.tpm_pcrs) if args.tpm_pin or args.tpm_pcrs else None


def warn_of(context: Context, kind: str | None) -> None:
    """Say it when the keys of this home are in a ``kind`` of key vault that protects them from nobody."""
    if kind == "plain-file":
        context.out.note(
            "Warning: the private keys are in a file without a passphrase. Whoever can read that file, "
            "or a backup of it, is you."
        )


def open_key_vault(context: Context) -> keyvault.KeyVault:
    """Return the key vault of the home, as its configuration says. Raises as `keyvault.open_home`."""
    from .. import keyvault

    chosen = _chosen(context)
    return keyvault.open_home(
        context.home.root,
        chosen.type if chosen else None,
        context.passphrase,
        chosen.cache_seconds if chosen else None,
    )


def show(context: Context, args: argparse.Namespace) -> int:
    """``keyvault show``: asks for nothing."""
    chosen = _chosen(context)
    report = open_key_vault(context).report()
    demands = list(chosen.require) if chosen else []
    rows: list[tuple[str, object]] = [("kind", report.kind)]
    rows += [(name.replace("_", " "), _word(getattr(report, name))) for name in _FACTS]
    rows += [("session cache", report.session_cache or "none"), ("", report.detail)]
    if demands:
        rows.append(("demanded", ", ".join(demands)))
    context.out.result({"key_vault": report.as_dict(), "require": demands}, fields(rows))
    return 0


def list_key_vaults(context: Context, args: argparse.Namespace) -> int:
    """``keyvault list``: every kind; works without a home too."""
    from .. import keyvault

    used = keyvault.existing(context.home.root)
    reports = keyvault.report_all(context.home.root)
    names = ("available", "persistent", "exportable", "hardware_backed")
    lines = table(
        ("kind", *(name.replace("_", " ") for name in names), ""),
        [
            (
                r.kind,
                *(_word(getattr(r, name)) for name in names),
                "used by this home" if r.kind == used else "",
            )
            for r in reports
        ],
    )
    for report in reports:
        lines += ["", *fields([(report.kind, report.detail)])]
    context.out.result({"used": used, "key_vaults": [report.as_dict() for report in reports]}, lines)
    return 0


def migrate(context: Context, args: argparse.Namespace) -> int:
    """``keyvault migrate --to KIND``."""
    from .. import keyvault

    home = context.home
    home.require_initialized()
    with home.hold(wait=_HOLD_SECONDS):
        logs.setup_home(home)
        before = keyvault.existing(home.root)
        new_passphrase = context.passphrase.second()
        report = keyvault.migrate(
            home.root,
            args.to,
            lambda kind: config.set_key_vault(home.config_path, kind),
            old_passphrase=context.passphrase,
            new_passphrase=new_passphrase,
            seal=seal_of(args),
            demands=_demands(context),
            weaker=args.weaker,
        )
    context.out.result(
        {"key_vault": report.as_dict(), "before": before},
        [f"The key of this home is in its {report.kind} key vault now.", *fields([("", report.detail)])],
    )
    warn_of(context, report.kind)
    return 0


def _demands(context: Context) -> tuple[str, ...]:
    chosen = _chosen(context)
    return chosen.require if chosen else ()


def _chosen(context: Context) -> config.KeyVaultConfig | None:
    return config.load(context.home.config_path).key_vault


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[value]


def _pcrs(text: str) -> tuple[int, ...]:
    from .. import keyvault

    try:
        if not text.isascii():
            raise ValueError
        return keyvault.Seal(pcrs=tuple(int(number) for number in text.split(","))).pcrs
    except (ValueError, MeshkitError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of registers from 0 to 23") from None
