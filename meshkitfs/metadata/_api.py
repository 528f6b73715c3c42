"""What a metadata home promises: where grants, rosters, heads, letters and identity records meet.

Everything in here travels as opaque signed bytes. A home checks what it accepts (see `Publication`), which
keeps honest clients from damaging each other; a reader never relies on that and verifies every record
itself, since a home may lie, lag or be somebody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["AccessList", "Metadata", "Publication", "ShareState"]


@dataclass(frozen=True, slots=True)
class Publication:
    """One atomic change of a share: a new head, a new roster, new capsules, or several of them.

    ``expect_head`` is the record hash of the head the publisher has built on (b"" when there is none yet)
    and ``expect_roster`` the seq of the newest roster it has seen (0 when there is none yet). Each is
    compared whenever it is not None, and must be given with a new head or roster respectively; a
    difference refuses the whole publication with ``head_conflict``. The numbers beside the blobs must be
    those inside them. Capsules are ``(kid of the recipient's encryption key, capsule id, blob)``.
    """

    share: bytes
    expect_head: bytes | None = None
    head: bytes | None = None
    head_ver: int = 0
    head_epoch: int = 0
    expect_roster: int | None = None
    roster: bytes | None = None
    roster_seq: int = 0
    roster_epoch: int = 0
    capsules: tuple[tuple[bytes, bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class ShareState:
    """What the gate needs of one share for one recipient, as of one moment (no publication in between)."""

    capsules: tuple[bytes, ...]
    roster: bytes | None
    timestamp: bytes | None
    head: bytes | None


@dataclass(frozen=True, slots=True)
class AccessList:
    """The newest vault record or revocation list of an id, and a timestamp over it (None: nobody vouches)."""

    record: bytes
    timestamp: bytes | None


@runtime_checkable
class Metadata(Protocol):
    """A metadata home. ``share`` is 16 bytes, a ``kid`` 16 bytes (see docs/format.md).

    Every method may raise `MeshkitError` ``metadata_unavailable``. A missing thing is None or an empty
    list; "could not find out" is always an exception.
    """

    async def service_key(self) -> bytes:
        """The 32-byte Ed25519 key that signs this home's timestamps; owners name it in their rosters."""

    async def share_state(self, share: bytes, kid: bytes) -> ShareState:
        """`capsules`, `roster`, `timestamp` and `head` together, consistent with each other: one request."""

    async def capsules(self, share: bytes, kid: bytes) -> list[bytes]:
        """All capsules of the share for this recipient, oldest first, revoked ones included."""

    async def roster(self, share: bytes) -> bytes | None:
        """The newest roster."""

    async def timestamp(self, share: bytes) -> bytes | None:
        """A freshly signed timestamp over the newest roster, good for 300 s; None without a roster."""

    async def head(self, share: bytes) -> bytes | None:
        """The newest head."""

    async def heads(self, share: bytes, after_ver: int, upto_ver: int) -> list[bytes]:
        """The heads with ``after_ver < ver <= upto_ver``, oldest first, as far as they are kept."""

    async def retention(self, share: bytes) -> bytes | None:
        """The newest retention record, which says which versions the owner has given up; None without one."""

    async def retain(self, share: bytes, record: bytes) -> None:
        """Replace the retention record by the next one. Repeating the one that is in force succeeds.

        Raises ``head_conflict`` when its seq is not the next one, ``invalid_record`` when it is malformed,
        for another share, not signed by the owner, or takes back what an earlier one gave up.
        """

    async def publish(self, publication: Publication) -> None:
        """Apply a publication entirely or not at all. Repeating one that is already in force succeeds.

        Raises ``head_conflict`` when the share has moved on (another head, another roster, or an epoch
        the newest roster has left), ``invalid_record`` when a record is malformed, is not signed by who
        must sign it, or does not fit the share.
        """

    async def post_letter(self, to_kid: bytes, blob: bytes) -> bytes:
        """Put a sealed letter into a mailbox; returns its 16-byte id. Raises no_space, invalid_argument."""

    async def letters(self, kid: bytes) -> list[tuple[bytes, bytes]]:
        """The letters in a mailbox as ``(id, blob)``, oldest first."""

    async def delete_letter(self, kid: bytes, letter_id: bytes) -> None:
        """Remove a letter; one that is not there is no error."""

    async def publish_identity(self, handle: str, record: bytes) -> None:
        """Publish an identity record, the first of its handle or the next in its chain.

        Raises ``identity_handle_taken`` when the handle (or the key) belongs to another chain,
        ``invalid_record`` when the record is malformed. Publishing a known record again is harmless.
        """

    async def identity(self, handle: str) -> list[bytes]:
        """The chain of records of a handle, oldest first; empty when nobody has that name."""

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        """The chain in which a signing key of that kid occurs, oldest first; empty when there is none."""

    async def access_list(self, list_id: bytes) -> AccessList | None:
        """A vault record, for its owner and its members, or a revocation list, for everybody who asks.

        The timestamp is one of `timestamp`'s kind, with the list's id in the place of the share's and the
        list's record hash in that of the roster's.
        """

    async def put_access_list(
        self, list_id: bytes, expect: int, record: bytes, readers: Sequence[bytes]
    ) -> None:
        """Replace the record numbered ``expect`` (0: there is none) by ``record``, the next or a later one.

        ``readers`` are the kids of the signing keys that may read it beside its owner (a revocation list is
        everybody's to read). Repeating the record that is in force succeeds. Raises ``head_conflict`` when
        another one is in force, ``invalid_record`` when it is malformed or somebody else's.
        """

    async def delete_access_list(self, list_id: bytes) -> None:
        """Remove one's own list; one that is not there is no error."""

    def tick(self, share: bytes | None = None, also: Sequence[bytes] = ()) -> int:
        """A number that differs from the last one whenever the store may have changed since.

        With ``share`` it need not move for changes of other shares; it moves for those of the access lists
        ``also``. Synchronous, a few microseconds, never
        waits. A store that cannot be looked at also gives a new number, sooner or later: the caller then asks
        properly and meets the error. How long a home that learns of changes from afar may be late is for it
        to publish.
        """

    def close(self) -> None:
        """Let go of the store's resources. Harmless when repeated."""
