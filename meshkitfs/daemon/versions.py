"""What the commands about past versions do: ``history`` and ``restore``."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

from meshkitfs.core.entries import DIR, SYMLINK
from meshkitfs.core.keys import kid_of
from meshkitfs.daemon.session import Session
from meshkitfs.errors import MeshkitError
from meshkitfs.identity import Signers
from meshkitfs.shares import Change, Share, go_back, path_changes
from meshkitfs.shares import restore as bring_back

__all__ = ["METHODS", "history", "restore"]

Progress = Callable[[dict[str, Any]], None]

DEFAULT_LIMIT: Final = 20
_KINDS: Final = {DIR: "directory", SYMLINK: "symlink"}


async def history(
    session: Session,
    relative: Callable[[str], str],
    progress: Progress,
    path: str,
    limit: int = DEFAULT_LIMIT,
) -> dict[str, Any]:
    """List the kept versions in which ``path`` changed, newest first; ``limit`` 0 lists all of them.

    Raises ``path_not_found`` if no version that can be read has it.
    """
    if type(limit) is not int or limit < 0:
        raise MeshkitError("invalid_argument", f"limit {limit!r}")
    share, parts = _place(session, relative(path))
    await share.history.refresh(await share.past.use("list", current=True))
    kept = share.history.kept
    writers = _writers(session, share)
    rows: list[dict[str, Any]] = []
    known = more = False
    looked = 0

    def look() -> None:
        nonlocal looked
        looked += 1
        progress({"stage": "looking", "done": looked, "total": len(kept), "unit": "versions"})

    async with aclosing(path_changes(share, parts, kept, look)) as changes:
        async for change in changes:
            row = _row(change, writers)
            if not row["readable"] and rows and rows[-1].get("code") == change.code:
                rows[-1]["first"] = change.version.number  # one line for those that have the same reason
                continue
            if limit and sum(row["readable"] for row in rows) >= limit and row["readable"]:
                more = True
                break
            known = known or row["readable"]
            rows.append(row)
    if not known:
        raise MeshkitError("path_not_found", f"{_said(share, parts)}, in no version that can be read")
    return {"share": share.name, "path": _said(share, parts), "versions": rows, "more": more}


def _row(change: Change, writers: dict[bytes, str]) -> dict[str, Any]:
    version, found = change.version, change.found
    row: dict[str, Any] = {
        "version": version.number,
        "name": version.label,
        "time": version.time,
        "writer": writers.get(version.writer) or version.writer.hex(),
        "what": change.what,
        "readable": not change.code,
        "code": change.code,
        "kind": None,
        "size": None,
    }
    if found is not None:
        row["kind"] = _KINDS.get(found.entry.kind, "file")
        row["size"] = found.entry.size if row["kind"] == "file" else None
    return row


def _writers(session: Session, share: Share) -> dict[bytes, str]:
    """Return who is known to sign with which key."""
    known = {
        kid: contact.handle for contact in session.contacts.list() for kid in Signers(contact.chain).keys
    }
    members = session.state.members(share.row.share)
    known |= {kid_of(member.signing_public): member.handle for member in members}
    return known | {
        kid_of(share.row.owner_public): share.row.owner_handle,
        **{key.kid: session.identity.handle for key in session.identity.signing_keys},
    }


async def restore(
    session: Session,
    relative: Callable[[str], str],
    progress: Progress,
    path: str,
    at: str,
    to: str | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Bring back what ``path`` was in version ``at`` (as `parse_moment` reads it), to its place or ``to``.

    With ``exact``, a whole share becomes what it was, also if the newest version cannot be read any more.
    Raises what `meshkitfs.shares.restore` does, ``version_not_found`` and ``invalid_argument``.
    """
    share, parts = _place(session, relative(path))
    target = None
    if to is not None:
        other, target = _place(session, relative(to))
        if other is not share:
            raise MeshkitError("invalid_argument", f"--to {to!r} is in another share than {path!r}")
        if not target:
            raise MeshkitError("path_exists", share.name)
    if exact and (parts or target is not None):
        raise MeshkitError("invalid_argument", "--exact is for a whole share, in its place")

    def report(done: int, total: int) -> None:
        progress({"stage": "restoring", "done": done, "total": total, "unit": "files"})

    # Not while versions are given up and blocks collected: it could be one of those that go.
    async with share.upkeep:
        look = share.past.use if exact else share.use
        await share.history.refresh(await look("list", current=True))
        version = share.history.at(at, int(session.services.wall()))
        if exact:
            done = await go_back(share, version)
        else:
            done = await bring_back(share, version, parts, target, report)
    return {
        "share": share.name,
        "path": _said(share, parts),
        "to": _said(share, parts if target is None else target),
        "version": version.number,
        "name": version.label,
        "time": version.time,
        "files": done.files,
        "directories": done.directories,
        "symlinks": done.symlinks,
        "same": done.same,
        "replaced": done.replaced,
        "unreadable": [_said(share, path) for path in done.unreadable],
        "exact": exact,
    }


def _place(session: Session, relative: str) -> tuple[Share, tuple[bytes, ...]]:
    name, _, inside = relative.strip("/").partition("/")
    return session.book.find(name), tuple(os.fsencode(part) for part in inside.split("/") if part)


def _said(share: Share, parts: tuple[bytes, ...]) -> str:
    return "/".join([share.name, *(os.fsdecode(part) for part in parts)])


METHODS: Final[dict[str, Callable[..., Awaitable[dict[str, Any]]]]] = {"history": history, "restore": restore}
