"""What the product really publishes, read by the second reader: from the store's files and a recipient's key.

The vectors show that core follows docs/format.md; this shows that everything above it does.
"""

import hashlib
import os
import random

import pytest
import second_reader
from devices import Device, World

KIB = 1024


def noise(size):
    return random.Random(size).randbytes(size)


@pytest.fixture
def world():
    with World() as running:
        yield running


def opened(device, owner, reader, share="first"):
    """Return (epoch key, head record, get), as somebody with the stores and ``reader``'s seed has them."""
    row = owner.share(share).row
    metadata, identity = reader.session.metadata, reader.session.identity
    blobs = device.world.run(metadata.capsules, row.share, identity.encryption.kid)
    head = device.world.run(metadata.head, row.share)
    public = owner.session.identity.signing.public
    found = [second_reader.open_capsule(identity.encryption.seed, blob, public) for blob in blobs]
    newest = max((header["epoch"], key) for header, key in found if header["share"] == row.share)
    stored = {}
    for path in device.blocks.rglob("bafkrei*"):
        data = path.read_bytes()
        stored[hashlib.sha256(data).digest()] = data
    return newest[1], head, stored.__getitem__


def read(device, owner, reader, writers=()):
    key, head, get = opened(device, owner, reader)
    public = owner.session.identity.signing.public
    return {
        os.fsdecode(path): None if content is None else bytes(content)
        for path, _, content in second_reader.read_share(public, key, head, get, writers)
    }


def fill(view):
    view.write("empty", b"")
    view.write("small", b"some text\n")
    view.write("inline edge", noise(16 * KIB))
    view.write("above inline", noise(16 * KIB + 1))
    view.write("blocks", noise(700 * KIB + 3))
    view.write("\udcff name\n", b"odd")
    view.mkdir("dir")
    view.mkdir("dir/inner")
    view.write("dir/inner/deep", noise(5))
    view.symlink("dir/link", b"../\xff")
    view.write("first name", b"linked")
    view.link("first name", "dir/second name")
    view.setxattr("small", b"user.note", b"\0\xff")
    fh = view.create("sparse")
    view.pwrite(fh, 600 * KIB, b"end")
    view.release(fh)
    view.write("grown", noise(300 * KIB))
    view.truncate("grown", 100)
    view.truncate("grown", 400 * KIB)
    view.mkdir("many")
    for i in range(150):
        view.write(f"many/{i:03}", b"%d" % i)


def test_a_share_as_published_is_what_its_owner_sees(world, tmp_path):
    alice = Device(world, tmp_path / "alice", "alice").start()
    alice.create_share()
    view = alice.view()
    fill(view)
    alice.flush()
    seen = view.contents()
    assert len(seen) > 160
    assert read(alice, alice, alice) == seen
    # A second version: old blocks, pages and manifests under the new root.
    for i in range(0, 150, 3):
        view.unlink(f"many/{i:03}")
    view.rename("blocks", "dir/moved")
    view.append("dir/moved", b"more")
    view.write("many/new", noise(70 * KIB))
    view.unlink("first name")
    alice.flush()
    seen = view.contents()
    assert read(alice, alice, alice) == seen
    alice.close()


def test_a_large_file_has_index_blocks(world, tmp_path):
    alice = Device(world, tmp_path / "alice", "alice").start()
    alice.create_share()
    view = alice.view()
    fh = view.create("large")
    size = 4097 * 256 * KIB
    view.pwrite(fh, 5, b"start")
    view.pwrite(fh, size - 9, b"end")
    view.release(fh)
    alice.flush()
    key, head, get = opened(alice, alice, alice)
    public = alice.session.identity.signing.public
    fetched = []
    ((path, kind, content),) = second_reader.read_share(
        public, key, head, lambda digest: fetched.append(digest) or get(digest)
    )
    assert (path, kind, len(content)) == (b"large", "file", size - 6)
    assert (content[5:10], content[size - 9 : size - 6]) == (b"start", b"end")
    # root, file manifest, two index blocks, two data blocks: everything between them is a hole.
    assert len(fetched) == 6
    alice.close()


def test_what_a_recipient_reads_and_writes(world, tmp_path):
    alice = Device(world, tmp_path / "alice", "alice").start()
    bob = Device(world, tmp_path / "bob", "bob", beside=alice).start()
    alice.create_share()
    alice.view().write("a", b"by alice")
    alice.flush()
    alice.grant("first", bob)
    bob.view().write("b", noise(40 * KIB))
    bob.flush()
    alice.refresh()
    writers = (bob.session.identity.signing.public,)
    seen = bob.view().contents()
    assert seen == {"a": b"by alice", "b": noise(40 * KIB)}
    assert read(alice, alice, bob, writers) == seen
    # Without the roster's word that bob writes here, his head is a stranger's.
    with pytest.raises(second_reader.FormatError):
        read(alice, alice, bob)
    bob.close()
    alice.close()
