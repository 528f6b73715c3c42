"""Several stores in an order: who is asked, when a write counts, and what is never done."""

from __future__ import annotations

import os
from pathlib import Path

import evil
import pytest
import trio
import trio.testing

from meshkitfs.core.blocks import Where, seal_block
from meshkitfs.core.cid import digest_of
from meshkitfs.errors import MeshkitError
from meshkitfs.providers import LocalStore, ProviderSpec, open_provider
from meshkitfs.providers.fallback import FallbackStore

BASE = Path("/srv/home")


def sealed(index: int = 0):
    return seal_block(Where.block(bytes(16), index), os.urandom(2000))[1]


@pytest.fixture
def members(tmp_path):
    """Three stores whose answers can be spoiled."""
    return [evil.EvilStore(LocalStore.open(tmp_path / name, create=True)) for name in "abc"]


def run(function, *args):
    return trio.run(function, *args)


def fails(code, function, *args):
    with pytest.raises(MeshkitError) as caught:
        run(function, *args)
    assert caught.value.code == code
    return caught.value


def holders(members, digest):
    return [run(member.inner.has, digest) for member in members]


def away(member):
    """The store does not answer, whatever it is asked."""

    async def gone(*_args):
        raise MeshkitError("provider_request_failed", "away")

    member.inner = type(member.inner)(member.inner.directory)
    for name in ("get", "put", "put_file", "sizes", "delete_many", "sync", "delete", "has_many"):
        setattr(member.inner, name, gone)


# -- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [evil.instead(b"<html>"), evil.missing(), evil.failing()], ids=["wrong", "lost", "away"]
)
def test_the_next_is_asked(members, fault):
    block = sealed()
    for member in members:
        run(member.inner.put, block)
    members[0].on_get(fault)
    store = FallbackStore(members)
    assert bytes(run(store.get, block.digest).data) == bytes(block.data)
    assert [source.served for source in store.sources()] == [0, 1, 0]
    assert store.counters.gets == 1


def test_it_is_said_who_served_and_who_did_not(members, caplog):
    caplog.set_level("INFO", "meshkitfs.providers.fallback")
    block = sealed()
    run(members[1].inner.put, block)
    members[0].on_get(evil.failing())
    store = FallbackStore(members)
    run(store.get, block.digest)
    first, second, third = store.sources()
    assert (first.failed, second.served, third.served) == (1, 1, 0)
    assert f"a block came from {members[1].name}: provider_request_failed" in caplog.text


def test_absent_is_what_nobody_has(members):
    fails("block_unavailable", FallbackStore(members).get, sealed().digest)


def test_not_absent_while_one_does_not_answer(members):
    members[1].on_get(evil.failing())
    fails("provider_request_failed", FallbackStore(members).get, sealed().digest)


def test_damaged_when_nobody_has_a_whole_one(members):
    block = sealed()
    run(members[2].inner.put, block)
    members[2].on_get(evil.instead(b"<html>"))
    fails("cid_mismatch", FallbackStore(members).get, block.digest)


def test_a_directory_that_is_away_is_passed_over(tmp_path):
    """Its disk is not mounted, neither when it is opened nor later; then it is, and it has its turn again."""
    spec = ProviderSpec.from_config(
        {
            "type": "fallback",
            "providers": [{"type": "local-dev", "store": name} for name in ("disk", "other")],
        },
        tmp_path,
    )
    for name in ("disk", "other"):
        LocalStore.open(tmp_path / name, create=True)
    block, later = sealed(), sealed(1)

    async def main():
        (tmp_path / "disk").rename(tmp_path / "unmounted")
        store = await open_provider(spec)
        await store.put(block)
        await store.sync()
        assert (await store.get(block.digest)).digest == block.digest
        (tmp_path / "unmounted").rename(tmp_path / "disk")
        await store.put(later)
        await store.sync()
        await store.aclose()

    trio.run(main)
    disk, other = LocalStore(tmp_path / "disk"), LocalStore(tmp_path / "other")
    assert [run(store.has, block.digest) for store in (disk, other)] == [False, True]
    assert [run(store.has, later.digest) for store in (disk, other)] == [True, False]


# -- writing ---------------------------------------------------------------------------------------------


def test_a_write_goes_to_the_first(members):
    block = sealed()
    run(FallbackStore(members).put, block)
    assert holders(members, block.digest) == [True, False, False]


def test_a_write_goes_to_the_first_that_takes_it(members, tmp_path):
    block, spooled = sealed(), sealed(1)
    (tmp_path / "spool").write_bytes(spooled.data)
    members[0].on_put = "provider_http_error"
    store = FallbackStore(members)
    run(store.put, block)
    run(store.put_files, [(spooled.digest, tmp_path / "spool")])
    run(store.sync)
    for digest in (block.digest, spooled.digest):
        assert holders(members, digest) == [False, True, False]
        assert run(store.has, digest)
        assert run(store.get, digest).digest == digest


def test_as_many_copies_as_were_asked_for(members):
    block, second = sealed(), sealed(1)
    run(FallbackStore(members, copies=2).put, block)
    assert holders(members, block.digest) == [True, True, False]
    members[1].on_put = "no_space"
    run(FallbackStore(members, copies=2).put, second)
    assert holders(members, second.digest) == [True, False, True]


def test_with_fewer_copies_it_is_not_stored(members):
    members[1].on_put = members[2].on_put = "provider_request_failed"
    store = FallbackStore(members, copies=2)
    fails("provider_request_failed", store.put, sealed())
    assert store.counters.bytes_out == 0


def test_nobody_takes_it(members):
    for member, code in zip(
        members, ("no_space", "provider_request_failed", "provider_http_error"), strict=True
    ):
        member.on_put = code
    fails("no_space", FallbackStore(members).put, sealed())


def test_a_damaged_block_is_offered_to_nobody_else(members):
    members[0].on_put = "cid_mismatch"
    fails("cid_mismatch", FallbackStore(members).put, sealed())
    assert members[1].log == []


def test_durable_only_where_all_that_took_something_say_so(members):
    store = FallbackStore(members)
    members[0].on_put = "provider_http_error"
    run(store.put, sealed())
    members[0].heal()
    run(store.put, sealed(1))
    members[1].on_sync = "provider_request_failed"
    fails("provider_request_failed", store.sync)
    fails("provider_request_failed", store.sync)  # not forgotten
    members[1].heal()
    run(store.sync)
    assert ("sync", b"") not in members[2].log  # it took nothing


def test_a_write_that_ends_while_a_sync_is_under_way_is_not_covered_by_it(members):
    store = FallbackStore(members[:1])
    inside, go_on = trio.Event(), trio.Event()
    real_put, real_sync = members[0].put, members[0].sync
    syncs = []

    async def put(block):
        inside.set()
        await go_on.wait()
        await real_put(block)

    async def sync():
        syncs.append("sync")
        await real_sync()
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()

    async def main():
        await store.put(sealed())
        members[0].put, members[0].sync = put, sync
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.put, sealed(1))
            await inside.wait()
            await store.sync()
        await store.sync()
        await store.sync()

    trio.run(main)
    assert syncs == ["sync", "sync"]  # the third had nothing to do


# -- deleting and asking ------------------------------------------------------------------------------------


def test_deleted_is_deleted_everywhere(members):
    block = sealed()
    for member in members:
        run(member.inner.put, block)
    run(FallbackStore(members).delete, block.digest)
    assert holders(members, block.digest) == [False] * 3


def test_a_deletion_that_one_does_not_hear_fails_and_the_others_do_it(members):
    block = sealed()
    for member in members:
        run(member.inner.put, block)
    members[0].deletes = 0
    fails("provider_request_failed", FallbackStore(members).delete_many, [block.digest])
    assert holders(members, block.digest) == [True, False, False]


def test_sizes_are_everybodys(members):
    first, second = sealed(), sealed(1)
    run(members[0].inner.put, first)
    run(members[2].inner.put, second)
    store = FallbackStore(members)
    assert run(store.sizes, [first.digest, second.digest, digest_of(b"x")]) == {
        first.digest: len(first.data), second.digest: len(second.data),
    }  # fmt: skip
    assert members[1].log == [("has", second.digest), ("has", digest_of(b"x"))]  # the rest was known


def test_has_is_unknown_while_one_that_may_have_it_is_away(members):
    block = sealed()
    run(members[0].inner.put, block)
    away(members[1])
    store = FallbackStore(members)
    assert run(store.has, block.digest)
    fails("provider_request_failed", store.has, digest_of(b"x"))


# -- what may be configured -----------------------------------------------------------------------------------

S3 = {"type": "s3", "endpoint": "https://a.example", "bucket": "blocks"}
OTHER = {**S3, "endpoint": "https://b.example"}
HERE = {"type": "local-dev", "store": "blocks"}
GATEWAY = {"type": "gateway-retrieval", "gatewayUrl": "https://gw.example", "storage": HERE}


def spec(*providers, **more):
    return ProviderSpec.from_config({"type": "fallback", "providers": list(providers), **more}, BASE)


def refused(*providers, **more):
    with pytest.raises(MeshkitError) as caught:
        spec(*providers, **more)
    assert caught.value.code == "invalid_config"
    return caught.value.detail


@pytest.mark.parametrize("providers", [(S3, HERE), (HERE, S3), (S3, OTHER, HERE), (S3, GATEWAY)])
def test_nothing_falls_back_to_a_local_store(providers):
    said = refused(*providers)
    assert "nothing falls back to a local store" in said
    assert "provider.providers[" in said
    inner = {"type": "fallback", "providers": list(providers)}
    assert "provider.providers[0].providers[" in refused(inner, OTHER)


def test_local_stores_may_stand_for_each_other():
    assert spec(HERE, {"type": "local-dev", "store": "more"}).directories() == [
        BASE / "blocks",
        BASE / "more",
    ]


def test_one_metadata_service_for_all():
    one, two = ({"metadataApiUrl": f"https://{name}.example"} for name in ("one", "two"))
    said = refused({**S3, **one}, {**OTHER, **two})
    assert said.startswith("field 'provider.providers[1].metadataApiUrl' is another")
    assert spec({**S3, **one}, {**OTHER, **one}).boundaries() == {"https://one.example"}
    assert spec({**S3, **one}, OTHER).boundaries() == {"https://one.example"}


def test_other_things_that_make_no_sense():
    assert "must be a list" in refused()
    assert "is in the list already" in refused(S3, S3)
    assert "more than the 2 providers" in refused(S3, OTHER, copies=3)
    assert "'provider.providers[1].bucket' is missing" in refused(
        S3, {"type": "s3", "endpoint": "https://b.example"}
    )
    assert "'provider.copies' must be a whole number" in refused(S3, OTHER, copies=0)
