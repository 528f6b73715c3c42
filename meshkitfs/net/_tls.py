"""What the connections to servers are checked against."""

from __future__ import annotations

import ssl
from functools import lru_cache

from meshkitfs.errors import MeshkitError
from meshkitfs.net._types import Tls

__all__ = ["client_context"]


def client_context(tls: Tls) -> ssl.SSLContext:
    """Return the context of a client's connections. Raises invalid_config for a file that cannot be used.

    Reading the system's authorities takes far longer than anything else about an endpoint, and a home has
    several of them, so those that trust the system, and show no certificate of their own, share one context.
    Files that the configuration names are read each time: they may have been renewed.
    """
    if tls == Tls():
        return _of_the_system(ssl.get_default_verify_paths())
    return _read(tls)


@lru_cache(maxsize=1)
def _of_the_system(_paths: ssl.DefaultVerifyPaths) -> ssl.SSLContext:
    """``_paths`` is where the authorities are at the moment: the environment may say so (SSL_CERT_FILE)."""
    return _read(Tls())


def _read(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise MeshkitError("invalid_config", f"a TLS file cannot be used: {error}") from None
    return context
