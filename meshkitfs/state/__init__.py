"""This device's own memory: what it knows of each share, encrypted at rest.

`State` is one encrypted SQLite database (`state.db`): shares and who was given them, the highest roster
and head ever seen, local commits that are not published yet, contacts and the clock floor. `Spool` holds
sealed blocks on their way to the byte store. Nothing in either is plaintext on disk.
"""

from meshkitfs.state._audit import AUDIT_LINES, AuditLine, AuditLog
from meshkitfs.state._carried import check_carried
from meshkitfs.state._clock import Clock
from meshkitfs.state._conditions import IssuedRow, OwnList
from meshkitfs.state._database import State
from meshkitfs.state._rows import LocalCommit, Mark, Member, Quarantine, ShareRow
from meshkitfs.state._spool import Spool

__all__ = [
    "AUDIT_LINES",
    "AuditLine",
    "AuditLog",
    "Clock",
    "IssuedRow",
    "LocalCommit",
    "Mark",
    "Member",
    "OwnList",
    "Quarantine",
    "ShareRow",
    "Spool",
    "State",
    "check_carried",
]
