"""Damaged or impossible things around a mount: each a clear coded error, and nothing lost."""

import errno
import os
import shutil

import pytest
from homes import Person, fails, needs_fuse, write_synced

pytestmark = needs_fuse


@pytest.fixture
def alice(tmp_path):
    with Person(tmp_path / "alice", "alice") as person:
        person.init()
        person.cli("share", "create", "first")
        yield person


def spoil(path):
    """Overwrite the middle of a file; returns what was there."""
    good = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(len(good) // 2)
        file.write(os.urandom(64))
        file.seek(0)
        file.write(os.urandom(64))
    return good


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("state.db", "state_corrupt"),
        ("identity.sealed", "identity_corrupt"),
        ("metadata.db", "metadata_unavailable"),
    ],
)
def test_a_damaged_file_of_the_home_is_named_and_left_alone(alice, name, code):
    path = alice.root / name
    good = spoil(path)
    bad = path.read_bytes()
    result = alice.mount(check=False)
    assert result.error["code"] == code
    assert result.error["suggestion"]
    assert path.read_bytes() == bad, "a damaged file is evidence: it must not be touched"
    # Put back, everything goes on.
    path.write_bytes(good)
    write_synced(alice.mount() / "first/file", b"still here")


def test_a_byte_store_that_is_gone_is_not_an_empty_one(alice):
    write_synced(alice.mount() / "first/file", b"content")
    alice.umount()
    away = alice.root.with_name("elsewhere")
    shutil.move(alice.blocks, away)
    assert alice.mount(check=False).error["code"] == "provider_request_failed"
    shutil.move(away, alice.blocks)
    assert (alice.mount() / "first/file").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "x" * 256])
def test_names_a_share_cannot_have(alice, name):
    assert alice.cli("share", "create", name, check=False).error["code"] == "invalid_name"


def test_a_share_name_that_is_taken_or_hidden_in_the_mount(alice):
    base = alice.mount()
    with fails(errno.EEXIST):
        os.mkdir(base / "first")
    with fails(errno.EINVAL):
        os.mkdir(base / ".secret")
    assert os.listdir(base) == ["first"]
