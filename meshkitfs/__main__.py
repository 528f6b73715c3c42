"""``python -m meshkitfs``: the same program as the ``meshkitfs`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
