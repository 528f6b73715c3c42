"""Blocks as objects of a bucket, at any server that speaks S3. A block's key is its CID, as with MeshKit.

Nothing is assumed of a server because of its name. A missing block is believed only when S3 says so
(``NoSuchKey``): a 404 page of a proxy, or a bucket that is gone, is "unknown". A stored block is believed
only when the answer has an ETag, as S3's do: a login page that answers everything with 200 stores nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import trio

from meshkitfs.core.blocks import MAX_SEALED, VerifiedBlock
from meshkitfs.core.cid import cid_text, digest_of, parse_cid
from meshkitfs.errors import MeshkitError
from meshkitfs.net import Endpoint, Reply
from meshkitfs.providers._api import Capabilities
from meshkitfs.providers._aws import Lookup, from_environment, from_file
from meshkitfs.providers._options import ENVIRONMENT, PATH, TEXT, URL, HttpOptions, choice, option, wrong
from meshkitfs.providers._remote import RemoteStore, each
from meshkitfs.providers._sigv4 import CONTENT_HASH, SigV4Auth, encode_path

__all__ = ["S3Options", "S3Store"]

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_HOST_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_PREFIX: Final = re.compile(r"([A-Za-z0-9!_*'()-][A-Za-z0-9!_.*'()-]*/?)+")
_REGION: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_PATH_STYLE, _HOST_STYLE = "path", "virtual-host"
# An answer of S3 is read here, refusal or not; too many requests, or trouble of its own, is tried again.
_ANSWERS: Final = frozenset(range(200, 500)) - {408, 429}
_ERROR_CAP: Final = 64 << 10
_LIST_CAP: Final = 4 << 20
_PAGE: Final = 1000  # S3's own bound, for a listing and for deleting many
# How long, after a proper answer of S3, a 404 without an explanation (to HEAD) is believed.
_BELIEVED_S: Final = 10.0
_NO_SPACE: Final = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "StorageFull"})
_WORDS: Final[Mapping[str, str]] = {
    "SignatureDoesNotMatch": "the secret access key is wrong, or the region is",
    "InvalidAccessKeyId": "this access key is not known there",
    "AccessDenied": "this access key may not do that (without the right to list, a missing block looks so)",
    "ExpiredToken": "the temporary credentials have expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much",
    "AuthorizationHeaderMalformed": "the region is wrong",
    "NoSuchBucket": "there is no such bucket; create it first",
    "BadDigest": "the bytes were changed on their way",
    "XAmzContentSHA256Mismatch": "the bytes were changed on their way",
}
_STATUS_WORDS: Final[Mapping[int, str]] = {
    400: "the request was not understood; the endpoint may want another region or style",
    401: "credentials are wanted",
    403: "the credentials are wrong, or this access key may not do that",
    404: "there is no such bucket, or this is not an S3 endpoint",
}


@dataclass(frozen=True, slots=True)
class S3Options(HttpOptions):
    """``{"type": "s3", "endpoint": URL, "bucket": NAME}`` and what else S3 servers differ in.

    The credentials are in environment variables, or in a file of the form that AWS tools use.
    """

    endpoint: str = option(URL)
    bucket: str = option(TEXT)
    region: str = option(TEXT, default="us-east-1")
    prefix: str = option(TEXT, default="")
    style: str = option(choice(_PATH_STYLE, _HOST_STYLE), default=_PATH_STYLE)
    access_key_id_env: str = option(ENVIRONMENT, default="AWS_ACCESS_KEY_ID")
    secret_access_key_env: str = option(ENVIRONMENT, default="AWS_SECRET_ACCESS_KEY")
    session_token_env: str = option(ENVIRONMENT, default="AWS_SESSION_TOKEN")
    credentials_file: Path | None = option(PATH, default=None)
    profile: str = option(TEXT, default="default")

    @classmethod
    def parse(cls, text: str, base: Path) -> S3Options:
        """``s3:https://HOST/BUCKET[/PREFIX]``, with the credentials of the environment."""
        parts = urlsplit(text)
        bucket, _, prefix = parts.path.strip("/").partition("/")
        if not parts.netloc or not bucket:
            raise MeshkitError("invalid_config", "the short form is s3:https://HOST/BUCKET[/PREFIX]")
        tail = f"?{parts.query}" if parts.query else ""
        fields = {"endpoint": f"{parts.scheme}://{parts.netloc}{tail}", "bucket": bucket}
        return cls.read({**fields, **({"prefix": prefix} if prefix else {})}, "provider", base)

    def addresses(self) -> dict[str, str]:
        return {"endpoint": self.endpoint}

    def check(self, where: str) -> None:
        HttpOptions.check(self, where)
        if not _BUCKET.fullmatch(self.bucket):
            wrong(f"{where}.bucket", "is not the name of a bucket")
        if self.style == _HOST_STYLE and not _HOST_BUCKET.fullmatch(self.bucket):
            wrong(f"{where}.bucket", "cannot be part of a host name; use 'style': 'path'")
        if self.prefix and not _PREFIX.fullmatch(self.prefix):
            wrong(f"{where}.prefix", "must be letters, digits, - and _, in parts divided by single '/'")
        if not _REGION.fullmatch(self.region):
            wrong(f"{where}.region", "is not the name of a region")

    def lookup(self) -> Lookup:
        """Return how to get the credentials of now. Raises invalid_config when there are none."""
        if self.credentials_file is not None:
            return from_file(self.credentials_file, self.profile)
        return from_environment(self.access_key_id_env, self.secret_access_key_env, self.session_token_env)

    async def open(self, *, create: bool) -> S3Store:
        """Open the bucket; it is never created. Asks the server only with ``create``."""
        store = S3Store(self)
        if create:
            try:
                await store.check()
            except BaseException:
                await store.aclose()
                raise
        return store


class S3Store(RemoteStore):
    """A bucket, or the part of it below a prefix."""

    def __init__(self, options: S3Options) -> None:
        prefix = options.prefix.rstrip("/")
        super().__init__(f"s3:{options.endpoint}/{options.bucket}" + (f"/{prefix}" if prefix else ""))
        self._options = options
        self._prefix = f"{prefix}/" if prefix else ""
        address, self._bucket_path = options.endpoint, f"/{options.bucket}"
        if options.style == _HOST_STYLE:
            scheme, _, rest = address.partition("://")
            address, self._bucket_path = f"{scheme}://{options.bucket}.{rest}", ""
        auth = SigV4Auth(options.lookup(), options.region)
        self._endpoint: Endpoint = options.endpoint_of(address, auth)
        self._believed_until = 0.0

    # -- one block -------------------------------------------------------------------------------------

    async def _read(self, digest: bytes) -> VerifiedBlock:
        reply = await self._ask("GET", self._key(digest), cap=MAX_SEALED)
        if reply.status == 200:
            block = VerifiedBlock.check(digest, reply.body)
            self._believe()
            return block
        if self._is_missing(reply):
            raise MeshkitError("block_unavailable", cid_text(digest))
        raise self._refused(reply)

    async def _write(self, digest: bytes, data: bytes) -> None:
        await self._store(self._key(digest), data, digest.hex())

    async def _measure(self, digest: bytes) -> int | None:
        reply = await self._ask("HEAD", self._key(digest))
        if reply.status == 200:
            self._must_be_s3(reply)
            length = reply.headers.get("content-length", "")
            # An empty object is no block, as an empty file is none.
            return int(length) or None if length.isdigit() else 1
        if reply.status != 404:
            raise self._refused(reply)
        if trio.current_time() >= self._believed_until:
            # No body says what is missing, the block or the bucket. Reading it does.
            reply = await self._ask("GET", self._key(digest), cap=MAX_SEALED)
            if reply.status == 200:
                return len(reply.body) or None
            if not self._is_missing(reply):
                raise self._refused(reply)
        return None

    async def _remove(self, digest: bytes) -> None:
        await self._delete(self._key(digest))

    # -- many ------------------------------------------------------------------------------------------

    async def delete_many(self, digests: Sequence[bytes]) -> None:
        """Delete with one request for many, where the server was seen to do so."""
        keys = [self._key(digest) for digest in digests]
        if len(keys) > 1 and self.capabilities.multi_delete is not False:
            for at in range(0, len(keys), _PAGE):
                if not await self._delete_page(keys[at : at + _PAGE]):
                    break
            else:
                if self.capabilities.multi_delete:
                    return
            # Not known yet whether it does what it says.
            left = await self.has_many(digests)
            self.capabilities = replace(self.capabilities, multi_delete=not left)
            keys = [self._key(digest) for digest in left]
        await each(self._delete, keys)

    async def digests(
        self, after: bytes = b"", foreign: Callable[[str], None] = lambda _: None
    ) -> AsyncIterator[bytes]:
        """Every block of the bucket, in the order of the keys, beginning behind ``after``.

        ``foreign`` is told the key of whatever is no block; it is left alone.
        """
        async for key in self._keys(cid_text(after) if after else ""):
            try:
                yield parse_cid(key)
            except MeshkitError:
                foreign(key)

    async def count(self) -> int:
        """How many objects there are, foreign ones included."""
        total = 0
        async for _ in self._keys(""):
            total += 1
        return total

    async def _keys(self, after: str) -> AsyncIterator[str]:
        """The keys below the prefix, without it, behind ``after``; one page at a time."""
        params = {"list-type": "2", "max-keys": str(_PAGE)}
        if self._prefix:
            params["prefix"] = self._prefix
        if after:
            params["start-after"] = self._prefix + after
        last = self._prefix + after
        while True:
            reply = await self._ask("GET", None, params=params, cap=_LIST_CAP)
            if reply.status != 200:
                raise self._refused(reply)
            page = _xml(reply, "ListBucketResult")
            for item in page.iterfind("{*}Contents"):
                key = item.findtext("{*}Key") or ""
                # A server that goes round in circles, or ignores what was asked, would keep us here for ever.
                if not key.startswith(self._prefix) or key <= last:
                    raise self._strange("a listing that is out of order")
                last = key
                yield key[len(self._prefix) :]
            if page.findtext("{*}IsTruncated") != "true":
                return
            token = page.findtext("{*}NextContinuationToken")
            if not token or token == params.get("continuation-token"):
                raise self._strange("a listing that does not go on")
            params.pop("start-after", None)
            params["continuation-token"] = token

    # -- the server ------------------------------------------------------------------------------------

    async def check(self) -> None:
        """See whether the bucket is there and may be used. Raises provider_http_error, saying why not."""
        reply = await self._ask("GET", self._key(digest_of(secrets.token_bytes(32))), cap=_ERROR_CAP)
        if not self._is_missing(reply):
            raise self._refused(reply) if reply.status >= 300 else self._strange("a block that cannot exist")

    async def probe(self) -> Capabilities:
        """Try what S3 servers differ in, with objects of random names that are deleted again."""
        keys = [f"{self._prefix}meshkitfs-probe.{secrets.token_hex(8)}" for _ in range(2)]
        try:
            for key in keys:
                await self._store(key, key.encode())
            reply = await self._put(keys[0], b"replaced", condition={"If-None-Match": "*"})
            kept = await self._ask("GET", keys[0], cap=_ERROR_CAP)
            # Both: that it says no, and that it has not done it all the same.
            conditional = reply.status == 412 and kept.body == keys[0].encode()
            done = await self._delete_page(keys)
            multi = done and all([(await self._ask("HEAD", key)).status == 404 for key in keys])
        finally:
            with trio.move_on_after(self._options.timeout_ms / 1000, shield=True):
                await each(self._delete, keys)
        listed = await self._ask("GET", None, params={"list-type": "2", "max-keys": "1"}, cap=_LIST_CAP)
        self.capabilities = Capabilities(conditional, multi, listed.status == 200)
        return self.capabilities

    async def aclose(self) -> None:
        """Close the connections."""
        await self._endpoint.aclose()

    def _key(self, digest: bytes) -> str:
        return self._prefix + cid_text(digest)

    async def _ask(
        self,
        method: str,
        key: str | None,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        cap: int = _ERROR_CAP,
    ) -> Reply:
        """Send a request about an object, or (None) the bucket. All that is sent here may be repeated."""
        path = f"{self._bucket_path}/{encode_path(key)}" if key is not None else self._bucket_path or "/"
        return await self._endpoint.request(
            method,
            path,
            params=params,
            headers=headers,
            content=content,
            # What a server says about a refusal is always let in.
            cap=max(cap, _ERROR_CAP),
            accept=_ANSWERS,
            idempotent=True,
        )

    async def _put(
        self, key: str, data: bytes, sha256: str | None = None, condition: Mapping[str, str] | None = None
    ) -> Reply:
        headers = {
            "Content-Type": "application/octet-stream",
            CONTENT_HASH: sha256 or digest_of(data).hex(),
            # Some servers do not look at the signed hash, but all look at this one.
            "Content-MD5": _md5(data),
            **(condition or {}),
        }
        return await self._ask("PUT", key, headers=headers, content=data)

    async def _store(self, key: str, data: bytes, sha256: str | None = None) -> None:
        reply = await self._put(key, data, sha256)
        if reply.status not in (200, 201, 204):
            raise self._refused(reply)
        self._must_be_s3(reply)

    async def _delete(self, key: str) -> None:
        reply = await self._ask("DELETE", key)
        if reply.status not in (200, 202, 204) and not self._is_missing(reply):
            raise self._refused(reply)

    async def _delete_page(self, keys: Sequence[str]) -> bool:
        """Ask to delete many at once; False if the server does not know that. Raises what it refuses."""
        objects = "".join(f"<Object><Key>{escape(key)}</Key></Object>" for key in keys)
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        body = f'<Delete xmlns="{space}"><Quiet>true</Quiet>{objects}</Delete>'.encode()
        headers = {"Content-Type": "application/xml", "Content-MD5": _md5(body)}
        try:
            reply = await self._ask(
                "POST", None, params={"delete": ""}, headers=headers, content=body, cap=_LIST_CAP
            )
        except MeshkitError as error:
            if error.code == "provider_http_error":  # 501: not implemented
                return False
            raise
        if reply.status != 200:
            if reply.status in (400, 404, 405):
                return False
            raise self._refused(reply)
        for item in _xml(reply, "DeleteResult").iterfind("{*}Error"):
            code = item.findtext("{*}Code") or ""
            if code != "NoSuchKey":
                raise self._failure(reply.status, code, item.findtext("{*}Message") or "")
        return True

    # -- what an answer means ----------------------------------------------------------------------------

    def _believe(self) -> None:
        self._believed_until = trio.current_time() + _BELIEVED_S

    def _must_be_s3(self, reply: Reply) -> None:
        if not reply.headers.get("etag"):
            raise self._strange("an answer without an ETag, so not S3's")
        self._believe()

    def _is_missing(self, reply: Reply) -> bool:
        """Whether S3 itself says that the object, and only that, is not there."""
        missing = reply.status == 404 and _code_of(reply)[0] == "NoSuchKey"
        if missing:
            self._believe()
        return missing

    def _refused(self, reply: Reply) -> MeshkitError:
        return self._failure(reply.status, *_code_of(reply))

    def _failure(self, status: int, code: str, message: str) -> MeshkitError:
        words = _WORDS.get(code) or _printable(message) or _STATUS_WORDS.get(status) or "no reason was given"
        detail = f"{self._endpoint.name}, bucket {self._options.bucket}: {words} (HTTP {status}"
        detail += f", {_printable(code)})" if code else ")"
        return MeshkitError(
            "no_space" if code in _NO_SPACE or status == 507 else "provider_http_error", detail
        )

    def _strange(self, what: str) -> MeshkitError:
        return MeshkitError("provider_request_failed", f"{self._endpoint.name} gave {what}")


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


def _xml(reply: Reply, root: str) -> ElementTree.Element:
    """Parse an answer, whose root must have that name. Raises provider_request_failed."""
    # S3 has no need of a document type, and entities are declared in one.
    if b"<!" not in reply.body:
        try:
            found = ElementTree.fromstring(reply.body)  # noqa: S314
        except (ElementTree.ParseError, ValueError, LookupError):
            found = None
        if found is not None and found.tag.rpartition("}")[2] == root:
            return found
    kind = reply.headers.get("content-type", "nothing said what")[:60]
    raise MeshkitError("provider_request_failed", f"the answer is not S3's {root} but {_printable(kind)}")


def _code_of(reply: Reply) -> tuple[str, str]:
    """Return S3's code and message of a refusal; empty ones if this is not S3's."""
    try:
        error = _xml(reply, "Error")
    except MeshkitError:
        return "", ""
    return error.findtext("{*}Code") or error.findtext("Code") or "", error.findtext("{*}Message") or ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()[:200]
