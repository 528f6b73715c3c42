"""Several devices of one owner: nothing that one has granted is lost by what another publishes.

A roster lists capsules by their hashes, and whoever makes the next one has to know whose they are. So each
device tells the others of a grant before it publishes it, and makes no roster on top of one that lists what
it has not heard of.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant

if TYPE_CHECKING:
    from meshkitfs.shares._book import ShareBook
    from meshkitfs.shares._services import Services
    from meshkitfs.shares._share import Share

__all__ = ["OtherDevices", "current", "redone"]

_TRIES: Final = 4

P = ParamSpec("P")
T = TypeVar("T")


class OtherDevices(Protocol):
    """The other devices of this identity, if there are any."""

    @property
    def any(self) -> bool:
        """Whether there may be others."""

    async def tell(self) -> None:
        """Tell them what this one has granted. Raises what the metadata home raises."""

    async def hear(self) -> Any:
        """Take in what they have told. Raises what the metadata home raises."""


async def current(services: Services, share: Share) -> Grant:
    """Return a grant to share with, whose roster lists nothing that this device has not heard of.

    Raises ``device_behind`` if another device has granted something, and its word of that is not here.
    """
    grant = await share.use("reshare", current=True)
    others = services.others
    if others is not None and others.any and _unknown(services, share, grant):
        await others.hear()
        if _unknown(services, share, grant):
            raise MeshkitError("device_behind", f"a grant of '{share.name}' that another device has made")
    return grant


def _unknown(services: Services, share: Share, grant: Grant) -> set[bytes]:
    known: Iterable[bytes] = (m.capsule_hash for m in services.state.members(share.row.share))
    return set(grant.roster.caps) - set(known)


def redone(
    change: Callable[Concatenate[ShareBook, P], Awaitable[T]],
) -> Callable[Concatenate[ShareBook, P], Awaitable[T]]:
    """Make a change of a roster again, on top of the newest, if another device was faster."""

    @functools.wraps(change)
    async def again(book: ShareBook, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for left in reversed(range(_TRIES)):
            try:
                return await change(book, *args, **kwargs)
            except MeshkitError as error:
                if error.code != "head_conflict" or not left or not book.shared_with_others:
                    raise
        raise AssertionError("the last try returns or raises")

    return again
