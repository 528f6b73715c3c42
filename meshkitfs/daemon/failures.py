"""Turning whatever was raised into one classified failure that can be told to a person."""

from __future__ import annotations

import os

from ..errors import MeshkitError

__all__ = ["as_error"]


def as_error(error: BaseException) -> MeshkitError:
    """Return the classified failure that ``error`` is or holds; anything else is ``internal_error``.

    A nursery wraps what its tasks raise in groups; the first classified failure in them is the one that
    is told. The detail of an unclassified one is only its type: its text may hold anything.
    """
    if isinstance(error, MeshkitError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [as_error(inner) for inner in error.exceptions]
        return next((item for item in found if item.code != "internal_error"), found[0])
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return MeshkitError("internal_error", f"{where}{os.strerror(error.errno)}")
    return MeshkitError("internal_error", type(error).__name__)
