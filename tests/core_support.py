"""Small things the t0 tests share: expecting a refusal, opening what was just sealed, loading vectors."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import settings

from meshkitfs.core._mint import mint_key
from meshkitfs.core.blocks import VerifiedBlock, open_block
from meshkitfs.errors import MeshkitError

# A busy machine is not a failure: no deadlines. A failing example prints what reproduces it.
settings.register_profile("meshkitfs", deadline=None, print_blob=True)
settings.load_profile("meshkitfs")


@contextlib.contextmanager
def refuses(code, about=""):
    """The block must raise MeshkitError ``code`` whose detail contains ``about``."""
    with pytest.raises(MeshkitError) as caught:
        yield
    assert caught.value.code == code
    assert about in caught.value.detail


def reopen(ref, sealed, where):
    """Open a block as a reader would, from its reference and what a store gave back."""
    return open_block(mint_key(ref[32:]), VerifiedBlock.check(ref[:32], sealed.data), where)


def vectors(name):
    return json.loads((Path(__file__).parent / "vectors" / name).read_text())


def attempt(code, call, *args):
    """Return what ``call`` returns, or None if it refuses with ``code``; other failures pass through."""
    try:
        return call(*args)
    except MeshkitError as error:
        if error.code != code:
            raise
        return None
