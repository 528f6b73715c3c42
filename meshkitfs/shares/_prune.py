"""Pruning: which past versions to keep by rule, and the owner's record of those that are given up.

Giving a version up deletes nothing. It only says that the version need not be kept; `_collect` deletes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import trio

from meshkitfs.core.records import Retention
from meshkitfs.errors import MeshkitError
from meshkitfs.shares._history import Version
from meshkitfs.shares._publishing import PUBLISH_DEADLINE_S
from meshkitfs.shares._share import Share

__all__ = ["RANGES_MAX", "Pruned", "Rules", "choose", "give_up", "prune", "require_owner"]

# As many as a record may hold.
RANGES_MAX = 10_000
_TRIES = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Rules:
    """What to keep; the rules are united.

    ``last``: that many newest versions. ``hourly`` to ``yearly``: the newest version of each of the last so
    many hours (days, weeks from Monday, months, years) that have any, in UTC. ``within``: everything of the
    last so many seconds before the newest version. 0 means that there is no such rule.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is no rule at all."""
        return self == Rules()


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` decided: every version that was kept before, newest first, with why it stays."""

    reasons: list[tuple[Version, list[str]]]

    @property
    def given_up(self) -> list[Version]:
        """The versions that no rule keeps, newest first."""
        return [version for version, why in self.reasons if not why]


def require_owner(share: Share) -> None:
    """Raise unless this home owns ``share`` and holds it live (``not_owner``, ``not_supported``)."""
    if not share.row.mine:
        raise MeshkitError("not_owner", f"'{share.name}' belongs to {share.row.owner_handle}")
    if share.row.grant != "live":
        raise MeshkitError("not_supported", f"'{share.name}' is a snapshot: it has one version")


def choose(versions: Sequence[Version], rules: Rules, now: int) -> list[tuple[Version, list[str]]]:
    """Return ``versions`` (given oldest first) newest first, each with the rules that keep it.

    The newest is always kept.
    """
    newest_first = list(reversed(versions))
    why: dict[int, list[str]] = {version.number: [] for version in versions}
    if newest_first:
        why[newest_first[0].number].append("newest")
        for version in newest_first[: rules.last]:
            why[version.number].append("last")
    buckets = (
        ("hourly", rules.hourly, "%Y-%m-%d %H"), ("daily", rules.daily, "%Y-%m-%d"),
        ("weekly", rules.weekly, "%G-%V"), ("monthly", rules.monthly, "%Y-%m"),
        ("yearly", rules.yearly, "%Y"),
    )  # fmt: skip
    for name, count, form in buckets:
        seen: set[str] = set()
        for version in newest_first:
            bucket = _moment(version.time).strftime(form)
            if bucket not in seen and len(seen) < count:
                why[version.number].append(name)
            if bucket not in seen:
                seen.add(bucket)
            if len(seen) > count:
                break
    if rules.within and newest_first:
        # A writer whose clock is ahead must not make everything else old.
        since = min(newest_first[0].time, now) - rules.within
        for version in newest_first:
            if version.time >= since:
                why[version.number].append("within")
    return [(version, why[version.number]) for version in newest_first]


def _moment(seconds: int) -> datetime:
    """Return a signed record's time; one beyond what can be reckoned with counts as the last moment."""
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def give_up(old: Iterable[Range], versions: Sequence[Version], gone: set[int], now: int) -> tuple[int, ...]:
    """Return the next record's flat list: what ``old`` has, and the versions numbered ``gone`` as of ``now``.

    ``versions`` are all there ever were, oldest first. Neighbours become one range: always if they were
    given up at the same time, and if there would be too many ranges also otherwise, as of the later time.
    Raises ``invalid_argument`` if that does not help.
    """
    before = list(old)
    firsts = [first for first, _, _ in before]

    def gone_before(number: int) -> bool:
        at = bisect_right(firsts, number) - 1
        return at >= 0 and number <= before[at][1]

    open_ones = [version.number for version in versions if not gone_before(version.number)]
    fresh = [(number, number, now) for number in open_ones if number in gone]
    kept = [number for number in open_ones if number not in gone]
    ranges = sorted([*before, *fresh])
    joined = _join(ranges, kept, any_time=False)
    if len(joined) > RANGES_MAX:
        joined = _join(ranges, kept, any_time=True)
    if len(joined) > RANGES_MAX:
        raise MeshkitError(
            "invalid_argument", f"more than {RANGES_MAX} gaps between versions: keep fewer single ones"
        )
    return tuple(number for part in joined for number in part)


def _join(ranges: Sequence[Range], kept: Sequence[int], *, any_time: bool) -> list[Range]:
    """Make one of neighbours that no kept version stands between."""
    joined: list[Range] = []
    for first, last, when in ranges:
        if joined:
            low, high, earlier = joined[-1]
            at = bisect_right(kept, high)
            apart = at < len(kept) and kept[at] < first
            if not apart and (earlier == when or any_time):
                joined[-1] = (low, last, max(earlier, when))
                continue
        joined.append((first, last, when))
    return joined


async def prune(share: Share, rules: Rules, *, dry_run: bool) -> Pruned:
    """Give up the versions of ``share`` that no rule keeps; with ``dry_run`` only find out which.

    Raises ``not_owner``; ``invalid_argument`` without a rule; ``head_conflict`` if others prune at the same
    time again and again; what the metadata store raises.
    """
    require_owner(share)
    if rules.empty:
        raise MeshkitError("invalid_argument", "no rule says what to keep; give at least one --keep-...")
    services = share.services
    for attempt in range(_TRIES):
        history = share.history
        await history.refresh(await share.past.use("reshare", current=True))
        now = int(services.wall())
        result = Pruned(choose(history.kept, rules, now))
        old = history.retention
        gone = {version.number for version in result.given_up}
        ranges = give_up(old.ranges() if old is not None else (), history.versions, gone, now)
        if dry_run or not gone:
            break
        seq = old.seq + 1 if old is not None else 1
        record = Retention(share.row.share, seq, ranges, now).sign(services.signing())
        try:
            with trio.fail_after(PUBLISH_DEADLINE_S):
                await services.metadata.retain(share.row.share, record)
        except trio.TooSlowError:
            raise MeshkitError("metadata_unavailable", "no answer in time") from None
        except MeshkitError as error:
            if error.code != "head_conflict" or attempt == _TRIES - 1:
                raise
            continue
        await history.refresh(await share.past.use("reshare", current=True))
        break
    return result
