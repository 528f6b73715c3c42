"""``lock`` and ``unlock``: close a mounted home without unmounting it, and open it again."""

from __future__ import annotations

import argparse
from typing import Any, Final

from ..core.secret_memory import wipe
from ..daemon import client, config
from ..errors import MeshkitError
from ._context import Context
from ._keyvault import open_key_vault
from ._shown import left_lines

__all__ = ["lock", "unlock"]

_NOT_MOUNTED: Final = "only a mounted home can be locked, or unlocked"


def lock(context: Context, _args: argparse.Namespace) -> int:
    """``lock``: done when the kernel has dropped what it held, or a deadline has passed.

    Without a mount there may still be a key that is kept in this session.
    """
    data = _told(context, "lock", {})
    if data is None:
        chosen = config.load(context.home.config_path).key_vault
        if chosen is None or chosen.cache_seconds is None:
            raise MeshkitError("not_mounted", _NOT_MOUNTED)
        open_key_vault(context).forget()
        context.out.result({"locked": None, "left": []}, ["This session keeps the key no longer."])
        return 0
    lines = ["Locked. 'meshkitfs unlock' opens it again."]
    left = data.get("left") or []
    context.out.result(data, lines + (left_lines(left) if left else []))
    return 0


def unlock(context: Context, _args: argparse.Namespace) -> int:
    """``unlock``: a passphrase is asked for here, a keyring is asked by the daemon."""
    if _ask(context, "status", {}).get("locked") is None:
        context.out.result({"locked": None}, ["It is not locked."])
        return 0
    params: dict[str, Any] = {}
    vault = open_key_vault(context)
    if vault.asks() is not None:
        key = vault.load()
        context.passphrase.forget()
        params["key"] = key.hex()
        wipe(key)
    data = _ask(context, "unlock", params)
    context.out.result(data, ["Unlocked."])
    return 0


def _ask(context: Context, method: str, params: dict[str, Any]) -> dict[str, Any]:
    answer = _told(context, method, params)
    if answer is None:
        raise MeshkitError("not_mounted", _NOT_MOUNTED)
    return answer


def _told(context: Context, method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    context.home.require_initialized()
    return client.ask_daemon(context.home, method, params)
