"""A share with a history, its byte store and metadata store, seen from outside: support for t3_keeping.

What a version consists of is found by the second reader (`second_reader`), which shares no code with what is
tested: it is given the epoch keys and the files of the store, and what it asks for is what the version needs.
"""

from __future__ import annotations

import os
import time

import evil
import second_reader
from devices import Device, World

from meshkitfs.core.records import Head
from meshkitfs.daemon.service import Service
from meshkitfs.shares import Rules, prune

DAY = 86400
BIG = 300 * 1024


class Missing(Exception):
    """A block that a version needs is not in the store."""


class Keeper:
    """A home with a share, driven step by step; every `save` is a version of its own."""

    def __init__(self, place, world=None, name="alice", beside=None):
        self.world = world or World()
        self.device = Device(self.world, place, name, beside=beside and beside.device).start()
        self.device.create_share(f"of {name}" if beside else "first")
        self.name = f"of {name}" if beside else "first"
        self.offset = 0

    # -- doing

    def view(self):
        return self.device.view(self.name)

    def share(self):
        return self.device.share(self.name)

    def save(self, *files, at=None):
        """Write (path, bytes) or remove (path, None), and publish; returns the version's number."""
        view = self.view()
        for path, data in files:
            if data is None:
                view.unlink(path)
            else:
                view.write(path, data)
        return self.publish(at=at)

    def publish(self, at=None):
        services = self.device.session.services
        if at is not None:
            services.wall = lambda: at
        try:
            self.device.flush(self.name)
        finally:
            self.shift(self.offset)
        return self.share().base.version

    def shift(self, seconds):
        """Let the home's wall clock be so far ahead."""
        self.offset = seconds
        self.device.session.services.wall = lambda: time.time() + seconds

    def call(self, method, **params):
        return self.world.run(Service(self.device.session).call, method, params, self.progress)

    @staticmethod
    def progress(event):
        assert event["done"] >= 0
        assert event.get("total") is None or event["done"] <= event["total"]

    def prune(self, **rules):
        """Give up what no rule keeps; returns the numbers given up."""
        done = self.world.run(lambda: prune(self.share(), Rules(**rules), dry_run=False))
        return sorted(version.number for version in done.given_up)

    def gc(self, grace="0d", delete=True):
        return self.call("gc", share=self.name, grace=grace, delete=delete)

    def restart(self):
        self.device.close()
        self.device.start()
        self.shift(self.offset)

    # -- looking

    def stored(self):
        """Every block of the store: digest to bytes."""
        return {digest: path.read_bytes() for digest, path in evil.all_blocks(self.device.blocks).items()}

    def blobs(self):
        """Every head, by version."""
        metadata, share = self.device.session.metadata, self.share().row.share
        found = self.world.run(metadata.heads, share, 0, 1 << 40)
        return {evil.peek(Head, blob).ver: blob for blob in found}

    def keys(self):
        """The epoch keys, from the owner's capsules."""
        identity = self.device.session.identity
        found = {}
        for blob in self.world.run(
            self.device.session.metadata.capsules, self.share().row.share, identity.encryption.kid
        ):
            header, key = second_reader.open_capsule(identity.encryption.seed, blob, identity.signing.public)
            found[header["epoch"]] = key
        return found

    def need(self, number, writers=()):
        """What a version consists of: (digests, path to content). Raises `Missing`."""
        stored, asked = self.stored(), set()

        def get(digest):
            asked.add(digest)
            if digest not in stored:
                raise Missing(digest.hex())
            return stored[digest]

        blob = self.blobs()[number]
        key = self.keys()[evil.peek(Head, blob).epoch]
        public = self.device.session.identity.signing.public
        content = {
            os.fsdecode(path): data
            for path, _, data in second_reader.read_share(public, key, blob, get, writers)
        }
        return asked, content

    def needs(self, numbers, writers=()):
        """The digests that any of these versions consists of."""
        return set().union(*(self.need(number, writers)[0] for number in numbers))
