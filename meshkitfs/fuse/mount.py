"""Serving a filesystem at a directory: from the mount to the last answer.

Only one mount at a time is possible in a process (pyfuse3 keeps its session in a global), and it is served
from the main thread. What the mount does not do is end itself on a signal: whoever runs it sets ``stop``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyfuse3
import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import handover, preflight
from meshkitfs.fuse.guard import guarded_process
from meshkitfs.fuse.invalidate import Invalidator
from meshkitfs.fuse.operations import Counters, Operations
from meshkitfs.fuse.spin import PATIENCE, Readiness
from meshkitfs.fuse.workers import Workers
from meshkitfs.vfs.types import Filesystem

__all__ = ["MountOptions", "Mounted", "run"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount. Times are in seconds.

    ``allow_other`` lets other users of the machine in (they see what the mounting user sees);
    ``read_only`` and ``noexec`` are the usual mount options. ``deadline`` ends a request that is not
    answered by then, ``sync_deadline`` an fsync. ``grace`` is how long requests under way may still take
    when the mount ends. ``patience`` is how long to poll for the next request before sleeping (0: never).
    """

    read_only: bool = False
    noexec: bool = False
    allow_other: bool = False
    deadline: float = 60.0
    sync_deadline: float = 600.0
    grace: float = 5.0
    patience: float = PATIENCE


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that is being served, for whoever started it."""

    mount: preflight.Mount
    invalidator: Invalidator
    readiness: Readiness
    workers: Workers
    counters: Counters


async def run(
    fs: Filesystem,
    mountpoint: str | os.PathLike[str],
    options: MountOptions | None = None,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[Mounted] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount ``fs`` at ``mountpoint`` and serve it until ``stop`` is set or somebody unmounts it.

    ``mountpoint`` should come from `preflight.check_mountpoint`. ``task_status`` is told once the kernel
    has accepted the mount. On return everything is unmounted and every request was answered; requests
    still under way ``options.grace`` seconds after ``stop`` are answered with ENOTCONN. What is dirty in
    ``fs`` is the caller's to save, before (while the mount still answers) or after.

    Raises MeshkitError ``mount_failed`` with what libfuse said, or RuntimeError outside the main thread.
    A KeyboardInterrupt that strikes a handler ends the mount as ``stop`` does and is raised afterwards.
    """
    options = options or MountOptions()
    struck: list[BaseException] = []

    def interrupt(error: BaseException) -> None:
        struck.append(error)
        stop.set()

    readiness = Readiness(options.patience)
    workers = Workers(options.deadline, readiness)
    operations = Operations(fs, workers, options.sync_deadline, interrupt)
    invalidator = Invalidator(fs.invalidations)
    operations.settled = invalidator.drained
    mount = _mount(operations, preflight.resolve(mountpoint), options)
    invalidator.start()
    try:
        # Not around the mounting and unmounting: libfuse runs fusermount3 there, and does not expect
        # the guard's signal while it waits for it.
        with guarded_process(), _pyfuse3_trio(workers):
            mounted = Mounted(mount, invalidator, readiness, workers, operations.counters)
            await _serve(mounted, operations.serving, options.grace, stop, task_status)
    except BaseExceptionGroup as failures:
        # The device could not be read; anything else is a defect and stays as it is.
        if failures.split(OSError)[1] is not None:
            raise
        raise MeshkitError("mount_failed", str(_first(failures))) from None
    finally:
        invalidator.close()
        with trio.CancelScope(shield=True):
            await _unmount(mount, invalidator, options.grace)
    if struck:
        raise struck[0]


async def _serve(
    mounted: Mounted,
    greeted: trio.Event,
    grace: float,
    stop: trio.Event,
    task_status: trio.TaskStatus[Mounted],
) -> None:
    serving = trio.CancelScope()

    async def announce() -> None:
        await greeted.wait()
        task_status.started(mounted)

    async def end() -> None:
        await stop.wait()
        # First, while the workers still answer: a notification may be waiting for one of their answers.
        mounted.invalidator.close()
        await mounted.invalidator.finished(grace)
        pyfuse3.terminate()
        await trio.sleep(grace)
        serving.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(announce)
        nursery.start_soon(end)
        nursery.start_soon(mounted.workers.watch)
        with serving:
            await pyfuse3.main()
        nursery.cancel_scope.cancel()


def _mount(operations: Operations, place: str, options: MountOptions) -> preflight.Mount:
    # Without default_permissions the kernel would check no mode bits at all. Not auto_unmount: when a
    # daemon dies, its mount point must refuse, not become a plain directory that takes plaintext.
    # Never max_read: libfuse 3.14 refuses the mount with it.
    device = place
    handed = -1
    chosen = {"default_permissions", "nosuid", "nodev", "fsname=meshkitfs", "subtype=meshkitfs"}
    chosen.add("ro" if options.read_only else "rw")
    if options.noexec:
        chosen.add("noexec")
    if options.allow_other:
        chosen.add("allow_other")
    if handover.wanted():
        if options.noexec or options.allow_other:
            raise MeshkitError("not_supported", "the mount helper has no such mount options")
        # It is mounted already, and libfuse takes no options for that.
        handed = handover.mount(place, read_only=options.read_only)
        device, chosen = f"/dev/fd/{handed}", set()
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, device, chosen)
        except RuntimeError as error:
            if handed >= 0:
                os.close(handed)
                handover.unmount(place)
            raise MeshkitError("mount_failed", said() or str(error)) from None
        warning = said()
    if warning:
        _log.warning("libfuse: %s", warning)
    mount = preflight.find(place)
    if mount is None:
        pyfuse3.close()
        if handed >= 0:
            handover.unmount(place)
        raise MeshkitError("mount_failed", f"{place} does not appear in the mount table")
    return mount


async def _unmount(mount: preflight.Mount, invalidator: Invalidator, grace: float) -> None:
    if not await invalidator.finished(grace):
        # Its thread is in the kernel, held back by a request that nobody will answer any more.
        preflight.sever(mount)
        if not await invalidator.finished(grace):
            return  # it still uses the session, which so must not be freed
    pyfuse3.close()
    if preflight.find(mount.path) == mount:
        # libfuse leaves a mount in place whose connection was cut, or that it has not made.
        if handover.wanted():
            handover.unmount(mount.path)
        else:
            preflight.unmount(mount.path, lazy=True)


@contextmanager
def _pyfuse3_trio(workers: Workers) -> Iterator[None]:
    names = vars(pyfuse3)
    original = names["trio"]
    names["trio"] = workers
    try:
        yield
    finally:
        names["trio"] = original


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Collect what is written to file descriptor 2: libfuse says there, and only there, what went wrong."""
    sys.stderr.flush()
    original = os.dup(2)
    collected = os.memfd_create("libfuse-messages")
    os.dup2(collected, 2)
    try:
        yield lambda: os.pread(collected, 4096, 0).decode(errors="replace").strip()
    finally:
        os.dup2(original, 2)
        os.close(original)
        os.close(collected)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
