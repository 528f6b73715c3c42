"""Asking a policy decision point: everything but HTTP 200 with JSON true, in time and for this question, is a no.

The decision point is a real server on loopback that does what a test says (pdp.py).
"""

from __future__ import annotations

import json
import os
import time

import pytest
import trio
import trustme
from http_server import Answer, reset, unused_port
from pdp import JSON, Pdp

from meshkitfs.core.keys import SigningKey
from meshkitfs.errors import MeshkitError
from meshkitfs.net import SecretSource, Tls
from meshkitfs.policy import AuthZen, AuthZenOptions, Deciders, Demand, PolicyRequest
from meshkitfs.policy import authzen as module

PINNED = SigningKey.generate()
EVE = SigningKey.generate()


@pytest.fixture
def pdp():
    with Pdp(ttl=30) as pdp:
        yield pdp


@pytest.fixture
def signer():
    with Pdp(signing=PINNED) as pdp:
        yield pdp


def requests(*actions, **changes):
    fields = {
        "policy_id": "p1",
        "identity": "ab" * 16,
        "cid": None,
        "capsule_id": b"\5" * 16,
        "vault_id": None,
        "capability": None,
    } | changes
    return [PolicyRequest(action=action, **fields) for action in actions]


def ask(pdp, asked=None, *, key=None, url=None, now=None, provider=None, **options):
    """Ask once, over a connection of its own."""
    # A busy machine is not what is tested.
    options = {"timeout_s": 30} | options

    async def main():
        one = AuthZen(AuthZenOptions(pdp.url, **options)) if provider is None else provider
        try:
            demand = Demand("p1", key=key, url=url or pdp.url)
            return await one.decide(demand, asked or requests("list", "read"), now or int(time.time()))
        finally:
            if provider is None:
                await one.aclose()

    return trio.run(main)


def refused(*args, code="policy_provider_error", **options):
    with pytest.raises(MeshkitError) as caught:
        ask(*args, **options)
    assert caught.value.code == code
    return caught.value


# == honest answers ====================================================================================


def test_one_request_asks_about_every_action_by_meshkits_names(pdp):
    pdp.allow = {"list"}
    asked = requests("list", "read", cid="bafkrei", vault_id="crew", capability="token-1")
    answers = ask(pdp, asked)
    assert [(a.allow, a.ttl_seconds) for a in answers] == [(True, 30), (False, 30)]
    assert pdp.rounds == 1
    (body,) = pdp.seen
    nonce = body.pop("context")["nonce"]
    assert len(nonce) == 22
    assert body == {
        "subject": {"type": "identity", "id": "ab" * 16},
        "resource": {
            "type": "capsule",
            "id": "05" * 16,
            "properties": {
                "policyId": "p1",
                "capsuleId": "05" * 16,
                "cid": "bafkrei",
                "vaultId": "crew",
                "capability": "token-1",
            },
        },
        "evaluations": [{"action": {"name": "list"}}, {"action": {"name": "read"}}],
    }
    assert "rule of the test" in answers[0].reason
    ask(pdp, asked)
    assert pdp.seen[1]["context"]["nonce"] != nonce


def test_where_there_is_no_batch_each_action_is_a_request():
    with Pdp(batch=False, path="/tenant") as pdp:
        pdp.allow = {"read"}
        assert [a.allow for a in ask(pdp)] == [False, True]
        assert pdp.rounds == 2
        assert [a.allow for a in ask(pdp, requests("read"))] == [True]


def test_a_yes_without_an_end_says_so_and_one_of_a_year_is_cut(pdp):
    for ttl, meant in ((None, None), (0, None), (1, 1), (31_536_000, module.TTL_MAX_S)):
        pdp.ttl = ttl
        assert ask(pdp)[0].ttl_seconds == meant


def test_a_signed_yes_holds_until_its_own_end(signer):
    now = int(time.time())
    answer = ask(signer, key=PINNED.public, now=now)[1]
    assert answer.allow is True
    assert 0 < answer.ttl_seconds <= 61
    assert PINNED.kid.hex()[:16] in answer.reason
    signer.life = 31_536_000
    assert ask(signer, key=PINNED.public, now=now)[1].ttl_seconds <= module.TTL_MAX_S + 5
    signer.allow = {"list"}
    assert [a.allow for a in ask(signer, key=PINNED.public)] == [True, False]


def test_the_token_goes_along_and_nowhere_else(pdp, tmp_path):
    canary = f"canary-{os.urandom(8).hex()}"
    file = tmp_path / "token"
    file.write_text(canary)
    file.chmod(0o600)
    assert ask(pdp, token=SecretSource(file=file))[0].allow
    assert all(request.header("authorization") == f"Bearer {canary}" for request in pdp.requests)
    pdp.spoil = lambda request, answer: Answer(500, canary.encode())
    error = refused(pdp, token=SecretSource(file=file))
    assert "500" in error.detail
    file.chmod(0o644)
    assert refused(pdp, code="invalid_config", token=SecretSource(file=file))


def test_an_answer_is_used_as_long_as_it_allows_and_a_no_never(pdp):
    async def main():
        provider = AuthZen(AuthZenOptions(pdp.url, timeout_s=30))
        demand, now = Demand("p1", url=pdp.url), int(time.time())

        async def at(later, asked=None, about=demand):
            found = await provider.decide(about, asked or requests("list", "read"), now + later)
            return [(answer.allow, answer.ttl_seconds) for answer in found], pdp.rounds

        try:
            pdp.ttl = 40
            assert await at(0) == ([(True, 40)] * 2, 1)
            assert await at(29) == ([(True, 11)] * 2, 1)
            # In its last quarter a lease is renewed, and that needs a new answer.
            assert await at(30) == ([(True, 40)] * 2, 2)
            # A clock that was set back makes no answer younger.
            assert (await at(-5))[1] == 3
            for other in (requests("list"), requests("list", "read", capsule_id=b"\6" * 16)):
                before = pdp.rounds
                assert (await at(0, other))[1] == before + 1
            assert (await at(0, about=Demand("p2", url=pdp.url)))[1] == pdp.rounds
            pdp.allow = {"list"}
            before = pdp.rounds
            asked = requests("list", "read", vault_id="crew")
            assert (await at(0, asked))[1] == before + 1
            assert (await at(0, asked))[1] == before + 2
            pdp.allow, pdp.ttl = {"list", "read"}, None
            assert (await at(0, asked))[1] == before + 3
            assert (await at(0, asked))[1] == before + 4
        finally:
            await provider.aclose()

    trio.run(main)


# == answers that are none =============================================================================


def body(value):
    return lambda request, answer: Answer(200, value, JSON)


def decisions(*values):
    return body(json.dumps({"evaluations": list(values)}).encode())


def one_decision(value):
    return decisions({"decision": True}, value)


def headers(*lines):
    return lambda request, answer: Answer(answer.status, answer.body, list(lines))


def status(code, *lines):
    return lambda request, answer: Answer(code, answer.body, [*JSON, *lines])


async def silence(*_):
    await trio.sleep_forever()


NO_ANSWERS = {
    "HTTP 500": status(500),
    "HTTP 503": status(503),
    "HTTP 400": status(400),
    "HTTP 401": status(401),
    "HTTP 403": status(403),
    "HTTP 404": status(404),
    "HTTP 201": status(201),
    "HTTP 204": status(204),
    "a redirect that keeps the method": status(307, ("Location", "/access/v1/evaluations")),
    "a redirect": status(302, ("Location", "/access/v1/evaluation")),
    "the text true": one_decision({"decision": "true"}),
    "the number 1": one_decision({"decision": 1}),
    "the number 1.0": one_decision({"decision": 1.0}),
    "null": one_decision({"decision": None}),
    "a list": one_decision({"decision": [True]}),
    "an object": one_decision({"decision": {"decision": True}}),
    "nothing": one_decision({}),
    "another spelling": one_decision({"Decision": True}),
    "not an object": one_decision(True),
    "fewer decisions": decisions({"decision": True}),
    "more decisions": decisions(*[{"decision": True}] * 3),
    "decisions in no list": body(b'{"evaluations":{"decision":true}}'),
    "a single decision": body(b'{"decision":true}'),
    "an array": body(b'[{"decision":true},{"decision":true}]'),
    "true": body(b"true"),
    "nothing at all": body(b""),
    "not JSON": body(b"yes"),
    "cut off JSON": body(b'{"evaluations":[{"decision":true},{"decision":true}'),
    "two JSON values": body(b'{"evaluations":[{"decision":true},{"decision":true}]}{}'),
    "a field twice": body(b'{"evaluations":[{"decision":true},{"decision":false,"decision":true}]}'),
    "a field twice above": body(b'{"evaluations":[],"evaluations":[{"decision":true},{"decision":true}]}'),
    "NaN": body(b'{"evaluations":[{"decision":true},{"decision":true,"x":NaN}]}'),
    "not UTF-8": body(b'{"evaluations":[{"decision":true},{"decision":true,"x":"\xff"}]}'),
    "deep": body(b'{"evaluations":' + b"[" * 30000 + b"]" * 30000 + b"}"),
    "far too long": body(b'{"evaluations":[{"decision":true},{"decision":true}]' + b" " * 70000 + b"}"),
    "a context that is none": one_decision({"decision": True, "context": "ttl"}),
    "an end that is a text": one_decision({"decision": True, "context": {"ttl": "30"}}),
    "an end that is true": one_decision({"decision": True, "context": {"ttl": True}}),
    "an end before the beginning": one_decision({"decision": True, "context": {"ttl": -1}}),
    "a page": headers(("Content-Type", "text/html")),
    "no content type": headers(),
    "JSON of another kind": headers(("Content-Type", "application/problem+json")),
    "another request's id": headers(*JSON, ("X-Request-ID", "11111111-1111-1111-1111-111111111111")),
    "compressed": headers(*JSON, ("Content-Encoding", "gzip")),
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_what_is_no_answer_is_a_no(pdp, kind):
    assert [a.allow for a in ask(pdp)] == [True, True]
    pdp.spoil = NO_ANSWERS[kind]
    refused(pdp)
    pdp.spoil = None
    assert [a.allow for a in ask(pdp)] == [True, True]


def test_an_echoed_id_and_none_are_both_fine(pdp):
    """Not every decision point sends the id back, although the standard says it."""
    pdp.spoil = headers(("Content-Type", "application/json; charset=utf-8"))
    assert ask(pdp)[0].allow is True


def test_a_late_answer_is_a_no(pdp):
    pdp.spoil = silence
    error = refused(pdp, timeout_s=0.2)
    assert "within 0.2 s" in error.detail


def test_a_connection_that_breaks_and_nobody_there(pdp):
    async def broken(request, stream):
        reset(stream)

    pdp._server._handler = broken
    refused(pdp)

    class Nobody:
        url = f"http://127.0.0.1:{unused_port()}"

    refused(Nobody)


# == who it is =========================================================================================


def saying(**changes):
    def spoil(request, answer):
        about = json.loads(answer.body) | changes
        return Answer(200, json.dumps({k: v for k, v in about.items() if v is not ...}).encode(), JSON)

    return spoil


OTHERS = {
    "another decision point": saying(policy_decision_point="https://pdp.example"),
    "none": saying(policy_decision_point=...),
    "a text that is none": saying(policy_decision_point=1),
    "evaluations elsewhere": saying(access_evaluations_endpoint="http://127.0.0.1:1/access/v1/evaluations"),
    "one evaluation elsewhere": saying(access_evaluation_endpoint="https://eve.example/access/v1/evaluation"),
    "no place to ask": saying(access_evaluation_endpoint=...),
    "not found": lambda request, answer: Answer(404),
    "a redirect": lambda request, answer: Answer(302, b"", [("Location", "/elsewhere")]),
    "a page": lambda request, answer: Answer(200, answer.body, [("Content-Type", "text/html")]),
    "a field twice": lambda request, answer: Answer(
        200, answer.body.replace(b"{", b'{"policy_decision_point":"x",', 1), JSON
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_decision_point_that_is_another_one_is_not_asked(pdp, kind):
    pdp.discovery = OTHERS[kind]
    refused(pdp)
    assert pdp.rounds == 0


def test_only_the_address_in_the_grant_is_asked(pdp):
    error = refused(pdp, code="policy_provider_required", url="https://pdp.example")
    assert "https://pdp.example" in error.detail
    assert pdp.requests == []

    async def nobody(demand):
        await Deciders().decide(demand, requests("read"), 0)

    for demand in (Demand("p1"), Demand("p1", url=pdp.url), Demand("p1", key=PINNED.public)):
        with pytest.raises(MeshkitError) as caught:
            trio.run(nobody, demand)
        assert caught.value.code == "policy_provider_required"


def test_a_grant_that_names_no_address_trusts_nobodys_word(pdp):
    """Otherwise the recipient would choose who decides."""

    async def main():
        provider = AuthZen(AuthZenOptions(pdp.url))
        try:
            await provider.decide(Demand("p1"), requests("read"), 0)
        finally:
            await provider.aclose()

    with pytest.raises(MeshkitError) as caught:
        trio.run(main)
    assert caught.value.code == "policy_provider_required"
    assert pdp.requests == []


def test_plain_http_is_for_this_machine():
    with pytest.raises(MeshkitError) as caught:
        AuthZen(AuthZenOptions("http://pdp.example"))
    assert caught.value.code == "invalid_config"


def test_a_certificate_of_a_stranger_is_no_proof(tmp_path):
    ours, eves = trustme.CA(), trustme.CA()
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    eves.issue_cert("127.0.0.1").configure_cert(context)
    (tmp_path / "ca.pem").write_bytes(ours.cert_pem.bytes())
    (tmp_path / "eve.pem").write_bytes(eves.cert_pem.bytes())
    with Pdp(tls=context) as pdp:
        refused(pdp, tls=Tls(tmp_path / "ca.pem"))
        assert ask(pdp, tls=Tls(tmp_path / "eve.pem"))[0].allow is True


# == signed decisions ==================================================================================


def resigned(pdp, **changes):
    """An answer of which the second decision is signed with other fields."""

    def spoil(request, answer):
        asked = json.loads(request.body)
        actions = [item["action"]["name"] for item in asked["evaluations"]]
        value = [pdp.decide(asked, actions[0]), pdp.decide(asked, actions[1], **changes)]
        return Answer(200, json.dumps({"evaluations": value}).encode(), JSON)

    return spoil


# Times are in seconds from when the test runs: between collecting and running may lie many minutes.
FORGED = {
    "by somebody else": {"signer": EVE},
    "about something else": {"req": bytes(32)},
    "for another nonce": {"nonce": bytes(16)},
    "from the future": {"iat": 600, "exp": 900},
    "a no beside a yes": {"allow": False},
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_yes_that_is_not_signed_for_this_question_is_none(signer, kind):
    signer.spoil = resigned(signer)
    assert ask(signer, key=PINNED.public)[1].allow is True
    now = int(time.time())
    fields = {name: now + value if name in ("iat", "exp") else value for name, value in FORGED[kind].items()}
    signer.spoil = resigned(signer, **fields)
    refused(signer, key=PINNED.public)


def changed(change):
    def spoil(request, answer):
        value = json.loads(answer.body)
        change(value["evaluations"][1])
        return Answer(200, json.dumps(value).encode(), JSON)

    return spoil


def without(decision):
    del decision["context"]["signedDecision"]


def flipped(decision):
    text = decision["context"]["signedDecision"]
    decision["context"]["signedDecision"] = ("A" if text[-5] != "A" else "B").join((text[:-5], text[-4:]))


def other_spelling(decision):
    decision["context"]["signedDecision"] += "=="


def a_number(decision):
    decision["context"]["signedDecision"] = 1


@pytest.mark.parametrize("change", [without, flipped, other_spelling, a_number])
def test_a_signature_that_cannot_be_read_is_none(signer, change):
    signer.spoil = changed(change)
    refused(signer, key=PINNED.public)


def test_a_decision_is_good_once(signer):
    """What was signed for one question is kept and given again, and given for the action beside it."""
    kept = []

    def keep(request, answer):
        kept.append(answer)
        return answer

    signer.spoil = keep
    assert ask(signer, key=PINNED.public)[1].allow is True
    signer.spoil = lambda request, answer: Answer(200, kept[0].body, JSON)
    assert "another question" in refused(signer, key=PINNED.public).detail

    def swapped(request, answer):
        value = json.loads(answer.body)
        value["evaluations"].reverse()
        return Answer(200, json.dumps(value).encode(), JSON)

    signer.spoil = swapped
    assert "something else" in refused(signer, key=PINNED.public).detail


@pytest.mark.parametrize(
    "other",
    [
        {"policy_id": "p2"}, {"identity": "cd" * 16}, {"capsule_id": b"\6" * 16}, {"cid": "bafkrei"},
        {"vault_id": "crew"}, {"capability": "t"},
    ],
)  # fmt: skip
def test_every_field_is_in_what_is_signed(signer, other):
    """A decision point that answers about another grant, identity or policy than the one it was asked about."""
    names = {"policy_id": "policyId", "capsule_id": "capsuleId", "vault_id": "vaultId"}
    ((field, value),) = other.items()
    mine = requests("list", "read", **({"cid": "x"} if field != "cid" else {}))

    def spoil(request, answer):
        asked = json.loads(request.body)
        if field == "identity":
            asked["subject"]["id"] = value
        else:
            shown = value.hex() if isinstance(value, bytes) else value
            asked["resource"]["properties"][names.get(field, field)] = shown
        values = [signer.decide(asked, item["action"]["name"]) for item in asked["evaluations"]]
        return Answer(200, json.dumps({"evaluations": values}).encode(), JSON)

    signer.spoil = spoil
    assert "something else" in refused(signer, mine, key=PINNED.public).detail


def test_an_old_signed_yes_is_over(signer):
    """The nonce is right, and the end has been: the answer has no time left."""
    now = int(time.time())
    signer.spoil = resigned(signer, iat=now - 100, exp=now - 50)
    answer = ask(signer, key=PINNED.public)[1]
    assert answer.ttl_seconds <= 0
