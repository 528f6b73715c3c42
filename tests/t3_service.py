"""The commands behind the control socket, called as the daemon calls them, on a home in process."""

from __future__ import annotations

import threading
import time

import pytest
import trio
from devices import Device, World, pattern

from meshkitfs.daemon import describe
from meshkitfs.daemon.rotation_schedule import keys_since
from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError


def until(world, condition, what):
    """Let the loop of ``world`` run until ``condition`` holds there."""

    async def wait():
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, what
            await trio.to_thread.run_sync(time.sleep, 0.001)

    world.run(wait)


def test_a_method_that_reports_progress_is_given_the_way_to_do_so(tmp_path):
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        events = []
        service = Service(device.session)
        assert world.run(service.call, "sync", {"timeout": 0}, events.append) == {"left": []}
        assert events == [], "nothing was to be done, and still somebody was told of it"
        assert world.run(service.call, "sync", {}) == {"left": []}  # nobody is looking
        device.close()


def go_on(world):
    """A little time passes; worker threads get some of the machine's, or the world's deadlines would outrun them."""
    world.pass_time(0.05)
    time.sleep(0.002)


def test_sync_waits_for_a_store_that_is_away_as_long_as_it_is_told_to(tmp_path):
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        view, share, service = device.view(), device.share(), Service(device.session)
        view.pwrite(view.create("file"), 0, pattern(1, 300 << 10))
        device.blocks.rename(tmp_path / "away")
        # Without waiting, one try.
        (left,) = world.run(service.call, "sync", {"timeout": 60})["left"]
        assert (left["state"], left["reason"]) == ("stuck", "provider_request_failed")
        short = world.start(service.call, "sync", {"timeout": 3, "wait": True})
        while not short.done.is_set():
            go_on(world)
        assert short.wait()["left"][0]["reason"] == "provider_request_failed"
        events = []
        long = world.start(service.call, "sync", {"timeout": 0, "wait": True}, events.append)
        tries = share._started
        while share._started < tries + 3 or not events:
            go_on(world)
        assert not long.done.is_set()
        assert events[-1] == {
            "stage": "waiting (provider_request_failed)", "done": 0, "total": left["bytes"], "unit": "bytes",
        }  # fmt: skip
        assert left["bytes"] > 300 << 10
        (tmp_path / "away").rename(device.blocks)
        while not long.done.is_set():
            go_on(world)
        assert long.wait() == {"left": []}
        device.close()


def test_sync_does_not_wait_for_what_will_not_pass(tmp_path):
    with World() as world:
        alice = Device(world, tmp_path / "alice", "alice").start()
        bob = Device(world, tmp_path / "bob", "bob", beside=alice).start()
        alice.create_share()
        alice.grant("first", bob)
        view = bob.view()
        view.pwrite(view.create("file"), 0, b"unsent")
        alice.grant_again("first", bob, "read")
        # The clock stands still: had it waited, it would not come back.
        (left,) = world.run(Service(bob.session).call, "sync", {"timeout": 300, "wait": True})["left"]
        assert left["reason"] == "right_not_granted"
        bob.close()
        alice.close()


def test_what_has_arrived_is_told_while_it_does(tmp_path, monkeypatch):
    """Bytes, not versions: a long upload is one version, and somebody looks at its bar."""
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        view, share, service = device.view(), device.share(), Service(device.session)
        view.pwrite(view.create("file"), 0, pattern(1, 4 << 20))
        store, gate = device.session.store, trio.Event()
        sync, asked = store.sync, []

        async def held_up():
            asked.append(1)
            await gate.wait()
            await sync()

        monkeypatch.setattr(store, "sync", held_up)
        events = []
        task = world.start(service.call, "sync", {"timeout": 0, "wait": True}, events.append)
        until(world, lambda: asked, "all was given to the store")
        (left,) = describe.left(device.session)
        assert left["state"] == "uploading"
        assert left["arrived"] == left["blocks"]
        assert left["arrived_bytes"] == left["bytes"] > 4 << 20
        world.pass_time(1)
        assert events[-1] == {"stage": "publishing", "done": left["bytes"], "total": events[-1]["total"],
                              "unit": "bytes"}  # fmt: skip
        assert device.session.book.find("first").uploading == (left["arrived"], left["arrived_bytes"])
        world._token.run_sync_soon(gate.set)
        assert task.wait() == {"left": []}
        assert share.uploading is None
        pending = describe.pending(device.session)
        assert pending == {"blocks": 0, "bytes": 0, "memory": 0}
        device.close()


def test_whole_shares_only(tmp_path):
    """A path in a share is no name for all of it: sealing everything again is not what was asked for."""
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        service = Service(device.session)
        for method, params in (("share.reencrypt", {}), ("share.revoke", {"recipient": "bob"})):
            with pytest.raises(MeshkitError) as refused:
                world.run(service.call, method, {"share": "first/letters"} | params)
            assert (refused.value.code, "'letters'" in refused.value.detail) == ("invalid_argument", True)
        assert world.run(service.call, "share.reencrypt", {"share": "first/"})["complete"]
        device.close()


def test_sync_does_not_wait_for_what_is_written_meanwhile(tmp_path):
    """A log that is written to all the time: what was there before is published, and that is all it waits for."""
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        view = device.view()
        view.write("before", b"before")
        fh = view.create("log")
        share, events, ended = device.share(), [], threading.Event()

        async def write_on():
            while not ended.is_set():
                await device.fs.write(fh, 0, b"line")
                await trio.lowlevel.checkpoint()

        writer = world.start(write_on)
        sync = world.start(Service(device.session).call, "sync", {"timeout": 0}, events.append)
        try:
            sync.wait()
        finally:
            ended.set()
            writer.wait()
        assert share.counters.heads == 1
        assert [item["share"] for item in sync.result["left"]] == ["first"]
        device.crash()
        device.start()
        assert device.view().read("before") == b"before"
        device.close()


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("nosuch", {}),
        ("sync", {"nosuch": 1}),
        ("sync", {"progress": 1}),
        ("status", {"progress": 1}),
        ("share.show", {}),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_happens(tmp_path, method, params):
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        with pytest.raises(MeshkitError) as refused:
            world.run(Service(device.session).call, method, params, lambda _: None)
        assert refused.value.code == "invalid_argument"
        device.close()


def test_status_says_how_many_have_a_share_and_when_keys_are_replaced(tmp_path):
    with World() as world:
        alice = Device(world, tmp_path / "alice", "alice").start()
        bob = Device(world, tmp_path / "bob", "bob", beside=alice).start()
        alice.create_share()
        service = Service(alice.session)

        def told():
            data = world.run(service.call, "status", {})
            return data["rotation"], [share["members"] for share in data["shares"]]

        assert told() == ({"every": None, "next": None}, [0])
        alice.grant("first", bob)
        world.run(service.call, "identity.schedule", {"every": "30d"})
        due = keys_since(alice.session.identity) + 30 * 86400
        assert told() == ({"every": 30 * 86400, "next": due}, [1])
        world.run(service.call, "share.revoke", {"share": "first", "recipient": "bob"})
        assert told()[1] == [0]
        # Of other people's shares nobody here knows.
        assert [
            share["members"] for share in world.run(Service(bob.session).call, "status", {})["shares"]
        ] == [None]
        bob.close()
        alice.close()
