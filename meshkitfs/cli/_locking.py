"""``lock`` and ``unlock``: close a mounted home without unmounting it, and open it again."""

from __future__ import annotations

import argparse
from typing import Any

from ..core.secret_memory import wipe
from ..daemon import client
from ..errors import MeshkitError
from ._context import Context
from ._inspect import left_lines

__all__ = ["lock", "unlock"]


def lock(context: Context, _args: argparse.Namespace) -> int:
    """``lock``: done when the kernel has dropped what it held, or a deadline has passed."""
    data = _ask(context, "lock", {})
    lines = ["Locked. 'meshkitfs unlock' opens it again."]
    left = data.get("left") or []
    context.out.result(data, lines + (left_lines(left) if left else []))
    return 0


def unlock(context: Context, _args: argparse.Namespace) -> int:
    """``unlock``: a passphrase is asked for here, a keyring is asked by the daemon."""
    from .. import keyvault

    home = context.home
    if _ask(context, "status", {}).get("locked") is None:
        context.out.result({"locked": None}, ["It is not locked."])
        return 0
    params: dict[str, Any] = {}
    if keyvault.existing(home.root) == keyvault.PASSPHRASE_FILE:
        vault = keyvault.open_vault(keyvault.PASSPHRASE_FILE, home.root, context.passphrase)
        key = vault.load()
        context.passphrase.forget()
        params["key"] = key.hex()
        wipe(key)
    data = _ask(context, "unlock", params)
    context.out.result(data, ["Unlocked."])
    return 0


def _ask(context: Context, method: str, params: dict[str, Any]) -> dict[str, Any]:
    context.home.require_initialized()
    answer = client.ask_daemon(context.home, method, params)
    if answer is None:
        raise MeshkitError("not_mounted", "only a mounted home can be locked, or unlocked")
    return answer
