"""``desktop install`` and ``desktop uninstall``: hooks for file managers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder
from ._output import printable

__all__ = ["desktop_commands", "install", "uninstall"]

# By file manager: the file in `meshkitfs.desktop`, where it goes below the user's data directory, its mode.
# KDE takes a service menu of a home only if it may be executed.
_HOOKS: Final = {
    "nautilus": ("nautilus_extension.py", "nautilus-python/extensions/meshkitfs.py", 0o644),
    "dolphin": ("servicemenu.desktop", "kio/servicemenus/meshkitfs.desktop", 0o755),
}


def install(context: Context, _args: argparse.Namespace) -> int:
    """``desktop install``: put the hooks where file managers look for them."""
    return _each(context, _put, "installed")


def uninstall(context: Context, _args: argparse.Namespace) -> int:
    """``desktop uninstall``"""
    return _each(context, _take, "removed")


def desktop_commands(add: Adder) -> None:
    """Add ``desktop``."""
    desktop = add.group("desktop", "show the state of files in file managers")
    desktop.command(
        "install",
        install,
        "add to Nautilus and Dolphin",
        "Put an extension for Nautilus (it needs nautilus-python) and a context menu for Dolphin into your\n"
        "data directory (XDG_DATA_HOME). The file managers see them when they start again.",
        "meshkitfs desktop install",
    )
    desktop.command("uninstall", uninstall, "take that away again", example="meshkitfs desktop uninstall")


def _each(context: Context, work: Callable[[str, Path, int], None], word: str) -> int:
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    done = {}
    for manager, (source, place, mode) in _HOOKS.items():
        try:
            work(source, data / place, mode)
        except OSError as error:
            raise MeshkitError("invalid_argument", f"{data / place}: {error.strerror}") from None
        done[manager] = str(data / place)
    context.out.result({word: done}, [f"{name}: {word} {printable(path)}" for name, path in done.items()])
    return 0


def _put(source: str, target: Path, mode: int) -> None:
    from importlib import resources  # only this command needs it, and it loads much

    text = resources.files("meshkitfs.desktop").joinpath(source).read_text(encoding="utf-8")
    program = os.path.abspath(sys.argv[0])
    text = text.replace("@PROGRAM@", f'"{program}"' if " " in program else program)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.chmod(mode)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _take(_source: str, target: Path, _mode: int) -> None:
    target.unlink(missing_ok=True)
