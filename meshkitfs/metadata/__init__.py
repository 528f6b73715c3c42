"""Metadata homes: capsules, rosters, timestamps, heads, mailboxes and the identity directory."""

from meshkitfs.metadata._api import AccessList, Metadata, Publication, ShareState
from meshkitfs.metadata._feed import RECHECK_S
from meshkitfs.metadata.embedded import EmbeddedMetadata
from meshkitfs.metadata.http import HttpMetadata, KeyPin, ServiceInfo, look
from meshkitfs.metadata.release import KnownService, ReleaseOffer, Releases, ReleaseSource

__all__ = [
    "RECHECK_S",
    "AccessList",
    "EmbeddedMetadata",
    "HttpMetadata",
    "KeyPin",
    "KnownService",
    "Metadata",
    "Publication",
    "ReleaseOffer",
    "ReleaseSource",
    "Releases",
    "ServiceInfo",
    "ShareState",
    "look",
]
