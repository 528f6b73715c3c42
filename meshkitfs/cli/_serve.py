"""Commands for who runs a service: ``serve``, ``serve-invite``."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..core.durations import parse_span
from ..daemon import logs
from ..daemon.config import LOG_FORMATS
from ..daemon.notify import Notifier
from ..errors import MeshkitError
from ._context import Context
from ._output import clock

__all__ = [
    "database_options",
    "run",
    "serve",
    "serve_commands",
    "serve_invite",
    "server_room",
    "settings_of",
]

DEFAULT_LIFE: Final = "7d"


def serve(context: Context, args: argparse.Namespace) -> int:
    """``serve``: run the service in this process until it is told to end."""
    server = server_room()
    settings = settings_of(server, args)
    notifier = Notifier.take()
    logs.setup(None, stderr=True, level=logging.WARNING, form=settings.log_format)

    def started(addresses: list[str]) -> None:
        data = {"listening": addresses, "join": settings.join}
        context.out.result(data, [f"Listening on {', '.join(addresses)}. Ctrl-C ends it."])
        sys.stdout.flush()
        if notifier is not None:
            notifier.ready(f"Listening on {', '.join(addresses)}")

    run(partial(server.serve, settings, started))
    return 0


def serve_invite(context: Context, args: argparse.Namespace) -> int:
    """``serve-invite``: make an invitation in the name of who runs the service."""
    server = server_room()
    settings = settings_of(server, args)
    code, expires = run(partial(server.invite, settings, parse_span(args.expires)))
    context.out.result(
        {"code": code, "expires": expires},
        [code, f"Good for one newcomer until {clock(expires)}. It is shown only now."],
    )
    return 0


def serve_commands(add: Any) -> None:
    """Add ``serve`` and ``serve-invite`` to the grammar."""
    parser = add.command(
        "serve",
        serve,
        "run a metadata service for others",
        "Serve capsules, rosters, heads, mailboxes and the identity directory to members, until SIGTERM.\n"
        "Everything can be set in a file (--config), and the following also here.",
        "meshkitfs serve --database /srv/meshkitfs/metadata.db --listen 127.0.0.1:8787",
    )
    database_options(parser)
    parser.add_argument(
        "--listen",
        metavar="PLACE",
        action="append",
        help="HOST:PORT or unix:PATH, repeatable (default: 127.0.0.1:8787, or what systemd hands over)",
    )
    parser.add_argument(
        "--name", metavar="HOST[:PORT]", action="append", help="what clients call this service, repeatable"
    )
    parser.add_argument(
        "--join", metavar="POLICY", help="who may become a member: invite (default), token, open"
    )
    parser.add_argument("--join-token-file", metavar="FILE", help="the token of the policy 'token'")
    parser.add_argument(
        "--release-key-file", metavar="FILE", help="release keys: a file of mode 0600 with 64 hex digits"
    )
    parser.add_argument("--tls-cert-file", metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key-file", metavar="FILE", help="its private key, PEM")
    parser.add_argument(
        "--tls-client-ca-file", metavar="FILE", help="ask clients for a certificate of this CA"
    )
    parser.add_argument(
        "--metrics", metavar="PLACE", help="show metrics for Prometheus at HOST:PORT or unix:PATH"
    )
    parser.add_argument("--log-format", choices=LOG_FORMATS, help="how the log is written (default: text)")
    invite = add.command(
        "serve-invite",
        serve_invite,
        "invite somebody to a service that you run",
        "Make an invitation directly in the service's database; the service may be running.",
        "meshkitfs serve-invite --database /srv/meshkitfs/metadata.db",
    )
    database_options(invite)
    invite.add_argument(
        "--expires", metavar="DURATION", default=DEFAULT_LIFE, help=f"how long it is good for: 12h, 30d "
        f"(default: {DEFAULT_LIFE})",
    )  # fmt: skip


def database_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which service's database is meant."""
    parser.add_argument(
        "--database", metavar="PLACE", help="a file, or postgresql://HOST/NAME without a password"
    )
    parser.add_argument("--database-file", metavar="FILE", help="a file of mode 0600 that holds the PLACE")


def settings_of(server: Any, args: argparse.Namespace) -> Any:
    """The configuration file with the options over it."""
    overrides: dict[str, Any] = {}
    if args.database is not None:
        is_address = server.is_postgresql(args.database)
        overrides["database"] = args.database if is_address else str(Path(args.database).absolute())
        overrides["database_secret"] = server.SecretSource()
    if args.database_file is not None:
        overrides["database_secret"] = server.SecretSource(file=Path(args.database_file).absolute())
        if args.database is None:
            overrides["database"] = ""
    if getattr(args, "listen", None):
        overrides["listen"] = tuple(args.listen)
    if getattr(args, "name", None):
        overrides["names"] = frozenset(args.name)
    if getattr(args, "join", None):
        overrides["join"] = args.join
    if getattr(args, "metrics", None):
        overrides["metrics"] = args.metrics
    if getattr(args, "log_format", None):
        overrides["log_format"] = args.log_format
    if getattr(args, "join_token_file", None):
        overrides["join_token"] = server.SecretSource(file=Path(args.join_token_file).absolute())
    if getattr(args, "release_key_file", None):
        overrides["release_key"] = server.SecretSource(file=Path(args.release_key_file).absolute())
    tls = [getattr(args, name, None) for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file")]
    if any(tls):
        if not (tls[0] and tls[1]):
            raise MeshkitError("invalid_argument", "--tls-cert-file and --tls-key-file go together")
        overrides["tls"] = server.TlsFiles(*(Path(name).absolute() if name else None for name in tls))
    config = getattr(args, "config", None)
    return server.load(Path(config) if config else None, overrides)


def run(work: Any) -> Any:
    """Run it under trio; the one failure of a group of tasks comes out as itself."""
    import trio  # other commands do without it

    try:
        return trio.run(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None


def server_room() -> Any:
    """The service's room: its packages are an extra, and only these commands need them."""
    try:
        from .. import server
    except ImportError as error:
        missing = f"{error.name or 'a package'} is missing: pip install 'meshkitfs[server]'"
        raise MeshkitError("not_supported", missing) from None
    return server
