"""Telling a merge when nobody is changing the tree, and everybody else when a merge runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from meshkitfs.shares._tree import Tree

__all__ = ["Changing"]


class Changing:
    """Counts the changes of a share's tree that are under way; see `Share.changing`."""

    __slots__ = ("_tree", "count", "merging", "quiet")

    def __init__(self, tree: Callable[[], Tree | None]) -> None:
        self._tree = tree
        self.count = 0
        self.quiet = trio.Event()
        # Set while a merge runs, or waits for the changes under way to end.
        self.merging: trio.Event | None = None

    async def __aenter__(self) -> Tree:
        while self.merging is not None:
            await self.merging.wait()
        tree = self._tree()
        assert tree is not None  # callers have been through `use`
        self.count += 1
        return tree

    async def __aexit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self.quiet.set()

    @asynccontextmanager
    async def held_off(self) -> AsyncIterator[None]:
        """Around a merge: waits until no change is under way, and keeps new ones out."""
        self.merging = trio.Event()
        try:
            while self.count:
                self.quiet = trio.Event()
                await self.quiet.wait()
            yield
        finally:
            self.merging.set()
            self.merging = None
