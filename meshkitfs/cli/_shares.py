"""Commands about shares: ``share create|list|show|add|revoke|reencrypt|...``, ``inbox``, ``accept``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import MeshkitError, exit_code_for
from ._asking import mount_points
from ._colour import meaning
from ._context import Context
from ._output import ago, clock, count, duration, fields, printable, size, table
from ._shown import rights_of, share_table
from ._targets import share_path

__all__ = [
    "accept",
    "accept_rollback",
    "add",
    "create",
    "decline",
    "inbox",
    "list_shares",
    "reencrypt",
    "revoke",
    "show",
]


def create(context: Context, args: argparse.Namespace) -> int:
    """``share create NAME``"""
    wanted = {"name": args.name, "enforcement": args.enforcement, "release_service": args.release_service}
    try:
        data = context.call("share.create", {name: said for name, said in wanted.items() if said is not None})
    except MeshkitError as error:
        if error.code != "share_exists" or not args.if_needed:
            raise
        data = context.call("share.show", {"share": args.name})
        context.out.result(data, [f"The share {printable(args.name)} is there already."])
        return 0
    lines = [f"Created the share {printable(data.get('name', args.name))}."]
    if data.get("enforcement") == "release":
        lines.append(f"{printable(data.get('release_service'))} holds half of its key.")
    context.out.result(data, lines)
    return 0


def list_shares(context: Context, _args: argparse.Namespace) -> int:
    """``share list``"""
    data = context.call("share.list", {})
    shares = data["shares"]
    lines = share_table(shares) if shares else ["There are no shares."]
    context.out.result(data, lines)
    return 0


def show(context: Context, args: argparse.Namespace) -> int:
    """``share show SHARE``"""
    data = context.call("share.show", {"share": share_path(args.share, mount_points(context.home))})
    lines = fields(
        [
            ("name", data.get("name")),
            ("id", data.get("id")),
            ("owner", "you" if data.get("mine") else data.get("owner")),
            ("rights", rights_of(data)),
            ("expires", None if data.get("mine") else ago(data.get("expires") or None)),
            ("version", data.get("version")),
            ("head", data.get("head")),
            ("epoch", data.get("epoch")),
            ("entries", data.get("entries")),
            ("enforcement", _enforcement(data)),
            ("state", meaning(data.get("state"))),
            ("reason", meaning(data.get("reason"))),
            ("conflicts", ", ".join(data.get("conflicts") or ())),
        ]
    )
    recipients = data.get("recipients") or []
    if recipients:
        rows = [
            [
                item.get("handle") or item.get("fingerprint"),
                item.get("path") or "/",
                rights_of(item),
                clock(item.get("expires") or None),
                _conditions(item),
            ]
            for item in recipients
        ]
        lines += ["", *table(("recipient", "path", "rights", "expires", "conditions"), rows)]
    elif data.get("mine"):
        lines += ["", "Nobody else has access."]
    context.out.result(data, lines)
    return 0


def add(context: Context, args: argparse.Namespace) -> int:
    """``share add TARGET RECIPIENT``"""
    target = share_path(args.target, mount_points(context.home))
    data = context.call(
        "share.add",
        {
            "target": target,
            "recipient": args.recipient,
            "rights": args.rights,
            "expires": args.expires,
            "snapshot": args.snapshot,
            "policy": args.policy,
            "vault": args.vault,
            "capability": args.capability,
            "offline_grace": args.offline_grace,
            "require_key_vault": args.require_key_vault,
        },
    )
    what = "exactly this version" if data.get("grant") == "snapshot" or args.snapshot else "from now on"
    lines = [f"{printable(args.recipient)} may {rights_of(data) or 'read'} {printable(target)}, {what}."]
    lines += fields(
        [
            ("expires", ago(data.get("expires") or None) or "never"),
            ("CID", data.get("cid")),
            ("conditions", _conditions(data)),
            ("capsule", data.get("capsule")),
        ]
    )
    if data.get("trust") == "pinned":
        lines.append(
            f"This key was never compared with {printable(args.recipient)}; "
            f"'meshkitfs contacts verify {printable(args.recipient)}' does that."
        )
    context.out.result(data, lines)
    return 0


def revoke(context: Context, args: argparse.Namespace) -> int:
    """``share revoke SHARE RECIPIENT``; with ``--reencrypt`` two calls: only the second may be broken off."""
    share = share_path(args.share, mount_points(context.home))
    data = context.call("share.revoke", {"share": share, "recipient": args.recipient})
    lines = [f"Revoked what {printable(args.recipient)} could do in {printable(share)}."]
    bound = data.get("bound_seconds")
    if isinstance(bound, (int, float)):
        lines.append(f"Opens fail at once; what is open ends within {duration(bound)}.")
    offline = data.get("unreachable_bound_seconds")
    if isinstance(offline, (int, float)):
        lines.append(
            f"A device that cannot reach the metadata store goes on for {duration(offline)} at most."
        )
    lines.append("Copies made before this cannot be recalled.")
    if not args.reencrypt:
        context.out.result(data, lines)
        return 0
    try:
        done = context.call("share.reencrypt", {"share": share})
    except (MeshkitError, KeyboardInterrupt) as error:
        again = f"'meshkitfs share reencrypt {printable(share)}' goes on"
        context.out.note(f"{lines[0]} What was there before has not all got new keys: {again}.")
        if isinstance(error, MeshkitError):
            raise MeshkitError(error.code, f"revoked, but not all written again: {error.detail}") from error
        raise
    context.out.result(data | {"reencrypted": done}, lines + _rewritten(done))
    return _incomplete(done)


def reencrypt(context: Context, args: argparse.Namespace) -> int:
    """``share reencrypt SHARE``: exit 0 when nothing older is left, else as ``commit_pending``."""
    share = share_path(args.share, mount_points(context.home))
    data = context.call("share.reencrypt", {"share": share})
    context.out.result(data, _rewritten(data))
    return _incomplete(data)


def _rewritten(data: Mapping[str, Any]) -> list[str]:
    name = printable(data.get("share", ""))
    amount = size(int(data.get("bytes") or 0))
    lines = [
        f"Wrote {count(data.get('files'), 'file', 'files')} "
        f"({amount}, {count(data.get('blocks'), 'block', 'blocks')}) and "
        f"{count(data.get('directories'), 'directory', 'directories')} of {name} again, under new keys."
    ]
    if data.get("skipped"):
        lines.append(f"{data['skipped']} files and directories had new keys already.")
    unreadable = data.get("unreadable") or []
    if unreadable:
        lines += [f"{len(unreadable)} could not be read, and keep their old keys:"]
        lines += [f"  {printable(path)}" for path in unreadable]
    elif not data.get("complete"):
        lines.append("Others changed it faster than it could be rewritten: run it again.")
    if data.get("complete"):
        lines.append(f"Version {data.get('version')} of {name} names no block that was there before.")
    lines.append("The old blocks stay at the byte store until old versions are pruned and collected")
    lines.append("('meshkitfs prune', 'meshkitfs gc').")
    return lines


def _incomplete(data: Mapping[str, Any]) -> int:
    return 0 if data.get("complete") else exit_code_for(MeshkitError("commit_pending"))


def accept_rollback(context: Context, args: argparse.Namespace) -> int:
    """``share accept-rollback SHARE``"""
    share = share_path(args.share, mount_points(context.home))
    data = context.call("share.accept_rollback", {"share": share})
    now = data["now"]
    lines = [
        f"{printable(now.get('name'))} is at version {now.get('version')} now; "
        f"version {data['was_version']} was seen before."
    ]
    context.out.result(data, lines)
    return 0


def inbox(context: Context, _args: argparse.Namespace) -> int:
    """``inbox``"""
    data = context.call("inbox.list", {})
    letters = data["letters"]
    rows = [
        [
            letter.get("id"),
            f"{letter.get('from') or '?'}{'' if letter.get('trust') == 'verified' else ' (unverified)'}",
            letter.get("name"),
            letter.get("kind"),
            rights_of(letter),
            clock(letter.get("expires") or None),
            "yes" if letter.get("accepted") else "no",
        ]
        for letter in letters
    ]
    headings = ("id", "from", "name", "kind", "rights", "expires", "accepted")
    context.out.result(data, table(headings, rows) if letters else ["There are no invitations."])
    if data.get("unreadable"):
        context.out.note(f"{data['unreadable']} more cannot be read: damaged, or not for this identity.")
    if any(not letter.get("accepted") for letter in letters):
        context.out.note("Accept one with 'meshkitfs accept ID'.")
    return 0


def accept(context: Context, args: argparse.Namespace) -> int:
    """``accept LETTER``"""
    data = context.call("inbox.accept", {"letter": args.letter, "name": args.name})
    name = data.get("name") or data.get("share")
    context.out.result(data, [f"Accepted: it is now in your mount as {printable(name)}."])
    return 0


def decline(context: Context, args: argparse.Namespace) -> int:
    """``decline LETTER``"""
    data = context.call("inbox.decline", {"letter": args.letter})
    lines = [f"Thrown away: {printable(data['name'])} of {printable(data['from'])}, who is not told."]
    if data["accepted"]:
        lines.append("It was accepted before, and stays in your mount.")
    context.out.result(data, lines)
    return 0


def _enforcement(share: Mapping[str, Any]) -> str | None:
    if share.get("enforcement") == "release":
        return f"release, by {printable(share.get('release_service'))}"
    return share.get("enforcement")


def _conditions(item: Mapping[str, Any]) -> str:
    named = [f"{name} {item[name]}" for name in ("policy", "vault", "capability") if item.get(name)]
    if item.get("offline_grace"):
        named.append(f"offline for {duration(item['offline_grace'])}")
    if item.get("key_vault_required"):
        named.append(f"key vault {', '.join(item['key_vault_required'])}")
    if item.get("grant") == "snapshot":
        named.insert(0, "snapshot")
    return ", ".join(named)
