"""``status --watch``: the state of the mount as it changes, on the whole terminal or as lines.

The running daemon is asked once a second; it answers from memory. No home is opened for this and no
passphrase asked, so a daemon that is locked, or away for a while, is something to show and no reason to end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..daemon import client
from ..errors import MeshkitError
from ._colour import Tone, Toned
from ._context import Context
from ._output import clock, count, printable
from ._shown import amount

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["changes", "watch"]

_INTERVAL_S: Final = 1.0
# Shorter than elsewhere: whoever watches wants to be told that it does not answer.
_SILENCE_S: Final = 3.0
_AWAY: Final = "The daemon does not run. Waiting for it ('meshkitfs mount' starts it)."
_STYLES: Final = {
    Tone.GOOD: "green",
    Tone.WARN: "yellow",
    Tone.BAD: "red",
    Tone.ERROR: "bold red",
    Tone.HEADING: "bold",
    Tone.ASIDE: "dim",
}

Show = Callable[[Mapping[str, Any]], list[str]]


def watch(context: Context, show: Show) -> int:
    """Show until told to end; ``show`` makes the lines of ``status`` of what the daemon says.

    On a terminal until ``q`` or Ctrl-C, which is the ordinary way to end it: 0. Otherwise (a pipe, a
    terminal that cannot place text, ``--json``) what changed is printed, until Ctrl-C.
    """
    context.home.require_initialized()
    if not context.out.json_mode and _is_screen():
        _on_screen(context, show)
        return 0
    _as_lines(context)
    return 0


def _is_screen() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _look(context: Context) -> tuple[dict[str, Any], str]:
    """Return what the daemon says, and why it says nothing."""
    try:
        data = client.ask_daemon(context.home, "status", {}, silence=_SILENCE_S)
    except MeshkitError as error:
        return {}, f"{error.reason.sentence} ({printable(error.detail)})"
    return (data, "") if data is not None else ({}, _AWAY)


# -- lines ------------------------------------------------------------------------------------------------


def _as_lines(context: Context) -> None:
    before: dict[str, Any] = {}
    why = ""
    while True:
        data, away = _look(context)
        if context.out.json_mode:
            # Counters and times of day move by themselves; what they count is in the rest.
            if _settled(data) != _settled(before) or (away and not why):
                context.out.result(data, [])
        else:
            lines = [away] if away else changes(before, data)
            if not away or away != why:
                context.out.result({}, [f"{clock(time.time())}  {line}" for line in lines])
        sys.stdout.flush()
        before, why = data, away
        time.sleep(_INTERVAL_S)


def _settled(data: Mapping[str, Any]) -> dict[str, Any]:
    shares = [
        {name: value for name, value in share.items() if name != "freshness"}
        for share in data.get("shares") or []
    ]
    left = [
        {name: value for name, value in item.items() if name != "age_seconds"}
        for item in data.get("left") or []
    ]
    return {**data, "shares": shares, "left": left, "counters": None, "sources": None}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what is not as it was, a line each: of a daemon just found, all there is."""
    lines = []
    if before.get("mountpoint") != after.get("mountpoint") or before.get("pid") != after.get("pid"):
        lines.append(f"mounted at {printable(after.get('mountpoint') or '(nowhere)')}")
    if bool(before.get("locked")) != bool(after.get("locked")):
        lines.append("locked" if after.get("locked") else "unlocked")
    was, now = _shares(before), _shares(after)
    lines += [f"{printable(name)}: {text}" for name, text in now.items() if was.get(name) != text]
    # While it is locked it does not tell, which does not mean that they are gone.
    if not after.get("locked"):
        lines += [f"{printable(name)}: gone" for name in was if name not in now]
    if _queue(before) != _queue(after):
        lines.append(f"unsent: {_queue(after)}")
    known = {_entry(item) for item in before.get("errors") or []}
    for item in after.get("errors") or []:
        if _entry(item) not in known:
            lines.append(f"{printable(item.get('path', ''))}: {printable(item.get('code', ''))}")
    return lines


def _entry(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return (item.get("time"), item.get("path"), item.get("code"))


def _shares(data: Mapping[str, Any]) -> dict[str, str]:
    return {
        str(share.get("name")): f"{printable(share.get('reason') or share.get('state') or '?')}, "
        f"version {share.get('version')}{_members(share)}"
        for share in data.get("shares") or []
    }


def _members(share: Mapping[str, Any]) -> str:
    number = share.get("members")
    return "" if number is None else f", {count(number, 'member', 'members')}"


def _queue(data: Mapping[str, Any]) -> str:
    return amount(data.get("pending") or {})


# -- the whole terminal -----------------------------------------------------------------------------------


def _on_screen(context: Context, show: Show) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False)
    lines: list[str] = []
    with (
        _keys() as waiting,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                data, away = _look(context)
                lines = [away] if away else show(data)
                due = time.monotonic() + _INTERVAL_S
            live.update(_drawn(console, lines), refresh=True)
            if waiting(max(0.0, due - time.monotonic())) in (b"q", b"Q"):
                return


def _drawn(console: Console, lines: list[str]) -> RenderableType:
    """Return the lines that have room, each cut at the edge, below one that says what this is."""
    from rich.text import Text

    room = max(1, console.height - 2)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} lines more"]
    title = f"meshkitfs status  {time.strftime('%H:%M:%S')}  (q ends)"
    text = Text("\n".join([title, "", *lines]), no_wrap=True, overflow="ellipsis")
    text.stylize("bold", 0, len(title))
    at = len(title) + 2
    for line in lines:
        for start, end, tone in line.spans if isinstance(line, Toned) else ():
            text.stylize(_STYLES[tone], at + start, at + end)
        at += len(line) + 1
    return text


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Read single keys without showing them; yield what waits for one, for so many seconds or a new size.

    Ctrl-C and SIGTERM read as ``q``. They are noted and not raised: an exception that comes at any place may
    be swallowed there, or leave the terminal as it is.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    told: list[int] = []

    def end(number: int, _frame: object) -> None:
        told.append(number)

    handlers = {signal.SIGWINCH: _nothing, signal.SIGTERM: end, signal.SIGINT: end}
    replaced = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def waiting(seconds: float) -> bytes:
        # One that comes between the two looks is in the pipe.
        ready, _, _ = select.select([descriptor, reader], [], [], 0.0 if told else seconds)
        if reader in ready:
            os.read(reader, 64)
        if told:
            return b"q"
        return (os.read(descriptor, 1) or b"q") if descriptor in ready else b""

    try:
        changed = termios.tcgetattr(descriptor)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        changed[6][termios.VSUSP] = b"\0"  # stopped, it would leave its screen to the shell
        termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
        yield waiting
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, old in replaced.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(woken)
        os.close(reader)
        os.close(writer)


def _nothing(_number: int, _frame: object) -> None:
    """A handler of its own, so that the signal reaches the pipe and ends the wait."""
