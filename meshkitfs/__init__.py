"""meshkitfs: encrypted, content-addressed shares mounted as ordinary directories."""

__version__ = "0.1.0"
