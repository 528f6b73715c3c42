"""Writes tests/vectors/*.json: ``python tests/make_vectors.py``. Only for a format changed on purpose.

Everything is a function of fixed seeds: keys and salts come from a counter, never from the system. HPKE draws
its own randomness, so the capsule and the letter in frozen.json are samples, made once and kept.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from meshkitfs.core import blocks, cid, cobblestone, cose, entries, keys, manifest, records, release
from meshkitfs.core.blocks import HOLE, MAGIC, Where
from meshkitfs.core.capability import Token
from meshkitfs.core.decision import SignedDecision, question_hash
from meshkitfs.core.device import DeviceEntry, DeviceList, new_code
from meshkitfs.core.entries import Entry
from meshkitfs.core.identity_record import IdentityRecord, first_record, rotate
from meshkitfs.core.manifest import DirManifest, FileManifest, PageRef, RootAttrs
from meshkitfs.core.membership import Revocations, VaultRecord, revocations_id
from meshkitfs.core.pinned import Pinned

DIRECTORY = Path(__file__).parent / "vectors"
NOW = 1_800_000_000
SEED = bytes(range(32))
OID = bytes(range(16))
SHARE = bytes(range(16, 32))


def fixed(label, size=32):
    """Return ``size`` bytes that depend on nothing but ``label``."""
    return hashlib.shake_256(b"meshkitfs test vector " + label.encode()).digest(size)


class Sealer:
    """Seals with keys and salts from a counter, and keeps every block it made."""

    def __init__(self):
        self.store = {}
        self.count = 0

    def seal(self, where, plaintext, key=None, pad=0):
        self.count += 1
        key = fixed(f"key {self.count}") if key is None else key
        salt = fixed(f"salt {self.count}", 24)
        prefix = MAGIC if where.is_manifest else b""
        data = bytes(cobblestone.seal_portable(key, where.context, plaintext, pad, prefix, salt=salt))
        digest = cid.digest_of(data)
        self.store[digest] = data
        return digest + key

    def block(self, oid, index, plaintext):
        pad = blocks.padded_size(len(plaintext), 1 << 20) - len(plaintext)
        return self.seal(Where.block(oid, index), plaintext, pad=pad)

    def manifest(self, value, key=None):
        where = Where.manifest(value.oid, value.epoch, value.ver)
        return self.seal(where, blocks.frame(manifest.encode_manifest(value)), key)

    def page(self, oid, page_id, items):
        return self.seal(Where.page(oid, page_id), blocks.frame(manifest.encode_page(items)))


def block_vectors():
    def sealed(name, where, plaintext):
        data = cobblestone.seal_portable(SEED, where.context, plaintext, salt=bytes(range(24)))
        return {
            "name": name,
            "key": SEED.hex(),
            "salt": bytes(range(24)).hex(),
            "context": where.context.hex(),
            "plaintext_sha256": hashlib.sha256(plaintext).hexdigest(),
            "plaintext_size": len(plaintext),
            "sealed_size": len(data),
            "sealed": data.hex() if len(data) < 200 else None,
            "cid": cid.cid_text(cid.digest_of(data)),
        }

    def pattern(size):
        return (bytes(range(251)) * (size // 251 + 1))[:size]

    return {
        "messages": [
            sealed("hello", Where.block(OID, 3), b"hello"),
            sealed("256 KiB of zero", Where.block(OID, 3), bytes(262144)),
            sealed("empty", Where.block(OID, 0), b""),
            *(sealed(f"pattern {n}", Where.block(OID, 23), pattern(n)) for n in (16383, 16384, 16385, 65536)),
        ],
        "contexts": [
            {"kind": kind, "oid": OID.hex(), "numbers": numbers, "context": where.context.hex()}
            for kind, numbers, where in (
                *(
                    ("block", [n], Where.block(OID, n))
                    for n in (0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**53 - 1)
                ),
                ("index", [4095], Where.index(OID, 4095)),
                ("page", [300], Where.page(OID, 300)),
                ("manifest", [7, 5], Where.manifest(OID, 7, 5)),
            )
        ],
        "padded_size": [
            [n, blocks.padded_size(n, 1 << 20)]
            for n in (
                0,
                1,
                511,
                512,
                513,
                545,
                1000,
                4096,
                5000,
                16385,
                65536,
                65537,
                100000,
                262145,
                1048575,
            )
        ],
    }


def key_vectors():
    signing = keys.SigningKey.from_seed(bytes(32))
    encryption = keys.EncryptionKey.from_seed(bytes(32))
    record = cose.sign1(signing, "mk/head@1", {"t": "mk/head@1", "ver": 1})
    place = {"key": SEED.hex(), "oid": OID.hex(), "epoch": 7}
    return {
        "ver_key": place | {"ver": 5, "value": keys.ver_key(SEED, OID, 7, 5).hex()},
        "key_commit": place | {"ver": 0, "value": keys.key_commit(SEED, OID, 7, 0).hex()},
        "ed25519": {
            "seed": bytes(32).hex(),
            "public": signing.public.hex(),
            "kid": signing.kid.hex(),
            "did": keys.did_key(signing.public),
            "fingerprint": keys.fingerprint(signing.public),
        },
        "xwing": {
            "seed": bytes(32).hex(),
            "public_sha256": hashlib.sha256(encryption.public).hexdigest(),
            "kid": encryption.kid.hex(),
        },
        "cose": {"type": "mk/head@1", "record": record.hex(), "record_hash": cose.record_hash(record).hex()},
    }  # fmt: skip


def record_vectors():
    owner, writer = keys.SigningKey.from_seed(fixed("owner")), keys.SigningKey.from_seed(fixed("writer"))
    service, new_root = (
        keys.SigningKey.from_seed(fixed("service")),
        keys.SigningKey.from_seed(fixed("root 2")),
    )
    encryption = keys.EncryptionKey.from_seed(fixed("encryption"))
    head1 = records.Head(SHARE, OID, 1, 1, b"", fixed("root block"), NOW).sign(writer)
    head2 = records.Head(SHARE, OID, 1, 2, cose.record_hash(head1), fixed("root block 2"), NOW + 9).sign(
        writer
    )
    roster = records.Roster(
        SHARE, OID, 4, 1, (fixed("capsule 1"), fixed("capsule 2")), (owner.public, writer.public),
        1, NOW, NOW + 604800, (service.public,),
    ).sign(owner)  # fmt: skip
    timestamp = records.Timestamp(SHARE, cose.record_hash(roster), NOW, NOW + 300).sign(service)
    retention = records.Retention(SHARE, 2, (1, 3, NOW, 4, 4, NOW + 9, 7, 1000, NOW), NOW + 9).sign(owner)
    question = question_hash(
        policy="policy-9", identity=fixed("bob").hex()[:32], action="read", cid=None,
        capsule=fixed("capsule id", 16), vault="crew", capability=None,
    )  # fmt: skip
    decision = SignedDecision(question, fixed("nonce", 16), True, NOW, NOW + 60).sign(service)
    identity0 = first_record("alice", owner, encryption.public, NOW, 1000)
    successor = IdentityRecord(
        "alice", new_root.public, new_root.public, encryption.public, 0, b"", NOW + 5, NOW + 999, NOW + 5
    )
    identity1 = rotate(identity0, owner, successor, new_root)
    names = ("owner", "writer", "service", "new_root")
    return {
        "keys": {
            name: {"public": key.public.hex(), "kid": key.kid.hex()}
            for name, key in zip(names, (owner, writer, service, new_root), strict=True)
        },
        "records": [
            {
                "name": name,
                "type": typ,
                "signer": signer.public.hex(),
                "blob": blob.hex(),
                "hash": cose.record_hash(blob).hex(),
            }
            for name, typ, signer, blob in (
                ("first head", "mk/head@1", writer, head1),
                ("second head", "mk/head@1", writer, head2),
                ("roster", "mk/roster@1", owner, roster),
                ("timestamp", "mk/ts@1", service, timestamp),
                ("identity", "mk/id@1", owner, identity0),
                ("rotated identity", "mk/id@1", new_root, identity1),
                ("retention", "mk/retention@1", owner, retention),
                ("decision", "mk/dec@1", service, decision),
            )
        ],
    }  # fmt: skip


def share_vector():
    """A whole share: inline files, blocks, holes, an index block, pages, links, xattrs, odd names."""
    s = Sealer()
    owner, ek = keys.SigningKey.from_seed(fixed("owner")), fixed("epoch key")
    expected, packed = [], {}

    def oid(name):
        return fixed("oid " + name, 16)

    def entry(name, kind, ref=b"", size=0, mode=0o644, mtime=NOW * 10**9 + 5, extra=None, of=None):
        ver = 2 if ref else 0
        return Entry(
            name, kind, oid(of or name.decode("latin1")), mode, mtime, mtime, size, 1, ver, ref, extra
        )

    def file(name, content, block_size=65536, **more):
        value = FileManifest(
            oid(more.get("of") or name.decode("latin1")), 1, 2, len(content), block_size, None
        )
        if len(content) <= blocks.INLINE_MAX:
            value = FileManifest(value.oid, 1, 2, len(content), block_size, content)
        else:
            pieces = [content[at : at + block_size] for at in range(0, len(content), block_size)]
            pieces = [piece.rstrip(b"\0") for piece in pieces]
            refs = b"".join(s.block(value.oid, i, piece) if piece else HOLE for i, piece in enumerate(pieces))
            value = FileManifest(value.oid, 1, 2, len(content), block_size, None, refs=refs)
            packed[name] = refs
        return entry(name, entries.FILE, s.manifest(value), len(content), **more)

    def copy_of_large():
        # Made as a copy: its blocks are those of "large" and stay bound to that oid.
        value = FileManifest(oid("large copy"), 1, 2, len(large), 65536, None, refs=packed[b"large"])
        value = dataclasses.replace(value, lineage=oid("large"))
        return entry(b"large copy", entries.FILE, s.manifest(value), len(large))

    def big(name):
        # 4,097 blocks, all but the first and the last of them holes: an index block, and a hole for one.
        value_oid, size = oid(name.decode()), 4096 * 65536 + 10
        refs = s.block(value_oid, 0, b"start") + HOLE * 4095
        used = refs[:64]
        first = s.seal(Where.index(value_oid, 0), used, pad=blocks.padded_size(64, 1 << 20) - 64)
        value = FileManifest(value_oid, 1, 2, size, 65536, None, index=first + HOLE)
        return entry(name, entries.FILE, s.manifest(value), size, extra={"used": 65536})

    text = b"hello, share\n"
    large = fixed("content", 66_000)
    sparse = b"x" * 20 + bytes(65536 * 2 - 20) + b"y" * 100
    target = b"../\xff elsewhere"
    shared = file(b"linked", b"one content, two names", of="linked", extra={"nlink": 2})
    link_name = shared.oid.hex().encode()
    table = DirManifest(oid("links"), 1, 2, 1, (shared._replace(name=link_name),))
    inner = DirManifest(oid("inner"), 1, 2, 1, (file(b"\xf0\x9f\x94\x92 caf\xc3\xa9", b"", mtime=-1),))
    many = [file(b"%03d" % i, b"%d" % i, extra={"x": [[b"user.n", b"%d" % i]]}) for i in range(25)]
    pages = tuple(
        PageRef(i, many[i * 15].name, len(part), s.page(oid("many"), i, part))
        for i, part in enumerate((many[:15], many[15:]))
    )
    paged = DirManifest(oid("many"), 1, 2, 25, None, pages)
    root_entries = (
        Entry(b"first", entries.HARDLINK, shared.oid, 0, 0, 0, 0, 0, 0, b""),
        entry(b"inner", entries.DIR, s.manifest(inner), mode=0o755),
        file(b"large", large),
        copy_of_large(),
        entry(b"link", entries.SYMLINK, size=len(target), extra={"target": target}),
        entry(b"many", entries.DIR, s.manifest(paged), mode=0o750),
        Entry(b"second", entries.HARDLINK, shared.oid, 0, 0, 0, 0, 0, 0, b""),
        file(b"sparse", sparse, extra={"used": 65636}),
        file(b"text", text, mode=0o4755, extra={"used": 13, "x": [[b"user.a", b""], [b"user.b", b"\0\xff"]]}),
        big(b"very big"),
    )
    root = DirManifest(
        OID, 1, 3, len(root_entries), root_entries, links=s.manifest(table), links_oid=table.oid,
        links_ver=2, links_epoch=1, root=RootAttrs(0o755, NOW * 10**9, -1, {"x": [[b"user.k", b"v"]]}),
    )  # fmt: skip
    ref = s.manifest(root, keys.ver_key(ek, OID, 1, 3))
    head = records.Head(SHARE, OID, 1, 3, fixed("earlier head"), ref[:32], NOW).sign(owner)
    for path, kind, content in (
        (b"first", "file", b"one content, two names"),
        (b"inner", "dir", None),
        (b"inner/\xf0\x9f\x94\x92 caf\xc3\xa9", "file", b""),
        (b"large", "file", large),
        (b"large copy", "file", large),
        (b"link", "symlink", target),
        (b"many", "dir", None),
        *((b"many/%03d" % i, "file", b"%d" % i) for i in range(25)),
        (b"second", "file", b"one content, two names"),
        (b"sparse", "file", sparse),
        (b"text", "file", text),
    ):
        expected.append([path.hex(), kind, None if content is None else hashlib.sha256(content).hexdigest()])
    content_of_big = hashlib.sha256(b"start" + bytes(4096 * 65536 + 10 - 5)).hexdigest()
    expected.append([b"very big".hex(), "file", content_of_big])
    return {
        "owner": owner.public.hex(),
        "epoch_key": ek.hex(),
        "head": head.hex(),
        "blocks": {digest.hex(): data.hex() for digest, data in sorted(s.store.items())},
        "expected": expected,
    }


def condition_vectors():
    """A vault's first two records, a revocation list, and a token passed on twice; and tokens that are none."""
    issuer, bob, carol, dave = (
        keys.SigningKey.from_seed(fixed(name)) for name in ("owner", "bob", "carol", "dave")
    )
    vault_id, end = fixed("vault id", 16), NOW + 604800

    def vault(seq, prev, *members):
        record = VaultRecord(
            id=vault_id, seq=seq, prev=prev, owner=issuer.public, iat=NOW, exp=end, members=members
        )
        return record.sign(issuer)

    bob_member, carol_member = (fixed(f"{name} member", 32) for name in ("bob", "carol"))
    first = vault(1, b"", bob_member, carol_member)
    second = vault(2, cose.record_hash(first), carol_member)
    token_id = fixed("token id", 16)
    revoked = Revocations(
        id=revocations_id(issuer.public),
        seq=1,
        prev=b"",
        owner=issuer.public,
        iat=NOW,
        exp=end,
        tokens=(token_id,),
    ).sign(issuer)
    one = Token.issue(
        issuer, token_id=token_id, name="editors", holder=bob.public, rights=("read", "write"), share=None, iat=NOW,
        exp=end,
    )  # fmt: skip
    two = one.narrow(bob, holder=carol.public, rights=("read",), share=SHARE, exp=NOW + 3600, iat=NOW + 1)
    three = two.narrow(carol, holder=dave.public, rights=("list",), iat=NOW + 2)
    head, (a, b, c) = three.to_bytes()[:37], three.blobs

    def wider(**changes):
        block = dataclasses.replace(three.blocks[1], n=2, prev=two.last.digest, holder=dave.public, **changes)
        return block.sign(carol)

    def joined(*blobs):
        return (head + b"".join(len(blob).to_bytes(2, "big") + blob for blob in blobs)).hex()

    return {
        "issuer": issuer.public.hex(),
        "vault": Pinned(vault_id.hex(), issuer.public).text,
        "capability": Pinned("editors", issuer.public).text,
        "vault_records": [first.hex(), second.hex()],
        "revocations": revoked.hex(),
        "token": three.to_bytes().hex(),
        "token_text": three.to_text(),
        "blocks": [
            {
                "holder": block.holder.hex(),
                "rights": list(block.rights),
                "exp": block.exp,
                "hash": block.digest.hex(),
            }
            for block in three.blocks
        ],
        "refused": {
            "the first block is missing": joined(b, c),
            "a block in the middle is missing": joined(a, c),
            "blocks in another order": joined(a, c, b),
            "a block twice": joined(a, b, b),
            "more rights": joined(a, b, wider(rights=("read", "write"))),
            "a later end": joined(a, b, wider(exp=NOW + 3601)),
            "another share": joined(a, b, wider(share=OID)),
            "any share": joined(a, b, wider(share=None)),
            "signed by the issuer instead of the holder": joined(
                a, dataclasses.replace(three.blocks[1]).sign(issuer)
            ),
            "cut off": joined(a, b, c)[:-2],
        },
    }


def frozen_sample():
    """A capsule and a letter: not reproducible (HPKE draws its own randomness), so made once and kept."""
    owner, recipient = keys.SigningKey.from_seed(fixed("owner")), keys.EncryptionKey.from_seed(fixed("bob"))
    header = {
        "id": fixed("capsule id", 16), "grant": "live", "share": SHARE, "oid": OID, "epoch": 1, "nbf": NOW,
        "exp": NOW + 604800, "seq": 4, "rights": ["read", "list"], "pol": {"id": "policy-9"}, "vault": "crew",
        "offline_grace": 3600,
    }  # fmt: skip
    capsule = records.make_capsule(owner, header, fixed("epoch key"), recipient.public)
    record = first_record("alice", owner, keys.EncryptionKey.from_seed(fixed("encryption")).public, NOW, 1000)
    letter = records.Letter(capsule, record, b"first", entries.DIR, 0o755, NOW, 0, "here you are", NOW)
    return {
        "recipient_seed": fixed("bob").hex(),
        "owner": owner.public.hex(),
        "key": fixed("epoch key").hex(),
        "capsule": capsule.hex(),
        "letter": records.seal_letter(owner, letter, recipient.public).hex(),
    }


def release_vectors():
    """Two halves of an epoch's key, the mask of a snapshot, and a release service's statement of its key."""
    service = keys.SigningKey.from_seed(fixed("release service"))
    enc = keys.EncryptionKey.from_seed(fixed("release seal"))
    secret = release.EpochSecret(
        SHARE, 7, SEED, release.ReleaseService("https://keys.example", service.public)
    )
    mask = release.snapshot_mask(secret.release_half, fixed("capsule id", 16))
    return {
        "seed": SEED.hex(),
        "share": SHARE.hex(),
        "epoch": 7,
        "capsule_half": secret.capsule_half.hex(),
        "release_half": secret.release_half.hex(),
        "epoch_key": secret.key.hex(),
        "snapshot": {"capsule": fixed("capsule id", 16).hex(), "mask": mask.hex()},
        "service": service.public.hex(),
        "record": release.ReleaseKey(enc.public, NOW).sign(service).hex(),
    }


def frozen_release():
    """Capsules of version 2, a deposit and a release: samples of the first program that made them."""
    owner, recipient = keys.SigningKey.from_seed(fixed("owner")), keys.EncryptionKey.from_seed(fixed("bob"))
    service = keys.SigningKey.from_seed(fixed("release service"))
    enc = keys.EncryptionKey.from_seed(fixed("release seal"))
    where = release.ReleaseService("https://keys.example", service.public)
    secret = release.EpochSecret(SHARE, 7, SEED, where)
    header = {
        "id": fixed("capsule id", 16), "grant": "live", "share": SHARE, "oid": OID, "epoch": 7, "nbf": NOW,
        "exp": NOW + 604800, "seq": 4, "rights": ["read"],
    }  # fmt: skip
    half = records.make_capsule(
        owner, header | {"rel": where.header("half")}, secret.key, recipient.public, secret.capsule_half
    )
    whole = records.make_capsule(
        owner, header | {"rel": where.header("whole")}, secret.key, recipient.public, secret.raw
    )
    answer = release.Release(
        SHARE, cose.record_hash(half), 7, recipient.kid, fixed("nonce", 16), NOW, NOW + 300
    )
    return {
        "recipient_seed": fixed("bob").hex(),
        "service_seed": fixed("release seal").hex(),
        "owner": owner.public.hex(),
        "service": service.public.hex(),
        "key": secret.key.hex(),
        "capsule": half.hex(),
        "whole": whole.hex(),
        "deposit": secret.deposit(enc.public).sign(owner).hex(),
        "release": answer.sealing(secret.release_half, recipient.public).sign(service).hex(),
    }


def frozen_strength():
    """Capsules of version 3, with and without a release service: samples of the first program that made them."""
    owner, recipient = keys.SigningKey.from_seed(fixed("owner")), keys.EncryptionKey.from_seed(fixed("bob"))
    service = keys.SigningKey.from_seed(fixed("release service"))
    where = release.ReleaseService("https://keys.example", service.public)
    secret = release.EpochSecret(SHARE, 7, SEED, where)
    header = {
        "id": fixed("capsule id", 16), "grant": "live", "share": SHARE, "oid": OID, "epoch": 7, "nbf": NOW,
        "exp": NOW + 604800, "seq": 4, "rights": ["read"], "keyvault": ["hardware_backed", "persistent"],
    }  # fmt: skip
    half = header | {"rel": where.header("half")}
    return {
        "recipient_seed": fixed("bob").hex(),
        "owner": owner.public.hex(),
        "key": secret.key.hex(),
        "half": secret.release_half.hex(),
        "capsule": records.make_capsule(owner, header, secret.key, recipient.public).hex(),
        "halved": records.make_capsule(owner, half, secret.key, recipient.public, secret.capsule_half).hex(),
    }


def device_vectors():
    """An identity's second record, the list of its two devices, and the code of one of them."""
    owner, laptop, desktop = (
        keys.SigningKey.from_seed(fixed(name)) for name in ("owner", "laptop", "desktop")
    )
    enc = [keys.EncryptionKey.from_seed(fixed(f"{name} encryption")).public for name in ("laptop", "desktop")]
    encryption = keys.EncryptionKey.from_seed(fixed("encryption")).public
    first = first_record("alice", owner, encryption, NOW, 1000)
    renewed = IdentityRecord("alice", owner.public, owner.public, encryption, 1, b"", NOW, NOW + 1000, NOW)
    second = rotate(first, owner, renewed, owner)
    entries = tuple(
        DeviceEntry(name, first_record(f"device-{name}", key, public, NOW, 1000), NOW, desktop.kid)
        for name, key, public in zip(("laptop", "desktop"), (laptop, desktop), enc, strict=True)
    )
    code = new_code(laptop)
    return {
        "root": owner.public.hex(),
        "chain": [first.hex(), second.hex()],
        "list": DeviceList.of(second, entries, NOW).sign(owner).hex(),
        "laptop_seed": laptop.seed.hex(),
        "laptop": laptop.public.hex(),
        "code": code.to_text(),
        "code_signer": code.signer().public.hex(),
    }


VECTORS = {
    "devices.json": device_vectors,
    "blocks.json": block_vectors,
    "conditions.json": condition_vectors,
    "keys.json": key_vectors,
    "records.json": record_vectors,
    "share.json": share_vector,
    "release.json": release_vectors,
}
FROZEN = {
    "frozen.json": frozen_sample,
    "frozen_release.json": frozen_release,
    "frozen_strength.json": frozen_strength,
}


def main():
    DIRECTORY.mkdir(exist_ok=True)
    for name, make in VECTORS.items():
        (DIRECTORY / name).write_text(json.dumps(make(), indent=1) + "\n")
    for name, make in FROZEN.items():
        if not (DIRECTORY / name).exists():
            (DIRECTORY / name).write_text(json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
    main()
