"""An identity in a file: ``identity export|import`` and ``identity recovery create|restore``."""

from __future__ import annotations

import argparse
import base64
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ..core.secret_memory import SecretBytes
from ..daemon import client, logs
from ..errors import MeshkitError
from ._context import Context
from ._grammar import Adder
from ._init import agreed_stores
from ._keyvault import seal_of, warn_of
from ._new_file import new_file
from ._output import clock, fields, printable
from ._words import WORDS, WordsPlace, ask_words, words_of

if TYPE_CHECKING:
    from .. import keyvault
    from ..daemon.carrying import Carried

__all__ = ["moving_commands"]

_HOLD_SECONDS: Final = 20.0


def export(context: Context, args: argparse.Namespace) -> int:
    """``identity export FILE``"""
    from .. import keyvault
    from ..daemon import sealed_file

    ask = context.passphrase.second()

    with new_file(args.file) as file:
        key = SecretBytes(os.urandom(keyvault.KEY_BYTES))
        try:
            phrase = ask(keyvault.NEW_EXPORT_PROMPT)
            header = keyvault.seal_with_passphrase(phrase, bytes(key.view))
            data = _written(context, file, "export", sealed_file.EXPORT, header, key)
        finally:
            key.wipe()
            ask.forget()
    lines = [f"Wrote {printable(data['handle'])} to {printable(args.file)}, sealed with the passphrase."]
    context.out.result(data | {"file": os.path.abspath(args.file)}, lines)
    _notes(context, data)
    context.out.note("Use it in one home at a time: when it is imported elsewhere, give this home up.")
    return 0


def import_(context: Context, args: argparse.Namespace) -> int:
    """``identity import FILE``"""
    from .. import keyvault
    from ..daemon import carrying, sealed_file

    _free(context)
    vaults = context.passphrase.second()
    content = sealed_file.open_export(Path(args.file), lambda: context.passphrase(keyvault.EXPORT_PROMPT))
    return _taken(context, args, carrying.opened(content), vaults)


def create_recovery(context: Context, args: argparse.Namespace) -> int:
    """``identity recovery create FILE``: the words are shown only when the file is on the disk."""
    from ..daemon import sealed_file

    place = WordsPlace(args.words_fd)

    try:
        with new_file(args.file) as file:
            words = SecretBytes(os.urandom(sealed_file.WORDS_BYTES))
            salt = os.urandom(sealed_file.SALT_BYTES)
            key = SecretBytes(sealed_file.recovery_key(bytes(words.view), salt))
            try:
                data = _written(context, file, "recovery", sealed_file.RECOVERY, salt, key)
                if args.words_fd is None:
                    context.out.note(
                        f"The {WORDS} words of this file. Write them down, and keep them where the file is "
                        "not. They are not shown again."
                    )
                place.show(words_of(bytes(words.view)))
            finally:
                key.wipe()
                words.wipe()
    finally:
        place.close()
    data = context.call("identity.recovery_made", {"made": data["made"]}) | data
    lines = [f"Wrote a recovery file of {printable(data['handle'])} to {printable(args.file)}."]
    context.out.result(data | {"file": os.path.abspath(args.file)}, lines)
    _notes(context, data)
    return 0


def restore(context: Context, args: argparse.Namespace) -> int:
    """``identity recovery restore FILE``"""
    from ..daemon import carrying, sealed_file

    _free(context)
    content = sealed_file.open_recovery(Path(args.file), lambda: ask_words(args.words_fd))
    return _taken(context, args, carrying.opened(content), context.passphrase)


def _free(context: Context) -> None:
    """Raise ``already_initialized`` if there is an identity in this home."""
    if context.home.initialized:
        raise MeshkitError("already_initialized", str(context.home.root))


def _written(
    context: Context, file: BinaryIO, kind: str, mark: bytes, header: bytes, key: SecretBytes
) -> dict[str, Any]:
    """Have the home seal itself, and write the whole file to the disk."""
    from ..daemon import sealed_file

    params = {"kind": kind, "header": base64.b64encode(header).decode(), "key": key.view.hex()}
    data = context.call("identity.seal", params)
    file.write(sealed_file.finish(mark, header, base64.b64decode(data.pop("sealed"))))
    file.flush()
    os.fsync(file.fileno())
    return data


def _notes(context: Context, data: dict[str, Any]) -> None:
    """Say what is not in the file."""
    for what in data["inside"]:
        context.out.note(f"The {what} is in the home itself and not in the file: keep a copy of it too.")
    if data["unsent"]:
        names = ", ".join(map(printable, data["unsent"]))
        context.out.note(f"Not in the file are changes that were not published yet: {names}.")


def _taken(
    context: Context, args: argparse.Namespace, carried: Carried, passphrase: keyvault.Passphrase
) -> int:
    """Make this home the one of what was carried here."""
    home = context.home
    provider, metadata, kind = agreed_stores(context, args, carried.config(home.root))
    with home.hold(wait=_HOLD_SECONDS):
        logs.setup_home(home)
        from ..daemon.founding import initialize

        data = client.run_async(
            partial(
                initialize,
                home,
                carried.identity.handle,
                provider,
                metadata,
                kind,
                passphrase,
                False,
                None,
                seal_of(args),
                carried,
                not args.unchecked,
            )
        )
    vault = data.get("key_vault") or {}
    lines = [f"This home is {printable(data['handle'])} now."]
    lines += fields(
        [
            ("fingerprint", data.get("fingerprint")),
            ("home", home.root),
            ("key vault", vault.get("kind")),
            ("", vault.get("detail")),
            ("as it was", clock(data["made"])),
            ("shares", len(data["shares"])),
        ]
    )
    context.out.result(data | {"home": str(home.root)}, lines)
    warn_of(context, vault.get("kind"))
    return 0


def moving_commands(
    identity: Adder,
    stores: Callable[[argparse.ArgumentParser], None],
    descriptor: Callable[[str], int],
) -> None:
    """Add them below ``identity``; ``stores`` adds the options about stores and key vault."""
    out = identity.command(
        "export",
        export,
        "write your identity, sealed with a passphrase, to a file for another home",
        "Write the identity with all its keys, its contacts, and what this home knows of its shares to the\n"
        "new file FILE, sealed with a passphrase. Unsent changes and files are not in it.\n"
        "With --passphrase-fd the first line is for the key vault, the second for the file.",
        "meshkitfs identity export alice.identity",
    )
    out.add_argument("file", metavar="FILE", help="the file to write; it must not be there")
    take = identity.command(
        "import",
        import_,
        "make this home the one of an exported identity",
        "Set up this home, which has no identity yet, with what is in FILE. The stores are those of the\n"
        "exported home, unless others are named, and have to be there.\n"
        "With --passphrase-fd the first line is for the file, the second for the new key vault.",
        "meshkitfs identity import alice.identity",
    )
    group = identity.group("recovery", "a file and words that bring your identity back when all else is lost")
    make = group.command(
        "create",
        create_recovery,
        "write a recovery file, and show its words once",
        f"Write the new file FILE, and show the {WORDS} words that open it: once, on the terminal.\n"
        "Together they are the identity; apart they are nothing.",
        "meshkitfs identity recovery create alice.recovery",
    )
    make.add_argument("file", metavar="FILE", help="the file to write; it must not be there")
    _words_option(make, descriptor, "write the words to file descriptor N, and not to the terminal")
    back = group.command(
        "restore",
        restore,
        "make this home the one of a recovery file",
        "Set up this home, which has no identity yet, with what is in FILE, and find the shares again:\n"
        "yours, and those that others gave you. The stores are those of the lost home, unless others are\n"
        "named.",
        "meshkitfs identity recovery restore alice.recovery",
    )
    _words_option(back, descriptor, "read the words from file descriptor N")
    for parser in (take, back):
        parser.add_argument("file", metavar="FILE", help="the file")
        stores(parser)
        parser.add_argument(
            "--unchecked",
            action="store_true",
            help="do not ask the directory whether these are the newest keys",
        )


def _words_option(parser: argparse.ArgumentParser, descriptor: Callable[[str], int], what: str) -> None:
    parser.add_argument("--words-fd", metavar="N", type=descriptor, help=what)
