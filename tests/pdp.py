"""A policy decision point for tests: a real HTTP server that decides as it is told, honestly or not.

    with Pdp() as pdp:
        pdp.allow = {"list", "read"}                    # what it says yes to
        pdp.spoil = lambda request, answer: ...         # what becomes of an honest answer

``rounds`` counts the requests for decisions, ``seen`` keeps their bodies. With ``signing`` it signs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time

import cbor2
from http_server import Answer, HttpServer

from meshkitfs.core.decision import SignedDecision
from meshkitfs.core.keys import SigningKey

JSON = [("Content-Type", "application/json")]


def b64(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def question(body, action):
    """The hash of what is asked, made from what came over the wire as docs/format.md says it."""
    properties = body["resource"]["properties"]
    fields = {
        "t": "mk/question@1",
        "policy": properties["policyId"],
        "identity": body["subject"]["id"],
        "action": action,
        "cid": properties.get("cid"),
        "capsule": bytes.fromhex(properties["capsuleId"]),
        "vault": properties.get("vaultId"),
        "capability": properties.get("capability"),
    }
    return hashlib.sha256(cbor2.dumps(fields, canonical=True)).digest()


class Pdp:
    """``ttl`` is what it says of how long a decision holds (None: nothing); ``batch`` whether it takes many."""

    def __init__(self, *, signing=None, ttl=None, tls=None, batch=True, path=""):
        self.allow = {"list", "read", "write", "reshare"}
        self.signing, self.ttl, self.batch, self.path = signing, ttl, batch, path
        self.spoil = None  # (request, answer) -> what goes out
        self.discovery = None  # the same for what it says of itself
        self.rule = "rule of the test"
        self.life = 60  # seconds that a signed decision holds
        self.rounds, self.seen, self.requests = 0, [], []
        self._server = HttpServer(self._handle, tls)

    @property
    def url(self):
        return self._server.url + self.path

    @staticmethod
    def key():
        return SigningKey.generate()

    async def _handle(self, request, stream):
        self.requests.append(request)
        if request.path == "/.well-known/authzen-configuration" + self.path:
            about = {
                "policy_decision_point": self.url,
                "access_evaluation_endpoint": f"{self.url}/access/v1/evaluation",
            }
            if self.batch:
                about["access_evaluations_endpoint"] = f"{self.url}/access/v1/evaluations"
            answer = Answer(200, json.dumps(about).encode(), JSON)
            return self.discovery(request, answer) if self.discovery else answer
        if request.method != "POST" or not request.path.startswith(f"{self.path}/access/v1/evaluation"):
            return Answer(404)
        body = json.loads(request.body)
        self.rounds += 1
        self.seen.append(body)
        if request.path.endswith("s"):
            value = {"evaluations": [self.decide(body, e["action"]["name"]) for e in body["evaluations"]]}
        else:
            value = self.decide(body, body["action"]["name"])
        headers = [*JSON, ("X-Request-ID", request.header("x-request-id"))]
        answer = Answer(200, json.dumps(value).encode(), headers)
        if self.spoil is None:
            return answer
        spoiled = self.spoil(request, answer)
        return await spoiled if hasattr(spoiled, "__await__") else spoiled

    def decide(self, body, action, **changes):
        """One decision; ``changes`` are for the signed record."""
        allow = action in self.allow
        context = {"rule": self.rule}
        if self.ttl is not None:
            context["ttl"] = self.ttl
        if self.signing is not None:
            context["signedDecision"] = self.signed(body, action, **({"allow": allow} | changes))
        return {"decision": allow, "context": context}

    def signed(self, body, action, **changes):
        now = int(time.time())
        nonce = body["context"]["nonce"]
        fields = {
            "req": question(body, action),
            "nonce": base64.urlsafe_b64decode(nonce + "=" * (-len(nonce) % 4)),
            "allow": True,
            "iat": now,
            "exp": now + self.life,
        }
        signer = changes.pop("signer", self.signing)
        return b64(SignedDecision(**(fields | changes)).sign(signer))

    def close(self):
        self._server.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
