"""Damaged or impossible things around a mount: each a clear coded error, and nothing lost."""

import errno
import os
import shutil

import pytest
from homes import REASON, Person, fails, needs_fuse, wait_until, write_synced

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


def listing(path):
    try:
        return os.listdir(path)
    except OSError:
        return []


def test_a_byte_store_that_is_gone_is_not_an_empty_one(alice):
    write_synced(alice.mount() / "first/file", b"content")
    alice.umount()
    away = alice.root.with_name("elsewhere")
    shutil.move(alice.blocks, away)
    base = alice.mount() / "first"
    with fails(errno.EIO):
        os.listdir(base)
    assert b"provider_request_failed" in os.getxattr(base, REASON)
    with fails(errno.EIO):
        (base / "new").write_bytes(b"a share that cannot be read cannot be written either")
    assert not alice.blocks.exists(), "an empty store was made in its place"
    shutil.move(away, alice.blocks)
    # Nobody has to mount again.
    wait_until(lambda: "file" in listing(base), "the share, once its store is back")
    assert (base / "file").read_bytes() == b"content"


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
