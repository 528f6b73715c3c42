"""What all tests share: the servers that are started for them, and in which order they run.

The first letters of a file say its level: t0 formats and documents, t1 contracts of stores, key vaults and
services, t2 commits and uploads, t3 everything but a kernel, t4 real mounts, t5 crashes and whole machines,
t6 files of earlier versions. The other files here help them: `homes` (a person with a home and a mount),
`devices` (homes in one process), `service` and `service_home` (a metadata service), `memvfs` and `mounted`
(what the tests of a filesystem need), `evil*` (stores, gateways and services that lie).

Each server is started when the first test asks for it, and ended with the session.
"""

import os

import pytest
from servers.cluster import cluster
from servers.ipfs import ipfs_node, own_ipfs_node, second_ipfs_node
from servers.pinning import pinning_service

__all__ = ["cluster", "ipfs_node", "own_ipfs_node", "pinning_service", "second_ipfs_node"]

# A test that wants a session's bus makes one: nobody's desktop is notified, nobody's keyring asked.
os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several files run at a time, begin with the slow ones: else one of them runs alone at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name[:2], reverse=True)
