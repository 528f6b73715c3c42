"""A mount's life: open the home, serve it at a directory, end it without losing anything."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import trio

from meshkitfs.daemon import config as configuration
from meshkitfs.daemon import control, describe, watchdog
from meshkitfs.daemon.config import MountOptions
from meshkitfs.daemon.door import Door, NoShares, keyring_is_locked
from meshkitfs.daemon.home import Home
from meshkitfs.daemon.locking import DETAIL
from meshkitfs.daemon.notify import Notifier
from meshkitfs.daemon.notifying import DesktopNotifier
from meshkitfs.daemon.service import Progress, Service
from meshkitfs.daemon.session import CLOSE_DEADLINE_S
from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import mount as fuse_mount
from meshkitfs.keyvault import Passphrase
from meshkitfs.shares import ShareBook
from meshkitfs.state import AuditLine
from meshkitfs.vfs import ControlFiles, MeshFilesystem

if TYPE_CHECKING:
    from meshkitfs.daemon.metrics import Metrics

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
    notifier: Notifier | None = None,
) -> None:
    """Mount ``home`` (its lock is held) at ``mountpoint`` until it is unmounted, told to stop, or signalled.

    ``on_ready`` is called once the mount answers. It comes up locked if that is asked for, or if the home's
    keyring is locked; under a ``notifier``, which there may be before any keyring, also if that is not there.
    Raises what `open_session` and the mount itself raise.
    """
    # A working directory inside the mount would make the daemon wait for itself.
    os.chdir("/")
    mount = _Mount(home, mountpoint, options)
    keyring = not options.locked and await keyring_is_locked(home, away=notifier is not None)
    if options.locked or keyring:
        mount.door = door = Door(home, mount.info, watch=keyring)
        async with trio.open_nursery() as nursery:
            await mount.start(nursery)
            on_ready(mount.info | {"locked": True})
            if notifier is not None:
                nursery.start_soon(mount.tell, notifier)
            async with trio.open_nursery() as waiting:

                async def until_unmounted() -> None:
                    await mount.ending.unmounted.wait()
                    if mount.service is None:
                        waiting.cancel_scope.cancel()

                async def until_used() -> None:
                    await door.serve(mount.finish)
                    waiting.cancel_scope.cancel()

                waiting.start_soon(door.watch)
                waiting.start_soon(until_unmounted)
                waiting.start_soon(until_used)
            mount.ending.over.set()
            nursery.cancel_scope.cancel()
        return
    # A byte store that is away keeps nobody from mounting: what is only on this device is wanted most then.
    opening = Service.open(home, passphrase, absent=True)
    async with opening as service, trio.open_nursery() as nursery:
        mount.show(service)
        await mount.start(nursery)
        on_ready(dict(mount.info))
        if notifier is not None:
            nursery.start_soon(mount.tell, notifier)
        await mount.finish(service)
        mount.ending.over.set()
        nursery.cancel_scope.cancel()


class _Mount:
    """One mount point, and the home that is shown there once it can be opened."""

    def __init__(self, home: Home, mountpoint: Path, options: MountOptions) -> None:
        self.home = home
        self.point = mountpoint
        self.options = options
        self.info = {"mountpoint": str(mountpoint), "pid": os.getpid()}
        self.ending = _Ending()
        self.service: Service | None = None
        self.desktop: DesktopNotifier | None = None
        self.door: Door | None = None
        self._files = ControlFiles(
            {
                b"status.json": self._status,
                b"errors.txt": self._errors,
                b"capabilities.json": lambda: (
                    json.dumps(self._runtime(), indent=2, sort_keys=True).encode() + b"\n"
                ),
            }
        )
        # Until there is one to read, a book without shares; see `show`.
        book = cast(ShareBook, NoShares())
        self.fs = MeshFilesystem(book, self._files, self._runtime, self._note, self._record)
        self.fs.closed = self._closed
        self._settled: Callable[[], Any] | None = None
        self._metrics: Metrics | None = None

    def show(self, service: Service) -> None:
        """Show the shares of an open home."""
        session = service.session
        if self.options.fsync is not None:
            session.services.fsync_publishes = self.options.fsync == "published"
        service.mounted = self.info
        service.fault_of = lambda node: self.fs.faults.of(node.ino)
        service.lock.before = self._write_back
        service.lock.after = self._dropped
        session.listeners.append(self.fs.on_event)
        self.desktop = desktop = DesktopNotifier(session.config.notifications, service)
        session.listeners.append(desktop.on_event)
        session.services.nursery.start_soon(desktop.run)
        self.fs.book = session.book
        if self._metrics is not None:
            session.listeners.append(self._metrics.on_event)
        self.service = service

    async def start(self, nursery: trio.Nursery) -> None:
        """Serve the mount point and the control socket in ``nursery``; returns when both answer."""
        await nursery.start(_on_signal, self.ending.stop)
        how = fuse_mount.MountOptions(read_only=self.options.read_only, noexec=self.options.noexec)
        serving = partial(fuse_mount.run, self.fs, self.point, how, stop=self.ending.stop)

        async def serve(task_status: trio.TaskStatus[fuse_mount.Mounted]) -> None:
            try:
                await serving(task_status=task_status)
            finally:
                self.ending.unmounted.set()

        mounted: fuse_mount.Mounted = await nursery.start(serve)
        self._settled = mounted.invalidator.drained
        await self._show_metrics(nursery, mounted)
        await nursery.start(
            partial(control.serve, self.home, self._call, info=lambda: dict(self.info), stop=self._stop)
        )
        _log.info("mounted")

    async def _show_metrics(self, nursery: trio.Nursery, mounted: fuse_mount.Mounted) -> None:
        """Show metrics, if that is wanted. Raises ``invalid_config``."""
        wanted = configuration.load(self.home.config_path).metrics
        listen = wanted.listen if self.options.metrics is None else self.options.metrics
        if not listen:
            return
        # Loaded here: nobody else needs these libraries.
        from meshkitfs.daemon.metrics import Metrics
        from meshkitfs.net import scrape

        place = scrape.Place.parse(listen, remote=wanted.allow_remote)
        self._metrics = metrics = Metrics(lambda: self.service, mounted.counters)
        if self.service is not None:
            self.service.session.listeners.append(metrics.on_event)
        self.info["metrics"] = await nursery.start(scrape.show, place, metrics.registry)
        _log.info("metrics are shown")

    async def finish(self, service: Service) -> None:
        """Show ``service`` until it is unmounted, then make sure of what was changed, and publish it."""
        if self.service is None:
            self.show(service)
        await self.ending.unmounted.wait()
        # Nothing changes any more: first what must not be lost, then what others wait for.
        await service.session.secure()
        with self.ending.publishing:
            self.ending.publishing.deadline = trio.current_time() + CLOSE_DEADLINE_S
            await service.sync(lambda _: None)
        service.session.closing_s = 0
        if left := service.lock.left():
            _log.warning("ends with unsent changes, which are kept", extra={"fields": describe.amount(left)})

    async def tell(self, notifier: Notifier) -> None:
        """Keep systemd informed, until cancelled."""
        notifier.ready(self._summary())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                watchdog.keep, notifier, self._summary, partial(watchdog.answers, str(self.point))
            )
            await self.ending.unmounted.wait()
            notifier.stopping(self._summary())

    def _summary(self) -> str:
        """One line for ``systemctl status``, which others may see: how many shares, never which."""
        where = "Unmounted" if self.ending.unmounted.is_set() else f"Mounted at {self.point}"
        if self._closed() is not None:
            return f"{where}; locked: run 'meshkitfs unlock'"
        assert self.service is not None  # else it is locked
        amount = describe.amount(self.service.lock.left())
        shares = len(self.service.session.book.shares)
        unsent = (
            f"{amount['bytes']} bytes in {amount['shares']} unsent" if amount["shares"] else "all published"
        )
        return f"{where}; shares: {shares}; {unsent}"

    async def _call(self, method: str, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self.service is not None:
            result = await self.service.call(method, params, progress)
            if method == "status" and self.desktop is not None:
                result["notifications"] = self.desktop.status()
            return result
        assert self.door is not None  # a mount has one or the other
        return await self.door.call(method, params, progress)

    async def _stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Publish what waits, for ``timeout`` seconds, then unmount; what could not be published is kept."""
        service = self.service
        if service is not None:
            result = await service.sync(progress, float(params.get("timeout", STOP_SECONDS)))
            if result["left"]:
                self.ending.publishing.cancel()  # it had its time
        self.ending.stop.set()
        await self.ending.over.wait()
        return {"left": service.lock.left() if service is not None else []}

    def _closed(self) -> MeshkitError | None:
        return (
            MeshkitError("identity_locked", DETAIL) if self.service is None else self.service.session.locked
        )

    def _note(self, path: str, error: MeshkitError) -> None:
        if self.service is not None:
            self.service.session.note(path, error)
        if self.desktop is not None:
            self.desktop.refused(path, error)

    def _record(self, line: AuditLine) -> None:
        record = None if self.service is None else self.service.session.auditing.record
        if record is not None:
            record(line)

    def _runtime(self) -> dict[str, Any]:
        if self.service is not None:
            return self.service.session.runtime()
        return self.door.runtime() if self.door is not None else {}

    def _status(self) -> bytes:
        if self.service is not None:
            return describe.status_json(self.service.session, self.service.lock, self.info)
        data = self.door.status() if self.door is not None else {}
        return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"

    def _errors(self) -> bytes:
        if self.service is not None:
            return describe.errors_text(self.service.session)
        return describe.incident_text(
            describe.Incident(0, str(self.point), "identity_locked", DETAIL)
        ).encode()

    async def _write_back(self) -> None:
        """Have the kernel hand over what was written through memory maps and is not here yet."""
        await trio.to_thread.run_sync(_sync_filesystem, str(self.point), abandon_on_cancel=True)

    async def _dropped(self) -> None:
        """Return when the kernel has dropped what it was told to drop."""
        if self._settled is not None:
            await self._settled()


class _Ending:
    """How a mount ends: told to ``stop``, ``unmounted``, then ``publishing`` what is left, then ``over``."""

    def __init__(self) -> None:
        self.stop = trio.Event()
        self.unmounted = trio.Event()
        self.publishing = trio.CancelScope()
        self.over = trio.Event()


def _sync_filesystem(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ctypes.CDLL(None, use_errno=True).syncfs(descriptor)
    finally:
        os.close(descriptor)


async def _on_signal(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number != signal.SIGHUP:
                _log.info("stopping on %s", signal.Signals(number).name)
                stop.set()
