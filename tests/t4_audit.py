"""The log of this device, over a real mount: which program, what it did, and what it was told."""

import subprocess

from homes import Person, needs_fuse

pytestmark = needs_fuse


def test_programs_are_named_and_refusals_too(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice, Person(tmp_path / "bob", "bob") as bob:
        alice.init()
        bob.init(beside=alice)
        alice.mount()
        bob.mount()
        (alice.mnt / "photos").mkdir()
        (alice.mnt / "photos" / "note.txt").write_text("canary-in-a-file")
        alice.cli("sync")
        alice.cli("share", "add", "photos", "bob")
        bob.cli("accept", "photos", "--name", "photos")
        place = bob.mnt / "photos" / "note.txt"
        assert subprocess.run(["cat", place], capture_output=True, check=True).stdout == b"canary-in-a-file"
        alice.cli("share", "revoke", "photos", "bob")
        assert subprocess.run(["head", place], capture_output=True, check=False).returncode != 0
        lines = bob.cli("audit", "--share", "photos")["lines"]
        (read,) = [x for x in lines if x["program"] == "cat"]
        assert (read["path"], read["action"], read["allowed"], read["times"]) == ("note.txt", "read", True, 1)
        (refused,) = [x for x in lines if x["program"] == "head"]
        assert (refused["action"], refused["code"]) == ("read", "share_revoked")
        told = bob.run("audit", "--refused").out
        assert "head" in told
        assert "refused: share_revoked" in told
        assert "canary" not in str(lines)
        assert bob.cli("audit", "clear")["cleared"] >= 2
        assert bob.cli("audit")["lines"] == []
        assert bob.cli("audit", "clear", "--refused", check=False).code == 2
