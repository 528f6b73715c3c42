"""What the process needs while it serves a mount: three settings, made for the time of a mount only."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KICK_SECONDS", "SWITCH_SECONDS", "guarded_process"]

KICK_SECONDS = 0.25
SWITCH_SECONDS = 50e-6


def _kick(signum: int, frame: object) -> None:
    """Do nothing: that the signal came is what ends a blocking read."""


class _NotOurFault(logging.Filter):
    """Drop pyfuse3's error lines about answers to clients that were killed before they got one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "fuse_reply_* failed with No such file or directory" not in record.getMessage()


@contextmanager
def guarded_process() -> Iterator[None]:
    """Guard this process against three ways in which a mount makes a Python process stop or crawl.

    - A client killed between our poll and our read takes its request back, and pyfuse3 then blocks in
      read(2) with the GIL held: every task and thread stands still until somebody happens to use the
      mount. A periodic signal interrupts that read, and pyfuse3 knows what to do with EINTR.
    - A thread that computes keeps the GIL for the switch interval, 5 ms by default, and every request
      waits for it. A shorter interval costs such a thread little and divides the wait by a hundred.
    - A killed client is normal and is not worth an error in the log.

    Must be entered in the main thread (Python delivers signals there); raises RuntimeError elsewhere.
    The process gets SIGALRM from then on and must not use it or ITIMER_REAL for something else.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a mount has to be served from the main thread")
    interval = sys.getswitchinterval()
    log_filter = _NotOurFault()
    pyfuse3_log = logging.getLogger("pyfuse3")
    handler = signal.signal(signal.SIGALRM, _kick)
    try:
        sys.setswitchinterval(SWITCH_SECONDS)
        pyfuse3_log.addFilter(log_filter)
        signal.setitimer(signal.ITIMER_REAL, KICK_SECONDS, KICK_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        pyfuse3_log.removeFilter(log_filter)
        sys.setswitchinterval(interval)
