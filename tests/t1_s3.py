"""What is particular to S3: two real servers that differ, wrong credentials, and answers that are not S3's."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from pathlib import Path

import pytest
import trio
from evil_gateway import ABSENT, BEHAVIOURS, EvilGateway
from servers.moto import moto_s3_fixture  # noqa: F401
from servers.rclone import rclone_s3_fixture, rclone_server  # noqa: F401
from servers.s3 import S3Server

from meshkitfs.core import blocks
from meshkitfs.core.blocks import Where, seal_block
from meshkitfs.core.cid import cid_text, digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ProviderSpec, open_provider, s3, scrub


def sealed(size: int = 3000, index: int = 0):
    return seal_block(Where.block(bytes(16), index), os.urandom(size))[1]


@pytest.fixture(params=["rclone", "moto"])
def server(request) -> S3Server:
    found = request.getfixturevalue(f"{request.param}_s3")
    with found.credentials():
        yield found


@pytest.fixture
def prefix():
    return os.urandom(6).hex()


def use(config, work, *, create=False):
    """Open the store of a provider object and ``await work(store)``."""

    async def main():
        store = await open_provider(ProviderSpec.from_config(config, Path("/")), create=create)
        try:
            return await work(store)
        finally:
            await store.aclose()

    return trio.run(main)


def refused(config, work, code="provider_http_error", **more) -> str:
    with pytest.raises(MeshkitError) as caught:
        use(config, work, **more)
    assert caught.value.code == code, caught.value
    return caught.value.detail


def asks(digest=None):
    return lambda store: store.get(digest or digest_of(os.urandom(8)))


# -- what the two servers are like ------------------------------------------------------------------------------


def test_conditional_writes_are_found_out_and_not_believed(rclone_s3, moto_s3, prefix):
    found = {}
    for server in (rclone_s3, moto_s3):
        with server.credentials():
            config = server.config(prefix=prefix)
            assert use(config, _before) is None
            found[server.endpoint] = use(config, lambda store: store.probe())
            listed = server.client().list_objects_v2(Bucket=server.bucket, Prefix=prefix)
            assert "Contents" not in listed
    # rclone answers 200 to a PUT that must not replace, and replaces.
    assert [one.conditional_put for one in found.values()] == [False, True]
    assert all(one.multi_delete and one.listing for one in found.values())


async def _before(store):
    return store.capabilities.conditional_put


def test_the_layout_is_meshkits(server):
    """At the root of the bucket, the key is the CID: what another client stored so is read, and the reverse."""
    ours, theirs = sealed(), sealed(index=1)
    client = server.client()
    client.put_object(Bucket=server.bucket, Key=cid_text(theirs.digest), Body=bytes(theirs.data))

    async def work(store):
        await store.put(ours)
        return await store.get(theirs.digest)

    assert use(server.config(), work).digest == theirs.digest
    found = client.get_object(Bucket=server.bucket, Key=cid_text(ours.digest))
    assert found["Body"].read() == bytes(ours.data)
    assert found["ContentType"] == "application/octet-stream"
    use(server.config(), lambda store: store.delete_many([ours.digest, theirs.digest]))


def test_a_listing_has_as_many_pages_as_it_takes(server, prefix, monkeypatch):
    monkeypatch.setattr(s3, "_PAGE", 7)
    found = [sealed(50, index) for index in range(23)]
    client = server.client()
    for key in (f"{prefix}/notes.txt", f"{prefix}/{'b' * 59}", f"{prefix}x/{cid_text(found[0].digest)}"):
        client.put_object(Bucket=server.bucket, Key=key, Body=b"x")

    async def work(store):
        for block in found:
            await store.put(block)
        foreign = []
        every = [digest async for digest in store.digests(foreign=foreign.append)]
        rest = [digest async for digest in store.digests(every[9])]
        return every, rest, foreign, await store.count()

    every, rest, foreign, count = use(server.config(prefix=prefix), work)
    assert sorted(every) == sorted(block.digest for block in found)
    assert [cid_text(digest) for digest in every] == sorted(cid_text(digest) for digest in every)
    assert rest == every[10:]
    assert sorted(foreign) == sorted(["notes.txt", "b" * 59])
    assert count == 25


def test_a_whole_bucket_is_scrubbed(server, prefix):
    found = [sealed(500, index) for index in range(5)]

    async def work(store):
        for block in found:
            await store.put(block)
        client = server.client()
        client.put_object(Bucket=server.bucket, Key=f"{prefix}/{cid_text(found[2].digest)}", Body=b"damaged")
        return await scrub(store, None, lambda _: None)

    result = use(server.config(prefix=prefix), work)
    assert result.blocks == 5
    assert result.broken == {cid_text(found[2].digest): "cid_mismatch"}


def test_deleting_many_in_pages(server, prefix, monkeypatch):
    monkeypatch.setattr(s3, "_PAGE", 7)
    found = [sealed(50, index) for index in range(23)]

    async def work(store):
        for block in found:
            await store.put(block)
        await store.delete_many([block.digest for block in found])
        return await store.count(), store.capabilities.multi_delete

    assert use(server.config(prefix=prefix), work) == (0, True)


@pytest.mark.parametrize("how", ["says that it does not", "says that it did"])
def test_deleting_many_where_the_server_does_not(server, prefix, monkeypatch, how):
    """Whatever it says, the blocks are gone afterwards, and it is not asked for it again."""
    asked = []

    async def page(self, keys):
        asked.append(len(keys))
        return how == "says that it did"

    monkeypatch.setattr(s3.S3Store, "_delete_page", page)
    found = [sealed(50, index) for index in range(5)]

    async def work(store):
        for _ in range(2):
            for block in found:
                await store.put(block)
            await store.delete_many([block.digest for block in found])
            assert await store.has_many([block.digest for block in found]) == set()
        return store.capabilities.multi_delete

    assert use(server.config(prefix=prefix), work) is False
    assert asked == [5]


def test_virtual_host_style(moto_s3, monkeypatch, prefix):
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        name = host if isinstance(host, str) else host.decode()
        return real("127.0.0.1" if name.endswith("amazonaws.com") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    port = moto_s3.endpoint.rpartition(":")[2]
    config = {
        "type": "s3", "endpoint": f"http://s3.amazonaws.com:{port}", "bucket": moto_s3.bucket, "prefix": prefix,
        "style": "virtual-host", "allowInsecure": True,
    }  # fmt: skip
    block = sealed()

    async def work(store):
        await store.put(block)
        return await store.get(block.digest), await store.probe()

    with moto_s3.credentials():
        got, found = use(config, work, create=True)
    assert bytes(got.data) == bytes(block.data)
    assert found.conditional_put
    assert found.listing
    keys = [
        item["Key"] for item in moto_s3.client().list_objects_v2(Bucket="blocks", Prefix=prefix)["Contents"]
    ]
    assert keys == [f"{prefix}/{cid_text(block.digest)}"]


def test_a_block_that_was_damaged_here_is_not_sent(server, prefix, tmp_path):
    block = sealed()
    (tmp_path / "spool").write_bytes(bytes(block.data)[:-1] + b"?")

    async def work(store):
        with pytest.raises(MeshkitError) as caught:
            await store.put_file(block.digest, tmp_path / "spool")
        return caught.value.code, await store.count()

    assert use(server.config(prefix=prefix), work) == ("cid_mismatch", 0)


# -- credentials ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"secret_key": "wrong"}, "secret access key is wrong"), ({"access_key": "NOBODY"}, "not known there")],
)
def test_wrong_credentials_are_said_in_words(server, wrong, says):
    with server.credentials(**wrong):
        for work in (asks(), lambda store: store.put(sealed())):
            detail = refused(server.config(), work)
            assert says in detail
            assert "HTTP 403" in detail
        assert "HTTP 403" in refused(server.config(), lambda store: store.has(digest_of(b"x")))
        refused(server.config(), asks(), create=True)


def test_a_bucket_that_is_not_there_is_not_a_block_that_is_not_there(server):
    config = server.config() | {"bucket": "elsewhere"}
    for work in (
        asks(),
        lambda store: store.has(digest_of(b"x")),
        lambda store: store.sizes([digest_of(b"x")]),
        lambda store: store.put(sealed()),
        lambda store: store.count(),
        lambda store: store.delete(digest_of(b"x")),
    ):
        assert "bucket elsewhere" in refused(config, work)
    assert "there is no such bucket; create it first" in refused(config, asks(), create=True)


def test_without_credentials_nothing_is_asked(server, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    detail = refused(server.config(), asks(), code="invalid_config")
    assert "AWS_SECRET_ACCESS_KEY is not set" in detail
    assert "AWS_ACCESS_KEY_ID" not in detail


def test_other_variables_can_be_named(server, monkeypatch):
    monkeypatch.setenv("TEAM_KEY", os.environ["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("TEAM_SECRET", os.environ["AWS_SECRET_ACCESS_KEY"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    names = {"accessKeyIdEnv": "TEAM_KEY", "secretAccessKeyEnv": "TEAM_SECRET"}
    refused(server.config(**names), asks(), code="block_unavailable")


def credentials_file(path, server, secret=None, profile="default"):
    path.write_text(
        f"[{profile}]\naws_access_key_id = {server.access_key}\naws_secret_access_key = {secret or server.secret_key}\n"
    )
    path.chmod(0o600)
    return {"credentialsFile": str(path)}


def test_a_credentials_file(server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    where = credentials_file(tmp_path / "credentials", server)
    refused(server.config(**where), asks(), code="block_unavailable")
    where = credentials_file(tmp_path / "others", server, profile="team")
    refused(server.config(**where, profile="team"), asks(), code="block_unavailable")
    assert "no profile [default]" in refused(server.config(**where), asks(), code="invalid_config")


def test_renewed_credentials_are_used_without_a_restart(server, tmp_path):
    path = tmp_path / "credentials"
    where = credentials_file(path, server, secret="an-old-secret")

    async def work(store):
        with pytest.raises(MeshkitError, match="secret access key is wrong"):
            await store.get(digest_of(b"x"))
        credentials_file(path, server)
        with pytest.raises(MeshkitError) as caught:
            await store.get(digest_of(b"x"))
        return caught.value.code

    assert use(server.config(**where), work) == "block_unavailable"


@pytest.mark.parametrize("how", ["open to others", "missing", "not one", "empty"])
def test_a_credentials_file_that_cannot_be_used(server, tmp_path, how):
    path = tmp_path / "credentials"
    where = credentials_file(path, server)
    if how == "open to others":
        path.chmod(0o640)
    elif how == "missing":
        path.unlink()
    else:
        path.write_text("aws_secret_access_key = topsecret\n" if how == "not one" else "[default]\n")
    detail = refused(server.config(**where), asks(), code="invalid_config")
    assert str(path) in detail
    assert "topsecret" not in detail


def test_no_secret_is_shown(server, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "a-secret-that-is-not-the-right-one"
    with server.credentials(secret_key=secret):
        spec = ProviderSpec.from_config(server.config(), Path("/"))

        async def work(store):
            with pytest.raises(MeshkitError) as caught:
                await store.put(sealed())
            return repr(caught.value) + repr(vars(store)) + repr(store.sources()) + store.name

        text = use(server.config(), work) + repr(spec) + str(spec.to_config(Path("/")))
    assert secret not in text + caplog.text


# -- a server that is away, or is not S3 -----------------------------------------------------------------------


def test_a_server_that_stops_and_comes_back():
    with rclone_server() as (server, process), server.credentials():
        block = sealed()
        config = server.config(timeoutMs=500, retries=0)

        async def work(store):
            await store.put(block)
            process.pause()
            with pytest.raises(MeshkitError) as caught:
                await store.get(block.digest)
            process.resume()
            return caught.value.code, await store.get(block.digest)

        code, got = use(config | {"timeoutMs": 3000}, work)
        assert code == "provider_request_failed"
        assert bytes(got.data) == bytes(block.data)
        process.kill()
        refused(config, asks(block.digest), code="provider_request_failed")
        refused(config, lambda store: store.has(block.digest), code="provider_request_failed")
        refused(config, lambda store: store.put(block), code="provider_request_failed")


@pytest.fixture
def evil():
    with EvilGateway() as gateway:
        yield gateway


@pytest.fixture
def verified(monkeypatch):
    made = []

    def new(cls):
        made.append(cls)
        return object.__new__(cls)

    monkeypatch.setattr(blocks, "_new", new)
    return made


def evil_config(evil, name):
    short = name in ("silence", "slow head", "slow loris")
    return {
        "type": "s3",
        "endpoint": evil.url,
        "bucket": "blocks",
        "retries": 0,
        "timeoutMs": 500 if short else 20_000,
    }


@pytest.mark.parametrize("name", [*BEHAVIOURS, *ABSENT])
def test_nothing_that_is_not_s3_is_believed(evil, verified, monkeypatch, name):
    """Not a block, not that it is there, not that it is not there, not that it was stored or deleted."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    block = sealed()
    evil.serve(block)
    evil.behave(name)

    async def work(store):
        codes = {}
        for what, action in {
            "get": lambda: store.get(block.digest),
            "put": lambda: store.put(block),
            "has": lambda: store.has(block.digest),
            "sizes": lambda: store.sizes([block.digest]),
            "count": store.count,
            "check": store.check,
        }.items():
            try:
                codes[what] = repr(await action())
            except MeshkitError as error:
                codes[what] = error.code
        return codes, store.counters

    codes, counters = use(evil_config(evil, name), work)
    allowed = {"provider_request_failed", "provider_http_error"}
    assert set(codes.values()) - {"cid_mismatch"} <= allowed, codes
    assert codes["get"] in allowed | {"cid_mismatch"}
    assert all(codes[what] in allowed for what in ("put", "has", "sizes", "count", "check")), codes
    assert verified == []
    assert (counters.bytes_in, counters.bytes_out) == (0, 0)


def test_a_document_type_is_not_read(evil, monkeypatch):
    """Entities are declared in one, and can be made to grow without end."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bomb = b'<!DOCTYPE x [<!ENTITY a "NoSuchKey">]><Error><Code>&a;</Code></Error>'
    from evil_gateway import Behaviour, says

    monkeypatch.setitem(BEHAVIOURS, "bomb", Behaviour(says(404, bomb, "application/xml")))
    evil.behave("bomb")
    refused(evil_config(evil, "bomb"), asks())


# -- what may be configured -----------------------------------------------------------------------------------


def spec_of(**more):
    fields = {"type": "s3", "endpoint": "https://s3.example", "bucket": "blocks", **more}
    return ProviderSpec.from_config(fields, Path("/srv/home"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bucket": "a/b"}, "'provider.bucket' is not the name of a bucket"),
        ({"bucket": "Big_Bucket", "style": "virtual-host"}, "cannot be part of a host name"),
        ({"style": "dns"}, "'provider.style' must be 'path' or 'virtual-host'"),
        ({"prefix": "../x"}, "'provider.prefix' must be"),
        ({"prefix": "a//b"}, "'provider.prefix' must be"),
        ({"prefix": "/a"}, "'provider.prefix' must be"),
        ({"region": "eu west"}, "'provider.region' is not the name of a region"),
        ({"endpoint": "http://s3.example"}, "'provider.endpoint' would not be encrypted on its way"),
        ({"endpoint": "s3.example"}, "must be an http:// or https:// address"),
        ({"endpoint": "https://u:topsecret@s3.example"}, "'provider.endpoint' has credentials in it"),
        ({"endpoint": "https://s3.example?x=topsecret"}, "no '?'"),
        ({"secretAccessKey": "topsecret"}, "secrets do not belong in this file; name their place with"),
        ({"accessKeyId": "topsecret"}, "secrets do not belong"),
        ({"sessionToken": "topsecret"}, "secrets do not belong"),
        ({"credentials": {"secret": "topsecret"}}, "secrets do not belong"),
        (
            {"secretAccessKeyEnv": "top/secret+"},
            "'provider.secretAccessKeyEnv' must be the name of an environment",
        ),
        ({"tokenEnv": "X"}, "'provider.tokenEnv' is not a known field"),
        ({"timeoutMs": 0}, "'provider.timeoutMs' must be a whole number from 100 to 600000"),
        ({"timeoutMs": True}, "'provider.timeoutMs' must be a whole number"),
        ({"retries": -1}, "'provider.retries' must be a whole number"),
        ({"clientKey": "key.pem"}, "'provider.clientKey' needs 'clientCertificate'"),
        ({"allowInsecure": "yes"}, "'provider.allowInsecure' must be true or false"),
        ({"buckets": "x"}, "(did you mean 'bucket'?)"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_repeated(fields, says):
    with pytest.raises(MeshkitError) as caught:
        spec_of(**fields)
    assert caught.value.code == "invalid_config"
    assert says in caught.value.detail
    assert "topsecret" not in caught.value.detail


def test_written_back_as_it_was():
    fields = {
        "type": "s3", "endpoint": "https://s3.example/base", "bucket": "blocks", "region": "eu-west-1",
        "prefix": "team/a", "style": "virtual-host", "credentialsFile": "aws", "profile": "team", "timeoutMs": 30000,
        "retries": 5, "caFile": "/etc/ca.pem", "clientCertificate": "me.pem", "clientKey": "me.key",
        "metadataApiUrl": "https://meta.example", "allowInsecure": True, "accessKeyIdEnv": "A",
        "secretAccessKeyEnv": "B", "sessionTokenEnv": "C",
    }  # fmt: skip
    base = Path("/srv/home")
    spec = ProviderSpec.from_config(fields, base)
    assert spec.to_config(base) == fields
    assert {name for field in dataclasses.fields(spec.options) if (name := field.name)} == {
        "".join(f"_{c.lower()}" if c.isupper() else c for c in name) for name in fields if name != "type"
    }
    short = {"type": "s3", "endpoint": "https://s3.example", "bucket": "blocks"}
    assert ProviderSpec.from_config(short, base).to_config(base) == short
