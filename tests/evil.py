"""Stores and metadata homes that lie, on purpose and on command: a public fixture of the test suite.

Three ways to be evil, for three kinds of test:

- `EvilStore` and `EvilMetadata` wrap real ones inside a process and spoil chosen answers;
- the functions below them spoil a real store directory and a real metadata.db on disk, under a running
  daemon of another process just as well as under none.

Nothing in here is a mock: the spoiled thing is always what the real component stored.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import apsw

from meshkitfs.core.blocks import SealedBlock, VerifiedBlock
from meshkitfs.core.cid import cid_text, parse_cid
from meshkitfs.core.cose import peek1, record_hash
from meshkitfs.core.fields import Record
from meshkitfs.core.keys import SigningKey
from meshkitfs.core.records import Head, Roster, Timestamp
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import AccessList, Metadata, Publication, ShareState
from meshkitfs.providers import ByteStore, Capabilities, Counters, Source, Usage

R = TypeVar("R", bound=Record)

# == byte stores, in the process =====================================================================

# A fault gets the store below and the digest asked for, and does what a get would do.
StoreFault = Callable[[ByteStore, bytes], Awaitable[VerifiedBlock]]


def _spoiled(change: Callable[[bytes], bytes]) -> StoreFault:
    """The honest store's check, over changed bytes: what every provider must answer to them."""

    async def fault(inner: ByteStore, digest: bytes) -> VerifiedBlock:
        block = await inner.get(digest)
        return VerifiedBlock.check(digest, change(bytes(block.data)))

    return fault


def flip(at: int = 100) -> StoreFault:
    """One bit of the byte at ``at`` (modulo the size) is wrong."""
    return _spoiled(lambda data: flipped(data, at))


def truncate(by: int = 1) -> StoreFault:
    """The last ``by`` bytes are missing."""
    return _spoiled(lambda data: data[:-by])


def extend(tail: bytes = b"\0") -> StoreFault:
    """There are more bytes than there should be."""
    return _spoiled(lambda data: data + tail)


def instead(data: bytes) -> StoreFault:
    """Other bytes altogether, such as an error page that came with status 200."""
    return _spoiled(lambda _: data)


def swap(other: bytes) -> StoreFault:
    """The bytes of another block under this one's name."""

    async def fault(inner: ByteStore, digest: bytes) -> VerifiedBlock:
        return VerifiedBlock.check(digest, (await inner.get(other)).data)

    return fault


def lie(other: bytes) -> StoreFault:
    """A provider that breaks its contract: a properly verified block, but not the one asked for."""

    async def fault(inner: ByteStore, digest: bytes) -> VerifiedBlock:
        return await inner.get(other)

    return fault


def missing() -> StoreFault:
    """The block is not there."""

    async def fault(inner: ByteStore, digest: bytes) -> VerifiedBlock:
        raise MeshkitError("block_unavailable", cid_text(digest))

    return fault


def failing(code: str = "provider_request_failed") -> StoreFault:
    """The store cannot be asked."""

    async def fault(inner: ByteStore, digest: bytes) -> VerifiedBlock:
        raise MeshkitError(code, "evil")

    return fault


class EvilStore:
    """A byte store that spoils chosen answers of a real one.

    ``on_get`` says how a get fails: for one digest or for all, a number of times or for good. ``on_put``
    names the error code that puts end in. With ``forgets`` a put is acknowledged and nothing is stored;
    ``claims`` are digests it says it has; after ``deletes`` deletions it answers no more of them. ``log`` lists (method, digest) of all calls.
    """

    def __init__(self, inner: ByteStore) -> None:
        self.inner = inner
        self.on_put: str | None = None
        self.on_sync: str | None = None
        self.forgets = False
        self.deletes: int | None = None
        self.claims: set[bytes] = set()
        self.log: list[tuple[str, bytes]] = []
        self._faults: dict[bytes | None, tuple[StoreFault, int | None]] = {}

    def on_get(self, fault: StoreFault, digest: bytes | None = None, *, times: int | None = None) -> None:
        """Spoil the gets of a digest (None: of every digest without a fault of its own)."""
        self._faults[digest] = (fault, times)

    def heal(self) -> None:
        """Be honest from now on."""
        self._faults.clear()
        self.on_put = self.on_sync = self.deletes = None
        self.forgets = False
        self.claims.clear()

    @property
    def name(self) -> str:
        return f"evil {self.inner.name}"

    @property
    def local(self) -> bool:
        return self.inner.local

    @property
    def counters(self) -> Counters:
        return self.inner.counters

    async def get_many(self, digests: Sequence[bytes]) -> dict[bytes, VerifiedBlock]:
        found = {}
        for digest in digests:
            with contextlib.suppress(MeshkitError):
                found[digest] = await self.get(digest)
        return found

    async def get(self, digest: bytes) -> VerifiedBlock:
        self.log.append(("get", digest))
        for key in (digest, None):
            if key in self._faults:
                fault, times = self._faults[key]
                if times == 1:
                    del self._faults[key]
                elif times is not None:
                    self._faults[key] = (fault, times - 1)
                return await fault(self.inner, digest)
        return await self.inner.get(digest)

    async def put(self, block: SealedBlock) -> None:
        if self._takes("put", block.digest):
            await self.inner.put(block)

    async def put_file(self, digest: bytes, path: str | Path) -> None:
        if self._takes("put_file", digest):
            await self.inner.put_file(digest, path)

    async def put_files(self, files: Sequence[tuple[bytes, str | Path]]) -> None:
        for digest, path in files:
            await self.put_file(digest, path)

    async def has(self, digest: bytes) -> bool:
        return bool(await self.has_many((digest,)))

    async def has_many(self, digests: Iterable[bytes]) -> set[bytes]:
        wanted = list(digests)
        self.log += (("has", digest) for digest in wanted)
        return await self.inner.has_many(wanted) | self.claims.intersection(wanted)

    async def sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        wanted = list(digests)
        self.log += (("has", digest) for digest in wanted)
        return dict.fromkeys(self.claims.intersection(wanted), 1) | await self.inner.sizes(wanted)

    async def delete(self, digest: bytes) -> None:
        await self.delete_many((digest,))

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            if self.deletes is not None:
                if not self.deletes:
                    raise MeshkitError("provider_request_failed", "evil")
                self.deletes -= 1
            self.log.append(("delete", digest))
            await self.inner.delete(digest)

    async def sync(self) -> None:
        self.log.append(("sync", b""))
        if self.on_sync is not None:
            raise MeshkitError(self.on_sync, "evil")
        await self.inner.sync()

    def usage(self) -> Usage:
        return self.inner.usage()

    async def probe(self) -> Capabilities:
        return await self.inner.probe()

    def sources(self) -> list[Source]:
        return self.inner.sources()

    async def aclose(self) -> None:
        await self.inner.aclose()

    def _takes(self, method: str, digest: bytes) -> bool:
        self.log.append((method, digest))
        if self.on_put is not None:
            raise MeshkitError(self.on_put, "evil")
        return not self.forgets


# == metadata, in the process ========================================================================

# A fault gets the honest answer and gives another one, or raises.
Fault = Callable[[Any], Any]


def fixed(value: Any) -> Fault:
    """Always this answer: an old record, another share's, one signed by somebody else."""
    return lambda _: value


def withheld(answer: Any) -> Any:
    """ "There is nothing": None, or an empty list."""
    return [] if isinstance(answer, list) else None


def unavailable(code: str = "metadata_unavailable") -> Fault:
    """No answer at all."""

    def fault(_: Any) -> Any:
        raise MeshkitError(code, "evil")

    return fault


def damaged(answer: Any) -> Any:
    """The record, or each record of the list, with one bit wrong."""
    if isinstance(answer, bytes):
        return flipped(answer, len(answer) // 2)
    return [damaged(item) for item in answer]


class EvilMetadata:
    """A metadata home that spoils chosen answers of a real one.

    ``on(method, fault)`` spoils the answers of a method, of one share or handle or of all: for good, or a
    number of times. The consistent `share_state` is put together from the four spoiled single answers.
    Everything published through it is kept in ``rosters`` and ``published_heads`` (by share, oldest first),
    so that stale ones can be served; ``log`` lists (method, first argument) of all calls.
    """

    def __init__(self, inner: Metadata) -> None:
        self.inner = inner
        self.rosters: dict[bytes, list[bytes]] = {}
        self.published_heads: dict[bytes, list[bytes]] = {}
        self.log: list[tuple[str, Any]] = []
        self._faults: dict[tuple[str, Any], tuple[Fault, int | None]] = {}
        self._turn = 0

    def on(self, method: str, fault: Fault, about: Any = None, *, times: int | None = None) -> None:
        """Spoil the answers of ``method`` about a share, handle or kid (None: about everything)."""
        if method not in _ANSWERS:
            raise ValueError(f"{method} is not one of {sorted(_ANSWERS)}")
        self._faults[method, about] = (fault, times)
        self._turn += 1 << 50  # whoever trusts tick() looks again, as after a real change

    def heal(self) -> None:
        """Be honest from now on."""
        self._faults.clear()
        self._turn += 1 << 50

    def stale_roster(self, share: bytes, back: int = 1) -> None:
        """Serve the roster that many publications before the newest, with an honest timestamp over it."""
        old = self.rosters[share][-1 - back]
        self.on("roster", fixed(old), share)
        self.on("timestamp", lambda stamp: self.sign_timestamp(share, old, peek(Timestamp, stamp).iat), share)

    def stale_head(self, share: bytes, back: int = 1) -> None:
        """Serve an old head as the newest, and no heads after it."""
        old = self.published_heads[share][-1 - back]
        upto = peek(Head, old).ver
        self.on("head", fixed(old), share)
        self.on("heads", lambda blobs: [blob for blob in blobs if peek(Head, blob).ver <= upto], share)

    def old_timestamp(self, share: bytes, seconds: int) -> None:
        """Serve timestamps over the right roster that were signed ``seconds`` ago."""

        def fault(stamp: bytes) -> bytes:
            return self.sign_timestamp(share, self.rosters[share][-1], peek(Timestamp, stamp).iat - seconds)

        self.on("timestamp", fault, share)

    def sign_timestamp(self, share: bytes, roster: bytes, iat: int, lifetime: int = 300) -> bytes:
        """A timestamp with the real service key, over whatever roster and time is wanted."""
        record = Timestamp(share=share, roster=record_hash(roster), iat=iat, exp=iat + lifetime)
        return record.sign(service_key(self.inner.path))  # type: ignore[attr-defined]

    async def service_key(self) -> bytes:
        return await self._answer("service_key", None, self.inner.service_key())

    async def share_state(self, share: bytes, kid: bytes) -> ShareState:
        honest = await self.inner.share_state(share, kid)
        self.log.append(("share_state", share))
        return ShareState(
            capsules=tuple(self._spoil("capsules", share, list(honest.capsules))),
            roster=self._spoil("roster", share, honest.roster),
            timestamp=self._spoil("timestamp", share, honest.timestamp),
            head=self._spoil("head", share, honest.head),
        )

    async def capsules(self, share: bytes, kid: bytes) -> list[bytes]:
        return await self._answer("capsules", share, self.inner.capsules(share, kid))

    async def roster(self, share: bytes) -> bytes | None:
        return await self._answer("roster", share, self.inner.roster(share))

    async def timestamp(self, share: bytes) -> bytes | None:
        return await self._answer("timestamp", share, self.inner.timestamp(share))

    async def head(self, share: bytes) -> bytes | None:
        return await self._answer("head", share, self.inner.head(share))

    async def heads(self, share: bytes, after_ver: int, upto_ver: int) -> list[bytes]:
        return await self._answer("heads", share, self.inner.heads(share, after_ver, upto_ver))

    async def retention(self, share: bytes) -> bytes | None:
        return await self._answer("retention", share, self.inner.retention(share))

    async def retain(self, share: bytes, record: bytes) -> None:
        await self._answer("retain", share, self.inner.retain(share, record))

    async def publish(self, publication: Publication) -> None:
        await self._answer("publish", publication.share, self.inner.publish(publication))
        if publication.roster is not None:
            self.rosters.setdefault(publication.share, []).append(publication.roster)
        if publication.head is not None:
            self.published_heads.setdefault(publication.share, []).append(publication.head)

    async def post_letter(self, to_kid: bytes, blob: bytes) -> bytes:
        return await self._answer("post_letter", to_kid, self.inner.post_letter(to_kid, blob))

    async def letters(self, kid: bytes) -> list[tuple[bytes, bytes]]:
        return await self._answer("letters", kid, self.inner.letters(kid))

    async def delete_letter(self, kid: bytes, letter_id: bytes) -> None:
        await self._answer("delete_letter", kid, self.inner.delete_letter(kid, letter_id))

    async def publish_identity(self, handle: str, record: bytes) -> None:
        await self._answer("publish_identity", handle, self.inner.publish_identity(handle, record))

    async def identity(self, handle: str) -> list[bytes]:
        return await self._answer("identity", handle, self.inner.identity(handle))

    async def identity_by_kid(self, kid: bytes) -> list[bytes]:
        return await self._answer("identity_by_kid", kid, self.inner.identity_by_kid(kid))

    async def access_list(self, list_id: bytes) -> AccessList | None:
        return await self._answer("access_list", list_id, self.inner.access_list(list_id))

    async def put_access_list(self, list_id: bytes, expect: int, record: bytes, readers: Any) -> None:
        honest = self.inner.put_access_list(list_id, expect, record, readers)
        await self._answer("put_access_list", list_id, honest)

    async def delete_access_list(self, list_id: bytes) -> None:
        await self._answer("delete_access_list", list_id, self.inner.delete_access_list(list_id))

    def tick(self, share: bytes | None = None, also: Any = ()) -> int:
        return self.inner.tick(share, also) + self._turn

    def close(self) -> None:
        self.inner.close()

    async def _answer(self, method: str, about: Any, honest: Awaitable[Any]) -> Any:
        # The honest work is done first, also when the answer is then lost: a publish whose reply never
        # comes has taken place all the same.
        answer = await honest
        self.log.append((method, about))
        return self._spoil(method, about, answer)

    def _spoil(self, method: str, about: Any, answer: Any) -> Any:
        for key in ((method, about), (method, None)):
            if key in self._faults:
                fault, times = self._faults[key]
                if times == 1:
                    del self._faults[key]
                elif times is not None:
                    self._faults[key] = (fault, times - 1)
                return fault(answer)
        return answer


_ANSWERS = frozenset(
    name
    for name, value in vars(Metadata).items()
    if not name.startswith("_") and name not in ("share_state", "tick", "close") and callable(value)
)


def forged_head(genuine: bytes, signer: SigningKey, **changes: Any) -> bytes:
    """A head like ``genuine`` with some fields changed, signed by whoever is asked."""
    return replace(peek(Head, genuine), **changes).sign(signer)


def forged_roster(genuine: bytes, signer: SigningKey, **changes: Any) -> bytes:
    """A roster like ``genuine`` with some fields changed, signed by whoever is asked."""
    return replace(peek(Roster, genuine), **changes).sign(signer)


# == a store directory, on disk ======================================================================
#
# The files are replaced, not written into, because a store's file may be one with the spool's of the
# device that wrote it: with ``in_place`` that device's own copy is spoiled too.


def block_path(store: str | Path, block: bytes | str) -> Path:
    """The file of a block, named by digest or CID, in the directory of a LocalStore."""
    text = cid_text(block) if isinstance(block, bytes) else block
    return Path(store) / text[-2:] / text


def all_blocks(store: str | Path) -> dict[bytes, Path]:
    """Every block of a store directory: digest to file."""
    return {parse_cid(path.name): path for path in sorted(Path(store).glob("??/bafkrei*"))}


def flip_file(store: str | Path, block: bytes | str, at: int = 100, *, in_place: bool = False) -> None:
    """Change one bit of the byte at ``at`` (modulo the size)."""
    path = block_path(store, block)
    overwrite(path, flipped(path.read_bytes(), at), in_place=in_place)


def truncate_file(store: str | Path, block: bytes | str, by: int = 1, *, in_place: bool = False) -> None:
    """Cut off the last ``by`` bytes."""
    path = block_path(store, block)
    overwrite(path, path.read_bytes()[:-by], in_place=in_place)


def extend_file(
    store: str | Path, block: bytes | str, tail: bytes = b"\0", *, in_place: bool = False
) -> None:
    """Append bytes."""
    path = block_path(store, block)
    overwrite(path, path.read_bytes() + tail, in_place=in_place)


def swap_files(store: str | Path, one: bytes | str, other: bytes | str) -> None:
    """Exchange the bytes of two blocks."""
    first, second = block_path(store, one), block_path(store, other)
    one_data, other_data = first.read_bytes(), second.read_bytes()
    overwrite(first, other_data)
    overwrite(second, one_data)


def remove_file(store: str | Path, block: bytes | str) -> None:
    """Lose a block."""
    block_path(store, block).unlink()


def overwrite(path: Path, data: bytes, *, in_place: bool = False) -> None:
    """Put other bytes under a name, keeping mode, owner and group."""
    if in_place:
        path.write_bytes(data)
        return
    status = path.stat()
    draft = path.with_name(f".evil-{secrets.token_hex(8)}")
    draft.write_bytes(data)
    draft.chmod(status.st_mode & 0o7777)
    os.chown(draft, status.st_uid, status.st_gid)
    draft.replace(path)


def flipped(data: bytes, at: int) -> bytes:
    """The bytes with one bit of the byte at ``at`` (modulo the length) changed."""
    at %= len(data)
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


# == metadata.db, on disk ============================================================================


@contextlib.contextmanager
def opened(metadata: str | Path) -> Iterator[apsw.Connection]:
    """The file of an EmbeddedMetadata as a transaction, past all its rules.

    apsw, and not the standard library's sqlite3: two copies of SQLite in one process take each other's
    locks away.
    """
    connection = apsw.Connection(str(metadata), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(10_000)
        with connection:
            yield connection
    finally:
        connection.close()


def shares(metadata: str | Path) -> list[bytes]:
    """All shares that have a roster."""
    with opened(metadata) as db:
        return [row[0] for row in db.execute("SELECT DISTINCT share FROM rosters ORDER BY share")]


def service_key(metadata: str | Path) -> SigningKey:
    """The key that signs this file's timestamps."""
    with opened(metadata) as db:
        return SigningKey.from_seed(db.execute("SELECT seed FROM service").get)


def change_service_key(metadata: str | Path) -> None:
    """Let another key sign the timestamps from now on."""
    with opened(metadata) as db:
        db.execute("UPDATE service SET seed = ?", (secrets.token_bytes(32),))


def roll_back_head(metadata: str | Path, share: bytes, ver: int) -> None:
    """Forget every head after version ``ver`` (0: all of them), as a restored backup would."""
    with opened(metadata) as db:
        db.execute("DELETE FROM heads WHERE share = ? AND ver > ?", (share, ver))


def roll_back_roster(metadata: str | Path, share: bytes, seq: int) -> None:
    """Forget every roster after number ``seq`` (0: all of them): the un-revoke attempt."""
    with opened(metadata) as db:
        db.execute("DELETE FROM rosters WHERE share = ? AND seq > ?", (share, seq))


def replace_head(metadata: str | Path, share: bytes, blob: bytes) -> None:
    """Put another blob in the place of the newest head (a fork, a stranger's, another share's)."""
    with opened(metadata) as db:
        ver = db.execute("SELECT max(ver) FROM heads WHERE share = ?", (share,)).get
        values = (record_hash(blob), blob, share, ver)
        db.execute("UPDATE heads SET hash = ?, blob = ? WHERE share = ? AND ver = ?", values)


def append_head(metadata: str | Path, share: bytes, blob: bytes) -> None:
    """Add a head as the newest without anybody checking who signed it."""
    with opened(metadata) as db:
        values = (share, peek(Head, blob).ver, record_hash(blob), blob)
        db.execute("INSERT INTO heads (share, ver, hash, blob) VALUES (?, ?, ?, ?)", values)


def replace_roster(metadata: str | Path, share: bytes, blob: bytes) -> None:
    """Put another blob in the place of the newest roster."""
    with opened(metadata) as db:
        seq = db.execute("SELECT max(seq) FROM rosters WHERE share = ?", (share,)).get
        values = (record_hash(blob), blob, share, seq)
        db.execute("UPDATE rosters SET hash = ?, blob = ? WHERE share = ? AND seq = ?", values)


def newest_head(metadata: str | Path, share: bytes) -> bytes:
    """The newest head's blob."""
    with opened(metadata) as db:
        return db.execute("SELECT blob FROM heads WHERE share = ? ORDER BY ver DESC LIMIT 1", (share,)).get


def newest_roster(metadata: str | Path, share: bytes) -> bytes:
    """The newest roster's blob."""
    with opened(metadata) as db:
        return db.execute("SELECT blob FROM rosters WHERE share = ? ORDER BY seq DESC LIMIT 1", (share,)).get


def capsules(metadata: str | Path, share: bytes) -> list[bytes]:
    """All capsules of a share, oldest first."""
    with opened(metadata) as db:
        return [
            row[0] for row in db.execute("SELECT blob FROM capsules WHERE share = ? ORDER BY n", (share,))
        ]


def drop_capsules(metadata: str | Path, share: bytes) -> None:
    """Lose all capsules of a share."""
    with opened(metadata) as db:
        db.execute("DELETE FROM capsules WHERE share = ?", (share,))


def replace_capsule(metadata: str | Path, old: bytes, new: bytes, kid: bytes | None = None) -> None:
    """Put another blob in the place of a capsule, optionally into another recipient's drawer."""
    with opened(metadata) as db:
        db.execute("UPDATE capsules SET blob = ?, kid = ifnull(?, kid) WHERE blob = ?", (new, kid, old))


def flip_rows(metadata: str | Path, table: str, share: bytes, at: int = 100) -> None:
    """Change one bit in every ``heads``, ``rosters`` or ``capsules`` blob of a share."""
    if table not in ("heads", "rosters", "capsules"):
        raise ValueError(table)
    with opened(metadata) as db:
        rows = db.execute(f"SELECT blob FROM {table} WHERE share = ?", (share,)).fetchall()  # noqa: S608
        for (blob,) in rows:
            db.execute(f"UPDATE {table} SET blob = ? WHERE blob = ?", (flipped(blob, at), blob))  # noqa: S608


def peek(kind: type[R], blob: bytes) -> R:
    """A signed record without asking who signed it: to see what is to be spoiled."""
    return kind._from_payload(peek1(blob, kind.TYPE), b"", blob)
