"""The grammar of ``share``, ``inbox``, ``accept`` and ``decline``."""

from __future__ import annotations

from ..daemon.config import ENFORCEMENT
from . import _shares
from ._grammar import RIGHTS, Adder, rights
from ._inviting import invite_commands
from ._keyvault import demands_option

__all__ = ["share_commands"]


def share_commands(add: Adder) -> None:
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
        type=rights,
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

    invite_commands(add, share)
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
