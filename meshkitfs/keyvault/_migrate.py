"""Moving a home's key from one key vault to another, so that a kill at any moment costs nothing.

    1 key-move says "copying"       the old key vault counts
    2 the new key vault is made, and read back by another object
    3 key-move says "switched"      from here on the new key vault counts
    4 the configuration names the new kind
    5 the old key vault is destroyed
    6 key-move is removed

At each moment the home opens with the key vault that counts, and the same command, run again, finishes the
move (or, before 3, begins it anew).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault._api import KeyVault, KeyVaultReport, Passphrase
from meshkitfs.keyvault._choose import existing, make
from meshkitfs.keyvault._files import remove_leftovers, vault_file
from meshkitfs.keyvault._move import Move, finished, under_way
from meshkitfs.keyvault._session_cache import SessionCache
from meshkitfs.keyvault._strength import rank, require
from meshkitfs.keyvault._tpm2 import Seal


def migrate(
    directory: Path,
    kind: str,
    configure: Callable[[str], None],
    *,
    old_passphrase: Passphrase | None = None,
    new_passphrase: Passphrase | None = None,
    seal: Seal | None = None,
    demands: Iterable[str] = (),
    weaker: bool = False,
) -> KeyVaultReport:
    """Move the key of the home ``directory``, which the caller holds, to a key vault of ``kind``.

    ``configure`` is called with that kind once the new key vault counts; it makes the home's configuration
    name it, durably, and may be called again. ``weaker`` allows a key vault that ranks below the present one,
    but none that does not give what is demanded (``demands``).

    Raises MeshkitError: ``already_initialized`` (it is there already), ``keyvault_refused`` (weaker, or its
    file is open to others), ``keyvault_too_weak``, and what opening the old and making the new key vault
    raises. Whatever it raises, the home's key is where it was, or moved, and the command can be run again.
    """
    remove_leftovers(directory)
    move = under_way(directory)
    if move is not None and move.switched:
        # What has happened to the new one since it was read back is not known, and the old one is going.
        mine = move.new == kind
        wipe(_read_back(directory, move.new, new_passphrase if mine else old_passphrase))
        report = _finish(directory, move, configure)
        if mine:
            return report
        move = None
    elif move is not None and move.new != kind:
        _abandon(directory, move, old_passphrase)
        move = None
    held = existing(directory)
    if held is None:
        raise MeshkitError("identity_not_found", f"there is no key vault in {directory}")
    if held == kind:
        raise MeshkitError("already_initialized", f"the key of {directory} is in its {kind} key vault")
    old = make(held, directory, old_passphrase)
    new = make(kind, directory, new_passphrase, None, seal)
    _require_fit(old, new, demands, weaker)
    if move is None and os.path.lexists(vault_file(directory, kind)):
        # Not a copy that an earlier run made: nobody knows what it is, so it is not replaced.
        raise MeshkitError("already_initialized", f"{vault_file(directory, kind)} was not made by a move")
    secret = old.load()
    move = Move(held, kind)
    move.write(directory)
    new.destroy()
    new.create(secret)
    found = _read_back(directory, kind, new_passphrase)
    same = hmac.compare_digest(found, secret)
    wipe(found)
    wipe(secret)
    if not same:
        raise MeshkitError("keyvault_unavailable", f"the {kind} key vault gives back another key")
    move = Move(held, kind, switched=True)
    move.write(directory)
    return _finish(directory, move, configure)


def _require_fit(old: KeyVault, new: KeyVault, demands: Iterable[str], weaker: bool) -> None:
    there, here = old.report(), new.report()
    if not here.available:
        raise MeshkitError("keyvault_unavailable", here.detail)
    require(here, demands)
    if not weaker and rank(here) < rank(there):
        raise MeshkitError("keyvault_refused", f"{new.kind} is weaker than {old.kind}; --weaker allows it")


def _read_back(directory: Path, kind: str, passphrase: Passphrase | None) -> bytes:
    """Read the key as the next start will, from what is durable. The old key vault is still whole."""
    return make(kind, directory, passphrase).load()


def _finish(directory: Path, move: Move, configure: Callable[[str], None]) -> KeyVaultReport:
    configure(move.new)
    # With what a session may keep of it.
    SessionCache(make(move.old, directory), directory).destroy()
    finished(directory)
    return make(move.new, directory).report()


def _abandon(directory: Path, move: Move, passphrase: Passphrase | None) -> None:
    """Give up a move whose copy does not count yet, after making sure that the old key vault opens."""
    wipe(make(move.old, directory, passphrase).load())
    make(move.new, directory).destroy()
    finished(directory)
