"""Commands about people: ``identity show|create|publish|rotate|doctor`` and ``contacts list|add|verify``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import TABLE, MeshkitError, exit_code_for
from . import _joining as joining
from ._colour import meaning
from ._context import Context
from ._output import clock, duration, fields, printable, table

__all__ = [
    "contacts_add",
    "contacts_list",
    "contacts_verify",
    "identity_doctor",
    "identity_publish",
    "identity_rotate",
    "identity_show",
    "qr_lines",
]

_MAX_RECORD = 64 * 1024


def identity_show(context: Context, args: argparse.Namespace) -> int:
    """``identity show``"""
    data = context.call("identity.show", {})
    if args.export and not context.out.json_mode:
        context.out.result(data, [printable(data.get("record", ""))])
        return 0
    lines = fields(
        [
            ("identity", data.get("handle")),
            ("did", data.get("did")),
            ("fingerprint", data.get("fingerprint")),
            ("published", _yes(data.get("published"))),
            ("", data.get("directory") and f"the directory does not say: {data['directory']}"),
            *_key_vault(data.get("key_vault")),
            ("recovery file", _recovery(data.get("recovery"))),
            ("new keys", _rotation(data.get("rotation"))),
            *(("problem", problem) for problem in data.get("problems") or ()),
        ]
    )
    context.out.result(data, lines)
    return 0


def identity_doctor(context: Context, args: argparse.Namespace) -> int:
    """``identity doctor``: exit 0 when nothing failed, else 1."""
    from ..daemon.finding import Finding
    from ._doctor import shown

    data = context.call("identity.doctor", {})
    context.out.result(data, shown([Finding(**check) for check in data["checks"]]))
    return 0 if data["ok"] else 1


def identity_publish(context: Context, args: argparse.Namespace) -> int:
    """``identity publish``"""
    secret = joining.join(args.join_file)
    data = context.call("identity.publish", {} if secret is None else {"join": secret.reveal()})
    context.out.result(
        data, [f"Published as {printable(data.get('handle'))}: others can share with you now."]
    )
    return 0


def identity_rotate(context: Context, args: argparse.Namespace) -> int:
    """``identity rotate``: exit 0 when every own share is signed anew, else by the first that is not."""
    if args.every is not None:
        data = context.call("identity.schedule", {"every": args.every})
        context.out.result(data, fields([("new keys", _rotation(data.get("rotation")) or "when you ask")]))
        return 0
    data = context.call("identity.rotate", {"keys": args.keys, "again": args.again})
    lines = ["Finished the rotation that was begun before." if data["resumed"] else _ROTATED[args.keys]]
    lines += fields(
        [("fingerprint", data.get("fingerprint")), ("valid until", clock(data.get("valid_until")))]
    )
    if data["signed"]:
        lines.append(f"Signed anew, under new keys: {', '.join(map(printable, data['signed']))}.")
    for item in data["left"]:
        reason = TABLE[item["code"]].sentence
        lines.append(f"{printable(item['share'])}: not signed anew yet: {reason}")
    context.out.result(data, lines)
    if data["left"]:
        context.out.note(
            "A mounted home goes on with that by itself; this command does so when it is run again."
        )
        return exit_code_for(MeshkitError(data["left"][0]["code"]))
    return 0


def _rotation(rotation: Mapping[str, Any] | None) -> str:
    if not rotation or not rotation.get("every"):
        return ""
    return f"every {duration(rotation['every'])}, next {clock(rotation['next'])}"


_ROTATED: Final = {
    "both": "This identity has a new signing key and a new encryption key.",
    "signing": "This identity has a new signing key.",
    "encryption": "This identity has a new encryption key.",
    "none": "The record of this identity is renewed; its keys are the same.",
}


def contacts_list(context: Context, _args: argparse.Namespace) -> int:
    """``contacts list``"""
    data = context.call("contacts.list", {})
    contacts = data["contacts"]
    rows = [
        [
            item.get("handle"), meaning(item.get("trust")), item.get("fingerprint"),
            clock(item.get("first_seen")), _changed(item),
        ]
        for item in contacts
    ]  # fmt: skip
    headings = ("contact", "trust", "fingerprint", "first seen", "key")
    context.out.result(data, table(headings, rows) if contacts else ["There are no contacts."])
    return 0


def contacts_add(context: Context, args: argparse.Namespace) -> int:
    """``contacts add HANDLE``"""
    params: dict[str, Any] = {"handle": args.handle}
    if args.record is not None:
        params["record"] = _record(args.record)
    data = context.call("contacts.add", params)
    lines = [f"Added {printable(data.get('handle', args.handle))}."]
    lines += fields([("fingerprint", data.get("fingerprint")), ("trust", data.get("trust"))])
    context.out.result(data, lines)
    return 0


def contacts_verify(context: Context, args: argparse.Namespace) -> int:
    """``contacts verify HANDLE [CODE]``: without a code it shows the one to compare."""
    params: dict[str, Any] = {"handle": args.handle}
    if args.code:
        params["code"] = " ".join(args.code)
    data = context.call("contacts.verify", params)
    who = printable(args.handle)
    if args.code:
        lines = [f"{who} is verified: the key belongs to whoever told you this code."]
        if data.get("key_changed"):
            lines.append(f"{who}'s key {_changed(data)}.")
    else:
        lines = [
            f"Compare this code with {who}, in person or by voice:",
            "",
            f"    {printable(data.get('code', ''))}",
            "",
            *(qr_lines(str(data.get("code", "")), context.out.interactive) if args.qr else ()),
            f"If it is the same there, run 'meshkitfs contacts verify {who} CODE'.",
        ]
    context.out.result(data, lines)
    return 0


def _changed(contact: Mapping[str, Any]) -> str:
    """Return what is known of a change of a contact's key."""
    if contact.get("trust") == "blocked":
        return "another one was shown, without a valid chain"
    if not contact.get("key_changed"):
        return "as first seen"
    return f"changed {clock(contact['key_changed'])}, by a valid chain"


def qr_lines(code: str, colours: bool) -> list[str]:
    """Return the digits of a code as a QR code, two rows in a line of half blocks.

    ``colours`` makes it black on white on every terminal; without, it is so where text is dark on light.
    """
    import segno  # only this command needs it

    dark = [list(row) for row in segno.make("".join(code.split()), micro=False).matrix_iter(border=4)]
    if len(dark) % 2:
        dark.append([0] * len(dark[0]))
    before, after = ("\x1b[30;47m", "\x1b[0m") if colours else ("", "")
    pairs = zip(dark[::2], dark[1::2], strict=True)
    lines = ["".join(_HALVES[bool(up), bool(down)] for up, down in zip(*pair, strict=True)) for pair in pairs]
    return [*(f"{before}{line}{after}" for line in lines), ""]


_HALVES: Final = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def _record(text: str) -> str:
    """Return the record that was given: as text, as a file, or ``-`` for stdin."""
    try:
        if text == "-":
            return sys.stdin.read(_MAX_RECORD).strip()
        if text.startswith("meshkit-identity"):
            return text
        return Path(text).read_bytes()[:_MAX_RECORD].decode("utf-8", "replace").strip()
    except OSError as error:
        raise MeshkitError("invalid_argument", f"record {text}: {error.strerror}") from error


def _key_vault(report: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    if not report:
        return []
    return [
        ("key vault", report.get("kind")),
        ("  exportable", _yes(report.get("exportable"))),
        ("  hardware-backed", _yes(report.get("hardware_backed"))),
        ("  persistent", _yes(report.get("persistent"))),
        ("  locked", _yes(report.get("locked"))),
        ("  note", report.get("detail")),
    ]


def _recovery(note: Mapping[str, Any] | None) -> str:
    if not note:
        return "none"
    return f"of {clock(note['made'])}{'' if note['current'] else ', out of date'}"


def _yes(value: Any) -> str:
    return "yes" if value is True else "no" if value is False else "unknown"
