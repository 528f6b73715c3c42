"""What ``doctor`` says of the places of a home: what was found, why it matters, what to do."""

from __future__ import annotations

import json
import os
import time
from collections import namedtuple

import pytest

from meshkitfs.cli import _doctor, _doctor_places
from meshkitfs.daemon.home import Home
from meshkitfs.errors import TABLE, MeshkitError

Usage = namedtuple("Usage", "total used free")
MIB = 1 << 20


@pytest.fixture
def home(tmp_path):
    made = Home(tmp_path / "home")
    made.ensure()
    (tmp_path / "mnt").mkdir()
    made.config_path.write_text(json.dumps({"version": 1, "mount": {"point": str(tmp_path / "mnt")}}))
    return made


def point(home):
    return next(found for found in _doctor_places.mount_point(home) if found.name == "mount point")


def test_a_mount_point_that_cannot_be_used_is_found_before_somebody_mounts(home, tmp_path):
    place = tmp_path / "mnt"
    assert (point(home).status, point(home).remedy) == ("info", "")
    (place / "file").touch()
    found = point(home)
    assert (found.status, found.remedy) == ("warn", TABLE["mountpoint_not_empty"].remedy)
    assert "'file'" in found.detail
    assert "hidden" in found.detail  # why it matters
    (place / "file").unlink()
    place.rmdir()
    assert point(home).status == "info"  # 'mount' makes it
    place.touch()
    assert (point(home).status, point(home).remedy) == ("warn", TABLE["mountpoint_missing"].remedy)
    place.unlink()
    place.symlink_to(home.root)
    assert point(home).remedy == TABLE["mountpoint_inside_state"].remedy


def test_a_mount_of_another_kind_is_named(home):
    home.config_path.write_text(json.dumps({"version": 1, "mount": {"point": "/proc"}}))
    found = point(home)
    assert (found.status, "proc" in found.detail) == ("warn", True)
    assert "mount.point" in found.remedy


def test_a_broken_configuration_hides_no_other_finding(home, tmp_path):
    home.config_path.write_text("{")
    found = {check.name: check for check in _doctor._home(Context(home))}
    assert found["configuration"].status == "fail"
    assert (
        found["configuration"].remedy
        == "Correct the file; docs/operations.md has an example with every field."
    )
    assert found["home"].status == "ok"
    assert "home space" in found
    assert point(home).status in ("ok", "info", "warn")


@pytest.mark.parametrize(
    ("free", "status"), [(512 * MIB, "ok"), (100 * MIB, "warn"), (4 * MIB - 1, "fail"), (0, "fail")]
)
def test_a_full_disk_is_told_with_what_it_means(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(1 << 40, 0, free))
    found = _doctor_places.space("home space", tmp_path)
    assert found.status == status
    assert ("ENOSPC" in found.detail) == (str(tmp_path) in found.remedy) == (status != "ok")


def test_a_clock_behind_what_the_home_was_written_at(home):
    assert list(_doctor_places.clock_of(home)) == []  # nothing was written yet
    home.state_db.touch()
    assert list(_doctor_places.clock_of(home)) == []
    later = time.time() + 86400
    os.utime(home.state_db, (later, later))
    (found,) = _doctor_places.clock_of(home)
    assert (found.status, found.remedy) == ("warn", TABLE["clock_rollback"].remedy)
    assert "stays closed" in found.detail
    # It was told to forget, and the database has that in its log yet.
    home.state_db.with_name("state.db-wal").write_bytes(b"x")
    assert list(_doctor_places.clock_of(home)) == []


@pytest.mark.parametrize(
    ("code", "device", "helper"), [("fuse_missing", "fail", "ok"), ("fusermount_missing", "ok", "fail")]
)
def test_what_is_missing_for_mounting_is_told_of_what_is_missing(home, monkeypatch, code, device, helper):
    def fails():
        raise MeshkitError(code, "it is so")

    monkeypatch.setattr("meshkitfs.cli._doctor.preflight.check_system", fails)
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/fusermount3")
    found = {check.name: check for check in _doctor._fuse(Context(home))}
    assert (found["/dev/fuse"].status, found["fusermount3"].status) == (device, helper)
    (bad,) = [check for check in found.values() if check.status == "fail"]
    assert "nothing can be mounted" in bad.detail
    assert bad.remedy == TABLE[code].remedy


class Context:
    """What the checks of the machine and the home need of the invocation."""

    def __init__(self, home: Home) -> None:
        self.home = home
