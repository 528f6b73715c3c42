"""A real control server over a real socket, in a thread, with a small service behind it.

What stands in for the filesystem is only the service: the socket, the protocol, the lock and the client
are the product's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import trio

from meshkitfs.daemon import control
from meshkitfs.daemon.home import Home


class SmallService:
    """Has the shape of `meshkitfs.daemon.service.Service`; answers are set by the test."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.finished = threading.Event()
        self.go_on = threading.Event()

    async def call(
        self, method: str, params: dict[str, Any], progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        self.calls.append((method, params))
        answer = self.answers.get(method, {"method": method})
        if answer == "wait":
            self.started.set()
            try:
                await trio.to_thread.run_sync(self.go_on.wait, abandon_on_cancel=True)
            except trio.Cancelled:
                self.cancelled.set()
                raise
            self.finished.set()
            return {"waited": True}
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            return answer(params, progress)
        return answer


class RunningDaemon:
    """The server's side of a test; `stop` ends it from any thread."""

    def __init__(self, home: Home, service: SmallService, mountpoint: str | None, owner: int | None) -> None:
        self.home = home
        self.service = service
        self.mountpoint = mountpoint
        self.owner = owner
        self.stop_result: dict[str, Any] = {"left": []}
        self.stop_params: dict[str, Any] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(20)
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        if self._thread.is_alive() and self._token is not None and self._scope is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self.home.hold():
                trio.run(self._main)
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        stopped = trio.Event()

        async def stop(params: dict[str, Any], progress: control.Progress) -> dict[str, Any]:
            progress({"stage": "publishing", "done": 1, "total": 1})
            self.stop_params = params
            stopped.set()
            return self.stop_result

        with trio.CancelScope() as self._scope:
            self._token = trio.lowlevel.current_trio_token()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve, stop)
                self._ready.set()
                await stopped.wait()
                nursery.cancel_scope.cancel()

    async def _serve(self, stop: control.Stop, task_status: trio.TaskStatus[None]) -> None:
        await control.serve(
            self.home,
            self.service.call,
            info=lambda: {"mountpoint": self.mountpoint},
            stop=stop,
            owner=self.owner,
            task_status=task_status,
        )


@contextlib.contextmanager
def running(
    root: Any, service: SmallService | None = None, mountpoint: str | None = None, owner: int | None = None
):
    """Serve a home at ``root``, which is made to look initialized, until the block ends."""
    home = Home(root)
    home.ensure()
    home.identity_file.touch(mode=0o600)
    daemon = RunningDaemon(home, service or SmallService(), mountpoint, owner)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.service.go_on.set()
        daemon.stop()
