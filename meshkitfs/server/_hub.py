"""Who waits for which share or mailbox to change, and waking them: also when another instance changed it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import trio

from meshkitfs.metadata.service import Database

__all__ = ["Hub"]


class Hub:
    """Belongs to one run of trio. `run` listens to the database until it is cancelled."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: defaultdict[bytes, set[trio.Event]] = defaultdict(set)
        self.stopping = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wake those who wait whenever the database announces something."""
        token = trio.lowlevel.current_trio_token()

        def heard(subject: bytes | None) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self.wake, subject)

        forget = self._database.listen(heard)
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            forget()

    @contextlib.contextmanager
    def waiting(self, subjects: Sequence[bytes]) -> Iterator[trio.Event]:
        """An event that is set when one of the subjects may have changed since."""
        event = trio.Event()
        if self.stopping:
            event.set()
        for subject in subjects:
            self._waiting[subject].add(event)
        try:
            yield event
        finally:
            for subject in subjects:
                self._waiting[subject].discard(event)
                if not self._waiting[subject]:
                    del self._waiting[subject]

    def wake(self, subject: bytes | None) -> None:
        """Wake those who wait for the subject; None: everybody."""
        everybody = list(self._waiting.values())
        for events in everybody if subject is None else [self._waiting.get(subject, set())]:
            for event in events:
                event.set()

    def stop(self) -> None:
        """Nobody waits any more."""
        self.stopping = True
        self.wake(None)
