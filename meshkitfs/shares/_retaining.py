"""Signing anew what a share's owner has given up: of a key that was replaced, nobody takes that."""

from __future__ import annotations

from dataclasses import replace

import trio

from meshkitfs.core.records import Retention
from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant
from meshkitfs.shares._publishing import PUBLISH_DEADLINE_S
from meshkitfs.shares._share import Share

__all__ = ["resign_retention"]


async def resign_retention(share: Share, grant: Grant) -> None:
    """Publish the retention record, if there is one, signed with the newest key.

    Before the roster is, so that it is taken at every moment. Raises ``metadata_unavailable``,
    ``head_conflict``.
    """
    services, row = share.services, share.row
    try:
        with trio.fail_after(PUBLISH_DEADLINE_S):
            blob = await services.metadata.retention(row.share)
            if blob is None:
                return
            old = Retention.parse(blob, grant.owner_now)
            if old.signer == services.signing().kid:
                return
            new = replace(old, seq=old.seq + 1, iat=int(services.wall()))
            await services.metadata.retain(row.share, new.sign(services.signing()))
    except trio.TooSlowError:
        raise MeshkitError("metadata_unavailable", "no answer in time") from None
