"""Byte stores: where sealed blocks are kept. The only thing that comes out of here is a `VerifiedBlock`."""

from meshkitfs.providers._api import ByteStore, Capabilities, Counters, Source, Usage
from meshkitfs.providers._examine import Examined, Step, examine
from meshkitfs.providers._scrub import Listable, Scrubbed, scrub
from meshkitfs.providers._spec import ProviderSpec, open_provider, parse_provider, shareable
from meshkitfs.providers.local import LocalOptions, LocalStore

__all__ = [
    "ByteStore",
    "Capabilities",
    "Counters",
    "Examined",
    "Listable",
    "LocalOptions",
    "LocalStore",
    "ProviderSpec",
    "Scrubbed",
    "Source",
    "Step",
    "Usage",
    "examine",
    "open_provider",
    "parse_provider",
    "scrub",
    "shareable",
]
