"""Measure meshkitfs beside EncFS and CryFS: sequential write and read of one file, creation of small files.

Each filesystem is mounted in turn over its own directory below one backing directory, does the same work,
and is unmounted; rounds are interleaved so that a drifting machine treats all alike. The figures are medians.
Peers that are not installed are left out, and said so.

    python benchmarks/compare.py                     # 1 GiB, 10,000 files, 3 rounds
    python benchmarks/compare.py --mib 256 --files 2000 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20
SMALL = 4096


class Target:
    """One filesystem: how it is mounted over a backing directory, and how that is ended."""

    def __init__(self, name: str, mount: Callable[[Path, Path], None], unmount: Callable[[Path, Path], None]):
        self.name = name
        self._mount = mount
        self._unmount = unmount

    @contextmanager
    def mounted(self, base: Path) -> Iterator[Path]:
        """Mount and yield the directory to work in. What was written is there again the next time."""
        point = base / "mnt"
        point.mkdir(parents=True, exist_ok=True)
        self._mount(base, point)
        try:
            yield point / "bench" if self.name == "meshkitfs" else point
        finally:
            self._unmount(base, point)


def run(*command: str, stdin: str = "", env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, input=stdin, text=True, capture_output=True, env={**os.environ, **(env or {})}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def meshkit(base: Path, *command: str) -> None:
    run(sys.executable, "-m", "meshkitfs", *command, env={"MESHKITFS_HOME": str(base / "home")})


def mount_meshkit(base: Path, point: Path) -> None:
    if not (base / "home").exists():
        meshkit(base, "init", "--identity", "bench", "--key-vault", "plain-file")
        meshkit(base, "share", "create", "bench")
    meshkit(base, "mount", str(point))


def unmount_meshkit(base: Path, point: Path) -> None:
    meshkit(base, "umount", str(point))


def mount_encfs(base: Path, point: Path) -> None:
    (base / "cipher").mkdir(exist_ok=True)
    run("encfs", "--standard", "--stdinpass", str(base / "cipher"), str(point), stdin="bench\n")


def mount_cryfs(base: Path, point: Path) -> None:
    (base / "cipher").mkdir(exist_ok=True)
    environment = {
        "CRYFS_FRONTEND": "noninteractive",
        "CRYFS_NO_UPDATE_CHECK": "true",
        "CRYFS_LOCAL_STATE_DIR": str(base / "state"),
    }
    run("cryfs", str(base / "cipher"), str(point), stdin="bench\n", env=environment)


def unmount_fuse(_base: Path, point: Path) -> None:
    run("fusermount3", "-u", str(point))


def unmount_cryfs(_base: Path, point: Path) -> None:
    run("cryfs-unmount", str(point))
    # It goes on writing in the background after the mount point is free.
    while (
        subprocess.run(["pgrep", "-f", f"cryfs .*{point}"], capture_output=True, check=False).returncode == 0
    ):
        time.sleep(0.05)


TARGETS = (
    Target("meshkitfs", mount_meshkit, unmount_meshkit),
    Target("encfs", mount_encfs, unmount_fuse),
    Target("cryfs", mount_cryfs, unmount_cryfs),
)


def write_file(place: Path, mib: int, data: bytes) -> float:
    """Return MB/s of writing one file sequentially, its fsync included."""
    start = time.perf_counter()
    fd = os.open(place / "large", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for _ in range(mib):
        os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    return mib * CHUNK / 1e6 / (time.perf_counter() - start)


def read_file(place: Path, mib: int) -> float:
    """Return MB/s of reading it back after a new mount."""
    start = time.perf_counter()
    total = 0
    with open(place / "large", "rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            total += len(piece)
    assert total == mib * CHUNK, "short read"
    return total / 1e6 / (time.perf_counter() - start)


def create_files(place: Path, count: int, data: bytes) -> float:
    """Return files/s of creating small files in one directory."""
    directory = place / "small"
    directory.mkdir()
    start = time.perf_counter()
    for i in range(count):
        fd = os.open(directory / f"file{i:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, data)
        os.close(fd)
    return count / (time.perf_counter() - start)


def one_round(target: Target, base: Path, mib: int, files: int) -> dict[str, float]:
    block = os.urandom(CHUNK)
    with target.mounted(base) as place:
        written = write_file(place, mib, block)
        created = create_files(place, files, block[:SMALL])
    with target.mounted(base) as place:
        read = read_file(place, mib)
        assert len(os.listdir(place / "small")) == files, "files are missing"
    return {"write MB/s": written, "read MB/s": read, "create files/s": created}


def available(target: Target) -> bool:
    return target.name == "meshkitfs" or shutil.which(target.name) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the large file (default 1024)")
    parser.add_argument("--files", type=int, default=10_000, help="number of small files (default 10000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dir", type=Path, help="where the backing directories go (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    targets = [target for target in TARGETS if available(target)]
    for target in TARGETS:
        if target not in targets:
            print(f"left out: {target.name} is not installed", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
    for number in range(options.rounds):
        for target in targets:
            with tempfile.TemporaryDirectory(prefix="meshkitfs-bench-", dir=options.dir) as base:
                results[target.name].append(one_round(target, Path(base), options.mib, options.files))
            print(f"round {number + 1}: {target.name} done", file=sys.stderr)
    medians = {
        name: {key: statistics.median(item[key] for item in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    if options.json:
        print(json.dumps({"machine": platform.platform(), "medians": medians, "rounds": results}, indent=2))
        return
    names = list(medians)
    print(f"{options.mib} MiB, {options.files} files of {SMALL} B, median of {options.rounds}")
    print(
        f"{'':16}"
        + "".join(f"{name:>14}" for name in names)
        + "".join(f"{'/ ' + name:>10}" for name in names[1:])
    )
    for key in medians["meshkitfs"]:
        row = "".join(f"{medians[name][key]:14.0f}" for name in names)
        ratios = "".join(f"{medians['meshkitfs'][key] / medians[name][key]:10.2f}" for name in names[1:])
        print(f"{key:16}{row}{ratios}")


if __name__ == "__main__":
    main()
