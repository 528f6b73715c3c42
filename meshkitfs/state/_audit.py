"""Who opened what on this device, and whether they were let: the log behind ``meshkitfs audit``.

It is sealed with everything else in the state database. An open costs no disk and no transaction: lines wait
in memory, the same ones counted together, until `flush` writes them in one transaction. So a crash loses what
came since then; what is written is bounded in number and age. There is never content in it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from meshkitfs.state._database import State

__all__ = ["AUDIT_LINES", "AuditLine", "AuditLog"]

AUDIT_LINES: Final = 50_000  # kept; the oldest go first
WAITING_LINES: Final = 10_000  # in memory; what comes on top is only counted
LOST: Final = "lost"  # the action of a line that says how many were

_COLUMNS: Final = "first, last, share, path, action, code, program, times"
_DAY: Final = 86400
# What tells lines apart: share, path in it, action, code, program.
_Key = tuple[bytes, str, str, str, str]


@dataclass(frozen=True, slots=True)
class AuditLine:
    """``times`` opens of the same kind between ``first`` and ``last`` (UNIX seconds).

    ``share`` is its id; ``path`` is in it, '' for its root, or everywhere if names are not kept. ``action``
    is read, write, create, list, or the operation that was refused; ``code`` is '' if it was allowed.
    ``program`` is the name of the process that asked, as far as the kernel tells.
    """

    first: int
    last: int
    share: bytes
    path: str
    action: str
    code: str = ""
    program: str = ""
    times: int = 1


class AuditLog:
    """The log of one home. `add` is for the mount's thread and never waits; the rest is for workers."""

    def __init__(self, state: State, days: int) -> None:
        self._state = state
        self._days = days
        self._lock = threading.Lock()  # of what waits
        self._turn = threading.Lock()  # one flush, or reading, at a time
        self._waiting: dict[_Key, AuditLine] = {}
        self._lost = 0

    @property
    def waiting(self) -> int:
        """How many lines are in memory only."""
        return len(self._waiting)

    def add(self, line: AuditLine) -> None:
        """Note something; a line like one that waits is counted there."""
        key = (line.share, line.path, line.action, line.code, line.program)
        with self._lock:
            known = self._waiting.get(key)
            if known is not None:
                times = known.times + line.times
                line = AuditLine(min(known.first, line.first), max(known.last, line.last), *key, times)
            elif len(self._waiting) >= WAITING_LINES:
                self._lost += 1
                return
            self._waiting[key] = line

    def flush(self, now: int) -> None:
        """Write what waits, and let go of what is too old or too much; nothing if nothing waits.

        Raises no_space, home_busy, state_corrupt: it waits on then.
        """
        with self._turn:
            with self._lock:
                lines, lost = self._waiting, self._lost
                self._waiting, self._lost = {}, 0
            if not lines and not lost:
                return
            rows = sorted(lines.values(), key=lambda line: line.first)
            if lost:
                rows.append(AuditLine(now, now, b"", "", LOST, times=lost))
            try:
                self._write(rows, now)
            except BaseException:
                with self._lock:
                    self._lost += lost
                for line in rows if not lost else rows[:-1]:
                    self.add(line)
                raise

    def _write(self, rows: list[AuditLine], now: int) -> None:
        with self._state._transaction() as db:
            db.executemany(
                f"INSERT INTO audit({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?)",  # noqa: S608
                [_as_row(line) for line in rows],
            )
            db.execute("DELETE FROM audit WHERE last < ?", (now - self._days * _DAY,))
            db.execute(
                "DELETE FROM audit WHERE n <= (SELECT n FROM audit ORDER BY n DESC LIMIT 1 OFFSET ?)",
                (AUDIT_LINES,),
            )

    def read(
        self, *, since: int = 0, share: bytes | None = None, refused: bool = False, limit: int = 0
    ) -> list[AuditLine]:
        """Return the newest ``limit`` lines (0: all) that reach to ``since``, oldest first."""
        wanted = ["last >= ?"]
        values: list[object] = [since]
        if share is not None:
            wanted.append("share = ?")
            values.append(share)
        if refused:
            wanted.append("code != ''")
        query = f"SELECT {_COLUMNS} FROM audit WHERE {' AND '.join(wanted)} ORDER BY n DESC LIMIT ?"  # noqa: S608
        found = self._state._rows(query, *values, limit or -1)
        return [_line(row) for row in reversed(found)]

    def clear(self) -> int:
        """Forget everything; return how many lines that were."""
        with self._turn:
            with self._lock:
                gone, self._waiting, self._lost = len(self._waiting), {}, 0
            with self._state._transaction() as db:
                db.execute("DELETE FROM audit")
                return gone + db.changes()


def _as_row(line: AuditLine) -> tuple[object, ...]:
    # A name that is not UTF-8 has surrogates in it, which SQLite does not take as text.
    path = line.path.encode(errors="surrogateescape")
    return line.first, line.last, line.share, path, line.action, line.code, line.program, line.times


def _line(row: tuple[object, ...]) -> AuditLine:
    first, last, share, path, action, code, program, times = row
    assert isinstance(path, bytes)
    text = path.decode(errors="surrogateescape")
    return AuditLine(first, last, share, text, action, code, program, times)  # type: ignore[arg-type]
