"""What is wrong with a metadata service, in words. Asks it who it is, unsigned: no key is needed for that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from ..daemon.client import run_async
from ..daemon.config import MetadataConfig
from ..errors import MeshkitError
from ..metadata import look
from ..net import Tls

__all__ = ["examine"]

# Signed requests are refused from 120 s on; half of that is a clock to be mended.
_SKEW_FAIL_S: Final = 120
_SKEW_WARN_S: Final = 60

# What stands in the text of a failure, what it means, and what to do.
_WORDS: Final = (
    ("CERTIFICATE_VERIFY_FAILED", "its TLS certificate is not one that this device trusts",
     "Name its certificate authority in metadata.caFile. If it was trusted before, ask whoever runs it: "
     "somebody may be in between."),
    ("CERTIFICATE_REQUIRED", "it wants to see a client certificate",
     "Set metadata.clientCert and metadata.clientKey."),
    ("HANDSHAKE_FAILURE", "it does not agree on TLS; perhaps it wants a client certificate",
     "Set metadata.clientCert and metadata.clientKey, or ask whoever runs it."),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS there", "Correct metadata.url: host, port, scheme."),
    ("RECORD_LAYER", "it does not speak TLS there", "Correct metadata.url: host, port, scheme."),
    ("Name or service not known", "nobody knows that host", "Correct metadata.url, or mend the network."),
    ("name resolution", "nobody knows that host", "Correct metadata.url, or mend the network."),
    ("attempts to connect to", "nobody listens at that address",
     "Start the service, or correct metadata.url."),
    ("ConnectError", "it cannot be reached", "Start the service, or correct metadata.url."),
    ("no answer within", "it does not answer in time", "Look at the service, and at the network to it."),
    ("redirect", "it sends elsewhere, which is not followed", "Set metadata.url to where it really is."),
    # With TLS 1.3 a server says only after the handshake that it misses a certificate, and often just ends.
    ("disconnected without", "it breaks off; it may want a client certificate, or not speak HTTP",
     "If it asks for one, set metadata.clientCert and metadata.clientKey; else correct metadata.url."),
    ("RemoteProtocolError", "what answers there does not speak HTTP, or breaks off",
     "Correct metadata.url: host, port, scheme."),
    ("not JSON", "what answers there is no meshkitfs service", "Correct metadata.url."),
    ("not a meshkitfs service", "what answers there is no meshkitfs service",
     "Correct metadata.url."),
    ("it speaks version", "it is one of another version", "Update this program, or the service."),
    ("HTTP 50", "it is there, and in trouble", "Look at its own log."),
    ("HTTP ", "what answers there is no meshkitfs service", "Correct metadata.url."),
)  # fmt: skip


def examine(settings: MetadataConfig) -> Iterator[tuple[str, str, str]]:
    """Yield findings about the service: status (ok, warn, fail), what was found, what to do."""
    tls = Tls(settings.ca_file, settings.client_cert, settings.client_key)
    try:
        info = run_async(partial(look, settings.url, tls, settings.socket))
    except MeshkitError as error:
        if error.code != "metadata_unavailable":
            raise
        sentence, remedy = next(
            ((words, todo) for sign, words, todo in _WORDS if sign in error.detail),
            (error.reason.sentence, error.remedy),
        )
        yield "fail", f"{settings.url}: {sentence} ({error.detail})", remedy
        return
    yield "ok", f"{settings.url} answers (newcomers: {info.join})", ""
    skew = time.time() - info.time
    if abs(skew) >= _SKEW_WARN_S:
        where = "ahead of" if skew > 0 else "behind"
        yield (
            "fail" if abs(skew) >= _SKEW_FAIL_S else "warn",
            f"this device's clock is {abs(skew):.0f} s {where} the service's; from {_SKEW_FAIL_S} s on, no "
            "signed request is taken",
            "Set the clock of whichever is wrong; network time (NTP) keeps it right.",
        )
