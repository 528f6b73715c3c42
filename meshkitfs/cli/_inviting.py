"""Commands around people who have no identity yet: ``share invite|invitations|uninvite``, ``claim``."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import termios
from typing import TYPE_CHECKING, Any, Final

from ..errors import MeshkitError
from ._context import Context
from ._keyvault import demands_option
from ._mounting import mount_points
from ._new_file import new_file
from ._output import ago, clock, duration, fields, printable, table
from ._targets import share_path

if TYPE_CHECKING:
    from ._parser import _Adder

__all__ = ["claim", "claim_it", "claimed", "invite_commands", "read_ticket"]

_MAX_BYTES: Final = 65536


def invite(context: Context, args: argparse.Namespace) -> int:
    """``share invite SHARE --out FILE``: the file is made first, so that a secret always has its place."""
    if args.out == "-":
        data = _made(context, args)
        text = _chosen(data, args)
        context.out.result(data | ({"link": text} if args.link else {"ticket": text}), [text])
        return 0
    with new_file(args.out) as file:
        data = _made(context, args)
        file.write(f"{_chosen(data, args)}\n".encode())
    what = "a link to it" if args.link else "it"
    lines = [f"Wrote an invitation to {printable(data['share'])} to {printable(args.out)}."]
    lines += fields(
        [
            ("id", data["id"]),
            ("rights", ", ".join(data["rights"])),
            ("byte store", data["store"] or "not named: they say --provider"),
            ("good for one person until", clock(data["until"])),
            ("access until", ago(data["expires"] or None)),
            ("offline grace", duration(data["offline_grace"]) if data.get("offline_grace") else None),
            ("key vault", ", ".join(data["key_vault_required"]) or None),
        ]
    )
    lines += [
        f"Give the file, or {what}, to the one person it is for, by a way that nobody else can read:",
        "whoever comes first with it is let in.",
        "They run 'meshkitfs init --invitation FILE', and are let in when your home is mounted.",
    ]
    context.out.result(data | {"file": os.path.abspath(args.out)}, lines)
    return 0


def _made(context: Context, args: argparse.Namespace) -> dict[str, Any]:
    return context.call(
        "share.invite",
        {
            "share": share_path(args.share, mount_points(context.home)),
            "rights": args.rights,
            "expires": args.expires,
            "within": args.within,
            "link": args.link,
            "offline_grace": args.offline_grace,
            "require_key_vault": args.require_key_vault,
        },
    )


def _chosen(data: dict[str, Any], args: argparse.Namespace) -> str:
    """Take both forms of the secret out of ``data``; return the one that was asked for."""
    ticket, link = str(data.pop("ticket")), str(data.pop("link"))
    return link if args.link else ticket


def invitations(context: Context, _args: argparse.Namespace) -> int:
    """``share invitations``: also lets in who has claimed one meanwhile."""
    data = context.call("share.invitations", {})
    rows = [
        [
            item["id"],
            item["share"],
            ", ".join(item["rights"]),
            clock(item["until"]),
            item["stage"],
            item["handle"],
            ", ".join(item["refused"]),
        ]
        for item in data["invitations"]
    ]
    headings = ("id", "share", "rights", "good until", "state", "for", "refused")
    context.out.result(data, table(headings, rows) if rows else ["There are no invitations."])
    if any(item["refused"] for item in data["invitations"]):
        context.out.note("Somebody came with an invitation that was used or over: the file was passed on.")
    return 0


def uninvite(context: Context, args: argparse.Namespace) -> int:
    """``share uninvite ID``"""
    data = context.call("share.uninvite", {"invitation": args.invitation})
    if data["stage"] == "done":
        who, share = printable(data["handle"]), printable(data["share"])
        lines = [f"It was used by {who} already; 'meshkitfs share revoke {share} {who}' takes access away."]
    else:
        lines = [f"The invitation {printable(data['id'])} is good for nobody any more."]
        told = {
            "taken_back": "Nobody becomes a member of the service with it either.",
            "used": "Somebody has become a member of the service with it already.",
            "unknown": f"The service could not be asked ({printable(data['reason'])}): whoever has it "
            "may still become a member there, until it is over.",
        }
        lines += [told[data["joining"]]] if data["joining"] in told else []
    context.out.result(data, lines)
    return 0


def claim(context: Context, args: argparse.Namespace) -> int:
    """``claim FILE``"""
    data = claim_it(context, read_ticket(args.file))
    context.out.result(data, claimed(data))
    return 0


def claim_it(context: Context, ticket: str) -> dict[str, Any]:
    """Claim the invitation in ``ticket`` for the identity of this home."""
    return context.call("invitation.claim", {"ticket": ticket})


def claimed(data: dict[str, Any]) -> list[str]:
    """What a person is told after claiming."""
    return [
        f"Told {printable(data['owner'])} that the invitation to {printable(data['share'])} is for you.",
        "When their home has seen it, the share is in your inbox ('meshkitfs inbox').",
    ]


def read_ticket(place: str) -> str:
    """Return the invitation in a file of one's own, or on stdin (``-``). It is a secret.

    Raises ``invalid_config`` if others can read the file, ``invalid_argument`` if it cannot be read, or if it
    stands where its place should: other users see the words of a command.
    """
    if "meshkit-invitation" in place:
        raise MeshkitError(
            "invalid_argument",
            "an invitation is a secret, and others can see the words of a command. Take this one back "
            "('share uninvite') if you are not alone here; put it into a file of mode 0600, or say - and "
            "paste it",
        )
    if place == "-":
        return _pasted() if sys.stdin.isatty() else sys.stdin.read(_MAX_BYTES)
    try:
        with open(place, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise MeshkitError("invalid_config", f"{place} can be read by others: chmod 600 it")
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{place}: {error.strerror}") from None


def _pasted() -> str:
    """Read one line that is pasted at a terminal, without showing it.

    Not as a line of the terminal's own: those end after 4095 bytes.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSAFLUSH, quiet)
    print("Paste the invitation and press Enter (it is not shown): ", end="", file=sys.stderr, flush=True)
    pasted = b""
    try:
        while len(pasted) < _MAX_BYTES and (part := os.read(descriptor, 4096)):
            pasted += part
            if pasted.strip() and pasted[-1:] in (b"\n", b"\r", b"\x04"):
                break
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
        print(file=sys.stderr)
    return pasted.decode("utf-8", "replace").strip("\x04 \r\n")


def invite_commands(add: _Adder, share: _Adder, rights: Any) -> None:
    """Add these commands; ``rights`` parses a list of rights."""
    make = share.command(
        "invite",
        invite,
        "write an invitation for somebody who has no identity yet",
        "Write an invitation to SHARE into a new file. Whoever comes first with it is given access: hand it\n"
        "to one person, by a way that nobody else can read. It holds no key of the share, is good once, and\n"
        "can be taken back. Access is given while your home is mounted, or by 'meshkitfs share invitations'.",
        "meshkitfs share invite photos --out for-carol --rights read --within 3d",
    )
    make.add_argument("share", metavar="SHARE")
    make.add_argument(
        "--out", metavar="FILE", required=True, help="the file to write; it must not be there. - prints it"
    )
    make.add_argument("--link", action="store_true", help="as a link, whose secret is behind the #")
    make.add_argument(
        "--rights", metavar="LIST", type=rights, default=["read"], help="as in 'share add' (default: read)"
    )
    make.add_argument("--expires", metavar="WHEN", help="when the access ends, as in 'share add'")
    make.add_argument("--offline-grace", metavar="TIME", help="as in 'share add'")
    demands_option(make)
    make.add_argument(
        "--within", metavar="TIME", default="7d", help="how long it can be claimed, 60s to 30d (default: 7d)"
    )
    share.command("invitations", invitations, "list your invitations, and let in who has claimed one")
    take_back = share.command("uninvite", uninvite, "take an invitation back that was not used yet")
    take_back.add_argument("invitation", metavar="ID", help="from 'meshkitfs share invitations'")
    take = add.command(
        "claim",
        claim,
        "tell the owner of an invitation that it is for you",
        "Take an invitation that somebody wrote with 'meshkitfs share invite', for the identity of this\n"
        "home. The owner's home then gives access to it, and the share appears in the inbox.",
        "meshkitfs claim for-carol",
    )
    take.add_argument("file", metavar="FILE", help="the invitation or its link (mode 0600), or - for stdin")
