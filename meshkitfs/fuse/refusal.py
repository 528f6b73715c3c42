"""Which errno a failed handler answers. Pure, so that the whole table can be tested without a mount."""

from __future__ import annotations

import errno

import trio

from meshkitfs.errors import MeshkitError

__all__ = ["errno_for"]


def errno_for(error: BaseException) -> int | None:
    """Return the errno a system call gets for ``error``, or None if nobody foresaw that error.

    An exception group (a nursery inside the filesystem) counts as the most telling error in it: a
    refusal of ours before an operating system error before anything else, so that running two
    downloads in parallel does not change what a person is told.
    """
    if isinstance(error, BaseExceptionGroup):
        return _errno_of_group(error)
    if isinstance(error, MeshkitError):
        return _usable(error.errno)
    if isinstance(error, trio.TooSlowError | TimeoutError):
        return errno.ETIMEDOUT
    if isinstance(error, OSError):
        return _usable(error.errno)
    if isinstance(error, trio.Cancelled):
        # The mount is ending, and this is what all later calls get. Not EINTR: programs try that again.
        return errno.ENOTCONN
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return None


def _usable(code: int | None) -> int | None:
    """Filter out the numbers that would say something else to the kernel than was meant."""
    if code is None or not 0 < code < 512:
        # 0 would be success, and from 512 up are the kernel's own (ERESTARTSYS and its kin).
        return None
    if code == errno.ENOSYS:
        # The kernel takes ENOSYS as "never ask this again" for the whole life of the mount.
        return errno.EOPNOTSUPP
    return code


def _errno_of_group(group: BaseExceptionGroup[BaseException]) -> int | None:
    for kind in (MeshkitError, (OSError, trio.TooSlowError), Exception, BaseException):
        found = group.subgroup(kind)
        while isinstance(found, BaseExceptionGroup):
            member = found.exceptions[0]
            if not isinstance(member, BaseExceptionGroup):
                return errno_for(member)
            found = member
    return None
