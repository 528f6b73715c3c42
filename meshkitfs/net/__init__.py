"""Talking HTTP to servers that may be slow, away, broken or malicious: the one place where that is handled.

Everything that leaves this machine goes through an `Endpoint`, so that a deadline, a size cap, the rules for
redirects and TLS, retries, the number of requests at a time and the memory of a dead server are the same
everywhere. What an answer *means* is its caller's to say; nothing here trusts one.
"""

from meshkitfs.net._endpoint import Endpoint
from meshkitfs.net._retry import backoff
from meshkitfs.net._secrets import BearerAuth, Secret, SecretSource
from meshkitfs.net._types import Codes, Limits, Reply, Tls
from meshkitfs.net.signing import SignatureAuth, Signed, verify_request

__all__ = [
    "BearerAuth",
    "Codes",
    "Endpoint",
    "Limits",
    "Reply",
    "Secret",
    "SecretSource",
    "SignatureAuth",
    "Signed",
    "Tls",
    "backoff",
    "verify_request",
]
