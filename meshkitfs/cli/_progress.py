"""A progress line on stderr for calls that take long; nothing at all when nobody is looking."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ._output import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ProgressLine"]


class ProgressLine:
    """Shows progress events: ``{"stage": text, "done": int, "total": int | None, "unit": "bytes" | ...}``.

    Drawn from the first event on, so that quick calls draw nothing and do not load the drawing library.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, event: dict[str, Any]) -> None:
        """Take one event; unknown or missing fields do no harm."""
        if not self._enabled:
            return
        if self._progress is None:
            self._progress = _bar(event.get("unit") == "bytes")
            self._task = self._progress.add_task("", total=None)
            self._progress.start()
        assert self._task is not None  # set together with the bar
        self._progress.update(
            self._task,
            description=printable(event.get("stage", "working")),
            completed=_number(event.get("done")),
            total=_number(event.get("total")),
        )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _bar(of_bytes: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        # markup=False: a share's name is text, not instructions for the terminal.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True) if of_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
