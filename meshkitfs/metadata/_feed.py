"""Knowing that something changed at a service: a long poll in the background, and a number that it moves.

A service that answers is believed when it says that something changed. When it says nothing, that is believed
for a limited time only: `TRUST_S` after the last answer was asked for, the number moves by itself every
`STEP_S`; and for each share it moves `RECHECK_S` after the share was last asked about, whatever the feed
says. So the feed saves requests, and no proof rests on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.metadata._wire import b64, from_b64, read_fields
from meshkitfs.net import backoff

__all__ = ["POLL_DEADLINE_S", "RECHECK_S", "STEP_S", "TRUST_S", "WAIT_S", "Feed", "News", "read_news"]

_log = logging.getLogger(__name__)

# How long the service may hold a poll when there is no news, and when it is late with its answer.
WAIT_S: Final = 10
POLL_DEADLINE_S: Final = 15.0
# How long after it was asked for an answer is relied upon: two polls and some time to connect again.
TRUST_S: Final = 30.0
# How often the number moves while nothing is heard: more would help nobody and hurt a service in trouble.
STEP_S: Final = 10.0
# How long silence about one share is believed.
RECHECK_S: Final = 60.0
# Between two polls: what is asked about meanwhile goes along, and a service that talks nonsense has rest.
PAUSE_S: Final = 0.1
# A command that is over at once needs no feed.
FIRST_S: Final = 0.3
_CURSOR_MAX: Final = 200
# As many shares go into one poll; of more, the ones that were asked about last.
SHARES_MAX: Final = 1000

# Goes on while the machine sleeps: a laptop that wakes up must not rely on what it heard the day before.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class News:
    """An answer of the feed: which shares changed since the cursor that was sent, and the next cursor."""

    cursor: str | int
    shares: tuple[bytes, ...]
    mailbox: bool


def read_news(value: Any) -> News:
    """Return the news in an answer. Raises invalid_argument."""
    fields = read_fields(value, ("cursor", "shares", "mailbox"), "news")
    cursor, shares, mailbox = fields["cursor"], fields["shares"], fields["mailbox"]
    sane = type(cursor) is int or (isinstance(cursor, str) and 0 < len(cursor) <= _CURSOR_MAX)
    if not sane or not isinstance(shares, list) or type(mailbox) is not bool:
        raise MeshkitError("invalid_argument", "news without a cursor, shares and mailbox")
    return News(cursor, tuple(from_b64(share, "share") for share in shares), mailbox)


def _now() -> float:
    return time.clock_gettime(_CLOCK)


class Feed:
    """``ask`` sends one poll: its body, and how many seconds the answer may take; it returns the news.

    `tick`, `watch`, `asked` and `changed` never wait, and belong to the thread in which `run` runs.
    """

    def __init__(
        self,
        ask: Callable[[dict[str, Any]], Awaitable[News]],
        mailbox: bytes | None,
        clock: Callable[[], float] = _now,
    ) -> None:
        self._ask = ask
        # Whose letters are watched for; another one counts from the next request on.
        self.mailbox = mailbox
        self.clock = clock
        self.mail = 0
        self._moved = 0
        self._news: dict[bytes, int] = {}
        # When each share was last asked about, or its number last moved for want of that.
        self._looked: dict[bytes, float] = {}
        self._cursor: str | int | None = None
        # Up to when what has been heard is complete; None before the first answer.
        self._complete: float | None = None
        self._stepped = float("-inf")
        self._asking: frozenset[bytes] = frozenset()
        self._scope: trio.CancelScope | None = None
        self._problem = ""
        self.heard = trio.Event()

    @property
    def live(self) -> bool:
        """Whether silence means that nothing changed."""
        return self._complete is not None and self.clock() - self._complete <= TRUST_S

    @property
    def problem(self) -> str:
        """Why the last poll failed; empty when it did not."""
        return self._problem

    def tick(self, share: bytes | None = None, also: Sequence[bytes] = ()) -> int:
        """Return a number that moves when ``share`` (None: anything) or one of ``also`` may have changed."""
        now = self.clock()
        if not self.live and now - self._stepped >= STEP_S:
            self._stepped = now
            self._moved += 1
        if share is None:
            return self._moved + sum(self._news.values()) + self.mail
        return self._moved + sum(self._number(item, now) for item in (share, *also))

    def _number(self, item: bytes, now: float) -> int:
        looked = self._looked.get(item)
        if looked is not None and now - looked > (RECHECK_S if item in self._asking else STEP_S):
            self._looked[item] = now
            self.changed(item)
        return self._news.get(item, 0)

    def asked(self, share: bytes) -> None:
        """Somebody asks about ``share`` now: from here on, its changes are of interest."""
        if share not in self._looked and self._scope is not None:
            self._scope.cancel()
        self._looked[share] = self.clock()

    def changed(self, share: bytes) -> None:
        """Note that ``share`` has changed: by this home itself, or as far as anybody can tell."""
        self._news[share] = self._news.get(share, 0) + 1

    async def run(self) -> None:
        """Poll for ever. A feed that fails is asked again, later and later up to about 10 s."""
        await trio.sleep(FIRST_S)
        failures = 0
        while True:
            try:
                early = await self._poll()
            except MeshkitError as error:
                if self._problem != error.code:
                    _log.warning("the change feed is away: %s (%s)", error.code, error.detail)
                self._problem = error.code
                failures += 1
            except Exception:
                # A defect here must not take the mount down; without a feed it only asks more often.
                _log.exception("the change feed failed in a way nobody foresaw")
                self._problem = "internal_error"
                failures += 1
            else:
                if self._problem:
                    _log.info("the change feed is back")
                self._problem = ""
                # An answer that says nothing, before its time, is not what was asked for.
                failures = failures + 1 if early else 0
            await trio.sleep(PAUSE_S + (backoff(failures) if failures else 0.0))

    async def _poll(self) -> bool:
        """Ask once and take the answer in; returns whether it came too early, with nothing in it."""
        latest = sorted(self._looked, key=self._looked.__getitem__, reverse=True)
        self._asking = frozenset(latest[:SHARES_MAX])
        sent, first = self.clock(), self._cursor is None
        body = {
            "shares": [b64(share) for share in sorted(self._asking)],
            "mailbox": b64(self.mailbox),
            "after": self._cursor,
            "wait": 0 if first else WAIT_S,
        }
        with trio.CancelScope() as self._scope:
            news = await self._ask(body)
        if self._scope.cancelled_caught:
            return False  # somebody asks about more; the cursor stands where it was
        self._scope = None
        self._cursor = news.cursor
        self._complete = sent
        self.heard.set()
        if first:
            # What happened before the first cursor, nobody has told.
            self._moved += 1
            return False
        shares = self._asking.intersection(news.shares)
        for share in shares:
            self.changed(share)
        if news.mailbox:
            self.mail += 1
        return not shares and not news.mailbox and self.clock() - sent < WAIT_S / 2
