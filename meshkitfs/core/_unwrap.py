"""Taking the key out of a capsule. The import contract lets only ``meshkitfs.gate`` import this module."""

from __future__ import annotations

import hmac

from meshkitfs.core import hpke
from meshkitfs.core.capsule import WRAP_SIZE, Capsule
from meshkitfs.core.keys import EncryptionKey, key_commit, kid_of
from meshkitfs.core.release import EpochSecret, Release, epoch_key, xor
from meshkitfs.core.secret_memory import wipe
from meshkitfs.errors import MeshkitError

__all__ = ["hpke_open", "open_capsule", "open_release", "open_secret"]


def hpke_open(wrap: bytes, key: EncryptionKey, info: bytes) -> bytes:
    """Return the 32-byte key in ``wrap``. Raises MeshkitError ``key_unwrap_failed``."""
    if len(wrap) != WRAP_SIZE:
        raise MeshkitError("key_unwrap_failed", "wrapped key of another length")
    return hpke.unwrap(key, info, wrap)


def open_capsule(capsule: Capsule, key: EncryptionKey, half: bytes = b"") -> bytes:
    """Return the 32-byte key that ``capsule`` grants to the holder of ``key``; the caller wipes it.

    ``half`` is what the release service gave, where the capsule holds only a half. To be called only after
    every other check has passed. Raises MeshkitError ``recipient_not_authorized`` if it is addressed to
    somebody else, ``key_unwrap_failed`` if it does not open or its key is not the one the owner committed to.
    """
    raw = _held(capsule, key)
    if capsule.rel is not None:
        held = raw
        try:
            raw = _whole(capsule, held, half)
        finally:
            wipe(held)
    if not hmac.compare_digest(key_commit(raw, capsule.oid, capsule.epoch, capsule.ver), capsule.kc):
        wipe(raw)
        raise MeshkitError("key_unwrap_failed", "the key is not the one the capsule commits to")
    return raw


def _whole(capsule: Capsule, held: bytes, half: bytes) -> bytes:
    """Return the key that leads from what a capsule holds, and from what a service gave."""
    assert capsule.rel is not None  # the caller looked
    if capsule.rel["part"] == "whole":
        return EpochSecret(capsule.share, capsule.epoch, held, capsule.service).key
    if len(half) != 32:
        raise MeshkitError("key_unwrap_failed", "the capsule holds only half of the key")
    if capsule.grant == "snapshot":
        return xor(held, half)
    return epoch_key(held, half, capsule.share, capsule.epoch)


def open_secret(capsule: Capsule, key: EncryptionKey) -> EpochSecret:
    """Return what the owner of a share has of an epoch, from the owner's own live capsule; to be wiped.

    Raises as `open_capsule`, and ``right_not_granted`` if the capsule holds only half of the key.
    """
    if capsule.grant != "live" or (capsule.rel is not None and capsule.rel["part"] != "whole"):
        raise MeshkitError("right_not_granted", "the capsule holds no more than its recipient needs")
    wipe(open_capsule(capsule, key))  # it keeps its promise
    return EpochSecret(capsule.share, capsule.epoch, _held(capsule, key), capsule.service)


def open_release(
    record: bytes, capsule: Capsule, checked: bytes, nonce: bytes, key: EncryptionKey
) -> tuple[bytes, Release]:
    """Return the half in a release service's answer, and the answer. The caller wipes, and checks the times.

    ``capsule`` is the one whose half was asked for, ``checked`` the record hash of the one that was shown for
    it (the same, unless it is of an older epoch). Raises ``invalid_record`` for an answer that the service
    named in the capsule did not sign, or to another question; ``key_unwrap_failed`` if it does not open.
    """
    service = capsule.service
    if service is None:
        raise MeshkitError("invalid_record", "the capsule names no release service")
    answer = Release.parse(record, {kid_of(service.key): service.key})
    wanted = (capsule.share, checked, capsule.epoch, key.kid, nonce)
    if (answer.share, answer.capsule, answer.epoch, answer.to, answer.nonce) != wanted:
        raise MeshkitError("invalid_record", "the release is an answer to another question")
    return hpke.unwrap(key, answer.info, answer.half), answer


def _held(capsule: Capsule, key: EncryptionKey) -> bytes:
    if capsule.to != key.kid:
        raise MeshkitError("recipient_not_authorized", "the capsule is addressed to another key")
    return hpke_open(capsule.wrap, key, capsule.info)
