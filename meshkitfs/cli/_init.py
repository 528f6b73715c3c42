"""Setting up a home: ``init`` and ``identity create``."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..daemon import client, config, logs
from ..errors import MeshkitError
from . import _joining as joining
from ._context import Context
from ._inviting import claim_it, claimed, read_ticket
from ._keyvault import seal_of, warn_of
from ._output import fields, printable

if TYPE_CHECKING:
    from ..net import Secret
    from ..providers import ProviderSpec

__all__ = ["agreed_stores", "create_identity", "init", "named_metadata"]

_HOLD_SECONDS = 20.0


def init(context: Context, args: argparse.Namespace) -> int:
    """``init``: an identity, a key vault and a configuration; published unless told otherwise."""
    if args.invitation is None:
        return _set_up(context, args, args.identity, publish=not args.no_publish)
    return _set_up(context, args, args.identity, publish=True, invitation=read_ticket(args.invitation))


def create_identity(context: Context, args: argparse.Namespace) -> int:
    """``identity create [NAME]``: as ``init``, without publishing."""
    return _set_up(context, args, args.name, publish=False)


def _set_up(
    context: Context, args: argparse.Namespace, name: str | None, *, publish: bool, invitation: str = ""
) -> int:
    home = context.home
    if home.initialized:
        if not args.if_needed:
            raise MeshkitError("already_initialized", str(home.root))
        context.out.result({"home": str(home.root), "created": False}, [f"{home.root} is set up already."])
        return 0
    given = _existing_settings(context)
    handle = name or (
        given.identity if given and given.identity != config.DEFAULT_IDENTITY else _login_name()
    )
    from ..daemon.founding import initialize

    join = joining.join(args.join_file)
    if invitation:
        join = _follow(args, invitation) or join
    provider = _offered(context, args, given, invitation) or _provider(context, args.provider, given)
    metadata = _metadata(context, args, given)
    if given:
        _agree(context, given, provider, metadata)
    with home.hold(wait=_HOLD_SECONDS):
        logs.setup_home(home)
        data = client.run_async(
            partial(
                initialize,
                home,
                handle,
                provider,
                metadata,
                args.key_vault or (given.key_vault.type if given and given.key_vault else None),
                context.passphrase,
                publish,
                join,
                seal_of(args),
            )
        )
    vault = data.get("key_vault") or {}
    lines = [f"Created the identity {printable(data.get('handle', handle))}."]
    lines += fields(
        [
            ("fingerprint", data.get("fingerprint")),
            ("home", home.root),
            ("key vault", vault.get("kind")),
            ("", vault.get("detail")),
        ]
    )
    data |= {"home": str(home.root), "created": True}
    if invitation:
        data["invitation"] = claim_it(context, invitation)
        lines += claimed(data["invitation"])
    context.out.result(data, lines)
    warn_of(context, vault.get("kind"))
    return 0


def _follow(args: argparse.Namespace, text: str) -> Secret | None:
    """Use the metadata service that an invitation names; returns what lets one in there, if it says."""
    from ..core.ticket import Ticket
    from ..net import Secret

    ticket = Ticket.from_text(text)
    if not ticket.url:
        if args.metadata is None:
            raise MeshkitError(
                "invalid_argument", "the invitation names no metadata service: say --metadata FILE"
            )
        return None
    args.metadata = args.metadata or ticket.url
    return Secret.checked(ticket.join, "the invitation") if ticket.join else None


def _offered(
    context: Context, args: argparse.Namespace, given: config.Config | None, invitation: str
) -> ProviderSpec | None:
    """Return the byte store that an invitation names, after showing it, unless something else is said."""
    from ..core.ticket import Ticket
    from ..providers import ProviderSpec, shareable

    store = Ticket.from_text(invitation).store if invitation else ""
    if not store or args.provider is not None or given is not None:
        return None
    try:
        spec = ProviderSpec.from_config(json.loads(store), context.home.root)
        if spec.to_config() != shareable(spec):
            raise MeshkitError("invalid_config", "it names places of this machine, or credentials")
    except (ValueError, MeshkitError) as error:
        detail = error.detail if isinstance(error, MeshkitError) else "it is not JSON"
        raise MeshkitError(
            "invalid_argument", f"the byte store in the invitation cannot be used ({detail}): say --provider"
        ) from None
    context.out.note(
        f"The invitation names this byte store, where your files will be, too: {printable(store)}"
    )
    if context.out.interactive and sys.stdin.isatty():
        print("Use it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise MeshkitError(
                "operation_aborted", "the byte store was not wanted: say another with --provider"
            )
    return spec


def agreed_stores(
    context: Context, args: argparse.Namespace, carried: config.Config
) -> tuple[ProviderSpec, config.MetadataConfig, str | None]:
    """Return the stores and the kind of key vault for an identity that comes from elsewhere.

    What is said goes before what its home used; what a configuration that is there says must agree.
    """
    given = _existing_settings(context)
    provider = _provider(context, args.provider, given or carried)
    metadata = _metadata(context, args, given or carried)
    if given:
        _agree(context, given, provider, metadata)
    kind = args.key_vault or (given.key_vault.type if given and given.key_vault else None)
    return provider, metadata, kind


def named_metadata(context: Context, args: argparse.Namespace) -> config.MetadataConfig:
    """Return the metadata store that was said, or that a configuration which is there names.

    Raises ``invalid_argument`` if neither does.
    """
    given = _existing_settings(context)
    if args.metadata is None and given is None:
        raise MeshkitError("invalid_argument", "say --metadata: the one that the other device uses")
    return _metadata(context, args, given)


def _existing_settings(context: Context) -> config.Config | None:
    """Return a configuration that was written before the identity, so that init follows it."""
    if not os.path.lexists(context.home.config_path):
        return None
    return config.load(context.home.config_path)


def _provider(context: Context, text: str | None, given: config.Config | None) -> ProviderSpec:
    from ..providers import ProviderSpec, parse_provider

    if text is not None:
        return parse_provider(text)
    return given.provider if given else ProviderSpec.local(context.home.blocks_dir)


def _metadata(
    context: Context, args: argparse.Namespace, given: config.Config | None
) -> config.MetadataConfig:
    if args.metadata is None:
        where = given.metadata if given else config.MetadataConfig(context.home.metadata_db)
    else:
        where = config.MetadataConfig.parse(args.metadata)
        if where.url and given and given.metadata.url.rstrip("/") == where.url.rstrip("/"):
            where = given.metadata  # with its certificate authority, and how else it is reached
    if args.metadata_ca is None:
        return where
    if where.type != "http":
        raise MeshkitError("invalid_argument", "--metadata-ca is for a metadata service")
    return replace(where, ca_file=Path(_absolute(args.metadata_ca)))


def _agree(
    context: Context, given: config.Config, provider: ProviderSpec, metadata: config.MetadataConfig
) -> None:
    """A configuration that is there is never changed, so nothing may be set up that it does not say.

    Raises ``invalid_argument``.
    """
    same = {
        "byte store": provider == given.provider,
        f"metadata store (not {metadata.place})": metadata == given.metadata,
    }
    for what in (what for what, agreed in same.items() if not agreed):
        raise MeshkitError(
            "invalid_argument",
            f"{context.home.config_path} says something else about the {what}: write there what is meant, "
            "or leave the option out",
        )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name.lower()
    except KeyError:
        raise MeshkitError("invalid_argument", "this user has no name; choose one with --identity") from None
