"""The right to use one share: walking the gate, keeping the grant, and what ends with it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.gate import Grant, ends
from meshkitfs.shares._events import AccessChanged, NodeChanged
from meshkitfs.shares._nodes import FileNode
from meshkitfs.shares._services import Services
from meshkitfs.shares._tree import Tree
from meshkitfs.state import ShareRow

__all__ = ["Access"]


class Access:
    """The grant of a share, or why there is none, and the tree that is read under it."""

    def __init__(self, row: ShareRow, services: Services) -> None:
        self.row = row
        self.services = services
        self.grant: Grant | None = None
        # Why the last try was refused; None while the share can be used.
        self.refusal: MeshkitError | None = None
        # Why nobody confirms the grant just now; None while somebody does. It is good until its own end.
        self.unconfirmed: MeshkitError | None = None
        self.tree: Tree | None = None
        self._asked_at = 0.0
        self._refused_at = 0.0
        # The metadata store's change counter at the last walk; -1 asks for a new one.
        self._tick = -1
        # What the last grant let this home do; what the next one does not must not stay readable.
        self._could: frozenset[str] = frozenset()
        self._renewing = trio.Lock()
        # Called once when access ends: what else was read under the grant goes with it.
        self.on_refusal: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.row.name.decode(errors="surrogateescape")

    @property
    def denial(self) -> MeshkitError | None:
        """Why nothing can be done with the share now, as far as it is known; answered without asking anybody.

        A grant whose time is over is refused from that moment, also if nobody has tried to use it since.
        """
        return self.refusal or (self.grant.expired if self.grant is not None else None)

    def live(self, right: str) -> Grant | None:
        """Return the grant if it includes ``right`` and needs no renewal, without asking anybody."""
        grant = self.grant
        if grant is None or not grant.alive or self.tree is None or right not in grant.rights:
            return None
        return grant

    def _store_tick(self) -> int:
        """The metadata store's change counter for the share and the lists that its grant relies on."""
        return self.services.metadata.tick(self.row.share, self.grant.lists if self.grant is not None else ())

    def reconsider(self) -> None:
        """Have the next look walk the gate again: what this home has to show has changed."""
        self._tick = -1
        self._refused_at = float("-inf")

    async def _renew(self, *, ahead: bool = False, needed: bool = False) -> Grant:
        """Walk the gate and keep the new grant, or the refusal; ``ahead`` does so before the old one ends.

        Where nobody can say, a grant that lives goes on and is returned; with ``needed`` it goes on, and what
        kept the answer away is raised: the caller wants what that grant does not allow.
        """
        async with self._renewing:
            tick = self._store_tick()
            if self.grant is not None and self.grant.alive and tick == self._tick and not ahead:
                return self.grant
            try:
                # For whatever right there is: what is wanted is asked of the grant, and a no to that alone
                # does not end what others are doing.
                grant = await self.services.gate.open(self.row, None)
            except MeshkitError as error:
                held = self.grant
                if held is None or not held.alive or ends(error.code) or self._outdated(held):
                    self.refuse(error)
                    raise
                # Unknown is not no: what was proved goes on until its own end, and the watcher asks again.
                self._unconfirmed(error, tick)
                if needed:
                    raise
                return held
            # What another set of lists says of its changes was not counted before the walk.
            known = grant.lists == (self.grant.lists if self.grant is not None else ())
            self.grant = grant
            self._unconfirmed(grant.unproven, tick if known else -1)
            lost, self._could = self._could - grant.rights, grant.rights
            if lost & {"read", "list"}:
                self._drop_plaintext()
            if self.refusal is not None:
                self.refusal = None
                self.services.emit(AccessChanged(self.name, ""))
            return grant

    def _outdated(self, held: Grant) -> bool:
        """Whether the owner has said something newer than the roster that ``held`` rests on."""
        return self.services.state.mark(self.row.share).roster_seq > held.roster.seq

    def _unconfirmed(self, error: MeshkitError | None, tick: int) -> None:
        """Note how the question that was asked at ``tick`` was answered."""
        self.unconfirmed = error
        self._tick = tick
        self._asked_at = trio.current_time()

    def lapse(self) -> None:
        """Refuse the share if its lease is over, without asking anybody and without waiting.

        The kernel's copies go then, also if nobody uses the share and nobody answers.
        """
        if self.grant is not None and not self.grant.alive:
            try:
                self.grant.check()
            except MeshkitError as error:
                self.refuse(error)
                # Nobody has said no: it is asked about again at the next look.
                self._refused_at = float("-inf")

    def refuse(self, error: MeshkitError) -> None:
        """End the grant: keys and cached plaintext go, and the kernel is told to drop what it holds."""
        first = self.refusal is None or self.refusal.code != error.code
        if self.grant is not None:
            self.grant.end(error)
            self.grant = None
        self._tick = -1
        self._could = frozenset()
        self.unconfirmed = None
        self.refusal = error
        self._refused_at = trio.current_time()
        if not first:
            return
        self._drop_plaintext()
        self.services.emit(AccessChanged(self.name, error.code))

    def _drop_plaintext(self) -> None:
        """Forget what was read under the grant, and have the kernel drop what it holds of it."""
        self.services.reader.forget()
        if self.tree is not None:
            for node in self.tree.nodes.values():
                if isinstance(node, FileNode):
                    node.kernel_current = False
                self.services.emit(NodeChanged(node.ino, True))
        self.on_refusal()
