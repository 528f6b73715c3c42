"""The provider of IPFS Clusters against a contract server over two real nodes, which an independent client checks.

That it is a byte store like any other is tested in t1_store_contract.py.
"""

import base64
import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from servers import nodejs
from servers.cluster import Cluster
from servers.proxy import Answer, Proxy

from meshkitfs.core.blocks import SealedBlock, Where, seal_block
from meshkitfs.core.cid import cid_text, digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import ProviderSpec, open_provider
from meshkitfs.providers.ipfs_cluster import _archive

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


def config(cluster, url: str = "", **fields):
    node = next(iter(cluster.nodes.values()))
    return {
        "type": "ipfs-cluster",
        "clusterApiUrl": url or cluster.url,
        "node": {"type": "ipfs-http", "ipfsApiUrl": node.url, "lookupMs": 300},
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


def pinned(node, digest: bytes) -> bool:
    return node.rpc("pin/ls", arg=cid_text(digest)).status_code == 200


def client(cluster, *calls):
    """What the independent client makes of the server."""
    command = [*nodejs.script("npm_clients", "cluster_client.mjs"), cluster.url, cluster.authorization or ""]
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- the contract server is what an independent client takes for a cluster ------------------------------


def test_the_contract_server_against_an_independent_client(cluster):
    block = sealed(5000)
    cid = cid_text(block.digest)
    car = {"base64": base64.b64encode(_archive(block.digest, bytes(block.data))).decode()}
    options = {
        "replicationFactorMin": 1,
        "replicationFactorMax": 2,
        "metadata": {"color": "red"},
        "streamChannels": False,
    }
    [version, info, peers, added] = client(
        cluster, ["version"], ["info"], ["peerList"], ["addCAR", car, options]
    )
    assert version["ok"] == "1.1.6"
    assert info["ok"]["clusterPeers"] == [peer["id"] for peer in peers["ok"]] == list(cluster.nodes)
    assert added["ok"]["cid"] == cid
    cluster.settled()
    other = cid_text(digest_of(b"nothing"))
    [status, every, allocation, nothing, lost, unpinned, again] = client(
        cluster,
        ["status", cid],
        ["statusAll", {"cids": [cid]}],
        ["allocation", cid],
        ["status", other],
        ["allocation", other],
        ["unpin", cid],
        ["unpin", cid],
    )
    assert {peer["status"] for peer in status["ok"]["peerMap"].values()} == {"pinned"}
    assert every["ok"] == [status["ok"]]
    assert allocation["ok"]["metadata"] == {"color": "red"}
    assert allocation["ok"]["replicationFactorMin"] == 1
    assert {peer["status"] for peer in nothing["ok"]["peerMap"].values()} == {"unpinned"}
    assert lost["status"] == again["status"] == 404
    assert unpinned["ok"]["cid"] == cid


def test_the_independent_client_sees_what_we_stored(cluster):
    block = sealed()

    async def use(store):
        await store.put(block)
        await store.sync()

    with_store(config(cluster, replicationMin=2, replicationMax=2), use)
    [status] = client(cluster, ["status", cid_text(block.digest)])
    assert [peer["status"] for peer in status["ok"]["peerMap"].values()] == ["pinned", "pinned"]
    assert all(pinned(node, block.digest) for node in cluster.nodes.values())
    for node in cluster.nodes.values():
        assert node.rpc("block/get", arg=cid_text(block.digest)).content == bytes(block.data)


# -- replication -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, -1])
def test_a_sync_waits_for_as_many_pins_as_asked_for(cluster, replicas):
    blocks = [sealed() for _ in range(3)]
    cluster.allow.clear()

    async def use(store):
        for block in blocks:
            await store.put(block)
        # They are at the nodes, and not safe yet.
        assert await store.has_many(block.digest for block in blocks) == {block.digest for block in blocks}
        done = []

        async def sync():
            await store.sync()
            done.append(sum(pinned(node, b.digest) for node in cluster.nodes.values() for b in blocks))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            asked = len(cluster.asked)
            while len(cluster.asked) < asked + 3:
                await trio.sleep(0.02)
            assert not done
            cluster.allow.set()
        return done[0]

    most = {} if replicas == -1 else {"replicationMax": 2}
    copies = with_store(config(cluster, replicationMin=replicas, **most), use)
    assert copies >= (6 if replicas in (2, -1) else 3)


def test_too_few_pins_in_time_are_a_failure_that_stays_one_until_they_are_there(cluster):
    block = sealed()
    broken = list(cluster.nodes)[1]
    cluster.broken.add(broken)

    async def use(store):
        await store.put(block)
        for _ in range(2):
            with fails("provider_request_failed", "1 of 1 blocks", cid_text(block.digest)):
                await store.sync()
        # It is told to try again, and this time it can.
        cluster.broken.clear()
        with trio.fail_after(60):
            while True:
                try:
                    await store.sync()
                    break
                except MeshkitError as error:
                    assert error.code == "provider_request_failed"

    with_store(config(cluster, replicationMin=2, pinTimeoutMs=600), use)
    assert any(asked.startswith("POST") and "/recover" in asked for asked in cluster.asked)


def test_a_deleted_block_is_not_waited_for(cluster):
    block = sealed()
    cluster.broken |= set(cluster.nodes)

    async def use(store):
        await store.put(block)
        await store.delete(block.digest)
        await store.sync()

    with_store(config(cluster, pinTimeoutMs=600), use)


def test_a_cluster_that_is_too_small_is_found_out_when_it_is_set_up(cluster):
    async def use(store):
        raise AssertionError

    with fails("provider_http_error", "2 peers"):
        with_store(config(cluster, replicationMin=3), use, create=True)


def test_deleting_unpins_everywhere(cluster):
    block = sealed()

    async def use(store):
        await store.put(block)
        await store.sync()
        await store.delete(block.digest)
        assert not await store.has(block.digest)

    with_store(config(cluster, replicationMin=2), use)
    [status] = client(cluster, ["status", cid_text(block.digest)])
    assert {peer["status"] for peer in status["ok"]["peerMap"].values()} == {"unpinned"}


def test_a_size_that_nobody_noted_is_taken_from_the_block(cluster):
    block = sealed(4321)
    node = next(iter(cluster.nodes.values()))
    form = {"format": "raw", "mhtype": "sha2-256", "version": "1", "pin": "false"}
    node.rpc("block/put", {"data": bytes(block.data)}, **form).raise_for_status()
    client(cluster, ["pin", cid_text(block.digest), {"replicationFactorMin": 1, "replicationFactorMax": 2}])
    cluster.settled()

    async def use(store):
        assert await store.sizes([block.digest]) == {block.digest: len(block.data)}

    with_store(config(cluster), use)


# -- a cluster that does not behave ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        ("Bearer s3cr3t-canary", {}),
        ("Basic " + base64.b64encode(b"meshkit:s3cr3t-canary").decode(), {"username": "meshkit"}),
    ],
    ids=["bearer", "basic"],
)
def test_credentials(cluster, monkeypatch, header, fields):
    monkeypatch.setenv("MK_TEST_TOKEN", "s3cr3t-canary")
    cluster.authorization = header

    async def use(store):
        await store.put(sealed())
        await store.sync()

    with_store(config(cluster, tokenEnv="MK_TEST_TOKEN", **fields), use, create=True)
    with fails("provider_http_error", "401"):
        with_store(config(cluster), use)
    assert not any("canary" in asked for asked in cluster.asked)


@pytest.fixture
def proxy(cluster):
    with Proxy(cluster.url).running() as running:
        yield running


def test_a_status_that_broke_off_is_no_answer(cluster, proxy):
    blocks = [sealed() for _ in range(3)]

    def rule(method, path, body):
        if path.startswith("/pins?cids"):
            return lambda data: b"".join(data.splitlines(keepends=True)[:2])
        return None

    async def use(store):
        for block in blocks:
            await store.put(block)
        await store.sync()
        proxy.rule = rule
        with fails("provider_request_failed", "says nothing of"):
            await store.has_many([block.digest for block in blocks])

    with_store(config(cluster, proxy.url), use)


def test_a_cluster_that_names_a_block_otherwise_is_not_believed(cluster, proxy):
    block = sealed()
    other = cid_text(digest_of(b"other")).encode()
    proxy.rule = lambda method, path, body: (
        (lambda data: data.replace(cid_text(block.digest).encode(), other))
        if path.startswith("/add")
        else None
    )

    async def use(store):
        with fails("cid_mismatch", other.decode()):
            await store.put(block)
        await store.sync()  # nothing to wait for

    with_store(config(cluster, proxy.url), use)


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [
        (Answer(500, b'{"code":500,"message":"no space left on device"}'), "no_space", "space"),
        (
            Answer(500, b'{"code":500,"message":"not enough peers"}'),
            "provider_http_error",
            "not enough peers",
        ),
        (Answer(413, b"", "text/html"), "provider_http_error", "413"),
        (Answer(200, b"<html>welcome</html>", "text/html"), "provider_request_failed", "JSON"),
        (Answer(200, b"[]"), "cid_mismatch", "nothing"),
    ],
    ids=["full", "peers", "413", "page", "empty"],
)
def test_refusals_have_their_codes(cluster, proxy, answer, code, word):
    def rule(method, path, body):
        if path.startswith("/add"):
            raise answer

    proxy.rule = rule

    async def use(store):
        with fails(code, word):
            await store.put(sealed())

    with_store(config(cluster, proxy.url), use)


def test_a_block_that_is_kept_and_not_found_is_no_proof_of_absence(cluster):
    block = sealed()

    async def use(store):
        await store.put(block)
        await store.sync()
        for node in cluster.nodes.values():
            node.rpc("pin/rm", arg=cid_text(block.digest)).raise_for_status()
            node.rpc("block/rm", arg=cid_text(block.digest)).raise_for_status()
        with fails("provider_request_failed", "keeps"):
            await store.get(block.digest)
        await store.delete(block.digest)
        with fails("block_unavailable"):
            await store.get(block.digest)

    with_store(config(cluster), use)


def test_a_cluster_that_is_away(ipfs_node, second_ipfs_node):
    cluster = Cluster([ipfs_node, second_ipfs_node])
    with cluster.running():
        fields = config(cluster, retries=0)

    async def use(store):
        for call in (store.has, store.delete):
            with fails("provider_request_failed"):
                await call(digest_of(b"x"))
        with fails("provider_request_failed"):
            await store.put(sealed())

    with_store(fields, use)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"replicationMin": 2, "replicationMax": 1}, "replicationMax"),
        ({"replicationMin": -1, "replicationMax": 3}, "replicationMax"),
        ({"replicationMin": 0}, "replicationMin"),
        ({"node": {"type": "local-dev"}}, "node.type"),
        ({"username": "meshkit"}, "username"),
    ],
)
def test_settings_that_contradict_each_other(fields, field):
    base = {
        "type": "ipfs-cluster",
        "clusterApiUrl": "http://127.0.0.1:9094",
        "node": {"type": "ipfs-http", "ipfsApiUrl": "http://127.0.0.1:5001"},
    }
    ProviderSpec.from_config(base, Path("/"))
    with fails("invalid_config", f"provider.{field}"):
        ProviderSpec.from_config(base | fields, Path("/"))
