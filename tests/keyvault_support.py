"""What the tests of the key vaults share."""

from __future__ import annotations

import contextlib

import pytest

from meshkitfs.errors import MeshkitError
from meshkitfs.keyvault import _passphrase_file
from meshkitfs.keyvault._passphrase_file import Cost

PHRASE = "correct horse battery staple"
PIN = "2718281828"
SECRET = bytes(range(100, 132))


@contextlib.contextmanager
def refused(code: str):
    """Expect a MeshkitError with exactly this code, and nothing secret in its text."""
    with pytest.raises(MeshkitError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    for canary in (SECRET.hex(), PHRASE, PIN):
        assert canary not in str(caught.value)


NEW_PHRASE = "another battery altogether"


def old_answers(prompt):
    """Somebody who knows what opens the present key vault."""
    return PIN if "PIN" in prompt else PHRASE


def new_answers(prompt):
    """Somebody who knows what opens the one that the key is moved to."""
    return PIN if "PIN" in prompt else NEW_PHRASE


def stretch_cheaply(set_attribute):
    """Take Argon2id far below its floor, where keys are stretched many hundred times."""
    weak = Cost(8, 1, 1)
    set_attribute(_passphrase_file, "FLOOR", weak)
    set_attribute(_passphrase_file, "Cost", lambda *a: Cost(*a) if a else weak)
