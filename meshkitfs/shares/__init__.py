"""What a share is: its tree in memory, its commits and merges, its members.

`ShareBook` holds the shares of a home; a `Share` is one of them at work. Reading goes from a `Grant` and a
reference to plaintext in `_reader`; writing goes from `_content` (changed blocks) over `_sealer` (worker
threads, the spool) to `_commit` (a complete new tree on this device) and `Share.flush` (published).
"""

from meshkitfs.shares._book import ShareBook
from meshkitfs.shares._collect import Collected, collect
from meshkitfs.shares._events import (
    AccessChanged,
    Event,
    NameChanged,
    NodeChanged,
    PublishFailed,
    RosterOverdue,
)
from meshkitfs.shares._granting import ROSTER_LIFETIME_S, Terms, demands_of, grace_of
from meshkitfs.shares._history import Version
from meshkitfs.shares._inbox import Invitation, check_share_name
from meshkitfs.shares._locking import RefSeal
from meshkitfs.shares._lookback import Change, path_changes
from meshkitfs.shares._nodes import DirNode, FileNode, Node, SymlinkNode, inode_number
from meshkitfs.shares._own_lists import OwnLists, Vaults
from meshkitfs.shares._past import SNAPSHOTS, PastShare
from meshkitfs.shares._prune import Pruned, Rules, prune
from meshkitfs.shares._reader import BlockReader
from meshkitfs.shares._reencrypt import reencrypt
from meshkitfs.shares._repair import Repaired, repair
from meshkitfs.shares._restore import Restored, go_back, restore
from meshkitfs.shares._sealer import SPOOL_LIMIT, Budget
from meshkitfs.shares._services import Services
from meshkitfs.shares._share import Share
from meshkitfs.shares._tokens import Tokens
from meshkitfs.shares._tree import Tree, check_name, posix
from meshkitfs.shares._verify import Broken, Verified, verify
from meshkitfs.shares._welcome import Pending, Welcome

# A share as it is now, or as it was: what reading needs, both have.
AnyShare = Share | PastShare

__all__ = [
    "ROSTER_LIFETIME_S",
    "SNAPSHOTS",
    "SPOOL_LIMIT",
    "AccessChanged",
    "AnyShare",
    "BlockReader",
    "Broken",
    "Budget",
    "Change",
    "Collected",
    "DirNode",
    "Event",
    "FileNode",
    "Invitation",
    "NameChanged",
    "Node",
    "NodeChanged",
    "OwnLists",
    "PastShare",
    "Pending",
    "Pruned",
    "PublishFailed",
    "RefSeal",
    "Repaired",
    "Restored",
    "RosterOverdue",
    "Rules",
    "Services",
    "Share",
    "ShareBook",
    "SymlinkNode",
    "Terms",
    "Tokens",
    "Tree",
    "Vaults",
    "Verified",
    "Version",
    "Welcome",
    "check_name",
    "check_share_name",
    "collect",
    "demands_of",
    "go_back",
    "grace_of",
    "inode_number",
    "path_changes",
    "posix",
    "prune",
    "reencrypt",
    "repair",
    "restore",
    "verify",
]
