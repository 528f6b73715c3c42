"""The identity directory, as its client sees it: it serves chains of records, and is believed in no more."""

from __future__ import annotations

from typing import Literal, Protocol

from meshkitfs.errors import MeshkitError
from meshkitfs.identity._identity import Identity

Standing = Literal["unpublished", "behind", "current", "ahead", "other"]
"""How a directory's chain for a handle relates to the identity of this home:
nothing there; its beginning; the same; longer than here; somebody else's or a forgery."""


class Directory(Protocol):
    """The two methods of a metadata home that concern identities (see `meshkitfs.metadata.Metadata`)."""

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of records of a handle, oldest first; empty when nobody has that name."""

    async def publish_identity(self, handle: str, record: bytes) -> None:
        """Append a record to the chain of a handle. Raises ``identity_handle_taken``, ``invalid_record``."""


async def standing(identity: Identity, directory: Directory) -> Standing:
    """Say what the directory tells others about ``identity``. Raises what the directory raises.

    ``other`` is an alarm: people who look this handle up get other keys.
    """
    return _compare(list(identity.chain), await directory.identity(identity.handle))


async def publish(identity: Identity, directory: Directory) -> None:
    """Bring the directory's chain for ``identity`` up to date; harmless when it is.

    Raises MeshkitError ``identity_handle_taken`` if the directory has another chain under this name, or
    records of this identity that this home lacks (an old copy of the home), and what the directory raises.
    """
    try:
        there = await directory.identity(identity.handle)
    except MeshkitError as error:
        if error.code != "metadata_unauthorized":
            raise
        # A service answers its members only, and publishing is how one becomes one. It knows a member by the
        # newest key: one that has forgotten the last record (it was restored from a backup) is given that.
        if len(identity.chain) > 1:
            try:
                await directory.publish_identity(identity.handle, identity.record)
                return
            except MeshkitError as last:
                if last.code not in ("metadata_unauthorized", "invalid_record", "identity_handle_taken"):
                    raise
        there = []
    where = _compare(list(identity.chain), there)
    if where == "other":
        raise MeshkitError(
            "identity_handle_taken", f"{identity.handle!r} is somebody else's in the directory"
        )
    if where == "ahead":
        detail = f"the directory has newer records of {identity.handle!r} than this home: is it an old copy?"
        raise MeshkitError("identity_handle_taken", detail)
    for record in identity.chain[len(there) :]:
        await directory.publish_identity(identity.handle, record)


def _compare(here: list[bytes], there: list[bytes]) -> Standing:
    if not there:
        return "unpublished"
    if there == here:
        return "current"
    if there == here[: len(there)]:
        return "behind"
    if here == there[: len(here)]:
        return "ahead"
    return "other"
