"""The published vectors: they do not drift, and both readers agree with them."""

import hashlib
import json
from pathlib import Path

import make_vectors
import pytest
import second_reader
from core_support import reopen, vectors

from meshkitfs.core import (
    _unwrap,
    blocks,
    capability,
    capsule,
    cbor,
    cid,
    cobblestone,
    cose,
    device,
    entries,
    keys,
    letter,
    manifest,
    membership,
    pinned,
    records,
    release,
)
from meshkitfs.core._mint import mint_key
from meshkitfs.core.blocks import HOLE, SealedBlock, VerifiedBlock, Where, open_block
from meshkitfs.core.decision import SignedDecision
from meshkitfs.core.entries import DIR, FILE, HARDLINK, SYMLINK
from meshkitfs.core.identity_record import Endorsement
from meshkitfs.errors import MeshkitError


@pytest.mark.parametrize("name", make_vectors.VECTORS)
def test_vectors_are_what_the_code_makes(name):
    made = json.loads(json.dumps(make_vectors.VECTORS[name]()))
    assert made == vectors(name)


def test_the_vectors_of_the_design():
    """Values fixed before this code was written."""
    hello, zero = vectors("blocks.json")["messages"][:2]
    assert hello["context"] == "83686d6b2f626c6b403150000102030405060708090a0b0c0d0e0f03"
    assert hello["sealed"] == (
        "000102030405060708090a0b0c0d0e0f10111213141516179dfb91e1673333b8fe536e8e8e63f49f1fec292780d46fde"
        "56c3ea4ee0d2ec6e11edd75321a2e3c30a8ffef683f4b305a27619a570"
    )
    assert hello["cid"] == "bafkreieoeqh4elckijfiibaxnbllmuyabz4fngczwifdbrviujm57ouekq"
    assert zero["cid"] == "bafkreiauul7lvva5xsvlkfkcsso2sxpkcueuyo52ztii2m7v5pyyaagrzy"
    assert (hello["sealed_size"], zero["sealed_size"]) == (77, 262472)
    k = vectors("keys.json")
    assert k["ver_key"]["value"] == "b71de7dff6a1391dbf03f4f27dd30c8c7da13e1b01474ee8a99c34d3fc2233d0"
    assert k["key_commit"]["value"] == "c4667b8b36aaff0284877814ab8c724c06b779d5ee52e7755db22d6b2bf1a262"
    assert k["ed25519"]["kid"] == "2402752a887cbe1640c147f4733a41b6"
    assert k["cose"]["record_hash"] == "c64aac43ab26f014ab99e0c1d0c689feee30b5a7a15296c8c1c5e71acb2495be"


def test_the_document_says_what_the_code_does():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    joined = "".join(text.split())
    hello = vectors("blocks.json")["messages"][0]
    for value in (hello["context"], hello["sealed"], hello["cid"], blocks.MAGIC.hex(), letter.MAGIC.hex()):
        assert value in joined
    retention = next(v["blob"] for v in vectors("records.json")["records"] if v["name"] == "retention")
    assert retention[-228:-132] in joined  # the end of its payload
    types = [record.TYPE for record in (records.Head, records.Roster, records.Timestamp, records.Capsule)]
    types += [records.Retention.TYPE, SignedDecision.TYPE, "mk/question@1"]
    assert QUESTION in joined
    types += [membership.VaultRecord.TYPE, membership.Revocations.TYPE]
    types += [capability.Block.TYPE, device.DeviceList.TYPE]
    types += [records.IdentityRecord.TYPE, Endorsement.TYPE, letter.TYPE, capsule.TYPE_2, capsule.TYPE_3]
    types += [release.ReleaseKey.TYPE, release.Deposit.TYPE, release.Release.TYPE]
    for label in (
        *types,
        "mk/blk@1",
        "mk/idx@1",
        "mk/page@1",
        "mk/man@1",
        "mk/vk@1",
        "mk/kc@1",
        "mk/ch@1",
        "mk/rh@1",
        "mk/ek@1",
        "mk/rs@1",
        "mk/kid@1",
        "mk/fp@1",
    ):
        assert f"{label}`" in text or f'"{label}"' in text, label
    limits = (blocks.MAX_SEALED, *blocks.BLOCK_SIZES, blocks.INLINE_MAX, cbor.MAX_RECORD, letter.LETTER_MAX)
    for limit in (*limits, entries.XATTR_TOTAL_MAX):
        assert f"{limit:,}" in text, limit
    signed = (records.Head, records.Roster, records.Timestamp, records.Retention, records.IdentityRecord)
    lists = (membership.VaultRecord, membership.Revocations, capability.Block, device.DeviceList)
    released = (release.ReleaseKey, release.Deposit, release.Release)
    for record in (*signed, *lists, Endorsement, *released):
        for field in record.FIELDS:
            assert f"`{field}`" in text, field


def test_published_messages_open():
    for vector in vectors("blocks.json")["messages"]:
        if vector["sealed"] is None:
            continue
        key, context = bytes.fromhex(vector["key"]), bytes.fromhex(vector["context"])
        sealed = bytes.fromhex(vector["sealed"])
        assert cid.cid_text(cid.digest_of(sealed)) == vector["cid"]
        assert cid.parse_cid(vector["cid"]) == cid.digest_of(sealed)
        for open_ in (cobblestone.open_, cobblestone.open_portable, second_reader.cobblestone_open):
            plaintext = bytes(open_(key, context, sealed))
            assert hashlib.sha256(plaintext).hexdigest() == vector["plaintext_sha256"]


def test_published_contexts_and_sizes():
    make = {"block": Where.block, "index": Where.index, "page": Where.page, "manifest": Where.manifest}
    for vector in vectors("blocks.json")["contexts"]:
        where = make[vector["kind"]](bytes.fromhex(vector["oid"]), *vector["numbers"])
        assert where.context.hex() == vector["context"]
    for size, padded in vectors("blocks.json")["padded_size"]:
        assert blocks.padded_size(size, 1 << 20) == second_reader.padded(size, 1 << 20) == padded


# The question that the published decision answers, byte by byte as docs/format.md has it.
QUESTION = (
    "a861746d6d6b2f7175657374696f6e403163636964f6657661756c74646372657766616374696f6e647265616466706f"
    "6c69637968706f6c6963792d396763617073756c65504bb09416bb872330599e00aa36231224686964656e7469747978"
    "2037373437656639653763396232363735646236333366366665316438356233306a6361706162696c697479f6"
)


def test_published_records_verify():
    known = {
        "mk/head@1": records.Head,
        "mk/roster@1": records.Roster,
        "mk/ts@1": records.Timestamp,
        "mk/id@1": records.IdentityRecord,
        "mk/retention@1": records.Retention,
        "mk/dec@1": SignedDecision,
    }
    chain = []
    for vector in vectors("records.json")["records"]:
        blob, signer = bytes.fromhex(vector["blob"]), bytes.fromhex(vector["signer"])
        record = known[vector["type"]].parse(blob, {keys.kid_of(signer): signer})
        assert record.digest.hex() == vector["hash"]
        assert second_reader.verify(blob, vector["type"], [signer]) == cose.peek1(blob, vector["type"])
        if vector["type"] == "mk/id@1":
            chain.append(blob)
        if vector["type"] == "mk/retention@1":
            assert second_reader.given_up(blob, signer) == record.ranges() != []
        if vector["type"] == "mk/dec@1":
            assert record.req == hashlib.sha256(bytes.fromhex(QUESTION)).digest()
    assert records.verify_chain(chain).seq == 1


def test_published_devices():
    v = vectors("devices.json")
    root, chain, blob = bytes.fromhex(v["root"]), [*map(bytes.fromhex, v["chain"])], bytes.fromhex(v["list"])
    listed = device.DeviceList.parse_for(blob, chain[-1])
    assert [entry.name for entry in listed.entries] == ["laptop", "desktop"]
    assert second_reader.device_list(blob, chain[-1], root) == [
        (entry.name, entry.public.root) for entry in listed.entries
    ]
    with pytest.raises(MeshkitError):
        device.DeviceList.parse_for(blob, chain[0])
    code = device.DeviceCode.from_text(v["code"])
    assert code == device.new_code(keys.SigningKey.from_seed(bytes.fromhex(v["laptop_seed"])))
    assert code.signer().public.hex() == v["code_signer"]
    kid, seed = second_reader.device_code(v["code"])
    assert (kid, keys.SigningKey.from_seed(seed).public.hex()) == (listed.entries[0].kid, v["code_signer"])


def test_published_lists_and_tokens():
    v = vectors("conditions.json")
    issuer = bytes.fromhex(v["issuer"])
    vault = pinned.Pinned.parse(v["vault"])
    first, second = (membership.VaultRecord.parse_owned(bytes.fromhex(blob)) for blob in v["vault_records"])
    assert (vault.vault_id, vault.public) == (first.id, issuer)
    assert (second.prev, second.members) == (first.digest, first.members[1:])
    for blob, record in zip(v["vault_records"], (first, second), strict=True):
        assert second_reader.listed(bytes.fromhex(blob), "mk/vault@1", issuer) == list(record.members)
    data = bytes.fromhex(v["token"])
    token = capability.Token.from_text(v["token_text"])
    assert (token.to_bytes(), token.issuer) == (data, issuer)
    assert token.pinned.text == v["capability"]
    revoked = bytes.fromhex(v["revocations"])
    assert second_reader.listed(revoked, "mk/revocations@1", issuer) == [token.id]
    assert membership.Revocations.parse_owned(revoked).tokens == (token.id,)
    who, chain = second_reader.token(data)
    assert who == issuer
    for block, theirs, published in zip(token.blocks, chain, v["blocks"], strict=True):
        assert block.payload() == theirs
        assert (block.digest.hex(), block.holder.hex()) == (published["hash"], published["holder"])
        assert (list(block.rights), block.exp) == (published["rights"], published["exp"])
    for why, bad in v["refused"].items():
        with pytest.raises(second_reader.FormatError):
            second_reader.token(bytes.fromhex(bad))
        with pytest.raises(MeshkitError, match="invalid_record"):
            print(why, capability.Token.from_bytes(bytes.fromhex(bad)))


def test_the_frozen_capsule_and_letter_open():
    """Made once by this format's first version; they must open for ever."""
    frozen = vectors("frozen.json")
    seed, owner = bytes.fromhex(frozen["recipient_seed"]), bytes.fromhex(frozen["owner"])
    recipient = keys.EncryptionKey.from_seed(seed)
    blob = bytes.fromhex(frozen["capsule"])
    granted = records.Capsule.parse(blob, {keys.kid_of(owner): owner})
    assert _unwrap.open_capsule(granted, recipient).hex() == frozen["key"]
    header, key = second_reader.open_capsule(seed, blob, owner)
    assert key.hex() == frozen["key"]
    assert (header["pol"]["id"], header["rights"]) == ("policy-9", ["list", "read"])
    letter = records.open_letter(recipient, bytes.fromhex(frozen["letter"]))
    assert (letter.capsule, letter.sender.handle, letter.name) == (blob, "alice", b"first")


SHARE = vectors("share.json")
OWNER, EPOCH_KEY, HEAD = (bytes.fromhex(SHARE[name]) for name in ("owner", "epoch_key", "head"))
STORE = {bytes.fromhex(digest): bytes.fromhex(data) for digest, data in SHARE["blocks"].items()}


def digested(found):
    return [[p.hex(), kind, None if c is None else hashlib.sha256(c).hexdigest()] for p, kind, c in found]


def test_the_second_reader_reads_the_published_share():
    found = second_reader.read_share(OWNER, EPOCH_KEY, HEAD, STORE.__getitem__)
    assert digested(found) == SHARE["expected"]


def first_reader():
    """Read the published share with the product's core alone."""

    def load(ref, oid, epoch, ver):
        where = Where.manifest(oid, epoch, ver)
        return manifest.parse_manifest(
            reopen(ref, SealedBlock(ref[:32], STORE[ref[:32]]), where), oid, epoch, ver
        )

    def open_(ref, where):
        return open_block(mint_key(ref[32:]), VerifiedBlock.check(ref[:32], STORE[ref[:32]]), where)

    def entries_of(m):
        if m.entries is not None:
            yield from m.entries
        for i, page in enumerate(m.pages):
            upper = m.pages[i + 1].first if i + 1 < len(m.pages) else None
            yield from manifest.parse_page(open_(page.ref, Where.page(m.oid, page.page_id)), page, upper)

    def content(m):
        if m.inline is not None:
            return m.inline
        packed, total = m.refs, manifest.block_count(m.size, m.block_size)
        for i in range(len(m.index) // 64):
            ref, count = m.index[i * 64 : i * 64 + 64], min(4096, total - i * 4096)
            packed += (
                bytes(64 * count)
                if ref == HOLE
                else manifest.parse_index(open_(ref, Where.index(m.lineage or m.oid, i)), count)
            )
        out = bytearray(m.size)
        for i in range(total):
            ref, at = packed[i * 64 : i * 64 + 64], i * m.block_size
            if ref != HOLE:
                piece = open_(ref, Where.block(m.lineage or m.oid, i))[: m.size - at]
                out[at : at + len(piece)] = piece
        return bytes(out)

    def walk(m, path, links):
        for entry in entries_of(m):
            if entry.kind == HARDLINK:
                entry = links[entry.oid]._replace(name=entry.name)
            here = path + entry.name
            if entry.kind == SYMLINK:
                yield here, "symlink", entry.extra["target"]
                continue
            child = load(entry.ref, entry.oid, entry.epoch, entry.ver)
            if entry.kind == FILE:
                yield here, "file", content(child)
            else:
                assert entry.kind == DIR
                yield here, "dir", None
                yield from walk(child, here + b"/", links)

    head = records.Head.parse(HEAD, {keys.kid_of(OWNER): OWNER})
    root_key = keys.ver_key(EPOCH_KEY, head.oid, head.epoch, head.ver)
    root = load(head.root + root_key, head.oid, head.epoch, head.ver)
    table = load(root.links, root.links_oid, root.links_epoch, root.links_ver)
    return walk(root, b"", {entry.oid: entry for entry in entries_of(table)})


def test_the_first_reader_reads_the_published_share():
    assert digested(first_reader()) == SHARE["expected"]


def test_the_second_reader_refuses_a_damaged_share():
    """Whatever block is flipped, cut or swapped for another, reading stops; it never yields other bytes."""
    digests = sorted(STORE)
    for i, digest in enumerate(digests):
        flipped = bytearray(STORE[digest])
        flipped[i % len(flipped)] ^= 1
        for bad in (bytes(flipped), STORE[digests[i - 1]], STORE[digest][:-1], STORE[digest] + b"\0"):
            store = STORE | {digest: bad}
            seen = []
            with pytest.raises(second_reader.FormatError):
                seen.extend(
                    (path, kind)
                    for path, kind, _ in second_reader.read_share(OWNER, EPOCH_KEY, HEAD, store.__getitem__)
                )
            if i:
                break
    for ek in (bytes(32), EPOCH_KEY[::-1]):
        with pytest.raises(second_reader.FormatError):
            list(second_reader.read_share(OWNER, ek, HEAD, STORE.__getitem__))
    stranger = keys.SigningKey.from_seed(bytes(32)).public
    with pytest.raises(second_reader.FormatError):
        list(second_reader.read_share(stranger, EPOCH_KEY, HEAD, STORE.__getitem__))


def test_the_second_reader_shares_no_code():
    source = (second_reader.__file__,)
    for path in source:
        with open(path) as file:
            imports = [line for line in file if line.startswith(("import ", "from "))]
        assert imports
        assert not any("meshkitfs" in line or "make_vectors" in line for line in imports)
