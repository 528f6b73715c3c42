"""How much anybody may ask of a service for, on a clock of the test's: t1_service counts over real sockets."""

import pytest
import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.server import _limits
from meshkitfs.server._gate import _bounded
from meshkitfs.server._limits import Buckets, Memory, Rate, TooManyError


class Clock:
    now = 5000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def taken(buckets, name, cost=1.0):
    """None if it was let through, else after how many seconds to come again."""
    try:
        buckets.take(name, cost)
    except TooManyError as error:
        assert error.code == "rate_limited"
        return error.retry_after
    return None


def test_tokens_come_back_with_time(clock):
    buckets = Buckets(Rate(per_second=2, burst=4), "address", clock)
    assert [taken(buckets, "a") for _ in range(5)] == [None] * 4 + [1]
    clock.now += 0.25
    assert taken(buckets, "a") == 1  # half a token is none, and asking costs nothing
    clock.now += 0.25
    assert [taken(buckets, "a") for _ in range(2)] == [None, 1]
    clock.now += 3600
    assert [taken(buckets, "a") for _ in range(5)] == [None] * 4 + [1]  # never more than the burst


def test_retry_after_is_when_it_works(clock):
    buckets = Buckets(Rate(per_second=0.5, burst=4), "identity", clock)
    assert taken(buckets, "a", 3.0) is None
    wait = taken(buckets, "a", 3.0)
    assert wait == 4
    clock.now += wait - 1
    assert taken(buckets, "a", 3.0) == 1
    clock.now += 1
    assert taken(buckets, "a", 3.0) is None


def test_what_costs_more_than_there_can_be_costs_all_of_it(clock):
    buckets = Buckets(Rate(per_second=1, burst=5), "identity", clock)
    assert [taken(buckets, "a", 25.0) for _ in range(2)] == [None, 5]
    clock.now += 4
    assert taken(buckets, "a", 25.0) == 1
    clock.now += 1
    assert [taken(buckets, "a", 25.0), taken(buckets, "a")] == [None, 1]


def test_what_came_in_badly_is_charged_also_where_nothing_is_left(clock):
    buckets = Buckets(Rate(per_second=1, burst=3), "address", clock)
    buckets.charge("a", 2.0)
    assert [taken(buckets, "a") for _ in range(2)] == [None, 1]
    buckets.charge("a", 100.0)
    clock.now += 1  # a debt would have lasted
    assert taken(buckets, "a") is None


def test_each_name_has_its_own_and_the_oldest_are_forgotten(clock, monkeypatch):
    monkeypatch.setattr(_limits, "_REMEMBERED", 3)
    buckets = Buckets(Rate(per_second=1, burst=1), "address", clock)
    assert [taken(buckets, name) for name in "abc"] == [None] * 3
    assert [taken(buckets, name) for name in "abc"] == [1] * 3
    assert taken(buckets, "d") is None  # no more names than that are remembered: the first is not any more
    assert [taken(buckets, name) for name in "dc"] == [1, 1]
    assert taken(buckets, "a") is None


def test_room_for_bodies_is_all_requests_together():
    memory = Memory(100)
    memory.take(60)
    with pytest.raises(MeshkitError) as caught:
        memory.take(41)
    assert caught.value.code == "metadata_unavailable"
    memory.take(40)
    memory.give(60)
    memory.take(60)


def test_what_needs_no_signature_has_no_body():
    """Whatever a route would make of it: who sends one is cut off, who has gone is gone."""
    coming = [{"type": "http.request", "body": b""}, {"type": "http.request", "body": b"x"}]
    coming += [{"type": "http.disconnect"}]

    async def receive():
        return coming.pop(0)

    async def three():
        bounded = _bounded(receive)
        return [(await bounded())["type"] for _ in range(3)]

    assert trio.run(three) == ["http.request", "http.disconnect", "http.disconnect"]
