"""Reading through gateways: Helia's, and one that does every wrong thing there is (evil_gateway.py)."""

from __future__ import annotations

import os
import socket

import pytest
import trio
from evil_gateway import ABSENT, BEHAVIOURS, EvilGateway
from servers.helia import helia_fixture  # noqa: F401

from meshkitfs.core import blocks
from meshkitfs.core.blocks import MAX_SEALED, Where, seal_block
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import LocalStore, ProviderSpec, open_provider
from meshkitfs.providers import gateway as module


def sealed(size: int = 3000, index: int = 0):
    return seal_block(Where.block(bytes(16), index), os.urandom(size))[1]


@pytest.fixture
def gateway():
    with EvilGateway() as server:
        yield server


@pytest.fixture
def other():
    with EvilGateway() as server:
        yield server


@pytest.fixture
def verified(monkeypatch):
    """Every VerifiedBlock that comes to be."""
    made = []

    def new(cls):
        made.append(cls)
        return object.__new__(cls)

    monkeypatch.setattr(blocks, "_new", new)
    return made


def read(tmp_path, urls, work, **more):
    """Open the gateways in front of an empty local store, and ``await work(store)``."""
    config = {
        "type": "gateway-retrieval",
        "gateways": urls,
        "storage": {"type": "local-dev"},
        "timeoutMs": 20_000,
    }
    spec = ProviderSpec.from_config(config | more, tmp_path)

    async def main():
        store = await open_provider(spec, create=True)
        try:
            return await work(store)
        finally:
            await store.aclose()

    return trio.run(main)


def patience(name):
    """Little where it will be in vain."""
    return {"timeoutMs": 500} if name in ("silence", "slow head", "slow loris") else {}


def code_of(caught) -> str:
    return caught.value.code


def test_it_asks_as_the_specification_says(gateway, tmp_path):
    block = sealed()
    gateway.serve(block)
    got = read(tmp_path, [gateway.url], lambda store: store.get(block.digest))
    assert bytes(got.data) == bytes(block.data)
    [asked] = gateway.requests
    assert asked.headers["accept"] == "application/vnd.ipld.raw"
    assert asked.query == "format=raw"
    assert "authorization" not in asked.headers


def test_subdomain_style(gateway, tmp_path, monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        name = host if isinstance(host, str) else host.decode()
        return real("127.0.0.1" if name.endswith(".localhost") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    block = sealed()
    gateway.serve(block)
    url = gateway.url.replace("127.0.0.1", "localhost")
    read(tmp_path, [url], lambda store: store.get(block.digest), gatewayMode="subdomain")
    assert ".ipfs.localhost:" in gateway.requests[0].headers["host"]


def test_the_token_is_shown_to_the_gateway(gateway, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWAY_TOKEN", "let-me-in")
    block = sealed()
    gateway.serve(block)
    read(tmp_path, [gateway.url], lambda store: store.get(block.digest), tokenEnv="GATEWAY_TOKEN")
    assert gateway.requests[0].headers["authorization"] == "Bearer let-me-in"


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_no_misbehaviour_becomes_a_block(gateway, tmp_path, verified, name):
    block = sealed()
    gateway.serve(block)
    gateway.behave(name)

    async def work(store):
        with pytest.raises(MeshkitError) as caught:
            await store.get(block.digest)
        return caught.value, store.sources()[0]

    error, source = read(tmp_path, [gateway.url], work, **patience(name))
    assert error.code == ("cid_mismatch" if BEHAVIOURS[name].lies else "provider_request_failed"), error
    assert verified == []
    assert bool(source.barred) == BEHAVIOURS[name].lies
    assert source.served == 0
    assert source.failed + source.wrong == 1


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_next_gateway_is_asked(gateway, other, tmp_path, name):
    block = sealed()
    gateway.serve(block)
    other.serve(block)
    gateway.behave(name)
    got = read(tmp_path, [gateway.url, other.url], lambda store: store.get(block.digest), **patience(name))
    assert bytes(got.data) == bytes(block.data)
    assert (gateway.asked([block.digest]) > 0, other.asked()) == (True, 1)


@pytest.mark.parametrize("name", [name for name, how in BEHAVIOURS.items() if how.lies])
def test_one_that_lied_is_not_asked_again(gateway, other, tmp_path, name, caplog):
    good = [sealed(index=index) for index in range(3)]
    gateway.serve(*good)
    other.serve(*good)
    gateway.behave(name, good[0].digest)

    async def work(store):
        for block in good:
            await store.get(block.digest)
        return store.sources()

    first, second, storage = read(tmp_path, [gateway.url, other.url], work)
    assert gateway.asked() == 1
    assert (first.served, first.wrong, second.served, storage.served) == (0, 1, 3, 0)
    assert "other bytes" in first.barred
    assert "is not asked any more" in caplog.text


def test_one_that_was_away_is_asked_again(gateway, other, tmp_path):
    good = [sealed(index=index) for index in range(3)]
    gateway.serve(*good)
    other.serve(*good)
    gateway.behave("html page", times=1)

    async def work(store):
        for block in good:
            await store.get(block.digest)
        return store.sources()

    first, second, _ = read(tmp_path, [gateway.url, other.url], work)
    assert (first.served, first.wrong, first.barred, second.served) == (2, 1, "", 1)


@pytest.mark.parametrize("name", ABSENT)
def test_a_block_that_nobody_has_is_absent(gateway, other, tmp_path, name):
    gateway.behave(name)
    with pytest.raises(MeshkitError) as caught:
        read(tmp_path, [gateway.url, other.url], lambda store: store.get(sealed().digest))
    assert code_of(caught) == "block_unavailable"
    assert (gateway.asked(), other.asked()) == (1, 1)


def test_a_block_is_not_absent_while_one_of_them_does_not_say(gateway, other, tmp_path):
    gateway.behave("server error")
    with pytest.raises(MeshkitError) as caught:
        read(tmp_path, [gateway.url, other.url], lambda store: store.get(sealed().digest))
    assert code_of(caught) == "provider_request_failed"
    assert "not at the storage" in caught.value.detail
    assert "HTTP 500" in caught.value.detail


def test_nor_while_the_one_that_lied_might_have_it(gateway, tmp_path):
    block = sealed()
    gateway.behave("wrong block")

    async def work(store):
        codes = []
        for _ in range(2):
            with pytest.raises(MeshkitError) as caught:
                await store.get(block.digest)
            codes.append(code_of(caught))
        return codes

    assert read(tmp_path, [gateway.url], work) == ["cid_mismatch", "provider_request_failed"]


def test_the_storage_has_what_no_gateway_has(gateway, tmp_path):
    block = sealed()

    async def work(store):
        await store.put(block)
        await store.sync()
        assert await store.has(block.digest)
        got = await store.get(block.digest)
        return bytes(got.data), store.sources()

    data, (first, storage) = read(tmp_path, [gateway.url], work)
    assert data == bytes(block.data)
    assert (first.served, storage.served) == (0, 1)


# -- in which order ------------------------------------------------------------------------------------------


def test_in_their_order_unless_they_race(gateway, other, tmp_path):
    block = sealed()
    gateway.serve(block)
    other.serve(block)
    read(tmp_path, [gateway.url, other.url], lambda store: store.get(block.digest))
    assert (gateway.asked(), other.asked()) == (1, 0)


def test_a_slow_one_is_overtaken_when_they_race(gateway, other, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_STAGGER_S", 0.05)
    block = sealed()
    gateway.serve(block)
    gateway.behave("silence")
    other.serve(block)
    started = trio.current_time

    async def work(store):
        before = started()
        got = await store.get(block.digest)
        return got, started() - before, store.sources()

    got, took, (first, second, _) = read(
        tmp_path, [gateway.url, other.url], work, race=True, timeoutMs=30_000
    )
    assert bytes(got.data) == bytes(block.data)
    assert took < 20
    assert (first.served, second.served, second.failed) == (0, 1, 0)


def test_when_they_race_a_wrong_answer_does_not_win(gateway, other, tmp_path):
    good = [sealed(index=index) for index in range(10)]
    gateway.behave("wrong block")
    other.serve(*good)

    async def work(store):
        return [await store.get(block.digest) for block in good], store.sources()

    found, (first, second, _) = read(tmp_path, [gateway.url, other.url], work, race=True)
    assert [block.digest for block in found] == [block.digest for block in good]
    assert first.barred
    assert second.served == 10


def test_reading_ahead_takes_what_there_is(gateway, tmp_path):
    good = [sealed(index=index) for index in range(20)]
    gateway.serve(*good)
    gateway.behave("server error", good[3].digest)
    found = read(tmp_path, [gateway.url], lambda store: store.get_many([block.digest for block in good]))
    assert found.keys() == {block.digest for block in good} - {good[3].digest}


def test_a_body_without_end_is_given_up_at_the_cap(gateway, tmp_path):
    block = sealed()
    gateway.serve(block)
    gateway.behave("endless body")

    async def work(store):
        before = trio.current_time()
        with pytest.raises(MeshkitError) as caught:
            await store.get(block.digest)
        return trio.current_time() - before, caught.value

    took, error = read(tmp_path, [gateway.url], work, timeoutMs=60_000)
    assert took < 30
    assert str(MAX_SEALED) in error.detail


# -- Helia -----------------------------------------------------------------------------------------------


def test_helia_serves_our_blocks(helia, tmp_path):
    url, directory = helia
    behind = LocalStore.open(directory)
    good = [sealed(size, index) for index, size in enumerate((1, 70_000, 1_048_576))]
    for block in good:
        trio.run(behind.put, block)

    async def work(store):
        return [bytes((await store.get(block.digest)).data) for block in good], store.sources()

    found, (first, storage) = read(tmp_path, [url], work)
    assert found == [bytes(block.data) for block in good]
    assert (first.served, storage.served) == (3, 0)


def test_helia_says_what_it_does_not_have(helia, tmp_path):
    with pytest.raises(MeshkitError) as caught:
        read(tmp_path, [helia[0]], lambda store: store.get(sealed().digest))
    assert code_of(caught) == "block_unavailable"


def test_helia_in_subdomain_style(helia, tmp_path, monkeypatch):
    url, directory = helia
    behind = LocalStore.open(directory)
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        name = host if isinstance(host, str) else host.decode()
        return real("127.0.0.1" if name.endswith(".localhost") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    block = sealed()
    trio.run(behind.put, block)
    got = read(
        tmp_path, [url.replace("127.0.0.1", "localhost")], lambda store: store.get(block.digest),
        gatewayMode="subdomain",
    )  # fmt: skip
    assert bytes(got.data) == bytes(block.data)


def test_the_name_has_no_secret_and_says_where_it_writes(gateway, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWAY_TOKEN", "let-me-in")

    async def work(store):
        return store.name + repr(store.sources())

    text = read(tmp_path, [gateway.url], work, tokenEnv="GATEWAY_TOKEN")
    assert "let-me-in" not in text
    assert gateway.url in text
    assert "local-dev:" in text
