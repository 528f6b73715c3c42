"""A mount's life: open the home, serve it at a directory, end it without losing anything."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from meshkitfs.daemon import control, describe
from meshkitfs.daemon.config import MountOptions
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.service import Progress, Service
from meshkitfs.daemon.session import CLOSE_DEADLINE_S
from meshkitfs.fuse import mount as fuse_mount
from meshkitfs.keyvault import Passphrase
from meshkitfs.vfs import ControlFiles, MeshFilesystem

__all__ = ["run_mount"]

_log = logging.getLogger(__name__)

# How long an unmount waits for unsent changes when nobody says otherwise; 0 would mean without limit.
STOP_SECONDS = 60


async def run_mount(
    home: Home,
    mountpoint: Path,
    options: MountOptions,
    passphrase: Passphrase | None,
    on_ready: Callable[[dict[str, Any]], None],
) -> None:
    """Mount ``home`` (its lock is held) at ``mountpoint`` until it is unmounted, told to stop, or signalled.

    ``on_ready`` is called once the mount answers. Raises what `Session.open` and the mount itself raise.
    """
    # A working directory inside the mount would make the daemon wait for itself.
    os.chdir("/")
    # A byte store that is away keeps nobody from mounting: what is only on this device is wanted most then.
    opening = Service.open(home, passphrase, absent=True)
    async with opening as service, trio.open_nursery() as nursery:
        session = service.session
        if options.fsync is not None:
            session.services.fsync_publishes = options.fsync == "published"
        ending = _Ending()
        service.mounted = {"mountpoint": str(mountpoint), "pid": os.getpid()}
        files = ControlFiles(
            {
                b"status.json": lambda: describe.status_json(session, service.mounted),
                b"errors.txt": lambda: describe.errors_text(session),
                b"capabilities.json": lambda: (
                    json.dumps(session.runtime(), indent=2, sort_keys=True).encode() + b"\n"
                ),
            }
        )
        fs = MeshFilesystem(session.book, files, session.runtime, session.note, session.auditing.record)
        session.listeners.append(fs.on_event)
        service.fault_of = lambda node: fs.faults.of(node.ino)
        await nursery.start(_on_signal, ending.stop)
        readonly = fuse_mount.MountOptions(read_only=options.read_only)
        serving = partial(fuse_mount.run, fs, mountpoint, readonly, stop=ending.stop)

        async def serve(task_status: trio.TaskStatus[fuse_mount.Mounted]) -> None:
            try:
                await serving(task_status=task_status)
            finally:
                ending.unmounted.set()

        await nursery.start(serve)
        await nursery.start(
            partial(
                control.serve, home, service.call, info=lambda: dict(service.mounted),
                stop=partial(_stop, service, ending),
            )
        )  # fmt: skip
        on_ready({"mountpoint": str(mountpoint), "pid": os.getpid()})
        _log.info("mounted")
        await ending.unmounted.wait()
        # Nothing changes any more: first what must not be lost, then what others wait for.
        await session.secure()
        with ending.publishing:
            ending.publishing.deadline = trio.current_time() + CLOSE_DEADLINE_S
            await service.sync(lambda _: None)
        session.closing_s = 0
        ending.over.set()
        nursery.cancel_scope.cancel()


class _Ending:
    """How a mount ends: told to ``stop``, ``unmounted``, then ``publishing`` what is left, then ``over``."""

    def __init__(self) -> None:
        self.stop = trio.Event()
        self.unmounted = trio.Event()
        self.publishing = trio.CancelScope()
        self.over = trio.Event()


async def _stop(
    service: Service, ending: _Ending, params: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Publish what waits, for ``timeout`` seconds, then unmount; what could not be published is kept."""
    result = await service.sync(progress, float(params.get("timeout", STOP_SECONDS)))
    if result["left"]:
        ending.publishing.cancel()  # it had its time
    ending.stop.set()
    await ending.over.wait()
    return {"left": describe.left(service.session)}


async def _on_signal(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP:
                _log.info("stopping on %s", signal.Signals(number).name)
                stop.set()
