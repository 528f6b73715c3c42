"""The ``meshkitfs`` command.

A command parses its arguments, makes one call (`meshkitfs.daemon.client`), and shows the result: for a
person on the terminal, or with ``--json`` as one line of JSON on stdout, and then a failure is one line of
JSON on stderr. Exit codes are by kind of failure and documented in docs/cli.md.
"""

from ._fstab import mount_fstab
from ._main import main

__all__ = ["main", "mount_fstab"]
