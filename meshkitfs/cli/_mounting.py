"""Commands that begin and end a mount: ``mount``, ``umount``."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..daemon import background, client, config, logs
from ..daemon.failures import as_error
from ..daemon.home import Home
from ..daemon.notify import Notifier
from ..errors import MeshkitError, exit_code_for
from ..fuse import handover, preflight
from ._asking import daemon_info
from ._context import Context
from ._keyvault import open_key_vault
from ._output import printable
from ._progress import ProgressLine
from ._shown import left_lines

__all__ = ["mount", "umount"]

_HOLD_SECONDS = 20.0
_RELEASE_SECONDS = 30.0


def mount(context: Context, args: argparse.Namespace) -> int:
    """``mount [DIR]``: in the background, or in this process with ``--foreground``."""
    if args.foreground:
        return _foreground(context, args)
    place, info = _prepare(context, args)
    if info is None:
        info = _start(context, args, place)
        text = f"Mounted at {printable(place)}. Unmount with 'meshkitfs umount'."
        if info.get("locked"):
            text += " It is locked: run 'meshkitfs unlock'."
    else:
        text = f"It is mounted at {printable(place)} already."
    context.out.result({**info, "mountpoint": place}, [text])
    return 0


def _start(context: Context, args: argparse.Namespace, place: str) -> dict[str, Any]:
    secret = None if args.locked else _passphrase(context)
    options = _options(args)
    try:
        return background.start(context.home, Path(place), options, secret)
    except MeshkitError as error:
        if error.code not in ("home_busy", "mountpoint_busy"):
            raise
        # Two mounts at once: if the other one did what was asked for here, all is well.
        info = _settled_info(context.home)
        if info is None or info.get("mountpoint") != place:
            raise
        return info


def _options(args: argparse.Namespace, *, locked: bool | None = None) -> config.MountOptions:
    return config.MountOptions(
        args.nonempty,
        args.read_only,
        args.fsync,
        args.locked if locked is None else locked,
        args.noexec,
        log_format=args.log_format,
        metrics=args.metrics,
    )


def _settled_info(home: Home) -> dict[str, Any] | None:
    """Return what the daemon says; if another process holds the home, wait until it says so or lets go."""
    deadline = time.monotonic() + _HOLD_SECONDS
    while (info := daemon_info(home)) is None and home.holder() is not None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return info


def _foreground(context: Context, args: argparse.Namespace) -> int:
    background.tune_allocator()
    notifier = Notifier.take()
    pipe = background.ReadyPipe(args.ready_fd)
    in_background = args.ready_fd is not None
    home = context.home
    try:
        place, info = _prepare(context, args)
        if info is not None:
            if notifier is not None:
                # Not as if it were ours: it would be systemd's to watch and to end.
                raise MeshkitError("home_busy", f"it is mounted already, by process {info.get('pid')}")
            pipe.ready(info)
            context.out.result(
                {**info, "mountpoint": place}, [f"It is mounted at {printable(place)} already."]
            )
            return 0

        def on_ready(info: dict[str, Any] | None = None) -> None:
            context.passphrase.forget()
            pipe.ready({"mountpoint": place, **(info or {})})
            if not in_background and notifier is None:
                context.out.note(f"Mounted at {printable(place)}. Ctrl-C unmounts it.")

        from ..daemon.run import run_mount

        # Under systemd there is nobody to ask, now or at the next try: it waits, locked, for 'unlock'.
        waits = notifier is not None and not context.passphrase.given and _asks(context)
        options = _options(args, locked=args.locked or waits)
        with _held(home):
            logs.setup_home(home, stderr=not in_background, form=options.log_format)
            client.run_async(
                partial(run_mount, home, Path(place), options, context.passphrase, on_ready, notifier)
            )
    except BaseException as error:
        pipe.failed(as_error(error))
        raise
    return 0


@contextlib.contextmanager
def _held(home: Home) -> Iterator[None]:
    """Hold the home. A command that is at work in it is waited for, a daemon is not: that one stays."""
    deadline = time.monotonic() + _HOLD_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(home.hold(wait=0.5))
                break
            except MeshkitError as error:
                if error.code != "home_busy" or time.monotonic() > deadline or daemon_info(home) is not None:
                    raise
        yield


def _prepare(context: Context, args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """Check everything that can be checked before a daemon starts.

    Return the resolved mount point, and what the daemon says if this home is mounted there already.
    """
    home = context.home
    home.require_initialized()
    settings = config.load(home.config_path)
    point = settings.mount.point if args.dir is None else Path(args.dir)
    info = _settled_info(home)
    if info is not None:
        place = preflight.resolve(point)
        if info.get("mountpoint") == place:
            return place, info
        where = printable(info.get("mountpoint") or "nowhere yet")
        raise MeshkitError("home_busy", f"this home is mounted at {where} (process {info.get('pid')})")
    if handover.wanted():
        handover.clear_stale(preflight.resolve(point))
    else:
        preflight.check_system()
        preflight.clear_stale(point)
    if args.dir is None and not os.path.lexists(point):
        # Our own default may be made; a directory that a person named and that is missing is a typo.
        point.mkdir(mode=0o700, parents=True)
    state = [home.root, *settings.provider.directories()]
    if settings.metadata.path is not None:
        state.append(settings.metadata.path)
    return preflight.check_mountpoint(point, state, args.nonempty), None


def _asks(context: Context) -> bool:
    return open_key_vault(context).asks() is not None


def _passphrase(context: Context) -> str | None:
    """Ask for the passphrase or PIN here, where there is a terminal; the daemon has none."""
    prompt = open_key_vault(context).asks()
    return None if prompt is None else context.passphrase(prompt)


def umount(context: Context, args: argparse.Namespace) -> int:
    """``umount [DIR]``: exit 0 when nothing is left to send, else as ``commit_pending``."""
    home = context.home
    wanted = None if args.dir is None else preflight.resolve(args.dir)
    try:
        info = daemon_info(home)
    except MeshkitError as error:
        context.out.note(f"The daemon does not answer ({printable(error.detail)}); unmounting without it.")
        info = None
    if info is not None and info.get("mountpoint") and wanted in (None, info["mountpoint"]):
        place = str(info["mountpoint"])
        data = _stop(context, args, place)
    else:
        place = wanted or preflight.resolve(_configured_point(home))
        if not preflight.is_ours(place):
            if args.if_needed:
                context.out.result({"mountpoint": place, "unmounted": False}, [])
                return 0
            raise MeshkitError("not_mounted", place)
        if not preflight.clear_stale(place):
            _unmount(place, force=args.force)
        data = {}
    _wait_gone(place, args.force)
    if info is not None and not home.wait_released(_RELEASE_SECONDS):
        if not data.get("left"):
            raise MeshkitError("timed_out", f"unmounted, but process {home.holder()} has not ended")
        # It waits for its last request to a slow store. What is left has been made safe before.
        context.out.note(f"Process {home.holder()} has not ended yet; the home is in use until then.")
    return _report(context, place, data)


def _configured_point(home: Home) -> Path:
    try:
        return config.load(home.config_path).mount.point
    except MeshkitError:  # a mount must be endable also when the configuration has become unusable
        return config.default_mount_point()


def _stop(context: Context, args: argparse.Namespace, place: str) -> dict[str, Any]:
    """Have the daemon publish what is unsent, unmount, and let it end; return what it says is left."""
    answer: dict[str, Any] = {}
    with ProgressLine(enabled=context.out.interactive) as progress:

        def ask(method: str, params: dict[str, Any]) -> None:
            try:
                answer.update(client.ask_daemon(context.home, method, params, progress.update) or {})
            except MeshkitError as error:
                # It ends while we ask, as it does once nothing is mounted; what it said before stands.
                if error.code not in ("daemon_unreachable", "operation_aborted"):
                    raise

        if not args.force and preflight.is_ours(place):
            ask("sync", {"timeout": args.timeout})
            # Not left to the daemon, which could only detach: a program that still has a file open here
            # must be a reason to stop, with everything as it was.
            _unmount(place, force=False)
        ask("daemon.stop", {"timeout": args.timeout, "force": args.force})
    preflight.clear_stale(place)
    return answer


def _unmount(place: str, *, force: bool) -> None:
    try:
        preflight.unmount(place, lazy=force)
    except MeshkitError as error:
        if error.code != "mountpoint_busy":
            raise
        raise MeshkitError("mount_in_use", place) from None


def _wait_gone(place: str, force: bool) -> None:
    """Wait until nothing of ours is mounted at ``place``; the kernel tells when the mount table changes."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        while preflight.is_ours(place):
            left = deadline - time.monotonic()
            if left <= 0:
                if force:
                    preflight.unmount(place, lazy=True)
                    return
                raise MeshkitError("timed_out", f"{place} is still mounted")
            poll.poll(min(left, 1.0) * 1000)


def _report(context: Context, place: str, data: dict[str, Any]) -> int:
    left = data.get("left") or []
    lines = [f"Unmounted {printable(place)}." + ("" if left or not data else " Everything is published.")]
    if left:
        lines += left_lines(left)
    context.out.result({**data, "mountpoint": place, "unmounted": True}, lines)
    return exit_code_for(MeshkitError("commit_pending")) if left else 0
