"""What is wrong with an endpoint, in words: what its failure tells of the cause, and what to do."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ..errors import MeshkitError

__all__ = ["METADATA", "STORE", "Place", "explained"]


class Place(NamedTuple):
    """How the person has configured the endpoint: what it is, and what its settings are called."""

    what: str
    url: str
    ca: str
    certificate: str
    token: str


METADATA: Final = Place(
    "meshkitfs service",
    "metadata.url",
    "metadata.caFile",
    "metadata.clientCert and metadata.clientKey",
    "the identity",
)
STORE: Final = Place(
    "byte store of that type",
    "its address",
    "'caFile'",
    "'clientCertificate' and 'clientKey'",
    "the token, user name or keys",
)

# What stands in the text of a failure, what it means, what to do. The first that fits counts.
_WORDS: Final = (
    (r"certificate has expired|not yet valid", "its TLS certificate has run out, or has not begun",
     "Ask whoever runs it to renew it, and check this device's clock."),
    (r"(Hostname|IP address) mismatch|not valid for '", "its TLS certificate is for another host",
     "Correct {url}: use the name that is in the certificate. If it was right before, ask whoever runs it: "
     "somebody may be in between."),
    (r"CERTIFICATE_VERIFY_FAILED", "its TLS certificate is not one that this device trusts",
     "Name its certificate authority in {ca}. If it was trusted before, ask whoever runs it: "
     "somebody may be in between."),
    (r"CERTIFICATE_REQUIRED", "it wants to see a client certificate", "Set {certificate}."),
    (r"HANDSHAKE_FAILURE", "it does not agree on TLS; perhaps it wants a client certificate",
     "Set {certificate}, or ask whoever runs it."),
    (r"WRONG_VERSION_NUMBER|RECORD_LAYER", "it does not speak TLS there",
     "Correct {url}: host, port, scheme."),
    (r"Name or service not known|name resolution|No address associated", "nobody knows that host",
     "Correct {url}, or mend the network."),
    (r"Network is unreachable|No route to host", "there is no way to that host from here",
     "Mend the network, or correct {url}."),
    (r"attempts to connect to|ConnectError", "nobody listens at that address",
     "Start it, or correct {url}: host and port."),
    (r"no answer within|Timeout", "it does not answer in time", "Look at it, and at the network to it."),
    (r"redirect",
     "it sends elsewhere, which is not followed: to a login page, or to where it really is",
     "Set {url} to where it really is."),
    # With TLS 1.3 a server says only after the handshake that it misses a certificate, and often just ends.
    # And one that speaks TLS hangs up on who does not.
    (r"disconnected without",
     "it breaks off; it may speak TLS (https) only, want a client certificate, or not speak HTTP",
     "Correct {url}: host, port, scheme; if it asks for a certificate, set {certificate}."),
    (r"RemoteProtocolError|ReadError", "what answers there does not speak HTTP, or breaks off",
     "Correct {url}: host, port, scheme."),
    (r"HTTP 407\b", "a proxy on the way wants to know who you are", "Correct {url}, or set the proxy up."),
    (r"it speaks version", "it is one of another version", "Update this program, or the service."),
    (r"not JSON|not a meshkitfs service|without an ETag",
     "what answers there is no {what}; perhaps a login page, or another service",
     "Open the address in a browser to see what it is, and correct {url}."),
    (r"HTTP 50[234]\b", "a proxy before it cannot reach it, or it is in trouble", "Look at its own log."),
    (r"HTTP 5\d\d\b", "it is there, and in trouble", "Look at its own log."),
    (r"HTTP 429\b", "it is asked too often", "Wait a minute, and raise its limits if that is not enough."),
)  # fmt: skip
# Where nobody else has words for what a status means.
_STATUS: Final = (
    (r"HTTP 401 from", "it wants to know who you are, or does not believe it",
     "Check {token}, and where the configuration says they are."),
    (r"HTTP 403 from", "it does not allow that: a token for reading only, or an interface that is closed",
     "Ask whoever runs it for the right to write; check {token} and {url}."),
    (r"HTTP 40[45] from", "there is something, and it has no such interface: another port or path is meant",
     "Correct {url}: for an IPFS node it is that of the RPC (port 5001), not of the gateway (8080)."),
    (r"HTTP 400 from", "it does not understand what is asked: it may want https, or be something else",
     "Correct {url}: host, port, scheme."),
)  # fmt: skip


def explained(error: MeshkitError, place: Place) -> tuple[str, str] | None:
    """Return what the failure of an endpoint means and what to do; None if its own words say it best."""
    if error.code == "cid_mismatch":
        sentence = "it answers with other bytes than were asked for: it is damaged, or it is a login page"
        return sentence, f"Open the address in a browser to see what it is, and correct {place.url}."
    table: tuple[tuple[str, str, str], ...] = _WORDS
    if place is METADATA:
        # A service of its own would have answered in its own words.
        table += ((r"HTTP ", "what answers there is no {what}", "Correct {url}."),)
    else:
        table += _STATUS
    for sign, sentence, remedy in table:
        if re.search(sign, error.detail):
            names = place._asdict()
            return sentence.format(**names), remedy.format(**names)
    return None
