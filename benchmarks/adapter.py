"""What one request costs through the FUSE adapter: with polling, without, and with pyfuse3 as it comes.

Run as ``python benchmarks/adapter.py [ROUNDS]`` where a mount is possible. A filesystem in memory
(tests/memvfs.py) is mounted three times; each round measures every operation on each mount in turn, so
that a busy machine hits all three alike. Printed is the best median of all rounds in microseconds, and its
ratio to stock pyfuse3. ``--one-cpu`` puts everybody on the same processor.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
DAEMON = HERE.parent / "tests" / "memvfs.py"
VARIANTS = {
    "stock": ["--stock"],
    "no polling": ["--options", json.dumps({"patience": 0})],
    "polling": [],
}
SAMPLES = 400


def timed(call, samples=SAMPLES):
    clock = time.perf_counter
    took = []
    for _ in range(samples):
        start = clock()
        call()
        took.append(clock() - start)
    return median(took) * 1e6


def measure(directory):
    """Return the median time of each operation in microseconds."""
    path = os.path.join(directory, "file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, bytes(1 << 20), 0)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    page, large = mmap.mmap(-1, 4096), mmap.mmap(-1, 131072)
    data = bytes(4096)
    count = iter(range(10**9))
    made = []

    def create():
        made.append(os.path.join(directory, f"new{next(count)}"))
        os.close(os.open(made[-1], os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))

    result = {
        "statfs": timed(lambda: os.statvfs(directory)),
        "getattr": timed(lambda: os.fstat(fd)),
        "read 4K": timed(lambda: os.preadv(direct, [page], 0)),
        "read 128K": timed(lambda: os.preadv(direct, [large], 0)),
        "write 4K": timed(lambda: os.pwrite(fd, data, 0)),
        "open+close": timed(lambda: os.close(os.open(path, os.O_RDONLY))),
        "create+close": timed(create, SAMPLES // 4),
    }
    for name in made:
        os.unlink(name)
    os.close(direct)
    os.close(fd)
    return result


def main():
    rounds = int(next((word for word in sys.argv[1:] if word.isdigit()), "5"))
    if "--one-cpu" in sys.argv:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as base:
        daemons = {}
        best = {}
        try:
            for variant, options in VARIANTS.items():
                place = os.path.join(base, variant.replace(" ", "-"))
                os.mkdir(place)
                daemon = subprocess.Popen(
                    [sys.executable, str(DAEMON), place, "--timeout", "0", *options],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
                daemons[variant] = (daemon, place)
                daemon.stdout.readline()
            for _ in range(rounds):
                for variant, (_, place) in daemons.items():
                    for operation, took in measure(place).items():
                        key = (operation, variant)
                        best[key] = min(took, best.get(key, took))
        finally:
            for daemon, _ in daemons.values():
                daemon.stdin.close()
                daemon.wait(20)
    print(f"{'us (ratio to stock)':22}" + "".join(f"{variant:>18}" for variant in VARIANTS))
    for operation in dict.fromkeys(operation for operation, _ in best):
        cells = (
            f"{best[operation, variant]:9.1f} ({best[operation, variant] / best[operation, 'stock']:4.2f})  "
            for variant in VARIANTS
        )
        print(f"{operation:22}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
