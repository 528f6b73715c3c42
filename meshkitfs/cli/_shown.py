"""What several commands show in the same way: shares, rights, what is not published yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._colour import joined, meaning
from ._output import ago, clock, printable, size, table

__all__ = ["amount", "left_lines", "rights_of", "share_table"]


def share_table(shares: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of shares; with the number of members where it is told of one of them."""
    told = any(share.get("members") is not None for share in shares)
    headings = ("name", "owner", "rights", "expires", "version", *(("members",) if told else ()), "state")
    rows = [
        [
            share.get("name"),
            "you" if share.get("mine") else share.get("owner"),
            rights_of(share),
            None if share.get("mine") else clock(share.get("expires") or None),
            share.get("version"),
            *((share.get("members"),) if told else ()),
            meaning(share.get("reason") or share.get("state")),
        ]
        for share in shares
    ]
    return table(headings, rows, cut=("name", "owner"))


def rights_of(item: Mapping[str, Any]) -> str:
    """Return the rights that a share, a grant or a letter gives, as text."""
    return ", ".join(str(right) for right in item.get("rights") or ())


def left_lines(left: list[dict[str, Any]]) -> list[str]:
    """Say what is not published yet: one line for each share, with the reason."""
    lines = []
    for unsaved, title in (
        (False, "Not published yet (safe on this device, sent when it can be):"),
        (
            True,
            "Not published yet, and some of it in memory only (lost if the mount ends before it is saved):",
        ),
    ):
        items = [item for item in left if bool(item.get("unsaved")) is unsaved]
        if items:
            lines.append(title)
        for item in items:
            reason = ": ".join(str(item[name]) for name in ("reason", "detail") if item.get(name))
            reason = f": {reason}" if reason else ""
            since = f", since {ago(item['since'])}" if item.get("since") else ""
            state = joined(meaning(item["state"]), ", ") if item.get("state") else ""
            # What is in memory only may not be counted.
            much = amount(item, "changes" if unsaved else "nothing")
            arrived = f" ({size(item['arrived_bytes'])} of it arrived)" if item.get("arrived_bytes") else ""
            name = printable(item.get("share", "?"))
            lines.append(joined(f"  {name}  ", state, f"{much}{arrived}{since}{printable(reason)}"))
    return lines


def amount(item: Mapping[str, Any], nothing: str = "nothing") -> str:
    """Say how much of it waits: commits, blocks, bytes; ``nothing`` if that is none."""
    parts = [f"{item[name]} {name}" for name in ("commits", "blocks") if item.get(name)]
    if item.get("bytes"):
        parts.append(size(item["bytes"]))
    return ", ".join(parts) or nothing
