"""Signature Version 4: the examples that AWS publishes, and botocore as an oracle for everything else."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkitfs.providers._sigv4 import Credentials, SigV4Auth, authorization, canonical_request, encode_path

# "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk", Amazon S3 API
# reference: the account, the time and the four requests.
EXAMPLE = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
MOMENT = datetime(2013, 5, 24, tzinfo=UTC)
HOST = "examplebucket.s3.amazonaws.com"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def signed(request: httpx.Request, credentials=EXAMPLE, region="us-east-1", now=MOMENT) -> httpx.Request:
    auth = SigV4Auth(lambda: credentials, region, lambda: now)
    return next(auth.auth_flow(request))


@pytest.mark.parametrize(
    ("request_", "names", "signature"),
    [
        (
            httpx.Request("GET", f"https://{HOST}/test.txt", headers={"Range": "bytes=0-9"}),
            "host;range;x-amz-content-sha256;x-amz-date",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            httpx.Request(
                "PUT",
                f"https://{HOST}/test$file.text",
                headers={
                    "Date": "Fri, 24 May 2013 00:00:00 GMT",
                    "x-amz-storage-class": "REDUCED_REDUNDANCY",
                },
                content=b"Welcome to Amazon S3.",
            ),
            "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class",
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            httpx.Request("GET", f"https://{HOST}/?lifecycle"),
            "host;x-amz-content-sha256;x-amz-date",
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            httpx.Request("GET", f"https://{HOST}/?max-keys=2&prefix=J"),
            "host;x-amz-content-sha256;x-amz-date",
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_the_published_examples(request_, names, signature):
    expected = (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    assert signed(request_).headers["authorization"] == expected


def test_the_published_canonical_request():
    headers = {
        "host": HOST, "range": "bytes=0-9", "x-amz-content-sha256": EMPTY, "x-amz-date": "20130524T000000Z",
    }  # fmt: skip
    text = canonical_request("GET", "/test.txt", [], headers, EMPTY)
    assert text == (
        f"GET\n/test.txt\n\nhost:{HOST}\nrange:bytes=0-9\nx-amz-content-sha256:{EMPTY}\n"
        f"x-amz-date:20130524T000000Z\n\nhost;range;x-amz-content-sha256;x-amz-date\n{EMPTY}"
    )


# -- the oracle ------------------------------------------------------------------------------------------

_words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
_keys = st.lists(_words.filter(lambda word: word not in (".", "..")), min_size=1, max_size=3).map("/".join)


@given(
    method=st.sampled_from(["GET", "PUT", "HEAD", "DELETE", "POST"]),
    key=_keys,
    query=st.dictionaries(
        _words, st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8), max_size=3
    ),
    body=st.binary(max_size=40),
    token=st.none() | st.text("abcXYZ/+=", min_size=4, max_size=20),
    region=st.sampled_from(["us-east-1", "eu-west-1", "auto"]),
    meta=st.text("abc xyz", max_size=10),
)
def test_botocore_signs_the_same(method, key, query, body, token, region, meta):
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as Theirs

    url = f"https://store.example:9000/bucket/{encode_path(key)}"
    text = "&".join(
        f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in query.items()
    )
    full = f"{url}?{text}" if text else url
    ours = signed(
        httpx.Request(method, full, content=body, headers={"x-amz-meta-note": meta}),
        Credentials("AKID", "s3cret/+", token),
        region,
        datetime(2026, 11, 25, 22, 30, tzinfo=UTC),
    )
    theirs = AWSRequest(method, full, data=body, headers={"x-amz-meta-note": meta})
    theirs.headers["X-Amz-Content-SHA256"] = ours.headers["x-amz-content-sha256"]
    theirs.context["timestamp"] = ours.headers["x-amz-date"]
    theirs.headers["X-Amz-Date"] = ours.headers["x-amz-date"]
    if token:
        theirs.headers["X-Amz-Security-Token"] = token
    theirs.headers["Host"] = "store.example:9000"
    oracle = S3SigV4Auth(Theirs("AKID", "s3cret/+", token), "s3", region)
    request = oracle.canonical_request(theirs)
    assert (
        oracle.signature(oracle.string_to_sign(theirs, request), theirs)
        == (ours.headers["authorization"].rpartition("Signature=")[2])
    )


# -- what must not show ----------------------------------------------------------------------------------


def test_credentials_do_not_show_themselves():
    secret = Credentials("AKID", "a-very-secret-key", "a-session-token")
    for text in (repr(secret), str(secret), f"{secret!r}", repr(SigV4Auth(lambda: secret, "us-east-1"))):
        assert "secret" not in text
        assert "token" not in text


def test_the_secret_key_is_not_in_the_request():
    request = signed(httpx.Request("PUT", f"https://{HOST}/x", content=b"x"))
    assert EXAMPLE.secret_key not in str(request.headers.raw) + str(request.url)


def test_each_try_is_signed_anew_with_current_credentials():
    moments = iter([MOMENT, MOMENT.replace(hour=1)])
    kept = iter([EXAMPLE, Credentials("OTHER", "other")])
    auth = SigV4Auth(lambda: next(kept), "us-east-1", lambda: next(moments))
    first, second = (next(auth.auth_flow(httpx.Request("GET", f"https://{HOST}/x"))) for _ in range(2))
    assert first.headers["x-amz-date"] != second.headers["x-amz-date"]
    assert "Credential=OTHER/" in second.headers["authorization"]


def test_a_known_hash_is_signed_as_it_is():
    headers = {"x-amz-content-sha256": "0" * 64}
    request = signed(httpx.Request("PUT", f"https://{HOST}/x", content=b"body", headers=headers))
    text = canonical_request(
        "PUT", "/x", [], {"host": HOST, "x-amz-content-sha256": "0" * 64, "x-amz-date": "20130524T000000Z"}, "0" * 64,
    )  # fmt: skip
    assert request.headers["authorization"] == authorization(EXAMPLE, "us-east-1", "20130524T000000Z", text)
