"""What a share tells the layers above: somebody else changed something, or access to it ended or began."""

from __future__ import annotations

from dataclasses import dataclass

from meshkitfs.errors import MeshkitError

__all__ = ["AccessChanged", "Event", "NameChanged", "NodeChanged", "PublishFailed", "RosterOverdue"]


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """The attributes, and if ``content`` also the bytes, of an inode are no longer what was told before."""

    ino: int
    content: bool


@dataclass(frozen=True, slots=True)
class NameChanged:
    """A name in directory ``parent`` means something else now; ``gone`` is the inode it meant, 0 if none."""

    parent: int
    name: bytes
    gone: int


@dataclass(frozen=True, slots=True)
class AccessChanged:
    """A share was refused (``code`` of the refusal) or, with an empty ``code``, can be used again."""

    share: str
    code: str


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """What was changed in a share could not be published; it is kept here and tried again."""

    share: str
    error: MeshkitError


@dataclass(frozen=True, slots=True)
class RosterOverdue:
    """The roster of a share of one's own could not be renewed in good time (``roster_not_renewed``)."""

    share: str
    error: MeshkitError


Event = NodeChanged | NameChanged | AccessChanged | PublishFailed | RosterOverdue
