"""Hooks for file managers: they are put where those look, and what they would show of a real mount is right.

They were not run inside Nautilus or Dolphin here: neither is among the packages of the tests.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import homes
from homes import Person

NAUTILUS, DOLPHIN = "nautilus-python/extensions/meshkitfs.py", "kio/servicemenus/meshkitfs.desktop"


def test_installing_and_taking_away(tmp_path):
    someone = Person(tmp_path / "home", "uma")
    someone.env["XDG_DATA_HOME"] = str(tmp_path / "data")
    places = {"nautilus": str(tmp_path / "data" / NAUTILUS), "dolphin": str(tmp_path / "data" / DOLPHIN)}
    for _ in range(2):  # the second time over the first
        assert someone.cli("desktop", "install") == {"installed": places}
    menu = (tmp_path / "data" / DOLPHIN).read_text()
    assert "@" not in menu
    assert " explain %f" in menu
    assert os.access(tmp_path / "data" / DOLPHIN, os.X_OK)
    # The system's Python, to which this program is unknown.
    environment = {"PATH": os.environ["PATH"]}
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['look']('/etc/passwd'))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, places["nautilus"]],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\n", done.stderr
    for _ in range(2):
        assert someone.cli("desktop", "uninstall") == {"removed": places}
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))
    (tmp_path / "data" / "kio").rename(tmp_path / "away")
    (tmp_path / "data" / "kio").write_text("a file")
    assert someone.cli("desktop", "install", check=False).error["code"] == "invalid_argument"


@homes.needs_fuse
def test_what_is_shown_of_a_real_mount(tmp_path):
    with (
        Person(tmp_path / "vera", "vera", tmp_path / "vera mnt") as vera,
        Person(tmp_path / "wim", "wim") as wim,
    ):
        vera.env["XDG_DATA_HOME"] = str(tmp_path / "data")
        vera.cli("desktop", "install")
        vera.init()
        wim.init(vera)
        vera.mount()
        wim.mount()
        hook = runpy.run_path(str(tmp_path / "data" / NAUTILUS))
        look, states = hook["look"], hook["STATES"]

        def shown(path):
            state = look(str(path))
            assert state is None or state in states
            return state

        vera.cli("share", "create", "first")
        mine = vera.mnt / "first" / "file"
        homes.write_synced(mine, b"content")
        assert shown(mine) == "stored"
        name = homes.invite(vera, "first", wim, "--rights", "read")["name"]
        theirs = wim.mnt / name / "file"
        assert theirs.read_bytes() == b"content"
        assert shown(mine) == shown(mine.parent) == "shared"
        assert shown(theirs) == "readonly"
        with mine.open("ab") as file:
            file.write(b"more")
            file.flush()
            assert shown(mine) == "unsent"
        vera.cli("share", "revoke", "first", "wim")
        homes.errno_of(os.open, theirs, os.O_RDONLY)
        assert shown(wim.mnt / name) == "refused"
        assert shown(tmp_path) is None
        assert shown(wim.mnt / "no such share") is None
