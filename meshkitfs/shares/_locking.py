"""What a share keeps in memory while the identity is locked: no content, and no key that is not sealed.

The nodes that the kernel knows have to stay, so that open files and working directories go on after the
unlocking. In their entries are the keys of blocks and manifests. They are sealed where they stand, under a
key that only this identity's encryption key gives back: locking needs no secret, unlocking does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final, final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from meshkitfs.core import hpke
from meshkitfs.core.blocks import REF_SIZE
from meshkitfs.core.entries import Entry
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.core.secret_memory import SecretBytes, wipe
from meshkitfs.shares._nodes import DirNode, FileNode, Node
from meshkitfs.shares._tree import Tree

__all__ = ["RefSeal", "drop_content", "seal_refs", "unseal_refs"]

_INFO: Final = b"mk/locked-tree@1"
_DIGEST: Final = 32
# A reference that is sealed is one byte longer, so that none is ever taken for the other.
_SEALED: Final = REF_SIZE + 1


@final
class RefSeal:
    """Hides the key in a reference (digest || key) and shows it again.

    The mask of a key is AES-256 over its block's digest: a digest stands for one key, so no two keys have
    the same mask.
    """

    __slots__ = ("_key", "_wrapped")

    def __init__(self, public: bytes) -> None:
        """Make a new seal that the holder of the X-Wing key ``public`` can open."""
        key = os.urandom(32)
        self._wrapped = hpke.wrap(public, _INFO, key)
        self._key: SecretBytes | None = SecretBytes(key)

    def close(self) -> None:
        """Forget the key, so that `hide` and `show` are over until `open`."""
        if self._key is not None:
            self._key.wipe()
            self._key = None

    def open(self, key: EncryptionKey) -> None:
        """Get the key back. Raises ``identity_locked``, ``key_unwrap_failed``."""
        self._key = SecretBytes(hpke.unwrap(key, _INFO, self._wrapped))

    def hide(self, ref: bytes) -> bytes:
        """Return ``ref`` sealed; what is sealed, or no reference with a key, is returned as it is."""
        return ref if len(ref) != REF_SIZE else self._masked(ref) + b"\0"

    def show(self, ref: bytes) -> bytes:
        """Undo `hide`."""
        return ref if len(ref) != _SEALED else self._masked(ref[:REF_SIZE])

    def _masked(self, ref: bytes) -> bytes:
        assert self._key is not None  # the callers close it last and open it first
        encryptor = Cipher(algorithms.AES(self._key.view), modes.ECB()).encryptor()  # noqa: S305 (see the class)
        mask = encryptor.update(ref[:_DIGEST])
        hidden = int.from_bytes(ref[_DIGEST:], "big") ^ int.from_bytes(mask, "big")
        wipe(mask)
        return ref[:_DIGEST] + hidden.to_bytes(_DIGEST, "big")


def drop_content(tree: Tree) -> None:
    """Let go of the content of every file that holds nothing unsaved, also of those that are open."""
    for node in tree.nodes.values():
        if isinstance(node, FileNode):
            node.drop_content()


def seal_refs(tree: Tree, seal: RefSeal) -> None:
    """Seal every reference in the entries of ``tree``. Not while anything is read under a grant."""
    _change_refs(tree, seal.hide)


def unseal_refs(tree: Tree, seal: RefSeal) -> None:
    """Undo `seal_refs`."""
    _change_refs(tree, seal.show)


def _change_refs(tree: Tree, change: Callable[[bytes], bytes]) -> None:
    for node in _nodes(tree):
        if node.entry is not None:
            node.entry = _changed(node.entry, change)
        if isinstance(node, DirNode):
            for part in node.parts:
                part.ref = change(part.ref)
            for name, child in (node.children or {}).items():
                if isinstance(child, Entry):
                    assert node.children is not None
                    node.children[name] = _changed(child, change)


def _nodes(tree: Tree) -> Iterator[Node]:
    yield from tree.nodes.values()
    yield tree.links  # it is nobody's inode


def _changed(entry: Entry, change: Callable[[bytes], bytes]) -> Entry:
    ref = change(entry.ref)
    return entry if ref is entry.ref else entry._replace(ref=ref)
