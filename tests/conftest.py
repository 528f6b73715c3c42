"""The servers that tests share: each is started when the first test asks for it, and ended with the session."""

import os

from servers.cluster import cluster
from servers.ipfs import ipfs_node, own_ipfs_node, second_ipfs_node
from servers.pinning import pinning_service

__all__ = ["cluster", "ipfs_node", "own_ipfs_node", "pinning_service", "second_ipfs_node"]

# A test that wants a session's bus makes one: nobody's desktop is notified, nobody's keyring asked.
os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)
