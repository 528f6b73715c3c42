"""The commands about devices, with real mounts: a laptop is let in, and shut out again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from homes import Person, invite, needs_fuse, reason_code, wait_until, write_synced

pytestmark = [needs_fuse, pytest.mark.long]


def let_in(first, second, *options):
    """Run `device request` at one home and `device approve` at the other."""
    waiting = subprocess.Popen(
        [
            sys.executable, "-m", "meshkitfs", "--json", "device", "request", "--metadata", first.metadata,
            "--provider", f"local:{first.blocks}", "--key-vault", "plain-file",
        ],
        env=second.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )  # fmt: skip
    try:
        code = next(line for line in waiting.stderr if line.startswith("meshkit-device1:"))
        approved = first.cli("device", "approve", *options, stdin=code.encode())
        out, err = waiting.communicate(timeout=60)
        assert waiting.returncode == 0, err
        assert code.strip() not in out + repr(first.outputs)
        return approved, out
    finally:
        waiting.kill()


def test_a_laptop_comes_and_goes(tmp_path):
    with (
        Person(tmp_path / "desktop", "alice") as desktop,
        Person(tmp_path / "laptop", "alice") as laptop,
        Person(tmp_path / "bob", "bob") as bob,
    ):
        desktop.init()
        bob.init(desktop)
        bob.cli("share", "create", "photos")
        invite(bob, "photos", desktop)
        desktop.mount()
        os.mkdir(desktop.mnt / "notes")
        approved, _ = let_in(desktop, laptop, "--name", "laptop", "--this", "desktop")
        assert approved["device"] == "laptop"
        laptop.mount()
        assert sorted(os.listdir(laptop.mnt)) == sorted(os.listdir(desktop.mnt))
        write_synced(laptop.mnt / "notes/a", b"from the laptop")
        wait_until(lambda: os.path.exists(desktop.mnt / "notes/a"), "the file")
        assert (desktop.mnt / "notes/a").read_bytes() == b"from the laptop"
        os.mkdir(laptop.mnt / "more")
        wait_until(lambda: "more" in os.listdir(desktop.mnt), "the share")
        assert [item["name"] for item in laptop.cli("device", "list")["devices"]] == ["desktop", "laptop"]

        desktop.cli("device", "revoke", "laptop")
        wait_until(lambda: reason_code(laptop.mnt / "notes") == "device_revoked", "the end of the laptop")
        with pytest.raises(PermissionError):
            (laptop.mnt / "notes/a").read_bytes()
        write_synced(desktop.mnt / "notes/b", b"goes on")
        assert sorted(os.listdir(next(desktop.mnt.glob("photos*")))) == []
        refused = laptop.run("umount", check=False)
        assert refused.code in (0, 7)
        assert laptop.cli("share", "list", check=False).error["code"] == "device_revoked"
