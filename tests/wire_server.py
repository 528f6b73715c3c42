"""A stand-in for the metadata service, over an embedded home, until the real one is there.

It speaks the wire of docs/service.md and checks signatures; it has no rules about who may see what.
"""

from __future__ import annotations

import json
import time
from urllib.parse import parse_qs

import trio
from http_server import Answer, HttpServer

from meshkitfs.core.identity_record import IdentityRecord
from meshkitfs.errors import MeshkitError
from meshkitfs.metadata import _wire as wire
from meshkitfs.net import verify_request

STATUS = {
    "invalid_argument": 400,
    "metadata_unauthorized": 401,
    "metadata_forbidden": 403,
    "head_conflict": 409,
    "identity_handle_taken": 409,
    "invalid_record": 422,
    "no_space": 507,
    "metadata_unavailable": 503,
}
PAGE = 3


class WireServer(HttpServer):
    """Serves ``home``, an EmbeddedMetadata. ``join`` is open, or (kind, secret)."""

    def __init__(self, home, join="open", clock=time.time, tls=None):
        self.home = home
        self.join, self.secret = (join, None) if join == "open" else join
        self.clock = clock
        self.nonces, self.codes = set(), set()
        self.answering = self.feeding = True
        self.mute = self.key_home = None
        self.polling = 0
        self.seen = {}
        super().__init__(self._answer, tls)

    async def _answer(self, request, stream):
        if not self.answering or (not self.feeding and request.path == "/v1/changes"):
            return None
        try:
            result = await self._do(request)
        except MeshkitError as error:
            body = {"error": {"code": error.code, "message": error.reason.sentence, "detail": error.detail}}
            return Answer(STATUS[error.code], json.dumps(body).encode())
        if self.mute and request.method == "POST" and request.path.startswith(self.mute):
            return None
        if result is None:
            return Answer(204)
        status = 200
        if isinstance(result, tuple):
            status, result = result
        return Answer(status, json.dumps(result).encode(), [("Content-Type", "application/json")])

    async def _signer(self, request, newcomer):
        keys = {}
        for kid in [newcomer.kid] if newcomer else []:
            keys[kid] = newcomer.sig
        text = request.header("signature-input") or ""
        kid = bytes.fromhex(text.partition('keyid="')[2][:32] or "00")
        for record in (await self.home.identity_by_kid(kid))[-1:]:
            keys[kid] = IdentityRecord.parse_self_signed(record).sig
        url = f"http://{request.header('host')}{request.target}"
        signed = verify_request(request.method, url, request.headers, request.body, keys.get)
        if signed.nonce in self.nonces:
            raise MeshkitError("metadata_unauthorized", "seen before")
        self.nonces.add(signed.nonce)
        return signed.kid

    async def _do(self, request):
        home, parts = self.home, request.path.strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(request.target.partition("?")[2]).items()}
        body = json.loads(request.body) if request.body else {}
        if parts == ["v1", "service"]:
            key = wire.b64(await (self.key_home or home).service_key())
            return {"service": "meshkitfs", "version": 1, "key": key, "time": self.clock(), "join": self.join, "limits": {}}  # fmt: skip
        newcomer = None
        if parts[1] == "identities" and request.method == "POST":
            record = wire.from_b64(body["record"], "record")
            newcomer = IdentityRecord.parse_self_signed(record)
        await self._signer(request, newcomer)
        match request.method, parts[1:]:
            case "GET", ["shares", share, "state"]:
                return wire.write_share_state(
                    await home.share_state(bytes.fromhex(share), bytes.fromhex(query["kid"]))
                )
            case "GET", ["shares", share, "capsules"]:
                found = await home.capsules(bytes.fromhex(share), bytes.fromhex(query["kid"]))
                return {"capsules": [wire.b64(blob) for blob in found]}
            case "GET", ["shares", share, "heads"]:
                found = await home.heads(bytes.fromhex(share), int(query["after"]), int(query["upto"]))
                return {"heads": [wire.b64(blob) for blob in found[:PAGE]], "more": len(found) > PAGE}
            case "GET", ["shares", share, "roster" | "timestamp" | "head" | "retention" as which]:
                return {"record": wire.b64(await getattr(home, which)(bytes.fromhex(share)))}
            case "PUT", ["shares", share, "retention"]:
                return await home.retain(bytes.fromhex(share), wire.from_b64(body["record"], "record"))
            case "POST", ["shares", share, "publications"]:
                return await home.publish(wire.read_publication(bytes.fromhex(share), body))
            case "POST", ["mailboxes", kid]:
                posted = await home.post_letter(bytes.fromhex(kid), wire.from_b64(body["letter"], "letter"))
                return 201, {"id": wire.b64(posted)}
            case "GET", ["mailboxes", kid]:
                found = await home.letters(bytes.fromhex(kid))
                if "after" in query:
                    ids = [letter_id.hex() for letter_id, _ in found]
                    found = found[ids.index(query["after"]) + 1 :]
                page = [{"id": wire.b64(i), "blob": wire.b64(blob)} for i, blob in found[:PAGE]]
                return {"letters": page, "more": len(found) > PAGE}
            case "DELETE", ["mailboxes", kid, letter]:
                return await home.delete_letter(bytes.fromhex(kid), bytes.fromhex(letter))
            case "POST", ["identities", handle]:
                if not await home.identity(handle):
                    shown = {
                        "open": self.secret,
                        "token": (request.header("authorization") or "").removeprefix("Bearer "),
                        "invite": request.header("meshkit-invitation"),
                    }[self.join]
                    if shown in self.codes:
                        self.codes.remove(shown)
                    elif shown != self.secret:
                        raise MeshkitError("metadata_unauthorized", "not invited")
                return await home.publish_identity(handle, record)
            case "GET", ["identities", handle]:
                return {"chain": [wire.b64(blob) for blob in await home.identity(handle)]}
            case "GET", ["identity-keys", kid]:
                return {"chain": [wire.b64(blob) for blob in await home.identity_by_kid(bytes.fromhex(kid))]}
            case "POST", ["invitations"]:
                self.codes.add(f"code{len(self.nonces)}")
                return 201, {
                    "code": f"code{len(self.nonces)}",
                    "expires": int(self.clock()) + body["expires_in"],
                }
            case "POST", ["changes"]:
                self.polling += 1
                try:
                    return await self._changes(body)
                finally:
                    self.polling -= 1
        raise MeshkitError("invalid_argument", request.path)

    async def _changes(self, body):
        shares = [wire.from_b64(share, "share") for share in body["shares"]]
        mailbox = wire.from_b64(body["mailbox"], "mailbox") if body["mailbox"] else None

        async def looks():
            kid = bytes(16)
            found = {
                share: hash((await home.roster(share), await home.head(share), await home.retention(share)))
                for share in shares
            }
            return found, len(await home.letters(mailbox or kid))

        home = self.home
        before = self.seen.get(body["after"]) if body["after"] else None
        with trio.move_on_after(body["wait"]):
            while True:
                now, letters = await looks()
                if before is not None:
                    changed = [share for share in shares if now[share] != before[0].get(share)]
                    mail = letters != before[1]
                    if changed or mail:
                        return self._news(now, letters, changed, mail)
                if not body["wait"] or not self.answering or not self.feeding:
                    break
                await trio.sleep(0.02)
        now, letters = await looks()
        return self._news(now, letters, [], False)

    def _news(self, now, letters, changed, mail):
        cursor = f"c{len(self.seen)}"
        self.seen[cursor] = (now, letters)
        return {"cursor": cursor, "shares": [wire.b64(share) for share in changed], "mailbox": mail}
