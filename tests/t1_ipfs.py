"""The provider of IPFS nodes against a real one: what the node must have, and what happens when it does not behave.

That it is a byte store like any other is tested in t1_store_contract.py.
"""

import base64
import json
import os
import threading
import time
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
from multiformats import CID
from servers.bitswap import running_peer
from servers.proxy import Answer, Proxy

from meshkitfs.core.blocks import SealedBlock, Where, seal_block
from meshkitfs.core.cid import cid_text, digest_of
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


def with_store(url: str, function, **fields):
    """Run an async function with the store of a node."""

    async def main():
        spec = ProviderSpec.from_config({"type": "ipfs-http", "ipfsApiUrl": url, **fields}, "/")
        store = await open_provider(spec)
        try:
            return await function(store)
        finally:
            await store.aclose()

    return trio.run(main)


@pytest.fixture
def proxy(ipfs_node):
    with Proxy(ipfs_node.url).running() as running:
        yield running


def pinned(node, digest: bytes) -> bool:
    return node.rpc("pin/ls", arg=cid_text(digest)).status_code == 200


# -- what the node has -------------------------------------------------------------------------------


def test_a_block_is_pinned_at_the_node_under_its_cid(ipfs_node):
    block = sealed()

    async def use(store):
        await store.put(block)
        await store.sync()

    with_store(ipfs_node.url, use)
    assert pinned(ipfs_node, block.digest)
    assert ipfs_node.rpc("block/get", arg=cid_text(block.digest)).content == bytes(block.data)


def test_a_deleted_block_is_neither_pinned_nor_there(ipfs_node):
    block = sealed()

    async def use(store):
        await store.put(block)
        await store.delete(block.digest)

    with_store(ipfs_node.url, use)
    assert not pinned(ipfs_node, block.digest)
    assert cid_text(block.digest) not in ipfs_node.rpc("refs/local").text


def test_what_is_kept_outlives_a_garbage_collection_and_what_is_not_pinned_is_not_had(ipfs_node):
    block, loose = sealed(), sealed()
    files = {"data": bytes(loose.data)}
    ipfs_node.rpc(
        "block/put", files, format="raw", mhtype="sha2-256", version="1", pin="false"
    ).raise_for_status()

    async def use(store):
        await store.put(block)
        # The node has both; only one of them is kept.
        assert await store.has_many([block.digest, loose.digest]) == {block.digest}
        await trio.to_thread.run_sync(lambda: ipfs_node.rpc("repo/gc").raise_for_status())
        assert (await store.get(block.digest)).digest == block.digest
        assert await store.sizes([block.digest, loose.digest]) == {block.digest: len(block.data)}

    with_store(ipfs_node.url, use)


def test_kubo_fetches_what_we_stored_over_bitswap(ipfs_node):
    block = sealed(300_000)

    async def use(store):
        await store.put(block)

    with running_peer() as peer:
        with_store(ipfs_node.url, use)
        assert peer.fetch(ipfs_node.swarm, cid_text(block.digest)) == bytes(block.data)


def test_usage_is_what_the_node_says(ipfs_node):
    said = ipfs_node.rpc("repo/stat").json()

    async def use(store):
        before = store.usage()
        assert before.free_bytes == before.total_bytes  # not asked yet: no bound is known
        await store.probe()
        return store.usage()

    usage = with_store(ipfs_node.url, use)
    assert usage.total_bytes == min(int(said["StorageMax"]), 1 << 50)
    assert 0 < usage.free_bytes <= usage.total_bytes


# -- credentials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        ("Bearer s3cr3t-canary", {}),
        ("Basic " + base64.b64encode(b"meshkit:s3cr3t-canary").decode(), {"username": "meshkit"}),
    ],
    ids=["bearer", "basic"],
)
def test_credentials(proxy, monkeypatch, header, fields):
    monkeypatch.setenv("MK_TEST_TOKEN", "s3cr3t-canary")
    proxy.authorization = header
    block = sealed()

    async def use(store):
        await store.put(block)
        assert (await store.get(block.digest)).digest == block.digest

    with_store(proxy.url, use, tokenEnv="MK_TEST_TOKEN", **fields)
    proxy.authorization = header + "x"
    with fails("provider_http_error", "403"):
        with_store(proxy.url, use, tokenEnv="MK_TEST_TOKEN", **fields)
    with fails("provider_http_error", "403"):
        with_store(proxy.url, use)
    assert not any("canary" in asked for asked in proxy.asked)


def test_a_username_needs_its_password(ipfs_node):
    with fails("invalid_config", "tokenEnv"):
        with_store(ipfs_node.url, None, username="meshkit")


# -- a node that does not behave ---------------------------------------------------------------------


def test_a_missing_block_is_looked_for_as_long_as_said(ipfs_node):
    """And then the node itself says that it gives up, long before this side would."""

    async def use(store):
        began = time.monotonic()
        with fails("block_unavailable"):
            await store.get(digest_of(os.urandom(9)))
        return time.monotonic() - began

    quick = with_store(ipfs_node.url, use, lookupMs=300, timeoutMs=60_000)
    patient = with_store(ipfs_node.url, use, lookupMs=1500, timeoutMs=60_000)
    print(f"given up after {quick:.1f} s and {patient:.1f} s")
    assert patient >= 1.5


def test_every_command_tells_the_node_how_long_it_may_take(proxy):
    """Without that, a node looks for ever for what nobody has, and goes on when this side has given up."""
    block = sealed()

    async def use(store):
        await store.probe()
        await store.put(block)
        assert await store.has(block.digest)
        assert (await store.get(block.digest)).digest == block.digest
        with fails("block_unavailable"):
            await store.get(digest_of(os.urandom(9)))
        await store.delete(block.digest)

    with_store(proxy.url, use, lookupMs=300, timeoutMs=20_000)
    told = {}
    for asked in proxy.asked:
        parts = urlsplit(asked.partition(" ")[2])
        command = parts.path.removeprefix("/api/v0/")
        told.setdefault(command, []).extend(parse_qs(parts.query).get("timeout", ["nothing"]))
    assert set(told.pop("block/get")) == {"300ms"}
    assert told.keys() == {"id", "repo/stat", "block/put", "block/stat", "block/rm", "pin/ls", "pin/rm"}
    assert {said for every in told.values() for said in every} == {"16000ms"}


def lost(node):
    """Kubo's answer for a block that it does not have itself, where js-ipfs goes on looking."""

    def rule(method, path, body):
        if "block/stat" in path:
            cid = parse_qs(urlsplit(path).query)["arg"][0]
            if not node.block_there(cid):
                said = f"block was not found locally (offline): ipld: could not find {cid}"
                raise Answer(500, json.dumps({"Message": said, "Code": 0, "Type": "error"}).encode())

    return rule


def test_a_pinned_block_that_the_node_has_lost(own_ipfs_node):
    """As long as nobody says that it is gone it is not: only then it is missing, and can be stored again."""
    if os.environ.get("MESHKIT_TEST_KUBO"):
        pytest.skip("Kubo knows what it does not have")
    block = sealed()

    async def use(store):
        await store.put(block)
        own_ipfs_node.block_file(block.digest).unlink()
        with fails("provider_request_failed"):
            await store.get(block.digest)
        with fails("provider_request_failed"):
            await store.has(block.digest)
        proxy.rule = lost(own_ipfs_node)
        with fails("block_unavailable", "lost"):
            await store.get(block.digest)
        assert not await store.has(block.digest)
        await store.put(block)
        assert await store.has(block.digest)
        assert (await store.get(block.digest)).digest == block.digest

    with Proxy(own_ipfs_node.url).running() as proxy:
        with_store(proxy.url, use, lookupMs=300, timeoutMs=2000)


@pytest.mark.parametrize(
    "key", ["bafkreif2pall7dybz7vecqka3zo24irdwabwdi4wc55jznaq75q7eaavvu", "nonsense", None]
)
def test_a_node_that_names_a_block_otherwise_is_not_believed(proxy, key):
    block = sealed()

    def rule(method, path, body):
        if "block/put" in path:
            return lambda data: data.replace(cid_text(block.digest).encode(), (key or "").encode())
        return None

    proxy.rule = rule

    async def use(store):
        with fails("cid_mismatch"):
            await store.put(block)
        assert store.counters.bytes_out == 0

    with_store(proxy.url, use)


def test_another_base_is_the_same_cid(proxy):
    block = sealed()

    def rule(method, path, body):
        if "block/put" in path:
            other = str(CID.decode(cid_text(block.digest)).set(base="base58btc"))
            return lambda data: data.replace(cid_text(block.digest).encode(), other.encode())
        return None

    proxy.rule = rule

    async def use(store):
        await store.put(block)

    with_store(proxy.url, use)


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"<html>busy</html>", lambda data: b""],
    ids=["truncated", "extended", "page", "empty"],
)
def test_wrong_bytes_are_refused(proxy, spoil):
    block = sealed()
    proxy.rule = lambda method, path, body: spoil if "block/get" in path else None

    async def use(store):
        await store.put(block)
        with fails("cid_mismatch"):
            await store.get(block.digest)
        assert store.counters.bytes_in == 0

    with_store(proxy.url, use)


def test_an_endless_answer_is_cut_off(proxy):
    block = sealed()
    proxy.rule = lambda method, path, body: (lambda data: bytes(5 << 20)) if "block/get" in path else None

    async def use(store):
        await store.put(block)
        with fails("provider_request_failed", "bytes"):
            await store.get(block.digest)

    with_store(proxy.url, use, retries=0)


def test_a_server_that_does_not_take_large_bodies_is_named(proxy):
    def rule(method, path, body):
        if len(body) > 1 << 20:
            raise Answer(413, b"<html>413 Request Entity Too Large</html>", "text/html")

    proxy.rule = rule
    small, large = sealed(), sealed(1 << 20)

    async def use(store):
        await store.put(small)
        with fails("provider_http_error", "413", str(len(large.data)), "limit"):
            await store.put(large)

    with_store(proxy.url, use)


def test_a_full_disk_is_no_space(proxy):
    def rule(method, path, body):
        if "block/put" in path:
            said = b'{"Message":"write /data/ipfs/blocks/X: no space left on device","Code":0,"Type":"error"}'
            raise Answer(500, said)

    proxy.rule = rule

    async def use(store):
        with fails("no_space"):
            await store.put(sealed())

    with_store(proxy.url, use)


@pytest.mark.parametrize("said", [b"<html>it works</html>", b'{"ID":5}', b"[]", b"{}"])
def test_what_is_no_node_is_found_out_when_it_is_set_up(proxy, said):
    def rule(method, path, body):
        raise Answer(200, said)

    proxy.rule = rule

    async def main():
        spec = ProviderSpec.from_config({"type": "ipfs-http", "ipfsApiUrl": proxy.url}, "/")
        with fails("provider_request_failed"):
            await open_provider(spec, create=True)

    trio.run(main)


def test_a_gateway_is_no_rpc(proxy):
    def rule(method, path, body):
        raise Answer(404, b"404 page not found", "text/plain")

    proxy.rule = rule

    async def use(store):
        for call in (store.get, store.has, store.delete):
            with fails("provider_http_error", "404"):
                await call(digest_of(b"x"))

    with_store(proxy.url, use)


def test_a_node_that_stops_answering_costs_no_more_than_the_deadline(own_ipfs_node):
    block = sealed()

    async def use(store):
        await store.put(block)
        own_ipfs_node.server.pause()
        began = time.monotonic()
        try:
            with fails("provider_request_failed", "no answer within"):
                await store.get(block.digest)
            assert time.monotonic() - began < 10
        finally:
            own_ipfs_node.server.resume()
        # It answers again, and the same store goes on.
        while True:
            try:
                assert (await store.get(block.digest)).digest == block.digest
                break
            except MeshkitError as error:
                assert error.code == "provider_request_failed"
                await trio.sleep(0.1)

    with_store(own_ipfs_node.url, use, timeoutMs=800, retries=0)


def test_a_killed_node_loses_nothing_and_is_found_again(own_ipfs_node):
    blocks = [sealed() for _ in range(3)]

    async def use(store):
        await store.put(blocks[0])
        await store.sync()
        await trio.to_thread.run_sync(own_ipfs_node.kill)
        for call in (store.get, store.has, store.delete):
            with fails("provider_request_failed"):
                await call(blocks[0].digest)
        with fails("provider_request_failed"):
            await store.put(blocks[1])
        await trio.to_thread.run_sync(own_ipfs_node.start)
        with trio.fail_after(60):
            while True:  # the circuit breaker opens by itself
                try:
                    await store.put(blocks[2])
                    break
                except MeshkitError as error:
                    assert error.code == "provider_request_failed"
                    await trio.sleep(0.1)
        await store.sync()
        wanted = [block.digest for block in blocks]
        assert await store.has_many(wanted) == {wanted[0], wanted[2]}
        assert (await store.get_many(wanted)).keys() == {wanted[0], wanted[2]}

    with_store(own_ipfs_node.url, use, retries=0, lookupMs=300)


# -- many at once ------------------------------------------------------------------------------------


def test_many_files_go_up_side_by_side_and_memory_stays_bounded(proxy, tmp_path):
    lock, now, most = threading.Lock(), 0, 0
    gate = threading.Barrier(4)

    def rule(method, path, body):
        nonlocal now, most
        if "block/put" not in path:
            return
        with lock:
            now += 1
            most = max(most, now)
        try:
            gate.wait(20)  # nothing goes on before four are here together
        finally:
            with lock:
                now -= 1

    proxy.rule = rule
    files = []
    for i in range(16):
        block = sealed(1 << 20)
        path = tmp_path / str(i)
        path.write_bytes(block.data)
        files.append((block.digest, path))

    async def use(store):
        await store.put_files(files)
        assert await store.has_many(digest for digest, _ in files) == {digest for digest, _ in files}

    with_store(proxy.url, use)
    assert 4 <= most <= 8
