"""``doctor``: what this machine, this home and its stores are like. Works with nothing set up or running.

It asks for no passphrase and changes nothing, unless ``--reset-clock`` is said. Each check stands alone: one
that breaks is itself reported as failed, and the others still run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..daemon import client, config
from ..daemon.failures import as_error
from ..daemon.finding import FAIL, INFO, OK, WARN, Finding
from ..errors import TABLE, MeshkitError
from ..fuse import preflight
from . import _doctor_places, _doctor_watching
from ._asking import daemon_info
from ._colour import Tone, meaning, toned
from ._context import Context
from ._output import printable, table
from ._wrong import STORE, explained

if TYPE_CHECKING:
    from ..providers import ProviderSpec

__all__ = ["doctor", "examine_all", "shown"]

_MINIMUM = (3, 11)
_ENDPOINT_S = 20.0


def doctor(context: Context, args: argparse.Namespace) -> int:
    """``doctor``: exit 0 when nothing failed, else 1."""
    checks: list[Finding] = []
    if args.reset_clock:
        context.call("clock.reset", {})
        checks.append(Finding("clock", OK, "what this device remembered of time is forgotten"))
    if args.trust_service:
        key = context.call("metadata.trust_key", {})["key"]
        checks.append(Finding("service key", OK, f"this home takes {key[:16]} for the service's from now on"))
    checks += examine_all(context)
    good = all(check.status != FAIL for check in checks)
    context.out.result(
        {"ok": good, "version": __version__, "checks": [asdict(check) for check in checks]}, shown(checks)
    )
    return 0 if good else 1


def shown(checks: list[Finding]) -> list[str]:
    """Return the findings as lines for a person."""
    rows = [(meaning(_MARKS.get(check.status, check.status)), check.name, check.detail) for check in checks]
    lines = table(("", "check", "finding"), rows, fold=("finding",))
    remedies = [check for check in checks if check.remedy]
    if remedies:
        lines += ["", toned("What to do:", Tone.HEADING)]
        lines += [f"  {printable(check.name)}: {printable(check.remedy)}" for check in remedies]
    return lines


def examine_all(context: Context) -> list[Finding]:
    """Make every check. Never raises."""
    checks: list[Finding] = []
    for examine in (_python, _kernel, _fuse, _key_vaults, _home, _stores, _daemon, _mountpoint):
        checks += _guarded(examine, context)
    return checks


_MARKS = {OK: "ok", INFO: "info", WARN: "WARN", FAIL: "FAIL"}


def _guarded(examine: Callable[[Context], Iterator[Finding]], context: Context) -> Iterator[Finding]:
    name = examine.__name__.removeprefix("_").replace("_", " ")
    try:
        yield from examine(context)
    except MeshkitError as error:
        yield Finding(name, FAIL, error.detail or error.reason.sentence, error.remedy)
    except Exception as error:
        failure = as_error(error)
        yield Finding(name, FAIL, failure.detail, failure.remedy)


def _python(_context: Context) -> Iterator[Finding]:
    enough = sys.version_info >= _MINIMUM
    yield Finding(
        "python",
        OK if enough else FAIL,
        f"{platform.python_version()} ({sys.executable})",
        "" if enough else "Python 3.11 or newer is needed.",
    )
    bound = importlib.util.find_spec("pyfuse3") is not None
    yield Finding(
        "pyfuse3",
        OK if bound else FAIL,
        "installed" if bound else "not installed",
        "" if bound else "Install it: 'pip install pyfuse3' (needs gcc, pkg-config and libfuse3-dev).",
    )


def _kernel(_context: Context) -> Iterator[Finding]:
    linux = sys.platform == "linux"
    remedy = "" if linux else "Mounting needs Linux."
    yield Finding("kernel", OK if linux else FAIL, f"{platform.system()} {platform.release()}", remedy)


def _fuse(_context: Context) -> Iterator[Finding]:
    try:
        preflight.check_system()
        yield Finding("/dev/fuse", OK, "can be opened")
    except MeshkitError as error:
        detail = f"{error.detail}: nothing can be mounted"
        if error.code == "fusermount_missing":
            yield Finding("/dev/fuse", OK, "can be opened")
            yield Finding("fusermount3", FAIL, detail, error.remedy)
            return
        yield Finding("/dev/fuse", FAIL, detail, error.remedy)
    helper = shutil.which("fusermount3")
    if helper is not None:
        yield Finding("fusermount3", OK, helper)
    else:
        root = os.geteuid() == 0
        why = "root mounts without it, other users cannot" if root else "nothing can be mounted"
        remedy = MeshkitError("fusermount_missing").remedy
        yield Finding("fusermount3", WARN if root else FAIL, f"not on the PATH: {why}", remedy)


def _key_vaults(context: Context) -> Iterator[Finding]:
    from .. import keyvault

    used = keyvault.existing(context.home.root)
    for report in keyvault.report_all(context.home.root):
        name = f"key vault {report.kind}"
        if report.kind == used:
            remedy = "" if report.available else "Start or unlock it; see 'meshkitfs identity show'."
            yield Finding(
                name, OK if report.available else FAIL, f"{report.detail} (used by this home)", remedy
            )
        elif used is None:
            yield Finding(name, INFO, "can be used" if report.available else report.detail)


def _home(context: Context) -> Iterator[Finding]:
    home = context.home
    if not home.root.exists():
        yield Finding("home", INFO, f"{home.root} does not exist yet", "Run 'meshkitfs init'.")
        return
    info = home.root.stat()
    private = info.st_uid == os.geteuid() and not info.st_mode & 0o022
    yield Finding(
        "home",
        OK if private else FAIL,
        f"{home.root} (mode {stat.S_IMODE(info.st_mode):04o}, owner uid {info.st_uid})"
        + ("" if private else ": who can write there can put other keys and settings in"),
        "" if private else f"It must be yours and not writable for others: 'chmod go-w {home.root}'.",
    )
    if home.initialized:
        mode = home.identity_file.stat().st_mode
        tight = not mode & 0o077
        who = "" if tight else f" (mode {stat.S_IMODE(mode):04o}): others can read the sealed keys"
        remedy = "" if tight else f"'chmod 600 {home.identity_file}'"
        yield Finding("identity", OK if tight else WARN, f"{home.identity_file}{who}", remedy)
    else:
        yield Finding("identity", INFO, "none yet", "Run 'meshkitfs init'.")
    if home.config_path.exists():
        try:
            config.load(home.config_path)
            yield Finding("configuration", OK, str(home.config_path))
        except MeshkitError as error:
            yield Finding("configuration", FAIL, error.detail or error.reason.sentence, error.remedy)
    yield from _doctor_places.clock_of(home)
    yield _doctor_places.space("home space", home.root)


def _stores(context: Context) -> Iterator[Finding]:
    try:
        settings = config.load(context.home.config_path)
    except MeshkitError:
        return  # told by the check of the home
    yield from _byte_store(settings.provider)
    if settings.policy is not None:
        from ._doctor_policy import examine as examine_policy

        for status, detail, remedy in examine_policy(settings.policy):
            yield Finding("policy provider", status, detail, remedy)
    path = settings.metadata.path
    if path is None:
        from ._doctor_service import examine  # its libraries take longer to load than most commands run

        for status, detail, remedy in examine(settings.metadata):
            yield Finding("metadata service", status, detail, remedy)
        return
    yield _reachable("metadata store", path, path.is_file(), os.R_OK | os.W_OK)
    if path.is_file() and not os.access(path.parent, os.W_OK):
        # SQLite makes its journal beside the file.
        yield Finding(
            "metadata directory", FAIL, f"{path.parent} is not writable", "Its group needs write access."
        )


def _byte_store(spec: ProviderSpec) -> Iterator[Finding]:
    from ..daemon.client import run_async
    from ..providers import LocalOptions, examine

    if isinstance(spec.options, LocalOptions):
        store = spec.options.store
        yield _reachable("byte store", store, store.is_dir(), os.R_OK | os.W_OK | os.X_OK)
        if store.is_dir():
            yield _doctor_places.space("byte store space", store)
        return
    found = run_async(partial(examine, spec, write=False, deadline_s=_ENDPOINT_S))
    error = next((step.error for step in found.steps if step.error is not None), None)
    if error is None:
        yield Finding("byte store", OK, f"{found.name} answers in {found.steps[-1].ms:.0f} ms")
    else:
        sentence, remedy = explained(error, STORE) or ("", error.remedy)
        detail = error.detail or error.reason.sentence
        told = f"{sentence} ({detail})" if sentence else detail
        remedy += " 'meshkitfs providers test' tries every step."
        yield Finding("byte store", FAIL, f"{found.name}: {told}", remedy)


def _daemon(context: Context) -> Iterator[Finding]:
    home = context.home
    info = daemon_info(home)
    if info is None:
        holder = home.holder()
        if holder is None:
            yield Finding("daemon", INFO, "not running")
        else:
            yield Finding(
                "daemon",
                WARN,
                f"process {holder} holds the home and has no control socket",
                f"It is a command at work, or a daemon that starts or ends; if it stays, look at it ('ps -p "
                f"{holder} -f') and at {home.log_file}.",
            )
        return
    yield Finding("daemon", OK, f"process {info.get('pid')}, log {home.log_file}")
    status = client.ask_daemon(home, "status", {}) or {}
    for share in status.get("shares") or []:
        if share.get("reason"):
            why = TABLE.get(share["reason"], TABLE["internal_error"])
            yield Finding(
                f"share {share.get('name')}", WARN, f"{share['reason']}: {why.sentence}", why.remedy
            )
    problem = (status.get("metadata") or {}).get("problem")
    if problem:
        why = TABLE.get(problem, TABLE["internal_error"])
        yield Finding("change feed", FAIL, f"{problem}: {why.sentence}", why.remedy)
    with suppress(MeshkitError):  # a configuration that cannot be read is told by the check of the home
        yield from _doctor_watching.examine(config.load(home.config_path), status)
    left = status.get("left") or []
    detail = f"{len(left)} shares have unpublished changes" if left else "everything is published"
    yield Finding("unsent", INFO if left else OK, detail)


def _mountpoint(context: Context) -> Iterator[Finding]:
    yield from _doctor_places.mount_point(context.home)


def _reachable(name: str, path: Path, there: bool, need: int) -> Finding:
    if not there:
        return Finding(name, FAIL, f"{path} is not there", "Bring it back, or correct the configuration.")
    if not os.access(path, need):
        return Finding(name, FAIL, f"{path}: permission denied", "Ask its owner for read and write access.")
    return Finding(name, OK, str(path))
