"""Byte stores: where sealed blocks are kept. The only thing that comes out of here is a `VerifiedBlock`."""

from meshkitfs.providers._api import ByteStore, Counters, Usage
from meshkitfs.providers._scrub import Scrubbed, scrub
from meshkitfs.providers._spec import ProviderSpec, open_provider, parse_provider
from meshkitfs.providers.local import LocalStore

__all__ = [
    "ByteStore",
    "Counters",
    "LocalStore",
    "ProviderSpec",
    "Scrubbed",
    "Usage",
    "open_provider",
    "parse_provider",
    "scrub",
]
