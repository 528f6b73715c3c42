"""A second reader of the format, written from docs/format.md. It shares no code with meshkitfs.

It uses the standard library, AES-GCM, HKDF, Ed25519 and HPKE from ``cryptography``, and dag-cbor.
It is slow and complete: it refuses whatever the document says must be refused, and needs only bytes:

    for path, kind, content in read_share(owner_public, epoch_key, head_blob, get): ...

``get(digest)`` returns a stored block. Paths and contents are bytes; kind is "dir" (content None), "file" or
"symlink" (content is the target). The root itself is named only when it is a file.
"""

import base64
import hashlib
import hmac
import re
import struct

import dag_cbor
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

CHUNK = 16384
HOLE = b"\0" * 64
BLOCK_SIZES = (1 << 16, 1 << 18, 1 << 20)
FIELDS = ["name", "kind", "oid", "mode", "mtime_s", "mtime_ns", "ctime_s", "ctime_ns"]
FIELDS += ["size", "epoch", "ver", "ref", "extra"]


class FormatError(Exception):
    """The bytes are not a share of this format."""


def need(ok, why):
    if not ok:
        raise FormatError(why)


def sha256(data):
    return hashlib.sha256(data).digest()


# -- canonical CBOR ------------------------------------------------------------------------------------------


def cbor(data, limit=1 << 20):
    need(len(data) <= limit, "cbor size")
    try:
        value = dag_cbor.decode(data)
    except Exception as error:
        raise FormatError("cbor") from error
    lint(value)
    need(dag_cbor.encode(value) == data, "cbor form")
    return value


def lint(value, depth=0):
    if isinstance(value, (dict, list)):
        need(depth < 16, "cbor depth")
        for item in value.values() if isinstance(value, dict) else value:
            lint(item, depth + 1)
    elif isinstance(value, int):
        need(abs(value) < 2**53, "cbor integer")
    else:
        need(value is None or type(value) in (bytes, str), "cbor type")


def uint(value, low=0, high=2**53 - 1):
    return type(value) is int and low <= value <= high


def blob(value, size):
    return type(value) is bytes and len(value) == size


# -- sealed messages -----------------------------------------------------------------------------------------


def padded(size, cap):
    if size <= 512:
        return 512
    e = size.bit_length() - 1
    step = 1 << (e - e.bit_length())
    return min(-(-size // step) * step, cap)


def cobblestone_open(key, context, sealed):
    need(len(sealed) >= 72, "short")
    salt, commitment, body = sealed[:24], sealed[24:56], sealed[56:]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    okm = HKDFExpand(hashes.SHA512(), 76, info).derive(key)
    need(okm[44:] == commitment, "commitment")
    aead, nonce, out = AESGCM(okm[:32]), int.from_bytes(okm[32:44], "big"), []
    for i, at in enumerate(range(0, len(body), CHUNK + 16)):
        try:
            out.append(aead.decrypt((nonce ^ i).to_bytes(12, "big"), body[at : at + CHUNK + 16], None))
        except (InvalidTag, ValueError) as error:
            raise FormatError("tag") from error
    need(len(out[-1]) < CHUNK, "no last chunk")
    return b"".join(out)


def fetch(get, ref, context, magic=b""):
    """Return the plaintext of the block that a 64-byte reference names."""
    sealed = bytes(get(ref[:32]))
    need(len(sealed) <= 2 << 20 and sha256(sealed) == ref[:32], "cid")
    need(sealed[: len(magic)] == magic, "magic")
    return cobblestone_open(ref[32:], dag_cbor.encode(context), sealed[len(magic) :])


def unframe(plaintext):
    need(len(plaintext) >= 4, "frame")
    end = 4 + int.from_bytes(plaintext[:4], "big")
    need(end <= len(plaintext) == padded(end, 2 << 20) and not any(plaintext[end:]), "frame")
    return plaintext[4:end]


# -- structures ----------------------------------------------------------------------------------------------


def valid_name(name):
    return (
        type(name) is bytes and 0 < len(name) < 256 and not set(name) & {0, 47} and name not in (b".", b"..")
    )


def parse_extra(extra, allowed):
    need(type(extra) is dict and set(extra) <= allowed, "extra")
    if "used" in extra:
        need(uint(extra["used"]), "used")
    if "nlink" in extra:
        need(uint(extra["nlink"], 1), "nlink")
    if "target" in extra:
        target = extra["target"]
        need(type(target) is bytes and 0 < len(target) < 4096 and 0 not in target, "target")
    if "x" in extra:
        pairs = extra["x"]
        need(type(pairs) is list and pairs, "xattrs")
        for pair in pairs:
            need(type(pair) is list and len(pair) == 2 and all(type(part) is bytes for part in pair), "xattr")
            need(0 < len(pair[0]) < 256 and 0 not in pair[0], "xattr name")
        names = [name for name, _ in pairs]
        need(names == sorted(set(names)), "xattr order")
        need(sum(len(name) + len(value) for name, value in pairs) <= 131072, "xattr size")


def parse_entries(items):
    need(type(items) is list, "entries")
    entries = []
    for item in items:
        need(type(item) is list and len(item) == 13, "entry")
        entry = dict(zip(FIELDS, item, strict=True))
        need(valid_name(entry["name"]), "name")
        need(uint(entry["kind"], 0, 3) and blob(entry["oid"], 16) and uint(entry["mode"], 0, 0o7777), "entry")
        need(uint(entry["mtime_s"], 1 - 2**53) and uint(entry["mtime_ns"], 0, 999_999_999), "mtime")
        need(uint(entry["ctime_s"], 1 - 2**53) and uint(entry["ctime_ns"], 0, 999_999_999), "ctime")
        need(uint(entry["size"]) and uint(entry["epoch"]) and uint(entry["ver"]), "numbers")
        need(blob(entry["ref"], 64 if entry["kind"] < 2 else 0) and entry["ref"] != HOLE, "ref")
        parse_extra(entry["extra"], {"x", "used", "nlink", "target"})
        need(("target" in entry["extra"]) == (entry["kind"] == 2), "target")
        entries.append(entry)
    names = [entry["name"] for entry in entries]
    need(names == sorted(set(names)), "order")
    return entries


def parse_page(plaintext):
    entries = parse_entries(cbor(unframe(plaintext), 2 << 20))
    need(entries, "empty page")
    return entries


def parse_index(plaintext, count):
    used = -(-len(plaintext.rstrip(b"\0")) // 64)
    need(0 < used <= count <= 4096 and len(plaintext) == padded(64 * used, 1 << 20), "index")
    return (plaintext + bytes(64 * count))[: 64 * count]


def parse_manifest(plaintext, oid, epoch, ver):
    """Return the manifest as a map of plain values, all rules checked."""
    m = cbor(unframe(plaintext), 2 << 20)
    need(type(m) is dict and m.get("t") == "mk/man@1", "type")
    need(m.get("oid") == oid and m.get("epoch") == epoch and m.get("ver") == ver, "binding")
    need(uint(m["epoch"]) and uint(m["ver"]), "binding")
    need(uint(m.get("kind"), 0, 1), "kind")
    common = {"t", "oid", "epoch", "ver", "kind"}
    if m["kind"] == 1:
        form = set(m) - common - {"size", "bs", "lineage"}
        need(uint(m.get("size")) and m.get("bs") in BLOCK_SIZES and len(form) == 1, "file")
        form = form.pop()
        content, blocks = m[form], -(-m["size"] // m["bs"])
        need(type(content) is bytes, "content")
        if "lineage" in m:
            need(form != "inline" and blob(m["lineage"], 16) and m["lineage"] != oid, "lineage")
        if form == "inline":
            need(len(content) == m["size"] <= 16384, "inline")
        elif form == "refs":
            need(0 < blocks <= 4096 and len(content) == 64 * blocks, "refs")
        else:
            count = -(-blocks // 4096)
            need(form == "index" and 1 < count <= 4096 and len(content) == 64 * count, "index")
        return m
    need(uint(m.get("count")), "count")
    form = set(m) - common - {"count", "links", "root"}
    need(form in ({"entries"}, {"pages"}), "form")
    if "links" in m:
        links = m["links"]
        need(type(links) is list and len(links) == 4, "links")
        need(blob(links[0], 16) and uint(links[1]) and uint(links[2]), "links")
        need(blob(links[3], 64) and links[3] != HOLE, "links")
    if "root" in m:
        root = m["root"]
        need(type(root) is list and len(root) == 6 and uint(root[0], 0, 0o7777), "root")
        need(uint(root[1], 1 - 2**53) and uint(root[2], 0, 999_999_999), "root")
        need(uint(root[3], 1 - 2**53) and uint(root[4], 0, 999_999_999), "root")
        parse_extra(root[5], {"x"})
    if form == {"entries"}:
        m["entries"] = parse_entries(m["entries"])
        need(len(m["entries"]) == m["count"] <= 64, "count")
        return m
    pages = m["pages"]
    need(type(pages) is list and pages, "pages")
    for page in pages:
        need(type(page) is list and len(page) == 4, "page")
        need(uint(page[0]) and valid_name(page[1]) and uint(page[2], 1), "page")
        need(blob(page[3], 64) and page[3] != HOLE, "page")
    firsts, ids = [page[1] for page in pages], [page[0] for page in pages]
    need(firsts == sorted(set(firsts)) and len(set(ids)) == len(ids), "pages")
    need(sum(page[2] for page in pages) == m["count"], "count")
    return m


# -- walking a share -----------------------------------------------------------------------------------------


def load(get, ref, oid, epoch, ver):
    plaintext = fetch(get, ref, ["mk/man@1", oid, epoch, ver], b"MKE1\x01")
    return parse_manifest(plaintext, oid, epoch, ver)


def file_content(get, m):
    if "inline" in m:
        return m["inline"]
    oid, size, bs = m.get("lineage", m["oid"]), m["size"], m["bs"]
    refs = m.get("refs")
    if refs is None:
        blocks, refs = -(-size // bs), b""
        for i in range(len(m["index"]) // 64):
            ref, count = m["index"][64 * i : 64 * i + 64], min(4096, blocks - 4096 * i)
            if ref == HOLE:
                refs += HOLE * count
            else:
                refs += parse_index(fetch(get, ref, ["mk/idx@1", oid, 0, i]), count)
    out = bytearray(size)
    for i in range(len(refs) // 64):
        ref = refs[64 * i : 64 * i + 64]
        if ref != HOLE:
            plain = fetch(get, ref, ["mk/blk@1", oid, i])
            need(len(plain) <= bs, "block size")
            plain = plain[: min(bs, size - i * bs)]
            out[i * bs : i * bs + len(plain)] = plain
    return out


def entries_of(get, m):
    if "entries" in m:
        return m["entries"]
    out = []
    for page_id, first, count, ref in m["pages"]:
        page = parse_page(fetch(get, ref, ["mk/page@1", m["oid"], page_id]))
        need(len(page) == count and page[0]["name"] == first, "page")
        need(not out or out[-1]["name"] < first, "pages overlap")
        out += page
    return out


def walk(get, m, links, path):
    for entry in entries_of(get, m):
        here = path + entry["name"]
        if entry["kind"] == 3:
            need(entry["oid"] in links, "hard link to nothing")
            entry = links[entry["oid"]]
        if entry["kind"] == 2:
            yield here, "symlink", entry["extra"]["target"]
            continue
        child = load(get, entry["ref"], entry["oid"], entry["epoch"], entry["ver"])
        need(child["kind"] == entry["kind"] and "root" not in child and "links" not in child, "kind")
        if entry["kind"] == 1:
            need(child["size"] == entry["size"], "size")
            yield here, "file", file_content(get, child)
        else:
            yield here, "dir", None
            yield from walk(get, child, links, here + b"/")


def read_object(key, digest, oid, epoch, ver, get):
    """Yield what is under the object whose manifest has this digest and key (a root, or a snapshot)."""
    m = load(get, digest + key, oid, epoch, ver)
    if m["kind"] == 1:
        yield b"", "file", file_content(get, m)
        return
    links = {}
    if "links" in m:
        table_oid, table_epoch, table_ver, ref = m["links"]
        table = load(get, ref, table_oid, table_epoch, table_ver)
        need(table["kind"] == 0, "link table")
        for entry in entries_of(get, table):
            need(entry["name"] == entry["oid"].hex().encode() and entry["kind"] in (1, 2), "link table")
            links[entry["oid"]] = entry
    yield from walk(get, m, links, b"")


def read_share(owner_pub, ek, head_blob, get, writers=()):
    """Yield (path, kind, content) of the version that ``head_blob``, signed by owner or a writer, names."""
    head = verify(head_blob, "mk/head@1", [owner_pub, *writers])
    need(set(head) == {"t", "share", "oid", "epoch", "ver", "prev", "root", "ts"}, "head")
    label = b"mk/vk@1\0" + head["oid"] + struct.pack(">QQ", head["epoch"], head["ver"])
    key = HKDFExpand(hashes.SHA256(), 32, label).derive(ek)
    yield from read_object(key, head["root"], head["oid"], head["epoch"], head["ver"], get)


# -- signed records ------------------------------------------------------------------------------------------

P = 2**255 - 19
SMALL = {0, 1, P - 1}
SMALL |= {
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7,
}


def kid(public):
    return sha256(b"mk/kid@1\0" + public)[:16]


def item(major, data):
    n = len(data)
    if n < 24:
        return bytes((major | n,)) + data
    for code, width in ((24, 1), (25, 2), (26, 4)):
        if n < 1 << 8 * width:
            return bytes((major | code,)) + n.to_bytes(width, "big") + data
    raise FormatError("length")


def take_bytes(data):
    """Split a byte string off the front of CBOR ``data``."""
    need(data and 0x40 <= data[0] <= 0x5A, "cose")
    n, width = data[0] - 0x40, 0
    if n >= 24:
        width = 1 << n - 24
        n = int.from_bytes(data[1 : 1 + width], "big")
    value, rest = data[1 + width : 1 + width + n], data[1 + width + n :]
    need(len(value) == n and item(0x40, value) == data[: 1 + width + n], "cose")
    return value, rest


def verify(record, typ, publics):
    """Return the payload of a signed record of this type, signed by one of these public keys."""
    need(len(record) <= 1 << 20 and record[:1] == b"\x84", "cose")
    protected, rest = take_bytes(record[1:])
    need(rest[:1] == b"\xa0", "unprotected header")
    payload, rest = take_bytes(rest[1:])
    signature, rest = take_bytes(rest)
    need(not rest and len(signature) == 64, "cose")
    signer = protected[5:21]
    need(
        protected == b"\xa3\x01\x32\x04\x50" + signer + b"\x10" + item(0x60, typ.encode()), "protected header"
    )
    public = {kid(public): public for public in publics}.get(signer)
    need(public is not None, "signer")
    y = int.from_bytes(public, "little") & (2**255 - 1)
    need(len(public) == 32 and y < P and y not in SMALL, "key")
    signed = b"\x84\x6aSignature1" + item(0x40, protected) + b"\x40" + item(0x40, payload)
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
    except InvalidSignature as error:
        raise FormatError("signature") from error
    value = cbor(payload)
    need(type(value) is dict and value.get("t") == typ, "payload type")
    return value


def given_up(record, owner_pub):
    """Return the versions that a retention record gives up: [(first, last, time), ...]."""
    payload = verify(record, "mk/retention@1", [owner_pub])
    need(set(payload) == {"t", "share", "seq", "pruned", "iat"}, "retention")
    need(
        blob(payload["share"], 16) and uint(payload["seq"], 1) and uint(payload["iat"], 0, 2**40 - 1),
        "retention",
    )
    flat = payload["pruned"]
    need(type(flat) is list and len(flat) % 3 == 0 and len(flat) <= 30_000, "ranges")
    end, found = 0, []
    for first, last, when in zip(*[iter(flat)] * 3, strict=True):
        need(uint(first, end + 1) and uint(last, first) and uint(when, 0, 2**40 - 1), "range")
        found.append((first, last, when))
        end = last
    return found


def listed(record, typ, owner_pub):
    """Return what a vault record or a revocation list of this owner lists."""
    payload = verify(record, typ, [owner_pub])
    field, size = ("members", 32) if typ == "mk/vault@1" else ("tokens", 16)
    need(set(payload) == {"t", "id", "seq", "prev", "owner", "iat", "exp", field}, "list")
    need(payload["owner"] == owner_pub and blob(payload["id"], 16) and uint(payload["seq"], 1), "list")
    need(payload["prev"] == b"" if payload["seq"] == 1 else blob(payload["prev"], 32), "list")
    need(uint(payload["iat"], 0, 2**40) and uint(payload["exp"], payload["iat"] + 1, 2**40), "list")
    if typ == "mk/revocations@1":
        need(payload["id"] == sha256(b"mk/revocations@1\0" + owner_pub)[:16], "list")
    items = payload[field]
    need(type(items) is list and all(blob(i, size) for i in items) and len(set(items)) == len(items), "list")
    return items


def unverified(record):
    """Return what a signed record says, whoever signed it."""
    _, rest = take_bytes(record[1:])
    return cbor(take_bytes(rest[1:])[0])


def device_list(record, identity, root):
    """Return the devices, as (name, root key), of the list that belongs to this identity record."""
    newest = verify(identity, "mk/id@1", [root])
    payload = verify(record, "mk/devices@1", [newest["sig"]])
    need(set(payload) == {"t", "handle", "at", "seq", "made", "devices"}, "devices")
    need(payload["at"] == sha256(identity) and payload["seq"] == newest["seq"] >= 1, "devices")
    need(payload["handle"] == newest["handle"] and uint(payload["made"], 0, 2**40), "devices")
    found = []
    need(type(payload["devices"]) is list and 0 < len(payload["devices"]) <= 16, "devices")
    for device in payload["devices"]:
        need(set(device) == {"name", "record", "added", "by"}, "device")
        need(blob(device["by"], 16) and uint(device["added"], 0, 2**40), "device")
        need(re.fullmatch(r"[a-z0-9][a-z0-9._@-]{0,31}", device["name"]), "device")
        claimed = unverified(device["record"])["root"]
        need(verify(device["record"], "mk/id@1", [claimed])["seq"] == 0, "device")
        found.append((device["name"], claimed))
    need(len(dict(found)) == len({key for _, key in found}) == len(found), "devices")
    return found


def device_code(text):
    """Return (kid, the seed of the key that lets in) of a new device's code."""
    need(text.startswith("meshkit-device1:"), "code")
    raw = base64.urlsafe_b64decode(text[16:] + "==")
    need(len(raw) == 32, "code")
    # HKDF-Expand of one block.
    return raw[:16], hmac.new(raw[16:], b"mk/device-code@1" + raw[:16] + b"\x01", "sha256").digest()


def token(data):
    """Return (issuer, blocks) of a capability token, as maps, if its chain holds."""
    need(data[:5] == b"MKT1\x01" and len(data) > 37, "token")
    issuer, rest, blocks, signer, before = data[5:37], data[37:], [], data[5:37], b""
    gives = {
        "list": {"list"},
        "read": {"list", "read"},
        "write": {"list", "read", "write"},
        "reshare": {"reshare"},
    }
    allowed = set(gives)
    while rest:
        size = int.from_bytes(rest[:2], "big")
        record, rest = rest[2 : 2 + size], rest[2 + size :]
        need(len(record) == size <= 4096 and len(blocks) < 16, "token")
        b = verify(record, "mk/capability@1", [signer])
        need(set(b) == {"t", "id", "n", "prev", "name", "holder", "rights", "share", "iat", "exp"}, "block")
        need(
            type(b["n"]) is int and b["n"] == len(blocks) and b["prev"] == before and blob(b["id"], 16),
            "block",
        )
        need(
            blob(b["holder"], 32) and uint(b["iat"], 0, 2**40) and uint(b["exp"], b["iat"] + 1, 2**40),
            "block",
        )
        need(
            b["rights"] and b["rights"] == sorted(set(b["rights"])) and set(b["rights"]) <= set(gives),
            "rights",
        )
        need(b["share"] is None or blob(b["share"], 16), "block")
        now = set().union(*(gives[right] for right in b["rights"]))
        if blocks:
            last = blocks[-1]
            need((b["id"], b["name"]) == (last["id"], last["name"]), "block")
            need(now <= allowed and b["exp"] <= last["exp"], "wider")
            need(last["share"] is None or b["share"] == last["share"], "wider")
        blocks.append(b)
        allowed, signer, before = now, b["holder"], sha256(record)
    need(blocks, "token")
    return issuer, blocks


def xwing(seed):
    """Return (private key, public bytes) of a 32-byte X-Wing seed."""
    expanded = hashlib.shake_256(seed).digest(96)
    pq = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
    classic = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    public = pq.public_key().public_bytes_raw() + classic.public_key().public_bytes_raw()
    return MLKEM768X25519PrivateKey(pq, classic), public


def unwrap(private, sealed, info):
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    try:
        return suite.decrypt(sealed, private, info=info)
    except (InvalidTag, ValueError) as error:
        raise FormatError("wrap") from error


def expand(key, label):
    return HKDFExpand(hashes.SHA256(), 32, label).derive(key)


def open_capsule(seed, record, owner_pub, half=None):
    """Return (header, key) of a capsule, given the recipient's 32-byte X-Wing seed.

    ``half`` is what a release service gave, where the capsule holds only a half.
    """
    typ = next((typ for typ in ("mk/cap@3", "mk/cap@2") if typ.encode() in record[:40]), "mk/cap@1")
    payload = verify(record, typ, [owner_pub])
    need(set(payload) == {"t", "h", "w"} and len(payload["w"]) == 1168, "capsule")
    header = payload["h"]
    need(header["frm"] == kid(owner_pub) and (header["t"], header["v"]) == (typ, int(typ[-1])), "header")
    private, public = xwing(seed)
    need(header["to"] == kid(public), "recipient")
    held = unwrap(
        private, payload["w"], typ.encode() + b"\0" + sha256(dag_cbor.encode(header)) + header["to"]
    )
    need(("rel" in header) == (typ != "mk/cap@1"), "release")
    need(typ != "mk/cap@2" or header["rel"] is not None, "release")
    need(("keyvault" in header) == (typ == "mk/cap@3"), "key vault")
    if typ == "mk/cap@3":
        words = header["keyvault"]
        need(0 < len(words) <= 8 and words == sorted(set(words)), "demands of a key vault")
        need(all(type(word) is str and 0 < len(word.encode()) <= 64 for word in words), "a demand")
    key = whole(header, held, half) if header.get("rel") else held
    label = b"mk/kc@1\0" + header["oid"] + struct.pack(">QQ", header["epoch"], header["ver"])
    need(expand(key, label) == header["kc"], "key commitment")
    return header, key


def halves(seed, share, epoch):
    """Return (capsule half, release half) of an epoch's seed."""
    place = share + struct.pack(">Q", epoch)
    return expand(seed, b"mk/ch@1\0" + place), expand(seed, b"mk/rh@1\0" + place)


def joined(capsule_half, release_half, share, epoch):
    """Return the epoch key of two halves."""
    info = b"mk/ek@1\0" + share + struct.pack(">Q", epoch)
    return HKDF(hashes.SHA256(), 32, b"mk/ek@1", info).derive(capsule_half + release_half)


def whole(header, held, half):
    need(set(header["rel"]) == {"key", "part", "url"}, "release service")
    share, epoch = header["share"], header["epoch"]
    if header["rel"]["part"] == "whole":
        need(header["grant"] == "live", "a snapshot's seed")
        return joined(*halves(held, share, epoch), share, epoch)
    need(header["rel"]["part"] == "half" and half is not None and len(half) == 32, "the other half")
    if header["grant"] == "snapshot":
        return bytes(a ^ b for a, b in zip(held, half, strict=True))
    return joined(held, half, share, epoch)


def open_release(seed, record, service_pub, expected):
    """Return the half in a release service's answer; ``expected`` are fields that it must have."""
    payload = verify(record, "mk/release@1", [service_pub])
    names = {"t", "share", "capsule", "epoch", "to", "nonce", "iat", "exp", "half"}
    need(set(payload) == names and len(payload["half"]) == 1168, "release")
    need(uint(payload["iat"]) and payload["iat"] < payload["exp"] <= payload["iat"] + 3600, "times")
    need(all(payload[name] == value for name, value in expected.items()), "another answer")
    private, public = xwing(seed)
    need(payload["to"] == kid(public), "recipient")
    said = {name: value for name, value in payload.items() if name not in ("t", "half")}
    return unwrap(private, payload["half"], b"mk/release@1\0" + sha256(dag_cbor.encode(said)))


def open_deposit(seed, record, owner_pub):
    """Return (share, epoch, half) of what an owner left at a release service with this X-Wing seed."""
    payload = verify(record, "mk/half@1", [owner_pub])
    need(set(payload) == {"t", "share", "epoch", "to", "half"}, "deposit")
    private, public = xwing(seed)
    need(payload["to"] == kid(public), "recipient")
    info = b"mk/half@1\0" + payload["share"] + struct.pack(">Q", payload["epoch"]) + payload["to"]
    return payload["share"], payload["epoch"], unwrap(private, payload["half"], info)
