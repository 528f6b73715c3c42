"""The provider of pinning services, against a service that is not ours and a real node as the storage.

That it is a byte store like any other is tested in t1_store_contract.py.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from servers.pinning import TOKEN
from servers.proxy import Answer, Proxy

from meshkitfs.core.blocks import SealedBlock, Where, seal_block
from meshkitfs.core.cid import cid_text
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ProviderSpec, open_provider

OID = bytes(range(16))


def sealed(size: int = 1000) -> SealedBlock:
    return seal_block(Where.block(OID, 0), os.urandom(size))[1]


@contextmanager
def fails(code: str, *words: str):
    with pytest.raises(MeshkitError) as excinfo:
        yield
    assert excinfo.value.code == code
    for word in words:
        assert word in excinfo.value.detail, excinfo.value.detail


@pytest.fixture
def service(pinning_service, monkeypatch):
    monkeypatch.setenv("MK_TEST_TOKEN", TOKEN)
    return pinning_service


@pytest.fixture
def proxy(service):
    with Proxy(service.url).running() as running:
        yield running


def config(node, url, **fields):
    storage = {"type": "ipfs-http", "ipfsApiUrl": node.url, "lookupMs": 300}
    return {
        "type": "pinning-service",
        "endpoint": url,
        "tokenEnv": "MK_TEST_TOKEN",
        "storage": storage,
        **fields,
    }


def with_store(fields, function, create=False):
    async def main():
        store = await open_provider(ProviderSpec.from_config(fields, Path("/")), create=create)
        try:
            return await function(store)
        finally:
            await store.aclose()

    return trio.run(main)


def states(service, block):
    return [request["status"] for request in service.pins(cid_text(block.digest))]


# -- what the service is asked -----------------------------------------------------------------------


def test_a_stored_block_is_offered_once_and_given_up_when_it_is_deleted(ipfs_node, service, proxy):
    blocks = [sealed() for _ in range(23)]  # more than one request may name

    async def use(store):
        for block in blocks:
            await store.put(block)
        await store.put(blocks[0])
        await store.sync()
        assert [states(service, block) for block in blocks] == [["queued"]] * len(blocks)
        assert sum(asked.startswith("POST") for asked in proxy.asked) == len(blocks)
        await store.delete_many([block.digest for block in blocks[1:]])
        await store.delete_many([blocks[1].digest])  # nothing is there any more
        await store.sync()
        return await store.has_many(block.digest for block in blocks)

    assert with_store(config(ipfs_node, proxy.url), use) == {blocks[0].digest}
    assert [states(service, block) for block in blocks] == [["queued"]] + [[]] * (len(blocks) - 1)


def test_files_are_offered_together(ipfs_node, service, tmp_path):
    blocks = [sealed() for _ in range(12)]
    for index, block in enumerate(blocks):
        (tmp_path / str(index)).write_bytes(block.data)

    async def use(store):
        await store.put_files([(block.digest, tmp_path / str(index)) for index, block in enumerate(blocks)])

    with_store(config(ipfs_node, service.url), use)
    assert [states(service, block) for block in blocks] == [["queued"]] * len(blocks)


def test_the_storage_comes_first_and_the_service_never_takes_its_place(ipfs_node, service, proxy):
    """A service that refuses: the block is stored, and nobody is told that it is pinned."""
    block = sealed()

    def rule(method, path, body):
        if method == "POST":
            assert ipfs_node.rpc("pin/ls", arg=cid_text(block.digest)).status_code == 200
            raise Answer(
                402, json.dumps({"error": {"reason": "PAYMENT_REQUIRED", "details": "quota"}}).encode()
            )

    proxy.rule = rule

    async def use(store):
        with fails("provider_http_error", "402", "quota"):
            await store.put(block)
        assert await store.has(block.digest)
        assert (await store.get(block.digest)).digest == block.digest
        proxy.rule = lambda method, path, body: None
        await store.put(block)
        await store.sync()

    with_store(config(ipfs_node, proxy.url), use)
    assert states(service, block) == ["queued"]


def test_a_storage_that_is_away_is_not_replaced(own_ipfs_node, service):
    block = sealed()

    async def use(store):
        await trio.to_thread.run_sync(own_ipfs_node.kill)
        with fails("provider_request_failed"):
            await store.put(block)

    fields = config(own_ipfs_node, service.url)
    fields["storage"]["retries"] = 0
    with_store(fields, use)
    assert states(service, block) == []


def test_a_service_that_is_away_keeps_the_block_from_being_deleted(ipfs_node, service, proxy):
    block = sealed()

    def away(method, path, body):
        raise Answer(503)

    async def use(store):
        await store.put(block)
        proxy.rule = away
        with fails("provider_http_error", "503"):
            await store.delete(block.digest)
        assert await store.has(block.digest)

    with_store(config(ipfs_node, proxy.url, retries=0), use)


# -- waiting -----------------------------------------------------------------------------------------


def test_a_sync_waits_until_the_service_has_pinned_if_it_should(ipfs_node, service):
    blocks = [sealed(), sealed()]
    cids = [cid_text(block.digest) for block in blocks]

    async def use(store):
        for block in blocks:
            await store.put(block)
        with fails("provider_request_failed", "2 of 2 blocks"):
            await store.sync()
        service.turn(cids[0], "pinned")
        service.turn(cids[1], "pinning")
        with fails("provider_request_failed", "1 of 2 blocks", cids[1]):
            await store.sync()
        service.turn(cids[1], "pinned")
        await store.sync()

    with_store(config(ipfs_node, service.url, wait="pinned", pinTimeoutMs=700), use)


@pytest.mark.parametrize("wait", ["accepted", "pinned"])
def test_a_failed_pin_is_a_failure_and_is_asked_for_again_when_it_is_stored_again(ipfs_node, service, wait):
    block = sealed()
    cid = cid_text(block.digest)

    async def use(store):
        await store.put(block)
        service.turn(cid, "failed")
        for _ in range(2):
            with fails("provider_http_error", cid):
                await store.sync()
        await store.put(block)
        assert states(service, block) == ["queued"]
        service.turn(cid, "pinned")
        await store.sync()

    with_store(config(ipfs_node, service.url, wait=wait), use)


# -- a service that does not behave ------------------------------------------------------------------


def test_a_wrong_token(ipfs_node, service, monkeypatch):
    monkeypatch.setenv("MK_TEST_TOKEN", "another")
    block = sealed()

    async def use(store):
        with fails("provider_http_error", "401"):
            await store.put(block)

    with_store(config(ipfs_node, service.url), use)
    with fails("provider_http_error", "401"):
        with_store(config(ipfs_node, service.url), use, create=True)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>welcome</html>",
        b"[]",
        b'{"count":1,"results":[5]}',
        b'{"count":1,"results":[{"requestid":"r","status":"pinned","pin":{"cid":"bafkreinonsense"}}]}',
        b'{"count":1,"results":[{"requestid":5,"status":"pinned","pin":{}}]}',
    ],
)
def test_what_is_no_answer_is_not_taken_for_one(ipfs_node, service, proxy, body):
    def rule(method, path, sent):
        if method == "GET":
            raise Answer(200, body)

    proxy.rule = rule

    async def use(store):
        with fails("provider_request_failed"):
            await store.put(sealed())

    with_store(config(ipfs_node, proxy.url, retries=0), use)


def test_a_request_id_that_leads_elsewhere_is_not_followed(ipfs_node, service, proxy):
    block = sealed()

    def rule(method, path, body):
        if method == "GET":
            pin = {"requestid": "../../admin", "status": "pinned", "pin": {"cid": cid_text(block.digest)}}
            raise Answer(200, json.dumps({"count": 1, "results": [pin]}).encode())

    proxy.rule = rule

    async def use(store):
        await store.put(block)
        with fails("provider_request_failed", "admin"):
            await store.delete(block.digest)

    with_store(config(ipfs_node, proxy.url), use)
    assert not any(asked.startswith("DELETE") for asked in proxy.asked)


@pytest.mark.parametrize(
    "storage",
    [
        {"type": "local-dev", "store": "blocks"},
        {
            "type": "pinning-service",
            "endpoint": "http://127.0.0.1:1",
            "storage": {"type": "ipfs-http", "ipfsApiUrl": "http://127.0.0.1:2"},
        },
    ],
    ids=["local", "pinning"],
)
def test_what_cannot_be_pinned_from_is_no_storage(storage):
    fields = {"type": "pinning-service", "endpoint": "http://127.0.0.1:1", "storage": storage}
    with fails("invalid_config", "provider.storage"):
        ProviderSpec.from_config(fields, Path("/"))
