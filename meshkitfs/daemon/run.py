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
    async with Service.open(home, passphrase) as service, trio.open_nursery() as nursery:
        session = service.session
        stop = trio.Event()
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
        fs = MeshFilesystem(session.book, files, session.runtime, session.note)
        session.listeners.append(fs.on_event)
        service.fault_of = lambda node: fs.faults.of(node.ino)
        await nursery.start(_on_signal, stop)
        serving = partial(
            fuse_mount.run, fs, mountpoint, fuse_mount.MountOptions(read_only=options.read_only), stop=stop
        )
        ended = trio.Event()

        async def serve(task_status: trio.TaskStatus[fuse_mount.Mounted]) -> None:
            try:
                await serving(task_status=task_status)
            finally:
                ended.set()

        await nursery.start(serve)
        await nursery.start(
            partial(
                control.serve, home, service.call, info=lambda: dict(service.mounted),
                stop=partial(_stop, service, stop, ended),
            )
        )  # fmt: skip
        on_ready({"mountpoint": str(mountpoint), "pid": os.getpid()})
        _log.info("mounted")
        await ended.wait()
        await service.sync(lambda _: None)
        nursery.cancel_scope.cancel()


async def _stop(
    service: Service, stop: trio.Event, ended: trio.Event, params: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Publish what waits, then unmount. Without ``force``, what cannot be published is reported and kept."""
    result = await service.sync(progress, float(params.get("timeout", STOP_SECONDS)))
    stop.set()
    await ended.wait()
    return result


async def _on_signal(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP:
                _log.info("stopping on %s", signal.Signals(number).name)
                stop.set()
