"""Capability tokens as Biscuits: the same chain and the same answers, and what anybody can do to a Biscuit."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import t0_capability
from biscuit_auth import (
    Algorithm,
    AuthorizationError,
    AuthorizerBuilder,
    Biscuit,
    BiscuitBuilder,
    BlockBuilder,
    PrivateKey,
    PublicKey,
    UnverifiedBiscuit,
)
from hypothesis import given, settings
from t0_capability import ALICE, BOB, EVE, ISSUER, NOW, OTHER_SHARE, SHARE, check, refused, revoked

from meshkitfs.core.biscuit import BiscuitToken, _statements
from meshkitfs.core.capability import (
    BISCUIT_MAGIC,
    BLOCKS_MAX,
    TOKEN_MAX,
    Block,
    Token,
    implied_rights,
    issuing,
    open_token,
    seal_token,
)
from meshkitfs.core.keys import EncryptionKey
from meshkitfs.errors import MeshkitError

STEPS, RIGHTS, SHARES = t0_capability._STEPS, t0_capability._RIGHTS, t0_capability._SHARES


def issued(holder=ALICE, kind=BiscuitToken, **changes):
    terms = {"name": "team", "rights": ("read", "write"), "share": SHARE, "iat": NOW, "exp": NOW + 1000}
    terms |= changes
    return kind.issue(terms.pop("issuer", ISSUER), token_id=b"t" * 16, holder=holder.public, **terms)


def library(token):
    """The Biscuit as its library sees it."""
    return Biscuit.from_bytes(token.blobs[0], public(ISSUER))


def public(key):
    return PublicKey.from_bytes(key.public, Algorithm.Ed25519)


def private(key):
    return PrivateKey.from_bytes(key.seed, Algorithm.Ed25519)


def signed(token, signer, source):
    """A block on top of ``token``, signed by ``signer``, that no rule of ours was asked about."""
    known = library(token)
    block = known.third_party_request().create_block(private(signer), BlockBuilder(source))
    return bytes(known.append_third_party(public(signer), block).to_bytes())


def said(token, **changes):
    """What a block on top of ``token`` says, with these changes."""
    last = token.last
    fields = {
        "id": last.id, "n": last.n + 1, "prev": last.digest, "name": last.name, "holder": BOB.public,
        "rights": last.rights, "share": last.share, "iat": NOW, "exp": last.exp,
    }  # fmt: skip
    return _statements(Block(**fields | changes))


def spoiled(data, says="", issuer=ISSUER):
    refused("invalid_record", Token.from_bytes, BISCUIT_MAGIC + issuer.public + data, says=says)


# == as it should be ===================================================================================


def test_a_biscuit_is_good_for_its_holder_and_for_nobody_else():
    token = issued()
    assert check(token) == NOW + 1000
    assert token.rights == {"list", "read", "write"}
    refused("capability_denied", check, token, BOB, says="another holder")
    refused("capability_denied", check, token, share=OTHER_SHARE, says="another share")
    refused("capability_denied", check, token, now=NOW + 1000, says="ran out")
    refused("capability_denied", check, token, now=NOW - 61, says="future")
    refused("capability_denied", check, token, lists=revoked(signer=EVE), says="another issuer")
    refused("capability_denied", check, issued(issuer=EVE), says="name or issuer")
    assert "seed" not in repr(token)


def test_it_is_told_from_the_built_in_format_by_itself():
    cose, biscuit = issued(kind=issuing(False)), issued(kind=issuing(True))
    for token in (cose, biscuit, biscuit.narrow(ALICE, holder=BOB.public, iat=NOW)):
        read = Token.from_bytes(token.to_bytes())
        assert (type(read), read, read.last.digest) == (type(token), token, token.last.digest)
        assert Token.from_text(token.to_text()) == token
        key = EncryptionKey.generate()
        assert open_token(key, seal_token(token, key.public)) == token
    assert (cose.FORMAT, biscuit.FORMAT) == ("cose", "biscuit")
    swapped = biscuit.to_text().replace("meshkit-biscuit1", "meshkit-capability1")
    refused("invalid_argument", Token.from_text, swapped, says="another kind")


def test_narrowing_is_for_the_holder_never_widens_and_ends():
    token = issued(rights=("read",))
    refused("capability_denied", token.narrow, EVE, holder=EVE.public, iat=NOW, says="only its holder")
    for change in ({"rights": ["write"]}, {"exp": NOW + 1001}, {"share": OTHER_SHARE}):
        refused(
            "capability_denied", token.narrow, ALICE, holder=BOB.public, iat=NOW, says="widened", **change
        )
    for _ in range(BLOCKS_MAX - 1):
        token = token.narrow(ALICE, holder=ALICE.public, iat=NOW)
        refused("capability_denied", check, token, lists=revoked(token.id), says="revoked")
    refused("capability_denied", token.narrow, ALICE, holder=BOB.public, iat=NOW, says="blocks already")
    spoiled(signed(token, ALICE, said(token, n=BLOCKS_MAX - 1)), "too many")


@settings(max_examples=40, deadline=None)
@given(rights=RIGHTS, share=SHARES, steps=STEPS)
def test_both_formats_give_the_same_answers_and_no_more_than_their_parent(rights, share, steps):
    """And the library's own authorizer agrees: what it allows of the caveats is what we allow."""
    both = [
        issued(kind=issuing(biscuit), rights=rights, share=share, exp=NOW + 30) for biscuit in (False, True)
    ]
    holder = ALICE
    for wanted, only, exp, following in steps:
        made = []
        for token in both:
            try:
                terms = {"rights": wanted, "share": only, "exp": exp}
                made.append(token.narrow(holder, holder=following.public, iat=NOW, **terms))
            except MeshkitError as error:
                made.append((error.code, error.detail))
        if isinstance(made[1], Token):
            cose, biscuit = made
            assert cose.rights == biscuit.rights <= both[1].rights
            assert biscuit.last.exp <= both[1].last.exp
            both, holder = made, following
        else:
            assert made[0] == made[1]
    for place, moment in ((SHARE, NOW), (OTHER_SHARE, NOW), (SHARE, NOW + 30), (SHARE, NOW + 29)):
        answers = []
        for token in both:
            try:
                answers.append(check(token, holder, place, now=moment))
            except MeshkitError as error:
                answers.append(error.detail)
        assert answers[0] == answers[1]
        for right in ("list", "read", "write", "reshare"):
            ours = isinstance(answers[1], int) and right in both[1].rights
            assert authorized(both[1], right, place, moment) == ours


def authorized(token, right, share, moment):
    builder = AuthorizerBuilder(
        "operation({right}); share({share}); time({time}); allow if capability({name}, $id)",
        {"right": right, "share": share, "time": datetime.fromtimestamp(moment, UTC), "name": token.name},
    )
    limits = builder.limits()
    limits.max_time = timedelta(minutes=1)  # it is one millisecond, which a busy machine does not have
    builder.set_limits(limits)
    try:
        builder.build(library(token)).authorize()
    except AuthorizationError:
        return False
    return True


# == attacks ===========================================================================================


@pytest.mark.parametrize(
    "source",
    ["", "check if true", "holder(hex:" + EVE.public.hex() + ")", 'check if operation("list")', None],
    ids=["empty", "caveat", "holder", "narrower", "whole"],
)
def test_a_block_that_anybody_appended(source):
    """A Biscuit has the key for the next block in it; without the holder's signature the block counts for nothing."""
    token = issued().narrow(ALICE, holder=BOB.public, iat=NOW)
    block = BlockBuilder(said(token, holder=EVE.public) if source is None else source)
    spoiled(bytes(library(token).append(block).to_bytes()), "has not signed")
    unverified = UnverifiedBiscuit.from_base64(library(token).to_base64()).append(block)
    spoiled(bytes(unverified.verify(public(ISSUER)).to_bytes()), "has not signed")


@pytest.mark.parametrize("signer", [EVE, ALICE, ISSUER], ids=["stranger", "former holder", "issuer"])
def test_a_block_that_another_signed(signer):
    token = issued().narrow(ALICE, holder=BOB.public, iat=NOW)
    spoiled(signed(token, signer, said(token, holder=EVE.public)), "has not signed")
    assert BiscuitToken.verify([signed(token, BOB, said(token, holder=EVE.public))], ISSUER.public)


@pytest.mark.parametrize(
    "change",
    [{"rights": ("list", "read", "write")}, {"rights": ("reshare",)}, {"exp": NOW + 2000}, {"share": None},
     {"share": OTHER_SHARE}],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_a_signed_block_that_takes_more_than_it_was_given_spoils_the_token(change):
    token = issued(rights=("read",))
    spoiled(signed(token, ALICE, said(token, **change)), "allows more")


BOMB = "".join(f"n({i}); " for i in range(30)) + "m($a, $b, $c) <- n($a), n($b), n($c); "


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + 'right("write");\n',
        lambda text: text + "check if true;\n",
        lambda text: text + BOMB,
        lambda text: text.replace("check if operation", "reject if operation"),
        lambda text: text.replace('operation("list") or ', ""),  # what is implied is not left out
        lambda text: text.replace("$time < ", "$time <= "),
        lambda text: text.replace("$time", "$t"),
        lambda text: text.replace("issued(", "iat("),
        lambda text: text.replace("holder(hex:", "holder(hex:00"),
        lambda text: text.replace('operation("list")', 'operation("list") or operation("list")'),
        lambda text: "holder(hex:" + EVE.public.hex() + ");\n" + text,
        lambda text: 'capability("team", hex:' + "78" * 16 + ");\n" + text,
        lambda text: text.replace(BOB.public.hex(), "01" + "00" * 31),  # a point of small order
        lambda text: "",
    ],
)
def test_a_block_that_says_anything_else(change):
    token = issued()
    source = change(said(token))
    assert source != said(token)
    spoiled(signed(token, ALICE, source))
    # Neither does an issuer's first block.
    first = change(_statements(token.blocks[0]).replace(ALICE.public.hex(), BOB.public.hex()))
    spoiled(bytes(BiscuitBuilder(first).build(private(ISSUER)).to_bytes()))


def test_blocks_taken_away_swapped_or_brought_elsewhere():
    one, other = issued(), issued(share=None)
    two = one.narrow(ALICE, holder=BOB.public, rights=["read"], iat=NOW)
    # What Alice has signed for one token is no block of another, nor of another place in the same.
    block = library(one).third_party_request().create_block(private(ALICE), BlockBuilder(said(one)))
    for place in (other, one.narrow(ALICE, holder=ALICE.public, iat=NOW)):
        with pytest.raises(Exception, match="verifying"):
            library(place).append_third_party(public(ALICE), block)
    # The former token is its former holder's, and of no use to who has the later one.
    refused("capability_denied", check, one, BOB, says="another holder")
    # The last signature of a Biscuit proves its end: cut anywhere, or with a byte changed, it is nothing.
    data, seeded = two.blobs[0], random.Random(7)
    for size in seeded.sample(range(len(data)), 60):
        spoiled(data[:size])
    for at in seeded.sample(range(len(data)), 200):
        spoiled(data[:at] + bytes([data[at] ^ (1 << seeded.randrange(8))]) + data[at + 1 :])
    for tail in (b"\0", b"\x0a\0", b"\x28\x01", data):
        spoiled(data + tail)
    spoiled(data, issuer=EVE)
    for key in (b"\x01" + bytes(31), b"\xff" * 32):
        refused("invalid_record", Token.from_bytes, BISCUIT_MAGIC + key + data)


def test_a_token_that_is_too_large_is_not_even_parsed(monkeypatch):
    from meshkitfs.core import biscuit

    def never(*_):
        raise AssertionError("parsed")

    monkeypatch.setattr(biscuit, "_read", never)
    for data in (b"", bytes(TOKEN_MAX + 1)):
        refused("invalid_record", BiscuitToken.verify, [data], ISSUER.public, says="too large")


def test_a_failure_of_the_library_is_a_refusal():
    from meshkitfs.core.biscuit import _refusing

    panic = type("PanicException", (BaseException,), {})
    for error in (panic("x"), ValueError("x"), OverflowError()):
        with pytest.raises(MeshkitError) as caught, _refusing():
            raise error
        assert caught.value.code == "invalid_record"
    with pytest.raises(KeyboardInterrupt), _refusing():
        raise KeyboardInterrupt


def test_rights_are_spelled_with_what_they_imply():
    for right in ("list", "read", "write", "reshare"):
        assert set(issued(rights=(right,)).last.rights) == implied_rights([right])


def test_nothing_needs_the_library_until_a_biscuit_comes():
    """In another process, where it cannot be imported."""
    code = (
        "import sys; sys.modules['biscuit_auth'] = None\n"
        "from meshkitfs.core.capability import Token, issuing\n"
        "from meshkitfs.errors import MeshkitError\n"
        "assert issuing(False) is Token\n"
        "for call in (lambda: issuing(True), lambda: Token.from_text(sys.argv[1])):\n"
        "    try: call()\n"
        "    except MeshkitError as error: print(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, issued().to_text()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["biscuit_not_installed"] * 2, done.stderr
