"""The servers that tests share: each is started when the first test asks for it, and ended with the session."""

from servers.ipfs import ipfs_node, own_ipfs_node

__all__ = ["ipfs_node", "own_ipfs_node"]
