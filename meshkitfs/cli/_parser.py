"""The grammar of the command line: every command, its options and its help."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from .. import __version__
from ..daemon.config import ENFORCEMENT, KEY_VAULTS
from ..errors import MeshkitError
from . import _doctor, _history, _init, _inspect, _people, _providers, _shares
from ._audit import audit_commands
from ._autostart import autostart_commands
from ._capabilities import capability_commands
from ._context import Context
from ._desktop import desktop_commands
from ._inviting import invite_commands
from ._keeping_grammar import keeping_commands
from ._keyvault import demands_option, key_vault_commands, seal_options
from ._mounting_grammar import mounting_commands
from ._moving import moving_commands
from ._operator import operator_commands
from ._policies import policy_commands
from ._serve import serve_commands
from ._support import support_commands
from ._vaults import vault_commands

__all__ = ["UsageError", "build_parser"]

RIGHTS: Final = ("list", "read", "write")
DEFAULT_TIMEOUT: Final = 300.0
DEFAULT_LIMIT: Final = 20
_OF_AUTOSTART: Final = ("install", "uninstall", "status")

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


_Handler = Callable[[Context, argparse.Namespace], int]


class UsageError(MeshkitError):
    """An ``invalid_argument`` whose remedy names the help of the very command."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__("invalid_argument", message)
        self._command = command

    @property
    def remedy(self) -> str:
        return f"Try '{self._command} --help'."


class _Parser(argparse.ArgumentParser):
    """A parser that raises usage errors as classified failures, so that ``--json`` covers them too."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

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


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; ``args.handler(context, args)`` does the command.

    It is always the same one: nothing may be added to it.
    """
    shared = _shared_options()
    parser = _Parser(
        prog="meshkitfs",
        description="Mount encrypted, content-addressed shares as ordinary directories.",
        epilog=_EXIT_CODES,
        parents=[shared],
    )
    parser.add_argument("--version", action="version", version=f"meshkitfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = _Adder(commands, shared)
    _setup_commands(add)
    mounting_commands(add, _descriptor, _timeout)
    autostart_commands(add)
    _share_commands(add)
    policy_commands(add)
    vault_commands(add)
    capability_commands(add, _rights)
    _past_commands(add)
    _people_commands(add)
    key_vault_commands(add)
    _look_commands(add)
    support_commands(add)
    desktop_commands(add)
    audit_commands(add, _count)
    keeping_commands(add)
    serve_commands(add)
    operator_commands(add, _count)
    return parser


def _shared_options() -> argparse.ArgumentParser:
    """Options that may stand before or after the command. SUPPRESS keeps one place from undoing the other."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    group = shared.add_argument_group("options for every command")
    group.add_argument("--json", action="store_true", help="print the result, or the failure, as JSON")
    group.add_argument("--home", metavar="DIR", help="use this home directory instead of MESHKITFS_HOME")
    group.add_argument("--config", metavar="FILE", help="use this configuration file")
    group.add_argument(
        "--passphrase-fd", metavar="N", type=_descriptor, help="read the passphrase from file descriptor N"
    )
    return shared


class _Adder:
    """Adds commands to one level of the grammar."""

    def __init__(self, level: Any, shared: argparse.ArgumentParser) -> None:
        self._level = level
        self._shared = shared

    def command(
        self, name: str, handler: _Handler, summary: str, description: str = "", example: str = ""
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

    def group(self, name: str, summary: str) -> _Adder:
        description = f"{summary[0].upper()}{summary[1:]}."
        parser = self._level.add_parser(name, help=summary, description=description, parents=[self._shared])
        return _Adder(parser.add_subparsers(title="commands", metavar="COMMAND", required=True), self._shared)


def _setup_commands(add: _Adder) -> None:
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
    _store_options(init)


def _store_options(parser: argparse.ArgumentParser) -> None:
    _place_options(parser)
    _join_option(parser)
    _vault_options(parser)
    parser.add_argument("--if-needed", action="store_true", help="succeed if the home is set up already")


def _place_options(parser: argparse.ArgumentParser) -> None:
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


def _vault_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key-vault",
        metavar="KIND",
        choices=KEY_VAULTS,
        help=f"what keeps the private keys: {', '.join(KEY_VAULTS)} "
        "(default: secret-service where there is one, else passphrase-file)",
    )
    seal_options(parser)


def _moved_options(parser: argparse.ArgumentParser) -> None:
    _place_options(parser)
    _vault_options(parser)


def _join_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--join-file",
        metavar="FILE",
        help="a file of mode 0600 (or - for stdin) with the token or invitation that the metadata service "
        "asks newcomers for (default: the environment variable MESHKITFS_JOIN_TOKEN)",
    )


def _share_commands(add: _Adder) -> None:
    share = add.group("share", "create shares, show them, and give or take access")
    create = share.command(
        "create", _shares.create, "create a share", example="meshkitfs share create photos"
    )
    create.add_argument("name", metavar="NAME")
    create.add_argument("--if-needed", action="store_true", help="succeed if there is a share of that name")
    create.add_argument(
        "--enforcement",
        choices=ENFORCEMENT,
        help="who enforces access: the client (each member's program), or a release service, which holds "
        "half of the key (default: as configured, else client)",
    )
    create.add_argument(
        "--release-service",
        metavar="URL",
        help="which one (default: as configured, else the metadata service)",
    )
    share.command("list", _shares.list_shares, "list the shares, yours and other people's")
    show = share.command("show", _shares.show, "show one share and who has access to it")
    show.add_argument("share", metavar="SHARE")
    grant = share.command(
        "add",
        _shares.add,
        "give someone access",
        "Give RECIPIENT access to a share, or to a directory or file in one. TARGET is SHARE,\n"
        "SHARE/path/in/share, or a path under the mount point.",
        "meshkitfs share add photos/trip bob --rights read --expires 7d",
    )
    grant.add_argument("target", metavar="TARGET")
    grant.add_argument("recipient", metavar="RECIPIENT", help="a contact, or a name in the directory")
    grant.add_argument(
        "--rights",
        metavar="LIST",
        type=_rights,
        default=["read"],
        help=f"comma-separated: {', '.join(RIGHTS)} (default: read)",
    )
    grant.add_argument("--expires", metavar="WHEN", help="30m, 12h, 7d, 2w or a date such as 2026-12-31")
    grant.add_argument(
        "--offline-grace",
        metavar="TIME",
        help="how long it may be used while nobody can be asked whether it still stands: 12h, 3d, up to 7d",
    )
    grant.add_argument("--snapshot", action="store_true", help="exactly the version of now, not later ones")
    grant.add_argument("--policy", metavar="ID", help="demand a yes of this policy at every open")
    grant.add_argument("--vault", metavar="NAME", help="demand membership of this vault (see vault create)")
    grant.add_argument("--capability", metavar="NAME", help="demand a token of it (see capability issue)")
    demands_option(grant)
    revoke = share.command(
        "revoke",
        _shares.revoke,
        "take someone's access away",
        "Stop future opens by RECIPIENT, and encrypt what is written from now on with a key they never had.\n"
        "It cannot recall what they have read or copied.",
        "meshkitfs share revoke photos bob",
    )
    revoke.add_argument("share", metavar="SHARE")
    revoke.add_argument("recipient", metavar="RECIPIENT")
    revoke.add_argument(
        "--reencrypt", action="store_true", help="then do what 'meshkitfs share reencrypt' does"
    )
    rewrite = share.command(
        "reencrypt",
        _shares.reencrypt,
        "encrypt everything in a share of yours again, with new keys",
        "Read everything in SHARE and write it again under new keys, so that none of the keys someone kept\n"
        "opens anything in its newest version. Old blocks stay at the byte store until old versions are\n"
        "pruned and collected. It can be interrupted, and goes on the next time.",
        "meshkitfs share reencrypt photos",
    )
    rewrite.add_argument("share", metavar="SHARE")

    accept_rollback = share.command(
        "accept-rollback",
        _shares.accept_rollback,
        "end the quarantine of a share whose metadata store was restored",
        "A share is quarantined when its metadata store shows an older, or another, history than this\n"
        "device has seen. If the store was restored from a backup on purpose, this takes what it shows\n"
        "now as the truth. Otherwise somebody is hiding changes: compare with the other members first.",
        "meshkitfs share accept-rollback photos",
    )
    accept_rollback.add_argument("share", metavar="SHARE")

    invite_commands(add, share, _rights)
    add.command("inbox", _shares.inbox, "list the invitations that others sent")
    accept = add.command("accept", _shares.accept, "accept an invitation", example="meshkitfs accept 4f0c")
    accept.add_argument(
        "letter",
        metavar="ID",
        help="the id from 'meshkitfs inbox', or its beginning (4 characters), or the name",
    )
    accept.add_argument("--name", metavar="NAME", help="how to call it here")
    decline = add.command("decline", _shares.decline, "throw an invitation away; its sender is not told")
    decline.add_argument("letter", metavar="ID", help="as in 'accept'")


def _past_commands(add: _Adder) -> None:
    history = add.command(
        "history",
        _history.history,
        "show the versions in which a path changed",
        "Show the versions in which PATH changed: when, by whom, and how. It need not be there any more.\n"
        "The versions themselves are in SHARE/.snapshots, which is not listed.",
        "meshkitfs history ~/MeshKit/photos/beach.jpg",
    )
    history.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    history.add_argument(
        "--limit",
        metavar="N",
        type=_count,
        default=DEFAULT_LIMIT,
        help=f"the newest N of them; 0 for all (default: {DEFAULT_LIMIT})",
    )
    restore = add.command(
        "restore",
        _history.restore,
        "bring back a file or directory as it was",
        "Bring back PATH as it was in an earlier version, into the share of now. A file gets its old\n"
        "content; in a directory, what changed or is missing comes back, and what is newer stays. What is\n"
        "replaced stays in the history. WHEN is a version (v12), a time (2026-11-25,\n"
        "2026-11-25T03:53Z: the newest version at its end, UTC), or how long ago (2h, 3d).",
        "meshkitfs restore photos/trip --at 2d",
    )
    restore.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    restore.add_argument("--at", metavar="WHEN", required=True, help="which version: v12, a time, or 3d")
    restore.add_argument("--to", metavar="NEWPATH", help="bring it back to this free place in the same share")
    restore.add_argument(
        "--exact",
        action="store_true",
        help="PATH is a whole share: what the version did not have goes. Works also if the newest version "
        "cannot be read any more",
    )


def _people_commands(add: _Adder) -> None:
    identity = add.group("identity", "show, create, publish, rotate and move your own identity")
    show = identity.command("show", _people.identity_show, "show your identity and what protects its keys")
    show.add_argument(
        "--export", action="store_true", help="print only the public record, for 'contacts add'"
    )
    create = identity.command(
        "create", _init.create_identity, "create an identity without publishing it (else as 'init')"
    )
    create.add_argument("name", metavar="NAME", nargs="?", help="(default: your login name)")
    _store_options(create)
    publish = identity.command("publish", _people.identity_publish, "publish your identity in the directory")
    _join_option(publish)
    rotate = identity.command(
        "rotate",
        _people.identity_rotate,
        "give your identity new keys, signed by the old ones, and sign your shares with them",
    )
    rotate.add_argument(
        "--replace",
        dest="keys",
        choices=("both", "signing", "encryption", "none"),
        default="both",
        help="which keys to replace; 'none' only renews the record that says which they are (default: both)",
    )
    rotate.add_argument(
        "--again",
        action="store_true",
        help="begin another rotation though the last one left shares that could not be signed",
    )
    identity.command(
        "doctor", _people.identity_doctor, "check the keys, their records, and what would bring them back"
    )
    moving_commands(identity, _moved_options, _descriptor)

    contacts = add.group("contacts", "the people you share with, and how sure you are of their keys")
    contacts.command("list", _people.contacts_list, "list your contacts")
    person = contacts.command(
        "add",
        _people.contacts_add,
        "add a contact from the directory or from a record",
        example="meshkitfs contacts add bob bob.identity",
    )
    person.add_argument("handle", metavar="NAME")
    person.add_argument(
        "record", metavar="RECORD", nargs="?", help="their exported record: text, a file, or -"
    )
    verify = contacts.command(
        "verify", _people.contacts_verify, "show the code to compare with a contact, or confirm it"
    )
    verify.add_argument("handle", metavar="NAME")
    verify.add_argument("code", metavar="CODE", nargs="*", help="the code the contact told you")
    verify.add_argument(
        "--qr", action="store_true", help="show the code as a QR code too, for a phone to read to the other"
    )


def _look_commands(add: _Adder) -> None:
    add.command("status", _inspect.status, "show the mount, the shares, what is unsent and recent refusals")
    sync = add.command("sync", _inspect.sync, "publish what is unsent")
    _timeout(sync, "how long to try")
    explain = add.command(
        "explain",
        _inspect.explain,
        "show every check that decides whether a path may be opened",
        example="meshkitfs explain ~/MeshKit/photos/beach.jpg",
    )
    explain.add_argument("path", metavar="PATH", help="a path under the mount point, or SHARE/path")
    doctor = add.command(
        "doctor",
        _doctor.doctor,
        "check this machine, this home and its stores",
        "Check this machine, this home and its stores. Asks for no passphrase and changes nothing, unless\n"
        "told to reset the clock: forget the latest time this device has seen, after its clock was wrong.",
    )
    doctor.add_argument(
        "--reset-clock", action="store_true", help="the clock was wrong before; it is right now"
    )
    doctor.add_argument(
        "--trust-service",
        action="store_true",
        help="take the key that the metadata service shows now; ask whoever runs it first",
    )
    providers = add.group("providers", "the byte store that this home uses")
    test = providers.command(
        "test",
        _providers.test,
        "try the byte store out, and say what is wrong with it",
        "Store a probe block at the byte store of this home, or of SPEC, read it, delete it, and see what\n"
        "else the store can do. Needs no passphrase and no mount.",
        "meshkitfs providers test s3:https://s3.example.org/team-blocks",
    )
    test.add_argument("spec", metavar="SPEC", nargs="?", help="(default: as configured)")
    add.command("version", _inspect.version, "print the version")


def _timeout(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_TIMEOUT,
        help=f"{what} (default: {DEFAULT_TIMEOUT:.0f})",
    )


def _descriptor(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a file descriptor")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400 * 365:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return value


def _rights(text: str) -> list[str]:
    rights = [right.strip() for right in text.split(",")]
    for right in rights:
        if right not in RIGHTS:
            near = difflib.get_close_matches(right, RIGHTS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(RIGHTS)}"
            raise argparse.ArgumentTypeError(f"'{right}' is not a right: {hint}")
    return sorted(set(rights), key=RIGHTS.index)
