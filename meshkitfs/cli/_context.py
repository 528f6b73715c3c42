"""What every command is given: the home, the output, the passphrase, and the way to get work done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..daemon import client
from ..daemon.home import Home
from ._output import Output
from ._passphrase import PassphraseSource
from ._progress import ProgressLine

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    """One invocation of the program."""

    home: Home
    out: Output
    passphrase: PassphraseSource

    def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Do one method of the service, in the daemon or here, showing its progress on a terminal."""
        with ProgressLine(enabled=self.out.interactive) as progress:
            return client.run(
                self.home, method, params, passphrase=self.passphrase, on_progress=progress.update
            )
