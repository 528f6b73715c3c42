"""Past versions of a share as trees to look at: `PastShare` is to reading what `Share` is.

Whoever may open the share now may look at its past, and nobody else: a past tree has no grant of its own
but asks the live share's for each use, so a lease that ends, ends here too.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from meshkitfs.core.manifest import DirManifest, FileManifest
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._events import NameChanged, NodeChanged
from meshkitfs.shares._history import Version
from meshkitfs.shares._nodes import FileNode, Node, inode_number
from meshkitfs.shares._planting import plant
from meshkitfs.shares._sealer import Sealer
from meshkitfs.shares._tree import Tree, posix
from meshkitfs.state import ShareRow

if TYPE_CHECKING:
    from meshkitfs.shares._changing import Changing
    from meshkitfs.shares._share import Share

__all__ = ["SNAPSHOTS", "Past", "PastShare", "open_version"]

# The directory in a share's root where its versions are. It is found by name and never listed.
SNAPSHOTS: Final = b".snapshots"
# Trees of versions that may be in memory at a time for each share, before the kernel is asked to forget one.
KEPT_TREES: Final = 16


async def open_version(share: Share, grant: Grant, version: Version) -> DirManifest | FileManifest:
    """Return the root manifest of a past version. Raises ``version_not_granted``, ``block_unavailable``, …"""
    try:
        return await share.services.reader.open_root(grant, version.root, version.epoch, version.number)
    except MeshkitError as error:
        if error.code == "right_not_granted":
            raise MeshkitError("version_not_granted", f"version {version.number}: {error.detail}") from None
        raise


class PastShare:
    """One version of ``share`` to look at: what reading needs of `Share`. Every change is refused (EROFS)."""

    stuck: None = None
    dirty = False
    conflicts: tuple[bytes, ...] = ()

    def __init__(self, share: Share, version: Version) -> None:
        self.share = share
        self.version = version
        # Inode numbers are those of other objects than the live ones, and the same at every look.
        self._ref = share.row.ref + version.hash
        self.root_ino = inode_number(self._ref, share.row.oid)
        self.base = version.head
        self.services = share.services
        self.tree: Tree | None = None
        # How often the kernel was told of the root, less how often it has forgotten it.
        self.lookups = 0
        self._loading = trio.Lock()

    def __repr__(self) -> str:
        return f"<PastShare {self.version.number} of {self.share!r}>"

    # Not kept: a share can be renamed, and gets new grants.
    @property
    def row(self) -> ShareRow:
        return self.share.row

    @property
    def name(self) -> str:
        return f"{self.share.name}/{SNAPSHOTS.decode()}/{self.version.label}"

    @property
    def grant(self) -> Grant | None:
        return self.share.grant

    @property
    def refusal(self) -> MeshkitError | None:
        return self.share.refusal

    @property
    def denial(self) -> MeshkitError | None:
        return self.share.denial

    @property
    def unconfirmed(self) -> MeshkitError | None:
        return self.share.unconfirmed

    @property
    def tree_root(self) -> Node | None:
        return None if self.tree is None else self.tree.root

    def live(self, right: str) -> Grant | None:
        """As `Share.live`; there is no right to write."""
        return None if right == "write" or self.tree is None else self.share.past.live(right)

    async def use(self, right: str, *, current: bool = False) -> Grant:
        """As `Share.use`, with the tree of this version loaded. Raises also ``version_not_granted``."""
        if right == "write":
            raise posix(errno.EROFS)
        grant = await self.share.past.use(right, current=current)
        if self.tree is None:
            async with self._loading:
                if self.tree is None:
                    self.tree = await self._load(grant)
            self.share.past.used(self)
        return grant

    async def _load(self, grant: Grant) -> Tree:
        services = self.services
        sealer = Sealer(services.nursery, services.spool, services.reader.spooled, services.budget)
        manifest = await open_version(self.share, grant, self.version)
        row = replace(self.share.row, ref=self._ref)
        return await plant(grant, row, manifest, services.reader, sealer)

    def changing(self) -> Changing:
        raise posix(errno.EROFS)

    def hurry(self) -> None:
        """Nothing here is ever published."""

    async def fsync(self) -> None:
        """Nothing here is ever published."""

    def refused(self) -> None:
        """The share was refused: the kernel is told to drop what it holds of this version too."""
        if self.tree is not None:
            for node in self.tree.nodes.values():
                if isinstance(node, FileNode):
                    node.kernel_current = False
                self.services.emit(NodeChanged(node.ino, True))

    @property
    def unused(self) -> bool:
        """Whether the kernel knows nothing of this version any more."""
        if self.lookups > 0:
            return False
        return self.tree is None or not any(n.lookups or n.opens for n in self.tree.nodes.values())


class Past:
    """The versions of a share that somebody is looking at. A tree goes when the kernel has forgotten it."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._views: dict[bytes, PastShare] = {}
        # Those with a tree, the one that was used longest ago first.
        self._loaded: OrderedDict[bytes, PastShare] = OrderedDict()
        self.directory_ino = inode_number(share.row.ref, SNAPSHOTS)

    def __len__(self) -> int:
        return len(self._views)

    def live(self, right: str) -> Grant | None:
        """As `Share.live`, but the newest version need not be in memory."""
        grant = self._share.grant
        return grant if grant is not None and grant.alive and right in grant.rights else None

    async def use(self, right: str, *, current: bool = False) -> Grant:
        """As `Share.use`, also if the newest version cannot be read: that is when the past is wanted most."""
        grant = self.live(right)
        if grant is not None and not current:
            return grant
        try:
            return await self._share.use(right, current=current)
        except MeshkitError:
            grant = self._share.grant
            if grant is None:
                raise  # refused
            grant.require(right)
            return grant

    def view(self, version: Version) -> PastShare:
        """Return the view of a version; its tree is loaded when it is first used."""
        view = self._views.get(version.hash)
        if view is None:
            view = self._views[version.hash] = PastShare(self._share, version)
        return view

    def used(self, view: PastShare) -> None:
        """Note that ``view`` is looked at. With too many trees, the kernel is asked to forget the oldest."""
        if view.tree is None:
            return
        self._loaded[view.version.hash] = view
        self._loaded.move_to_end(view.version.hash)
        while len(self._loaded) > KEPT_TREES:
            _, oldest = self._loaded.popitem(last=False)
            name = oldest.version.label.encode()
            self._share.services.emit(NameChanged(self.directory_ino, name, 0))

    def drop(self, view: PastShare) -> None:
        """Let go of a view that nobody uses any more."""
        if self._views.get(view.version.hash) is view:
            del self._views[view.version.hash]
            self._loaded.pop(view.version.hash, None)

    def trees(self) -> list[Tree]:
        """Return the trees of versions that are in memory."""
        return [view.tree for view in self._views.values() if view.tree is not None]

    def refused(self) -> None:
        """The share was refused; see `PastShare.refused`."""
        for view in self._views.values():
            view.refused()
