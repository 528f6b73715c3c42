"""Keys of people and of shares: Ed25519 for signing, X-Wing for wrapping, HKDF for what follows from them."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from functools import lru_cache
from typing import Final, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshkitfs.core.secret_memory import SecretBytes, wipe
from meshkitfs.errors import MeshkitError

__all__ = [
    "ENC_PUBLIC_SIZE",
    "KID_SIZE",
    "EncryptionKey",
    "SigningKey",
    "check_ed25519_public",
    "check_encryption_public",
    "did_key",
    "fingerprint",
    "key_commit",
    "kid_of",
    "public_of_did",
    "ver_key",
]

KID_SIZE: Final = 16
ENC_PUBLIC_SIZE: Final = 1216  # ML-KEM-768 1184, X25519 32
_MLKEM_PUBLIC: Final = 1184

_P: Final = 2**255 - 19
# The y coordinates of all points of order 1, 2, 4 and 8. OpenSSL verifies signatures under such keys that
# nobody made, so they are refused when a key is loaded.
_SMALL_ORDER_Y: Final = frozenset(
    (
        0,
        1,
        _P - 1,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7,
    )
)
_B58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def kid_of(public: bytes) -> bytes:
    """Return the 16-byte key id of a public key of either kind."""
    return hashlib.sha256(b"mk/kid@1\0" + public).digest()[:KID_SIZE]


def check_ed25519_public(raw: bytes) -> Ed25519PublicKey:
    """Load a 32-byte Ed25519 public key.

    Raises MeshkitError ``invalid_record`` for a wrong length, a non-canonical encoding, a point of small
    order, or bytes that are no point.
    """
    if type(raw) is not bytes or len(raw) != 32:
        raise MeshkitError("invalid_record", "an Ed25519 key has 32 bytes")
    return _load_ed25519(raw)


@lru_cache(maxsize=1024)
def _load_ed25519(raw: bytes) -> Ed25519PublicKey:
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    if y >= _P:
        raise MeshkitError("invalid_record", "Ed25519 key that is not canonical")
    if y in _SMALL_ORDER_Y:
        raise MeshkitError("invalid_record", "Ed25519 key of small order")
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise MeshkitError("invalid_record", "not an Ed25519 key") from None


def check_encryption_public(raw: bytes) -> MLKEM768X25519PublicKey:
    """Load a 1216-byte X-Wing public key.

    Raises MeshkitError ``invalid_record`` for a wrong length, ML-KEM coefficients out of range, or an
    X25519 point with which every exchange gives zero.
    """
    if type(raw) is not bytes or len(raw) != ENC_PUBLIC_SIZE:
        raise MeshkitError("invalid_record", f"an X-Wing key has {ENC_PUBLIC_SIZE} bytes")
    return _load_xwing(raw)


@lru_cache(maxsize=256)
def _load_xwing(raw: bytes) -> MLKEM768X25519PublicKey:
    try:
        x25519 = X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC:])
        X25519PrivateKey.from_private_bytes(b"\x55" * 32).exchange(x25519)
        return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC]), x25519)
    except ValueError:
        raise MeshkitError("invalid_record", "not an X-Wing key") from None


@final
class SigningKey:
    """An Ed25519 private key: ``public`` is 32 bytes, ``kid`` 16; ``seed`` is secret and never printed.

    After `lock` only the public half is left, and `sign` and `seed` raise ``identity_locked`` until `unlock`.
    """

    __slots__ = ("_key", "kid", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        # OpenSSL keeps the seed in memory of its own, and cleans that when the object is freed.
        self._key: Ed25519PrivateKey | None = key
        self.public = key.public_key().public_bytes_raw()
        self.kid = kid_of(self.public)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """Return the key of a 32-byte seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes this key comes from; for sealing an identity, and for libraries that sign."""
        return self._private().private_bytes_raw()

    def _private(self) -> Ed25519PrivateKey:
        key = self._key
        if key is None:
            raise MeshkitError("identity_locked")
        return key

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte signature over ``data``."""
        return self._private().sign(data)

    def lock(self) -> None:
        """Forget the private half."""
        self._key = None

    def unlock(self, other: SigningKey) -> None:
        """Take the private half of ``other``, which is this very key. Raises ValueError for another one."""
        if other.public != self.public:
            raise ValueError("another key")
        self._key = other._private()

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a SigningKey cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid.hex()})"


@final
class EncryptionKey:
    """An X-Wing (ML-KEM-768, X25519) private key: ``public`` is 1216 bytes, ``seed`` the 32-byte secret.

    After `lock` only the public half is left, and `hpke` and `seed` raise ``identity_locked`` until `unlock`.
    """

    __slots__ = ("_hpke", "_seed", "kid", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise ValueError("an X-Wing seed has 32 bytes")
        expanded = hashlib.shake_256(seed).digest(96)
        parts = memoryview(expanded)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(parts[:64])
        x25519 = X25519PrivateKey.from_private_bytes(parts[64:])
        parts.release()
        wipe(expanded)
        # A copy in memory of our own is made here, and wiped with it; whose ``seed`` is, wipes it.
        self._seed: SecretBytes | None = SecretBytes(bytearray(seed))
        self._hpke: MLKEM768X25519PrivateKey | None = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        self.kid = kid_of(self.public)

    @classmethod
    def generate(cls) -> EncryptionKey:
        """Return a new random key."""
        return cls(os.urandom(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> EncryptionKey:
        """Return the key of a 32-byte seed (X-Wing expansion: SHAKE-256 to 96 bytes)."""
        return cls(seed)

    @property
    def hpke(self) -> MLKEM768X25519PrivateKey:
        """The key as the HPKE library takes it."""
        key = self._hpke
        if key is None:
            raise MeshkitError("identity_locked")
        return key

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes this key comes from; for sealing an identity, nothing else."""
        if self._seed is None:
            raise MeshkitError("identity_locked")
        return bytes(self._seed.view)

    def lock(self) -> None:
        """Forget the private half."""
        self._hpke = None
        if self._seed is not None:
            self._seed.wipe()
            self._seed = None

    def unlock(self, other: EncryptionKey) -> None:
        """Take the private half of ``other``, which is this very key. Raises ValueError for another one."""
        if other.public != self.public:
            raise ValueError("another key")
        self._hpke, self._seed = other._hpke, other._seed

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("an EncryptionKey cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"EncryptionKey(kid={self.kid.hex()})"


def did_key(public: bytes) -> str:
    """Return the ``did:key:z6Mk...`` of a 32-byte Ed25519 public key."""
    check_ed25519_public(public)
    number = int.from_bytes(b"\xed\x01" + public, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_B58[digit])
    return "did:key:z" + "".join(reversed(digits))


def public_of_did(text: str) -> bytes:
    """Return the 32-byte Ed25519 public key of a ``did:key:z6Mk...``. Raises ``invalid_record``."""
    encoded = text.removeprefix("did:key:z")
    number = 0
    if encoded == text or len(encoded) > 64 or not set(encoded) <= set(_B58):
        raise MeshkitError("invalid_record", "not the did:key of an Ed25519 key")
    for digit in encoded:
        number = number * 58 + _B58.index(digit)
    raw = number.to_bytes(48, "big")[-34:]
    if raw[:2] != b"\xed\x01" or did_key(raw[2:]) != text:
        raise MeshkitError("invalid_record", "not the did:key of an Ed25519 key")
    return raw[2:]


def fingerprint(public: bytes) -> str:
    """Return what two people compare: 120 bits as six groups of four base32 characters."""
    text = base64.b32encode(hashlib.sha256(b"mk/fp@1" + public).digest()[:15]).decode("ascii")
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def ver_key(ek: bytes | memoryview, oid: bytes, epoch: int, ver: int) -> bytes:
    """Return the 32-byte key of a share's root manifest at one version, from the share's epoch key."""
    return HKDFExpand(SHA256(), 32, b"mk/vk@1\0" + oid + struct.pack(">QQ", epoch, ver)).derive(ek)


def key_commit(key: bytes | memoryview, oid: bytes, epoch: int, ver: int) -> bytes:
    """Return the 32 bytes by which a capsule promises its key (``ver`` is 0 for a live grant)."""
    return HKDFExpand(SHA256(), 32, b"mk/kc@1\0" + oid + struct.pack(">QQ", epoch, ver)).derive(key)
