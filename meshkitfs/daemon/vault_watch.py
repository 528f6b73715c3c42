"""What the key vault of an open home gives, kept current: for people, and for grants that demand it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import trio

from meshkitfs.keyvault import KeyVault, KeyVaultReport

__all__ = ["LOOK_S", "VaultWatch"]

# How often the key vault is asked what it gives. This bounds how long a change of it goes unnoticed.
LOOK_S: Final = 5
# From which age on (seconds) its last report is not believed any more, and how long a new one is waited for.
STALE_S: Final = 30
DEADLINE_S: Final = 10


class VaultWatch:
    """A key vault with its last ``report`` (None: never asked); ``changed`` is called when that says else."""

    def __init__(self, vault: KeyVault, changed: Callable[[], None]) -> None:
        self.vault = vault
        self.report: KeyVaultReport | None = None
        self._changed = changed
        self._looked_at = float("-inf")

    async def look(self) -> KeyVaultReport:
        """Ask the key vault what it gives now. In a thread: a keyring may take its time, or hang."""
        began = trio.current_time()
        report = await trio.to_thread.run_sync(self.vault.report, abandon_on_cancel=True)
        before, self.report, self._looked_at = self.report, report, began
        if before is not None and _facts(before) != _facts(report):
            self._changed()
        return report

    async def now(self) -> KeyVaultReport | None:
        """Return a report that is not stale; None if the key vault does not give one in time."""
        if trio.current_time() < self._looked_at + STALE_S:
            return self.report
        with trio.move_on_after(DEADLINE_S):
            return await self.look()
        return None

    async def run(self) -> None:
        """Keep the report current, for attributes that file managers ask for by the hundred too."""
        while True:
            await trio.sleep(LOOK_S)
            await self.look()


def _facts(report: KeyVaultReport) -> KeyVaultReport:
    """What a demand can be about: without the words for people, and whether it is locked just now."""
    return replace(report, detail="", locked=None)
