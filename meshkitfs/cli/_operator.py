"""Commands for who runs a service: ``service members|shares|audit|stats|remove-…|readmit|release-handle``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.durations import parse_since
from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder, number
from ._output import clock, count, fields, printable, size, table
from ._serve import database_options, run, server_room, settings_of

__all__ = ["operator_commands"]

_NOTHING = "Nothing was changed. With --yes it is done."


def members(context: Context, args: argparse.Namespace) -> int:
    """``service members``"""
    found = _operate(args, lambda operator: operator.members())
    data = [
        {
            "handle": line.handle,
            "kid": line.kid.hex(),
            "bytes": line.bytes,
            "shares": line.shares,
            "letters": line.letters,
            "removed": line.removed,
        }
        for line in found
    ]
    rows = [[line.handle, line.shares, size(line.bytes), line.letters, clock(line.removed)] for line in found]
    headings = ("handle", "shares", "records", "letters", "removed")
    context.out.result({"members": data}, table(headings, rows) if rows else ["There are no members."])
    return 0


def shares(context: Context, args: argparse.Namespace) -> int:
    """``service shares``"""
    found = _operate(args, lambda operator: operator.shares(args.owner))
    data = [
        {
            "share": line.share.hex(),
            "owner": line.owner,
            "version": line.version,
            "heads": line.heads,
            "bytes": line.bytes,
            "recipients": line.recipients,
        }
        for line in found
    ]
    rows = [[line.share.hex(), line.owner, line.version, size(line.bytes), line.recipients] for line in found]
    headings = ("share", "owner", "version", "records", "recipients")
    context.out.result({"shares": data}, table(headings, rows) if rows else ["There are no shares."])
    return 0


def audit(context: Context, args: argparse.Namespace) -> int:
    """``service audit``"""
    since = parse_since(args.since, int(time.time())) if args.since else 0
    found = _operate(
        args,
        lambda operator: operator.audit(since=since, who=args.who, refused=args.refused, limit=args.limit),
    )
    data = [
        {
            "n": line.n,
            "at": line.at,
            "who": line.who,
            "kind": line.kind,
            "subject": line.subject.hex() if line.subject is not None else None,
            "outcome": line.outcome,
        }
        for line in found
    ]
    rows = [[clock(d["at"]), d["who"] or "(unknown)", d["kind"], d["subject"], d["outcome"]] for d in data]
    headings = ("time", "who", "what", "share or mailbox", "outcome")
    context.out.result({"lines": data}, table(headings, rows) if rows else ["There is nothing of that kind."])
    return 0


def stats(context: Context, args: argparse.Namespace) -> int:
    """``service stats``"""
    data = _operate(args, lambda operator: operator.stats())
    shown = [(name.replace("_", " "), size(n) if name == "record_bytes" else n) for name, n in data.items()]
    context.out.result(data, fields(shown))
    return 0


def remove_member(context: Context, args: argparse.Namespace) -> int:
    """``service remove-member HANDLE``: without ``--yes`` it only says what would happen."""
    removal = _operate(
        args,
        lambda operator: operator.remove_member(args.handle, shares=args.shares, apply=args.yes),
    )
    handle = printable(args.handle)
    lines = [
        f"Nothing that {handle} signs is accepted any more; the handle and its keys stay taken.",
        "What they have read or fetched is not recalled by this.",
    ]
    if removal.left:
        lines += [
            f"{count(len(removal.left), 'share', 'shares')} of theirs stay, and end for all others when the "
            "roster runs out, after 7 days at most:",
            *(f"  {share}" for share in removal.left),
        ]
    if removal.granted:
        lines += [
            f"{count(len(removal.granted), 'share', 'shares')} of others name them; their owners "
            "should revoke, which gives new keys to what is written from then on:",
            *(f"  {share}" for share in removal.granted),
        ]
    return _removed(context, removal, lines)


def remove_share(context: Context, args: argparse.Namespace) -> int:
    """``service remove-share SHARE``: without ``--yes`` it only says what would happen."""
    share = _share_id(args.share)
    removal = _operate(args, lambda operator: operator.remove_share(share, apply=args.yes))
    lines = [
        "Nobody is shown the share any more, its owner neither, and it cannot be published again.",
        "Where it is open it stays so until its lease ends, 5 minutes at most.",
        "Its blocks stay at the byte store: nobody can name them any more, so they cannot be collected.",
    ]
    return _removed(context, removal, lines)


def readmit(context: Context, args: argparse.Namespace) -> int:
    """``service readmit HANDLE``"""
    _operate(args, lambda operator: operator.readmit(args.handle))
    context.out.result({"handle": args.handle}, [f"{printable(args.handle)} is a member again."])
    return 0


def release_handle(context: Context, args: argparse.Namespace) -> int:
    """``service release-handle HANDLE``: without ``--yes`` it only says what would happen."""
    removal = _operate(args, lambda operator: operator.release_handle(args.handle, apply=args.yes))
    lines = [
        f"Somebody else may become {printable(args.handle)}. Who has the old one among the contacts is told "
        "that the key has changed, and shares nothing with the new one; who has not cannot tell them apart.",
        "The old one cannot be readmitted any more.",
    ]
    return _removed(context, removal, lines)


def _removed(context: Context, removal: Any, lines: list[str]) -> int:
    names = ("heads", "rosters", "capsules", "letters", "invitations", "records")
    deleted = {name: getattr(removal, name) for name in names}
    data: dict[str, Any] = {
        "what": removal.what,
        "applied": removal.applied,
        "shares": removal.shares,
        "deleted": deleted,
        "affected": removal.affected,
        "left": removal.left,
        "granted": removal.granted,
        "given_back": removal.given_back,
    }
    told = [f"{'Removed' if removal.applied else 'Would remove'}: {printable(removal.what)}"]
    told += [f"  {n} {name}" for name, n in deleted.items() if n]
    told += [f"  {size(n)} given back to {printable(who)}" for who, n in removal.given_back.items()]
    if removal.affected:
        told.append(f"Others who lose access: {', '.join(map(printable, removal.affected))}.")
    context.out.result(data, told + lines + ([] if removal.applied else [_NOTHING]))
    return 0


def _operate(args: argparse.Namespace, work: Callable[[Any], Any]) -> Any:
    server = server_room()
    return run(partial(server.operate, settings_of(server, args), work))


def _share_id(text: str) -> bytes:
    try:
        share = bytes.fromhex(text)
    except ValueError:
        share = b""
    if len(share) != 16:
        raise MeshkitError("invalid_argument", f"'{text}': a share's id has 32 hex digits")
    return share


def operator_commands(add: Adder) -> None:
    """Add the group ``service``."""
    group = add.group("service", "look after a service that you run")
    members_ = group.command("members", members, "list the members, and what they use")
    database_options(members_)
    shares_ = group.command("shares", shares, "list the shares, the largest first")
    database_options(shares_)
    shares_.add_argument("--owner", metavar="HANDLE", help="only those of one member")
    lines = group.command(
        "audit",
        audit,
        "read the audit log: who did what, when, with which share, and how it ended",
        example="meshkitfs service audit --database /srv/meshkitfs/metadata.db --since 2h --refused",
    )
    database_options(lines)
    lines.add_argument("--since", metavar="WHEN", help="2h, 3d for so long ago, or a date such as 2026-11-25")
    lines.add_argument("--who", metavar="HANDLE", help="only of one member; '-' for the operator")
    lines.add_argument("--refused", action="store_true", help="only what was refused")
    lines.add_argument(
        "--limit", metavar="N", type=number, default=100, help="the newest N; 0 for all (default: 100)"
    )
    database_options(group.command("stats", stats, "say how much there is of everything"))
    member = group.command(
        "remove-member",
        remove_member,
        "end somebody's membership",
        "End a membership: nothing that HANDLE signs is accepted any more, and their letters, open\n"
        "invitations and other records are deleted. The handle and the keys stay taken. Without --yes it\n"
        "only says what would happen, and to whom.",
        "meshkitfs service remove-member mallory --database /srv/meshkitfs/metadata.db",
    )
    database_options(member)
    member.add_argument("handle", metavar="HANDLE")
    member.add_argument("--shares", action="store_true", help="also remove the shares that they own")
    _yes(member)
    share = group.command(
        "remove-share",
        remove_share,
        "delete a share's records, for everybody",
        "Delete every record of a share; its owner's quota gets back what they took. It cannot be published\n"
        "again. Without --yes it only says what would happen, and to whom.",
        "meshkitfs service remove-share 0123456789abcdef0123456789abcdef --yes",
    )
    database_options(share)
    share.add_argument("share", metavar="SHARE", help="its id, from 'meshkitfs service shares'")
    _yes(share)
    again = group.command("readmit", readmit, "let somebody who was removed be a member again")
    database_options(again)
    again.add_argument("handle", metavar="HANDLE")
    handle = group.command(
        "release-handle",
        release_handle,
        "let somebody else take the handle of a removed member",
        "Let somebody else take HANDLE. Whoever takes it gets nothing of the one before: no letters, no\n"
        "shares, no capsules. Without --yes it only says what would happen.",
    )
    database_options(handle)
    handle.add_argument("handle", metavar="HANDLE")
    _yes(handle)


def _yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do it")
