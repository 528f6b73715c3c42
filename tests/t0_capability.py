"""Capability tokens, vault records and revocation lists as records: what verifies, and every way it must not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkitfs.core.capability import BLOCKS_MAX, Block, Token, check_token, implied_rights
from meshkitfs.core.capsule import RIGHTS
from meshkitfs.core.cose import record_hash
from meshkitfs.core.keys import EncryptionKey, SigningKey, did_key, kid_of, public_of_did
from meshkitfs.core.membership import (
    LIST_LIFETIME_S,
    ListMark,
    Revocations,
    VaultRecord,
    member_entry,
    newest_revocations,
    newest_vault,
    revocations_id,
)
from meshkitfs.core.pinned import Pinned
from meshkitfs.core.records import Timestamp
from meshkitfs.errors import MeshkitError

NOW = 1_800_000_000
SHARE, OTHER_SHARE = b"s" * 16, b"o" * 16
ISSUER, ALICE, BOB, EVE = (SigningKey.from_seed(bytes([n]) * 32) for n in (1, 2, 3, 4))
SERVICE = SigningKey.from_seed(b"\x09" * 32)
ASKED = Pinned("team", ISSUER.public)


def issued(holder=ALICE, **changes):
    terms = {"name": "team", "rights": ("read", "write"), "share": SHARE, "iat": NOW, "exp": NOW + 1000}
    terms |= changes
    return Token.issue(terms.pop("issuer", ISSUER), token_id=b"t" * 16, holder=holder.public, **terms)


def block(signer, token, **changes):
    """A block on top of ``token`` that no rule was asked about, signed by ``signer``."""
    last = token.last
    fields = {
        "id": last.id, "n": last.n + 1, "prev": last.digest, "name": last.name, "holder": BOB.public,
        "rights": last.rights, "share": last.share, "iat": NOW, "exp": last.exp,
    }  # fmt: skip
    return Block(**fields | changes).sign(signer)


def revoked(*tokens, seq=1, signer=ISSUER, **changes):
    fields = {
        "id": revocations_id(signer.public), "seq": seq, "prev": b"" if seq == 1 else b"p" * 32,
        "owner": signer.public, "iat": NOW, "exp": NOW + LIST_LIFETIME_S, "tokens": tokens,
    }  # fmt: skip
    return Revocations.parse_owned(Revocations(**fields | changes).sign(signer))


def check(token, holder=ALICE, share=SHARE, asked=ASKED, lists=None, now=NOW):
    return check_token(
        token, asked=asked, holder=holder.public, share=share, revoked=lists or revoked(), now=now
    )


def refused(code, call, *args, says="", **kwargs):
    with pytest.raises(MeshkitError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code
    assert says in caught.value.detail
    return caught.value


# == tokens ==============================================================================================


def test_a_token_is_good_for_its_holder_and_for_nobody_else():
    token = issued()
    assert check(token) == NOW + 1000
    assert token.rights == {"list", "read", "write"}
    refused("capability_denied", check, token, BOB, says="another holder")
    refused("capability_denied", check, token, share=OTHER_SHARE, says="another share")
    refused("capability_denied", check, token, now=NOW + 1000, says="ran out")
    refused("capability_denied", check, token, now=NOW - 61, says="future")
    refused("capability_denied", check, token, lists=revoked(token.id), says="revoked")
    refused("capability_denied", check, token, lists=revoked(signer=EVE), says="another issuer")
    refused("capability_denied", check, token, asked=Pinned("crew", ISSUER.public), says="name or issuer")
    refused("capability_denied", check, token, asked=Pinned("team", EVE.public), says="name or issuer")
    refused("capability_denied", check, issued(issuer=EVE), says="name or issuer")


def test_a_narrowed_token_is_the_next_holders_and_no_longer_the_first_ones():
    token = issued().narrow(ALICE, holder=BOB.public, rights=["read"], exp=NOW + 10, iat=NOW)
    assert check(token, BOB) == NOW + 10
    assert token.rights == {"list", "read"}
    refused("capability_denied", check, token, ALICE, says="another holder")
    # What was revoked is revoked with all that was made from it.
    refused("capability_denied", check, token, BOB, lists=revoked(token.id))


def test_narrowing_is_for_the_holder_and_never_widens():
    token = issued(rights=("read",))
    refused("capability_denied", token.narrow, EVE, holder=EVE.public, iat=NOW, says="only its holder")
    for change in ({"rights": ["write"]}, {"exp": NOW + 1001}, {"share": OTHER_SHARE}):
        refused(
            "capability_denied", token.narrow, ALICE, holder=BOB.public, iat=NOW, says="widened", **change
        )
    for _ in range(BLOCKS_MAX - 1):
        token = token.narrow(ALICE, holder=ALICE.public, iat=NOW)
    refused("capability_denied", token.narrow, ALICE, holder=BOB.public, iat=NOW, says="blocks already")


@pytest.mark.parametrize(
    "change",
    [
        {"rights": ("list", "read", "write")},
        {"rights": ("reshare",)},
        {"exp": NOW + 2000},
        {"share": None},
        {"share": OTHER_SHARE},
        {"id": b"x" * 16},
        {"name": "crew"},
        {"n": 2},
        {"prev": b"x" * 32},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_signed_block_that_takes_more_than_it_was_given_spoils_the_token(change):
    token = issued(rights=("read",))
    refused("invalid_record", Token.verify, [*token.blobs, block(ALICE, token, **change)], ISSUER.public)
    assert Token.verify([*token.blobs, block(ALICE, token)], ISSUER.public)


def test_forged_dropped_and_reordered_blocks():
    one = issued(rights=("write",))
    two = one.narrow(ALICE, holder=BOB.public, rights=["read"], iat=NOW)
    three = two.narrow(BOB, holder=EVE.public, rights=["list"], iat=NOW)
    # A block that another than the holder signed, also if it is the issuer.
    for signer in (EVE, BOB, ISSUER):
        forged = block(signer, one)
        refused("invalid_record", Token.verify, [*one.blobs, forged], ISSUER.public)
    # Every other selection and order of the blocks, except the tokens that it was made from.
    good = {one.blobs, two.blobs, three.blobs}
    tried = 0
    for size in (1, 2, 3):
        for chosen in itertools.product(three.blobs, repeat=size):
            if chosen not in good:
                tried += 1
                refused("invalid_record", Token.verify, list(chosen), ISSUER.public)
    assert tried == 36
    refused("invalid_record", Token.verify, [], ISSUER.public)
    refused("invalid_record", Token.verify, one.blobs, EVE.public)
    # A token that lost its last block is its former holder's, not of who took the block away.
    refused("capability_denied", check, two, EVE, says="another holder")


def test_the_text_of_a_token_has_one_form():
    token = issued().narrow(ALICE, holder=BOB.public, iat=NOW)
    text = token.to_text()
    assert Token.from_text(f"  {text[:50]}\n{text[50:]}\n").blobs == token.blobs
    for wrong in (
        "",
        "meshkit-capability1:",
        "x" + text,
        text + "A",
        text[:-3],
        text.replace(":", ";"),
        "é" * 9,
    ):
        with pytest.raises(MeshkitError) as caught:
            Token.from_text(wrong)
        assert caught.value.code in ("invalid_argument", "invalid_record")
        assert text[30:60] not in caught.value.detail
    data = token.to_bytes()
    for at in range(len(data)):
        spoiled = bytearray(data)
        spoiled[at] ^= 1
        refused("invalid_record", Token.from_bytes, bytes(spoiled))
    for size in range(len(data)):
        if size != len(issued().to_bytes()):
            refused("invalid_record", Token.from_bytes, data[:size])


_RIGHTS = st.sets(st.sampled_from(RIGHTS), min_size=1).map(lambda rights: tuple(sorted(rights)))
_SHARES = st.sampled_from([None, SHARE, OTHER_SHARE])
_STEPS = st.lists(
    st.tuples(st.none() | _RIGHTS, _SHARES, st.none() | st.integers(NOW + 1, NOW + 40), st.sampled_from([ALICE, BOB, EVE])),
    max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(rights=_RIGHTS, share=_SHARES, steps=_STEPS, honest=st.booleans())
def test_no_chain_of_narrowings_allows_what_its_parent_does_not(rights, share, steps, honest):
    """Whatever is asked for, by the rules or past them: a token that verifies allows no more than its parent."""
    token, holder = issued(rights=rights, share=share, exp=NOW + 30), ALICE
    for wanted, only, exp, following in steps:
        parent = token
        try:
            if honest:
                token = token.narrow(
                    holder, holder=following.public, rights=wanted, share=only, exp=exp, iat=NOW
                )
            else:
                changes = {"holder": following.public, "share": only, "exp": exp or NOW + 30}
                changes |= {"rights": wanted} if wanted else {}
                token = Token.verify([*token.blobs, block(holder, token, **changes)], ISSUER.public)
        except MeshkitError:
            continue
        for person, place, moment in itertools.product(
            (ALICE, BOB, EVE), (SHARE, OTHER_SHARE), (NOW, NOW + 15, NOW + 30, NOW + 40)
        ):
            try:
                check(token, person, place, now=moment)
            except MeshkitError:
                continue
            assert person is following
            assert check(parent, holder, place, now=moment)
            assert token.rights <= parent.rights <= implied_rights(rights)
        holder = following


# == what capsules name ==================================================================================


def test_what_a_capsule_names_pins_the_key():
    assert public_of_did(did_key(ISSUER.public)) == ISSUER.public
    vault = Pinned("0f" * 16, ISSUER.public)
    assert Pinned.parse(vault.text) == vault
    assert vault.vault_id == b"\x0f" * 16
    assert len(vault.text) <= 256
    for wrong in ("team", "team@", "@" + did_key(ISSUER.public), "te am@" + did_key(ISSUER.public), vault.text + "1",
                  vault.text.upper(), "team@did:key:z" + "z" * 60, "team@did:key:z", "team@did:key:z6Mk"):  # fmt: skip
        refused("invalid_record", Pinned.parse, wrong)
    refused("invalid_record", lambda: ASKED.vault_id)


# == vault records and revocation lists ==================================================================

VAULT = b"v" * 16
UNSEEN = ListMark()
MEMBER = EncryptionKey.from_seed(b"\x07" * 32)


def vault(seq=1, signer=ISSUER, **changes):
    fields = {
        "id": VAULT, "seq": seq, "prev": b"" if seq == 1 else b"p" * 32, "owner": signer.public, "iat": NOW,
        "exp": NOW + LIST_LIFETIME_S, "members": (member_entry(ALICE.public, MEMBER.public),),
    }  # fmt: skip
    return VaultRecord(**fields | changes).sign(signer)


def stamp(record, signer=SERVICE, list_id=VAULT, **changes):
    fields = {"share": list_id, "roster": record_hash(record), "iat": NOW, "exp": NOW + 300} | changes
    return Timestamp(**fields).sign(signer)


def newest(record, word, mark=UNSEEN, now=NOW, owner=ISSUER):
    return newest_vault(
        record, word, vault=VAULT, owner=owner.public, mark=mark, timestamp_keys=[SERVICE.public], now=now
    )


def test_a_vault_record_that_is_proved():
    record = vault()
    found, until = newest(record, stamp(record))
    assert until == NOW + 300
    assert found.lists(MEMBER.kid)
    assert not found.lists(kid_of(ALICE.public))
    assert found.signing_kids() == (ALICE.kid,)
    # Seen before, and the next of it.
    mark = ListMark(1, record_hash(record))
    assert newest(record, stamp(record), mark)[0].seq == 1
    following = vault(2, prev=mark.hash)
    assert newest(following, stamp(following), mark)[0].seq == 2
    # Further ahead, the store has not kept what lies between; only the owner can have signed it.
    later = vault(5)
    assert newest(later, stamp(later), mark)[0].seq == 5
    # It ends with the record itself, if that is sooner.
    short = vault(exp=NOW + 20)
    assert newest(short, stamp(short))[1] == NOW + 20


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: (None, None), "shows no vault record"),
        (lambda: (vault(signer=EVE), None), "not its owner's"),
        (lambda: (vault(id=b"w" * 16), None), "another's"),
        (lambda: (vault(iat=NOW - 5, exp=NOW), None), "ran out"),
        (lambda: (vault(iat=NOW + 61, exp=NOW + 99), None), "future"),
        (lambda: (vault(), None), "nobody vouches"),
        (lambda: (vault(), stamp(vault(), EVE)), "timestamp of the vault record is not usable"),
        (lambda: (vault(), stamp(vault(2))), "not for this"),
        (lambda: (vault(), stamp(vault(), list_id=SHARE)), "not for this"),
        (lambda: (vault(), stamp(vault(), iat=NOW - 300, exp=NOW + 900)), "not of now"),
        (lambda: (vault(), stamp(vault(), exp=NOW + 900, iat=NOW + 61)), "not of now"),
        (lambda: (revoked_blob(), None), "not its owner's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_vault_record_that_is_not_proved(make, says):
    record, word = make()
    refused("vault_membership_required", newest, record, word, says=says)


def test_vault_records_that_go_back_or_fork():
    seen = ListMark(2, record_hash(vault(2)))
    for record, says in (
        (vault(1), "2 was seen"),
        (vault(2, members=()), "two different"),
        (vault(3, prev=b"x" * 32), "does not follow"),
    ):
        refused("vault_membership_required", newest, record, stamp(record), seen, says=says)
    # The very same record under the same number is no fork.
    assert newest(vault(2), stamp(vault(2)), seen)


def revoked_blob(**changes):
    fields = {
        "id": revocations_id(ISSUER.public), "seq": 1, "prev": b"", "owner": ISSUER.public, "iat": NOW,
        "exp": NOW + LIST_LIFETIME_S, "tokens": (b"t" * 16,),
    }  # fmt: skip
    return Revocations(**fields | changes).sign(ISSUER)


def test_a_revocation_list_is_read_by_the_same_rules():
    record, list_id = revoked_blob(), revocations_id(ISSUER.public)

    def newest_list(record, word, mark=UNSEEN, now=NOW):
        return newest_revocations(
            record, word, issuer=ISSUER.public, mark=mark, timestamp_keys=[SERVICE.public], now=now
        )

    found, until = newest_list(record, stamp(record, list_id=list_id))
    assert (found.tokens, until) == ((b"t" * 16,), NOW + 300)
    old = ListMark(2, b"x" * 32)
    refused("capability_denied", newest_list, record, stamp(record, list_id=list_id), old, says="2 was seen")
    refused("capability_denied", newest_list, None, None, says="shows no revocation list")
    refused("capability_denied", newest_list, record, stamp(record, list_id=list_id), now=NOW + 300)
    with pytest.raises(MeshkitError):
        Revocations.parse_owned(revoked_blob(id=b"r" * 16))


def test_fields_that_break_a_rule():
    for change in (
        {"seq": 0},
        {"prev": b"p" * 32},
        {"members": (b"m" * 31,)},
        {"members": (b"m" * 32,) * 2},
        {"exp": NOW},
    ):
        refused("invalid_record", vault, **change)
    refused("invalid_record", VaultRecord.parse_owned, vault(owner=EVE.public))
    for change in (
        {"name": "a b"},
        {"name": ""},
        {"rights": ()},
        {"rights": ("fly",)},
        {"exp": NOW},
        {"share": b"s"},
    ):
        refused("invalid_record", issued, **change)
