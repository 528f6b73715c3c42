"""The servers that tests share: each is started when the first test asks for it, and ended with the session."""

from servers.cluster import cluster
from servers.ipfs import ipfs_node, own_ipfs_node, second_ipfs_node

__all__ = ["cluster", "ipfs_node", "own_ipfs_node", "second_ipfs_node"]
