"""The commands behind the control socket, called as the daemon calls them, on a home in process."""

from __future__ import annotations

import pytest
from devices import Device, World

from meshkitfs.daemon.service import Service
from meshkitfs.errors import MeshkitError


def test_a_method_that_reports_progress_is_given_the_way_to_do_so(tmp_path):
    with World() as world:
        device = Device(world, tmp_path / "alice", "alice").start()
        device.create_share()
        events = []
        service = Service(device.session)
        assert world.run(service.call, "sync", {"timeout": 0}, events.append) == {"left": []}
        assert events == [{"done": 0, "total": 0, "unit": "blocks"}]
        assert world.run(service.call, "sync", {}) == {"left": []}  # nobody is looking
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
