"""Running a script of ours on Node.js, with the npm packages that `make install-test` put there."""

from __future__ import annotations

import shutil

from servers.install import HERE, TARGET, missing, node_command
from servers.process import not_tested


def script(name: str, file: str) -> list[str]:
    """The command that runs ``NAME/FILE`` with the packages of ``NAME``. Skips where they are not installed."""
    why = missing(TARGET, "node", name)
    if why:
        not_tested(f"what needs {name}", why)
    # An ES module finds packages only beside itself, and it may be newer than the installation.
    place = TARGET / name / file
    shutil.copy2(HERE / name / file, place)
    return [*node_command(), str(place)]
