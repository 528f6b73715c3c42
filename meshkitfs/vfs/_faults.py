"""What went wrong with single files and directories: the reason that ``user.meshkit.reason`` gives for them.

A share that is refused as a whole has its own record (`Share.refusal`). This one is for the rest: bytes that
do not match their CID, a right that a grant does not have, a block that is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from meshkitfs.errors import MeshkitError
from meshkitfs.shares import AnyShare, Node

__all__ = ["Faults", "classified", "path_of"]

_KEPT: Final = 1000


class Faults:
    """The newest fault of each inode, until the inode is opened again. ``report`` is told path and error."""

    def __init__(self, report: Callable[[str, MeshkitError], None]) -> None:
        self._report = report
        self._held: OrderedDict[int, MeshkitError] = OrderedDict()

    def note(self, share: AnyShare, node: Node | None, error: MeshkitError) -> None:
        """Remember ``error`` for ``node``, unless it is the refusal of the whole share."""
        if share.refusal is not None and share.refusal.code == error.code:
            return
        ino = share.root_ino if node is None else node.ino
        self._held[ino] = error
        self._held.move_to_end(ino)
        if len(self._held) > _KEPT:
            self._held.popitem(last=False)
        self._report(path_of(share, node), error)

    def of(self, ino: int) -> MeshkitError | None:
        """Return what went wrong with an inode last, None if nothing did since it was opened."""
        return self._held.get(ino)

    def clear(self, ino: int) -> None:
        """Forget the fault of an inode: it was opened."""
        if self._held:
            self._held.pop(ino, None)


def classified(error: BaseException) -> MeshkitError | None:
    """Return the refusal or fault in ``error``, which may be a group of several; None if there is none."""
    if isinstance(error, MeshkitError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := classified(one)) is not None), None)
    return None


def path_of(share: AnyShare, node: Node | None) -> str:
    """Return ``SHARE/path/in/share`` of a node."""
    names: list[str] = []
    while node is not None and node.parent is not None:
        names.append(node.name.decode(errors="surrogateescape"))
        node = node.parent
    return "/".join([share.name, *reversed(names)])
