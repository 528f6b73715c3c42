"""README's five minutes, every command as it stands there, in one shell and a home directory of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mounted import needs_mount

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.long,
    needs_mount,
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
    pytest.mark.skipif(shutil.which("getfattr") is None, reason="needs getfattr"),
]

# What needs a second machine.
ELSEWHERE = ("share invite", "--invitation")
# A comment behind a command that says what it answers; the others say why it is there.
ANSWERS = {"Permission denied": False, "plum cake": True}
MARK = "@@ line"


def commands():
    """The lines of README's shell blocks, from the first to the last step of the five minutes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    walk = text.partition("## Five minutes")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", walk, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if not any(word in line for word in ELSEWHERE)]


@pytest.fixture
def shell(tmp_path):
    """A directory of one's own, and the environment of somebody who has just logged in without a desktop."""
    home = tmp_path / "somebody"
    home.mkdir(mode=0o700)
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    # The environment is made already: that of the tests.
    flags = f"-o install VENV={sys.prefix}"
    env = {**kept, "HOME": str(home), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "MAKEFLAGS": flags}
    yield env
    for place in (home / "meshkitfs-bob", home / ".local/share/meshkitfs"):
        if (place / "run/control.sock").exists():
            ending = [f"{sys.prefix}/bin/meshkitfs", "umount", "--force", "--timeout", "5"]
            subprocess.run(ending, env={**env, "MESHKITFS_HOME": str(place)}, capture_output=True, timeout=60)


def test_the_five_minutes(shell):
    lines = commands()
    assert len(lines) > 35
    script = ["exec 2>&1"]
    for number, line in enumerate(lines):
        script += [f"echo; echo '{MARK} {number}'", line, 'code=$?; echo; echo "@@ code $code"']
    done = subprocess.run(
        ["bash", "-u", "-c", "\n".join(script)],
        env=shell,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    parts = re.split(rf"^{MARK} \d+$", done.stdout, flags=re.MULTILINE)[1:]
    assert len(parts) == len(lines), done.stdout
    for line, part in zip(lines, parts, strict=True):
        said, _, code = part.rpartition("@@ code ")
        answer = next((words for words in ANSWERS if f"# {words}" in line), None)
        works = True if answer is None else ANSWERS[answer]
        print(line, "->", part)
        assert (int(code) == 0) is works, (line, part)
        assert answer is None or answer in said, (line, part)
    assert "not there" in done.stdout
    assert "share_revoked" in done.stdout
    assert not os.path.ismount(f"{shell['HOME']}/MeshKit")
    assert not os.path.ismount(f"{shell['HOME']}/Bob")
