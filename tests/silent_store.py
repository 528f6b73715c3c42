"""``meshkitfs``, with a byte store that takes a block and never answers."""

import sys

import trio

from meshkitfs.cli import main
from meshkitfs.providers import LocalStore


async def silence(*_args: object) -> None:
    await trio.sleep_forever()


LocalStore.put_files = silence  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
