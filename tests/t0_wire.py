"""Signed requests and the JSON of the metadata service: what is accepted, and that nothing else is."""

import base64
import hashlib
import os
import re
import time

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import Publication, ShareState, _wire
from meshkitfs.net import SignatureAuth, signing, verify_request

KEY = SigningKey.from_seed(bytes(range(32)))
URL = "https://service.example:8443/v1/shares/00/state?kid=11&x=%20"


def signed(method="POST", url=URL, body=b'{"a": 1}', key=KEY, now=None, headers=None):
    """A request as it leaves the client."""
    request = httpx.Request(method, url, content=body, headers=headers)
    auth = SignatureAuth(lambda: key, lambda: time.time() if now is None else now)
    flow = auth.sync_auth_flow(request)
    return next(flow)


def verify(request, *, method=None, url=None, body=None, lines=None, known=KEY):
    return verify_request(
        method or request.method,
        url or str(request.url),
        request.headers.raw if lines is None else lines,
        request.content if body is None else body,
        lambda kid: known.public if kid == known.kid else None,
    )


def refused(request, **changes):
    with pytest.raises(MeshkitError) as caught:
        verify(request, **changes)
    assert caught.value.code == "metadata_unauthorized"
    assert caught.value.detail.isprintable()


def with_header(request, name, value):
    return [(k, v) for k, v in request.headers.raw if k.lower() != name.lower().encode()] + [
        (name.encode(), value.encode())
    ]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_a_signed_request_is_accepted(method):
    request = signed(method, body=b"" if method == "GET" else b"body")
    who = verify(request)
    assert who.kid == KEY.kid
    assert len(who.nonce) == 16


def test_the_signature_is_over_what_rfc_9421_says():
    """The signature base put together by hand, as section 2.5 describes it, and checked with the bare key."""
    request = signed(now=1_790_000_000)
    given, signature = request.headers["signature-input"], request.headers["signature"]
    parameters = given.removeprefix("mk=")
    assert re.fullmatch(
        r'\("@method" "@authority" "@path" "@query" "content-digest"\);created=1790000000;keyid="[0-9a-f]{32}"'
        r';alg="ed25519";nonce="[\w-]{22}";tag="meshkitfs-1"',
        parameters,
    ), parameters
    digest = base64.b64encode(hashlib.sha256(b'{"a": 1}').digest()).decode()
    base = "\n".join(
        [
            '"@method": POST',
            '"@authority": service.example:8443',
            '"@path": /v1/shares/00/state',
            '"@query": ?kid=11&x=%20',
            f'"content-digest": sha-256=:{digest}:',
            f'"@signature-params": {parameters}',
        ]
    )
    raw = base64.b64decode(re.fullmatch("mk=:(.*):", signature)[1])
    Ed25519PublicKey.from_public_bytes(KEY.public).verify(raw, base.encode())


def test_every_request_has_a_nonce_of_its_own():
    assert len({verify(signed()).nonce for _ in range(50)}) == 50


def test_whatever_is_covered_cannot_be_changed():
    request = signed()
    refused(request, method="PUT")
    refused(request, url=URL.replace("service.example", "other.example"))
    refused(request, url=URL.replace(":8443", ""))
    refused(request, url=URL.replace("shares/00", "shares/01"))
    refused(request, url=URL.replace("kid=11", "kid=12"))
    refused(request, url=URL + "&y=1")
    refused(request, body=b'{"a": 2}')
    refused(request, body=b"")
    digest = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    refused(request, body=b"x", lines=with_header(request, "content-digest", f"sha-256=:{digest}:"))


def test_a_body_must_be_covered():
    request = signed("GET", body=b"")
    digest = base64.b64encode(hashlib.sha256(b"smuggled").digest()).decode()
    refused(request, body=b"smuggled")
    refused(request, body=b"smuggled", lines=with_header(request, "content-digest", f"sha-256=:{digest}:"))


@pytest.mark.parametrize("seconds", [-signing.SKEW_S - 5, signing.SKEW_S + 5, -86400])
def test_too_old_or_from_the_future(seconds):
    refused(signed(now=time.time() + seconds))


@pytest.mark.parametrize("seconds", [-signing.SKEW_S + 5, signing.SKEW_S - 5])
def test_clocks_may_differ_a_little(seconds):
    verify(signed(now=time.time() + seconds))


def test_another_key():
    refused(signed(key=SigningKey.generate()))
    refused(signed(), known=SigningKey.generate())
    # The right name on another key's signature.
    fake = signed(key=SigningKey.generate())
    lines = with_header(fake, "signature-input", signed().headers["signature-input"])
    refused(fake, lines=lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("meshkitfs-1", "meshkitfs-2"),
        lambda text: text.replace("mk=", "other="),
        lambda text: text.replace('alg="ed25519"', 'alg="hmac-sha256"'),
        lambda text: text.replace(' "@path"', ""),
        lambda text: text.replace(' "content-digest"', ""),
        lambda text: re.sub(';nonce="[^"]*"', "", text),
        lambda text: re.sub('nonce="[^"]*"', 'nonce="short"', text),
        lambda text: re.sub(";created=[0-9]*", "", text),
        lambda text: re.sub('keyid="..', 'keyid="', text),
        lambda text: text + ";expires=9999999999",
        lambda text: "",
        lambda text: "junk",
        lambda text: "mk=()",
        lambda text: f"{text}, {text}",
        lambda text: text + '\x00\u00e9"',
    ],
)
def test_the_form_is_fixed(change):
    """Also where whoever holds the key signs it: the verifier insists on the one form."""
    request = signed()
    text = change(request.headers["signature-input"])
    lines = with_header(request, "signature-input", text)
    refused(request, lines=lines)
    refused(request, lines=with_header(request, "signature", "mk=::"))
    refused(request, lines=[(k, v) for k, v in request.headers.raw if k.lower() != b"signature"])


def resigned(change):
    """A request whose parameters were changed before signing, by somebody who has the key."""
    request = signed()
    parameters = change(request.headers["signature-input"].removeprefix("mk="))
    digest = request.headers["content-digest"]
    lines = {
        '"@method"': "POST",
        '"@authority"': "service.example:8443",
        '"@path"': "/v1/shares/00/state",
        '"@query"': "?kid=11&x=%20",
        '"content-digest"': digest,
    }
    covered = re.findall('"[@a-z-]+"', parameters.partition(")")[0])
    base = "\n".join([*(f"{name}: {lines[name]}" for name in covered), f'"@signature-params": {parameters}'])
    signature = base64.b64encode(KEY.sign(base.encode())).decode()
    request.headers["signature-input"] = f"mk={parameters}"
    request.headers["signature"] = f"mk=:{signature}:"
    return request


def test_the_form_is_fixed_also_for_the_key_s_own_holder():
    verify(resigned(lambda text: text))  # the helper does sign validly
    refused(resigned(lambda text: text.replace(' "@path"', "")))
    refused(resigned(lambda text: text.replace(' "@query"', "")))
    refused(resigned(lambda text: text.replace('"@method" ', "")))
    refused(resigned(lambda text: text.replace('"@authority" ', "")))
    refused(resigned(lambda text: text.replace(' "content-digest"', "")))
    refused(resigned(lambda text: re.sub(';nonce="[^"]*"', "", text)))
    refused(resigned(lambda text: re.sub('nonce="[^"]*"', 'nonce="c2hvcnQ"', text)))
    refused(resigned(lambda text: re.sub(";created=[0-9]*", "", text)))
    refused(resigned(lambda text: re.sub(';alg="ed25519"', "", text)))
    refused(resigned(lambda text: text + ";expires=9999999999"))
    refused(resigned(lambda text: text.replace("meshkitfs-1", "something else")))


def test_weak_keys_are_refused():
    """A point of small order verifies anything: it must not get as far as that."""
    request = signed()
    with pytest.raises(MeshkitError):
        verify_request(
            request.method, str(request.url), request.headers.raw, request.content, lambda _: bytes(32)
        )


def test_a_locked_key_signs_nothing():
    def locked():
        raise MeshkitError("identity_locked")

    flow = SignatureAuth(locked, time.time).sync_auth_flow(httpx.Request("GET", URL))
    with pytest.raises(MeshkitError, match="identity_locked"):
        next(flow)


# -- the JSON ------------------------------------------------------------------------------------------------------

blobs = st.binary(max_size=60)
numbers = st.integers(0, 2**63 - 1)
ids = st.binary(min_size=16, max_size=16)
publications = st.builds(
    Publication,
    share=ids,
    expect_head=st.none() | blobs,
    head=st.none() | blobs,
    head_ver=numbers,
    head_epoch=numbers,
    expect_roster=st.none() | numbers,
    roster=st.none() | blobs,
    roster_seq=numbers,
    roster_epoch=numbers,
    capsules=st.lists(st.tuples(ids, ids, blobs), max_size=3).map(tuple),
)


@given(publications)
def test_publications_come_back(publication):
    assert _wire.read_publication(publication.share, _wire.write_publication(publication)) == publication


@given(st.builds(ShareState, st.lists(blobs, max_size=3).map(tuple), *[st.none() | blobs] * 3))
def test_share_states_come_back(state):
    assert _wire.read_share_state(_wire.write_share_state(state)) == state


GOOD = _wire.write_publication(Publication(bytes(16), head=b"h", capsules=((bytes(16), bytes(16), b"c"),)))


@pytest.mark.parametrize(
    "value",
    [
        None, [], "x", {}, {**GOOD, "more": 1}, {k: v for k, v in GOOD.items() if k != "head"},
        *({**GOOD, name: bad} for name in ("head_ver", "roster_seq") for bad in (-1, 2**63, True, 1.0, "1", None)),
        *({**GOOD, "head": bad} for bad in ("a", "aa==", "ab", "a+", "\u00e9\u00e9", 1, ["aa"], "aaaa\n")),
        {**GOOD, "expect_roster": -1}, {**GOOD, "capsules": None}, {**GOOD, "capsules": [{}]},
        {**GOOD, "capsules": [{"kid": "AA", "id": "A" * 22, "blob": "AA"}]},
    ],
)  # fmt: skip
def test_anything_else_is_refused(value):
    with pytest.raises(MeshkitError, match="invalid_argument"):
        _wire.read_publication(bytes(16), value)


def test_ids_in_paths():
    raw = os.urandom(16)
    assert _wire.from_hex(raw.hex(), "share") == raw
    for bad in ("", raw.hex()[:-1], raw.hex().upper() + "", "0x" + "0" * 30, "\u0661" * 32, raw.hex() + "00"):
        if bad != raw.hex():
            with pytest.raises(MeshkitError, match="invalid_argument"):
                _wire.from_hex(bad, "share")
