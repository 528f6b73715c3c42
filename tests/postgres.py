"""A real PostgreSQL for the tests: a cluster of its own, run by an unprivileged user, on a Unix socket only.

    with Cluster() as cluster:
        conninfo = cluster.fresh()      # an empty schema in it
        cluster.kill(); cluster.start() # as a crash would

fsync stays on: what the tests say about durability would mean nothing otherwise.
"""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest


def binaries() -> Path:
    """The directory of initdb and postgres: on PATH, or where Debian keeps them."""
    for found in sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), reverse=True):
        return Path(found).parent
    onpath = shutil.which("postgres")
    if onpath is None:
        pytest.fail("PostgreSQL is not installed: make packages-test")
    return Path(os.path.realpath(onpath)).parent


class Cluster:
    """One database server with its data, removed at the end."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="mkpg-"))
        self.user: str | int | None = None
        if os.geteuid() == 0:  # PostgreSQL refuses to be root
            account = next(
                (name for name in ("postgres", "nobody") if name in {u.pw_name for u in pwd.getpwall()}), None
            )
            assert account, "no unprivileged account to run PostgreSQL as"
            entry = pwd.getpwnam(account)
            os.chown(self.place, entry.pw_uid, entry.pw_gid)
            self.user = account
        self.place.chmod(0o755)
        self.data = self.place / "data"
        self._numbers = itertools.count()
        self._run("initdb", "-D", self.data, "-A", "trust", "-U", "mk", "-E", "UTF8", "--locale=C")
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self.place} -c max_connections=60"
        self._run(
            "pg_ctl", "-w", "-t", "60", "-D", self.data, "-o", options, "-l", self.place / "log", "start"
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it; ``immediate`` is what a crash is for the data."""
        self._run("pg_ctl", "-w", "-D", self.data, "-m", mode, "stop")

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def signal(self, number: int) -> None:
        """Send a signal to the server and to each of its processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in [self.pid, *map(int, children)]:
            os.kill(pid, number)

    def fresh(self) -> str:
        """Return what to connect to an empty place in it with."""
        name = f"t{next(self._numbers)}"
        with psycopg.connect(self.address, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self.address} options='-c search_path={name}'"

    @property
    def address(self) -> str:
        return f"host={self.place} user=mk dbname=postgres"

    def close(self) -> None:
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, name: str, *arguments: object) -> None:
        done = subprocess.run(
            [str(binaries() / name), *map(str, arguments)],
            user=self.user,
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open in the server
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=120,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )
        assert done.returncode == 0, f"{name} failed: {done.returncode}; see {self.place / 'log'}"


__all__ = ["Cluster", "signal"]
