"""A file that a command writes for a person: new, theirs only, and gone again if it did not become whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import MeshkitError

__all__ = ["new_file"]


@contextmanager
def new_file(place: str) -> Iterator[BinaryIO]:
    """Make the file ``place`` (mode 0600), which must not be there, for the block to fill.

    It is made before the block runs, so that a secret that is made there has its place; if the block fails,
    the file is removed. Raises MeshkitError ``invalid_argument`` if it cannot be made or written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(place, flags, 0o600)
    except OSError as error:
        raise MeshkitError("invalid_argument", f"{place}: {error.strerror}") from None
    try:
        with open(descriptor, "wb") as file:
            yield file
    except BaseException as error:
        os.unlink(place)
        if isinstance(error, OSError):
            raise MeshkitError("invalid_argument", f"{place}: {error.strerror}") from None
        raise
