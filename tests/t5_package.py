"""What is handed out: the source distribution, the wheel that is built from it, and the program that it installs."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from mounted import needs_mount

import meshkitfs

ROOT = Path(__file__).resolve().parents[1]
# What a working tree has and a clean one has not.
LITTER = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")

pytestmark = pytest.mark.long


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A clean copy of the tree."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=LITTER))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """Both distributions; the wheel is built from the unpacked source distribution."""
    out = tmp_path_factory.mktemp("dist")
    before = files_below(tree)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
        check=True,
        capture_output=True,
        timeout=240,
    )
    return before, out


@pytest.fixture(scope="module")
def source(built):
    (archive,) = built[1].glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


@pytest.fixture(scope="module")
def wheel(built):
    (archive,) = built[1].glob("*.whl")
    return archive


def test_the_source_distribution_is_the_whole_tree(built, source):
    assert {"Makefile", "LICENSE", "README.md", "tests/t5_package.py", "docs/cli.md"} <= source
    assert built[0] - source - {"MANIFEST.in"} == set()


def test_the_wheel_has_the_program_and_nothing_else(tree, wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    program = {f"meshkitfs/{name}" for name in files_below(tree / "meshkitfs")}
    assert {"meshkitfs/py.typed", "meshkitfs/cli/_main.py"} <= program
    assert program <= names
    rest = {name for name in names - program if ".dist-info/" not in name}
    # Units and the like, which are no code, go below share/.
    assert {name for name in rest if ".data/data/share/" not in name} == set()


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("/METADATA")]
        said = email.message_from_bytes(opened.read(name))
        licence = opened.read(name.replace("METADATA", "licenses/LICENSE"))
    assert (said["Name"], said["Version"]) == ("meshkitfs", meshkitfs.__version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert said["Requires-Python"] == ">=3.11"
    assert {"server", "tpm", "test"} <= set(said.get_all("Provides-Extra"))
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().startswith("# meshkitfs")
    assert "Operating System :: POSIX :: Linux" in said.get_all("Classifier")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The program in an environment of its own, which borrows from this one all but meshkitfs itself."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(place / "bin/python")),
            *("install", "--no-deps", "--no-index", "--quiet", str(wheel)),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (packages,) = place.glob("lib/python*/site-packages")
    # A .pth of that directory is not followed, so the checkout that is installed there is not found.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


@needs_mount
def test_the_installed_program_works_away_from_the_checkout(installed, tmp_path):
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    env = {**kept, "HOME": str(tmp_path), "MESHKITFS_HOME": str(tmp_path / "home")}

    def meshkit(*arguments):
        done = subprocess.run(
            [str(installed / "bin/meshkitfs"), *arguments],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    where = subprocess.run(
        [str(installed / "bin/python"), "-c", "import meshkitfs; print(meshkitfs.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(installed)
    assert meshkitfs.__version__ in meshkit("--version")
    meshkit("init", "--identity", "me", "--key-vault", "plain-file")
    meshkit("doctor")
    point = tmp_path / "mount"
    point.mkdir()
    meshkit("mount", str(point))
    try:
        (point / "first").mkdir()
        shutil.copy(ROOT / "LICENSE", point / "first")
        meshkit("sync")
        assert (point / "first/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    finally:
        meshkit("umount", str(point))
    assert not os.path.ismount(point)
