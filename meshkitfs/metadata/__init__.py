"""Metadata homes: capsules, rosters, timestamps, heads, mailboxes and the identity directory."""

from meshkitfs.metadata._api import Metadata, Publication, ShareState
from meshkitfs.metadata.embedded import EmbeddedMetadata

__all__ = ["EmbeddedMetadata", "Metadata", "Publication", "ShareState"]
