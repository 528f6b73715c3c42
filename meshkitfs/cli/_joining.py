"""Where the secret comes from that a metadata service asks newcomers for. Never an argument."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..net import Secret

__all__ = ["VARIABLE", "join"]

VARIABLE: Final = "MESHKITFS_JOIN_TOKEN"
_MAX_BYTES: Final = 4096


def join(place: str | None) -> Secret | None:
    """Return the secret in the file ``place`` (``-`` for stdin), or in the environment, or None.

    Raises invalid_config: the file is not there, can be read by others, or holds no secret.
    """
    if place is None and VARIABLE not in os.environ:
        return None
    from ..net import Secret, SecretSource  # its libraries take longer to load than most commands run

    if place == "-":
        return Secret.checked(sys.stdin.read(_MAX_BYTES), "stdin")
    if place is not None:
        return SecretSource(file=Path(place)).load()
    return SecretSource(env=VARIABLE).load()
