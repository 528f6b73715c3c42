"""The systemd units of a home, or of the metadata service: put in place, taken away, looked at.

The units lie in the repository's systemd/ and, when installed, in the package's share directory. They name
/usr/bin/meshkitfs; what is put in place names the program that was run.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import MeshkitError
from . import config
from .home import Home

__all__ = ["Units", "install", "status", "uninstall"]

_PROGRAM: Final = "/usr/bin/meshkitfs"
_HELPER: Final = ("meshkitfs-fusermount.socket", "meshkitfs-fusermount@.service")
_SERVE: Final = ("meshkitfs-serve.socket", "meshkitfs-serve.service")
# systemctl waits for what it starts, and a start or stop has the unit's own limits.
_START_S: Final = 120.0
_STOP_S: Final = 200.0


@dataclass(frozen=True, slots=True)
class Units:
    """What belongs together: ``files`` as shipped, the unit ``main``, and ``enabled``, which starts it."""

    main: str
    enabled: str
    files: tuple[str, ...]
    home: Home | None = None

    @classmethod
    def of_home(cls, home: Home) -> Units:
        """The units of ``home``: the plain one for the default home, else an instance named for its path."""
        if home.root == Home.locate(environ={}).root:
            return cls("meshkitfs.service", "meshkitfs.service", ("meshkitfs.service",), home)
        name = f"meshkitfs@{_run('systemd-escape', '--path', '--', str(home.root)).strip()}.service"
        return cls(name, name, ("meshkitfs@.service",), home)

    @classmethod
    def of_service(cls) -> Units:
        """The units of `meshkitfs serve`."""
        return cls("meshkitfs-serve.service", "meshkitfs-serve.socket", _SERVE)

    @property
    def drop_ins(self) -> Path:
        """Where what is added to the main unit lies."""
        return _directory() / f"{self.main}.d"


def install(units: Units, *, hardened: bool, start: bool) -> dict[str, Any]:
    """Put ``units`` in place, have them started at login, and with ``start`` now; returns `status`.

    Installing again replaces them, and restarts nothing. Raises ``not_supported`` without a systemd of this
    user, ``not_initialized`` and ``invalid_config`` of the home, and ``mount_failed`` if the start fails.
    """
    _systemctl("show-environment")
    files = {_directory() / name: _rendered(name) for name in units.files}
    if units.home is not None:
        units.home.require_initialized()
        settings = config.load(units.home.config_path)
        # A directory of another user, or a file, is found out by the start; that it is missing, never.
        _forget(units)
        if hardened:
            files |= {_directory() / name: _rendered(name) for name in _HELPER}
            files[units.drop_ins / "50-hardened.conf"] = _rendered("hardened.conf")
            files[units.drop_ins / "60-paths.conf"] = _paths(units.home, settings)
            # The hardened daemon can write to its stores only, not make a directory beside them.
            if not os.path.lexists(settings.mount.point):
                settings.mount.point.mkdir(mode=0o700, parents=True)
    for path, text in files.items():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(path, text)
    _systemctl("daemon-reload")
    _systemctl("enable", units.enabled, *([_HELPER[0]] if hardened else []))
    if start:
        _systemctl("start", *([_HELPER[0]] if hardened else []), units.enabled, wait=_START_S)
    return status(units)


def uninstall(units: Units) -> dict[str, Any]:
    """Stop ``units`` and take them away; what other homes use stays. Harmless where there are none."""
    _systemctl("show-environment")
    present = [name for name in dict.fromkeys((units.enabled, units.main)) if _known(name)]
    if present:
        _systemctl("disable", units.enabled)
        _systemctl("stop", *present, wait=_STOP_S)
    _forget(units)
    if not _others(units):
        for name in units.files:
            (_directory() / name).unlink(missing_ok=True)
    if not list(_directory().glob("meshkitfs*.service.d/50-hardened.conf")) and _known(_HELPER[0]):
        _systemctl("disable", "--now", _HELPER[0])
        for name in _HELPER:
            (_directory() / name).unlink(missing_ok=True)
    _systemctl("daemon-reload")
    return status(units)


def status(units: Units) -> dict[str, Any]:
    """Say what is in place, and what systemd says of it."""
    shown = _systemctl(
        "show", "--property=ActiveState,SubState,StatusText,MainPID,NRestarts,Result", units.main
    )
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return {
        "unit": units.main,
        "installed": all((_directory() / name).exists() for name in units.files),
        "enabled": _asks("is-enabled", units.enabled),
        "hardened": (units.drop_ins / "50-hardened.conf").exists(),
        "active": values.get("ActiveState", ""),
        "state": values.get("SubState", ""),
        "result": values.get("Result", ""),
        "status": values.get("StatusText", ""),
        "pid": int(values.get("MainPID") or 0) or None,
        "restarts": int(values.get("NRestarts") or 0),
        "linger": _lingers(),
    }


def _directory() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(configured) if os.path.isabs(configured) else Path(os.path.expanduser("~")) / ".config"
    return base / "systemd" / "user"


def _known(name: str) -> bool:
    file = f"{name.partition('@')[0]}@.service" if "@" in name else name
    return (_directory() / file).exists()


def _others(units: Units) -> bool:
    """Whether another instance of the template is started at login, so that its file is still used."""
    wanted = _directory() / "default.target.wants"
    return "@" in units.main and any(path.name != units.main for path in wanted.glob("meshkitfs@*.service"))


def _forget(units: Units) -> None:
    for name in ("50-hardened.conf", "60-paths.conf"):
        (units.drop_ins / name).unlink(missing_ok=True)
    if units.drop_ins.is_dir() and not any(units.drop_ins.iterdir()):
        units.drop_ins.rmdir()


def _paths(home: Home, settings: config.Config) -> str:
    places = {home.root, *settings.provider.directories()}
    if settings.metadata.path is not None:
        places.add(settings.metadata.path.parent)  # SQLite has files beside it
    lines = [f"ReadWritePaths={_quoted(str(place))}" for place in sorted(places)]
    return "\n".join(["# Where the daemon may write: its home and its stores.", "[Service]", *lines, ""])


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _rendered(name: str) -> str:
    text = _shipped(name).read_text(encoding="utf-8")
    program, search = _program()
    text = text.replace(f"ExecStart={_PROGRAM} ", f"ExecStart={' '.join(map(_quoted, program))} ")
    if search and "ExecStart=" in text:
        text = text.replace("[Service]\n", f"[Service]\nEnvironment={_quoted(f'PYTHONPATH={search}')}\n", 1)
    return text


def _shipped(name: str) -> Path:
    tree = Path(__file__).resolve().parents[2] / "systemd" / name
    if tree.exists():
        return tree
    try:
        for file in importlib.metadata.files("meshkitfs") or ():
            if file.parts[-3:] == ("meshkitfs", "systemd", name):
                return Path(str(file.locate()))
    except importlib.metadata.PackageNotFoundError:
        pass
    raise MeshkitError("not_supported", f"the unit {name} is not part of this installation")


def _program() -> tuple[list[str], str]:
    """The command that runs this very program later, and the PYTHONPATH that it needs."""
    invoked = shutil.which(sys.argv[0]) if os.path.basename(sys.argv[0]) == "meshkitfs" else None
    if invoked is not None:
        return [os.path.abspath(invoked)], ""
    tree = str(Path(__file__).resolve().parents[2])
    search = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if "site-packages" not in tree and tree not in search:
        search.insert(0, tree)
    return [sys.executable, "-P", "-m", "meshkitfs"], os.pathsep.join(map(os.path.abspath, search))


def _quoted(text: str) -> str:
    if any(c in text for c in "\n\0"):
        raise MeshkitError("not_supported", "systemd cannot have a path with a line break in it")
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'


def _lingers() -> bool:
    import pwd

    try:
        return Path("/var/lib/systemd/linger", pwd.getpwuid(os.getuid()).pw_name).exists()
    except KeyError:
        return False


def _systemctl(*arguments: str, wait: float = 30.0) -> str:
    return _run("systemctl", "--user", *arguments, wait=wait)


def _asks(*arguments: str) -> bool:
    done = subprocess.run(
        ["systemctl", "--user", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=30,
    )
    return done.returncode == 0


def _run(*command: str, wait: float = 30.0) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=wait, check=False
        )
    except FileNotFoundError:
        raise MeshkitError("not_supported", f"{command[0]} is not installed: this needs systemd") from None
    except subprocess.TimeoutExpired:
        raise MeshkitError("timed_out", f"{' '.join(command[:3])}, after {wait:.0f} seconds") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or f"{' '.join(command)} ended with {done.returncode}"
    if "show-environment" in command:
        raise MeshkitError("not_supported", f"no systemd of this user answers: {said}")
    raise MeshkitError("mount_failed", f"{said}\nSee 'journalctl --user --unit=meshkitfs*'.")
