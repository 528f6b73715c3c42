"""Metadata homes: capsules, rosters, timestamps, heads, mailboxes and the identity directory."""

from meshkitfs.metadata._api import Metadata, Publication, ShareState
from meshkitfs.metadata.embedded import EmbeddedMetadata
from meshkitfs.metadata.http import HttpMetadata, KeyPin, ServiceInfo

__all__ = [
    "EmbeddedMetadata",
    "HttpMetadata",
    "KeyPin",
    "Metadata",
    "Publication",
    "ServiceInfo",
    "ShareState",
]
