"""Contacts: whose keys this person trusts, and how far.

A contact is pinned when first seen (in the directory, in a letter, or in a record given by hand) and
verified when two people have compared their code. From then on the directory can only extend what is
pinned: records signed by the pinned keys, in one chain. Any other key blocks the contact, for good, until the
person adds the right record by hand. There is no "continue anyway".
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import time
from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, get_args

from meshkitfs.core.identity_record import IdentityRecord, verify_chain, verify_links
from meshkitfs.core.keys import did_key, fingerprint
from meshkitfs.core.records import record_hash
from meshkitfs.errors import MeshkitError
from meshkitfs.identity._directory import Directory
from meshkitfs.identity._exchange import code_digits, from_text, to_text, verification_code
from meshkitfs.identity._identity import check_handle

Trust = Literal["pinned", "verified", "blocked"]

_CLOCK_SKEW: Final = 3600  # seconds by which another device's clock may be ahead


class ContactStore(Protocol):
    """Where rows are kept; `meshkitfs.state` has these. A row is JSON text that only this module reads."""

    def contact_row(self, handle: str) -> str | None: ...

    def contact_rows(self) -> list[tuple[str, str]]:
        """All ``(handle, row)``."""

    def set_contact_row(self, handle: str, row: str) -> None:
        """Store durably, replacing the row there was."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contact:
    """One person: the newest record (signed blob) that is trusted, and how it came to be.

    ``first_seen`` is UNIX seconds. ``evidence`` is the record that blocked the contact, if any: kept so that
    the attempt can be shown. ``before`` are the records that lead to ``record``, as far as they are known
    here, oldest first; ``key_changed`` is when this home followed them to another key (UNIX seconds, 0 for
    never).
    """

    handle: str
    record: bytes = dataclasses.field(repr=False)
    trust: Trust
    first_seen: int
    evidence: bytes | None = dataclasses.field(default=None, repr=False)
    before: tuple[bytes, ...] = dataclasses.field(default=(), repr=False)
    key_changed: int = 0

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Every record of theirs that is known here, oldest first: a chain, or the end of one."""
        return (*self.before, self.record)

    @property
    def public(self) -> IdentityRecord:
        """The record, parsed: ``root`` and ``sig`` (signing), ``enc`` (the key to wrap for), their kids."""
        return IdentityRecord.parse_self_signed(self.record)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public.root)

    def as_dict(self) -> dict[str, Any]:
        """The form of ``contacts list --json``."""
        public = self.public
        return {
            "handle": self.handle,
            "trust": self.trust,
            "fingerprint": self.fingerprint,
            "did": did_key(public.root),
            "first_seen": self.first_seen,
            "valid_until": public.exp,
            "key_changed": self.key_changed or None,
        }


class ContactBook:
    """This person's contacts. ``own_root`` is their own root key (32 bytes), ``now`` always UNIX seconds.

    Its errors: ``contact_unknown`` (nobody of that name, or only an expired record), ``contact_key_changed``
    (blocked, now or before), ``invalid_argument``, ``invalid_record``, ``verification_failed``,
    ``state_corrupt`` (a stored row makes no sense), and whatever the directory raises.
    """

    def __init__(self, own_root: bytes, store: ContactStore, directory: Directory) -> None:
        self._own_root = own_root
        self._own_roots = {own_root}
        # What was read last, for those who may not wait for the disk. Nobody else writes to the store.
        self._remembered: dict[str, Contact | None] = {}
        self._store = store
        self._directory = directory

    def get(self, handle: str) -> Contact | None:
        """Return the contact as it is known here, without asking anybody."""
        row = self._store.contact_row(handle)
        return None if row is None else _from_row(handle, row)

    def remembered(self, handle: str) -> Contact | None:
        """As `get`, from memory where possible."""
        if handle not in self._remembered:
            self._remembered[handle] = self.get(handle)
        return self._remembered[handle]

    def reread(self, handle: str) -> None:
        """Somebody else has written to the store: what is remembered of ``handle`` is read again."""
        self._remembered.pop(handle, None)

    def own(self, root: bytes) -> None:
        """This person's own root key is another from now on; the ones before stay theirs."""
        self._own_root = root
        self._own_roots.add(root)

    def list(self) -> list[Contact]:
        """Return all contacts, blocked ones too, by name."""
        return sorted((_from_row(*row) for row in self._store.contact_rows()), key=lambda c: c.handle)

    async def resolve(self, handle: str, now: int) -> Contact:
        """Return the contact whose key may be used now, asking the directory; pins one never seen before."""
        contact = await self._look_up(handle, now)
        if contact is None:
            raise MeshkitError("contact_unknown", f"{handle!r} is neither a contact nor in the directory")
        return _valid_now(contact, now)

    async def meet(self, record: bytes, now: int) -> Contact:
        """Return the contact who sent ``record`` (a signed blob, as in a letter); pins one never seen before.

        It may be an older one of theirs: a letter can wait for long. Raises ``contact_key_changed`` if the
        record is of another key than the one trusted for that name.
        """
        sent = IdentityRecord.parse_self_signed(record)
        contact = await self._look_up(sent.handle, now)
        if contact is None:
            self._require_other(sent)
            return self._keep(_valid_now(Contact(sent.handle, record, "pinned", now), now))
        if record not in contact.chain and contact.public.root != sent.root:
            further = _continued(contact, record, now)
            if further is None:
                raise _changed(contact, "sent a record of another key than the one trusted for that name")
            contact = self._keep(further)
        return _valid_now(contact, now)

    async def follow(self, handle: str, now: int) -> Contact | None:
        """Return the contact after hearing the directory, also one whose record has run out; None if unknown.

        For records that are signed already. Nobody is pinned by this. Raises as `resolve`.
        """
        return await self._look_up(handle, now) if self.get(handle) is not None else None

    def add(self, given: bytes | str, now: int, *, replace: bool = False) -> Contact:
        """Pin a record that the person got by hand: a signed blob or its text form.

        It ends a block, also if its key is the new one: handing a record over is the person's own act. A
        contact in good standing keeps its key unless ``replace`` is said: ``contact_key_changed``.
        """
        record = from_text(given) if isinstance(given, str) else given
        public = IdentityRecord.parse_self_signed(record)
        self._require_other(public)
        new = _valid_now(Contact(public.handle, record, "pinned", now), now)
        known = self.get(public.handle)
        if known is None or known.trust == "blocked":
            return self._keep(new)
        if record in known.chain:
            return known
        further = _continued(known, record, now)
        if further is not None:
            return self._keep(further)
        if known.public.root == public.root:
            if public.seq <= known.public.seq:
                return known
            return self._keep(dataclasses.replace(known, record=record, before=()))
        if replace:
            return self._keep(new)
        raise _changed(known, "has another key here; if that one is lost for good, replace it")

    def verification_code(self, handle: str) -> str:
        """Return the code to compare with this contact, who must see the same."""
        return verification_code(self._own_root, self._unblocked(handle).public.root)

    def verify(self, handle: str, code: str) -> Contact:
        """Mark a contact as verified if ``code`` is the one both of you see, else ``verification_failed``."""
        contact = self._unblocked(handle)
        expected = code_digits(self.verification_code(handle)) or ""
        if not hmac.compare_digest(expected, code_digits(code) or "-"):
            raise MeshkitError("verification_failed", f"contact {handle!r}")
        return self._keep(dataclasses.replace(contact, trust="verified"))

    async def _look_up(self, handle: str, now: int) -> Contact | None:
        """Return the contact after hearing the directory (if known, even expired), or None."""
        check_handle(handle)
        self._unblocked_or_unknown(handle)
        chain = await self._directory.identity(handle)
        # Read again: while the directory was asked, another task may have pinned or blocked it.
        known = self._unblocked_or_unknown(handle)
        if not chain:
            return known
        if known is None:
            newest = _newest(handle, chain)
            self._require_other(newest)
            new = Contact(handle, chain[-1], "pinned", now, before=tuple(chain[:-1]))
            return self._keep(_valid_now(new, now))
        try:
            newest = _newest(handle, chain)
            follows = _follows(known, chain)
        except MeshkitError:
            # Served garbage says nothing about the contact; a self-consistent record of another key does.
            if not _is_other_key(known, chain[-1]):
                raise
            follows = False
        if not follows:
            raise _changed(self._block(known, chain), "has another key in the directory")
        if newest.seq > known.public.seq or len(chain) > len(known.chain):
            return self._keep(_advanced(known, chain, now))
        return known

    def _unblocked_or_unknown(self, handle: str) -> Contact | None:
        contact = self.get(handle)
        if contact is not None and contact.trust == "blocked":
            raise _changed(contact, "is blocked")
        return contact

    def _unblocked(self, handle: str) -> Contact:
        contact = self._unblocked_or_unknown(handle)
        if contact is None:
            raise MeshkitError("contact_unknown", f"{handle!r} is not a contact")
        return contact

    def _require_other(self, record: IdentityRecord) -> None:
        if record.root in self._own_roots:
            raise MeshkitError("invalid_argument", f"{record.handle!r} is this identity itself")

    def _block(self, contact: Contact, chain: Sequence[bytes]) -> Contact:
        return self._keep(dataclasses.replace(contact, trust="blocked", evidence=chain[-1]))

    def _keep(self, contact: Contact) -> Contact:
        self._store.set_contact_row(contact.handle, _to_row(contact))
        self._remembered[contact.handle] = contact
        return contact


def _newest(handle: str, chain: Sequence[bytes]) -> IdentityRecord:
    newest = verify_chain(chain)
    if newest.handle != handle:
        raise MeshkitError("invalid_record", f"the directory answers for {handle!r} with {newest.handle!r}")
    return newest


def _follows(known: Contact, chain: Sequence[bytes]) -> bool:
    """Whether a verified chain is the contact's own: continues what is known of it, or is the beginning."""
    first = IdentityRecord.parse_self_signed(known.chain[0])
    # The seq is the place in the chain, so each known record has exactly one place to be.
    if len(chain) > first.seq:
        return all(map(bytes.__eq__, chain[first.seq :], known.chain))
    # A directory that lags, hides or was restored, by more than is known here. What is pinned stays.
    last = IdentityRecord.parse_self_signed(chain[-1])
    return last.root == first.root or record_hash(chain[-1]) == first.prev


def _advanced(known: Contact, chain: Sequence[bytes], now: int) -> Contact:
    """Return the contact with the records of a verified chain that continues what is known."""
    new = dataclasses.replace(known, record=chain[-1], before=tuple(chain[:-1]))
    old_keys = (known.public.root, known.public.sig, known.public.enc)
    if (new.public.root, new.public.sig, new.public.enc) != old_keys:
        new = dataclasses.replace(new, key_changed=now)
    return new


def _continued(known: Contact, record: bytes, now: int) -> Contact | None:
    """Return the contact with ``record`` as the next of their chain; None if it is not."""
    chain = (*known.chain, record)
    try:
        verify_links(chain)
    except MeshkitError:
        return None
    return _advanced(known, chain, now)


def _is_other_key(known: Contact, record: bytes) -> bool:
    try:
        return IdentityRecord.parse_self_signed(record).root != known.public.root
    except MeshkitError:
        return False


def _valid_now(contact: Contact, now: int) -> Contact:
    public = contact.public
    if now >= public.exp:
        day = time.strftime("%Y-%m-%d", time.gmtime(public.exp))
        raise MeshkitError("contact_unknown", f"the identity record of {contact.handle!r} expired on {day}")
    if now < public.nbf - _CLOCK_SKEW:
        raise MeshkitError("contact_unknown", f"the identity record of {contact.handle!r} is not valid yet")
    return contact


def _changed(contact: Contact, what: str) -> MeshkitError:
    return MeshkitError("contact_key_changed", f"{contact.handle!r} {what} (trusted: {contact.fingerprint})")


def _to_row(contact: Contact) -> str:
    return json.dumps(
        {
            "record": to_text(contact.record),
            "trust": contact.trust,
            "first_seen": contact.first_seen,
            "evidence": None if contact.evidence is None else to_text(contact.evidence),
            "before": [to_text(record) for record in contact.before],
            "key_changed": contact.key_changed,
        }
    )


def _from_row(handle: str, row: str) -> Contact:
    try:
        fields = json.loads(row)
        evidence = fields["evidence"]
        contact = Contact(
            handle=handle,
            record=from_text(fields["record"]),
            trust=fields["trust"],
            first_seen=int(fields["first_seen"]),
            evidence=None if evidence is None else from_text(evidence),
            # Rows of earlier versions have neither.
            before=tuple(map(from_text, fields.get("before", ()))),
            key_changed=int(fields.get("key_changed", 0)),
        )
        if contact.public.handle != handle or contact.trust not in get_args(Trust):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, MeshkitError):
        # Never read as "unknown": that would pin whatever the directory offers next.
        raise MeshkitError("state_corrupt", f"the row of contact {handle!r} makes no sense") from None
    return contact
