"""What is said about a mount point before it is used, and how a mount is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from mounted import mounts_in, needs_mount, needs_root

from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import preflight


@pytest.fixture
def mount(tmp_path):
    """Makes mounts with options of the test's choice."""
    with mounts_in(tmp_path) as make:
        yield make


def code(call, *args, **more):
    """Return the code of the MeshkitError that ``call`` raises."""
    with pytest.raises(MeshkitError) as caught:
        call(*args, **more)
    return caught.value.code


class TestTheSystem:
    def test_no_device(self, monkeypatch, tmp_path):
        monkeypatch.setattr(preflight, "_DEVICE", str(tmp_path / "fuse"))
        assert code(preflight.check_system) == "fuse_missing"
        (tmp_path / "fuse").touch()
        assert code(preflight.check_system) == "fuse_missing"

    @needs_root
    def test_a_device_that_cannot_be_opened(self, monkeypatch, tmp_path):
        # As in a container: the node is there, but nothing is behind it.
        os.mknod(tmp_path / "fuse", 0o600 | 0o020000, os.makedev(10, 254))
        monkeypatch.setattr(preflight, "_DEVICE", str(tmp_path / "fuse"))
        assert code(preflight.check_system) == "fuse_missing"

    @needs_mount
    def test_an_ordinary_user_needs_the_helper(self, monkeypatch, tmp_path):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert code(preflight.check_system) == "fusermount_missing"
        helper = tmp_path / "fusermount3"
        helper.write_text("#!/bin/sh\n")
        helper.chmod(0o755)
        assert code(preflight.check_system) == "fusermount_missing"
        helper.chmod(0o4755)
        preflight.check_system()

    @needs_mount
    def test_without_new_privileges_the_helper_is_of_no_use(self, tmp_path):
        script = f"""
import ctypes, os
from meshkitfs.fuse import preflight
helper = {str(tmp_path / "fusermount3")!r}
open(helper, "w").close()
os.chmod(helper, 0o4755)
os.environ["PATH"] = {str(tmp_path)!r}
os.geteuid = lambda: 1000
preflight.check_system()
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
try:
    preflight.check_system()
except preflight.MeshkitError as error:
    print(error.code)
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.stdout, ended.stderr) == ("fusermount_missing\n", "")


class TestMountPoints:
    def test_an_empty_directory_is_fine_and_is_named_without_links(self, tmp_path):
        (tmp_path / "mnt").mkdir()
        (tmp_path / "link").symlink_to("mnt")
        assert preflight.check_mountpoint(tmp_path / "link", []) == str(tmp_path / "mnt")
        assert preflight.check_mountpoint(f"{tmp_path}/x/../mnt/", []) == str(tmp_path / "mnt")

    def test_missing_or_not_a_directory(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "dangling").symlink_to("nowhere")
        for name in ("missing", "file", "file/below", "dangling"):
            assert code(preflight.check_mountpoint, tmp_path / name, []) == "mountpoint_missing"

    def test_not_empty(self, tmp_path):
        (tmp_path / ".hidden").touch()
        assert code(preflight.check_mountpoint, tmp_path, []) == "mountpoint_not_empty"
        assert preflight.check_mountpoint(tmp_path, [], nonempty=True) == str(tmp_path)

    def test_inside_our_own_state_in_either_direction(self, tmp_path):
        state = tmp_path / "home" / "state"
        (state / "mnt").mkdir(parents=True)
        (tmp_path / "link").symlink_to(state)
        (tmp_path / "home" / "state2").mkdir()
        inside = [state, state / "mnt", tmp_path / "link" / "mnt", tmp_path / "home", tmp_path, "/"]
        for place in inside:
            for named in (state, tmp_path / "link"):
                refusal = code(preflight.check_mountpoint, place, [tmp_path / "other", named], nonempty=True)
                # The root directory is a mount already, wherever one looks.
                assert refusal == ("mountpoint_busy" if place == "/" else "mountpoint_inside_state")
        assert preflight.check_mountpoint(tmp_path / "home" / "state2", [state])
        # A state directory that does not exist yet counts like one that does.
        assert (
            code(preflight.check_mountpoint, state / "mnt", [state / "mnt" / "new"])
            == "mountpoint_inside_state"
        )

    def test_a_mount_of_something_else(self):
        assert code(preflight.check_mountpoint, "/proc", []) == "mountpoint_busy"
        assert not preflight.is_ours("/proc")
        assert not preflight.is_stale("/proc")
        assert preflight.clear_stale("/proc") is False
        assert code(preflight.unmount, "/proc") == "not_mounted"

    @needs_root
    def test_no_permission(self, tmp_path):
        (tmp_path / "locked" / "mnt").mkdir(parents=True)
        (tmp_path / "locked").chmod(0o700)
        script = f"""
import os
from meshkitfs.fuse import preflight
os.setuid(65534)
try:
    preflight.check_mountpoint({str(tmp_path / "locked" / "mnt")!r}, [])
except preflight.MeshkitError as error:
    print(error.code, error.detail)
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "mount_failed" in ended.stdout
        assert "Permission denied" in ended.stdout


@needs_mount
class TestMounts:
    def test_a_living_mount_is_found_and_left_alone(self, mount):
        daemon = mount()
        ours = [found for found in preflight.mounts() if found.path == daemon.place]
        assert [(found.source, found.fstype) for found in ours] == [("meshkitfs", "fuse.meshkitfs")]
        assert ours[0].device == daemon.do(
            "i = os.stat(root); result = f'{os.major(i.st_dev)}:{os.minor(i.st_dev)}'"
        )
        assert preflight.is_ours(daemon.place)
        assert not preflight.is_stale(daemon.place)
        assert code(preflight.check_mountpoint, daemon.place, []) == "mountpoint_busy"
        assert preflight.clear_stale(daemon.place) is False
        assert daemon.do("result = os.statvfs(root).f_bsize") == 4096

    def test_through_a_link_and_with_a_difficult_name(self, tmp_path):
        base = tmp_path / "a b\tc\\d\né"
        base.mkdir()
        with mounts_in(base) as make:
            daemon = make()
            (tmp_path / "link").symlink_to(daemon.place)
            assert preflight.resolve(tmp_path / "link") == daemon.place
            assert preflight.is_ours(tmp_path / "link")
            preflight.unmount(tmp_path / "link")
            assert daemon.process.wait(20) == 0

    def test_below_a_mount_there_is_none(self, mount):
        daemon = mount()
        daemon.do("os.mkdir(at('d'))")
        assert not preflight.is_ours(os.path.join(daemon.place, "d"))
        assert code(preflight.unmount, os.path.join(daemon.place, "d")) == "not_mounted"

    def test_a_daemon_that_does_not_answer_hangs_nobody(self, mount):
        daemon = mount(timeout=0)
        script = f"""
from meshkitfs.fuse import preflight
preflight._ANSWER_SECONDS = 0.2
place = {daemon.place!r}
try:
    preflight.check_mountpoint(place, [])
except preflight.MeshkitError as error:
    print(error.code, preflight.is_ours(place), preflight.is_stale(place), preflight.clear_stale(place))
"""
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            ended = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=20
            )
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert (ended.stdout, ended.stderr) == ("mountpoint_busy True False False\n", "")

    @needs_root
    @pytest.mark.parametrize("lazy", [False, True])
    def test_root_unmounts_without_the_helper_too(self, mount, monkeypatch, lazy):
        daemon = mount()
        monkeypatch.setattr(preflight, "_HELPER", "no-such-program")
        preflight.unmount(daemon.place, lazy=lazy)
        assert daemon.process.wait(20) == 0

    def test_an_ordinary_user_cannot(self, mount, monkeypatch):
        daemon = mount()
        monkeypatch.setattr(preflight, "_HELPER", "no-such-program")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert code(preflight.unmount, daemon.place) == "fusermount_missing"

    def test_a_stale_mount_that_cannot_be_cleared_says_so(self, mount, monkeypatch):
        daemon = mount()
        daemon.process.kill()
        daemon.process.wait(20)
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "_HELPER", "false")
            assert code(preflight.clear_stale, daemon.place) == "mountpoint_stale"
        assert preflight.clear_stale(daemon.place) is True
